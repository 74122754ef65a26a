package server

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/test/identitytest"
)

func (s *testStream) withdrawing(m *nodev1.Withdrawing) {
	s.a.h.t.Helper()
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Withdrawing{Withdrawing: m}})
}

// reporting opens the stream of an agent that reports, and reads up to its first
// snapshot.
func (a *testAgent) reporting() *testStream {
	a.h.t.Helper()
	s := a.sync(&nodev1.Hello{ReportsWithdrawals: true})
	if m := s.next(); !m.GetWelcome().GetReportsWithdrawals() {
		a.h.t.Fatalf("not welcomed: %v", m)
	}
	if m := s.next(); m.GetSnapshot() == nil {
		a.h.t.Fatalf("no snapshot: %v", m)
	}
	return s
}

// withdrawal waits until a withdrawal is as it should be.
func (h *house) withdrawal(id string, is func(*adminv1.Withdrawal) bool) *adminv1.Withdrawal {
	h.t.Helper()
	admin, ctx := h.admin()
	var w *adminv1.Withdrawal
	if !h.eventually(func() bool {
		answer, err := admin.ListWithdrawals(ctx, &adminv1.ListWithdrawalsRequest{Id: id})
		if err != nil {
			h.t.Fatal(err)
		}
		w = answer.GetWithdrawals()[0]
		return is(w)
	}) {
		h.t.Fatalf("withdrawal is %v", w)
	}
	return w
}

// How far a withdrawal is, is known for each node and by name for each stream that
// lags; what other nodes say, and what is about other changes, does not count. At its
// end it is recorded and measured.
func TestV_E3_TimeToEffect(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"), shopEntry("other"))
	a, b, c := h.join("n1", nil), h.join("n2", nil), h.join("n3", nil)
	first := a.reporting()
	old := b.sync(&nodev1.Hello{})
	old.next()
	admin, ctx := h.admin()
	deleted, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"web"}})
	if err != nil {
		t.Fatal(err)
	}
	delta := first.next().GetDelta()
	if delta.GetRevision() != deleted.GetRevision() {
		t.Fatalf("delta %v", delta)
	}
	report := &nodev1.Withdrawing{
		Cause: nodev1.Cause_CAUSE_ENTRIES, After: delta.GetFromRevision(), Until: delta.GetRevision(), Streams: 3,
		Laggards: []*nodev1.Laggard{{Name: "spiffe://example.org/app/web (process 7)"}},
	}
	id := deleted.GetWithdrawal()
	first.withdrawing(&nodev1.Withdrawing{Cause: nodev1.Cause_CAUSE_QUARANTINE, Until: 1 << 62, Streams: 9, Acknowledged: 9})
	first.withdrawing(&nodev1.Withdrawing{Cause: nodev1.Cause_CAUSE_ENTRIES, After: delta.GetRevision(), Until: delta.GetRevision() + 1, Streams: 9, Acknowledged: 9})
	first.withdrawing(report)
	first.applied(delta.GetRevision())
	w := h.withdrawal(id, func(w *adminv1.Withdrawal) bool { return w.GetStreams() == 3 && w.GetNodesApplied() == 1 })
	if w.GetState() != "pending" || w.GetStreamsAcknowledged() != 0 || w.GetMax() != nil || w.GetNodes() != 3 || w.GetCause() != "entry" || w.GetWhat() != "web" {
		t.Errorf("begun: %v", w)
	}
	byNode := make(map[string]*adminv1.Laggard)
	for _, l := range w.GetLaggards() {
		byNode[l.GetNodeId()] = l
	}
	if l := byNode[a.id]; len(byNode) != 3 || l.GetName() != report.GetLaggards()[0].GetName() || !l.GetConnected() ||
		!byNode[b.id].GetConnected() || byNode[b.id].GetName() != "" || byNode[c.id].GetConnected() || byNode[c.id].GetWaitedUntil() == nil {
		t.Errorf("laggards: %v", w.GetLaggards())
	}
	report.Laggards, report.Acknowledged, report.Ended = nil, 2, 1
	first.withdrawing(report)
	first.withdrawing(&nodev1.Withdrawing{Cause: report.GetCause(), After: report.GetAfter(), Until: report.GetUntil(), Streams: 90, Acknowledged: 90}) // too late
	old.applied(deleted.GetRevision())
	if pending := identitytest.Metric(t, h.metrics, "meshid_ca_withdrawals_pending"); pending != 1 {
		t.Errorf("%v pending", pending)
	}
	last := c.reporting()
	last.applied(deleted.GetRevision())
	w = h.withdrawal(id, func(w *adminv1.Withdrawal) bool { return w.GetState() != "pending" })
	if w.GetState() != "complete" || w.GetStreams() != 3 || w.GetStreamsAcknowledged() != 2 || w.GetStreamsEnded() != 1 || w.GetNodesApplied() != 3 ||
		w.GetNodesSilent() != 1 || len(w.GetLaggards()) != 0 || w.GetP50().AsDuration() > w.GetP99().AsDuration() || w.GetP99().AsDuration() > w.GetMax().AsDuration() || w.GetMax().AsDuration() <= 0 {
		t.Errorf("over: %v", w)
	}
	if n := identitytest.Metric(t, h.metrics, "meshid_ca_withdrawals_total", "entry", "complete"); n != 1 {
		t.Errorf("%v complete", n)
	}
	if n := identitytest.Metric(t, h.metrics, "meshid_ca_withdrawal_effect_seconds", "entry"); n != 2 {
		t.Errorf("%v streams measured", n)
	}
	h.stop()
	records := h.records(ledgerv1.Event_EVENT_WITHDRAWN)
	if len(records) != 1 || records[0].GetActor() != "uid:0" || records[0].GetOutcome() != ledgerv1.Outcome_OUTCOME_SUCCESS ||
		!strings.Contains(records[0].GetDetail(), "entry web: carried out on 3 of 3 nodes; 2 of 3 streams have acknowledged, 1 ended before; time to effect p50 ") {
		t.Errorf("records: %v", records)
	}
}

