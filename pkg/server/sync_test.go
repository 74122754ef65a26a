package server

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/identity"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

func durationOf(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// Entries reach the agent as deltas; it is told of nothing that is not its own.
func TestSyncDeltas(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", map[string]string{"zone": "a"})
	s := a.sync(&nodev1.Hello{AgentVersion: "v0"})
	snap := s.next().GetSnapshot()
	if diff := cmp.Diff([]string{"web"}, names(snap.GetEntries())); diff != "" {
		t.Fatal(diff)
	}
	admin, ctx := h.admin()
	foreign, own := shopEntry("foreign"), shopEntry("own")
	foreign.Nodes, own.Nodes = `node.labels["zone"] == "b"`, `node.labels["zone"] == "a"`

	rev := h.apply(foreign)
	d := s.next().GetDelta()
	if d.GetFromRevision() != snap.GetRevision() || d.GetRevision() != rev || len(d.GetUpserts()) != 0 || len(d.GetRemoved()) != 0 {
		t.Errorf("a foreign entry: %v", d)
	}
	rev = h.apply(own)
	if d = s.next().GetDelta(); d.GetRevision() != rev || !slices.Equal(names(d.GetUpserts()), []string{"own"}) {
		t.Errorf("an own entry: %v", d)
	}
	if got := d.GetUpserts()[0].GetRevision(); got != rev {
		t.Errorf("the entry has revision %d, want %d", got, rev)
	}
	// It goes to the other zone: for this node it is gone, for others it came.
	moved := shopEntry("own")
	moved.Nodes = `node.labels["zone"] == "b"`
	h.apply(moved)
	if d = s.next().GetDelta(); !slices.Equal(d.GetRemoved(), []string{"own"}) || len(d.GetUpserts()) != 0 {
		t.Errorf("an entry that went: %v", d)
	}
	moved.Hint = "again"
	h.apply(moved)
	if d = s.next().GetDelta(); len(d.GetRemoved())+len(d.GetUpserts()) != 0 {
		t.Errorf("an entry that is elsewhere: %v", d)
	}
	resp, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"foreign", "web", "own"}})
	if err != nil {
		t.Fatal(err)
	}
	if d = s.next().GetDelta(); !slices.Equal(d.GetRemoved(), []string{"web"}) || d.GetRevision() != resp.GetRevision() {
		t.Errorf("deletion: %v", d)
	}
	// What the agent has in force is known.
	for _, tt := range []struct {
		applied  uint64
		want     uint32
		laggards []string
	}{{resp.GetRevision() - 1, 0, []string{a.id}}, {resp.GetRevision(), 1, nil}} {
		s.applied(tt.applied)
		got := h.eventually(func() bool {
			session, ok := h.server.hub.get(a.id)
			return ok && session.inForce().revision == tt.applied
		})
		st, err := admin.EntryStatus(ctx, &adminv1.EntryStatusRequest{})
		if !got || err != nil || st.GetNodesInForce() != tt.want || st.GetNodesConnected() != 1 || !slices.Equal(st.GetLaggards(), tt.laggards) {
			t.Errorf("status is %v, %v", st, err)
		}
	}
}

// An agent resumes from what it has; over a gap, from another epoch, or when its
// node is another one, it gets a snapshot.
func TestSyncResume(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", map[string]string{"zone": "a"})
	first := func(a *testAgent, hello *nodev1.Hello) *nodev1.SyncResponse {
		t.Helper()
		return a.sync(hello).next()
	}
	snap := first(a, &nodev1.Hello{}).GetSnapshot()
	epoch, had := snap.GetEpoch(), snap.GetRevision()
	last := h.apply(shopEntry("db"))

	if d := first(a, &nodev1.Hello{Epoch: epoch, Revision: had}).GetDelta(); d.GetFromRevision() != had || d.GetRevision() != last || !slices.Equal(names(d.GetUpserts()), []string{"db"}) {
		t.Errorf("resume: %v", d)
	}
	for name, hello := range map[string]*nodev1.Hello{
		"other epoch":     {Epoch: "x", Revision: had},
		"no epoch":        {Revision: had},
		"ahead of the CA": {Epoch: epoch, Revision: last + 1},
		"too old":         {Epoch: epoch, Revision: 0},
	} {
		if s := first(a, hello).GetSnapshot(); s.GetRevision() != last || len(s.GetEntries()) != 2 {
			t.Errorf("%s: %v", name, s)
		}
	}
	// Nothing new: nothing is sent but the bundle, and it counts as in force.
	s := a.sync(&nodev1.Hello{Epoch: epoch, Revision: last, BundleSequence: 1})
	if m, err := s.stream.Recv(); err != nil || m.GetBundle() == nil {
		t.Fatalf("%v, %v", m, err)
	}
	if !h.eventually(func() bool {
		session, ok := h.server.hub.get(a.id)
		return ok && session.inForce().revision == last
	}) {
		t.Error("a resumed agent is not in force")
	}
	last = h.apply(shopEntry("cache"))
	if d := s.next().GetDelta(); d.GetRevision() != last {
		t.Errorf("after a resume with nothing new: %v", d)
	}
	// The same after a restart of the CA: the epoch is that of the store.
	h.stop()
	h.start()
	a.conn.Close()
	a.conn = h.dial(a.key, a.chain)
	a.client = nodev1.NewNodeServiceClient(a.conn)
	s = a.sync(&nodev1.Hello{Epoch: epoch, Revision: last})
	last = h.apply(shopEntry("queue"))
	if d := s.next().GetDelta(); d.GetRevision() != last || !slices.Equal(names(d.GetUpserts()), []string{"queue"}) {
		t.Errorf("after a restart: %v", d)
	}
	if s := first(a, &nodev1.Hello{Epoch: epoch, Revision: had}).GetSnapshot(); len(s.GetEntries()) != 4 {
		t.Errorf("from before the restart: %v", s)
	}
	// The node was attested anew with other labels: other entries may be its own.
	b := h.join("n1", map[string]string{"zone": "b"})
	if s := first(b, &nodev1.Hello{Epoch: epoch, Revision: last}).GetSnapshot(); s.GetEpoch() == epoch || s.GetNode().GetLabels()["zone"] != "b" {
		t.Errorf("another node: %v", s)
	}
}

