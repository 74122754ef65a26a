package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
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

// requestCase is a request that is granted (with nothing of it but the key in
// the certificate) or refused.
type requestCase struct {
	request x509.CertificateRequest
	granted bool
}

func checkRequests(t *testing.T, cases map[string]requestCase) {
	t.Helper()
	f := open(t, Config{})
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			now := time.Now()
			key := newKey(t)
			got, err := ParseCSR(csrOf(t, key, &tc.request))
			if !tc.granted {
				wantReason(t, err, ReasonCSR)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			leaf, intermediate, _ := f.issue(t, now, &Request{Key: got})
			checkProfile(t, leaf, intermediate, nil)
			bare, _, _ := f.issue(t, now, &Request{Key: parseKey(t, key)})
			sameButSerial(t, leaf, bare)
		})
	}
}

func uris(t testing.TB, texts ...string) (all []*url.URL) {
	t.Helper()
	for _, text := range texts {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, u)
	}
	return all
}

func asks(oid asn1.ObjectIdentifier, value ...byte) x509.CertificateRequest {
	return x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Critical: true, Value: value}}}
}

func TestV_B1_NamesInTheRequest(t *testing.T) {
	checkRequests(t, map[string]requestCase{
		"none":          {x509.CertificateRequest{}, true},
		"two uris":      {x509.CertificateRequest{URIs: uris(t, "spiffe://example.org/a", "spiffe://example.org/b")}, false},
		"one uri twice": {x509.CertificateRequest{URIs: uris(t, "spiffe://example.org/a", "spiffe://example.org/a")}, false},
		"another's uri": {x509.CertificateRequest{URIs: uris(t, "spiffe://example.org/admin")}, true},
		"of all types": {x509.CertificateRequest{
			URIs: uris(t, "spiffe://example.org/a"), DNSNames: []string{"x.org"},
			IPAddresses: []net.IP{{1, 2, 3, 4}}, EmailAddresses: []string{"a@x.org"},
		}, true},
		"other name": {asks(asn1.ObjectIdentifier{2, 5, 29, 17}, 0x30, 0x09, 0xa0, 0x07, 0x06, 0x01, 0x2a, 0xa0, 0x02, 0x0c, 0x00), true},
		"malformed":  {asks(asn1.ObjectIdentifier{2, 5, 29, 17}, 0x30, 0x05, 0x86), false},
	})
}

func TestV_B3_ClaimsInTheRequest(t *testing.T) {
	many := make([]string, 200)
	for i := range many {
		many[i] = strings.Repeat("a", 20) + string(rune('a'+i%26)) + ".example.org"
	}
	checkRequests(t, map[string]requestCase{
		"ca":                      {asks(asn1.ObjectIdentifier{2, 5, 29, 19}, 0x30, 0x03, 0x01, 0x01, 0xff), true},
		"keyCertSign and cRLSign": {asks(asn1.ObjectIdentifier{2, 5, 29, 15}, 0x03, 0x02, 0x01, 0x06), true},
		"name constraints":        {asks(asn1.ObjectIdentifier{2, 5, 29, 30}, 0x30, 0x00), true},
		"unknown critical":        {asks(asn1.ObjectIdentifier{1, 3, 9999}, 0x05, 0x00), true},
		"long common name":        {x509.CertificateRequest{Subject: pkix.Name{CommonName: strings.Repeat("x", 5000)}}, true},
		"200 names":               {x509.CertificateRequest{DNSNames: many}, true},
		"1,000 names":             {x509.CertificateRequest{DNSNames: slices.Concat(many, many, many, many, many)}, false},
	})
}

func TestSpec_B13_RequestForAnAuthority(t *testing.T) {
	checkRequests(t, map[string]requestCase{
		"ca":          {asks(asn1.ObjectIdentifier{2, 5, 29, 19}, 0x30, 0x06, 0x01, 0x01, 0xff, 0x02, 0x01, 0x05), true},
		"keyCertSign": {asks(asn1.ObjectIdentifier{2, 5, 29, 15}, 0x03, 0x02, 0x02, 0x04), true},
	})
}

