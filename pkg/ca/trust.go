package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// How the roots change. What is to happen, package rotation decides; here it is
// carried out, each step in one transaction of the store:
//
//  1. what others have changed is taken over
//  2. the state machine is asked, with what the nodes have acknowledged
//  3. keys that the step needs are made, or opened and checked
//  4. the step is recorded in the ledger and stored, if nobody was quicker
//  5. it is in force: the bundle goes to the agents, the signer changes
//  6. once an intermediate of the new root signs, the nodes are told to renew
//
// A process that is killed at any point goes on at 1: the steps that were stored
// are in force, and the others are not.

// ErrTrustChanged is wrapped by Store.ChangeTrust's error when another CA has
// changed the roots since they were read.
var ErrTrustChanged = errors.New("the roots were changed by another CA")

// Trust is what the store keeps of the roots.
type Trust struct {
	// Roots are all that there were, in the order in which they were added.
	Roots []Root
	// Sequence is that of the bundle that they make up: it grows with each change
	// of the bundle and is never 0 once there is a root.
	Sequence uint64
	// Epoch grows with each change of anything here.
	Epoch uint64
	// Paused: nothing happens by itself.
	Paused bool
	// Lists are the revocation lists of the intermediates; none unless the CA
	// revokes by lists.
	Lists []RevocationList
	// Listed: Lists are part of the bundle, and proxies go by them.
	Listed bool
}

// RevocationList says which certificates of an intermediate are refused.
type RevocationList struct {
	// Issuer is the intermediate, List its list; both are DER and not modified.
	Issuer, List []byte
}

// ListsInForce returns the lists that are part of the bundle.
func (t Trust) ListsInForce() []RevocationList {
	if !t.Listed {
		return nil
	}
	return t.Lists
}

// SameLists says whether the same lists are part of two bundles.
func (t Trust) SameLists(other Trust) bool {
	return slices.EqualFunc(t.ListsInForce(), other.ListsInForce(), func(a, b RevocationList) bool {
		return bytes.Equal(a.Issuer, b.Issuer) && bytes.Equal(a.List, b.List)
	})
}

// Bundle returns the certificates of the roots that are in the bundle.
func (t Trust) Bundle() [][]byte {
	var all [][]byte
	for _, r := range t.Roots {
		if r.State != StateGone {
			all = append(all, r.Certificate)
		}
	}
	return all
}

// Intermediate is what the store keeps of one.
type Intermediate struct {
	// ID is its own, Root that of the root it chains to.
	ID, Root string
	// Instance is the CA process that made it.
	Instance string
	// LiveUntil is the end of the last that it has signed, or may still sign.
	LiveUntil time.Time
}

// Store keeps the roots of the trust domain. It is shared by all CAs of the
// trust domain, and durable: what was changed is seen by all who read after it.
// It may be called concurrently.
type Store interface {
	// Trust returns all roots.
	Trust(ctx context.Context) (Trust, error)
	// ChangeTrust replaces what Trust returns by t, if its epoch is still that of
	// t, and returns what is stored then: the epoch is greater by one, so is the
	// sequence if the bundle has changed, and a root without a sequence has that of
	// the bundle. Of several CAs that read the same epoch one succeeds; the error of
	// the others wraps ErrTrustChanged. record is called with the result before it
	// is committed, and nothing is changed if it fails.
	ChangeTrust(ctx context.Context, t Trust, record func(Trust) error) (Trust, error)
	// Intermediates returns those of which something may live.
	Intermediates(ctx context.Context) ([]Intermediate, error)
	// PutIntermediates adds or replaces intermediates, and forgets those of which
	// nothing lives at now.
	PutIntermediates(ctx context.Context, now time.Time, changed ...Intermediate) error
}

// Intermediates returns those of all CAs of the trust domain of which something may
// live.
func (c *CA) Intermediates(ctx context.Context) ([]Intermediate, error) {
	return c.cfg.Store.Intermediates(ctx)
}

const (
	// maxSteps bounds those that are taken at once.
	maxSteps = 8
	// drain is how long a tainted root stays after the last X.509-SVID that chains
	// to it was replaced.
	drain = 30 * time.Second
	// stalledAfter is how long proxies may take to acknowledge a bundle.
	stalledAfter = 5 * time.Minute
	// storeTimeout bounds one question to the store.
	storeTimeout = 10 * time.Second
)

