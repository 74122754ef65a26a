package ca

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// The upstream CA changes its root without a word: the old chain stays in use until
// every live proxy knows the new root.
func TestFault_F26_UpstreamChangesItsRoot(t *testing.T) {
	for _, watched := range []bool{false, true} {
		t.Run(fmt.Sprintf("announced %v", watched), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := &fleet{}
				nodes.acknowledge(1)
				old, fresh := upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.NewAuthority(t, upstreamtest.Good)
				m := upstreamtest.NewMemory(old, upstreamtest.Good)
				store := &memoryStore{}
				u := &Upstream{CA: m, Kind: "memory"}
				if !watched {
					u.CA = unwatched{m}
				}
				f := open(t, Config{Store: store, Upstream: u, Fleet: nodes.nodes})
				f.run(t)
				synctest.Wait()
				before := f.intermediate(t)
				m.Become(fresh, upstreamtest.Good)
				time.Sleep(DefaultIntermediateLife/2 + time.Hour)
				synctest.Wait()
				if got := states(t, store); got != "active prepared" {
					t.Fatal(got)
				}
				f.verifySigned(t, time.Now())
				if !f.intermediate(t).Equal(before) {
					t.Fatal("a chain to the new root is in use before it is known")
				}
				nodes.acknowledge(2)
				f.FleetChanged()
				time.Sleep(time.Minute)
				synctest.Wait()
				if got := states(t, store); got != "retiring active" {
					t.Fatal(got)
				}
				f.verifySigned(t, time.Now())
				if f.intermediate(t).Equal(before) {
					t.Error("the new root is not used")
				}
				time.Sleep(2 * DefaultMaxTTL)
				synctest.Wait()
				if got := states(t, store); got != "gone active" {
					t.Error(got)
				}
			})
		})
	}
}

// An upstream CA that announces a root, and signs with it once it is in force, is followed
// within minutes of that and not with the next renewal; it is not asked without an end if
// it never does.
func TestUpstreamRootIsFollowed(t *testing.T) {
	for _, leaves := range []bool{false, true} {
		t.Run(fmt.Sprintf("leaves=%t", leaves), func(t *testing.T) { followRoot(t, leaves) })
	}
}

func followRoot(t *testing.T, leaves bool) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		old, fresh := upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.NewAuthority(t, upstreamtest.Good)
		m := upstreamtest.NewMemory(old, upstreamtest.Good)
		store := &memoryStore{}
		f := open(t, Config{Store: store, Upstream: &Upstream{CA: m, Kind: "memory", Leaves: leaves}, Fleet: nodes.nodes})
		f.run(t)
		verify := func() {
			t.Helper()
			if !leaves {
				f.verifySigned(t, time.Now())
			} else if err := f.signLeaf(t); err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		m.Become(old, upstreamtest.Good, fresh.Root)
		time.Sleep(time.Minute)
		nodes.acknowledge(2)
		f.FleetChanged()
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := states(t, store); got != "active distributed" {
			t.Fatal(got)
		}
		asked := m.Calls()
		if asked > 6 {
			t.Errorf("asked %d times in an hour", asked)
		}
		verify()
		m.Become(fresh, upstreamtest.Good, old.Root)
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := states(t, store); got != "retiring active" {
			t.Errorf("an hour after it signs with the new root: %s", got)
		}
		verify()
	})
}

func TestFollowAt(t *testing.T) {
	since := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for after, want := range map[time.Duration]time.Duration{
		-time.Hour: time.Minute, 0: time.Minute, time.Minute: 4 * time.Minute, 5 * time.Minute: 16 * time.Minute,
		24 * time.Hour: 4096 * time.Minute,
	} {
		if got := followAt(since, since.Add(after)).Sub(since); got != want {
			t.Errorf("signed last after %s: asked after %s, want %s", after, got, want)
		}
	}
}

// unwatched is an upstream CA that does not tell of its roots.
type unwatched struct{ *upstreamtest.Memory }

func (unwatched) WatchRoots() {}

// From a root of our own to that of an enterprise, which signs intermediates or each
// leaf, and back; at each hour all that was issued and lives verifies.
func TestAdoptUpstreamAndBack(t *testing.T) {
	for _, leaves := range []bool{false, true} {
		t.Run(fmt.Sprintf("leaves=%t", leaves), func(t *testing.T) { adoptAndBack(t, leaves) })
	}
}

