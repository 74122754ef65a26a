package console

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// OIDC is a provider that says who somebody is (OpenID Connect Core 1.0,
// authorization code flow with PKCE).
type OIDC struct {
	Issuer, ClientID string
	// ClientSecret is empty for a public client.
	ClientSecret string
	// RedirectURL is where the provider sends browsers back: the console's address
	// with /console/login/callback.
	RedirectURL string
	// Scopes beside openid.
	Scopes []string
	// GroupsClaim is the claim with the groups.
	GroupsClaim string
	// Subjects (the claim sub) and Groups may look.
	Subjects, Groups []string
	// Roots verify the provider's certificate; nil for the system's.
	Roots *x509.CertPool
}

const (
	oidcCookie  = "__Host-meshid-oidc"
	oidcTimeout = 10 * time.Second
	loginLife   = 10 * time.Minute
	maxAnswer   = 1 << 20 // of the provider
)

// algorithms are those of ID tokens: asymmetric ones only, whatever the provider
// says that it supports.
var algorithms = []string{oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA}

// errNotAllowed says that the provider knows who it is.
var errNotAllowed = errors.New("neither the subject nor a group of it may look")

// oidcLogin signs people in with a provider.
type oidcLogin struct {
	cfg    OIDC
	client *http.Client
	aead   cipher.AEAD // seals what a login has to remember, in the browser's cookie

	mu       sync.Mutex // guards what follows
	provider *oidc.Provider
}

// pending is a login between the way there and the way back.
type pending struct {
	State    string    `json:"state"`
	Nonce    string    `json:"nonce"`
	Verifier string    `json:"verifier"`
	To       string    `json:"to"`
	Ends     time.Time `json:"ends"`
}

func newOIDCLogin(cfg OIDC) (*oidcLogin, error) {
	if len(cfg.Subjects) == 0 && len(cfg.Groups) == 0 {
		return nil, errors.New("oidc: nobody could look: name subjects or groups")
	}
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.Roots},
		TLSHandshakeTimeout: oidcTimeout, ResponseHeaderTimeout: oidcTimeout, MaxIdleConns: 4, IdleConnTimeout: time.Minute,
	}
	return &oidcLogin{cfg: cfg, aead: aead, client: &http.Client{
		Transport: bounded{transport}, Timeout: oidcTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// bounded bounds the answers of a provider.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// discover asks the provider for its addresses, once it answers.
func (o *oidcLogin) discover(ctx context.Context) (*oidc.Provider, *oauth2.Config, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.provider == nil {
		// The provider's keys are fetched later with this context's client, not
		// within its deadline.
		p, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), o.client), o.cfg.Issuer)
		if err != nil {
			return nil, nil, fmt.Errorf("ask the provider %s: %w", o.cfg.Issuer, err)
		}
		o.provider = p
	}
	return o.provider, &oauth2.Config{
		ClientID: o.cfg.ClientID, ClientSecret: o.cfg.ClientSecret, Endpoint: o.provider.Endpoint(), RedirectURL: o.cfg.RedirectURL,
		Scopes: append([]string{oidc.ScopeOpenID}, o.cfg.Scopes...),
	}, nil
}

// start returns where to send the browser, and the cookie that it brings back.
func (o *oidcLogin) start(ctx context.Context, to string, now time.Time) (address, cookie string, err error) {
	_, config, err := o.discover(ctx)
	if err != nil {
		return "", "", err
	}
	p := pending{State: rand.Text(), Nonce: rand.Text(), Verifier: oauth2.GenerateVerifier(), To: local(to), Ends: now.Add(loginLife)}
	text, err := json.Marshal(p)
	if err != nil {
		return "", "", err
	}
	cookie = base64.RawURLEncoding.EncodeToString(o.aead.Seal(nil, nil, text, []byte(oidcCookie))) //nolint:gosec // G407: this AEAD makes a random nonce itself
	return config.AuthCodeURL(p.State, oidc.Nonce(p.Nonce), oauth2.S256ChallengeOption(p.Verifier)), cookie, nil
}

// resume opens the cookie of a login that is not too old.
func (o *oidcLogin) resume(cookie string, now time.Time) (pending, error) {
	var p pending
	raw, err := base64.RawURLEncoding.DecodeString(cookie)
	if err != nil {
		return p, errors.New("the cookie of the login is not ours")
	}
	text, err := o.aead.Open(nil, nil, raw, []byte(oidcCookie))
	if err != nil {
		return p, errors.New("the cookie of the login is not ours, or from before a restart")
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return p, err
	}
	if !now.Before(p.Ends) {
		return p, errors.New("the login took too long")
	}
	return p, nil
}

