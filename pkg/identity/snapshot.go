package identity

import (
	"crypto"
	"crypto/x509"
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
}

// SVID is an X.509-SVID with its private key. It is immutable. A new SVID is a
// new value: consumers may key caches by the pointer.
type SVID struct {
	ID spiffeid.ID
	// Chain is the leaf, then its intermediates; the root is not included.
	Chain []*x509.Certificate
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
