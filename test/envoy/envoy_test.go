package envoy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/require"
)

// A sidecar becomes LIVE with each way of asking, serves mutual TLS with what it was
// given, takes a rotation, and has acknowledged its root to the agent.
func TestSpec_S01_S02_S03_S04_S05_S06_Protocols(t *testing.T) {
	for name, c := range map[string]config{
		"sotw":                {},
		"delta":               {Delta: true},
		"aggregated sotw":     {ADS: true},
		"aggregated delta":    {ADS: true, Delta: true},
		"google grpc":         {Google: true},
		"google grpc delta":   {Google: true, Delta: true},
		"abstract socket":     {Socket: "@"},
		"names are SPIFFE":    {Delta: true, Leaf: "spiffe://a.test/x", Root: "spiffe://a.test"},
		"names are SPIFFE, 2": {Leaf: "spiffe://a.test/x", Root: "ALL"},
	} {
		t.Run(name, func(t *testing.T) {
			require.Envoy(t)
			ca := identitytest.NewAuthority(t, "a.test")
			x, client := ca.Intermediate().SVID("/x"), ca.SVID("/client")
			a := newAgentAt(t, c.Socket, ca.Snapshot(7, x))
			c.Socket, c.Application = a.socket, newApplication(t)
			p := startEnvoy(t, c)
			p.waitLive()
			port := p.port("inbound")
			who, server := mustCall(t, port, client, ca.Cert)
			if who != "URI=spiffe://a.test/client" || !server.Equal(identitytest.X509(x.Chain[0])) {
				t.Errorf("called as %q, by %s", who, server.URIs)
			}
			if n := a.source.LastAcknowledged(); n != 7 {
				t.Errorf("sequence %d acknowledged", n)
			}
			if !a.source.HasSubscribed(p.command.Process.Pid) {
				t.Error("the peer is another process")
			}
			next := ca.SVID("/x")
			a.source.Publish(ca.Snapshot(8, next))
			eventually(t, "the new certificate", func() bool {
				_, server := mustCall(t, port, client, ca.Cert)
				return server.Equal(identitytest.X509(next.Chain[0]))
			})
			eventually(t, "the acknowledgement", func() bool { return a.source.LastAcknowledged() == 8 })
			if n := p.stat("update_rejected"); n != 0 {
				t.Errorf("%d updates rejected", n)
			}
		})
	}
}

// TestSpec_S09_OneStreamPerName: what has the same name shares a stream, and a push.
func TestSpec_S09_OneStreamPerName(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	p := startEnvoy(t, config{Socket: a.socket, Delta: true, Peer: 1, PeerID: "spiffe://a.test/y"})
	p.waitLive()
	// The listener and the cluster have the same two names.
	eventually(t, "two streams", func() bool { return a.source.Open() == 2 })
	if n := a.metric("meshid_agent_sds_responses_total"); n != 2 {
		t.Errorf("%v responses", n)
	}
	p.kill()
	eventually(t, "streams of a killed Envoy are freed", func() bool { return a.source.Open() == 0 })
}

// pair is two sidecars, one calling the other.
type pair struct {
	t        *testing.T
	ca       *identitytest.Authority
	from, to *agent
	a, b     *proxy
	url      string
}

func newPair(t *testing.T, c config) *pair {
	t.Helper()
	ca := identitytest.NewAuthority(t, "a.test")
	p := &pair{t: t, ca: ca, from: newAgent(t, ca.Snapshot(1, ca.SVID("/a"))), to: newAgent(t, ca.Snapshot(1, ca.SVID("/b")))}
	to := c
	to.Name, to.Socket, to.Application = "b", p.to.socket, newApplication(t)
	p.b = startEnvoy(t, to)
	p.b.waitLive()
	c.Name, c.Socket, c.Application = "a", p.from.socket, to.Application
	c.Peer, c.PeerID = p.b.port("inbound"), "spiffe://a.test/b"
	p.a = startEnvoy(t, c)
	p.a.waitLive()
	p.url = fmt.Sprintf("http://127.0.0.1:%d/", p.a.port("outbound"))
	return p
}

// publish gives both sides new snapshots.
func (p *pair) publish(sequence uint64, roots []*identitytest.Authority, signer *identitytest.Authority) {
	b := roots[0].Bundle(sequence, roots[1:]...)
	p.from.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{signer.SVID("/a")}, Bundle: b})
	p.to.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{signer.SVID("/b")}, Bundle: b})
}

