package store

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/ca"
)

func TestTrust(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	if got, err := d.Trust(t.Context()); err != nil || len(got.Roots) != 0 || got.Sequence != 0 || got.Epoch != 0 {
		t.Fatalf("Trust = %+v, %v", got, err)
	}
	change := func(trust ca.Trust) ca.Trust {
		t.Helper()
		var recorded ca.Trust
		next, err := d.ChangeTrust(t.Context(), trust, func(r ca.Trust) error {
			recorded = r
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(recorded, next); diff != "" {
			t.Errorf("recorded and stored: %s", diff)
		}
		return next
	}
	first := change(ca.Trust{Roots: []ca.Root{{Certificate: []byte{1}, Key: "file:root-1.key", State: "active", CreatedAt: time.Unix(1, 2), Since: time.Unix(1, 3)}}})
	first.Roots = append(first.Roots, ca.Root{Certificate: []byte{0}, Key: "", State: "prepared", CreatedAt: time.Unix(3, 4), Since: time.Unix(3, 5), Automatic: true})
	second := change(first)
	if second.Epoch != 2 || second.Sequence != 2 || second.Roots[0].Sequence != 1 || second.Roots[1].Sequence != 2 {
		t.Errorf("%+v", second)
	}
	// States change without the bundle, a root that leaves changes it.
	second.Roots[0].State, second.Roots[0].Tainted, second.Roots[1].State, second.Paused = "retiring", true, "active", true
	third := change(second)
	if third.Epoch != 3 || third.Sequence != 2 {
		t.Errorf("%+v", third)
	}
	third.Roots[0].State = "gone"
	want := change(third)
	if want.Epoch != 4 || want.Sequence != 3 {
		t.Errorf("%+v", want)
	}
	// Who comes late, and what cannot be recorded, changes nothing.
	if _, err := d.ChangeTrust(t.Context(), third, unrecorded); !errors.Is(err, ca.ErrTrustChanged) {
		t.Errorf("an old epoch: %v", err)
	}
	broken := errors.New("no ledger")
	spoilt := want
	spoilt.Roots = []ca.Root{{Certificate: []byte{7}, State: "active"}}
	if _, err := d.ChangeTrust(t.Context(), spoilt, func(ca.Trust) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("no record: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if rev, err := d.Revision(t.Context()); err != nil || rev != 3 {
		t.Errorf("revision %d, %v: each change of the bundle is one", rev, err)
	}
}

// Lists are part of what changes as one, over a restart too; the bundle has changed if
// they are in force.
func TestTrustWithRevocationLists(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	change := func(trust ca.Trust) ca.Trust {
		t.Helper()
		next, err := d.ChangeTrust(t.Context(), trust, unrecorded)
		if err != nil {
			t.Fatal(err)
		}
		return next
	}
	trust := change(ca.Trust{Roots: []ca.Root{{Certificate: []byte{1}, State: "active", CreatedAt: time.Unix(1, 2), Since: time.Unix(1, 3)}}})
	trust.Lists = []ca.RevocationList{{Issuer: []byte{1}, List: []byte{2}}, {Issuer: []byte{3}, List: []byte{4}}}
	trust = change(trust)
	if trust.Sequence != 1 || trust.Epoch != 2 {
		t.Errorf("not in force: %+v", trust)
	}
	trust.Listed = true
	trust = change(trust)
	if trust.Sequence != 2 {
		t.Errorf("in force: %+v", trust)
	}
	trust.Paused = true
	if trust = change(trust); trust.Sequence != 2 {
		t.Errorf("another change: %+v", trust)
	}
	trust.Lists = []ca.RevocationList{{Issuer: []byte{1}, List: []byte{9}}}
	if trust = change(trust); trust.Sequence != 3 {
		t.Errorf("one is newer, one gone: %+v", trust)
	}
	broken := errors.New("no ledger")
	spoilt := trust
	spoilt.Lists, spoilt.Listed = nil, false
	if _, err := d.ChangeTrust(t.Context(), spoilt, func(ca.Trust) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("no record: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(trust, got); diff != "" {
		t.Error(diff)
	}
}

func TestIntermediates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	a := ca.Intermediate{ID: "a", Root: "r", Instance: "x", LiveUntil: time.Unix(100, 0)}
	b := ca.Intermediate{ID: "b", Root: "r", Instance: "y", LiveUntil: time.Unix(200, 0)}
	if err := d.PutIntermediates(t.Context(), time.Unix(50, 0), a, b); err != nil {
		t.Fatal(err)
	}
	a.LiveUntil = time.Unix(300, 0)
	if err := d.PutIntermediates(t.Context(), time.Unix(250, 0), a); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	got, err := d.Intermediates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]ca.Intermediate{a}, got); diff != "" {
		t.Error(diff)
	}
}

// 64 CAs add their first root at once: one of them succeeds.
func TestFault_F21_FirstRootOnce(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	var added atomic.Int64
	var wg sync.WaitGroup
	for n := range 64 {
		wg.Go(func() {
			_, err := d.ChangeTrust(t.Context(), ca.Trust{Roots: []ca.Root{{Certificate: []byte{byte(n)}, Key: fmt.Sprint(n), State: "active"}}}, unrecorded)
			switch {
			case err == nil:
				added.Add(1)
			case !errors.Is(err, ca.ErrTrustChanged):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err := d.Trust(t.Context())
	if err != nil || added.Load() != 1 || len(got.Roots) != 1 || got.Sequence != 1 {
		t.Errorf("%d added, %+v, %v", added.Load(), got, err)
	}
}
