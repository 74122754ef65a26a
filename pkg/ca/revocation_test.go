package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// verifier is a proxy that goes by lists, as Envoy does: it refuses whatever has an
// issuer without a list, or with one that has expired.
type verifier struct {
	lists    map[string]*x509.RevocationList // by issuer; nil if it has none
	sequence uint64
}

func (v *verifier) take(t testing.TB, c *CA) {
	t.Helper()
	_, lists, sequence := c.BundleWithLists()
	if sequence == v.sequence {
		return
	}
	v.lists, v.sequence = nil, sequence
	for _, l := range lists {
		if v.lists == nil {
			v.lists = make(map[string]*x509.RevocationList)
		}
		list, err := x509.ParseRevocationList(l.List)
		if err != nil {
			t.Fatal(err)
		}
		if err := list.CheckSignatureFrom(parse(t, l.Issuer)); err != nil {
			t.Fatal(err)
		}
		v.lists[string(l.Issuer)] = list
	}
}

var errRevoked = errors.New("it is on the list")

func (v *verifier) accepts(now time.Time, leaf, issuer *x509.Certificate) error {
	list := v.lists[string(issuer.Raw)]
	switch {
	case now.After(leaf.NotAfter):
		return errors.New("it has expired")
	case v.lists == nil:
		return nil
	case list == nil:
		return errors.New("its issuer has no list")
	case now.After(list.NextUpdate) || now.Before(list.ThisUpdate):
		return errors.New("the list of its issuer has expired")
	case slices.ContainsFunc(list.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(leaf.SerialNumber) == 0 }):
		return errRevoked
	}
	return nil
}

// listed is a proxy with an X.509-SVID and a verifier.
type listed struct {
	verifier
	name         string
	leaf, issuer *x509.Certificate
	renewAt      time.Time
	late         time.Time // until then it takes no bundle
}

func (p *listed) follow(t *testing.T, f *fixture) {
	t.Helper()
	now := time.Now()
	if !now.Before(p.late) {
		p.take(t, f.CA)
	}
	if now.Before(p.renewAt) || !f.Signs(now) {
		return
	}
	var signed *Signed
	p.leaf, p.issuer, signed = f.issue(t, now, &Request{ID: id("/" + p.name)})
	p.renewAt = signed.RenewAt
}

