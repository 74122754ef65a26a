package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	"github.com/meshid/meshid/test/identitytest"
)

// fleet is one node, which acknowledges what the test says.
type fleet struct {
	mu   sync.Mutex // guards what follows
	node rotation.Node
}

func (f *fleet) nodes() []rotation.Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []rotation.Node{f.node}
}

// acknowledge says that the node and its proxies have a bundle.
func (f *fleet) acknowledge(sequence uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.node = rotation.Node{ID: "spiffe://example.org/meshid/node/test/a", Connected: true, Sequence: sequence, AckSequence: sequence, Streams: 2, Acknowledged: 2, Counted: true}
}

// states returns those of the roots, in their order.
func states(t *testing.T, s Store) string {
	t.Helper()
	trust, err := s.Trust(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, r := range trust.Roots {
		state := r.State
		if r.Tainted && r.State != StateGone {
			state += "!" // tainted
		}
		all = append(all, state)
	}
	return strings.Join(all, " ")
}

func command(t *testing.T, c *CA, verb rotation.Verb, override bool) {
	t.Helper()
	if err := c.Command(t.Context(), rotation.Command{Verb: verb, Override: override}, "uid:0"); err != nil {
		t.Fatal(err)
	}
}

// A rotation from beginning to end: what was signed before and after verifies at
// each step, with the bundle of each step that proxies may have.
func TestRotateRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		var retired []string
		store := &memoryStore{}
		f := open(t, Config{Store: store, Fleet: nodes.nodes, OnRetiring: func(root string, _ bool) { retired = append(retired, root) }})
		f.run(t)
		first := f.Authorities()[0].ID
		oldLeaf, oldAbove, _ := f.issue(t, time.Now(), &Request{TTL: 20 * time.Hour})
		command(t, f.CA, rotation.VerbRotate, false)
		synctest.Wait()
		if got := states(t, store); got != "active prepared" {
			t.Fatal(got)
		}
		// The agent has it, a proxy does not: nothing signs with it, and it is named.
		nodes.acknowledge(2)
		nodes.mu.Lock()
		nodes.node.Acknowledged, nodes.node.Laggards = 1, []rotation.Laggard{{Name: "spiffe://example.org/web", Acknowledged: 1, Since: time.Now()}}
		nodes.mu.Unlock()
		f.FleetChanged()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := states(t, store); got != "active prepared" {
			t.Fatal(got)
		}
		if warning, _ := f.Health(time.Now()); warning == nil || !strings.Contains(warning.Error(), "spiffe://example.org/web has bundle 1") {
			t.Errorf("health: %v", warning)
		}
		if err := f.Command(t.Context(), rotation.Command{Verb: rotation.VerbActivate}, "uid:0"); !errors.Is(err, rotation.ErrRefused) {
			t.Errorf("activated before it is known: %v", err)
		}
		nodes.acknowledge(2)
		f.FleetChanged()
		synctest.Wait()
		if got := states(t, store); got != "retiring active" {
			t.Fatal(got)
		}
		if len(retired) != 1 || retired[0] != first {
			t.Errorf("told to renew what %v signed, want %s", retired, first)
		}
		newLeaf, newAbove, _ := f.issue(t, time.Now(), &Request{})
		for _, err := range []error{f.verify(time.Now(), oldLeaf, oldAbove), f.verify(time.Now(), newLeaf, newAbove)} {
			if err != nil {
				t.Error(err)
			}
		}
		if string(newAbove.AuthorityKeyId) == string(oldAbove.AuthorityKeyId) {
			t.Error("the old root signs")
		}
		// The old root stays until its last leaf has expired, over a restart too.
		nodes.acknowledge(2)
		for oldLeaf.NotAfter.After(time.Now()) {
			if got := states(t, store); got != "retiring active" {
				t.Fatalf("%s before the last leaf expired: %s", time.Until(oldLeaf.NotAfter), got)
			}
			time.Sleep(time.Hour)
		}
		time.Sleep(2 * DefaultMaxTTL)
		synctest.Wait()
		if got := states(t, store); got != "gone active" {
			t.Error(got)
		}
		if roots, sequence := f.Bundle(); len(roots) != 1 || sequence != 3 {
			t.Errorf("%d roots at sequence %d", len(roots), sequence)
		}
		var bundles []string
		for _, r := range f.records(t) {
			if r.GetEvent() == ledgerv1.Event_EVENT_BUNDLE {
				bundles = append(bundles, fmt.Sprint(r.GetBundle().GetSequence(), len(r.GetBundle().GetRoots()), r.GetActor()))
			}
		}
		if want := []string{"1 1", "2 2uid:0", "3 1"}; !slices.Equal(bundles, want) {
			t.Errorf("bundles in the ledger: %q, want %q", bundles, want)
		}
	})
}

