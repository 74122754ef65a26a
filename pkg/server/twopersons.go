package server

// With Config.TwoPersons, a change of roots takes two:
//
//  1. a call for it is held in place of its handler, and answered with an id
//  2. another person approves that: exactly what was asked for is carried out, once.
//     Or anybody rejects it, or an hour goes by, or the roots change meanwhile: then it
//     has to be asked for again
//
// What is held is in this process's memory alone, so that nobody finds it, or puts it,
// in the database: a restart forgets it.

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

const (
	maxHeld  = 16 // changes at the same time
	heldLife = time.Hour
)

// Reasons of EVENT_APPROVAL.
const (
	changeRequested = "requested"
	changeApproved  = "approved"
	changeRejected  = "rejected"
	changeOwn       = "own_request"
)

// rootVerbs are what can be held, and how it is put to the second person.
var rootVerbs = map[string]string{
	"prepare":    "make a root and have it distributed",
	"rotate":     "replace the root by a new one",
	"activate":   "have the next root sign",
	"taint":      "replace all that a root signed, and have the root leave",
	"retire":     "take a root out of the trust bundle",
	"rollback":   "undo the rotation that is under way",
	"adopt":      "change over to the root of the upstream CA",
	"adopt-self": "change over to a root of this CA's own",
}

// held are the changes of roots that wait for a second person.
type held struct {
	mu  sync.Mutex // held while one of them is recorded; guards what follows
	all []heldChange
}

// heldChange is one of them.
type heldChange struct {
	*adminv1.RootChange
	// roots are those that it was asked for; of others, it might mean something else.
	roots string
}

// takesTwo reports whether a call is held for a second person.
func (s *Server) takesTwo(method string, req any) bool {
	if !s.cfg.TwoPersons || methods[method] != roleTwoAdmins {
		return false
	}
	change, ok := req.(*adminv1.ChangeRotationRequest)
	return !ok || change.GetVerb() != "pause" && change.GetVerb() != "resume"
}

// hold stands for the handler of a call that takes two persons: it changes nothing.
// The same from the same person is held once.
func (s *Server) hold(ctx context.Context, req any) (any, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	change, ok := req.(*adminv1.ChangeRotationRequest)
	if !ok {
		return nil, fail(kindInternal, "internal error", fmt.Errorf("%T cannot be held for a second person", req))
	}
	what, ok := rootVerbs[change.GetVerb()]
	if !ok || len(change.GetRoot()) > maxHeldName || strings.Trim(change.GetRoot(), "0123456789abcdef") != "" {
		return nil, fail(kindInvalid, "there is no such command, or no such root", nil)
	}
	now, err := s.rotation(ctx)
	if err != nil {
		return nil, err
	}
	if change.GetRoot() != "" {
		what += ": " + change.GetRoot()
	}
	if change.GetOverride() {
		what += ", though somebody may be cut off (override)"
	}
	h := heldChange{roots: rootsText(now), RootChange: &adminv1.RootChange{
		Id: newRequestID(), Change: change, Actor: c.actor,
		RequestedAt: timestamppb.New(c.began), ExpiresAt: timestamppb.New(c.began.Add(heldLife)),
	}}
	h.What = change.GetVerb() + ": " + what + "; now " + h.roots

	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	s.held.expire(c.began)
	for _, other := range s.held.all {
		if other.GetActor() == h.GetActor() && other.roots == h.roots && proto.Equal(other.GetChange(), change) {
			return &adminv1.ChangeRotationResponse{Rotation: now, Held: other.RootChange}, nil
		}
	}
	if len(s.held.all) >= maxHeld {
		return nil, fail(kindOverload, fmt.Sprintf("%d changes of roots wait for a second person already: reject some (ca authority pending)", maxHeld), nil)
	}
	if err := s.recordHeld(ctx, c, h, changeRequested); err != nil {
		return nil, err
	}
	s.held.all = append(s.held.all, h)
	s.log.InfoContext(ctx, "change of roots waits for a second person", "verb", change.GetVerb(), "actor", c.actor, "id", h.GetId(), "request_id", c.requestID)
	return &adminv1.ChangeRotationResponse{Rotation: now, Held: h.RootChange}, nil
}

// ListRootChanges implements adminv1.AdminServiceServer.
func (a *adminService) ListRootChanges(context.Context, *adminv1.ListRootChangesRequest) (*adminv1.ListRootChangesResponse, error) {
	w := &a.s.held
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expire(time.Now())
	answer := &adminv1.ListRootChangesResponse{}
	for _, h := range w.all {
		answer.Changes = append(answer.Changes, h.RootChange)
	}
	return answer, nil
}

// ApproveRootChange implements adminv1.AdminServiceServer.
func (a *adminService) ApproveRootChange(ctx context.Context, req *adminv1.ApproveRootChangeRequest) (*adminv1.ApproveRootChangeResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	h, err := a.s.settle(ctx, c, req.GetId(), changeApproved)
	if err != nil {
		return nil, err
	}
	// The records of the change name who asked for it; that of the approval names both.
	asked := *c
	asked.actor = h.GetActor()
	done, err := a.ChangeRotation(context.WithValue(ctx, callerKey{}, &asked), h.GetChange())
	if err != nil {
		return nil, err
	}
	return &adminv1.ApproveRootChangeResponse{Change: h.RootChange, Rotation: done.GetRotation()}, nil
}

