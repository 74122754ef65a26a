package ca

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// Each leaf is looked at as crypto/x509 sees it, whatever its key.
func TestSpec_B_LeafProfile(t *testing.T) {
	f := open(t, Config{})
	for name, key := range allowedKeys(t) {
		for _, dns := range [][]string{nil, {"web.shop.internal", "*.shop.internal"}} {
			now := time.Now()
			pub := parseKey(t, key)
			if pub.Algorithm() != name {
				t.Errorf("algorithm %q of %q", pub.Algorithm(), name)
			}
			leaf, intermediate, signed := f.issue(t, now, &Request{Key: pub, DNSNames: dns})
			checkProfile(t, leaf, intermediate, dns)
			if got, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !got.Equal(key.Public()) {
				t.Errorf("%s: another key", name)
			}
			if err := f.verify(now, leaf, intermediate); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if !bytes.Equal(leaf.SerialNumber.Bytes(), signed.Serial) || !leaf.NotAfter.Equal(signed.NotAfter) || !leaf.NotBefore.Equal(signed.NotBefore) {
				t.Errorf("%s: what Sign says is not what is in the certificate", name)
			}
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := x509svid.ParseRaw(slices.Concat(leaf.Raw, intermediate.Raw), der); err != nil {
				t.Errorf("%s: go-spiffe: %v", name, err)
			}
		}
	}
}

func checkProfile(t testing.TB, leaf, intermediate *x509.Certificate, dns []string) {
	t.Helper()
	if len(leaf.URIs) != 1 || leaf.Version != 3 || leaf.Subject.String() != "" || len(leaf.UnhandledCriticalExtensions) != 0 {
		t.Errorf("uris %v, version %d, subject %q", leaf.URIs, leaf.Version, leaf.Subject)
	}
	if leaf.IsCA || !leaf.BasicConstraintsValid || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("ca %v, key usage %v", leaf.IsCA, leaf.KeyUsage)
	}
	for _, arc := range []int{15, 17, 19} {
		if !critical(leaf, arc) {
			t.Errorf("extension 2.5.29.%d is not critical", arc)
		}
	}
	if want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}; !slices.Equal(leaf.ExtKeyUsage, want) {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	if !slices.Equal(leaf.DNSNames, dns) || len(leaf.EmailAddresses)+len(leaf.IPAddresses) != 0 {
		t.Errorf("names %v %v %v", leaf.DNSNames, leaf.EmailAddresses, leaf.IPAddresses)
	}
	if !bytes.Equal(leaf.AuthorityKeyId, intermediate.SubjectKeyId) || len(leaf.SubjectKeyId) != 20 || !bytes.Equal(leaf.RawIssuer, intermediate.RawSubject) {
		t.Error("leaf and issuer do not chain up")
	}
	if leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() < 120 || leaf.SerialNumber.BitLen() > 128 {
		t.Errorf("serial %s", leaf.SerialNumber)
	}
	if leaf.SignatureAlgorithm != x509.ECDSAWithSHA256 || len(leaf.Extensions) != 6 {
		t.Errorf("%s, %d extensions", leaf.SignatureAlgorithm, len(leaf.Extensions))
	}
}

// one issues a leaf for the rows that look at a single field of it.
func one(t testing.TB, r *Request) (f *fixture, leaf, intermediate *x509.Certificate) {
	t.Helper()
	f = open(t, Config{})
	leaf, intermediate, _ = f.issue(t, time.Now(), r)
	return f, leaf, intermediate
}

func TestSpec_B01_OneURISAN(t *testing.T) {
	_, leaf, _ := one(t, &Request{ID: id("/ns/a/b")})
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/ns/a/b" {
		t.Error(leaf.URIs)
	}
}

func TestSpec_B02_NonRootPath(t *testing.T) {
	f := open(t, Config{})
	_, err := f.Sign(time.Now(), &Request{ID: testDomain.ID(), Key: parseKey(t, newKey(t))})
	wantReason(t, err, ReasonID)
	_, err = f.Sign(time.Now(), &Request{Key: parseKey(t, newKey(t))})
	wantReason(t, err, ReasonID)
}

func TestSpec_B03_SANCriticalWithoutSubject(t *testing.T) {
	_, leaf, _ := one(t, &Request{})
	if string(leaf.RawSubject) != "\x30\x00" || !critical(leaf, 17) {
		t.Error("want an empty subject and a critical san")
	}
}

func TestSpec_B05_NotAnAuthority(t *testing.T) {
	_, leaf, _ := one(t, &Request{})
	if leaf.IsCA || !leaf.BasicConstraintsValid {
		t.Error("want basic constraints without ca")
	}
}

