package agent

import (
	"testing"
	"time"
)

func TestFirstSVID(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		w := h.subscribe(1, 1000)
		settleDown()
		if s := w.Snapshot(); s == nil || !s.Denied || s.Bundle == nil {
			t.Fatalf("without an entry: %+v, want a denial", s)
		}
		h.ca.apply(uidEntry("web", "/web", 1000))
		settleDown()
		s := mustHave(t, w, "/web")
		if s.Denied || s.SVIDs[0].Entry != "web" {
			t.Errorf("snapshot %+v", s)
		}
		other := h.subscribe(2, 1000)
		settleDown()
		if other.Snapshot() != s {
			t.Error("a second process of the instance has another snapshot")
		}
		if n := h.ca.issued(); n != 1 {
			t.Errorf("%d items were issued, want 1", n)
		}
		w.Close()
		other.Close()
	})
}

func TestRenewalOverDays(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		last := mustHave(t, w, "/web").SVIDs[0]
		for range 3 * 24 * 4 {
			time.Sleep(15 * time.Minute)
			settleDown()
			now := mustHave(t, w, "/web").SVIDs[0]
			if left := time.Until(now.NotAfter()); left < 25*time.Minute {
				t.Fatalf("only %v left of an X.509-SVID with a life of an hour", left)
			}
			last = now
		}
		if n := h.ca.issued(); n < 3*24*2-4 || n > 3*24*2+4 {
			t.Errorf("%d items in three days, want about %d", n, 3*24*2)
		}
		if n := h.ca.count(func() int { return h.ca.attestations }); n != 1 {
			t.Errorf("the node was attested %d times, want once", n)
		}
		if n := h.ca.count(func() int { return h.ca.renewals }); n < 65 || n > 80 {
			t.Errorf("the agent's X.509-SVID was renewed %d times, want about 72", n)
		}
		_ = last
		w.Close()
	})
}
