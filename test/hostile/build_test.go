package hostile

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// Nothing that is for tests is in the programs.
func TestV_K7_NoTestCode(t *testing.T) {
	t.Parallel()
	prefixes := []string{"testing.", "testing/", "net/http/pprof.", "net/http/httptest.", "google.golang.org/grpc/test", "github.com/google/go-cmp"}
	parts := []string{"/test/", "/attesttest.", "faultpoint", "failpoint"}
	for _, name := range []string{"ca", "node-agent"} {
		f, err := elf.Open(filepath.Join(local.Binaries(t), name))
		must(t, err)
		defer f.Close()
		symbols, err := f.Symbols()
		must(t, err)
		if len(symbols) < 10_000 {
			t.Errorf("%s: only %d symbols were looked at", name, len(symbols))
		}
		for _, s := range symbols {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s.Name, p) }) ||
				slices.ContainsFunc(parts, func(p string) bool { return strings.Contains(strings.ToLower(s.Name), p) }) {
				t.Errorf("%s: %s", name, s.Name)
			}
		}
		if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 {
			t.Errorf("%s needs %v (%v)", name, libs, err)
		}
	}
}

// What is released is position independent, static and without a writable part
// that is executable, and the same bytes from any folder.
func TestV_K7_Release(t *testing.T) {
	t.Parallel()
	root := require.Repository()
	if _, err := os.Stat(filepath.Join(root, "bin", "release")); err != nil && os.Getenv("REQUIRE_ALL") != "1" {
		t.Skip("no bin/release: compiling all for a release takes minutes the first time; run `make release` before")
	}
	list, err := exec.CommandContext(t.Context(), "git", "-C", root, "ls-files", "-z", "go.mod", "go.sum", "Makefile", "cmd", "pkg", "internal", "proto").Output()
	must(t, err)
	var built [2]string
	for n := range built {
		dir := filepath.Join(t.TempDir(), strings.Repeat("x", 1+n))
		for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
			data, err := os.ReadFile(filepath.Join(root, name))
			if errors.Is(err, os.ErrNotExist) {
				continue // it is being deleted
			}
			must(t, err)
			must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
			must(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
		}
		cmd := exec.CommandContext(t.Context(), require.Program(t, "make"), "-C", dir, "release")
		cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
			return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS") || strings.HasPrefix(v, "GOFLAGS")
		})
		if printed, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make release: %v\n%s", err, printed)
		}
		built[n] = filepath.Join(dir, "bin", "release")
	}
	for _, name := range []string{"ca", "node-agent"} {
		a, err1 := os.ReadFile(filepath.Join(built[0], name))
		b, err2 := os.ReadFile(filepath.Join(built[1], name))
		if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
			t.Errorf("%s differs from folder to folder (%v, %v)", name, err1, err2)
		}
		if bytes.Contains(a, []byte(filepath.Dir(filepath.Dir(built[0])))) || bytes.Contains(a, []byte(root+"/")) {
			t.Errorf("%s knows where it was built", name)
		}
		f, err := elf.NewFile(bytes.NewReader(a))
		must(t, err)
		if f.Type != elf.ET_DYN {
			t.Errorf("%s is %v, not position independent", name, f.Type)
		}
		if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 {
			t.Errorf("%s needs %v (%v)", name, libs, err)
		}
		if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Flags&(elf.PF_W|elf.PF_X) == elf.PF_W|elf.PF_X }) {
			t.Errorf("%s has a part that is writable and executable", name)
		}
	}
}
