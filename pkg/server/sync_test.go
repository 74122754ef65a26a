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
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
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

// eventually reports whether something comes true in 10 s, looking whenever
// others had a chance to run.
func (h *house) eventually(cond func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(10 * time.Second)
	defer limit.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-limit.C:
			return false
		}
	}
	return true
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

// Orders: renewals and inspections.
func TestOrders(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	s := a.sync(&nodev1.Hello{})
	s.next()
	admin, ctx := h.admin()
	var old string
	for _, authority := range h.ca.Authorities() {
		if authority.Role == "intermediate" {
			old = authority.ID
		}
	}
	rotated, err := admin.RotateIntermediate(ctx, &adminv1.RotateIntermediateRequest{Within: durationOf(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	if r := s.next().GetRotate(); r.GetAuthority() != old || r.GetWithin().AsDuration() != time.Minute || rotated.GetAuthority().GetId() == old {
		t.Errorf("order is %v, the new authority %v", r, rotated.GetAuthority().GetId())
	}
	renewed, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{})
	if err != nil || renewed.GetNodes() != 1 {
		t.Fatal(renewed, err)
	}
	if r := s.next().GetRotate(); r == nil || r.GetAuthority() != "" {
		t.Errorf("order is %v", r)
	}
	if _, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{Within: durationOf(-1)}); err == nil {
		t.Error("negative time")
	}

	type answer struct {
		resp *adminv1.ExplainResponse
		err  error
	}
	for name, tt := range map[string]struct {
		inspected *nodev1.Inspected
		want      codes.Code
	}{
		"attested": {&nodev1.Inspected{Workload: workload("web"), Instance: "docker:1"}, codes.OK},
		"gone":     {&nodev1.Inspected{Error: "no such process"}, codes.FailedPrecondition},
		"too much": {&nodev1.Inspected{Instance: strings.Repeat("x", 1000)}, codes.FailedPrecondition},
	} {
		got := make(chan answer, 1)
		go func() {
			resp, err := admin.Explain(ctx, &adminv1.ExplainRequest{
				Node: &adminv1.ExplainRequest_NodeId{NodeId: a.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 42},
			})
			got <- answer{resp, err}
		}()
		i := s.next().GetInspect()
		if i.GetPid() != 42 {
			t.Fatalf("inspect is %v", i)
		}
		// An answer to what was not asked is nobody's.
		s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Inspected{Inspected: &nodev1.Inspected{Request: i.GetRequest() + 1000, Error: "x"}}})
		tt.inspected.Request = i.GetRequest()
		s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Inspected{Inspected: tt.inspected}})
		r := <-got
		if c := statusOf2(r.err); c != tt.want {
			t.Errorf("%s: %v", name, r.err)
		}
		if tt.want == codes.OK && (r.resp.GetInstance() != "docker:1" || !r.resp.GetVerdicts()[0].GetMatches()) {
			t.Errorf("%s: %v", name, r.resp)
		}
	}
	// A node that is not connected, and one that goes away while it is asked.
	b := h.join("n2", nil)
	_, err = admin.Explain(ctx, &adminv1.ExplainRequest{Node: &adminv1.ExplainRequest_NodeId{NodeId: b.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 1}})
	if statusOf2(err) != codes.FailedPrecondition {
		t.Errorf("not connected: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		got <- second(admin.Explain(ctx, &adminv1.ExplainRequest{Node: &adminv1.ExplainRequest_NodeId{NodeId: a.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 1}}))
	}()
	s.next()
	s.stream.CloseSend()
	if err := <-got; statusOf2(err) != codes.Unavailable {
		t.Errorf("left: %v", err)
	}
}

func statusOf2(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	return statusOf(err, "").Code()
}

