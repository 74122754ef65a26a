package sds

import (
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// The life of a stream:
//
//  1. serve, the handler, counts it in and takes the peer from the connection.
//  2. receive, in the handler, takes requests into the session: it is the only
//     goroutine of a silent stream. Nothing comes before it that may wait: what a
//     thousand proxies say of themselves, 60 MB, would be held in memory meanwhile.
//  3. work subscribes to the source, once, and sends what the session says is due.
//     It is called whenever the snapshot or the session may have changed, in a
//     goroutine that ends when nothing more is due: streams are silent for nearly
//     all of their life.
//  4. end says why the stream is to end: work then tells the client, and receive
//     returns.
//
// Nothing is queued anywhere: each leaves state, and calls wake. When the process
// ends, its connection is closed (pkg/attest/peer), and the stream with it.

// stream is one open stream.
type stream struct {
	server   *Server
	protocol protocol
	grpc     grpc.ServerStream
	call     statusWriter
	peer     *peer.Peer
	phase    atomic.Int32  // of work
	ended    chan struct{} // closed by work when nothing will be sent any more

	// Owned by work, and by serve once that has ended.
	watch                       *identity.Watch // nil until it has subscribed
	timer                       *time.Timer     // nil if nothing is due by itself
	unanswered, held, rejecting bool            // counted in the gauge of that name
	// silentAt is when a client that has asked for nothing is sent away, heldAt
	// when it is said that names wait; zero when that is settled.
	silentAt, heldAt time.Time
	// forced is what was reported as in force last. It is held weakly: the agent
	// drops what it replaces, keys included.
	forced weak.Pointer[identity.Snapshot]

	mu      sync.Mutex // guards what follows
	session *session
	err     error // why it is to end
}

// Phases of work.
const (
	idle    int32 = iota
	working       // a goroutine works
	again         // it is to look once more
	over          // it will never again
)

// serve is the handler of all streams. What is on its stack is there for as long as
// the stream is open.
func (s *Server) serve(g grpc.ServerStream, p protocol) error {
	st, release, err := s.open(g, p)
	if err != nil {
		return err
	}
	defer release()
	st.wake()
	st.end(st.receive())
	<-st.ended
	return st.err
}

// open counts a stream in. The caller calls release when nothing works for it any
// more.
func (s *Server) open(g grpc.ServerStream, p protocol) (st *stream, release func(), err error) {
	ctx := g.Context()
	caller, ok := peer.FromContext(ctx)
	if !ok {
		// Keys go over a local socket to a process that the kernel named, or not
		// at all.
		s.metrics.refusals[refusedPeer].Inc()
		return nil, nil, status.Error(codes.Unauthenticated, "the process at the other end of the connection is not known")
	}
	call, ok := grpc.ServerTransportStreamFromContext(ctx).(statusWriter)
	if !ok {
		return nil, nil, status.Error(codes.Internal, "the stream cannot be ended")
	}
	leave, err := s.admit(caller.UID)
	if err != nil {
		return nil, nil, err
	}
	st = &stream{
		server: s, protocol: p, grpc: g, call: call, peer: caller,
		ended:    make(chan struct{}),
		session:  newSession(p.delta(), maxNames),
		silentAt: time.Now().Add(firstRequestWithin),
	}
	s.metrics.streams[p].Inc()
	s.keep(st)
	return st, func() {
		s.drop(st)
		if st.watch != nil {
			st.watch.Close()
		}
		s.metrics.streams[p].Dec()
		leave()
	}, nil
}

// subscribe asks the source for a peer's watch. It turns errors into such that a
// proxy may see.
func (s *Server) subscribe(ctx context.Context, p *peer.Peer) (*identity.Watch, error) {
	watch, err := s.source.Subscribe(ctx, p)
	if err == nil {
		return watch, nil
	}
	s.metrics.refusals[refusedSource].Inc()
	s.log.DebugContext(ctx, "process could not be served", "pid", p.PID, "err", err)
	var kinded interface{ GRPCStatus() *status.Status }
	if errors.As(err, &kinded) {
		switch code := kinded.GRPCStatus().Code(); code {
		case codes.ResourceExhausted, codes.PermissionDenied:
			return nil, status.Error(code, "the process cannot be served")
		default:
		}
	}
	return nil, status.Error(codes.Unavailable, "the process cannot be attested at the moment")
}

// receive takes requests in until the stream ends, and returns why it did.
func (st *stream) receive() error {
	for {
		r, err := st.read()
		if err != nil {
			return err
		}
		st.mu.Lock()
		st.take(r)
		st.mu.Unlock()
		st.wake()
	}
}

// end says why the stream is to end: the first reason stays.
func (st *stream) end(err error) {
	st.mu.Lock()
	if st.err == nil {
		st.err = err
	}
	st.mu.Unlock()
	st.wake()
}

// received is a request with what is said about it to people.
type received struct {
	request
	typeURL string
	problem string // of a refusal
}

// read reads one request.
func (st *stream) read() (*received, error) {
	in := &incoming{delta: st.protocol.delta()}
	if err := st.grpc.RecvMsg(in); err != nil {
		return nil, err
	}
	if err := st.server.checkType(in.received.typeURL, st.protocol); err != nil {
		return nil, err
	}
	return in.received, nil
}

// checkType refuses other resources than secrets. On the dedicated streams the type
// may be left out.
func (s *Server) checkType(typeURL string, p protocol) error {
	if typeURL == TypeURL || typeURL == "" && !p.aggregated() {
		return nil
	}
	s.metrics.refusals[refusedType].Inc()
	return status.Errorf(codes.InvalidArgument, "only resources of the type %s are served", TypeURL)
}

// take takes a request into the session. The caller holds st.mu.
func (st *stream) take(r *received) {
	m := st.server.metrics
	outcome, sent := st.session.request(&r.request)
	switch outcome {
	case outcomeAccepted:
		m.acks[st.protocol].Inc()
		m.acknowledging.Observe(time.Since(sent).Seconds())
	case outcomeRejected:
		m.rejections[classify(r.problem)].Inc()
		st.server.logRejection(st.peer.PID, r.problem)
	case outcomeNone:
	}
	st.count()
}

// count moves the session's counts into the metrics. The caller holds st.mu.
func (st *stream) count() {
	s, m := st.session, st.server.metrics
	m.surplusNames.Add(float64(s.surplus))
	m.unknownNames.Add(float64(s.strange))
	s.surplus, s.strange = 0, 0
	for _, err := range s.blocked {
		m.withheld[withheldGuard].Inc()
		st.server.log.Error("secret held back because it is not what its name says", "pid", st.peer.PID, "err", err)
		st.server.report(conditionRejected, "a secret was held back because it is not what its name says; this is a defect of the agent")
	}
	s.blocked = nil
}

// wake has work look at what is due. It never blocks.
func (st *stream) wake() {
	for {
		switch phase := st.phase.Load(); phase {
		case idle:
			if st.phase.CompareAndSwap(idle, working) {
				go st.work()
				return
			}
		case working:
			if st.phase.CompareAndSwap(working, again) {
				return
			}
		default:
			return
		}
	}
}

// work sends what is due, until nothing is or the stream is to end.
func (st *stream) work() {
	for {
		st.phase.Store(working) // what was left before is seen below
		at, err := st.sendDue()
		if err != nil {
			st.setTimer(time.Time{})
			st.forget()
			st.phase.Store(over)
			st.end(err)
			st.hangUp()
			close(st.ended)
			return
		}
		st.setTimer(at)
		if st.phase.CompareAndSwap(working, idle) {
			return
		}
	}
}

// statusWriter is what gRPC's streams have besides what gRPC promises. Without it, only a
// second goroutine for each stream could end one whose handler waits for a message.
// TestStreamEnds fails if it is not there any more.
type statusWriter interface {
	// WriteStatus ends the call as if its handler had returned.
	WriteStatus(s *status.Status) error
}

// hangUp tells the client why the stream ends, and has receive return.
func (st *stream) hangUp() {
	var why *status.Status // nil is OK: the client is done
	if !errors.Is(st.err, io.EOF) {
		why = status.Convert(st.err)
	}
	if err := st.call.WriteStatus(why); err != nil {
		st.server.log.Debug("client was not told why its stream ends", "pid", st.peer.PID, "err", err)
	}
}

// setTimer has work look again at a time, or not by itself if that is zero.
func (st *stream) setTimer(at time.Time) {
	switch {
	case at.IsZero() && st.timer != nil:
		st.timer.Stop()
		st.timer = nil
	case at.IsZero():
	case st.timer == nil:
		st.timer = time.AfterFunc(time.Until(at), st.wake)
	default:
		st.timer.Reset(time.Until(at))
	}
}

// sendDue sends what is due and returns when to look again though nothing has
// happened, zero for never. The error says that the stream is to end.
func (st *stream) sendDue() (time.Time, error) {
	if st.watch == nil {
		if err := st.subscribe(); err != nil {
			return time.Time{}, err
		}
	}
	for {
		response, at, err := st.due(time.Now())
		if err != nil || response == nil {
			return at, err
		}
		if err := st.send(response); err != nil {
			return at, err
		}
	}
}

// subscribe subscribes the stream to the source, if it is not to end already.
func (st *stream) subscribe() error {
	st.mu.Lock()
	err := st.err
	st.mu.Unlock()
	if err != nil {
		return err
	}
	if st.watch, err = st.server.subscribe(st.grpc.Context(), st.peer); err != nil {
		return err
	}
	st.watch.Notify(st.wake)
	return nil
}

// due returns the response that is due now, or nil and when to look again though
// nothing has happened, zero for never. It also passes on what was acknowledged.
func (st *stream) due(now time.Time) (r *response, at time.Time, err error) {
	snapshot := st.watch.Snapshot()
	st.mu.Lock()
	if st.err != nil {
		st.mu.Unlock()
		return nil, at, st.err
	}
	select {
	case <-st.watch.Done():
		st.mu.Unlock()
		st.server.metrics.refusals[refusedSource].Inc()
		st.server.log.Debug("stream ended by its source", "pid", st.peer.PID, "err", st.watch.Err())
		return nil, at, status.Error(codes.Unavailable, "the agent cannot serve this process at the moment")
	default:
	}
	r = st.session.next(now, func(sub *subscription) resolution {
		r, again := st.server.resolve(snapshot, sub, now)
		at = earlier(at, again)
		return r
	})
	runtime.KeepAlive(snapshot) // secrets hold their SVIDs weakly
	sequence, acknowledged := st.session.acknowledge()
	carries, inForce := st.session.inForce()
	inForce = inForce && r == nil && snapshot != nil
	heard, waiting := st.session.heard, st.session.waiting
	unanswered, rejecting := st.session.inflight != nil, st.session.rejecting
	names := 0
	if st.held || !st.heldAt.IsZero() && !now.Before(st.heldAt) {
		names = waiting()
	}
	refused := st.session.refused
	st.session.refused = nil
	st.count()
	st.mu.Unlock()

	for _, leaf := range refused {
		st.watch.Reject(leaf)
	}
	if acknowledged {
		st.watch.Acknowledge(sequence)
	}
	if inForce && st.forced.Value() != snapshot {
		st.forced = weak.Make(snapshot)
		st.watch.InForce(snapshot, carries)
	}
	switch {
	case !st.silentAt.IsZero() && heard:
		st.silentAt, st.heldAt = time.Time{}, now.Add(heldAfter)
	case !st.silentAt.IsZero() && !now.Before(st.silentAt):
		st.server.metrics.refusals[refusedSilent].Inc()
		return nil, at, status.Error(codes.DeadlineExceeded, "no request was made")
	case !st.heldAt.IsZero() && !now.Before(st.heldAt):
		st.heldAt = time.Time{}
		if names > 0 {
			st.server.logHeld(st.peer.PID, names)
		}
	}
	st.show(unanswered, names > 0, rejecting)
	return r, earlier(at, earlier(st.silentAt, st.heldAt)), nil
}

// earlier returns the earlier of two times, of which zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// show keeps the gauges that count streams by their state.
func (st *stream) show(unanswered, held, rejecting bool) {
	m := st.server.metrics
	move(m.unanswered, &st.unanswered, unanswered)
	move(m.held, &st.held, held)
	if st.rejecting != rejecting {
		st.server.countRejecting(rejecting)
	}
	move(m.rejected, &st.rejecting, rejecting)
}

// forget takes the stream out of the gauges.
func (st *stream) forget() { st.show(false, false, false) }

// move counts a stream into or out of a gauge.
func move(g interface{ Add(float64) }, is *bool, will bool) {
	switch {
	case will && !*is:
		g.Add(1)
	case !will && *is:
		g.Add(-1)
	}
	*is = will
}

// send sends one response.
func (st *stream) send(r *response) error {
	// The process may have ended since it connected, and its connection be held
	// by another.
	if err := st.peer.Alive(); err != nil {
		return status.Error(codes.Unavailable, "the process has ended")
	}
	m := st.server.metrics
	for _, i := range r.items {
		if i.tombstone {
			m.tombstones.Inc()
		}
	}
	m.responses[st.protocol].Inc()
	if !st.protocol.delta() {
		return st.grpc.SendMsg(r.world())
	}
	return st.grpc.SendMsg(r.delta())
}

// world returns the response as a state of the world.
func (r *response) world() *discoveryv3.DiscoveryResponse {
	m := &discoveryv3.DiscoveryResponse{VersionInfo: r.version, TypeUrl: TypeURL, Nonce: r.nonce}
	for _, i := range r.items {
		m.Resources = append(m.Resources, i.any)
	}
	return m
}

// delta returns the response as a change.
func (r *response) delta() *discoveryv3.DeltaDiscoveryResponse {
	m := &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: r.version, TypeUrl: TypeURL, Nonce: r.nonce, RemovedResources: r.removed,
	}
	for _, i := range r.items {
		m.Resources = append(m.Resources, &discoveryv3.Resource{Name: i.name, Version: i.version, Resource: i.any})
	}
	return m
}

