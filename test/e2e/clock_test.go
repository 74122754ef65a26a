package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/require"
	"github.com/meshid/meshid/test/shop/mesh"
)

// clock is the wall clock of a program, which a test steps.
type clock struct{ program, file string }

// newClock builds the program that shows another the clock that a file says.
func newClock(t *testing.T) *clock {
	t.Helper()
	prepare(t)
	c := &clock{program: filepath.Join(machine.dir, "stepclock"), file: filepath.Join(t.TempDir(), "clock")}
	source := filepath.Join(require.Repository(), "test", "e2e", "testdata", "stepclock.c")
	if out, err := exec.CommandContext(t.Context(), require.Program(t, "gcc"), "-O2", "-o", c.program, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	c.step(t, 0)
	return c
}

func (c *clock) wrap() []string { return []string{c.program, c.file} }

// step sets how far the program's clock is from the machine's.
func (c *clock) step(t *testing.T, by time.Duration) {
	t.Helper()
	must(t, os.WriteFile(c.file+".new", []byte(strconv.Itoa(int(by.Seconds()))), 0o600))
	must(t, os.Rename(c.file+".new", c.file))
}

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
			c := newClock(t)
			m := open(t, mesh.Config{RequestsPerConnection: 1, Entries: entries(t, "1h"), RunAgent: c.wrap()})
			before := issued(t, m)
			c.step(t, by)
			must(t, m.Renew(100*time.Millisecond)(t.Context())) // wakes it, so that it sees the new time
			must(t, m.Sell(t.Context(), 500))
			if n := issued(t, m) - before; n > 60 {
				t.Errorf("%d certificates were issued in ten seconds for %d identities", n, len(m.All()))
			}
			c.step(t, 0)
			must(t, m.RotateAll(t.Context(), 2*time.Minute, m.Renew(100*time.Millisecond)))
			must(t, m.Sell(t.Context(), 50))
			sold(t, m)
		})
	}
}

// A node agent whose clock is a little wrong is as good as any, if the CA dates
// certificates back by as much as clocks may be wrong.
func TestFault_F46_AgentsClockIsALittleWrong(t *testing.T) {
	c := newClock(t)
	c.step(t, 4*time.Minute)
	m := open(t, mesh.Config{
		RequestsPerConnection: 1, Entries: entries(t, "1h"), RunAgent: c.wrap(), ExtraCA: "svid: {backdate: 5m}\n",
	})
	must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
	c.step(t, -4*time.Minute)
	must(t, m.RotateAll(t.Context(), time.Minute, m.Renew(100*time.Millisecond)))
	must(t, m.Sell(t.Context(), 50))
	sold(t, m)
}

// The CA's clock is stepped back and forth under traffic: nothing that is valid
// is lost, and once the clock is right certificates are issued as before.
func TestFault_F45_CAsClockIsStepped(t *testing.T) {
	for name, by := range map[string]time.Duration{"an hour ahead": time.Hour, "an hour behind": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			c := newClock(t)
			m := open(t, mesh.Config{RequestsPerConnection: 1, Entries: entries(t, "1h"), RunCA: c.wrap()})
			c.step(t, by)
			must(t, m.Sell(t.Context(), 250))
			select {
			case <-m.CA.Ended():
				t.Fatalf("the CA ended: %s", m.CA.Tail())
			default:
			}
			c.step(t, 0)
			must(t, m.AwaitCA(t.Context()))
			must(t, m.AwaitAgent(t.Context()))
			must(t, m.RotateAll(t.Context(), 2*time.Minute, m.Renew(100*time.Millisecond)))
			must(t, m.Sell(t.Context(), 50))
			sold(t, m)
		})
	}
}