func (c *CA) policy() rotation.Policy {
	return rotation.Policy{
		RootLife: c.cfg.RootLife, IntermediateLife: c.cfg.IntermediateLife, Drain: drain, StalledAfter: stalledAfter,
	}
}

// rotationTrust is what the state machine knows of the roots.
func (s *state) rotationTrust() rotation.Trust {
	t := rotation.Trust{Paused: s.trust.Paused}
	for _, r := range s.roots {
		t.Roots = append(t.Roots, rotation.Root{
			ID: r.id, State: rotation.State(r.state), Since: r.since, Sequence: r.sequence, NotAfter: r.cert.NotAfter,
			Foreign: r.foreign, Automatic: r.automatic, Tainted: r.tainted,
		})
	}
	return t
}

// inputs are what the state machine has to know at now. The caller holds mu.
func (c *CA) inputs(ctx context.Context, now time.Time, s *state) (rotation.Inputs, error) {
	in := rotation.Inputs{Now: now, Horizons: make(map[string]time.Time), Drained: make(map[string]time.Time), Policy: c.policy()}
	if c.cfg.Fleet != nil {
		in.Nodes = c.cfg.Fleet()
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	intermediates, err := c.cfg.Store.Intermediates(ctx)
	if err != nil {
		return in, err
	}
	for _, i := range intermediates {
		if i.LiveUntil.After(in.Horizons[i.Root]) {
			in.Horizons[i.Root] = i.LiveUntil
		}
	}
	waitBelow(in.Nodes, intermediates)
	for _, r := range s.roots {
		if r.state != StateRetiring || !drained(in, r.id) {
			delete(c.drained, r.id)
			continue
		}
		if _, ok := c.drained[r.id]; !ok {
			c.drained[r.id] = now
		}
		in.Drained[r.id] = c.drained[r.id]
	}
	c.metrics.observeFleet(in, s)
	return in, nil
}

// drained says whether every live node is known to have nothing that chains to
// the root.
func drained(in rotation.Inputs, id string) bool {
	return len(rotation.Holders(in, id)) == 0
}

// advance takes the steps that are due. The caller holds mu.
func (c *CA) advance(ctx context.Context, now time.Time) (changed bool, err error) {
	for range maxSteps {
		adopted, err := c.refresh(ctx, now)
		changed = changed || adopted
		if err != nil {
			return changed, err
		}
		s := c.state.Load()
		in, err := c.inputs(ctx, now, s)
		if err != nil {
			return changed, err
		}
		t := s.rotationTrust()
		c.stalled.Store(new(rotation.Stalled(t, in)))
		step := rotation.Next(t, in)
		if step == nil {
			c.nextStep = rotation.UntilDue(t, in)
			return changed, nil
		}
		err = c.take(ctx, now, step, nil, "")
		switch {
		case errors.Is(err, ErrTrustChanged): // another CA was quicker: look again
		case err != nil:
			return changed, err
		default:
			changed = true
		}
	}
	c.nextStep = now
	return changed, nil
}

// refresh takes over what other CAs have changed. The caller holds mu.
func (c *CA) refresh(ctx context.Context, now time.Time) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	t, err := c.cfg.Store.Trust(ctx)
	if err != nil {
		return false, fmt.Errorf("read the roots: %w", err)
	}
	s := c.state.Load()
	if t.Epoch == s.trust.Epoch {
		return false, nil
	}
	if t.Epoch < s.trust.Epoch || t.Sequence < s.trust.Sequence {
		return false, fmt.Errorf("the store is at epoch %d of the roots, and %d was there before: was it restored from a backup? Stop the CA, and restore its newest state", t.Epoch, s.trust.Epoch)
	}
	// This CA's journal says under which roots it decides, whoever changed them.
	if err := c.recordStep(ctx, now, s.trust, t, &rotation.Step{Why: "changed by another CA"}, ""); err != nil {
		return false, err
	}
	if err := c.adopt(ctx, now, t, nil); err != nil {
		return false, err
	}
	c.log.InfoContext(ctx, "roots changed by another ca are in force", "epoch", t.Epoch, "sequence", t.Sequence)
	return true, nil
}

// adopt puts what the store has into force. known has keys that are open already.
// The caller holds mu.
func (c *CA) adopt(ctx context.Context, now time.Time, t Trust, known []*root) error {
	s := *c.state.Load()
	next, err := c.parseTrust(ctx, now, t, append(known, s.roots...))
	if err != nil {
		return err
	}
	for _, r := range next.roots {
		i := slices.IndexFunc(s.roots, func(o *root) bool { return o.id == r.id })
		if r.state == StateRetiring && (i < 0 || s.roots[i].state != StateRetiring || s.roots[i].tainted != r.tainted) {
			c.renewals = append(c.renewals, r.id)
		}
	}
	next.active, next.retiring, next.next = s.active, s.retiring, s.next
	c.setState(next)
	return nil
}