func TestSpec_B06_KeyUsageIsDigitalSignature(t *testing.T) {
	_, leaf, _ := one(t, &Request{})
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature || !critical(leaf, 15) {
		t.Error(leaf.KeyUsage)
	}
}

func TestSpec_B07_NoSigningUsage(t *testing.T) {
	_, leaf, _ := one(t, &Request{})
	if leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		t.Error(leaf.KeyUsage)
	}
}

func TestSpec_B08_ExtendedKeyUsageBoth(t *testing.T) {
	_, leaf, _ := one(t, &Request{})
	if len(leaf.ExtKeyUsage) != 2 || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		t.Error(leaf.ExtKeyUsage)
	}
}

func TestSpec_B17_ChainOrder(t *testing.T) {
	f, leaf, intermediate := one(t, &Request{})
	roots, _ := f.Bundle()
	if leaf.IsCA || !intermediate.IsCA || intermediate.Equal(roots[0]) {
		t.Error("want leaf, then intermediate, without the root")
	}
	if err := leaf.CheckSignatureFrom(intermediate); err != nil {
		t.Error(err)
	}
}

func TestSpec_B18_KeyIdentifiersChainUp(t *testing.T) {
	f, leaf, intermediate := one(t, &Request{})
	roots, _ := f.Bundle()
	if !bytes.Equal(leaf.AuthorityKeyId, intermediate.SubjectKeyId) || !bytes.Equal(intermediate.AuthorityKeyId, roots[0].SubjectKeyId) {
		t.Error("identifiers do not chain")
	}
	if bytes.Equal(leaf.SubjectKeyId, intermediate.SubjectKeyId) || len(leaf.SubjectKeyId) == 0 {
		t.Error("subject key identifier")
	}
}

// Row B8: how far a new leaf lies in the past. A verifier 4 minutes behind
// accepts one of the default life, and never more than a quarter of a short
// life is backdated.
func TestV_B8_Backdating(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	for ttl, want := range map[time.Duration]time.Duration{
		0:                5 * time.Minute,
		24 * time.Hour:   5 * time.Minute,
		8 * time.Minute:  2 * time.Minute,
		time.Minute:      15 * time.Second,
		10 * time.Second: 2 * time.Second,
	} {
		leaf, intermediate, _ := f.issue(t, now, &Request{TTL: ttl})
		got := now.Sub(leaf.NotBefore)
		if got > want+time.Second/2 && ttl > 10*time.Second || got < want-2*time.Second || got < 0 { // rounded to seconds twice
			t.Errorf("ttl %s: backdated by %s, want %s", ttl, got, want)
		}
		if leaf.NotBefore.Before(intermediate.NotBefore) {
			t.Errorf("ttl %s: leaf older than its issuer", ttl)
		}
		if ttl == 0 {
			if err := f.verify(now.Add(-4*time.Minute), leaf, intermediate); err != nil {
				t.Errorf("4 minutes behind: %v", err)
			}
		}
	}
}

// Who is told what a life may be gets no other.
func TestBoundsOfLife(t *testing.T) {
	f := open(t, Config{})
	leaf, _, _ := f.issue(t, time.Now(), &Request{TTL: time.Hour, Backdate: time.Minute, MinLife: time.Hour, MaxLife: time.Hour})
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life != time.Hour {
		t.Errorf("a life of %s", life)
	}
	_, err := f.Sign(time.Now(), &Request{ID: id("/app"), Key: parseKey(t, newKey(t)), TTL: 30 * time.Minute, MinLife: time.Hour})
	wantReason(t, err, ReasonTTL)
	// What is too short because the authority ends is no fault of the request.
	f = open(t, Config{IntermediateLife: 48 * time.Hour, MaxTTL: 24 * time.Hour})
	late := time.Now().Add(30 * time.Hour)
	if _, err = f.Sign(late, &Request{ID: id("/app"), Key: parseKey(t, newKey(t)), TTL: 24 * time.Hour, MinLife: 23 * time.Hour}); !errors.Is(err, ErrNoAuthority) {
		t.Errorf("beyond the authority's end: %v", err)
	}
}

func TestSpec_B09_NotBeforeBackdated(t *testing.T) {
	_, leaf, _ := one(t, &Request{})
	if time.Since(leaf.NotBefore) < 10*time.Second {
		t.Error(leaf.NotBefore)
	}
}

