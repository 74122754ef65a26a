package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	mathrand "math/rand/v2"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ca/upstream"
)

// An intermediate from an upstream CA, at half of its predecessor's life:
//
//  1. key made in memory, and a request for it signed
//  2. the upstream CA is asked; whatever it does, nothing else waits for it
//  3. the answer is held against the request, as a hostile CA's
//  4. its chain has to end in a root that signs already, or that is in force
//     everywhere: then the rest is as with an intermediate of our own root
//
// A failure is tried again, the sooner the less is left of the predecessor.

// Upstream makes the CA of somebody else the root above our intermediates.
type Upstream struct {
	// CA is asked by one goroutine at a time.
	CA upstream.CA
	// Kind names it in messages, such as "vault".
	Kind string
	// Leaves has it sign each X.509-SVID, in place of intermediates; it has to be an
	// upstream.LeafSigner.
	Leaves bool
	// Pins are the SHA-256 of those of its roots that may be trusted. Without any,
	// the roots of its first answer are trusted, and later ones as it names them.
	Pins [][32]byte
}

func (u *Upstream) pinned(root *x509.Certificate) bool {
	return len(u.Pins) == 0 || slices.Contains(u.Pins, sha256.Sum256(root.Raw))
}

const (
	// mintTimeout bounds one request.
	mintTimeout = 2 * time.Minute
	// deniedBase and deniedMax pace what only an operator can mend.
	deniedBase, deniedMax = 15 * time.Second, 10 * time.Minute
	mintBase, mintMax     = 2 * time.Second, 5 * time.Minute
	// maxRetryAfter bounds what an upstream CA may have us wait.
	maxRetryAfter = time.Hour
	// minAttempts is the number of attempts for which there is always room.
	minAttempts = 20
)

// mintFailure is why there is no new intermediate. It is immutable.
type mintFailure struct {
	err      error
	since    time.Time
	failures int
	retryAt  time.Time
}

// retryMint is how long after a failed request to wait, of which failures have
// followed each other, when left is what remains of the intermediate in use; a
// pure function, random is in [0, 1).
func retryMint(err error, failures int, left time.Duration, random float64) time.Duration {
	policy := backoff.Policy{Base: mintBase, Max: mintMax}
	if errors.Is(err, upstream.ErrDenied) {
		policy = backoff.Policy{Base: deniedBase, Max: deniedMax}
	}
	wait := policy.Bound(failures)/2 + policy.Delay(failures, random)/2
	if limit, ok := errors.AsType[*upstream.RateLimitError](err); ok {
		wait = max(wait, min(limit.RetryAfter, maxRetryAfter))
	}
	return min(wait, max(left/minAttempts, mintBase))
}

