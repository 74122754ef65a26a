package peer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"
)

func TestAccept(t *testing.T) {
	l, path := listen(t, Options{})
	h := start(t, 0, "connect", path)
	_, p := accept(t, l)
	if p.PID != h.Process.Pid || int(p.UID) != os.Geteuid() || int(p.GID) != os.Getegid() || !p.Proven() {
		t.Errorf("peer %d/%d/%d, proven %v", p.PID, p.UID, p.GID, p.Proven())
	}
	if err := p.Alive(); err != nil {
		t.Error(err)
	}
	proc, err := p.Process()
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	path, err = proc.ExecutablePath()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if path != want {
		t.Errorf("executable %q, want %q", path, want)
	}
	s, err := proc.Status()
	if err != nil {
		t.Fatal(err)
	}
	if int(s.EffectiveUID) != os.Geteuid() {
		t.Errorf("status %+v", s)
	}
}

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

// On an old kernel, a process that is older than its connection is accepted, and
// says that it is not proven by the kernel.
func TestV_D1_Fallback(t *testing.T) {
	l, path := listen(t, Options{noPeerPIDFD: true})
	dial(t, path)
	_, p := accept(t, l)
	if p.PID != os.Getpid() || p.Proven() {
		t.Errorf("peer %d, proven %v", p.PID, p.Proven())
	}
	// A young one gets in sooner or later.
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("x"))
			_ = c.Close()
		}
	}()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestFallbackYoung$")
	cmd.Env = append(os.Environ(), "PEER_TEST_YOUNG="+path)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestFallbackYoung is the young process of TestV_D1_Fallback.
func TestFallbackYoung(t *testing.T) {
	path := os.Getenv("PEER_TEST_YOUNG")
	if path == "" {
		t.Skip("runs within TestV_D1_Fallback")
	}
	within(t, "accepted", func() bool {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		n, _ := c.Read(make([]byte, 1))
		return n == 1
	})
}

