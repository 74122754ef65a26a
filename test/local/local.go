// Package local runs the real programs, a CA and node agents, as processes on
// this machine, each in a folder of its own, for tests and benchmarks that need
// no container. It stops what it started, by process.
package local

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshid/meshid/pkg/agent"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/require"
)

// TrustDomain is that of every CA here.
const TrustDomain = "example.org"

// patience bounds every wait: a loaded machine is slow, and only a failure waits
// this long.
const patience = 60 * time.Second

var build = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("MESHID_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "meshid-bin")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // workloads of other users run them
		return "", err
	}
	// As in the Makefile.
	for _, args := range [][]string{{"./cmd/ca"}, {"-tags=grpcnotrace,nethttpomithttp2", "./cmd/node-agent"}} {
		cmd := exec.Command("go", append([]string{"build", "-o", dir + "/"}, args...)...) //nolint:gosec // the arguments are ours
		cmd.Dir = require.Repository()
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build the programs: %w\n%s", err, out)
		}
	}
	return dir, nil
})

// Binaries returns the folder with ca and node-agent: MESHID_BIN, or one that
// they are built into, once for all tests of a package. Remove it with Clean.
func Binaries(t testing.TB) string {
	t.Helper()
	dir, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Main runs the tests of a package and removes what Binaries built.
func Main(m *testing.M) int {
	code := m.Run()
	if os.Getenv("MESHID_BIN") == "" {
		if dir, err := build(); err == nil {
			_ = os.RemoveAll(dir) // a leftover in the temporary folder harms nobody
		}
	}
	return code
}

// Process is one program.
type Process struct {
	name string
	args []string
	log  *identitytest.Log
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; read after done is closed
}

// New returns a program that was not started yet. Whoever starts it kills it.
func New(args ...string) *Process {
	return &Process{name: filepath.Base(args[0]), args: args, log: &identitytest.Log{}}
}

// Run starts a program, which is stopped when the test ends.
func Run(t testing.TB, args ...string) *Process {
	t.Helper()
	p := New(args...)
	p.Start(t)
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() || os.Getenv("MESHID_LOGS") != "" {
			t.Logf("log of %s:\n%s", p.name, p.Log())
		}
	})
	return p
}

