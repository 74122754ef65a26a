package conformance

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	encodingasn1 "encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/protobuf/types/known/durationpb"

	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// sample is an X.509-SVID as a workload gets it from the agent, with DNS names,
// which all tests of its form look at.
type sample struct {
	id            string
	dns           []string
	ttl           time.Duration
	before, after time.Time // it was issued between them
	chain         []*x509.Certificate
	roots         []*x509.Certificate
}

var theSample struct {
	once sync.Once
	s    *sample
}

func sampled(t *testing.T) *sample {
	t.Helper()
	w := shared(t)
	theSample.once.Do(func() {
		uid := newUser()
		e := entry("sample", uid)
		e.DnsNames = []string{"sample.internal", "sample.shop.internal"}
		e.Ttl = durationpb.New(20 * time.Minute)
		s := &sample{id: e.GetSpiffeId(), dns: e.GetDnsNames(), ttl: 20 * time.Minute, before: time.Now()}
		w.apply(t, e)
		x := w.as(t, uid).context(t)
		s.after, s.chain = time.Now(), x.DefaultSVID().Certificates
		b, err := x.Bundles.GetX509BundleForTrustDomain(x.DefaultSVID().ID.TrustDomain())
		if err != nil {
			t.Fatal(err)
		}
		s.roots = b.X509Authorities()
		theSample.s = s
	})
	if theSample.s == nil {
		t.Fatal("there is no sample")
	}
	return theSample.s
}

func (s *sample) leaf() *x509.Certificate { return s.chain[0] }

func TestSpec_B01_OneURI(t *testing.T) {
	s := sampled(t)
	if diff := cmp.Diff(names{tagURI: {s.id}, tagDNS: s.dns}, namesOf(t, s.leaf())); diff != "" {
		t.Error(diff)
	}
}

func TestSpec_B02_PathIsNotRoot(t *testing.T) {
	s := sampled(t)
	if u := s.leaf().URIs[0]; len(u.Path) < 2 || u.Host != td || u.Scheme != "spiffe" {
		t.Errorf("it is %s", u)
	}
}

func TestSpec_B03_SANCriticalWithoutSubject(t *testing.T) {
	s := sampled(t)
	empty := []byte{0x30, 0x00}
	if e, ok := extensionsOf(t, s.leaf())[oidSAN]; !ok || !e.critical || !bytes.Equal(s.leaf().RawSubject, empty) {
		t.Errorf("critical %v, subject %x", e.critical, s.leaf().RawSubject)
	}
	out, err := openssl(t, "x509", "-noout", "-text", "-in", write(t, pemOf(s.leaf())))
	if err != nil || !strings.Contains(out, "X509v3 Subject Alternative Name: critical") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestSpec_B04_SANNotCriticalWithSubject: authorities have a subject.
func TestSpec_B04_SANNotCriticalWithSubject(t *testing.T) {
	s := sampled(t)
	for _, c := range append(slices.Clone(s.roots), s.chain[1:]...) {
		if e := extensionsOf(t, c)[oidSAN]; e.critical || len(c.Subject.Names) == 0 {
			t.Errorf("%s: critical %v", c.Subject, e.critical)
		}
	}
}

func TestSpec_B05_BasicConstraints(t *testing.T) {
	s := sampled(t)
	e, ok := extensionsOf(t, s.leaf())[oidBasicConstraints]
	// DER leaves out what is the default: cA FALSE.
	if !ok || !e.critical || !bytes.Equal(e.value, []byte{0x30, 0x00}) || s.leaf().IsCA {
		t.Errorf("%v %x", e.critical, e.value)
	}
}

func TestSpec_B06_KeyUsage(t *testing.T) {
	e, ok := extensionsOf(t, sampled(t).leaf())[oidKeyUsage]
	// digitalSignature is the first bit, and the only one.
	if !ok || !e.critical || !bytes.Equal(e.value, []byte{0x03, 0x02, 0x07, 0x80}) {
		t.Errorf("critical %v, value %x", e.critical, e.value)
	}
}

func TestSpec_B07_NoSigningUsage(t *testing.T) {
	if u := sampled(t).leaf().KeyUsage; u&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		t.Errorf("key usage %b", u)
	}
}

