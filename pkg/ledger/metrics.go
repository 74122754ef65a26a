package ledger

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Reasons for which records could not be written: the values of the label
// "reason".
const (
	reasonFull  = "full"  // no space; the journal goes on when there is some
	reasonWrite = "write" // a write was refused; final
	reasonSync  = "sync"  // an fsync was refused; final
)

// metrics are what a journal counts.
type metrics struct {
	records  prometheus.Counter
	sync     prometheus.Histogram
	batch    prometheus.Histogram
	failures *prometheus.CounterVec
	writable prometheus.Gauge
	bytes    prometheus.Gauge
	segments prometheus.Gauge
	size     prometheus.Gauge
	queue    prometheus.GaugeFunc
}

// newMetrics registers the metrics of one journal; reg may be nil. queued is how
// many requests wait.
func newMetrics(reg prometheus.Registerer, queued func() float64) (*metrics, error) {
	m := &metrics{
		records: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_records_total",
			Help: "Records made durable since the start.",
		}),
		sync: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_ledger_fsync_duration_seconds",
			Help:                        "How long the disk took to make a batch of records durable.",
			Buckets:                     prometheus.ExponentialBuckets(0.000_05, 2, 18), // 50 µs to 6.5 s
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_ledger_batch_records",
			Help:                        "Records that shared one fsync.",
			Buckets:                     prometheus.ExponentialBuckets(1, 2, 12),
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_failures_total",
			Help: "Batches that could not be recorded, so that nothing was released: full (no space, resumes by itself), write or sync (final).",
		}, []string{"reason"}),
		writable: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_ledger_writable",
			Help: "1 if the last batch could be recorded, 0 if not: then nothing is issued.",
		}),
		bytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_ledger_size_bytes",
			Help: "Bytes in the journal's segments, without space reserved in advance.",
		}),
		segments: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_ledger_segments",
			Help: "Number of the journal's segments.",
		}),
		size: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_ca_ledger_records",
			Help: "Records in the journal; the next one gets this index.",
		}),
		queue: prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "meshid_ca_ledger_queue_requests",
			Help: "Requests that wait for their records to be written: the next batch.",
		}, queued),
	}
	for _, r := range []string{reasonFull, reasonWrite, reasonSync} {
		m.failures.WithLabelValues(r)
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.records, m.sync, m.batch, m.failures, m.writable, m.bytes, m.segments, m.size, m.queue} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}
