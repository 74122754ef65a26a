package server

// A CA whose clock was set neither knows what is valid nor what to date a
// certificate with. It issues nothing, renews nothing of its own, and lets nothing
// end, until the clock is set back or an operator says that it is right now.
// Agents go on with what they have. What an operator does, such as a ban, is done.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/internal/clock"
	"github.com/meshid/meshid/pkg/health"
)

// clockInterval is how often the clock is looked at while nobody asks for
// anything; each signature looks at it as well.
const clockInterval = 2 * time.Second

// conditionClock: the CA's clock was set.
const conditionClock = "clock"

const clockHint = ": nothing is issued until it is set back, or `ca clock confirm` says that it is right now"

// checkClock fails while the clock is not to be relied on.
func (s *Server) checkClock() error {
	if s.cfg.Clock == nil {
		return nil
	}
	if err := s.cfg.Clock.Check(); err != nil {
		return fail(kindUnavailable, "the CA does not rely on its clock now: try again", err)
	}
	return nil
}

// clockJump is by how many seconds the clock is off, 0 while it is relied on.
func (s *Server) clockJump() float64 {
	if s.cfg.Clock == nil {
		return 0
	}
	if jump, ok := errors.AsType[*clock.JumpError](s.cfg.Clock.Check()); ok {
		return jump.By.Seconds()
	}
	return 0
}

// watchClock reports and records that the clock was set, and that it is back.
func (s *Server) watchClock(ctx context.Context) {
	if s.cfg.Clock == nil {
		return
	}
	s.clockMu.Lock()
	defer s.clockMu.Unlock()
	err := s.cfg.Clock.Check()
	if set := err != nil; set == s.clockSet {
		return
	}
	r := s.ownRecord(ledgerv1.Event_EVENT_CLOCK)
	if err == nil {
		r.Reason, r.Detail = "back", "the clock is where it was"
	} else {
		r.Reason, r.Detail = "set", err.Error()
	}
	if err != nil {
		s.log.ErrorContext(ctx, "clock was set, nothing is issued", "err", err)
		s.cfg.Health.Set(conditionClock, health.Error, err.Error()+clockHint)
	}
	if err := s.append(ctx, r); err != nil {
		s.log.WarnContext(ctx, "state of the clock is not recorded, will retry", "err", err)
		return
	}
	if s.clockSet = err != nil; s.clockSet {
		s.metrics.clockJumps.Inc()
		return
	}
	s.log.InfoContext(ctx, "clock is relied on again")
	s.cfg.Health.Clear(conditionClock)
}

// ConfirmClock implements adminv1.AdminServiceServer.
func (a *adminService) ConfirmClock(ctx context.Context, _ *adminv1.ConfirmClockRequest) (*adminv1.ConfirmClockResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	s := a.s
	s.watchClock(ctx) // so that what is confirmed is on the record
	s.clockMu.Lock()
	defer s.clockMu.Unlock()
	if s.cfg.Clock == nil || !s.clockSet {
		return nil, fail(kindConflict, "there is nothing to confirm: the CA relies on its clock", nil)
	}
	jump := s.cfg.Clock.Check()
	if jump == nil {
		return nil, fail(kindConflict, "there is nothing to confirm: the clock is where it was", nil)
	}
	r := s.newRecord(c, ledgerv1.Event_EVENT_CLOCK)
	r.Reason, r.Detail = "confirmed", jump.Error()
	if err := s.append(ctx, r); err != nil {
		return nil, fail(kindUnavailable, "nothing was confirmed: the ledger cannot write now", err)
	}
	by := s.cfg.Clock.Confirm()
	s.clockSet = false
	s.cfg.Health.Clear(conditionClock)
	s.log.WarnContext(ctx, "clock was confirmed", "actor", c.actor, "err", jump, "request_id", c.requestID)
	return &adminv1.ConfirmClockResponse{Time: timestamppb.Now(), By: durationpb.New(by)}, nil
}

// maxSkew is what the clocks of agents may differ by before it is a condition.
const maxSkew = 30 * time.Second

// reportSkew keeps the condition about the clocks of the nodes that are connected.
func (s *Server) reportSkew() {
	var wrong []string
	for _, session := range s.hub.all() {
		if skew := session.inForce().clockSkew.AsDuration(); skew.Abs() > maxSkew {
			wrong = append(wrong, fmt.Sprintf("%s (%+.0f s)", session.nodeID, skew.Seconds()))
		}
	}
	if len(wrong) == 0 {
		s.cfg.Health.Clear(conditionSkew)
		return
	}
	const shown = 3
	text := strings.Join(wrong[:min(len(wrong), shown)], ", ")
	if len(wrong) > shown {
		text += fmt.Sprintf(" and %d more", len(wrong)-shown)
	}
	s.cfg.Health.Set(conditionSkew, health.Warning, "clocks of nodes are not the CA's: "+text+": set those that are wrong")
}
