package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/internal/sealed"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
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
		stranger := h.subscribe(3, 1001)
		settleDown()
		if s := stranger.Snapshot(); s == nil || !s.Denied || len(s.SVIDs) > 0 {
			t.Errorf("a stranger has %+v", s)
		}
		item := h.ca.items[0]
		if item.GetKind() != nodev1.IssueKind_ISSUE_KIND_FIRST || item.GetInstance() != "unix:1000:1000:/bin/app" ||
			item.GetWorkload().GetUnix().GetUid() != 1000 || len(item.GetPreviousSerial()) > 0 || item.GetProcess().GetPid() != 1 {
			t.Errorf("item %v", item)
		}
	})
}

// TestSpec_E05_StableOrder: the default identity is the first in the list, so
// the order must not depend on who was issued first.
func TestSpec_E05_StableOrder(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("b", "/b", 1000), uidEntry("c", "/c", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/b", "/c")
		h.ca.apply(uidEntry("a", "/z", 1000))
		settleDown()
		mustHave(t, w, "/z", "/b", "/c")
		h.ca.apply(uidEntry("d", "/d", 1000))
		settleDown()
		mustHave(t, w, "/z", "/b", "/c", "/d")
	})
}

// TestSpec_E06_DuplicateHint: hints are unique; the second one is dropped, not
// the identity.
func TestSpec_E06_DuplicateHint(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		a, b := uidEntry("a", "/a", 1000), uidEntry("b", "/b", 1000)
		a.Hint, b.Hint = "main", "main"
		h.ca.apply(a, b)
		w := h.subscribe(1, 1000)
		settleDown()
		s := mustHave(t, w, "/a", "/b")
		if s.SVIDs[0].Hint != "main" || s.SVIDs[1].Hint != "" {
			t.Errorf("hints %q and %q", s.SVIDs[0].Hint, s.SVIDs[1].Hint)
		}
		if !strings.Contains(h.log.String(), "hint is dropped") {
			t.Error("nothing was logged")
		}
	})
}

func TestRenewalOverDays(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		last := mustHave(t, w, "/web").SVIDs[0]
		const days = 2
		changes := 0
		for range days * 24 * 4 {
			time.Sleep(15 * time.Minute)
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
		time.Sleep(29 * time.Minute)
		h.ca.net.set(true)
		for range 25 {
			time.Sleep(time.Minute)
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
		time.Sleep(time.Minute)
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
		time.Sleep(59 * time.Minute)
		settleDown()
		mustHave(t, w, "/web")
		time.Sleep(time.Minute)
		settleDown()
		s := mustHave(t, w)
		if len(s.Withdrawn) != 0 || s.Denied { // expired, but not taken away
			t.Errorf("after expiry: withdrawn %q, denied %v", withdrawn(s), s.Denied)
		}
		time.Sleep(4 * time.Hour) // a week is no different
		settleDown()
		if c := h.condition(condNode); c.Severity != health.Error {
			t.Errorf("condition %+v", c)
		}
		h.ca.net.set(false)
		time.Sleep(time.Minute)
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
		time.Sleep(10 * time.Minute)
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
		time.Sleep(20 * time.Minute)
		settleDown()
		mustHave(t, w)
		if n := h.ca.count(func() int { return h.ca.attestations }); n > 150 {
			t.Errorf("%d attestations in 20 minutes of refusals", n)
		}
		h.ca.mu.Lock()
		h.ca.refuseAttest = nil
		h.ca.mu.Unlock()
		time.Sleep(time.Minute)
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
		time.Sleep(3 * time.Second)
		settleDown()
		if s := mustHave(t, w); len(s.Withdrawn) != 1 {
			t.Errorf("snapshot %+v", s)
		}
	})
}

// TestV_E3_EntryDeletedWhileStreaming: what an entry gave is withdrawn with it.
func TestV_E3_EntryDeletedWhileStreaming(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("a", "/a", 1000), uidEntry("b", "/b", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		b := mustHave(t, w, "/a", "/b").SVIDs[1]
		h.ca.remove("a")
		settleDown()
		s := mustHave(t, w, "/b")
		if s.SVIDs[0] != b || s.Denied || !slices.Equal(withdrawn(s), []string{"/a"}) {
			t.Errorf("snapshot %+v", s)
		}
		h.ca.remove("b")
		settleDown()
		s = mustHave(t, w)
		if !s.Denied || !slices.Equal(withdrawn(s), []string{"/a", "/b"}) {
			t.Errorf("snapshot %+v", s)
		}
		h.ca.apply(uidEntry("b", "/b", 1000))
		settleDown()
		s = mustHave(t, w, "/b")
		if s.SVIDs[0] == b || !slices.Equal(withdrawn(s), []string{"/a"}) {
			t.Errorf("snapshot %+v", s)
		}
	})
}

