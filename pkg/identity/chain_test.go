package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"testing"
	"time"
)

// signer is a CA of tests.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

var chainSerial int64

func signCertificate(t testing.TB, template *x509.Certificate, by *signer) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chainSerial++
	template.SerialNumber = big.NewInt(chainSerial)
	template.BasicConstraintsValid = true
	if by == nil {
		by = &signer{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{cert, key}
}

func newSigner(t testing.TB, name string, by *signer, change func(*x509.Certificate)) *signer {
	t.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: chainNow.Add(-2 * time.Hour), NotAfter: chainNow.Add(10 * time.Hour),
	}
	if change != nil {
		change(template)
	}
	return signCertificate(t, template, by)
}

func newLeaf(t testing.TB, by *signer, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		NotBefore: chainNow.Add(-time.Hour), NotAfter: chainNow.Add(time.Hour), DNSNames: []string{"a.test"},
	}
	if change != nil {
		change(template)
	}
	return signCertificate(t, template, by).cert
}

var chainNow = time.Now().Truncate(time.Second)

// What is remembered of the issuers of one leaf makes no difference to what is said
// about the next one, whatever it is.
func TestChains_MemoryMakesNoDifference(t *testing.T) {
	root, other := newSigner(t, "root", nil, nil), newSigner(t, "root", nil, nil)
	inter := newSigner(t, "inter", root, nil)
	impostor := newSigner(t, "inter", other, func(c *x509.Certificate) { c.SubjectKeyId = inter.cert.SubjectKeyId })
	below := newSigner(t, "below", inter, nil)
	critical := func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	}
	noPath := newSigner(t, "no path", root, func(c *x509.Certificate) { c.MaxPathLenZero = true })
	constrained := newSigner(t, "constrained", root, func(c *x509.Certificate) {
		c.PermittedDNSDomainsCritical, c.PermittedDNSDomains = true, []string{"a.test"}
	})
	policies := newSigner(t, "policies", root, func(c *x509.Certificate) {
		// RFC 5280 §4.2.1.11: requireExplicitPolicy 0
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 36}, Critical: true, Value: []byte{0x30, 3, 0x80, 1, 0}}}
	})
	serverOnly := newSigner(t, "server only", root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	short := newSigner(t, "short", root, func(c *x509.Certificate) { c.NotAfter = chainNow.Add(time.Minute) })
	leafOf := func(by *signer, change func(*x509.Certificate), more ...*signer) []*x509.Certificate {
		chain := []*x509.Certificate{newLeaf(t, by, change), by.cert}
		for _, m := range more {
			chain = append(chain, m.cert)
		}
		return chain
	}
	roots := []*x509.Certificate{root.cert}
	forged := newLeaf(t, impostor, nil)
	for _, tc := range []struct {
		name  string
		warm  []*x509.Certificate // verified before
		chain []*x509.Certificate
		roots []*x509.Certificate
		now   time.Time
		ok    bool
	}{
		{"good", leafOf(inter, nil), leafOf(inter, nil), roots, chainNow, true},
		{"good, three", leafOf(below, nil, inter), leafOf(below, nil, inter), roots, chainNow, true},
		{"several roots", leafOf(inter, nil), leafOf(inter, nil), []*x509.Certificate{other.cert, root.cert}, chainNow, true},
		{"signed by an impostor", leafOf(inter, nil), []*x509.Certificate{forged, inter.cert}, roots, chainNow, false},
		{"impostor's chain", leafOf(inter, nil), []*x509.Certificate{forged, impostor.cert}, roots, chainNow, false},
		{"root has gone", leafOf(inter, nil), leafOf(inter, nil), []*x509.Certificate{other.cert}, chainNow, false},
		{"no root", leafOf(inter, nil), leafOf(inter, nil), nil, chainNow, false},
		{"expired", leafOf(inter, nil), leafOf(inter, func(c *x509.Certificate) { c.NotAfter = chainNow.Add(-time.Second) }), roots, chainNow, false},
		{"not yet valid", leafOf(inter, nil), leafOf(inter, func(c *x509.Certificate) { c.NotBefore = chainNow.Add(time.Second) }), roots, chainNow, false},
		{"other usage", leafOf(inter, nil), leafOf(inter, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), roots, chainNow, false},
		{"critical extension", leafOf(inter, nil), leafOf(inter, critical), roots, chainNow, false},
		{"issuer expires meanwhile", leafOf(short, nil), leafOf(short, nil), roots, chainNow.Add(2 * time.Minute), false},
		{"intermediate as leaf", leafOf(inter, nil), []*x509.Certificate{inter.cert, inter.cert}, roots, chainNow, true},
		{"CA as leaf", leafOf(inter, nil), []*x509.Certificate{below.cert, inter.cert}, roots, chainNow, true},
		{"leaf as issuer", leafOf(inter, nil), slices.Insert(leafOf(inter, nil), 1, newLeaf(t, inter, nil)), roots, chainNow, true},
		{"path length", leafOf(noPath, nil), leafOf(newSigner(t, "too deep", noPath, nil), nil, noPath), roots, chainNow, false},
		{"name within constraints", leafOf(constrained, nil), leafOf(constrained, nil), roots, chainNow, true},
		{"name beyond constraints", leafOf(constrained, nil), leafOf(constrained, func(c *x509.Certificate) { c.DNSNames = []string{"b.test"} }), roots, chainNow, false},
		{"policy demanded", leafOf(policies, func(c *x509.Certificate) { c.PolicyIdentifiers = []asn1.ObjectIdentifier{{1, 2, 3}} }), leafOf(policies, nil), roots, chainNow, false},
		{"issuer for other usage", leafOf(inter, nil), leafOf(serverOnly, nil), roots, chainNow, false},
		{"reversed", leafOf(inter, nil), func() []*x509.Certificate { c := leafOf(inter, nil); slices.Reverse(c); return c }(), roots, chainNow, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var warm, cold Chains
			if _, err := warm.Verify(chainNow, tc.warm, roots, x509.ExtKeyUsageClientAuth); err != nil && tc.name != "policy demanded" {
				t.Fatalf("warm up: %v", err)
			}
			for n, c := range []*Chains{&cold, &warm, &warm} {
				proof, err := c.Verify(tc.now, tc.chain, tc.roots, x509.ExtKeyUsageClientAuth)
				want, wantErr := verify(tc.now, tc.chain, tc.roots, x509.ExtKeyUsageClientAuth)
				if (err == nil) != tc.ok || (err == nil) != (wantErr == nil) {
					t.Errorf("run %d: err = %v, crypto/x509 says %v, want ok = %v", n, err, wantErr, tc.ok)
				}
				whole := slices.ContainsFunc(want, func(p []*x509.Certificate) bool {
					return len(p) == len(tc.chain)+1 && slices.EqualFunc(p[:len(tc.chain)], tc.chain, (*x509.Certificate).Equal)
				})
				if (proof != nil) != whole || proof.OfChain(NewCertificates(tc.chain...)) != whole {
					t.Errorf("run %d: proof %v, want one: %v", n, proof, whole)
				}
			}
		})
	}
}

