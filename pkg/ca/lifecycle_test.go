package ca

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/pkg/ca/rotation"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Weeks of life: always able to sign, no leaf outlives its issuer, every leaf
// verifies for all of its life against a bundle that never changes.
func TestWeeksOfRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := open(t, Config{IntermediateLife: 3 * 24 * time.Hour, MaxTTL: 24 * time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := f.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		roots, sequence := f.Bundle()
		key := parseKey(t, newKey(t))
		issuers := map[string]bool{}
		for i := range 21 * 24 / 3 {
			now := time.Now()
			ttl := []time.Duration{0, 10 * time.Second, 24 * time.Hour, 7 * time.Hour, time.Minute}[i%5]
			leaf, intermediate, signed := f.issue(t, now, &Request{Key: key, TTL: ttl})
			issuers[string(intermediate.Raw)] = true
			if !leaf.NotAfter.Before(intermediate.NotAfter) || leaf.NotBefore.Before(intermediate.NotBefore) {
				t.Fatalf("leaf %s to %s, issuer %s to %s", leaf.NotBefore, leaf.NotAfter, intermediate.NotBefore, intermediate.NotAfter)
			}
			instants := []time.Time{now}
			if i%8 == 0 {
				instants = []time.Time{leaf.NotBefore, leaf.NotAfter}
			}
			for _, at := range instants {
				if err := f.verify(at, leaf, intermediate); err != nil {
					t.Fatalf("%s: %v", at, err)
				}
			}
			life := signed.NotAfter.Sub(now)
			if early, late := now.Add(life*35/100), now.Add(life*65/100); signed.RenewAt.Before(early) || signed.RenewAt.After(late) {
				t.Fatalf("renew at %s, not between %s and %s", signed.RenewAt, early, late)
			}
			if _, err := f.ServerCertificate(); err != nil {
				t.Fatal(err)
			}
			if warning, failure := f.Health(now); warning != nil || failure != nil {
				t.Fatal(warning, failure)
			}
			if n := len(f.Authorities()); n > 3 {
				t.Fatalf("%d authorities", n)
			}
			time.Sleep(3 * time.Hour)
		}
		if n := len(issuers); n < 13 || n > 15 {
			t.Errorf("%d intermediates in three weeks, want one each 36 hours", n)
		}
		if after, s := f.Bundle(); s != sequence || !after[0].Equal(roots[0]) || len(after) != 1 {
			t.Error("the bundle changed")
		}
		if n := counter(t, f, "meshid_ca_svid_ttl_shrunk_total", "authority_expiry"); n != 0 {
			t.Errorf("%v lives shrunk", n)
		}
		states := map[string]int{}
		for _, r := range f.records(t) {
			if r.Event == ledgerv1.Event_EVENT_AUTHORITY {
				states[r.Authority.Role+" "+r.Authority.State]++
			}
		}
		n := states["intermediate active"]
		if n < len(issuers) || states["intermediate retiring"] != n-1 || states["intermediate gone"] < n-2 {
			t.Errorf("recorded %v", states)
		}
		cancel()
		running.Wait()
	})
}