// An evicted agent may stay to say what its proxies did, and for nothing else. Its
// report ends whatever else it is waited for.
func TestV_E7_EvictedReports(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	s := a.reporting()
	admin, ctx := h.admin()
	deleted, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"web"}})
	if err != nil {
		t.Fatal(err)
	}
	s.next() // and does not carry it out
	banned, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: a.id, Reason: "test"})
	if err != nil {
		t.Fatal(err)
	}
	if m := s.next(); !m.GetEvicted().GetBanned() {
		t.Errorf("told: %v", m)
	}
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{}); err == nil {
		t.Error("a banned node is answered")
	}
	s.applied(deleted.GetRevision()) // counts for nothing
	report := &nodev1.Withdrawing{Cause: nodev1.Cause_CAUSE_EVICTION, Streams: 2}
	s.withdrawing(report)
	h.withdrawal(banned.GetWithdrawal(), func(w *adminv1.Withdrawal) bool { return w.GetStreams() == 2 && w.GetState() == "pending" })
	report.Acknowledged = 2
	s.withdrawing(report)
	if err := s.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	h.wantCode(s.end(), codes.Unauthenticated)
	for _, id := range []string{banned.GetWithdrawal(), deleted.GetWithdrawal()} {
		if w := h.withdrawal(id, func(w *adminv1.Withdrawal) bool { return w.GetState() != "pending" }); w.GetState() != "complete" || w.GetStreamsAcknowledged() != 2 {
			t.Errorf("over: %v", w)
		}
	}
}