// fetch answers one request, as soon as there is something to answer.
func (s *Server) fetch(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	if err := s.checkType(r.GetTypeUrl(), protocolFetch); err != nil {
		return nil, err
	}
	caller, ok := peer.FromContext(ctx)
	if !ok {
		s.metrics.refusals[refusedPeer].Inc()
		return nil, status.Error(codes.Unauthenticated, "the process at the other end of the connection is not known")
	}
	release, err := s.admit(caller.UID)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, fetchWithin)
	defer cancel()
	watch, err := s.subscribe(ctx, caller)
	if err != nil {
		return nil, err
	}
	defer watch.Close()

	session := newSession(false, maxNames)
	session.request(&request{names: r.GetResourceNames()})
	for {
		now, snapshot := time.Now(), watch.Snapshot()
		due := session.next(now, func(sub *subscription) resolution {
			r, _ := s.resolve(snapshot, sub, now)
			return r
		})
		runtime.KeepAlive(snapshot) // secrets hold their SVIDs weakly
		if due != nil {
			if err := caller.Alive(); err != nil {
				return nil, status.Error(codes.Unavailable, "the process has ended")
			}
			s.metrics.responses[protocolFetch].Inc()
			return due.world(), nil
		}
		select {
		case <-watch.Changed():
		case <-watch.Done():
			return nil, status.Error(codes.Unavailable, "the agent cannot serve this process at the moment")
		case <-s.closing:
			return nil, errStopping
		case <-ctx.Done():
			return nil, status.Error(codes.Unavailable, "none of the secrets is there yet")
		}
	}
}