// A second stream of a node ends the first.
func TestSyncSecondEndsFirst(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	s1 := a.sync(&nodev1.Hello{})
	s1.next()
	s2 := a.sync(&nodev1.Hello{})
	s2.next()
	h.wantCode(s1.end(), codes.FailedPrecondition)
	h.apply(shopEntry("web"))
	if s2.next().GetDelta() == nil {
		t.Error("the second stream does not go on")
	}
}

func TestSyncProtocol(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	applied := &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{Revision: 1}}}
	hello := &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{}}}
	ended := func(n int, name string) *nodev1.SyncRequest {
		m := &nodev1.InstancesEnded{}
		for range n {
			m.Instances = append(m.Instances, &nodev1.InstancesEnded_Instance{Instance: name})
		}
		return &nodev1.SyncRequest{Message: &nodev1.SyncRequest_InstancesEnded{InstancesEnded: m}}
	}
	flood := slices.Repeat([]*nodev1.SyncRequest{applied}, syncBurst+100)
	for name, tt := range map[string]struct {
		messages []*nodev1.SyncRequest
		want     codes.Code
	}{
		"applied first":      {[]*nodev1.SyncRequest{applied}, codes.InvalidArgument},
		"nothing first":      {[]*nodev1.SyncRequest{{}}, codes.InvalidArgument},
		"hello twice":        {[]*nodev1.SyncRequest{hello, hello}, codes.InvalidArgument},
		"nothing second":     {[]*nodev1.SyncRequest{hello, {}}, codes.InvalidArgument},
		"long version":       {[]*nodev1.SyncRequest{{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{AgentVersion: strings.Repeat("x", 65)}}}}, codes.InvalidArgument},
		"hostile version":    {[]*nodev1.SyncRequest{{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{AgentVersion: "v1\u202e\n"}}}}, codes.InvalidArgument},
		"too many instances": {[]*nodev1.SyncRequest{hello, ended(maxEnded+1, "x")}, codes.InvalidArgument},
		"nameless instance":  {[]*nodev1.SyncRequest{hello, ended(1, "")}, codes.InvalidArgument},
		"flood":              {append([]*nodev1.SyncRequest{hello}, flood...), codes.ResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := a.client.Sync(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range tt.messages {
				if stream.Send(m) != nil {
					break // the server has ended it
				}
			}
			s := &testStream{a, stream}
			h.wantCode(s.end(), tt.want)
		})
	}
	// Left in good order.
	s := a.sync(&nodev1.Hello{})
	s.next()
	s.stream.CloseSend()
	if err := s.end(); status.Code(err) != codes.Unknown { // io.EOF: ended with OK
		t.Errorf("a stream that the agent closed: %v", err)
	}
	if !h.eventually(func() bool { return h.server.hub.count() == 0 }) {
		t.Error("a session is left behind")
	}
}