// take carries out one step. foreign is the certificate of a root of the upstream
// CA that the step prepares; nil has one of our own made. The caller holds mu.
func (c *CA) take(ctx context.Context, now time.Time, step *rotation.Step, foreign *x509.Certificate, actor string) error {
	s := c.state.Load()
	t := s.trust
	t.Paused = (t.Paused || step.Pause) && !step.Resume
	t.Roots = slices.Clone(t.Roots)
	var known []*root
	for _, m := range step.Moves {
		i := slices.IndexFunc(s.roots, func(r *root) bool { return r.id == m.ID })
		if i < 0 {
			return fmt.Errorf("root %s is not there", m.ID)
		}
		r := *s.roots[i]
		if m.To == rotation.Active && !r.foreign && r.key == nil {
			// A key that cannot be had is found before anything depends on it.
			if err := c.unlock(ctx, &r, r.reference, now); err != nil {
				return fmt.Errorf("root %s: %w", r.id, err)
			}
			known = append(known, &r)
		}
		stored := &t.Roots[slices.IndexFunc(t.Roots, func(o Root) bool { return bytes.Equal(o.Certificate, r.cert.Raw) })]
		if stored.State != string(m.To) {
			stored.State, stored.Since = string(m.To), now.Round(0).UTC()
		}
		stored.Tainted, stored.Automatic = m.Tainted, m.Automatic
	}
	if step.Prepare {
		prepared, key, err := c.prepareRoot(ctx, now, foreign)
		if err != nil {
			return err
		}
		prepared.Automatic = step.Automatic
		t.Roots = append(t.Roots, *prepared)
		if key != nil {
			known = append(known, key)
		}
	}
	sctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	stored, err := c.cfg.Store.ChangeTrust(sctx, t, func(stored Trust) error {
		return c.recordStep(sctx, now, s.trust, stored, step, actor)
	})
	if err != nil {
		return fmt.Errorf("store a step of the roots: %w", err)
	}
	if err := c.adopt(ctx, now, stored, known); err != nil {
		return err
	}
	for _, m := range step.Moves {
		c.log.InfoContext(ctx, "root changed", "authority", m.ID, "state", m.To, "tainted", m.Tainted, "reason", step.Why, "sequence", stored.Sequence)
		if f := c.mintFailed.Load(); f != nil && m.To == rotation.Distributed {
			again := *f
			again.retryAt = time.Time{}
			c.mintFailed.Store(&again)
			c.wake()
		}
	}
	if step.Prepare {
		c.log.InfoContext(ctx, "root prepared", "authority", c.state.Load().roots[len(c.state.Load().roots)-1].id, "reason", step.Why, "sequence", stored.Sequence)
	}
	return nil
}

// prepareRoot makes a root, or takes that of an upstream CA.
func (c *CA) prepareRoot(ctx context.Context, now time.Time, foreign *x509.Certificate) (*Root, *root, error) {
	prepared := &Root{State: StatePrepared, CreatedAt: now.Round(0).UTC(), Since: now.Round(0).UTC()}
	if foreign != nil {
		prepared.Certificate = foreign.Raw
		return prepared, nil, nil
	}
	cert, key, reference, err := c.makeOwnRoot(ctx, now)
	if err != nil {
		return nil, nil, err
	}
	prepared.Certificate, prepared.Key = cert.Raw, reference
	r := newRoot(cert, StatePrepared)
	r.key, r.reference = key, reference
	return prepared, r, nil
}

// makeOwnRoot makes a key and signs a root with it.
func (c *CA) makeOwnRoot(ctx context.Context, now time.Time) (*x509.Certificate, crypto.Signer, string, error) {
	key, reference, err := c.createRootKey(ctx)
	if err != nil {
		return nil, nil, "", err
	}
	cert, err := makeRoot(c.cfg.TrustDomain, c.cfg.Subject, key, now, c.cfg.RootLife)
	if err != nil {
		return nil, nil, "", fmt.Errorf("sign a root: %w", err)
	}
	if err := checkRoot(cert, c.cfg.TrustDomain); err != nil {
		return nil, nil, "", fmt.Errorf("check the new root: %w", err)
	}
	if err := selfCheck(key, cert.PublicKey); err != nil {
		return nil, nil, "", fmt.Errorf("check the new root's key: %w", err)
	}
	return cert, key, reference, nil
}

