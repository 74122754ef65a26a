package unix

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/test/self"
)

// The test binary is also the process that connects, and then executes another
// file: TestMain does that instead of the tests if helperEnv names it.
const helperEnv = "UNIX_TEST_HELPER"

func TestMain(m *testing.M) {
	args := strings.Fields(os.Getenv(helperEnv))
	if len(args) == 0 {
		m.Run()
		return
	}
	if err := helper(args); err != nil {
		fmt.Fprintln(os.Stderr, "helper:", err)
		os.Exit(1) //nolint:forbidigo // this is not a test, but a process that a test started
	}
}

// helper connects to the first argument, and at each line on stdin does the next
// of the others.
func helper(args []string) error {
	c, err := net.Dial("unix", args[0])
	if err != nil {
		return err
	}
	f, err := c.(*net.UnixConn).File() // survives exec once it is told to
	if err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFD, 0); err != nil {
		return err
	}
	in := bufio.NewReader(os.Stdin)
	for _, do := range args[1:] {
		if _, err := in.ReadString('\n'); err != nil {
			return err
		}
		if path, ok := strings.CutPrefix(do, "exec="); ok {
			return syscall.Exec(path, []string{path, "600"}, nil)
		}
		id, err := strconv.Atoi(strings.TrimPrefix(do, "uid="))
		if err != nil {
			return err
		}
		if err := syscall.Setresuid(-1, id, -1); err != nil {
			return err
		}
		fmt.Fprintln(os.Stdout, "done")
	}
	_, err = io.Copy(io.Discard, in)
	return err
}

// process is a started process that has connected.
type process struct {
	cmd  *exec.Cmd
	in   io.Writer
	out  *bufio.Reader
	peer *peer.Peer
}

func (p *process) step(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		t.Fatal(err)
	}
}

func (p *process) end() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// connect starts the helper and returns it as the peer of a socket.
func connect(t *testing.T, attr *syscall.SysProcAttr, steps ...string) *process {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} { // other users connect
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "s")
	l, err := peer.Listen(t.Context(), path, peer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "helper")
	if err := os.WriteFile(binary, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), helperEnv+"="+strings.Join(append([]string{path}, steps...), " "))
	cmd.Stderr = os.Stderr
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr = attr
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
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	p, _ := peer.FromConn(c)
	h := &process{cmd: cmd, in: in, out: bufio.NewReader(out), peer: p}
	t.Cleanup(func() { h.end(); c.Close() })
	return h
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_ALL") == "1" {
			t.Fatal("needs root, and REQUIRE_ALL=1")
		}
		t.Skip("needs root")
	}
}

func newAttestor(t testing.TB) *Attestor {
	t.Helper()
	a, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// sum hashes a file.
func sum(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// sleepCopy copies sleep to where it can be changed.
func sleepCopy(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Skip(err)
	}
	path := filepath.Join(t.TempDir(), "sleep")
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConformance(t *testing.T) {
	attesttest.Workload(t, attesttest.WorkloadConfig{
		Attestor: func(t *testing.T) attest.WorkloadAttestor { return newAttestor(t) },
		Mine: func(t *testing.T) (*peer.Peer, func()) {
			h := connect(t, nil)
			return h.peer, h.end
		},
	})
}

func TestAttest(t *testing.T) {
	path := sleepCopy(t)
	p, _ := attesttest.Sleeper(t, path)
	f, err := newAttestor(t).Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	u := f.Workload.GetUnix()
	if u.GetUid() != int64(os.Geteuid()) || u.GetGid() != int64(os.Getegid()) || u.GetPath() != path || u.GetSha256() != sum(t, path) {
		t.Errorf("facts %v", u)
	}
	if f.Rank != attest.RankProcess || !strings.HasPrefix(f.Instance, fmt.Sprintf("unix:%d:%d:", os.Geteuid(), os.Getegid())) {
		t.Errorf("instance %q, rank %d", f.Instance, f.Rank)
	}
}

// D15: ids come from the kernel, and are those of the process that connected.
func TestV_D15_Groups(t *testing.T) {
	needRoot(t)
	h := connect(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4000000001, Gid: 2002, Groups: []uint32{3003, 65534, 3001}}})
	f, err := newAttestor(t).Attest(t.Context(), h.peer)
	if err != nil {
		t.Fatal(err)
	}
	u := f.Workload.GetUnix()
	if u.GetUid() != 4000000001 || u.GetGid() != 2002 {
		t.Errorf("facts %v", u)
	}
	// The kernel sorts them. 65534 is an ordinary group here.
	if diff := cmp.Diff([]int64{3001, 3003, 65534}, u.GetGroups()); diff != "" {
		t.Errorf("groups: %s", diff)
	}
}

