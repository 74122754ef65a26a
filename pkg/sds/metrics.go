package sds

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// protocol is how a stream speaks.
type protocol int

const (
	protocolSotW protocol = iota
	protocolDelta
	protocolAggregatedSotW
	protocolAggregatedDelta
	protocolFetch
	protocols
)

func (p protocol) String() string {
	return [protocols]string{"sotw", "delta", "ads_sotw", "ads_delta", "fetch"}[p]
}

func (p protocol) delta() bool { return p == protocolDelta || p == protocolAggregatedDelta }

// aggregated says that each request must name its type.
func (p protocol) aggregated() bool {
	return p == protocolAggregatedSotW || p == protocolAggregatedDelta
}

// refused is why a stream was refused.
type refused string

const (
	refusedLimit    refused = "limit"
	refusedUIDLimit refused = "uid_limit"
	refusedPeer     refused = "peer"
	refusedSource   refused = "source"
	refusedType     refused = "type"
	refusedSilent   refused = "silent"
)

var refusals = []refused{refusedLimit, refusedUIDLimit, refusedPeer, refusedSource, refusedType, refusedSilent}

// withheld is why a secret was not sent although it is there.
type withheld string

const (
	withheldExpired     withheld = "expired"
	withheldNotYetValid withheld = "not_yet_valid"
	withheldKey         withheld = "key"
	withheldProfile     withheld = "profile"
	withheldChain       withheld = "chain"
	withheldBundle      withheld = "bundle"
	withheldGuard       withheld = "guard"
)

var withholdings = []withheld{
	withheldExpired, withheldNotYetValid, withheldKey, withheldProfile, withheldChain, withheldBundle, withheldGuard,
}

// rejection is why a proxy did not accept a response.
type rejection string

const (
	rejectedKey         rejection = "key"
	rejectedCertificate rejection = "certificate"
	rejectedValidation  rejection = "validation_context"
	rejectedOther       rejection = "other"
)

var rejections = []rejection{rejectedKey, rejectedCertificate, rejectedValidation, rejectedOther}

// classify makes a closed reason out of a proxy's error text.
func classify(text string) rejection {
	t := strings.ToLower(text)
	switch {
	case strings.Contains(t, "private key"), strings.Contains(t, "key_values_mismatch"), strings.Contains(t, "key type"):
		return rejectedKey
	case strings.Contains(t, "validation"), strings.Contains(t, "trusted ca"), strings.Contains(t, "trust bundle"),
		strings.Contains(t, "trust domain"), strings.Contains(t, "spiffe"):
		return rejectedValidation
	case strings.Contains(t, "certificate"):
		return rejectedCertificate
	default:
		return rejectedOther
	}
}

type metrics struct {
	streams   [protocols]prometheus.Gauge
	responses [protocols]prometheus.Counter
	acks      [protocols]prometheus.Counter

	rejections    map[rejection]prometheus.Counter
	refusals      map[refused]prometheus.Counter
	withheld      map[withheld]prometheus.Counter
	unanswered    prometheus.Gauge
	held          prometheus.Gauge
	rejected      prometheus.Gauge
	unknownNames  prometheus.Counter
	surplusNames  prometheus.Counter
	tombstones    prometheus.Counter
	acknowledging prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	streams := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "meshid_agent_sds_streams",
		Help: "Open streams of proxies, by protocol.",
	}, []string{"protocol"})
	responses := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_sds_responses_total",
		Help: "Responses sent to proxies, by protocol.",
	}, []string{"protocol"})
	acks := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_sds_acks_total",
		Help: "Responses that proxies have put into force, by protocol.",
	}, []string{"protocol"})
	rejected := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_sds_nacks_total",
		Help: "Responses that proxies have refused, by reason; they keep what they had.",
	}, []string{"reason"})
	refusedStreams := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_sds_refused_streams_total",
		Help: "Streams that were ended with an error, by reason.",
	}, []string{"reason"})
	withheldSecrets := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "meshid_agent_sds_withheld_secrets_total",
		Help: "Times a secret was found not good enough to be sent, by reason.",
	}, []string{"reason"})
	m := &metrics{
		rejections: make(map[rejection]prometheus.Counter, len(rejections)),
		refusals:   make(map[refused]prometheus.Counter, len(refusals)),
		withheld:   make(map[withheld]prometheus.Counter, len(withholdings)),
		unanswered: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_agent_sds_unacknowledged_streams",
			Help: "Streams whose proxy has a response that it has neither put into force nor refused.",
		}),
		held: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_agent_sds_held_streams",
			Help: "Streams that have waited for a secret for more than 30 seconds.",
		}),
		rejected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshid_agent_sds_rejecting_streams",
			Help: "Streams whose proxy has refused the last response.",
		}),
		unknownNames: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshid_agent_sds_unknown_names_total",
			Help: "Names asked for that are not names of secrets, or of secrets that the caller has no right to.",
		}),
		surplusNames: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshid_agent_sds_surplus_names_total",
			Help: "Names that were ignored because their stream has its maximum of names.",
		}),
		tombstones: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshid_agent_sds_tombstones_total",
			Help: "Expired certificates sent in place of a withdrawn identity.",
		}),
		acknowledging: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                        "meshid_agent_sds_ack_seconds",
			Help:                        "Time from sending a response to its acknowledgement.",
			Buckets:                     []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
	}
	for p := range protocols {
		if p != protocolFetch {
			m.streams[p] = streams.WithLabelValues(p.String())
			m.acks[p] = acks.WithLabelValues(p.String())
		}
		m.responses[p] = responses.WithLabelValues(p.String())
	}
	for _, r := range rejections {
		m.rejections[r] = rejected.WithLabelValues(string(r))
	}
	for _, r := range refusals {
		m.refusals[r] = refusedStreams.WithLabelValues(string(r))
	}
	for _, w := range withholdings {
		m.withheld[w] = withheldSecrets.WithLabelValues(string(w))
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		streams, responses, acks, rejected, refusedStreams, withheldSecrets, m.unanswered, m.held, m.rejected,
		m.unknownNames, m.surplusNames, m.tombstones, m.acknowledging,
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics of the secret discovery service: %w", err)
		}
	}
	return m, nil
}
