package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"testing"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// authorityRecords is an index with records of authorities, one a page.
type authorityRecords struct {
	Records

	list []*ledgerv1.Authority
}

func (f authorityRecords) Find(_ context.Context, q search.Query) ([]search.Found, search.Position, error) {
	if q.Event != ledgerv1.Event_EVENT_AUTHORITY {
		return nil, search.Position{}, errors.New("it reads more than it has to")
	}
	i := uint64(0)
	if q.After.Valid {
		i = q.After.Record + 1
	}
	return []search.Found{{Entry: ledger.Entry{Record: &ledgerv1.Record{Authority: f.list[i]}}}},
		search.Position{Record: i, Valid: i+1 < uint64(len(f.list))}, nil
}

// A root stands for all intermediates that chain to it: those of the ledger, and
// those of other CAs of which something may live.
func TestBelow(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var root, own string
	var fingerprint [32]byte
	for _, a := range h.ca.Authorities() {
		if a.Role == ca.RoleRoot {
			root, fingerprint = a.ID, sha256.Sum256(a.Certificate.Raw)
		} else {
			own = a.ID
		}
	}
	old := "0123456789abcdef0123456789abcdef01234567"
	h.server.cfg.Records = authorityRecords{list: []*ledgerv1.Authority{
		{Id: root, Role: "root", Sha256: fingerprint[:]},
		{Id: "recorded", Role: "intermediate", Root: root},
		{Id: old, Role: "root", Sha256: []byte{0x77, 0x78, 0x79}},
		{Id: "older", Role: "intermediate", Root: old},
		{Id: "recorded", Role: "intermediate", Root: root, State: "gone"},
	}}
	if err := h.store.PutIntermediates(t.Context(), time.Now(), ca.Intermediate{ID: "elsewhere", Root: root, Instance: "ca-2", LiveUntil: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	want := []string{own, "elsewhere", "recorded"}
	slices.Sort(want)
	for _, name := range []string{root, root[:8], hex.EncodeToString(fingerprint[:]), hex.EncodeToString(fingerprint[:])[:10]} {
		id, below, err := h.server.Below(t.Context(), name)
		if err != nil || id != root || !slices.Equal(below, want) {
			t.Errorf("below %s: %s %q %v, want %q", name, id, below, err, want)
		}
	}
	if id, below, err := h.server.Below(t.Context(), "77:78:79"); err != nil || id != old || !slices.Equal(below, []string{"older"}) {
		t.Errorf("below a root that is no more: %s %q %v", id, below, err)
	}
	for _, name := range []string{"", "77", "ffffffff", "%%%%%%%%", own, "older"} {
		if id, _, err := h.server.Below(t.Context(), name); !errors.Is(err, search.ErrNoRoot) {
			t.Errorf("%q is %q, %v", name, id, err)
		}
	}
}