func TestSpec_B10_NotAfterWithinPolicy(t *testing.T) {
	f := open(t, Config{MaxTTL: 2 * time.Hour})
	now := time.Now()
	leaf, _, _ := f.issue(t, now, &Request{TTL: 24 * time.Hour})
	if life := leaf.NotAfter.Sub(now); life > 2*time.Hour || life < 2*time.Hour-time.Second {
		t.Errorf("life of %s", life)
	}
	if counter(t, f, "meshid_ca_svid_ttl_shrunk_total", "max_ttl") != 1 {
		t.Error("shrunk without a trace")
	}
	for _, ttl := range []time.Duration{-1, 1, -time.Hour, MinTTL - 1} {
		_, err := f.Sign(now, &Request{ID: id("/a"), Key: parseKey(t, newKey(t)), TTL: ttl})
		wantReason(t, err, ReasonTTL)
	}
}

// C07: whatever the moment and the life asked for, the leaf ends before its
// issuer, or there is none.
func TestSpec_C07_NeverOutlivesTheIssuer(t *testing.T) {
	f := open(t, Config{})
	a := f.state.Load().active
	for _, left := range []time.Duration{
		-time.Hour, -time.Second, 0, 1, time.Second, 5 * time.Second, 59 * time.Second, time.Minute,
		61 * time.Second, 65 * time.Second, 66 * time.Second, 70 * time.Second, time.Hour, 30 * time.Hour, 6 * 24 * time.Hour,
	} {
		for _, ttl := range []time.Duration{0, MinTTL, time.Minute, time.Hour, 24 * time.Hour, 1 << 60} {
			for _, fraction := range []time.Duration{0, 1, 499 * time.Millisecond, time.Second - 1} {
				now := a.notAfter.Add(-left + fraction)
				notBefore, notAfter, shrunk, err := f.choose(a, now, ttl, 0)
				if err != nil {
					if !errors.Is(err, ErrNoAuthority) || left > maxMargin+minRemaining+time.Second {
						t.Errorf("%s before the end: %v", left, err)
					}
					continue
				}
				if !notAfter.Before(a.notAfter) || notBefore.Before(a.notBefore) || notBefore.After(now) || notAfter.Sub(now) < minRemaining {
					t.Errorf("%s before the end, ttl %s: %s to %s", left, ttl, notBefore, notAfter)
				}
				if ttl <= f.cfg.MaxTTL && (shrunk == shrunkByAuthority) != notAfter.Equal(a.leafEnd) {
					t.Errorf("%s before the end, ttl %s: shrunk %d", left, ttl, shrunk)
				}
			}
		}
	}
}

func TestSpec_B11_SerialsAreRandomAndUnique(t *testing.T) {
	seen := make(map[[16]byte]bool, 100_000)
	var ones [16 * 8]int
	for range 100_000 {
		var s [16]byte
		newSerial(&s)
		if seen[s] || s[0]&0x80 != 0 || s[0] == 0 {
			t.Fatalf("serial %x", s)
		}
		seen[s] = true
		for bit := range ones {
			ones[bit] += int(s[bit/8] >> (7 - bit%8) & 1)
		}
	}
	free := 0
	for _, n := range ones {
		if n > 49_000 && n < 51_000 {
			free++
		}
	}
	if free < 126 {
		t.Errorf("%d random bits, want 126", free)
	}
}

// Row B2: what differs between two leaves of one entry.
func TestV_B2_OnlyKeySerialValiditySKIDiffer(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	blank := func(c *x509.Certificate) []byte {
		tbs := bytes.Clone(c.RawTBSCertificate)
		for _, part := range [][]byte{c.SerialNumber.Bytes(), c.RawSubjectPublicKeyInfo, c.SubjectKeyId} {
			if bytes.Count(tbs, part) != 1 {
				t.Fatalf("%x is not there once", part)
			}
			tbs = bytes.Replace(tbs, part, make([]byte, len(part)), 1)
		}
		for _, at := range []time.Time{c.NotBefore, c.NotAfter} {
			tbs = bytes.Replace(tbs, []byte(at.UTC().Format("060102150405Z")), make([]byte, 13), 1)
		}
		return tbs
	}
	first, _, _ := f.issue(t, now, &Request{DNSNames: []string{"a.b"}})
	second, _, _ := f.issue(t, now.Add(90*time.Second), &Request{DNSNames: []string{"a.b"}, TTL: 2 * time.Hour})
	if diff := cmp.Diff(blank(first), blank(second)); diff != "" {
		t.Error(diff)
	}
}

