package server

// How long it takes until what was withdrawn is out of use:
//
//  1. beginWithdrawal notes a withdrawal in the moment in which it comes into force
//     at the CA, with the nodes that have to carry it out;
//  2. each agent says what became of its streams (reported), and that it has carried
//     out what it was sent (applied);
//  3. when nobody is waited for any more the withdrawal is complete: recorded,
//     measured, and remembered for a while without its nodes.

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/server/registry"
)

const (
	// maxOpenWithdrawals bounds those that are followed at the same time: the oldest
	// is given up for the next. maxWithdrawals bounds all that are remembered.
	maxOpenWithdrawals, maxWithdrawals = 32, 128
	// maxWithdrawn bounds what is said about what was withdrawn.
	maxWithdrawn = 512
	// leaveGrace is how long the stream of an evicted agent stays open for it to say
	// what its proxies did.
	leaveGrace = 10 * time.Second
)

// Kinds of withdrawals.
const (
	withdrawalEntry      = "entry"
	withdrawalNode       = "node"
	withdrawalQuarantine = "quarantine"
)

// States of withdrawals.
const (
	withdrawalPending    = "pending"
	withdrawalComplete   = "complete"
	withdrawalIncomplete = "incomplete"
)

// withdrawals are those that began since the CA started. The zero value has none.
type withdrawals struct {
	// mu guards what follows, and each withdrawal. Whoever holds it may take the
	// hub's, and never a session's.
	mu  sync.Mutex
	all []*withdrawal // the oldest first
}

// pending counts those that somebody is waited for.
func (ws *withdrawals) pending() (n int) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		if w.ended.IsZero() {
			n++
		}
	}
	return n
}

// withdrawal is one thing that was taken back.
type withdrawal struct {
	id, cause, what string
	// at is the revision, or the sequence of quarantines, that brought it; 0 for a
	// node.
	at      uint64
	began   time.Time
	ended   time.Time // zero while it is pending
	actor   string
	request string

	waiting                      map[string]*carriedOut // by node, those that are waited for
	room                         int                    // how many it had when it was made
	nodes, applied, silent, gone uint32
	// Of all nodes that are not waited for any more. Those of the others are theirs.
	streams, acknowledged, lost uint32
	effect                      delays
	// below are the CAs below whose right to intermediates it took.
	below []string

	// What follows is about revocation lists. revoking is set until it is known what
	// was put on them, or while more is to come; lists are the nodes, of listNodes,
	// whose proxies have not acknowledged sequence, which is that of the bundle with
	// the newest of the lists.
	revoking   bool
	revoked    uint32
	sequence   uint64
	lists      map[string]bool
	listNodes  uint32
	notRevoked string
	refused    delays
}

// carriedOut is how far a node is.
type carriedOut struct {
	applied                     bool
	streams, acknowledged, lost uint32
	laggards                    []*nodev1.Laggard
}

// begin puts something out of force and notes its withdrawal, as one: no agent can
// say that it has carried it out before it is waited for. change returns the
// withdrawal's at. The agents are told afterwards, and then revoke
// is called.
func (s *Server) beginWithdrawal(c *caller, cause, what string, nodes []string, change func() uint64) (id string) {
	w := &withdrawal{
		id: strings.ToLower(rand.Text()[:12]), cause: cause, what: cut(what, maxWithdrawn), actor: c.actor, request: c.requestID,
		waiting: make(map[string]*carriedOut, len(nodes)), room: len(nodes), nodes: clamp(len(nodes)),
		revoking: s.cfg.CA.RevokesByLists(),
	}
	for _, node := range nodes {
		w.waiting[node] = new(carriedOut)
	}
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	allowed := s.allowedBelow()
	w.at, w.began = change(), time.Now()
	still := s.allowedBelow()
	w.below = slices.DeleteFunc(allowed, func(id string) bool { return slices.Contains(still, id) })
	ws.all = append(ws.all, w)
	open := 0
	for _, other := range slices.Backward(ws.all) {
		if !other.ended.IsZero() {
			continue
		}
		if open++; open > maxOpenWithdrawals {
			s.giveUp(other)
		}
	}
	if over := len(ws.all) - maxWithdrawals; over > 0 {
		ws.all = slices.Delete(ws.all, 0, over)
	}
	s.settleWithdrawal(w)
	return w.id
}

