// Package gcpcas is a fake of Google Cloud's Certificate Authority Service, and of the
// server that gives service accounts their access tokens: as much of their API as an
// upstream CA uses. It checks tokens, permissions and each parameter as the original
// does, and can be slow, wrong, limited or gone. It does not know who its client is. It
// is no Google: what it shows is that a client keeps to the API, not that Google keeps
// to it.
package gcpcas

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// What clients have to know.
const (
	Pool    = "projects/meshid-test/locations/europe-west3/caPools/mesh"
	Account = "meshid@meshid-test.iam.gserviceaccount.com"
	// Authority is the ID of the pool's one CA.
	Authority = "root-1"
)

// Permissions are those that a client needs.
var Permissions = []string{"privateca.certificates.create", "privateca.caPools.use"}

// Server is a running fake. Its fields may be changed before the first request.
type Server struct {
	// URL is where it listens.
	URL string
	// CA is the PEM certificate of the CA of its own TLS certificate.
	CA []byte
	// Key is the key file of the service account.
	Key []byte
	// Granted are the permissions of the account.
	Granted []string

	t         testing.TB
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour

	mu       sync.Mutex // guards what follows
	account  *rsa.PrivateKey
	tokens   map[string]time.Time
	requests map[string]any // request id → answer
	ids      map[string]bool
	roots    []*x509.Certificate
}

// accountKey is that of all fakes, since it takes a while to make; secondKey that of those
// whose account has changed it.
var accountKey, secondKey = makeKey(), makeKey()

func makeKey() func() (*rsa.PrivateKey, error) {
	return sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })
}

// ChangeKey has the account's key changed: what was signed with the one before is
// refused.
func (s *Server) ChangeKey() {
	s.t.Helper()
	key, err := secondKey()
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.account = key
}

// New starts a server which signs as a does, and behaves as b.
func New(t testing.TB, a *upstreamtest.Authority, b upstreamtest.Behaviour) *Server {
	t.Helper()
	account, err := accountKey()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		Granted: Permissions, t: t, authority: a, behaviour: b, account: account,
		tokens: map[string]time.Time{}, requests: map[string]any{}, ids: map[string]bool{}, roots: []*x509.Certificate{a.Root},
	}
	var end func()
	s.URL, s.CA, end = upstreamtest.Serve(t, s.serve)
	if s.Key, err = json.Marshal(map[string]string{
		"type": "service_account", "project_id": "meshid-test", "private_key_id": "k1", "client_email": Account, "client_id": "1",
		"private_key": string(upstreamtest.KeyPEM(t, account)), "token_uri": s.URL + "/token", "universe_domain": "googleapis.com",
	}); err != nil {
		t.Fatal(err)
	}
	if b == upstreamtest.Gone {
		end()
	}
	return s
}

// failure is an error of the API.
type failure struct {
	code            int
	status, message string
}

func refuse(code int, status, format string, args ...any) *failure {
	return &failure{code, status, fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *failure {
	return refuse(http.StatusBadRequest, "INVALID_ARGUMENT", format, args...)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		s.t.Errorf("read a request: %v", err)
		return
	}
	if r.URL.Path == "/token" {
		s.token(w, r, body)
		return
	}
	if s.behaviour == upstreamtest.Slow {
		<-r.Context().Done()
		return
	}
	answer, failed := s.act(r, body)
	if s.behaviour == upstreamtest.Garbage && failed == nil {
		answer = "<html>"
	}
	if failed != nil {
		if failed.code == http.StatusTooManyRequests {
			w.Header().Set("Retry-After", "7")
		}
		answer = map[string]any{"error": map[string]any{"code": failed.code, "message": failed.message, "status": failed.status}}
		s.reply(w, failed.code, answer)
		return
	}
	s.reply(w, http.StatusOK, answer)
}

func (s *Server) reply(w http.ResponseWriter, code int, answer any) {
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		s.t.Logf("an answer was not read: %v", err)
	}
}

