package x509pop

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// pki makes certificates for tests.
type pki struct {
	t      *testing.T
	serial int64
}

// issued is a certificate with its key.
type issued struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func ecKey(t *testing.T) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// rsaKey makes each size once: it is slow.
var rsaKeys = struct {
	sync.Mutex
	m map[int]*rsa.PrivateKey
}{m: map[int]*rsa.PrivateKey{}}

func rsaKey(t *testing.T, bits int) crypto.Signer {
	t.Helper()
	rsaKeys.Lock()
	defer rsaKeys.Unlock()
	if rsaKeys.m[bits] == nil {
		fips140.WithoutEnforcement(func() { // it is for us to refuse weak keys
			k, err := rsa.GenerateKey(rand.Reader, bits)
			if err != nil {
				t.Fatal(err)
			}
			rsaKeys.m[bits] = k
		})
	}
	return rsaKeys.m[bits]
}

// issue makes a certificate; parent nil makes it self-signed.
func (p *pki) issue(parent *issued, key crypto.Signer, change func(*x509.Certificate)) *issued {
	p.t.Helper()
	p.serial++
	tmpl := &x509.Certificate{
		SerialNumber:          big.NewInt(0xab00 + p.serial),
		Subject:               pkix.Name{CommonName: fmt.Sprintf("certificate %d", p.serial)},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		BasicConstraintsValid: true,
	}
	if change != nil {
		change(tmpl)
	}
	if parent == nil {
		parent = &issued{cert: tmpl, key: key}
	}
	var der []byte
	var err error
	fips140.WithoutEnforcement(func() {
		der, err = x509.CreateCertificate(rand.Reader, tmpl, parent.cert, key.Public(), parent.key)
	})
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return &issued{cert: c, key: key}
}

func ca(c *x509.Certificate) {
	c.IsCA = true
	c.KeyUsage = x509.KeyUsageCertSign
}

func machine(c *x509.Certificate) {
	c.Subject.CommonName = "web-3.dc1.internal"
	c.DNSNames = []string{"web-3.dc1.internal", "web-3"}
	c.KeyUsage = x509.KeyUsageDigitalSignature
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} // any is good
}

