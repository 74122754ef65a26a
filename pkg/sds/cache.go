package sds

import (
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

	"github.com/meshid/meshid/internal/weakmap"
	"github.com/meshid/meshid/pkg/identity"
)

// maxCombined bounds the sets of trust domains that are kept encoded.
const maxCombined = 64

// cache encodes each SVID and each bundle once. It holds them weakly: what the
// agent has dropped is gone from here as well, keys included.
type cache struct {
	svids   weakmap.Map[identity.SVID, leafEntry]
	bundles weakmap.Map[identity.Bundle, bundleEntry]

	mu         sync.Mutex                       // guards what follows
	combined   map[[sha256.Size]byte]*secret    // secrets of several bundles
	tombstones func(id string) (*secret, error) // safe for concurrent use
}

func newCache() *cache {
	return &cache{combined: make(map[[sha256.Size]byte]*secret), tombstones: newGraveyard().tombstone}
}

// leafEntry is what is known about one SVID.
type leafEntry struct {
	once                sync.Once // fills what follows
	secret              *secret
	refusal             *withheldError
	notBefore, notAfter time.Time

	mu      sync.Mutex // guards what follows
	bundle  weak.Pointer[identity.Bundle]
	checked bool
	chain   *withheldError
}

// leaf returns an SVID's secret, checked as of now against the bundle that the
// same caller is given.
func (c *cache) leaf(s *identity.SVID, b *identity.Bundle, now time.Time) (*secret, *withheldError) {
	e := c.svids.Get(s)
	e.once.Do(func() {
		if e.refusal = checkLeaf(s); e.refusal != nil {
			return
		}
		e.notBefore, e.notAfter = identity.Validity(s.Chain)
		var err error
		if e.secret, err = newLeafOf(s); err != nil {
			if !errors.As(err, &e.refusal) {
				e.refusal = withhold(withheldProfile, "%w", err)
			}
		}
	})
	switch {
	case e.refusal != nil:
		return nil, e.refusal
	case b == nil || b.TrustDomain != s.ID.TrustDomain():
		return nil, withhold(withheldBundle, "check certificate of %s: there is no trust bundle of its trust domain", s.ID)
	case now.Before(e.notBefore):
		r := withhold(withheldNotYetValid, "check certificate of %s: not valid before %s", s.ID, e.notBefore)
		r.until = e.notBefore
		return nil, r
	case !now.Before(e.notAfter):
		return nil, withhold(withheldExpired, "check certificate of %s: expired at %s", s.ID, e.notAfter)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if key := weak.Make(b); !e.checked || e.bundle != key {
		e.bundle, e.checked = key, true
		e.chain = checkChain(s, b, now)
	}
	if e.chain != nil {
		return nil, e.chain
	}
	return e.secret, nil
}

// bundleEntry is one bundle.
type bundleEntry struct {
	once    sync.Once // fills what follows
	domain  *trustDomain
	secret  *secret // the bundle alone
	refusal *withheldError
}

func (c *cache) bundle(b *identity.Bundle) *bundleEntry {
	e := c.bundles.Get(b)
	e.once.Do(func() {
		var err error
		if e.domain, err = newTrustDomain(b); err == nil {
			e.secret, err = newRoot(e.domain)
		}
		if err != nil && !errors.As(err, &e.refusal) {
			e.refusal = withhold(withheldBundle, "%w", err)
		}
	})
	return e
}

// root returns the secret of one bundle.
func (c *cache) root(b *identity.Bundle) (*secret, *withheldError) {
	if b == nil {
		return nil, withhold(withheldBundle, "encode trust bundle: there is none")
	}
	e := c.bundle(b)
	return e.secret, e.refusal
}

// all returns the secret of all bundles of a snapshot. The local one must be good;
// of the others those are left out that are not, so that one of them does not
// cost the rest.
func (c *cache) all(s *identity.Snapshot) (*secret, *withheldError) {
	local, refusal := c.root(s.Bundle)
	if refusal != nil {
		return nil, refusal
	}
	if len(s.Federated) == 0 {
		return local, nil
	}
	domains := make([]*trustDomain, 0, 1+len(s.Federated))
	domains = append(domains, c.bundle(s.Bundle).domain)
	for td, b := range s.Federated {
		if b == nil || td != b.TrustDomain || td == s.Bundle.TrustDomain {
			continue
		}
		if e := c.bundle(b); e.refusal == nil {
			domains = append(domains, e.domain)
		}
	}
	slices.SortFunc(domains[1:], func(a, b *trustDomain) int { return strings.Compare(a.name, b.name) })

	digest := sha256.New()
	for _, d := range domains {
		digest.Write(d.digest[:])
	}
	key := [sha256.Size]byte(digest.Sum(nil))
	c.mu.Lock()
	defer c.mu.Unlock()
	if known := c.combined[key]; known != nil {
		return known, nil
	}
	made, err := newRoot(domains...)
	if err != nil {
		if !errors.As(err, &refusal) {
			refusal = withhold(withheldBundle, "%w", err)
		}
		return nil, refusal
	}
	if len(c.combined) >= maxCombined {
		clear(c.combined) // sets change rarely, and all at once
	}
	c.combined[key] = made
	return made, nil
}