// Orders that meet before they are sent are one.
func TestOrdersMerge(t *testing.T) {
	for _, tt := range []struct {
		orders []string
		want   string
	}{
		{[]string{"a"}, "a"}, {[]string{"a", "a"}, "a"}, {[]string{"a", "b"}, ""}, {[]string{"", "a"}, ""}, {[]string{"a", ""}, ""},
	} {
		s := &session{wake: make(chan struct{}, 1)}
		for _, authority := range tt.orders {
			s.order(&nodev1.Rotate{Authority: authority})
		}
		r, _, _ := s.takeOrders()
		if r.GetAuthority() != tt.want {
			t.Errorf("%v: %q", tt.orders, r.GetAuthority())
		}
		if r, _, _ := s.takeOrders(); r != nil {
			t.Errorf("%v: sent twice", tt.orders)
		}
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

func TestApplyEntries(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	apply := func(req *adminv1.ApplyEntriesRequest) map[string]string {
		t.Helper()
		resp, err := admin.ApplyEntries(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		actions := make(map[string]string)
		for _, c := range resp.GetChanges() {
			actions[c.GetName()] = c.GetAction()
			if (c.GetBefore() == nil) != (c.GetAction() == actionCreated) || (c.GetAfter() == nil) != (c.GetAction() == actionDeleted) {
				t.Errorf("%s is %s from %v to %v", c.GetName(), c.GetAction(), c.GetBefore(), c.GetAfter())
			}
		}
		if want := h.server.registry.Entries().Revision; resp.GetRevision() != want {
			t.Errorf("revision %d, want %d", resp.GetRevision(), want)
		}
		return actions
	}
	changed := shopEntry("b")
	changed.Hint = "new"
	for _, step := range []struct {
		req  *adminv1.ApplyEntriesRequest
		want map[string]string
		rev  uint64
	}{
		{&adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("b"), shopEntry("a")}, DryRun: true}, map[string]string{"a": "created", "b": "created"}, 0},
		{&adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("b"), shopEntry("a")}}, map[string]string{"a": "created", "b": "created"}, 1},
		{&adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("b"), shopEntry("a")}}, map[string]string{"a": "unchanged", "b": "unchanged"}, 0},
		{&adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{changed}, DryRun: true, Prune: true}, map[string]string{"a": "deleted", "b": "changed"}, 0},
		{&adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{changed, shopEntry("c")}, Prune: true}, map[string]string{"a": "deleted", "b": "changed", "c": "created"}, 1},
		{&adminv1.ApplyEntriesRequest{}, map[string]string{}, 0},
	} {
		before := h.server.registry.Entries().Revision
		if diff := cmp.Diff(step.want, apply(step.req)); diff != "" {
			t.Errorf("changes (-want +got):\n%s", diff)
		}
		if got := h.server.registry.Entries().Revision - before; got != step.rev {
			t.Errorf("revision grew by %d, want %d", got, step.rev)
		}
	}
	applied, deleted := h.records(ledgerv1.Event_EVENT_ENTRY_APPLIED), h.records(ledgerv1.Event_EVENT_ENTRY_DELETED)
	if len(applied) != 4 || len(deleted) != 1 {
		t.Fatalf("%d and %d records", len(applied), len(deleted))
	}
	r := applied[2]
	if r.GetActor() != "uid:0" || r.GetEntry().GetName() != "b" || len(r.GetEntry().GetDigest()) != 32 ||
		!strings.Contains(r.GetDiff(), "+  hint: new") || !strings.Contains(r.GetDiff(), " - name: b") {
		t.Errorf("record is %v", r)
	}
	list, err := admin.ListEntries(ctx, &adminv1.ListEntriesRequest{})
	if err != nil || !slices.Equal(names(list.GetEntries()), []string{"b", "c"}) {
		t.Errorf("entries are %v, %v", list, err)
	}
	if list, err = admin.ListEntries(ctx, &adminv1.ListEntriesRequest{Names: []string{"c"}}); err != nil || len(list.GetEntries()) != 1 {
		t.Errorf("entries are %v, %v", list, err)
	}
	if _, err := admin.ListEntries(ctx, &adminv1.ListEntriesRequest{Names: []string{"x"}}); statusOf2(err) != codes.NotFound {
		t.Errorf("list: %v", err)
	}
}

