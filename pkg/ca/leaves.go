package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	mathrand "math/rand/v2"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/pkcs10"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// X.509-SVIDs that the upstream CA signs itself (Upstream.Leaves), for those who may not
// have the key of a CA in the mesh. Then no key here signs anything, and each
// X.509-SVID is a call:
//
//  1. the request, which the workload's agent has made, must ask for the names of the
//     entry and for nothing else
//  2. it waits for its turn: so many calls at once, so many a second; who would wait for
//     too long is told when to come back
//  3. the upstream CA signs
//  4. what comes back is held against the request, as a hostile CA's: key, names, life,
//     profile, and a chain to the root that is in force
//
// In place of an intermediate, the CA's own X.509-SVID is renewed: it shows which root is
// above, and whatever is said elsewhere of an intermediate is said of that root. A leaf
// below another one is not released, and has the CA look which root signs now.

const (
	// leafConcurrency is how many calls of the upstream CA may be open.
	leafConcurrency = 64
	// leafWait is the longest wait for a turn.
	leafWait = 3 * time.Second
	// deniedRetry is how soon what the upstream CA denied is tried again.
	deniedRetry = time.Minute
)

// LaterError says that a request may be granted when it is made again.
type LaterError struct {
	// After is how much later; 0 if that is not known.
	After time.Duration
	Err   error
}

func (e *LaterError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *LaterError) Unwrap() error { return e.Err }

// NamesInCSR reports whether Sign needs requests that ask for the names.
func (c *CA) NamesInCSR() bool { return c.leaves != nil }

// leafSigner is the upstream CA as who signs each leaf.
type leafSigner struct {
	upstream.LeafSigner
	limits upstream.Capabilities
	turns  chan struct{} // one token for each call that is open
	rate   *rate.Limiter
	// until is when the upstream CA wants to be asked again, in Unix nanoseconds.
	until atomic.Int64
	// failed is why the last leaf was not signed, nil after one that was.
	failed atomic.Pointer[error]
}

// newLeafSigner returns nil if intermediates sign.
func newLeafSigner(u *Upstream) (*leafSigner, error) {
	if u == nil || !u.Leaves {
		return nil, nil //nolint:nilnil // said above
	}
	signer, ok := u.CA.(upstream.LeafSigner)
	if !ok {
		return nil, fmt.Errorf("the upstream CA %s signs intermediates only: remove leaves", u.Kind)
	}
	s := &leafSigner{LeafSigner: signer, limits: u.CA.Capabilities(), turns: make(chan struct{}, leafConcurrency), rate: rate.NewLimiter(rate.Inf, 0)}
	if most := s.limits.LeafRate; most > 0 {
		s.rate = rate.NewLimiter(rate.Limit(most), max(1, int(most)))
	}
	return s, nil
}

// enter waits for a turn; leave ends it.
func (s *leafSigner) enter(ctx context.Context) (leave func(), err error) {
	now := time.Now()
	later := func(wait time.Duration) error {
		// Spread, so that those who are sent away together do not come back together.
		return &LaterError{After: wait + time.Duration(mathrand.Int64N(int64(wait)+1)), Err: errors.New("more X.509-SVIDs are asked for than the upstream CA signs in time")} //nolint:gosec // spreading load needs no secrecy
	}
	if until := time.Unix(0, s.until.Load()); until.After(now) {
		return nil, later(until.Sub(now))
	}
	place := s.rate.ReserveN(now, 1)
	wait := place.DelayFrom(now)
	if wait > leafWait {
		place.CancelAt(now)
		return nil, later(wait)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		place.Cancel()
		return nil, later(time.Second)
	}
	timer.Reset(leafWait)
	select {
	case s.turns <- struct{}{}:
		return func() { <-s.turns }, nil
	case <-timer.C:
	case <-ctx.Done():
	}
	place.Cancel()
	return nil, later(leafWait)
}