// months runs a CA that revokes by lists for two months: its intermediates and
// its root rotate, it restarts, proxies are late, identities are revoked. Nobody is ever
// refused by anybody but for having been revoked, and whoever was is refused for as long
// as it lives.
func months(t *testing.T, seed uint64, revokeEvery int) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	synctest.Test(t, func(t *testing.T) {
		random := mathrand.New(mathrand.NewPCG(seed, 2))
		proxies := []*listed{{name: "a"}, {name: "b"}, {name: "c"}, {name: "d"}}
		var mu sync.Mutex // guards proxies and current
		var current func() uint64
		cfg := Config{
			Store: &memoryStore{}, Keys: keys.Memory(), Revocation: true,
			RootLife: 40 * 24 * time.Hour, IntermediateLife: 4 * 24 * time.Hour, MaxTTL: 12 * time.Hour, DefaultTTL: 6 * time.Hour,
			Fleet: func() (all []rotation.Node) {
				mu.Lock()
				defer mu.Unlock()
				if current == nil {
					return nil
				}
				for _, p := range proxies {
					n := rotation.Node{ID: p.name, Connected: true, Sequence: current(), Streams: 1, AckSequence: current(), Counted: true}
					if p.sequence >= current() {
						n.Acknowledged = 1
					}
					all = append(all, n)
				}
				return all
			},
		}
		start := func() (*fixture, func()) {
			f := open(t, cfg)
			f.nap = time.Hour
			mu.Lock()
			current = func() uint64 { return f.state.Load().trust.Sequence }
			mu.Unlock()
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = f.Run(ctx) })
			return f, func() { cancel(); running.Wait() }
		}
		f, stop := start()
		cfg = f.cfg
		type pair struct{ leaf, issuer *x509.Certificate }
		var revoked []pair
		var newest verifier
		restarts, refusals, checks := 0, 0, 0
		issuers := make(map[string]bool)
		follow := func() {
			mu.Lock()
			for _, p := range proxies {
				p.follow(t, f)
				if p.issuer != nil {
					issuers[string(p.issuer.Raw)] = true
				}
			}
			mu.Unlock()
			f.FleetChanged()
			synctest.Wait()
		}
		for step := range 60 * 12 {
			if random.IntN(60) == 0 {
				stop()
				f, stop = start()
				restarts++
				// All connect again, within the time for which it waits.
				for _, p := range proxies {
					p.late = time.Time{}
				}
				for !f.Signs(time.Now()) {
					follow()
					time.Sleep(time.Second)
				}
			}
			if random.IntN(60) == 0 {
				proxies[random.IntN(len(proxies))].late = time.Now().Add(time.Duration(random.IntN(8)) * time.Hour)
			}
			follow()
			now := time.Now()
			for _, p := range proxies {
				for _, q := range proxies {
					if err := q.accepts(now, p.leaf, p.issuer); err != nil {
						t.Fatalf("step %d: %s is refused by %s: %v", step, p.name, q.name, err)
					}
					checks++
				}
			}
			if random.IntN(revokeEvery) == 0 {
				p := proxies[random.IntN(len(proxies))]
				done, err := f.Revoke(t.Context(), "test", "uid:0", func(l *Leaf) bool { return l.SPIFFEID == id("/"+p.name).String() })
				if err != nil {
					t.Fatal(err)
				}
				if done.Count > 0 && done.Sequence != f.state.Load().trust.Sequence || done.Left != "" {
					t.Fatalf("%+v", done)
				}
				if i := slices.IndexFunc(f.state.Load().own(), func(a *authority) bool { return a.cert.Equal(p.issuer) }); i >= 0 {
					if done.Count == 0 {
						t.Fatal("nothing is revoked")
					}
					revoked = append(revoked, pair{p.leaf, p.issuer})
					p.renewAt = time.Time{}
				}
				follow()
			}
			// Whoever has the newest lists, refuses all that were revoked.
			newest.take(t, f.CA)
			revoked = slices.DeleteFunc(revoked, func(r pair) bool { return time.Now().After(r.leaf.NotAfter) })
			for _, r := range revoked {
				if newest.accepts(time.Now(), r.leaf, r.issuer) == nil {
					t.Fatalf("step %d: what was revoked is believed again", step)
				}
				refusals++
			}
			if warning, failure := f.Health(time.Now()); failure != nil {
				t.Fatalf("%v, %v", failure, warning)
			}
			if n := len(f.state.Load().trust.Lists); n > 12 {
				t.Fatalf("%d lists", n)
			}
			time.Sleep(2 * time.Hour)
			synctest.Wait()
		}
		stop()
		if restarts < 5 || refusals < 30 || len(issuers) < 15 {
			t.Errorf("%d restarts, %d refusals, %d intermediates: the test shows nothing", restarts, refusals, len(issuers))
		}
		t.Logf("%d restarts, %d intermediates, %d refusals of what was revoked, %d others accepted", restarts, len(issuers), refusals, checks)
	})
}

func TestV_L2_RevokedStaysRevoked(t *testing.T) { months(t, 1, 3) }

func TestV_L3_NobodyIsRefusedForWantOfAList(t *testing.T) { months(t, 2, 40) }

// Whatever expires when, nothing leaves a list before it has expired.
func TestV_L2_PruneKeepsWhatLives(t *testing.T) {
	random := mathrand.New(mathrand.NewPCG(3, 4))
	now := time.Unix(1_700_000_000, 0)
	var all []revokedLeaf
	for range 5000 {
		now = now.Add(time.Duration(random.IntN(600)) * time.Second)
		leaf := revokedLeaf{at: now, notAfter: now.Unix() + int64(random.IntN(24*3600)) - 3600}
		random.Uint64()
		newSerial(&leaf.serial)
		before := append(all, leaf)
		all = prune(before, now)
		for _, r := range before {
			kept := slices.Contains(all, r)
			if lives := r.notAfter >= now.Unix(); lives && !kept {
				t.Fatalf("what lives until %d is dropped at %d", r.notAfter, now.Unix())
			}
			if long := r.notAfter < now.Add(-2*pruneMargin).Unix(); long && kept {
				t.Fatalf("what expired at %d is kept at %d", r.notAfter, now.Unix())
			}
		}
	}
}

