package peer

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

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
