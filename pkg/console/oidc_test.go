package console

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// provider is an OpenID provider that is as strict as a real one about what the
// console sends, and gives whatever token the test wants.
type provider struct {
	world *world // of the console that was made last

	*httptest.Server
	t     testing.TB
	key   *ecdsa.PrivateKey
	other *ecdsa.PrivateKey // not in the provider's keys

	mu    sync.Mutex            // guards what follows
	codes map[string]url.Values // what was asked for, by code
	// claims and sign may change what a token says.
	claims func(map[string]any)
	sign   func(header, claims map[string]any) string
	token  func(map[string]any) // the whole answer
}

const (
	clientID     = "meshid-console"
	clientSecret = "correct horse"
)

func newProvider(t testing.TB) *provider {
	t.Helper()
	p := &provider{t: t, codes: make(map[string]url.Values)}
	for _, k := range []**ecdsa.PrivateKey{&p.key, &p.other} {
		var err error
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{
			"issuer": p.URL, "authorization_endpoint": p.URL + "/authorize", "token_endpoint": p.URL + "/token", "jwks_uri": p.URL + "/keys",
			// A provider may say that it supports what nobody should accept.
			"id_token_signing_alg_values_supported": []string{"ES256", "none", "HS256"},
		})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"keys": []any{map[string]any{
			"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": "1",
			"x": b64(p.key.X.FillBytes(make([]byte, 32))), "y": b64(p.key.Y.FillBytes(make([]byte, 32))),
		}}})
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		id, secret, _ := r.BasicAuth()
		asked, known := p.codes[r.PostFormValue("code")]
		delete(p.codes, r.PostFormValue("code")) // once
		sum := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
		switch {
		case id != clientID, secret != url.QueryEscape(clientSecret), !known, r.PostFormValue("grant_type") != "authorization_code",
			r.PostFormValue("redirect_uri") != asked.Get("redirect_uri"), b64(sum[:]) != asked.Get("code_challenge"):
			w.WriteHeader(http.StatusBadRequest)
			answer(w, map[string]any{"error": "invalid_grant", "error_description": "<script>alert(1)</script>"})
			return
		}
		now := time.Now() // the library's clock
		claims := map[string]any{
			"iss": p.URL, "sub": "alice", "aud": clientID, "exp": now.Add(time.Minute).Unix(), "iat": now.Unix(), "nonce": asked.Get("nonce"),
			"groups": []string{"staff", "operators"},
		}
		if p.claims != nil {
			p.claims(claims)
		}
		header := map[string]any{"alg": "ES256", "kid": "1", "typ": "JWT"}
		sign := p.sign
		if sign == nil {
			sign = func(h, c map[string]any) string { return es256(p.t, p.key, h, c) }
		}
		body := map[string]any{"access_token": "x", "token_type": "Bearer", "id_token": sign(header, claims)}
		if p.token != nil {
			p.token(body)
		}
		answer(w, body)
	})
	p.Server = httptest.NewTLSServer(mux)
	t.Cleanup(p.Close)
	return p
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func unsigned(t testing.TB, header, claims map[string]any) string {
	t.Helper()
	h, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	c, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return b64(h) + "." + b64(c)
}

func es256(t testing.TB, key *ecdsa.PrivateKey, header, claims map[string]any) string {
	t.Helper()
	text := unsigned(t, header, claims)
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + b64(slices.Concat(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))))
}

// authorize is the provider's page: it checks what the console asks for, and sends
// the browser back.
func (p *provider) authorize(location string) (back *url.URL) {
	p.t.Helper()
	u, err := url.Parse(location)
	if err != nil {
		p.t.Fatal(err)
	}
	q := u.Query()
	if !strings.HasPrefix(location, p.URL+"/authorize?") || q.Get("response_type") != "code" || q.Get("client_id") != clientID ||
		q.Get("redirect_uri") != "https://"+host+"/console/login/callback" || !slices.Contains(strings.Fields(q.Get("scope")), "openid") ||
		q.Get("code_challenge_method") != "S256" || len(q.Get("state")) < 20 || len(q.Get("nonce")) < 20 {
		p.t.Fatalf("asks the provider for %s", location)
	}
	code := rand.Text()
	p.mu.Lock()
	p.codes[code] = q
	p.mu.Unlock()
	if back, err = url.Parse(q.Get("redirect_uri")); err != nil {
		p.t.Fatal(err)
	}
	back.RawQuery = url.Values{"code": {code}, "state": {q.Get("state")}, "iss": {p.URL}}.Encode()
	return back
}