// recordStep makes the records of all that has changed between two states of the
// store durable.
func (c *CA) recordStep(ctx context.Context, now time.Time, before, after Trust, step *rotation.Step, actor string) error {
	var drafts []*ledger.Draft
	add := func(r *ledgerv1.Record) {
		r.Detail, r.Actor = step.Why, actor
		drafts = append(drafts, ledger.NewDraft(r, nil))
	}
	var roots []*ledgerv1.Authority
	var signer *x509.Certificate
	for i, r := range after.Roots {
		cert, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			return fmt.Errorf("read a root back: %w", err)
		}
		record := c.authorityRecord(now, cert, RoleRoot, r.State, after.Sequence)
		record.Authority.Tainted = r.Tainted
		if r.State == StateActive {
			signer = cert
		}
		if r.State != StateGone {
			roots = append(roots, record.GetAuthority())
		}
		if i >= len(before.Roots) || before.Roots[i].State != r.State || before.Roots[i].Tainted != r.Tainted || before.Roots[i].Automatic != r.Automatic {
			add(record)
		}
	}
	if before.Sequence != after.Sequence || before.Paused != after.Paused {
		if signer == nil {
			return errors.New("record a step of the roots: no root is active after it")
		}
		record := c.authorityRecord(now, signer, RoleRoot, StateActive, after.Sequence)
		if before.Sequence != after.Sequence {
			record.Event = ledgerv1.Event_EVENT_BUNDLE
			record.Bundle = &ledgerv1.Bundle{Sequence: after.Sequence, Roots: roots}
		}
		add(record)
	}
	if _, err := c.cfg.Ledger.Append(ctx, drafts...); err != nil {
		return fmt.Errorf("record a step of the roots: %w", err)
	}
	return nil
}

// Command carries out what an operator asks of the roots, for actor. Its error
// wraps rotation.ErrRefused for what would break something, and says what.
func (c *CA) Command(ctx context.Context, command rotation.Command, actor string) error {
	s := c.state.Load()
	if s.signer.foreign && slices.Contains([]rotation.Verb{rotation.VerbPrepare, rotation.VerbRotate, rotation.VerbTaint}, command.Verb) && command.Root == "" {
		return fmt.Errorf("%w: the root is that of the upstream CA, which says when it changes: rotate it there, or adopt a root of this CA's own: ca authority adopt --self",
			rotation.ErrRefused)
	}
	return c.order(ctx, actor, nil, func(t rotation.Trust, in rotation.Inputs) (*rotation.Step, error) {
		return rotation.Do(t, in, command)
	})
}

// AdoptUpstream has the mesh change over to the root of the upstream CA, by the
// same steps as a rotation: nothing signs with it before every live proxy has
// acknowledged it.
func (c *CA) AdoptUpstream(ctx context.Context, actor string) error {
	if c.cfg.Upstream == nil {
		return fmt.Errorf("%w: no upstream CA is configured: write the section upstream, and start the CA again", rotation.ErrRefused)
	}
	c.mintMu.Lock()
	verified, _, _, err := c.ask(ctx)
	c.mintMu.Unlock()
	if err != nil {
		return fmt.Errorf("adopt the upstream CA: %w", err)
	}
	root := verified.Anchors[0]
	return c.order(ctx, actor, root, func(t rotation.Trust, in rotation.Inputs) (*rotation.Step, error) {
		if step, err := rotation.Announce(t, in, authorityID(root), true); step != nil || err != nil {
			return step, err
		}
		// It is known already, such as from before the mesh went back.
		step, err := rotation.Switch(t, authorityID(root))
		if err == nil && step == nil {
			return nil, fmt.Errorf("%w: root %s of the upstream CA is active already", rotation.ErrRefused, authorityID(root))
		}
		return step, err
	})
}

// AdoptOwn is the way back: to a root of this CA's own.
func (c *CA) AdoptOwn(ctx context.Context, actor string) error {
	if !c.state.Load().signer.foreign {
		return fmt.Errorf("%w: the root is this CA's own already", rotation.ErrRefused)
	}
	return c.order(ctx, actor, nil, func(t rotation.Trust, in rotation.Inputs) (*rotation.Step, error) {
		return rotation.Do(t, in, rotation.Command{Verb: rotation.VerbRotate})
	})
}