func TestInstancesEnded(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	s := a.sync(&nodev1.Hello{})
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_InstancesEnded{InstancesEnded: &nodev1.InstancesEnded{
		Instances: []*nodev1.InstancesEnded_Instance{{Instance: "docker:abc", Serials: [][]byte{{0xab}, {0xcd, 0xef}}}, {Instance: "docker:def"}},
	}}})
	var records []*ledgerv1.Record
	if !h.eventually(func() bool { records = h.records(ledgerv1.Event_EVENT_INSTANCE_ENDED); return len(records) == 2 }) {
		t.Fatalf("records are %v", records)
	}
	if r := records[0]; r.GetInstance() != "docker:abc" || len(r.GetDropped()) != 2 ||
		!bytes.Equal(r.GetDropped()[1].GetSerial(), []byte{0xcd, 0xef}) || r.GetNode().GetId() != a.id {
		t.Errorf("record is %v", r)
	}
	if got, detail := dropped(slices.Repeat([][]byte{{1}}, 20)); len(got) != maxEndedSerials || detail != "and 4 more certificates" {
		t.Errorf("%d certificates, %q", len(got), detail)
	}
}

// 64 concurrent writers, some of whose changes are refused, and agents that
// follow the stream, breaking off and resuming at random: each ends with exactly
// the entries of the last revision, and never sees a revision go back.
func TestV_E4_ChangeFeed(t *testing.T) {
	h := newHouse(t)
	agents := []*testAgent{h.join("n0", map[string]string{"zone": "0"}), h.join("n1", map[string]string{"zone": "1"})}
	var writers, followers sync.WaitGroup
	var last uint64
	written := make(chan struct{}) // closed when last is set
	for i, a := range agents {
		followers.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 7))
			have := make(map[string]*entryv1.Entry)
			var epoch string
			var rev, until uint64
			s := a.sync(&nodev1.Hello{})
			for until == 0 || rev < until {
				select {
				case <-written:
					if until = last; rev >= until {
						continue
					}
				default:
				}
				m := s.next()
				switch {
				case m.GetSnapshot() != nil:
					snap := m.GetSnapshot()
					if snap.GetEpoch() == epoch && snap.GetRevision() < rev {
						t.Errorf("snapshot of %d after %d", snap.GetRevision(), rev)
					}
					epoch, rev = snap.GetEpoch(), snap.GetRevision()
					clear(have)
					for _, e := range snap.GetEntries() {
						have[e.GetName()] = e
					}
				case m.GetDelta() != nil:
					d := m.GetDelta()
					if d.GetFromRevision() != rev || d.GetRevision() <= rev {
						t.Errorf("delta from %d to %d at %d", d.GetFromRevision(), d.GetRevision(), rev)
					}
					for _, name := range d.GetRemoved() {
						if have[name] == nil {
							t.Errorf("told of %s, which was never here", name)
						}
						delete(have, name)
					}
					for _, e := range d.GetUpserts() {
						have[e.GetName()] = e
					}
					rev = d.GetRevision()
				}
				if random.IntN(8) == 0 {
					s.stream.CloseSend()
					s = a.sync(&nodev1.Hello{Epoch: epoch, Revision: rev})
				}
			}
			delete(have, "wake") // it came after the last
			want := make(map[string]*entryv1.Entry)
			node, _ := h.server.registry.Node(a.id)
			for _, e := range h.server.registry.Entries().Set.MatchNode(identity.NewFacts(node.Attributes, nil)) {
				want[e.Name()] = e.Proto()
			}
			delete(want, "wake")
			if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(have))); diff != "" {
				t.Errorf("agent %d (-want +got):\n%s", i, diff)
			}
			for name, e := range want {
				if have[name].GetRevision() != e.GetRevision() || have[name].GetWorkloads() != e.GetWorkloads() {
					t.Errorf("agent %d has %v, not %v", i, have[name], e)
				}
			}
		})
	}
	admin, ctx := h.admin()
	for w := range 64 {
		writers.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), 1))
			for range 4 {
				e := shopEntry(fmt.Sprintf("e%d", random.IntN(24)))
				e.Nodes = []string{"", `node.labels["zone"] == "0"`, `node.labels["zone"] == "1"`}[random.IntN(3)]
				e.Hint = fmt.Sprint(random.IntN(100))
				switch random.IntN(5) {
				case 0:
					e.Workloads = "nonsense ("
					if _, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{e}}); err == nil {
						t.Error("nonsense was applied")
					}
				case 1:
					_, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{e.GetName()}})
					if c := statusOf2(err); c != codes.OK && c != codes.NotFound {
						t.Errorf("delete: %v", err)
					}
				default:
					if _, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{e}}); err != nil {
						t.Errorf("apply: %v", err)
					}
				}
			}
		})
	}
	writers.Wait()
	last = h.apply(shopEntry("last"))
	close(written)
	h.apply(shopEntry("wake")) // whoever waits for a message gets one
	followers.Wait()
	stored, rev, err := h.store.Entries(t.Context())
	if err != nil || rev != h.server.registry.Entries().Revision || len(stored) != h.server.registry.Entries().Set.Len() {
		t.Errorf("stored: %d entries at %d, %v; in force: %d at %d", len(stored), rev, err,
			h.server.registry.Entries().Set.Len(), h.server.registry.Entries().Revision)
	}
}
