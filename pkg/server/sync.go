package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Limits of a Sync stream.
const (
	helloTimeout = 10 * time.Second
	// Messages of an agent: so many a second after so many at once.
	syncRate, syncBurst = 50, 2000
	// Records of ended instances of one node, likewise. What is over the limit
	// is counted, not recorded.
	endedRate, endedBurst = 50, 2000
	maxEnded              = 512 // in one message
	maxEndedSerials       = 16  // of one instance
)

// Sync implements nodev1.NodeServiceServer. This goroutine sends, a second one
// receives; they share the session only.
func (n *nodeService) Sync(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	s := n.s
	c, err := callerOf(stream.Context())
	if err != nil {
		return err
	}
	if c.node == nil {
		return fail(kindDenied, "permission denied", errors.New("caller is not a node"))
	}
	session, err := s.hub.open(c.node.ID, c.serial)
	if err != nil {
		return err
	}
	defer s.hub.close(session)
	// An eviction after authorization and before open would have found no
	// session to end.
	if now, ok := s.registry.Node(c.node.ID); !ok || now.State != registry.Active {
		return fail(kindUnauthenticated, "the node was evicted: attest again", nil)
	}
	if !s.tasks.start(func() { // Recv ends when this handler has returned
		session.end(receive(s, stream, c, nodev1.NodeService_Sync_FullMethodName, syncRate, syncBurst, func(msg *nodev1.SyncRequest) error {
			return s.take(stream.Context(), session, c, msg)
		}))
	}) {
		return fail(kindUnavailable, "the CA is shutting down", nil)
	}
	sender := &sender{
		s: s, session: session, stream: stream, caller: c, node: c.node,
		epoch: c.node.Epoch(s.registry.Epoch()),
		facts: identity.NewFacts(c.node.Attributes, nil),
	}
	return sender.run(c.notAfter)
}

// receive gives take each message of a stream, until the stream ends or take returns an
// error, which it then returns: errLeft if the other side has closed it. The stream may
// carry rate messages a second, and burst at once.
func receive[Req, Res any](s *Server, stream grpc.BidiStreamingServer[Req, Res], c *caller, method string, rate, burst float64, take func(*Req) error) (err error) {
	// No interceptor is above this goroutine.
	defer func() {
		if p := recover(); p != nil {
			err = s.finish(stream.Context(), c, method, p, nil)
		}
	}()
	limit := newBucket(rate, burst)
	for {
		msg, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return errLeft
		case err != nil:
			return err
		}
		if got, _ := limit.take(time.Now(), 1); got == 0 {
			return fail(kindOverload, "too many messages", nil)
		}
		if err := take(msg); err != nil {
			return err
		}
	}
}

// errLeft ends a session in good order.
var errLeft = errors.New("the other side has closed the stream")

// take takes one message.
func (s *Server) take(ctx context.Context, session *session, c *caller, msg *nodev1.SyncRequest) error {
	session.mu.Lock()
	defer session.mu.Unlock()
	hello, isHello := msg.GetMessage().(*nodev1.SyncRequest_Hello)
	if isHello != (session.hello == nil) {
		return fail(kindInvalid, "hello must come first, and once", nil)
	}
	switch m := msg.GetMessage().(type) {
	// What an evicted agent may still say.
	case *nodev1.SyncRequest_Withdrawing:
		session.mu.Unlock()
		defer session.mu.Lock()
		return s.reported(session.nodeID, m.Withdrawing)
	case *nodev1.SyncRequest_Hello:
		if !legalVersion(hello.Hello.GetAgentVersion()) {
			return fail(kindInvalid, "the agent's version is not a short line of ASCII", nil)
		}
		session.hello = hello.Hello
		// An order that came before Hello is among them.
		if missed := s.orders.missed(time.Now(), c.node.AttestedAt, hello.Hello.GetRotated()); missed != nil {
			session.rotate = missed
		}
		session.poke()
	case *nodev1.SyncRequest_Applied:
		if session.evicted != nil {
			return nil // it has nothing in force
		}
		session.force.revision = m.Applied.GetRevision()
		session.force.bundleSequence = m.Applied.GetBundleSequence()
		if skew := m.Applied.GetClockSkew(); skew.IsValid() {
			session.force.clockSkew = skew
		}
		if sent := m.Applied.GetSent(); sent.IsValid() {
			session.clock = &nodev1.Clock{Sent: sent, Received: timestamppb.Now()}
			session.poke()
		}
		session.force.quarantineSequence = m.Applied.GetQuarantineSequence()
		s.cfg.CA.FleetChanged()
		speaks := session.welcomed
		session.mu.Unlock()
		defer session.mu.Lock()
		s.carriedOutBy(session.nodeID, m.Applied.GetRevision(), m.Applied.GetQuarantineSequence(), speaks)
		s.listsInForce(session)
	case *nodev1.SyncRequest_BundleAcks:
		if err := session.force.acks(m.BundleAcks); err != nil {
			return err
		}
		s.cfg.CA.FleetChanged()
		session.mu.Unlock()
		defer session.mu.Lock()
		s.listsInForce(session)
	case *nodev1.SyncRequest_InstancesEnded:
		session.mu.Unlock()
		defer session.mu.Lock()
		return s.recordEnded(ctx, c, m.InstancesEnded)
	case *nodev1.SyncRequest_Inspected:
		if answer, ok := session.inspections[m.Inspected.GetRequest()]; ok {
			delete(session.inspections, m.Inspected.GetRequest())
			answer <- m.Inspected // capacity 1, and this is the only one
		}
	default:
		return fail(kindInvalid, "unknown message", nil)
	}
	return nil
}