func TestSpec_B14_SubjectAndNamesNotCopied(t *testing.T) {
	checkRequests(t, map[string]requestCase{
		"subject": {x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}}, true},
		"dns":     {x509.CertificateRequest{DNSNames: []string{"admin.example.org"}}, true},
	})
}

func TestSpec_B12_TwoURIsRefused(t *testing.T) {
	a, b := id("/a").URL(), id("/b").URL()
	_, err := ParseCSR(csrOf(t, newKey(t), &x509.CertificateRequest{URIs: []*url.URL{a, b}}))
	wantReason(t, err, ReasonCSR)
}

// sameButSerial: for one key and moment, two leaves differ in the serial only.
func sameButSerial(t testing.TB, a, b *x509.Certificate) {
	t.Helper()
	blank := func(c *x509.Certificate) []byte {
		return bytes.Replace(bytes.Clone(c.RawTBSCertificate), c.SerialNumber.Bytes(), make([]byte, 16), 1)
	}
	if diff := cmp.Diff(blank(a), blank(b)); diff != "" {
		t.Errorf("the request reached the certificate:\n%s", diff)
	}
}

// Row B6: possession of the key has to be proved.
func TestV_B6_ProofOfPossession(t *testing.T) {
	for name, key := range allowedKeys(t) {
		good := csr(t, key)
		bad := bytes.Clone(good)
		bad[len(bad)-2] ^= 0x01
		_, err := ParseCSR(bad)
		wantReason(t, err, ReasonCSR)
		if !errors.Is(err, errNoPossession) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Another key's signature over this key's request.
	mine, victim := newKey(t), newKey(t)
	swapped := bytes.Replace(csr(t, mine), point(t, mine), point(t, victim), 1)
	_, err := ParseCSR(swapped)
	wantReason(t, err, ReasonCSR)
	// A signature that is missing, and one of another form.
	for _, signature := range [][]byte{{}, {0}, {1, 0x30, 0}, {0, 0x30, 0x06, 2, 1, 0, 2, 1, 0}} {
		_, err := ParseCSR(rebuild(t, mine, signature))
		wantReason(t, err, ReasonCSR)
	}
}

func point(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	p, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// rebuild gives the request of key another BIT STRING as its signature.
func rebuild(t testing.TB, key crypto.Signer, bits []byte) []byte {
	t.Helper()
	var parts struct {
		Info, Algorithm asn1.RawValue
		Signature       asn1.RawValue
	}
	if _, err := asn1.Unmarshal(csr(t, key), &parts); err != nil {
		t.Fatal(err)
	}
	parts.Signature = asn1.RawValue{FullBytes: appendValue(nil, tagBitString, bits)}
	der, err := asn1.Marshal(parts)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestSpec_B15_BadKeysAndSignatures(t *testing.T) {
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, err = ParseCSR(csr(t, p224))
	wantReason(t, err, ReasonCSR)
	bad := csr(t, newKey(t))
	bad[len(bad)-1] ^= 1
	_, err = ParseCSR(bad)
	wantReason(t, err, ReasonCSR)
}

// A key that was proved otherwise is the same one.
func TestProvenKey(t *testing.T) {
	for name, private := range allowedKeys(t) {
		want := parseKey(t, private)
		spki, err := x509.MarshalPKIXPublicKey(private.Public())
		if err != nil {
			t.Fatal(err)
		}
		got, err := ProvenKey(spki)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.SPKI(), want.SPKI()) || got.Hash() != want.Hash() || got.ski != want.ski || got.Algorithm() != name {
			t.Errorf("%s: another key", name)
		}
		_, err = ProvenKey(append(spki, 0))
		wantReason(t, err, ReasonCSR)
	}
}