// cut shortens a text for people.
func cut(text string, to int) string {
	if len(text) <= to {
		return text
	}
	return strings.ToValidUTF8(text[:to], "") + "…"
}

// entitled are the nodes that may have something of what is to be withdrawn: those
// that have an X.509-SVID of their own.
func (s *Server) entitled() (nodes []string) {
	now := time.Now()
	for _, n := range s.registry.Nodes() {
		if n.State == registry.Active && n.NotAfter.After(now) {
			nodes = append(nodes, n.ID)
		}
	}
	return nodes
}

// concerns says whether what an agent did from after to until includes the
// withdrawal.
func (w *withdrawal) concerns(cause nodev1.Cause, after, until uint64) bool {
	switch cause {
	case nodev1.Cause_CAUSE_ENTRIES:
		return w.cause == withdrawalEntry && after < w.at && w.at <= until
	case nodev1.Cause_CAUSE_QUARANTINE:
		return w.cause == withdrawalQuarantine && after < w.at && w.at <= until
	default:
		return true // an eviction withdraws everything
	}
}

// reported takes what an agent says about what it withdrew.
func (s *Server) reported(node string, m *nodev1.Withdrawing) error {
	settled := uint64(m.GetAcknowledged()) + uint64(m.GetEnded())
	switch {
	case len(m.GetLaggards()) > maxNodeLaggards:
		return fail(kindInvalid, fmt.Sprintf("more than %d laggards in one report", maxNodeLaggards), nil)
	case slices.ContainsFunc(m.GetLaggards(), func(l *nodev1.Laggard) bool { return len(l.GetName()) > maxLaggardName }):
		return fail(kindInvalid, "the name of a laggard is too long", nil)
	case m.GetCause() == nodev1.Cause_CAUSE_UNSPECIFIED:
		return fail(kindInvalid, "a withdrawal without a cause", nil)
	case settled > uint64(m.GetStreams()) || m.GetStreams() > maxNodeStreams:
		return fail(kindInvalid, fmt.Sprintf("%d of %d streams have acknowledged or ended: at most %d can be open", settled, m.GetStreams(), maxNodeStreams), nil)
	}
	now := time.Now()
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		n := w.waiting[node]
		if n == nil || !w.concerns(m.GetCause(), m.GetAfter(), m.GetUntil()) {
			continue
		}
		// Of an eviction on top of something else, the larger numbers stay.
		if m.GetCause() == nodev1.Cause_CAUSE_EVICTION {
			n.applied = true
			if n.streams > m.GetStreams() {
				continue
			}
		}
		if news := m.GetAcknowledged(); news > n.acknowledged {
			w.effect.add(now.Sub(w.began), news-n.acknowledged)
			s.metrics.withdrawalEffect[w.cause].observe(now.Sub(w.began), news-n.acknowledged)
			n.acknowledged = news
		}
		n.streams, n.lost, n.laggards = max(m.GetStreams(), n.acknowledged), m.GetEnded(), m.GetLaggards()
		s.settleNode(w, node, n)
	}
	return nil
}

// maxNodeStreams is more than any agent keeps open.
const maxNodeStreams = 1 << 20

// carriedOutBy notes what an agent has in force. speaks says whether it is one that
// reports.
func (s *Server) carriedOutBy(node string, revision, quarantines uint64, speaks bool) {
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		n := w.waiting[node]
		if n == nil || n.applied || w.cause == withdrawalNode {
			continue
		}
		if w.cause == withdrawalEntry && revision < w.at || w.cause == withdrawalQuarantine && quarantines < w.at {
			continue
		}
		n.applied = true
		if !speaks {
			w.silent++
		}
		s.settleNode(w, node, n)
	}
}

// evictedSilently notes that an agent was told to leave which does not report.
func (s *Server) evictedSilently(node string) {
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		if n := w.waiting[node]; n != nil {
			n.applied = true
			w.silent++
			s.settleNode(w, node, n)
		}
	}
}

