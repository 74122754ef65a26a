package istio

import (
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
)

// How a request ends.
const (
	outcomeIssued          = "issued"
	outcomeUnauthenticated = "unauthenticated"
	outcomeDenied          = "denied"
	outcomeInvalid         = "invalid"
	outcomeOverload        = "overload"
	outcomeUnavailable     = "unavailable"
	outcomeCanceled        = "canceled"
	outcomeInternal        = "internal"
)

// What became of a token.
const (
	tokenCached   = "cached"
	tokenVerified = "verified"
	tokenRefused  = "refused"
	tokenError    = "error"
)

func outcomeOf(c codes.Code) string {
	switch c {
	case codes.Unauthenticated:
		return outcomeUnauthenticated
	case codes.PermissionDenied:
		return outcomeDenied
	case codes.InvalidArgument:
		return outcomeInvalid
	case codes.ResourceExhausted:
		return outcomeOverload
	case codes.Unavailable, codes.FailedPrecondition:
		return outcomeUnavailable
	case codes.Canceled:
		return outcomeCanceled
	default:
		return outcomeInternal
	}
}

// How a TLS handshake ends: the values that server.DirectListener counts.
var handshakeOutcomes = []string{"ok", "failed", "overload"}

// CountHandshake counts a handshake; it is server.DirectListener.Counted.
func (s *Service) CountHandshake(outcome string) { s.metrics.handshakes.WithLabelValues(outcome).Inc() }

type metrics struct {
	handshakes *prometheus.CounterVec
	requests   *prometheus.CounterVec
	tokens     *prometheus.CounterVec
	duration   prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_istio_handshakes_total", Help: "TLS handshakes on the listener for Istio's clients.",
		}, []string{"outcome"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_istio_requests_total", Help: "Certificates that Istio's clients asked for, by how that ended.",
		}, []string{"outcome"}),
		tokens: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_istio_tokens_total", Help: "Tokens of Istio's clients: verified with the cluster or its keys, known from before, refused, or not verifiable then.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "meshid_ca_istio_request_duration_seconds", Help: "Time from a request of one of Istio's clients to its answer.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
	}
	for _, outcome := range []string{
		outcomeIssued, outcomeUnauthenticated, outcomeDenied, outcomeInvalid, outcomeOverload, outcomeUnavailable, outcomeCanceled, outcomeInternal,
	} {
		m.requests.WithLabelValues(outcome)
	}
	for _, outcome := range handshakeOutcomes {
		m.handshakes.WithLabelValues(outcome)
	}
	for _, result := range []string{tokenCached, tokenVerified, tokenRefused, tokenError} {
		m.tokens.WithLabelValues(result)
	}
	for _, c := range []prometheus.Collector{m.handshakes, m.requests, m.tokens, m.duration} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