// One mistake fails everything, and each mistake is named with its place.
func TestApplyEntriesErrors(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("kept"))
	admin, ctx := h.admin()
	bad, twice := shopEntry("bad"), shopEntry("twice")
	bad.Workloads = "docker.labels[\"app\"] == \"x\" &&\n  docker.imgae == \"y\""
	bad.SpiffeId = "spiffe://other.org/x"
	_, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("good"), bad, twice, twice}, Prune: true})
	st := statusOf(err, "r1")
	if st.Code() != codes.InvalidArgument {
		t.Fatal(err)
	}
	violations := make(map[string]string)
	for _, d := range st.Details() {
		if b, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range b.GetFieldViolations() {
				violations[v.GetField()] = v.GetDescription()
			}
		}
	}
	if !strings.Contains(violations["bad.workloads:2:9"], "image") || len(violations) != 3 {
		t.Errorf("violations are %q", violations)
	}
	if _, ok := violations["twice.name"]; !ok {
		t.Errorf("violations are %q", violations)
	}
	if got := h.server.registry.Entries().Names(); !slices.Equal(got, []string{"kept"}) {
		t.Errorf("entries are %v", got)
	}
	for name, err := range map[string]error{
		"empty":          second(admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{nil}})),
		"no name":        second(admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{{}}})),
		"reserved":       second(admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{{Name: "x", SpiffeId: "spiffe://example.org/meshid/ca", Workloads: "unix.uid == 5"}}})),
		"foreign domain": second(admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{{Name: "x", SpiffeId: "spiffe://other/x", Workloads: "unix.uid == 5"}}})),
	} {
		if statusOf2(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"kept", "nobody"}}); statusOf2(err) != codes.NotFound {
		t.Errorf("delete: %v", err)
	}
	if h.server.registry.Entries().Set.Len() != 1 {
		t.Error("an entry was deleted beside an unknown one")
	}
}

