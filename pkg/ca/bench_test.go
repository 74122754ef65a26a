package ca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/keys"
)

// baseline is the bare work with the standard library: parse and check the
// request, create the certificate. No rule, no linter, no record.
func baseline(b *testing.B, request []byte, issuer *authority) {
	parsed, err := x509.ParseCertificateRequest(request)
	if err != nil {
		b.Fatal(err)
	}
	if err := parsed.CheckSignature(); err != nil {
		b.Fatal(err)
	}
	var serial [16]byte
	newSerial(&serial)
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]),
		NotBefore:    now.Add(-5 * time.Minute), NotAfter: now.Add(time.Hour),
		URIs:     []*url.URL{id("/ns/shop/app/web").URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if _, err := x509.CreateCertificate(rand.Reader, template, issuer.cert, parsed.PublicKey, issuer.key); err != nil {
		b.Fatal(err)
	}
}

func issueOnce(b *testing.B, f *fixture, request []byte) {
	key, err := ParseCSR(request)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := f.Sign(time.Now(), &Request{ID: id("/ns/shop/app/web"), Key: key}); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkStdlibBaseline(b *testing.B) {
	f, request := open(b, Config{}), csr(b, newKey(b))
	issuer := f.state.Load().active
	b.ReportAllocs()
	for b.Loop() {
		baseline(b, request, issuer)
	}
}

func BenchmarkIssue(b *testing.B) {
	f, request := open(b, Config{}), csr(b, newKey(b))
	b.ReportAllocs()
	for b.Loop() {
		issueOnce(b, f, request)
	}
}

// BenchmarkIssueByKind is what an X.509-SVID costs under an intermediate of each kind.
func BenchmarkIssueByKind(b *testing.B) {
	for _, kind := range []keys.Kind{keys.P256, keys.P384, keys.Ed25519, keys.RSA3072, keys.RSA4096} {
		b.Run(string(kind), func(b *testing.B) {
			f, request := open(b, Config{IntermediateKey: kind}), csr(b, newKey(b))
			for b.Loop() {
				issueOnce(b, f, request)
			}
		})
	}
}

func BenchmarkIssueParallel(b *testing.B) {
	f, request := open(b, Config{}), csr(b, newKey(b))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			issueOnce(b, f, request)
		}
	})
}

// BenchmarkIssueRatio takes turns between the two, so that what else the machine
// does falls on both, and reports how many times the baseline an issuance takes.
func BenchmarkIssueRatio(b *testing.B) {
	f, request := open(b, Config{}), csr(b, newKey(b))
	issuer := f.state.Load().active
	var ours, theirs time.Duration
	for b.Loop() {
		start := time.Now()
		baseline(b, request, issuer)
		middle := time.Now()
		issueOnce(b, f, request)
		theirs += middle.Sub(start)
		ours += time.Since(middle)
	}
	b.ReportMetric(float64(ours)/float64(theirs), "x-stdlib")
}

// What each part of an issuance costs.
func BenchmarkParts(b *testing.B) {
	f, request := open(b, Config{}), csr(b, newKey(b))
	a, now := f.state.Load().active, time.Now()
	key := parseKey(b, newKey(b))
	l := leaf{notBefore: floor(now), notAfter: floor(now.Add(time.Hour)), id: "spiffe://example.org/ns/shop/app/web", key: key}
	newSerial(&l.serial)
	certificate := signLeaf(b, a, &l)
	cert := parse(b, certificate)
	digest := sha256.Sum256(cert.RawTBSCertificate)
	want := intent{
		issuer: a.cert.RawSubject, issuerKeyID: a.cert.SubjectKeyId, issuerKey: a.cert.PublicKey, issuerNotBefore: a.notBefore, issuerEnd: a.notAfter,
		trustDomain: "example.org", serial: l.serial[:], spki: key.spki, id: l.id,
		notBefore: l.notBefore, notAfter: l.notAfter, signed: now, maxLife: time.Hour,
	}
	fail := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	for name, part := range map[string]func() error{
		"parse and check the request": func() error { _, err := ParseCSR(request); return err },
		"encode":                      func() error { _, err := a.template.appendTBS(&l); return err },
		"sign":                        func() error { _, err := a.scheme.sign(a.key, cert.RawTBSCertificate); return err },
		"lint":                        func() error { _, err := want.lint(certificate); return err },
		"check the signature":         func() error { return a.scheme.verify(cert.RawTBSCertificate, cert.Signature) },
		"claim the key":               func() error { f.live.claim(&key.hash, 1, 1, 2); return nil },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				fail(part())
			}
		})
	}
	b.Run("check the signature with crypto.ecdsa", func(b *testing.B) {
		for b.Loop() {
			if !ecdsa.VerifyASN1(a.cert.PublicKey.(*ecdsa.PublicKey), digest[:], cert.Signature) {
				b.Fatal("does not verify")
			}
		}
	})
}
