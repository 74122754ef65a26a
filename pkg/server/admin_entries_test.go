package server

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"

	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

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