// writePEM writes certificates, and the key of the first if key is set.
func writePEM(t *testing.T, path string, certs ...*issued) string {
	t.Helper()
	var b bytes.Buffer
	for _, c := range certs {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeKey(t *testing.T, path string, key crypto.Signer) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newAttester(t *testing.T, chain ...*issued) *Attester {
	t.Helper()
	dir := t.TempDir()
	a, err := NewAttester(AgentConfig{
		Certificate: writePEM(t, filepath.Join(dir, "machine.pem"), chain...),
		Key:         writeKey(t, filepath.Join(dir, "machine.key"), chain[0].key),
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newVerifier(t *testing.T, trusted ...*issued) *Verifier {
	t.Helper()
	v, err := NewVerifier(Config{CABundle: writePEM(t, filepath.Join(t.TempDir(), "ca.pem"), trusted...)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

var someBinding = make([]byte, sha256.Size)

// run runs one attestation.
func run(t *testing.T, a *Attester, v *Verifier) (*attributesv1.Node, error) {
	t.Helper()
	evidence, err := a.Evidence(t.Context(), someBinding)
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: someBinding},
		func(ctx context.Context, challenge []byte) ([]byte, error) {
			return a.Respond(ctx, someBinding, challenge)
		})
}

func TestConformance(t *testing.T) {
	for name, key := range map[string]func(*testing.T) crypto.Signer{
		"ECDSA P-256": ecKey,
		"ECDSA P-384": func(t *testing.T) crypto.Signer {
			k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			return k
		},
		"RSA": func(t *testing.T) crypto.Signer { return rsaKey(t, 2048) },
		"Ed25519": func(t *testing.T) crypto.Signer {
			_, k, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			return k
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := &pki{t: t}
			root := p.issue(nil, ecKey(t), ca)
			intermediate := p.issue(root, ecKey(t), ca)
			leaf := p.issue(intermediate, key(t), machine)
			sum := sha256.Sum256(leaf.cert.Raw)
			id := hex.EncodeToString(sum[:])
			attesttest.Node(t, attesttest.NodeConfig{
				Pair: func(t *testing.T) (attest.NodeAttester, attest.NodeVerifier) {
					return newAttester(t, leaf, intermediate), newVerifier(t, root)
				},
				Bound: true,
				Want: &attributesv1.Node{
					Method: "x509pop", Id: id,
					X509Pop: &attributesv1.X509PoP{
						SubjectCn: "web-3.dc1.internal", IssuerCn: "certificate 2", Serial: "ab03",
						Sha256: id, DnsNames: []string{"web-3.dc1.internal", "web-3"},
					},
				},
			})
		})
	}
}

// Each row is a chain that must not attest a machine.
func TestChains(t *testing.T) {
	p := &pki{t: t}
	root := p.issue(nil, ecKey(t), ca)
	stranger := p.issue(nil, ecKey(t), func(c *x509.Certificate) { ca(c); c.Subject = root.cert.Subject })
	intermediate := p.issue(root, ecKey(t), ca)
	good := p.issue(root, ecKey(t), machine)
	notCA := p.issue(root, ecKey(t), machine)
	pathLen := p.issue(root, ecKey(t), func(c *x509.Certificate) { ca(c); c.MaxPathLenZero = true })
	below := p.issue(pathLen, ecKey(t), ca)
	constrained := p.issue(root, ecKey(t), func(c *x509.Certificate) {
		ca(c)
		c.PermittedDNSDomainsCritical = true
		c.PermittedDNSDomains = []string{"dc2.internal"}
	})
	expiredCA := p.issue(root, ecKey(t), func(c *x509.Certificate) { ca(c); c.NotAfter = time.Now().Add(-time.Minute) })
	weakCA := p.issue(root, rsaKey(t, 1024), ca)
	deep := []*issued{}
	parent := root
	for range MaxCertificates {
		parent = p.issue(parent, ecKey(t), ca)
		deep = append([]*issued{parent}, deep...)
	}
	with := func(change func(*x509.Certificate)) *issued {
		return p.issue(root, ecKey(t), func(c *x509.Certificate) { machine(c); change(c) })
	}
	many := []*issued{good}
	for range MaxCertificates {
		many = append(many, intermediate)
	}
	for name, chain := range map[string][]*issued{
		"unknown CA of the same name":        {p.issue(stranger, ecKey(t), machine)},
		"unknown CA, its root sent along":    {p.issue(stranger, ecKey(t), machine), stranger},
		"intermediate not sent":              {p.issue(intermediate, ecKey(t), machine)},
		"CA certificate":                     {with(func(c *x509.Certificate) { c.IsCA = true })},
		"intermediate CA itself":             {intermediate},
		"root itself":                        {root},
		"may sign certificates":              {with(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })},
		"may sign revocation lists":          {with(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })},
		"key usage without digitalSignature": {with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })},
		"no key usage":                       {with(func(c *x509.Certificate) { c.KeyUsage = 0 })},
		"expired":                            {with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })},
		"not valid yet":                      {with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })},
		"issued by a machine":                {p.issue(notCA, ecKey(t), machine), notCA},
		"path too long":                      {p.issue(below, ecKey(t), machine), below, pathLen},
		"outside the name constraints":       {p.issue(constrained, ecKey(t), machine), constrained},
		"below an expired CA":                {p.issue(expiredCA, ecKey(t), machine), expiredCA},
		"below a CA with a weak key":         {p.issue(weakCA, ecKey(t), machine), weakCA},
		"weak RSA key":                       {p.issue(root, rsaKey(t, 1024), machine)},
		"unknown critical extension": {with(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		})},
		"self-signed":           {p.issue(nil, ecKey(t), machine)},
		"too many certificates": many,
		"too deep":              append([]*issued{p.issue(parent, ecKey(t), machine)}, deep...),
		"too large": {with(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 5}, Value: make([]byte, MaxEvidence)}}
		})},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVerifier(t, root)
			leaf := chain[0]
			// Not with the Attester, which would refuse most of them itself.
			evidence := []byte{version}
			for _, c := range chain {
				evidence = append(evidence, byte(len(c.cert.Raw)>>8), byte(len(c.cert.Raw)))
				evidence = append(evidence, c.cert.Raw...)
			}
			n, err := v.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: someBinding},
				func(_ context.Context, challenge []byte) ([]byte, error) {
					m, err := statement(challenge[1:], someBinding, leaf.cert.Raw)
					if err != nil {
						return nil, err
					}
					signature, err := sign(leaf.key, m)
					return encodeBytes(signature), err
				})
			if n != nil || !errors.Is(err, attest.ErrRefused) {
				t.Errorf("node %v, error %v", n, err)
			}
		})
	}
	if _, err := run(t, newAttester(t, good), newVerifier(t, root)); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// A certificate in the bundle that is not a CA's is a pin: the whole of it is
