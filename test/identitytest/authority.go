// Package identitytest makes what tests of the agent's two services need: X.509-SVIDs
// and bundles of an authority of their own, a source that publishes them, and the
// process that asks. It issues as the test says, right or wrong, and knows nothing
// about the CA, the agent or the services.
package identitytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// serials counts certificates, so that no two of a test have the same number.
var serials atomic.Int64

// Authority is a CA of a test: a root, or an intermediate below one. Its methods
// fail the test if they cannot do what they are asked.
type Authority struct {
	TrustDomain spiffeid.TrustDomain
	Cert        *x509.Certificate
	Key         *ecdsa.PrivateKey
	// Above is what the chain of a leaf goes on with: empty for a root.
	Above []*x509.Certificate

	t testing.TB
}

// NewAuthority returns a root of a trust domain, valid from an hour ago for a day.
func NewAuthority(t testing.TB, trustDomain string) *Authority {
	t.Helper()
	a := &Authority{TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), Key: NewKey(t), t: t}
	a.Cert = a.Sign(CATemplate(trustDomain), nil, a.Key.Public())
	return a
}

// CATemplate returns what the certificate of an authority says.
func CATemplate(trustDomain string) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: trustDomain},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
}

// Intermediate returns an authority that a has signed.
func (a *Authority) Intermediate() *Authority {
	a.t.Helper()
	i := &Authority{TrustDomain: a.TrustDomain, Key: NewKey(a.t), t: a.t}
	i.Cert = a.Sign(CATemplate(a.TrustDomain.Name()), nil, i.Key.Public())
	i.Above = append([]*x509.Certificate{i.Cert}, a.Above...)
	return i
}

// As returns an authority with the certificate and key of a that issues for another
// trust domain.
func (a *Authority) As(trustDomain spiffeid.TrustDomain) *Authority {
	return &Authority{TrustDomain: trustDomain, Cert: a.Cert, Key: a.Key, Above: a.Above, t: a.t}
}

// Sign signs a template with a serial number of its own, after change, which may
// be nil, has spoilt it.
func (a *Authority) Sign(template *x509.Certificate, change func(*x509.Certificate), public crypto.PublicKey) *x509.Certificate {
	a.t.Helper()
	template.SerialNumber = big.NewInt(serials.Add(1))
	if change != nil {
		change(template)
	}
	parent := a.Cert
	if parent == nil { // it is the root itself
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, a.Key)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

// SVID issues an X.509-SVID for an hour, with a key of its own.
func (a *Authority) SVID(path string, change ...func(*x509.Certificate)) *identity.SVID {
	a.t.Helper()
	return a.SVIDFor(NewKey(a.t), path, change...)
}

// SVIDFor issues an X.509-SVID for a key.
func (a *Authority) SVIDFor(key crypto.Signer, path string, change ...func(*x509.Certificate)) *identity.SVID {
	a.t.Helper()
	id, err := spiffeid.FromPath(a.TrustDomain, path)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf := a.Sign(&x509.Certificate{
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}, func(c *x509.Certificate) {
		for _, f := range change {
			f(c)
		}
	}, key.Public())
	return &identity.SVID{ID: id, Chain: identity.NewCertificates(append([]*x509.Certificate{leaf}, a.Above...)...), Key: key, Entry: "test"}
}

// X509 returns all that a certificate says, nil if it cannot be read.
func X509(c *identity.Certificate) *x509.Certificate {
	whole, err := c.X509()
	if err != nil {
		return nil
	}
	return whole
}

// Bundle returns the bundle of a's trust domain: a's certificate and those of
// others.
func (a *Authority) Bundle(sequence uint64, others ...*Authority) *identity.Bundle {
	b := &identity.Bundle{TrustDomain: a.TrustDomain, Sequence: sequence, Roots: []*x509.Certificate{a.Cert}}
	for _, o := range others {
		b.Roots = append(b.Roots, o.Cert)
	}
	return b
}

// Snapshot returns SVIDs with the bundle of a alone.
func (a *Authority) Snapshot(sequence uint64, svids ...*identity.SVID) *identity.Snapshot {
	return &identity.Snapshot{SVIDs: svids, Bundle: a.Bundle(sequence)}
}

// NewKey returns a new P-256 key.
func NewKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
