// Package stepclock shows programs another wall clock than the machine's, and steps
// it while they run. Their monotonic clock stays true. It does not know which
// programs these are.
package stepclock

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/meshid/meshid/test/require"
)

// Clock is the wall clock of any number of programs. It is not safe for concurrent
// use.
type Clock struct {
	program, file string
	by            time.Duration
}

// New returns a clock that is right. It builds the program that shows it, and skips
// the test where root or a C compiler is missing.
func New(t testing.TB) *Clock {
	t.Helper()
	require.Root(t)
	dir := t.TempDir()
	c := &Clock{program: filepath.Join(dir, "stepclock"), file: filepath.Join(dir, "clock")}
	source := filepath.Join(require.Repository(), "test", "stepclock", "testdata", "stepclock.c")
	//nolint:gosec // a compiler of this machine, a source of this repository
	if out, err := exec.CommandContext(t.Context(), require.Program(t, "gcc"), "-O2", "-o", c.program, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	c.Step(t, 0)
	return c
}

// Wrap returns what stands before a program, and its arguments, that sees the clock.
func (c *Clock) Wrap() []string { return []string{c.program, c.file} }

// Step sets how far the clock is from the machine's, in whole seconds.
func (c *Clock) Step(t testing.TB, by time.Duration) {
	t.Helper()
	c.by = by
	if err := os.WriteFile(c.file+".new", []byte(strconv.Itoa(int(by.Seconds()))), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(c.file+".new", c.file); err != nil {
		t.Fatal(err)
	}
}

// Now is what the clock shows.
func (c *Clock) Now() time.Time { return time.Now().Add(c.by) }