// compared.
func TestV_C11_PinnedLeaf(t *testing.T) {
	p := &pki{t: t}
	key := ecKey(t)
	pinned := p.issue(nil, key, machine)
	like := func(c *x509.Certificate) {
		machine(c)
		c.SerialNumber = pinned.cert.SerialNumber
		c.NotAfter = pinned.cert.NotAfter.Add(time.Second)
	}
	v := newVerifier(t, pinned)
	if _, err := run(t, newAttester(t, pinned), v); err != nil {
		t.Errorf("the pinned certificate: %v", err)
	}
	for name, other := range map[string]*issued{
		"same key, name and serial":       p.issue(nil, key, like),
		"same name and serial":            p.issue(nil, ecKey(t), like),
		"signed by the pinned one's key":  p.issue(pinned, ecKey(t), like),
		"same key, signed by itself, new": p.issue(pinned, key, machine),
	} {
		t.Run(name, func(t *testing.T) {
			if n, err := run(t, newAttester(t, other), v); !errors.Is(err, attest.ErrRefused) {
				t.Errorf("node %v, error %v", n, err)
			}
		})
	}
}

// C8: what a hostile encoder can leave out.
func TestV_C8_EmptyParts(t *testing.T) {
	p := &pki{t: t}
	root := p.issue(nil, ecKey(t), ca)
	noEKU := p.issue(root, ecKey(t), func(c *x509.Certificate) {
		machine(c)
		c.ExtKeyUsage = nil
		c.DNSNames = nil
		c.Subject = pkix.Name{}
		c.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 37}, Value: []byte{0x30, 0}}} // an empty list
	})
	v := newVerifier(t, root)
	for name, evidence := range map[string][]byte{
		"no certificate":           {version},
		"empty certificate":        {version, 0, 0},
		"empty sequence":           {version, 0, 2, 0x30, 0},
		"length without bytes":     {version, 0xff, 0xff},
		"half a length":            {version, 0},
		"sequence of empty values": {version, 0, 6, 0x30, 4, 0x30, 0, 0x30, 0},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := v.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: someBinding}, nil)
			if !errors.Is(err, attest.ErrRefused) {
				t.Errorf("error %v", err)
			}
		})
	}
	// No panic, whatever is decided.
	_, _ = v.Verify(t.Context(), attest.Claim{Evidence: append([]byte{version, byte(len(noEKU.cert.Raw) >> 8), byte(len(noEKU.cert.Raw))}, noEKU.cert.Raw...), Binding: someBinding},
		func(context.Context, []byte) ([]byte, error) { return []byte{version, 0}, nil })
}

