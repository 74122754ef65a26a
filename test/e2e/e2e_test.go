// Package e2e runs the real programs, real Envoys and a real Docker engine, and
// looks at them from outside: does the shop sell, and to whom only. It answers
// "does the whole hold"; what a part does by itself is that part's tests.
package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/test/require"
	"github.com/meshid/meshid/test/shop/engine"
	"github.com/meshid/meshid/test/shop/mesh"
)

// machine is what all tests share: the programs, and a Docker engine of our own,
// which some of them restart.
var machine struct {
	once   sync.Once
	dir    string
	engine *engine.Engine
	err    error
}

// patience is how long something may take that takes a moment on an idle machine.
const patience = time.Minute

func TestMain(m *testing.M) {
	code := m.Run()
	if machine.engine != nil {
		if err := machine.engine.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "stop the docker engine:", err)
			code = 1
		}
	}
	if machine.dir != "" {
		_ = os.RemoveAll(machine.dir)
	}
	os.Exit(code) //nolint:forbidigo // TestMain is this package's main
}

// prepare builds the programs and starts the engine, once.
func prepare(t *testing.T) {
	t.Helper()
	require.Root(t)
	require.Envoy(t)
	require.Program(t, "dockerd")
	machine.once.Do(func() {
		// Short, since sockets are below it; t.TempDir is not.
		machine.dir, machine.err = os.MkdirTemp("", "meshid-e2e-") //nolint:usetesting // see above
		if machine.err != nil {
			return
		}
		if machine.err = os.Chmod(machine.dir, 0o711); machine.err != nil {
			return
		}
		if machine.err = build(filepath.Join(machine.dir, "bin")); machine.err != nil {
			return
		}
		machine.engine, machine.err = engine.StartPrivate(context.Background(), filepath.Join(machine.dir, "docker"))
	})
	if machine.err != nil {
		t.Fatal(machine.err)
	}
}

// build builds the programs as they are shipped, with the race detector where
// the tests have it; the one in a container is static.
func build(dir string) error {
	race := "-race=false"
	if raceEnabled {
		race = "-race"
	}
	for _, b := range []struct {
		cgo  string
		args []string
	}{
		{"1", []string{"build", race, "-o", dir + "/", "./cmd/ca", "./cmd/node-agent"}},
		{"0", []string{"build", "-o", filepath.Join(dir, "shop"), "./test/shop"}},
	} {
		cmd := exec.Command("go", b.args...)
		cmd.Dir = require.Repository()
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+b.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %v: %w\n%s", b.args, err, out)
		}
	}
	return nil
}

// start starts a CA and a node agent; the test's end stops them, and fails if
// they do not stop as they should.
func start(t *testing.T, c mesh.Config) *mesh.Mesh {
	t.Helper()
	prepare(t)
	dir, err := os.MkdirTemp(machine.dir, "m") //nolint:usetesting // its path is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	c.Dir, c.Bin, c.Envoy, c.Engine = dir, filepath.Join(machine.dir, "bin"), require.Envoy(t), machine.engine
	if c.Entries == "" {
		c.Entries = filepath.Join(require.Repository(), "deploy", "demo", "entries.yaml")
	}
	if c.Rate == 0 {
		c.Rate = 50
	}
	c.Progress = t.Logf
	m, err := mesh.Start(t.Context(), c)
	if m != nil {
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("the CA says:\n%s\nthe node agent says:\n%s", m.CA.Tail(), m.Agent.Tail())
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// open starts a mesh and opens the shop.
func open(t *testing.T, c mesh.Config) *mesh.Mesh {
	t.Helper()
	m := start(t, c)
	must(t, m.Open(t.Context()))
	return m
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sold fails the test if a request has failed, or Envoy refused a secret.
func sold(t *testing.T, m *mesh.Mesh) mesh.Figures {
	t.Helper()
	f, err := m.Figures(t.Context())
	must(t, err)
	t.Logf("requests %d, failures %d, handshakes %d, rotations %d, rejected secrets %d", f.Requests, f.Failures, f.Handshakes, f.Rotations, f.Rejected)
	if f.Failures > 0 {
		t.Errorf("%d of %d requests failed; the last one: %s", f.Failures, f.Requests, f.LastError)
	}
	if f.Rejected > 0 {
		t.Errorf("envoy rejected %d secrets", f.Rejected)
	}
	return f
}

// agentStatus is what the tests read of `node-agent status -o json`.
type agentStatus struct {
	Instances []struct {
		Instance   string `json:"instance"`
		Identities []struct {
			SPIFFEID string    `json:"spiffe_id"`
			State    string    `json:"state"`
			Serial   string    `json:"serial"`
			NotAfter time.Time `json:"not_after"`
		} `json:"identities"`
	} `json:"instances"`
}

func status(ctx context.Context, m *mesh.Mesh) (agentStatus, error) {
	var s agentStatus
	out, err := exec.CommandContext(ctx, filepath.Join(m.Bin, "node-agent"), "status", "-o", "json", "--admin-socket", m.AgentAdminSocket()).CombinedOutput()
	if err != nil {
		return s, fmt.Errorf("node-agent status: %w: %s", err, out)
	}
	return s, json.Unmarshal(out, &s)
}

// holders counts the instances on the machine that hold an identity.
func (s agentStatus) holders(id string) int {
	n := 0
	for _, i := range s.Instances {
		for _, identity := range i.Identities {
			if identity.SPIFFEID == id && identity.Serial != "" {
				n++
			}
		}
	}
	return n
}

// awaitHolders waits until n instances hold an identity.
func awaitHolders(t *testing.T, m *mesh.Mesh, id string, n int) {
	t.Helper()
	must(t, mesh.Await(t.Context(), fmt.Sprintf("%d holders of %s", n, id), patience, func(ctx context.Context) error {
		s, err := status(ctx, m)
		if err == nil && s.holders(id) != n {
			err = fmt.Errorf("there are %d: %+v", s.holders(id), s)
		}
		return err
	}))
}

// awaitClosed waits until the customer's requests fail: nobody serves it any more.
func awaitClosed(t *testing.T, m *mesh.Mesh) {
	t.Helper()
	before, err := m.Sales(t.Context())
	must(t, err)
	at := time.Now()
	must(t, mesh.Await(t.Context(), "the customer to be refused", patience, func(ctx context.Context) error {
		s, err := m.Sales(ctx)
		if err == nil && s.Failures == before.Failures {
			err = errors.New("all requests succeed")
		}
		return err
	}))
	t.Logf("refused after %v", time.Since(at).Round(time.Millisecond))
}
