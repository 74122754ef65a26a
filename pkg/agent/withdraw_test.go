package agent

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

// TestV_E7_Evicted: an evicted node loses everything at once, and gets it back
// when it may attest again.
// TestV_E3_Quarantined: what the CA quarantines is withdrawn at once and not asked for
// again until it is lifted; a key that is quarantined is replaced by another.
func TestV_E3_Quarantined(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000), uidEntry("more", "/more", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		first := mustHave(t, w, "/more", "/web").SVIDs
		push := func(m *nodev1.Quarantines) {
			h.ca.mu.Lock()
			h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Quarantines{Quarantines: m}})
			h.ca.mu.Unlock()
			settleDown()
		}
		sum := func(b []byte) []byte {
			s := sha256.Sum256(b)
			return s[:]
		}
		web := sum([]byte("spiffe://example.org/web"))
		push(&nodev1.Quarantines{Sequence: 7, SpiffeIdSha256: [][]byte{web, {1, 2}}})
		s := mustHave(t, w, "/more")
		if diff := cmp.Diff([]string{"/web"}, withdrawn(s)); diff != "" || s.Denied {
			t.Errorf("withdrawn (-want +got)\n%s denied %v", diff, s.Denied)
		}
		h.mu.Lock()
		sequence := h.quarantined
		h.mu.Unlock()
		if sequence != 7 {
			t.Errorf("sequence %d", sequence)
		}
		late := h.subscribe(2, 1000) // another of the same instance
		before := h.ca.issued()
		pass(10 * time.Minute)
		settleDown()
		mustHave(t, late, "/more")
		if n := h.ca.issued(); n != before {
			t.Errorf("%d X.509-SVIDs asked for meanwhile", n-before)
		}
		push(&nodev1.Quarantines{Sequence: 8})
		again := mustHave(t, w, "/more", "/web")
		if len(again.Withdrawn) != 0 {
			t.Errorf("lifted, and withdrawn: %v", again.Withdrawn)
		}
		for _, v := range again.SVIDs {
			if v.ID.Path() == "/web" && slices.ContainsFunc(first, func(o *identity.SVID) bool { return o.Key.Public().(*ecdsa.PublicKey).Equal(v.Key.Public()) }) {
				t.Error("the old key came back")
			}
		}
		for n, m := range []*nodev1.Quarantines{
			{KeySha256: [][]byte{sum(again.SVIDs[0].Chain[0].RawSubjectPublicKeyInfo)}},
			{Serials: [][]byte{append([]byte{0}, again.SVIDs[1].Chain[0].SerialNumber.Bytes()...)}},
		} {
			m.Sequence = uint64(9 + n)
			push(m)
			next := mustHave(t, w, "/more", "/web")
			if next.SVIDs[n].Chain[0].Equal(again.SVIDs[n].Chain[0]) || !next.SVIDs[1-n].Chain[0].Equal(again.SVIDs[1-n].Chain[0]) {
				t.Errorf("%d: only the one that is quarantined is to be replaced", n)
			}
			again = next
		}
		// All of them: then it is denied.
		push(&nodev1.Quarantines{Sequence: 11, SpiffeIdSha256: [][]byte{web, sum([]byte("spiffe://example.org/more"))}})
		if s := mustHave(t, w); !s.Denied || len(s.Withdrawn) != 2 {
			t.Errorf("all: %+v", s)
		}
	})
}

func TestV_E7_Evicted(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		first := mustHave(t, w, "/web").SVIDs[0]
		h.ca.mu.Lock()
		h.ca.refuseAttest = status.Error(codes.PermissionDenied, "no")
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Evicted{Evicted: &nodev1.Evicted{Reason: "test"}}})
		h.ca.mu.Unlock()
		settleDown()
		s := mustHave(t, w)
		if diff := cmp.Diff([]string{"/web"}, withdrawn(s)); diff != "" || !s.Denied {
			t.Errorf("withdrawn (-want +got)\n%s denied %v", diff, s.Denied)
		}
		if c := h.condition(condNode); c.Severity != health.Error {
			t.Errorf("condition %+v", c)
		}
		pass(20 * time.Minute)
		settleDown()
		mustHave(t, w)
		if n := h.ca.count(func() int { return h.ca.attestations }); n > 150 {
			t.Errorf("%d attestations in 20 minutes of refusals", n)
		}
		h.ca.mu.Lock()
		h.ca.refuseAttest = nil
		h.ca.mu.Unlock()
		pass(time.Minute)
		settleDown()
		again := mustHave(t, w, "/web").SVIDs[0]
		if again.Key.Public().(*ecdsa.PublicKey).Equal(first.Key.Public()) {
			t.Error("the old key came back")
		}
	})
}

// TestV_E7_BannedWhileAway: a ban that was spoken while the agent was not
// connected is carried out when it comes back.
func TestV_E7_BannedWhileAway(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		h.ca.mu.Lock()
		h.ca.refuseSync = status.Error(codes.PermissionDenied, "the node is banned")
		h.ca.refuseAttest = status.Error(codes.PermissionDenied, "the node is banned")
		h.ca.mu.Unlock()
		h.ca.net.set(true)
		h.ca.net.set(false)
		pass(3 * time.Second)
		settleDown()
		if s := mustHave(t, w); len(s.Withdrawn) != 1 {
			t.Errorf("snapshot %+v", s)
		}
	})
}