// The horizon is not forgotten when the CA restarts, and a restart with the same
// store and keys goes on where the rotation was.
func TestRotateRootOverRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		store, keyStore := &memoryStore{}, keys.Memory()
		cfg := Config{Store: store, Keys: keyStore, Fleet: nodes.nodes}
		start := func() (*fixture, func()) {
			f := open(t, cfg)
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = f.Run(ctx) })
			synctest.Wait()
			return f, func() { cancel(); running.Wait() }
		}
		f, stop := start()
		leaf, _, _ := f.issue(t, time.Now(), &Request{TTL: 24 * time.Hour})
		command(t, f.CA, rotation.VerbRotate, false)
		stop()
		nodes.acknowledge(2)
		f, stop = start()
		if got := states(t, store); got != "retiring active" {
			t.Fatal(got)
		}
		for leaf.NotAfter.After(time.Now()) {
			time.Sleep(3 * time.Hour)
			stop()
			f, stop = start()
			if got := states(t, store); got != "retiring active" && leaf.NotAfter.After(time.Now()) {
				t.Fatalf("%s before the last leaf expired: %s", time.Until(leaf.NotAfter), got)
			}
		}
		time.Sleep(DefaultIntermediateLife)
		synctest.Wait()
		if got := states(t, store); got != "gone active" {
			t.Error(got)
		}
		if _, failure := f.Health(time.Now()); failure != nil {
			t.Error(failure)
		}
		stop()
	})
}

// Two CAs of one store rotate at once: one root is made, and both sign with it.
func TestFault_F21_TwoRotateAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		store, keyStore := &memoryStore{}, keys.Memory()
		a := open(t, Config{Store: store, Keys: keyStore, Fleet: nodes.nodes, Instance: "a"})
		b := open(t, Config{Store: store, Keys: keyStore, Fleet: nodes.nodes, Instance: "b"})
		a.run(t)
		b.run(t)
		refused := make(chan error, 2)
		var both sync.WaitGroup
		for _, c := range []*fixture{a, b} {
			both.Go(func() {
				refused <- c.Command(t.Context(), rotation.Command{Verb: rotation.VerbRotate}, "uid:0")
			})
		}
		both.Wait()
		if one, two := <-refused, <-refused; (one == nil) == (two == nil) {
			t.Errorf("one is to win: %v, %v", one, two)
		}
		if got := states(t, store); got != "active prepared" {
			t.Fatal(got)
		}
		nodes.acknowledge(2)
		time.Sleep(2 * longestNap)
		synctest.Wait()
		if got := states(t, store); got != "retiring active" {
			t.Fatal(got)
		}
		aRoots, aSequence := a.Bundle()
		bRoots, bSequence := b.Bundle()
		if aSequence != bSequence || len(aRoots) != 2 || len(bRoots) != 2 {
			t.Errorf("bundles %d and %d", aSequence, bSequence)
		}
		for _, c := range []*fixture{a, b} {
			_, above, _ := c.issue(t, time.Now(), &Request{})
			if err := above.CheckSignatureFrom(aRoots[1]); err != nil {
				t.Errorf("%s does not sign with the new root: %v", c.cfg.Instance, err)
			}
		}
	})
}

// Killed or failing at each write of a rotation, before and after it was done: the
// next process goes on, nothing is done twice, and all that was issued verifies.
func TestFault_F23_KilledAtEachStep(t *testing.T) {
	for _, after := range []bool{false, true} {
		for write := range 12 {
			t.Run(fmt.Sprintf("write %d after %v", write, after), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { killedAt(t, write, after) })
			})
		}
	}
}

// killer is a store in which one write fails, and all after it: the process is as
// good as dead.
type killer struct {
	*memoryStore
	mu    sync.Mutex // guards left
	left  int
	after bool
}

var errKilled = errors.New("killed")

// dies reports whether this write is the last, and whether it is done.
func (k *killer) dies() (dead, done bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.left--
	return k.left < 0, k.left >= 0 || k.left == -1 && k.after
}

func (k *killer) ChangeTrust(ctx context.Context, t Trust, record func(Trust) error) (next Trust, err error) {
	dead, done := k.dies()
	if done {
		next, err = k.memoryStore.ChangeTrust(ctx, t, record)
	}
	if dead {
		return Trust{}, errKilled
	}
	return next, err
}