func adoptAndBack(t *testing.T, leaves bool) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		a := upstreamtest.NewAuthority(t, upstreamtest.Good)
		store := &memoryStore{}
		f := open(t, Config{Store: store, Upstream: nil, Fleet: nodes.nodes})
		if err := f.AdoptUpstream(t.Context(), "uid:0"); !errors.Is(err, rotation.ErrRefused) {
			t.Errorf("without an upstream CA: %v", err)
		}
		keyStore := f.cfg.Keys
		f = open(t, Config{Store: store, Keys: keyStore, Upstream: &Upstream{CA: upstreamtest.NewMemory(a, upstreamtest.Good), Kind: "memory", Leaves: leaves}, Fleet: nodes.nodes})
		f.run(t)
		synctest.Wait()
		if n := len(f.state.Load().roots); n != 1 {
			t.Fatalf("%d roots: the upstream CA is used before it was adopted", n)
		}
		type issued struct {
			until time.Time
			check func() error
		}
		var live []issued
		hours := func(n int) {
			t.Helper()
			for range n {
				request := named(t, newKey(t), appNames)
				request.TTL = 5 * time.Hour
				signed, err := f.Sign(time.Now(), request)
				if err != nil {
					t.Fatal(err)
				}
				durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
				if err != nil {
					t.Fatal(err)
				}
				live = append(live, issued{signed.NotAfter, func() error { return f.verify(time.Now(), parseAll(t, durable[0].Chain())...) }})
				_, sequence := f.Bundle()
				nodes.acknowledge(sequence)
				time.Sleep(time.Hour)
				synctest.Wait()
				for _, i := range live {
					if i.until.After(time.Now()) {
						if err := i.check(); err != nil {
							t.Fatal(err)
						}
					}
				}
				if n := len(f.state.Load().roots); n > rotation.MaxRoots {
					t.Fatalf("%d roots", n)
				}
			}
		}
		hours(3)
		if err := f.AdoptUpstream(t.Context(), "uid:0"); err != nil {
			t.Fatal(err)
		}
		hours(80)
		if roots, _ := f.Bundle(); len(roots) != 1 || !roots[0].Equal(a.Root) {
			t.Errorf("%d roots: %s", len(roots), states(t, store))
		}
		if err := f.Command(t.Context(), rotation.Command{Verb: rotation.VerbRotate}, "uid:0"); !errors.Is(err, rotation.ErrRefused) {
			t.Errorf("rotate under an upstream CA: %v", err)
		}
		if err := f.AdoptOwn(t.Context(), "uid:0"); err != nil {
			t.Fatal(err)
		}
		hours(80)
		if roots, _ := f.Bundle(); len(roots) != 1 || roots[0].Equal(a.Root) {
			t.Errorf("%d roots: %s", len(roots), states(t, store))
		}
	})
}

// A verifier that no agent serves has only the old root, and then both: while the change
// is paused all that is issued verifies with the old one, and afterwards with both.
func TestAdoptWaitsForStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		a := upstreamtest.NewAuthority(t, upstreamtest.Good)
		f := open(t, Config{Store: &memoryStore{}, Fleet: nodes.nodes})
		store, keyStore := f.cfg.Store, f.cfg.Keys
		f = open(t, Config{Store: store, Keys: keyStore, Upstream: &Upstream{CA: upstreamtest.NewMemory(a, upstreamtest.Good), Kind: "memory"}, Fleet: nodes.nodes})
		f.run(t)
		old, _ := f.Bundle()
		stranger := slices.Clone(old)
		hours := func(n int) {
			t.Helper()
			for range n {
				signed, err := f.Sign(time.Now(), &Request{ID: id("/app"), Key: parseKey(t, newKey(t))})
				if err != nil {
					t.Fatal(err)
				}
				durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
				if err != nil {
					t.Fatal(err)
				}
				chain := parseAll(t, durable[0].Chain())
				if _, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(testDomain, stranger), x509svid.WithTime(time.Now())); err != nil {
					t.Fatal(err)
				}
				_, sequence := f.Bundle()
				nodes.acknowledge(sequence)
				time.Sleep(time.Hour)
				synctest.Wait()
			}
		}
		hours(2)
		command(t, f.CA, rotation.VerbPause, false)
		if err := f.AdoptUpstream(t.Context(), "uid:0"); err != nil {
			t.Fatal(err)
		}
		hours(100)
		both, _ := f.Bundle()
		if len(both) != 2 {
			t.Fatalf("%d roots while the change is paused", len(both))
		}
		stranger = slices.Clone(both)
		command(t, f.CA, rotation.VerbResume, false)
		hours(100)
		if roots, _ := f.Bundle(); len(roots) != 1 || !roots[0].Equal(a.Root) {
			t.Errorf("%d roots: the change did not go on", len(roots))
		}
	})
}
