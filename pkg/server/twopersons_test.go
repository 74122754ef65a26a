package server

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/attest/peer"
)

// onSocket is the admin API over the operators' socket: the person at the machine.
func (h *house) onSocket() adminv1.AdminServiceClient {
	h.t.Helper()
	path := h.t.TempDir() + "/admin.sock"
	lis, err := peer.Listen(h.t.Context(), path, peer.Options{Mode: 0o600})
	if err != nil {
		h.t.Fatal(err)
	}
	g := h.server.AdminGRPC()
	served := make(chan error, 1)
	go func() { served <- g.Serve(lis) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		conn.Close()
		g.Stop()
		if err := <-served; err != nil {
			h.t.Error(err)
		}
	})
	return adminv1.NewAdminServiceClient(conn)
}

// remoteAdmin is the admin API over mTLS, as the identity of an admin's entry.
func (h *house) remoteAdmin(a *testAgent, name string) adminv1.AdminServiceClient {
	h.t.Helper()
	h.apply(&entryv1.Entry{
		Name: name, SpiffeId: "spiffe://example.org/" + name, Workloads: `unix.uid == 1000 && unix.path == "/app"`, Admin: true,
	})
	key, item := newKey(h.t), a.item(name, workload("web"))
	item.Csr = newCSR(h.t, key)
	return adminv1.NewAdminServiceClient(h.dial(key, parseChain(h.t, a.issue(item)[0].GetSvid().GetChain())))
}