// TestV_E3_LowerRevisionRejected: a replica that lags behind does not bring back
// what was deleted.
func TestV_E3_LowerRevisionRejected(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("a", "/a", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/a")
		h.ca.remove("a")
		settleDown()
		mustHave(t, w)
		h.ca.mu.Lock()
		stale := &nodev1.Snapshot{Epoch: h.ca.epoch, Revision: h.ca.revision - 1, Node: h.ca.node, Entries: []*entryv1.Entry{uidEntry("a", "/a", 1000)}}
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Snapshot{Snapshot: stale}})
		h.ca.mu.Unlock()
		settleDown()
		mustHave(t, w)
		// Another epoch is another history: its revisions cannot be compared.
		time.Sleep(time.Minute)
		h.ca.mu.Lock()
		h.ca.epoch, h.ca.revision = "epoch-2", 1
		h.ca.entries["a"] = uidEntry("a", "/a", 1000)
		h.ca.push(h.ca.snapshot())
		h.ca.mu.Unlock()
		settleDown()
		mustHave(t, w, "/a")
		if st := h.Status(); st.Epoch != "epoch-2" || st.Revision != 1 {
			t.Errorf("status %+v", st)
		}
	})
}

// TestV_E4_GapMeansSnapshot: a delta that does not follow is not applied.
func TestV_E4_GapMeansSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		w := h.subscribe(1, 1000)
		settleDown()
		h.ca.mu.Lock()
		h.ca.revision += 5 // which the agent never hears of
		h.ca.entries["lost"] = uidEntry("lost", "/lost", 1000)
		h.ca.mu.Unlock()
		h.ca.apply(uidEntry("web", "/web", 1000))
		time.Sleep(5 * time.Second)
		settleDown()
		mustHave(t, w, "/lost", "/web")
		// One that is in force already is ignored.
		h.ca.mu.Lock()
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Delta{Delta: &nodev1.Delta{
			FromRevision: h.ca.revision - 2, Revision: h.ca.revision - 1, Removed: []string{"web"},
		}}})
		h.ca.mu.Unlock()
		settleDown()
		mustHave(t, w, "/lost", "/web")
	})
}

func TestEntryThatDoesNotCompile(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		h.ca.apply(uidEntry("other", "/other", 1000), entry("web", "/web", "unix.uid == from_the_future(1000)"))
		settleDown()
		s := mustHave(t, w, "/other") // default deny: its older form is not in force at the CA
		if !slices.Equal(withdrawn(s), []string{"/web"}) {
			t.Errorf("withdrawn %q", withdrawn(s))
		}
		if c := h.condition(condEntries); c.Severity != health.Warning {
			t.Errorf("condition %+v", c)
		}
		if st := h.Status(); st.Skipped != 1 || st.Entries != 1 {
			t.Errorf("status %+v", st)
		}
		h.ca.apply(uidEntry("web", "/web", 1000))
		settleDown()
		mustHave(t, w, "/other", "/web")
		if c := h.condition(condEntries); c.Severity != health.OK {
			t.Errorf("condition %+v", c)
		}
	})
}

// TestEntryChanged: an identity that stays is served until its successor is in
// hand, also if the entry that gives it is another one.
func TestEntryChanged(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		old := mustHave(t, w, "/web").SVIDs[0]
		gate := make(chan struct{})
		h.ca.mu.Lock()
		h.ca.issueGate = gate
		h.ca.mu.Unlock()
		changed := uidEntry("web", "/web", 1000)
		changed.DnsNames = []string{"web.internal"}
		h.ca.apply(changed)
		settleDown()
		if got := mustHave(t, w, "/web").SVIDs[0]; got != old {
			t.Error("another X.509-SVID before it was issued")
		}
		close(gate)
		settleDown()
		s := mustHave(t, w, "/web")
		if got := s.SVIDs[0]; got == old || !slices.Equal(identitytest.X509(got.Chain[0]).DNSNames, []string{"web.internal"}) || len(s.Withdrawn) > 0 {
			t.Errorf("snapshot %+v", s)
		}
		if got := h.ca.items[len(h.ca.items)-1]; got.GetKind() != nodev1.IssueKind_ISSUE_KIND_ROTATION || len(got.GetPreviousSerial()) == 0 {
			t.Errorf("item %v", got)
		}
	})
}

