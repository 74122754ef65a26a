package sds

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	mathrand "math/rand/v2"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"weak"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

func countCertificates(b []byte) int {
	n := 0
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return n
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return 0
		}
		n++
	}
}

func TestKindOf(t *testing.T) {
	for name, want := range map[string]kind{
		"default": kindLeaf, "ROOTCA": kindRoot, "ALL": kindRoot,
		"spiffe://a.test": kindRoot, "spiffe://a.test/x": kindLeaf,
		"": kindUnknown, "*": kindUnknown, "Default": kindUnknown, "rootca": kindUnknown, "spiffe://": kindUnknown,
		"spiffe://a.test/": kindUnknown, "spiffe://A.test": kindUnknown, "spiffe://a.test//x": kindUnknown,
		"spiffe://a.test/../x": kindUnknown, "SPIFFE://a.test/x": kindUnknown, "spiffe://a.test/x?y": kindUnknown,
		"spiffe://a.test:1/x": kindUnknown, "default\x00": kindUnknown, "ROOTCA\n": kindUnknown,
		"file-root:/etc/passwd": kindUnknown, "spiffe://a.test/" + strings.Repeat("x", 2048): kindUnknown,
	} {
		if got := kindOf(name); got != want {
			t.Errorf("%q is of kind %d, want %d", name, got, want)
		}
	}
}

// Rules 2.12 of the server: what a proxy would accept and fail with later is not
// sent.
func TestCacheLeaf_ChecksWhatEnvoyDoesNot(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	inter := root.Intermediate()
	other := identitytest.NewAuthority(t, "a.test")
	now := time.Now()
	good, strange := inter.SVID("/x"), other.Intermediate().SVID("/x")
	proven := func(s *identity.SVID, by *identitytest.Authority) *identity.SVID {
		t.Helper()
		chain, err := parse(s.Chain)
		if err != nil {
			t.Fatal(err)
		}
		p, err := new(identity.Chains).Verify(now, chain, []*x509.Certificate{by.Cert}, x509.ExtKeyUsageClientAuth)
		if err != nil || p == nil {
			t.Fatalf("proof %v, %v", p, err)
		}
		return &identity.SVID{ID: s.ID, Chain: s.Chain, Proof: p, Key: s.Key, Entry: s.Entry}
	}
	for _, tc := range []struct {
		name string
		svid *identity.SVID
		want withheld // "" if it is good
	}{
		{"good with intermediate", good, ""},
		{"good from root", root.SVID("/x"), ""},
		{"another key", &identity.SVID{ID: good.ID, Chain: good.Chain, Key: identitytest.NewKey(t)}, withheldKey},
		{"no key", &identity.SVID{ID: good.ID, Chain: good.Chain}, withheldChain},
		{"no chain", &identity.SVID{ID: good.ID, Key: good.Key}, withheldChain},
		{"intermediate first", &identity.SVID{ID: good.ID, Chain: []*identity.Certificate{good.Chain[1], good.Chain[0]}, Key: good.Key}, withheldKey},
		{"intermediate missing", &identity.SVID{ID: good.ID, Chain: good.Chain[:1], Key: good.Key}, withheldChain},
		{"unrelated certificate in the chain", &identity.SVID{ID: good.ID, Chain: append(good.Chain[:2:2], identity.NewCertificate(other.Cert)), Key: good.Key}, withheldChain},
		{"hole in the chain", &identity.SVID{ID: good.ID, Chain: []*identity.Certificate{good.Chain[0], nil}, Key: good.Key}, withheldChain},
		{"another ID", &identity.SVID{ID: spiffeid.RequireFromString("spiffe://a.test/y"), Chain: good.Chain, Key: good.Key}, withheldProfile},
		{"root of another authority", other.SVID("/x"), withheldChain},
		{"another trust domain", identitytest.NewAuthority(t, "b.test").SVID("/x"), withheldBundle},
		{"two URIs", root.SVID("/x", func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "a.test", Path: "/admin"})
		}), withheldProfile},
		{"no URI", root.SVID("/x", func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"x"} }), withheldProfile},
		{"CA", root.SVID("/x", func(c *x509.Certificate) { c.IsCA = true }), withheldProfile},
		{"may sign certificates", root.SVID("/x", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), withheldProfile},
		{"no digital signature", root.SVID("/x", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), withheldProfile},
		{"expired", root.SVID("/x", func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), withheldExpired},
		{"not yet valid", root.SVID("/x", func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), withheldNotYetValid},
		{"good with proof", proven(good, root), ""},
		{"proof of another chain", &identity.SVID{
			ID: good.ID, Chain: append(good.Chain[:2:2], identity.NewCertificate(other.Cert)), Proof: proven(good, root).Proof, Key: good.Key,
		}, withheldChain},
		{"proof of another leaf", &identity.SVID{
			ID: good.ID, Chain: []*identity.Certificate{strange.Chain[0], good.Chain[1]}, Proof: proven(good, root).Proof, Key: strange.Key,
		}, withheldChain},
		{"proof for another root", proven(strange, other), withheldChain},
		{"proof of what has another key", &identity.SVID{
			ID: good.ID, Chain: good.Chain, Proof: proven(good, root).Proof, Key: identitytest.NewKey(t),
		}, withheldKey},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCache()
			s, refusal := c.leaf(tc.svid, root.Bundle(1), now)
			switch {
			case tc.want == "" && refusal != nil:
				t.Fatal(refusal)
			case tc.want == "" && s == nil:
				t.Fatal("no secret")
			case tc.want != "" && refusal == nil:
				t.Fatal("accepted")
			case tc.want != "" && refusal.reason != tc.want:
				t.Fatalf("reason %s (%v), want %s", refusal.reason, refusal, tc.want)
			}
		})
	}
}

