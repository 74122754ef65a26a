package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bundle is the trust bundle of one trust domain. It is immutable: it may be
// shared between goroutines, and neither it nor what it points to is changed.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// Sequence grows with each change of the bundle.
	Sequence uint64
	// Roots are self-signed CA certificates, never empty.
	Roots []*x509.Certificate
	// Lists are the revocation lists of the intermediates: one for each of which
	// something lives, or none at all, and then nothing is revoked by lists.
	Lists []*RevocationList
}

// Certificate is what is kept of a certificate once it was verified: what is delivered,
// and what is asked for later, under the names that crypto/x509 has for it. It takes a
// fifth of an x509.Certificate, of which a node would have one for each identity. It is
// immutable.
type Certificate struct {
	// Raw is the certificate in DER.
	Raw                                                []byte
	RawIssuer, RawSubjectPublicKeyInfo, AuthorityKeyId []byte //nolint:revive,staticcheck // as crypto/x509 spells it
	SerialNumber                                       *big.Int
	NotBefore, NotAfter                                time.Time
}

// NewCertificate returns what is kept of c. They share memory: c must not be changed
// afterwards.
func NewCertificate(c *x509.Certificate) *Certificate {
	return &Certificate{
		Raw: c.Raw, RawIssuer: c.RawIssuer, RawSubjectPublicKeyInfo: c.RawSubjectPublicKeyInfo,
		AuthorityKeyId: c.AuthorityKeyId, SerialNumber: c.SerialNumber, NotBefore: c.NotBefore, NotAfter: c.NotAfter,
	}
}

// NewCertificates returns what is kept of each of them.
func NewCertificates(all ...*x509.Certificate) []*Certificate {
	kept := make([]*Certificate, len(all))
	for n, c := range all {
		kept[n] = NewCertificate(c)
	}
	return kept
}

// Equal says whether two certificates are the same, byte for byte.
func (c *Certificate) Equal(other *Certificate) bool { return bytes.Equal(c.Raw, other.Raw) }

// X509 returns all that the certificate says. It parses it anew.
func (c *Certificate) X509() (*x509.Certificate, error) { return x509.ParseCertificate(c.Raw) }

// SVID is an X.509-SVID with its private key. It is immutable. A new SVID is a
// new value: consumers may key caches by the pointer.
type SVID struct {
	ID spiffeid.ID
	// Chain is the leaf, then its intermediates; the root is not included.
	Chain []*Certificate
	// Proof is that of Chain: nil if there is none, and then whoever wants to be
	// sure verifies for himself.
	Proof *Proof
	Key   crypto.Signer
	// Hint is the Workload API's hint, or "".
	Hint string
	// Entry is the name of the registration entry it was issued under.
	Entry string
	// RenewAt is when the agent replaces it.
	RenewAt time.Time
}

// NotAfter returns when the leaf expires.
func (s *SVID) NotAfter() time.Time { return s.Chain[0].NotAfter }

// Snapshot is all that one workload instance has at one moment. It is immutable.
type Snapshot struct {
	// SVIDs in a stable order: the first one is the default identity.
	SVIDs []*SVID
	// Bundle is that of the local trust domain; never nil.
	Bundle *Bundle
	// Federated are the bundles of other trust domains, by name; may be nil.
	Federated map[spiffeid.TrustDomain]*Bundle
	// Withdrawn are identities that this instance had and has no right to any
	// more: they are to be made useless wherever they were delivered. One that
	// has merely expired is not among them.
	Withdrawn []spiffeid.ID
	// Denied is set when the instance was attested and no entry gives it an
	// identity. It is false while identities are still on their way.
	Denied bool
}

// Default returns the default identity's SVID, or nil if there is none (yet).
func (s *Snapshot) Default() *SVID {
	if s == nil || len(s.SVIDs) == 0 {
		return nil
	}
	return s.SVIDs[0]
}
