package upstream_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// Every wrong answer comes out as an error, whoever made it.
func TestFault_F25_WrongAnswersAreRefused(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(_ *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			return upstreamtest.NewMemory(a, b)
		},
	})
}

func request(t *testing.T, c upstream.Capabilities, ttl time.Duration) *upstream.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := upstream.NewRequest(upstreamtest.TrustDomain, key, pkix.Name{CommonName: "test"}, ttl, c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestNewRequest(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		limits     upstream.Capabilities
		ttl, wants time.Duration
	}{
		{upstream.Capabilities{}, time.Hour, time.Hour},
		{upstream.Capabilities{MinTTL: 2 * time.Hour}, time.Hour, 2 * time.Hour},
		{upstream.Capabilities{MaxTTL: time.Hour}, day, time.Hour},
		{upstream.Capabilities{TTLGranularity: day}, 25 * time.Hour, 2 * day},
		{upstream.Capabilities{TTLGranularity: day}, 2 * day, 2 * day},
		{upstream.Capabilities{TTLGranularity: day, MaxTTL: 30 * time.Hour}, 40 * time.Hour, day},
	} {
		if got := request(t, c.limits, c.ttl).TTL; got != c.wants {
			t.Errorf("%s of %+v is %s, want %s", c.ttl, c.limits, got, c.wants)
		}
	}
	r := request(t, upstream.Capabilities{}, time.Hour).Request
	if len(r.URIs) != 1 || r.URIs[0].String() != "spiffe://example.org" {
		t.Errorf("URI names %v", r.URIs)
	}
	if n := len(request(t, upstream.Capabilities{NoURI: true}, time.Hour).Request.URIs); n != 0 {
		t.Errorf("%d URI names for a CA that refuses them", n)
	}
}

// A key that the CA does not certify is not shown to it.
func TestNewRequestKeyTypes(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	limits := upstream.Capabilities{KeyTypes: []x509.PublicKeyAlgorithm{x509.RSA, x509.ECDSA}}
	_, err = upstream.NewRequest(upstreamtest.TrustDomain, key, pkix.Name{CommonName: "test"}, time.Hour, limits)
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "[RSA ECDSA], not Ed25519") {
		t.Errorf("%v", err)
	}
	request(t, limits, time.Hour)
}

// What asks for nothing special of crypto/x509 is understood by it.
func TestRequestedExtensions(t *testing.T) {
	r := request(t, upstream.Capabilities{}, time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	self := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotAfter: time.Now(), ExtraExtensions: r.Request.Extensions}
	der, err := x509.CreateCertificate(rand.Reader, self, self, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if !c.IsCA || c.MaxPathLen != 0 || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("CA %v, path length %d, key usage %b", c.IsCA, c.MaxPathLen, c.KeyUsage)
	}
}

// A CA that lets an intermediate live for years does not make ours live so long.
func TestVerifyBoundsLife(t *testing.T) {
	r := request(t, upstream.Capabilities{}, time.Hour)
	now := time.Now()
	chain, roots := upstreamtest.NewAuthority(t, upstreamtest.LongLife).Answer(r.CSR, r.TTL)
	v, err := r.Verify(now, &upstream.Minted{Chain: chain, Roots: roots})
	if err != nil {
		t.Fatal(err)
	}
	if got := v.NotAfter.Sub(now); got > 2*time.Hour {
		t.Errorf("it is used for %s", got)
	}
}

// A name that the CA drops is missed, unless it is known to.
func TestVerifyName(t *testing.T) {
	unnamed := request(t, upstream.Capabilities{NoURI: true}, time.Hour)
	chain, roots := upstreamtest.NewAuthority(t, upstreamtest.Good).Answer(unnamed.CSR, unnamed.TTL)
	if _, err := unnamed.Verify(time.Now(), &upstream.Minted{Chain: chain, Roots: roots}); err != nil {
		t.Error(err)
	}
}

func TestCheckRoot(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip("this build makes no weak keys: ", err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "weak"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, weak.Public(), weak)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := upstream.CheckRoot(upstreamtest.TrustDomain, root); err == nil || !strings.Contains(err.Error(), "1024 bits") {
		t.Errorf("a weak key: %v", err)
	}
}

// Certificates come in any order, repeated, and with a cross-signed issuer that leads
// to another root.
func TestArrange(t *testing.T) {
	a, old := upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.NewAuthority(t, upstreamtest.Good)
	chain, _ := upstreamtest.NewAuthority(t, upstreamtest.Good).Answer(request(t, upstream.Capabilities{}, time.Hour).CSR, time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, a.Root, old.Root, a.RootKey.Public(), old.RootKey)
	if err != nil {
		t.Fatal(err)
	}
	cross, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	r := request(t, upstream.Capabilities{}, time.Hour)
	signed, _ := a.Answer(r.CSR, time.Hour)
	for _, c := range []struct {
		name         string
		others       []*x509.Certificate
		chain, roots int
	}{
		{"in order", []*x509.Certificate{a.Issuer, a.Root}, 2, 1},
		{"turned around, repeated", []*x509.Certificate{a.Root, a.Issuer, signed[0]}, 2, 1},
		{"cross-signed beside its root", []*x509.Certificate{cross, a.Root, old.Root, a.Issuer}, 2, 2},
		{"cross-signed without its root", []*x509.Certificate{old.Root, cross, a.Issuer}, 3, 1},
		{"with a stranger", []*x509.Certificate{chain[1], a.Root, a.Issuer}, 2, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := upstream.Arrange(signed[0], c.others)
			if len(m.Chain) != c.chain || len(m.Roots) != c.roots {
				t.Errorf("%d in the chain and %d roots, want %d and %d", len(m.Chain), len(m.Roots), c.chain, c.roots)
			}
			if v, err := r.Verify(time.Now(), m); err != nil || len(v.Chain) != c.chain {
				t.Errorf("it does not verify: %v", err)
			}
		})
	}
	if m := upstream.Arrange(signed[0], nil); len(m.Chain) != 1 || len(m.Roots) != 0 {
		t.Errorf("alone: %d, %d", len(m.Chain), len(m.Roots))
	}
}
