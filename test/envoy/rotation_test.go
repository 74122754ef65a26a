package envoy

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

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
