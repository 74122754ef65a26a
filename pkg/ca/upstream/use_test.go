package upstream_test

import (
	"crypto/sha256"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

func TestUse_CheckRoots(t *testing.T) {
	a, b := upstreamtest.NewAuthority(t, upstreamtest.Good).Root, upstreamtest.NewAuthority(t, upstreamtest.Good).Root
	named := *a
	named.URIs = append(named.URIs, spiffeid.RequireTrustDomainFromString("other.org").ID().URL())
	for _, c := range []struct {
		name  string
		roots []*x509.Certificate
		pins  []*x509.Certificate
		says  string
	}{
		{"no roots", nil, []*x509.Certificate{a}, ""},
		{"no pins", []*x509.Certificate{a, b}, nil, ""},
		{"one is pinned", []*x509.Certificate{a, b}, []*x509.Certificate{b}, ""},
		{"another is pinned", []*x509.Certificate{a}, []*x509.Certificate{b}, "roots: none of the roots there"},
		{"of another trust domain", []*x509.Certificate{&named}, nil, "other.org"},
	} {
		u := upstream.Use{TrustDomain: spiffeid.RequireTrustDomainFromString("example.org")}
		for _, p := range c.pins {
			u.Pins = append(u.Pins, sha256.Sum256(p.Raw))
		}
		switch err := u.CheckRoots("roots", c.roots); {
		case (err == nil) != (c.says == ""), err != nil && !strings.Contains(err.Error(), c.says):
			t.Errorf("%s: %v, want it to say %q", c.name, err, c.says)
		}
	}
}
