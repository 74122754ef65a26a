// Package vault is the upstream CA that is a PKI mount of HashiCorp Vault or OpenBao,
// whose API is the same. It speaks the handful of calls that are needed. It does not
// know what for an intermediate is used.
//
// A request for an intermediate:
//
//  1. a token is there, or is had by one of four methods (login.go)
//  2. sign-intermediate is called; a token that is refused is replaced once
//  3. what comes back is put in order: the chain, and the roots above it
//
// A leaf is had in the same way, by sign with a role.
//
// Between requests, WatchRoots reads the mount's chain, which needs no token, and
// keeps the token alive, so that what is wrong with it is known long before it is
// needed.
package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	// lookEvery is how often the mount's roots are looked at.
	lookEvery = time.Minute
	// callTimeout bounds the calls that nobody waits for.
	callTimeout = 30 * time.Second
	// maxCertificates bounds the certificates of one answer: a mount names the
	// intermediate twice, and all that leads from its issuer to a root.
	maxCertificates = 2*upstream.MaxChain + upstream.MaxRoots
)

// Config says which mount of which server, and how to log in there: one of token_file,
// approle, kubernetes and certificate.
type Config struct {
	// URL is where Vault or OpenBao listens, such as https://vault.internal:8200.
	URL string `yaml:"url"`
	// ServerCA is the path of the PEM certificates of the CAs that may issue the
	// server's own certificate; without it, those of the system.
	ServerCA string `yaml:"server_ca"`
	// Namespace is the namespace of the mount and of the login, if there is one.
	Namespace string `yaml:"namespace"`
	// Mount is the path of the PKI secrets engine.
	Mount string `yaml:"mount" default:"pki"`
	// Issuer is the name or ID of an issuer in the mount; without it, the mount's
	// default issuer signs.
	Issuer string `yaml:"issuer"`
	// Role is the name of the role in the mount that signs X.509-SVIDs, if the upstream
	// CA signs each.
	Role string `yaml:"role"`
	// Roots is the path of the PEM certificates of the roots above the issuer, if the
	// mount does not have them.
	Roots string `yaml:"roots"`
	// TokenFile is the path of a file with a token, mode 0600. It is read again when the
	// token ends or is refused.
	TokenFile string `yaml:"token_file"`
	// AppRole logs in with a role ID and a secret ID.
	AppRole AppRole `yaml:"approle"`
	// Kubernetes logs in with the token of this pod's service account.
	Kubernetes Kubernetes `yaml:"kubernetes"`
	// Certificate logs in with a TLS client certificate.
	Certificate Certificate `yaml:"certificate"`
}

// AppRole are the settings of the auth method approle.
type AppRole struct {
	// Mount is the path of the auth method.
	Mount string `yaml:"mount" default:"approle"`
	// RoleID is the role's ID.
	RoleID string `yaml:"role_id"`
	// SecretIDFile is the path of a file with the secret ID, mode 0600.
	SecretIDFile string `yaml:"secret_id_file"`
	// Wrapped says that the file has a response-wrapping token in place of the secret
	// ID. It is unwrapped once; the secret ID is then in memory only.
	Wrapped bool `yaml:"wrapped"`
}

// Kubernetes are the settings of the auth method kubernetes.
type Kubernetes struct {
	// Mount is the path of the auth method.
	Mount string `yaml:"mount" default:"kubernetes"`
	// Role is the role's name.
	Role string `yaml:"role"`
	// TokenFile is the path of a projected service account token.
	TokenFile string `yaml:"token_file" default:"/var/run/secrets/kubernetes.io/serviceaccount/token"`
}

// Certificate are the settings of the auth method cert.
type Certificate struct {
	// Mount is the path of the auth method.
	Mount string `yaml:"mount" default:"cert"`
	// Role is the name of the certificate role; without it, the server looks for one.
	Role string `yaml:"role"`
	// Certificate is the path of the PEM client certificate, with those above it.
	Certificate string `yaml:"certificate"`
	// Key is the path of its PEM private key, mode 0600.
	Key string `yaml:"key"`
}

// CA is a PKI mount. It may be called concurrently.
type CA struct {
	config  Config
	base    *url.URL
	method  method
	session session
	kept    upstream.Connections
}

// segments is the form of the path of a mount or namespace.
var segments = regexp.MustCompile(`^[A-Za-z0-9_~-][A-Za-z0-9_.~-]*(/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)*$`)

