package server

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"

	"github.com/meshid/meshid/internal/clock"
	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// settable is a wall clock that a test sets.
type settable struct {
	mu sync.Mutex // guards by
	by time.Duration
}

func (s *settable) set(by time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.by = by
}

func (s *settable) read() clock.Reading {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := clock.Read()
	r.Wall = r.Wall.Add(s.by)
	return r
}

// The CA's clock is set: nothing is issued, renewed, used up or deleted until it is
// back, or an operator has confirmed it; all of it is on the record.
func TestFault_F45_NothingUntilConfirmed(t *testing.T) {
	s := &settable{}
	h := newHouse(t, func(c *Config) { c.Clock = clock.NewGuard(s.read) })
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	token := h.token("n2", nil)
	admin, ctx := h.admin()
	condition := func() health.Condition {
		for _, c := range h.health.Conditions() {
			if c.Name == conditionClock {
				return c
			}
		}
		t.Fatal("no condition")
		return health.Condition{}
	}
	works := func() {
		t.Helper()
		if r := a.issue(a.item("web", workload("web")))[0]; r.GetSvid() == nil {
			t.Errorf("nothing is issued: %v", r)
		}
		if !h.eventually(func() bool { return condition().Severity == health.OK }) {
			t.Errorf("condition %+v", condition())
		}
	}
	stands := func() {
		t.Helper()
		r := a.issue(a.item("web", workload("web")))[0].GetRefusal()
		if r.GetReason() != nodev1.Reason_REASON_UNAVAILABLE || r.GetRetryAfter().AsDuration() <= 0 {
			t.Errorf("Issue: %v", r)
		}
		_, err := a.client.Renew(t.Context(), &nodev1.RenewRequest{Csr: newCSR(t, newKey(t)), PreviousSerial: a.serial()})
		h.wantCode(err, codes.Unavailable)
		_, err = h.attest(h.dial(nil, nil), token, newKey(t))
		h.wantCode(err, codes.Unavailable)
		if _, err := admin.RotateIntermediate(ctx, &adminv1.RotateIntermediateRequest{}); err == nil {
			t.Error("the intermediate was replaced")
		}
		if _, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{}); err == nil {
			t.Error("renewals were ordered")
		}
		if _, err := admin.CreateToken(ctx, &adminv1.CreateTokenRequest{}); err == nil {
			t.Error("a token was made, and others may have been deleted")
		}
		if !h.eventually(func() bool { return condition().Severity == health.Error }) || !strings.Contains(condition().Message, "ca clock confirm") {
			t.Errorf("condition %+v", condition())
		}
		if h.server.clockJump() == 0 {
			t.Error("the metric shows nothing")
		}
	}
	if _, err := admin.ConfirmClock(ctx, &adminv1.ConfirmClockRequest{}); err == nil {
		t.Error("confirmed what nobody asked")
	}
	works()
	s.set(4 * time.Minute) // what a verifier bears
	works()
	s.set(time.Hour)
	stands()
	s.set(0) // it comes back
	works()
	s.set(-365 * 24 * time.Hour)
	stands()
	answer, err := admin.ConfirmClock(ctx, &adminv1.ConfirmClockRequest{})
	if err != nil || answer.GetBy().AsDuration() > -364*24*time.Hour {
		t.Fatalf("ConfirmClock: %v, %v", answer, err)
	}
	works()
	if _, err := h.attest(h.dial(nil, nil), token, newKey(t)); err != nil {
		t.Errorf("the token was used up: %v", err)
	}
	var reasons []string
	for _, r := range h.records(ledgerv1.Event_EVENT_CLOCK) {
		reasons = append(reasons, r.GetReason())
	}
	if got := strings.Join(reasons, " "); got != "set back set confirmed" {
		t.Errorf("the ledger has %q", got)
	}
	if n := testutil.ToFloat64(h.server.metrics.clockJumps); n != 2 {
		t.Errorf("%v jumps counted", n)
	}
}
