// Package awspca is a fake of AWS Private CA: as much of its API as an upstream CA
// uses. It checks signatures (Signature Version 4), permissions and each parameter as
// the original does, and can be slow, wrong, limited or gone. It does not know who its
// client is. It is no AWS: what it shows is that a client keeps to the API, not that
// AWS keeps to it.
package awspca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// What clients have to know.
const (
	ARN       = "arn:aws:acm-pca:eu-central-1:123456789012:certificate-authority/11223344-1234-1122-2233-112233445566"
	AccessKey = "AKIAIOSFODNN7EXAMPLE"                     //nolint:gosec // G101: AWS's own example, of nobody
	SecretKey = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY" //nolint:gosec // G101: the same
	region    = "eu-central-1"
)

// Actions are those that a client needs to be allowed.
var Actions = []string{"DescribeCertificateAuthority", "IssueCertificate", "GetCertificate"}

// Server is a running fake. Its fields may be changed before the first request, and
// its methods called concurrently.
type Server struct {
	// URL is where it listens.
	URL string
	// CA is the PEM certificate of the CA of its own TLS certificate.
	CA []byte
	// Status of the private CA.
	Status string
	// Allowed are the actions that the client may call.
	Allowed []string
	// Pending is how many times a certificate is asked for before it is there.
	Pending int

	t         testing.TB
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour

	mu      sync.Mutex // guards what follows
	issued  map[string]*certificate
	tokens  map[string]string // idempotency token → ARN
	actions []string
}

type certificate struct {
	csr     []byte
	ttl     time.Duration
	pending int
}

// New starts a server which signs as a does, and behaves as b.
func New(t testing.TB, a *upstreamtest.Authority, b upstreamtest.Behaviour) *Server {
	t.Helper()
	s := &Server{
		Status: "ACTIVE", Allowed: Actions, Pending: 1, t: t, authority: a, behaviour: b,
		issued: map[string]*certificate{}, tokens: map[string]string{},
	}
	var end func()
	s.URL, s.CA, end = upstreamtest.Serve(t, s.serve)
	if b == upstreamtest.Gone {
		end()
	}
	return s
}

// Calls returns the actions that were called, in order.
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.actions)
}

// failure is an error of the API. Nearly all have the status 400.
type failure struct {
	status        int
	kind, message string
}