// RejectRootChange implements adminv1.AdminServiceServer.
func (a *adminService) RejectRootChange(ctx context.Context, req *adminv1.RejectRootChangeRequest) (*adminv1.RejectRootChangeResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	h, err := a.s.settle(ctx, c, req.GetId(), changeRejected)
	if err != nil {
		return nil, err
	}
	return &adminv1.RejectRootChangeResponse{Change: h.RootChange}, nil
}

// settle takes a change out of those that are held, once, and records why. The caller
// carries it out if it was approved.
func (s *Server) settle(ctx context.Context, c *caller, id, why string) (heldChange, error) {
	now, err := s.rotation(ctx)
	if err != nil {
		return heldChange{}, err
	}
	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	s.held.expire(c.began)
	i := slices.IndexFunc(s.held.all, func(h heldChange) bool { return h.GetId() == id })
	if i < 0 {
		return heldChange{}, fail(kindNotFound, "no change of roots waits under this id: it was approved or rejected, an hour went by, or the CA was started again (ca authority pending)", nil)
	}
	h := s.held.all[i]
	if why == changeApproved {
		if person(h.GetActor()) == person(c.actor) {
			return heldChange{}, s.refuseOwn(ctx, c, h)
		}
		if !s.stillAdmin(h.GetActor()) {
			s.held.all = slices.Delete(s.held.all, i, i+1)
			return heldChange{}, fail(kindConflict, "who asked for it is no admin any more: it is forgotten", nil)
		}
		if roots := rootsText(now); roots != h.roots {
			s.held.all = slices.Delete(s.held.all, i, i+1)
			return heldChange{}, fail(kindConflict, "the roots have changed since it was asked for, and it might mean something else: ask for it again", fmt.Errorf("were %s, are %s", h.roots, roots))
		}
	}
	if err := s.recordHeld(ctx, c, h, why); err != nil {
		return heldChange{}, err
	}
	s.held.all = slices.Delete(s.held.all, i, i+1)
	s.log.InfoContext(ctx, "change of roots was settled", "reason", why, "verb", h.GetChange().GetVerb(), "actor", c.actor, "id", id, "request_id", c.requestID)
	return h, nil
}

// stillAdmin reports whether an actor, who was an admin, is one now.
func (s *Server) stillAdmin(actor string) bool {
	if person(actor) == onMachine {
		return true
	}
	_, quarantined := s.registry.Quarantines().Of(actor, nil, nil)
	_, ok := s.registry.Entries().Admin(actor)
	return ok && !quarantined
}

// refuseOwn records that somebody wanted to be the second person as well.
func (s *Server) refuseOwn(ctx context.Context, c *caller, h heldChange) error {
	r := s.heldRecord(c, h, changeOwn)
	r.Outcome = ledgerv1.Outcome_OUTCOME_REFUSED
	c.recorded = true
	s.recordRefusal(ctx, c.actor, true, r)
	return fail(kindConflict, "your own change of roots is approved by somebody else: another admin's identity, and the admin socket counts as one person whoever uses it", nil)
}

func (s *Server) recordHeld(ctx context.Context, c *caller, h heldChange, reason string) error {
	if err := s.append(ctx, s.heldRecord(c, h, reason)); err != nil {
		return fail(kindUnavailable, "nothing was changed: the ledger cannot write now", err)
	}
	return nil
}

func (s *Server) heldRecord(c *caller, h heldChange, reason string) *ledgerv1.Record {
	r := s.newRecord(c, ledgerv1.Event_EVENT_APPROVAL)
	r.Reason = reason
	r.Detail = truncate(fmt.Sprintf("%s: %s; asked for by %s", h.GetId(), h.GetWhat(), h.GetActor()))
	if c.address != "" {
		r.Node = &ledgerv1.NodeRef{Address: c.address}
	}
	return r
}

// expire forgets what was held for too long.
func (w *held) expire(now time.Time) {
	w.all = slices.DeleteFunc(w.all, func(h heldChange) bool { return !now.Before(h.GetExpiresAt().AsTime()) })
}

// onMachine is the person who is at the CA's machine.
const onMachine = "uid:"

// person is who an actor is: whoever is root on the CA's machine can be each of those
// who may use its socket.
func person(actor string) string {
	if strings.HasPrefix(actor, onMachine) {
		return onMachine
	}
	return actor
}

// rootsText says which roots there are: what a change means depends on it. That a root
// was distributed meanwhile makes no difference.
func rootsText(r *adminv1.Rotation) string {
	roots := make([]string, 0, len(r.GetRoots()))
	for _, root := range r.GetRoots() {
		state := root.GetState()
		if state == "distributed" {
			state = "prepared"
		}
		if root.GetTainted() {
			state += " and tainted"
		}
		roots = append(roots, "root "+root.GetId()+" is "+state)
	}
	return strings.Join(roots, ", ")
}
