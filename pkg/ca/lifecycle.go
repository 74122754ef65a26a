package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// The life of a root is in trust.go. An intermediate, every half of its life:
//
//  1. key made in memory
//  2. certificate signed by the root, checked; its key proves itself
//  3. recorded as active, its predecessor as retiring
//  4. put in place: the next leaf is signed by it. No bundle changes, since its
//     root is in all of them
//  5. gone, and recorded as that, when the last leaf that it signed has expired

const (
	// longestNap bounds how long a deadline can be overslept: timers stand
	// still while the machine sleeps, so the wall clock is looked at again.
	longestNap = 30 * time.Second
	// minPause is the least time from one look to the next.
	minPause = 50 * time.Millisecond
	// A renewal that failed is tried again after 1 s, doubling up to this.
	longestRetry = time.Minute
	// clockNap is between two looks while the clock is not to be relied on.
	clockNap = time.Second
	// maxRetiring bounds what an operator who rotates in a loop can pile up.
	maxRetiring = 32
	// maxKeyNames is how many taken names Open tries to get around.
	maxKeyNames = 100
)

// Run renews the intermediate at half of its life, and the CA's own X.509-SVID,
// until ctx ends; it returns nil then. What fails is tried again, sooner first,
// while the old one goes on signing.
func (c *CA) Run(ctx context.Context) error {
	var minting sync.WaitGroup
	defer minting.Wait()
	if c.cfg.Upstream != nil {
		minting.Go(func() { c.runMint(ctx) })
		if w, ok := c.cfg.Upstream.CA.(upstream.RootWatcher); ok {
			minting.Go(func() { c.runWatch(ctx, w) })
		}
	}
	var last time.Time
	for {
		// However often it is woken, such as by nodes that acknowledge a bundle.
		if backoff.Wait(ctx, minPause-time.Since(last)) != nil {
			return nil
		}
		last = time.Now()
		nap := c.maintain(ctx, time.Now())
		c.tellAbove(ctx)
		timer := time.NewTimer(nap)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-c.kick:
			timer.Stop()
		}
	}
}

// maintain does what is due at now and returns how long there is nothing to do.
func (c *CA) maintain(ctx context.Context, now time.Time) (nap time.Duration) {
	now = now.Round(0) // wall time: the monotonic clock stops in sleep
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.cfg.Clock(); err != nil {
		return clockNap
	}
	// More than the longest retry can only mean that the clock went back.
	if wait := c.retryAt.Sub(now); wait > 0 && wait <= longestRetry {
		return wait
	}
	changed, err := c.renew(ctx, now)
	if err == nil {
		c.failures, c.retryAt = 0, time.Time{}
		c.failed.Store(nil)
	} else {
		c.failures++
		c.retryAt = now.Add(min(time.Second<<min(c.failures-1, 10), longestRetry))
		c.failed.Store(&err)
		if ctx.Err() == nil {
			c.log.WarnContext(ctx, "renewal not done, will retry", "err", err)
		}
	}
	if changed {
		// OnChange is called without the lock, whatever else comes.
		c.mu.Unlock()
		c.cfg.OnChange()
		c.mu.Lock()
	}
	return min(max(c.nextDue(now).Sub(now), 10*time.Millisecond), c.nap)
}

// renew reports whether the intermediate was replaced. The caller holds mu.
func (c *CA) renew(ctx context.Context, now time.Time) (changed bool, err error) {
	changed, stepErr := c.advance(ctx, now)
	if c.intermediateDue(now) {
		if err := c.replaceIntermediate(ctx, now); err != nil {
			c.metrics.rotationFailed.Inc()
			return changed, fmt.Errorf("renew the intermediate: %w", err)
		}
		changed = true
	}
	promoted, err := c.promote(ctx, now)
	changed = changed || promoted
	if err != nil {
		return changed, fmt.Errorf("have the prepared intermediate sign: %w", err)
	}
	c.flushRenewals()
	if c.ownDue(now) {
		if err := c.replaceOwn(ctx, now); err != nil {
			return changed, fmt.Errorf("renew the authority's own x.509-svid: %w", err)
		}
	}
	if err := c.dropGone(ctx, now); err != nil {
		return changed, fmt.Errorf("record the end of an intermediate: %w", err)
	}
	tended, err := c.tend(ctx, now)
	changed = changed || tended
	if err != nil {
		return changed, fmt.Errorf("keep the revocation lists: %w", err)
	}
	if stepErr != nil {
		return changed, fmt.Errorf("rotate the roots: %w", stepErr)
	}
	return changed, nil
}

