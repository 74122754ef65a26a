package workloadapi

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/internal/weakmap"
	"github.com/meshid/meshid/pkg/identity"
)

// maxHint is the longest hint that is sent, in bytes: Workload API §5.2.1.
const maxHint = 1024

// cache encodes each SVID and each bundle once, for all messages of all calls. It
// holds them weakly: what the agent has dropped is gone from here as well, keys
// included. The zero value is empty.
type cache struct {
	svids   weakmap.Map[identity.SVID, encodedSVID]
	bundles weakmap.Map[identity.Bundle, encodedBundle]
}

type encodedSVID struct {
	once       sync.Once // fills what follows
	chain, key []byte    // Workload API §5.1: certificates in DER, one after the other
	err        error
}

type encodedBundle struct {
	once sync.Once // fills what follows
	der  []byte
	err  error
}

func (c *cache) svid(s *identity.SVID) *encodedSVID {
	e := c.svids.Get(s)
	e.once.Do(func() {
		if len(s.Chain) == 0 || slices.Contains(s.Chain, nil) || s.Key == nil {
			e.err = fmt.Errorf("encode SVID of %s: certificate or key is missing", s.ID)
			return
		}
		leaf, err := s.Chain[0].X509()
		if err != nil {
			e.err = fmt.Errorf("encode SVID of %s: %w", s.ID, err)
			return
		}
		// Workload API §5.2.1: the message and the certificate say the same.
		if id := leaf.URIs; len(id) != 1 || id[0].String() != s.ID.String() {
			e.err = fmt.Errorf("encode SVID of %s: its certificate is for %q", s.ID, id)
			return
		}
		for _, c := range s.Chain {
			e.chain = append(e.chain, c.Raw...)
		}
		if e.key, e.err = x509.MarshalPKCS8PrivateKey(s.Key); e.err != nil {
			e.err = fmt.Errorf("encode SVID of %s: key type %T cannot be delivered", s.ID, s.Key)
		}
	})
	return e
}

// bundle returns a bundle's DER. An empty one is an error: a client would take it
// for "believe nobody", and fail with all its peers.
func (c *cache) bundle(b *identity.Bundle) ([]byte, error) {
	if b == nil {
		return nil, errors.New("encode trust bundle: there is none")
	}
	e := c.bundles.Get(b)
	e.once.Do(func() {
		// A leaf in it would vouch for itself.
		notCA := func(c *x509.Certificate) bool { return c == nil || !c.BasicConstraintsValid || !c.IsCA }
		for _, c := range slices.DeleteFunc(slices.Clone(b.Roots), notCA) {
			e.der = append(e.der, c.Raw...)
		}
		if len(e.der) == 0 || b.TrustDomain.IsZero() {
			e.err = fmt.Errorf("encode trust bundle of %q: it has no CA certificate", b.TrustDomain.Name())
		}
	})
	return e.der, e.err
}

// lists returns the revocation lists of a bundle, DER each (Workload API §5.2.1).
func lists(b *identity.Bundle) (all [][]byte) {
	for _, l := range b.Lists {
		all = append(all, l.List)
	}
	return all
}

// x509SVIDs returns the message for a snapshot that has SVIDs, and how many hints
// were left out. An SVID that cannot be delivered makes it fail as a whole: a
// message is complete, and without it would take that SVID from the workload.
func (c *cache) x509SVIDs(s *identity.Snapshot) (m *workload.X509SVIDResponse, dropped int, err error) {
	local, err := c.bundle(s.Bundle)
	if err != nil {
		return nil, 0, err
	}
	m = &workload.X509SVIDResponse{FederatedBundles: c.federated(s)}
	hints := make(map[string]bool, len(s.SVIDs))
	for _, v := range s.SVIDs {
		bundle := local
		if v.ID.TrustDomain() != s.Bundle.TrustDomain {
			if bundle, err = c.bundle(s.Federated[v.ID.TrustDomain()]); err != nil {
				return nil, 0, fmt.Errorf("SVID of %s: %w", v.ID, err)
			}
		}
		e := c.svid(v)
		if e.err != nil {
			return nil, 0, e.err
		}
		hint := v.Hint
		if hint != "" && (hints[hint] || len(hint) > maxHint) {
			hint = "" // §5.2.1: hints are unique in a message
			dropped++
		}
		hints[hint] = true
		m.Svids = append(m.Svids, &workload.X509SVID{
			SpiffeId:    v.ID.String(),
			X509Svid:    e.chain,
			X509SvidKey: e.key,
			Bundle:      bundle,
			Hint:        hint,
		})
	}
	m.Crl = lists(s.Bundle)
	return m, dropped, nil
}

// x509Bundles returns the message with all bundles of a snapshot.
func (c *cache) x509Bundles(s *identity.Snapshot) (*workload.X509BundlesResponse, error) {
	local, err := c.bundle(s.Bundle)
	if err != nil {
		return nil, err
	}
	bundles := c.federated(s)
	if bundles == nil {
		bundles = make(map[string][]byte, 1)
	}
	bundles[s.Bundle.TrustDomain.IDString()] = local
	return &workload.X509BundlesResponse{Bundles: bundles, Crl: lists(s.Bundle)}, nil
}

// federated returns the other bundles, by the SPIFFE ID of their trust domain. One
// that is not good is left out, so that it does not cost the client the rest.
func (c *cache) federated(s *identity.Snapshot) map[string][]byte {
	if len(s.Federated) == 0 {
		return nil
	}
	bundles := make(map[string][]byte, len(s.Federated)+1)
	byName := func(a, b spiffeid.TrustDomain) int { return a.Compare(b) }
	for _, td := range slices.SortedFunc(maps.Keys(s.Federated), byName) {
		b := s.Federated[td]
		if b == nil || b.TrustDomain != td || td == s.Bundle.TrustDomain {
			continue
		}
		if der, err := c.bundle(b); err == nil {
			bundles[td.IDString()] = der
		}
	}
	return bundles
}