func (p *provider) console(t testing.TB, change ...func(*OIDC)) *Console {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(p.Certificate())
	o := &OIDC{
		Issuer: p.URL, ClientID: clientID, ClientSecret: clientSecret, RedirectURL: "https://" + host + "/console/login/callback",
		Scopes: []string{"groups"}, GroupsClaim: "groups", Subjects: []string{"alice"}, Roots: roots,
	}
	for _, c := range change {
		c(o)
	}
	p.world = &world{text: "x"}
	return testConsole(t, p.world, func(c *Config) { c.Access = Access{OIDC: o} })
}

// begin goes to the provider and returns the way back.
func (b *browser) begin(p *provider) *url.URL {
	b.t.Helper()
	resp := b.status(http.StatusSeeOther, http.MethodGet, loginPath+"/oidc?to=%2Fconsole%2Fnodes", nil)
	return p.authorize(resp.Header.Get("Location"))
}

func TestOIDC(t *testing.T) {
	p := newProvider(t)
	for name, change := range map[string]func(*OIDC){
		"by subject": func(*OIDC) {},
		"by group":   func(o *OIDC) { o.Subjects, o.Groups = nil, []string{"operators"} },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBrowser(t, p.console(t, change))
			back := b.begin(p)
			resp := b.status(http.StatusSeeOther, http.MethodGet, back.RequestURI(), nil)
			if to := resp.Header.Get("Location"); to != "/console/nodes" {
				t.Errorf("goes to %q", to)
			}
			if all := p.world.takeSignIns(); len(all) != 1 || all[0].Who != "alice" || all[0].In.GetMethod() != "oidc" || all[0].Reason != "" {
				t.Errorf("recorded is %v", all)
			}
			if page := b.status(http.StatusOK, http.MethodGet, "/console/nodes", nil).Body; !strings.Contains(page, "alice") {
				t.Error("the page does not say who is signed in")
			}
			// The way back is good once: the code is used up, and so is the cookie.
			thief := newBrowser(t, b.c)
			thief.status(http.StatusForbidden, http.MethodGet, back.RequestURI(), nil)
			b.status(http.StatusForbidden, http.MethodGet, back.RequestURI(), nil)
		})
	}
}

