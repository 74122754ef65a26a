// Package sds is Envoy's Secret Discovery Service, version 3: state of the world
// and delta, on its own streams and as an aggregated stream restricted to
// secrets. It answers "which secrets may this proxy have now", and goes on
// answering for as long as the stream is open. It does not know how a process is
// attested, where SVIDs come from, or that there is a CA: it turns the snapshots
// of an identity.Watch into secrets.
//
// Resource names. A name's kind decides what is ever sent under it:
//
//	default         the default X.509-SVID
//	<SPIFFE ID>     that X.509-SVID
//	ROOTCA          the trust bundle of the local trust domain
//	ALL             the trust bundles of all trust domains that are known
//	spiffe://<td>   the trust bundle of that trust domain
//
// What is there is sent, what is not there yet is held: a stream is never ended
// because an identity is missing, since a proxy that is refused comes back only
// after a back-off of up to half a minute. A name that the caller has no right to
// is answered with removed_resources in delta, and not at all in the state of the
// world. Streams end with an error only for a wrong type (InvalidArgument), when
// a limit is reached (ResourceExhausted), and when the source gave up
// (Unavailable).
//
// Nothing of a request but its names, versions and acknowledgements is ever
// looked at: the node that a proxy claims to be, 61 kB of it, is cut off before
// the request is decoded. Who asks is known from the connection alone.
package sds

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// TypeURL is the only resource type that is served.
const TypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Conditions are the names that Options.Report is called with.
var Conditions = []string{conditionRejected}

// conditionRejected: a proxy has refused a secret, or a secret was not good
// enough to be sent.
const conditionRejected = "secrets_rejected"

// Limits of one connection and one stream. The node message of a plain Envoy
// 1.40 has 61 kB, that of a mesh's sidecar has its pod's labels and annotations
// as well (Kubernetes allows 256 KiB of the latter).
const (
	maxRequestBytes    = 512 << 10
	maxHeaderBytes     = 16 << 10
	maxStreamsPerConn  = 100
	maxNames           = 2048 // further ones are treated as if they did not exist
	handshakeTimeout   = 5 * time.Second
	firstRequestWithin = 10 * time.Second
	heldAfter          = 30 * time.Second
	fetchWithin        = 10 * time.Second
)

// Source gives the secrets of one process.
type Source interface {
	// Subscribe is called once for each stream, with the process at the other
	// end of its connection. It may block while the process is attested, and
	// honours ctx. An error with the gRPC code ResourceExhausted or
	// PermissionDenied keeps it, any other is Unavailable to the proxy. The
	// caller closes the Watch.
	Subscribe(ctx context.Context, p *peer.Peer) (*identity.Watch, error)
}

// Options are what a server is made from besides its source. Zero values of the
// limits are replaced by the defaults.
type Options struct {
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Report is told about the health conditions of Conditions: problem is "" when
	// the condition is all right again. It may be nil, is called concurrently
	// and must not block.
	Report func(condition, problem string)
	// MaxStreams bounds the open streams, 10,000 by default, and MaxStreamsPerUID
	// those of one user, 4,000 by default: nobody can lock the others out.
	MaxStreams, MaxStreamsPerUID int
}

// Server serves secrets. All methods may be called concurrently.
type Server struct {
	source  Source
	log     *slog.Logger
	metrics *metrics
	cache   *cache
	report  func(condition, problem string)
	closing chan struct{}  // closed by Close
	running sync.WaitGroup // handlers; Add only under mu while not closed

	maxStreams, maxStreamsPerUID int

	mu       sync.Mutex // guards what follows
	closed   bool
	streams  int                  // with those that are being subscribed
	live     map[*stream]struct{} // those that are
	perUID   map[uint32]int
	rejected int       // streams whose last answer was a rejection
	logged   time.Time // when a warning was logged last
}