// New checks the settings and reads each file once.
func New(c Config) (*CA, error) {
	base, ok := upstream.ParseAddress(c.URL, false)
	if !ok {
		return nil, fmt.Errorf("url: %.100q is not the address of a Vault; write https://host:port", c.URL)
	}
	for _, p := range []struct {
		name      string
		value     *string
		otherwise string
	}{
		{"mount", &c.Mount, "pki"},
		{"namespace", &c.Namespace, ""},
		{"issuer", &c.Issuer, ""},
		{"role", &c.Role, ""},
		{"approle.mount", &c.AppRole.Mount, "approle"},
		{"kubernetes.mount", &c.Kubernetes.Mount, "kubernetes"},
		{"certificate.mount", &c.Certificate.Mount, "cert"},
	} {
		if *p.value == "" {
			*p.value = p.otherwise
			continue
		}
		*p.value = strings.Trim(*p.value, "/")
		if !segments.MatchString(*p.value) {
			return nil, fmt.Errorf("%s: %.100q is not a path there; write it as `vault secrets list` or `vault auth list` shows it, such as %q", p.name, *p.value, "team/pki")
		}
	}
	if strings.Contains(c.Issuer, "/") {
		return nil, fmt.Errorf("issuer: %.100q is not the name or ID of an issuer; write it as `vault list %s/issuers` shows it", c.Issuer, c.Mount)
	}
	if strings.Contains(c.Role, "/") {
		return nil, fmt.Errorf("role: %.100q is not the name of a role; write it as `vault list %s/roles` shows it", c.Role, c.Mount)
	}
	method, err := newMethod(c)
	if err != nil {
		return nil, err
	}
	v := &CA{config: c, base: base, session: newSession(), method: method}
	if _, err := v.extraRoots(); err != nil {
		return nil, err
	}
	if _, err := v.connect(); err != nil {
		return nil, err
	}
	return v, nil
}

// Capabilities returns the unit of lives: limits are those of the mount, which does
// not say them to everybody.
func (*CA) Capabilities() upstream.Capabilities {
	return upstream.Capabilities{TTLGranularity: time.Second}
}

// CheckUse implements upstream.UseChecker.
func (v *CA) CheckUse(u upstream.Use) error {
	if u.Leaves && v.config.Role == "" {
		return errNoRole
	}
	return nil
}

var errNoRole = errors.New("role: is not set, and leaves is: write the name of the role in the mount that signs X.509-SVIDs")

// connection is to the server, with what the files hold now: over connections that are
// kept, or over one of its own.
type connection struct {
	client *http.Client
	alone  func() (c *connection, done func(), err error)
}

func (v *CA) connect() (*connection, error) {
	var pair *tls.Certificate
	if v.config.Certificate.Certificate != "" {
		read, err := upstream.ReadPair(v.config.Certificate.Certificate, v.config.Certificate.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		pair = &read
	}
	client, err := v.kept.Client(v.config.ServerCA, pair)
	if err != nil {
		return nil, err
	}
	return &connection{client: client, alone: func() (*connection, func(), error) {
		client, done, err := upstream.Client(v.config.ServerCA, pair)
		return &connection{client: client}, done, err
	}}, nil
}

// call is one call of the API below /v1; what is in secrets is taken out of what
// errors say.
func (v *CA) call(ctx context.Context, c *connection, method, path, token string, in, out any, secrets ...string) error {
	header := http.Header{"X-Vault-Request": {"true"}}
	if v.config.Namespace != "" {
		header.Set("X-Vault-Namespace", v.config.Namespace)
	}
	if token != "" {
		header.Set("X-Vault-Token", token)
		secrets = append(secrets, token)
	}
	rest := &upstream.REST{Client: c.client, Name: "vault", Said: func(body []byte) string { return said(body, secrets) }}
	err := rest.Call(ctx, method, v.base.JoinPath("v1", path).String(), header, in, out)
	status, ok := errors.AsType[*upstream.StatusError](err)
	if !ok {
		return err
	}
	switch status.Code {
	case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return fmt.Errorf("%w: %w (it is a standby that forwards nothing: configure the address of the active server, or of the load balancer)", upstream.ErrUnavailable, status)
	case http.StatusPreconditionFailed, 472, 473: // behind the active server, or a standby
		return fmt.Errorf("%w: %w", upstream.ErrUnavailable, status)
	}
	return err
}

// said reads the messages of an error. Some quote what was sent.
func said(body []byte, secrets []string) string {
	var e struct {
		Errors []string `json:"errors"`
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	text := strings.Join(strings.Fields(strings.Join(e.Errors, "; ")), " ")
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, "…")
		}
	}
	return text
}

// issuer is the path of the issuer that signs, below the mount.
func (v *CA) issuer() string {
	if v.config.Issuer == "" {
		return "root"
	}
	return "issuer/" + v.config.Issuer
}

// Mint has an intermediate signed.
func (v *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	return v.sign(ctx, v.config.Mount+"/"+v.issuer()+"/sign-intermediate", r, map[string]any{
		// Subject and names are those of the CSR; the common name is no DNS name.
		"use_csr_values": true, "exclude_cn_from_sans": true, "max_path_length": 0,
	})
}

// SignLeaf has an X.509-SVID signed by the role, which takes the names from the CSR.
func (v *CA) SignLeaf(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	if v.config.Role == "" {
		return nil, fmt.Errorf("%w: %w", upstream.ErrDenied, errNoRole)
	}
	path := v.config.Mount + "/sign/" + v.config.Role
	if v.config.Issuer != "" {
		path = v.config.Mount + "/" + v.issuer() + "/sign/" + v.config.Role
	}
	return v.sign(ctx, path, r, map[string]any{})
}