// TestV_E3_WithdrawalsReported: the CA hears which change took something from how many
// streams, before it hears that the change is in force; then who has acknowledged and
// who has ended, and by name who has done neither. Streams of bundles alone are none of
// them, changes that take nothing are not reported, and a new session is told again.
func TestV_E3_WithdrawalsReported(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000), uidEntry("more", "/more", 1000))
		var watches []*identity.Watch
		for n := range 4 {
			watches = append(watches, h.subscribe(n+1, 1000))
		}
		settleDown()
		told := func() (all []*nodev1.Withdrawing) {
			pass(time.Second)
			settleDown()
			h.ca.mu.Lock()
			defer h.ca.mu.Unlock()
			for _, m := range h.ca.heard {
				if w := m.GetWithdrawing(); w != nil {
					all = append(all, w)
				}
			}
			h.ca.heard = nil
			return all
		}
		push := func(m *nodev1.SyncResponse) {
			h.ca.mu.Lock()
			h.ca.push(m)
			h.ca.mu.Unlock()
			settleDown()
		}
		h.ca.remove("more")
		if got := told(); got != nil {
			t.Errorf("a CA that did not ask was told: %v", got)
		}
		for _, w := range watches {
			w.InForce(w.Snapshot(), true)
		}
		h.ca.mu.Lock()
		h.ca.welcome = true
		h.ca.mu.Unlock()
		push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Welcome{Welcome: &nodev1.Welcome{ReportsWithdrawals: true}}})
		if got := told(); len(got) != 1 || got[0].GetAcknowledged() != 4 {
			t.Errorf("of what was before: %v", got)
		}

		sum := sha256.Sum256([]byte("spiffe://example.org/web"))
		push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Quarantines{Quarantines: &nodev1.Quarantines{Sequence: 7, SpiffeIdSha256: [][]byte{sum[:]}}}})
		h.ca.mu.Lock()
		first, applied := -1, -1
		for i, m := range h.ca.heard {
			if m.GetWithdrawing() != nil && first < 0 {
				first = i
			}
			if m.GetApplied().GetQuarantineSequence() == 7 && applied < 0 {
				applied = i
			}
		}
		h.ca.mu.Unlock()
		if first < 0 || applied < first {
			t.Errorf("withdrawing is message %d, applied %d", first, applied)
		}
		got := told()
		if len(got) != 1 || got[0].GetCause() != nodev1.Cause_CAUSE_QUARANTINE || got[0].GetAfter() != 0 || got[0].GetUntil() != 7 ||
			got[0].GetStreams() != 4 || got[0].GetAcknowledged() != 0 || len(got[0].GetLaggards()) != 4 ||
			!strings.HasPrefix(got[0].GetLaggards()[0].GetName(), "spiffe://example.org/web (process ") {
			t.Errorf("told %v", got)
		}
		watches[0].InForce(watches[0].Snapshot(), true)
		watches[0].InForce(watches[0].Snapshot(), true) // once too often
		watches[1].InForce(watches[1].Snapshot(), false)
		watches[2].Close()
		got = told()
		last := got[len(got)-1]
		if last.GetStreams() != 3 || last.GetAcknowledged() != 1 || last.GetEnded() != 1 || len(last.GetLaggards()) != 1 {
			t.Errorf("told %v", got)
		}
		// The stream is told of something newer before it has acknowledged: that
		// counts for both.
		push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Quarantines{Quarantines: &nodev1.Quarantines{Sequence: 8}}})
		watches[3].InForce(watches[3].Snapshot(), true)
		got = told()
		if last := got[len(got)-1]; last.GetUntil() != 7 || last.GetAcknowledged() != 2 || len(last.GetLaggards()) != 0 {
			t.Errorf("told %v", got)
		}
		h.ca.net.set(true)
		pass(time.Second)
		h.ca.net.set(false)
		pass(time.Minute)
		if got := told(); len(got) != 2 || got[1].GetAcknowledged() != 2 {
			t.Errorf("a new session was told %v", got)
		}
	})
}

// TestV_E7_LeavesWithAReport: an evicted agent stays until its proxies have
// acknowledged, but not for long; where nobody asked, it leaves at once.
func TestV_E7_LeavesWithAReport(t *testing.T) {
	for name, acknowledge := range map[string]bool{"acknowledged": true, "silent proxy": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, h *harness) {
				h.ca.mu.Lock()
				h.ca.welcome = true
				h.ca.mu.Unlock()
				h.ca.apply(uidEntry("web", "/web", 1000))
				w := h.subscribe(1, 1000)
				settleDown()
				mustHave(t, w, "/web")
				h.ca.mu.Lock()
				h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Welcome{Welcome: &nodev1.Welcome{ReportsWithdrawals: true}}})
				h.ca.refuseAttest = status.Error(codes.PermissionDenied, "no")
				h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Evicted{Evicted: &nodev1.Evicted{Reason: "test"}}})
				h.ca.mu.Unlock()
				pass(leaveWithin - time.Second)
				settleDown()
				open := func() bool {
					h.ca.mu.Lock()
					defer h.ca.mu.Unlock()
					return len(h.ca.syncs) == 1
				}
				if !open() {
					t.Fatal("the agent has left before its proxy acknowledged")
				}
				if acknowledge {
					w.InForce(w.Snapshot(), true)
					settleDown()
				} else {
					pass(2 * time.Second)
					settleDown()
				}
				if open() {
					t.Error("the agent has not left")
				}
				h.ca.mu.Lock()
				defer h.ca.mu.Unlock()
				var last *nodev1.Withdrawing
				for _, m := range h.ca.heard {
					if m.GetWithdrawing() != nil {
						last = m.GetWithdrawing()
					}
				}
				if last.GetCause() != nodev1.Cause_CAUSE_EVICTION || last.GetStreams() != 1 || (last.GetAcknowledged() == 1) != acknowledge {
					t.Errorf("the last words: %v", last)
				}
			})
		})
	}
}
