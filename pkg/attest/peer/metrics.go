package peer

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// reason is why a connection was refused.
type reason string

// The closed set of reasons.
const (
	reasonNamespace      reason = "pid_namespace"
	reasonGone           reason = "gone"
	reasonUnproven       reason = "unproven"
	reasonUIDLimit       reason = "uid_limit"
	reasonContainerLimit reason = "container_limit"
	reasonLimit          reason = "limit"
	reasonCalls          reason = "calls"
	reasonError          reason = "error"
)

var reasons = []reason{reasonNamespace, reasonGone, reasonUnproven, reasonUIDLimit, reasonContainerLimit, reasonLimit, reasonCalls, reasonError}

type metrics struct {
	connections prometheus.Gauge
	refusals    map[reason]prometheus.Counter
	restored    prometheus.Counter
}

// newMetrics registers the metrics. Several listeners of one program share
// them.
func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{refusals: make(map[reason]prometheus.Counter, len(reasons))}
	connections, err := register(reg, prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "meshid_agent_peer_connections",
		Help: "Open connections of processes to the agent's sockets.",
	}))
	if err != nil {
		return nil, err
	}
	m.connections = connections
	refusals, err := register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_peer_refusals_total",
		Help: "Connections to the agent's sockets that were refused at accept, or later for too many calls, by reason.",
	}, []string{"reason"}))
	if err != nil {
		return nil, err
	}
	m.restored, err = register(reg, prometheus.NewCounter(prometheus.CounterOpts{
		Name: "meshid_agent_peer_sockets_restored_total",
		Help: "Times that the file of a socket was gone and was made again.",
	}))
	if err != nil {
		return nil, err
	}
	for _, r := range reasons {
		m.refusals[r] = refusals.WithLabelValues(string(r))
	}
	return m, nil
}

// register returns c, or the collector that was registered in its place before.
func register[C prometheus.Collector](reg prometheus.Registerer, c C) (C, error) {
	if reg == nil {
		return c, nil
	}
	err := reg.Register(c)
	if dup, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if old, ok := dup.ExistingCollector.(C); ok {
			return old, nil
		}
	}
	return c, err
}