// state is how far the roots are.
func (h *house) roots() string {
	h.t.Helper()
	r, err := h.server.rotation(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return rootsText(r)
}

// Which calls of the admin API one person makes alone, all of them: a method that is
// new has to be put here, by somebody who has thought of whether it changes roots.
var onePerson = map[string]bool{
	adminv1.AdminService_ApplyEntries_FullMethodName:       true,
	adminv1.AdminService_DeleteEntries_FullMethodName:      true,
	adminv1.AdminService_ListEntries_FullMethodName:        true,
	adminv1.AdminService_Explain_FullMethodName:            true,
	adminv1.AdminService_EntryStatus_FullMethodName:        true,
	adminv1.AdminService_CreateToken_FullMethodName:        true,
	adminv1.AdminService_ListTokens_FullMethodName:         true,
	adminv1.AdminService_DeleteToken_FullMethodName:        true,
	adminv1.AdminService_ListNodes_FullMethodName:          true,
	adminv1.AdminService_EvictNode_FullMethodName:          true,
	adminv1.AdminService_BanNode_FullMethodName:            true,
	adminv1.AdminService_UnbanNode_FullMethodName:          true,
	adminv1.AdminService_AddQuarantine_FullMethodName:      true,
	adminv1.AdminService_LiftQuarantine_FullMethodName:     true,
	adminv1.AdminService_ListQuarantines_FullMethodName:    true,
	adminv1.AdminService_ListWithdrawals_FullMethodName:    true,
	adminv1.AdminService_GetBundle_FullMethodName:          true,
	adminv1.AdminService_ListAuthorities_FullMethodName:    true,
	adminv1.AdminService_RotateIntermediate_FullMethodName: true,
	adminv1.AdminService_GetRotation_FullMethodName:        true,
	adminv1.AdminService_ListRootChanges_FullMethodName:    true,
	adminv1.AdminService_ApproveRootChange_FullMethodName:  true, // another one
	adminv1.AdminService_RejectRootChange_FullMethodName:   true,
	adminv1.AdminService_RenewSVIDs_FullMethodName:         true,
	adminv1.AdminService_ConfirmClock_FullMethodName:       true,
	adminv1.AdminService_GetStatus_FullMethodName:          true,
	adminv1.ConsoleService_CreateLink_FullMethodName:       true,
	adminv1.LedgerService_Find_FullMethodName:              true,
	adminv1.LedgerService_Who_FullMethodName:               true,
	adminv1.LedgerService_FirstSeen_FullMethodName:         true,
	adminv1.LedgerService_Overdue_FullMethodName:           true,
	adminv1.LedgerService_NewlyAllowed_FullMethodName:      true,
	adminv1.LedgerService_ListNames_FullMethodName:         true,
	adminv1.LedgerService_Archive_FullMethodName:           true,
}

// Each method of the admin API, from the descriptors, and each verb of those that
// change roots: what takes two persons is held whoever calls first, over the socket
// and over mTLS, and nothing else is.
func TestV_J7_TwoPersons_EveryMethod(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.TwoPersons = true })
	two := map[string]bool{adminv1.AdminService_ChangeRotation_FullMethodName: true}
	for full, m := range servedMethods(t, h.server.AdminGRPC()) {
		if onePerson[full] == two[full] {
			t.Errorf("%s: does it take one person, or two? Say so in this test", full)
		}
		if two[full] != (methods[full] == roleTwoAdmins) {
			t.Errorf("%s has role %d", full, methods[full])
		}
		if two[full] && (m.IsStreamingClient() || m.IsStreamingServer()) {
			t.Errorf("%s is a stream, and would not be held", full)
		}
	}
	a := h.join("n1", nil)
	for who, admin := range map[string]adminv1.AdminServiceClient{"socket": h.onSocket(), "remote": h.remoteAdmin(a, "ops")} {
		for verb := range rootVerbs {
			before := h.roots()
			answer, err := admin.ChangeRotation(t.Context(), &adminv1.ChangeRotationRequest{Verb: verb, Override: verb == "retire"})
			got := answer.GetHeld()
			if err != nil || got.GetId() == "" || got.GetActor() == "" || got.GetChange().GetVerb() != verb || answer.GetRotation() == nil ||
				!strings.HasPrefix(got.GetWhat(), verb+": ") || strings.Contains(got.GetWhat(), "override") != (verb == "retire") {
				t.Errorf("%s: %s: %v, %v", who, verb, answer, err)
			}
			if after := h.roots(); after != before {
				t.Errorf("%s: %s was done by one person: %s, now %s", who, verb, before, after)
			}
		}
		for _, bad := range []*adminv1.ChangeRotationRequest{{}, {Verb: "Rotate"}, {Verb: "taint", Root: "not a\nroot"}, {Verb: "taint", Root: strings.Repeat("a", 65)}} {
			_, err := admin.ChangeRotation(t.Context(), bad)
			h.wantCode(err, codes.InvalidArgument)
		}
		for _, verb := range []string{"pause", "resume"} {
			answer, err := admin.ChangeRotation(t.Context(), &adminv1.ChangeRotationRequest{Verb: verb})
			if err != nil || answer.GetHeld() != nil || answer.GetRotation().GetPaused() != (verb == "pause") {
				t.Errorf("%s: %s: %v, %v", who, verb, answer, err)
			}
		}
		if _, err := admin.RotateIntermediate(t.Context(), &adminv1.RotateIntermediateRequest{}); err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
	// Without the setting, one is enough.
	alone := newHouse(t)
	answer, err := alone.onSocket().ChangeRotation(t.Context(), &adminv1.ChangeRotationRequest{Verb: "prepare"})
	if err != nil || answer.GetHeld() != nil || len(answer.GetRotation().GetRoots()) != 2 {
		t.Errorf("%v, %v", answer, err)
	}
}