// request makes one request from a to b.
func (p *pair) request(client *http.Client) error {
	r, err := client.Get(p.url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	if r.StatusCode != http.StatusOK || string(body) != "URI=spiffe://a.test/a" {
		return fmt.Errorf("%s: %s", r.Status, body)
	}
	return nil
}

// load makes requests all the time until stop, which returns how many there were
// and the first failures.
func (p *pair) load() (stop func() (requests int64, failures []error)) {
	var requests atomic.Int64
	var mu sync.Mutex
	var failures []error
	quit := make(chan struct{})
	var done sync.WaitGroup
	for range 4 {
		done.Go(func() {
			client := &http.Client{Transport: &http.Transport{}, Timeout: patience}
			defer client.CloseIdleConnections()
			for {
				select {
				case <-quit:
					return
				default:
				}
				if err := p.request(client); err != nil {
					mu.Lock()
					failures = append(failures, err)
					mu.Unlock()
				}
				requests.Add(1)
			}
		})
	}
	return func() (int64, []error) {
		close(quit)
		done.Wait()
		return requests.Load(), failures
	}
}

// TestSpec_S16_S17_S18_S19_S22_RotationsUnderLoad: leaves of both sides and roots, in the order that a CA keeps,
// with connections kept and with a handshake for each request: nothing is lost.
func TestSpec_S16_S17_S18_S19_S22_RotationsUnderLoad(t *testing.T) {
	rotations := 100
	for name, c := range map[string]config{
		"sotw, kept alive":      {},
		"delta, handshake each": {Delta: true, OneRequest: true},
		"delta, HTTP/2":         {Delta: true, HTTP2: true},
		"sotw, handshake each":  {OneRequest: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, c)
			if err := p.request(http.DefaultClient); err != nil {
				t.Fatal(err)
			}
			stop := p.load()
			sequence, ca := uint64(1), p.ca
			// rotate gives both sides new leaves, and a new bundle if it changes, and
			// waits until they are in force: each push has its acknowledgement, and
			// each side shows its new leaf.
			rotate := func(pushes int, signer *identitytest.Authority, roots ...*identitytest.Authority) {
				t.Helper()
				acks := func() float64 {
					return p.from.metric("meshid_agent_sds_acks_total") + p.to.metric("meshid_agent_sds_acks_total")
				}
				want := acks() + float64(2*pushes)
				p.publish(sequence, roots, signer)
				eventually(t, "all is acknowledged", func() bool { return acks() == want })
				if pushes > 1 { // the source is told just after the counter has moved
					eventually(t, "the source knows", func() bool { return p.from.source.LastAcknowledged() == sequence })
				}
				for _, side := range []struct {
					proxy *proxy
					agent *agent
				}{{p.a, p.from}, {p.b, p.to}} {
					port, leaf := side.proxy.port("inbound"), identitytest.X509(side.agent.source.Latest().Default().Chain[0])
					eventually(t, "the leaf is in use", func() bool {
						_, server := mustCall(t, port, signer.SVID("/client"))
						return server.Equal(leaf)
					})
				}
			}
			for i := range rotations {
				if i%20 != 19 {
					rotate(1, ca, ca)
					continue
				}
				next := identitytest.NewAuthority(t, "a.test")
				sequence++
				rotate(2, ca, ca, next) // the root first
				rotate(1, next, ca, next)
				sequence++
				rotate(2, next, next) // and the old one goes at last
				ca = next
			}
			requests, failures := stop()
			if len(failures) > 0 {
				t.Errorf("%d of %d requests failed: %v", len(failures), requests, failures[0])
			}
			if n := p.a.stat("cluster.peer.upstream_cx_destroy"); !c.OneRequest && n != 0 {
				t.Errorf("%d connections were lost that are kept", n)
			}
			for _, e := range []*proxy{p.a, p.b} {
				if n := e.stat("update_rejected"); n != 0 {
					t.Errorf("%d updates rejected", n)
				}
			}
			t.Logf("%d rotations, %d requests, %d failed", rotations, requests, len(failures))
		})
	}
}

