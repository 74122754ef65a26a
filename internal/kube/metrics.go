package kube

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// outcomes are what becomes of a call: the values of the label "outcome".
var outcomes = []struct {
	kind error
	name string
}{
	{nil, "ok"},
	{ErrDenied, "denied"},
	{ErrNotFound, "not_found"},
	{ErrExists, "exists"},
	{ErrConflict, "conflict"},
	{ErrInvalid, "invalid"},
	{ErrLimited, "limited"},
	{ErrUnavailable, "unavailable"},
}

// Outcomes of a TokenReview.
const (
	reviewAccepted = "accepted"
	reviewRefused  = "refused" // the cluster, or what it says, speaks against the token
	reviewError    = "error"   // nobody knows
)

// metrics are what the clients of a cluster count, all together.
type metrics struct {
	calls     *prometheus.CounterVec
	reviews   *prometheus.CounterVec
	reviewing prometheus.Histogram
}

// ofCluster has the metrics of a cluster say which one it is.
func ofCluster(cluster string, reg prometheus.Registerer) prometheus.Registerer {
	return prometheus.WrapRegistererWith(prometheus.Labels{"cluster": cluster}, reg)
}

// newMetrics returns the metrics of a cluster's clients, and registers them if this is the
// first one; reg may be nil.
func newMetrics(cluster string, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_kubernetes_calls_total",
			Help: "Calls to a cluster's API server, without watches, by what became of them.",
		}, []string{"outcome"}),
		reviews: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_kubernetes_token_reviews_total",
			Help: "Service account tokens that a cluster was asked about (TokenReview), by what became of them.",
		}, []string{"outcome"}),
		reviewing: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_ca_kubernetes_token_review_duration_seconds",
			Help:                        "Time that a cluster takes for a TokenReview.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, 1, 5, 15},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
	}
	if reg != nil {
		reg = ofCluster(cluster, reg)
		if err := errors.Join(shared(reg, &m.calls), shared(reg, &m.reviews), shared(reg, &m.reviewing)); err != nil {
			return nil, err
		}
	}
	for _, o := range outcomes {
		m.calls.WithLabelValues(o.name)
	}
	for _, o := range []string{reviewAccepted, reviewRefused, reviewError} {
		m.reviews.WithLabelValues(o)
	}
	return m, nil
}

// shared registers a collector, or replaces it by the one that is registered already.
func shared[C prometheus.Collector](reg prometheus.Registerer, c *C) error {
	err := reg.Register(*c)
	if registered, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if known, ok := registered.ExistingCollector.(C); ok {
			*c = known
			return nil
		}
	}
	return err
}

func (m *metrics) count(err error) {
	for _, o := range outcomes {
		if errors.Is(err, o.kind) {
			m.calls.WithLabelValues(o.name).Inc()
			return
		}
	}
}

// reviewed counts a TokenReview that began then.
func (m *metrics) reviewed(began time.Time, err error) {
	outcome := reviewAccepted
	switch {
	case errors.Is(err, ErrToken):
		outcome = reviewRefused
	case err != nil:
		outcome = reviewError
	}
	m.reviews.WithLabelValues(outcome).Inc()
	m.reviewing.Observe(time.Since(began).Seconds())
}

// register registers the metrics of what is followed; reg may be nil.
func (p *Pods) register(cluster string, reg prometheus.Registerer) error {
	if reg == nil {
		return nil
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	reg = ofCluster(cluster, reg)
	var problems []error
	for _, c := range []prometheus.Collector{
		gauge("meshid_ca_kubernetes_pods", "Pods that are known of a cluster.", func() float64 {
			pods, _ := p.Len()
			return float64(pods)
		}),
		gauge("meshid_ca_kubernetes_nodes", "Nodes that are known of a cluster.", func() float64 {
			_, nodes := p.Len()
			return float64(nodes)
		}),
		gauge("meshid_ca_kubernetes_behind_seconds", "For how long what is known of a cluster's pods and nodes may have been old; 0 if it is not.", func() float64 {
			now := time.Now()
			since, why := p.Behind(now)
			if why == nil {
				return 0
			}
			return now.Sub(since).Seconds()
		}),
		gauge("meshid_ca_kubernetes_heard_timestamp_seconds", "When a cluster's API server last said something about pods; it does so every minute. 0 if it never has.", func() float64 {
			pods, _ := p.State()
			if pods.Heard.IsZero() {
				return 0
			}
			return float64(pods.Heard.UnixMilli()) / 1000
		}),
	} {
		problems = append(problems, reg.Register(c))
	}
	return errors.Join(problems...)
}
