package server

// With Config.TwoPersons, a change of roots takes two, and with TwoPersonsEntries so does
// one of entries that give power:
//
//  1. a call for it is held in place of its handler, or by it, and answered with an id
//  2. another person approves that: exactly what was asked for is carried out, once.
//     Or anybody rejects it, or an hour goes by, or the roots or these entries change
//     meanwhile: then it has to be asked for again
//
// What is held is in this process's memory alone, so that nobody finds it, or puts it,
// in the database: a restart forgets it.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

const (
	maxHeld  = 16 // changes at the same time
	heldLife = time.Hour
	// maxHeldEntries bounds the size of one.
	maxHeldEntries = 64 << 10
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
	// basis is what it was asked for: the roots, or the entries as they were. With another
	// one, it might mean something else.
	basis string
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
	basis := rootsText(now)
	held, err := s.keepHeld(ctx, c, basis, &adminv1.RootChange{Change: change, What: change.GetVerb() + ": " + what + "; now " + basis})
	if err != nil {
		return nil, err
	}
	return &adminv1.ChangeRotationResponse{Rotation: now, Held: held}, nil
}

// keepHeld has a change wait. The same from the same person is held once.
func (s *Server) keepHeld(ctx context.Context, c *caller, basis string, change *adminv1.RootChange) (*adminv1.RootChange, error) {
	change.Id, change.Actor = newRequestID(), c.actor
	change.RequestedAt, change.ExpiresAt = timestamppb.New(c.began), timestamppb.New(c.began.Add(heldLife))
	h := heldChange{basis: basis, RootChange: change}
	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	s.held.expire(c.began)
	for _, other := range s.held.all {
		if other.GetActor() == h.GetActor() && other.basis == h.basis && proto.Equal(other.GetChange(), h.GetChange()) && proto.Equal(other.GetEntries(), h.GetEntries()) {
			return other.RootChange, nil
		}
	}
	if len(s.held.all) >= maxHeld {
		return nil, fail(kindOverload, fmt.Sprintf("%d changes wait for a second person already: reject some (ca authority pending)", maxHeld), nil)
	}
	if err := s.recordHeld(ctx, c, h, changeRequested); err != nil {
		return nil, err
	}
	s.held.all = append(s.held.all, h)
	s.log.InfoContext(ctx, "change waits for a second person", "verb", h.verb(), "actor", c.actor, "id", h.GetId(), "request_id", c.requestID)
	return h.RootChange, nil
}

// verb is the kind of a change, for the log.
func (h heldChange) verb() string {
	if h.GetEntries() != nil {
		return "apply"
	}
	return h.GetChange().GetVerb()
}

// givesPower says whether who has the entry's identity is an administrator or a CA
// below, and was not by the same entry before. To take that away takes one person: it
// may have to be done at once.
func (c *change) givesPower() bool {
	return (c.action == actionCreated || c.action == actionChanged) && (c.after.GetAdmin() || c.after.GetDownstream())
}

// holdEntries has a change of entries wait, together with what else was to be changed
// by the same call; entryMu is held.
func (s *Server) holdEntries(ctx context.Context, c *caller, current *registry.Entries, changes []*change) (*adminv1.RootChange, error) {
	req := new(adminv1.ApplyEntriesRequest)
	var what []string
	for _, ch := range changes {
		switch ch.action {
		case actionDeleted:
			return nil, fail(kindConflict, fmt.Sprintf("nothing was changed: entries marked admin or downstream take a second person, and entry %s would be deleted by the same call: apply these by themselves, without prune", ch.name()), nil)
		case actionCreated, actionChanged:
			e := proto.CloneOf(ch.after)
			e.Revision = 0
			req.Entries = append(req.Entries, e)
			what = append(what, entryText(ch))
		}
	}
	if size := proto.Size(req); size > maxHeldEntries {
		return nil, fail(kindInvalid, fmt.Sprintf("nothing was changed: entries marked admin or downstream take a second person, and this change has %d bytes, at most %d are held: apply these by themselves", size, maxHeldEntries), nil)
	}
	return s.keepHeld(ctx, c, entriesBasis(current, req.GetEntries()), &adminv1.RootChange{Entries: req, What: truncate("apply: " + strings.Join(what, "; "))})
}

// entryText says for a person what is to be done with an entry.
func entryText(ch *change) string {
	text := fmt.Sprintf("entry %s is %s: %s", ch.name(), ch.action, ch.after.GetSpiffeId())
	if ch.after.GetAdmin() {
		text += ", an administrator"
	}
	if ch.after.GetDownstream() {
		text += ", a CA below"
	}
	if ch.after.GetNodes() != "" {
		text += ", on nodes with " + ch.after.GetNodes()
	}
	return text + ", for workloads with " + ch.after.GetWorkloads()
}

// entriesBasis is how the entries of these names are now.
func entriesBasis(current *registry.Entries, of []*entryv1.Entry) string {
	h := sha256.New()
	for _, e := range of {
		text := "none"
		if before, ok := current.Proto(e.GetName()); ok {
			text = identity.FormatYAML(before)
		}
		sum := sha256.Sum256([]byte(text))
		h.Write([]byte(e.GetName())) // never fails
		h.Write(sum[:])
	}
	return hex.EncodeToString(h.Sum(nil))
}

var errEntriesChanged = fail(kindConflict, "the entries have changed since it was asked for, and it might mean something else: ask for it again", nil)

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
	as := context.WithValue(ctx, callerKey{}, &asked)
	if h.GetEntries() != nil {
		done, err := a.s.applyEntries(as, h.GetEntries(), h.basis)
		if err != nil {
			return nil, err
		}
		return &adminv1.ApproveRootChangeResponse{Change: h.RootChange, Entries: done}, nil
	}
	done, err := a.ChangeRotation(as, h.GetChange())
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
	now := ""
	if s.isHeldOfRoots(id) {
		r, err := s.rotation(ctx)
		if err != nil {
			return heldChange{}, err
		}
		now = rootsText(r)
	}
	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	s.held.expire(c.began)
	i := slices.IndexFunc(s.held.all, func(h heldChange) bool { return h.GetId() == id })
	if i < 0 {
		return heldChange{}, fail(kindNotFound, "no change waits under this id: it was approved or rejected, an hour went by, or the CA was started again (ca authority pending)", nil)
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
		if h.GetEntries() != nil {
			now = entriesBasis(s.registry.Entries(), h.GetEntries().GetEntries())
		}
		switch {
		case now == h.basis:
		case h.GetEntries() != nil:
			s.held.all = slices.Delete(s.held.all, i, i+1)
			return heldChange{}, errEntriesChanged
		default:
			s.held.all = slices.Delete(s.held.all, i, i+1)
			return heldChange{}, fail(kindConflict, "the roots have changed since it was asked for, and it might mean something else: ask for it again", fmt.Errorf("were %s, are %s", h.basis, now))
		}
	}
	if err := s.recordHeld(ctx, c, h, why); err != nil {
		return heldChange{}, err
	}
	s.held.all = slices.Delete(s.held.all, i, i+1)
	s.log.InfoContext(ctx, "change that waited was settled", "reason", why, "verb", h.verb(), "actor", c.actor, "id", id, "request_id", c.requestID)
	return h, nil
}

// isHeldOfRoots says whether a change of roots waits under an id.
func (s *Server) isHeldOfRoots(id string) bool {
	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	return slices.ContainsFunc(s.held.all, func(h heldChange) bool { return h.GetId() == id && h.GetEntries() == nil })
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
	return fail(kindConflict, "your own change is approved by somebody else: another admin's identity, and the admin socket counts as one person whoever uses it", nil)
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