// order takes the step that decide returns. If another CA is quicker, it decides
// anew.
func (c *CA) order(ctx context.Context, actor string, foreign *x509.Certificate, decide func(rotation.Trust, rotation.Inputs) (*rotation.Step, error)) error {
	err := c.decide(ctx, actor, foreign, decide)
	if err != nil {
		return err
	}
	c.cfg.OnChange()
	c.wake()
	return nil
}

func (c *CA) decide(ctx context.Context, actor string, foreign *x509.Certificate, decide func(rotation.Trust, rotation.Inputs) (*rotation.Step, error)) error {
	if err := c.cfg.Clock(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for range maxSteps {
		now := time.Now().Round(0)
		if _, err = c.refresh(ctx, now); err != nil {
			return err
		}
		s := c.state.Load()
		in, ierr := c.inputs(ctx, now, s)
		if ierr != nil {
			return ierr
		}
		step, derr := decide(s.rotationTrust(), in)
		if derr != nil || step == nil {
			return derr
		}
		if err = c.take(ctx, now, step, foreign, actor); !errors.Is(err, ErrTrustChanged) {
			return err
		}
	}
	return err
}

// FleetChanged says that nodes may have acknowledged something. It never blocks.
func (c *CA) FleetChanged() {
	if s := c.state.Load(); s.moving || s.next != nil {
		select {
		case c.kick <- struct{}{}:
		default:
		}
	}
}

// Rotation is what is known of the roots at one moment.
type Rotation struct {
	Trust  rotation.Trust
	Inputs rotation.Inputs
	// Sequence is that of the bundle in force.
	Sequence uint64
	// Stalled says what a rotation waits for beyond patience; "" for nothing.
	Stalled string
}

// Rotation says how far the roots are.
func (c *CA) Rotation(ctx context.Context) (*Rotation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, now := c.state.Load(), time.Now().Round(0)
	in, err := c.inputs(ctx, now, s)
	if err != nil {
		return nil, err
	}
	t := s.rotationTrust()
	return &Rotation{Trust: t, Inputs: in, Sequence: s.trust.Sequence, Stalled: rotation.Stalled(t, in)}, nil
}

// flushRenewals has the nodes renew what retiring roots signed, once what they get
// chains to the one that signs. The caller holds mu.
func (c *CA) flushRenewals() {
	s := c.state.Load()
	if len(c.renewals) == 0 || s.active == nil || s.active.root.id != s.signer.id {
		return
	}
	slices.Sort(c.renewals)
	for _, id := range slices.Compact(c.renewals) {
		i := slices.IndexFunc(s.roots, func(r *root) bool { return r.id == id })
		if i >= 0 && s.roots[i].state == StateRetiring && c.cfg.OnRetiring != nil {
			c.cfg.OnRetiring(id, s.roots[i].tainted)
		}
	}
	c.renewals = nil
}

// announced takes a root of the upstream CA into the bundle, if it is new. It is
// used when the upstream CA signs with it.
func (c *CA) announced(ctx context.Context, cert *x509.Certificate) error {
	return c.order(ctx, "", cert, func(t rotation.Trust, in rotation.Inputs) (*rotation.Step, error) {
		return rotation.Announce(t, in, authorityID(cert), false)
	})
}

// runWatch takes over the roots that the upstream CA announces, until ctx ends.
func (c *CA) runWatch(ctx context.Context, w upstream.RootWatcher) {
	pace := backoff.New(backoff.Policy{Base: mintBase, Max: mintMax})
	for ctx.Err() == nil {
		err := w.WatchRoots(ctx, func(roots []*x509.Certificate) error {
			pace.Reset()
			if !c.state.Load().signer.foreign || len(roots) > upstream.MaxRoots {
				return nil
			}
			for _, r := range roots {
				if err := upstream.CheckRoot(c.cfg.TrustDomain, r); err != nil {
					return fmt.Errorf("root %.100q: %w", r.Subject, err)
				}
				if !c.cfg.Upstream.pinned(r) || r.NotAfter.Before(time.Now()) {
					continue
				}
				if err := c.announced(ctx, r); err != nil {
					return err
				}
			}
			return nil
		})
		if ctx.Err() == nil {
			c.log.WarnContext(ctx, "roots of the upstream ca are not watched, will retry", "kind", c.cfg.Upstream.Kind, "err", err)
			_ = backoff.Wait(ctx, mintBase+pace.Next()) // the loop looks at ctx
		}
	}
}
