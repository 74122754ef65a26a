package envoy

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// expiring returns a client's SVID that expires soon, after begin has done with it
// what needs it to be valid. On a machine that is too slow for that it is tried again
// with one that lives longer.
func expiring(t testing.TB, ca *identitytest.Authority, begin func(*identity.SVID) error) *identity.SVID {
	t.Helper()
	for life := 3 * time.Second; ; life *= 2 { // certificates count in seconds
		v := ca.SVID("/client", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(life) })
		err := begin(v)
		if err == nil {
			return v
		}
		if time.Now().Before(v.NotAfter()) || life > patience {
			t.Fatal(err)
		}
	}
}

// waitExpired waits until an SVID has expired for everybody.
func waitExpired(t testing.TB, v *identity.SVID) {
	t.Helper()
	eventually(t, "the certificate has expired", func() bool { return time.Now().After(v.NotAfter().Add(time.Second)) })
}

// TestV_H2_OpenConnections: the open connection of a client that expired, or whose
// root is gone, is closed within the configured duration. Without one it lives on.
func TestV_H2_OpenConnections(t *testing.T) {
	for name, row := range map[string]struct {
		life string
		end  func(*testing.T, *agent, *identity.SVID)
	}{
		"expired": {"4s", func(t *testing.T, _ *agent, v *identity.SVID) { waitExpired(t, v) }},
		"root removed": {"1s", func(t *testing.T, a *agent, _ *identity.SVID) {
			next := identitytest.NewAuthority(t, "a.test")
			a.source.Publish(next.Snapshot(2, next.SVID("/x")))
			eventually(t, "both have the new root", func() bool { return a.metric("meshid_agent_sds_acks_total") == 8 })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca := identitytest.NewAuthority(t, "a.test")
			a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
			c := config{Socket: a.socket, Delta: true, Application: newApplication(t)}
			unbounded := startEnvoy(t, c)
			c.ConnectionLife = row.life
			bounded := startEnvoy(t, c)
			proxies := []*proxy{unbounded, bounded}
			ports, sessions := make(map[*proxy]int), make(map[*proxy]*session)
			for _, p := range proxies {
				p.waitLive()
				ports[p] = p.port("inbound")
			}
			v := expiring(t, ca, func(v *identity.SVID) error {
				for _, p := range proxies {
					s, err := open(t, ports[p], clientConfig(v))
					if err != nil {
						return err
					}
					if err := s.get(); err != nil {
						return err
					}
					sessions[p] = s
				}
				return nil
			})
			row.end(t, a, v)
			eventually(t, "the connection is closed", func() bool { return sessions[bounded].get() != nil })
			if n := bounded.stat("http.inbound.downstream_cx_max_duration_reached"); n == 0 {
				t.Error("no connection was closed for its age")
			}
			if err := sessions[unbounded].get(); err != nil {
				t.Errorf("without a bound, the experiment shows nothing: %v", err)
			}
			for _, p := range proxies {
				if _, err := try(t, ports[p], clientConfig(v)); err == nil {
					t.Error("it came back")
				}
			}
		})
	}
}

// TestV_H2_WithdrawnSidecar: a sidecar whose identity was withdrawn, and which keeps its
// connection busy, loses it within the configured duration, and gets no other.
func TestV_H2_WithdrawnSidecar(t *testing.T) {
	for _, c := range []config{{Delta: true, ConnectionLife: "1s"}, {ConnectionLife: "1s", HTTP2: true}} {
		t.Run(fmt.Sprintf("HTTP2 %t", c.HTTP2), func(t *testing.T) {
			t.Parallel()
			p := newPair(t, c)
			if err := p.request(http.DefaultClient); err != nil {
				t.Fatal(err)
			}
			p.from.source.Publish(&identity.Snapshot{
				Bundle: p.ca.Bundle(1), Withdrawn: []spiffeid.ID{spiffeid.RequireFromString("spiffe://a.test/a")}, Denied: true,
			})
			eventually(t, "it is refused", func() bool { return p.request(http.DefaultClient) != nil })
			if n := p.b.stat("http.inbound.downstream_cx_max_duration_reached"); n == 0 {
				t.Error("no connection was closed for its age")
			}
			// At once: Envoy may take its 15 s to give up on one.
			var asking sync.WaitGroup
			for range 20 {
				asking.Go(func() {
					if p.request(http.DefaultClient) == nil {
						t.Error("a withdrawn identity came back")
					}
				})
			}
			asking.Wait()
		})
	}
}