func TestSpec_B19_OpenSSLVerify(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("REQUIRE_ALL") != "" {
			t.Fatal(err)
		}
		t.Skip("openssl is not installed")
	}
	for _, constraints := range []bool{false, true} {
		f := open(t, Config{NameConstraints: constraints})
		roots, _ := f.Bundle()
		leaf, intermediate, _ := f.issue(t, time.Now(), &Request{DNSNames: []string{"web.shop.internal"}})
		dir := t.TempDir()
		for name, cert := range map[string]*x509.Certificate{"root": roots[0], "intermediate": intermediate, "leaf": leaf} {
			text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, purpose := range []string{"sslclient", "sslserver"} {
			command := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", purpose,
				"-CAfile", "root", "-untrusted", "intermediate", "leaf")
			command.Dir = dir
			if out, err := command.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", purpose, err, out)
			}
		}
		// And a leaf is no authority.
		command := exec.CommandContext(t.Context(), openssl, "x509", "-in", "leaf", "-noout", "-purpose")
		command.Dir = dir
		out, err := command.CombinedOutput()
		if err != nil || strings.Contains(string(out), "SSL client CA : Yes") || !strings.Contains(string(out), "SSL client : Yes") {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

func TestSpec_B20_EveryKeyPassesGoSPIFFE(t *testing.T) {
	f := open(t, Config{})
	for name, key := range allowedKeys(t) {
		leaf, intermediate, _ := f.issue(t, time.Now(), &Request{Key: parseKey(t, key)})
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		svid, err := x509svid.ParseRaw(slices.Concat(leaf.Raw, intermediate.Raw), der)
		if err != nil || svid.ID != id("/ns/shop/app/web") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A03 of the suite: 2048 bytes are issued, 2049 are not.
func TestSpec_A03_LongestID(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	prefix := len("spiffe://example.org/")
	leaf, intermediate, _ := f.issue(t, now, &Request{ID: id("/" + strings.Repeat("a", 2048-prefix))})
	if got := leaf.URIs[0].String(); len(got) != 2048 {
		t.Errorf("%d bytes", len(got))
	}
	if err := f.verify(now, leaf, intermediate); err != nil {
		t.Error(err)
	}
	_, err := f.Sign(now, &Request{ID: id("/" + strings.Repeat("a", 2049-prefix)), Key: parseKey(t, newKey(t))})
	wantReason(t, err, ReasonID)
	// The longest certificate there can be still has a well-formed head.
	names := make([]string, maxDNSNames)
	for i := range names {
		names[i] = strings.Repeat(strings.Repeat("a", 62)+string(rune('a'+i%26))+".", 3) + strings.Repeat("b", 60-i/26) + string(rune('a'+i%26))
	}
	leaf, intermediate, _ = f.issue(t, now, &Request{DNSNames: names, Key: parseKey(t, rsaKey()), ID: id("/" + strings.Repeat("a", 2048-prefix))})
	checkProfile(t, leaf, intermediate, names)
}

func TestSignRefusesNames(t *testing.T) {
	f := open(t, Config{})
	for _, bad := range []spiffeid.ID{
		id("/meshid/ca"), id("/..."), id("/a/..../b"),
		spiffeid.RequireFromString("spiffe://other.org/a"),
		{},
	} {
		_, err := f.Sign(time.Now(), &Request{ID: bad, Key: parseKey(t, newKey(t))})
		wantReason(t, err, ReasonID)
	}
	long := strings.Repeat("a", 64)
	for _, bad := range [][]string{
		{""},
		{"a..b"},
		{".a"},
		{"a."},
		{"A.b"},
		{"a b"},
		{"a\x00.b"},
		{"spiffe://example.org/a"},
		{"a/b"},
		{"a@b"},
		{"é.org"},
		{"10.0.0.1"},
		{"::1"},
		{long},
		{"a.*.b"},
		{"*"},
		{"-a"},
		{"a-.b"},
		{"a.b", "a.b"},
		make([]string, maxDNSNames+1),
		{strings.Repeat("abc.", 64) + "de"},
	} {
		_, err := f.Sign(time.Now(), &Request{ID: id("/a"), DNSNames: bad, Key: parseKey(t, newKey(t))})
		wantReason(t, err, ReasonDNS)
	}
	_, err := f.Sign(time.Now(), &Request{ID: id("/a")})
	wantReason(t, err, ReasonCSR)
	if n := counter(t, f, "meshid_ca_sign_refused_total", ReasonDNS); n != 21 {
		t.Errorf("%v refusals counted", n)
	}
}

// Row F47 of the fault suite: the form of times changes with 2050.
func TestFault_F47_TimesBeyond2049(t *testing.T) {
	for _, at := range []time.Time{
		time.Date(2049, 12, 31, 23, 30, 0, 0, time.UTC),
		time.Date(2038, 1, 19, 3, 14, 7, 0, time.UTC),
		time.Date(2050, 1, 1, 0, 10, 0, 0, time.UTC),
		time.Date(2068, 2, 29, 23, 59, 59, 0, time.UTC),
	} {
		a := testAuthority(t, at)
		l := leaf{notBefore: at.Add(-5 * time.Minute), notAfter: at.Add(time.Hour), id: "spiffe://example.org/a", key: parseKey(t, newKey(t))}
		newSerial(&l.serial)
		certificate := signLeaf(t, a, &l)
		if err := a.lintLeaf(&l, at, certificate); err != nil {
			t.Errorf("%s: %v", at, err)
		}
		got := parse(t, certificate)
		if !got.NotBefore.Equal(l.notBefore) || !got.NotAfter.Equal(l.notAfter) {
			t.Errorf("%s: %s to %s", at, got.NotBefore, got.NotAfter)
		}
	}
}

// What Sign fills in, and that the record tells the truth about the certificate.
func TestSignFillsTheRecord(t *testing.T) {
	f := open(t, Config{Instance: "ca-7"})
	now := time.Now()
	key := newKey(t)
	record := &ledgerv1.Record{Kind: ledgerv1.Kind_KIND_FIRST, Instance: "docker:1", Node: &ledgerv1.NodeRef{Id: "n"}}
	signed, err := f.Sign(now, &Request{ID: id("/a"), DNSNames: []string{"a.b"}, Key: parseKey(t, key), Record: record})
	if err != nil {
		t.Fatal(err)
	}
	durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
	if err != nil {
		t.Fatal(err)
	}
	cert, r := parse(t, durable[0].Chain()[0]), durable[0].Record()
	fingerprint, spki := sha256.Sum256(cert.Raw), sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	switch c := r.Certificate; {
	case !bytes.Equal(c.Serial, cert.SerialNumber.Bytes()), !bytes.Equal(c.Sha256, fingerprint[:]), !bytes.Equal(c.SpkiSha256, spki[:]),
		!c.NotBefore.AsTime().Equal(cert.NotBefore), !c.NotAfter.AsTime().Equal(cert.NotAfter),
		c.KeyAlgorithm != "EC-P256", !slices.Equal(c.DnsNames, cert.DNSNames):
		t.Errorf("certificate %v", c)
	}
	authority := f.Authorities()[1]
	issuer := sha256.Sum256(authority.Certificate.Raw)
	switch {
	case r.Version != 1, r.Event != ledgerv1.Event_EVENT_ISSUE, r.Outcome != ledgerv1.Outcome_OUTCOME_SUCCESS,
		r.TrustDomain != "example.org", r.SpiffeId != "spiffe://example.org/a", r.CaInstance != "ca-7",
		r.Instance != "docker:1", r.Node.Id != "n", !r.Time.AsTime().Equal(now):
		t.Errorf("record %v", r)
	case r.Authority.Id != authority.ID, r.Authority.Role != RoleIntermediate, !bytes.Equal(r.Authority.Sha256, issuer[:]), r.Authority.BundleSequence != 1:
		t.Errorf("authority %v", r.Authority)
	}
	if counter(t, f, "meshid_ca_svid_signed_total", "first") != 1 {
		t.Error("not counted")
	}
}

// Concurrent signatures and rotations: no leaf is signed by one authority and
// sent with the certificate of another.
func TestSignConcurrently(t *testing.T) {
	f := open(t, Config{})
	key := parseKey(t, newKey(t))
	var signers sync.WaitGroup
	for range 4 {
		signers.Go(func() {
			for range 50 {
				now := time.Now()
				signed, err := f.Sign(now, &Request{ID: id("/a"), Key: key})
				if err != nil {
					t.Error(err)
					return
				}
				durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
				if err != nil {
					t.Error(err)
					return
				}
				chain := durable[0].Chain()
				leaf, err1 := x509.ParseCertificate(chain[0])
				intermediate, err2 := x509.ParseCertificate(chain[1])
				if err := errors.Join(err1, err2); err != nil {
					t.Error(err)
					return
				}
				if err := f.verify(now, leaf, intermediate); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 10 {
		if _, err := f.RotateIntermediate(t.Context()); err != nil {
			t.Error(err)
		}
	}
	signers.Wait()
}