// Of two persons one asks and the other approves, whichever begins; the ledger has
// both, and who tried to be both.
func TestV_J7_TwoPersons_ApprovedByTheOther(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.TwoPersons = true })
	ctx := t.Context()
	a := h.join("n1", nil)
	local, remote, other := h.onSocket(), h.remoteAdmin(a, "ops"), h.remoteAdmin(a, "security")
	ask := func(admin adminv1.AdminServiceClient, verb string) string {
		t.Helper()
		answer, err := admin.ChangeRotation(ctx, &adminv1.ChangeRotationRequest{Verb: verb})
		if err != nil || answer.GetHeld().GetId() == "" {
			t.Fatalf("%v, %v", answer, err)
		}
		return answer.GetHeld().GetId()
	}
	approve := func(admin adminv1.AdminServiceClient, id string) error {
		_, err := admin.ApproveRootChange(ctx, &adminv1.ApproveRootChangeRequest{Id: id})
		return err
	}
	id := ask(remote, "prepare")
	if again := ask(remote, "prepare"); again != id {
		t.Errorf("the same is held twice, as %s and %s", id, again)
	}
	before := h.roots()
	err := approve(remote, id)
	h.wantCode(err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "somebody else") || h.roots() != before {
		t.Errorf("own request: %v, roots are %s", err, h.roots())
	}
	list, err := other.ListRootChanges(ctx, &adminv1.ListRootChangesRequest{})
	if err != nil || len(list.GetChanges()) != 1 || list.GetChanges()[0].GetId() != id || list.GetChanges()[0].GetActor() != "spiffe://example.org/ops" {
		t.Fatalf("%v, %v", list, err)
	}
	done, err := local.ApproveRootChange(ctx, &adminv1.ApproveRootChangeRequest{Id: id})
	if err != nil || len(done.GetRotation().GetRoots()) != 2 || done.GetChange().GetId() != id {
		t.Fatalf("%v, %v", done, err)
	}
	h.wantCode(approve(local, id), codes.NotFound) // once
	h.wantCode(approve(other, "0000000000000000"), codes.NotFound)

	// At the machine everybody is one person, of whatever user.
	id = ask(local, "rollback")
	err = approve(local, id)
	h.wantCode(err, codes.FailedPrecondition)
	_, err = h.server.settle(ctx, &caller{actor: "uid:12345", requestID: "r", began: time.Now()}, id, changeApproved)
	if err == nil || !strings.Contains(err.Error(), "one person") {
		t.Errorf("another user of the socket: %v", err)
	}
	if err := approve(other, id); err != nil {
		t.Error(err)
	}
	if got := h.roots(); got != before {
		t.Errorf("roots are %s, were %s", got, before)
	}

	// What the CA would refuse is refused after the approval, and is to be asked for again.
	id = ask(remote, "rollback")
	h.wantCode(approve(other, id), codes.FailedPrecondition)
	h.wantCode(approve(other, id), codes.NotFound)

	// Rejected, by whom it may be.
	id = ask(remote, "rotate")
	if _, err := remote.RejectRootChange(ctx, &adminv1.RejectRootChangeRequest{Id: id}); err != nil {
		t.Error(err)
	}
	h.wantCode(approve(local, id), codes.NotFound)

	// Asked for of other roots: it might mean something else now.
	id = ask(remote, "taint")
	if err := approve(other, ask(local, "prepare")); err != nil {
		t.Fatal(err)
	}
	err = approve(local, id)
	h.wantCode(err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "ask for it again") || strings.Contains(h.roots(), "tainted") {
		t.Errorf("%v, %s", err, h.roots())
	}

	// Who is no admin any more has asked for nothing.
	id = ask(other, "taint")
	if got := list.GetChanges()[0].GetWhat(); !strings.HasSuffix(got, "; now "+before) {
		t.Errorf("the second person reads %q", got)
	}
	if _, err := local.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"security"}}); err != nil {
		t.Fatal(err)
	}
	err = approve(remote, id)
	if err == nil || !strings.Contains(err.Error(), "no admin any more") || strings.Contains(h.roots(), "tainted") {
		t.Errorf("%v, %s", err, h.roots())
	}

	// The root that was meant, by its whole name, is the one that is tainted.
	active := h.ca.Authorities()[0].ID
	answer, err := local.ChangeRotation(ctx, &adminv1.ChangeRotationRequest{Verb: "taint", Root: active})
	if err != nil || !strings.Contains(answer.GetHeld().GetWhat(), "leave: "+active+"; now ") {
		t.Fatalf("%v, %v", answer, err)
	}
	if err := approve(remote, answer.GetHeld().GetId()); err != nil || !regexp.MustCompile("root "+active+" is [a-z]+ and tainted").MatchString(h.roots()) {
		t.Errorf("%v, %s", err, h.roots())
	}

	var got []string
	for _, r := range h.records(ledgerv1.Event_EVENT_APPROVAL) {
		by := strings.TrimPrefix(r.GetActor(), "spiffe://example.org/")
		if strings.HasPrefix(by, "uid:") {
			by = "uid"
		}
		_, asked, _ := strings.Cut(r.GetDetail(), "; asked for by ")
		if asked = strings.TrimPrefix(asked, "spiffe://example.org/"); strings.HasPrefix(asked, "uid:") {
			asked = "uid"
		}
		_, what, _ := strings.Cut(r.GetDetail(), ": ")
		verb, _, _ := strings.Cut(what, ":")
		got = append(got, strings.Join([]string{verb, asked, r.GetReason(), by}, " "))
		if refused := r.GetOutcome() == ledgerv1.Outcome_OUTCOME_REFUSED; refused != (r.GetReason() == changeOwn) {
			t.Errorf("%v", r)
		}
	}
	want := []string{
		"prepare ops requested ops", "prepare ops own_request ops", "prepare ops approved uid",
		"rollback uid requested uid", "rollback uid own_request uid", "rollback uid own_request uid", "rollback uid approved security",
		"rollback ops requested ops", "rollback ops approved security",
		"rotate ops requested ops", "rotate ops rejected ops",
		"taint ops requested ops", "prepare uid requested uid", "prepare uid approved security",
		"taint security requested security", "taint uid requested uid", "taint uid approved ops",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("recorded is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	made := false
	for _, r := range h.records(ledgerv1.Event_EVENT_AUTHORITY) {
		made = made || r.GetAuthority().GetState() == "prepared" && r.GetActor() == "spiffe://example.org/ops"
	}
	if !made {
		t.Error("the root does not name who asked for it")
	}
}

// What waits is bounded, in number and in time, and a restart forgets it.
func TestV_J7_TwoPersons_Bounded(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.TwoPersons = true })
	asks := func(actor, root string) (*adminv1.RootChange, error) {
		ctx := context.WithValue(t.Context(), callerKey{}, &caller{actor: actor, requestID: "r", began: time.Now()})
		answer, err := h.server.hold(ctx, &adminv1.ChangeRotationRequest{Verb: "taint", Root: root})
		got, _ := answer.(*adminv1.ChangeRotationResponse)
		return got.GetHeld(), err
	}
	var first *adminv1.RootChange
	for i := range maxHeld {
		got, err := asks("spiffe://example.org/ops", strings.Repeat("a", i+1))
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = got
		}
	}
	if _, err := asks("spiffe://example.org/ops", "b"); err == nil || !strings.Contains(err.Error(), "reject some") {
		t.Errorf("one too many: %v", err)
	}
	if life := first.GetExpiresAt().AsTime().Sub(first.GetRequestedAt().AsTime()); life != heldLife {
		t.Errorf("it is held for %v", life)
	}
	// One whose hour is over is nobody's any more, and makes room.
	admin := h.onSocket()
	h.server.held.mu.Lock()
	h.server.held.all[0].ExpiresAt = timestamppb.New(time.Now().Add(-time.Nanosecond))
	h.server.held.mu.Unlock()
	_, err := admin.ApproveRootChange(t.Context(), &adminv1.ApproveRootChangeRequest{Id: first.GetId()})
	h.wantCode(err, codes.NotFound)
	last, err := asks("spiffe://example.org/ops", "b")
	if err != nil {
		t.Fatal(err)
	}
	list, err := admin.ListRootChanges(t.Context(), &adminv1.ListRootChangesRequest{})
	if err != nil || len(list.GetChanges()) != maxHeld || list.GetChanges()[maxHeld-1].GetId() != last.GetId() {
		t.Errorf("%v, %v", list, err)
	}

	h.stop()
	h.start(func(c *Config) { c.TwoPersons = true })
	admin = h.onSocket()
	_, err = admin.ApproveRootChange(t.Context(), &adminv1.ApproveRootChangeRequest{Id: last.GetId()})
	h.wantCode(err, codes.NotFound)
	if list, err := admin.ListRootChanges(t.Context(), &adminv1.ListRootChangesRequest{}); err != nil || len(list.GetChanges()) != 0 {
		t.Errorf("%v, %v", list, err)
	}
}

