package k8s

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// call names a call to the kubelet or to the container runtime.
type call string

// The calls.
const (
	callPods    call = "kubelet_pods"
	callVersion call = "runtime_version"
	callStatus  call = "runtime_container_status"
	callList    call = "runtime_list_containers"
	callEvents  call = "runtime_events" // counted when they end
)

const (
	outcomeOK    = "ok"
	outcomeError = "error"
)

type metrics struct {
	containers, pods, kubeletUp, runtimeUp, events, watched prometheus.Gauge
	calls                                                   *prometheus.CounterVec
	asking                                                  prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &metrics{
		containers: gauge("meshid_agent_k8s_containers", "Running containers of pods in the index."),
		pods:       gauge("meshid_agent_k8s_pods", "Pods in the kubelet's last answer."),
		kubeletUp:  gauge("meshid_agent_k8s_kubelet_up", "Whether the last call to the kubelet succeeded: 1 or 0."),
		runtimeUp:  gauge("meshid_agent_k8s_runtime_up", "Whether the last call to the container runtime succeeded: 1 or 0."),
		events:     gauge("meshid_agent_k8s_runtime_events", "Whether the container runtime tells of containers that it makes: 1 or 0. If it does not, cgroups are watched."),
		watched:    gauge("meshid_agent_k8s_watched_cgroups", "Cgroups of the kubelet that are watched for new pods and containers."),
		asking: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_agent_k8s_announcement_seconds",
			Help:                        "From the sign of a new container until all is known of it.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, 1, 5},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_k8s_calls_total",
			Help: "Calls to the kubelet and to the container runtime, by call and outcome.",
		}, []string{"call", "outcome"}),
	}
	for _, c := range []call{callPods, callVersion, callStatus, callList, callEvents} {
		m.calls.WithLabelValues(string(c), outcomeOK)
		m.calls.WithLabelValues(string(c), outcomeError)
	}
	if reg == nil {
		return m, nil
	}
	var err error
	for _, c := range []prometheus.Collector{m.containers, m.pods, m.kubeletUp, m.runtimeUp, m.events, m.watched, m.asking, m.calls} {
		err = errors.Join(err, reg.Register(c))
	}
	return m, err
}

// called counts a call. That there is no such container, or no such call, is an answer.
func (m *metrics) called(c call, err error) {
	up := m.runtimeUp
	if c == callPods {
		up = m.kubeletUp
	}
	if err != nil && !errors.Is(err, container.ErrNotFound) && !errors.Is(err, errNoEvents) {
		up.Set(0)
		m.calls.WithLabelValues(string(c), outcomeError).Inc()
		return
	}
	up.Set(1)
	m.calls.WithLabelValues(string(c), outcomeOK).Inc()
}
