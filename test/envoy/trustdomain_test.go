package envoy

import (
	"crypto/x509"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// TestSpec_S15_FailOpenGuard: a bootstrap without any guard of its own, and each broken state that
// a trust bundle can be in, at first and later: a client with another CA's
// certificate, or with none, is never let in.
func TestSpec_S15_FailOpenGuard(t *testing.T) {
	ca, evil := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "a.test")
	leaf := identitytest.X509(ca.SVID("/y").Chain[0])
	x := ca.SVID("/x")
	expired := identitytest.NewAuthority(t, "a.test")
	expired.Cert = expired.Sign(func() *x509.Certificate {
		c := identitytest.CATemplate("a.test")
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		return c
	}(), nil, expired.Key.Public())
	broken := map[string]*identity.Bundle{
		"none":       nil,
		"empty":      {TrustDomain: ca.TrustDomain, Sequence: 2},
		"a leaf":     {TrustDomain: ca.TrustDomain, Sequence: 2, Roots: []*x509.Certificate{leaf}},
		"nil root":   {TrustDomain: ca.TrustDomain, Sequence: 2, Roots: []*x509.Certificate{nil}},
		"no domain":  {Sequence: 2, Roots: []*x509.Certificate{ca.Cert}},
		"expired":    expired.Bundle(2),
		"not parsed": {TrustDomain: ca.TrustDomain, Sequence: 2, Roots: []*x509.Certificate{{Raw: []byte("x"), IsCA: true}}},
	}
	refused := func(t *testing.T, port int) {
		t.Helper()
		for name, v := range map[string]*identity.SVID{"no certificate": nil, "another CA's": evil.SVID("/client")} {
			if _, _, err := call(port, v); err == nil {
				t.Errorf("%s was let in", name)
			}
		}
	}
	for _, c := range []config{{}, {Delta: true}} {
		t.Run(fmt.Sprintf("delta %t", c.Delta), func(t *testing.T) {
			a := newAgent(t, nil)
			c.Socket, c.Application, c.Plain, c.FetchTimeout = a.socket, newApplication(t), true, "0.1s"
			p := startEnvoy(t, c)
			p.waitLive() // its port is open, without secrets
			port := p.port("inbound")
			refused(t, port)
			for name, b := range broken {
				a.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{x}, Bundle: b})
				t.Log(name)
				refused(t, port)
			}
			a.source.Publish(ca.Snapshot(3, x))
			eventually(t, "it serves", func() bool {
				_, _, err := call(port, ca.SVID("/client"), ca.Cert)
				return err == nil
			})
			refused(t, port)
			for name, b := range broken {
				a.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{x}, Bundle: b})
				t.Log(name)
				refused(t, port)
			}
			a.source.Publish(&identity.Snapshot{Denied: true})
			refused(t, port)
			a.stop()
			refused(t, port)
		})
	}
}

// TestSpec_H17_S29_TrustDomainsAreApart: with ALL, the CA of one trust domain cannot vouch for identities
// of another; who is no longer federated is refused.
func TestSpec_H17_S29_TrustDomainsAreApart(t *testing.T) {
	ca, other := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test")
	forger := other.As(ca.TrustDomain)
	x := ca.SVID("/x")
	federated := ca.Snapshot(1, x)
	federated.Federated = map[spiffeid.TrustDomain]*identity.Bundle{other.TrustDomain: other.Bundle(1)}
	a := newAgent(t, federated)
	p := startEnvoy(t, config{Socket: a.socket, Delta: true, Root: "ALL", Application: newApplication(t)})
	p.waitLive()
	port := p.port("inbound")
	if who, _ := mustCall(t, port, ca.SVID("/client"), ca.Cert); who != "URI=spiffe://a.test/client" {
		t.Error(who)
	}
	if who, _ := mustCall(t, port, other.SVID("/client"), ca.Cert); who != "URI=spiffe://b.test/client" {
		t.Error(who)
	}
	if _, _, err := call(port, forger.SVID("/client"), ca.Cert); err == nil {
		t.Error("an identity of a.test, signed by b.test's CA, was believed")
	}
	a.source.Publish(ca.Snapshot(2, x))
	eventually(t, "b.test is not believed any more", func() bool {
		_, _, err := call(port, other.SVID("/client"), ca.Cert)
		return err != nil
	})
	mustCall(t, port, ca.SVID("/client"), ca.Cert)
}

// TestSpec_S34_ManyTrustDomains: two thousand do not break a handshake.
func TestSpec_S34_ManyTrustDomains(t *testing.T) {
	ca, other := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test")
	s := ca.Snapshot(1, ca.SVID("/x"))
	s.Federated = make(map[spiffeid.TrustDomain]*identity.Bundle)
	for i := range 2000 {
		td := spiffeid.RequireTrustDomainFromString(fmt.Sprintf("domain-%d.test", i))
		s.Federated[td] = &identity.Bundle{TrustDomain: td, Sequence: 1, Roots: []*x509.Certificate{other.Cert}}
	}
	a := newAgent(t, s)
	p := startEnvoy(t, config{Socket: a.socket, Root: "ALL", Application: newApplication(t)})
	p.waitLive()
	mustCall(t, p.port("inbound"), ca.SVID("/client"), ca.Cert)
}

// TestSpec_S30_S31_OnDemand: certificates fetched at the handshake: an identity that is not there fails
// fast, one that is served, and after its withdrawal no handshake succeeds.
func TestSpec_S30_S31_OnDemand(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	x, y := ca.SVID("/x"), ca.SVID("/y")
	a := newAgent(t, ca.Snapshot(1, y))
	p := startEnvoy(t, config{Socket: a.socket, Delta: true, OnDemand: "spiffe://a.test/x", Application: newApplication(t)})
	p.waitLive()
	port, client := p.port("inbound"), ca.SVID("/client")
	start := time.Now()
	if _, _, err := call(port, client, ca.Cert); err == nil {
		t.Error("a handshake for an identity that is not there succeeded")
	}
	t.Logf("failed after %s", time.Since(start).Round(time.Millisecond))
	a.source.Publish(ca.Snapshot(1, y, x))
	eventually(t, "it is served", func() bool {
		_, server, err := call(port, client, ca.Cert)
		return err == nil && server.Equal(identitytest.X509(x.Chain[0]))
	})
	a.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{y}, Bundle: ca.Bundle(1), Withdrawn: []spiffeid.ID{x.ID}})
	eventually(t, "it is gone", func() bool {
		_, _, err := call(port, client, ca.Cert)
		return err != nil
	})
	for range 10 {
		if _, _, err := call(port, client, ca.Cert); err == nil {
			t.Fatal("a withdrawn identity was served")
		}
	}
}