// recordEnded records that instances have ended and their keys were dropped.
func (s *Server) recordEnded(ctx context.Context, c *caller, m *nodev1.InstancesEnded) error {
	ended := m.GetInstances()
	if len(ended) > maxEnded {
		return fail(kindInvalid, fmt.Sprintf("%d instances in one message, at most %d are allowed", len(ended), maxEnded), nil)
	}
	for _, e := range ended {
		if len(e.GetInstance()) == 0 || len(e.GetInstance()) > maxInstanceBytes {
			return fail(kindInvalid, "an instance's name is empty or too long", nil)
		}
	}
	admitted, _ := s.useOf(c.node.ID).ended.take(time.Now(), len(ended))
	if over := len(ended) - admitted; over > 0 {
		s.metrics.suppressed.Add(float64(over))
	}
	if admitted == 0 {
		return nil
	}
	records := make([]*ledgerv1.Record, admitted)
	for i, e := range ended[:admitted] {
		r := s.newRecord(c, ledgerv1.Event_EVENT_INSTANCE_ENDED)
		r.Took = nil // the call is a stream
		r.Node, r.Instance, r.VerifiedBy = nodeRef(c.node, c.address), e.GetInstance(), "agent"
		r.Dropped, r.Detail = dropped(e.GetSerials())
		records[i] = r
	}
	if err := s.append(ctx, records...); err != nil {
		s.log.ErrorContext(ctx, "end of instances cannot be recorded", "node_id", c.node.ID, "err", err)
	}
	return nil
}

// dropped names the certificates of an instance that has ended, the first
// maxEndedSerials of them.
func dropped(serials [][]byte) (certificates []*ledgerv1.Certificate, detail string) {
	for _, serial := range serials[:min(len(serials), maxEndedSerials)] {
		certificates = append(certificates, &ledgerv1.Certificate{Serial: serial[:min(len(serial), maxSerialBytes)]})
	}
	if over := len(serials) - maxEndedSerials; over > 0 {
		detail = fmt.Sprintf("and %d more certificates", over)
	}
	return certificates, detail
}

// sender sends to one agent what it does not have yet. What it has sent is the
// whole of its state: changes that follow each other quickly are one message.
type sender struct {
	s       *Server
	session *session
	stream  grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]
	caller  *caller
	node    *registry.Node
	epoch   string
	facts   *identity.Facts

	welcomed bool // it was told that this CA wants to hear of withdrawals
	synced   bool // a snapshot was sent, or the agent resumed
	revision uint64
	bundled  bool
	sequence uint64
	// quarantines are those that were sent; nil is none.
	quarantines *registry.Quarantines
}

// run sends until the session or the agent's X.509-SVID ends.
func (s *sender) run(notAfter time.Time) error {
	expired := time.NewTimer(time.Until(notAfter))
	defer expired.Stop()
	late := time.NewTimer(helloTimeout)
	defer late.Stop()
	for {
		if evicted, err := s.sendNew(); err != nil || evicted {
			if evicted && s.welcomed {
				s.stay()
			}
			return err
		}
		select {
		case <-s.session.wake:
		case <-s.session.done:
			if reason := s.session.endReason(); !errors.Is(reason, errLeft) {
				return reason
			}
			return nil
		case <-s.stream.Context().Done():
			return s.stream.Context().Err()
		case <-expired.C:
			return fail(kindUnauthenticated, "the X.509-SVID has expired", nil)
		case <-late.C:
			if _, ok := s.session.opened(); !ok {
				return fail(kindInvalid, "hello did not come in time", nil)
			}
		}
	}
}

