package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Bounds of what agents say about a rotation, and of what operators are told.
const (
	maxNodeLaggards = 16
	maxLaggardName  = 2200 // a SPIFFE ID and a process
	maxHeldRoots    = 16
	maxHeldName     = 64
	maxShown        = 100
)

// How the renewal of what a retiring root signed is spread: at so many X.509-SVIDs
// a second in the whole mesh, over this time at least. Of one node, those that
// expire first are renewed first; first issues and renewals that are due have a
// time of their own and do not queue behind.
const (
	renewRate, renewRateTainted     = 200, 1000
	renewWithin, renewWithinTainted = time.Minute, 5 * time.Second
)

// acks takes what an agent says about its streams.
func (f *inForce) acks(m *nodev1.BundleAcks) error {
	if len(m.GetLaggards()) > maxNodeLaggards || len(m.GetHeld()) > maxHeldRoots {
		return fail(kindInvalid, fmt.Sprintf("more than %d laggards or %d roots in one report", maxNodeLaggards, maxHeldRoots), nil)
	}
	laggards := make([]rotation.Laggard, 0, len(m.GetLaggards()))
	for _, l := range m.GetLaggards() {
		if len(l.GetName()) > maxLaggardName {
			return fail(kindInvalid, "the name of a laggard is too long", nil)
		}
		laggards = append(laggards, rotation.Laggard{Name: l.GetName(), Acknowledged: l.GetAcknowledged(), Since: l.GetSince().AsTime()})
	}
	held := make(map[string]uint32, len(m.GetHeld()))
	for _, h := range m.GetHeld() {
		if len(h.GetRoot()) > maxHeldName {
			return fail(kindInvalid, "the name of a root is too long", nil)
		}
		held[h.GetRoot()] = h.GetSvids()
	}
	f.streams, f.acknowledged, f.ackSequence = m.GetStreams(), m.GetAcknowledged(), m.GetSequence()
	f.laggards, f.held, f.counted, f.reported = laggards, held, m.GetCounted(), true
	return nil
}

// Fleet says what the nodes have in force; it is what ca.Config.Fleet has to call.
// Nodes that may not connect are not part of it: their workloads are not to be
// trusted, nor waited for.
func (s *Server) Fleet() []rotation.Node {
	known := s.registry.Nodes()
	fleet := make([]rotation.Node, 0, len(known))
	for _, n := range known {
		if n.State != registry.Active {
			continue
		}
		node := rotation.Node{ID: n.ID, Lease: n.NotAfter, Since: n.LastSeen}
		if session, ok := s.hub.get(n.ID); ok {
			force := session.inForce()
			node.Connected = true
			// Until it has said what its proxies have, it has nothing.
			if force.reported {
				node.Sequence = force.bundleSequence
			}
			node.Streams, node.Acknowledged, node.AckSequence = force.streams, force.acknowledged, force.ackSequence
			node.Laggards, node.Held, node.Counted = force.laggards, force.held, force.counted
		}
		fleet = append(fleet, node)
	}
	return append(fleet, s.below.fleet(s.registry.Entries())...)
}

// Retiring has the nodes renew what chains to a root; it is what
// ca.Config.OnRetiring has to call.
func (s *Server) Retiring(root string, tainted bool) {
	svids, within := s.renewal(root, tainted)
	s.renewFrom(root, within)
	s.log.Info("renewal of what a root signed is ordered", "authority", root, "within", within, "count", svids)
}

// renewal says how many X.509-SVIDs chain to a root, or to any if it is "", and how
// long their renewal takes.
func (s *Server) renewal(root string, tainted bool) (svids int, within time.Duration) {
	rate := renewRate
	within = renewWithin
	if tainted {
		rate, within = renewRateTainted, renewWithinTainted
	}
	for _, session := range s.hub.all() {
		for id, n := range session.inForce().held {
			if root == "" || id == root {
				svids += int(n)
			}
		}
	}
	return svids, min(max(within, time.Duration(svids)*time.Second/time.Duration(rate)), maxRotateWithin)
}

// renewFrom has the nodes renew what an authority signed.
func (s *Server) renewFrom(authority string, within time.Duration) {
	order := s.orders.add(time.Now(), authority, within)
	for _, session := range s.hub.all() {
		session.order(order)
	}
}

// GetRotation implements adminv1.AdminServiceServer.
func (a *adminService) GetRotation(ctx context.Context, _ *adminv1.GetRotationRequest) (*adminv1.GetRotationResponse, error) {
	r, err := a.s.rotation(ctx)
	if err != nil {
		return nil, err
	}
	return &adminv1.GetRotationResponse{Rotation: r}, nil
}

