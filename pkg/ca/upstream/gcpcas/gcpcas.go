// Package gcpcas is the upstream CA that is a CA pool of Google Cloud's Certificate
// Authority Service. It makes the two calls of its API that are needed, with the
// credentials that Google's own programs on this machine would use. It does not know
// what for an intermediate is used.
//
// A request for an intermediate:
//
//  1. certificates.create is called with everything that the certificate is to have:
//     of the CSR only the key is used
//  2. fetchCaCerts says which roots the pool has
package gcpcas

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	defaultEndpoint = "https://privateca.googleapis.com"
	scope           = "https://www.googleapis.com/auth/cloud-platform"
)

// Config says which pool.
type Config struct {
	// Pool is the name of the CA pool:
	// projects/PROJECT/locations/LOCATION/caPools/POOL.
	Pool string `yaml:"pool"`
	// CertificateAuthority is the ID of the CA of the pool that is to sign; the pool
	// chooses if "".
	CertificateAuthority string `yaml:"certificate_authority"`
	// CredentialsFile is the path of the key of a service account, mode 0600; without
	// it, the credentials are the machine's, the pod's, or those that
	// GOOGLE_APPLICATION_CREDENTIALS names.
	CredentialsFile string `yaml:"credentials_file"`
	// Endpoint is the address of the API; Google's own if "".
	Endpoint string `yaml:"endpoint"`
	// ServerCA is the path of the CA certificates of the endpoint; the system's if "".
	ServerCA string `yaml:"server_ca"`
}

// CA is a CA pool. It may be called concurrently.
type CA struct {
	config Config
	base   string // of the pool
}

var (
	poolForm = regexp.MustCompile(`^projects/[a-z0-9:.-]{1,63}/locations/[a-z0-9-]{1,63}/caPools/[A-Za-z0-9_-]{1,63}$`)
	idForm   = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`)
)

// New checks the settings, and reads the credentials once if they are in a file.
func New(c Config) (*CA, error) {
	if !poolForm.MatchString(c.Pool) {
		return nil, fmt.Errorf("pool: %.200q is not the name of a CA pool; write projects/PROJECT/locations/LOCATION/caPools/POOL", c.Pool)
	}
	if c.CertificateAuthority != "" && !idForm.MatchString(c.CertificateAuthority) {
		return nil, fmt.Errorf("certificate_authority: %.100q is not the ID of a CA; write the last part of its name, or leave it out to have the pool choose", c.CertificateAuthority)
	}
	if c.Endpoint == "" {
		c.Endpoint = defaultEndpoint
	}
	u, ok := upstream.ParseAddress(c.Endpoint, false)
	if !ok {
		return nil, fmt.Errorf("endpoint: %.100q is not the address of an API; write https://host", c.Endpoint)
	}
	s := &CA{config: c, base: u.JoinPath("v1", c.Pool).String()}
	if c.ServerCA != "" {
		if _, err := upstream.ReadCertificates(c.ServerCA); err != nil {
			return nil, fmt.Errorf("server_ca: %w", err)
		}
	}
	if c.CredentialsFile != "" {
		if _, err := s.credentials(context.Background()); err != nil {
			return nil, fmt.Errorf("credentials_file: %w", err)
		}
	}
	return s, nil
}

// Capabilities say that the intermediates are the last CAs of their chain.
func (*CA) Capabilities() upstream.Capabilities { return upstream.Capabilities{PathLen0: true} }

// credentials are found in the order of Google's own programs: a file, the
// environment, the metadata server.
func (s *CA) credentials(ctx context.Context) (oauth2.TokenSource, error) {
	if s.config.CredentialsFile == "" {
		found, err := google.FindDefaultCredentials(ctx, scope)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", upstream.ErrUnavailable, err)
		}
		return found.TokenSource, nil
	}
	data, err := upstream.ReadSecret(s.config.CredentialsFile)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	// Other types could have this program run commands or ask any address.
	found, err := google.CredentialsFromJSONWithType(ctx, data, google.ServiceAccount, scope)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is not the key of a service account", upstream.ErrDenied, s.config.CredentialsFile)
	}
	return found.TokenSource, nil
}

// connect returns what makes calls.
func (s *CA) connect(ctx context.Context) (_ *upstream.REST, done func(), _ error) {
	client, done, err := upstream.Client(s.config.ServerCA, nil)
	if err != nil {
		return nil, nil, err
	}
	tokens, err := s.credentials(context.WithValue(ctx, oauth2.HTTPClient, client))
	if err != nil {
		done()
		return nil, nil, err
	}
	authorized := &http.Client{Transport: &oauth2.Transport{Base: client.Transport, Source: tokens}}
	return &upstream.REST{Client: authorized, Name: "Google Certificate Authority Service", Said: said}, done, nil
}

// said reads the message of an error.
func said(body []byte) string {
	var e struct {
		Error struct {
			Message string `json:"message"`
			Status  string `json:"status"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	return strings.TrimPrefix(e.Error.Status+": "+e.Error.Message, ": ")
}