// TestOIDCRefusals: each token and each way back that is not exactly right.
func TestOIDCRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		claims func(map[string]any)
		sign   func(p *provider) func(h, c map[string]any) string
		token  func(map[string]any)
		back   func(url.Values)
		change func(*OIDC)
		lose   bool // the browser has lost its cookie
		forge  bool // the browser has one that is not ours
	}{
		"wrong nonce":      {claims: func(c map[string]any) { c["nonce"] = "other" }},
		"no nonce":         {claims: func(c map[string]any) { delete(c, "nonce") }},
		"wrong audience":   {claims: func(c map[string]any) { c["aud"] = "another-client" }},
		"no audience":      {claims: func(c map[string]any) { delete(c, "aud") }},
		"two audiences":    {claims: func(c map[string]any) { c["aud"] = []string{clientID, "another-client"} }},
		"other party":      {claims: func(c map[string]any) { c["azp"] = "another-client" }},
		"expired":          {claims: func(c map[string]any) { c["exp"] = time.Now().Add(-time.Hour).Unix() }},
		"no expiry":        {claims: func(c map[string]any) { delete(c, "exp") }},
		"not yet valid":    {claims: func(c map[string]any) { c["nbf"] = time.Now().Add(time.Hour).Unix() }},
		"wrong issuer":     {claims: func(c map[string]any) { c["iss"] = "https://evil.example" }},
		"no subject":       {claims: func(c map[string]any) { delete(c, "sub") }},
		"another subject":  {claims: func(c map[string]any) { c["sub"] = "mallory" }},
		"groups as text":   {claims: func(c map[string]any) { c["sub"], c["groups"] = "mallory", "operators" }, change: func(o *OIDC) { o.Groups = []string{"operators"} }},
		"groups elsewhere": {claims: func(c map[string]any) { c["sub"], c["roles"], c["groups"] = "mallory", []string{"operators"}, nil }, change: func(o *OIDC) { o.Groups = []string{"operators"} }},
		"alg none": {sign: func(p *provider) func(h, c map[string]any) string {
			return func(h, c map[string]any) string { h["alg"] = "none"; return unsigned(p.t, h, c) + "." }
		}},
		"no signature": {sign: func(p *provider) func(h, c map[string]any) string {
			return func(h, c map[string]any) string { return unsigned(p.t, h, c) + "." }
		}},
		"signed with the client's secret": {sign: func(p *provider) func(h, c map[string]any) string {
			return func(h, c map[string]any) string {
				h["alg"] = "HS256"
				text := unsigned(p.t, h, c)
				m := hmac.New(sha256.New, []byte(clientSecret))
				m.Write([]byte(text))
				return text + "." + b64(m.Sum(nil))
			}
		}},
		"another key": {sign: func(p *provider) func(h, c map[string]any) string {
			return func(h, c map[string]any) string { return es256(p.t, p.other, h, c) }
		}},
		"a key in the token": {sign: func(p *provider) func(h, c map[string]any) string {
			return func(h, c map[string]any) string {
				h["jwk"] = map[string]any{"kty": "EC", "crv": "P-256", "x": b64(p.other.X.FillBytes(make([]byte, 32))), "y": b64(p.other.Y.FillBytes(make([]byte, 32)))}
				return es256(p.t, p.other, h, c)
			}
		}},
		"changed after signing": {sign: func(p *provider) func(h, c map[string]any) string {
			return func(h, c map[string]any) string {
				parts := strings.Split(es256(p.t, p.key, h, map[string]any{"sub": "mallory"}), ".")
				return unsigned(p.t, h, c) + "." + parts[2]
			}
		}},
		"no id token":        {token: func(b map[string]any) { delete(b, "id_token") }},
		"id token no string": {token: func(b map[string]any) { b["id_token"] = 7 }},
		"wrong state":        {back: func(q url.Values) { q.Set("state", "other") }},
		"no state":           {back: func(q url.Values) { q.Del("state") }},
		"another provider":   {back: func(q url.Values) { q.Set("iss", "https://evil.example") }},
		"wrong code":         {back: func(q url.Values) { q.Set("code", "other") }},
		"refused":            {back: func(q url.Values) { q.Set("error", "access_denied") }},
		"no cookie":          {lose: true},
		"forged cookie":      {forge: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t)
			p.claims, p.token = tc.claims, tc.token
			if tc.sign != nil {
				p.sign = tc.sign(p)
			}
			change := tc.change
			if change == nil {
				change = func(*OIDC) {}
			}
			b := newBrowser(t, p.console(t, change))
			back := b.begin(p)
			q := back.Query()
			if tc.back != nil {
				tc.back(q)
			}
			if tc.lose {
				delete(b.cookies, oidcCookie)
			}
			if tc.forge {
				b.cookies[oidcCookie] = b64([]byte(`{"state":"` + q.Get("state") + `"}.................`))
			}
			back.RawQuery = q.Encode()
			page := b.status(http.StatusForbidden, http.MethodGet, back.RequestURI(), nil).Body
			checkPage(t, name, page)
			who, why := "", reasonProvider
			if name == "another subject" || name == "groups as text" || name == "groups elsewhere" {
				who, why = "mallory", reasonNotAllowed
			}
			if name == "no subject" {
				why = reasonNotAllowed
			}
			if all := p.world.takeSignIns(); len(all) != 1 || all[0].Who != who || all[0].Reason != why {
				t.Errorf("recorded is %v, want %q %s", all, who, why)
			}
			if _, in := b.cookies[sessionCookie]; in {
				t.Error("signed in")
			}
			b.status(http.StatusSeeOther, http.MethodGet, "/console/", nil)
		})
	}
}

// TestOIDCProviderAway: a provider that does not answer is said to, and asked again.
func TestOIDCProviderAway(t *testing.T) {
	p := newProvider(t)
	c := p.console(t)
	p.Close()
	b := newBrowser(t, c)
	b.status(http.StatusBadGateway, http.MethodGet, loginPath+"/oidc", nil)
	if _, err := newOIDCLogin(OIDC{Issuer: p.URL, ClientID: clientID}); err == nil {
		t.Error("a login that nobody may use was made")
	}
	off := newBrowser(t, testConsole(t, &world{}))
	off.status(http.StatusNotFound, http.MethodGet, loginPath+"/oidc", nil)
	off.status(http.StatusNotFound, http.MethodGet, loginPath+"/callback", nil)
}

// TestOIDCNeverLeavesTheSite: where a login comes from cannot say where it ends.
func TestOIDCNeverLeavesTheSite(t *testing.T) {
	p := newProvider(t)
	for _, to := range []string{"//evil.example", "https://evil.example/", `/console/\evil.example`, "/console//evil.example"} {
		b := newBrowser(t, p.console(t))
		resp := b.status(http.StatusSeeOther, http.MethodGet, loginPath+"/oidc?"+url.Values{"to": {to}}.Encode(), nil)
		resp = b.status(http.StatusSeeOther, http.MethodGet, p.authorize(resp.Header.Get("Location")).RequestURI(), nil)
		if got := resp.Header.Get("Location"); got != "/console/" {
			t.Errorf("%s leads to %q", to, got)
		}
	}
}
