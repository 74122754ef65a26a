package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/attest"
)

// outcome is a closed set.
type outcome string

const (
	succeeded outcome = "success"
	refused   outcome = "refused" // somebody decided so
	failed    outcome = "error"   // nobody could decide
	invalid   outcome = "invalid" // what came back was not what was asked for
)

var outcomes = []outcome{succeeded, refused, failed, invalid}

// kindAgent counts the agent's own X.509-SVID beside the kinds of cache.Kind.
const kindAgent = "agent"

// What becomes of an X.509-SVID that a proxy refuses.
const (
	rejectionReissued = "reissued"
	rejectionKept     = "kept"
)

type metrics struct {
	renewals     *prometheus.CounterVec
	lag          prometheus.Histogram
	first        prometheus.Histogram
	attestations *prometheus.CounterVec // of workloads
	attesting    *prometheus.HistogramVec
	calls        prometheus.Histogram   // to the CA, to have X.509-SVIDs issued
	rejections   *prometheus.CounterVec // by proxies
	nodes        *prometheus.CounterVec // of this node
	keys         prometheus.Histogram
	connects     *prometheus.CounterVec
	skipped      prometheus.Gauge
	saved        *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, workloads []attest.WorkloadAttestor) (*metrics, error) {
	m := &metrics{
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_renewals_total",
			Help: "X.509-SVIDs asked of the CA, by why and by what became of it.",
		}, []string{"kind", "outcome"}),
		lag: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_agent_renewal_lag_seconds",
			Help:                        "From the moment an X.509-SVID was to be had until it was in hand.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, 1, 5, 30, 300, 3600},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		first: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_agent_first_svid_seconds",
			Help:                        "From a stream's opening until its first X.509-SVID was published to it.",
			Buckets:                     []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5, 30},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		attestations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_workload_attestations_total",
			Help: "Questions about processes to workload attestors; not_mine is an answer too.",
		}, []string{"method", "outcome"}),
		attesting: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                        "meshid_agent_workload_attestation_seconds",
			Help:                        "Time of a workload attestor for one process, with what it waits for.",
			Buckets:                     []float64{.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}, []string{"method"}),
		calls: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_agent_issue_seconds",
			Help:                        "Time of one call that has the CA issue X.509-SVIDs, as it is seen here.",
			Buckets:                     []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1, 5, 30},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		nodes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_node_attestations_total",
			Help: "Attempts to attest this node.",
		}, []string{"outcome"}),
		keys: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_agent_key_generate_seconds",
			Help:                        "Time to make one key and its CSR.",
			Buckets:                     []float64{.00005, .0001, .00025, .0005, .001, .0025, .01, .1},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		connects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_ca_sessions_total",
			Help: "Sessions with the CA that ended, by outcome: success means that the agent ended it.",
		}, []string{"outcome"}),
		skipped: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_agent_entries_skipped",
			Help: "Entries in force at the CA that this agent cannot compile.",
		}),
		rejections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_rejected_svids_total",
			Help: "X.509-SVIDs that a proxy refused: reissued with a new key, or kept because that was done before.",
		}, []string{"outcome"}),
		saved: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_sealed_cache_writes_total",
			Help: "Writes of the sealed cache.",
		}, []string{"outcome"}),
	}
	for _, kind := range []string{cache.First.String(), cache.Renewal.String(), cache.Rotation.String(), kindAgent} {
		for _, o := range outcomes {
			m.renewals.WithLabelValues(kind, string(o))
		}
	}
	for _, w := range workloads {
		m.attesting.WithLabelValues(w.Name())
		for _, o := range []string{string(succeeded), string(failed), "not_mine"} {
			m.attestations.WithLabelValues(w.Name(), o)
		}
	}
	for _, o := range []string{rejectionReissued, rejectionKept} {
		m.rejections.WithLabelValues(o)
	}
	for _, o := range outcomes {
		m.nodes.WithLabelValues(string(o))
	}
	for _, o := range []outcome{succeeded, failed} {
		m.connects.WithLabelValues(string(o))
		m.saved.WithLabelValues(string(o))
	}
	for _, c := range []prometheus.Collector{
		m.renewals, m.lag, m.first, m.attestations, m.attesting, m.calls, m.nodes, m.keys, m.connects, m.skipped, m.saved, m.rejections,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// collector shows the state of an agent when it is asked for.
type collector struct{ agent *Agent }

var (
	descSVIDs     = prometheus.NewDesc("meshid_agent_cache_svids", "X.509-SVIDs at hand.", nil, nil)
	descIdents    = prometheus.NewDesc("meshid_agent_cache_identities", "Identities of the workload instances that are present.", nil, nil)
	descInstances = prometheus.NewDesc("meshid_agent_instances", "Workload instances that are present.", nil, nil)
	descStreams   = prometheus.NewDesc("meshid_agent_streams", "Open streams of workloads and proxies.", nil, nil)
	descNotAfter  = prometheus.NewDesc("meshid_agent_svid_min_not_after_timestamp_seconds",
		"When the first X.509-SVID expires; 0 if there is none.", nil, nil)
	descStale = prometheus.NewDesc("meshid_agent_serving_stale_svids",
		"X.509-SVIDs at hand whose renewal is overdue.", nil, nil)
	descUnreachable = prometheus.NewDesc("meshid_agent_ca_unreachable_seconds",
		"How long there has been no session with the CA; 0 while there is one.", nil, nil)
	descRevision = prometheus.NewDesc("meshid_agent_revision", "Revision of the entries in force.", nil, nil)
	descSkew     = prometheus.NewDesc("meshid_agent_clock_skew_seconds",
		"How far this machine's clock is ahead of the CA's; 0 while it is not known.", nil, nil)
	descBundle = prometheus.NewDesc("meshid_agent_bundle_sequence", "Sequence of the trust bundle in force.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descSVIDs, descIdents, descInstances, descStreams, descNotAfter, descStale, descUnreachable, descRevision, descBundle, descSkew,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	a := c.agent
	now := time.Now()
	a.mu.Lock()
	stats := a.cache.Stats(now)
	streams, revision := len(a.streams), a.revision
	var sequence uint64
	if a.bundle != nil {
		sequence = a.bundle.Sequence
	}
	ahead := a.skew.by
	unreachable := time.Duration(0)
	if a.session == nil {
		unreachable = now.Sub(a.since)
	}
	a.mu.Unlock()
	notAfter := 0.0
	if !stats.MinNotAfter.IsZero() {
		notAfter = float64(stats.MinNotAfter.Unix())
	}
	for _, g := range []struct {
		desc  *prometheus.Desc
		value float64
	}{
		{descSVIDs, float64(stats.SVIDs)},
		{descIdents, float64(stats.Identities)},
		{descInstances, float64(stats.Instances)},
		{descStreams, float64(streams)},
		{descNotAfter, notAfter},
		{descStale, float64(stats.Overdue)},
		{descUnreachable, unreachable.Seconds()},
		{descRevision, float64(revision)},
		{descBundle, float64(sequence)},
		{descSkew, ahead.Seconds()},
	} {
		ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, g.value)
	}
}
