package workloadapi

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// method is one of the methods that are served.
type method int

const (
	methodX509SVID method = iota
	methodX509Bundles
	methods
)

func (m method) String() string {
	return [methods]string{"FetchX509SVID", "FetchX509Bundles"}[m]
}

// outcome is how a call ended.
type outcome string

const (
	outcomeClosed      outcome = "closed"
	outcomeDenied      outcome = "denied"
	outcomeUnavailable outcome = "unavailable"
	outcomeExhausted   outcome = "resource_exhausted"
)

var outcomes = []outcome{outcomeClosed, outcomeDenied, outcomeUnavailable, outcomeExhausted}

func outcomeOf(c codes.Code) outcome {
	switch c {
	case codes.OK, codes.Canceled, codes.DeadlineExceeded:
		return outcomeClosed
	case codes.PermissionDenied:
		return outcomeDenied
	case codes.ResourceExhausted:
		return outcomeExhausted
	default:
		return outcomeUnavailable
	}
}

type metrics struct {
	streams  [methods]prometheus.Gauge
	messages [methods]prometheus.Counter
	calls    [methods]map[outcome]prometheus.Counter
	hints    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	streams := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "meshid_agent_workloadapi_streams",
		Help: "Open calls of workloads, by method.",
	}, []string{"method"})
	messages := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_workloadapi_messages_total",
		Help: "Messages sent to workloads, by method.",
	}, []string{"method"})
	calls := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_workloadapi_calls_total",
		Help: "Calls of workloads that have ended, by method and outcome.",
	}, []string{"method", "outcome"})
	m := &metrics{hints: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "meshid_agent_workloadapi_dropped_hints_total",
		Help: "Hints left out of messages because another identity of the workload has the same, or they are too long.",
	})}
	for i := range methods {
		m.streams[i] = streams.WithLabelValues(i.String())
		m.messages[i] = messages.WithLabelValues(i.String())
		m.calls[i] = make(map[outcome]prometheus.Counter, len(outcomes))
		for _, o := range outcomes {
			m.calls[i][o] = calls.WithLabelValues(i.String(), string(o))
		}
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{streams, messages, calls, m.hints} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics of the workload API: %w", err)
		}
	}
	return m, nil
}