// TestFault_F37_RestartFromSealedCache: a restart needs no network, changes no key,
// and gives nothing to whom it does not belong.
func TestFault_F37_RestartFromSealedCache(t *testing.T) {
	dir := t.TempDir()
	seal := filepath.Join(dir, "seal")
	if err := os.WriteFile(seal, []byte(strings.Repeat("s", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "agent")
	with := func(c *Config) { c.SealingKeyFile = seal }
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, data, with)
		h.workloads.container(7, "c1", "shop")
		h.start()
		settleDown()
		ca.apply(uidEntry("a", "/a", 1000), uidEntry("b", "/b", 1000),
			entry("shop", `/{docker.labels["app"]}`, `docker.container_id == "c1"`))
		w, c := h.subscribe(1, 1000), h.subscribe(7, 0)
		settleDown()
		before := mustHave(t, w, "/a", "/b")
		container := mustHave(t, c, "/shop")
		time.Sleep(2 * time.Second)
		h.stop()
		if w.Err() == nil {
			t.Error("the watch of a stopped agent goes on")
		}
		raw, err := os.ReadFile(filepath.Join(data, sealedFile))
		if err != nil {
			t.Fatal(err)
		}
		for _, clear := range []string{"/web", "spiffe", "unix"} {
			if strings.Contains(string(raw), clear) {
				t.Errorf("the sealed cache shows %q", clear)
			}
		}
		if st, err := os.Stat(filepath.Join(data, sealedFile)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode of the sealed cache: %v, %v", st.Mode(), err)
		}

		ca.net.set(true)
		h = newHarness(t, ca, data, with)
		h.workloads.container(7, "c1", "shop")
		h.workloads.container(8, "c1", "relabelled") // the id of an old container, other facts
		h.start()
		settleDown()
		w = h.subscribe(2, 1000)
		stranger := h.subscribe(3, 1001)
		relabelled := h.subscribe(8, 0)
		settleDown()
		after := mustHave(t, w, "/a", "/b")
		for n := range after.SVIDs {
			if !after.SVIDs[n].Chain[0].Equal(before.SVIDs[n].Chain[0]) || after.SVIDs[n].Key == nil {
				t.Errorf("identity %d has another certificate after the restart", n)
			}
		}
		mustHave(t, stranger)
		if !stranger.Snapshot().Denied {
			t.Error("a stranger is not denied")
		}
		mustHave(t, relabelled)
		time.Sleep(time.Minute)
		c = h.subscribe(7, 0)
		settleDown()
		if got := mustHave(t, c, "/shop").SVIDs[0]; !got.Chain[0].Equal(container.SVIDs[0].Chain[0]) {
			t.Error("the container has another certificate after the restart")
		}
		if ca.attestations != 1 || ca.issued() != 3 {
			t.Errorf("%d attestations, %d items", ca.attestations, ca.issued())
		}
		ca.net.set(false)
		time.Sleep(time.Minute)
		settleDown()
		mustHave(t, relabelled, "/relabelled")
		if ca.attestations != 1 {
			t.Errorf("%d attestations, want 1", ca.attestations)
		}
		mustHave(t, w, "/a", "/b")
		h.stop()

		// Nobody comes back: the keys are dropped and the CA is told.
		h = newHarness(t, ca, data, with)
		h.start()
		time.Sleep(3 * time.Minute)
		settleDown()
		if got := endedInstances(ca); !slices.Contains(got, "docker:c1") || !slices.Contains(got, "unix:1000:1000:/bin/app") {
			t.Errorf("ended instances %q", got)
		}
		if st := h.Status(); len(st.Instances) != 0 {
			t.Errorf("instances %+v", st.Instances)
		}
		h.stop()
	})
}

func endedInstances(ca *fakeCA) []string {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	var out []string
	for _, m := range ca.heard {
		for _, i := range m.GetInstancesEnded().GetInstances() {
			if len(i.GetSerials()) > 0 {
				out = append(out, i.GetInstance())
			}
		}
	}
	return out
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
		time.Sleep(50 * time.Minute)
		settleDown()
		third := mustHave(t, w, "/web").SVIDs[0]
		w.Reject(third.Chain[0])
		settleDown()
		if third == second || mustHave(t, w, "/web").SVIDs[0] == third {
			t.Error("the renewed one was not issued anew")
		}
	})
}

// inAnotherBoot makes a sealed cache one that was written before the machine was
// started anew.
func inAnotherBoot(t *testing.T, h *harness) {
	t.Helper()
	v, err := h.openVault()
	if err != nil {
		t.Fatal(err)
	}
	box, err := os.ReadFile(v.path)
	if err != nil {
		t.Fatal(err)
	}
	h.vault = v
	s, err := h.unseal(box)
	if err != nil {
		t.Fatal(err)
	}
	s.Boot = "another"
	plain, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(v.path, v.sealer.Seal(plain), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFault_F31_Reboot: with a key that outlives a reboot the node is who it was,
// and its workloads, which are others, have new keys.
func TestFault_F31_Reboot(t *testing.T) {
	dir := t.TempDir()
	seal := filepath.Join(dir, "seal")
	if err := os.WriteFile(seal, []byte(strings.Repeat("s", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "agent")
	with := func(c *Config) { c.SealingKeyFile = seal }
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, data, with)
		h.start()
		settleDown()
		ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		before := mustHave(t, w, "/web")
		h.stop()
		inAnotherBoot(t, h)

		h = newHarness(t, ca, data, with)
		h.start()
		settleDown()
		w = h.subscribe(1, 1000)
		settleDown()
		after := mustHave(t, w, "/web")
		if ca.attestations != 1 {
			t.Errorf("%d attestations, want that the node is who it was", ca.attestations)
		}
		if after.SVIDs[0].Chain[0].Equal(before.SVIDs[0].Chain[0]) {
			t.Error("the key of a workload has outlived the machine's reboot")
		}
		h.stop()
	})
}

// TestFault_F31_RebootWithoutKey: without such a key the node has to be attested
// anew, and what an operator reads says why and what to do.
func TestFault_F31_RebootWithoutKey(t *testing.T) {
	data := filepath.Join(t.TempDir(), "agent")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := sealed.New([]byte(strings.Repeat("x", 32)), "a key that is gone", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, sealedFile), other.Seal([]byte("{}")), 0o600); err != nil {
		t.Fatal(err)
	}
	name := "meshid:" + filepath.Join(data, sealedFile)
	if _, err := sealed.KeyringSecret(name); err != nil {
		t.Skipf("the kernel gives no keyring here: %v", err)
	}
	defer func() {
		if err := sealed.RemoveKeyringSecret(name); err != nil {
			t.Error(err)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		ca.refuseAttest = status.Error(codes.PermissionDenied, "attestation refused: the CA's ledger says why")
		h := newHarness(t, ca, data, func(c *Config) { c.SealingKeyFile = "" })
		h.start()
		time.Sleep(time.Minute)
		settleDown()
		c := h.condition(condNode)
		for _, want := range []string{"make a new join token", "a reboot empties", "sealing_key_file"} {
			if c.Severity != health.Error || !strings.Contains(c.Message, want) {
				t.Errorf("condition %+v does not say %q", c, want)
			}
		}
		ca.mu.Lock()
		ca.refuseAttest = nil
		ca.mu.Unlock()
		time.Sleep(time.Minute)
		settleDown()
		if c := h.condition(condNode); c.Severity != health.OK {
			t.Errorf("condition %+v", c)
		}
		h.stop()
	})
}