func TestSpec_B08_ExtKeyUsage(t *testing.T) {
	s := sampled(t)
	if diff := cmp.Diff([]x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, slices.Sorted(slices.Values(s.leaf().ExtKeyUsage))); diff != "" || len(s.leaf().UnknownExtKeyUsage) > 0 {
		t.Error(diff, s.leaf().UnknownExtKeyUsage)
	}
}

func TestSpec_B09_Backdated(t *testing.T) {
	s := sampled(t)
	const backdate = 5 * time.Minute // the default, and a quarter of the life, which is rounded down to a second
	if nb := s.leaf().NotBefore; nb.After(s.after.Add(2*time.Second-backdate)) || nb.Before(s.before.Add(-time.Second-backdate)) {
		// Never before its issuer: a CA that was just started has not existed for so long.
		if !nb.Equal(s.chain[1].NotBefore) {
			t.Errorf("asked between %v and %v, not before %v", s.before, s.after, nb)
		}
	}
	if s.leaf().NotBefore.Before(s.chain[1].NotBefore) {
		t.Error("begins before its issuer")
	}
}

func TestSpec_B10_End(t *testing.T) {
	s := sampled(t)
	na := s.leaf().NotAfter
	if na.After(s.after.Add(s.ttl)) || na.Before(s.before.Add(s.ttl-2*time.Second)) {
		t.Errorf("asked between %v and %v for %v, not after %v", s.before, s.after, s.ttl, na)
	}
	for i, c := range s.chain[1:] {
		if c.NotAfter.Before(s.chain[i].NotAfter) {
			t.Errorf("issuer ends at %v", c.NotAfter)
		}
	}
}

// TestSpec_B11_Serials: positive, at most 20 bytes, random, never twice.
func TestSpec_B11_Serials(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("b11", uid))
	r := join(t, w.ca, "rogue-b11", nil)
	seen, ones, n := make(map[string]bool), make(map[int]int), 0
	for range 2 {
		items := make([]*nodev1.IssueItem, 500)
		for i := range items {
			items[i] = item("b11", uid, csrOf(t, newKey(t), nil))
		}
		for _, result := range r.issue(t, items...) {
			serial := parse(t, result.GetSvid().GetChain()[0]).SerialNumber
			if serial.Sign() <= 0 || len(serial.Bytes()) > 20 || seen[serial.String()] {
				t.Fatalf("serial %x, twice: %v", serial, seen[serial.String()])
			}
			seen[serial.String()] = true
			for bit := range 160 {
				ones[bit] += int(serial.Bit(bit))
			}
			n++
		}
	}
	random := 0
	for _, o := range ones {
		if o > n*2/5 && o < n*3/5 {
			random++
		}
	}
	if random < 64 {
		t.Errorf("%d random bits in %d serials", random, n)
	}
}

// refusedRequest is asked for over the wire by an agent with a right to the entry.
func refusedRequest(t *testing.T, name string, requests map[string][]byte) {
	t.Helper()
	w := shared(t)
	uid := newUser()
	w.apply(t, entry(name, uid))
	r := join(t, w.ca, "rogue-"+name, nil)
	for what, der := range requests {
		t.Run(what, func(t *testing.T) {
			if message := r.refused(t, item(name, uid, der), nodev1.Reason_REASON_CSR); message == "" {
				t.Error("no message")
			}
		})
	}
	// The agent itself is not thrown out for it, and the entry is a good one.
	_, chain := r.issued(t, item(name, uid, csrOf(t, newKey(t), nil)))
	checkLeaf(t, chain, "spiffe://"+td+"/"+name)
}