// New returns a server that serves what src gives.
func New(src Source, o Options) (*Server, error) {
	if src == nil {
		return nil, errors.New("make secret discovery service: no source given")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Report == nil {
		o.Report = func(string, string) {}
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	return &Server{
		source:           src,
		log:              o.Logger,
		metrics:          m,
		cache:            newCache(),
		report:           o.Report,
		closing:          make(chan struct{}),
		maxStreams:       cmp.Or(o.MaxStreams, 10_000),
		maxStreamsPerUID: cmp.Or(o.MaxStreamsPerUID, 4_000),
		live:             make(map[*stream]struct{}),
		perUID:           make(map[uint32]int),
	}, nil
}

// Register adds the services to r, which must have been made with ServerOptions
// and with credentials that know the peer: peer.Credentials.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	secretv3.RegisterSecretDiscoveryServiceServer(r, secrets{s})
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, aggregated{s})
}

// Close ends all streams with Unavailable, so that the gRPC server can stop
// gracefully, and returns when their goroutines have ended. New streams are
// refused from then on.
func (s *Server) Close() {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	open := slices.Collect(maps.Keys(s.live))
	s.mu.Unlock()
	for _, st := range open {
		st.end(errStopping)
	}
	s.running.Wait()
}

// errStopping is what clients are told by Close.
var errStopping = status.Error(codes.Unavailable, "the agent is stopping")

// ServerOptions are the gRPC options for a server of secrets on a local socket:
// limits against hostile clients, small buffers (a machine has hundreds of
// mostly silent connections), and pings as often as Envoys like to send them.
// The caller adds credentials.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreamsPerConn),
		grpc.ConnectionTimeout(handshakeTimeout),
		// Windows stay at HTTP/2's 64 KiB: what a client can make the server
		// buffer is bounded, and no bandwidth estimator pings.
		grpc.StaticStreamWindowSize(64 << 10),
		grpc.StaticConnWindowSize(128 << 10),
		// Of a pool, for as long as something is read or written: pages.
		grpc.ReadBufferSize(4 << 10),
		grpc.WriteBufferSize(4 << 10),
		// Envoy pings every 30 s with the bootstraps that are recommended; the
		// default policy would answer with GOAWAY.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime:             10 * time.Second,
			PermitWithoutStream: true,
		}),
	}
}

// admit counts a stream of a user in. The caller calls the returned function
// when the stream has ended.
func (s *Server) admit(uid uint32) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, errStopping
	case s.streams >= s.maxStreams:
		s.metrics.refusals[refusedLimit].Inc()
		return nil, status.Errorf(codes.ResourceExhausted, "the agent has its maximum of %d streams open", s.maxStreams)
	case s.perUID[uid] >= s.maxStreamsPerUID:
		s.metrics.refusals[refusedUIDLimit].Inc()
		return nil, status.Errorf(codes.ResourceExhausted, "user %d has its maximum of %d streams open", uid, s.maxStreamsPerUID)
	}
	s.streams++
	s.perUID[uid]++
	s.running.Add(1)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.streams--
		if s.perUID[uid]--; s.perUID[uid] == 0 {
			delete(s.perUID, uid)
		}
		s.running.Done()
	}, nil
}

// keep has Close end a stream, at once if it has been called.
func (s *Server) keep(st *stream) {
	s.mu.Lock()
	closed := s.closed
	s.live[st] = struct{}{}
	s.mu.Unlock()
	if closed {
		st.end(errStopping)
	}
}

// drop is the inverse of keep.
func (s *Server) drop(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, st)
}

// secrets is the dedicated service.
type secrets struct{ *Server }

// StreamSecrets serves the state of the world.
func (s secrets) StreamSecrets(g grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	return s.serve(g, protocolSotW)
}

// DeltaSecrets serves changes.
func (s secrets) DeltaSecrets(g grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	return s.serve(g, protocolDelta)
}

// FetchSecrets answers once.
func (s secrets) FetchSecrets(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	return s.fetch(ctx, r)
}

// aggregated is the aggregated service, restricted to secrets.
type aggregated struct{ *Server }

// StreamAggregatedResources serves the state of the world.
func (s aggregated) StreamAggregatedResources(g grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	return s.serve(g, protocolAggregatedSotW)
}

// DeltaAggregatedResources serves changes.
func (s aggregated) DeltaAggregatedResources(g grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	return s.serve(g, protocolAggregatedDelta)
}
