package peer

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/mem"

	"github.com/meshid/meshid/test/self"
)

func TestAccept(t *testing.T) {
	l, path := listen(t, Options{})
	h := start(t, 0, "connect", path)
	_, p := accept(t, l)
	if p.PID != h.Process.Pid || int(p.UID) != os.Geteuid() || int(p.GID) != os.Getegid() || !p.proven {
		t.Errorf("peer %d/%d/%d, proven %v", p.PID, p.UID, p.GID, p.proven)
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
			fds := self.Descriptors(t)
			path := tc.make(t.TempDir())
			l, err := Listen(t.Context(), path, Options{})
			if err == nil {
				l.Close()
				t.Fatal("listens")
			}
			if !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if n := self.Descriptors(t); n > fds {
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

// counted are buffers that are counted while they are out of their pool.
type counted struct{ taken, out atomic.Int64 }

func (c *counted) Get(n int) *[]byte {
	c.taken.Add(1)
	c.out.Add(1)
	b := make([]byte, n)
	return &b
}

func (c *counted) Put(*[]byte) { c.out.Add(-1) }

// A connection on which nothing comes holds no buffer, and gRPC reads by that.
func TestReadOnReady(t *testing.T) {
	l, path := listen(t, Options{})
	client := dial(t, path)
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ready, ok := server.(interface {
		ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error)
	})
	if !ok {
		t.Fatal("gRPC would not find the method")
	}
	pool := &counted{}
	type result struct {
		b   *[]byte
		n   int
		err error
	}
	read := func() chan result {
		c := make(chan result, 1)
		go func() {
			b, n, err := ready.ReadOnReady(8, pool)
			c <- result{b, n, err}
		}()
		return c
	}
	waiting := read()
	for deadline := time.Now().Add(time.Minute); pool.taken.Load() == 0 || pool.out.Load() != 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d buffers taken, %d held while nothing comes", pool.taken.Load(), pool.out.Load())
		}
	}
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := <-waiting
	if got.err != nil || got.n != 5 || string((*got.b)[:got.n]) != "hello" {
		t.Fatalf("read %d bytes, %v", got.n, got.err)
	}
	pool.Put(got.b)
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if got := <-read(); !errors.Is(got.err, io.EOF) || got.b != nil {
		t.Errorf("at the end: %d bytes, %v", got.n, got.err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	if got := <-read(); !errors.Is(got.err, net.ErrClosed) || got.b != nil {
		t.Errorf("closed on this side: %d bytes, %v", got.n, got.err)
	}
	if n := pool.out.Load(); n != 0 {
		t.Errorf("%d buffers are lost", n)
	}
}
