// Package upstream says what a CA of somebody else must offer to be the root
// above ours: it signs an intermediate now and then, and says which roots it has;
// some sign each X.509-SVID too, if that is wanted.
// Each kind of upstream CA is a package below this one, with a Config and a New
// that refuses what can never work, and accepts a CA that cannot be reached now.
// None of them is trusted: whoever uses one checks what comes back against what
// was asked. Package upstreamtest holds each kind to this.
package upstream

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/internal/pkcs10"
)

// CA signs intermediates. An implementation need not serve concurrent calls: it
// is called by one goroutine. Every call has a deadline. It does not retry and
// does not wait out a limit: the caller does, when the error says how it is.
type CA interface {
	// Mint has an intermediate signed. Errors wrap ErrDenied, ErrUnavailable or a
	// *RateLimitError where one of them applies; anything else counts as an error
	// of this call alone, and is tried again later.
	Mint(ctx context.Context, r *Request) (*Minted, error)
	// Capabilities says what this CA can do; it does not change.
	Capabilities() Capabilities
}

// RootWatcher is a CA that tells of changes of its roots by itself. Those of a CA
// that does not are those that came with the last Minted.
type RootWatcher interface {
	// WatchRoots calls changed with all present roots, at once and after each
	// change, until ctx ends or changed returns an error, which it then returns.
	// If the connection is lost, it returns an error and is called again.
	WatchRoots(ctx context.Context, changed func(roots []*x509.Certificate) error) error
}

// LookForRoots is WatchRoots for a CA that does not tell of changes: look is called at
// once, and again when next has passed. What look returns beside an error is told before
// that ends it; nil roots are those from before.
func LookForRoots(ctx context.Context, look func(context.Context) (roots []*x509.Certificate, next time.Duration, err error), changed func([]*x509.Certificate) error) error {
	var known []*x509.Certificate
	for {
		roots, next, err := look(ctx)
		if roots != nil && !slices.EqualFunc(roots, known, (*x509.Certificate).Equal) {
			known = roots
			if err := changed(slices.Clone(known)); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		case <-timer.C:
		}
	}
}

// RootFollower is a CA that signs with a new root only once that is in force below
// it, and keeps an old one for as long as something below needs it.
type RootFollower interface {
	// InForce is called with what the mesh has of each root in its bundle, now and
	// then and after each change. It does not block. It may be called while the
	// other methods are.
	InForce(roots []InForce)
}

// InForce is what a mesh has of a root.
type InForce struct {
	Root *x509.Certificate
	// Acknowledged: every live proxy trusts it.
	Acknowledged bool
	// Held: something that has not expired chains to it.
	Held bool
	// WaitsFor says for people what keeps it from being Acknowledged; "" if nothing
	// does.
	WaitsFor string
}

// LeafSigner is a CA that can sign every leaf itself, for users who may not have
// a CA key in the mesh. It is called concurrently, up to Capabilities.LeafRate.
type LeafSigner interface {
	// SignLeaf has one X.509-SVID signed: what is minted begins with it. NewLeaf makes
	// the request. Errors are as those of Mint.
	SignLeaf(ctx context.Context, r *Request) (*Minted, error)
}

// Request asks for an intermediate, or for an X.509-SVID. NewRequest and NewLeaf make
// one, and its Verify checks what comes back.
type Request struct {
	// CSR is a PKCS#10 request in DER, signed with the key that is to be certified. For
	// an intermediate, its subject, its one URI name (spiffe://<trust domain>) and the
	// basic constraints and key usage it asks for are those that the certificate should
	// have; for an X.509-SVID it has the names, and nothing else.
	CSR []byte
	// Request is CSR, parsed.
	Request *x509.CertificateRequest
	// TTL is the life that is wanted; a multiple of Capabilities.TTLGranularity
	// and not below Capabilities.MinTTL.
	TTL time.Duration

	// What Verify needs to hold an answer against the request.
	td    spiffeid.TrustDomain
	key   crypto.Signer // nil for a leaf, as leaf is for an intermediate
	noURI bool
	leaf  *pkcs10.Names
}

// Minted is what a CA answers.
type Minted struct {
	// Chain begins with what was asked for; each certificate is issued by the next,
	// and the last by one of Roots, which itself is not in the chain.
	Chain []*x509.Certificate
	// Roots are all self-signed certificates under which this CA wants to be
	// trusted now. At least one.
	Roots []*x509.Certificate
}

// Capabilities are the limits of a CA. The zero value means: none known.
type Capabilities struct {
	// MinTTL and MaxTTL bound the life of what it signs; 0 for no bound.
	MinTTL, MaxTTL time.Duration
	// TTLGranularity is the unit in which it counts lives: AWS Private CA, days.
	TTLGranularity time.Duration
	// PathLen0 says that its intermediates cannot sign further intermediates.
	PathLen0 bool
	// KeyTypes are the kinds of keys that it certifies; nil for all.
	KeyTypes []x509.PublicKeyAlgorithm
	// LeafRate is how many leaves a second a LeafSigner may be asked for; 0 for no bound
	// that is known.
	LeafRate float64
	// NoURI says that the CA drops or refuses the URI name of an intermediate: it
	// is then no SVID itself (X509-SVID §3.2 has it as SHOULD).
	NoURI bool
}

// ErrDenied is wrapped when the CA refuses for a reason that a retry does not
// change: a permission or a policy there. An operator must act.
var ErrDenied = errors.New("upstream CA refuses")

// ErrUnavailable is wrapped when the CA could not be asked, or failed: a retry may
// help.
var ErrUnavailable = errors.New("upstream CA is not available")

// RateLimitError says that the CA wants to be asked later.
type RateLimitError struct {
	// RetryAfter is how much later; 0 if it did not say.
	RetryAfter time.Duration
	Err        error
}

// Error says when to ask again.
func (e *RateLimitError) Error() string {
	if e.RetryAfter > 0 {
		return fmt.Sprintf("upstream CA limits its rate, ask again in %s: %v", e.RetryAfter, e.Err)
	}
	return fmt.Sprintf("upstream CA limits its rate: %v", e.Err)
}

// Unwrap returns the answer of the CA.
func (e *RateLimitError) Unwrap() error { return e.Err }

// maxSaid is how much of what a CA says is passed on in an error, in bytes.
const maxSaid = 500

// Cut bounds a text of a CA's that becomes part of an error.
func Cut(text string) string {
	if len(text) > maxSaid {
		return strings.ToValidUTF8(text[:maxSaid], "") + "…"
	}
	return text
}