// finish checks what the provider sent the browser back with:
//
//  1. state: this browser began this login; iss (RFC 9207): with this provider
//  2. the code is exchanged for an ID token, with PKCE's verifier
//  3. the token's signature, issuer, audience and times; its nonce is this login's
//  4. the subject or a group may look; if not, the error is errNotAllowed, and name
//     says who it is
func (o *oidcLogin) finish(ctx context.Context, p pending, r *http.Request) (name string, err error) {
	q := r.URL.Query()
	if subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(p.State)) != 1 {
		return "", errors.New("the login was begun by another browser")
	}
	if q.Has("iss") && q.Get("iss") != o.cfg.Issuer {
		return "", errors.New("the answer is of another provider")
	}
	if q.Has("error") {
		return "", fmt.Errorf("the provider refused: %.100q", q.Get("error"))
	}
	provider, config, err := o.discover(ctx)
	if err != nil {
		return "", err
	}
	ctx = oidc.ClientContext(ctx, o.client)
	token, err := config.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(p.Verifier))
	if err != nil {
		if refused, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
			return "", fmt.Errorf("exchange the code: the provider refused: %.100q", refused.ErrorCode) // the body may hold anything
		}
		return "", fmt.Errorf("exchange the code: %w", err)
	}
	raw, ok := token.Extra("id_token").(string)
	if !ok {
		return "", errors.New("the provider gave no id token")
	}
	id, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: o.cfg.ClientID, SupportedSigningAlgs: algorithms}).Verify(ctx, raw)
	if err != nil {
		return "", fmt.Errorf("verify the id token: %w", err)
	}
	if subtle.ConstantTimeCompare([]byte(id.Nonce), []byte(p.Nonce)) != 1 {
		return "", errors.New("the id token is of another login: its nonce differs")
	}
	claims := make(map[string]any)
	if err := id.Claims(&claims); err != nil {
		return "", fmt.Errorf("read the id token's claims: %w", err)
	}
	// OpenID Connect Core 1.0 §3.1.3.7, rules 4 and 5.
	if azp, has := claims["azp"]; (has || len(id.Audience) > 1) && azp != o.cfg.ClientID {
		return "", errors.New("the id token was issued to another client")
	}
	if !o.allowed(id.Subject, claims) {
		return id.Subject, errNotAllowed
	}
	return id.Subject, nil
}

// allowed reports whether the subject or one of its groups is configured.
func (o *oidcLogin) allowed(subject string, claims map[string]any) bool {
	if subject != "" && slices.Contains(o.cfg.Subjects, subject) {
		return true
	}
	groups, _ := claims[o.cfg.GroupsClaim].([]any)
	return slices.ContainsFunc(groups, func(g any) bool {
		name, ok := g.(string)
		return ok && slices.Contains(o.cfg.Groups, name)
	})
}

// loginByOIDC sends the browser to the provider.
func (c *Console) loginByOIDC(w http.ResponseWriter, r *http.Request) {
	if c.oidc == nil {
		http.NotFound(w, r)
		return
	}
	if !c.tries.take(r.RemoteAddr, c.cfg.Now()) {
		c.refused(r, methodOIDC, "", reasonTooMany, "")
		tooMany(w)
		return
	}
	address, cookie, err := c.oidc.start(r.Context(), r.URL.Query().Get("to"), c.cfg.Now())
	if err != nil {
		c.log.WarnContext(r.Context(), "sign-in to the console cannot begin", "method", methodOIDC, "err", err)
		c.renderLogin(w, http.StatusBadGateway, loginPage{Problem: "The identity provider does not answer. Try again; the CA's log says why."})
		return
	}
	setOIDCCookie(w, cookie, int(loginLife/time.Second))
	http.Redirect(w, r, address, http.StatusSeeOther) //nolint:gosec // G710: the address is the configured provider's
}

func setOIDCCookie(w http.ResponseWriter, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{
		Name: oidcCookie, Value: value, Path: "/", MaxAge: maxAge,
		Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, // Lax: the provider sends the browser back here
	})
}

// callbackOIDC is where the provider sends the browser back to.
func (c *Console) callbackOIDC(w http.ResponseWriter, r *http.Request) {
	if c.oidc == nil {
		http.NotFound(w, r)
		return
	}
	now := c.cfg.Now()
	if !c.tries.take(r.RemoteAddr, now) {
		c.refused(r, methodOIDC, "", reasonTooMany, "")
		tooMany(w)
		return
	}
	var p pending
	cookie, err := r.Cookie(oidcCookie)
	if err == nil {
		p, err = c.oidc.resume(cookie.Value, now)
	}
	setOIDCCookie(w, "", -1)
	var name string
	if err == nil {
		name, err = c.oidc.finish(r.Context(), p, r)
	}
	if err != nil {
		reason := reasonProvider
		if errors.Is(err, errNotAllowed) {
			reason = reasonNotAllowed
		}
		c.log.WarnContext(r.Context(), "the identity provider's answer is refused", "method", methodOIDC, "address", r.RemoteAddr, "err", err)
		// What the provider or the browser sent is not repeated.
		what, _, _ := strings.Cut(err.Error(), ": ")
		c.refused(r, methodOIDC, name, reason, what)
		c.renderLogin(w, http.StatusForbidden, loginPage{Problem: "You were not signed in: the identity provider's answer was refused, or you may not look. The CA's log says why.", To: p.To})
		return
	}
	c.begin(w, r, user{name: name, method: methodOIDC}, p.To)
}