// settleNode waits for a node no longer if it has nothing more to say. ws.mu is held.
func (s *Server) settleNode(w *withdrawal, node string, n *carriedOut) {
	if !n.applied || n.acknowledged+n.lost < n.streams {
		return
	}
	w.applied++
	w.leave(node, n)
	s.settleWithdrawal(w)
}

// leave adds up what a node did that is not waited for any more.
func (w *withdrawal) leave(node string, n *carriedOut) {
	w.streams, w.acknowledged, w.lost = w.streams+n.streams, w.acknowledged+n.acknowledged, w.lost+n.lost
	delete(w.waiting, node)
	if w.room > 64 && len(w.waiting) < w.room/8 { // a map does not shrink by itself
		w.waiting, w.room = maps.Collect(maps.All(w.waiting)), len(w.waiting)
	}
}

// giveUp waits for nobody any more. ws.mu is held.
func (s *Server) giveUp(w *withdrawal) {
	for node, n := range w.waiting {
		w.gone++
		w.leave(node, n)
	}
	w.gone += clamp(len(w.lists))
	w.lists, w.revoking = nil, false
	s.settleWithdrawal(w)
}

// reviewWithdrawals waits no longer for nodes that nothing is to be expected of:
// their own X.509-SVID has expired, and with it all that they were issued before; or
// they were evicted, and have gone without a word.
func (s *Server) reviewWithdrawals(now time.Time) {
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.all {
		for node, n := range w.waiting {
			known, ok := s.registry.Node(node)
			_, connected := s.hub.get(node)
			if ok && known.NotAfter.After(now) && (connected || known.State == registry.Active) {
				continue
			}
			if ok && !connected && known.NotAfter.After(now) && now.Sub(w.began) < leaveGrace {
				continue // its report may be on its way
			}
			w.gone++
			w.leave(node, n)
			delete(w.lists, node)
			s.settleWithdrawal(w)
		}
		for node := range w.lists {
			known, ok := s.registry.Node(node)
			_, connected := s.hub.get(node)
			if w.waiting[node] != nil || ok && known.State == registry.Active && (connected || known.NotAfter.After(now)) {
				continue
			}
			w.gone++
			delete(w.lists, node)
			s.settleWithdrawal(w)
		}
	}
}

// settleWithdrawal ends a withdrawal that nobody is waited for. ws.mu is held.
func (s *Server) settleWithdrawal(w *withdrawal) {
	if len(w.waiting) > 0 || w.revoking || len(w.lists) > 0 || !w.ended.IsZero() {
		return
	}
	w.ended = time.Now()
	state := w.state()
	s.metrics.withdrawals.WithLabelValues(w.cause, state).Inc()
	if w.nodes == 0 && w.revoked == 0 {
		return // it concerned nobody
	}
	r := s.ownRecord(ledgerv1.Event_EVENT_WITHDRAWN)
	r.Actor, r.RequestId = w.actor, w.request
	if w.cause == withdrawalNode && w.nodes == 1 {
		r.Node = &ledgerv1.NodeRef{Id: w.what}
	}
	r.Detail, r.Took = truncate(w.summary()), durationpb.New(w.ended.Sub(w.began))
	if state == withdrawalIncomplete {
		r.Outcome = ledgerv1.Outcome_OUTCOME_ERROR
	}
	s.tasks.start(func() {
		if err := s.append(context.Background(), r); err != nil {
			s.log.Error("end of a withdrawal cannot be recorded", "err", err)
		}
	})
}

func (w *withdrawal) state() string {
	switch {
	case w.ended.IsZero():
		return withdrawalPending
	case w.gone > 0 || w.acknowledged+w.lost < w.streams || w.notRevoked != "":
		return withdrawalIncomplete
	default:
		return withdrawalComplete
	}
}

