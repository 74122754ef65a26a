package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
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
		pass(2 * idle)
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
		pass(time.Minute)
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
		pass(6 * time.Second)
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
		pass(3 * time.Hour) // announced: its key stays and is renewed
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
		pass(3 * time.Hour)
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
		pass(4 * time.Second)
		w = h.subscribe(1, 1000)
		settleDown()
		if mustHave(t, w, "/web").SVIDs[0] != first {
			t.Error("issued again within the linger")
		}
		w.Close()
		pass(6 * time.Second)
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
