package peer

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/meshid/meshid/test/self"
)

// The connection is closed when the process ends, not when its last descriptor
// is: others may hold copies.
func TestV_D2_ProcessEnds(t *testing.T) {
	l, path := listen(t, Options{})
	h := start(t, 0, "connect", path)
	c, p := accept(t, l)
	proc, err := p.Process()
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	h.end()
	<-p.Done()
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("error %v, want ErrGone", err)
	}
	if _, err := p.Process(); !errors.Is(err, ErrGone) {
		t.Errorf("error %v, want ErrGone", err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("connection is open")
	}
	if _, err := proc.Status(); !errors.Is(err, ErrGone) {
		t.Errorf("directory that was open: error %v, want ErrGone", err)
	}
	if _, err := proc.ExecutablePath(); !errors.Is(err, ErrGone) {
		t.Errorf("executable: error %v, want ErrGone", err)
	}
}

// A process that ended before it was accepted never gets to the server.
func TestV_D2_EndsBeforeAccept(t *testing.T) {
	for _, o := range []Options{{}, {noPeerPIDFD: true}} {
		reg := prometheus.NewRegistry()
		o.Registerer = reg
		l, path := listen(t, o)
		h := start(t, 0, "connect", path)
		h.line(t)
		h.end()
		within(t, "own connection", func() bool {
			dial(t, path)
			_, p := accept(t, l)
			return p.PID == os.Getpid()
		})
		_, err := testutil.GatherAndCount(reg)
		if err != nil {
			t.Fatal(err)
		}
		if n := testutil.ToFloat64(l.(*listener).metrics.refusals[reasonGone]); n != 1 {
			t.Errorf("%v connections counted as gone, want 1", n)
		}
	}
}

// Who is handed a descriptor speaks as the process that connected, and no longer
// than that lives.
func TestV_D9_PassedDescriptor(t *testing.T) {
	l, path := listen(t, Options{})
	h := start(t, 0, "leave", path)
	child, err := strconv.Atoi(h.line(t))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(child, syscall.SIGKILL)
	c, p := accept(t, l)
	if p.PID != h.Process.Pid {
		t.Errorf("peer is %d, want %d, which connected", p.PID, h.Process.Pid)
	}
	h.leave()
	<-p.Done()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is open for the child")
	}
}

func TestV_D3_ChildNamespace(t *testing.T) {
	needRoot(t)
	l, path := listen(t, Options{})
	h := start(t, syscall.CLONE_NEWPID, "connect", path)
	_, p := accept(t, l)
	if p.PID != h.Process.Pid {
		t.Errorf("peer is %d, want %d as seen from here", p.PID, h.Process.Pid)
	}
}

// Root in a container is not root here: the kernel says which process is in a process id
// namespace below this one's, and control groups which share it.
func TestElsewhere(t *testing.T) {
	needRoot(t)
	l, path := listen(t, Options{})
	start(t, 0, "connect", path)
	if _, p := accept(t, l); p.Elsewhere() != nil {
		t.Errorf("a process beside this one: %v", p.Elsewhere())
	}
	start(t, syscall.CLONE_NEWPID, "connect", path)
	_, p := accept(t, l)
	if err := p.Elsewhere(); err == nil || !strings.Contains(err.Error(), "process id namespace of its own") {
		t.Errorf("a process in a namespace of its own: %v", err)
	}
	startIn(t, makeCgroup(t, "meshid-test-"+strconv.Itoa(os.Getpid())+"-"+idA), "connect", path)
	_, p = accept(t, l)
	if err := p.Elsewhere(); err == nil || !strings.Contains(err.Error(), idA) {
		t.Errorf("a process in a container of this namespace: %v", err)
	}
	p.own = p.container // as kubectl exec does it, where control groups have no namespaces of their own
	if err := p.Elsewhere(); err != nil {
		t.Errorf("a process in this program's own container: %v", err)
	}
	_ = p.Close()
	if err := p.Elsewhere(); err != nil {
		t.Errorf("a process that has gone: %v", err)
	}
}

func TestV_D3_NoPID(t *testing.T) {
	err := checkPID(0)
	if !errors.Is(err, ErrPIDNamespace) || !strings.Contains(err.Error(), "--pid=host") || !strings.Contains(err.Error(), "hostPID") {
		t.Errorf("error %v does not name the fix", err)
	}
	if reasonOf(err) != reasonNamespace {
		t.Errorf("reason %q", reasonOf(err))
	}
	needRoot(t)
	path := filepath.Join(t.TempDir(), "agent.sock")
	h := start(t, syscall.CLONE_NEWPID|syscall.CLONE_NEWNS, "serve", path)
	if got := h.line(t); got != "ready" {
		t.Fatal(got)
	}
	c := dial(t, path)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v, want that the connection is closed", err)
	}
	if got := h.line(t); !strings.Contains(got, "--pid=host") || !strings.Contains(got, "reason=pid_namespace") {
		t.Errorf("log %q does not name the fix", got)
	}
}

