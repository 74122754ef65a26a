// Package stepca is the upstream CA that is a step-ca. It speaks the three calls of its
// API that are needed, with tokens of a JWK or an X5C provisioner, and trusts the
// server by the fingerprint of its root. It does not know what for an intermediate is
// used.
//
// A request for an intermediate:
//
//  1. the root is fetched by its fingerprint, once, and from then on authenticates the
//     server
//  2. a token for this one CSR is signed, which lives for minutes
//  3. /1.0/sign is called, then /roots
//
// A leaf is had in the same way, by a provisioner whose template is for leaves.
package stepca

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

// tokenLife is that of a token: step-ca allows clocks to differ by a minute.
const tokenLife = 5 * time.Minute

// margin is by how much an intermediate ends before the certificate that asked for
// it, for clocks that differ.
const margin = time.Minute

// Config says which step-ca, and with which provisioner.
type Config struct {
	// URL is where step-ca listens, such as https://ca.internal:9000, with a name from
	// dnsNames of its configuration.
	URL string `yaml:"url"`
	// RootSHA256 is the fingerprint of its root, as `step certificate fingerprint` prints
	// it: the server is trusted by it.
	RootSHA256 string `yaml:"root_sha256"`
	// Provisioner is the name of the provisioner.
	Provisioner string `yaml:"provisioner"`
	// Key is the path of the provisioner's private key, mode 0600. For a JWK provisioner,
	// the JWK, encrypted as `step crypto jwk create` writes it or not; for an X5C
	// provisioner, PEM.
	Key string `yaml:"key"`
	// PasswordFile is the path of the password of an encrypted JWK, mode 0600.
	PasswordFile string `yaml:"password_file"`
	// Certificate is the path of the PEM certificates of the key, leaf first, of an X5C
	// provisioner; none for a JWK provisioner.
	Certificate string `yaml:"certificate"`
}

// CA is a step-ca. It may be called concurrently.
type CA struct {
	config Config
	base   *url.URL
	pin    []byte
	root   atomic.Pointer[x509.Certificate] // the one that has the fingerprint, once it was shown
	kept   upstream.Connections
}

// New checks the settings and reads the key once.
func New(c Config) (*CA, error) {
	base, ok := upstream.ParseAddress(c.URL, false)
	if !ok {
		return nil, fmt.Errorf("url: %.100q is not the address of a step-ca; write https://host:port", c.URL)
	}
	pin, err := hex.DecodeString(strings.ReplaceAll(c.RootSHA256, ":", ""))
	if err != nil || len(pin) != sha256.Size {
		return nil, fmt.Errorf("root_sha256: %.100q is not a SHA-256; write the 64 digits that `step certificate fingerprint root_ca.crt` prints", c.RootSHA256)
	}
	if c.Provisioner == "" || c.Key == "" {
		return nil, errors.New("set provisioner to the name of a JWK or X5C provisioner, and key to the path of its private key")
	}
	if c.Certificate != "" && c.PasswordFile != "" {
		return nil, errors.New("password_file is for the JWK of a JWK provisioner, and certificate for an X5C provisioner: remove one")
	}
	s := &CA{config: c, base: base, pin: pin}
	if _, _, err := s.signer(); err != nil {
		return nil, err
	}
	return s, nil
}

// Capabilities returns none: limits are those of the provisioner, which does not say them.
func (*CA) Capabilities() upstream.Capabilities { return upstream.Capabilities{} }

// said reads the message of an error.
func said(body []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	return e.Message
}

func rest(client *http.Client) *upstream.REST {
	return &upstream.REST{Client: client, Name: "step-ca", Said: said}
}

// fetchRoot has the server show the root that has the fingerprint, once: no other one
// ever has it.
func (s *CA) fetchRoot(ctx context.Context) (*x509.Certificate, error) {
	if root := s.root.Load(); root != nil {
		return root, nil
	}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}, //nolint:gosec // what comes is compared with the fingerprint
		Proxy:           http.ProxyFromEnvironment, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 1 << 16,
	}
	defer transport.CloseIdleConnections()
	var answer struct {
		CA string `json:"ca"`
	}
	if err := rest(&http.Client{Transport: transport}).Call(ctx, http.MethodGet, s.base.JoinPath("root", hex.EncodeToString(s.pin)).String(), nil, nil, &answer); err != nil {
		if errors.Is(err, upstream.ErrDenied) {
			return nil, fmt.Errorf("%w: compare root_sha256 with `step certificate fingerprint` of its root", err)
		}
		return nil, err
	}
	all, err := upstream.ParseChain(1, answer.CA)
	if err != nil || len(all) != 1 {
		return nil, fmt.Errorf("the root from step-ca is no certificate: %w", err)
	}
	if sum := sha256.Sum256(all[0].Raw); subtle.ConstantTimeCompare(sum[:], s.pin) != 1 {
		return nil, fmt.Errorf("%w: the root that step-ca shows has SHA-256 %s, not that of root_sha256: this is another CA, or somebody in between",
			upstream.ErrDenied, hex.EncodeToString(sum[:]))
	}
	s.root.Store(all[0])
	return all[0], nil
}