// ignoredRequest is what may be granted, but with nothing of it.
func ignoredRequest(t *testing.T, name string, requests map[string]*x509.CertificateRequest) {
	t.Helper()
	w := shared(t)
	uid := newUser()
	e := entry(name, uid)
	e.DnsNames = []string{"registered.internal"}
	w.apply(t, e)
	r := join(t, w.ca, "rogue-"+name, nil)
	granted := 0
	for what, template := range requests {
		t.Run(what, func(t *testing.T) {
			i := item(name, uid, csrOf(t, newKey(t), template))
			i.Instance = what
			result := r.issue(t, i)[0]
			if result.GetSvid() == nil {
				if got := result.GetRefusal().GetReason(); got != nodev1.Reason_REASON_CSR {
					t.Errorf("refused with %v", got)
				}
				return
			}
			granted++
			checkLeaf(t, parseAll(t, result.GetSvid().GetChain()), e.GetSpiffeId(), e.GetDnsNames()...)
		})
	}
	if granted == 0 {
		t.Error("nothing was granted, so nothing was shown to be left out")
	}
}

func uris(t testing.TB, texts ...string) []*url.URL {
	t.Helper()
	all := make([]*url.URL, 0, len(texts))
	for _, text := range texts {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, u)
	}
	return all
}

func asking(extensions ...pkix.Extension) *x509.CertificateRequest {
	return &x509.CertificateRequest{ExtraExtensions: extensions}
}

func extensionOf(oid encodingasn1.ObjectIdentifier, value ...byte) pkix.Extension {
	return pkix.Extension{Id: oid, Critical: true, Value: value}
}

func TestSpec_B12_TwoURIs(t *testing.T) {
	id := "spiffe://" + td + "/b12"
	requests := make(map[string][]byte)
	for what, all := range map[string][]string{
		"another one too": {id, "spiffe://" + td + "/admin"}, "the same twice": {id, id}, "none of spiffe": {"https://a/", "https://b/"},
	} {
		requests[what] = csrOf(t, newKey(t), &x509.CertificateRequest{URIs: uris(t, all...)})
	}
	refusedRequest(t, "b12", requests)
}

func TestSpec_B13_AsksForAnAuthority(t *testing.T) {
	ignoredRequest(t, "b13", authorityRequests())
}

func authorityRequests() map[string]*x509.CertificateRequest {
	basicConstraints, keyUsage := []int{2, 5, 29, 19}, []int{2, 5, 29, 15}
	return map[string]*x509.CertificateRequest{
		"CA:TRUE":                asking(extensionOf(basicConstraints, 0x30, 0x03, 0x01, 0x01, 0xff)),
		"CA:TRUE, path length":   asking(extensionOf(basicConstraints, 0x30, 0x06, 0x01, 0x01, 0xff, 0x02, 0x01, 0x03)),
		"keyCertSign":            asking(extensionOf(keyUsage, 0x03, 0x02, 0x02, 0x84)),
		"cRLSign":                asking(extensionOf(keyUsage, 0x03, 0x02, 0x01, 0x82)),
		"all of it":              asking(extensionOf(basicConstraints, 0x30, 0x03, 0x01, 0x01, 0xff), extensionOf(keyUsage, 0x03, 0x02, 0x01, 0x86)),
		"subject key id of CA":   asking(extensionOf([]int{2, 5, 29, 14}, append([]byte{0x04, 0x14}, make([]byte, 20)...)...)),
		"any extended key use":   asking(extensionOf([]int{2, 5, 29, 37}, 0x30, 0x06, 0x06, 0x04, 0x55, 0x1d, 0x25, 0x00)),
		"code signing":           asking(extensionOf([]int{2, 5, 29, 37}, 0x30, 0x0a, 0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x03)),
		"OCSP signing, no check": asking(extensionOf([]int{1, 3, 6, 1, 5, 5, 7, 48, 1, 5}, 0x05, 0x00)),
	}
}

func TestSpec_B14_SubjectAndNamesNotCopied(t *testing.T) {
	ignoredRequest(t, "b14", nameRequests(t))
}