func TestCacheLeaf_KeyTypes(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := newCache()
	for _, v := range []*identity.SVID{root.SVIDFor(ed, "/x"), root.SVIDFor(rsaKey, "/x"), root.SVIDFor(p384, "/x")} {
		s, refusal := c.leaf(v, root.Bundle(1), time.Now())
		if refusal != nil {
			t.Fatal(refusal)
		}
		a, err := s.named(nameDefault)
		if err != nil {
			t.Fatal(err)
		}
		if err := guardAny(a); err != nil {
			t.Errorf("%T: %v", v.Key, err)
		}
	}
}

// A leaf is checked again when the bundle is another, or the time.
func TestCacheLeaf_ChecksAgain(t *testing.T) {
	root, next := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "a.test")
	v, now := root.SVID("/x"), time.Now()
	c := newCache()
	both := root.Bundle(1, next)
	first, refusal := c.leaf(v, both, now)
	if refusal != nil {
		t.Fatal(refusal)
	}
	if _, refusal := c.leaf(v, next.Bundle(2), now); refusal == nil || refusal.reason != withheldChain {
		t.Fatalf("its root has gone: %v", refusal)
	}
	again, refusal := c.leaf(v, both, now)
	if refusal != nil || again != first {
		t.Fatalf("its root is back: %v, same secret %t", refusal, again == first)
	}
	if _, refusal := c.leaf(v, both, v.NotAfter()); refusal == nil || refusal.reason != withheldExpired {
		t.Fatalf("it has expired: %v", refusal)
	}
	broken := &identity.Bundle{TrustDomain: root.TrustDomain, Roots: []*x509.Certificate{nil, {}, identitytest.X509(v.Chain[0])}}
	if _, refusal := c.leaf(v, broken, now); refusal == nil || refusal.reason != withheldChain {
		t.Fatalf("a bundle without a CA: %v", refusal)
	}
	if _, refusal := c.leaf(v, nil, now); refusal == nil || refusal.reason != withheldBundle {
		t.Fatalf("no bundle: %v", refusal)
	}
}

