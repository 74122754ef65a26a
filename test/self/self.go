// Package self answers what the process of a test or a benchmark itself uses. It knows
// nothing of ours.
package self

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Descriptors counts the open file descriptors.
func Descriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// CPU returns the processor time that was used so far.
func CPU(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