func nameRequests(t testing.TB) map[string]*x509.CertificateRequest {
	t.Helper()
	// otherName with a user principal name (1.3.6.1.4.1.311.20.2.3).
	var other cryptobyte.Builder
	other.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier([]int{1, 3, 6, 1, 4, 1, 311, 20, 2, 3})
			b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
				b.AddASN1(asn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte("root@example.org")) })
			})
		})
	})
	many := make([]string, 100)
	for i := range many {
		many[i] = strings.Repeat("x", i%20+1) + ".evil.internal"
	}
	return map[string]*x509.CertificateRequest{
		"subject":      {Subject: pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}, SerialNumber: "1"}},
		"long subject": {Subject: pkix.Name{CommonName: strings.Repeat("x", 5000)}},
		"another uri":  {URIs: uris(t, "spiffe://"+td+"/admin")},
		"foreign uri":  {URIs: uris(t, "spiffe://evil.org/admin")},
		"uri and dns":  {URIs: uris(t, "spiffe://"+td+"/admin"), DNSNames: []string{"evil.internal"}},
		"dns":          {DNSNames: []string{"*", "registered.internal", "evil.internal"}},
		"many dns":     {DNSNames: many},
		"ip":           {IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}},
		"email":        {EmailAddresses: []string{"spiffe://example.org/admin@example.org"}},
		"other name":   asking(extensionOf([]int{2, 5, 29, 17}, other.BytesOrPanic()...)),
	}
}

func TestSpec_B15_BadSignaturesAndKeys(t *testing.T) {
	good := newKey(t)
	der := csrOf(t, good, nil)
	flipped := bytes.Clone(der)
	flipped[len(flipped)-3] ^= 1
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	refusedRequest(t, "b15", map[string][]byte{
		"signature altered":     flipped,
		"signed by another key": signedBy(t, newKey(t), der),
		"nothing":               nil,
		"not a request":         []byte("-----BEGIN CERTIFICATE REQUEST-----"),
		"rubbish behind":        append(bytes.Clone(der), 0),
		"P-224":                 csrOf(t, p224, nil),
		"P-521":                 csrOf(t, p521, nil),
		"RSA-1024":              rsa1024(t),
		"RSA e=1":               rsaExponentOne(t),
	})
}

// signedBy replaces the signature of a request with that of another key.
func signedBy(t testing.TB, key *ecdsa.PrivateKey, der []byte) []byte {
	t.Helper()
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(parsed.RawTBSCertificateRequest)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	var request cryptobyte.Builder
	request.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(parsed.RawTBSCertificateRequest)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier([]int{1, 2, 840, 10045, 4, 3, 2}) // ecdsa-with-SHA256
		})
		b.AddASN1BitString(signature)
	})
	return request.BytesOrPanic()
}

// rsa1024 makes a request that is good but for its key.
func rsa1024(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	if out, err := openssl(t, "req", "-new", "-newkey", "rsa:1024", "-nodes", "-sha256", "-subj", "/", "-outform", "DER",
		"-keyout", dir+"/key.pem", "-out", dir+"/csr.der"); err != nil {
		t.Fatal(out)
	}
	return readFile(t, dir+"/csr.der")
}

// rsaExponentOne makes a request whose signature verifies, since with the public
// exponent 1 everybody can make it: it is the padded digest itself.
func rsaExponentOne(t testing.TB) []byte {
	t.Helper()
	n := new(big.Int).Lsh(big.NewInt(1), 2047)
	n.Add(n, big.NewInt(1<<20+7)) // odd, of 2048 bits
	sha256WithRSA := func(b *cryptobyte.Builder) {
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier([]int{1, 2, 840, 113549, 1, 1, 11})
			b.AddASN1NULL()
		})
	}
	var info cryptobyte.Builder
	info.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(0)
		b.AddASN1(asn1.SEQUENCE, func(*cryptobyte.Builder) {})
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier([]int{1, 2, 840, 113549, 1, 1, 1})
				b.AddASN1NULL()
			})
			b.AddASN1(asn1.BIT_STRING, func(b *cryptobyte.Builder) {
				b.AddUint8(0)
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1BigInt(n)
					b.AddASN1Int64(1)
				})
			})
		})
		b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(*cryptobyte.Builder) {})
	})
	digest := sha256.Sum256(info.BytesOrPanic())
	// RFC 8017 §9.2.
	digestInfo := append([]byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}, digest[:]...)
	signature := append([]byte{0, 1}, bytes.Repeat([]byte{0xff}, 256-3-len(digestInfo))...)
	signature = append(append(signature, 0), digestInfo...)
	var request cryptobyte.Builder
	request.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(info.BytesOrPanic())
		sha256WithRSA(b)
		b.AddASN1BitString(signature)
	})
	return request.BytesOrPanic()
}