// A process that has changed its user since it connected would mix the facts of
// two.
func TestV_D15_UserChanges(t *testing.T) {
	needRoot(t)
	h := connect(t, nil, "uid=1234", "uid=0")
	a := newAttestor(t)
	if _, err := a.Attest(t.Context(), h.peer); err != nil {
		t.Fatal(err)
	}
	h.step(t)
	if _, err := h.out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	// Setresuid of the Go runtime changes all threads, so the main one too.
	if f, err := a.Attest(t.Context(), h.peer); err == nil || !strings.Contains(err.Error(), "connected with 0") {
		t.Errorf("facts %v, error %v", f, err)
	}
}

// The executable is read again each time: one that connects and then executes
// what another is allowed to is still the same user, and its path is the new one.
func TestSpec_I04_ExecAfterConnect(t *testing.T) {
	path := sleepCopy(t)
	h := connect(t, nil, "exec="+path)
	a := newAttestor(t)
	before, err := a.Attest(t.Context(), h.peer)
	if err != nil {
		t.Fatal(err)
	}
	h.step(t)
	var after *attest.Facts
	for { // until exec has happened
		if after, err = a.Attest(t.Context(), h.peer); err != nil {
			t.Fatal(err)
		}
		if after.Workload.GetUnix().GetPath() != before.Workload.GetUnix().GetPath() {
			break
		}
	}
	u := after.Workload.GetUnix()
	if u.GetPath() != path || u.GetSha256() != sum(t, path) {
		t.Errorf("facts %v", u)
	}
	if after.Instance == before.Instance {
		t.Errorf("two executables are one instance, %s", after.Instance)
	}
}

// D8: path and hash can be had by anybody who may execute the file; the uid
// cannot.
func TestV_D8_SameFileOtherUser(t *testing.T) {
	needRoot(t)
	const victim, attacker = 2001, 2002
	a := newAttestor(t)
	var facts []*attest.Facts
	for _, uid := range []uint32{victim, attacker} {
		h := connect(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}, "exec=/bin/sleep")
		h.step(t)
		var f *attest.Facts
		for f == nil || f.Workload.GetUnix().GetPath() == "" || strings.HasSuffix(f.Workload.GetUnix().GetPath(), "/helper") {
			var err error
			if f, err = a.Attest(t.Context(), h.peer); err != nil {
				t.Fatal(err)
			}
		}
		facts = append(facts, f)
	}
	v, m := facts[0].Workload.GetUnix(), facts[1].Workload.GetUnix()
	if v.GetPath() != m.GetPath() || v.GetSha256() != m.GetSha256() {
		t.Errorf("not the same file: %v and %v", v, m)
	}
	if v.GetUid() != victim || m.GetUid() != attacker || facts[0].Instance == facts[1].Instance {
		t.Errorf("the users are mixed up: %v and %v", facts[0], facts[1])
	}
}