// TestSpec_S11_Hold: nothing at first, an identity later: it serves at once.
func TestSpec_S11_Hold(t *testing.T) {
	for name, c := range map[string]config{"sotw": {}, "delta": {Delta: true}, "aggregated delta": {ADS: true, Delta: true}} {
		t.Run(name, func(t *testing.T) {
			ca := identitytest.NewAuthority(t, "a.test")
			a := newAgent(t, &identity.Snapshot{Bundle: ca.Bundle(1), Denied: true})
			c.Socket, c.Application = a.socket, newApplication(t)
			p := startEnvoy(t, c)
			eventually(t, "Envoy has its root", func() bool { return a.source.LastAcknowledged() == 1 })
			if p.live() {
				t.Error("LIVE without an identity")
			}
			start := time.Now()
			a.source.Publish(ca.Snapshot(1, ca.SVID("/x")))
			p.waitLive()
			took := time.Since(start)
			mustCall(t, p.port("inbound"), ca.SVID("/client"), ca.Cert)
			if n := p.stat("update_failure") + p.stat("update_rejected"); c.ADS && n != 0 {
				t.Logf("%d updates failed", n)
			}
			t.Logf("LIVE %s after the identity was there", took.Round(time.Millisecond))
		})
	}
}

// TestSpec_S12_AgentLater: the agent starts after Envoy.
func TestSpec_S12_AgentLater(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	a.stop()
	p := startEnvoy(t, config{Socket: a.socket, Delta: true, Application: newApplication(t)})
	eventually(t, "Envoy has tried", func() bool { return p.stat("cluster.agent.upstream_cx_connect_fail") > 0 })
	a.start()
	p.waitLive()
	mustCall(t, p.port("inbound"), ca.SVID("/client"), ca.Cert)
}

// TestSpec_S13_FetchTimeout: an Envoy that opens its port without a secret lets nobody in.
func TestSpec_S13_FetchTimeout(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, nil)
	p := startEnvoy(t, config{Socket: a.socket, FetchTimeout: "0.2s", Application: newApplication(t)})
	p.waitLive()
	port := p.port("inbound")
	for _, v := range []*identity.SVID{nil, ca.SVID("/client")} {
		if _, _, err := call(port, v); err == nil {
			t.Error("let in")
		}
	}
	a.source.Publish(ca.Snapshot(1, ca.SVID("/x")))
	eventually(t, "it serves", func() bool {
		_, _, err := call(port, ca.SVID("/client"), ca.Cert)
		return err == nil
	})
	if _, _, err := call(port, nil); err == nil {
		t.Error("let in without a certificate")
	}
}

// TestSpec_S28_Tombstone: after a withdrawal no new handshake succeeds, in both
// directions and with each protocol, and it heals when the identity is back.
func TestSpec_S28_Tombstone(t *testing.T) {
	for name, c := range map[string]config{"sotw": {}, "delta": {Delta: true}} {
		t.Run(name, func(t *testing.T) {
			c.OneRequest = true
			p := newPair(t, c)
			id := spiffeid.RequireFromString("spiffe://a.test/a")
			try := func() error { return p.request(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}) }
			if err := try(); err != nil {
				t.Fatal(err)
			}
			p.from.source.Publish(&identity.Snapshot{Bundle: p.ca.Bundle(1), Withdrawn: []spiffeid.ID{id}, Denied: true})
			eventually(t, "calls of a are refused", func() bool { return try() != nil })
			for range 20 {
				if try() == nil {
					t.Fatal("a withdrawn identity got in")
				}
			}
			if n := p.a.stat("update_rejected"); n != 0 {
				t.Errorf("%d updates rejected", n)
			}
			_, server, err := call(p.a.port("inbound"), p.ca.SVID("/client"), p.ca.Cert)
			if err == nil {
				t.Error("a withdrawn identity is believed as a server")
			}
			if server == nil || !server.NotAfter.Before(time.Now()) || server.URIs[0].String() != id.String() {
				t.Error("not a tombstone")
			}
			p.from.source.Publish(p.ca.Snapshot(1, p.ca.SVID("/a")))
			eventually(t, "a is back", func() bool { return try() == nil })
		})
	}
}

