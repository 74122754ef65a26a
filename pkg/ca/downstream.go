package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// CAs below this one, which have intermediates of their own, signed by our root as
// ours are. Our proxies have to believe what they sign, and theirs what we sign:
//
//   - a root stays in the bundle for as long as one of their intermediates lives:
//     these are in the store beside our own
//   - a new root signs only once they have it in force everywhere below: they are
//     among the nodes whose acknowledgements a rotation waits for, for as long as
//     their last intermediate lives
//
// The same from below: tellAbove says what is in force in this mesh, to an upstream
// CA that waits for it.

// below is what stands in Intermediate.Instance before the SPIFFE ID of a CA below.
const below = "below:"

// ErrNotRoot is returned where the root is that of an upstream CA: it alone can sign
// intermediates.
var ErrNotRoot = errors.New("the root of this CA is that of its upstream CA: put CAs below that one")

// Downstream is a request for an intermediate of a CA below this one.
type Downstream struct {
	// ID is the SPIFFE ID of the CA below.
	ID  string
	Key *PublicKey
	// Life is shortened to what this CA's own intermediates get.
	Life time.Duration
	// Actor, RequestID and Address say in the record who has asked.
	Actor, RequestID, Address string
}

// SignDownstream signs an intermediate and returns it once that is recorded. It may
// sign leaves of this trust domain, and nothing that signs. The error wraps
// ErrNotRoot, ErrListsBelow or ErrNoAuthority where these apply, and is a *RequestError for what can
// never be granted.
func (c *CA) SignDownstream(ctx context.Context, r *Downstream) (*x509.Certificate, error) {
	if err := c.cfg.Clock(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoAuthority, err)
	}
	if r.Life < MinTTL {
		return nil, &RequestError{Reason: ReasonTTL, Err: fmt.Errorf("an intermediate of %s: at least %s is needed", r.Life, MinTTL)}
	}
	pub, err := x509.ParsePKIXPublicKey(r.Key.SPKI())
	if err != nil {
		return nil, &RequestError{Reason: ReasonCSR, Err: err}
	}
	if c.cfg.Revocation {
		return nil, ErrListsBelow
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now().Round(0)
	if c.state.Load().signer.foreign {
		return nil, ErrNotRoot
	}
	if err := c.unlockSigner(ctx, now); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoAuthority, err)
	}
	s := c.state.Load()
	end := c.intermediateEnd(s.signer, now)
	if wanted := floor(now.Add(r.Life)); wanted.Before(end) {
		end = wanted
	}
	cert, err := c.certify(s.signer, pub, now, end)
	if err != nil {
		return nil, fmt.Errorf("sign an intermediate for %s: %w", r.ID, err)
	}
	sctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	// Noted before it is recorded, and recorded before it is released: the root
	// does not leave while it may be used.
	if err := c.cfg.Store.PutIntermediates(sctx, now, Intermediate{ID: authorityID(cert), Root: s.signer.id, Instance: below + r.ID, LiveUntil: cert.NotAfter}); err != nil {
		return nil, fmt.Errorf("%w: note an intermediate for %s: %w", ErrNoAuthority, r.ID, err)
	}
	record := c.authorityRecord(now, cert, RoleIntermediate, StateActive, s.trust.Sequence)
	record.Authority.Root = s.signer.id
	record.Actor, record.RequestId = r.Actor, r.RequestID
	record.Detail = fmt.Sprintf("for the CA below, path length 0, life %s", cert.NotAfter.Sub(now).Round(time.Second))
	if r.Address != "" {
		record.Node = &ledgerv1.NodeRef{Address: r.Address}
	}
	if _, err := c.cfg.Ledger.Append(sctx, ledger.NewDraft(record, nil)); err != nil {
		return nil, fmt.Errorf("%w: record an intermediate for %s: %w", ErrNoAuthority, r.ID, err)
	}
	c.log.InfoContext(ctx, "intermediate of a ca below signed", "spiffe_id", r.ID, "authority", authorityID(cert), "not_after", cert.NotAfter)
	return cert, nil
}

// SignedBelow reports whether an issuer is an intermediate of a CA below this one.
func (c *CA) SignedBelow(ctx context.Context, issuer *x509.Certificate) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	intermediates, err := c.cfg.Store.Intermediates(ctx)
	if err != nil {
		return false, fmt.Errorf("read the intermediates: %w", err)
	}
	id := authorityID(issuer)
	return slices.ContainsFunc(intermediates, func(i Intermediate) bool {
		_, ok := i.Below()
		return ok && i.ID == id
	}), nil
}

// waitBelow has CAs below be waited for as long as something lives that their
// intermediates signed, connected or not.
func waitBelow(nodes []rotation.Node, intermediates []Intermediate) {
	ends := make(map[string]time.Time)
	for _, i := range intermediates {
		if id, ok := i.Below(); ok && i.LiveUntil.After(ends[id]) {
			ends[id] = i.LiveUntil
		}
	}
	for i := range nodes {
		if end, ok := ends[nodes[i].ID]; ok {
			nodes[i].Lease = end
		}
	}
}

// tellAbove tells the upstream CA, if it wants to know, what of its roots is in force.
func (c *CA) tellAbove(ctx context.Context) {
	if c.cfg.Upstream == nil {
		return
	}
	above, ok := c.cfg.Upstream.CA.(upstream.RootFollower)
	if !ok {
		return
	}
	now, err := c.Rotation(ctx)
	if err != nil {
		return // what is held is not known: what was told stays
	}
	bundle := c.state.Load().roots
	var roots []upstream.InForce
	for _, r := range now.Trust.Bundle() {
		i := slices.IndexFunc(bundle, func(b *root) bool { return b.id == r.ID })
		if i < 0 {
			continue
		}
		told := upstream.InForce{Root: bundle[i].cert, Acknowledged: r.State != rotation.Prepared, Held: now.Inputs.Horizons[r.ID].After(now.Inputs.Now)}
		if waiting := rotation.Waiting(now.Inputs, r.Sequence); !told.Acknowledged {
			told.WaitsFor = fmt.Sprintf("%d nodes: %s", len(waiting), rotation.Names(waiting))
			if now.Trust.Paused {
				told.WaitsFor = "its roots, which are paused there (ca authority resume)"
			}
		}
		roots = append(roots, told)
	}
	above.InForce(roots)
}

// Below returns the SPIFFE ID of the CA below whose intermediate it is.
func (i Intermediate) Below() (id string, ok bool) { return strings.CutPrefix(i.Instance, below) }