// TestFault_F42_CorruptedCache: whatever is in the file, the agent starts, and
// attests itself again.
func TestFault_F42_CorruptedCache(t *testing.T) {
	dir := t.TempDir()
	seal := filepath.Join(dir, "seal")
	if err := os.WriteFile(seal, []byte(strings.Repeat("s", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "agent")
	file := filepath.Join(data, sealedFile)
	with := func(c *Config) { c.SealingKeyFile = seal }
	for name, spoil := range map[string]func(t *testing.T){
		"flipped byte": func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cut": func(t *testing.T) {
			if err := os.Truncate(file, 20); err != nil {
				t.Fatal(err)
			}
		},
		"other key": func(t *testing.T) {
			if err := os.WriteFile(seal, []byte(strings.Repeat("x", 32)), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"readable by others": func(t *testing.T) {
			if err := os.Chmod(file, 0o644); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newFakeCA(t)
				defer ca.close()
				h := newHarness(t, ca, data, with)
				h.start()
				settleDown()
				ca.apply(uidEntry("web", "/web", 1000))
				w := h.subscribe(1, 1000)
				settleDown()
				mustHave(t, w, "/web")
				h.stop()
				spoil(t)
				before := ca.attestations
				h = newHarness(t, ca, data, with)
				h.start()
				settleDown()
				w = h.subscribe(1, 1000)
				settleDown()
				mustHave(t, w, "/web")
				if ca.attestations != before+1 {
					t.Errorf("%d attestations, want one more than %d", ca.attestations, before)
				}
				if !strings.Contains(h.log.String(), "sealed cache is dropped") {
					t.Error("nothing was logged")
				}
				h.stop()
			})
		})
	}
}

// TestFault_F42_NoSealingKey: without a key nothing is written, and it is said.
func TestFault_F42_NoSealingKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, dir)
		h.start()
		settleDown()
		ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		if c := h.condition(condSealed); c.Severity != health.Warning || !strings.Contains(c.Message, "sealing_key_file") {
			t.Errorf("condition %+v", c)
		}
		time.Sleep(time.Minute)
		h.stop()
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if f.Name() != "agent.lock" {
				t.Errorf("file %s was written", f.Name())
			}
		}
	})
}

// TestFault_F41_TwoAgents: the second one refuses and names the first.
func TestFault_F41_TwoAgents(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, dir)
		h.start()
		settleDown()
		second := newHarness(t, ca, dir)
		err := second.Run(t.Context())
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
			t.Errorf("Run = %v, want an error with the process id %d", err, os.Getpid())
		}
		h.stop()
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
				time.Sleep(time.Hour)
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
		time.Sleep(59 * time.Minute)
		settleDown()
		mustHave(t, w, "/web")
		time.Sleep(time.Minute)
		settleDown()
		if s := mustHave(t, w); len(s.Withdrawn) != 0 || s.Denied {
			t.Errorf("snapshot %+v", s)
		}
	})
}

// TestV_D2_ProcessEnds: nothing is published to a stream after its process has
// ended, and the stream ends.
func TestV_D2_ProcessEnds(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("a", "/a", 1000))
		p := peer.ForTest(1, 1000, 1000)
		w, err := h.Subscribe(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		other := h.subscribe(2, 1000)
		settleDown()
		mustHave(t, w, "/a")
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		h.ca.apply(uidEntry("b", "/b", 1000))
		settleDown()
		mustHave(t, other, "/a", "/b")
		select {
		case <-w.Done():
		default:
			t.Fatal("the watch goes on")
		}
		if !errors.Is(w.Err(), peer.ErrGone) || w.Snapshot() != nil {
			t.Errorf("Err = %v, Snapshot = %v", w.Err(), w.Snapshot())
		}
		// One that nothing is published to ends as well.
		p = peer.ForTest(3, 1000, 1000)
		if w, err = h.Subscribe(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		settleDown()
		_ = p.Close()
		time.Sleep(2 * idle)
		settleDown()
		if w.Err() == nil {
			t.Error("the watch goes on")
		}
		if _, err := h.Subscribe(t.Context(), p); !errors.Is(err, peer.ErrGone) {
			t.Errorf("Subscribe of a dead process = %v", err)
		}
	})
}