// Without a record nothing is held, and nothing approved.
func TestV_J7_TwoPersons_NothingWithoutARecord(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.TwoPersons = true })
	as := func(actor string) context.Context {
		return context.WithValue(t.Context(), callerKey{}, &caller{actor: actor, requestID: "r", began: time.Now()})
	}
	answer, err := h.server.hold(as("uid:0"), &adminv1.ChangeRotationRequest{Verb: "prepare"})
	if err != nil {
		t.Fatal(err)
	}
	held, _ := answer.(*adminv1.ChangeRotationResponse)
	before := h.roots()
	if err := h.journal.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.server.hold(as("uid:0"), &adminv1.ChangeRotationRequest{Verb: "rotate"}); err == nil {
		t.Error("held without a record")
	}
	_, err = h.server.AdminService().ApproveRootChange(as("spiffe://example.org/ops"), &adminv1.ApproveRootChangeRequest{Id: held.GetHeld().GetId()})
	if err == nil || h.roots() != before {
		t.Errorf("approved without a record: %v, %s", err, h.roots())
	}
	h.server.held.mu.Lock()
	defer h.server.held.mu.Unlock()
	if n := len(h.server.held.all); n != 1 {
		t.Errorf("%d are held, want the one that was recorded", n)
	}
}

// With entries.two_persons, entries that make an administrator or a CA below wait for
// another person, exactly as they were asked for, and nothing else does.
func TestV_J7_TwoPersons_Entries(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	a := h.join("n1", nil)
	ops, security, third := h.remoteAdmin(a, "ops"), h.remoteAdmin(a, "security"), h.remoteAdmin(a, "third")
	local := h.onSocket()
	h.server.cfg.TwoPersonsEntries = true
	entry := func(name string, change func(*entryv1.Entry)) *entryv1.Entry {
		e := shopEntry(name)
		e.SpiffeId, e.DnsNames = "spiffe://example.org/"+name, nil
		change(e)
		return e
	}
	boss := func(e *entryv1.Entry) { e.Admin = true }
	lower := func(e *entryv1.Entry) { e.Downstream = true }
	plain := func(*entryv1.Entry) {}
	apply := func(who adminv1.AdminServiceClient, req *adminv1.ApplyEntriesRequest) *adminv1.RootChange {
		t.Helper()
		answer, err := who.ApplyEntries(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		return answer.GetHeld()
	}
	of := func(entries ...*entryv1.Entry) *adminv1.ApplyEntriesRequest {
		return &adminv1.ApplyEntriesRequest{Entries: entries}
	}
	is := func(name string) *entryv1.Entry {
		e, _ := h.server.registry.Entries().Proto(name)
		return e
	}
	approve := func(who adminv1.AdminServiceClient, id string) error {
		_, err := who.ApproveRootChange(ctx, &adminv1.ApproveRootChangeRequest{Id: id})
		return err
	}

	// What gives no power takes one person, and so does what takes it away.
	if apply(ops, of(entry("web", plain))) != nil || is("web") == nil {
		t.Error("an entry without a mark waits")
	}
	if apply(ops, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{entry("evil", boss)}, DryRun: true}) != nil || is("evil") != nil {
		t.Error("a dry run waits, or is none")
	}
	for _, who := range []adminv1.AdminServiceClient{ops, local} {
		for _, e := range []*entryv1.Entry{entry("evil", boss), entry("evil", lower)} {
			held := apply(who, of(e, entry("beside", plain)))
			if held.GetId() == "" || is("evil") != nil || is("beside") != nil || len(held.GetEntries().GetEntries()) != 2 || !strings.Contains(held.GetWhat(), "entry evil is created: spiffe://example.org/evil, ") {
				t.Errorf("one person has done it: %v", held)
			}
			if _, err := who.RejectRootChange(ctx, &adminv1.RejectRootChangeRequest{Id: held.GetId()}); err != nil {
				t.Error(err)
			}
		}
	}
	// The mark is there already, and the rule is not what it was.
	wider := is("ops")
	changed := entry("ops", boss)
	changed.Workloads = "unix.uid == 0"
	held := apply(ops, of(changed, entry("web", plain)))
	if held.GetId() == "" || is("ops").GetWorkloads() != wider.GetWorkloads() || len(held.GetEntries().GetEntries()) != 1 {
		t.Errorf("a wider rule of an administrator's entry: %v", held)
	}
	if again := apply(ops, of(changed)); again.GetId() != held.GetId() {
		t.Error("the same waits twice")
	}
	h.wantCode(approve(ops, held.GetId()), codes.FailedPrecondition)
	if err := approve(security, held.GetId()); err != nil || is("ops").GetWorkloads() != "unix.uid == 0" {
		t.Errorf("approved by another: %v, %v", err, is("ops"))
	}
	h.wantCode(approve(third, held.GetId()), codes.NotFound) // once
	asked := false
	for _, r := range h.records(ledgerv1.Event_EVENT_ENTRY_APPLIED) {
		asked = asked || r.GetEntry().GetName() == "ops" && r.GetActor() == "spiffe://example.org/ops"
	}
	approved := false
	for _, r := range h.records(ledgerv1.Event_EVENT_APPROVAL) {
		approved = approved || r.GetReason() == "approved" && r.GetActor() == "spiffe://example.org/security" && strings.HasSuffix(r.GetDetail(), "asked for by spiffe://example.org/ops")
	}
	if !asked || !approved {
		t.Errorf("the records do not say who asked (%t) and who approved (%t)", asked, approved)
	}

	// Another entry has come in its place meanwhile.
	held = apply(local, of(entry("new", boss)))
	if apply(ops, of(entry("new", plain))) != nil || is("new") == nil {
		t.Error("an entry without a mark waits")
	}
	err := approve(security, held.GetId())
	h.wantCode(err, codes.FailedPrecondition)
	if is("new").GetAdmin() || err == nil || !strings.Contains(err.Error(), "the entries have changed") {
		t.Errorf("approved though it is another entry: %v", err)
	}
	// Who asked is no administrator any more; to see to that takes one person.
	held = apply(third, of(entry("heir", boss)))
	unmarked := entry("third", plain)
	if apply(ops, of(unmarked)) != nil || is("third").GetAdmin() {
		t.Error("taking power away waits")
	}
	h.wantCode(approve(security, held.GetId()), codes.FailedPrecondition)
	if is("heir") != nil {
		t.Error("who is no administrator has made one")
	}
	// What cannot be shown to a second person is not held.
	_, err = ops.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{entry("evil", boss)}, Prune: true})
	h.wantCode(err, codes.FailedPrecondition)
	many := []*entryv1.Entry{entry("evil", boss)}
	for i := range 500 {
		many = append(many, entry(fmt.Sprintf("web-%d", i), func(e *entryv1.Entry) { e.Hint = strings.Repeat("x", 150) }))
	}
	_, err = ops.ApplyEntries(ctx, of(many...))
	h.wantCode(err, codes.InvalidArgument)
	if is("evil") != nil || is("web-1") != nil || is("security") == nil {
		t.Error("it was done all the same")
	}
}
