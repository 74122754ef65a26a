package server

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	downstreamv1 "github.com/meshid/meshid/proto/downstream/v1"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Limits of a CA below.
const (
	// It may have so many intermediates signed at once, and then one each mintEvery:
	// processes that start, and their renewals.
	mintBurst = 20
	mintEvery = time.Minute
	// Messages of its stream, likewise.
	followRate, followBurst = 5, 100
	maxRootName             = 64
	// maxLinks is the number of streams of one CA below: of its processes, and a few
	// that are not noticed to be gone.
	maxLinks = 32
)

// downstreamService serves the CAs below this one.
type downstreamService struct {
	downstreamv1.UnimplementedDownstreamServiceServer

	s *Server
}

// Mint implements downstreamv1.DownstreamServiceServer. Who asks is who the connection
// says, and what is signed depends on nothing that it says but its key.
func (d *downstreamService) Mint(ctx context.Context, req *downstreamv1.MintRequest) (*downstreamv1.MintResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if got, _ := d.s.below.of(c.actor).mints.take(c.began, 1); got == 0 {
		return nil, fail(kindOverload, fmt.Sprintf("too many intermediates were asked for: one is signed each %s", mintEvery), nil)
	}
	key, err := ca.ParseCSR(req.GetCsr())
	if err != nil {
		return nil, fail(kindInvalid, truncate(err.Error()), nil)
	}
	if q, ok := d.s.registry.Quarantines().Of(c.actor, hashOf(key), nil); ok {
		return nil, fail(kindDenied, "the key is quarantined", fmt.Errorf("quarantine %v", q))
	}
	cert, err := d.s.cfg.CA.SignDownstream(ctx, &ca.Downstream{
		ID: c.actor, Key: key, Life: req.GetLife().AsDuration(), Actor: c.actor, RequestID: c.requestID, Address: c.address,
	})
	var wrong *ca.RequestError
	switch {
	case errors.As(err, &wrong):
		return nil, fail(kindInvalid, truncate(wrong.Error()), nil)
	case errors.Is(err, ca.ErrNotRoot):
		return nil, fail(kindConflict, ca.ErrNotRoot.Error(), nil)
	case errors.Is(err, ca.ErrListsBelow):
		return nil, fail(kindConflict, ca.ErrListsBelow.Error(), nil)
	case err != nil:
		return nil, fail(kindUnavailable, "no intermediate can be signed now", err)
	}
	return &downstreamv1.MintResponse{Chain: [][]byte{cert.Raw}, Roots: d.s.rootsNow()}, nil
}

func hashOf(key *ca.PublicKey) []byte {
	sum := key.Hash()
	return sum[:]
}

func (s *Server) rootsNow() *downstreamv1.Roots {
	bundle, sequence := s.cfg.CA.Bundle()
	roots := &downstreamv1.Roots{Sequence: sequence}
	for _, r := range bundle {
		roots.Roots = append(roots.Roots, r.Raw)
	}
	return roots
}

// Follow implements downstreamv1.DownstreamServiceServer. This goroutine sends, a
// second one receives.
func (d *downstreamService) Follow(stream grpc.BidiStreamingServer[downstreamv1.FollowRequest, downstreamv1.Roots]) error {
	s := d.s
	c, err := callerOf(stream.Context())
	if err != nil {
		return err
	}
	link, err := s.below.open(c.actor)
	if err != nil {
		return err
	}
	defer func() {
		s.below.close(c.actor, link)
		s.cfg.CA.FleetChanged()
	}()
	if !s.tasks.start(func() { // Recv ends when this handler has returned
		link.end(receive(s, stream, c, downstreamv1.DownstreamService_Follow_FullMethodName, followRate, followBurst, func(msg *downstreamv1.FollowRequest) error {
			return s.takeFollow(link, msg)
		}))
	}) {
		return fail(kindUnavailable, "the CA is shutting down", nil)
	}
	expired := time.NewTimer(time.Until(c.notAfter))
	defer expired.Stop()
	sent := uint64(0)
	for {
		if _, ok := s.registry.Entries().Downstream(c.actor); !ok {
			return fail(kindDenied, "permission denied: no entry marked downstream has this SPIFFE ID any more", nil)
		}
		if _, ok := s.registry.Quarantines().Of(c.actor, c.key, c.serial); ok {
			return fail(kindDenied, "the identity is quarantined", nil)
		}
		if roots := s.rootsNow(); roots.GetSequence() != sent {
			if err := stream.Send(roots); err != nil {
				return err
			}
			sent = roots.GetSequence()
		}
		select {
		case <-link.wake:
		case <-link.done:
			if errors.Is(link.reason, errLeft) {
				return nil
			}
			return link.reason
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-expired.C:
			return fail(kindUnauthenticated, "the X.509-SVID has expired", nil)
		}
	}
}

// takeFollow takes what the CA below says.
func (s *Server) takeFollow(link *link, msg *downstreamv1.FollowRequest) error {
	if len(msg.GetHeld()) > maxHeldRoots {
		return fail(kindInvalid, fmt.Sprintf("%d roots, at most %d are allowed", len(msg.GetHeld()), maxHeldRoots), nil)
	}
	held := make(map[string]uint32, len(msg.GetHeld()))
	for _, root := range msg.GetHeld() {
		if _, err := hex.DecodeString(root); err != nil || len(root) > maxRootName {
			return fail(kindInvalid, "a root is not named by its key identifier", nil)
		}
		held[root] = 1
	}
	if len(msg.GetWaitsFor()) > maxLaggardName {
		return fail(kindInvalid, "what is waited for is too long", nil)
	}
	s.below.report(link, &lowerForce{acknowledged: msg.GetAcknowledged(), held: held, waitsFor: msg.GetWaitsFor()})
	s.cfg.CA.FleetChanged()
	return nil
}