// TestV_D13_AttestorCannotAnswer: the stream is held, nothing less is accepted,
// and it is tried again.
func TestV_D13_AttestorCannotAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		second := newFakeWorkloads()
		second.errs[1] = errors.New("the runtime hangs")
		h.cfg.Workloads = append(h.cfg.Workloads, second)
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		time.Sleep(time.Minute)
		settleDown()
		if w.Snapshot() != nil || w.Err() != nil {
			t.Fatalf("snapshot %+v, err %v", w.Snapshot(), w.Err())
		}
		second.mu.Lock()
		if c := h.condition(condWorkload); c.Severity != health.Warning {
			t.Errorf("condition %+v", c)
		}
		if second.calls > 60 || second.calls < 5 {
			t.Errorf("%d attempts in a minute", second.calls)
		}
		second.errs[1] = attest.ErrNotMine
		second.mu.Unlock()
		time.Sleep(6 * time.Second)
		settleDown()
		mustHave(t, w, "/web")
		if c := h.condition(condWorkload); c.Severity != health.OK {
			t.Errorf("condition %+v", c)
		}
		second.mu.Lock()
		second.errs[2] = attest.ErrNotMine
		second.mu.Unlock()
		h.workloads.mu.Lock()
		h.workloads.errs[2] = attest.ErrNotMine
		h.workloads.mu.Unlock()
		nobody := h.subscribe(2, 1000)
		settleDown()
		if nobody.Err() == nil {
			t.Error("a process that nobody knows keeps its stream")
		}
	})
}

// TestContainers: a container that is announced has its X.509-SVID before it
// asks; when it ends, its keys are dropped, its streams closed and the CA told.
func TestContainers(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(entry("shop", `/app/{docker.labels["app"]}`, `docker.image.startsWith("registry.internal/")`))
		settleDown()
		facts := h.workloads.container(7, "c1", "orders")
		h.workloads.events <- attest.InstanceEvent{Instance: "docker:c1", Workload: facts}
		settleDown()
		if n := h.ca.issued(); n != 1 {
			t.Fatalf("%d items before the container asked, want 1", n)
		}
		w := h.subscribe(7, 0)
		settleDown()
		mustHave(t, w, "/app/orders")
		if n := h.ca.issued(); n != 1 {
			t.Errorf("%d items, want 1", n)
		}
		w.Close()
		time.Sleep(3 * time.Hour) // announced: its key stays and is renewed
		settleDown()
		w = h.subscribe(7, 0)
		settleDown()
		mustHave(t, w, "/app/orders")
		h.workloads.events <- attest.InstanceEvent{Instance: "docker:c1", Ended: true}
		settleDown()
		if !errors.Is(w.Err(), ErrInstanceEnded) {
			t.Errorf("Err = %v", w.Err())
		}
		if got := endedInstances(h.ca); !slices.Equal(got, []string{"docker:c1"}) {
			t.Errorf("ended instances %q", got)
		}
		n := h.ca.issued()
		time.Sleep(3 * time.Hour)
		settleDown()
		if got := h.ca.issued(); got != n {
			t.Errorf("%d items for a container that has ended", got-n)
		}
		if st := h.Status(); len(st.Instances) != 0 {
			t.Errorf("instances %+v", st.Instances)
		}
	})
}

// TestV_D10_Relabelled: a stream of a container whose attributes change gets
// what they give now, and loses what they gave before.
func TestV_D10_Relabelled(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(entry("shop", `/app/{docker.labels["app"]}`, `docker.image.startsWith("registry.internal/")`))
		settleDown()
		h.workloads.events <- attest.InstanceEvent{Instance: "docker:c1", Workload: h.workloads.container(7, "c1", "orders")}
		w := h.subscribe(7, 0)
		settleDown()
		mustHave(t, w, "/app/orders")
		h.workloads.events <- attest.InstanceEvent{Instance: "docker:c1", Workload: h.workloads.container(7, "c1", "stock")}
		settleDown()
		s := mustHave(t, w, "/app/stock")
		if !slices.Equal(withdrawn(s), []string{"/app/orders"}) {
			t.Errorf("withdrawn %q", withdrawn(s))
		}
	})
}

