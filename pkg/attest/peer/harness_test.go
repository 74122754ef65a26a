package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also the processes that connect: TestMain runs one of these
// instead of the tests if helperEnv names it.
const helperEnv = "PEER_TEST_HELPER"

func TestMain(m *testing.M) {
	args := strings.Fields(os.Getenv(helperEnv))
	if len(args) == 0 {
		m.Run()
		return
	}
	var err error
	if args[0] == "in" { // cgroup, helper and its arguments
		if err = os.WriteFile(filepath.Join(args[1], "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err == nil {
			args = args[2:]
		}
	}
	switch args[0] {
	case "in": // err says why not
	case "connect": // path: connect, say so, wait for the end of stdin
		err = helperConnect(args[1])
	case "leave": // path: connect, give the connection to a child too, wait for the end of stdin
		err = helperLeave(args[1])
	case "serve": // path: listen in this process id namespace, log to stdout
		err = helperServe(args[1])
	case "namespace": // test: run a test as the first process of a namespace
		if err = mountProc(); err == nil {
			os.Unsetenv(helperEnv)
			os.Setenv(insideEnv, "1")
			m.Run()
			return
		}
	default:
		err = errors.New("unknown helper")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "helper:", err)
		os.Exit(1) //nolint:forbidigo // this is not a test, but a process that a test started
	}
}

// insideEnv is set in a test that runs as the first process of its own process
// id namespace.
const insideEnv = "PEER_TEST_INSIDE"

func helperConnect(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintln(os.Stdout, "connected")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func helperLeave(path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	child := exec.Command("sleep", "600")
	child.ExtraFiles = []*os.File{f}
	if err := child.Start(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, child.Process.Pid)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func helperServe(path string) error {
	if err := mountProc(); err != nil {
		return err
	}
	l, err := Listen(context.Background(), path, Options{Logger: slog.New(slog.NewTextHandler(os.Stdout, nil))})
	if err != nil {
		return err
	}
	defer l.Close()
	fmt.Fprintln(os.Stdout, "ready")
	_, err = l.Accept()
	return err
}

// mountProc mounts the procfs of this namespace where it is looked for.
func mountProc() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	return nil
}

// helper is a running helper process.
type helper struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start starts a helper; flags are clone flags.
func start(t *testing.T, flags uintptr, args ...string) *helper {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+strings.Join(args, " "))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h := &helper{Cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() { h.end() })
	return h
}

// line returns the next line that the helper prints.
func (h *helper) line(t *testing.T) string {
	t.Helper()
	s, err := h.out.ReadString('\n')
	if err != nil {
		t.Fatalf("helper: %v", err)
	}
	return strings.TrimSpace(s)
}

// leave lets the helper exit by itself.
func (h *helper) leave() {
	_ = h.in.Close()
	_ = h.Wait()
}

// end kills the helper and waits for it.
func (h *helper) end() {
	_ = h.Process.Kill()
	_ = h.Wait()
}

// needRoot skips a test that makes namespaces or chooses process ids.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_ALL") == "1" {
			t.Fatal("needs root, and REQUIRE_ALL=1")
		}
		t.Skip("needs root")
	}
}

// listen listens at a fresh path.
func listen(t *testing.T, o Options) (net.Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := Listen(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l, path
}

// dial connects this process.
func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// accept accepts one connection.
func accept(t *testing.T, l net.Listener) (net.Conn, *Peer) {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	p, ok := FromConn(c)
	if !ok {
		t.Fatal("no peer")
	}
	return c, p
}

// within fails if f is not true soon. It yields and does not sleep.
func within(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within 30 s", what)
		case <-tick.C:
		}
	}
}

// startAs starts sleep under the process id pid, which must be free.
func startAs(pid int) (*exec.Cmd, error) {
	for range 100 {
		// Threads of this process take ids too, so it may need some attempts.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			return nil, err
		}
		cmd := exec.Command("sleep", "600")
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		if cmd.Process.Pid == pid {
			return cmd, nil
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	return nil, fmt.Errorf("process id %d is not given out again", pid)
}
