package docker

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// call names a call to the engine.
type call string

// The calls.
const (
	callList             call = "list_containers"
	callInspectContainer call = "inspect_container"
	callInspectImage     call = "inspect_image"
	callEvents           call = "events"
)

const (
	outcomeOK    = "ok"
	outcomeError = "error"
)

type metrics struct {
	containers prometheus.Gauge
	connected  prometheus.Gauge
	calls      *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		containers: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_agent_docker_containers",
			Help: "Running containers in the index.",
		}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_agent_docker_connected",
			Help: "Whether the event stream of the Docker engine is open: 1 or 0.",
		}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_agent_docker_calls_total",
			Help: "Calls to the Docker engine, by call and outcome.",
		}, []string{"call", "outcome"}),
	}
	for _, c := range []call{callList, callInspectContainer, callInspectImage, callEvents} {
		m.calls.WithLabelValues(string(c), outcomeOK)
		m.calls.WithLabelValues(string(c), outcomeError)
	}
	if reg == nil {
		return m, nil
	}
	return m, errors.Join(reg.Register(m.containers), reg.Register(m.connected), reg.Register(m.calls))
}

// called counts a call. That there is no such container is an answer.
func (m *metrics) called(c call, err error) {
	outcome := outcomeOK
	if err != nil && !errors.Is(err, container.ErrNotFound) {
		outcome = outcomeError
	}
	m.calls.WithLabelValues(string(c), outcome).Inc()
}
