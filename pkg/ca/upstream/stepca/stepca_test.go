package stepca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// fake behaves as a step-ca with one JWK provisioner as far as it is used; the real
// one is in test/stepca.
type fake struct {
	t     *testing.T
	a     *upstreamtest.Authority
	b     upstreamtest.Behaviour
	key   jose.JSONWebKey
	used  map[string]bool
	roots []*x509.Certificate
	url   string

	server      *httptest.Server
	connections atomic.Int64
}

// startFake returns it with the configuration of a client.
func startFake(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*fake, Config) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, a: a, b: b, key: jose.JSONWebKey{Key: private, KeyID: "kid-1", Algorithm: "ES256"}, used: map[string]bool{}}
	// Its TLS certificate is from the root: the issuer may be broken.
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.Root, private.Public(), a.RootKey)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(f)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: private}}, MinVersion: tls.VersionTLS12}
	s.Config.ErrorLog = nil
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			f.connections.Add(1)
		}
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	f.url, f.server = s.URL, s
	jwk, err := json.Marshal(f.key)
	if err != nil {
		t.Fatal(err)
	}
	path := upstreamtest.File(t, "provisioner.json", jwk)
	if b == upstreamtest.Gone {
		s.Close()
	}
	sum := sha256.Sum256(a.Root.Raw)
	return f, Config{URL: s.URL, RootSHA256: hex.EncodeToString(sum[:]), Provisioner: "meshid", Key: path}
}

func (f *fake) answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		f.t.Error(err)
	}
}

func (f *fake) refuse(w http.ResponseWriter, status int, text string) {
	f.answer(w, status, map[string]any{"status": status, "message": text})
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/root/"):
		sum := sha256.Sum256(f.a.Root.Raw)
		if r.URL.Path != "/root/"+hex.EncodeToString(sum[:]) {
			f.refuse(w, http.StatusNotFound, "The requested resource could not be found.")
			return
		}
		f.answer(w, http.StatusOK, map[string]string{"ca": string(upstreamtest.PEM(f.a.Root))})
	case r.Method == http.MethodGet && r.URL.Path == "/roots":
		f.answer(w, http.StatusCreated, map[string]any{"crts": texts(f.roots)})
	case r.Method == http.MethodPost && r.URL.Path == "/1.0/sign":
		f.sign(w, r)
	default:
		f.t.Errorf("%s %s is called", r.Method, r.URL)
		f.refuse(w, http.StatusNotFound, "no such path")
	}
}

func texts(all []*x509.Certificate) []string {
	out := []string{}
	for _, c := range all {
		out = append(out, string(upstreamtest.PEM(c)))
	}
	return out
}

func (f *fake) sign(w http.ResponseWriter, r *http.Request) {
	var body struct {
		CSR      string `json:"csr"`
		OTT      string `json:"ott"`
		NotAfter string `json:"notAfter"`
	}
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&body); err != nil {
		f.t.Error(err)
	}
	_, _ = io.Copy(io.Discard, r.Body)
	block, _ := pem.Decode([]byte(body.CSR))
	if block == nil {
		f.t.Error("the CSR is no PEM")
		return
	}
	f.checkToken(body.OTT, block.Bytes)
	switch f.b { //nolint:exhaustive // the others answer
	case upstreamtest.Slow:
		<-r.Context().Done()
		return
	case upstreamtest.Denied:
		f.refuse(w, http.StatusForbidden, "The request was forbidden by the certificate authority: requested duration is too long")
		return
	case upstreamtest.RateLimited:
		w.Header().Set("Retry-After", "7")
		f.refuse(w, http.StatusTooManyRequests, "slow down")
		return
	case upstreamtest.Garbage:
		_, _ = w.Write([]byte("<html>"))
		return
	}
	ttl, err := time.ParseDuration(body.NotAfter)
	if err != nil {
		f.t.Error(err)
	}
	chain, roots := f.a.Answer(block.Bytes, ttl)
	f.roots = roots
	f.answer(w, http.StatusCreated, map[string]any{"crt": texts(chain)[0], "ca": "", "certChain": texts(chain)})
}

