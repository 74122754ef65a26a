// Package workloadapi serves the X.509 half of the SPIFFE Workload API to the
// processes of this machine. It answers "who am I, and whom may I believe", and
// goes on answering for as long as the stream is open. It does not know how a
// process is attested or where SVIDs come from: it turns the snapshots of an
// identity.Watch into messages.
//
// What a caller sees (SPIFFE Workload Endpoint §6, Workload API §5.2):
//
//   - Every message is complete, in the snapshot's stable order: the first SVID
//     is the default identity.
//   - While it is not known yet what the caller is, the call is held, for
//     ten seconds; then it ends with Unavailable and the client comes back.
//   - A caller without an identity gets PermissionDenied, at once or after
//     Options.DenyAfter, also in the middle of a stream when its last identity
//     was taken.
//   - Every call on the socket must have the metadata workload.spiffe.io: true,
//     else it ends with InvalidArgument. Envoy's discovery services, which share
//     the socket, are exempt by decision: a stock Envoy does not send it, and a
//     browser or a confused server that is made to send requests, which is what
//     the metadata guards against, cannot speak their streams any more than it
//     can connect to a Unix socket.
//   - For any reason inside the agent a call ends with Unavailable and never with
//     Canceled or InvalidArgument: clients of go-spiffe take those for final and
//     live on with what they have until it expires.
//
// The JWT and WIT methods answer Unimplemented.
package workloadapi

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	reflectionv1 "google.golang.org/grpc/reflection"
	reflectiongrpc "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// patience is how long a call is held while it is not known what the caller is.
const patience = 10 * time.Second

// Source gives what one process may have.
type Source interface {
	// Subscribe is called once for each call, with the process at the other end
	// of its connection. It may block while the process is attested, and honours
	// ctx. An error with the gRPC code ResourceExhausted or PermissionDenied
	// keeps it, any other is Unavailable to the client. The caller closes the
	// Watch.
	Subscribe(ctx context.Context, p *peer.Peer) (*identity.Watch, error)
}

// Options are what a server is made from besides its source. Zero values of the
// limits are replaced by the defaults, but for DenyAfter.
type Options struct {
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// DenyAfter is how long a new call of a process without an identity is held
	// before it is told so, in case that an entry for it is just being made: it
	// is then served in milliseconds, where a client that was refused comes back
	// after up to 30 seconds. Against that stands that people wait for the error
	// as well. 0 tells at once.
	DenyAfter time.Duration
	// MaxStreams bounds the open calls, 10,000 by default, and MaxStreamsPerUID
	// those of one user, 4,000 by default: nobody can lock the others out.
	MaxStreams, MaxStreamsPerUID int
}

// Server serves the Workload API. All methods may be called concurrently.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	source    Source
	log       *slog.Logger
	metrics   *metrics
	cache     cache
	denyAfter time.Duration
	closing   chan struct{}  // closed by Close
	running   sync.WaitGroup // calls; Add only under mu while not closed

	maxStreams, maxStreamsPerUID int

	mu      sync.Mutex // guards what follows
	closed  bool
	streams int
	perUID  map[uint32]int
	logged  time.Time // when a warning was logged last
}

// New returns a server that serves what src gives.
func New(src Source, o Options) (*Server, error) {
	if src == nil {
		return nil, errors.New("make workload API: no source given")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	return &Server{
		source:           src,
		log:              o.Logger,
		metrics:          m,
		denyAfter:        max(o.DenyAfter, 0),
		closing:          make(chan struct{}),
		maxStreams:       cmp.Or(o.MaxStreams, 10_000),
		maxStreamsPerUID: cmp.Or(o.MaxStreamsPerUID, 4_000),
		perUID:           make(map[uint32]int),
	}, nil
}

// Register adds the service to r, which must have been made with ServerOptions and
// with credentials that know the peer: peer.Credentials.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	workload.RegisterSpiffeWorkloadAPIServer(r, s)
}

// RegisterReflection adds gRPC server reflection to r (Workload Endpoint §7). It
// tells about the Workload API and nothing else that r may have.
func RegisterReflection(r grpc.ServiceRegistrar) {
	reflectiongrpc.RegisterServerReflectionServer(r, reflectionv1.NewServerV1(reflectionv1.ServerOptions{Services: listed{}}))
}

// listed are the services that reflection tells about.
type listed struct{}

// GetServiceInfo returns them.
func (listed) GetServiceInfo() map[string]grpc.ServiceInfo {
	return map[string]grpc.ServiceInfo{workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName: {}}
}

// Close ends all calls with Unavailable, so that the gRPC server can stop
// gracefully, and returns when they have ended. New ones are refused from then
// on.
func (s *Server) Close() {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	s.mu.Unlock()
	s.running.Wait()
}

// admit counts a call of a user in. The caller calls the returned function when
// the call has ended.
func (s *Server) admit(uid uint32) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, status.Error(codes.Unavailable, "the agent is stopping")
	case s.streams >= s.maxStreams:
		return nil, status.Errorf(codes.ResourceExhausted, "the agent has its maximum of %d calls open", s.maxStreams)
	case s.perUID[uid] >= s.maxStreamsPerUID:
		return nil, status.Errorf(codes.ResourceExhausted, "user %d has its maximum of %d calls open", uid, s.maxStreamsPerUID)
	}
	s.streams++
	s.perUID[uid]++
	s.running.Add(1)
	return func() {
		s.mu.Lock()
		s.streams--
		if s.perUID[uid]--; s.perUID[uid] == 0 {
			delete(s.perUID, uid)
		}
		s.mu.Unlock()
		s.running.Done()
	}, nil
}