// summary says for people what became of it.
func (w *withdrawal) summary() string {
	text := fmt.Sprintf("%s %s: carried out on %d of %d nodes; %d of %d streams have acknowledged", w.cause, w.what, w.applied, w.nodes, w.acknowledged, w.streams)
	if w.lost > 0 {
		text += fmt.Sprintf(", %d ended before", w.lost)
	}
	if w.acknowledged > 0 {
		text += fmt.Sprintf("; time to effect p50 %s, p99 %s, max %s", w.effect.quantile(.5).Round(time.Millisecond), w.effect.quantile(.99).Round(time.Millisecond), w.effect.max.Round(time.Millisecond))
	}
	if w.revoked > 0 || w.notRevoked != "" {
		text += fmt.Sprintf("; %d certificates revoked, in force on %d of %d nodes", w.revoked, w.listNodes-clamp(len(w.lists)), w.listNodes)
	}
	if w.refused.total > 0 {
		text += fmt.Sprintf(", at the last proxy after %s", w.refused.max.Round(time.Millisecond))
	}
	if w.notRevoked != "" {
		text += "; not all are on a list: " + w.notRevoked
	}
	return text
}

// ListWithdrawals implements adminv1.AdminServiceServer.
func (a *adminService) ListWithdrawals(ctx context.Context, req *adminv1.ListWithdrawalsRequest) (*adminv1.ListWithdrawalsResponse, error) {
	s := a.s
	s.reviewWithdrawals(time.Now())
	resp := new(adminv1.ListWithdrawalsResponse)
	var fleet []rotation.Node
	if s.cfg.CA.RevokesByLists() {
		fleet = s.Fleet()
	}
	below := s.disallowedBelow(ctx)
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range slices.Backward(ws.all) {
		if req.GetId() == "" || req.GetId() == w.id {
			p := s.withdrawalProto(w, fleet)
			for _, a := range below {
				if slices.Contains(w.below, a.GetSpiffeId()) {
					p.Below = append(p.Below, a)
				}
			}
			resp.Withdrawals = append(resp.Withdrawals, p)
		}
	}
	if req.GetId() != "" && len(resp.GetWithdrawals()) == 0 {
		return nil, fail(kindNotFound, fmt.Sprintf("there is no withdrawal %q: this CA remembers the last %d since it started, the ledger has them all (withdrawn)",
			truncate(req.GetId()), maxWithdrawals), nil)
	}
	return resp, nil
}

// disallowedBelow are the intermediates that live of CAs below which a withdrawal
// concerns, and which may have no others. Where the store cannot be read, the CAs are
// named without what they have.
func (s *Server) disallowedBelow(ctx context.Context) []*adminv1.AuthorityBelow {
	var concerned []string
	s.withdrawals.mu.Lock()
	for _, w := range s.withdrawals.all {
		concerned = append(concerned, w.below...)
	}
	s.withdrawals.mu.Unlock()
	if len(concerned) == 0 {
		return nil
	}
	allowed := s.allowedBelow()
	concerned = slices.DeleteFunc(concerned, func(id string) bool { return slices.Contains(allowed, id) })
	below, err := s.authoritiesBelow(ctx, func(id string) bool { return slices.Contains(concerned, id) })
	if err != nil {
		s.log.WarnContext(ctx, "intermediates of CAs below cannot be read", "err", err)
		slices.Sort(concerned)
		for _, id := range slices.Compact(concerned) {
			below = append(below, &adminv1.AuthorityBelow{SpiffeId: id})
		}
	}
	return below
}

// withdrawalProto describes a withdrawal. ws.mu is held.
func (s *Server) withdrawalProto(w *withdrawal, fleet []rotation.Node) *adminv1.Withdrawal {
	p := &adminv1.Withdrawal{
		Id: w.id, Cause: w.cause, What: w.what, Began: timestamppb.New(w.began), State: w.state(),
		Nodes: w.nodes, NodesApplied: w.applied, NodesSilent: w.silent, NodesGone: w.gone,
		Streams: w.streams, StreamsAcknowledged: w.acknowledged, StreamsEnded: w.lost,
		Revoked: w.revoked, RevocationNodes: w.listNodes, RevocationNodesInForce: w.listNodes - clamp(len(w.lists)), NotRevoked: w.notRevoked,
	}
	if !w.ended.IsZero() {
		p.Ended = timestamppb.New(w.ended)
	}
	if w.refused.total > 0 {
		p.RevocationEffect = durationpb.New(w.refused.max)
	}
	for node, n := range w.waiting {
		if n.applied {
			p.NodesApplied++
		}
		p.Streams, p.StreamsAcknowledged, p.StreamsEnded = p.GetStreams()+n.streams, p.GetStreamsAcknowledged()+n.acknowledged, p.GetStreamsEnded()+n.lost
		p.Laggards = append(p.Laggards, s.withdrawalLaggards(w, node, n)...)
	}
	for _, n := range fleet {
		if w.lists[n.ID] && w.waiting[n.ID] == nil {
			p.Laggards = append(p.Laggards, s.listLaggards(w, n)...)
		}
	}
	slices.SortFunc(p.GetLaggards(), func(a, b *adminv1.Laggard) int {
		if c := a.GetSince().AsTime().Compare(b.GetSince().AsTime()); c != 0 {
			return c
		}
		return strings.Compare(a.GetNodeId()+a.GetName(), b.GetNodeId()+b.GetName())
	})
	p.Laggards = p.GetLaggards()[:min(len(p.GetLaggards()), maxShown)]
	if p.GetStreamsAcknowledged() > 0 {
		p.P50, p.P99, p.Max = durationpb.New(w.effect.quantile(.5)), durationpb.New(w.effect.quantile(.99)), durationpb.New(w.effect.max)
	}
	return p
}