// A list that would have anybody refused never becomes part of a bundle: what was in
// force stays, and Health says why.
func TestV_L3_BadListStaysOut(t *testing.T) {
	f := open(t, Config{Revocation: true})
	now := time.Now()
	a := f.state.Load().active
	good := f.state.Load().trust.Lists
	if len(good) != 1 {
		t.Fatalf("%d lists", len(good))
	}
	other := open(t, Config{Revocation: true}).state.Load().active
	list := func(by *authority, change func(*x509.RevocationList)) RevocationList {
		l := &x509.RevocationList{Number: big.NewInt(2), ThisUpdate: now.Add(-time.Hour), NextUpdate: by.cert.NotAfter.Add(listMargin)}
		change(l)
		der, err := x509.CreateRevocationList(rand.Reader, l, by.cert, by.key)
		if err != nil {
			t.Fatal(err)
		}
		return RevocationList{Issuer: a.cert.Raw, List: der}
	}
	alive := []Intermediate{{ID: a.id, LiveUntil: now.Add(time.Hour)}}
	for name, tt := range map[string]struct {
		lists []RevocationList
		alive []Intermediate
		want  string
	}{
		"good":         {good, alive, ""},
		"missing":      {nil, alive, "has no revocation list"},
		"one missing":  {good, append(alive, Intermediate{ID: "0123", LiveUntil: now.Add(time.Minute)}), "what intermediate 0123 signed may live until"},
		"not needed":   {good, append(alive, Intermediate{ID: "0123", LiveUntil: now.Add(-time.Minute)}), ""},
		"twice":        {append(slices.Clone(good), good...), alive, "two revocation lists"},
		"expired":      {[]RevocationList{list(a, func(l *x509.RevocationList) { l.NextUpdate = now.Add(-time.Second) })}, alive, "ends at"},
		"below budget": {[]RevocationList{list(a, func(l *x509.RevocationList) { l.NextUpdate = now.Add(23 * time.Hour) })}, alive, "an outage would have everybody refused"},
		"too early":    {[]RevocationList{list(a, func(l *x509.RevocationList) { l.ThisUpdate = now.Add(time.Hour) })}, alive, "is good from"},
		"of another":   {[]RevocationList{list(other, func(*x509.RevocationList) {})}, alive, "check the revocation list"},
		"garbage":      {[]RevocationList{{Issuer: a.cert.Raw, List: []byte("x")}}, alive, "read the revocation list"},
		"no issuer":    {[]RevocationList{{Issuer: []byte("x"), List: good[0].List}}, alive, "read the issuer"},
	} {
		err := checkLists(tt.lists, tt.alive, now)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Another issuer turns up that has none.
	_, before, sequence := f.BundleWithLists()
	if err := f.cfg.Store.PutIntermediates(t.Context(), now, Intermediate{ID: "0123", Instance: "below:x", LiveUntil: now.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	leaf, _, _ := f.issue(t, now, &Request{})
	_, err := f.Revoke(t.Context(), "test", "uid:0", func(*Leaf) bool { return true })
	if err == nil || !strings.Contains(err.Error(), "the revocation lists in force stay") {
		t.Errorf("revoked: %v", err)
	}
	_, after, again := f.BundleWithLists()
	if again != sequence || len(after) != len(before) || string(after[0].List) != string(before[0].List) {
		t.Error("the bundle has changed")
	}
	// It has ended: what could not be revoked can be now.
	if err := f.cfg.Store.PutIntermediates(t.Context(), now, Intermediate{ID: "0123", LiveUntil: now.Add(-time.Hour)}); err != nil {
		t.Fatal(err)
	}
	done, err := f.Revoke(t.Context(), "test", "uid:0", func(l *Leaf) bool { return new(big.Int).SetBytes(l.Serial[:]).Cmp(leaf.SerialNumber) == 0 })
	if err != nil || done.Count != 1 || done.Sequence != sequence+1 || done.Left != "" {
		t.Errorf("%+v, %v", done, err)
	}
	var v verifier
	v.take(t, f.CA)
	if err := v.accepts(now, leaf, a.cert); !errors.Is(err, errRevoked) {
		t.Errorf("accepted: %v", err)
	}
	records := f.records(t)
	i := slices.IndexFunc(records, func(r *ledgerv1.Record) bool { return r.GetEvent() == ledgerv1.Event_EVENT_REVOKED })
	if i < 0 || new(big.Int).SetBytes(records[i].GetCertificate().GetSerial()).Cmp(leaf.SerialNumber) != 0 || records[i].GetAuthority().GetId() != a.id ||
		records[i].GetActor() != "uid:0" || records[i].GetDetail() != "test" || records[i].GetSpiffeId() != leaf.URIs[0].String() {
		t.Errorf("record %d: %v", i, records[max(i, 0)])
	}
}

// Lists are switched on in a mesh that has none: they are in force when nothing lives
// any more whose issuer has none. Switched off, they are gone at once.
func TestV_L3_SwitchedOnAndOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{Store: &memoryStore{}, Keys: keys.Memory(), MaxTTL: 2 * time.Hour, DefaultTTL: time.Hour}
		f := open(t, cfg)
		cfg = f.cfg
		old, oldIssuer, _ := f.issue(t, time.Now(), &Request{TTL: 2 * time.Hour})
		cfg.Revocation = true
		run := func() (*fixture, func()) {
			f := open(t, cfg)
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = f.Run(ctx) })
			synctest.Wait()
			return f, func() { cancel(); running.Wait() }
		}
		f, stop := run()
		leaf, issuer, _ := f.issue(t, time.Now(), &Request{TTL: 2 * time.Hour})
		done, err := f.Revoke(t.Context(), "early", "", func(l *Leaf) bool { return true })
		if err != nil || done.Count != 1 || done.Sequence != 0 || !strings.Contains(done.Left, "nothing is revoked by lists yet") {
			t.Fatalf("%+v, %v", done, err)
		}
		if warning, failure := f.Health(time.Now()); failure != nil || warning == nil || !strings.Contains(warning.Error(), "has no revocation list") {
			t.Errorf("health: %v, %v", warning, failure)
		}
		var v verifier
		begun := time.Now()
		for v.take(t, f.CA); v.lists == nil; v.take(t, f.CA) {
			if err := v.accepts(time.Now(), leaf, issuer); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if time.Since(begun) > 3*time.Hour {
				t.Fatal("lists never come into force")
			}
		}
		if time.Now().Before(old.NotAfter) {
			t.Errorf("lists are in force %s after the start, while something lives whose issuer has none", time.Since(begun))
		}
		if v.accepts(time.Now().Add(-time.Hour), old, oldIssuer) == nil {
			t.Error("an issuer without a list is believed")
		}
		if warning, failure := f.Health(time.Now()); failure != nil || warning != nil {
			t.Errorf("health: %v, %v", warning, failure)
		}
		// Something was signed by a version of this program that knows no lists: the CA
		// starts, and nobody goes by lists until that has ended.
		stop()
		if err := cfg.Store.PutIntermediates(t.Context(), time.Now(), Intermediate{ID: "0123", Instance: cfg.Instance, LiveUntil: time.Now().Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		f, stop = run()
		if v.take(t, f.CA); v.lists != nil || !f.Signs(time.Now()) {
			t.Errorf("%d lists, signs: %v", len(v.lists), f.Signs(time.Now()))
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if v.take(t, f.CA); v.lists == nil {
			t.Error("lists are not in force again")
		}
		stop()
		cfg.Revocation = false
		sequence := v.sequence
		f, stop = run()
		defer stop()
		if v.take(t, f.CA); v.lists != nil || v.sequence <= sequence {
			t.Errorf("switched off: %d lists, sequence %d after %d", len(v.lists), v.sequence, sequence)
		}
	})
}

// After a restart nothing is signed for workloads until the proxies have the list of the
// new intermediate, or a minute is over; agents and the CA itself have their own at once.
func TestV_L3_RestartWaitsForTheProxies(t *testing.T) {
	for name, acknowledged := range map[string]bool{"acknowledged": true, "given up": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := new(fleet)
				nodes.acknowledge(1 << 20)
				cfg := Config{Store: &memoryStore{}, Keys: keys.Memory(), Revocation: true, Fleet: nodes.nodes}
				f := open(t, cfg)
				cfg = f.cfg
				cfg.Fleet = nodes.nodes
				nodes.acknowledge(f.state.Load().trust.Sequence)
				f = open(t, cfg)
				ctx, cancel := context.WithCancel(t.Context())
				var running sync.WaitGroup
				running.Go(func() { _ = f.Run(ctx) })
				defer func() { cancel(); running.Wait() }()
				synctest.Wait()
				sign := func(event ledgerv1.Event) error {
					_, err := f.Sign(time.Now(), &Request{ID: id("/a"), Key: parseKey(t, newKey(t)), Record: &ledgerv1.Record{Event: event}})
					return err
				}
				if err := sign(ledgerv1.Event_EVENT_ISSUE); !errors.Is(err, ErrNoAuthority) {
					t.Errorf("signed for a workload: %v", err)
				}
				if err := sign(ledgerv1.Event_EVENT_ATTEST); err != nil {
					t.Errorf("not signed for an agent: %v", err)
				}
				if _, err := f.ServerCertificate(); err != nil {
					t.Error(err)
				}
				warning, failure := f.Health(time.Now())
				if failure != nil || warning == nil || !strings.Contains(warning.Error(), "waiting for spiffe://example.org/meshid/node/test/a") {
					t.Errorf("health: %v, %v", warning, failure)
				}
				if acknowledged {
					nodes.acknowledge(f.state.Load().trust.Sequence)
					f.FleetChanged()
					time.Sleep(time.Second)
				} else {
					time.Sleep(restartWait - time.Second)
					if err := sign(ledgerv1.Event_EVENT_ISSUE); !errors.Is(err, ErrNoAuthority) {
						t.Errorf("signed too early: %v", err)
					}
					time.Sleep(2 * time.Second)
				}
				synctest.Wait()
				if err := sign(ledgerv1.Event_EVENT_ISSUE); err != nil {
					t.Errorf("not signed: %v", err)
				}
				if warning, failure := f.Health(time.Now()); failure != nil || warning != nil {
					t.Errorf("health: %v, %v", warning, failure)
				}
			})
		})
	}
}