// Row B7: towards the end of the root lives shrink visibly, then Sign refuses.
func TestV_B7_EndOfTheRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := open(t, Config{RootLife: 48 * time.Hour, IntermediateLife: 12 * time.Hour, MaxTTL: 4 * time.Hour, DefaultTTL: 4 * time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		if err := f.Command(t.Context(), rotation.Command{Verb: rotation.VerbPause}, "uid:0"); err != nil {
			t.Fatal(err)
		}
		roots, _ := f.Bundle()
		end := roots[0].NotAfter
		key := parseKey(t, newKey(t))
		refused, signatures := 0, 0
		for time.Now().Before(end) {
			now := time.Now()
			signed, err := f.Sign(now, &Request{ID: id("/a"), Key: key})
			switch {
			case errors.Is(err, ErrNoAuthority):
				refused++
				if end.Sub(now) > 3*time.Minute {
					t.Fatalf("refused %s before the end: %v", end.Sub(now), err)
				}
				if !strings.Contains(err.Error(), "new root") {
					t.Errorf("no advice in %q", err)
				}
			case err != nil:
				t.Fatal(err)
			case refused > 0:
				t.Fatal("signed after a refusal")
			default:
				signatures++
				if !signed.NotAfter.Before(end) || signed.NotAfter.Sub(now) < minRemaining {
					t.Fatalf("at %s: until %s, root until %s", now, signed.NotAfter, end)
				}
				want := now.Add(4 * time.Hour).Truncate(time.Second)
				if last := end.Add(-5 * time.Minute); want.After(last) {
					want = last
				}
				if signed.NotAfter.Before(want) {
					t.Fatalf("shrunk to %s without need, %s before the end", signed.NotAfter.Sub(now), end.Sub(now))
				}
			}
			step := 30 * time.Minute
			if end.Sub(now) < 45*time.Minute {
				step = 20 * time.Second
			}
			time.Sleep(step)
		}
		if refused == 0 || signatures == 0 {
			t.Errorf("%d refused, %d signed", refused, signatures)
		}
		if counter(t, f, "meshid_ca_svid_ttl_shrunk_total", "authority_expiry") == 0 {
			t.Error("shrunk without a trace")
		}
		if counter(t, f, "meshid_ca_sign_refused_total", "authority") != float64(refused) {
			t.Error("refusals not counted")
		}
		if warning, failure := f.Health(time.Now()); warning == nil || failure == nil {
			t.Error("healthy with an expired root")
		}
		cancel()
		running.Wait()
	})
}

// Deadlines are wall-clock times: maintain is told a time, as after a sleep.
func TestClockJumps(t *testing.T) {
	f := open(t, Config{})
	ctx := t.Context()
	start := time.Now()
	key := parseKey(t, newKey(t))
	sign := func(now time.Time) error {
		_, err := f.Sign(now, &Request{ID: id("/a"), Key: key})
		return err
	}
	for _, step := range []struct {
		name    string
		at      time.Duration
		rotates bool
	}{
		{"nothing to do", time.Minute, false},
		{"asleep beyond half life", 4 * 24 * time.Hour, true},
		{"asleep beyond the end", 60 * 24 * time.Hour, true},
		{"a year ahead", 365 * 24 * time.Hour, true},
		{"and back", 24 * time.Hour, true},
		{"an hour back", 23 * time.Hour, true},
		{"some minutes back", 23*time.Hour - 5*time.Minute, false},
	} {
		now := start.Add(step.at)
		before := f.Authorities()[1].ID
		nap := f.maintain(ctx, now)
		if rotated := f.Authorities()[1].ID != before; rotated != step.rotates {
			t.Errorf("%s: rotated %v", step.name, rotated)
		}
		if nap <= 0 || nap > longestNap {
			t.Errorf("%s: nap %s", step.name, nap)
		}
		if err := sign(now); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
	}
	// Before the root there is nothing to sign with, and it says so.
	now := start.Add(-24 * time.Hour)
	f.maintain(ctx, now)
	if err := sign(now); !errors.Is(err, ErrNoAuthority) || !strings.Contains(err.Error(), "clock") {
		t.Errorf("before the root: %v", err)
	}
	// Back in the present it recovers by itself.
	f.maintain(ctx, start)
	if err := sign(start); err != nil {
		t.Error(err)
	}
}