func (v *CA) sign(ctx context.Context, path string, r *upstream.Request, parameters map[string]any) (*upstream.Minted, error) {
	extra, err := v.extraRoots()
	if err != nil {
		return nil, err
	}
	conn, err := v.connect()
	if err != nil {
		return nil, err
	}
	parameters["csr"] = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}))
	parameters["format"] = "pem"
	parameters["ttl"] = strconv.FormatInt(int64(r.TTL/time.Second), 10) + "s"
	var signed struct {
		Data struct {
			Certificate string   `json:"certificate"`
			IssuingCA   string   `json:"issuing_ca"`
			CAChain     []string `json:"ca_chain"`
		} `json:"data"`
	}
	err = v.withToken(ctx, conn, func(token string) error {
		err := v.call(ctx, conn, http.MethodPost, path, token, parameters, &signed)
		if upstream.Stale(err) { // a second certificate for the same key and names harms nobody
			err = v.call(ctx, conn, http.MethodPost, path, token, parameters, &signed)
		}
		return advise(err, path)
	})
	if err != nil {
		return nil, err
	}
	all, err := upstream.ParseChain(maxCertificates, append([]string{signed.Data.Certificate, signed.Data.IssuingCA}, signed.Data.CAChain...)...)
	if err != nil {
		return nil, fmt.Errorf("the answer of vault: %w", err)
	}
	if signed.Data.Certificate == "" || len(all) == 0 {
		return nil, fmt.Errorf("the answer of vault to %s has no certificate", path)
	}
	return upstream.Arrange(all[0], append(all[1:], extra...)), nil
}

// advise adds what to do about a refusal of the path.
func advise(err error, path string) error {
	status, ok := errors.AsType[*upstream.StatusError](err)
	if !ok {
		return err
	}
	switch status.Code {
	case http.StatusForbidden:
		return fmt.Errorf("%w: give the token a policy with the capability update on %q", err, path)
	case http.StatusNotFound:
		return fmt.Errorf("%w: compare mount, issuer and namespace with `vault secrets list` there", err)
	}
	return err
}

// extraRoots reads the configured roots.
func (v *CA) extraRoots() ([]*x509.Certificate, error) {
	if v.config.Roots == "" {
		return nil, nil
	}
	roots, err := upstream.ReadCertificates(v.config.Roots)
	if err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	return roots, nil
}

// roots reads those above the issuer that signs now.
func (v *CA) roots(ctx context.Context, conn *connection) ([]*x509.Certificate, error) {
	extra, err := v.extraRoots()
	if err != nil {
		return nil, err
	}
	// The chain of one issuer is a list, that of the default issuer a text.
	var texts []string
	var path string
	if v.config.Issuer == "" {
		path = v.config.Mount + "/cert/ca_chain"
		var answer struct {
			Data struct {
				CAChain     string `json:"ca_chain"`
				Certificate string `json:"certificate"`
			} `json:"data"`
		}
		err = v.call(ctx, conn, http.MethodGet, path, "", nil, &answer)
		texts = []string{answer.Data.Certificate, answer.Data.CAChain}
	} else {
		path = v.config.Mount + "/issuer/" + v.config.Issuer + "/json"
		var answer struct {
			Data struct {
				CAChain     []string `json:"ca_chain"`
				Certificate string   `json:"certificate"`
			} `json:"data"`
		}
		err = v.call(ctx, conn, http.MethodGet, path, "", nil, &answer)
		texts = append([]string{answer.Data.Certificate}, answer.Data.CAChain...)
	}
	if err != nil {
		return nil, advise(err, path)
	}
	chain, err := upstream.ParseChain(2*maxCertificates, texts...)
	if err != nil {
		return nil, fmt.Errorf("the chain from vault: %w", err)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("vault has no CA certificate at %s: make or import one there", path)
	}
	found := upstream.Arrange(chain[0], append(chain, extra...)).Roots
	if chain[0].CheckSignatureFrom(chain[0]) == nil {
		found = append(found, chain[0])
	}
	var roots []*x509.Certificate
	for _, r := range found {
		if !slices.ContainsFunc(roots, r.Equal) {
			roots = append(roots, r)
		}
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("the chain at %s has no root: import the root there, or set roots to its PEM file", path)
	}
	return roots, nil
}

// WatchRoots implements upstream.RootWatcher, and keeps the token alive.
func (v *CA) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	return upstream.LookForRoots(ctx, v.look, changed)
}

// look reads the roots, and renews the token if it is time; next is when to look
// again.
func (v *CA) look(ctx context.Context) (roots []*x509.Certificate, next time.Duration, err error) {
	conn, err := v.connect()
	if err != nil {
		return nil, 0, err
	}
	short, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if roots, err = v.roots(short, conn); err != nil {
		return nil, 0, err
	}
	next, err = v.keepAlive(short, conn)
	return roots, min(next, lookEvery), err
}