// intermediateDue is a pure function of the state and now.
func (c *CA) intermediateDue(now time.Time) bool {
	s := c.state.Load()
	switch a := s.active; {
	case s.signer.foreign: // runMint does it
		return false
	case s.next != nil && s.next.root.id == s.signer.id && s.next.usable(now) && !s.next.suspect.Load():
		return false // it waits for its list to be in force
	case a == nil || !a.usable(now) || a.suspect.Load() || a.root.id != s.signer.id:
		return true
	case now.Before(a.renewAt):
		return false
	default:
		// At the end of the root a new one would not live longer.
		return c.intermediateEnd(s.signer, now).After(a.notAfter)
	}
}

func (c *CA) ownDue(now time.Time) bool {
	own, active := c.own.Load(), c.state.Load().issuer(now, true)
	if active == nil || !active.usable(now) || active.key == nil {
		return false // there is nothing to sign it with, or runMint does it
	}
	return own == nil || !own.usable(now) || !now.Before(own.renewAt) || own.authority != active.id
}

// nextDue is when maintain has something to do; what is due already and was not
// done waits for retryAt, or cannot be done.
func (c *CA) nextDue(now time.Time) time.Time {
	if c.failures > 0 {
		return c.retryAt
	}
	s := c.state.Load()
	due := now.Add(c.nap)
	sooner := func(t time.Time) {
		if t.After(now) && t.Before(due) {
			due = t
		}
	}
	sooner(c.nextStep)
	if s.active != nil {
		sooner(s.active.renewAt)
	}
	if s.next != nil {
		sooner(c.latest(s, now))
	}
	if own := c.own.Load(); own != nil {
		sooner(own.renewAt)
	}
	return due
}

// replaceIntermediate makes an intermediate below our own root and puts it in
// place. The caller holds mu.
func (c *CA) replaceIntermediate(ctx context.Context, now time.Time) error {
	if err := c.unlockSigner(ctx, now); err != nil {
		return err
	}
	s := c.state.Load()
	a, err := c.makeIntermediate(s.signer, s.trust.Sequence, now)
	if err != nil {
		return err
	}
	if c.cfg.Revocation {
		return c.prepare(ctx, a, now)
	}
	return c.install(ctx, a, now)
}

// install has a sign from now on, once that is recorded. The caller holds mu.
func (c *CA) install(ctx context.Context, a *authority, now time.Time) error {
	s := c.state.Load()
	made := []Intermediate{{ID: a.id, Root: a.root.id, Instance: c.cfg.Instance, LiveUntil: a.notAfter}}
	if old := s.active; old != nil {
		made = append(made, Intermediate{ID: old.id, Root: old.root.id, Instance: c.cfg.Instance, LiveUntil: c.lastLeafEnd(now)})
	}
	sctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := c.cfg.Store.PutIntermediates(sctx, now, made...); err != nil {
		return err
	}
	var drafts []*ledger.Draft
	if a.key != nil {
		drafts = append(drafts, c.intermediateDraft(now, a, StateActive, s.trust.Sequence))
	}
	if s.active != nil && s.active.key != nil {
		drafts = append(drafts, c.intermediateDraft(now, s.active, StateRetiring, s.trust.Sequence))
	}
	if len(drafts) > 0 {
		if _, err := c.cfg.Ledger.Append(ctx, drafts...); err != nil {
			return fmt.Errorf("record it: %w", err)
		}
	}
	next := *s
	next.active, next.next = a, nil
	if s.active != nil {
		next.retiring = append([]retiring{{authority: s.active, since: now.Round(0)}}, s.retiring...)
		c.metrics.rotated.Inc()
	}
	if len(next.retiring) > maxRetiring {
		forgotten := next.retiring[maxRetiring]
		c.log.WarnContext(ctx, "more retiring intermediates than are kept, forgetting the oldest", "authority", forgotten.id)
		next.retiring = next.retiring[:maxRetiring]
	}
	c.setState(&next)
	if a.key == nil {
		c.log.InfoContext(ctx, "upstream ca signs each x.509-svid", "authority", a.id, "not_after", a.notAfter)
		return nil
	}
	c.log.InfoContext(ctx, "intermediate active", "authority", a.id, "not_after", a.notAfter)
	return nil
}

