// Package vault is a fake of HashiCorp Vault, and of OpenBao, whose API is the same:
// as much of its HTTP API as an upstream CA and its operator use. It checks each
// parameter, header and right as the original does, and can be slow, wrong, sealed or
// gone. It does not know who its client is. It is no Vault: what it shows is that a
// client keeps to the API, not that a Vault keeps to it.
package vault

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// Server is a running fake. All methods may be called concurrently.
type Server struct {
	// URL is where it listens.
	URL string
	// CA is the PEM certificate of the CA of its own TLS certificate.
	CA []byte
	// Root is a token with the policy root.
	Root string

	t          testing.TB
	serverKey  *ecdsa.PrivateKey
	serviceKey *ecdsa.PrivateKey // signs service account tokens
	listener   *httptest.Server

	connections atomic.Int64

	mu        sync.Mutex // guards what follows
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour
	sealed    bool
	standby   string
	namespace string
	clock     time.Duration // how far the server's time is ahead
	secrets   map[string]*pki
	auths     map[string]*auth
	policies  map[string]policy
	tokens    map[string]*token
	requests  []Request
	changed   chan struct{} // closed at each request
}

// Request is what somebody has asked.
type Request struct {
	Method, Path string
	Status       int
	Body         map[string]any
}

// New starts a server which signs as a does, and behaves as b. Its PKI mounts and
// auth methods are made with its API: see Operator.
func New(t testing.TB, a *upstreamtest.Authority, b upstreamtest.Behaviour) *Server {
	t.Helper()
	s := &Server{
		t: t, authority: a, behaviour: b, serverKey: newKey(t), serviceKey: newKey(t), changed: make(chan struct{}),
		secrets: map[string]*pki{}, auths: map[string]*auth{}, tokens: map[string]*token{},
		policies: map[string]policy{"default": mustPolicy(defaultPolicy), "response-wrapping": mustPolicy(wrappingPolicy)},
	}
	s.Root = s.mint(&token{policies: []string{"root"}}).id
	listener := httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	certificate, ca := s.certificate()
	listener.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12, ClientAuth: tls.RequestClientCert}
	listener.Config.ErrorLog = nil
	listener.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.connections.Add(1)
		}
	}
	listener.StartTLS()
	t.Cleanup(listener.Close)
	s.URL, s.CA, s.listener = listener.URL, upstreamtest.PEM(ca), listener
	return s
}

// certificate makes the server's own.
func (s *Server) certificate() (tls.Certificate, *x509.Certificate) {
	s.t.Helper()
	a := upstreamtest.NewAuthority(s.t, upstreamtest.Good)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.Root, s.serverKey.Public(), a.RootKey)
	if err != nil {
		s.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: s.serverKey}, a.Root
}

// Close takes the server away.
func (s *Server) Close() { s.listener.Close() }

// Connections returns how many there have been.
func (s *Server) Connections() int { return int(s.connections.Load()) }

// CloseConnections closes those that are open.
func (s *Server) CloseConnections() { s.listener.CloseClientConnections() }

// Seal seals the server, or unseals it.
func (s *Server) Seal(sealed bool) { s.set(func() { s.sealed = sealed }) }

// Standby has the server point to another one, until that is empty.
func (s *Server) Standby(active string) { s.set(func() { s.standby = active }) }

// Namespace has everything in a namespace.
func (s *Server) Namespace(name string) { s.set(func() { s.namespace = name }) }

// Become has it sign as another CA, or behave otherwise.
func (s *Server) Become(a *upstreamtest.Authority, b upstreamtest.Behaviour) {
	s.set(func() { s.authority, s.behaviour = a, b })
}

// Advance has the server's time go on.
func (s *Server) Advance(d time.Duration) { s.set(func() { s.clock += d }) }

// RevokeAll revokes all tokens but Root.
func (s *Server) RevokeAll() {
	s.set(func() {
		for id := range s.tokens {
			if id != s.Root {
				delete(s.tokens, id)
			}
		}
	})
}

func (s *Server) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// now is the server's time. mu is held.
func (s *Server) now() time.Time { return time.Now().Add(s.clock) }

// Requests returns those whose path ends so, in their order.
func (s *Server) Requests(suffix string) []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.matching(suffix)
}

func (s *Server) matching(suffix string) []Request {
	var found []Request
	for _, r := range s.requests {
		if strings.HasSuffix(r.Path, suffix) {
			found = append(found, r)
		}
	}
	return found
}