// Each secret is encoded once, whatever the number of streams and names, and what
// differs between names is the name.
func TestSecretIsShared(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	v, b, now := root.SVID("/x"), root.Bundle(1), time.Now()
	c := newCache()
	one, _ := c.leaf(v, b, now)
	two, _ := c.leaf(v, b, now)
	if one != two {
		t.Error("encoded twice")
	}
	first, err := one.named(nameDefault)
	if err != nil {
		t.Fatal(err)
	}
	same, err := one.named(nameDefault)
	if err != nil {
		t.Fatal(err)
	}
	if first != same {
		t.Error("named twice")
	}
	other, err := one.named(v.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	a, z := secretsOf(t, []*anypb.Any{first}), secretsOf(t, []*anypb.Any{other})
	x, y := a[nameDefault], z[v.ID.String()]
	y.Name = x.GetName()
	if !proto.Equal(x, y) {
		t.Error("the same secret differs under another name")
	}
	if _, err := one.named(nameRoot); err == nil {
		t.Error("a leaf got the name of a trust bundle")
	}
	bundle, refusal := c.root(b)
	if refusal != nil {
		t.Fatal(refusal)
	}
	if _, err := bundle.named(nameDefault); err == nil {
		t.Error("a trust bundle got the name of a leaf")
	}
	if _, err := bundle.named("*"); err == nil {
		t.Error("a trust bundle got a name of no kind")
	}
}

// A certificate with its key is encoded around the time that it is sent, always to
// the same, and not when the SVID has gone.
func TestV_I5_EncodedOnlyWhileItIsSent(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	v := root.SVID("/x")
	s, refusal := newCache().leaf(v, root.Bundle(1), time.Now())
	if refusal != nil {
		t.Fatal(refusal)
	}
	first, err := s.named(nameDefault)
	if err != nil {
		t.Fatal(err)
	}
	want, sent := bytes.Clone(first.GetValue()), weak.Make(first)
	collect := func(what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !done(); runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
			runtime.GC()
		}
	}
	runtime.KeepAlive(first)
	collect("what was sent is kept", func() bool { return sent.Value() == nil })
	again, err := s.named(nameDefault)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.GetValue(), want) {
		t.Error("encoded to something else")
	}
	runtime.KeepAlive(v)
	collect("named without its SVID", func() bool { _, err := s.named(nameDefault); return err != nil })
}

// TestV_I5_CacheForgets: what the agent has dropped, keys included, is dropped here.
func TestV_I5_CacheForgets(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	c := newCache()
	b := root.Bundle(1)
	kept := root.SVID("/kept")
	for range 50 {
		if _, refusal := c.leaf(root.SVID("/x"), b, time.Now()); refusal != nil {
			t.Fatal(refusal)
		}
	}
	keptSecret, _ := c.leaf(kept, b, time.Now())
	// Cleanups run in a goroutine of the runtime some time after a collection.
	for deadline := time.Now().Add(10 * time.Second); c.svids.len() > 1 && time.Now().Before(deadline); {
		runtime.GC()
		runtime.Gosched()
	}
	if n := c.svids.len(); n != 1 {
		t.Errorf("%d entries for one SVID", n)
	}
	if again, _ := c.leaf(kept, b, time.Now()); again != keptSecret {
		t.Error("forgot an SVID that is in use")
	}
	runtime.KeepAlive(kept)
}

func TestGraveyardIsBounded(t *testing.T) {
	g := newGraveyard()
	if _, err := g.tombstone("spiffe://a.test/x"); err != nil {
		t.Fatal(err)
	}
	for len(g.known) < maxTombstones {
		g.known[rand.Text()] = nil
	}
	if _, err := g.tombstone("spiffe://a.test/y"); err != nil {
		t.Fatal(err)
	}
	if n := len(g.known); n > maxTombstones {
		t.Errorf("%d tombstones", n)
	}
}

func TestTombstone(t *testing.T) {
	g := newGraveyard()
	s, err := g.tombstone("spiffe://a.test/x")
	if err != nil {
		t.Fatal(err)
	}
	again, err := g.tombstone("spiffe://a.test/x")
	if err != nil {
		t.Fatal(err)
	}
	if s != again {
		t.Error("made twice: it would be sent twice")
	}
	a, err := s.named(nameDefault)
	if err != nil {
		t.Fatal(err)
	}
	secret := secretsOf(t, []*anypb.Any{a})[nameDefault].GetTlsCertificate()
	block, _ := pem.Decode(secret.GetCertificateChain().GetInlineBytes())
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !leaf.NotAfter.Before(time.Now()) {
		t.Errorf("expires at %s", leaf.NotAfter)
	}
	if diff := cmp.Diff([]string{"spiffe://a.test/x"}, uriStrings(leaf)); diff != "" {
		t.Error(diff)
	}
	if uris, err := rawURIs(leaf); err != nil || len(uris) != 1 {
		t.Errorf("%q %v", uris, err)
	}
	if leaf.IsCA {
		t.Error("is a CA")
	}
}