// dropGone ends the retiring of those whose last leaf has expired. A leaf that
// is being signed with one at this moment is covered by longestNap.
func (c *CA) dropGone(ctx context.Context, now time.Time) error {
	s := c.state.Load()
	gone := func(r retiring) bool {
		return now.Unix() > r.lastLeaf.Load() && now.Sub(r.since) > longestNap
	}
	var drafts []*ledger.Draft
	var ended []Intermediate
	for _, r := range s.retiring {
		if gone(r) {
			ended = append(ended, Intermediate{ID: r.id, Root: r.root.id, Instance: c.cfg.Instance, LiveUntil: now.Add(-time.Second)})
			if r.key != nil {
				drafts = append(drafts, c.intermediateDraft(now, r.authority, StateGone, s.trust.Sequence))
			}
		}
	}
	if len(ended) == 0 {
		return nil
	}
	sctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := c.cfg.Store.PutIntermediates(sctx, now, ended...); err != nil {
		return err
	}
	if len(drafts) > 0 {
		if _, err := c.cfg.Ledger.Append(ctx, drafts...); err != nil {
			return err
		}
	}
	next := *s
	next.retiring = slices.DeleteFunc(slices.Clone(s.retiring), gone)
	c.setState(&next)
	return nil
}

// intermediateDraft is the ledger record of an intermediate's new state.
func (c *CA) intermediateDraft(now time.Time, a *authority, state string, sequence uint64) *ledger.Draft {
	r := c.authorityRecord(now, a.cert, RoleIntermediate, state, sequence)
	r.Authority.Root = a.root.id
	return ledger.NewDraft(r, nil)
}

func (c *CA) authorityRecord(now time.Time, cert *x509.Certificate, role, state string, sequence uint64) *ledgerv1.Record {
	fingerprint, spki := sha256.Sum256(cert.Raw), sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return &ledgerv1.Record{
		Version: recordVersion, Time: timestamppb.New(now),
		Event: ledgerv1.Event_EVENT_AUTHORITY, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: c.cfg.TrustDomain.Name(), SpiffeId: c.cfg.TrustDomain.IDString(),
		Certificate: &ledgerv1.Certificate{
			Serial: cert.SerialNumber.Bytes(), Sha256: fingerprint[:], SpkiSha256: spki[:],
			KeyAlgorithm: algorithmOf(cert.PublicKey),
			NotBefore:    timestamppb.New(cert.NotBefore), NotAfter: timestamppb.New(cert.NotAfter),
		},
		Authority: &ledgerv1.Authority{
			Id: authorityID(cert), Role: role, State: state, Sha256: fingerprint[:],
			NotAfter: timestamppb.New(cert.NotAfter), BundleSequence: sequence,
		},
		CaInstance: c.cfg.Instance, CaVersion: c.cfg.Version,
	}
}

// loadRoots returns the state without an intermediate.
func (c *CA) loadRoots(ctx context.Context, now time.Time) (*state, error) {
	t, err := c.cfg.Store.Trust(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the roots: %w", err)
	}
	if len(t.Roots) == 0 {
		return c.createRoot(ctx, now, t, "first root of the trust domain", "")
	}
	s, err := c.parseTrust(ctx, now, t, nil)
	if err != nil {
		return nil, err
	}
	for _, r := range s.roots {
		if r.state == StateRetiring { // in case nobody was told
			c.renewals = append(c.renewals, r.id)
		}
	}
	return s, c.closeEarlier(ctx, now)
}