// TestLinger: a stream that is opened again soon is answered with what is at
// hand; later, the key is gone.
func TestLinger(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		first := mustHave(t, w, "/web").SVIDs[0]
		w.Close()
		time.Sleep(4 * time.Second)
		w = h.subscribe(1, 1000)
		settleDown()
		if mustHave(t, w, "/web").SVIDs[0] != first {
			t.Error("issued again within the linger")
		}
		w.Close()
		time.Sleep(6 * time.Second)
		settleDown()
		if st := h.Status(); len(st.Instances) != 0 {
			t.Errorf("instances %+v", st.Instances)
		}
		if got := endedInstances(h.ca); len(got) != 1 {
			t.Errorf("ended instances %q", got)
		}
		w = h.subscribe(1, 1000)
		settleDown()
		if mustHave(t, w, "/web").SVIDs[0] == first {
			t.Error("a key came back from the dead")
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
		time.Sleep(4 * time.Minute)
		settleDown()
		if n := count(); n < 2 || n > 6 {
			t.Errorf("%d of 8 X.509-SVIDs are of the old authority after half of the time", n)
		}
		time.Sleep(5 * time.Minute)
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

// TestV_G1_BundleSequence: older bundles and others with the same sequence are
// not believed; nor are empty ones and those of others (G3, G4).
func TestV_G1_BundleSequence(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		second := newAuthority(t, "root 2", nil)
		push := func(b *nodev1.Bundle) {
			h.ca.mu.Lock()
			h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: b}})
			h.ca.mu.Unlock()
			settleDown()
		}
		h.ca.mu.Lock()
		h.ca.roots, h.ca.sequence = append(h.ca.roots, second), 5
		good := h.ca.bundle()
		h.ca.mu.Unlock()
		push(good)
		s := mustHave(t, w, "/web")
		if len(s.Bundle.Roots) != 2 || s.Bundle.Sequence != 5 {
			t.Fatalf("bundle %+v", s.Bundle)
		}
		for name, b := range map[string]*nodev1.Bundle{
			"older":                {TrustDomain: "example.org", Sequence: 4, Roots: [][]byte{second.cert.Raw}},
			"same sequence":        {TrustDomain: "example.org", Sequence: 5, Roots: [][]byte{second.cert.Raw}},
			"empty":                {TrustDomain: "example.org", Sequence: 6},
			"other trust domain":   {TrustDomain: "example.com", Sequence: 6, Roots: [][]byte{second.cert.Raw}},
			"garbage":              {TrustDomain: "example.org", Sequence: 6, Roots: [][]byte{{1, 2, 3}}},
			"intermediate as root": {TrustDomain: "example.org", Sequence: 6, Roots: [][]byte{h.ca.intermediate.cert.Raw}},
			"twice":                {TrustDomain: "example.org", Sequence: 6, Roots: [][]byte{second.cert.Raw, second.cert.Raw}},
		} {
			push(b)
			if w.Snapshot() != s {
				t.Errorf("%s: the bundle was believed", name)
			}
			if c := h.condition(condBundle); name != "older" && c.Severity != health.Error {
				t.Errorf("%s: condition %+v", name, c)
			}
		}
		good.Sequence = 7
		push(good)
		if c := h.condition(condBundle); c.Severity != health.OK || w.Snapshot().Bundle.Sequence != 7 {
			t.Errorf("condition %+v", c)
		}
	})
}

// TestBundleAcks: the CA hears how many of the streams that carry bundles have
// the one in force.
func TestBundleAcks(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		var watches []*identity.Watch
		for n := range 4 {
			watches = append(watches, h.subscribe(n+1, 1000))
		}
		settleDown()
		last := func() *nodev1.BundleAcks {
			time.Sleep(time.Second)
			settleDown()
			h.ca.mu.Lock()
			defer h.ca.mu.Unlock()
			for _, m := range slices.Backward(h.ca.heard) {
				if m.GetBundleAcks() != nil {
					return m.GetBundleAcks()
				}
			}
			return nil
		}
		want := func(streams, acknowledged uint32, sequence uint64) {
			t.Helper()
			got := last()
			if got.GetStreams() != streams || got.GetAcknowledged() != acknowledged || got.GetSequence() != sequence {
				t.Errorf("acks %v, want %d of %d for %d", got, acknowledged, streams, sequence)
			}
		}
		for _, w := range watches[:3] { // the fourth carries no bundle
			w.Acknowledge(1)
		}
		watches[0].Acknowledge(99) // which nobody has
		want(3, 3, 1)
		h.ca.mu.Lock()
		h.ca.sequence = 2
		h.ca.roots = append(h.ca.roots, newAuthority(t, "root 2", nil))
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: h.ca.bundle()}})
		h.ca.mu.Unlock()
		settleDown()
		want(3, 0, 2)
		watches[0].Acknowledge(2)
		watches[1].Acknowledge(2)
		want(3, 2, 2)
		watches[2].Close()
		want(2, 2, 2)
		h.ca.mu.Lock()
		n := 0
		for _, m := range h.ca.heard {
			if a := m.GetApplied(); a.GetRevision() == 2 && a.GetBundleSequence() == 2 {
				n++
			}
		}
		h.ca.mu.Unlock()
		if n == 0 {
			t.Error("the CA never heard that the bundle is in force")
		}
	})
}

// TestRootRemoved: what chains to a root that has left is replaced at once.
func TestRootRemoved(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		second := newAuthority(t, "root 2", nil)
		intermediate := newAuthority(t, "intermediate 2", second)
		h.ca.mu.Lock()
		first := h.ca.root
		h.ca.roots, h.ca.sequence = []*authority{first, second}, 2
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: h.ca.bundle()}})
		h.ca.intermediate, h.ca.root = intermediate, second
		h.ca.mu.Unlock()
		settleDown()
		h.ca.mu.Lock()
		h.ca.roots, h.ca.sequence = []*authority{second}, 3
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: h.ca.bundle()}})
		h.ca.mu.Unlock()
		settleDown()
		if got := mustHave(t, w, "/web").SVIDs[0]; !got.Chain[1].Equal(identity.NewCertificate(intermediate.cert)) {
			t.Error("the X.509-SVID chains to a root that nobody trusts")
		}
	})
}

