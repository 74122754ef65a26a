package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"
)

// testAuthority is an intermediate that is valid around now.
func testAuthority(t testing.TB, now time.Time) *authority {
	t.Helper()
	key := newKey(t)
	r, err := makeRoot(testDomain, Subject{}, key, now, 365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	c := &CA{cfg: Config{TrustDomain: testDomain}.withDefaults()}
	signer := newRoot(r, StateActive)
	signer.key = key
	a, err := c.makeIntermediate(signer, 1, now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func signLeaf(t testing.TB, a *authority, l *leaf) []byte {
	t.Helper()
	buffer, err := a.template.appendTBS(l)
	if err != nil {
		t.Fatal(err)
	}
	return a.seal(t, buffer)
}

func (a *authority) seal(t testing.TB, buffer []byte) []byte {
	t.Helper()
	signature, err := a.scheme.sign(a.key, buffer[outerHead:])
	if err != nil {
		t.Fatal(err)
	}
	return a.template.appendSignature(buffer, signature)
}

// lintLeaf is what Sign does with a certificate before it releases it.
func (a *authority) lintLeaf(l *leaf, now time.Time, certificate []byte) error {
	c := &CA{cfg: Config{TrustDomain: testDomain}.withDefaults()}
	return c.check(a, l, now, certificate)
}

func testLeaf(t testing.TB, now time.Time) *leaf {
	t.Helper()
	l := &leaf{
		notBefore: floor(now.Add(-time.Minute)), notAfter: floor(now.Add(time.Hour)),
		id: "spiffe://example.org/ns/a", dnsNames: []string{"a.example.org", "b.example.org"}, key: parseKey(t, newKey(t)),
	}
	newSerial(&l.serial)
	return l
}

// Row F68 of the fault suite: a bit that flips anywhere in a finished
// certificate keeps it from being released.
func TestFault_F68_EveryBitFlipIsFound(t *testing.T) {
	now := time.Now()
	a := testAuthority(t, now)
	l := testLeaf(t, now)
	certificate := signLeaf(t, a, l)
	if err := a.lintLeaf(l, now, certificate); err != nil {
		t.Fatal(err)
	}
	for i := range len(certificate) * 8 {
		certificate[i/8] ^= 1 << (i % 8)
		if err := a.lintLeaf(l, now, certificate); !errors.Is(err, errNotMeant) {
			t.Fatalf("bit %d of byte %d flipped: %v", i%8, i/8, err)
		}
		certificate[i/8] ^= 1 << (i % 8)
	}
	for n := range certificate {
		if a.lintLeaf(l, now, certificate[:n]) == nil {
			t.Fatalf("cut to %d bytes and accepted", n)
		}
	}
	if a.lintLeaf(l, now, append(certificate, 0)) == nil {
		t.Fatal("followed by a byte and accepted")
	}
}

// Row F68: the flip happens before the signature, so the signature is good.
func TestFault_F68_FlipBeforeTheSignature(t *testing.T) {
	now := time.Now()
	a := testAuthority(t, now)
	l := testLeaf(t, now)
	buffer, err := a.template.appendTBS(l)
	if err != nil {
		t.Fatal(err)
	}
	for i := outerHead; i < len(buffer); i++ {
		flipped := bytes.Clone(buffer)
		flipped[i] ^= 0x04
		if err := a.lintLeaf(l, now, a.seal(t, flipped)); !errors.Is(err, errNotMeant) {
			t.Fatalf("byte %d flipped before the signature: %v", i, err)
		}
	}
}

// Row B9: what was linted is what is signed.
func TestV_B9_LintedIsSigned(t *testing.T) {
	now := time.Now()
	a := testAuthority(t, now)
	l := testLeaf(t, now)
	buffer, err := a.template.appendTBS(l)
	if err != nil {
		t.Fatal(err)
	}
	tbs := bytes.Clone(buffer[outerHead:])
	certificate := parse(t, a.seal(t, buffer))
	if !bytes.Equal(tbs, certificate.RawTBSCertificate) {
		t.Fatal("the signed bytes are not the encoded ones")
	}
	want := intent{
		issuer: a.cert.RawSubject, issuerKeyID: a.cert.SubjectKeyId, issuerKey: a.cert.PublicKey, issuerNotBefore: a.notBefore, issuerEnd: a.notAfter,
		trustDomain: "example.org", serial: l.serial[:], spki: l.key.spki, id: l.id, dnsNames: l.dnsNames,
		notBefore: l.notBefore, notAfter: l.notAfter, signed: now, maxLife: time.Hour,
	}
	got, err := want.lint(certificate.Raw)
	if err != nil || !bytes.Equal(got.tbs, tbs) {
		t.Fatalf("linted other bytes (%v)", err)
	}
}

// Each rule has a certificate that breaks it and no earlier one. They are made
// by crypto/x509, so the linter is tried on an encoder that is not ours.
func TestLintRules(t *testing.T) {
	now := floor(time.Now())
	a := testAuthority(t, now)
	key := newKey(t)
	pub := parseKey(t, key)
	base := leaf{notBefore: now.Add(-time.Minute), notAfter: now.Add(time.Hour), id: "spiffe://example.org/ns/a", dnsNames: []string{"a.example.org"}, key: pub}
	newSerial(&base.serial)
	extension := func(arc int, critical bool, value ...byte) pkix.Extension {
		return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, arc}, Critical: critical, Value: value}
	}
	names := func(parts ...[]byte) []byte {
		return appendValue(nil, tagSequence, bytes.Join(parts, nil))
	}
	uri := func(s string) []byte { return appendValue(nil, tagURI, []byte(s)) }
	dns := func(s string) []byte { return appendValue(nil, tagDNS, []byte(s)) }
	good := func() (*x509.Certificate, *leaf) {
		l := base
		return &x509.Certificate{
			SerialNumber: new(big.Int).SetBytes(l.serial[:]),
			NotBefore:    l.notBefore, NotAfter: l.notAfter,
			SubjectKeyId: pub.ski[:],
			ExtraExtensions: []pkix.Extension{
				extension(15, true, 3, 2, 7, 0x80),
				extension(37, false, derFixedExtensions[27-2:27+20]...),
				extension(19, true, 0x30, 0),
				extension(17, true, names(uri(l.id), dns(l.dnsNames[0]))...),
			},
		}, &l
	}
	replace := func(arc int, with ...pkix.Extension) func(*x509.Certificate, *leaf) {
		return func(c *x509.Certificate, _ *leaf) {
			var kept []pkix.Extension
			for _, e := range c.ExtraExtensions {
				if e.Id[3] == arc {
					kept = append(kept, with...)
				} else {
					kept = append(kept, e)
				}
			}
			c.ExtraExtensions = kept
		}
	}
	san := func(value []byte) func(*x509.Certificate, *leaf) { return replace(17, extension(17, true, value...)) }
	sanAs := func(id string) func(*x509.Certificate, *leaf) {
		return func(c *x509.Certificate, l *leaf) {
			l.id = id
			san(names(uri(id), dns("a.example.org")))(c, l)
		}
	}
	for name, tc := range map[string]struct {
		rule   int
		change func(*x509.Certificate, *leaf)
	}{
		"good":                  {0, func(*x509.Certificate, *leaf) {}},
		"short serial":          {7, func(c *x509.Certificate, l *leaf) { c.SerialNumber = big.NewInt(77); l.serial = [16]byte{} }},
		"other serial":          {7, func(_ *x509.Certificate, l *leaf) { l.serial[5] ^= 1 }},
		"other time":            {11, func(c *x509.Certificate, _ *leaf) { c.NotAfter = c.NotAfter.Add(time.Second) }},
		"ends before it begins": {11, func(c *x509.Certificate, l *leaf) { l.notAfter = l.notBefore.Add(-time.Hour); c.NotAfter = l.notAfter }},
		"outlives the issuer":   {12, func(c *x509.Certificate, l *leaf) { l.notAfter = a.notAfter; c.NotAfter = l.notAfter }},
		"older than the issuer": {12, func(c *x509.Certificate, l *leaf) {
			l.notBefore = a.notBefore.Add(-time.Second)
			c.NotBefore = l.notBefore
		}},
		"lives too long":    {13, func(c *x509.Certificate, l *leaf) { l.notAfter = now.Add(25 * time.Hour); c.NotAfter = l.notAfter }},
		"subject":           {14, func(c *x509.Certificate, _ *leaf) { c.Subject.CommonName = "x" }},
		"other key":         {15, func(_ *x509.Certificate, l *leaf) { l.key = parseKey(t, newKey(t)) }},
		"unknown extension": {17, func(c *x509.Certificate, _ *leaf) { c.CRLDistributionPoints = []string{"http://x"} }},
		"unknown private one": {17, func(c *x509.Certificate, _ *leaf) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: []int{1, 3, 9, 9}, Value: []byte{5, 0}})
		}},
		"no key usage":             {18, replace(15)},
		"no extended key usage":    {18, replace(37)},
		"no basic constraints":     {18, replace(19)},
		"no names":                 {18, replace(17)},
		"twice":                    {18, replace(19, extension(19, true, 0x30, 0), extension(19, true, 0x30, 0))},
		"key usage not critical":   {19, replace(15, extension(15, false, 3, 2, 7, 0x80))},
		"key cert sign":            {19, replace(15, extension(15, true, 3, 2, 2, 0x84))},
		"key encipherment":         {19, replace(15, extension(15, true, 3, 2, 5, 0xa0))},
		"client only":              {20, replace(37, extension(37, false, append([]byte{0x30, 0x0a}, derFixedExtensions[27+10:27+20]...)...))},
		"any usage":                {20, replace(37, extension(37, false, 0x30, 0x06, 0x06, 0x04, 0x55, 0x1d, 0x25, 0x00))},
		"no usage":                 {20, replace(37, extension(37, false, 0x30, 0))},
		"ca":                       {21, replace(19, extension(19, true, 0x30, 3, 1, 1, 0xff))},
		"ca false written out":     {21, replace(19, extension(19, true, 0x30, 3, 1, 1, 0))},
		"constraints not critical": {21, replace(19, extension(19, false, 0x30, 0))},
		"other issuer key": {22, func(c *x509.Certificate, _ *leaf) {
			c.ExtraExtensions = append(c.ExtraExtensions, extension(35, false, 0x30, 3, 0x80, 1, 1))
		}},
		"other subject key":   {23, func(c *x509.Certificate, _ *leaf) { c.SubjectKeyId = []byte{1} }},
		"names not critical":  {24, replace(17, extension(17, false, names(uri(base.id), dns("a.example.org"))...))},
		"two uris":            {25, san(names(uri(base.id), uri(base.id)))},
		"no uri":              {25, san(names(dns("a.example.org")))},
		"no names in the san": {25, san(names())},
		"other uri":           {26, san(names(uri("spiffe://example.org/ns/b"), dns("a.example.org")))},
		"scheme in capitals":  {26, san(names(uri("SPIFFE://example.org/ns/a"), dns("a.example.org")))},
		"other dns":           {27, san(names(uri(base.id), dns("b.example.org")))},
		"dns missing":         {27, san(names(uri(base.id)))},
		"dns more":            {27, san(names(uri(base.id), dns("a.example.org"), dns("a.example.org")))},
		"email":               {28, san(names(uri(base.id), dns("a.example.org"), appendValue(nil, 0x81, []byte("a@b"))))},
		"ip":                  {28, san(names(uri(base.id), dns("a.example.org"), appendValue(nil, 0x87, []byte{1, 2, 3, 4})))},
		"other name":          {28, san(names(uri(base.id), dns("a.example.org"), []byte{0xa0, 0}))},
		"capitals meant":      {29, sanAs("SPIFFE://example.org/ns/a")},
		"other domain":        {29, sanAs("spiffe://example.com/a")},
		"longer domain":       {29, sanAs("spiffe://example.org.evil/a")},
		"port":                {29, sanAs("spiffe://example.org:1/a")},
		"user":                {29, sanAs("spiffe://u@example.org/a")},
		"no path":             {29, sanAs("spiffe://example.org")},
		"root path":           {29, sanAs("spiffe://example.org/")},
		"empty segment":       {30, sanAs("spiffe://example.org//a")},
		"empty last segment":  {30, sanAs("spiffe://example.org/a/")},
		"dots":                {30, sanAs("spiffe://example.org/a/../b")},
		"last dots":           {30, sanAs("spiffe://example.org/a/...")},
		"percent":             {30, sanAs("spiffe://example.org/%41")},
		"query":               {30, sanAs("spiffe://example.org/a?b")},
		"fragment":            {30, sanAs("spiffe://example.org/a#b")},
		"nul":                 {30, sanAs("spiffe://example.org/a\x00")},
		"space":               {30, sanAs("spiffe://example.org/a b")},
		"not ascii":           {30, sanAs("spiffe://example.org/é")},
		"nul in a dns name": {31, func(c *x509.Certificate, l *leaf) {
			l.dnsNames = []string{"a\x00b"}
			san(names(uri(base.id), dns("a\x00b")))(c, l)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			template, l := good()
			tc.change(template, l)
			der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
			if err != nil {
				t.Fatal(err)
			}
			if tc.rule == 18 || tc.rule == 17 {
				// Nothing else may be missing.
				if template.SubjectKeyId == nil {
					t.Fatal("incomplete")
				}
			}
			err = a.lintLeaf(l, now, der)
			var lint *lintError
			switch errors.As(err, &lint); {
			case tc.rule == 0 && err != nil:
				t.Fatal(err)
			case tc.rule != 0 && (lint == nil || lint.rule != tc.rule):
				t.Fatalf("got %v, want rule %d", err, tc.rule)
			}
		})
	}
}