func TestExplain(t *testing.T) {
	h := newHouse(t)
	other, templated := shopEntry("other"), shopEntry("templated")
	other.Nodes = `node.id == "other"`
	templated.SpiffeId, templated.Workloads = `spiffe://example.org/{docker.labels["missing"]}`, shopEntry("web").GetWorkloads()
	h.apply(shopEntry("web"), shopEntry("db"), other, templated)
	admin, ctx := h.admin()
	resp, err := admin.Explain(ctx, &adminv1.ExplainRequest{
		Node:   &adminv1.ExplainRequest_NodeAttributes{NodeAttributes: &attributesv1.Node{Method: "join_token", Id: "n"}},
		Target: &adminv1.ExplainRequest_Workload{Workload: workload("web")},
	})
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, v := range resp.GetVerdicts() {
		order = append(order, v.GetName()+" "+v.GetField())
	}
	if diff := cmp.Diff([]string{"web ", "templated spiffe_id", "db workloads", "other nodes"}, order); diff != "" {
		t.Error(diff)
	}
	if v := resp.GetVerdicts()[0]; !v.GetMatches() || v.GetSpiffeId() != "spiffe://example.org/app/web" {
		t.Errorf("verdict is %v", v)
	}
	if v := resp.GetVerdicts()[2]; !strings.Contains(v.GetTerm(), `"db"`) || v.GetWhy() == "" {
		t.Errorf("verdict is %v", v)
	}
	for name, req := range map[string]*adminv1.ExplainRequest{
		"no target":    {},
		"unknown node": {Node: &adminv1.ExplainRequest_NodeId{NodeId: "x"}, Target: &adminv1.ExplainRequest_Workload{Workload: workload("web")}},
		"unknown name": {Target: &adminv1.ExplainRequest_Workload{Workload: workload("web")}, Names: []string{"x"}},
		"pid nowhere":  {Target: &adminv1.ExplainRequest_Pid{Pid: 1}},
	} {
		if _, err := admin.Explain(ctx, req); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A stored entry that does not compile any more is not in force, is reported,
// and is put right by applying it again.
func TestBrokenStoredEntry(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	if _, err := h.store.ApplyEntries(t.Context(), []*entryv1.Entry{{Name: "old", SpiffeId: "spiffe://example.org/old", Workloads: "gone.field == 1"}}, nil,
		func(uint64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.start()
	admin, ctx := h.admin()
	condition := func() health.Severity {
		for _, c := range h.health.Conditions() {
			if c.Name == conditionEntries {
				return c.Severity
			}
		}
		return health.Error
	}
	list, err := admin.ListEntries(ctx, &adminv1.ListEntriesRequest{})
	if err != nil || !slices.Equal(names(list.GetEntries()), []string{"old", "web"}) || condition() != health.Warning {
		t.Errorf("%v, %v, %v", list, err, condition())
	}
	resp, err := admin.Explain(ctx, &adminv1.ExplainRequest{Target: &adminv1.ExplainRequest_Workload{Workload: workload("web")}, Names: []string{"old"}})
	if err != nil || !strings.Contains(resp.GetVerdicts()[0].GetWhy(), "not in force") {
		t.Errorf("%v, %v", resp, err)
	}
	a := h.join("n1", nil)
	if r := a.issue(a.item("old", workload("web")))[0].GetRefusal(); r.GetReason() != nodev1.Reason_REASON_ENTRY_UNKNOWN {
		t.Errorf("issued under a broken entry: %v", r)
	}
	h.apply(shopEntry("old"))
	if condition() != health.OK || h.server.registry.Entries().Set.Len() != 2 {
		t.Errorf("condition %v, %d entries in force", condition(), h.server.registry.Entries().Set.Len())
	}
}

func TestStatusAndNodes(t *testing.T) {
	h := newHouse(t)
	short := shopEntry("short")
	short.Ttl = durationOf(10 * time.Minute)
	h.apply(shopEntry("web"), short)
	a := h.join("n1", map[string]string{"zone": "a"})
	a.issue(a.item("web", workload("web")), a.item("nobody", workload("web")))
	s := a.sync(&nodev1.Hello{AgentVersion: "v9"})
	s.next()
	s.applied(7)
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: &nodev1.BundleAcks{Streams: 3, Sequence: 1, Acknowledged: 2}}})
	admin, ctx := h.admin()
	var nodes *adminv1.ListNodesResponse
	if !h.eventually(func() bool {
		var err error
		nodes, err = admin.ListNodes(ctx, &adminv1.ListNodesRequest{})
		return err == nil && nodes.GetNodes()[0].GetStreams() == 3
	}) {
		t.Fatalf("nodes are %v", nodes)
	}
	n := nodes.GetNodes()[0]
	if n.GetId() != a.id || n.GetState() != "active" || !n.GetConnected() || n.GetAgentVersion() != "v9" || n.GetRevision() != 7 ||
		n.GetBundleSequence() != 1 || n.GetStreamsAcknowledged() != 2 || string(n.GetSvidSerial()) != string(a.serial()) {
		t.Errorf("node is %v", n)
	}
	st, err := admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
	if err != nil || st.GetEntries() != 2 || st.GetNodes() != 1 || st.GetNodesConnected() != 1 || st.GetIssued() != 1 || st.GetRefused() != 1 ||
		st.GetOutageBudget().AsDuration() != 5*time.Minute || st.GetRecords() == 0 || len(st.GetConditions()) != len(Conditions) || st.GetBundleSequence() != 1 {
		t.Errorf("status is %v, %v", st, err)
	}
	bundle, err := admin.GetBundle(ctx, &adminv1.GetBundleRequest{})
	if err != nil || len(bundle.GetRoots()) != 1 || bundle.GetTrustDomain() != "example.org" {
		t.Errorf("bundle is %v, %v", bundle, err)
	}
	authorities, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil || len(authorities.GetAuthorities()) != 2 {
		t.Errorf("authorities are %v, %v", authorities, err)
	}
}

// When the CA stops, streams end in a way that has agents come back.
func TestShutdown(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	s := a.sync(&nodev1.Hello{})
	s.next()
	h.server.hub.shutdown()
	h.wantCode(s.end(), codes.Unavailable)
	_, err := h.dialSync(a)
	h.wantCode(err, codes.Unavailable)
}

func TestConfig(t *testing.T) {
	if _, err := New(t.Context(), Config{}); err == nil {
		t.Error("a server of nothing was made")
	}
	h := newHouse(t)
	good := h.server.cfg
	for name, change := range map[string]func(*Config){
		"long agent TTL": func(c *Config) { c.AgentTTL = 25 * time.Hour },
		"short":          func(c *Config) { c.AgentTTL = time.Second },
		"twice":          func(c *Config) { c.Verifiers = append(c.Verifiers, c.Verifiers...) },
		"registered":     func(*Config) {},
	} {
		cfg := good
		change(&cfg)
		if _, err := New(t.Context(), cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