// listLaggards names what of a node goes by older revocation lists.
func (s *Server) listLaggards(w *withdrawal, n rotation.Node) []*adminv1.Laggard {
	lagging := new(carriedOut)
	for _, l := range n.Laggards {
		lagging.laggards = append(lagging.laggards, &nodev1.Laggard{Name: l.Name})
	}
	return s.withdrawalLaggards(w, n.ID, lagging)
}

// withdrawalLaggards names what of a node is waited for.
func (s *Server) withdrawalLaggards(w *withdrawal, node string, n *carriedOut) (all []*adminv1.Laggard) {
	if _, connected := s.hub.get(node); !connected {
		l := &adminv1.Laggard{NodeId: node, Since: timestamppb.New(w.began)}
		if known, ok := s.registry.Node(node); ok {
			l.Since, l.WaitedUntil = timestamppb.New(known.LastSeen), timestamppb.New(known.NotAfter)
		}
		return []*adminv1.Laggard{l}
	}
	for _, l := range n.laggards {
		all = append(all, &adminv1.Laggard{NodeId: node, Name: l.GetName(), Since: timestamppb.New(w.began), Connected: true})
	}
	if len(all) == 0 {
		all = append(all, &adminv1.Laggard{NodeId: node, Since: timestamppb.New(w.began), Connected: true})
	}
	return all
}

// stay keeps the stream of an evicted agent open until it has said what its proxies
// did.
func (s *sender) stay() {
	timer := time.NewTimer(leaveGrace)
	defer timer.Stop()
	for {
		select {
		case <-s.session.wake:
		case <-s.session.done:
			return
		case <-s.stream.Context().Done():
			return
		case <-timer.C:
			return
		}
	}
}

// dismiss closes the streams and connections of evicted nodes: at once those of which
// the agent does not stay to report, and the others when it has reported.
func (s *Server) dismiss(ctx context.Context, told []*session) {
	ctx = context.WithoutCancel(ctx)
	bye := func(session *session) {
		session.end(fail(kindUnauthenticated, "the node was evicted: attest again", nil))
		// The stream's end is on its way through gRPC's own queue; closing the
		// connection at once could overtake it.
		pause(ctx, flushGrace)
		s.conns.closeAll(session.nodeID)
	}
	var mu sync.Mutex // guards staying
	var staying []*session
	var leaving sync.WaitGroup
	for _, session := range told {
		leaving.Go(func() {
			session.waitLeft(ctx, evictionGrace)
			if !session.reports() {
				s.evictedSilently(session.nodeID)
			}
			if session.stays() {
				mu.Lock()
				defer mu.Unlock()
				staying = append(staying, session)
				return
			}
			bye(session)
		})
	}
	leaving.Wait()
	wait := func() {
		var all sync.WaitGroup
		for _, session := range staying {
			all.Go(func() {
				session.waitLeft(ctx, leaveGrace)
				bye(session)
			})
		}
		all.Wait()
		s.reviewWithdrawals(time.Now())
	}
	if len(staying) > 0 && s.tasks.start(wait) {
		return
	}
	for _, session := range staying { // the CA is shutting down
		bye(session)
	}
	s.reviewWithdrawals(time.Now())
}
