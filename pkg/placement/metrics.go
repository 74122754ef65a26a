package placement

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/server"
)

// verdictNames are the values of the label "verdict".
var verdictNames = map[server.PlacementVerdict]string{
	server.PlacementUnknown:  "unknown",
	server.PlacementRefuted:  "refuted",
	server.PlacementVerified: "verified",
	server.PlacementClaimed:  "claimed",
}

// metrics are what a placement counts.
type metrics struct {
	verdicts map[server.PlacementVerdict]prometheus.Counter
	duration prometheus.Histogram
}

// newMetrics registers the metrics of one placement; reg may be nil.
func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	verdicts := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_placement_total",
		Help: "Workloads of Kubernetes by whether they run where their agent says: verified by the cluster, claimed by the agent and believed, refuted, or unknown for now.",
	}, []string{"verdict"})
	m := &metrics{
		verdicts: map[server.PlacementVerdict]prometheus.Counter{},
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_placement_duration_seconds",
			Help:                        "How long it took to place the workloads of a request, with waiting for pods that the cluster had not told of yet.",
			Buckets:                     prometheus.ExponentialBuckets(0.000_01, 4, 10), // 10 µs to 2.6 s
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
	}
	for verdict, name := range verdictNames {
		m.verdicts[verdict] = verdicts.WithLabelValues(name)
	}
	if reg == nil {
		return m, nil
	}
	return m, errors.Join(reg.Register(verdicts), reg.Register(m.duration))
}