func uriStrings(c *x509.Certificate) []string {
	var s []string
	for _, u := range c.URIs {
		s = append(s, u.String())
	}
	return s
}

// Versions are hashes of the contents: another server, or this one after a
// restart, makes the same.
func TestSpec_S08_VersionsAreStable(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	v, now := root.SVID("/x"), time.Now()
	copied := *v
	b1, b2 := root.Bundle(1), root.Bundle(7)
	one, _ := newCache().leaf(v, b1, now)
	two, _ := newCache().leaf(&copied, b2, now)
	if one.version != two.version {
		t.Error("the same SVID has two versions")
	}
	r1, _ := newCache().root(b1)
	r2, _ := newCache().root(b2)
	if r1.version != r2.version {
		t.Error("the same bundle has two versions")
	}
	other, _ := newCache().leaf(root.SVID("/x"), b1, now)
	if other.version == one.version {
		t.Error("two SVIDs have the same version")
	}
	federated := map[spiffeid.TrustDomain]*identity.Bundle{}
	for _, td := range []string{"b.test", "c.test", "d.test"} {
		f := identitytest.NewAuthority(t, td)
		federated[f.TrustDomain] = f.Bundle(1)
	}
	versions := make(map[string]bool)
	for range 20 {
		s, refusal := newCache().all(&identity.Snapshot{Bundle: b1, Federated: federated})
		if refusal != nil {
			t.Fatal(refusal)
		}
		versions[s.version] = true
	}
	if len(versions) != 1 {
		t.Errorf("ALL has %d versions", len(versions))
	}
}

// TestFault_F54_OneBadDomainIsIsolated: a federated bundle that is not good costs
// only its own trust domain, the local one is never left out.
func TestFault_F54_OneBadDomainIsIsolated(t *testing.T) {
	a, b, c := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test"), identitytest.NewAuthority(t, "c.test")
	empty := &identity.Bundle{TrustDomain: c.TrustDomain, Sequence: 1}
	all, refusal := newCache().all(&identity.Snapshot{
		Bundle:    a.Bundle(1),
		Federated: map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1), c.TrustDomain: empty},
	})
	if refusal != nil {
		t.Fatal(refusal)
	}
	if diff := cmp.Diff([]string{"a.test", "b.test"}, domainsOf(t, all)); diff != "" {
		t.Error(diff)
	}
	// A bundle that says that it is of another domain than the one it is filed
	// under, or that pretends to be the local one.
	all, refusal = newCache().all(&identity.Snapshot{
		Bundle:    a.Bundle(1),
		Federated: map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: c.Bundle(1), a.TrustDomain: a.Bundle(2, c), c.TrustDomain: nil},
	})
	if refusal != nil {
		t.Fatal(refusal)
	}
	if diff := cmp.Diff([]string{"a.test"}, domainsOf(t, all)); diff != "" {
		t.Error(diff)
	}
	if _, refusal = newCache().all(&identity.Snapshot{
		Bundle:    &identity.Bundle{TrustDomain: a.TrustDomain},
		Federated: map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1)},
	}); refusal == nil {
		t.Error("ALL without the local trust domain")
	}
	// Large: 200 domains with 3 roots each.
	federated := map[spiffeid.TrustDomain]*identity.Bundle{}
	for i := range 200 {
		td := spiffeid.RequireTrustDomainFromString("d" + strings.Repeat("x", i))
		federated[td] = &identity.Bundle{TrustDomain: td, Roots: []*x509.Certificate{a.Cert, b.Cert, c.Cert}}
	}
	all, refusal = newCache().all(&identity.Snapshot{Bundle: a.Bundle(1), Federated: federated})
	if refusal != nil {
		t.Fatal(refusal)
	}
	if n := len(domainsOf(t, all)); n != 201 {
		t.Errorf("%d domains", n)
	}
}

