package store

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/ledger/search"
)

const (
	// fanOutLeast and fanOutPeers are what a node must have, and how many others
	// there must be, for search.IdentityFanOut.
	fanOutLeast = 10
	fanOutPeers = 5

	// reasonClone is the reason of the refusal of an agent with an X.509-SVID that
	// it had replaced, as pkg/server records it.
	reasonClone = "cloned_agent"
)

const (
	// gaugeInterval is how long a count of the inventory is good for.
	gaugeInterval = 10 * time.Second
	// gaugeTimeout bounds the counting.
	gaugeTimeout = 2 * time.Second
)

// expiryBuckets are the values of the label "bucket", each with all that expire
// within that time.
var expiryBuckets = []struct {
	name string
	time.Duration
}{{"10m", 10 * time.Minute}, {"30m", 30 * time.Minute}, {"1h", time.Hour}, {"6h", 6 * time.Hour}, {"24h", 24 * time.Hour}}

// Inventory counts X.509-SVIDs of workloads and agents.
type Inventory struct {
	// Active are valid and in use: not replaced, dropped or withdrawn.
	Active uint64
	// Expiring are those of them that expire within each of the buckets.
	Expiring []uint64
	// Overdue are those of them that should have been replaced by now.
	Overdue uint64
}

// Inventory counts at now. It reads one index, as far as X.509-SVIDs are valid.
func (r *Records) Inventory(ctx context.Context, now time.Time) (Inventory, error) {
	i := Inventory{Expiring: make([]uint64, len(expiryBuckets))}
	at := toStored(now)
	count := r.db.dialect.rebind(`SELECT count(*) FROM certificates WHERE state = ?1 AND not_after > ?2 AND not_after <= ?3`)
	from := at
	var below uint64
	for b, bucket := range expiryBuckets {
		to := toStored(now.Add(bucket.Duration))
		var n uint64
		if err := r.db.reader.QueryRowContext(ctx, count, int(search.Current), from, to).Scan(&n); err != nil {
			return i, err
		}
		below += n
		i.Expiring[b], from = below, to
	}
	var later uint64
	if err := r.db.reader.QueryRowContext(ctx, count, int(search.Current), from, toStored(now.Add(10*365*24*time.Hour))).Scan(&later); err != nil {
		return i, err
	}
	i.Active = below + later
	err := r.db.reader.QueryRowContext(ctx, r.db.dialect.rebind(
		`SELECT count(*) FROM certificates WHERE overdue_at > ?1 AND overdue_at <= ?2 AND not_after > ?2`),
		toStored(now.Add(-search.MaxLife)), at).Scan(&i.Overdue)
	return i, err
}

// recordMetrics are what Records exposes.
type recordMetrics struct {
	r                                    *Records
	anomalies, active, expiring, overdue *prometheus.Desc
}

// newRecordMetrics registers the metrics of r; reg may be nil.
func newRecordMetrics(reg prometheus.Registerer, r *Records) (*recordMetrics, error) {
	m := &recordMetrics{
		r: r,
		anomalies: prometheus.NewDesc("meshid_ca_anomalies_total",
			"Records of the ledger that are unusual by a rule, since the search index was begun; it outlives restarts.", []string{"rule"}, nil),
		active: prometheus.NewDesc("meshid_ca_active_svids",
			"X.509-SVIDs that are valid and in use: not replaced, dropped or withdrawn.", nil, nil),
		expiring: prometheus.NewDesc("meshid_ca_svid_expiring",
			"X.509-SVIDs in use that expire within this time.", []string{"bucket"}, nil),
		overdue: prometheus.NewDesc("meshid_ca_svid_overdue_renewal",
			"X.509-SVIDs in use and valid that should have been renewed by now.", nil, nil),
	}
	if reg == nil {
		return m, nil
	}
	return m, reg.Register(m)
}

// Describe implements prometheus.Collector.
func (m *recordMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.anomalies
	ch <- m.active
	ch <- m.expiring
	ch <- m.overdue
}

// Collect implements prometheus.Collector. If the inventory cannot be counted, the
// gauges are as they were.
func (m *recordMetrics) Collect(ch chan<- prometheus.Metric) {
	for rule := range search.Anomaly(search.Rules) {
		ch <- prometheus.MustNewConstMetric(m.anomalies, prometheus.CounterValue, float64(m.r.counts[rule].Load()), rule.String())
	}
	i := m.r.counted(time.Now())
	ch <- prometheus.MustNewConstMetric(m.active, prometheus.GaugeValue, float64(i.Active))
	ch <- prometheus.MustNewConstMetric(m.overdue, prometheus.GaugeValue, float64(i.Overdue))
	for b, bucket := range expiryBuckets {
		ch <- prometheus.MustNewConstMetric(m.expiring, prometheus.GaugeValue, float64(i.Expiring[b]), bucket.name)
	}
}

// counted returns the inventory of at most gaugeInterval ago.
func (r *Records) counted(now time.Time) Inventory {
	r.gauges.Lock()
	defer r.gauges.Unlock()
	if now.Sub(r.gauges.at) < gaugeInterval {
		return r.gauges.counts
	}
	ctx, cancel := context.WithTimeout(context.Background(), gaugeTimeout) // a scrape has no context
	defer cancel()
	i, err := r.Inventory(ctx, now)
	if err != nil {
		r.log.WarnContext(ctx, "inventory cannot be counted", "err", err)
	} else {
		r.gauges.counts = i
	}
	if r.gauges.counts.Expiring == nil {
		r.gauges.counts.Expiring = make([]uint64, len(expiryBuckets))
	}
	r.gauges.at = now
	return r.gauges.counts
}
