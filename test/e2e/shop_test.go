package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/shop/mesh"
)

// The shop sells over three mutual TLS hops, in both ways to ask for secrets.
// The customer checks in each answer that every service was called by exactly
// the identity that X-Forwarded-Client-Cert must name.
func TestSpec_S01_S02_S16_ShopSells(t *testing.T) {
	for name, sds := range map[string]string{"sotw": mesh.SDSStateOfTheWorld, "delta": mesh.SDSDelta} {
		t.Run(name, func(t *testing.T) {
			m := open(t, mesh.Config{SDS: sds})
			must(t, m.Sell(t.Context(), 50))
			sold(t, m)
			for _, i := range m.All() {
				c, err := i.Envoy.Certificate(t.Context())
				must(t, err)
				if c == nil || c.ID != m.ID(i.Service.Name) {
					t.Errorf("certificate of %s: %+v, want %s", i.Name, c, m.ID(i.Service.Name))
				}
			}
		})
	}
}

// A container whose labels match no entry gets no identity, a service that has
// one is let in only where it is named, and neither a plain nor a forged
// connection gets anywhere. Both intruders try all of it.
func TestV_E2_IntrudersAreRefused(t *testing.T) {
	m := open(t, mesh.Config{})
	must(t, m.Intrude(t.Context()))
	gossip := m.Instances(mesh.Gossip)[0]
	must(t, m.AwaitReady(t.Context(), gossip))
	for _, name := range mesh.Intruders {
		i := m.Instances(name)[0]
		must(t, mesh.Await(t.Context(), name+" to try its doors", patience, func(ctx context.Context) error {
			attempts, err := i.Attempts(ctx)
			if err != nil {
				return err
			}
			if len(attempts) != 4 {
				return fmt.Errorf("%d ways in, want 4", len(attempts))
			}
			for _, a := range attempts {
				if a.GotIn > 0 {
					t.Fatalf("%s got in %s", name, a.Name)
				}
				if a.Tries < 3 {
					return fmt.Errorf("it tried %d times %s", a.Tries, a.Name)
				}
			}
			return nil
		}))
	}
	c, err := m.Instances(mesh.Burglar)[0].Envoy.Certificate(t.Context())
	must(t, err)
	if c != nil {
		t.Errorf("the burglar has a certificate: %+v", c)
	}
	stock, err := m.Instances("stock")[0].Envoy.Traffic(t.Context())
	must(t, err)
	if stock.Refused == 0 {
		t.Error("stock's sidecar has refused nobody")
	}
	sold(t, m)
}

// Instances come and go under traffic: each has a key of its own, which is
// dropped when it ends.
func TestV_I8_ScaleUpAndDown(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 5})
	orders := m.ID("orders")
	awaitHolders(t, m, orders, 1)
	must(t, m.Scale(t.Context(), "orders", 3))
	awaitHolders(t, m, orders, 3)
	serials := map[string]bool{}
	for _, i := range m.Instances("orders") {
		c, err := i.Envoy.Certificate(t.Context())
		must(t, err)
		serials[c.Serial] = true
	}
	if len(serials) != 3 {
		t.Errorf("three instances serve %d certificates", len(serials))
	}
	must(t, m.Sell(t.Context(), 100))
	sales, err := m.Sales(t.Context())
	must(t, err)
	for _, i := range m.Instances("orders") {
		if sales.Instances[i.Name] == 0 {
			t.Errorf("%s was never called", i.Name)
		}
	}
	must(t, m.Scale(t.Context(), "orders", 1))
	awaitHolders(t, m, orders, 1)
	must(t, m.Sell(t.Context(), 100))
	sold(t, m)
}

// All leaves, then the intermediate with all leaves, are replaced under traffic,
// with connections that are kept and with a handshake for each request.
func TestSpec_S17_S18_RotationUnderTraffic(t *testing.T) {
	for name, perConnection := range map[string]int{"kept alive": 0, "handshake per request": 1} {
		t.Run(name, func(t *testing.T) {
			m := open(t, mesh.Config{RequestsPerConnection: perConnection, Rate: 100})
			before, err := m.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
			must(t, err)
			for range 5 {
				must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
			}
			must(t, m.RotateAll(t.Context(), time.Minute, m.RotateIntermediate(100*time.Millisecond)))
			after, err := m.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
			must(t, err)
			if active(before) == active(after) {
				t.Errorf("intermediate %s is still the active one", active(after))
			}
			must(t, m.Sell(t.Context(), 100))
			f := sold(t, m)
			if want := uint64(6 * len(m.All())); f.Rotations < want {
				t.Errorf("%d rotations, want %d at least", f.Rotations, want)
			}
		})
	}
}

