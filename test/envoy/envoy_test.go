package envoy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
