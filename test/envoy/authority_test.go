package envoy

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

var serials atomic.Int64

// authority is a CA of tests.
type authority struct {
	t    testing.TB
	td   spiffeid.TrustDomain
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	up   []*x509.Certificate // what a leaf's chain goes on with
}

func newAuthority(t testing.TB, td string) *authority {
	t.Helper()
	a := &authority{t: t, td: spiffeid.RequireTrustDomainFromString(td), key: newKey(t)}
	a.cert = a.sign(caTemplate(td), nil, a.key.Public())
	return a
}

func caTemplate(td string) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: td},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: td}},
	}
}

// intermediate returns a CA that a has signed.
func (a *authority) intermediate() *authority {
	a.t.Helper()
	i := &authority{t: a.t, td: a.td, key: newKey(a.t)}
	i.cert = a.sign(caTemplate(a.td.Name()), nil, i.key.Public())
	i.up = append([]*x509.Certificate{i.cert}, a.up...)
	return i
}

func (a *authority) sign(template *x509.Certificate, change func(*x509.Certificate), public crypto.PublicKey) *x509.Certificate {
	a.t.Helper()
	template.SerialNumber = big.NewInt(serials.Add(1))
	if change != nil {
		change(template)
	}
	parent := a.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

// svid issues an X.509-SVID.
func (a *authority) svid(path string, change ...func(*x509.Certificate)) *identity.SVID {
	a.t.Helper()
	return a.svidOf(newKey(a.t), path, change...)
}

func (a *authority) svidOf(key crypto.Signer, path string, change ...func(*x509.Certificate)) *identity.SVID {
	a.t.Helper()
	id, err := spiffeid.FromPath(a.td, path)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf := a.sign(&x509.Certificate{
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
	return &identity.SVID{ID: id, Chain: append([]*x509.Certificate{leaf}, a.up...), Key: key, Entry: "test"}
}

// bundle returns the bundle of a's trust domain with a's root and others.
func (a *authority) bundle(sequence uint64, others ...*authority) *identity.Bundle {
	b := &identity.Bundle{TrustDomain: a.td, Sequence: sequence, Roots: []*x509.Certificate{a.cert}}
	for _, o := range others {
		b.Roots = append(b.Roots, o.cert)
	}
	return b
}

func (a *authority) snapshot(sequence uint64, svids ...*identity.SVID) *identity.Snapshot {
	return &identity.Snapshot{SVIDs: svids, Bundle: a.bundle(sequence)}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