// D16: a user namespace changes what a process sees, and not what it is.
func TestV_D16_UserNamespace(t *testing.T) {
	needRoot(t)
	h := connect(t, &syscall.SysProcAttr{
		Cloneflags:                 syscall.CLONE_NEWUSER,
		UidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 10}},
		GidMappings:                []syscall.SysProcIDMap{{ContainerID: 0, HostID: 200000, Size: 10}},
		GidMappingsEnableSetgroups: true,
		Credential:                 &syscall.Credential{Uid: 0, Gid: 0},
	})
	f, err := newAttestor(t).Attest(t.Context(), h.peer)
	if err != nil {
		t.Fatal(err)
	}
	if u := f.Workload.GetUnix(); u.GetUid() != 100000 || u.GetGid() != 200000 {
		t.Errorf("root in a user namespace is attested as %v", u)
	}
}

// D16: if the agent itself is in a user namespace, an id that is not mapped is
// shown as one that means nothing.
func TestV_D16_OverflowIDs(t *testing.T) {
	a := newAttestor(t)
	a.ids.read, a.ids.ids = true, overflowIDs{uid: 65534, gid: 65534}
	for _, ids := range [][2]uint32{{65534, 1000}, {1000, 65534}} {
		p := peer.ForTest(os.Getpid(), ids[0], ids[1])
		if f, err := a.Attest(t.Context(), p); err == nil || !strings.Contains(err.Error(), "user namespace") {
			t.Errorf("uid %d, gid %d: facts %v, error %v", ids[0], ids[1], f, err)
		}
	}
	for text, want := range map[string]bool{
		"         0          0 4294967295\n": true,
		"         0     100000      65536\n": false,
		"0 0 4294967294\n":                   false,
		"1 1 4294967294\n":                   false,
		"":                                   false,
		"0 0 1000\n1000 100000 4294966295\n": false,
		"         0       1000          1\n 1 100000   65536 \n": false,
	} {
		if got := mapsAll(text); got != want {
			t.Errorf("%q maps all: %v", text, got)
		}
	}
	if os.Getuid() == 0 {
		o, err := (&idMaps{}).overflow()
		if err != nil || o.hidesUID(65534) && mapsAllHere(t) {
			t.Errorf("overflow ids here: %+v, %v", o, err)
		}
	}
}

func mapsAllHere(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	return mapsAll(string(text))
}