// active returns the ID of the intermediate that signs.
func active(l *adminv1.ListAuthoritiesResponse) string {
	for _, a := range l.GetAuthorities() {
		if a.GetRole() == "intermediate" && a.GetState() == "active" {
			return a.GetId()
		}
	}
	return ""
}

// The sidecars go on without the node agent. After its return the identities are
// the same, nothing was issued anew, and they rotate again.
func TestSpec_S08_S24_AgentKilled(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 5, Entries: entries(t, "1h")})
	must(t, m.Sell(t.Context(), 150)) // three seconds: the cache on disk is one behind at most
	before := serials(t, m)
	m.Agent.Kill()
	must(t, m.Sell(t.Context(), 100))
	must(t, m.Agent.Start())
	must(t, m.AwaitAgent(t.Context()))
	awaitHolders(t, m, m.ID("orders"), 1)
	must(t, m.Sell(t.Context(), 50))
	for name, serial := range serials(t, m) {
		if before[name] != serial {
			t.Errorf("%s has another certificate after the agent's restart", name)
		}
	}
	must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
	must(t, m.Sell(t.Context(), 50))
	sold(t, m)
}

// With the CA down, what runs goes on, and the agent can even be restarted: it
// serves from its cache. After the CA's return issuing resumes, and its journal
// is whole.
func TestSpec_S25_S46_CAKilled(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 5, Entries: entries(t, "1h")})
	must(t, m.CA.Signal(os.Kill))
	<-m.CA.Ended()
	m.Agent.Kill()
	must(t, m.Agent.Start())
	must(t, m.Sell(t.Context(), 100))
	awaitHolders(t, m, m.ID("orders"), 1)

	// A sidecar that starts now is served from the cache as well.
	stock := m.Instances("stock")[0]
	must(t, m.Engine.StopContainer(t.Context(), stock.Sidecar, time.Second))
	must(t, m.Engine.StartContainer(t.Context(), stock.Sidecar))

	must(t, m.CA.Start())
	must(t, m.AwaitCA(t.Context()))
	must(t, m.AwaitAgent(t.Context()))
	must(t, m.AwaitReady(t.Context(), stock))
	must(t, m.Scale(t.Context(), "orders", 2))
	awaitHolders(t, m, m.ID("orders"), 2)
	out, err := m.LedgerCommand(t.Context(), "verify")
	must(t, err)
	t.Logf("ca ledger verify: %s", out)
}

// An entry that is deleted takes its identities with it: what was delivered is
// made useless within seconds, and comes back with the entry.
func TestSpec_S28_EntryDeleted(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 1})
	_, err := m.CACommand(t.Context(), "entry", "delete", "shop")
	must(t, err)
	awaitClosed(t, m)
	awaitHolders(t, m, m.ID("orders"), 0)
	must(t, m.ApplyEntries(t.Context()))
	awaitHolders(t, m, m.ID("orders"), 1)
	awaitOpen(t, m)
}

// A node that is banned loses its stream, and its workloads their identities, at
// once; renewals are refused, and a restart of the agent changes nothing.
func TestV_E7_NodeBanned(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 1})
	_, err := m.Admin.BanNode(t.Context(), &adminv1.BanNodeRequest{Id: m.NodeID(), Reason: "test"})
	must(t, err)
	awaitClosed(t, m)
	nodes, err := m.Admin.ListNodes(t.Context(), &adminv1.ListNodesRequest{})
	must(t, err)
	for _, n := range nodes.GetNodes() {
		if n.GetId() == m.NodeID() && (n.GetConnected() || n.GetState() != "banned") {
			t.Errorf("the banned node is %s, connected: %v", n.GetState(), n.GetConnected())
		}
	}
	m.Agent.Kill()
	must(t, m.Agent.Start())
	must(t, mesh.Await(t.Context(), "the refusal to be recorded", patience, func(ctx context.Context) error {
		if m.AwaitNode(ctx, 100*time.Millisecond) == nil {
			t.Fatal("the banned node is connected")
		}
		status, err := m.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
		if err == nil && status.GetRefused() == 0 {
			err = errors.New("nothing was refused")
		}
		return err
	}))
	awaitHolders(t, m, m.ID("orders"), 0)
	_, err = m.Admin.UnbanNode(t.Context(), &adminv1.UnbanNodeRequest{Id: m.NodeID()})
	must(t, err)
}