// failedNow notes why a leaf was not signed, and says when to try again.
func (s *leafSigner) failedNow(err error) error {
	s.failed.Store(&err)
	var after time.Duration
	if limit, ok := errors.AsType[*upstream.RateLimitError](err); ok {
		after = min(max(limit.RetryAfter, time.Second), maxRetryAfter)
		s.until.Store(time.Now().Add(after).UnixNano())
	} else if errors.Is(err, upstream.ErrDenied) {
		after = deniedRetry
	}
	return &LaterError{After: after, Err: err}
}

// signature is what was made, here or above.
type signature struct {
	chain     [][]byte // DER, leaf first
	serial    []byte
	authority *ledgerv1.Authority // as the record has it: read only
}

// signAbove has the upstream CA sign l, whose times become those of the certificate.
func (c *CA) signAbove(ctx context.Context, now time.Time, a *authority, r *Request, l *leaf, made *signature) error {
	if len(r.CSR) == 0 {
		c.metrics.refused[refusedCSR].Inc()
		return &RequestError{Reason: ReasonCSR, Err: errors.New("the upstream CA signs only what a request in PKCS #10 asks for, and there is none")}
	}
	ttl := (l.notAfter.Sub(now) + time.Second - 1).Truncate(time.Second) // its end was rounded down
	request, err := upstream.NewLeaf(c.cfg.TrustDomain, r.CSR, l.key.spki, pkcs10.Names{URI: l.id, DNS: l.dnsNames}, ttl, c.leaves.limits)
	switch {
	case errors.Is(err, upstream.ErrLife):
		c.metrics.refused[refusedTTL].Inc()
		return &RequestError{Reason: ReasonTTL, Err: err}
	case err != nil:
		c.metrics.refused[refusedCSR].Inc()
		return &RequestError{Reason: ReasonCSR, Err: err}
	}
	leave, err := c.leaves.enter(ctx)
	if err != nil {
		c.metrics.refused[refusedAuthority].Inc()
		return err
	}
	defer leave()
	verified, err := c.askLeaf(ctx, request)
	if err != nil {
		c.metrics.refused[refusedAuthority].Inc()
		return c.leaves.failedNow(fmt.Errorf("have the X.509-SVID %s signed: %w", l.id, err))
	}
	if !slices.ContainsFunc(verified.Anchors, a.root.cert.Equal) {
		a.suspect.Store(true)
		c.wake()
		c.metrics.refused[refusedAuthority].Inc()
		return fmt.Errorf("%w: the upstream CA signs below another root than %s, which is looked at now", ErrNoAuthority, a.root.id)
	}
	c.leaves.failed.Store(nil)
	cert := verified.Chain[0]
	l.notBefore, l.notAfter = cert.NotBefore, cert.NotAfter
	if r.MaxLife > 0 && l.notAfter.Sub(l.notBefore) > r.MaxLife {
		c.metrics.refused[refusedTTL].Inc()
		return &RequestError{Reason: ReasonTTL, Err: fmt.Errorf("the upstream CA signs for %s: at most %s is wanted here", l.notAfter.Sub(l.notBefore), r.MaxLife)}
	}
	*made = signature{chain: encoded(verified.Chain), serial: cert.SerialNumber.Bytes(), authority: c.signedBy(verified.Chain, a.root)}
	return nil
}

// askLeaf asks for a leaf and holds the answer against the request.
func (c *CA) askLeaf(ctx context.Context, request *upstream.Request) (_ *upstream.Verified, err error) {
	defer func(start time.Time) { c.metrics.observeUpstream(start, err) }(time.Now())
	minted, err := c.leaves.SignLeaf(ctx, request)
	if err != nil {
		return nil, err
	}
	return request.Verify(time.Now(), minted)
}

// signedBy is what the record of a leaf says of its issuer.
func (c *CA) signedBy(chain []*x509.Certificate, r *root) *ledgerv1.Authority {
	issuer, role := r.cert, RoleRoot
	if len(chain) > 1 {
		issuer, role = chain[1], RoleIntermediate
	}
	fingerprint := sha256.Sum256(issuer.Raw)
	return &ledgerv1.Authority{
		Id: authorityID(issuer), Role: role, State: StateActive, Sha256: fingerprint[:], Root: r.id,
		NotAfter: timestamppb.New(issuer.NotAfter), BundleSequence: c.state.Load().trust.Sequence,
	}
}