// ChangeRotation implements adminv1.AdminServiceServer.
func (a *adminService) ChangeRotation(ctx context.Context, req *adminv1.ChangeRotationRequest) (*adminv1.ChangeRotationResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	authority := a.s.cfg.CA
	switch verb := req.GetVerb(); verb {
	case "adopt":
		err = authority.AdoptUpstream(ctx, c.actor)
	case "adopt-self":
		err = authority.AdoptOwn(ctx, c.actor)
	default:
		err = authority.Command(ctx, rotation.Command{Verb: rotation.Verb(verb), Root: req.GetRoot(), Override: req.GetOverride()}, c.actor)
	}
	switch {
	case errors.Is(err, rotation.ErrRefused):
		return nil, fail(kindConflict, truncate(err.Error()), err)
	case err != nil:
		a.s.log.ErrorContext(ctx, "roots cannot be changed", "verb", req.GetVerb(), "actor", c.actor, "request_id", c.requestID, "err", err)
		return nil, fail(kindUnavailable, "nothing was changed: the CA's log says why", err)
	}
	a.s.log.InfoContext(ctx, "roots changed by command", "verb", req.GetVerb(), "actor", c.actor, "request_id", c.requestID)
	r, err := a.s.rotation(ctx)
	if err != nil {
		return nil, err
	}
	return &adminv1.ChangeRotationResponse{Rotation: r}, nil
}

// rotation describes how far the roots are.
func (s *Server) rotation(ctx context.Context) (*adminv1.Rotation, error) {
	now, err := s.cfg.CA.Rotation(ctx)
	if err != nil {
		return nil, fail(kindUnavailable, "the store cannot be read now", err)
	}
	in := now.Inputs
	r := &adminv1.Rotation{BundleSequence: now.Sequence, Paused: now.Trust.Paused, Stalled: now.Stalled}
	for _, root := range now.Trust.Bundle() {
		out := &adminv1.Root{
			Id: root.ID, State: string(root.State), Since: timestamppb.New(root.Since), Sequence: root.Sequence,
			NotAfter: timestamppb.New(root.NotAfter), Automatic: root.Automatic, Upstream: root.Foreign, Tainted: root.Tainted,
		}
		for _, n := range in.Nodes {
			out.Svids += n.Held[root.ID]
		}
		if root.State == rotation.Retiring {
			out.Holders = rootHolders(in, root.ID)
		}
		if horizon, ok := in.Horizons[root.ID]; ok {
			out.LiveUntil = timestamppb.New(horizon)
		}
		r.Roots = append(r.Roots, out)
	}
	for _, n := range in.Nodes {
		if !n.Live(in.Now) {
			continue
		}
		r.Nodes++
		r.Proxies += n.Streams
		if n.AckSequence >= now.Sequence {
			r.ProxiesAcknowledged += n.Acknowledged
		}
	}
	waiting := rotation.Waiting(in, now.Sequence)
	r.NodesWaiting = clamp(len(waiting))
	for _, n := range waiting {
		r.Laggards = append(r.Laggards, laggards(n)...)
	}
	slices.SortStableFunc(r.Laggards, func(a, b *adminv1.Laggard) int { return a.GetSince().AsTime().Compare(b.GetSince().AsTime()) })
	r.Laggards = r.Laggards[:min(len(r.Laggards), maxShown)]
	return r, nil
}

// rootHolders names who keeps a root that signs no more in the bundle.
func rootHolders(in rotation.Inputs, root string) (all []*adminv1.RootHolder) {
	nodes := rotation.Holders(in, root)
	for _, n := range nodes[:min(len(nodes), maxShown)] {
		h := &adminv1.RootHolder{NodeId: n.ID, Below: n.Below, Connected: n.Connected, Counted: n.Counted, Svids: n.Held[root]}
		if !n.Lease.IsZero() {
			h.Until = timestamppb.New(n.Lease)
		}
		all = append(all, h)
	}
	return all
}

// laggards names what of a node has not acknowledged the bundle in force.
func laggards(n rotation.Node) []*adminv1.Laggard {
	if !n.Connected {
		return []*adminv1.Laggard{{NodeId: n.ID, Since: timestamppb.New(n.Since), Acknowledged: n.Sequence, WaitedUntil: timestamppb.New(n.Lease), Below: n.Below}}
	}
	if len(n.Laggards) == 0 {
		return []*adminv1.Laggard{{NodeId: n.ID, Since: timestamppb.Now(), Acknowledged: n.Sequence, Connected: true, Below: n.Below, WaitsFor: n.WaitsFor}}
	}
	all := make([]*adminv1.Laggard, len(n.Laggards))
	for i, l := range n.Laggards {
		all[i] = &adminv1.Laggard{NodeId: n.ID, Name: l.Name, Since: timestamppb.New(l.Since), Acknowledged: l.Acknowledged, Connected: true}
	}
	return all
}