// closeEarlier notes that earlier processes of this instance sign no more: their
// keys were in memory.
func (c *CA) closeEarlier(ctx context.Context, now time.Time) error {
	all, err := c.cfg.Store.Intermediates(ctx)
	if err != nil {
		return err
	}
	var changed []Intermediate
	for _, i := range all {
		if end := c.lastLeafEnd(now); i.Instance == c.cfg.Instance && i.LiveUntil.After(end) {
			i.LiveUntil = end
			changed = append(changed, i)
		}
	}
	return c.cfg.Store.PutIntermediates(ctx, now, changed...)
}

// lastLeafEnd is a time beyond which no leaf lives that is signed until now, or is
// being signed.
func (c *CA) lastLeafEnd(now time.Time) time.Time { return now.Add(c.cfg.MaxTTL + longestNap) }

// parseTrust returns the state, without intermediates, that the roots in the store
// make up. What is in known already is not opened again.
func (c *CA) parseTrust(ctx context.Context, now time.Time, t Trust, known []*root) (*state, error) {
	s := &state{trust: t}
	for _, r := range t.Roots {
		loaded, err := c.parseRoot(r, known)
		if err != nil {
			return nil, err
		}
		if loaded == nil {
			continue
		}
		s.roots = append(s.roots, loaded)
		s.bundle = append(s.bundle, loaded.cert)
		switch loaded.state {
		case StateActive:
			s.signer = loaded
		case StatePrepared:
			s.moving = true
		case StateRetiring:
			s.moving = s.moving || loaded.tainted
		}
	}
	switch {
	case s.signer == nil:
		return nil, errors.New("none of the roots in the store is active: restore the store from a backup")
	case s.signer.foreign && c.cfg.Upstream == nil:
		return nil, fmt.Errorf("root %s is that of an upstream CA, and none is configured: write the section upstream", s.signer.id)
	case s.signer.foreign || s.signer.key != nil:
		return s, nil
	}
	// A key that may come back is asked for again when it is needed.
	if err := c.unlock(ctx, s.signer, s.signer.reference, now); err != nil && !errors.Is(err, keys.ErrUnavailable) {
		return nil, fmt.Errorf("root %s: %w", s.signer.id, err)
	}
	return s, nil
}

// parseRoot returns nil for a root that is gone.
func (c *CA) parseRoot(r Root, known []*root) (*root, error) {
	switch r.State {
	case StatePrepared, StateDistributed, StateActive, StateRetiring:
	case StateGone:
		return nil, nil //nolint:nilnil // said in the comment
	default:
		return nil, fmt.Errorf("a root of the store is in the unknown state %q: it was written by a newer version", r.State)
	}
	loaded := &root{}
	if i := slices.IndexFunc(known, func(k *root) bool { return bytes.Equal(k.cert.Raw, r.Certificate) }); i >= 0 {
		*loaded = *known[i]
	} else {
		cert, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			return nil, fmt.Errorf("a root of the store is not a certificate, restore the store from a backup: %w", err)
		}
		check := checkRoot
		loaded = newRoot(cert, r.State)
		if r.Key == "" {
			check = func(cert *x509.Certificate, td spiffeid.TrustDomain) error { return upstream.CheckRoot(td, cert) }
		}
		if err := check(cert, c.cfg.TrustDomain); err != nil {
			return nil, fmt.Errorf("root %s of the store: %w", loaded.id, err)
		}
	}
	loaded.state, loaded.since, loaded.sequence = r.State, r.Since, r.Sequence
	loaded.automatic, loaded.tainted = r.Automatic, r.Tainted
	loaded.reference, loaded.foreign = r.Key, r.Key == ""
	return loaded, nil
}

// authorityID names an authority in lower-case hexadecimal: by its subject key
// identifier, or, since an upstream CA's root may lack one, its key's SHA-256.
func authorityID(cert *x509.Certificate) string {
	if len(cert.SubjectKeyId) > 0 {
		return hex.EncodeToString(cert.SubjectKeyId)
	}
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:20])
}

func newRoot(cert *x509.Certificate, state string) *root {
	return &root{
		id: authorityID(cert), cert: cert, state: state,
		spkiHash: sha256.Sum256(cert.RawSubjectPublicKeyInfo),
	}
}

