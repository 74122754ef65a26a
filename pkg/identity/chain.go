package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A chain is verified once, where it comes into the agent, and what is to be done
// with it later asks for the Proof. Two things are remembered, both by the exact
// bytes of certificates and never by a name in them:
//
//   - Proof: this chain leads to that root.
//   - Chains: these issuers lead to that root, so that of the next leaf below them
//     only the leaf is left to verify.

// Proof says that one chain leads to one root. Only Chains.Verify makes one, so
// whoever has it need not verify the signatures again. It is immutable; the zero
// value proves nothing.
type Proof struct {
	chain, root         [sha256.Size]byte
	notBefore, notAfter time.Time // when all of them are valid, the root included
}

// OfChain says whether p is about exactly these certificates, in this order: each
// is then signed by the next one. It hashes them, which costs a hundredth of what
// a signature does.
func (p *Proof) OfChain(chain []*Certificate) bool {
	return p != nil && !p.notAfter.IsZero() && p.chain == digestOf(chain)
}

// Anchored says whether p is about a chain that leads to one of these roots, and is
// valid now. The caller has asked OfChain.
func (p *Proof) Anchored(roots []*x509.Certificate, now time.Time) bool {
	return p != nil && !p.notAfter.IsZero() && !now.Before(p.notBefore) && !now.After(p.notAfter) &&
		slices.ContainsFunc(roots, func(r *x509.Certificate) bool { return sha256.Sum256(r.Raw) == p.root })
}

// digestOf stands for certificates in an order.
func digestOf(chain []*Certificate) (sum [sha256.Size]byte) {
	h := sha256.New()
	var length [8]byte
	for _, c := range chain {
		binary.BigEndian.PutUint64(length[:], uint64(len(c.Raw)))
		h.Write(length[:])
		h.Write(c.Raw)
	}
	h.Sum(sum[:0])
	return sum
}

// Chains verifies chains. The zero value is ready for use, and may be used
// concurrently.
type Chains struct {
	mu    sync.Mutex // guards known
	known map[issuersKey]issuers
}

// maxIssuers bounds what is remembered.
const maxIssuers = 64

// issuersKey names the certificates between a leaf and its root, and what leaves
// below them are for.
type issuersKey struct {
	chain [sha256.Size]byte
	usage x509.ExtKeyUsage
}

// issuers lead to root whatever the leaf below them is: see selfContained.
type issuers struct {
	root                *x509.Certificate
	notBefore, notAfter time.Time
}

// Verify verifies that a chain, the leaf first, leads to one of roots now, and that
// its leaf may be used for usage. The proof is nil if it does so, but not through
// all of its certificates in their order: nobody can say then that each is signed by
// the next. It returns the errors of crypto/x509.
func (c *Chains) Verify(now time.Time, chain, roots []*x509.Certificate, usage x509.ExtKeyUsage) (*Proof, error) {
	if len(chain) == 0 || slices.Contains(chain, nil) || slices.Contains(roots, nil) {
		return nil, errors.New("a certificate is missing")
	}
	key := issuersKey{digestOf(NewCertificates(chain[1:]...)), usage}
	short := len(chain) > 1 && selfContained(chain[0]) && !chain[0].IsCA
	if short {
		if found, ok := c.find(key, roots, now); ok {
			if _, err := verify(now, chain[:1], chain[1:2], usage); err != nil {
				return nil, err
			}
			return found.prove(chain), nil
		}
	}
	paths, err := verify(now, chain, roots, usage)
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		if len(path) != len(chain)+1 || !slices.EqualFunc(path[:len(chain)], chain, (*x509.Certificate).Equal) {
			continue
		}
		found := issuers{root: path[len(chain)]}
		found.notBefore, found.notAfter = Validity(NewCertificates(path[1:]...))
		if short && !slices.ContainsFunc(path[1:], func(c *x509.Certificate) bool { return !selfContained(c) }) {
			c.keep(key, found)
		}
		return found.prove(chain), nil
	}
	return nil, nil //nolint:nilnil // verified, and nothing more is proved
}

// verify is crypto/x509's verification, with nothing else trusted than roots.
func verify(now time.Time, chain, roots []*x509.Certificate, usage x509.ExtKeyUsage) ([][]*x509.Certificate, error) {
	anchors, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		anchors.AddCert(r)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	paths, err := chain[0].Verify(x509.VerifyOptions{
		Roots: anchors, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return nil, fmt.Errorf("verify the chain: %w", err)
	}
	return paths, nil
}

// prove makes the proof of a chain below these issuers.
func (i issuers) prove(chain []*x509.Certificate) *Proof {
	p := &Proof{chain: digestOf(NewCertificates(chain...)), root: sha256.Sum256(i.root.Raw), notBefore: i.notBefore, notAfter: i.notAfter}
	if leaf := chain[0]; leaf.NotBefore.After(p.notBefore) {
		p.notBefore = leaf.NotBefore
	}
	if leaf := chain[0]; leaf.NotAfter.Before(p.notAfter) {
		p.notAfter = leaf.NotAfter
	}
	return p
}

// find returns issuers that were verified before, if they lead to one of roots
// now.
func (c *Chains) find(key issuersKey, roots []*x509.Certificate, now time.Time) (issuers, bool) {
	c.mu.Lock()
	found, ok := c.known[key]
	c.mu.Unlock()
	return found, ok && !now.Before(found.notBefore) && !now.After(found.notAfter) &&
		slices.ContainsFunc(roots, func(r *x509.Certificate) bool { return bytes.Equal(r.Raw, found.root.Raw) })
}

func (c *Chains) keep(key issuersKey, i issuers) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= maxIssuers {
		c.known = make(map[issuersKey]issuers)
	}
	c.known[key] = i
}

// selfContained says whether nothing in a certificate makes the validity of another one in
// its chain depend on it, but for its key, its names as issuer and subject, its
// basic constraints and its usage. Constraints of names and policies do (RFC 5280
// §6.1): a chain with those is verified as a whole, each time.
func selfContained(c *x509.Certificate) bool {
	return !slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool {
		return !slices.ContainsFunc(selfContainedExtensions, e.Id.Equal)
	})
}

// selfContainedExtensions are the ones of RFC 5280 that selfContained is about.
var selfContainedExtensions = []asn1.ObjectIdentifier{
	{2, 5, 29, 14},              // subject key identifier
	{2, 5, 29, 15},              // key usage
	{2, 5, 29, 17},              // subject alternative name
	{2, 5, 29, 19},              // basic constraints
	{2, 5, 29, 31},              // CRL distribution points
	{2, 5, 29, 35},              // authority key identifier
	{2, 5, 29, 37},              // extended key usage
	{1, 3, 6, 1, 5, 5, 7, 1, 1}, // authority information access
}

// Validity returns when all of these certificates are valid; both are zero if there
// are none.
func Validity(all []*Certificate) (notBefore, notAfter time.Time) {
	for n, c := range all {
		if n == 0 || c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if n == 0 || c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}
