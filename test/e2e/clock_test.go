package e2e

import (
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/shop/mesh"
	"github.com/meshid/meshid/test/stepclock"
)

// issued returns how many certificates the CA has issued.
func issued(t *testing.T, m *mesh.Mesh) uint64 {
	t.Helper()
	s, err := m.Admin.GetStatus(t.Context(), &adminv1.GetStatusRequest{})
	must(t, err)
	return s.GetIssued()
}

// A node agent whose clock is stepped does no harm: the sidecars keep what they
// have, which is valid by their own clocks, the CA is not asked again and again,
// and once the clock is right all is as before.
func TestFault_F46_AgentsClockIsStepped(t *testing.T) {
	for name, by := range map[string]time.Duration{"past the renewals": 40 * time.Minute, "an hour behind": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			c := stepclock.New(t)
			m := open(t, mesh.Config{RequestsPerConnection: 1, Entries: entries(t, "1h"), RunAgent: c.Wrap()})
			before := issued(t, m)
			c.Step(t, by)
			must(t, m.Renew(100*time.Millisecond)(t.Context())) // wakes it, so that it sees the new time
			must(t, m.Sell(t.Context(), 500))
			if n := issued(t, m) - before; n > 60 {
				t.Errorf("%d certificates were issued in ten seconds for %d identities", n, len(m.All()))
			}
			c.Step(t, 0)
			must(t, m.RotateAll(t.Context(), 2*time.Minute, m.Renew(100*time.Millisecond)))
			must(t, m.Sell(t.Context(), 50))
			sold(t, m)
		})
	}
}

// A node agent whose clock is a little wrong is as good as any, if the CA dates
// certificates back by as much as clocks may be wrong.
func TestFault_F46_AgentsClockIsALittleWrong(t *testing.T) {
	c := stepclock.New(t)
	c.Step(t, 4*time.Minute)
	m := open(t, mesh.Config{
		RequestsPerConnection: 1, Entries: entries(t, "1h"), RunAgent: c.Wrap(), ExtraCA: "svid: {backdate: 5m}\n",
	})
	must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
	c.Step(t, -4*time.Minute)
	must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
	must(t, m.Sell(t.Context(), 50))
	sold(t, m)
}

// The CA's clock is stepped back and forth under traffic: nothing that is valid
// is lost, and once the clock is right certificates are issued as before.
func TestFault_F45_CAsClockIsStepped(t *testing.T) {
	for name, by := range map[string]time.Duration{"an hour ahead": time.Hour, "an hour behind": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			c := stepclock.New(t)
			m := open(t, mesh.Config{RequestsPerConnection: 1, Entries: entries(t, "1h"), RunCA: c.Wrap()})
			c.Step(t, by)
			must(t, m.Sell(t.Context(), 250))
			select {
			case <-m.CA.Ended():
				t.Fatalf("the CA ended: %s", m.CA.Tail())
			default:
			}
			c.Step(t, 0)
			must(t, m.AwaitCA(t.Context()))
			must(t, m.AwaitAgent(t.Context()))
			must(t, m.RotateAll(t.Context(), 2*time.Minute, m.Renew(100*time.Millisecond)))
			must(t, m.Sell(t.Context(), 50))
			sold(t, m)
		})
	}
}