// checkToken does what step-ca does with a token.
func (f *fake) checkToken(token string, csr []byte) {
	f.t.Helper()
	parsed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		f.t.Error(err)
		return
	}
	if kid := parsed.Signatures[0].Protected.KeyID; kid != f.key.KeyID {
		f.t.Errorf("the token has kid %q", kid)
	}
	public := f.key.Public()
	payload, err := parsed.Verify(&public)
	if err != nil {
		f.t.Error(err)
		return
	}
	var c struct {
		Iss  string            `json:"iss"`
		Aud  string            `json:"aud"`
		Sub  string            `json:"sub"`
		Jti  string            `json:"jti"`
		Sans []string          `json:"sans"`
		Iat  int64             `json:"iat"`
		Nbf  int64             `json:"nbf"`
		Exp  int64             `json:"exp"`
		Cnf  map[string]string `json:"cnf"`
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		f.t.Error(err)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		f.t.Error(err)
		return
	}
	sum := sha256.Sum256(csr)
	if c.Iss != "meshid" || c.Aud != f.url+"/1.0/sign" || c.Sub != request.Subject.CommonName || len(c.Sans) != 1 || c.Sans[0] != request.URIs[0].String() ||
		c.Iat == 0 || c.Exp <= c.Nbf || c.Cnf["x5rt#S256"] != base64.RawURLEncoding.EncodeToString(sum[:]) {
		f.t.Errorf("the token says %s", payload)
	}
	if c.Jti == "" || f.used[c.Jti] {
		f.t.Errorf("the token was used before")
	}
	f.used[c.Jti] = true
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			_, c := startFake(t, b, a)
			ca, err := New(c)
			if err != nil {
				t.Fatal(err)
			}
			return ca
		},
	})
}

// A server that shows another root than the pinned one gets no token.
// What is signed one after the other goes over one connection, and another one if the
// server has closed that.
func TestConnections(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	f, c := startFake(t, upstreamtest.Good, a)
	ca, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if _, err := upstreamtest.Mint(t.Context(), t, ca); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.connections.Load(); n != 2 {
		t.Errorf("%d connections, want one for the root that has the fingerprint, and one", n)
	}
	f.server.CloseClientConnections()
	if _, err := upstreamtest.Mint(t.Context(), t, ca); err != nil {
		t.Errorf("after the server has closed the connections: %v", err)
	}
}

func TestPin(t *testing.T) {
	_, c := startFake(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	c.RootSHA256 = strings.Repeat("00:", 31) + "00"
	ca, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	_, err = upstreamtest.Mint(t.Context(), t, ca)
	if err == nil || !strings.Contains(err.Error(), "root_sha256") {
		t.Errorf("got %v", err)
	}
}

func TestNew(t *testing.T) {
	_, good := startFake(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	empty := upstreamtest.File(t, "empty", []byte("{}"))
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no url", func(c *Config) { c.URL = "" }, "https://host:port"},
		{"plain HTTP", func(c *Config) { c.URL = "http://ca" }, "https://host:port"},
		{"no fingerprint", func(c *Config) { c.RootSHA256 = "ab" }, "step certificate fingerprint"},
		{"no provisioner", func(c *Config) { c.Provisioner = "" }, "set provisioner"},
		{"no key", func(c *Config) { c.Key = empty + "x" }, "no such file"},
		{"not a JWK", func(c *Config) { c.Key = empty }, "no private JWK"},
		{"not encrypted", func(c *Config) { c.PasswordFile = empty }, "remove password_file"},
		{"both kinds", func(c *Config) { c.PasswordFile, c.Certificate = empty, empty }, "remove one"},
		{"not a certificate", func(c *Config) { c.Certificate = empty }, "certificate"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := good
			c.change(&config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}