// inside runs the calling test in a process id namespace of its own, where
// nobody else takes process ids. It returns true there.
func inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideEnv) != "" {
		return true
	}
	needRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), helperEnv+"=namespace")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("in its own namespace: %v\n%s", err, out)
	}
	return false
}

// An attacker connects, leaves the connection to a child, exits, and has a
// victim started under his process id. Before it is accepted, and after.
func TestV_D1_PIDReuse(t *testing.T) {
	if !inside(t) {
		return
	}
	for _, o := range []Options{{}, {noPeerPIDFD: true}} {
		// Starting processes is slow on a busy machine: as many as fit.
		const most, least = 100, 8
		wrong, reused := 0, 0
		for began := time.Now(); reused < most && (reused < least || time.Since(began) < 3*time.Second); {
			n := reused
			l, path := listen(t, o)
			metrics := l.(*listener).metrics
			attacker := start(t, 0, "leave", path)
			child, err := strconv.Atoi(attacker.line(t))
			if err != nil {
				t.Fatal(err)
			}
			var before *Peer
			if n%2 == 1 && !o.noPeerPIDFD {
				_, before = accept(t, l)
				if before.PID != attacker.Process.Pid {
					t.Fatalf("peer %d, want %d", before.PID, attacker.Process.Pid)
				}
			}
			attacker.leave()
			victim, err := startAs(attacker.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			reused++
			if before != nil {
				proc, err := before.Process()
				if err == nil {
					_ = proc.Close()
				}
				if !errors.Is(err, ErrGone) || !errors.Is(before.Alive(), ErrGone) {
					wrong++
				}
			} else {
				within(t, "own connection", func() bool {
					c := dial(t, path)
					_, p := accept(t, l)
					_ = c.Close()
					if p.PID == attacker.Process.Pid {
						wrong++
					}
					return p.PID == os.Getpid()
				})
				if testutil.ToFloat64(metrics.refusals[reasonGone])+testutil.ToFloat64(metrics.refusals[reasonUnproven]) < 1 {
					wrong++
				}
			}
			_ = victim.Process.Kill()
			_ = victim.Wait()
			_ = syscall.Kill(child, syscall.SIGKILL)
			_, _ = syscall.Wait4(child, nil, 0, nil) // we are its init
			_ = l.Close()
		}
		t.Logf("no pidfd from the kernel %v: %d process ids used again, %d wrong answers", o.noPeerPIDFD, reused, wrong)
		if wrong != 0 {
			t.Errorf("%d wrong answers after %d reuses", wrong, reused)
		}
	}
}

func TestOpen(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if int(p.UID) != os.Geteuid() || !p.proven {
		t.Errorf("peer %+v", p)
	}
	_ = cmd.Process.Kill()
	<-p.Done() // a zombie is not alive
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("error %v, want ErrGone", err)
	}
	_ = cmd.Wait()
	if _, err := Open(cmd.Process.Pid); !errors.Is(err, ErrGone) {
		t.Errorf("opened a process that is gone: %v", err)
	}
	for _, pid := range []int{0, -1} {
		if _, err := Open(pid); err == nil {
			t.Errorf("opened process %d", pid)
		}
	}
}

func TestForTest(t *testing.T) {
	p := ForTest(1234, 5, 6)
	if err := p.Alive(); err != nil {
		t.Error(err)
	}
	select {
	case <-p.Done():
		t.Error("done")
	default:
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	<-p.Done()
	if err := p.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("error %v, want ErrGone", err)
	}
}

// Connections die at each step, and nothing is left over.
func TestV_D17_Descriptors(t *testing.T) {
	l, path := listen(t, Options{})
	warm := dial(t, path)
	c, _ := accept(t, l)
	_ = c.Close()
	_ = warm.Close()
	fds, goroutines := self.Descriptors(t), runtime.NumGoroutine()
	for n := range 1000 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if n%5 == 0 {
			_ = c.Close() // before accept
		}
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		p, _ := FromConn(a)
		switch n % 5 {
		case 1: // the server closes
		case 2: // twice
			_ = a.Close()
		case 3: // while it is being read
			proc, err := p.Process()
			if err != nil {
				t.Fatal(err)
			}
			_ = a.Close()
			if _, err := proc.Status(); err != nil {
				t.Error(err)
			}
			_ = proc.Close()
		case 4: // the client first
			_ = c.Close()
		}
		_ = a.Close()
		_ = c.Close()
	}
	if n := self.Descriptors(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
	within(t, "goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })

	// Processes that are killed.
	for range 20 {
		h := start(t, 0, "connect", path)
		c, p := accept(t, l)
		h.end()
		<-p.Done()
		_ = c.Close()
	}
	within(t, "descriptors", func() bool { return self.Descriptors(t) <= fds })

	// And the listener itself.
	_ = l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if n := self.Descriptors(t); n >= fds {
		t.Errorf("%d descriptors after the listener was closed, %d before", n, fds)
	}
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.w != nil || shared.uses != 0 {
		t.Errorf("the watcher is still used %d times", shared.uses)
	}
}