// TestNewTrustDomain_TakesOnlyCAs: a leaf as an anchor would vouch for itself.
func TestNewTrustDomain_TakesOnlyCAs(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	leaf := identitytest.X509(a.SVID("/x").Chain[0])
	if _, err := newTrustDomain(&identity.Bundle{TrustDomain: a.TrustDomain, Roots: []*x509.Certificate{leaf, nil, {}}}); err == nil {
		t.Error("a bundle without a CA was encoded")
	}
	d, err := newTrustDomain(&identity.Bundle{TrustDomain: a.TrustDomain, Roots: []*x509.Certificate{leaf, a.Cert, a.Cert, nil}})
	if err != nil {
		t.Fatal(err)
	}
	if n := countCertificates(d.roots); n != 1 {
		t.Errorf("%d anchors", n)
	}
}

func domainsOf(t *testing.T, s *secret) []string {
	t.Helper()
	a, err := s.named(nameAll)
	if err != nil {
		t.Fatal(err)
	}
	config := &tlsv3.SPIFFECertValidatorConfig{}
	v := secretsOf(t, []*anypb.Any{a})[nameAll].GetValidationContext()
	if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range config.GetTrustDomains() {
		names = append(names, d.GetName())
	}
	return names
}

// TestSpec_S15_RootsAlwaysHaveAnAnchor makes secrets from arbitrary bundles, many of
// them broken: each is either refused or has an anchor in each trust domain, and
// guard agrees with the generated code about it.
func TestSpec_S15_RootsAlwaysHaveAnAnchor(t *testing.T) {
	rounds := 100_000
	if testing.Short() {
		rounds = 5_000
	}
	pool := []*x509.Certificate{
		identitytest.NewAuthority(t, "a.test").Cert, identitytest.NewAuthority(t, "b.test").Cert,
		identitytest.X509(identitytest.NewAuthority(t, "a.test").SVID("/x").Chain[0]), nil,
		{},
	}
	tds := []spiffeid.TrustDomain{
		{},
		spiffeid.RequireTrustDomainFromString("a.test"), spiffeid.RequireTrustDomainFromString("b.test"),
		spiffeid.RequireTrustDomainFromString("c.test"),
	}
	names := []string{nameRoot, nameAll, "spiffe://a.test", "spiffe://b.test", "spiffe://c.test"}
	rng := mathrand.New(mathrand.NewPCG(1, 2))
	random := func() *identity.Bundle {
		if rng.IntN(8) == 0 {
			return nil
		}
		b := &identity.Bundle{TrustDomain: tds[rng.IntN(len(tds))], Sequence: rng.Uint64()}
		for range rng.IntN(4) {
			b.Roots = append(b.Roots, pool[rng.IntN(len(pool))])
		}
		return b
	}
	source := identitytest.NewSource(nil)
	s, err := New(source, Options{})
	if err != nil {
		t.Fatal(err)
	}
	served, refusedCount := 0, 0
	for range rounds {
		snapshot := &identity.Snapshot{Bundle: random(), Denied: rng.IntN(2) == 0}
		for range rng.IntN(3) {
			if snapshot.Federated == nil {
				snapshot.Federated = make(map[spiffeid.TrustDomain]*identity.Bundle)
			}
			snapshot.Federated[tds[rng.IntN(len(tds))]] = random()
		}
		name := names[rng.IntN(len(names))]
		session := newSession(rng.IntN(2) == 0, 10)
		session.request(&request{names: []string{name}, subscribe: []string{name}})
		r := session.next(time.Now(), func(sub *subscription) resolution {
			r, _ := s.resolve(snapshot, sub, time.Now())
			return r
		})
		if len(session.blocked) > 0 {
			t.Fatalf("the constructor made what guard has to hold back: %v", session.blocked)
		}
		if r == nil || len(r.items) == 0 {
			refusedCount++
			continue
		}
		served++
		if err := guardAny(r.items[0].any); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if served < rounds/20 || refusedCount < rounds/20 {
		t.Errorf("%d served, %d refused: the test does not test", served, refusedCount)
	}
}

// TestSpec_S15_GuardCatchesEachMutation breaks the builder in each way that would make a
// proxy trust everybody: guard must hold each of them back.
func TestSpec_S15_GuardCatchesEachMutation(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	v := a.SVID("/x")
	rootPEM := encodePEM("CERTIFICATE", a.Cert.Raw)
	certificate := &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(encodePEM("CERTIFICATE", v.Chain[0].Raw)), PrivateKey: inline(encodePEM("PRIVATE KEY", []byte("x"))),
	}}
	spiffe := func(domains ...*tlsv3.SPIFFECertValidatorConfig_TrustDomain) *corev3.TypedExtensionConfig {
		value, err := encode(&tlsv3.SPIFFECertValidatorConfig{TrustDomains: domains})
		if err != nil {
			t.Fatal(err)
		}
		return &corev3.TypedExtensionConfig{Name: validatorName, TypedConfig: &anypb.Any{TypeUrl: validatorType, Value: value}}
	}
	domain := func(name string, roots []byte) *tlsv3.SPIFFECertValidatorConfig_TrustDomain {
		return &tlsv3.SPIFFECertValidatorConfig_TrustDomain{Name: name, TrustBundle: inline(roots)}
	}
	good := func() *tlsv3.CertificateValidationContext {
		return &tlsv3.CertificateValidationContext{SuppressClientCaList: true, CustomValidatorConfig: spiffe(domain("a.test", rootPEM))}
	}
	validation := func(change func(*tlsv3.CertificateValidationContext)) *tlsv3.Secret {
		v := good()
		change(v)
		return &tlsv3.Secret{Name: nameRoot, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}}
	}
	listPEM := []byte("-----BEGIN X509 CRL-----\n")
	withLists := func(roots, lists []byte, change ...func(*tlsv3.CertificateValidationContext)) *tlsv3.Secret {
		v := &tlsv3.CertificateValidationContext{SuppressClientCaList: true, TrustedCa: inline(roots), Crl: inline(lists), OnlyVerifyLeafCertCrl: true}
		for _, f := range change {
			f(v)
		}
		return &tlsv3.Secret{Name: nameRoot, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}}
	}
	for _, tc := range []struct {
		name   string
		secret *tlsv3.Secret
		ok     bool
	}{
		{"good root", validation(func(*tlsv3.CertificateValidationContext) {}), true},
		{"good leaf", &tlsv3.Secret{Name: nameDefault, Type: certificate}, true},
		{"no type", &tlsv3.Secret{Name: nameRoot}, false},
		{"certificate under a root's name", &tlsv3.Secret{Name: nameRoot, Type: certificate}, false},
		{"root under a certificate's name", &tlsv3.Secret{Name: nameDefault, Type: &tlsv3.Secret_ValidationContext{ValidationContext: good()}}, false},
		{"no type under a certificate's name", &tlsv3.Secret{Name: nameDefault}, false},
		{"generic secret", &tlsv3.Secret{Name: nameRoot, Type: &tlsv3.Secret_GenericSecret{GenericSecret: &tlsv3.GenericSecret{}}}, false},
		{"ticket keys", &tlsv3.Secret{Name: nameDefault, Type: &tlsv3.Secret_SessionTicketKeys{SessionTicketKeys: &tlsv3.TlsSessionTicketKeys{}}}, false},
		{"name of no kind", &tlsv3.Secret{Name: "other", Type: certificate}, false},
		{"empty validation context", validation(func(v *tlsv3.CertificateValidationContext) { v.Reset() }), false},
		{"no validator", validation(func(v *tlsv3.CertificateValidationContext) { v.CustomValidatorConfig = nil }), false},
		{"pooled roots", validation(func(v *tlsv3.CertificateValidationContext) {
			v.CustomValidatorConfig, v.TrustedCa = nil, inline(rootPEM)
		}), false},
		{"pooled roots besides", validation(func(v *tlsv3.CertificateValidationContext) { v.TrustedCa = inline(rootPEM) }), false},
		{"revocation lists", validation(func(v *tlsv3.CertificateValidationContext) { v.Crl = inline([]byte("-----BEGIN X509 CRL-----\n")) }), false},
		{"revocation lists with roots", withLists(rootPEM, listPEM), true},
		{"revocation lists without roots", withLists(nil, listPEM), false},
		{"revocation lists with something else for roots", withLists([]byte("x"), listPEM), false},
		{"roots without revocation lists", withLists(rootPEM, nil), false},
		{"roots with something else for revocation lists", withLists(rootPEM, rootPEM), false},
		{"revocation lists for the whole chain", withLists(rootPEM, listPEM, func(v *tlsv3.CertificateValidationContext) { v.OnlyVerifyLeafCertCrl = false }), false},
		{"revocation lists and names", withLists(rootPEM, listPEM, func(v *tlsv3.CertificateValidationContext) {
			v.MatchTypedSubjectAltNames = []*tlsv3.SubjectAltNameMatcher{{SanType: tlsv3.SubjectAltNameMatcher_URI}}
		}), false},
		{"revocation lists and the untrusted", withLists(rootPEM, listPEM, func(v *tlsv3.CertificateValidationContext) {
			v.TrustChainVerification = tlsv3.CertificateValidationContext_ACCEPT_UNTRUSTED
		}), false},
		{"expired allowed", validation(func(v *tlsv3.CertificateValidationContext) { v.AllowExpiredCertificate = true }), false},
		{"untrusted accepted", validation(func(v *tlsv3.CertificateValidationContext) {
			v.TrustChainVerification = tlsv3.CertificateValidationContext_ACCEPT_UNTRUSTED
		}), false},
		{"another validator", validation(func(v *tlsv3.CertificateValidationContext) {
			v.CustomValidatorConfig.Name = "envoy.tls.cert_validator.default"
		}), false},
		{"another configuration", validation(func(v *tlsv3.CertificateValidationContext) {
			v.CustomValidatorConfig.TypedConfig.TypeUrl = TypeURL
		}), false},
		{"no configuration", validation(func(v *tlsv3.CertificateValidationContext) { v.CustomValidatorConfig.TypedConfig = nil }), false},
		{"no trust domain", validation(func(v *tlsv3.CertificateValidationContext) { v.CustomValidatorConfig = spiffe() }), false},
		{"trust domain without name", validation(func(v *tlsv3.CertificateValidationContext) {
			v.CustomValidatorConfig = spiffe(domain("", rootPEM))
		}), false},
		{"trust domain without anchor", validation(func(v *tlsv3.CertificateValidationContext) {
			v.CustomValidatorConfig = spiffe(domain("a.test", rootPEM), domain("b.test", nil))
		}), false},
		{"anchor that is no certificate", validation(func(v *tlsv3.CertificateValidationContext) {
			v.CustomValidatorConfig = spiffe(domain("a.test", []byte("x")))
		}), false},
		{"key missing", &tlsv3.Secret{Name: nameDefault, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(rootPEM),
		}}}, false},
		{"certificate missing", &tlsv3.Secret{Name: nameDefault, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{}}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			value, err := encode(tc.secret)
			if err != nil {
				t.Fatal(err)
			}
			if err := guard(tc.secret.GetName(), value); (err == nil) != tc.ok {
				t.Errorf("guard said %v", err)
			}
			if err := guard(tc.secret.GetName()+"x", value); err == nil {
				t.Error("guard let another name pass")
			}
		})
	}
}

