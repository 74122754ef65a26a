package tree

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/ledger"
)

// points are the moments at which the writer's work can be interrupted.
func points() map[string]func(op string, n int, after bool) bool {
	m := map[string]func(op string, n int, after bool) bool{}
	for _, op := range []string{"mkdir", "write", "rename", "syncdir", "replace state", "replace checkpoint", "removeall"} {
		for _, nth := range []int{0, 1, 3} {
			for _, after := range []bool{false, true} {
				name := fmt.Sprintf("%s %d, before", op, nth)
				if after {
					name = fmt.Sprintf("%s %d, after", op, nth)
				}
				m[name] = func(o string, n int, a bool) bool { return o == op && n == nth && a == after }
			}
		}
	}
	return m
}

// TestV_F4_Interrupted stops the writer for good at each of its steps, before and
// after it was done, and starts it again: no gap, no duplicate, and no head that was
// seen is contradicted.
func TestV_F4_Interrupted(t *testing.T) {
	t.Parallel()
	for name, strikes := range points() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := &faultyDisk{}
			e := newEnv(t)
			e.options.disk = d
			e.start()
			e.append(250) // the next ones fill a tile
			before := e.covered()
			var dead atomic.Bool
			d.set(func(op string, n int, after bool) error {
				if strikes(op, n, after) {
					dead.Store(true)
				}
				if dead.Load() {
					return unix.EIO
				}
				return nil
			})
			e.append(3)
			e.append(600)
			// Either it is stopped, or that step did not come.
			e.await("the fault", func() bool { return dead.Load() || e.tree.Checkpoint().Size == e.journal.Size() })
			seen := e.tree.Checkpoint()
			e.kill()
			d.set(nil)
			e.start()
			e.append(5)
			now := e.covered()
			e.stop()
			e.verify()
			for _, c := range []Checkpoint{before, seen} {
				if err := consistent(e.treeDir(), c, now); err != nil {
					t.Errorf("the checkpoint of %d records: %v", c.Size, err)
				}
			}
			if now.Root != naiveRoot(e.hashes()) || now.Size != 858 {
				t.Errorf("%d records", now.Size)
			}
		})
	}
}

// TestV_F12_FullDisk refuses writes for a while: the journal goes on, and the tree
// catches up by itself.
func TestV_F12_FullDisk(t *testing.T) {
	t.Parallel()
	d := &faultyDisk{}
	e := newEnv(t)
	e.options.disk = d
	e.start()
	e.append(10)
	e.covered()
	d.set(func(op string, _ int, after bool) error {
		if op == "write" && !after {
			return unix.ENOSPC
		}
		return nil
	})
	// More than is kept in memory.
	e.append(2 * maxPendingFiles * tileWidth)
	e.await("a failure", func() bool { return errors.Is(e.tree.problemNow(), unix.ENOSPC) })
	e.tree.mu.Lock()
	e.tree.waiting = time.Now().Add(-2 * time.Minute)
	e.tree.mu.Unlock()
	if warning, failure := e.tree.Health(time.Now()); !errors.Is(warning, unix.ENOSPC) || failure != nil {
		t.Errorf("health: %v, %v", warning, failure)
	}
	d.set(nil)
	e.covered()
	e.await("no warning", func() bool { w, _ := e.tree.Health(time.Now()); return w == nil })
	e.stop()
	e.verify()
}

// TestFirstStartInterrupted stops the first start between the state and the key.
func TestFirstStartInterrupted(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.start()
	e.covered()
	e.stop()
	for _, name := range []string{e.options.Key, filepath.Join(e.treeDir(), checkpointName)} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	e.start()
	e.append(1)
	e.covered()
	e.stop()
	e.verify()
}

// crashDir is set in the process that is to be killed.
const crashDir = "MESHID_TEST_TREE_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashMain(dir, os.Stdout) // until it is killed
		return
	}
	m.Run()
}

// crashMain appends records and has them signed until it is killed.
func crashMain(dir string, out io.Writer) {
	j, err := ledger.Open(filepath.Join(dir, "ledger"), ledger.Options{SegmentBytes: 64 << 10})
	if err != nil {
		fmt.Fprintln(out, "open:", err)
		return
	}
	tr, err := Open(filepath.Join(dir, "tree"), j, Options{Key: filepath.Join(dir, "keys", "log.key"), Origin: "example.org/ca-1", Interval: time.Millisecond})
	if err != nil {
		fmt.Fprintln(out, "open:", err)
		return
	}
	go func() {
		fmt.Fprintln(out, "run:", tr.Run(context.Background()))
	}()
	for i := 0; ; i++ {
		if _, err := j.Append(context.Background(), testDraft(fmt.Sprint(j.Size())), testDraft(fmt.Sprint(j.Size(), "b"))); err != nil {
			fmt.Fprintln(out, "append:", err)
			return
		}
		fmt.Fprintln(out, "appended", i)
	}
}

// TestV_F4_KilledAtRandomTimes kills a process that appends and signs, again and
// again on one ledger: it is always sound, and continues each head that was seen.
func TestV_F4_KilledAtRandomTimes(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var seen []Checkpoint
	for round := range 6 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+e.dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		s := bufio.NewScanner(out)
		for n := 0; s.Scan(); n++ {
			if !strings.HasPrefix(s.Text(), "appended") {
				t.Errorf("the process says %q", s.Text())
			}
			if n != 40+round*37 {
				continue
			}
			// Whatever is published at this moment was seen by somebody.
			if c, err := ReadCheckpoint(e.treeDir(), e.verifier().Key); err == nil {
				seen = append(seen, c)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
			t.Errorf("the process ended by itself: %v", err)
		}
		e.start()
		now := e.covered()
		e.stop()
		e.verify()
		for _, c := range seen {
			if err := consistent(e.treeDir(), c, now); err != nil {
				t.Errorf("round %d: the checkpoint of %d records: %v", round, c.Size, err)
			}
		}
	}
	if len(seen) == 0 {
		t.Error("no checkpoint was seen")
	}
}
