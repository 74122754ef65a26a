// Package ejbca is a fake of EJBCA: the call pkcs10enroll of its REST API, with roles,
// profiles and end entities. It checks each parameter and right as the original does,
// and can be slow, wrong, offline or gone. It does not know who its client is. It is no
// EJBCA: what it shows is that a client keeps to the API, not that an EJBCA keeps to it.
package ejbca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// Formats in which versions of EJBCA answer.
const (
	DER       = "DER"
	PEM       = "PEM"
	PEMBase64 = "PEM in base64"
)

// Setup is what operators have set up.
type Setup struct {
	CAName, CertificateProfile, EndEntityProfile string
	// SubjectFields and AltFields are those that the end entity profile has.
	SubjectFields, AltFields []string
	// Validity is that of the certificate profile.
	Validity time.Duration
	// Approval has requests wait for one.
	Approval bool
	// Offline is set if the CA's key cannot be used.
	Offline bool
	// NoREST is set if the protocol is switched off.
	NoREST bool
	// Format is how it answers.
	Format string
}

// Server is a running fake. All methods may be called concurrently.
type Server struct {
	// URL is where it listens.
	URL string
	// CA is the PEM certificate of the CA of its own TLS certificate, and of its
	// administrators': EJBCA calls it ManagementCA.
	CA []byte

	t          testing.TB
	management *upstreamtest.Authority
	listener   *httptest.Server

	mu        sync.Mutex // guards what follows
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour
	setup     Setup
	roles     map[string]*role
	entities  map[string]int // how often each was enrolled
}

// New starts a server that is set up, and signs as a does and behaves as b.
func New(t testing.TB, a *upstreamtest.Authority, b upstreamtest.Behaviour, setup Setup) *Server {
	t.Helper()
	s := &Server{t: t, authority: a, behaviour: b, setup: setup, roles: map[string]*role{}, entities: map[string]int{}, management: upstreamtest.NewAuthority(t, upstreamtest.Good)}
	certificate, key := s.issue("ejbca", x509.ExtKeyUsageServerAuth, time.Hour)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	listener := httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	// A client without a certificate is let in, and refused by the application.
	listener.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, ClientAuth: tls.RequestClientCert}
	listener.Config.ErrorLog = nil
	listener.StartTLS()
	t.Cleanup(listener.Close)
	s.URL, s.CA, s.listener = listener.URL, upstreamtest.PEM(s.management.Root), listener
	return s
}

// Close takes the server away.
func (s *Server) Close() { s.listener.Close() }

// Change changes what is set up.
func (s *Server) Change(change func(*Setup)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.setup)
}

// Enrolled returns how often an end entity was.
func (s *Server) Enrolled(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entities[name]
}

// role is one of administrators.
type role struct {
	rules   []string // that are accepted, with a slash at the end
	members []string // common names
}

// Operator runs a command of ejbca.sh, as far as operators of an upstream CA need it.
func (s *Server) Operator(words []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(words) < 3 || words[0] != "roles" {
		return fmt.Errorf("this fake has no command %q", words)
	}
	if words[1] == "addrole" && len(words) == 3 {
		s.roles[words[2]] = &role{}
		return nil
	}
	flags := map[string]string{}
	for i := 2; words[1] == "addrolemember" && i+1 < len(words); i += 2 {
		flags[words[i]] = words[i+1]
	}
	name := words[2]
	if words[1] == "addrolemember" {
		name = flags["--role"]
	}
	r := s.roles[name]
	switch {
	case r == nil:
		return fmt.Errorf("no such role %q", name)
	case words[1] == "changerule" && len(words) == 5 && words[4] == "ACCEPT":
		if !strings.HasPrefix(words[3], "/") || !strings.HasSuffix(words[3], "/") {
			return fmt.Errorf("no resource with name %q is available", words[3])
		}
		r.rules = append(r.rules, words[3])
		return nil
	case words[1] == "addrolemember" && flags["--caname"] == "ManagementCA" && flags["--with"] == "CertificateAuthenticationToken:WITH_COMMONNAME" && flags["--value"] != "":
		r.members = append(r.members, flags["--value"])
		return nil
	}
	return fmt.Errorf("this fake has no command %q", words)
}