// Await waits until there are n requests whose path ends so.
func (s *Server) Await(suffix string, n int) []Request {
	s.t.Helper()
	patience := time.After(time.Minute)
	for {
		s.mu.Lock()
		found, changed := s.matching(suffix), s.changed
		s.mu.Unlock()
		if len(found) >= n {
			return found
		}
		select {
		case <-changed:
		case <-patience:
			s.t.Fatalf("%d requests to %s, want %d", len(found), suffix, n)
		}
	}
}

// answer is what is sent back.
type answer struct {
	status     int
	data       map[string]any
	auth       map[string]any
	wrap       map[string]any
	warnings   []string
	errors     []string
	retryAfter time.Duration
	location   string
	raw        string
}

func failure(status int, format string, args ...any) *answer {
	return &answer{status: status, errors: []string{fmt.Sprintf(format, args...)}}
}

func denied() *answer {
	return failure(http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
}

// call is a request that is being served.
type call struct {
	*http.Request
	path  string // below /v1/, without the namespace
	body  map[string]any
	token *token
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	data, err := io.ReadAll(io.LimitReader(r.Body, 32<<20))
	if err != nil {
		return // the client has gone
	}
	c := &call{Request: r, path: strings.TrimPrefix(r.URL.Path, "/v1/")}
	a := s.handle(c, data)
	s.mu.Lock()
	s.requests = append(s.requests, Request{Method: r.Method, Path: r.URL.Path, Status: a.status, Body: c.body})
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	s.write(w, a)
}

func (s *Server) write(w http.ResponseWriter, a *answer) {
	if a.location != "" {
		w.Header().Set("Location", a.location)
	}
	if a.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(a.retryAfter/time.Second)))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(a.status)
	switch {
	case a.raw != "":
		_, err := io.WriteString(w, a.raw)
		_ = err // the client has gone
		return
	case a.status == http.StatusNoContent:
		return
	}
	body := map[string]any{"errors": a.errors}
	if a.status/100 == 2 {
		body = map[string]any{
			"request_id": rand.Text(), "lease_id": "", "renewable": false, "lease_duration": 0,
			"data": a.data, "wrap_info": a.wrap, "warnings": a.warnings, "auth": a.auth,
		}
	}
	if err := json.NewEncoder(w).Encode(body); err != nil {
		return // the client has gone
	}
}

// handle is what stands before every path.
func (s *Server) handle(c *call, data []byte) *answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !strings.HasPrefix(c.URL.Path, "/v1/"):
		return failure(http.StatusNotFound, "404 page not found")
	case c.Header.Get("X-Vault-Request") != "true":
		return failure(http.StatusPreconditionFailed, "missing 'X-Vault-Request' header")
	case s.sealed:
		return failure(http.StatusServiceUnavailable, "Vault is sealed")
	case s.standby != "":
		return &answer{status: http.StatusTemporaryRedirect, location: s.standby + c.URL.Path}
	case s.behaviour == upstreamtest.RateLimited:
		limited := failure(http.StatusTooManyRequests, "request path %q: rate limit quota exceeded", c.path)
		limited.retryAfter = upstreamtest.RetryAfter
		return limited
	}
	switch c.Method {
	case http.MethodPost, http.MethodPut:
		if len(data) > 0 {
			if err := json.Unmarshal(data, &c.body); err != nil {
				return failure(http.StatusBadRequest, "failed to parse JSON input: %v", err)
			}
		}
	case http.MethodGet:
	default:
		return failure(http.StatusMethodNotAllowed, "unsupported operation")
	}
	namespace := strings.Trim(c.Header.Get("X-Vault-Namespace"), "/")
	if namespace != s.namespace && !strings.HasPrefix(c.path, "sys/wrapping/") {
		return failure(http.StatusNotFound, "no handler for route %q. route entry not found.", namespace+"/"+c.path)
	}
	if id := c.Header.Get("X-Vault-Token"); id != "" {
		c.token = s.use(id)
	}
	return s.route(c)
}

