package console

import (
	"cmp"
	"context"
	"crypto/sha256"
	"net/http"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Ledger is where sign-ins are recorded; the server is.
type Ledger interface {
	// RecordSignIn makes a sign-in durable; it has no effect unless that succeeds.
	RecordSignIn(ctx context.Context, who string, in *ledgerv1.SignIn) error
	// RecordRefusedSignIn notes a refusal; there may be very many.
	RecordRefusedSignIn(ctx context.Context, who string, in *ledgerv1.SignIn, reason, detail string)
}

// Ways to sign in.
const (
	methodMTLS = "mtls"
	methodOIDC = "oidc"
	methodLink = "link"
)

// Reasons of refusals: a closed set.
const (
	reasonTooMany     = "too_many_attempts"
	reasonLink        = "link_not_valid"
	reasonCertificate = "certificate_not_accepted"
	reasonProvider    = "provider_not_believed"
	reasonNotAllowed  = "not_allowed"
)

// signedIn records a sign-in, before it has any effect.
func (c *Console) signedIn(r *http.Request, u user, certificate []byte) error {
	err := c.cfg.Ledger.RecordSignIn(r.Context(), cmp.Or(u.actor, u.name), &ledgerv1.SignIn{
		Method: u.method, Address: r.RemoteAddr, CertificateSha256: certificate,
	})
	if err != nil {
		return err
	}
	c.metrics.login(u.method, true)
	c.log.InfoContext(r.Context(), "signed in to the console", "method", u.method, "actor", u.name, "address", r.RemoteAddr)
	return nil
}

// unrecorded answers who cannot be let in because that cannot be recorded.
func (c *Console) unrecorded(w http.ResponseWriter, r *http.Request, u user, err error) {
	c.log.ErrorContext(r.Context(), "sign-in to the console cannot be recorded", "method", u.method, "actor", u.name, "address", r.RemoteAddr, "err", err)
	http.Error(w, "you cannot be signed in now: the ledger cannot write. `ca status` on the CA's machine says why", http.StatusServiceUnavailable)
}

// refused notes that somebody was not let in.
func (c *Console) refused(r *http.Request, method, who, reason, detail string) {
	c.metrics.login(method, false)
	c.log.WarnContext(r.Context(), "sign-in to the console refused", "method", method, "actor", who, "address", r.RemoteAddr, "reason", reason)
	c.cfg.Ledger.RecordRefusedSignIn(r.Context(), who, &ledgerv1.SignIn{Method: method, Address: r.RemoteAddr}, reason, detail)
}

// signInByCertificate records the first sight of a certificate that is accepted: there
// is no other moment at which somebody signs in with one.
func (c *Console) signInByCertificate(r *http.Request, u user) error {
	key := sha256.Sum256(r.TLS.PeerCertificates[0].Raw)
	now := c.cfg.Now()
	if _, seen := c.seen.get(key, now); seen {
		return nil
	}
	c.seeing.Lock()
	defer c.seeing.Unlock()
	if _, seen := c.seen.get(key, now); seen {
		return nil // meanwhile
	}
	if err := c.signedIn(r, u, key[:]); err != nil {
		return err
	}
	c.seen.displace(key, struct{}{}, now, now.Add(c.cfg.Access.sessionLife()))
	return nil
}

// refuseCertificate notes that a certificate was presented, and is not accepted.
func (c *Console) refuseCertificate(r *http.Request) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return
	}
	key := sha256.Sum256(r.TLS.PeerCertificates[0].Raw)
	c.metrics.login(methodMTLS, false)
	c.cfg.Ledger.RecordRefusedSignIn(r.Context(), "", &ledgerv1.SignIn{
		Method: methodMTLS, Address: r.RemoteAddr, CertificateSha256: key[:],
	}, reasonCertificate, "the client certificate is not one of those that may look")
}