// runMint keeps the intermediate from the upstream CA new until ctx ends.
func (c *CA) runMint(ctx context.Context) {
	for {
		timer := time.NewTimer(c.mintDueIn(time.Now().Round(0)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-c.kickMint:
			timer.Stop()
		case <-timer.C:
		}
		if c.mintDueIn(time.Now().Round(0)) > 0 {
			continue
		}
		if _, err := c.mintAndInstall(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			c.log.WarnContext(ctx, "upstream ca signed nothing, will retry", "kind", c.cfg.Upstream.Kind, "err", err)
			continue
		}
		c.cfg.OnChange()
		c.wake()
	}
}

// mintDueIn is how long the upstream CA need not be asked; at most longestNap.
func (c *CA) mintDueIn(now time.Time) time.Duration {
	s := c.state.Load()
	if s.signer == nil || !s.signer.foreign {
		return longestNap
	}
	wait := time.Duration(0)
	if f := c.mintFailed.Load(); f != nil {
		// More than the longest wait can only mean that the clock went back.
		if wait = f.retryAt.Sub(now); wait > maxRetryAfter {
			wait = 0
		}
	} else if a := s.active; a != nil && a.root.id == s.signer.id && a.usable(now) && !a.suspect.Load() {
		due := a.renewAt
		for _, r := range s.roots {
			if at := followAt(r.since, a.made); r.foreign && r.state == StateDistributed && !s.trust.Paused && at.Before(due) {
				due = at
			}
		}
		wait = due.Sub(now)
	}
	return min(max(wait, 0), longestNap)
}

// followFirst is how long after a root of the upstream CA has come into force here the CA
// is asked whether it signs with that root.
const followFirst = time.Minute

// followAt is when an upstream CA is asked again of which another root is in force here
// since a time, and which has signed last at made. It does not tell when it signs with that
// root, and until it is followed nobody can let go of the one before: not the CAs beside
// this one either. Each question is four times as late as the one before it.
func followAt(since, made time.Time) time.Time {
	wait := followFirst
	for !since.Add(wait).After(made) {
		wait *= 4
	}
	return since.Add(wait)
}

// mintAndInstall asks the upstream CA and puts what it gives in place. mu is not
// held while it is asked.
func (c *CA) mintAndInstall(ctx context.Context) (a *authority, err error) {
	c.mintMu.Lock()
	defer c.mintMu.Unlock()
	defer func() {
		if err != nil {
			c.metrics.rotationFailed.Inc()
			c.mintFailedNow(err)
		}
	}()
	if err := c.cfg.Clock(); err != nil {
		return nil, err
	}
	a, err = c.mint(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now().Round(0)
	if c.state.Load().signer.id != a.root.id {
		return nil, errors.New("the root has changed in the meantime")
	}
	install := c.install
	if c.leaves != nil {
		install = c.installAbove
	}
	if err := install(ctx, a, now); err != nil {
		return nil, err
	}
	c.mintFailed.Store(nil)
	c.flushRenewals()
	if c.leaves != nil {
		return a, nil
	}
	if err := c.replaceOwn(ctx, now); err != nil {
		c.log.WarnContext(ctx, "own x.509-svid not renewed, will retry", "err", err)
	}
	return a, nil
}

// mintFailedNow notes a failure and when to try again. mintMu is held.
func (c *CA) mintFailedNow(err error) {
	now := time.Now().Round(0)
	f := &mintFailure{err: err, since: now, failures: 1}
	if last := c.mintFailed.Load(); last != nil {
		f.since, f.failures = last.since, last.failures+1
	}
	left := time.Duration(0)
	if a := c.state.Load().active; a != nil {
		left = a.leafEnd.Sub(now)
	}
	f.retryAt = now.Add(retryMint(err, f.failures, left, mathrand.Float64())) //nolint:gosec // spreading load needs no secrecy
	c.mintFailed.Store(f)
}

// mint asks the upstream CA for an intermediate below the root that signs.
func (c *CA) mint(ctx context.Context) (*authority, error) {
	verified, key, now, err := c.ask(ctx)
	if err != nil {
		return nil, err
	}
	// The root that signs is best, then one that is known.
	slices.SortStableFunc(verified.Anchors, func(a, b *x509.Certificate) int { return c.rank(b) - c.rank(a) })
	anchor := verified.Anchors[0]
	name := authorityID(anchor)
	err = c.order(ctx, "", anchor, func(t rotation.Trust, in rotation.Inputs) (*rotation.Step, error) {
		if step, err := rotation.Announce(t, in, name, false); step != nil || err != nil {
			return step, err
		}
		return rotation.Switch(t, name)
	})
	if err != nil {
		return nil, err
	}
	s := c.state.Load()
	if s.signer.id != name {
		return nil, fmt.Errorf("the upstream CA now signs with root %s (%.100q), which is used when every live proxy has acknowledged it", name, anchor.Subject)
	}
	if c.leaves != nil {
		return above(verified, key, s.signer, now), nil
	}
	return newAuthority(verified.Chain, verified.NotAfter, s.signer, key, s.trust.Sequence, now)
}

// rank is greater for roots that signed before.
func (c *CA) rank(cert *x509.Certificate) int {
	id := authorityID(cert)
	s := c.state.Load()
	switch {
	case s.signer.id == id:
		return 2
	case slices.ContainsFunc(s.roots, func(r *root) bool { return r.id == id }):
		return 1
	default:
		return 0
	}
}

// requestIntermediate makes a key and the request for an intermediate.
func (c *CA) requestIntermediate() (crypto.Signer, *upstream.Request, error) {
	key, err := c.cfg.IntermediateKey.Generate()
	if err != nil {
		return nil, nil, err
	}
	t, err := authorityTemplate(c.cfg.TrustDomain, c.cfg.Subject.name(c.cfg.TrustDomain, RoleIntermediate), key.Public())
	if err != nil {
		return nil, nil, err
	}
	request, err := upstream.NewRequest(c.cfg.TrustDomain, key, t.Subject, c.cfg.IntermediateLife, c.cfg.Upstream.CA.Capabilities())
	return key, request, err
}

// ask makes a key, has it certified, and verifies the answer: an intermediate, or the
// CA's own X.509-SVID if the upstream CA signs each.
func (c *CA) ask(ctx context.Context) (_ *upstream.Verified, _ crypto.Signer, _ time.Time, err error) {
	defer func(start time.Time) { c.metrics.observeUpstream(start, err) }(time.Now())
	var now time.Time
	fail := func(doing string, err error) (*upstream.Verified, crypto.Signer, time.Time, error) {
		return nil, nil, now, fmt.Errorf("%s: %w", doing, err)
	}
	u := c.cfg.Upstream
	sign, request := u.CA.Mint, c.requestIntermediate
	if c.leaves != nil {
		sign, request = c.leaves.SignLeaf, c.requestOwn
	}
	key, wanted, err := request()
	if err != nil {
		return fail("make a request", err)
	}
	ctx, cancel := context.WithTimeout(ctx, mintTimeout)
	defer cancel()
	minted, err := sign(ctx, wanted)
	if err != nil {
		return fail("have it signed by "+u.Kind, err)
	}
	now = time.Now().Round(0)
	verified, err := wanted.Verify(now, minted)
	if err != nil {
		return fail("check the answer of "+u.Kind, err)
	}
	verified.Anchors = slices.DeleteFunc(verified.Anchors, func(r *x509.Certificate) bool { return !u.pinned(r) })
	verified.Roots = slices.DeleteFunc(verified.Roots, func(r *x509.Certificate) bool { return !u.pinned(r) })
	if len(verified.Anchors) == 0 {
		sum := sha256.Sum256(minted.Roots[0].Raw)
		return fail("check the answer of "+u.Kind, fmt.Errorf("%w: its root %s (%.100q) is not among those pinned: compare it with what the operators of that CA say, then add it to upstream.roots_sha256",
			upstream.ErrDenied, hex.EncodeToString(sum[:]), minted.Roots[0].Subject))
	}
	return verified, key, now, nil
}

// maxAboveWarning is how long before its end a certificate of an upstream CA is warned of
// at most, unless intermediates live longer.
const maxAboveWarning = 30 * 24 * time.Hour

// aboveHealth says that a certificate of the upstream CA ends soon: each intermediate is
// then shorter than the last, and nothing fails before all of it ends at once.
func (c *CA) aboveHealth(above *x509.Certificate, now time.Time) error {
	left := above.NotAfter.Sub(now)
	if left >= max(c.cfg.IntermediateLife, min(above.NotAfter.Sub(above.NotBefore)/10, maxAboveWarning)) {
		return nil
	}
	return fmt.Errorf("the certificate %.100q of the upstream CA ends at %s, and all that is below it with it: have it renewed there",
		above.Subject, above.NotAfter.UTC().Format(time.RFC3339))
}

// mintHealth says how it is with the upstream CA at now.
func (c *CA) mintHealth(s *state, now time.Time) error {
	f := c.mintFailed.Load()
	if f == nil {
		return nil
	}
	since := f.since.UTC().Format(time.RFC3339)
	if s.active == nil {
		return fmt.Errorf("the upstream CA has signed nothing since %s: %w", since, f.err)
	}
	what, end := "intermediate", s.active.leafEnd
	if s.active.key == nil { // the leaves themselves are in leafHealth
		what, end = "X.509-SVID of this CA", s.active.own.chain[0].NotAfter
	}
	urgent := ""
	// Half of the life is slack; half of that is gone.
	if half := end.Sub(s.active.renewAt); end.Sub(now) < half/2 {
		urgent = "act now: more than half of the time for it is over: "
	}
	return fmt.Errorf("%sthe upstream CA has signed no new %s since %s, and issuing ends at %s: %w",
		urgent, what, since, end.UTC().Format(time.RFC3339), f.err)
}
