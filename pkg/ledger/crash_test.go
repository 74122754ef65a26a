package ledger

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// crashDir is set in the process that is to be killed.
const crashDir = "MESHID_TEST_LEDGER_CRASH_DIR"

// crashMain appends from several goroutines until it is killed, and says on out
// what was acknowledged.
func crashMain(dir string, out io.Writer) {
	j, err := Open(dir, Options{SegmentBytes: 32 << 10})
	if err != nil {
		fmt.Fprintln(out, "open:", err)
		return
	}
	fmt.Fprintln(out, "open")
	var wg sync.WaitGroup
	start := j.Size()
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%d-%d-%d", start, g, i)
				drafts := []*Draft{testDraft(id)}
				if g == 0 { // one that appends several at once
					drafts = append(drafts, testDraft(id+"b"), testDraft(id+"c"))
				}
				durables, err := j.Append(context.Background(), drafts...)
				if err != nil {
					fmt.Fprintln(out, "append:", err)
					return
				}
				for _, d := range durables {
					// One write for each line: a pipe keeps them whole.
					fmt.Fprintf(out, "%d %x %s\n", d.Index(), d.Hash(), d.Record().GetRequestId())
				}
			}
		})
	}
	wg.Wait()
}

// TestFault_F4_KilledAtRandomTimes kills a process that appends under load, again and
// again on one journal: what was acknowledged is in it, each time.
func TestFault_F4_KilledAtRandomTimes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	acknowledged := map[string]string{} // "index hash" → request id
	for range 8 {
		crashRound(t, dir, rand.IntN(200), acknowledged)
		found := map[string]string{}
		for e, err := range Scan(dir, 0) {
			if err != nil {
				t.Fatal(err)
			}
			found[fmt.Sprintf("%d %x", e.Index, e.Hash)] = e.Record.GetRequestId()
		}
		for k, id := range acknowledged {
			if found[k] != id {
				t.Fatalf("record %s of %s was acknowledged and is not in the journal", k, id)
			}
		}
		if _, err := Verify(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
	}
	j := openTest(t, dir, Options{})
	if int(j.Size()) < len(acknowledged) {
		t.Fatalf("%d records, %d were acknowledged", j.Size(), len(acknowledged))
	}
	t.Logf("%d records, %d acknowledged", j.Size(), len(acknowledged))
}

// crashRound runs the process until it has said so many lines.
func crashRound(t *testing.T, dir string, lines int, acknowledged map[string]string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir)
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
		if n == lines {
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
		}
		if s.Text() == "open" {
			continue
		}
		index, rest, _ := strings.Cut(s.Text(), " ")
		hash, id, ok := strings.Cut(rest, " ")
		if len(hash) != 64 {
			if ok || n < lines { // else it was killed while it wrote the line
				t.Errorf("the process says %q", s.Text())
			}
			continue
		}
		acknowledged[index+" "+hash] = id
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
		t.Errorf("the process ended by itself: %v", err)
	}
}

// TestPanicEndsTheProcess has the writer panic: a caller that recovers from its own
// panics, as servers do, must not go on.
func TestPanicEndsTheProcess(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), panicking+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "panic: write to ledger: the disk is haunted") || strings.Contains(string(out), "went on") {
		t.Errorf("the process ended with %v, and said:\n%s", err, out)
	}
}

// panicking is set in the process whose writer is to panic, in its working directory.
const panicking = "MESHID_TEST_LEDGER_PANIC"

func panicMain(out io.Writer) {
	defer func() {
		fmt.Fprintln(out, "went on after", recover())
	}()
	d := &faultyDisk{}
	j, err := Open("ledger", Options{disk: d})
	if err != nil {
		panic(err)
	}
	d.set(func(op string, _ int) (int, error) {
		if op == "datasync" {
			panic("the disk is haunted")
		}
		return 0, nil
	}, nil)
	_, err = j.Append(context.Background(), testDraft("x"))
	fmt.Fprintln(out, "went on with", err)
}