// A bundle with revocation lists is for the validator that reads them, with all of its
// roots and lists and no names; with other trust domains beside it there is none that
// could be used, so that what was served before stays.
func TestV_L3_ListsInTheValidationContext(t *testing.T) {
	a, other := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test")
	second := identitytest.NewAuthority(t, "a.test")
	b := a.Bundle(1, second)
	plain, refusal := newCache().root(a.Bundle(1, second))
	if refusal != nil {
		t.Fatal(refusal)
	}
	b.Lists = []*identity.RevocationList{{Issuer: a.Cert, List: []byte("first")}, {Issuer: second.Cert, List: []byte("second")}}
	c := newCache()
	made, refusal := c.root(b)
	if refusal != nil {
		t.Fatal(refusal)
	}
	named, err := made.named(nameRoot)
	if err != nil {
		t.Fatal(err)
	}
	if err := guard(nameRoot, named.GetValue()); err != nil {
		t.Error(err)
	}
	var got tlsv3.Secret
	if err := proto.Unmarshal(named.GetValue(), &got); err != nil {
		t.Fatal(err)
	}
	want := &tlsv3.Secret{Name: nameRoot, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa:             inline(slices.Concat(encodePEM("CERTIFICATE", a.Cert.Raw), encodePEM("CERTIFICATE", second.Cert.Raw))),
		Crl:                   inline(slices.Concat(encodePEM("X509 CRL", []byte("first")), encodePEM("X509 CRL", []byte("second")))),
		OnlyVerifyLeafCertCrl: true, SuppressClientCaList: true,
	}}}
	if !proto.Equal(want, &got) {
		t.Errorf("%v", &got)
	}
	newer := *b
	newer.Lists = b.Lists[:1]
	again, refusal := c.root(&newer)
	if refusal != nil || again.version == made.version || plain.version == made.version {
		t.Errorf("versions %s, %s and %s; %v", plain.version, made.version, again.version, refusal)
	}
	snapshot := &identity.Snapshot{Bundle: b, Federated: map[spiffeid.TrustDomain]*identity.Bundle{other.TrustDomain: other.Bundle(1)}}
	if _, refusal := c.all(snapshot); refusal == nil || refusal.reason != withheldBundle {
		t.Errorf("with another trust domain: %v", refusal)
	}
	if _, refusal := c.all(&identity.Snapshot{Bundle: b}); refusal != nil {
		t.Error(refusal)
	}
}

