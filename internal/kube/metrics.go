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

// metrics are what a client counts.
type metrics struct{ calls *prometheus.CounterVec }

// ofCluster has the metrics of a cluster say which one it is.
func ofCluster(cluster string, reg prometheus.Registerer) prometheus.Registerer {
	return prometheus.WrapRegistererWith(prometheus.Labels{"cluster": cluster}, reg)
}

// newMetrics registers the metrics of one client; reg may be nil.
func newMetrics(cluster string, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{calls: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_ca_kubernetes_calls_total",
		Help: "Calls to a cluster's API server, without watches, by what became of them.",
	}, []string{"outcome"})}
	for _, o := range outcomes {
		m.calls.WithLabelValues(o.name)
	}
	if reg == nil {
		return m, nil
	}
	return m, ofCluster(cluster, reg).Register(m.calls)
}

func (m *metrics) count(err error) {
	for _, o := range outcomes {
		if errors.Is(err, o.kind) {
			m.calls.WithLabelValues(o.name).Inc()
			return
		}
	}
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
