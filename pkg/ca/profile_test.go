package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	"github.com/meshid/meshid/test/require"
)

// Every kind of an intermediate's key signs what verifiers accept, and nothing of what
// it signs is released if a bit of it has changed.
func TestIntermediateKeyKinds(t *testing.T) {
	for kind, want := range map[keys.Kind]struct {
		key       string
		signature x509.SignatureAlgorithm
	}{
		keys.P256:    {"EC-P256", x509.ECDSAWithSHA256},
		keys.P384:    {"EC-P384", x509.ECDSAWithSHA384},
		keys.RSA3072: {"RSA-3072", x509.SHA256WithRSA},
		keys.RSA4096: {"RSA-4096", x509.SHA256WithRSA},
		keys.Ed25519: {"Ed25519", x509.PureEd25519},
	} {
		t.Run(string(kind), func(t *testing.T) {
			f, now := open(t, Config{IntermediateKey: kind}), time.Now()
			leaf, intermediate, _ := f.issue(t, now, &Request{})
			if got := algorithmOf(intermediate.PublicKey); got != want.key || leaf.SignatureAlgorithm != want.signature {
				t.Errorf("a key of kind %s signs with %s", got, leaf.SignatureAlgorithm)
			}
			if err := f.verify(now, leaf, intermediate); err != nil {
				t.Error(err)
			}
			a := f.state.Load().active
			if err := a.scheme.verify(leaf.RawTBSCertificate, leaf.Signature); err != nil {
				t.Errorf("a good signature: %v", err)
			}
			for _, damage := range []func(tbs, signature []byte){
				func(tbs, _ []byte) { tbs[len(tbs)-1] ^= 1 },
				func(_, signature []byte) { signature[len(signature)-1] ^= 1 },
			} {
				tbs, signature := bytes.Clone(leaf.RawTBSCertificate), bytes.Clone(leaf.Signature)
				damage(tbs, signature)
				if a.scheme.verify(tbs, signature) == nil {
					t.Error("a damaged certificate verifies")
				}
			}
			// The linter does not take one kind's algorithm for another's.
			for _, other := range []keys.Kind{keys.P256, keys.P384, keys.Ed25519} {
				if other == kind {
					continue
				}
				key, err := other.Generate()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := (&intent{issuerKey: key.Public()}).lint(leaf.Raw); err == nil || !strings.Contains(err.Error(), "rule 3") {
					t.Errorf("for an issuer's key of kind %s: %v", other, err)
				}
			}
			if _, err := f.RotateIntermediate(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := algorithmOf(f.intermediate(t).PublicKey); got != want.key {
				t.Errorf("the next intermediate has a key of kind %s", got)
			}
			f.opensslAccepts(t)
		})
	}
}

// opensslAccepts has another implementation verify a new chain.
func (f *fixture) opensslAccepts(t *testing.T) {
	t.Helper()
	openssl := require.Program(t, "openssl")
	roots, _ := f.Bundle()
	leaf, intermediate, _ := f.issue(t, time.Now(), &Request{})
	dir := t.TempDir()
	for name, cert := range map[string]*x509.Certificate{"root": roots[0], "intermediate": intermediate, "leaf": leaf} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "root", "-untrusted", "intermediate", "leaf")
	command.Dir = dir
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

// A configuration may change between two starts: what signed stays valid.
func TestIntermediateKeyKindChanges(t *testing.T) {
	store, ks, now := &memoryStore{}, keys.Memory(), time.Now()
	before := open(t, Config{Store: store, Keys: ks})
	leaf, intermediate, _ := before.issue(t, now, &Request{})
	after := open(t, Config{Store: store, Keys: ks, IntermediateKey: keys.P384, Subject: Subject{CommonName: "Acme"}})
	if err := after.verify(now, leaf, intermediate); err != nil {
		t.Error(err)
	}
	after.issues(t)
}

// With an upstream CA, the request has the key and the name that are configured.
func TestUpstreamProfile(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	f := open(t, Config{
		Upstream:        &Upstream{CA: upstreamtest.NewMemory(a, upstreamtest.Good), Kind: "memory", Pins: [][32]byte{sha256.Sum256(a.Root.Raw)}},
		IntermediateKey: keys.RSA3072, Subject: Subject{CommonName: "Acme mesh", Organization: "Acme", Country: "DE"},
	})
	f.verifySigned(t, time.Now())
	intermediate := f.intermediate(t)
	if got := algorithmOf(intermediate.PublicKey); got != "RSA-3072" {
		t.Errorf("a key of kind %s", got)
	}
	if got := intermediate.Subject; got.CommonName != "Acme mesh intermediate" || got.Organization[0] != "Acme" || got.Country[0] != "DE" {
		t.Errorf("named %s", got)
	}
}

func TestSubject(t *testing.T) {
	f := open(t, Config{Subject: Subject{
		CommonName: "Müller & Söhne", Organization: "Müller", OrganizationalUnit: "Platform", Country: "DE", Province: "Bavaria", Locality: "Hof",
	}})
	f.issues(t)
	f.opensslAccepts(t)
	for _, a := range f.Authorities() {
		got := a.Certificate.Subject
		own := got.SerialNumber
		got.SerialNumber = ""
		if want := "CN=Müller & Söhne " + a.Role + ",OU=Platform,O=Müller,L=Hof,ST=Bavaria,C=DE"; got.String() != want || len(own) != 16 {
			t.Errorf("%s, serial %q; want %s", got, own, want)
		}
	}
	long := spiffeid.RequireTrustDomainFromString(strings.Repeat("a", 65))
	if got := (Subject{}).Root(long).String(); got != "CN=meshid root" {
		t.Errorf("a long trust domain: %s", got)
	}
	if got := (Subject{}).Root(testDomain).String(); got != "CN=meshid root,O=example.org" {
		t.Errorf("by default: %s", got)
	}
	for want, s := range map[string]Subject{
		"common_name":         {CommonName: strings.Repeat("x", 52)},
		"organization":        {Organization: "a\x00b"},
		"organizational_unit": {OrganizationalUnit: "a\nb"},
		"province":            {Province: "\xff"},
		"locality":            {Locality: strings.Repeat("x", 129)},
		"country":             {Country: "de"},
	} {
		if field, err := s.Check(); err == nil || field != want {
			t.Errorf("%+v: %q, %v", s, field, err)
		}
		if _, err := tryOpen(t, Config{Subject: s}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: opened: %v", s, err)
		}
	}
	if field, err := (Subject{CommonName: strings.Repeat("ü", 51)}).Check(); err != nil {
		t.Errorf("%s: %v", field, err)
	}
}