// FuzzGuard: guard never passes what the generated code finds unsafe.
func FuzzGuard(f *testing.F) {
	a := identitytest.NewAuthority(f, "a.test")
	c := newCache()
	b := a.Bundle(1)
	root, refusal := c.root(b)
	if refusal != nil {
		f.Fatal(refusal)
	}
	leaf, refusal := c.leaf(a.SVID("/x"), b, time.Now())
	if refusal != nil {
		f.Fatal(refusal)
	}
	b = a.Bundle(2)
	b.Lists = []*identity.RevocationList{{Issuer: a.Cert, List: []byte("list")}}
	listed, refusal := c.root(b)
	if refusal != nil {
		f.Fatal(refusal)
	}
	for s, name := range map[*secret]string{root: nameRoot, listed: nameAll, leaf: nameDefault} {
		named, err := s.named(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(name, named.GetValue())
	}
	f.Fuzz(func(t *testing.T, name string, value []byte) {
		if guard(name, value) != nil {
			return
		}
		s := &tlsv3.Secret{}
		if err := proto.Unmarshal(value, s); err != nil {
			return // a proxy cannot read it either
		}
		if s.GetName() != name {
			t.Fatalf("named %q instead of %q", s.GetName(), name)
		}
		switch kindOf(name) {
		case kindRoot:
			v := s.GetValidationContext()
			if v.GetOnlyVerifyLeafCertCrl() {
				if v.GetCustomValidatorConfig() != nil || v.GetTrustChainVerification() != 0 || v.GetAllowExpiredCertificate() || len(v.GetMatchTypedSubjectAltNames()) > 0 ||
					!bytes.HasPrefix(v.GetTrustedCa().GetInlineBytes(), pemCertificate) || !bytes.HasPrefix(v.GetCrl().GetInlineBytes(), pemList) {
					t.Fatal("unsafe validation context with lists passed")
				}
				return
			}
			if v == nil || v.GetCustomValidatorConfig().GetName() != validatorName || v.GetTrustedCa() != nil {
				t.Fatal("unsafe validation context passed")
			}
			config := &tlsv3.SPIFFECertValidatorConfig{}
			if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
				return
			}
			for _, d := range config.GetTrustDomains() {
				if !bytes.HasPrefix(d.GetTrustBundle().GetInlineBytes(), pemCertificate) {
					t.Fatal("trust domain without anchor passed")
				}
			}
			if len(config.GetTrustDomains()) == 0 {
				t.Fatal("validator without trust domain passed")
			}
		case kindLeaf:
			if s.GetTlsCertificate() == nil {
				t.Fatal("something else than a certificate passed")
			}
		default:
			t.Fatal("a name of no kind passed")
		}
	})
}