// authoritiesBelow are the intermediates of CAs below that match names by SPIFFE ID, of
// which something may live.
func (s *Server) authoritiesBelow(ctx context.Context, match func(id string) bool) ([]*adminv1.AuthorityBelow, error) {
	all, err := s.cfg.CA.Intermediates(ctx)
	if err != nil {
		return nil, err
	}
	var below []*adminv1.AuthorityBelow
	now, signer := time.Now(), ""
	for _, a := range s.cfg.CA.Authorities() {
		if a.Role == ca.RoleRoot && a.State == ca.StateActive {
			signer = a.ID
		}
	}
	for _, i := range all {
		id, ok := i.Below()
		if !ok || !match(id) || !i.LiveUntil.After(now) {
			continue
		}
		_, entry := s.registry.Entries().Downstream(id)
		below = append(below, &adminv1.AuthorityBelow{
			Id: i.ID, SpiffeId: id, Root: i.Root, Current: i.Root == signer, NotAfter: timestamppb.New(i.LiveUntil), Connected: s.below.connected(id), Entry: entry,
		})
	}
	slices.SortFunc(below, func(a, b *adminv1.AuthorityBelow) int {
		return cmp.Or(cmp.Compare(a.GetSpiffeId(), b.GetSpiffeId()), b.GetNotAfter().AsTime().Compare(a.GetNotAfter().AsTime()))
	})
	return below, nil
}

// allowedBelow are the CAs below that may have intermediates signed.
func (s *Server) allowedBelow() []string {
	quarantined := s.registry.Quarantines()
	return slices.DeleteFunc(s.registry.Entries().Downstreams(), func(id string) bool {
		_, ok := quarantined.Of(id, nil, nil)
		return ok
	})
}

// below knows the CAs below this one, by SPIFFE ID. They are as many as there are
// entries that name them. Its methods may be called concurrently.
type below struct {
	mu     sync.Mutex // guards what follows
	all    map[string]*lower
	closed bool
}

// lower is one of them.
type lower struct {
	mints *bucket
	// What follows is guarded by below.mu.
	links map[*link]bool // of its processes
	since time.Time      // when the last one left
}

// lowerForce is what a process of a CA below has said: acknowledged is the sequence of
// a bundle that is in force everywhere below, and of the roots in held something lives
// there; waitsFor says for people what keeps the newest bundle from being in force. It
// is immutable.
type lowerForce struct {
	acknowledged uint64
	held         map[string]uint32
	waitsFor     string
}

// link is one stream.
type link struct {
	wake   chan struct{} // capacity 1; what there is to say is read afterwards
	done   chan struct{} // closed by end
	once   sync.Once
	reason error       // set before done is closed
	force  *lowerForce // guarded by below.mu; nil until it has said something
}

func (l *link) end(reason error) {
	l.once.Do(func() {
		l.reason = reason
		close(l.done)
	})
}

func newBelow() *below { return &below{all: make(map[string]*lower)} }

func (b *below) of(id string) *lower {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.get(id)
}

// get is of for who holds mu.
func (b *below) get(id string) *lower {
	l, ok := b.all[id]
	if !ok {
		l = &lower{mints: newBucket(1/mintEvery.Seconds(), mintBurst), links: make(map[*link]bool)}
		b.all[id] = l
	}
	return l
}

// open begins a stream.
func (b *below) open(id string) (*link, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.get(id)
	switch {
	case b.closed:
		return nil, fail(kindUnavailable, "the CA is shutting down", nil)
	case len(l.links) >= maxLinks:
		return nil, fail(kindOverload, "too many streams of this CA below: try again", nil)
	}
	k := &link{wake: make(chan struct{}, 1), done: make(chan struct{})}
	l.links[k] = true
	return k, nil
}

func (b *below) close(id string, k *link) {
	k.end(errors.New("stream has ended"))
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.get(id)
	delete(l.links, k)
	l.since = time.Now()
}

func (b *below) connected(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	l, ok := b.all[id]
	return ok && len(l.links) > 0
}

func (b *below) report(k *link, force *lowerForce) {
	b.mu.Lock()
	defer b.mu.Unlock()
	k.force = force
}

// wakeAll has every stream look at what is new.
func (b *below) wakeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.all {
		for k := range l.links {
			select {
			case k.wake <- struct{}{}:
			default:
			}
		}
	}
}

// shutdown ends all streams; no new one is opened.
func (b *below) shutdown() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, l := range b.all {
		for k := range l.links {
			k.end(fail(kindUnavailable, "the CA is shutting down", nil))
		}
	}
}

// fleet is what a rotation has to know of the CAs below that have an entry. The leases
// are those of their intermediates, which package ca knows.
func (b *below) fleet(entries *registry.Entries) []rotation.Node {
	ids := entries.Downstreams()
	fleet := make([]rotation.Node, len(ids))
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, id := range ids {
		fleet[i].ID, fleet[i].Below = id, true
		l, ok := b.all[id]
		if !ok {
			continue
		}
		l.tell(&fleet[i])
	}
	return fleet
}

// tell says what all processes of a CA below have; below.mu is held.
func (l *lower) tell(n *rotation.Node) {
	n.Since, n.Connected, n.Counted = l.since, len(l.links) > 0, len(l.links) > 0
	n.Held = make(map[string]uint32)
	first := true
	for k := range l.links {
		if k.force == nil { // until it has said what it has, it has nothing
			n.Sequence, n.Counted, n.WaitsFor = 0, false, ""
			return
		}
		maps.Copy(n.Held, k.force.held)
		if first || k.force.acknowledged < n.Sequence {
			n.Sequence, n.WaitsFor, first = k.force.acknowledged, k.force.waitsFor, false
		}
	}
}
