package sds

import (
	"bytes"
	"crypto/x509"
	mathrand "math/rand/v2"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

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
	rootPEM := encodePEM(nil, "CERTIFICATE", a.Cert.Raw)
	certificate := &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(encodePEM(nil, "CERTIFICATE", v.Chain[0].Raw)), PrivateKey: inline(encodePEM(nil, "PRIVATE KEY", []byte("x"))),
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