func TestRotationWithoutLedger(t *testing.T) {
	changes := 0
	f := open(t, Config{OnChange: func() { changes++ }})
	if err := f.cfg.Ledger.Close(); err != nil {
		t.Fatal(err)
	}
	before := f.Authorities()
	if _, err := f.RotateIntermediate(t.Context()); err == nil {
		t.Fatal("rotated without a record")
	}
	due := time.Now().Add(4 * 24 * time.Hour)
	for range 5 {
		if nap := f.maintain(t.Context(), due); nap <= 0 || nap > longestRetry {
			t.Fatalf("retry after %s", nap)
		}
	}
	if warning, _ := f.Health(due); warning == nil {
		t.Error("the failed renewal does not show")
	}
	if counter(t, f, "meshid_ca_intermediate_rotations_total", "failure") != 1 {
		t.Error("one failure, then the retry has to wait")
	}
	after := f.Authorities()
	if len(after) != len(before) || after[1].ID != before[1].ID || changes != 0 {
		t.Error("an authority that is not recorded is in place")
	}
}

func TestRotateIntermediate(t *testing.T) {
	changes := make(chan struct{}, 10)
	f := open(t, Config{OnChange: func() { changes <- struct{}{} }})
	old := f.Authorities()[1]
	serverBefore, err := f.ServerCertificate()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	leaf, intermediate, _ := f.issue(t, now, &Request{})
	fresh, err := f.RotateIntermediate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	<-changes
	all := f.Authorities()
	if len(all) != 3 || all[1].ID != fresh.ID || fresh.ID == old.ID || all[2].ID != old.ID || all[2].State != StateRetiring {
		t.Fatalf("authorities %v", all)
	}
	if err := f.verify(now, leaf, intermediate); err != nil {
		t.Errorf("the old leaf: %v", err)
	}
	if serverAfter, err := f.ServerCertificate(); err != nil || serverAfter == serverBefore {
		t.Errorf("the server's certificate is still the old one (%v)", err)
	}
	// The key of the retiring one is refused too.
	if _, taken := f.state.Load().keys[f.state.Load().retiring[0].spkiHash]; !taken {
		t.Error("the retiring authority's key is free to take")
	}
	for range maxRetiring + 5 {
		if _, err := f.RotateIntermediate(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-changes
	}
	if n := len(f.Authorities()); n != maxRetiring+2 {
		t.Errorf("%d authorities kept", n)
	}
}

// Rows F44 and F68 of the fault suite: what has expired or is damaged is
// replaced without anybody's help.
func TestFault_F44_OwnCertificateExpired(t *testing.T) {
	f := open(t, Config{})
	now := time.Now().Add(36 * time.Hour)
	if before := f.own.Load(); before.usable(now) {
		t.Fatal("still valid")
	}
	f.maintain(t.Context(), now)
	if after := f.own.Load(); !after.usable(now) {
		t.Fatal("not replaced")
	}
}

func TestFault_F68_DamagedKeyIsReplaced(t *testing.T) {
	f := open(t, Config{})
	s := *f.state.Load()
	damaged := *s.active.key.(*ecdsa.PrivateKey)
	other := newKey(t)
	damaged.D, damaged.PublicKey = other.D, other.PublicKey //nolint:staticcheck // what a damaged key is
	a := &authority{
		id: s.active.id, cert: s.active.cert, root: s.active.root, spkiHash: s.active.spkiHash,
		notBefore: s.active.notBefore, notAfter: s.active.notAfter, leafEnd: s.active.leafEnd, renewAt: s.active.renewAt,
		key: &damaged, scheme: s.active.scheme, template: s.active.template, record: s.active.record,
	}
	s.active = a
	f.setState(&s)
	now := time.Now()
	request := &Request{ID: id("/a"), Key: parseKey(t, newKey(t))}
	if _, err := f.Sign(now, request); !errors.Is(err, errBadSignature) || !errors.Is(err, errNotMeant) {
		t.Fatalf("released a signature of another key: %v", err)
	}
	if counter(t, f, "meshid_ca_sign_refused_total", "self_check") != 1 {
		t.Error("not counted")
	}
	select {
	case <-f.kick:
	default:
		t.Error("Run is not woken")
	}
	f.maintain(t.Context(), now)
	if _, err := f.Sign(now, request); err != nil {
		t.Errorf("after the replacement: %v", err)
	}
}
