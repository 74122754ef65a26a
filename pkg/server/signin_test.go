package server

import (
	"fmt"
	"testing"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// A storm of refused sign-ins, from very many addresses, is a bounded number of
// records, and every one is counted.
func TestRefusedSignInsAreBounded(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	const each = 40
	hosts := refusalSources + 100
	before := h.journal.Size()
	for i := range hosts {
		for j := range each {
			h.server.RecordRefusedSignIn(t.Context(), "", &ledgerv1.SignIn{Method: "link", Address: fmt.Sprintf("[2001:db8::%x]:%d", i, j+1)}, "link_not_valid", "")
		}
	}
	single := h.journal.Size() - before
	if limit := uint64(refusalSources + 1); single > limit {
		t.Errorf("%d refusals are %d records, more than %d", hosts*each, single, limit)
	}
	due := h.server.refusals.summaries(time.Now().Add(refusalWindow))
	total := single
	for _, r := range due {
		total += r.GetSummary().GetCount()
		if r.GetEvent() != ledgerv1.Event_EVENT_SIGN_IN || r.GetSignIn().GetMethod() != "link" || r.GetReason() != "link_not_valid" {
			t.Fatalf("a summary is %v", r)
		}
	}
	if len(due) > refusalSources+1 || total != uint64(hosts*each) {
		t.Errorf("%d summaries, with them %d of %d are in the ledger", len(due), total, hosts*each)
	}
}

// Those who can be told apart by a provider are, though they share an address.
func TestSignInRecords(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	in := &ledgerv1.SignIn{Method: "oidc", Address: "192.0.2.1:1234"}
	if err := h.server.RecordSignIn(t.Context(), "alice", in); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		h.server.RecordRefusedSignIn(t.Context(), "bob", in, "not_allowed", "neither")
		h.server.RecordRefusedSignIn(t.Context(), "carol", in, "not_allowed", "neither")
	}
	var got []string
	for _, r := range h.records(ledgerv1.Event_EVENT_SIGN_IN) {
		got = append(got, fmt.Sprint(r.GetActor(), " ", r.GetOutcome(), " ", r.GetReason(), " ", r.GetSignIn().GetAddress(), " ", r.GetRequestId() != ""))
	}
	want := "[alice OUTCOME_SUCCESS  192.0.2.1:1234 true bob OUTCOME_REFUSED not_allowed 192.0.2.1:1234 true carol OUTCOME_REFUSED not_allowed 192.0.2.1:1234 true]"
	if fmt.Sprint(got) != want {
		t.Errorf("%v\nwant %s", got, want)
	}
	if err := h.journal.Close(); err != nil {
		t.Fatal(err)
	}
	if err := h.server.RecordSignIn(t.Context(), "alice", in); err == nil {
		t.Error("it was recorded by a journal that is closed")
	}
}