// TestV_H2_EndlessRequest: the bound of a connection waits for the requests that are
// open; only a bound for requests ends one that never ends. So it is for clients of a
// sidecar and for its servers.
func TestV_H2_EndlessRequest(t *testing.T) {
	sink := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	t.Cleanup(sink.Close)
	application := sink.Listener.Addr().(*net.TCPAddr).Port
	ca := identitytest.NewAuthority(t, "a.test")
	x := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	server := startEnvoy(t, config{Socket: x.socket, Delta: true, Application: application})
	for side, row := range map[string]struct {
		c                config
		tooOld, tooLong  string // what Envoy counts
		connectionsBound func(*config)
		requestsBound    func(*config)
	}{
		"inbound": {
			config{},
			"http.inbound.downstream_cx_max_duration_reached", "http.inbound.downstream_rq_max_duration_reached",
			func(c *config) { c.ConnectionLife = "0.3s" }, func(c *config) { c.StreamLife = "1s" },
		},
		"outbound": {
			config{Peer: server.port("inbound"), PeerID: "spiffe://a.test/x"},
			"cluster.peer.upstream_cx_max_duration_reached", "cluster.peer.upstream_rq_max_duration_reached",
			func(c *config) { c.PeerConnectionLife = "0.3s" }, func(c *config) { c.PeerStreamLife = "1s" },
		},
	} {
		t.Run(side, func(t *testing.T) {
			t.Parallel()
			c := row.c
			c.Socket, c.Delta, c.Application = x.socket, true, application
			row.connectionsBound(&c)
			begin := func() (*proxy, func() error) {
				p := startEnvoy(t, c)
				p.waitLive()
				var conn net.Conn
				if side == "inbound" {
					s, err := open(t, p.port(side), clientConfig(ca.SVID("/client")))
					if err != nil {
						t.Fatal(err)
					}
					conn = s.conn
				} else {
					var err error
					if conn, err = net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.port(side)))); err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = conn.Close() })
				}
				write := func(text string) error {
					if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
						return err
					}
					_, err := io.WriteString(conn, text)
					return err
				}
				if err := write("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				return p, func() error { return write("1\r\nx\r\n") }
			}
			p, endless := begin()
			eventually(t, "the connection is too old", func() bool {
				if err := endless(); err != nil {
					t.Fatal(err)
				}
				return p.stat(row.tooOld) > 0
			})
			row.requestsBound(&c)
			q, bounded := begin()
			eventually(t, "the request is ended", func() bool { return bounded() != nil })
			if q.stat(row.tooLong) == 0 {
				t.Error("it was not ended for its length")
			}
			if err := endless(); err != nil {
				t.Errorf("a bound for connections alone is enough now: %v", err)
			}
		})
	}
}

// resuming is the configuration of a client that resumes its sessions.
func resuming(v *identity.SVID, version uint16) *tls.Config {
	c := clientConfig(v)
	c.MinVersion, c.MaxVersion = version, version
	c.ServerName = "x" // sessions are kept by name
	c.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	return c
}