// What an earlier process has revoked stays on its list; what it has not can be revoked
// only with all of its intermediate.
func TestV_L2_ListsOutliveTheProcess(t *testing.T) {
	cfg := Config{Store: &memoryStore{}, Keys: keys.Memory(), Revocation: true}
	f := open(t, cfg)
	cfg = f.cfg
	bad, issuer, _ := f.issue(t, time.Now(), &Request{})
	good, _, _ := f.issue(t, time.Now(), &Request{})
	if done, err := f.Revoke(t.Context(), "test", "", func(l *Leaf) bool { return string(l.Serial[:]) == string(bad.SerialNumber.FillBytes(make([]byte, 16))) }); err != nil || done.Count != 1 {
		t.Fatalf("%+v, %v", done, err)
	}
	f = open(t, cfg)
	var v verifier
	v.take(t, f.CA)
	if err := v.accepts(time.Now(), bad, issuer); !errors.Is(err, errRevoked) {
		t.Errorf("revoked: %v", err)
	}
	if err := v.accepts(time.Now(), good, issuer); err != nil {
		t.Errorf("the other: %v", err)
	}
	if done, err := f.Revoke(t.Context(), "test", "", func(*Leaf) bool { return true }); err != nil || done.Count != 0 {
		t.Errorf("%+v, %v", done, err)
	}
	bequeathed, err := f.Bequeathed(t.Context())
	if err != nil || len(bequeathed) != 1 || bequeathed[0].ID != authorityID(issuer) || len(bequeathed[0].Revoked) != 1 || !bequeathed[0].Revoked[[16]byte(bad.SerialNumber.FillBytes(make([]byte, 16)))] {
		t.Fatalf("%+v, %v", bequeathed, err)
	}
	if _, err := f.Abandon(t.Context(), f.state.Load().own()[0].id, "test", ""); err == nil {
		t.Error("an intermediate in use is abandoned")
	}
	if _, err := f.Abandon(t.Context(), bequeathed[0].ID, "test", ""); err != nil {
		t.Fatal(err)
	}
	v.take(t, f.CA)
	for _, leaf := range []*x509.Certificate{bad, good} {
		if v.accepts(time.Now(), leaf, issuer) == nil {
			t.Error("what an abandoned intermediate signed is believed")
		}
	}
	if bequeathed, err := f.Bequeathed(t.Context()); err != nil || len(bequeathed) != 0 {
		t.Errorf("%+v, %v", bequeathed, err)
	}
}