// What an agent says about withdrawals is bounded; who lies loses the stream.
func TestWithdrawalReportsAreBounded(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	entries := nodev1.Cause_CAUSE_ENTRIES
	for name, m := range map[string]*nodev1.Withdrawing{
		"no cause":           {Streams: 1},
		"more than there is": {Cause: entries, Streams: 2, Acknowledged: 2, Ended: 1},
		"overflow":           {Cause: entries, Streams: 2, Acknowledged: 1 << 31, Ended: 1 << 31},
		"too many streams":   {Cause: entries, Streams: maxNodeStreams + 1},
		"too many laggards":  {Cause: entries, Streams: 99, Laggards: slices.Repeat([]*nodev1.Laggard{{}}, maxNodeLaggards+1)},
		"long name":          {Cause: entries, Streams: 99, Laggards: []*nodev1.Laggard{{Name: strings.Repeat("x", maxLaggardName+1)}}},
	} {
		s := a.reporting()
		if err := s.stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Withdrawing{Withdrawing: m}}); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if err := s.end(); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			h.wantCode(err, codes.InvalidArgument)
		}
	}
}

// Nobody is waited for for ever: not for a node whose certificate has expired, nor for
// one that was evicted and has gone, nor beyond the number that is followed.
func TestWithdrawalsAreGivenUp(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	s := h.server
	c := &caller{actor: "test"}
	begin := func(what string, nodes ...string) string {
		return s.beginWithdrawal(c, withdrawalEntry, what, nodes, func() uint64 { return 1 })
	}
	state := func(id string) *adminv1.Withdrawal {
		return h.withdrawal(id, func(*adminv1.Withdrawal) bool { return true })
	}
	waits, unknown, nobody := begin("waits", a.id), begin("unknown", a.id, "spiffe://example.org/gone"), begin("nobody")
	if w := state(waits); w.GetState() != "pending" {
		t.Errorf("waits: %v", w)
	}
	if w := state(unknown); w.GetState() != "pending" || w.GetNodesGone() != 1 || w.GetNodes() != 2 {
		t.Errorf("of an unknown node: %v", w)
	}
	if w := state(nobody); w.GetState() != "complete" {
		t.Errorf("of nobody: %v", w)
	}
	s.reviewWithdrawals(time.Now().Add(24 * time.Hour))
	if w := state(waits); w.GetState() != "incomplete" || w.GetNodesGone() != 1 {
		t.Errorf("expired: %v", w)
	}
	first := begin("the first of many", a.id)
	for i := range maxOpenWithdrawals {
		begin(fmt.Sprint(i), a.id)
	}
	if w := state(first); w.GetState() != "incomplete" {
		t.Errorf("the first of many: %v", w)
	}
	for range 2 * maxWithdrawals {
		begin("more", a.id)
	}
	admin, ctx := h.admin()
	answer, err := admin.ListWithdrawals(ctx, &adminv1.ListWithdrawalsRequest{})
	if err != nil || len(answer.GetWithdrawals()) != maxWithdrawals {
		t.Errorf("%d are remembered, %v", len(answer.GetWithdrawals()), err)
	}
	if _, err := admin.ListWithdrawals(ctx, &adminv1.ListWithdrawalsRequest{Id: first}); err == nil {
		t.Error("the first is still remembered")
	}
}

func TestDelays(t *testing.T) {
	var d delays
	for n := 1; n <= 1000; n++ {
		d.add(time.Duration(n)*time.Millisecond, 1)
	}
	for q, want := range map[float64]time.Duration{.5: 500 * time.Millisecond, .99: 990 * time.Millisecond, 1: time.Second} {
		if got := d.quantile(q); got < want || got > want+want/20 || got > d.max {
			t.Errorf("quantile %v is %s, want %s to 5 %%", q, got, want)
		}
	}
	var one delays
	one.add(-time.Second, 5)
	one.add(1000*time.Hour, 1)
	if got := one.quantile(.5); got > time.Millisecond || one.max != 24*time.Hour {
		t.Errorf("quantile %s, max %s", got, one.max)
	}
}