// Two files are two instances, whatever they are called and hold.
func TestInstances(t *testing.T) {
	a := newAttestor(t)
	one, two := sleepCopy(t), sleepCopy(t)
	attested := func(path string) *attest.Facts {
		t.Helper()
		p, _ := attesttest.Sleeper(t, path)
		f, err := a.Attest(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f1, f1again, f2 := attested(one), attested(one), attested(two)
	if f1.Instance != f1again.Instance {
		t.Errorf("two processes of one file: %s and %s", f1.Instance, f1again.Instance)
	}
	if f1.Instance == f2.Instance {
		t.Errorf("two files: both %s", f1.Instance)
	}
	// The file is replaced, as a package manager does it.
	p, _ := attesttest.Sleeper(t, one)
	old, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(two, one); err != nil {
		t.Fatal(err)
	}
	f, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if f.Instance != old.Instance || f.Workload.GetUnix().GetPath() != one+" (deleted)" || f.Workload.GetUnix().GetSha256() != old.Workload.GetUnix().GetSha256() {
		t.Errorf("after its file was replaced: %v", f)
	}
	if n := attested(one); n.Instance == old.Instance {
		t.Error("the new file is the old one's instance")
	}
}

func TestHashLimit(t *testing.T) {
	path := sleepCopy(t)
	p, _ := attesttest.Sleeper(t, path)
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for limit, hashed := range map[int64]bool{st.Size(): true, st.Size() - 1: false, 1: false} {
		a, err := New(Config{MaxExecutableBytes: limit})
		if err != nil {
			t.Fatal(err)
		}
		f, err := a.Attest(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Workload.GetUnix().GetSha256() != ""; got != hashed {
			t.Errorf("limit %d of %d: hashed %v", limit, st.Size(), got)
		}
	}
	if _, err := New(Config{MaxExecutableBytes: -1}); err == nil {
		t.Error("a negative limit is accepted")
	}
}

// The hash is kept only for a file that has not changed for a while, and is not
// believed for another version of the file.
func TestHashCache(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	h := newHashes(1 << 20)
	hashOf := func() (string, fileID) {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var st unix.Statx_t
		if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
			t.Fatal(err)
		}
		id := identify(&st)
		s, err := h.hash(t.Context(), f, id)
		if err != nil {
			t.Fatal(err)
		}
		return s, id
	}
	if err := os.WriteFile(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	one, id := hashOf()
	if _, kept := h.known[id]; kept {
		t.Error("kept the hash of a file that was written just now")
	}
	if err := os.WriteFile(path, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	if two, _ := hashOf(); two == one {
		t.Error("the old hash for the new contents")
	}
	for n := range maxHashes + 10 {
		h.keep(fileID{ino: uint64(n)}, "x")
	}
	if len(h.known) > maxHashes {
		t.Errorf("%d hashes kept", len(h.known))
	}
	// A file whose version is not the one that was described is not hashed.
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s, err := h.hash(t.Context(), f, id); err == nil {
		t.Errorf("hash %s of another version", s)
	}
}

// A file system that hangs costs its user his slots and nobody else's.
func TestV_D13_ExecutableHangs(t *testing.T) {
	h := newHashes(1)
	hang := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	started := make(chan struct{}, maxPerUID)
	for range maxPerUID {
		wg.Go(func() {
			_, err := h.bounded(ctx, 1000, func(context.Context) (*attest.Facts, error) {
				started <- struct{}{}
				<-hang
				return nil, errors.New("too late")
			}, func() { t.Error("not run") })
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		})
	}
	for range maxPerUID {
		<-started
	}
	cancel()
	wg.Wait() // they have returned, their goroutines hang

	short, done := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer done()
	instead := false
	if _, err := h.bounded(short, 1000, nil, func() { instead = true }); !errors.Is(err, context.DeadlineExceeded) || !instead {
		t.Errorf("the same user: error %v", err)
	}
	want := &attest.Facts{Instance: "x"}
	if got, err := h.bounded(t.Context(), 1001, func(context.Context) (*attest.Facts, error) { return want, nil }, nil); err != nil || got != want {
		t.Errorf("another user: %v, %v", got, err)
	}
	close(hang)
	if got, err := h.bounded(t.Context(), 1000, func(context.Context) (*attest.Facts, error) { return want, nil }, nil); err != nil || got != want {
		t.Errorf("the same user, when it goes on: %v, %v", got, err)
	}
	for range maxPerUID { // all slots are free again
		release, err := h.slot(t.Context(), 1000)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
	}
}

// Each attestation leaves no descriptor behind, whatever becomes of it.
func TestV_D17_Descriptors(t *testing.T) {
	a := newAttestor(t)
	path := sleepCopy(t)
	p, end := attesttest.Sleeper(t, path)
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	before := self.Descriptors(t)
	for range 500 {
		if _, err := a.Attest(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := a.Attest(ctx, p); err == nil {
			t.Fatal("attested although it was cancelled")
		}
	}
	end()
	for range 500 {
		if _, err := a.Attest(t.Context(), p); !errors.Is(err, peer.ErrGone) {
			t.Fatalf("error %v", err)
		}
	}
	if n := self.Descriptors(t); n > before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

func BenchmarkAttestWarm(b *testing.B) {
	a := newAttestor(b)
	p, err := peer.Open(os.Getppid())
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	if _, err := a.Attest(b.Context(), p); err != nil {
		b.Fatal(err)
	}
	before := self.CPU(b)
	for b.Loop() {
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(self.CPU(b)-before)/float64(b.N), "cpu-ns/op")
}

func BenchmarkAttestCold(b *testing.B) {
	p, err := peer.Open(os.Getppid())
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	st, err := os.Stat(fmt.Sprintf("/proc/%d/exe", os.Getppid()))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	before := self.CPU(b)
	for b.Loop() {
		if _, err := newAttestor(b).Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(self.CPU(b)-before)/float64(b.N), "cpu-ns/op")
}