// C7: each kind of key that is not meant is refused, by both halves.
func TestV_C7_UnknownKeys(t *testing.T) {
	var p224 *ecdsa.PrivateKey
	var err error
	fips140.WithoutEnforcement(func() { p224, err = ecdsa.GenerateKey(elliptic.P224(), rand.Reader) })
	if err != nil {
		t.Fatal(err)
	}
	even := *rsaKey(t, 2048).Public().(*rsa.PublicKey)
	even.E = 65536
	three := even
	three.E = 3
	for name, pub := range map[string]crypto.PublicKey{
		"nil":            nil,
		"string":         "key",
		"P-224":          p224.Public(),
		"RSA 1024":       rsaKey(t, 1024).Public(),
		"RSA, e even":    &even,
		"RSA, e = 3":     &three,
		"RSA of 8 kbit":  &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 8191), E: 65537},
		"RSA by value":   even,
		"Ed25519 by ptr": new(ed25519.PublicKey),
	} {
		if err := checkKey(pub); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, pub := range map[string]crypto.PublicKey{"nil": nil, "string": "key"} {
		if verify(pub, []byte("m"), []byte("s")) {
			t.Errorf("%s: verified", name)
		}
	}
}

// A signature that the machine makes elsewhere must not be of use here: each
// part of the statement counts.
func TestStatement(t *testing.T) {
	nonce, binding, leaf := make([]byte, 32), make([]byte, 32), []byte("leaf")
	m, err := statement(nonce, binding, leaf)
	if err != nil {
		t.Fatal(err)
	}
	if len(m) != 64+32+32+32 || !bytes.HasPrefix(m, []byte(label)) || len(label) > labelSize {
		t.Errorf("statement of %d bytes", len(m))
	}
	if len(label) <= 48 {
		t.Errorf("label of %d bytes: a peer of TLS 1.2 chooses 32 of what the machine signs", len(label))
	}
	one := append(make([]byte, 31), 1)
	for _, other := range [][3][]byte{{one, binding, leaf}, {nonce, one, leaf}, {nonce, binding, []byte("leaf2")}} {
		if o, err := statement(other[0], other[1], other[2]); err != nil || bytes.Equal(m, o) {
			t.Errorf("%x: the same statement, or %v", other, err)
		}
	}
}

// The bundle is read again when the file has changed, and what cannot be read is
// not trusted on.
func TestBundleChanges(t *testing.T) {
	p := &pki{t: t}
	first, second := p.issue(nil, ecKey(t), ca), p.issue(nil, ecKey(t), ca)
	path := writePEM(t, filepath.Join(t.TempDir(), "ca.pem"), first)
	v, err := NewVerifier(Config{CABundle: path})
	if err != nil {
		t.Fatal(err)
	}
	one, two := newAttester(t, p.issue(first, ecKey(t), machine)), newAttester(t, p.issue(second, ecKey(t), machine))
	check := func(what string, wantOne, wantTwo bool) {
		t.Helper()
		_, errOne := run(t, one, v)
		_, errTwo := run(t, two, v)
		if (errOne == nil) != wantOne || (errTwo == nil) != wantTwo {
			t.Errorf("%s: %v and %v", what, errOne, errTwo)
		}
	}
	check("first", true, false)
	writePEM(t, path, first, second)
	check("both", true, true)
	next := writePEM(t, path+".new", second)
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
	check("second", false, true)
	for name, text := range map[string]string{
		"empty": "", "text": "no certificates yet\n", "cut off": "-----BEGIN CERTIFICATE-----\nMIIB",
		"a key":   "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"garbage": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"huge":    strings.Repeat("x", maxBundle+1),
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		check(name, false, false)
		if _, err := run(t, two, v); errors.Is(err, attest.ErrRefused) {
			t.Errorf("%s: a mistake of the CA's operator is no refusal: %v", name, err)
		}
		if _, err := NewVerifier(Config{CABundle: path}); err == nil {
			t.Errorf("%s: NewVerifier accepts it", name)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	check("missing", false, false)
	writePEM(t, path, second)
	check("back again", false, true)
}

// The machine's certificate is renewed under the agent's feet.
func TestV_C10_CertificateIsRenewed(t *testing.T) {
	p := &pki{t: t}
	root := p.issue(nil, ecKey(t), ca)
	v := newVerifier(t, root)
	leaf := p.issue(root, ecKey(t), machine)
	a := newAttester(t, leaf)
	before, err := run(t, a, v)
	if err != nil {
		t.Fatal(err)
	}
	renewed := p.issue(root, ecKey(t), machine)
	writePEM(t, a.config.Certificate, renewed)
	if _, err := a.Evidence(t.Context(), nil); err == nil {
		t.Error("sent a certificate whose key is not there yet")
	}
	writeKey(t, a.config.Key, renewed.key)
	after, err := run(t, a, v)
	if err != nil {
		t.Fatal(err)
	}
	if before.GetId() == after.GetId() {
		t.Error("another certificate is the same node")
	}
	// Between evidence and challenge: the attempt goes on with what it showed.
	evidence, err := a.Evidence(t.Context(), someBinding)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, a.config.Certificate, leaf)
	writeKey(t, a.config.Key, leaf.key)
	if _, err := v.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: someBinding},
		func(ctx context.Context, challenge []byte) ([]byte, error) {
			return a.Respond(ctx, someBinding, challenge)
		}); err != nil {
		t.Error(err)
	}
}

