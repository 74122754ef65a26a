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
	"net/url"
	"runtime"
	"testing"
	"time"
	"weak"

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
	for deadline := time.Now().Add(10 * time.Second); c.svids.Len() > 1 && time.Now().Before(deadline); {
		runtime.GC()
		runtime.Gosched()
	}
	if n := c.svids.Len(); n != 1 {
		t.Errorf("%d entries for one SVID", n)
	}
	if again, _ := c.leaf(kept, b, time.Now()); again != keptSecret {
		t.Error("forgot an SVID that is in use")
	}
	runtime.KeepAlive(kept)
}