// Mint has an intermediate signed.
func (s *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	root, err := s.fetchRoot(ctx)
	if err != nil {
		return nil, err
	}
	rest := rest(s.kept.For([]*x509.Certificate{root}, nil))
	m, err := s.sign(ctx, rest, r)
	if upstream.Stale(err) { // with another token: the first one may have been used
		m, err = s.sign(ctx, rest, r)
	}
	if err != nil {
		return nil, err
	}
	var roots struct {
		Certificates []string `json:"crts"`
	}
	if err := rest.Call(ctx, http.MethodGet, s.base.JoinPath("roots").String(), nil, nil, &roots); err != nil {
		return nil, err
	}
	if m.Roots, err = upstream.ParseChain(upstream.MaxRoots, roots.Certificates...); err != nil {
		return nil, fmt.Errorf("the roots from step-ca: %w", err)
	}
	return m, nil
}

// sign has something signed. The answer is without the roots.
func (s *CA) sign(ctx context.Context, rest *upstream.REST, r *upstream.Request) (*upstream.Minted, error) {
	now := time.Now()
	token, notAfter, err := s.token(r, now)
	if err != nil {
		return nil, err
	}
	// step-ca signs nothing that outlives the certificate of an X5C provisioner.
	ttl := r.TTL
	if left := notAfter.Sub(now).Truncate(time.Second) - margin; !notAfter.IsZero() && left < ttl {
		if left <= 0 {
			return nil, fmt.Errorf("%w: the certificate in %s ends at %s: put its successor there", upstream.ErrDenied, s.config.Certificate, notAfter.UTC().Format(time.RFC3339))
		}
		ttl = left
	}
	var signed struct {
		Chain []string `json:"certChain"`
	}
	if err := rest.Call(ctx, http.MethodPost, s.base.JoinPath("1.0", "sign").String(), nil, map[string]string{
		"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR})),
		"ott": token,
		// By its own clock.
		"notAfter": ttl.String(),
	}, &signed); err != nil {
		return nil, err
	}
	m := &upstream.Minted{}
	if m.Chain, err = upstream.ParseChain(2*upstream.MaxChain, signed.Chain...); err != nil {
		return nil, fmt.Errorf("the chain from step-ca: %w", err)
	}
	return m, nil
}

// SignLeaf has an X.509-SVID signed, by a provisioner whose template is for leaves.
func (s *CA) SignLeaf(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	return s.Mint(ctx, r)
}

// token makes the one-time token for a request: it says for which CSR it is, so
// that nobody who sees it, in step-ca's log for one, has any use for it.
func (s *CA) token(r *upstream.Request, now time.Time) (_ string, notAfter time.Time, _ error) {
	signer, notAfter, err := s.signer()
	if err != nil {
		return "", notAfter, err
	}
	audience := s.base.JoinPath("1.0", "sign")
	if s.config.Certificate != "" {
		audience.Fragment = "x5c/" + s.config.Provisioner
	}
	names := slices.Clone(r.Request.DNSNames)
	for _, u := range r.Request.URIs {
		names = append(names, u.String())
	}
	subject := r.Request.Subject.CommonName
	if subject == "" && len(names) > 0 { // step-ca wants one; the template decides what it is used for
		subject = names[len(names)-1]
	}
	csr := sha256.Sum256(r.CSR)
	claims, err := json.Marshal(map[string]any{
		"iss": s.config.Provisioner, "aud": audience.String(), "sub": subject, "sans": names,
		"jti": rand.Text(), "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(tokenLife).Unix(),
		"sha": hex.EncodeToString(s.pin),
		"cnf": map[string]string{"x5rt#S256": base64.RawURLEncoding.EncodeToString(csr[:])},
	})
	if err != nil {
		return "", notAfter, fmt.Errorf("encode the token for step-ca: %w", err)
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		return "", notAfter, fmt.Errorf("sign the token for step-ca: %w", err)
	}
	token, err := signed.CompactSerialize()
	return token, notAfter, err
}
