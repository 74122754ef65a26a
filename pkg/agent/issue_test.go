package agent

import (
	"crypto/ecdsa"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/types/known/durationpb"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

func TestRenewalOverDays(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		last := mustHave(t, w, "/web").SVIDs[0]
		const days = 2
		changes := 0
		for range days * 24 * 4 {
			pass(15 * time.Minute)
			settleDown()
			now := mustHave(t, w, "/web").SVIDs[0]
			if left := time.Until(now.NotAfter()); left < 25*time.Minute {
				t.Fatalf("only %v left of an X.509-SVID with a life of an hour", left)
			}
			if now != last {
				changes++
				if now.Key.Public().(*ecdsa.PublicKey).Equal(last.Key.Public()) {
					t.Fatal("the key was not renewed")
				}
			}
			last = now
		}
		if n := h.ca.issued(); n < days*24*2-4 || n > days*24*2+4 {
			t.Errorf("%d items in %d days, want about %d", n, days, days*24*2)
		}
		if changes < days*24*2-4 {
			t.Errorf("the stream saw %d X.509-SVIDs", changes)
		}
		if n := h.ca.count(func() int { return h.ca.attestations }); n != 1 {
			t.Errorf("the node was attested %d times, want once", n)
		}
		if n := h.ca.count(func() int { return h.ca.renewals }); n < days*24-4 || n > days*24+4 {
			t.Errorf("the agent's X.509-SVID was renewed %d times, want about %d", n, days*24)
		}
		renewals := 0
		for _, item := range h.ca.items[1:] {
			if item.GetKind() != nodev1.IssueKind_ISSUE_KIND_RENEWAL || len(item.GetPreviousSerial()) == 0 {
				t.Fatalf("item %v", item)
			}
			renewals++
		}
		if renewals == 0 {
			t.Error("nothing was renewed")
		}
	})
}

// TestFault_F30_OutageWithinBudget: nobody notices an outage that is shorter than
// what is at hand lives.
func TestFault_F30_OutageWithinBudget(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		if got := h.Status().OutageBudget; got != "1h0m0s" {
			t.Errorf("outage budget %q", got)
		}
		pass(29 * time.Minute)
		h.ca.net.set(true)
		for range 25 {
			pass(time.Minute)
			settleDown()
			mustHave(t, w, "/web")
		}
		if c := h.condition(condStale); c.Severity == health.OK || !strings.Contains(c.Message, "no CA since") {
			t.Errorf("condition %+v", c)
		}
		if c := h.condition(condCA); c.Severity != health.Warning {
			t.Errorf("condition %+v", c)
		}
		second := h.subscribe(2, 1000) // a new process of a known instance
		settleDown()
		mustHave(t, second, "/web")
		if st := h.Status(); st.Connected || st.LastError == "" {
			t.Errorf("status %+v", st)
		}
		h.ca.net.set(false)
		pass(time.Minute)
		settleDown()
		s := mustHave(t, w, "/web")
		if left := time.Until(s.SVIDs[0].NotAfter()); left < 55*time.Minute {
			t.Errorf("%v left after the outage, want a fresh one", left)
		}
		for _, name := range []string{condStale, condCA, condRenewal, condNode} {
			if c := h.condition(name); c.Severity != health.OK {
				t.Errorf("condition %+v after the outage", c)
			}
		}
		if n := h.ca.count(func() int { return h.ca.attestations }); n != 1 {
			t.Errorf("%d attestations, want 1", n)
		}
	})
}

// TestFault_F43_TotalExpiry: a site that slept for a week is back within a minute,
// and nobody was served anything expired meanwhile.
func TestFault_F43_TotalExpiry(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		h.ca.net.set(true)
		pass(59 * time.Minute)
		settleDown()
		mustHave(t, w, "/web")
		pass(time.Minute)
		settleDown()
		s := mustHave(t, w)
		if len(s.Withdrawn) != 0 || s.Denied { // expired, but not taken away
			t.Errorf("after expiry: withdrawn %q, denied %v", withdrawn(s), s.Denied)
		}
		pass(4 * time.Hour) // a week is no different
		settleDown()
		if c := h.condition(condNode); c.Severity != health.Error {
			t.Errorf("condition %+v", c)
		}
		h.ca.net.set(false)
		pass(time.Minute)
		settleDown()
		s = mustHave(t, w, "/web")
		if len(s.Withdrawn) != 0 {
			t.Errorf("still withdrawn: %q", withdrawn(s))
		}
		if n := h.ca.count(func() int { return h.ca.attestations }); n != 2 {
			t.Errorf("%d attestations, want 2", n)
		}
		if c := h.condition(condNode); c.Severity != health.OK {
			t.Errorf("condition %+v", c)
		}
	})
}