// What a certificate is asked for with; the names are the API's (v1, Certificate).
type (
	certificate struct {
		Lifetime string            `json:"lifetime"`
		Config   certificateConfig `json:"config"`
	}
	certificateConfig struct {
		PublicKey     publicKey     `json:"publicKey"`
		SubjectConfig subjectConfig `json:"subjectConfig"`
		X509Config    x509Config    `json:"x509Config"`
	}
	publicKey struct {
		Key    []byte `json:"key"`
		Format string `json:"format"`
	}
	subjectConfig struct {
		Subject        subject         `json:"subject"`
		SubjectAltName subjectAltNames `json:"subjectAltName"`
	}
	subject struct {
		CommonName         string `json:"commonName"`
		Organization       string `json:"organization,omitempty"`
		OrganizationalUnit string `json:"organizationalUnit,omitempty"`
		CountryCode        string `json:"countryCode,omitempty"`
	}
	subjectAltNames struct {
		URIs []string `json:"uris"`
	}
	x509Config struct {
		CAOptions caOptions `json:"caOptions"`
		KeyUsage  keyUsage  `json:"keyUsage"`
	}
	caOptions struct {
		IsCA                bool `json:"isCa"`
		MaxIssuerPathLength int  `json:"maxIssuerPathLength"`
	}
	keyUsage struct {
		BaseKeyUsage baseKeyUsage `json:"baseKeyUsage"`
	}
	baseKeyUsage struct {
		CertSign bool `json:"certSign"`
		CRLSign  bool `json:"crlSign"`
	}
)

// maxCommonName is that of X.520, ub-common-name.
const maxCommonName = 64

// Mint has an intermediate signed.
func (s *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	rest, done, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	wanted, err := describe(r)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(r.CSR)
	query := url.Values{
		"certificateId": {"meshid-" + hex.EncodeToString(sum[:16])},
		"requestId":     {requestID(sum)},
	}
	if s.config.CertificateAuthority != "" {
		query.Set("issuingCertificateAuthorityId", s.config.CertificateAuthority)
	}
	var signed struct {
		PEMCertificate      string   `json:"pemCertificate"`
		PEMCertificateChain []string `json:"pemCertificateChain"`
	}
	if err := rest.Call(ctx, http.MethodPost, s.base+"/certificates?"+query.Encode(), nil, wanted, &signed); err != nil {
		return nil, err
	}
	first, err := upstream.ParseChain(1, signed.PEMCertificate)
	if err == nil && len(first) != 1 {
		err = errors.New("there is none")
	}
	if err != nil {
		return nil, fmt.Errorf("the certificate from Google: %w", err)
	}
	others, err := upstream.ParseChain(2*upstream.MaxChain, signed.PEMCertificateChain...)
	if err != nil {
		return nil, fmt.Errorf("the chain from Google: %w", err)
	}
	all, err := s.pool(ctx, rest)
	if err != nil {
		return nil, err
	}
	return upstream.Arrange(first[0], append(others, all...)), nil
}

// pool returns the CA certificates of the pool. Those of CAs that do not sign yet are
// among them, so that their root is known before it is needed.
func (s *CA) pool(ctx context.Context, rest *upstream.REST) ([]*x509.Certificate, error) {
	var chains struct {
		CACerts []struct {
			Certificates []string `json:"certificates"`
		} `json:"caCerts"`
	}
	if err := rest.Call(ctx, http.MethodPost, s.base+":fetchCaCerts", nil, struct{}{}, &chains); err != nil {
		return nil, err
	}
	var texts []string
	for _, chain := range chains.CACerts {
		texts = append(texts, chain.Certificates...)
	}
	all, err := upstream.ParseChain(upstream.MaxRoots*upstream.MaxChain, texts...)
	if err != nil {
		return nil, fmt.Errorf("the CA certificates of the pool: %w", err)
	}
	return all, nil
}

// describe says what the certificate of a request is to have.
func describe(r *upstream.Request) (*certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(r.Request.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encode the key: %w", err)
	}
	c := &certificate{
		Lifetime: strconv.FormatInt(int64(r.TTL/time.Second), 10) + "s",
		Config: certificateConfig{
			PublicKey:  publicKey{Key: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), Format: "PEM"},
			X509Config: x509Config{CAOptions: caOptions{IsCA: true}, KeyUsage: keyUsage{baseKeyUsage{CertSign: true, CRLSign: true}}},
		},
	}
	// The API knows no serialNumber in a subject; it tells the names of intermediates
	// apart.
	from := r.Request.Subject
	to := &c.Config.SubjectConfig.Subject
	to.CommonName = strings.TrimSpace(from.CommonName + " " + from.SerialNumber)
	if len(to.CommonName) > maxCommonName {
		to.CommonName = from.CommonName
	}
	for _, part := range []struct {
		to   *string
		from []string
	}{{&to.Organization, from.Organization}, {&to.OrganizationalUnit, from.OrganizationalUnit}, {&to.CountryCode, from.Country}} {
		if len(part.from) > 0 {
			*part.to = part.from[0]
		}
	}
	for _, u := range r.Request.URIs {
		c.Config.SubjectConfig.SubjectAltName.URIs = append(c.Config.SubjectConfig.SubjectAltName.URIs, u.String())
	}
	return c, nil
}

// requestID is a UUID (RFC 9562 §5.8) that is the same for the same request, so that
// one that is made again gets the same certificate.
func requestID(sum [32]byte) string {
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80
	id := hex.EncodeToString(sum[:16])
	return strings.Join([]string{id[:8], id[8:12], id[12:16], id[16:20], id[20:]}, "-")
}
