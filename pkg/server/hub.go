package server

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ca/rotation"
)

// hub knows the Sync stream of each node that has one and wakes it when there is
// something to send.
type hub struct {
	max int

	mu       sync.Mutex // guards what follows
	sessions map[string]*session
	closed   bool
}

func newHub(maxStreams int) *hub {
	return &hub{max: maxStreams, sessions: make(map[string]*session)}
}

// errReplaced ends a node's stream when it opens another.
var errReplaced = fail(kindConflict, "the node has opened another stream", nil)

// open makes a session for a node and ends the one that it had.
func (h *hub) open(nodeID string, serial []byte) (*session, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, had := h.sessions[nodeID]
	switch {
	case h.closed:
		return nil, fail(kindUnavailable, "the CA is shutting down", nil)
	case !had && len(h.sessions) >= h.max:
		return nil, fail(kindOverload, "too many streams: try again", nil)
	}
	if had {
		old.end(errReplaced)
	}
	s := &session{
		nodeID: nodeID, serial: serial,
		wake: make(chan struct{}, 1), done: make(chan struct{}), left: make(chan struct{}),
		inspections: make(map[uint64]chan *nodev1.Inspected),
	}
	h.sessions[nodeID] = s
	return s, nil
}

// close forgets a session whose stream has ended.
func (h *hub) close(s *session) {
	s.end(errors.New("stream has ended"))
	h.mu.Lock()
	if h.sessions[s.nodeID] == s {
		delete(h.sessions, s.nodeID)
	}
	h.mu.Unlock()
	close(s.left)
}

func (h *hub) get(nodeID string) (*session, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.sessions[nodeID]
	return s, ok
}

// all returns the sessions sorted by node.
func (h *hub) all() []*session {
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.sessions))
	h.mu.Unlock()
	slices.SortFunc(all, func(a, b *session) int {
		if a.nodeID < b.nodeID {
			return -1
		}
		return 1
	})
	return all
}

func (h *hub) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sessions)
}

// wakeAll has every session look at what is new.
func (h *hub) wakeAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.sessions {
		s.poke()
	}
}

// end ends the node's stream, if it has one.
func (h *hub) end(nodeID string, reason error) {
	if s, ok := h.get(nodeID); ok {
		s.end(reason)
	}
}

// shutdown ends all streams; no new one is opened.
func (h *hub) shutdown() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, s := range h.sessions {
		s.end(fail(kindUnavailable, "the CA is shutting down", nil))
	}
}

// maxInspections is the number of Inspect requests to one node that may be
// unanswered.
const maxInspections = 16

// session is the Sync stream of one node. Its handler sends; everybody else
// changes the state and wakes it.
type session struct {
	nodeID string
	serial []byte
	wake   chan struct{} // capacity 1; state is read afterwards under mu
	done   chan struct{} // closed by end
	left   chan struct{} // closed when the handler has returned

	mu     sync.Mutex // guards what follows
	ended  bool
	reason error
	// Orders that are still to be sent. Of rotations, the wider one stays.
	evicted  *nodev1.Evicted
	rotate   *nodev1.Rotate
	inspects []*nodev1.Inspect
	clock    *nodev1.Clock // likewise
	// inspections are waited for, by request.
	inspections map[uint64]chan *nodev1.Inspected
	nextRequest uint64
	// What the agent has reported.
	hello *nodev1.Hello
	force inForce
	// welcomed: it knows that it is to report withdrawals.
	welcomed bool
}

// inForce is what an agent has in force.
type inForce struct {
	revision       uint64
	bundleSequence uint64
	// quarantineSequence is that of the Quarantines which it has carried out.
	quarantineSequence uint64
	// streams of proxies and workloads, and how many of them have acknowledged
	// ackSequence.
	streams, acknowledged uint32
	ackSequence           uint64
	// Which streams have not, and how many X.509-SVIDs chain to which root, as far
	// as the agent says.
	laggards []rotation.Laggard
	held     map[string]uint32
	counted  bool
	reported bool
	// clockSkew is how far the agent says that its clock is ahead; nil if it does
	// not.
	clockSkew *durationpb.Duration
}

func (s *session) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// end ends the session; the first reason stays.
func (s *session) end(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended, s.reason = true, reason
	close(s.done)
}

func (s *session) endReason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reason
}

// evict has the agent told, as the last thing on this stream.
func (s *session) evict(e *nodev1.Evicted) {
	s.mu.Lock()
	s.evicted = e
	s.mu.Unlock()
	s.poke()
}

// order has the agent renew. An order for all of its X.509-SVIDs includes those
// for one authority's.
func (s *session) order(r *nodev1.Rotate) {
	s.mu.Lock()
	if s.rotate == nil || s.rotate.GetAuthority() != "" {
		if s.rotate != nil && s.rotate.GetAuthority() != r.GetAuthority() {
			// Two authorities at once: all, as soon as the more urgent of them.
			sooner := r
			if s.rotate.GetWithin().AsDuration() < r.GetWithin().AsDuration() {
				sooner = s.rotate
			}
			r = &nodev1.Rotate{Within: sooner.GetWithin(), Sequence: r.GetSequence()}
		}
		s.rotate = r
	}
	s.mu.Unlock()
	s.poke()
}

// inspect asks the agent about a process and waits for the answer.
func (s *session) inspect(ctx context.Context, pid int64) (*nodev1.Inspected, error) {
	answer := make(chan *nodev1.Inspected, 1)
	s.mu.Lock()
	if len(s.inspections) >= maxInspections {
		s.mu.Unlock()
		return nil, fail(kindOverload, "too many inspections of this node at the same time", nil)
	}
	s.nextRequest++
	request := s.nextRequest
	s.inspections[request] = answer
	s.inspects = append(s.inspects, &nodev1.Inspect{Request: request, Pid: pid})
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.inspections, request)
		s.inspects = slices.DeleteFunc(s.inspects, func(i *nodev1.Inspect) bool { return i.GetRequest() == request })
		s.mu.Unlock()
	}()
	s.poke()
	select {
	case a := <-answer:
		return a, nil
	case <-s.done:
		return nil, fail(kindUnavailable, "the node's stream has ended", s.endReason())
	case <-ctx.Done():
		return nil, fail(kindUnavailable, "the node did not answer in time", ctx.Err())
	}
}

// eviction returns what the agent is to be told of its eviction, if it is to be.
func (s *session) eviction() *nodev1.Evicted {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.evicted
}

// takeOrders returns what is still to be sent, once.
func (s *session) takeOrders() (rotate *nodev1.Rotate, inspects []*nodev1.Inspect, clock *nodev1.Clock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rotate, inspects, clock = s.rotate, s.inspects, s.clock
	s.rotate, s.inspects, s.clock = nil, nil, nil
	return rotate, inspects, clock
}

// welcome notes that the agent is about to be asked to report withdrawals.
func (s *session) welcome() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.welcomed = true
}

// reports says whether the agent has been asked to report withdrawals.
func (s *session) reports() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.welcomed
}

// stays says whether an evicted agent has been welcomed, and so stays to report.
func (s *session) stays() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.welcomed && !s.ended
}

// opened returns Hello once it has come.
func (s *session) opened() (*nodev1.Hello, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hello, s.hello != nil
}

// setForce notes a revision as in force from the start: the agent resumed with it.
func (s *session) setForce(revision, bundleSequence uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.force.revision, s.force.bundleSequence = revision, bundleSequence
}

func (s *session) inForce() inForce {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.force
}

// waitLeft waits until the handler has returned, or for d.
func (s *session) waitLeft(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.left:
	case <-t.C:
	case <-ctx.Done():
	}
}