func refuse(kind, format string, args ...any) *failure {
	return &failure{http.StatusBadRequest, kind, fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *failure {
	return refuse("ValidationException", format, args...)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if s.behaviour == upstreamtest.Slow {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		s.t.Errorf("read a request: %v", err)
		return
	}
	answer, failed := s.act(r, body)
	if s.behaviour == upstreamtest.Garbage && failed == nil {
		_, _ = w.Write([]byte("<html>"))
		return
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	if failed != nil {
		w.Header().Set("X-Amzn-Requestid", "b1a4b5c6")
		w.WriteHeader(failed.status)
		answer = map[string]string{"__type": failed.kind, "message": failed.message}
	}
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		s.t.Logf("an answer was not read: %v", err)
	}
}

func (s *Server) act(r *http.Request, body []byte) (any, *failure) {
	action, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "ACMPrivateCA.")
	switch {
	case r.Method != http.MethodPost || r.URL.Path != "/" || !ok:
		return nil, refuse("UnknownOperationException", "")
	case r.Header.Get("Content-Type") != "application/x-amz-json-1.1":
		return nil, refuse("SerializationException", "")
	}
	if f := s.authenticate(r, body); f != nil {
		return nil, f
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.actions = append(s.actions, action)
	switch {
	case !slices.Contains(s.Allowed, action) || s.behaviour == upstreamtest.Denied:
		return nil, refuse("AccessDeniedException", "User: arn:aws:iam::123456789012:user/meshid is not authorized to perform: acm-pca:%s on resource: %s", action, ARN)
	case s.behaviour == upstreamtest.RateLimited:
		return nil, refuse("ThrottlingException", "Rate exceeded")
	}
	var in struct {
		CertificateAuthorityArn string `json:"CertificateAuthorityArn"`
		CertificateArn          string `json:"CertificateArn"`
		Csr                     []byte `json:"Csr"`
		SigningAlgorithm        string `json:"SigningAlgorithm"`
		TemplateArn             string `json:"TemplateArn"`
		IdempotencyToken        string `json:"IdempotencyToken"`
		Validity                *struct {
			Type  string `json:"Type"`
			Value int64  `json:"Value"`
		} `json:"Validity"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, refuse("SerializationException", "%v", err)
	}
	if in.CertificateAuthorityArn != ARN {
		return nil, refuse("ResourceNotFoundException", "Could not find resource %s", in.CertificateAuthorityArn)
	}
	switch action {
	case "DescribeCertificateAuthority":
		return map[string]any{"CertificateAuthority": map[string]any{
			"Arn": ARN, "Status": s.Status, "Type": "SUBORDINATE", "UsageMode": "GENERAL_PURPOSE",
			"CertificateAuthorityConfiguration": map[string]any{"KeyAlgorithm": "EC_prime256v1", "SigningAlgorithm": "SHA256WITHECDSA"},
		}}, nil
	case "IssueCertificate":
		if s.Status != "ACTIVE" {
			return nil, refuse("InvalidStateException", "The certificate authority is not in a valid state for issuing certificates")
		}
		if in.Validity == nil {
			return nil, invalid("1 validation error detected: Value null at 'validity' failed to satisfy constraint: Member must not be null")
		}
		return s.issue(in.Csr, in.SigningAlgorithm, in.TemplateArn, in.IdempotencyToken, in.Validity.Type, in.Validity.Value)
	default: // GetCertificate
		return s.get(in.CertificateArn)
	}
}

var (
	tokenForm    = regexp.MustCompile(`^[\x09\x0a\x0d\x20-\xff]{1,36}$`)
	templateForm = regexp.MustCompile(`^arn:aws:acm-pca:::template/(SubordinateCACertificate_PathLen[0-3]|BlankSubordinateCACertificate_PathLen[0-3]_(APICSR|CSR|API)Passthrough)/V1$`)
)

func (s *Server) issue(csr []byte, algorithm, template, token, kind string, value int64) (any, *failure) {
	block, rest := pem.Decode(csr)
	switch {
	case block == nil || block.Type != "CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0:
		return nil, refuse("MalformedCSRException", "The CSR is not a PEM-encoded certificate signing request")
	case algorithm != "SHA256WITHECDSA":
		return nil, invalid("The signing algorithm %s does not match the key algorithm EC_prime256v1 of the CA", algorithm)
	case !templateForm.MatchString(template):
		return nil, refuse("InvalidArnException", "The template ARN %s is not valid", template)
	case token != "" && !tokenForm.MatchString(token):
		return nil, invalid("Value at 'idempotencyToken' failed to satisfy constraint: Member must have length less than or equal to 36")
	case kind != "ABSOLUTE":
		s.t.Errorf("the validity is of the type %q: this fake knows ABSOLUTE only", kind)
		return nil, invalid("Value at 'validity.type' failed to satisfy constraint")
	}
	end := time.Unix(value, 0)
	switch {
	case !end.After(time.Now()):
		return nil, invalid("The certificate validity ends in the past")
	case end.After(s.authority.Issuer.NotAfter) && s.behaviour != upstreamtest.Expired:
		return nil, invalid("The certificate validity specified exceeds the certificate authority validity")
	}
	if arn, ok := s.tokens[token]; token != "" && ok {
		return map[string]string{"CertificateArn": arn}, nil
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	arn := ARN + "/certificate/" + hex.EncodeToString(id)
	s.issued[arn] = &certificate{csr: block.Bytes, ttl: time.Until(end), pending: s.Pending}
	s.tokens[token] = arn
	return map[string]string{"CertificateArn": arn}, nil
}

func (s *Server) get(arn string) (any, *failure) {
	c, ok := s.issued[arn]
	if !ok {
		return nil, refuse("ResourceNotFoundException", "Could not find resource %s", arn)
	}
	if c.pending > 0 {
		c.pending--
		return nil, refuse("RequestInProgressException", "The request to issue certificate %s is in progress", arn)
	}
	chain, roots := s.authority.Answer(c.csr, c.ttl)
	if len(chain) == 0 {
		return nil, refuse("RequestFailedException", "The request has failed")
	}
	return map[string]string{
		"Certificate":      string(upstreamtest.PEM(chain[0])),
		"CertificateChain": string(upstreamtest.PEM(append(slices.Clone(chain[1:]), roots...)...)),
	}, nil
}

var authorization = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/]+)/\d{8}/` + region + `/acm-pca/aws4_request, SignedHeaders=([a-z0-9;-]+), Signature=[0-9a-f]{64}$`)

// authenticate signs the request again, with what the client must have.
func (s *Server) authenticate(r *http.Request, body []byte) *failure {
	parts := authorization.FindStringSubmatch(r.Header.Get("Authorization"))
	switch {
	case r.Header.Get("Authorization") == "":
		return refuse("MissingAuthenticationTokenException", "Missing Authentication Token")
	case parts == nil:
		return refuse("IncompleteSignatureException", "Authorization header is malformed")
	case parts[1] != AccessKey:
		return refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || time.Since(at).Abs() > 5*time.Minute {
		return refuse("InvalidSignatureException", "Signature expired")
	}
	names := strings.Split(parts[2], ";")
	for _, needed := range []string{"host", "x-amz-date", "x-amz-target"} {
		if !slices.Contains(names, needed) {
			return refuse("InvalidSignatureException", "the header %s is not signed", needed)
		}
	}
	again, err := http.NewRequestWithContext(context.Background(), r.Method, s.URL+r.URL.String(), bytes.NewReader(body)) //nolint:gosec // G704: it is signed, and not sent
	if err != nil {
		return refuse("InternalFailure", "%v", err)
	}
	for _, name := range names {
		if values := r.Header.Values(name); len(values) > 0 && name != "host" {
			again.Header[http.CanonicalHeaderKey(name)] = values
		}
	}
	sum := sha256.Sum256(body)
	if err := v4.NewSigner().SignHTTP(context.Background(), aws.Credentials{AccessKeyID: AccessKey, SecretAccessKey: SecretKey},
		again, hex.EncodeToString(sum[:]), "acm-pca", region, at); err != nil {
		return refuse("InternalFailure", "%v", err)
	}
	if again.Header.Get("Authorization") != r.Header.Get("Authorization") {
		return refuse("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	}
	return nil
}
