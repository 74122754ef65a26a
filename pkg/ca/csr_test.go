package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Row B13: hostile bytes give an error, never a panic. Row B2: whatever is in a
// request that is granted, the certificate is that of a bare request.
func FuzzParseCSR(f *testing.F) {
	for _, key := range allowedKeys(f) {
		f.Add(csr(f, key))
		f.Add(csrOf(f, key, &x509.CertificateRequest{DNSNames: []string{"a.b"}}))
	}
	f.Add([]byte{})
	f.Add([]byte{0x30, 0x80})
	f.Add(bytes.Repeat([]byte{0x30, 0x82, 0x10, 0x00}, 1000))
	now := time.Now()
	a := testAuthority(f, now)
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := ParseCSR(der)
		if err != nil {
			wantReason(t, err, ReasonCSR)
			return
		}
		// Strict is stricter than crypto/x509.
		request, err := x509.ParseCertificateRequest(der)
		if err != nil {
			// Attributes and names are skipped here and parsed there: what it
			// cannot read does not matter, as long as the key is the same.
			if !bytes.Contains(der, key.SPKI()) {
				t.Fatal("a key that is not in the request")
			}
		} else {
			if err := request.CheckSignature(); err != nil {
				t.Fatalf("crypto/x509 says: %v", err)
			}
			if !bytes.Equal(request.RawSubjectPublicKeyInfo, key.SPKI()) {
				t.Fatal("another key")
			}
		}
		bare, err := publicKeyOf(key.SPKI(), key.Algorithm())
		if err != nil {
			t.Fatal(err)
		}
		l := leaf{notBefore: floor(now), notAfter: floor(now.Add(time.Hour)), id: "spiffe://example.org/a", key: key}
		one, err := a.template.appendTBS(&l)
		if err != nil {
			t.Fatal(err)
		}
		l.key = bare
		two, err := a.template.appendTBS(&l)
		if err != nil || !bytes.Equal(one, two) {
			t.Fatal("the request reached the certificate")
		}
	})
}

func TestV_B13_MalformedRequests(t *testing.T) {
	good := csr(t, newKey(t))
	if _, err := ParseCSR(good); err != nil {
		t.Fatal(err)
	}
	for n := range good {
		if _, err := ParseCSR(good[:n]); err == nil {
			t.Fatalf("cut to %d bytes and accepted", n)
		}
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})
	for name, bad := range map[string][]byte{
		"pem":       text,
		"trailing":  append(bytes.Clone(good), 0),
		"too large": make([]byte, maxCSR+1),
		"nothing":   nil,
	} {
		_, err := ParseCSR(bad)
		if err == nil {
			t.Errorf("%s accepted", name)
			continue
		}
		wantReason(t, err, ReasonCSR)
	}
	for i := range len(good) * 8 {
		flipped := bytes.Clone(good)
		flipped[i/8] ^= 1 << (i % 8)
		if _, err := ParseCSR(flipped); err == nil {
			t.Errorf("bit %d flipped and accepted", i)
		}
	}
}

// Signature algorithms that fit a P-256 key, and those that do not.
func TestParseCSRSignatureAlgorithms(t *testing.T) {
	key := newKey(t)
	for _, algorithm := range []x509.SignatureAlgorithm{x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512} {
		der := csrOf(t, key, &x509.CertificateRequest{SignatureAlgorithm: algorithm})
		if _, err := ParseCSR(der); err != nil {
			t.Errorf("%s: %v", algorithm, err)
		}
	}
	for _, algorithm := range []x509.SignatureAlgorithm{x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA512WithRSAPSS} {
		der := csrOf(t, rsaKey(), &x509.CertificateRequest{SignatureAlgorithm: algorithm})
		if _, err := ParseCSR(der); err != nil {
			t.Errorf("%s: %v", algorithm, err)
		}
	}
	good := csr(t, key)
	for name, oid := range map[string][]byte{
		"ecdsa with sha-1":   {0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01},
		"ecdsa with sha-224": {0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x01},
		"rsa":                {0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b},
	} {
		var parts struct{ Info, Algorithm, Signature asn1.RawValue }
		if _, err := asn1.Unmarshal(good, &parts); err != nil {
			t.Fatal(err)
		}
		parts.Algorithm = asn1.RawValue{FullBytes: appendValue(nil, tagSequence, oid)}
		der, err := asn1.Marshal(parts)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseCSR(der); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
}

// The key outlives the buffer that the request came in.
func TestPublicKeyDoesNotReferToTheRequest(t *testing.T) {
	for name, key := range allowedKeys(t) {
		der := csr(t, key)
		pub, err := ParseCSR(der)
		if err != nil {
			t.Fatal(err)
		}
		want, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		clear(der)
		if !bytes.Equal(pub.SPKI(), want) {
			t.Errorf("%s: changed with the request", name)
		}
	}
}

// Row K4: what the authority is given holds no private key, and its own is
// nowhere outside of the key store.
func TestV_K4_NoPrivateKeyLeaves(t *testing.T) {
	key := newKey(t)
	secret, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	f := open(t, Config{})
	leaf, intermediate, _ := f.issue(t, time.Now(), &Request{Key: parseKey(t, key)})
	own, err := f.state.Load().active.key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	seen := [][]byte{csr(t, key), leaf.Raw, intermediate.Raw}
	segments, err := filepath.Glob(filepath.Join(f.dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range segments {
		if info, err := os.Stat(name); err != nil || !info.Mode().IsRegular() {
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, content)
	}
	for _, content := range seen {
		if bytes.Contains(content, secret) || bytes.Contains(content, own) {
			t.Fatal("a private key")
		}
	}
}