// Row B12: no control byte, and no identity in a name of another type.
func TestV_B12_NoControlBytesInNames(t *testing.T) {
	for c := range 256 {
		name := "a" + string([]byte{byte(c)}) + "b"
		legal := c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
		if (checkDNSName(name) == nil) != legal || isDNSName([]byte(name)) != legal {
			t.Errorf("dns name %q", name)
		}
		path := "spiffe://example.org/" + name
		inPath := legal || c >= 'A' && c <= 'Z' || c == '/'
		if (lintID([]byte(path), "example.org") == nil) != inPath {
			t.Errorf("id %q", path)
		}
	}
	if checkDNSName("spiffe://example.org/a") == nil {
		t.Error("a uri as dns name")
	}
	for _, other := range []string{"a", ".b", "*a", "", "*."} {
		if want := other == "a" || other == ".b"; isDNSName([]byte(other)) != want {
			t.Errorf("%q", other)
		}
	}
}

// The linter's walk over IDs agrees with url.Parse and with the request's check.
func FuzzLintID(f *testing.F) {
	for _, seed := range []string{"/a", "/a/b", "/../a", "/a/", "//", "/a%20", "/A.b_c-d", "/...", "/\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		raw := "spiffe://example.org" + path
		if lintID([]byte(raw), "example.org") != nil {
			return
		}
		u, err := url.Parse(raw)
		if err != nil || u.String() != raw || u.Host != "example.org" || u.Path != path || u.RawQuery+u.Fragment != "" {
			t.Errorf("%q: %v, %v", raw, u, err)
		}
	})
}

