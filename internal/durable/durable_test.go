package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// killStep is set in the process that is to kill itself: it writes the file "f" in
// its working directory, and ends at the step. holdLock is set in the one that is
// to hold the lock "lock" there.
const (
	killStep = "MESHID_TEST_DURABLE_STEP"
	holdLock = "MESHID_TEST_DURABLE_LOCK"
)

// Two contents of different length.
var (
	oldContent = bytes.Repeat([]byte("old "), 1000)
	newContent = bytes.Repeat([]byte("new!"), 3000)
)

// steps are all steps of a replacement, in order.
var steps = []string{"write", "write the rest", "sync", "rename", "sync directory", "done"}

func TestMain(m *testing.M) {
	if at := os.Getenv(killStep); at != "" {
		_ = write("f", newContent, 0o600, 0, func(name string) error {
			if name == at {
				return unix.Kill(os.Getpid(), unix.SIGKILL)
			}
			return nil
		})
		return
	}
	if os.Getenv(holdLock) != "" {
		if l, err := Acquire("lock"); err == nil {
			fmt.Fprintln(os.Stdout, "locked")
			_, _ = io.ReadAll(os.Stdin) // until it is killed
			_ = l.Release()
		}
		return
	}
	m.Run()
}

// TestV_K3_KilledWhileWriting kills a process at each step: a reader finds the old
// file or the new one, and the next write succeeds.
func TestV_K3_KilledWhileWriting(t *testing.T) {
	t.Parallel()
	for i, step := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "f")
			if err := WriteFile(path, oldContent, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.Dir = filepath.Dir(path)
			cmd.Env = append(os.Environ(), killStep+"="+step)
			if out, err := cmd.CombinedOutput(); err == nil || cmd.ProcessState.Exited() {
				t.Fatalf("the process ended by itself: %v, %s", err, out)
			}
			want := oldContent
			if i > 3 {
				want = newContent
			}
			if got, err := ReadSecret(path, 1<<20); err != nil || !bytes.Equal(got, want) {
				t.Errorf("found %.8q, %v", got, err)
			}
			if err := WriteFile(path, []byte("third"), 0o600); err != nil {
				t.Error(err)
			}
			if names := list(t, filepath.Dir(path)); names != "f" {
				t.Errorf("left behind: %s", names)
			}
		})
	}
}

// TestV_K3_FailedWrite fails at each step.
func TestV_K3_FailedWrite(t *testing.T) {
	t.Parallel()
	for i, step := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "key.pem")
			if err := WriteFile(path, oldContent, 0o600); err != nil {
				t.Fatal(err)
			}
			err := write(path, newContent, 0o600, 0, func(name string) error {
				if name == step {
					return unix.EIO
				}
				return nil
			})
			if !errors.Is(err, unix.EIO) {
				t.Errorf("error is %v", err)
			}
			want := oldContent
			if i > 3 { // it is in place; that it will stay is not known
				want = newContent
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("found %.8q, %v", got, err)
			}
			if names := list(t, filepath.Dir(path)); names != "key.pem" {
				t.Errorf("left behind: %s", names)
			}
		})
	}
}

// list returns the names in dir.
func list(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// TestConcurrentWrites has many writers of one file, and a reader that must never
// see anything but what one of them wrote.
func TestConcurrentWrites(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	content := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 5000+i) }
	if err := WriteFile(path, content(0), 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 5 {
				if err := WriteFile(path, content(i), 0o600); err != nil {
					t.Error(err)
				}
				got, err := os.ReadFile(path)
				if err != nil || len(got) < 5000 || !bytes.Equal(got, content(int(got[0]-'a'))) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
		})
	}
	wg.Wait()
	if names := list(t, filepath.Dir(path)); names != "f" {
		t.Errorf("left behind: %s", names)
	}
}

func TestCreateFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := CreateFile(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CreateFile(path, []byte("second"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("error is %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != "first" {
		t.Errorf("%q, %v", b, err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("nowhere", link); err != nil {
		t.Fatal(err)
	}
	if err := CreateFile(link, nil, 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a symbolic link: %v", err)
	}
	if err := Remove(path); err != nil {
		t.Error(err)
	}
	if err := Remove(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
	if names := list(t, dir); names != "link" {
		t.Errorf("left behind: %s", names)
	}
}

func TestWriteFileRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.WriteFile(target, []byte("target"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(staging string) error{
		"symbolic link": func(s string) error { return os.Symlink(target, s) },
		"hard link":     func(s string) error { return os.Link(target, s) },
		"directory":     func(s string) error { return os.Mkdir(s, 0o700) },
		"pipe":          func(s string) error { return unix.Mkfifo(s, 0o600) },
		"foreign file": func(s string) error {
			return errors.Join(os.WriteFile(s, nil, 0o666), os.Chown(s, 12345, 12345))
		},
	} {
		if name == "foreign file" && os.Geteuid() != 0 {
			continue // only root can make one
		}
		staging := filepath.Join(dir, ".f.new")
		if err := plant(staging); err != nil {
			t.Fatal(err)
		}
		if err := WriteFile(filepath.Join(dir, "f"), []byte("secret"), 0o600); !errors.Is(err, ErrUnsafe) {
			t.Errorf("%s in the way: %v", name, err)
		}
		if b, err := os.ReadFile(target); string(b) != "target" {
			t.Errorf("%s: the target has %q, %v", name, b, err)
		}
		if err := os.Remove(staging); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteFile(filepath.Join(dir, "f"), nil, 0o600|fs.ModeSetuid); err == nil {
		t.Error("setuid accepted")
	}
	if err := WriteFile(dir+"/", nil, 0o600); err == nil {
		t.Error("no name accepted")
	}
	if err := WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	// A link at the path itself is replaced.
	link := filepath.Join(dir, "link")
	if err := errors.Join(os.Symlink(target, link), WriteFile(link, []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(link); err != nil || !st.Mode().IsRegular() {
		t.Errorf("link is %v, %v", st.Mode(), err)
	}
}

// TestV_K1_Modes makes files and directories under the most and the least
// permissive umask.
func TestV_K1_Modes(t *testing.T) { // not parallel: the umask is the process's
	for _, umask := range []int{0o000, 0o077, 0o777} {
		old := unix.Umask(umask)
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "a", "b")
		err := MkdirAll(path, 0o700)
		for _, perm := range []fs.FileMode{0o600, 0o644} {
			if err == nil {
				err = WriteFile(filepath.Join(path, fmt.Sprintf("%o", perm)), nil, perm)
			}
		}
		unix.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]fs.FileMode{"a": 0o700, "a/b": 0o700, "a/b/600": 0o600, "a/b/644": 0o644} {
			if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != want {
				t.Errorf("umask %03o: %s is %v, want %v: %v", umask, name, st.Mode().Perm(), want, err)
			}
		}
	}
}

// TestV_K1_SecretFiles reads files that only this user, or not only this user,
// could have touched.
func TestV_K1_SecretFiles(t *testing.T) {
	t.Parallel()
	root := os.Geteuid() == 0
	rows := map[string]struct {
		prepare func(dir, path string) error
		needs   bool // root
		safe    bool
	}{
		"0600":                    {func(_, p string) error { return os.Chmod(p, 0o600) }, false, true},
		"0400":                    {func(_, p string) error { return os.Chmod(p, 0o400) }, false, true},
		"0700":                    {func(_, p string) error { return os.Chmod(p, 0o700) }, false, true},
		"group may read":          {func(_, p string) error { return os.Chmod(p, 0o640) }, false, false},
		"group may write":         {func(_, p string) error { return os.Chmod(p, 0o620) }, false, false},
		"all may read":            {func(_, p string) error { return os.Chmod(p, 0o604) }, false, false},
		"others may execute":      {func(_, p string) error { return os.Chmod(p, 0o601) }, false, false},
		"owned by another":        {func(_, p string) error { return os.Chown(p, 12345, -1) }, true, false},
		"group of another":        {func(_, p string) error { return os.Chown(p, -1, 12345) }, true, true},
		"directory for all":       {func(d, _ string) error { return os.Chmod(d, 0o777) }, false, false},
		"directory for the group": {func(d, _ string) error { return os.Chmod(d, 0o770) }, false, false},
		"directory to read":       {func(d, _ string) error { return os.Chmod(d, 0o755) }, false, true},
		"directory like /tmp":     {func(d, _ string) error { return os.Chmod(d, 0o777|fs.ModeSticky) }, false, true},
		"directory of another":    {func(d, _ string) error { return os.Chown(d, 12345, -1) }, true, false},
		"symbolic link": {func(_, p string) error {
			return errors.Join(os.Rename(p, p+"x"), os.Symlink(p+"x", p))
		}, false, false},
		"pipe":      {func(_, p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) }, false, false},
		"directory": {func(_, p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, false, false},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if row.needs && !root {
				t.Skip("needs root, to give files away")
			}
			dir := filepath.Join(t.TempDir(), "d")
			path := filepath.Join(dir, "key.pem")
			if err := errors.Join(MkdirAll(dir, 0o700), WriteFile(path, []byte("secret"), 0o600), row.prepare(dir, path)); err != nil {
				t.Fatal(err)
			}
			b, err := ReadSecret(path, 100)
			if row.safe && (err != nil || string(b) != "secret") {
				t.Errorf("%q, %v", b, err)
			}
			if !row.safe && (!errors.Is(err, ErrUnsafe) || b != nil) {
				t.Errorf("accepted: %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows the content: %v", err)
			}
		})
	}
	t.Run("size", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "f")
		if err := WriteFile(path, []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadSecret(path, 5); err == nil || errors.Is(err, ErrUnsafe) {
			t.Errorf("larger than the limit: %v", err)
		}
		if b, err := ReadSecret(path, 6); err != nil || len(b) != 6 {
			t.Errorf("%q, %v", b, err)
		}
		if _, err := ReadSecret(path+"x", 6); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("none: %v", err)
		}
	})
}

func TestV_K1_Directories(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	if err := errors.Join(
		os.Mkdir(filepath.Join(base, "open"), 0o700), os.Chmod(filepath.Join(base, "open"), 0o750),
		os.Symlink(base, filepath.Join(base, "link")),
		os.WriteFile(filepath.Join(base, "file"), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"open", "link", "file"} {
		if err := MkdirAll(filepath.Join(base, name), 0o700); !errors.Is(err, ErrUnsafe) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := MkdirAll(filepath.Join(base, "file", "x"), 0o700); err == nil {
		t.Error("directory in a file")
	}
	if err := CheckDir(filepath.Join(base, "open"), 0o755); err != nil {
		t.Error(err)
	}
	if err := CheckDir(filepath.Join(base, "none"), 0o755); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if os.Geteuid() != 0 {
		return
	}
	foreign := filepath.Join(base, "foreign")
	if err := errors.Join(os.Mkdir(foreign, 0o700), os.Chown(foreign, 12345, -1)); err != nil {
		t.Fatal(err)
	}
	if err := MkdirAll(foreign, 0o700); !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), "12345") {
		t.Errorf("directory of another: %v", err)
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	l, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Acquire(path); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("second: %v", err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	// Another process, which is killed.
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Dir = filepath.Dir(path)
	cmd.Env = append(os.Environ(), holdLock+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, len("locked\n"))
	if _, err := io.ReadFull(out, said); err != nil || string(said) != "locked\n" {
		t.Fatalf("%q, %v", said, err)
	}
	if _, err := Acquire(path); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", cmd.Process.Pid)) {
		t.Errorf("while another process has it: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if l, err = Acquire(path); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Remove(path), os.Symlink("elsewhere", path)); err != nil {
		t.Fatal(err)
	}
	if _, err := Acquire(path); err == nil {
		t.Error("symbolic link followed")
	}
}