// TestFault_F32_HalfOpen: a CA that vanished without a word is noticed.
func TestFault_F32_HalfOpen(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		time.Sleep(time.Minute)
		h.ca.net.mu.Lock()
		h.ca.net.hole = true
		h.ca.net.mu.Unlock()
		time.Sleep(20 * time.Second)
		settleDown()
		if h.Status().Connected {
			t.Fatal("still connected after 20 s without an answer")
		}
		h.ca.net.mu.Lock()
		h.ca.net.hole = false
		h.ca.net.mu.Unlock()
		time.Sleep(time.Minute)
		settleDown()
		if !h.Status().Connected {
			t.Error("not connected again")
		}
	})
}

// TestFault_F34_ResetStorm: sessions that break all the time cost no attestation,
// and are not made faster than they break.
func TestFault_F34_ResetStorm(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		for range 300 {
			time.Sleep(2 * time.Second)
			h.ca.net.set(true)
			h.ca.net.set(false)
		}
		settleDown()
		h.ca.mu.Lock()
		attestations, sessions := h.ca.attestations, h.ca.sessions
		h.ca.mu.Unlock()
		if attestations != 1 {
			t.Errorf("%d attestations, want 1", attestations)
		}
		if sessions > 150 {
			t.Errorf("%d sessions in ten minutes of resets", sessions)
		}
		time.Sleep(time.Minute)
		settleDown()
		if !h.Status().Connected {
			t.Error("not connected afterwards")
		}
	})
}

// TestV_C10_RefusedOwnRenewal: an agent whose own X.509-SVID is not accepted any
// more attests the node again.
func TestV_C10_RefusedOwnRenewal(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		h.ca.mu.Lock()
		h.ca.refuseRenew = status.Error(codes.Unauthenticated, "there is a newer one")
		h.ca.mu.Unlock()
		time.Sleep(70 * time.Minute)
		settleDown()
		mustHave(t, w, "/web")
		if n := h.ca.count(func() int { return h.ca.attestations }); n != 2 {
			t.Errorf("%d attestations, want 2", n)
		}
		if !h.Status().Connected {
			t.Error("not connected")
		}
	})
}

func TestInspect(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.mu.Lock()
		h.ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Inspect{Inspect: &nodev1.Inspect{Request: 7, Pid: -1}}})
		h.ca.mu.Unlock()
		settleDown()
		h.ca.mu.Lock()
		defer h.ca.mu.Unlock()
		n := slices.IndexFunc(h.ca.heard, func(m *nodev1.SyncRequest) bool { return m.GetInspected() != nil })
		if n < 0 || h.ca.heard[n].GetInspected().GetRequest() != 7 || h.ca.heard[n].GetInspected().GetError() == "" {
			t.Errorf("heard %v", h.ca.heard)
		}
	})
}

func TestBounds(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.subscribe(1, 1)
		w := h.subscribe(2, 2)
		if _, err := h.Subscribe(t.Context(), peer.ForTest(3, 3, 3)); !errors.Is(err, ErrTooManyStreams) {
			t.Errorf("third stream: %v", err)
		}
		w.Close()
		h.subscribe(3, 3)
	}, func(c *Config) { c.MaxStreams = 2 })
}

// TestV_I6_NoGoroutineStays: an open stream costs none, and none is left behind
// by streams that end at any point.
func TestV_I6_NoGoroutineStays(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		base := runtime.NumGoroutine()
		var watches []*identity.Watch
		for n := range 500 {
			watches = append(watches, h.subscribe(n+2, 1000))
		}
		settleDown()
		if n := runtime.NumGoroutine(); n > base+5 { // others' tests may have some
			t.Errorf("500 open streams cost %d goroutines", n-base)
		}
		for _, w := range watches {
			w.Close()
		}
		h.workloads.mu.Lock()
		for n := range 500 {
			h.workloads.errs[n] = errors.New("not now")
		}
		h.workloads.mu.Unlock()
		for n := range 500 {
			ctx, cancel := context.WithCancel(t.Context())
			w, err := h.Subscribe(ctx, peer.ForTest(n, 1000, 1000))
			if err != nil {
				t.Fatal(err)
			}
			switch n % 3 {
			case 0:
				cancel()
				w.Close()
			case 1:
				w.Close()
				cancel()
			default:
				settleDown()
				cancel()
				w.Close()
			}
		}
		settleDown()
		if n := runtime.NumGoroutine(); n > base+5 { // others' tests may have some
			buffer := make([]byte, 1<<20)
			t.Errorf("%d goroutines are left:\n%s", n-base, buffer[:runtime.Stack(buffer, true)])
		}
	})
}

// TestV_J4_NoSecretsShown: neither the log nor the status holds a key, a token
// or a CSR.
func TestV_J4_NoSecretsShown(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		time.Sleep(time.Hour)
		h.ca.net.set(true)
		time.Sleep(70 * time.Minute)
		settleDown()
		st, err := json.Marshal(h.Status())
		if err != nil {
			t.Fatal(err)
		}
		everything := h.log.String() + string(st)
		for _, bad := range []string{"PRIVATE", "canary-evidence", "me: who", "\\x30"} {
			if strings.Contains(everything, bad) {
				t.Errorf("%q is shown:\n%s", bad, everything)
			}
		}
		if long := regexp.MustCompile(`[0-9a-zA-Z+/]{80,}`).FindString(everything); long != "" {
			t.Errorf("something that looks like a key is shown: %s", long)
		}
	})
}