// The issuers are verified once.
func TestChains_RemembersIssuers(t *testing.T) {
	root := newSigner(t, "root", nil, nil)
	inter := newSigner(t, "inter", root, nil)
	var c Chains
	for n := range maxIssuers + 10 {
		by := inter
		if n > 0 {
			by = newSigner(t, "inter", root, nil)
		}
		if _, err := c.Verify(chainNow, []*x509.Certificate{newLeaf(t, by, nil), by.cert}, []*x509.Certificate{root.cert}, x509.ExtKeyUsageClientAuth); err != nil {
			t.Fatal(err)
		}
		if len(c.known) == 0 || len(c.known) > maxIssuers {
			t.Fatalf("after %d chains, %d issuers are known", n+1, len(c.known))
		}
	}
}

func TestProof(t *testing.T) {
	root, other := newSigner(t, "root", nil, nil), newSigner(t, "root", nil, nil)
	inter := newSigner(t, "inter", root, nil)
	chain := []*x509.Certificate{newLeaf(t, inter, nil), inter.cert}
	var c Chains
	p, err := c.Verify(chainNow, chain, []*x509.Certificate{root.cert}, x509.ExtKeyUsageClientAuth)
	if err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string][]*x509.Certificate{
		"another leaf": {newLeaf(t, inter, nil), inter.cert}, "shorter": chain[:1], "longer": {chain[0], inter.cert, root.cert},
		"turned round": {inter.cert, chain[0]}, "empty": nil,
	} {
		if p.OfChain(NewCertificates(other...)) {
			t.Errorf("%s: proved", name)
		}
	}
	if !p.OfChain(NewCertificates(chain...)) || (&Proof{}).OfChain(nil) || (*Proof)(nil).OfChain(NewCertificates(chain...)) {
		t.Error("chain")
	}
	for _, tc := range []struct {
		name  string
		roots []*x509.Certificate
		now   time.Time
		want  bool
	}{
		{"the root", []*x509.Certificate{root.cert}, chainNow, true},
		{"among others", []*x509.Certificate{other.cert, root.cert}, chainNow, true},
		{"another root of the same name", []*x509.Certificate{other.cert}, chainNow, false},
		{"none", nil, chainNow, false},
		{"the intermediate", []*x509.Certificate{inter.cert}, chainNow, false},
		{"before", []*x509.Certificate{root.cert}, chainNow.Add(-61 * time.Minute), false},
		{"after", []*x509.Certificate{root.cert}, chainNow.Add(61 * time.Minute), false},
	} {
		if got := p.Anchored(tc.roots, tc.now); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
	if (&Proof{}).Anchored([]*x509.Certificate{root.cert}, chainNow) || (*Proof)(nil).Anchored([]*x509.Certificate{root.cert}, chainNow) {
		t.Error("nothing proves something")
	}
	for name, chain := range map[string][]*x509.Certificate{"empty": nil, "hole": {chain[0], nil}} {
		if _, err := c.Verify(chainNow, chain, []*x509.Certificate{root.cert}, x509.ExtKeyUsageClientAuth); err == nil {
			t.Errorf("%s: verified", name)
		}
	}
}

// BenchmarkChains: the next leaf below the same issuers, and what it was verified
// for before.
func BenchmarkChains(b *testing.B) {
	root := newSigner(b, "root", nil, nil)
	inter := newSigner(b, "inter", root, nil)
	chain, roots := []*x509.Certificate{newLeaf(b, inter, nil), inter.cert}, []*x509.Certificate{root.cert}
	var c Chains
	p, err := c.Verify(chainNow, chain, roots, x509.ExtKeyUsageClientAuth)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("verify", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.Verify(chainNow, chain, roots, x509.ExtKeyUsageClientAuth); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("standard library", func(b *testing.B) {
		for b.Loop() {
			if _, err := verify(chainNow, chain, roots, x509.ExtKeyUsageClientAuth); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("proof", func(b *testing.B) {
		kept := NewCertificates(chain...)
		for b.Loop() {
			if !p.OfChain(kept) || !p.Anchored(roots, chainNow) {
				b.Fatal("not proved")
			}
		}
	})
}
