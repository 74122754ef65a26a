package sds

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

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
		TrustedCa:             inline(slices.Concat(encodePEM(nil, "CERTIFICATE", a.Cert.Raw), encodePEM(nil, "CERTIFICATE", second.Cert.Raw))),
		Crl:                   inline(slices.Concat(encodePEM(nil, "X509 CRL", []byte("first")), encodePEM(nil, "X509 CRL", []byte("second")))),
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

// The PEM is the standard library's, byte for byte, at each length of its last line.
func TestEncodePEM(t *testing.T) {
	for n := range 200 {
		der := bytes.Repeat([]byte{byte(n)}, n)
		want := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		if got := encodePEM([]byte("x"), "CERTIFICATE", der); string(got) != "x"+string(want) {
			t.Errorf("%d bytes: %q, want %q", n, got, want)
		}
	}
}
