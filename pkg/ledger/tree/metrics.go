package tree

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Results of asking a witness: the values of the label "result".
const (
	resultCosigned = "cosigned"
	resultFailed   = "failed"  // not reached, or an answer of no use
	resultRefused  = "refused" // it has seen another tree
)

// metrics are what a tree counts.
type metrics struct {
	checkpoints prometheus.Counter
	failures    prometheus.Counter
	publish     prometheus.Histogram
	witness     *prometheus.CounterVec
}

// newMetrics registers the metrics of one tree; reg may be nil.
func newMetrics(reg prometheus.Registerer, t *Tree) (*metrics, error) {
	m := &metrics{
		checkpoints: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_tree_checkpoints_total",
			Help: "Checkpoints published since the start.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_tree_failures_total",
			Help: "Attempts to publish a checkpoint that failed; they are repeated, unless the tree disagrees with its journal.",
		}),
		publish: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "meshid_ca_ledger_tree_publish_duration_seconds",
			Help:    "How long it took to write and sign a checkpoint, without witnesses.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14), // 1 ms to 8 s
		}),
		witness: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_witness_requests_total",
			Help: "Requests to witnesses: cosigned, failed (repeated), refused (the witness has seen another tree: nothing more is signed).",
		}, []string{"result"}),
	}
	for _, r := range []string{resultCosigned, resultFailed, resultRefused} {
		m.witness.WithLabelValues(r)
	}
	if reg == nil {
		return m, nil
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	now := func() float64 { return float64(time.Now().UnixMilli()) / 1000 }
	var errs []error
	for _, c := range []prometheus.Collector{
		m.checkpoints, m.failures, m.publish, m.witness,
		gauge("meshid_ca_ledger_tree_size", "Records that the published checkpoint covers.",
			func() float64 { return float64(t.Checkpoint().Size) }),
		gauge("meshid_ca_ledger_tree_checkpoint_timestamp_seconds", "Up to when the published checkpoint covers the journal: now, if no record waits for one.",
			func() float64 { return now() - t.behind(time.Now()).Seconds() }),
		gauge("meshid_ca_ledger_tree_unwitnessed_seconds", "For how long records have been waiting for the cosignatures of the witnesses; 0 without witnesses.",
			func() float64 { return t.unwitnessed(time.Now()).Seconds() }),
		gauge("meshid_ca_ledger_tree_halted", "1 if the tree disagrees with its journal or a witness: nothing is signed any more, and somebody must find out why.",
			func() float64 {
				if t.Halted() != nil {
					return 1
				}
				return 0
			}),
	} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}
