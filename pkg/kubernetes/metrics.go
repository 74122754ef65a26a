package kubernetes

import (
	"github.com/prometheus/client_golang/prometheus"
)

// How a PodCertificateRequest ends.
const (
	outcomeIssued = "issued"
	outcomeDenied = "denied"
	outcomeFailed = "failed"
	outcomeLost   = "lost" // issued, but another CA's answer was there first
	outcomeGone   = "gone"
)

// podMetrics are what is counted of PodCertificateRequest objects.
type podMetrics struct {
	requests *prometheus.CounterVec
	duration prometheus.Histogram
}

// newPodMetrics registers the metrics of one cluster; reg may be nil.
func newPodMetrics(cluster string, reg prometheus.Registerer, pending func() int) (*podMetrics, error) {
	m := &podMetrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_pod_certificate_requests_total",
			Help: "PodCertificateRequests by what became of them: issued, denied, failed; lost if another CA's answer was there when this one's was signed, gone if nothing had to be signed any more.",
		}, []string{"outcome"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_pod_certificate_duration_seconds",
			Help:                        "Time from when a PodCertificateRequest was heard of to its answer.",
			Buckets:                     []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
	}
	for _, outcome := range []string{outcomeIssued, outcomeDenied, outcomeFailed, outcomeLost, outcomeGone} {
		m.requests.WithLabelValues(outcome)
	}
	if reg == nil {
		return m, nil
	}
	reg = prometheus.WrapRegistererWith(prometheus.Labels{"cluster": cluster}, reg)
	for _, c := range []prometheus.Collector{m.requests, m.duration, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "meshid_ca_pod_certificate_requests_pending", Help: "PodCertificateRequests that have no answer yet.",
	}, func() float64 { return float64(pending()) })} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