func TestAgentMistakes(t *testing.T) {
	p := &pki{t: t}
	root := p.issue(nil, ecKey(t), ca)
	leaf := p.issue(root, ecKey(t), machine)
	for name, tc := range map[string]struct {
		change func(a *Attester)
		want   string
	}{
		"readable key": {func(a *Attester) { os.Chmod(a.config.Key, 0o644) }, "chmod it to 0600"},
		"no key":       {func(a *Attester) { os.Remove(a.config.Key) }, "no such file"},
		"other key":    {func(a *Attester) { writeKey(t, a.config.Key, ecKey(t)) }, "does not match"},
		"a CA":         {func(a *Attester) { writePEM(t, a.config.Certificate, root); writeKey(t, a.config.Key, root.key) }, "is a CA certificate"},
		"no PEM":       {func(a *Attester) { os.WriteFile(a.config.Certificate, []byte("x"), 0o644) }, "failed to find"},
		"chain too big": {func(a *Attester) {
			writePEM(t, a.config.Certificate, leaf, root, root, root, root, root, root, root, root)
		}, "want 1 to 8"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAttester(t, leaf)
			tc.change(a)
			_, err := a.Evidence(t.Context(), someBinding)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
	if _, err := NewAttester(AgentConfig{Certificate: "x"}); err == nil {
		t.Error("no key configured: accepted")
	}
	if _, err := NewVerifier(Config{}); err == nil {
		t.Error("no bundle configured: accepted")
	}
}

func FuzzEvidence(f *testing.F) {
	p := &pki{t: &testing.T{}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	root := p.issue(nil, key, ca)
	leaf := p.issue(root, key, machine)
	roots := x509.NewCertPool()
	roots.AddCert(root.cert)
	good, err := encodeChain([][]byte{leaf.cert.Raw, root.cert.Raw})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte{version, 0, 2, 0x30, 0})
	f.Fuzz(func(t *testing.T, evidence []byte) {
		chain, err := decodeChain(evidence)
		if err == nil {
			again, err := encodeChain(chain)
			if err != nil || !bytes.Equal(again, evidence) {
				t.Errorf("%x is not encoded as it was: %x, %v", evidence, again, err)
			}
		}
		c, err := verifyChain(evidence, roots, time.Now())
		if err == nil && !bytes.Equal(c.Raw, leaf.cert.Raw) {
			t.Errorf("accepted %x", c.Raw)
		}
	})
}

func FuzzResponse(f *testing.F) {
	f.Add([]byte{version, 1, 2, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decodeResponse(b); err == nil && (len(s) == 0 || len(s) > maxSignature) {
			t.Errorf("signature of %d bytes", len(s))
		}
		if n, err := decodeChallenge(b); err == nil && len(n) != nonceSize {
			t.Errorf("nonce of %d bytes", len(n))
		}
	})
}