// ClientCertificate returns a certificate of the ManagementCA and its key in PEM. It
// is in a role if its name is.
func (s *Server) ClientCertificate(name string, life time.Duration) (certificate, key []byte) {
	s.t.Helper()
	return s.issue(name, x509.ExtKeyUsageClientAuth, life)
}

func (s *Server) issue(name string, usage x509.ExtKeyUsage, life time.Duration) (certificate, key []byte) {
	s.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, s.management.Root, private.Public(), s.management.RootKey)
	if err != nil {
		s.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), upstreamtest.KeyPEM(s.t, private)
}

// refusal is an answer that is no certificate.
type refusal struct {
	status  int
	message string
	html    bool
}

func refuse(status int, format string, args ...any) *refusal {
	return &refusal{status: status, message: fmt.Sprintf(format, args...)}
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return // the client has gone
	}
	answer, bad := s.handle(r, body)
	status := http.StatusCreated
	if bad != nil {
		status = bad.status
		switch {
		case bad.html:
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(status)
			_, err := io.WriteString(w, "<html><head><title>Error</title></head><body>"+bad.message+"</body></html>")
			_ = err // the client has gone
			return
		case status == http.StatusAccepted:
			answer = map[string]any{"status_code": status, "info_message": bad.message, "request_id": 1234}
		default:
			answer = map[string]any{"error_code": status, "error_message": bad.message}
		}
	}
	if status == http.StatusTooManyRequests { // of a proxy: EJBCA itself has no limit
		w.Header().Set("Retry-After", strconv.Itoa(int(upstreamtest.RetryAfter/time.Second)))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		return // the client has gone
	}
}

// request is that of pkcs10enroll, as version 8 and later have it.
type request struct {
	Request            string           `json:"certificate_request"`
	CertificateProfile string           `json:"certificate_profile_name"`
	EndEntityProfile   string           `json:"end_entity_profile_name"`
	CAName             string           `json:"certificate_authority_name"`
	Username           string           `json:"username"`
	Password           string           `json:"password"`
	AccountBindingID   string           `json:"account_binding_id"`
	IncludeChain       bool             `json:"include_chain"`
	Email              string           `json:"email"`
	ResponseFormat     string           `json:"response_format"`
	SubjectDN          string           `json:"subject_dn"`
	StartTime          string           `json:"start_time"`
	EndTime            string           `json:"end_time"`
	ExtensionData      []map[string]any `json:"extension_data"`
	CustomData         []map[string]any `json:"custom_data"`
}

func (s *Server) handle(r *http.Request, body []byte) (any, *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.behaviour == upstreamtest.RateLimited {
		return nil, refuse(http.StatusTooManyRequests, "too many requests")
	}
	if s.setup.NoREST {
		return nil, &refusal{status: http.StatusForbidden, message: "This service has been disabled.", html: true}
	}
	if r.URL.Path != "/ejbca/ejbca-rest-api/v1/certificate/pkcs10enroll" || r.Method != http.MethodPost {
		return nil, &refusal{status: http.StatusNotFound, message: "Not Found", html: true}
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return nil, refuse(http.StatusUnsupportedMediaType, "HTTP 415 Unsupported Media Type")
	}
	if bad := s.authorize(r); bad != nil {
		return nil, bad
	}
	var q request
	d := json.NewDecoder(strings.NewReader(string(body)))
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		s.t.Errorf("the request is not one of pkcs10enroll: %v", err)
		return nil, refuse(http.StatusBadRequest, "JSON processing failed")
	}
	csr, bad := s.check(q)
	if bad != nil {
		return nil, bad
	}
	switch s.behaviour { //nolint:exhaustive // the others answer
	case upstreamtest.Slow:
		s.mu.Unlock()
		<-r.Context().Done()
		s.mu.Lock()
		return nil, refuse(http.StatusInternalServerError, "too late")
	case upstreamtest.Garbage:
		return nil, &refusal{status: http.StatusOK, message: "welcome", html: true}
	}
	s.entities[q.Username]++
	chain, roots := s.authority.Answer(csr.Raw, s.setup.Validity)
	if len(chain) == 0 {
		return nil, refuse(http.StatusInternalServerError, "General failure.")
	}
	return s.answer(chain, roots, q.IncludeChain), nil
}