// TestV_H7_F55_ReissuedOnce: an X.509-SVID that a proxy refuses is issued once more,
// with a new key; one that is refused as well is kept, whatever the proxy says.
func TestV_H7_F55_ReissuedOnce(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w, other := h.subscribe(1, 1000), h.subscribe(2, 1000)
		settleDown()
		first := mustHave(t, w, "/web").SVIDs[0]
		w.Reject(first.Chain[0])
		other.Reject(first.Chain[0]) // the same one, by another stream
		settleDown()
		second := mustHave(t, w, "/web").SVIDs[0]
		if second.Chain[0].Equal(first.Chain[0]) || second.Key == first.Key {
			t.Fatal("it was not issued anew, with a new key")
		}
		w.Reject(first.Chain[0]) // late
		for range 10 {
			w.Reject(second.Chain[0])
			settleDown()
		}
		if now := mustHave(t, w, "/web").SVIDs[0]; now != second || h.ca.issued() != 2 {
			t.Errorf("issued %d times, want 2", h.ca.issued())
		}
		if n := testutil.ToFloat64(h.metrics.rejections.WithLabelValues(rejectionReissued)); n != 1 {
			t.Errorf("%v counted as reissued", n)
		}
		if n := testutil.ToFloat64(h.metrics.rejections.WithLabelValues(rejectionKept)); n != 12 {
			t.Errorf("%v counted as kept", n)
		}
		// At its time it is renewed as any, and that one gets its chance.
		pass(50 * time.Minute)
		settleDown()
		third := mustHave(t, w, "/web").SVIDs[0]
		w.Reject(third.Chain[0])
		settleDown()
		if third == second || mustHave(t, w, "/web").SVIDs[0] == third {
			t.Error("the renewed one was not issued anew")
		}
	})
}

func TestRefusalsAreBounded(t *testing.T) {
	for _, tc := range []struct {
		name  string
		retry time.Duration
		max   int
	}{
		{"not before something changes", -1, 25},
		{"at once", 0, 1200},
		{"in ten minutes", 10 * time.Minute, 6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, h *harness) {
				h.ca.refuseItem = func(*nodev1.IssueItem) *nodev1.Refusal {
					return refusal(nodev1.Reason_REASON_UNAVAILABLE, tc.retry)
				}
				h.ca.apply(uidEntry("web", "/web", 1000))
				w := h.subscribe(1, 1000)
				pass(time.Hour)
				settleDown()
				if s := w.Snapshot(); s == nil || s.Denied || len(s.SVIDs) > 0 {
					t.Errorf("snapshot %+v", s)
				}
				if n := h.ca.issued(); n < 2 || n > tc.max {
					t.Errorf("%d requests in an hour, want 2 to %d", n, tc.max)
				}
				if c := h.condition(condRenewal); c.Severity != health.Warning {
					t.Errorf("condition %+v", c)
				}
				i := h.Status().Instances[0].Identities[0]
				if i.State != "failing" || !strings.Contains(i.Reason, "REASON_UNAVAILABLE") {
					t.Errorf("status %+v", i)
				}
				// A change of the entry is tried at once.
				h.ca.mu.Lock()
				h.ca.refuseItem = nil
				h.ca.mu.Unlock()
				changed := uidEntry("web", "/web", 1000)
				changed.Hint = "x"
				h.ca.apply(changed)
				settleDown()
				mustHave(t, w, "/web")
			})
		})
	}
}

// TestRefusedRenewalKeepsServing: what the CA refuses to renew is served until it
// expires; an entry's end is another matter.
func TestRefusedRenewalKeepsServing(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		h.ca.mu.Lock()
		h.ca.refuseItem = func(*nodev1.IssueItem) *nodev1.Refusal {
			return refusal(nodev1.Reason_REASON_RULE_NOT_MATCHED, -1)
		}
		h.ca.mu.Unlock()
		pass(59 * time.Minute)
		settleDown()
		mustHave(t, w, "/web")
		pass(time.Minute)
		settleDown()
		if s := mustHave(t, w); len(s.Withdrawn) != 0 || s.Denied {
			t.Errorf("snapshot %+v", s)
		}
	})
}

func TestRotate(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		var watches []*identity.Watch
		for n := range 8 {
			h.ca.apply(uidEntry(fmt.Sprint("web", n), fmt.Sprint("/web/", n), n))
			watches = append(watches, h.subscribe(n+1, uint32(n)))
		}
		settleDown()
		old := h.ca.intermediate
		h.ca.mu.Lock()
		h.ca.intermediate = newAuthority(t, "intermediate 2", h.ca.root)
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Rotate{Rotate: &nodev1.Rotate{
			Authority: old.id(), Within: durationpb.New(8 * time.Minute),
		}}})
		h.ca.mu.Unlock()
		count := func() (n int) {
			for i, w := range watches {
				if mustHave(t, w, fmt.Sprint("/web/", i)).SVIDs[0].Chain[1].Equal(identity.NewCertificate(old.cert)) {
					n++
				}
			}
			return n
		}
		pass(4 * time.Minute)
		settleDown()
		if n := count(); n < 2 || n > 6 {
			t.Errorf("%d of 8 X.509-SVIDs are of the old authority after half of the time", n)
		}
		pass(5 * time.Minute)
		settleDown()
		if n := count(); n != 0 {
			t.Errorf("%d X.509-SVIDs are of the old authority after all of the time", n)
		}
		if n := h.ca.issued(); n != 16 {
			t.Errorf("%d items, want 16", n)
		}
		if n := h.ca.count(func() int { return h.ca.renewals }); n != 1 {
			t.Errorf("the agent's own was renewed %d times, want once", n)
		}
		for _, item := range h.ca.items[8:] {
			if item.GetKind() != nodev1.IssueKind_ISSUE_KIND_ROTATION {
				t.Errorf("item %v", item)
			}
		}
	})
}
