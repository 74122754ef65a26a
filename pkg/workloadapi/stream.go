package workloadapi

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// errDenied tells a process that it has no identity: Workload Endpoint §6.
var errDenied = status.Error(codes.PermissionDenied, "no identity issued")

// errUnavailable tells a client to come back.
var errUnavailable = status.Error(codes.Unavailable, "the agent cannot serve this process at the moment")

// FetchX509SVID streams the X.509-SVIDs of the caller with the bundles that belong
// to them.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, g grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return serve(s, methodX509SVID, true, g, func(snapshot *identity.Snapshot) (*workload.X509SVIDResponse, error) {
		if len(snapshot.SVIDs) == 0 {
			return nil, nil //nolint:nilnil // nothing to say yet
		}
		m, dropped, err := s.cache.x509SVIDs(snapshot)
		if dropped > 0 {
			s.metrics.hints.Add(float64(dropped))
			s.logHints(dropped)
		}
		return m, err
	})
}

// FetchX509Bundles streams the X.509 bundles of all trust domains that the caller
// may believe. A caller without an identity is denied these as well.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, g grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return serve(s, methodX509Bundles, false, g, func(snapshot *identity.Snapshot) (*workload.X509BundlesResponse, error) {
		if len(snapshot.SVIDs) == 0 {
			return nil, nil //nolint:nilnil // nothing to say yet
		}
		return s.cache.x509Bundles(snapshot)
	})
}

// serve streams what message makes of each snapshot. message returns nil while
// there is nothing to say. keys says whether messages carry X.509-SVIDs.
func serve[M any, P interface {
	*M
	proto.Message
}](s *Server, m method, keys bool, g grpc.ServerStreamingServer[M], message func(*identity.Snapshot) (*M, error)) error {
	s.metrics.streams[m].Inc()
	defer s.metrics.streams[m].Dec()
	err := stream(s, g, keys, s.metrics.messages[m].Inc, func(a, b *M) bool { return proto.Equal(P(a), P(b)) }, message)
	if g.Context().Err() != nil {
		s.metrics.calls[m][outcomeClosed].Inc()
		return status.Error(codes.Unavailable, "the call has ended") // nobody reads it
	}
	s.metrics.calls[m][outcomeOf(status.Code(err))].Inc()
	return err
}

// A client of the Workload API has no way to acknowledge: it counts as having what
// was handed to its open stream. When it takes that into use, or that it has not
// dropped what a denial took from it, is not known.
func stream[M any](s *Server, g grpc.ServerStreamingServer[M], keys bool, sent func(), equal func(a, b *M) bool, message func(*identity.Snapshot) (*M, error)) error {
	ctx := g.Context()
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "the process at the other end of the connection is not known")
	}
	release, err := s.admit(caller.UID)
	if err != nil {
		return err
	}
	defer release()
	watch, err := s.subscribe(ctx, caller)
	if err != nil {
		return err
	}
	defer watch.Close()

	timer := time.NewTimer(patience)
	defer timer.Stop()
	begun := time.Now()
	var last *M
	var seen *identity.Snapshot
	for {
		snapshot := watch.Snapshot()
		var next *M
		if snapshot != nil && snapshot != seen {
			seen = snapshot
			if next, err = message(snapshot); err != nil {
				s.logError(caller.PID, err)
				if last == nil {
					return errUnavailable
				}
				next = nil // what the client has is better than nothing
			}
		}
		denied := snapshot != nil && snapshot.Denied
		switch {
		case next != nil:
			if last == nil || !equal(last, next) { // Workload API §4.3: messages follow changes
				if err := caller.Alive(); err != nil {
					return status.Error(codes.Unavailable, "the process has ended")
				}
				if err := g.Send(next); err != nil {
					return errUnavailable
				}
				sent()
				last = next
				timer.Stop()
			}
			if snapshot.Bundle != nil {
				watch.Acknowledge(snapshot.Bundle.Sequence)
			}
			watch.InForce(snapshot, keys)
		case denied && (last != nil || time.Since(begun) >= s.denyAfter):
			watch.InForce(snapshot, keys)
			return errDenied
		case denied:
			timer.Reset(s.denyAfter - time.Since(begun))
		}
		select {
		case <-watch.Changed():
		case <-timer.C:
			if !denied {
				return status.Error(codes.Unavailable, "it is not known yet what the process is")
			}
		case <-watch.Done():
			s.log.DebugContext(ctx, "call ended by its source", "pid", caller.PID, "err", watch.Err())
			return errUnavailable
		case <-caller.Done():
			return status.Error(codes.Unavailable, "the process has ended")
		case <-s.closing:
			return status.Error(codes.Unavailable, "the agent is stopping")
		case <-ctx.Done():
			return errUnavailable
		}
	}
}

// subscribe asks the source for a peer's watch. It turns errors into such that do
// not make a client give up.
func (s *Server) subscribe(ctx context.Context, p *peer.Peer) (*identity.Watch, error) {
	watch, err := s.source.Subscribe(ctx, p)
	if err == nil {
		return watch, nil
	}
	s.log.DebugContext(ctx, "process could not be served", "pid", p.PID, "err", err)
	var kinded interface{ GRPCStatus() *status.Status }
	if errors.As(err, &kinded) {
		switch code := kinded.GRPCStatus().Code(); code {
		case codes.ResourceExhausted:
			return nil, status.Error(code, "the process cannot be served")
		case codes.PermissionDenied:
			return nil, errDenied
		default:
		}
	}
	return nil, status.Error(codes.Unavailable, "the process cannot be attested at the moment")
}

// logInterval bounds how often what a process can cause is logged as a warning.
const logInterval = time.Second

// loud says whether it is time for another warning.
func (s *Server) loud() bool {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.logged) < logInterval {
		return false
	}
	s.logged = now
	return true
}

func (s *Server) logError(pid int, err error) {
	if s.loud() {
		s.log.Warn("identities of a process cannot be delivered", "pid", pid, "err", err)
		return
	}
	s.log.Debug("identities of a process cannot be delivered", "pid", pid, "err", err)
}

func (s *Server) logHints(dropped int) {
	if s.loud() {
		s.log.Warn("hints left out, give the entries of one workload different ones of at most 1024 bytes", "hints", dropped)
		return
	}
	s.log.Debug("hints left out, give the entries of one workload different ones of at most 1024 bytes", "hints", dropped)
}
