package peer

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
)

var (
	idA = strings.Repeat("a1", 32)
	idB = strings.Repeat("b2", 32)
)

func TestContainerOf(t *testing.T) {
	for name, tc := range map[string]struct{ text, own, want string }{
		"none":                   {"0::/system.slice/ssh.service\n", "", ""},
		"empty":                  {"", "", ""},
		"not lines of a cgroup":  {"docker/" + idA + "\n1:x\n", "", ""},
		"cgroupfs driver":        {"0::/docker/" + idA + "\n", "", "/docker/" + idA},
		"systemd driver":         {"0::/system.slice/docker-" + idA + ".scope\n", "", "/system.slice/docker-" + idA + ".scope"},
		"kubernetes":             {"0::/kubepods.slice/kubepods-pod7.slice/cri-containerd-" + idA + ".scope\n", "", "/kubepods.slice/kubepods-pod7.slice/cri-containerd-" + idA + ".scope"},
		"v1":                     {"2:cpu:/docker/" + idA + "\n1:name=systemd:/docker/" + idA + "\n", "", "/docker/" + idA},
		"in one hierarchy only":  {"2:cpu:/\n1:name=systemd:/docker/" + idA + "\n0::/\n", "", "/docker/" + idA},
		"made below its own":     {"0::/docker/" + idA + "/" + idB + "\n", "", "/docker/" + idA},
		"made deeper":            {"0::/docker/" + idA + "/x/y/docker-" + idB + ".scope/z\n", "", "/docker/" + idA},
		"of another's name":      {"0::/user.slice/user-7.slice/docker-" + idA + ".scope\n", "", "/user.slice/user-7.slice/docker-" + idA + ".scope"},
		"another namespace":      {"0::/../docker-" + idA + ".scope\n", "", "/../docker-" + idA + ".scope"},
		"63 digits":              {"0::/docker/" + idA[1:] + "\n", "", ""},
		"capitals":               {"0::/docker/" + strings.ToUpper(idA) + "\n", "", ""},
		"beside this program's":  {"0::/docker/" + idB + "\n", "/docker/" + idA, "/docker/" + idB},
		"in this program's":      {"0::/docker/" + idA + "\n", "/docker/" + idA, "/docker/" + idA},
		"below this program's":   {"0::/docker/" + idA + "/docker/" + idB + "/x\n", "/docker/" + idA, "/docker/" + idA + "/docker/" + idB},
		"with this one's prefix": {"0::/docker/" + idA + "b/docker/" + idB + "\n", "/docker/" + idA, "/docker/" + idA + "b"},
		"not ended":              {"0::/docker/" + idA, "", "/docker/" + idA},
		"colons":                 {"0::/a:b/docker-" + idA + ".scope\n", "", "/a:b/docker-" + idA + ".scope"},
	} {
		if got := containerOf([]byte(tc.text), tc.own); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

func FuzzContainerOf(f *testing.F) {
	f.Add([]byte("0::/docker/"+idA+"/"+idB+"\n"), "/docker/"+idA)
	f.Fuzz(func(t *testing.T, text []byte, own string) {
		if got := containerOf(text, own); got != "" && !strings.Contains(string(text), got) {
			t.Errorf("%q is not in %q", got, text)
		}
	})
}

// Whatever a container makes of itself, below it or with other users, it has its
// own places and no more; the others of its users have theirs.
func TestV_I1_PlacesOfAContainer(t *testing.T) {
	q := newQuota("streams", 10, 6, 3)
	enter := func(uid uint32, container string, want reason) {
		t.Helper()
		if r, err := q.enter(uid, container); r != want || (err == nil) != (want == "") {
			t.Fatalf("uid %d in %q: %q, %v, want %q", uid, container, r, err, want)
		}
	}
	enter(0, "a", "")
	enter(0, "a", "")
	enter(1000, "a", "") // another user inside
	enter(0, "a", reasonContainerLimit)
	enter(2000, "a", reasonContainerLimit)
	enter(0, "b", "")
	enter(0, "", "")
	enter(0, "", "")
	enter(0, "", "") // no container: bounded by the user
	enter(0, "b", reasonUIDLimit)
	enter(5, "c", "")
	enter(6, "c", "")
	enter(7, "c", "")
	enter(8, "d", reasonLimit)
	q.leave(0, "a")
	enter(0, "a", "")
	for range 2 {
		q.leave(0, "a")
	}
	q.leave(1000, "a")
	q.leave(0, "b")
	for range 3 {
		q.leave(0, "")
	}
	for uid := range uint32(3) {
		q.leave(5+uid, "c")
	}
	if q.open != 0 || len(q.users) != 0 || len(q.containers) != 0 {
		t.Errorf("something is left over: %+v", q)
	}
}

// A process in a cgroup that a runtime could have made is counted as a container,
// at accept, by the kernel's word.
func TestV_I1_ContainerIsKnownAtAccept(t *testing.T) {
	needRoot(t)
	group := makeCgroup(t, "meshid-test-"+strconv.Itoa(os.Getpid())+"-"+idA)
	l, path := listen(t, Options{MaxConns: 8, MaxConnsPerUID: 4, MaxConnsPerContainer: 1})
	confined := startIn(t, group, "connect", path)
	c, p := accept(t, l)
	confined.line(t)
	if !strings.HasSuffix(p.container, idA) {
		t.Fatalf("the container is %q", p.container)
	}
	second := startIn(t, group, "connect", path)
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	second.line(t) // connected, and refused
	m := l.(*listener).metrics
	within(t, "the refusal", func() bool { return testutil.ToFloat64(m.refusals[reasonContainerLimit]) == 1 })

	mine := dial(t, path) // the same user, elsewhere
	_ = (<-accepted).Close()
	if _, err := mine.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	_ = c.Close()
}

// makeCgroup makes a cgroup below this process's own, in the first hierarchy in
// which that is possible.
func makeCgroup(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		mount := strings.TrimPrefix(f[1], "name=")
		for _, root := range []string{"/sys/fs/cgroup/" + mount, "/sys/fs/cgroup/unified"} {
			if f[1] != "" && strings.HasSuffix(root, "unified") {
				continue
			}
			dir := filepath.Join(root, f[2], name)
			if st := (unix.Statfs_t{}); unix.Statfs(filepath.Dir(dir), &st) != nil || st.Type != unix.CGROUP_SUPER_MAGIC && st.Type != unix.CGROUP2_SUPER_MAGIC {
				continue
			}
			if os.Mkdir(dir, 0o755) != nil {
				continue
			}
			if f[1] == "cpuset" { // it takes no process before it has been given processors
				_ = os.Remove(dir)
				continue
			}
			t.Cleanup(func() {
				within(t, "the end of the cgroup", func() bool { return os.Remove(dir) == nil })
			})
			return dir
		}
	}
	if os.Getenv("REQUIRE_ALL") == "1" {
		t.Fatal("no cgroup can be made here, and REQUIRE_ALL=1")
	}
	t.Skip("no cgroup can be made here")
	return ""
}

// startIn starts a helper that enters a cgroup first.
func startIn(t *testing.T, group string, args ...string) *helper {
	t.Helper()
	return start(t, 0, append([]string{"in", group}, args...)...)
}
