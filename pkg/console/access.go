package console

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"time"
)

// Access says who may look, and how they show who they are. Each way is off unless
// it is there.
type Access struct {
	// Admin returns the SPIFFE ID that a client's X.509-SVID proves, if it is that of
	// an entry marked admin.
	Admin func(context.Context, *tls.ConnectionState) (string, error)
	// ClientCAs verify other client certificates, of which those with a subject
	// (RFC 4514) or a DNS name or an e-mail address in Subjects may look.
	ClientCAs *x509.CertPool
	Subjects  []string
	OIDC      *OIDC
	// Links are single-use links made by NewLink.
	Links bool
	// SessionLife is how long a login lasts; 8 h if 0.
	SessionLife time.Duration
}

func (a Access) sessionLife() time.Duration {
	if a.SessionLife > 0 {
		return a.SessionLife
	}
	return 8 * time.Hour
}

const (
	sessionCookie = "__Host-meshid-session"
	linkLife      = 10 * time.Minute
	maxLinks      = 16
	maxSessions   = 256
)

// user is who looks.
type user struct {
	name    string
	actor   string // as the ledger has it; name if empty
	method  string // how that was shown, a value of the metric's label
	session string // its cookie; empty for certificates
}

type userKey struct{}

// known lets only those pass who have shown who they are, and of whom that is
// recorded.
func (c *Console) known(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, ok := c.user(r)
		if ok && u.method == methodMTLS {
			if err := c.signInByCertificate(r, u); err != nil {
				c.unrecorded(w, r, u, err)
				return
			}
		}
		if !ok {
			c.refuseCertificate(r)
			if r.URL.Path == prefix+"/events" || r.Method != http.MethodGet {
				http.Error(w, "sign in first", http.StatusUnauthorized)
				return
			}
			http.Redirect(w, r, loginPath+"?"+url.Values{"to": {local(r.URL.RequestURI())}}.Encode(), http.StatusSeeOther)
			return
		}
		next(w, r.WithContext(context.WithValue(r.Context(), userKey{}, u)))
	})
}

// user says who asks: by the session's cookie, else by the client certificate.
func (c *Console) user(r *http.Request) (user, bool) {
	if cookie, err := r.Cookie(sessionCookie); err == nil {
		if u, ok := c.sessions.get(keyOf(cookie.Value), c.cfg.Now()); ok {
			u.session = cookie.Value
			return u, true
		}
	}
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return user{}, false
	}
	if c.cfg.Access.Admin != nil {
		if id, err := c.cfg.Access.Admin(r.Context(), r.TLS); err == nil {
			return user{name: id, method: methodMTLS}, true
		}
	}
	if name, err := c.cfg.Access.verify(r.TLS.PeerCertificates, c.cfg.Now()); err == nil {
		return user{name: name, method: methodMTLS}, true
	}
	return user{}, false
}

// verify returns the name by which a client certificate may look.
func (a Access) verify(chain []*x509.Certificate, now time.Time) (string, error) {
	if a.ClientCAs == nil {
		return "", errors.New("no client ca is configured")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:min(len(chain), 5)] {
		between.AddCert(c)
	}
	leaf := chain[0]
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots: a.ClientCAs, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return "", err
	}
	for _, name := range slices.Concat([]string{leaf.Subject.String()}, leaf.DNSNames, leaf.EmailAddresses) {
		if name != "" && slices.Contains(a.Subjects, name) {
			return name, nil
		}
	}
	return "", errors.New("the certificate's subject is not one of those that may look")
}

// errTooManyLinks says that links wait to be used.
var errTooManyLinks = errors.New("too many links wait to be used: use one, or wait ten minutes")

// ErrNoLinks is returned by NewLink if links are not among the ways in.
var ErrNoLinks = errors.New("one-time links are off: set console.one_time_link in the CA's configuration")

// NewLink makes a link by which one browser can sign in once, within ten minutes.
// by is who asked for it. The caller puts the address before it.
func (c *Console) NewLink(by string) (path string, ends time.Time, err error) {
	if !c.cfg.Access.Links {
		return "", time.Time{}, ErrNoLinks
	}
	secret, now := rand.Text(), c.cfg.Now()
	ends = now.Add(linkLife)
	if !c.links.add(keyOf(secret), by, now, ends) {
		return "", time.Time{}, errTooManyLinks
	}
	return loginPath + "?" + url.Values{"token": {secret}}.Encode(), ends, nil
}

// loginPage is what the page to sign in shows.
type loginPage struct {
	Links, OIDC, Certificates bool
	Token, To, Problem        string
}

// showLogin offers the ways in. A link is not used up by looking at it, so that a
// preview in a chat does not.
func (c *Console) showLogin(w http.ResponseWriter, r *http.Request) {
	if _, ok := c.user(r); ok && !r.URL.Query().Has("token") {
		redirect(w, r, r.URL.Query().Get("to"))
		return
	}
	c.renderLogin(w, http.StatusOK, loginPage{Token: r.URL.Query().Get("token"), To: local(r.URL.Query().Get("to"))})
}

func (c *Console) renderLogin(w http.ResponseWriter, code int, p loginPage) {
	a := c.cfg.Access
	p.Links, p.OIDC, p.Certificates = a.Links, a.OIDC != nil, a.Admin != nil || a.ClientCAs != nil
	p.To = cmp.Or(p.To, prefix+"/")
	c.render(w, code, &view{Title: "Sign in", Template: "login", Body: p})
}

// loginByLink uses a link up.
func (c *Console) loginByLink(w http.ResponseWriter, r *http.Request) {
	now := c.cfg.Now()
	if !c.tries.take(r.RemoteAddr, now) {
		c.refused(r, methodLink, "", reasonTooMany, "")
		tooMany(w)
		return
	}
	by, ok := c.links.take(keyOf(r.PostFormValue("token")), now)
	if !ok || !c.cfg.Access.Links {
		c.refused(r, methodLink, "", reasonLink, "the link was used already, is too old, or is none")
		c.renderLogin(w, http.StatusForbidden, loginPage{Problem: "This link was used already, or is too old. Make a new one."})
		return
	}
	c.begin(w, r, user{name: "link of " + by, actor: by, method: methodLink}, r.PostFormValue("to"))
}

// begin begins a session, once it is recorded.
func (c *Console) begin(w http.ResponseWriter, r *http.Request, u user, to string) {
	if err := c.signedIn(r, u, nil); err != nil {
		c.unrecorded(w, r, u, err)
		return
	}
	if old, err := r.Cookie(sessionCookie); err == nil {
		c.sessions.take(keyOf(old.Value), c.cfg.Now())
	}
	secret, now, life := rand.Text(), c.cfg.Now(), c.cfg.Access.sessionLife()
	c.sessions.displace(keyOf(secret), u, now, now.Add(life))
	http.SetCookie(w, &http.Cookie{
		Name: sessionCookie, Value: secret, Path: "/", MaxAge: int(life / time.Second),
		Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
	redirect(w, r, to)
}

// logout ends the session.
func (c *Console) logout(w http.ResponseWriter, r *http.Request) {
	if cookie, err := r.Cookie(sessionCookie); err == nil {
		c.sessions.take(keyOf(cookie.Value), c.cfg.Now())
	}
	http.SetCookie(w, &http.Cookie{Name: sessionCookie, Path: "/", MaxAge: -1, Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode})
	http.Redirect(w, r, loginPath, http.StatusSeeOther)
}