// Lists are bounded, and what does not fit is said.
func TestRevokeIsBounded(t *testing.T) {
	f := open(t, Config{Revocation: true})
	a := f.state.Load().active
	for i := range maxRevoked + 5 {
		leaf := Leaf{SPIFFEID: fmt.Sprintf("spiffe://example.org/%d", i), NotAfter: time.Now().Add(time.Hour).Unix()}
		newSerial(&leaf.Serial)
		a.listing.signed(leaf, time.Now().Unix())
	}
	done, err := f.Revoke(t.Context(), "test", "", func(*Leaf) bool { return true })
	if err != nil || done.Count != maxRevoked || !strings.Contains(done.Left, "is full: 5 of 10005 certificates are not on it") {
		t.Errorf("%+v, %v", done, err)
	}
	if _, lists, _ := f.BundleWithLists(); len(lists) != 1 || len(lists[0].List) > 600<<10 {
		t.Errorf("%d lists, %d bytes", len(lists), len(lists[0].List))
	}
	l := newListing()
	now := time.Now().Unix()
	for i := range 5000 {
		leaf := Leaf{NotAfter: now + int64(i/10)}
		newSerial(&leaf.Serial)
		l.signed(leaf, now+int64(i/10))
	}
	if n := len(l.leaves); n > 2048 {
		t.Errorf("%d are remembered, of which 10 live", n)
	}
}