// route finds what serves a path. mu is held.
func (s *Server) route(c *call) *answer {
	for mount, p := range s.secrets {
		if path, ok := strings.CutPrefix(c.path, mount+"/"); ok {
			return s.servePKI(c, p, path)
		}
	}
	for mount, a := range s.auths {
		if path, ok := strings.CutPrefix(c.path, "auth/"+mount+"/"); ok {
			return s.serveAuth(c, mount, a, path)
		}
	}
	switch {
	case strings.HasPrefix(c.path, "auth/token/"):
		return s.serveToken(c)
	case strings.HasPrefix(c.path, "sys/wrapping/"):
		return s.serveWrapping(c)
	}
	if !s.allowed(c) {
		return denied()
	}
	name := c.path[strings.LastIndexByte(c.path, '/')+1:]
	switch {
	case strings.HasPrefix(c.path, "sys/policies/acl/") && c.Method != http.MethodGet:
		if bad := s.only(c, "policy"); bad != nil {
			return bad
		}
		p, err := parsePolicy(c.string("policy"))
		if err != nil {
			return failure(http.StatusBadRequest, "failed to parse policy: %v", err)
		}
		s.policies[name] = p
		return &answer{status: http.StatusNoContent}
	case strings.HasPrefix(c.path, "sys/mounts/") && strings.HasSuffix(c.path, "/tune"):
		p := s.secrets[strings.TrimSuffix(strings.TrimPrefix(c.path, "sys/mounts/"), "/tune")]
		if p == nil {
			return failure(http.StatusBadRequest, "cannot fetch sysview for path %q", c.path)
		}
		return s.tune(c, p)
	case strings.HasPrefix(c.path, "sys/mounts/"):
		if c.string("type") != "pki" {
			return failure(http.StatusBadRequest, "this fake has the secrets engine pki only")
		}
		s.secrets[strings.TrimPrefix(c.path, "sys/mounts/")] = &pki{maxTTL: 32 * 24 * time.Hour}
		return &answer{status: http.StatusNoContent}
	case strings.HasPrefix(c.path, "sys/auth/"):
		kind := c.string("type")
		if !slices.Contains([]string{"approle", "kubernetes", "cert"}, kind) {
			return failure(http.StatusBadRequest, "this fake has no auth method %q", kind)
		}
		s.auths[strings.TrimPrefix(c.path, "sys/auth/")] = &auth{kind: kind, roles: map[string]*role{}}
		return &answer{status: http.StatusNoContent}
	}
	return failure(http.StatusNotFound, "no handler for route %q. route entry not found.", c.path)
}

// only refuses parameters that the path does not have. The original ignores them
// with a warning; whoever sends them means something by it.
func (s *Server) only(c *call, known ...string) *answer {
	for name := range c.body {
		if !slices.Contains(known, name) {
			s.t.Errorf("%s %s has the parameter %q, which it does not know", c.Method, c.path, name)
			return failure(http.StatusBadRequest, "unknown parameter %q", name)
		}
	}
	return nil
}

func (c *call) string(name string) string {
	text, _ := c.body[name].(string)
	return text
}

// list is a parameter that may be a list, or a text with commas.
func (c *call) list(name string) []string {
	switch v := c.body[name].(type) {
	case string:
		if v == "" {
			return nil
		}
		return strings.Split(v, ",")
	case []any:
		var all []string
		for _, e := range v {
			text, _ := e.(string)
			all = append(all, text)
		}
		return all
	}
	return nil
}

// number is a parameter that may be a number, or a text.
func (c *call) number(name string) (int, error) {
	switch v := c.body[name].(type) {
	case nil:
		return 0, nil
	case float64:
		return int(v), nil
	case string:
		return strconv.Atoi(v)
	}
	return 0, fmt.Errorf("error converting input for field %q: expected type 'int'", name)
}

// truth is a parameter that may be a bool, or a text.
func (c *call) truth(name string) (bool, error) {
	switch v := c.body[name].(type) {
	case nil:
		return false, nil
	case bool:
		return v, nil
	case string:
		return strconv.ParseBool(v)
	}
	return false, fmt.Errorf("error converting input for field %q: expected type 'bool'", name)
}

// duration is a parameter in seconds, or with a unit.
func (c *call) duration(name string) (time.Duration, error) {
	switch v := c.body[name].(type) {
	case nil:
		return 0, nil
	case float64:
		return time.Duration(v) * time.Second, nil
	case string:
		if n, err := strconv.Atoi(v); err == nil {
			return time.Duration(n) * time.Second, nil
		}
		return time.ParseDuration(v)
	}
	return 0, fmt.Errorf("error converting input for field %q: expected type 'duration'", name)
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// parseCSR reads the parameter csr.
func (c *call) parseCSR() (*x509.CertificateRequest, *answer) {
	text := c.string("csr")
	if text == "" {
		return nil, failure(http.StatusBadRequest, `"csr" is empty`)
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, failure(http.StatusBadRequest, "csr contains no data")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, failure(http.StatusBadRequest, "certificate request could not be parsed: %v", err)
	}
	if csr.CheckSignature() != nil {
		return nil, failure(http.StatusBadRequest, "request signature invalid")
	}
	return csr, nil
}
