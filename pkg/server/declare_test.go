package server

import (
	"strings"
	"testing"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// What a source declares is in force, and nobody else changes it.
func TestDeclare(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("mine"))
	declare := func(entries ...*entryv1.Entry) map[string]string {
		t.Helper()
		rejected, err := h.server.Declare(t.Context(), "kubernetes:prod", "prod", entries)
		if err != nil {
			t.Fatal(err)
		}
		texts := make(map[string]string)
		for name, problem := range rejected {
			texts[name] = problem.Error()
		}
		return texts
	}
	names := func() string {
		admin, ctx := h.admin()
		res, err := admin.ListEntries(ctx, &adminv1.ListEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(names(res.GetEntries()), " ")
	}
	web, bad, boss := shopEntry("k8s/prod/web"), shopEntry("k8s/prod/bad"), shopEntry("k8s/prod/boss")
	web.SpiffeId, bad.SpiffeId, boss.SpiffeId = "spiffe://example.org/app/web", "spiffe://example.org/app/bad", "spiffe://example.org/app/boss"
	bad.Workloads, boss.Admin = "docker.labels[", true
	rejected := declare(web, bad, boss)
	if len(rejected) != 2 || !strings.Contains(rejected["k8s/prod/boss"], "cannot be declared") || rejected["k8s/prod/bad"] == "" {
		t.Errorf("rejected %v", rejected)
	}
	if got := names(); got != "k8s/prod/web mine" {
		t.Errorf("in force: %s", got)
	}
	records := h.records(ledgerv1.Event_EVENT_ENTRY_APPLIED)
	if last := records[len(records)-1]; last.GetActor() != "kubernetes:prod" || last.GetEntry().GetName() != "k8s/prod/web" {
		t.Errorf("the record is %v", last)
	}
	before, ok := h.server.EntryRevision("k8s/prod/web")
	if !ok {
		t.Error("the entry has no revision")
	}
	declare(web) // nothing changes
	if after, _ := h.server.EntryRevision("k8s/prod/web"); after != before {
		t.Errorf("revision %d became %d", before, after)
	}
	// One that is not valid any more leaves what was in force.
	web.Workloads = "docker.labels["
	if rejected := declare(web); rejected["k8s/prod/web"] == "" || names() != "k8s/prod/web mine" {
		t.Errorf("rejected %v, in force: %s", rejected, names())
	}

	admin, ctx := h.admin()
	if _, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("k8s/prod/other")}}); err == nil {
		t.Error("an entry was applied among those that are declared")
	}
	if _, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"k8s/prod/web"}}); err == nil {
		t.Error("an entry that is declared was deleted")
	}
	if _, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Prune: true}); err != nil {
		t.Fatal(err)
	}
	if got := names(); got != "k8s/prod/web" {
		t.Errorf("after a prune: %s", got)
	}
	if _, err := h.server.Declare(t.Context(), "kubernetes:test", "test", []*entryv1.Entry{shopEntry("k8s/prod/x")}); err == nil {
		t.Error("a source declares entries of another one")
	}
	if _, err := h.server.Declare(t.Context(), "kubernetes:test", "test", nil); err != nil || names() != "k8s/prod/web" {
		t.Errorf("a source without entries: %v, in force: %s", err, names())
	}
	// What is wrong with the whole keeps nothing in force that is not wanted any more.
	twice := shopEntry("k8s/prod/twice")
	if _, err := h.server.Declare(t.Context(), "kubernetes:prod", "prod", []*entryv1.Entry{twice, twice}); err == nil || names() != "" {
		t.Errorf("two of one name: %v, in force: %s", err, names())
	}
	declare(shopEntry("k8s/prod/last"))
	declare()
	if got := names(); got != "" {
		t.Errorf("after all were taken back: %s", got)
	}
	if len(h.records(ledgerv1.Event_EVENT_ENTRY_DELETED)) != 3 {
		t.Error("deletions are not recorded")
	}
}