// TestSpec_S27_NACK: Envoy refuses a key of a kind that it does not support; what it had
// goes on, and it is pushed once only.
func TestSpec_S27_NACK(t *testing.T) {
	for name, c := range map[string]config{"sotw": {}, "delta": {Delta: true}, "aggregated delta": {ADS: true, Delta: true}} {
		t.Run(name, func(t *testing.T) {
			ca := identitytest.NewAuthority(t, "a.test")
			good := ca.SVID("/x")
			a := newAgent(t, ca.Snapshot(1, good))
			c.Socket, c.Application = a.socket, newApplication(t)
			p := startEnvoy(t, c)
			p.waitLive()
			port, client := p.port("inbound"), ca.SVID("/client")
			key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			sent := a.metric("meshid_agent_sds_responses_total")
			a.source.Publish(ca.Snapshot(1, ca.SVIDFor(key, "/x")))
			eventually(t, "it is refused", func() bool { return a.metric("meshid_agent_sds_nacks_total") == 1 })
			eventually(t, "it is counted", func() bool { return a.metric("meshid_agent_sds_rejecting_streams") == 1 })
			for range 50 {
				if _, server := mustCall(t, port, client, ca.Cert); !server.Equal(identitytest.X509(good.Chain[0])) {
					t.Fatal("the good one is not served any more")
				}
			}
			if n := a.metric("meshid_agent_sds_responses_total") - sent; n != 1 {
				t.Errorf("%v pushes for one change", n)
			}
			next := ca.SVID("/x")
			a.source.Publish(ca.Snapshot(1, next))
			eventually(t, "the next one is taken", func() bool {
				_, server := mustCall(t, port, client, ca.Cert)
				return server.Equal(identitytest.X509(next.Chain[0]))
			})
			eventually(t, "it is all right again", func() bool { return a.metric("meshid_agent_sds_rejecting_streams") == 0 })
		})
	}
}

// TestSpec_S08_S24_AgentRestart: over a restart of the agent Envoy keeps what it has; when the agent is back
// with the same, nothing is pushed, no context changes, and the root counts as in force.
func TestSpec_S08_S24_AgentRestart(t *testing.T) {
	for name, c := range map[string]config{"sotw": {}, "delta": {Delta: true}, "aggregated delta": {ADS: true, Delta: true}} {
		t.Run(name, func(t *testing.T) {
			ca := identitytest.NewAuthority(t, "a.test")
			a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
			c.Socket, c.Application = a.socket, newApplication(t)
			p := startEnvoy(t, c)
			p.waitLive()
			port, client := p.port("inbound"), ca.SVID("/client")
			mustCall(t, port, client, ca.Cert)
			updates := p.stat("ssl_context_update_by_sds")
			a.stop()
			mustCall(t, port, client, ca.Cert)
			streams := map[bool]int{false: 2, true: 1}[c.ADS]
			acks := len(a.source.Acknowledged())
			a.start()
			eventually(t, "all streams are back", func() bool { return a.source.Open() == streams })
			eventually(t, "the root counts as in force", func() bool { return len(a.source.Acknowledged()) > acks })
			mustCall(t, port, client, ca.Cert)
			if n := a.metric("meshid_agent_sds_responses_total"); n != 0 {
				t.Errorf("%v responses though nothing has changed", n)
			}
			if n := p.stat("ssl_context_update_by_sds"); n != updates {
				t.Errorf("%d context updates", n-updates)
			}
			next := ca.SVID("/x")
			a.source.Publish(ca.Snapshot(1, next))
			eventually(t, "it goes on", func() bool {
				_, server := mustCall(t, port, client, ca.Cert)
				return server.Equal(identitytest.X509(next.Chain[0]))
			})
		})
	}
}

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

// TestSpec_S44_Killed: the streams of a killed Envoy are freed at once, time after
// time.
func TestSpec_S44_Killed(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	for range 5 {
		p := startEnvoy(t, config{Socket: a.socket})
		p.waitLive()
		if n := a.source.Open(); n != 2 {
			t.Errorf("%d streams", n)
		}
		start := time.Now()
		p.kill()
		eventually(t, "streams are freed", func() bool { return a.source.Open() == 0 })
		t.Logf("freed after %s", time.Since(start).Round(time.Millisecond))
	}
	if n := a.metric("meshid_agent_sds_streams"); n != 0 {
		t.Errorf("%v streams counted", n)
	}
}

// TestSpec_S36_PostQuantum: the key agreement between two sidecars is a hybrid one.
func TestSpec_S36_PostQuantum(t *testing.T) {
	p := newPair(t, config{Delta: true})
	if err := p.request(http.DefaultClient); err != nil {
		t.Fatal(err)
	}
	if p.b.stat("ssl.curves.X25519MLKEM768") == 0 || p.b.stat("ssl.versions.TLSv1.3") == 0 {
		t.Error("another key agreement")
	}
}