// sendNew sends all that the agent does not have: first what takes its rights,
// then the bundle, then the entries, then orders.
func (s *sender) sendNew() (evicted bool, err error) {
	if eviction := s.session.eviction(); eviction != nil {
		err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Evicted{Evicted: eviction}})
		return true, errors.Join(err, fail(kindUnauthenticated, "the node was evicted: attest again", nil))
	}
	quarantines := s.s.registry.Quarantines()
	if q, ok := quarantines.Of(s.node.ID, s.caller.key, s.caller.serial); ok {
		// By its name it may not attest again; with another key it may.
		s.session.evict(&nodev1.Evicted{Banned: q.SPIFFEID != "", Reason: "quarantined: " + q.Reason})
		return s.sendNew()
	}
	hello, ok := s.session.opened()
	if !ok {
		return false, nil
	}
	if hello.GetReportsWithdrawals() && !s.welcomed {
		welcome := &nodev1.Welcome{ReportsWithdrawals: true, NamesInCsr: s.s.cfg.CA.NamesInCSR()}
		s.session.welcome()
		if err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Welcome{Welcome: welcome}}); err != nil {
			return false, err
		}
		s.welcomed = true
	}
	if quarantines != s.quarantines || quarantines == nil && hello.GetQuarantineSequence() > 0 && !s.synced {
		if err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Quarantines{Quarantines: quarantinesProto(quarantines)}}); err != nil {
			return false, err
		}
		s.quarantines = quarantines
	}
	rotate, inspects, clock := s.session.takeOrders()
	if clock != nil {
		if err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Clock{Clock: clock}}); err != nil {
			return false, err
		}
	}
	if bundle := s.s.bundle(); !s.bundled || bundle.GetSequence() != s.sequence {
		if err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: bundle}}); err != nil {
			return false, err
		}
		s.bundled, s.sequence = true, bundle.GetSequence()
	}
	if err := s.sendEntries(hello); err != nil {
		return false, err
	}
	if rotate != nil {
		if err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Rotate{Rotate: rotate}}); err != nil {
			return false, err
		}
	}
	for _, i := range inspects {
		if err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Inspect{Inspect: i}}); err != nil {
			return false, err
		}
	}
	return false, nil
}

// sendEntries brings the agent to the current revision: by a delta where the
// history reaches back to what the agent has, else by a snapshot.
func (s *sender) sendEntries(hello *nodev1.Hello) error {
	entries := s.s.registry.Entries()
	from := s.revision
	if !s.synced {
		if hello.GetEpoch() != s.epoch {
			return s.sendSnapshot(entries)
		}
		if from = hello.GetRevision(); from > entries.Revision {
			s.s.log.WarnContext(s.stream.Context(), "an agent was told more than this ca knows, and does not follow it: if all of its data folder was restored from a copy, see ca store accept --restored",
				"node_id", s.node.ID, "revision", entries.Revision, "agents_revision", from)
		}
	}
	if from == entries.Revision {
		if !s.synced {
			s.synced, s.revision = true, from
			s.session.setForce(from, hello.GetBundleSequence())
		}
		return nil
	}
	upserts, removed, ok := entries.Delta(from, s.facts)
	if !ok {
		return s.sendSnapshot(entries)
	}
	err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Delta{Delta: &nodev1.Delta{
		FromRevision: from, Revision: entries.Revision, Upserts: protos(upserts), Removed: removed,
	}}})
	if err != nil {
		return err
	}
	s.s.metrics.syncMessages.WithLabelValues("delta").Inc()
	s.synced, s.revision = true, entries.Revision
	return nil
}

func (s *sender) sendSnapshot(entries *registry.Entries) error {
	err := s.send(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Snapshot{Snapshot: &nodev1.Snapshot{
		Epoch: s.epoch, Revision: entries.Revision, Entries: protos(entries.Set.MatchNode(s.facts)), Node: s.node.Attributes,
	}}})
	if err != nil {
		return err
	}
	s.s.metrics.syncMessages.WithLabelValues("snapshot").Inc()
	s.synced, s.revision = true, entries.Revision
	return nil
}

func (s *sender) send(m *nodev1.SyncResponse) error { return s.stream.Send(m) }

func protos(entries []*identity.Entry) []*entryv1.Entry {
	all := make([]*entryv1.Entry, len(entries))
	for i, e := range entries {
		all[i] = e.Proto()
	}
	return all
}