// logInterval bounds how often what a process can cause is logged as a warning.
// Each case is counted; a process could cause one as often as it connects.
const logInterval = time.Second

// maxProblem bounds how much of a proxy's error text is logged.
const maxProblem = 512

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

// logRejection logs that a proxy has refused a response.
func (s *Server) logRejection(pid int, problem string) {
	if len(problem) > maxProblem {
		problem = problem[:maxProblem]
	}
	if s.loud() {
		s.log.Warn("proxy refused a secret and keeps the one before", "pid", pid, "err", problem)
		return
	}
	s.log.Debug("proxy refused a secret and keeps the one before", "pid", pid, "err", problem)
}

// logHeld logs that a proxy has been waiting for long.
func (s *Server) logHeld(pid, names int) {
	if s.loud() {
		s.log.Warn("proxy waits for secrets and will have them as soon as they exist", "pid", pid, "names", names)
		return
	}
	s.log.Debug("proxy waits for secrets and will have them as soon as they exist", "pid", pid, "names", names)
}

// withhold counts and logs that a secret is not good enough to be sent.
func (s *Server) withhold(e *withheldError) {
	s.metrics.withheld[e.reason].Inc()
	if s.loud() {
		s.log.Warn("secret is not good enough to be sent", "reason", string(e.reason), "err", e)
		return
	}
	s.log.Debug("secret is not good enough to be sent", "reason", string(e.reason), "err", e)
}

// countRejecting reports the condition when the first stream begins to refuse and
// when the last one has ceased to.
func (s *Server) countRejecting(rejecting bool) {
	s.mu.Lock()
	if rejecting {
		s.rejected++
	} else {
		s.rejected--
	}
	n := s.rejected
	s.mu.Unlock()
	switch {
	case rejecting && n == 1:
		s.report(conditionRejected, "a proxy has refused a secret and keeps the one before; see the log for its reason")
	case !rejecting && n == 0:
		s.report(conditionRejected, "")
	}
}
