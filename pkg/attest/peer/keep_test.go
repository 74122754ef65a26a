package peer

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
)

// kept is a listener whose socket is taken away, with a connection that is open.
type kept struct {
	*listener
	path string
	log  *safeBuffer

	client, server net.Conn

	mu      sync.Mutex // guards reports
	reports []error
}

type safeBuffer struct {
	mu sync.Mutex // guards buf
	bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

func keepIn(t *testing.T, dir string, o Options) *kept {
	t.Helper()
	k := &kept{path: filepath.Join(dir, "agent.sock"), log: &safeBuffer{}}
	o.Logger = slog.New(slog.NewTextHandler(k.log, nil))
	o.Report = func(err error) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.reports = append(k.reports, err)
	}
	l, err := Listen(t.Context(), k.path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	k.listener = l.(*listener)
	k.client = dial(t, k.path)
	k.server, _ = accept(t, l)
	return k
}

// restored waits until the socket was made again n times, then connects.
func (k *kept) restored(t *testing.T, n float64) {
	t.Helper()
	within(t, "the socket", func() bool { return testutil.ToFloat64(k.metrics.restored) == n })
	dial(t, k.path)
	accept(t, k)
	if st, err := os.Lstat(k.path); err != nil || st.Mode() != os.ModeSocket|0o666 {
		t.Errorf("socket: %v, %v", st, err)
	}
	// The connection of before is as it was.
	if _, err := k.client.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := k.server.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// last returns the last report, and false if there is none.
func (k *kept) last() (error, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.reports) == 0 {
		return nil, false
	}
	return k.reports[len(k.reports)-1], true
}

func TestFault_F40_SocketIsMadeAgain(t *testing.T) {
	for name, take := range map[string]func(t *testing.T, dir string){
		"the file":       func(t *testing.T, dir string) { try(t, os.Remove(filepath.Join(dir, "agent.sock"))) },
		"the folder":     func(t *testing.T, dir string) { remove(t, dir) },
		"a folder above": func(t *testing.T, dir string) { remove(t, filepath.Dir(dir)) },
		"the file, renamed": func(t *testing.T, dir string) {
			try(t, os.Rename(filepath.Join(dir, "agent.sock"), filepath.Join(dir, "x")))
		},
		"the folder, renamed":      func(t *testing.T, dir string) { try(t, os.Rename(dir, dir+".old")) },
		"a folder above, renamed":  func(t *testing.T, dir string) { try(t, os.Rename(filepath.Dir(dir), filepath.Dir(dir)+".old")) },
		"the file, for a dead one": func(t *testing.T, dir string) { deadSocket(t, filepath.Join(dir, "agent.sock")) },
	} {
		for _, old := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ", old kernel"}[old], func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "run", "meshid")
				k := keepIn(t, dir, Options{noPeerPIDFD: old})
				for n := range 2 {
					take(t, dir)
					if old {
						within(t, "the socket", func() bool { return testutil.ToFloat64(k.metrics.restored) == float64(n+1) })
					} else {
						k.restored(t, float64(n+1))
					}
					try(t, os.RemoveAll(dir+".old"))
					try(t, os.RemoveAll(filepath.Dir(dir)+".old"))
				}
				if err, told := k.last(); err != nil || !told {
					t.Errorf("report %v, %v", err, told)
				}
				if !strings.Contains(k.log.String(), "is made again") {
					t.Errorf("log %q", k.log.String())
				}
				if err := k.Close(); err != nil {
					t.Error(err)
				}
				if _, err := os.Lstat(k.path); !os.IsNotExist(err) {
					t.Errorf("left behind: %v", err)
				}
			})
		}
	}
}

// A file system is mounted over the folder, and taken away again.
func TestFault_F40_Mounts(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	k := keepIn(t, dir, Options{})
	try(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755,size=1m"))
	mounted := true
	defer func() {
		if mounted {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	}()
	k.restored(t, 1)
	try(t, unix.Unmount(dir, unix.MNT_DETACH))
	mounted = false
	k.restored(t, 2) // the file that is there again is that of a socket that was closed
}

// What somebody else has put in the place of the socket is left alone, and said;
// when it has gone, the socket is made again.
func TestFault_F40_NotInAStrangersPlace(t *testing.T) {
	needRoot(t)
	elsewhere := filepath.Join(t.TempDir(), "other.sock")
	stranger, err := net.Listen("unix", elsewhere)
	try(t, err)
	defer stranger.Close()
	for name, tc := range map[string]struct {
		put  func(t *testing.T, dir, path string)
		want string
	}{
		"a link to his socket": {func(t *testing.T, _, path string) {
			try(t, os.Symlink(elsewhere, path+"~"))
			try(t, os.Rename(path+"~", path))
		}, "symbolic link"},
		"a file": {func(t *testing.T, _, path string) {
			try(t, os.WriteFile(path+"~", nil, 0o666))
			try(t, os.Rename(path+"~", path))
		}, "not a socket"},
		"his socket": {func(t *testing.T, _, path string) {
			l, err := net.Listen("unix", path+"~")
			try(t, err)
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			t.Cleanup(func() { _ = l.Close() })
			try(t, os.Rename(path+"~", path))
		}, "listens there"},
		"his folder": {func(t *testing.T, dir, _ string) {
			try(t, os.Mkdir(dir+"~", 0o755))
			try(t, os.Chown(dir+"~", 1234, 1234))
			try(t, os.Rename(dir, dir+".old"))
			try(t, os.Rename(dir+"~", dir))
		}, "belongs to uid 1234"},
		"a folder for all": {func(t *testing.T, dir, path string) {
			try(t, os.Chmod(dir, 0o777))
			try(t, os.Remove(path))
		}, "chmod it to 0755"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "meshid")
			k := keepIn(t, dir, Options{})
			tc.put(t, dir, k.path)
			before, _ := os.Lstat(k.path)
			within(t, "the report", func() bool {
				err, told := k.last()
				return told && err != nil && strings.Contains(err.Error(), tc.want)
			})
			after, _ := os.Lstat(k.path)
			if before != nil && (after == nil || !os.SameFile(before, after)) {
				t.Error("what was there is not there any more")
			}
			if n := testutil.ToFloat64(k.metrics.restored); n != 0 {
				t.Errorf("made %v times", n)
			}
			remove(t, dir)
			k.restored(t, 1)
			within(t, "the end of the report", func() bool { err, _ := k.last(); return err == nil })
		})
	}
}

// Without inotify there is the time.
func TestFault_F40_WithoutEvents(t *testing.T) {
	w := &folderWatch{path: t.TempDir()}
	w.wait(t.Context(), 1)
	w.follow()
	w.interrupt()
	w.close()
}

// remove removes a folder in which a socket may be made meanwhile.
func remove(t *testing.T, dir string) {
	t.Helper()
	within(t, "the end of the folder", func() bool { return os.RemoveAll(dir) == nil })
}

func deadSocket(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path+"~")
	try(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	try(t, l.Close())
	try(t, os.Rename(path+"~", path))
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
