package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestSpec_C01_RootFields(t *testing.T) {
	f := open(t, Config{})
	roots, _ := f.Bundle()
	root := roots[0]
	if !root.IsCA || root.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(root.ExtKeyUsage) != 0 {
		t.Errorf("ca %v, key usage %v, extended %v", root.IsCA, root.KeyUsage, root.ExtKeyUsage)
	}
	if !critical(root, 15) || !critical(root, 19) {
		t.Error("key usage and basic constraints must be critical")
	}
	if err := root.CheckSignatureFrom(root); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(root.SubjectKeyId, root.AuthorityKeyId) || len(root.SubjectKeyId) != 20 {
		t.Error("key identifiers")
	}
	if root.SerialNumber.BitLen() < 64 || root.SerialNumber.Sign() <= 0 {
		t.Error("serial")
	}
	if pub, ok := root.PublicKey.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		t.Error("not a p-256 key")
	}
}

func critical(cert *x509.Certificate, arc int) bool {
	for _, e := range cert.Extensions {
		if e.Id.Equal([]int{2, 5, 29, arc}) {
			return e.Critical
		}
	}
	return false
}

func TestSpec_C02_IntermediateFields(t *testing.T) {
	f := open(t, Config{})
	root, intermediate := f.Authorities()[0].Certificate, f.Authorities()[1].Certificate
	if !intermediate.IsCA || !intermediate.MaxPathLenZero || intermediate.MaxPathLen != 0 {
		t.Error("path length 0 wanted")
	}
	if err := checkIntermediate(intermediate, root, testDomain); err != nil {
		t.Error(err)
	}
	if len(intermediate.ExtKeyUsage)+len(intermediate.PermittedURIDomains) != 0 {
		t.Error("unasked restrictions")
	}
	if bytes.Equal(intermediate.RawSubject, root.RawSubject) {
		t.Error("one subject for two authorities")
	}
}

func TestSpec_C03_AuthorityIDWithoutPath(t *testing.T) {
	for _, a := range open(t, Config{}).Authorities() {
		if len(a.Certificate.URIs) != 1 || a.Certificate.URIs[0].String() != "spiffe://example.org" {
			t.Errorf("%s: %v", a.Role, a.Certificate.URIs)
		}
	}
}

// C06: an authority's certificate is no identity.
func TestSpec_C06_AuthorityCannotAuthenticate(t *testing.T) {
	f := open(t, Config{})
	for _, a := range f.Authorities() {
		if err := f.verify(time.Now(), a.Certificate); err == nil {
			t.Errorf("go-spiffe takes the %s for an identity", a.Role)
		}
	}
}

// B11 of failures.md: a leaf cannot sign.
func TestV_B11_LeafUsedAsAuthority(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	key := newKey(t)
	leaf, intermediate, _ := f.issue(t, now, &Request{Key: parseKey(t, key)})
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || len(leaf.UnknownExtKeyUsage) != 0 {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	forged, err := authorityTemplate(testDomain, pkix.Name{CommonName: "x"}, newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	forged.IsCA, forged.KeyUsage = false, x509.KeyUsageDigitalSignature
	forged.URIs[0] = id("/victim").URL()
	forged.NotBefore, forged.NotAfter = now.Add(-time.Minute), now.Add(time.Minute)
	victim, err := sign(forged, leaf, newKey(t).Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.verify(now, victim, leaf, intermediate); err == nil {
		t.Fatal("a leaf signed an identity")
	}
}

func TestV_B14_NameConstraints(t *testing.T) {
	f := open(t, Config{NameConstraints: true})
	now := time.Now()
	leaf, intermediate, _ := f.issue(t, now, &Request{})
	if !slices.Equal(intermediate.PermittedURIDomains, []string{"example.org"}) || !critical(intermediate, 30) {
		t.Errorf("constraints %v", intermediate.PermittedURIDomains)
	}
	if err := f.verify(now, leaf, intermediate); err != nil {
		t.Fatal(err)
	}
	// The name is checked in code too: the constraint alone permits subdomains.
	for _, other := range []string{"evil.example.org", "example.org.evil", "example.com"} {
		td := spiffeid.RequireTrustDomainFromString(other)
		_, err := f.Sign(now, &Request{ID: spiffeid.RequireFromPath(td, "/a"), Key: parseKey(t, newKey(t))})
		wantReason(t, err, ReasonID)
	}
	numeric := open(t, Config{NameConstraints: true, TrustDomain: spiffeid.RequireTrustDomainFromString("1.2.3.4")})
	if got := numeric.Authorities()[1].Certificate.PermittedURIDomains; len(got) != 0 {
		t.Errorf("a constraint no verifier can use: %v", got)
	}
}