// Start starts the program, also again after Stop or Kill. It is the leader of a
// process group, and is killed when the tests end without having stopped it.
func (p *Process) Start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(p.args[0], p.args[1:]...) //nolint:gosec,noctx // the arguments are the test's; it is stopped with the test
	cmd.Stdout, cmd.Stderr = p.log, p.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	done, started := make(chan struct{}), make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig is about the thread that started it
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(done)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	p.cmd, p.done = cmd, done
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Log returns what the program has printed since it was first started.
func (p *Process) Log() string { return p.log.String() }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill kills the program and waits for its end. It may have ended, or not started.
func (p *Process) Kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// Signal sends a signal.
func (p *Process) Signal(t testing.TB, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// Stop ends the program as an operator does, and returns its error, nil if it
// ended cleanly.
func (p *Process) Stop(t testing.TB) error {
	t.Helper()
	p.Signal(t, syscall.SIGTERM)
	select {
	case <-p.done:
		return p.err
	case <-time.After(patience):
		p.Kill()
		return errors.New("did not end on SIGTERM")
	}
}

// Await calls done until it returns nil: every 5 ms, after 200 times every 50 ms.
func Await(t testing.TB, what string, done func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for tries := 1; ; tries++ {
		err := done(ctx)
		if err == nil {
			return
		}
		if tries == 200 {
			tick.Reset(50 * time.Millisecond) // what takes so long needs the processor itself
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}

// CA is a running CA.
type CA struct {
	*Process
	Dir, Listen, Metrics, AdminSocket, DataDir string
	Admin                                      adminv1.AdminServiceClient
}

// CAOptions change how a CA is started.
type CAOptions struct {
	// Config is added to ca.yaml.
	Config string
	// Listen is where it listens, if not on loopback.
	Listen string
	// Wrap stands before the program's own arguments.
	Wrap []string
}

// StartCA starts a CA and waits until it answers.
func StartCA(t testing.TB, o CAOptions) *CA {
	t.Helper()
	dir := shortDir(t)
	c := &CA{
		Dir: dir, Listen: cmp.Or(o.Listen, FreeAddress(t)), Metrics: FreeAddress(t),
		AdminSocket: filepath.Join(dir, "admin.sock"), DataDir: filepath.Join(dir, "ca"),
	}
	config := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nlisten: '%s'\nadmin_socket: %s\nmetrics_listen: '%s'\n%s",
		TrustDomain, c.DataDir, c.Listen, c.AdminSocket, c.Metrics, o.Config)
	c.Process = Run(t, append(o.Wrap, filepath.Join(Binaries(t), "ca"), "run", "--config", writeFile(t, dir, "ca.yaml", config))...)
	conn, err := grpc.NewClient("unix:"+c.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c.Admin = adminv1.NewAdminServiceClient(conn)
	c.AwaitReady(t)
	return c
}

// AwaitReady waits until the CA answers.
func (c *CA) AwaitReady(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ended := c.Done() // of this run: there may be another before the goroutine ends
	go func() {
		select {
		case <-ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	if _, err := c.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("wait for the CA: %v\n%s", err, c.Log())
	}
}

// Command runs one of ca's commands against this CA and returns what it prints.
func (c *CA) Command(t testing.TB, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(Binaries(t), "ca"), args...) //nolint:gosec,noctx // the arguments are the test's; it is stopped with the test
	cmd.Env = append(os.Environ(), "MESHID_ADMIN_SOCKET="+c.AdminSocket)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("ca %v: %w: %s", args, err, stderr.String())
	}
	return string(out), err
}

// MustCommand is Command for what cannot fail.
func (c *CA) MustCommand(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.Command(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply applies entries, given as YAML.
func (c *CA) Apply(t testing.TB, entries string) {
	t.Helper()
	c.MustCommand(t, "entry", "apply", "-f", writeFile(t, c.Dir, "entries.yaml", entries))
}

// Agent is a running node agent.
type Agent struct {
	*Process
	NodeID, Dir, Socket, AdminSocket, Metrics string
}

// AgentOptions change how an agent is started.
type AgentOptions struct {
	// Config is added to agent.yaml.
	Config string
	// Address of the CA, if not its own: a proxy in between.
	Address string
	// Labels of the node.
	Labels map[string]string
	// NodeAttestation replaces the join token: the value of node_attestation.
	NodeAttestation string
	// Wrap stands before the program's own arguments.
	Wrap []string
}

// StartAgent joins a node to the CA with a token and waits until it is connected.
func (c *CA) StartAgent(t testing.TB, node string, o AgentOptions) *Agent {
	t.Helper()
	a := c.LaunchAgent(t, node, o)
	a.AwaitConnected(t)
	return a
}

// LaunchAgent is StartAgent without the wait.
func (c *CA) LaunchAgent(t testing.TB, node string, o AgentOptions) *Agent {
	t.Helper()
	dir := shortDir(t)
	a := &Agent{
		Dir: dir, Socket: filepath.Join(dir, "agent.sock"), AdminSocket: filepath.Join(dir, "admin.sock"),
		Metrics: FreeAddress(t),
	}
	if o.NodeAttestation == "" {
		token, err := c.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: node, Labels: o.Labels})
		if err != nil {
			t.Fatal(err)
		}
		a.NodeID = token.GetNodeId()
		o.NodeAttestation = fmt.Sprintf("{join_token: {token_file: %s}}", writeFile(t, dir, "token", token.GetToken()))
	}
	if o.Address == "" {
		o.Address = c.Listen
	}
	config := fmt.Sprintf(`trust_domain: %s
ca: {address: '%s', bundle: %s}
data_dir: %s
socket: %s
admin_socket: %s
metrics_listen: '%s'
node_attestation: %s
%s`, TrustDomain, o.Address, writeFile(t, dir, "bundle.pem", c.MustCommand(t, "bundle", "show")), filepath.Join(dir, "agent"),
		a.Socket, a.AdminSocket, a.Metrics, o.NodeAttestation, o.Config)
	a.Process = Run(t, append(o.Wrap, filepath.Join(Binaries(t), "node-agent"), "run", "--config", writeFile(t, dir, "agent.yaml", config))...)
	return a
}

// Address is the agent's socket in the form of SPIFFE_ENDPOINT_SOCKET.
func (a *Agent) Address() string { return "unix://" + a.Socket }

// AwaitConnected waits until the agent has a stream with the CA.
func (a *Agent) AwaitConnected(t testing.TB) {
	t.Helper()
	Await(t, "wait for the agent", func(ctx context.Context) error {
		select {
		case <-a.Done():
			t.Fatalf("the agent has ended:\n%s", a.Log())
		default:
		}
		s, err := a.Status(ctx, t)
		if err == nil && !s.Connected {
			err = errors.New("not connected: " + s.LastError)
		}
		return err
	})
}

// Status asks the agent how it is.
func (a *Agent) Status(ctx context.Context, t testing.TB) (*agent.Status, error) {
	t.Helper()
	cmd := exec.CommandContext(ctx, filepath.Join(Binaries(t), "node-agent"), "status", "-o", "json", "--admin-socket", a.AdminSocket) //nolint:gosec // the arguments are ours
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	s := &agent.Status{}
	return s, json.Unmarshal(out, s)
}

// Ports of FreeAddress: below those that the kernel gives to whoever connects
// (net.ipv4.ip_local_port_range), so that none is taken in between.
const firstPort, lastPort = 20000, 32767

// FreeAddress returns a loopback address that nothing listens on.
func FreeAddress(t testing.TB) string {
	t.Helper()
	var failed error
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(lastPort-firstPort)) //nolint:gosec // any will do
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", address)
		if err != nil {
			failed = err
			continue
		}
		_ = l.Close() // nothing was sent
		return address
	}
	t.Fatal(failed)
	return ""
}

// shortDir is t.TempDir with a path that is short enough for a Unix socket.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "meshid") //nolint:usetesting // t.TempDir is too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // workloads of other users reach the sockets in it
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func writeFile(t testing.TB, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