// token gives an access token for a statement that the account's key has signed
// (RFC 7523).
func (s *Server) token(w http.ResponseWriter, r *http.Request, body []byte) {
	form, err := url.ParseQuery(string(body))
	refused := func(text string) {
		s.reply(w, http.StatusBadRequest, map[string]string{"error": "invalid_grant", "error_description": text})
	}
	if err != nil || r.Method != http.MethodPost || form.Get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
		refused("Bad Request")
		return
	}
	statement, err := jwt.ParseSigned(form.Get("assertion"), []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		refused("Invalid JWT")
		return
	}
	var claims struct {
		jwt.Claims
		Scope string `json:"scope"`
	}
	s.mu.Lock()
	account := s.account.Public()
	s.mu.Unlock()
	if err := statement.Claims(account, &claims); err != nil {
		refused("Invalid JWT Signature.")
		return
	}
	if err := claims.Validate(jwt.Expected{Issuer: Account, AnyAudience: jwt.Audience{s.URL + "/token"}}); err != nil ||
		claims.Scope != "https://www.googleapis.com/auth/cloud-platform" {
		refused("Invalid JWT: issuer, audience, time or scope")
		return
	}
	token := rand.Text()
	s.mu.Lock()
	s.tokens[token] = time.Now().Add(time.Hour)
	s.mu.Unlock()
	s.reply(w, http.StatusOK, map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": 3600})
}