func TestCheckStart(t *testing.T) {
	for _, tc := range []struct {
		start uint64
		since time.Duration
		ok    bool
	}{
		{0, 0, false}, // the queue was never seen empty
		{5, 0, false}, //
		{99, time.Second, true},
		{100, time.Second, false}, // in the tick of since
		{99, time.Second - 1, false},
		{101, time.Second, false},
	} {
		if err := checkStart(tc.start, tc.since); (err == nil) != tc.ok {
			t.Errorf("start %d, since %s: %v", tc.start, tc.since, err)
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
	if int(p.UID) != os.Geteuid() || !p.Proven() {
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
	fds, goroutines := descriptors(t), runtime.NumGoroutine()
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
	if n := descriptors(t); n != fds {
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
	within(t, "descriptors", func() bool { return descriptors(t) <= fds })

	// And the listener itself.
	_ = l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if n := descriptors(t); n >= fds {
		t.Errorf("%d descriptors after the listener was closed, %d before", n, fds)
	}
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.w != nil || shared.uses != 0 {
		t.Errorf("the watcher is still used %d times", shared.uses)
	}
}

func TestV_I1_Limits(t *testing.T) {
	reg := prometheus.NewRegistry()
	var log bytes.Buffer
	l, path := listen(t, Options{MaxConns: 3, MaxConnsPerUID: 2, Registerer: reg, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	m := l.(*listener).metrics
	dial(t, path)
	first, _ := accept(t, l)
	dial(t, path)
	accept(t, l)

	refused := dial(t, path)
	accepted := make(chan net.Conn)
	go func() {
		c, err := l.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	if _, err := refused.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v, want that the connection is closed", err)
	}
	if n := testutil.ToFloat64(m.refusals[reasonUIDLimit]); n != 1 {
		t.Errorf("%v refusals counted, want 1", n)
	}

	// Another user still gets in, up to the limit of all.
	ll := l.(*listener)
	if r, err := ll.admit(ForTest(1, 12345, 0)); err != nil {
		t.Errorf("another user: %v (%s)", err, r)
	}
	if r, err := ll.admit(ForTest(1, 12346, 0)); err == nil || r != reasonLimit {
		t.Errorf("above the limit of all: %v (%s)", err, r)
	}
	ll.leave(ForTest(1, 12345, 0))

	// One that goes makes room for the next.
	_ = first.Close()
	dial(t, path)
	c := <-accepted
	if !strings.Contains(log.String(), "has 2 connections open: limit reached") {
		t.Errorf("log %q", log.String())
	}
	if n := testutil.ToFloat64(m.connections); n != 2 {
		t.Errorf("%v connections counted, want 2", n)
	}
	_ = c.Close()
}

func TestSocketFile(t *testing.T) {
	dir := t.TempDir()
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	path := filepath.Join(dir, "run", "agent.sock")
	l, err := Listen(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Dir(path)); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("directory: %v, %v", st.Mode(), err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode() != os.ModeSocket|0o666 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	if l.Addr().String() != path {
		t.Errorf("address %q", l.Addr())
	}
	if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 {
		t.Errorf("directory holds %v, %v", names, err)
	}

	_, err = Listen(t.Context(), path, Options{})
	if err == nil || !strings.Contains(err.Error(), "process "+strconv.Itoa(os.Getpid())+" listens there") {
		t.Errorf("a second listener: %v", err)
	}

	// A socket that was left behind by a killed agent.
	raw := l.(*listener)
	_ = raw.socket.Close()
	if _, err := net.Dial("unix", path); err == nil {
		t.Fatal("still listening")
	}
	next, err := Listen(t.Context(), path, Options{Mode: 0o600})
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	// The old one, closed late, does not take the new one's file away.
	_ = l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is left behind: %v", err)
	}
	if err := next.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
}

func TestSocketRefusals(t *testing.T) {
	base := t.TempDir()
	target := filepath.Join(base, "target.sock")
	tl, err := net.Listen("unix", target)
	if err != nil {
		t.Fatal(err)
	}
	defer tl.Close()
	for name, tc := range map[string]struct {
		make func(dir string) string
		want string
	}{
		"symlink": {func(dir string) string {
			p := filepath.Join(dir, "s")
			os.Symlink(target, p)
			return p
		}, "symbolic link"},
		"dangling symlink": {func(dir string) string {
			p := filepath.Join(dir, "s")
			os.Symlink("/nonexistent", p)
			return p
		}, "symbolic link"},
		"file": {func(dir string) string {
			p := filepath.Join(dir, "s")
			os.WriteFile(p, nil, 0o600)
			return p
		}, "not a socket"},
		"directory": {func(dir string) string {
			p := filepath.Join(dir, "s")
			os.Mkdir(p, 0o700)
			return p
		}, "not a socket"},
		"pipe": {func(dir string) string {
			p := filepath.Join(dir, "s")
			unix.Mkfifo(p, 0o600)
			return p
		}, "not a socket"},
		"somebody's socket": {func(string) string { return target }, "listens there"},
		"directory that all may write": {func(dir string) string {
			os.Chmod(dir, 0o777)
			return filepath.Join(dir, "s")
		}, "chmod it to 0755"},
		"relative": {func(string) string { return "agent.sock" }, "absolute"},
		"too long": {func(dir string) string { return filepath.Join(dir, strings.Repeat("x", 120)) }, "at most 107"},
	} {
		t.Run(name, func(t *testing.T) {
			fds := descriptors(t)
			path := tc.make(t.TempDir())
			l, err := Listen(t.Context(), path, Options{})
			if err == nil {
				l.Close()
				t.Fatal("listens")
			}
			if !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if n := descriptors(t); n > fds {
				t.Errorf("%d descriptors, %d before", n, fds)
			}
		})
	}
	if _, err := os.Lstat(target); err != nil {
		t.Errorf("somebody's socket was removed: %v", err)
	}
}

func TestSpec_I06_ForeignDirectory(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := os.Chown(dir, 1234, 1234); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), filepath.Join(dir, "s"), Options{}); err == nil || !strings.Contains(err.Error(), "belongs to uid 1234") {
		t.Errorf("error %v", err)
	}
}

func TestAbstract(t *testing.T) {
	path := "@meshid-test-" + strconv.Itoa(os.Getpid())
	l, err := Listen(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial(t, path)
	if _, p := accept(t, l); p.PID != os.Getpid() {
		t.Errorf("peer %d", p.PID)
	}
}

// call makes one call to a method that answers with the caller's process id.
func call(t *testing.T, target string, o ...grpc.DialOption) (string, error) {
	t.Helper()
	cc, err := grpc.NewClient(target, append(o, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err = cc.Invoke(ctx, "/test/Who", &emptypb.Empty{}, &emptypb.Empty{})
	return status.Convert(err).Message(), err
}

func who(_ any, s grpc.ServerStream) error {
	p, ok := FromContext(s.Context())
	if !ok {
		return status.Error(codes.Internal, "nobody")
	}
	return status.Error(codes.NotFound, strconv.Itoa(p.PID))
}

func TestCredentials(t *testing.T) {
	l, path := listen(t, Options{})
	server := grpc.NewServer(grpc.Creds(Credentials()), grpc.UnknownServiceHandler(who))
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	if got, _ := call(t, "unix:"+path); got != strconv.Itoa(os.Getpid()) {
		t.Errorf("the server says %q", got)
	}
	server.Stop()
	wg.Wait()

	// A connection that was not accepted by Listen is not served.
	b := bufconn.Listen(1 << 16)
	server = grpc.NewServer(grpc.Creds(Credentials()), grpc.UnknownServiceHandler(who))
	wg.Go(func() { _ = server.Serve(b) })
	_, err := call(t, "passthrough:x", grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return b.DialContext(ctx) }))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("without a peer: %v", err)
	}
	server.Stop()
	wg.Wait()

	if _, ok := FromContext(t.Context()); ok {
		t.Error("a peer in an empty context")
	}
	p := ForTest(1, 2, 3)
	if got, ok := FromContext(NewContext(t.Context(), p)); !ok || got != p {
		t.Error("not the peer that was put in")
	}
	if _, _, err := Credentials().ClientHandshake(t.Context(), "", nil); err == nil {
		t.Error("a client's handshake succeeds")
	}
}

// D18: a browser or a proxy at the socket gets nothing.
func TestV_D18_HTTP1(t *testing.T) {
	l, path := listen(t, Options{})
	server := grpc.NewServer(grpc.Creds(Credentials()), grpc.UnknownServiceHandler(who))
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	defer wg.Wait()
	defer server.Stop()
	c := dial(t, path)
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want that the connection is closed: %v", err)
	}
}

func TestV_D6_CheckedProc(t *testing.T) {
	fd, err := unix.Open(t.TempDir(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := checkProc(fd); err == nil || !strings.Contains(err.Error(), "not procfs") {
		t.Errorf("error %v", err)
	}
	proc, err := OpenProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	for _, name := range []string{"exe", "cwd/go.mod", "root/etc/passwd", "../1/status", "ns/pid", "/etc/passwd", "fd/0"} {
		if b, err := proc.ReadFile(name); err == nil {
			t.Errorf("read %d bytes through %s", len(b), name)
		}
	}
	needRoot(t)
	if !inside(t) {
		return
	}
	// Something is mounted over a process's directory.
	if err := unix.Mount("tmpfs", "/proc/"+strconv.Itoa(os.Getpid()), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if p, err := OpenProcess(os.Getpid()); err == nil {
		p.Close()
		t.Error("opened what is mounted over it")
	}
}

func TestParseStatus(t *testing.T) {
	const good = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 20 4294967295 \nNStgid:\t1\n"
	s, err := parseStatus([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&Status{EffectiveUID: 2, EffectiveGID: 6, Groups: []uint32{10, 20, 4294967295}}, s); diff != "" {
		t.Error(diff)
	}
	for name, text := range map[string]string{
		"empty":        "",
		"no Gid":       "Uid:\t1\t2\t3\t4\nGroups:\t\n",
		"three ids":    "Uid:\t1\t2\t3\nGid:\t5\t6\t7\t8\nGroups:\t\n",
		"not a number": "Uid:\t1\tx\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t\n",
		"too large":    "Uid:\t1\t4294967296\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t\n",
		"bad group":    "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t1 -2\n",
	} {
		if s, err := parseStatus([]byte(text)); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func TestParseStat(t *testing.T) {
	rest := " S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 1"
	for name, text := range map[string]string{
		"plain":       "1 (init)" + rest,
		"parentheses": "1 (a) S 2 (b)" + rest,
		"line feed":   "1 (a\n)" + rest,
	} {
		s, err := parseStat([]byte(text))
		if err != nil || s != (Stat{Parent: 7, StartTime: 4711}) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	for _, text := range []string{"", "1 init S 7", "1 (init) S 7", "1 (init" + rest} {
		if s, err := parseStat([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, s)
		}
	}
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte("Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 20 \n"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStatus(b) })
}

func FuzzStat(f *testing.F) {
	f.Add([]byte("1 (a) S 2 (b) S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 1"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStat(b) })
}

func BenchmarkAccept(b *testing.B) {
	path := filepath.Join(b.TempDir(), "s")
	l, err := Listen(b.Context(), path, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for b.Loop() {
		c, err := net.Dial("unix", path)
		if err != nil {
			b.Fatal(err)
		}
		a, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		_ = a.Close()
		_ = c.Close()
	}
}

func BenchmarkAlive(b *testing.B) {
	p, err := Open(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		if err := p.Alive(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkProcessStatus(b *testing.B) {
	p, err := Open(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	for b.Loop() {
		proc, err := p.Process()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := proc.Status(); err != nil {
			b.Fatal(err)
		}
		_ = proc.Close()
	}
}
