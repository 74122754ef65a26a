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

type metrics struct {
	requests *prometheus.CounterVec
	tokens   *prometheus.CounterVec
	duration prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
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
	for _, result := range []string{tokenCached, tokenVerified, tokenRefused, tokenError} {
		m.tokens.WithLabelValues(result)
	}
	for _, c := range []prometheus.Collector{m.requests, m.tokens, m.duration} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