func (k *killer) PutIntermediates(ctx context.Context, now time.Time, changed ...Intermediate) (err error) {
	dead, done := k.dies()
	if done {
		err = k.memoryStore.PutIntermediates(ctx, now, changed...)
	}
	if dead {
		return errKilled
	}
	return err
}

func killedAt(t *testing.T, write int, after bool) {
	nodes := &fleet{}
	nodes.acknowledge(1)
	store, keyStore := &memoryStore{}, keys.Memory()
	cfg := Config{Store: store, Keys: keyStore, Fleet: nodes.nodes}
	f := open(t, cfg)
	leaf, above, _ := f.issue(t, time.Now(), &Request{TTL: 24 * time.Hour})
	dying := cfg
	dying.Store = &killer{memoryStore: store, left: write, after: after}
	if f, err := tryOpen(t, dying); err == nil {
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		_ = f.Command(t.Context(), rotation.Command{Verb: rotation.VerbRotate}, "uid:0") // it may be dead already
		synctest.Wait()
		_, sequence := f.Bundle()
		nodes.acknowledge(sequence)
		f.FleetChanged()
		time.Sleep(time.Minute)
		synctest.Wait()
		if err := f.verify(time.Now(), leaf, above); err != nil {
			t.Error(err)
		}
		cancel()
		running.Wait()
	}
	// Another process goes on, and whatever was left is finished.
	g := open(t, cfg)
	g.run(t)
	if err := g.verify(time.Now(), leaf, above); err != nil {
		t.Error(err)
	}
	if len(g.state.Load().roots) == 1 {
		command(t, g.CA, rotation.VerbRotate, false)
	}
	for range 50 {
		_, sequence := g.Bundle()
		nodes.acknowledge(sequence)
		time.Sleep(time.Hour)
		synctest.Wait()
		next, nextAbove, _ := g.issue(t, time.Now(), &Request{})
		if err := g.verify(time.Now(), next, nextAbove); err != nil {
			t.Error(err)
		}
		if leaf.NotAfter.After(time.Now()) {
			if err := g.verify(time.Now(), leaf, above); err != nil {
				t.Error(err)
			}
		}
		if n := len(g.state.Load().roots); n > 2 {
			t.Fatalf("%d roots: the rotation was begun twice", n)
		}
	}
	if n := len(g.state.Load().roots); n != 1 {
		t.Errorf("%d roots are left: %s", n, states(t, store))
	}
}

// The operator may decide that somebody is cut off; the ledger says who did.
func TestOverrideIsRecorded(t *testing.T) {
	nodes := &fleet{}
	nodes.acknowledge(1)
	f := open(t, Config{Fleet: nodes.nodes})
	command(t, f.CA, rotation.VerbPrepare, false)
	command(t, f.CA, rotation.VerbActivate, true)
	for _, r := range f.records(t) {
		if strings.HasPrefix(r.GetDetail(), "override: 1 nodes have not acknowledged") && r.GetActor() == "uid:0" && r.GetAuthority().GetState() == StateActive {
			return
		}
	}
	t.Error("the override is not in the ledger")
}

// A CA stands still in the middle of a rotation, and another one finishes it: what
// the first one does after it wakes is refused by the store, and it goes on from
// what is there.
func TestFault_F22_LateStepIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		store, keyStore := &memoryStore{}, keys.Memory()
		a := open(t, Config{Store: store, Keys: keyStore, Fleet: nodes.nodes, Instance: "a"})
		late := open(t, Config{Store: store, Keys: keyStore, Fleet: nodes.nodes, Instance: "late"})
		command(t, a.CA, rotation.VerbPrepare, false)
		now := time.Now()
		late.mu.Lock()
		_, err := late.refresh(t.Context(), now)
		late.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		decided := late.state.Load()
		command(t, a.CA, rotation.VerbActivate, true)
		_, before := a.Bundle()
		// It wakes with what it had decided.
		step, err := rotation.Do(decided.rotationTrust(), rotation.Inputs{Now: now}, rotation.Command{Verb: rotation.VerbRollback})
		if err != nil {
			t.Fatal(err)
		}
		late.mu.Lock()
		err = late.take(t.Context(), now, step, nil, "")
		late.mu.Unlock()
		if !errors.Is(err, ErrTrustChanged) {
			t.Fatalf("a late step: %v", err)
		}
		if got := states(t, store); got != "retiring active" {
			t.Fatal(got)
		}
		nodes.acknowledge(before)
		late.run(t)
		time.Sleep(2 * longestNap)
		synctest.Wait()
		if _, after := late.Bundle(); after != before || late.state.Load().signer.id != a.state.Load().signer.id {
			t.Errorf("bundle %d, then %d", before, after)
		}
		// Its own journal says what it decides by, though another one changed it.
		var recorded []string
		for _, r := range late.records(t) {
			if r.GetDetail() == "changed by another CA" {
				recorded = append(recorded, fmt.Sprintf("%s %s %d", r.GetEvent(), r.GetAuthority().GetState(), len(r.GetBundle().GetRoots())))
			}
		}
		want := []string{"EVENT_AUTHORITY prepared 0", "EVENT_BUNDLE active 2", "EVENT_AUTHORITY retiring 0", "EVENT_AUTHORITY active 0"}
		if !slices.Equal(recorded, want) {
			t.Errorf("recorded %q, want %q", recorded, want)
		}
	})
}