// TestSpec_S35_Resumption: with a stock context a client resumes its session; with our settings
// each connection is a full handshake, and an expired client is refused.
func TestSpec_S35_Resumption(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	c := config{Socket: a.socket, Delta: true, Application: newApplication(t)}
	ours := startEnvoy(t, c)
	c.Resumption = true
	stock := startEnvoy(t, c)
	ours.waitLive()
	stock.waitLive()
	port := map[*proxy]int{ours: ours.port("inbound"), stock: stock.port("inbound")}
	clients := map[*proxy]map[uint16]*tls.Config{ours: {}, stock: {}}
	v := expiring(t, ca, func(v *identity.SVID) error {
		for p, resumes := range map[*proxy]bool{ours: false, stock: true} {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				client := resuming(v, version)
				clients[p][version] = client
				for i := range 3 {
					resumed, err := try(t, port[p], client)
					if err != nil {
						return err
					}
					if want := resumes && i > 0; resumed != want {
						t.Errorf("%s, connection %d: resumed %t, want %t", tls.VersionName(version), i, resumed, want)
					}
				}
			}
		}
		return nil
	})
	waitExpired(t, v)
	for version, client := range clients[stock] {
		resumed, err := try(t, port[stock], client)
		t.Logf("expired, with a stock context, %s: resumed %t, refused %t", tls.VersionName(version), resumed, err != nil)
	}
	for version, client := range clients[ours] {
		if resumed, err := try(t, port[ours], client); err == nil || resumed {
			t.Errorf("expired, %s: resumed %t, %v", tls.VersionName(version), resumed, err)
		}
	}
}

// TestV_H3_SessionsAfterAChange: no session outlives a change of what the server
// trusts, not even with a stock context; with ours there are none.
func TestV_H3_SessionsAfterAChange(t *testing.T) {
	for _, c := range []config{{Delta: true}, {Delta: true, Resumption: true}, {Resumption: true}} {
		t.Run(fmt.Sprintf("delta %t, resumption %t", c.Delta, c.Resumption), func(t *testing.T) {
			ca, next := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "a.test")
			a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
			c.Socket, c.Application = a.socket, newApplication(t)
			p := startEnvoy(t, c)
			p.waitLive()
			port := p.port("inbound")
			var clients []*tls.Config
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				client := resuming(ca.SVID("/client"), version)
				clients = append(clients, client)
				var resumed bool
				for range 2 {
					var err error
					if resumed, err = try(t, port, client); err != nil {
						t.Fatal(err)
					}
				}
				if resumed != c.Resumption {
					t.Errorf("%s: resumed %t", tls.VersionName(version), resumed)
				}
			}
			a.source.Publish(next.Snapshot(2, next.SVID("/x")))
			believed := next.SVID("/other")
			eventually(t, "the new root is in force", func() bool {
				_, _, err := call(port, believed, next.Cert)
				return err == nil && a.source.LastAcknowledged() == 2
			})
			for _, client := range clients {
				for range 3 {
					if resumed, err := try(t, port, client); err == nil || resumed {
						t.Errorf("%s: resumed %t, %v, though its root is gone", tls.VersionName(client.MinVersion), resumed, err)
					}
				}
			}
		})
	}
}

// TestSpec_S20_ClientOfTLS12: a client that speaks TLS 1.2 at most is served, through a rotation, where no minimum
// is configured, and refused with the one that we ship.
func TestSpec_S20_ClientOfTLS12(t *testing.T) {
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	c := config{Socket: a.socket, Delta: true, Application: newApplication(t)}
	served := startEnvoy(t, c)
	c.Minimum = "TLSv1_3"
	refused := startEnvoy(t, c)
	served.waitLive()
	refused.waitLive()
	client := clientConfig(ca.SVID("/client"))
	client.MinVersion, client.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	port := served.port("inbound")
	if _, err := try(t, port, client); err != nil {
		t.Error(err)
	}
	if served.stat("ssl.versions.TLSv1.2") == 0 {
		t.Error("it was another version")
	}
	if _, err := try(t, refused.port("inbound"), client); err == nil {
		t.Error("served below the minimum")
	}
	next := ca.SVID("/x")
	a.source.Publish(ca.Snapshot(1, next))
	eventually(t, "the new certificate", func() bool {
		s, err := open(t, port, client)
		if err != nil {
			t.Fatal(err)
		}
		defer s.conn.Close()
		if err := s.get(); err != nil {
			t.Fatal(err)
		}
		return s.conn.ConnectionState().PeerCertificates[0].Equal(identitytest.X509(next.Chain[0]))
	})
	nobody := clientConfig(nil)
	nobody.MinVersion, nobody.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if _, err := try(t, port, nobody); err == nil {
		t.Error("let in without a certificate")
	}
}