func TestSignatureCheckerAgreesWithTheStandardLibrary(t *testing.T) {
	key := newKey(t)
	checker, err := newSignatureChecker(key)
	if err != nil {
		t.Fatal(err)
	}
	short := 0
	for i := range 200 {
		digest := sha256.Sum256([]byte{byte(i)})
		if i == 0 {
			digest = [32]byte{}
		}
		signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		if x, r, err := checker.nonceX(&digest, signature); err == nil && bytes.Equal(x, r) {
			short++
		}
		if err := checker.check(&digest, signature); err != nil {
			t.Fatal(err)
		}
		for _, at := range []int{5, len(signature) - 3} {
			signature[at] ^= 0x10
			if got, want := checker.check(&digest, signature) == nil, ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature); got || want {
				t.Fatalf("got %v, want %v", got, want)
			}
			signature[at] ^= 0x10
		}
		digest[3] ^= 1
		if checker.check(&digest, signature) == nil {
			t.Fatal("accepted for another digest")
		}
	}
	if short != 200 {
		t.Errorf("%d of 200 took the short cut", short)
	}
	other, err := ecdsa.SignASN1(rand.Reader, newKey(t), make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]byte{nil, {0x30, 0}, {0x30, 6, 2, 1, 0, 2, 1, 1}, {0x30, 6, 2, 1, 1, 2, 1, 0}, {0x30, 6, 2, 1, 0xff, 2, 1, 1}, other} {
		if checker.check(&[32]byte{}, bad) == nil {
			t.Errorf("%x accepted", bad)
		}
	}
	halves := *key
	halves.PublicKey = newKey(t).PublicKey
	if _, err := newSignatureChecker(&halves); err == nil {
		t.Error("two keys' halves accepted")
	}
}