func (s *Server) act(r *http.Request, body []byte) (any, *failure) {
	s.mu.Lock()
	defer s.mu.Unlock()
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if until, known := s.tokens[token]; !ok || !known || time.Now().After(until) {
		return nil, refuse(http.StatusUnauthorized, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
	}
	switch s.behaviour { //nolint:exhaustive // the others answer
	case upstreamtest.RateLimited:
		return nil, refuse(http.StatusTooManyRequests, "RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'Certificate creation requests'")
	case upstreamtest.Denied:
		return nil, s.denied("privateca.certificates.create")
	}
	switch {
	case r.Method != http.MethodPost:
		return nil, refuse(http.StatusNotFound, "NOT_FOUND", "Method not found.")
	case r.URL.Path == "/v1/"+Pool+":fetchCaCerts":
		if !slices.Contains(s.Granted, "privateca.caPools.use") {
			return nil, s.denied("privateca.caPools.use")
		}
		return map[string]any{"caCerts": []any{map[string]any{"certificates": texts(s.roots)}}}, nil
	case r.URL.Path == "/v1/"+Pool+"/certificates":
		if !slices.Contains(s.Granted, "privateca.certificates.create") {
			return nil, s.denied("privateca.certificates.create")
		}
		return s.create(r.URL.Query(), body)
	default:
		return nil, refuse(http.StatusNotFound, "NOT_FOUND", "Resource %q was not found", r.URL.Path)
	}
}

func (*Server) denied(permission string) *failure {
	return refuse(http.StatusForbidden, "PERMISSION_DENIED", "Permission '%s' denied on '%s'", permission, Pool)
}

var (
	certificateID = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,63}$`)
	requestID     = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
)

// create is certificates.create.
func (s *Server) create(query url.Values, body []byte) (any, *failure) {
	for name := range query {
		if !slices.Contains([]string{"certificateId", "requestId", "issuingCertificateAuthorityId", "validateOnly"}, name) {
			return nil, invalid("Invalid JSON payload received. Unknown name %q: Cannot bind query parameter.", name)
		}
	}
	var in struct {
		Lifetime string `json:"lifetime"`
		Config   *struct {
			PublicKey struct {
				Key    []byte `json:"key"`
				Format string `json:"format"`
			} `json:"publicKey"`
			SubjectConfig struct {
				Subject struct {
					CommonName         string `json:"commonName"`
					Organization       string `json:"organization"`
					OrganizationalUnit string `json:"organizationalUnit"`
					CountryCode        string `json:"countryCode"`
				} `json:"subject"`
				SubjectAltName struct {
					URIs []string `json:"uris"`
				} `json:"subjectAltName"`
			} `json:"subjectConfig"`
			X509Config struct {
				CAOptions struct {
					IsCA                *bool `json:"isCa"`
					MaxIssuerPathLength *int  `json:"maxIssuerPathLength"`
				} `json:"caOptions"`
				KeyUsage struct {
					BaseKeyUsage struct {
						CertSign bool `json:"certSign"`
						CRLSign  bool `json:"crlSign"`
					} `json:"baseKeyUsage"`
				} `json:"keyUsage"`
			} `json:"x509Config"`
		} `json:"config"`
	}
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return nil, invalid("Invalid JSON payload received: %v", err)
	}
	lifetime, err := time.ParseDuration(in.Lifetime)
	switch {
	case err != nil || lifetime <= 0 || !strings.HasSuffix(in.Lifetime, "s"):
		return nil, invalid("Invalid value at 'certificate.lifetime' (type.googleapis.com/google.protobuf.Duration)")
	case in.Config == nil:
		return nil, invalid("certificate_config: one of pem_csr and config must be set")
	case query.Get("certificateId") == "" || !certificateID.MatchString(query.Get("certificateId")):
		return nil, invalid("certificate_id is required for a CA pool of the tier ENTERPRISE")
	case query.Get("requestId") != "" && !requestID.MatchString(query.Get("requestId")):
		return nil, invalid("request_id must be a UUID")
	case query.Has("issuingCertificateAuthorityId") && query.Get("issuingCertificateAuthorityId") != Authority:
		return nil, refuse(http.StatusNotFound, "NOT_FOUND", "CertificateAuthority %q was not found", query.Get("issuingCertificateAuthorityId"))
	case in.Config.PublicKey.Format != "PEM":
		return nil, invalid("public_key.format must be PEM")
	case len(in.Config.SubjectConfig.Subject.CommonName) > 64:
		return nil, invalid("subject.common_name must be at most 64 characters")
	}
	if answer, again := s.requests[query.Get("requestId")]; again {
		return answer, nil
	}
	if s.ids[query.Get("certificateId")] {
		return nil, refuse(http.StatusConflict, "ALREADY_EXISTS", "Resource already exists")
	}
	block, _ := pem.Decode(in.Config.PublicKey.Key)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, invalid("public_key.key is not a PEM-encoded public key")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, invalid("public_key.key: %v", err)
	}
	options := in.Config.X509Config
	if options.CAOptions.IsCA == nil || !*options.CAOptions.IsCA || options.CAOptions.MaxIssuerPathLength == nil || *options.CAOptions.MaxIssuerPathLength != 0 ||
		!options.KeyUsage.BaseKeyUsage.CertSign || !options.KeyUsage.BaseKeyUsage.CRLSign {
		s.t.Errorf("what is asked for is no CA of path length 0: %s", body)
	}
	var uris []*url.URL
	for _, text := range in.Config.SubjectConfig.SubjectAltName.URIs {
		u, err := url.Parse(text)
		if err != nil {
			return nil, invalid("subject_alt_name.uris: %v", err)
		}
		uris = append(uris, u)
	}
	chain, roots := s.authority.Certify(public, pkix.Name{CommonName: in.Config.SubjectConfig.Subject.CommonName}, uris, lifetime)
	if len(chain) == 0 {
		return nil, refuse(http.StatusInternalServerError, "INTERNAL", "Internal error")
	}
	s.roots = roots
	answer := map[string]any{
		"name": Pool + "/certificates/" + query.Get("certificateId"), "lifetime": in.Lifetime,
		"pemCertificate": texts(chain)[0], "pemCertificateChain": texts(slices.Concat(chain[1:], roots)),
	}
	s.ids[query.Get("certificateId")] = true
	s.requests[query.Get("requestId")] = answer
	return answer, nil
}

func texts(all []*x509.Certificate) []string {
	out := []string{}
	for _, c := range all {
		out = append(out, string(upstreamtest.PEM(c)))
	}
	return out
}
