// Package ejbca is the upstream CA that is an EJBCA: one call of its REST API, as an
// administrator with a client certificate. It does not know what for an intermediate
// is used.
//
// A request for an intermediate:
//
//  1. the client certificate and its key are read
//  2. pkcs10enroll is called for a CA, two profiles and an end entity
//  3. what comes back, in PEM or DER, is put in order: the chain, and the root above it
package ejbca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	// restPath is where EJBCA has its REST API.
	restPath = "/ejbca/ejbca-rest-api"
	// maxName bounds each name: EJBCA's columns have 250 characters and more.
	maxName = 250
)

// Config says which EJBCA, as whom, and with which of its CAs and profiles.
type Config struct {
	// URL is where EJBCA listens for clients with certificates, such as
	// https://ejbca.internal:8443; with the path of its REST API, if that is not
	// /ejbca/ejbca-rest-api.
	URL string `yaml:"url"`
	// ServerCA is the path of the PEM certificates of the CAs that may issue the
	// server's own certificate; without it, those of the system.
	ServerCA string `yaml:"server_ca"`
	// Certificate is the path of the PEM client certificate of an administrator, with
	// those above it.
	Certificate string `yaml:"certificate"`
	// Key is the path of its PEM private key, mode 0600.
	Key string `yaml:"key"`
	// CAName is the name of the CA that signs.
	CAName string `yaml:"ca_name"`
	// CertificateProfile is the name of a certificate profile of the type Sub CA.
	CertificateProfile string `yaml:"certificate_profile"`
	// EndEntityProfile is the name of an end entity profile.
	EndEntityProfile string `yaml:"end_entity_profile"`
	// EndEntity is the name of the end entity that has the intermediates; EJBCA makes
	// it. Give each CA process one of its own.
	EndEntity string `yaml:"end_entity"`
	// AccountBindingID is given to EJBCA for external accounts, if it wants one.
	AccountBindingID string `yaml:"account_binding_id"`
	// Roots is the path of the PEM certificates of the roots above the CA, if EJBCA
	// does not have them.
	Roots string `yaml:"roots"`
}

// CA is an EJBCA. It may be called concurrently.
type CA struct {
	config Config
	enroll string // URL
}

// New checks the settings and reads each file once.
func New(c Config) (*CA, error) {
	base, ok := upstream.ParseAddress(c.URL, true)
	if !ok {
		return nil, fmt.Errorf("url: %.100q is not the address of an EJBCA; write https://host:port", c.URL)
	}
	if base.Path == "" {
		base.Path = restPath
	}
	for _, s := range []struct{ name, value, shown string }{
		{"ca_name", c.CAName, "the name of the CA that signs"},
		{"certificate_profile", c.CertificateProfile, "the name of a certificate profile of the type Sub CA"},
		{"end_entity_profile", c.EndEntityProfile, "the name of an end entity profile"},
		{"end_entity", c.EndEntity, "a name for this CA process, such as meshid-ca-1"},
		{"certificate", c.Certificate, "the path of an administrator's client certificate"},
		{"key", c.Key, "the path of its private key"},
	} {
		if s.value == "" {
			return nil, fmt.Errorf("set %s to %s", s.name, s.shown)
		}
		if len(s.value) > maxName {
			return nil, fmt.Errorf("%s: it has %d bytes, write at most %d", s.name, len(s.value), maxName)
		}
	}
	e := &CA{config: c, enroll: base.JoinPath("v1", "certificate", "pkcs10enroll").String()}
	if _, err := e.roots(); err != nil {
		return nil, err
	}
	_, done, err := e.client(time.Time{})
	if err != nil {
		return nil, err
	}
	done()
	return e, nil
}

// Capabilities returns none: limits are those of the profiles, which are not shown.
func (*CA) Capabilities() upstream.Capabilities { return upstream.Capabilities{} }