// TestSpec_S37_Pings: an Envoy that pings its agent is not sent away.
func TestSpec_S37_Pings(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	t.Parallel()
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	p := startEnvoy(t, config{Socket: a.socket, Delta: true, Ping: "10s"})
	p.waitLive()
	connections := p.stat("cluster.agent.upstream_cx_total")
	deadline := time.NewTimer(36 * time.Second)
	defer deadline.Stop()
	<-deadline.C
	if n := p.stat("cluster.agent.upstream_cx_total"); n != connections {
		t.Errorf("%d new connections", n-connections)
	}
	if n := p.stat("cluster.agent.http2.keepalive_timeout") + p.stat("cluster.agent.http2.goaway_sent"); n != 0 {
		t.Errorf("%d pings failed", n)
	}
}

// TestSpec_S38_PrometheusNames: with the short names, each secret has a label of its own.
func TestSpec_S38_PrometheusNames(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	p := startEnvoy(t, config{Socket: a.socket})
	p.waitLive()
	all, _ := p.get("/stats/prometheus")
	for _, want := range []string{
		`envoy_sds_update_success{envoy_xds_resource_name="default"} 1`,
		`envoy_sds_update_success{envoy_xds_resource_name="ROOTCA"} 1`,
		`expiration_unix_time_seconds{`,
	} {
		if !strings.Contains(all, want) {
			t.Errorf("no %s", want)
		}
	}
}

// TestSpec_S39_ConfigDump: what Envoy's admin port shows has no key.
func TestSpec_S39_ConfigDump(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	x := ca.SVID("/x")
	a := newAgent(t, ca.Snapshot(1, x))
	p := startEnvoy(t, config{Socket: a.socket, Delta: true})
	p.waitLive()
	der, err := x509.MarshalPKCS8PrivateKey(x.Key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for _, path := range []string{"/config_dump?include_eds", "/config_dump?resource=dynamic_active_secrets", "/certs", "/stats", "/init_dump"} {
		dump, _ := p.get(path)
		for _, secret := range []string{
			base64.StdEncoding.EncodeToString(keyPEM)[:60], base64.StdEncoding.EncodeToString(der)[:60], "PRIVATE KEY",
			base64.StdEncoding.EncodeToString(keyPEM)[60:120],
		} {
			if strings.Contains(dump, secret) {
				t.Errorf("%s shows the key", path)
			}
		}
	}
	// Versions are there, for people who compare.
	dump, _ := p.get("/config_dump?resource=dynamic_active_secrets")
	var d struct {
		Configs []struct {
			Name    string `json:"name"`
			Version string `json:"version_info"`
		} `json:"configs"`
	}
	if err := json.Unmarshal([]byte(dump), &d); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, c := range d.Configs {
		names[c.Name] = c.Version != ""
	}
	if diff := cmp.Diff(map[string]bool{"default": true, "ROOTCA": true}, names); diff != "" {
		t.Error(diff)
	}
}

// TestSpec_S41_Validate: Envoy takes each bootstrap that is shipped, and each that is
// tested here.
func TestSpec_S41_Validate(t *testing.T) {
	binary := require.Envoy(t)
	files, err := filepath.Glob(filepath.Join(require.Repository(), "deploy", "envoy", "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no bootstraps found")
	}
	for _, c := range []config{{}, {Delta: true, Peer: 1}, {ADS: true}, {ADS: true, Delta: true}, {Google: true}, {OnDemand: "x"}, {Plain: true}} {
		c.Socket = "/run/agent.sock"
		files = append(files, c.render(t, t.TempDir()))
	}
	for _, f := range files {
		out, err := exec.CommandContext(t.Context(), binary, "--mode", "validate", "-c", f, "--log-level", "warning").CombinedOutput()
		if err != nil {
			// It looks for the directory of endpoints, which is not on this machine.
			text, readErr := os.ReadFile(f)
			if readErr == nil && strings.Contains(string(out), "/etc/envoy/endpoints") {
				dir := t.TempDir()
				there := filepath.Join(dir, "bootstrap.yaml")
				if err := os.WriteFile(filepath.Join(dir, "stock.yaml"), []byte("resources: []\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(there, []byte(strings.ReplaceAll(string(text), "/etc/envoy/endpoints", dir)), 0o600); err != nil {
					t.Fatal(err)
				}
				out, err = exec.CommandContext(t.Context(), binary, "--mode", "validate", "-c", there, "--log-level", "warning").CombinedOutput()
			}
			if err != nil {
				t.Errorf("%s: %v\n%s", f, err, out)
			}
		}
	}
}