// A store that was restored from a backup never takes the bundle back: what is in
// force stays, and health says what has happened.
func TestV_L8_RestoredStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := &fleet{}
		nodes.acknowledge(1)
		store := &memoryStore{}
		f := open(t, Config{Store: store, Fleet: nodes.nodes})
		backup := store.trust()
		command(t, f.CA, rotation.VerbPrepare, false)
		_, before := f.Bundle()
		f.run(t)
		synctest.Wait()
		store.mu.Lock()
		store.roots, store.sequence, store.epoch = backup.Roots, backup.Sequence, backup.Epoch
		store.mu.Unlock()
		time.Sleep(2 * longestNap)
		synctest.Wait()
		if roots, after := f.Bundle(); after != before || len(roots) != 2 {
			t.Errorf("%d roots at sequence %d, it was %d", len(roots), after, before)
		}
		if warning, _ := f.Health(time.Now()); warning == nil || !strings.Contains(warning.Error(), "restored from a backup") {
			t.Errorf("health: %v", warning)
		}
		if err := f.Command(t.Context(), rotation.Command{Verb: rotation.VerbRollback}, "uid:0"); err == nil {
			t.Error("a step was taken on a restored store")
		}
	})
}

// The metrics say how many nodes still hold something of a root of each state: a node
// that has not counted may, one that is gone does not.
func TestHoldersMetrics(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	m, err := newMetrics(reg)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	s := &state{roots: []*root{{id: "new", state: StateActive}, {id: "old", state: StateRetiring}, {id: "bad", state: StateRetiring, tainted: true}}}
	in := rotation.Inputs{Now: now, Nodes: []rotation.Node{
		{ID: "a", Connected: true, Counted: true, Held: map[string]uint32{"new": 2, "old": 3}},
		{ID: "b", Connected: true, Counted: true, Held: map[string]uint32{"new": 1}},
		{ID: "away", Lease: now.Add(time.Hour)},
		{ID: "gone", Lease: now.Add(-time.Hour), Held: map[string]uint32{"bad": 9}},
	}}
	check := func(when string, want map[string][2]float64) {
		t.Helper()
		for state, n := range want {
			state, tainted := strings.CutSuffix(state, "!")
			labels := []string{state, strconv.FormatBool(tainted)}
			holders := identitytest.Metric(t, reg, "meshid_ca_bundle_trust_holders", labels...)
			if svids := identitytest.Metric(t, reg, "meshid_ca_root_svids", labels...); holders != n[0] || svids != n[1] {
				t.Errorf("%s: %v nodes hold %v X.509-SVIDs of a root that is %s, want %v", when, holders, svids, labels, n)
			}
		}
	}
	check("at the start", map[string][2]float64{StateActive: {}, StateRetiring: {}, StateRetiring + "!": {}, StateActive + "!": {}, StatePrepared: {}})
	m.observeFleet(in, s)
	check("with two old roots", map[string][2]float64{StateActive: {3, 3}, StateRetiring: {2, 3}, StateRetiring + "!": {1, 0}, StatePrepared: {}})
	in.Nodes[0].Held, in.Nodes[2] = map[string]uint32{"new": 5}, in.Nodes[3]
	s.roots = s.roots[:2]
	m.observeFleet(in, s)
	check("when they were let go", map[string][2]float64{StateActive: {2, 6}, StateRetiring: {}, StateRetiring + "!": {}, StateActive + "!": {}})
}