// TestSpec_B16_KeyOfAnotherInstance: a key belongs to one instance, of one node.
func TestSpec_B16_KeyOfAnotherInstance(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("b16", uid))
	r := join(t, w.ca, "rogue-b16", nil)
	key := newKey(t)
	r.issued(t, item("b16", uid, csrOf(t, key, nil)))
	other := item("b16", uid, csrOf(t, key, nil))
	other.Instance = "another"
	r.refused(t, other, nodev1.Reason_REASON_CSR)
	join(t, w.ca, "rogue-b16-2", nil).refused(t, item("b16", uid, csrOf(t, key, nil)), nodev1.Reason_REASON_CSR)
}

func TestSpec_B17_ChainOrder(t *testing.T) {
	s := sampled(t)
	if len(s.chain) != 2 || s.chain[0].IsCA || !s.chain[1].IsCA {
		t.Fatalf("chain of %d", len(s.chain))
	}
	for i, c := range s.chain[1:] {
		if err := s.chain[i].CheckSignatureFrom(c); err != nil {
			t.Error(err)
		}
	}
	for _, root := range s.roots {
		if slices.ContainsFunc(s.chain, root.Equal) {
			t.Error("the root is in the chain")
		}
	}
}

func TestSpec_B18_KeyIdentifiers(t *testing.T) {
	s := sampled(t)
	chain := append(slices.Clone(s.chain), s.roots[0])
	for i, c := range chain {
		if len(c.SubjectKeyId) == 0 {
			t.Errorf("certificate %d has no subject key identifier", i)
		}
		if i+1 < len(chain) && !bytes.Equal(c.AuthorityKeyId, chain[i+1].SubjectKeyId) {
			t.Errorf("certificate %d names %x, its issuer is %x", i, c.AuthorityKeyId, chain[i+1].SubjectKeyId)
		}
	}
}

func TestSpec_B19_OpenSSL(t *testing.T) {
	s := sampled(t)
	for _, purpose := range []string{"sslclient", "sslserver"} {
		if out, err := opensslVerify(t, purpose, s.roots, s.chain); err != nil {
			t.Errorf("%s: %s", purpose, out)
		}
	}
	// What openssl verifies is not anything.
	if out, err := opensslVerify(t, "sslclient", s.roots, s.chain[:1]); err == nil {
		t.Errorf("without the intermediate: %s", out)
	}
}

// TestSpec_B20_EveryKindOfKey: passes go-spiffe, and Envoy.
func TestSpec_B20_EveryKindOfKey(t *testing.T) {
	w := shared(t)
	p := envoy(t)
	uid := newUser()
	w.apply(t, entry("b20", uid))
	r := join(t, w.ca, "rogue-b20", nil)
	for kind, key := range keysOf(t) {
		t.Run(kind, func(t *testing.T) {
			i := item("b20", uid, csrOf(t, key, nil))
			i.Instance = kind
			result, chain := r.issued(t, i)
			checkLeaf(t, chain, "spiffe://"+td+"/b20")
			svid := svidOf(t, result.GetChain(), key)
			if _, _, err := x509svid.Verify(chain, p.bundle); err != nil {
				t.Error(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if peer, err := p.ask(ctx, svid); err != nil || peer != "spiffe://"+td+"/b20" {
				t.Errorf("envoy saw %q: %v", peer, err)
			}
		})
	}
}