// unlock gives r its key, after it has proved that the two belong together.
func (c *CA) unlock(ctx context.Context, r *root, reference string, now time.Time) error {
	switch {
	case now.Before(r.cert.NotBefore):
		return fmt.Errorf("it is valid from %s on, and the clock says %s: correct the clock",
			r.cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.After(r.cert.NotAfter):
		return fmt.Errorf("it has expired at %s: correct the clock, or begin anew with an empty data directory",
			r.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	key, err := c.cfg.Keys.Open(ctx, reference)
	if err != nil {
		return fmt.Errorf("open its key: %w", err)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(r.cert.PublicKey) {
		return fmt.Errorf("its key %s is another one than its certificate's: restore the key and the store from one backup", reference)
	}
	if err := selfCheck(key, r.cert.PublicKey); err != nil {
		return fmt.Errorf("check its key %s: %w", reference, err)
	}
	r.key = key
	return nil
}

// issuer is what signs at now. What no proxy ever has to verify, the certificates of
// agents and of this CA, need not wait for a revocation list.
func (s *state) issuer(now time.Time, forUs bool) *authority {
	if forUs && s.next != nil && (s.active == nil || !s.active.usable(now)) {
		return s.next.authority
	}
	return s.active
}

// unlockSigner gets the key of the root that signs, if it was not to be had so far.
// The caller holds mu.
func (c *CA) unlockSigner(ctx context.Context, now time.Time) error {
	s := *c.state.Load()
	if s.signer.key != nil {
		return nil
	}
	signer := *s.signer
	if err := c.unlock(ctx, &signer, signer.reference, now); err != nil {
		return fmt.Errorf("root %s: %w", signer.id, err)
	}
	s.roots = slices.Clone(s.roots)
	s.roots[slices.Index(s.roots, s.signer)] = &signer
	s.signer = &signer
	c.setState(&s)
	return nil
}

// CheckRootKey has the key of the root that signs prove itself. It is nil where that
// is the upstream CA's. It takes as long as the key's device does.
func (c *CA) CheckRootKey() error {
	s := c.state.Load()
	switch failed := c.failed.Load(); {
	case s.signer.foreign:
		return nil
	case s.signer.key != nil:
		return selfCheck(s.signer.key, s.signer.cert.PublicKey)
	case failed != nil:
		return *failed
	default:
		return fmt.Errorf("key %s: %w", s.signer.reference, keys.ErrUnavailable)
	}
}

// createRoot makes the first root of the trust domain, or takes that of the
// upstream CA; t is what the store has, no root.
func (c *CA) createRoot(ctx context.Context, now time.Time, t Trust, why, actor string) (*state, error) {
	first := Root{State: StateActive, CreatedAt: now.Round(0).UTC(), Since: now.Round(0).UTC()}
	var known []*root
	if c.cfg.Upstream != nil {
		cert, err := c.firstUse(ctx)
		if err != nil {
			return nil, err
		}
		first.Certificate = cert.Raw
	} else {
		cert, key, reference, err := c.makeOwnRoot(ctx, now)
		if err != nil {
			return nil, err
		}
		first.Certificate, first.Key = cert.Raw, reference
		r := newRoot(cert, StateActive)
		r.key = key
		known = append(known, r)
	}
	t.Roots = append(t.Roots, first)
	stored, err := c.cfg.Store.ChangeTrust(ctx, t, func(stored Trust) error {
		return c.recordStep(ctx, now, Trust{Epoch: t.Epoch}, stored, &rotation.Step{Why: why}, actor)
	})
	if errors.Is(err, ErrTrustChanged) {
		return nil, fmt.Errorf("store the new root: %w: it made the first root of %s at the same moment, so this one is not used; "+
			"give this CA that root's key, then start it again", err, c.cfg.TrustDomain.Name())
	}
	if err != nil {
		return nil, fmt.Errorf("store the new root: %w", err)
	}
	s, err := c.parseTrust(ctx, now, stored, known)
	if err != nil {
		return nil, err
	}
	c.log.InfoContext(ctx, "root created", "authority", s.signer.id, "not_after", s.signer.cert.NotAfter)
	return s, nil
}

// firstUse returns the root of the upstream CA.
func (c *CA) firstUse(ctx context.Context) (*x509.Certificate, error) {
	verified, _, _, err := c.ask(ctx)
	if err != nil {
		return nil, err
	}
	cert := verified.Anchors[0]
	sum := sha256.Sum256(cert.Raw)
	if len(c.cfg.Upstream.Pins) == 0 {
		c.log.WarnContext(ctx, "root of the upstream ca is trusted on first use: compare it, and pin it", "kind", c.cfg.Upstream.Kind, "sha256", hex.EncodeToString(sum[:]),
			"subject", cert.Subject.String())
	}
	return cert, nil
}

// createRootKey takes the first free name: a key that an interrupted start has
// left is not reused, since nobody knows who has seen it.
func (c *CA) createRootKey(ctx context.Context) (crypto.Signer, string, error) {
	for i := range maxKeyNames {
		key, reference, err := c.cfg.Keys.Create(ctx, fmt.Sprintf("root-%d", i+1))
		if errors.Is(err, keys.ErrExists) {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("create a root key: %w", err)
		}
		return key, reference, nil
	}
	return nil, "", fmt.Errorf("create a root key: the names root-1 to root-%d are all taken, remove those that are not used", maxKeyNames)
}

// algorithmOf names a key as PublicKey.Algorithm does.
func algorithmOf(pub crypto.PublicKey) string {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return "EC-" + compact(pub.Params().Name)
	case *rsa.PublicKey:
		return "RSA-" + strconv.Itoa(pub.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	default:
		return "unknown"
	}
}

// compact makes P256 of P-256.
func compact(curve string) string { return strings.ReplaceAll(curve, "-", "") }

// ownSVID is immutable.
type ownSVID struct {
	certificate                  *tls.Certificate
	authority                    string
	notBefore, notAfter, renewAt time.Time
}

func (o *ownSVID) usable(now time.Time) bool {
	return !now.Before(o.notBefore) && now.Before(o.notAfter)
}

// replaceOwn issues the CA's own X.509-SVID as it would another's: recorded
// before it is used. The caller holds mu.
func (c *CA) replaceOwn(ctx context.Context, now time.Time) error {
	id, err := spiffeid.FromPath(c.cfg.TrustDomain, ownPath)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	pub, err := publicKeyOf(spki, algorithmOf(key.Public()))
	if err != nil {
		return err
	}
	signed, err := c.sign(ctx, now, &Request{ID: id, DNSNames: c.cfg.DNSNames, Key: pub, TTL: c.cfg.MaxTTL, Record: c.ownRecord()}, true)
	if err != nil {
		return err
	}
	return c.showOwn(ctx, c.state.Load().issuer(now, true), key, signed)
}

// ownRecord is what the record of the CA's own X.509-SVID says of the request.
func (c *CA) ownRecord() *ledgerv1.Record {
	kind := ledgerv1.Kind_KIND_RENEWAL
	if c.own.Load() == nil {
		kind = ledgerv1.Kind_KIND_FIRST
	}
	return &ledgerv1.Record{Event: ledgerv1.Event_EVENT_ISSUE, Kind: kind, Instance: "ca", VerifiedBy: "ca"}
}

// showOwn has the CA show itself with an X.509-SVID that a has signed, once that is
// recorded.
func (c *CA) showOwn(ctx context.Context, a *authority, key crypto.Signer, signed *Signed) error {
	durable, err := c.cfg.Ledger.Append(ctx, signed.Draft)
	if err != nil {
		return fmt.Errorf("record it: %w", err)
	}
	if len(durable) != 1 {
		return fmt.Errorf("record it: the ledger returned %d records for 1", len(durable))
	}
	chain := append(slices.Clone(durable[0].Chain()), a.root.cert.Raw)
	parsedLeaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return err
	}
	c.own.Store(&ownSVID{
		certificate: &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: parsedLeaf},
		authority:   a.id,
		notBefore:   signed.NotBefore, notAfter: signed.NotAfter, renewAt: signed.RenewAt,
	})
	c.metrics.ownNotAfter.Set(seconds(signed.NotAfter))
	return nil
}