// client reads the files, and refuses a client certificate that ends before now.
func (e *CA) client(now time.Time) (client *http.Client, done func(), err error) {
	pair, err := upstream.ReadPair(e.config.Certificate, e.config.Key)
	if err != nil {
		return nil, nil, err
	}
	if pair.Leaf.NotAfter.Before(now) {
		return nil, nil, fmt.Errorf("%w: the client certificate in %s ended at %s: put its successor there", upstream.ErrDenied, e.config.Certificate, pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return upstream.Client(e.config.ServerCA, &pair)
}

// roots reads the configured roots.
func (e *CA) roots() ([]*x509.Certificate, error) {
	if e.config.Roots == "" {
		return nil, nil
	}
	roots, err := upstream.ReadCertificates(e.config.Roots)
	if err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	return roots, nil
}

// enrollment is the request of pkcs10enroll.
type enrollment struct {
	Request            string `json:"certificate_request"`
	CertificateProfile string `json:"certificate_profile_name"`
	EndEntityProfile   string `json:"end_entity_profile_name"`
	CAName             string `json:"certificate_authority_name"`
	EndEntity          string `json:"username"`
	Password           string `json:"password"`
	AccountBindingID   string `json:"account_binding_id,omitempty"`
	IncludeChain       bool   `json:"include_chain"`
}

// enrolled is its answer: a certificate, or what it waits for.
type enrolled struct {
	Certificate string   `json:"certificate"`
	Format      string   `json:"response_format"`
	Chain       []string `json:"certificate_chain"`

	StatusCode int    `json:"status_code"`
	Message    string `json:"info_message"`
}

// Mint has an intermediate signed.
func (e *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	extra, err := e.roots()
	if err != nil {
		return nil, err
	}
	client, done, err := e.client(time.Now())
	if err != nil {
		return nil, err
	}
	defer done()
	rest := &upstream.REST{Client: client, Name: "ejbca", Said: said}
	var answer enrolled
	if err := rest.Call(ctx, http.MethodPost, e.enroll, nil, enrollment{
		Request:            string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR})),
		CertificateProfile: e.config.CertificateProfile, EndEntityProfile: e.config.EndEntityProfile, CAName: e.config.CAName,
		EndEntity: e.config.EndEntity, AccountBindingID: e.config.AccountBindingID, IncludeChain: true,
		Password: rand.Text(), // enrolment is at once: nobody needs it again
	}, &answer); err != nil {
		return nil, advise(err)
	}
	if answer.Certificate == "" {
		if answer.StatusCode == http.StatusAccepted {
			return nil, fmt.Errorf("%w: ejbca has the request wait for an approval (%.200q), which this does not wait for: take approvals out of the profile and the CA", upstream.ErrDenied, answer.Message)
		}
		return nil, errors.New("the answer of ejbca has no certificate")
	}
	all, err := parse(append([]string{answer.Certificate}, answer.Chain...))
	if err != nil {
		return nil, fmt.Errorf("the answer of ejbca, in the format %.20q: %w", answer.Format, err)
	}
	return upstream.Arrange(all[0], append(all[1:], extra...)), nil
}

// said reads the message of an error.
func said(body []byte) string {
	var e struct {
		Message string `json:"error_message"`
	}
	if json.Unmarshal(body, &e) != nil {
		return ""
	}
	return e.Message
}

// advise adds what to do where the server does not say it.
func advise(err error) error {
	status, ok := errors.AsType[*upstream.StatusError](err)
	if !ok || status.Said != "" {
		return err
	}
	switch status.Code {
	case http.StatusForbidden, http.StatusNotFound:
		return fmt.Errorf("%w: enable REST Certificate Management in System Configuration, Protocol Configuration there, and compare url", err)
	}
	return err
}

// parse reads certificates, each in base64 of its DER or of PEM, or in PEM: versions
// differ.
func parse(texts []string) ([]*x509.Certificate, error) {
	const most = 2*upstream.MaxChain + upstream.MaxRoots
	if len(texts) > most {
		return nil, fmt.Errorf("more than %d certificates", most)
	}
	for i, text := range texts {
		if strings.Contains(text, "-----BEGIN") {
			continue
		}
		data, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, fmt.Errorf("certificate %d is neither PEM nor base64", i+1)
		}
		if !bytes.Contains(data, []byte("-----BEGIN")) {
			data = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: data})
		}
		texts[i] = string(data)
	}
	all, err := upstream.ParseChain(most, texts...)
	if err == nil && len(all) == 0 {
		err = errors.New("no certificate")
	}
	return all, err
}