// authorize is what stands before each call.
func (s *Server) authorize(r *http.Request) *refusal {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return refuse(http.StatusForbidden, "Client certificate or OAuth bearer token required.")
	}
	shown := r.TLS.PeerCertificates[0]
	pool := x509.NewCertPool()
	pool.AddCert(s.management.Root)
	_, err := shown.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	var rules []string
	for _, r := range s.roles {
		if slices.Contains(r.members, shown.Subject.CommonName) {
			rules = append(rules, r.rules...)
		}
	}
	if err != nil || len(rules) == 0 {
		return refuse(http.StatusForbidden, "Authentication failed: No admin authenticated for certificate with serialNumber %s and issuerDN '%s'.", shown.SerialNumber, shown.Issuer)
	}
	for _, needed := range []string{
		"/administrator/", "/ca_functionality/create_certificate/", "/ra_functionality/create_end_entity/", "/ra_functionality/edit_end_entity/",
		"/ca/" + s.setup.CAName + "/", "/endentityprofilesrules/" + s.setup.EndEntityProfile + "/create_end_entity/",
		"/endentityprofilesrules/" + s.setup.EndEntityProfile + "/edit_end_entity/",
	} {
		if !slices.ContainsFunc(rules, func(r string) bool { return strings.HasPrefix(needed, r) }) {
			return refuse(http.StatusForbidden, "Administrator not authorized to resource %s", strings.TrimSuffix(needed, "/"))
		}
	}
	return nil
}

// check is what the profiles are for. Almost all that is wrong is a 400 there.
func (s *Server) check(q request) (*x509.CertificateRequest, *refusal) {
	bad := func(format string, args ...any) (*x509.CertificateRequest, *refusal) {
		return nil, refuse(http.StatusBadRequest, format, args...)
	}
	switch {
	case q.CAName != s.setup.CAName:
		return bad("CA with name %q doesn't exist", q.CAName)
	case q.CertificateProfile != s.setup.CertificateProfile:
		return bad("Certificate profile with name %q doesn't exist", q.CertificateProfile)
	case q.EndEntityProfile != s.setup.EndEntityProfile:
		return bad("End Entity Profile with name %q doesn't exist", q.EndEntityProfile)
	case q.Username == "":
		return bad("Username cannot be empty or null.")
	case q.Password == "":
		return bad("Password cannot be empty or null.")
	}
	block, _ := pem.Decode([]byte(q.Request))
	if block == nil {
		return bad("Invalid certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return bad("Invalid certificate request")
	}
	if csr.CheckSignature() != nil {
		return bad("Invalid signature on request.")
	}
	for _, name := range csr.Subject.Names {
		field := map[string]string{"2.5.4.3": "CN", "2.5.4.5": "SN", "2.5.4.10": "O", "2.5.4.11": "OU", "2.5.4.6": "C"}[name.Type.String()]
		if !slices.Contains(s.setup.SubjectFields, field) {
			return bad("Wrong number of %s fields in Subject DN.", field)
		}
	}
	if len(csr.URIs) > 0 && !slices.Contains(s.setup.AltFields, "URI") {
		return bad("Wrong number of URI fields in Subject Alternative Name.")
	}
	switch {
	case s.setup.Offline:
		return bad("CA token is off-line for CA with name '%s'.", q.CAName)
	case s.setup.Approval:
		return nil, refuse(http.StatusAccepted, "The request has been added for approval.")
	}
	return csr, nil
}

// answer is that of a version which has the format.
func (s *Server) answer(chain, roots []*x509.Certificate, include bool) any {
	encode := func(c *x509.Certificate) string {
		switch text := string(upstreamtest.PEM(c)); s.setup.Format {
		case PEM:
			return text
		case PEMBase64:
			return base64.StdEncoding.EncodeToString([]byte(text))
		default:
			return base64.StdEncoding.EncodeToString(c.Raw)
		}
	}
	format := "PEM"
	if s.setup.Format == "" || s.setup.Format == DER {
		format = "DER"
	}
	out := map[string]any{"certificate": encode(chain[0]), "serial_number": chain[0].SerialNumber.Text(16), "response_format": format}
	if include {
		all := []string{}
		for _, c := range append(chain[1:], roots...) {
			all = append(all, encode(c))
		}
		out["certificate_chain"] = all
	}
	return out
}