// The CA is away for longer than certificates live: connections are refused
// from the moment they expire, and all is well again once the CA is back.
// Nobody restarts an Envoy for it.
func TestSpec_S25_CAAwayForLongerThanALife(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 1, Entries: entries(t, "12s")})
	m.CA.Kill()
	var last time.Time
	for _, i := range m.All() {
		c, err := i.Envoy.Certificate(t.Context())
		must(t, err)
		if c.NotAfter.After(last) {
			last = c.NotAfter
		}
	}
	awaitClosed(t, m)
	// Requests that succeed after the last expiry would be the failure.
	timer := time.NewTimer(time.Until(last))
	<-timer.C
	before, err := m.Sales(t.Context())
	must(t, err)
	must(t, m.Sell(t.Context(), 20))
	after, err := m.Sales(t.Context())
	must(t, err)
	if ok := (after.Requests - after.Failures) - (before.Requests - before.Failures); ok > 8 { // those that were open
		t.Errorf("%d requests succeeded after all certificates had expired", ok)
	}
	must(t, m.CA.Start())
	must(t, m.AwaitCA(t.Context()))
	awaitOpen(t, m)
}

// A sidecar that is killed is back with its identity at once, and one that is
// paused does not hold up the others.
func TestSpec_S44_SidecarKilledAndPaused(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 1})
	must(t, m.Scale(t.Context(), "orders", 2))
	victim := m.Instances("orders")[1]
	must(t, m.Engine.KillContainer(t.Context(), victim.Sidecar, "SIGSTOP"))
	must(t, m.RotateAll(t.Context(), patience, m.Renew(100*time.Millisecond), victim))
	must(t, m.Engine.KillContainer(t.Context(), victim.Sidecar, "SIGCONT"))
	must(t, m.AwaitReady(t.Context(), victim))
	must(t, m.Engine.KillContainer(t.Context(), victim.Sidecar, "SIGKILL"))
	awaitHolders(t, m, m.ID("orders"), 1)
	must(t, m.Engine.StartContainer(t.Context(), victim.Sidecar))
	must(t, m.AwaitReady(t.Context(), victim))
	awaitHolders(t, m, m.ID("orders"), 2)
	awaitOpen(t, m)
}

// The engine restarts: its containers are gone, and so are their keys; what is
// started afterwards has identities as before.
func TestV_D13_EngineRestarts(t *testing.T) {
	m := open(t, mesh.Config{})
	must(t, machine.engine.Restart(t.Context()))
	awaitHolders(t, m, m.ID("orders"), 0)
	for _, i := range m.All() {
		must(t, m.Discard(t.Context(), i))
	}
	must(t, m.Reopen(t.Context()))
	must(t, m.Sell(t.Context(), 50))
	sold(t, m)
}

// The engine hangs: it accepts connections and says nothing. Those whose
// container is known rotate on, and nobody gets what he should not; after it has
// come back, new containers get their identities.
func TestV_D13_EngineHangs(t *testing.T) {
	m := open(t, mesh.Config{RequestsPerConnection: 5})
	must(t, machine.engine.Hang())
	defer func() { must(t, machine.engine.Resume()) }()
	for range 2 {
		must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
	}
	must(t, m.Sell(t.Context(), 100))
	must(t, machine.engine.Resume())
	must(t, m.Scale(t.Context(), "orders", 2))
	must(t, m.Sell(t.Context(), 50))
	sold(t, m)
}

// Envoy's admin interface shows no private key.
func TestSpec_S39_NoKeyInConfigDump(t *testing.T) {
	m := open(t, mesh.Config{})
	var dump json.RawMessage
	must(t, m.Instances("orders")[0].Envoy.Get(t.Context(), "/config_dump?include_eds", &dump))
	if strings.Contains(string(dump), "PRIVATE KEY") {
		t.Error("config_dump shows a private key")
	}
	if !strings.Contains(string(dump), "default") {
		t.Error("config_dump does not name the secret")
	}
}

// entries returns the demo's entries with another life.
func entries(t *testing.T, ttl string) string {
	t.Helper()
	text, err := os.ReadFile("../../deploy/demo/entries.yaml")
	must(t, err)
	changed := strings.Replace(string(text), "ttl: 1m", "ttl: "+ttl, 1)
	if changed == string(text) {
		t.Fatal("the demo's entries have another ttl than this test expects")
	}
	path := filepath.Join(t.TempDir(), "entries.yaml")
	must(t, os.WriteFile(path, []byte(changed), 0o600))
	return path
}

func serials(t *testing.T, m *mesh.Mesh) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, i := range m.All() {
		c, err := i.Envoy.Certificate(t.Context())
		must(t, err)
		if c != nil {
			out[i.Name] = c.Serial
		}
	}
	return out
}

// awaitOpen waits until twenty requests in a row have succeeded.
func awaitOpen(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	var since mesh.Sales
	must(t, mesh.Await(t.Context(), "the shop to sell again", patience, func(ctx context.Context) error {
		now, err := m.Sales(ctx)
		if err != nil {
			return err
		}
		if now.Failures != since.Failures {
			since = now
		}
		if now.Requests < since.Requests+20 {
			return fmt.Errorf("the last failure: %s", now.LastError)
		}
		return nil
	}))
}