func TestStatus(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		h.subscribe(1, 1000)
		settleDown()
		st := h.Status()
		if st.NodeID != "spiffe://example.org/meshid/node/join_token/n1" || !st.Connected || st.Revision != 2 ||
			st.Streams != 1 || st.Entries != 1 || st.BundleSequence != 1 || len(st.Conditions) != len(Conditions) {
			t.Errorf("status %+v", st)
		}
		i := st.Instances[0]
		if i.Instance != "unix:1000:1000:/bin/app" || i.Streams != 1 || i.Identities[0].State != "ok" ||
			i.Identities[0].SPIFFEID != "spiffe://example.org/web" || i.Identities[0].Serial == "" {
			t.Errorf("instance %+v", i)
		}
		if _, err := h.registry.Gather(); err != nil {
			t.Error(err)
		}
	})
}

// TestMultipleIdentitiesInContainer: two processes of one container that differ
// in their attributes have what each of them matches, and no more.
func TestMultipleIdentitiesInContainer(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		process := func(pid int, uid int64) {
			h.workloads.mu.Lock()
			defer h.workloads.mu.Unlock()
			h.workloads.facts[pid] = &attest.Facts{
				Workload: &attributesv1.Workload{
					Docker: &attributesv1.Docker{ContainerId: "c1", Labels: map[string]string{"app": "shop"}},
					Unix:   &attributesv1.Unix{Uid: uid},
				},
				Instance: "docker:c1", Rank: attest.RankContainer,
			}
		}
		process(1, 0)
		process(2, 1000)
		h.ca.apply(entry("both", "/both", `docker.container_id == "c1"`),
			entry("root", "/root", `docker.container_id == "c1" && unix.uid == 0`),
			entry("named", "/u/{string(unix.uid)}", `docker.container_id == "c1"`))
		a, b := h.subscribe(1, 0), h.subscribe(2, 1000)
		settleDown()
		mustHave(t, a, "/both", "/u/0", "/root")
		mustHave(t, b, "/both", "/u/1000")
		if a.Snapshot().SVIDs[0] != b.Snapshot().SVIDs[0] {
			t.Error("one identity of one instance has two keys")
		}
		// The template changes: the shortcut of one must not be the other's.
		h.ca.apply(entry("both", "/x/{string(unix.uid)}", `docker.container_id == "c1"`))
		settleDown()
		mustHave(t, a, "/x/0", "/u/0", "/root")
		mustHave(t, b, "/x/1000", "/u/1000")
	})
}

func TestNewChecksItsConfig(t *testing.T) {
	ca := newFakeCA(t)
	defer ca.close()
	for name, change := range map[string]func(*Config){
		"no trust domain":      func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"no address":           func(c *Config) { c.CAAddress = "" },
		"no anchors, no pin":   func(c *Config) { c.TrustAnchors = nil }, // T6
		"short pin":            func(c *Config) { c.RootSHA256 = []byte{1} },
		"no node attester":     func(c *Config) { c.Node = nil },
		"no workload attestor": func(c *Config) { c.Workloads = nil },
		"no data directory":    func(c *Config) { c.DataDir = "" },
		"leaf as anchor":       func(c *Config) { c.TrustAnchors[0] = ca.intermediate.cert },
	} {
		h := newHarness(t, ca, t.TempDir())
		c := h.config
		c.Registerer, c.TrustAnchors = prometheus.NewRegistry(), slices.Clone(c.TrustAnchors)
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestFault_F36_DeadAddressFirst: a dead replica at the first of several addresses
// does not keep the agent from the next.
func TestFault_F36_DeadAddressFirst(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		names := manual.NewBuilderWithScheme("names")
		names.InitialState(resolver.State{Endpoints: []resolver.Endpoint{
			{Addresses: []resolver.Address{{Addr: "hangs"}}},
			{Addresses: []resolver.Address{{Addr: "refuses"}}},
			{Addresses: []resolver.Address{{Addr: "good"}}},
		}})
		h := newHarness(t, ca, dir, func(c *Config) {
			c.CAAddress = "names:///ca"
			c.DialOptions = []grpc.DialOption{
				grpc.WithResolvers(names),
				grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
					switch address {
					case "hangs":
						<-ctx.Done()
						return nil, ctx.Err()
					case "good":
						return ca.dial(ctx, address)
					default:
						return nil, errors.New("connection refused")
					}
				}),
			}
		})
		h.start()
		defer h.stop()
		time.Sleep(5 * time.Second)
		settleDown()
		if !h.Status().Connected {
			t.Errorf("not connected after 5 s: %+v", h.Status())
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
			time.Sleep(time.Second)
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
		time.Sleep(time.Second)
		h.ca.net.set(false)
		time.Sleep(time.Minute)
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
				time.Sleep(leaveWithin - time.Second)
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
					time.Sleep(2 * time.Second)
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