// While the clock is not to be relied on, no list is signed: one from the future would
// have everybody refused.
func TestV_L3_NoListByAWrongClock(t *testing.T) {
	var wrong error
	f := open(t, Config{Revocation: true, Clock: func() error { return wrong }})
	f.issue(t, time.Now(), &Request{})
	wrong = errors.New("the clock was set")
	_, before, _ := f.BundleWithLists()
	if _, err := f.Revoke(t.Context(), "test", "", func(*Leaf) bool { return true }); !errors.Is(err, wrong) {
		t.Errorf("revoked: %v", err)
	}
	_, after, _ := f.BundleWithLists()
	if string(after[0].List) != string(before[0].List) {
		t.Error("there is a new list")
	}
}

func TestRevocationIsRefusedWithOthers(t *testing.T) {
	f := open(t, Config{Revocation: true})
	if _, err := f.SignDownstream(t.Context(), &Downstream{ID: "spiffe://example.org/below", Key: parseKey(t, newKey(t)), Life: time.Hour}); !errors.Is(err, ErrListsBelow) {
		t.Errorf("signed for a CA below: %v", err)
	}
	if _, err := tryOpen(t, Config{Revocation: true, Upstream: &Upstream{}}); err == nil || !strings.Contains(err.Error(), "need a root of this CA's own") {
		t.Errorf("with an upstream CA: %v", err)
	}
}
