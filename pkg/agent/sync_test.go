package agent

import (
	"slices"
	"testing"
	"time"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

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
		pass(time.Minute)
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
		pass(5 * time.Second)
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
			pass(time.Second)
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