func encoded(chain []*x509.Certificate) [][]byte {
	der := make([][]byte, len(chain))
	for i, c := range chain {
		der[i] = c.Raw
	}
	return der
}

// ownLeaf is the CA's own X.509-SVID as the upstream CA has signed it.
type ownLeaf struct {
	key   crypto.Signer
	chain []*x509.Certificate
}

// requestOwn makes a key and the request for the CA's own X.509-SVID.
func (c *CA) requestOwn() (crypto.Signer, *upstream.Request, error) {
	id, err := spiffeid.FromPath(c.cfg.TrustDomain, ownPath)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	names := pkcs10.Names{URI: id.String(), DNS: c.cfg.DNSNames}
	csr, err := pkcs10.Sign(key, names)
	if err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, nil, err
	}
	request, err := upstream.NewLeaf(c.cfg.TrustDomain, csr, spki, names, c.cfg.MaxTTL, c.leaves.limits)
	return key, request, err
}

// above is the authority that stands for the upstream CA: it has the root, and no key.
func above(v *upstream.Verified, key crypto.Signer, r *root, now time.Time) *authority {
	first := r.cert // that ends
	for _, issuer := range v.Chain[1:] {
		if issuer.NotAfter.Before(first.NotAfter) {
			first = issuer
		}
	}
	end := first.NotAfter
	return &authority{
		id: r.id, cert: r.cert, root: r, spkiHash: r.spkiHash, above: first,
		notBefore: r.cert.NotBefore, notAfter: end, leafEnd: floor(end.Add(-margin(end.Sub(now)))),
		made: now, renewAt: renewAt(now, v.Chain[0].NotAfter),
		own: &ownLeaf{key: key, chain: v.Chain},
	}
}

// installAbove puts into force what the upstream CA has shown of itself: the root that is
// above, and the CA's own X.509-SVID, once that is recorded. The caller holds mu.
func (c *CA) installAbove(ctx context.Context, a *authority, now time.Time) error {
	s := c.state.Load()
	if old := s.active; old != nil && old.id == a.id {
		a.lastLeaf.Store(old.lastLeaf.Load())
		next := *s
		next.active = a
		c.setState(&next)
	} else if err := c.install(ctx, a, now); err != nil {
		return err
	}
	return c.recordOwn(ctx, a, now)
}

// recordOwn has the CA show itself with the X.509-SVID that came with a.
func (c *CA) recordOwn(ctx context.Context, a *authority, now time.Time) error {
	cert := a.own.chain[0]
	pub, err := publicKeyOf(cert.RawSubjectPublicKeyInfo, algorithmOf(cert.PublicKey))
	if err != nil {
		return err
	}
	l := &leaf{id: cert.URIs[0].String(), dnsNames: c.cfg.DNSNames, key: pub, notBefore: cert.NotBefore, notAfter: cert.NotAfter}
	made := &signature{chain: encoded(a.own.chain), serial: cert.SerialNumber.Bytes(), authority: c.signedBy(a.own.chain, a.root)}
	record := c.ownRecord()
	c.fill(record, made, l, now)
	a.sawLeaf(cert.NotAfter.Unix())
	c.metrics.signed[kindOther].Inc()
	return c.showOwn(ctx, a, a.own.key, &Signed{Draft: ledger.NewDraft(record, made.chain), NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, RenewAt: a.renewAt})
}

// leafHealth says that leaves are not signed.
func (c *CA) leafHealth() error {
	if c.leaves == nil {
		return nil
	}
	if failed := c.leaves.failed.Load(); failed != nil {
		return fmt.Errorf("the upstream CA signs each X.509-SVID, and has not signed the last one: %w", *failed)
	}
	return nil
}
