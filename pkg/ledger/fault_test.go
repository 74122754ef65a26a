package ledger

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fault is one failing operation, counted from the moment it is armed.
type fault struct {
	op      string
	nth     int
	err     error
	partial int // of a write: bytes done before the error
	after   bool
}

func (f fault) arm(d *faultyDisk) {
	from := d.count(f.op)
	hit := func(op string, n int) error {
		if op == f.op && n-from == f.nth {
			return &os.PathError{Op: op, Path: "segment", Err: f.err}
		}
		return nil
	}
	if f.after {
		d.set(nil, hit)
		return
	}
	d.set(func(op string, n int) (int, error) { return f.partial, hit(op, n) }, nil)
}

// recoverable is the part of the fault table after which the journal goes on by
// itself. The segments are so small that each second batch begins a new one.
var recoverable = map[string]fault{
	"no space":                         {op: "write", err: unix.ENOSPC},
	"no quota":                         {op: "write", err: unix.EDQUOT},
	"no space for all of it":           {op: "write", err: unix.ENOSPC, partial: 100},
	"no space for the last bytes":      {op: "write", err: unix.ENOSPC, partial: 1 << 20},
	"no space, said when it was done":  {op: "write", err: unix.ENOSPC, after: true},
	"no space for a segment":           {op: "create", err: unix.ENOSPC},
	"no space for a segment's header":  {op: "write", nth: 4, err: unix.ENOSPC},
	"no space for a segment's name":    {op: "rename", err: unix.ENOSPC},
	"cannot reserve space":             {op: "allocate", err: unix.EOPNOTSUPP},
	"no space to reserve":              {op: "allocate", err: unix.ENOSPC},
	"no space for a part of a header":  {op: "write", nth: 4, err: unix.ENOSPC, partial: 10},
	"no space for the second or third": {op: "write", nth: 2, err: unix.ENOSPC, partial: 700},
}

func TestFault_F12_NoSpaceIsOvercome(t *testing.T) {
	t.Parallel()
	for name, f := range recoverable {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			d := &faultyDisk{}
			var states []error
			j := openTest(t, dir, Options{disk: d, SegmentBytes: 4 << 10, OnState: func(err error) { states = append(states, err) }})
			var want []string
			refused := 0
			f.arm(d)
			for _, id := range ids("r", 20) {
				draft := testDraft(id)
				durables, err := j.Append(t.Context(), draft)
				if err != nil {
					refused++
					if !errors.Is(err, ErrFull) || durables != nil {
						t.Fatalf("error is %v", err)
					}
					if j.Failed() != nil || j.Size() != uint64(len(want)) {
						t.Fatalf("size %d, failed %v", j.Size(), j.Failed())
					}
					// The same draft, once there is space again.
					if _, err := j.Append(t.Context(), draft); err != nil {
						t.Fatalf("again: %v", err)
					}
				}
				want = append(want, id)
			}
			// Space that cannot be reserved is not needed yet.
			if struck := d.count(f.op) > f.nth; !struck || (refused == 1) == (f.op == "allocate") {
				t.Errorf("%d calls were refused", refused)
			}
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			if len(states) != 2*refused || refused > 0 && (!errors.Is(states[0], ErrFull) || states[1] != nil) {
				t.Errorf("states told: %v", states)
			}
			wantIDs(t, dir, want)
			openTest(t, dir, Options{})
		})
	}
}

func TestFault_F12_FullForAWhile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := &faultyDisk{}
	var log bytes.Buffer
	j := openTest(t, dir, Options{disk: d, SegmentBytes: 4 << 10, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	var want []string
	for round := range 5 {
		for _, id := range ids(fmt.Sprint(round), 7) {
			appendTest(t, j, id)
			want = append(want, id)
		}
		d.set(func(op string, _ int) (int, error) {
			if op == "write" || op == "allocate" || op == "create" {
				return round * 100, unix.ENOSPC
			}
			return 0, nil
		}, nil)
		for range 10 {
			if _, err := j.Append(t.Context(), testDraft("refused")); !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
		}
		d.set(nil, nil)
	}
	appendTest(t, j, "last")
	wantIDs(t, dir, append(want, "last"))
	if n := strings.Count(log.String(), "level=ERROR"); n != 5 {
		t.Errorf("%d log lines for 5 full disks:\n%s", n, log.String())
	}
}

// final is the part of the fault table after which nothing more is written.
var final = map[string]fault{
	"write refused":                    {op: "write", err: unix.EIO},
	"write refused in the middle":      {op: "write", err: unix.EIO, partial: 300},
	"write done and refused":           {op: "write", err: unix.EIO, after: true},
	"read-only":                        {op: "write", err: unix.EROFS},
	"fdatasync refused":                {op: "datasync", err: unix.EIO},
	"fdatasync done and refused":       {op: "datasync", err: unix.EIO, after: true},
	"fdatasync without space":          {op: "datasync", err: unix.ENOSPC},
	"third fdatasync":                  {op: "datasync", nth: 2, err: unix.EIO},
	"segment's end not cut":            {op: "truncate", err: unix.EIO},
	"segment not synced":               {op: "sync", err: unix.EIO},
	"segment synced and refused":       {op: "sync", err: unix.EIO, after: true},
	"next segment not created":         {op: "create", err: unix.EACCES},
	"next segment's header":            {op: "write", nth: 4, err: unix.EIO, partial: 20},
	"next segment not synced":          {op: "sync", nth: 1, err: unix.EIO},
	"next segment not named":           {op: "rename", err: unix.EIO},
	"next segment named and refused":   {op: "rename", err: unix.EIO, after: true},
	"directory not synced":             {op: "syncdir", err: unix.EIO},
	"directory synced and refused":     {op: "syncdir", err: unix.EIO, after: true},
	"sync says there is no space":      {op: "sync", nth: 1, err: unix.ENOSPC},
	"descriptor closed under the CA":   {op: "write", nth: 1, err: os.ErrClosed},
	"fdatasync interrupted for good":   {op: "datasync", err: unix.EINTR},
	"write that is short for no cause": {op: "write", err: errors.New("short"), partial: 8},
}

func TestFault_F14_FailureStays(t *testing.T) {
	t.Parallel()
	for name, f := range final {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			d := &faultyDisk{}
			var states []error
			j := openTest(t, dir, Options{disk: d, SegmentBytes: 4 << 10, OnState: func(err error) { states = append(states, err) }})
			var want []string
			f.arm(d)
			for _, id := range ids("r", 20) {
				durables, err := j.Append(t.Context(), testDraft(id))
				if err == nil {
					want = append(want, id)
					continue
				}
				if !errors.Is(err, ErrFailed) || !errors.Is(err, f.err) || durables != nil {
					t.Fatalf("error is %v", err)
				}
				break
			}
			if len(want) == 20 {
				t.Fatal("the fault did not strike")
			}
			select {
			case <-j.Broken():
			default:
				t.Error("not broken")
			}
			d.set(nil, nil)
			d.mu.Lock()
			clear(d.calls)
			d.mu.Unlock()
			for range 3 {
				if _, err := j.Append(t.Context(), testDraft("later")); !errors.Is(err, ErrFailed) || j.Failed() == nil {
					t.Fatalf("after the failure: %v", err)
				}
			}
			if err := j.Close(); err != nil {
				t.Error(err)
			}
			if len(d.calls) != 0 {
				t.Errorf("after the failure the disk was asked for %v", d.calls)
			}
			if len(states) != 1 || j.Size() != uint64(len(want)) {
				t.Errorf("states %v, size %d, want %d", states, j.Size(), len(want))
			}
			reopened(t, dir, want)
		})
	}
}

// reopened checks that after opening anew the acknowledged records are there, with
// at most one more, and that it goes on.
func reopened(t *testing.T, dir string, acknowledged []string) {
	t.Helper()
	j := openTest(t, dir, Options{SegmentBytes: 4 << 10})
	got, err := scanIDs(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(acknowledged); len(got) < n || len(got) > n+1 || strings.Join(got[:n], " ") != strings.Join(acknowledged, " ") {
		t.Fatalf("found %v, acknowledged %v", got, acknowledged)
	}
	appendTest(t, j, "after")
	wantIDs(t, dir, append(got, "after"))
}

// TestFault_F14_OpenDoesNotTrustMemory checks that Open writes the last batch again:
// after an fsync that failed, the file reads well and is not on the disk.
func TestFault_F14_OpenDoesNotTrustMemory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := openTest(t, dir, Options{})
	appendTest(t, j, "a", "b")
	if _, err := j.Append(t.Context(), testDraft("c"), testDraft("d")); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []fault{
		{op: "write", err: unix.EIO},
		{op: "truncate", err: unix.EIO},
		{op: "sync", err: unix.EIO},
		{op: "syncdir", err: unix.EIO},
		{op: "open", err: unix.EACCES},
	} {
		d := &faultyDisk{}
		f.arm(d)
		if _, err := Open(dir, Options{disk: d}); !errors.Is(err, f.err) {
			t.Errorf("%s: %v", f.op, err)
		}
	}
	d := &faultyDisk{}
	var written int
	d.set(func(op string, _ int) (int, error) {
		if op == "write" {
			written++
		}
		return 0, nil
	}, nil)
	openTest(t, dir, Options{disk: d})
	if written != 1 || d.count("sync") != 1 || d.count("syncdir") != 1 {
		t.Errorf("calls: %v", d.calls)
	}
	wantIDs(t, dir, []string{"a", "b", "c", "d"})
}

// TestFault_F18_PowerFailure takes any sectors of the last write away, as a power
// failure may.
func TestFault_F18_PowerFailure(t *testing.T) {
	t.Parallel()
	const sector = 512
	dir := t.TempDir()
	d := &faultyDisk{}
	j := openTest(t, dir, Options{disk: d, SegmentBytes: 16 << 10})
	acknowledged := ids("r", 5)
	appendTest(t, j, acknowledged...)
	name := filepath.Join(dir, segmentName(0))
	before, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	fault{op: "datasync", err: unix.EIO}.arm(d)
	batch := ids("lost", 6)
	var drafts []*Draft
	for _, id := range batch {
		drafts = append(drafts, testDraft(id))
	}
	if _, err := j.Append(t.Context(), drafts...); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	after, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	before = append(before, make([]byte, len(after)-len(before))...)
	j.Close()
	random := rand.New(rand.NewPCG(1, 2))
	lengths := map[int]int{}
	for range 150 {
		content := bytes.Clone(after)
		for at := 0; at < len(content); at += sector {
			if random.IntN(2) == 0 {
				copy(content[at:min(at+sector, len(content))], before[at:])
			}
		}
		if random.IntN(2) == 0 { // the file's size is old, too
			content = content[:len(content)-random.IntN(len(content)-int(j.writer.offset))]
		}
		crashed := t.TempDir()
		if err := os.WriteFile(filepath.Join(crashed, segmentName(0)), content, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := Open(crashed, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := scanIDs(crashed, 0)
		want := append(acknowledged[:5:5], batch...)
		if err != nil || len(got) < 5 || strings.Join(got, " ") != strings.Join(want[:len(got)], " ") {
			t.Fatalf("found %v: %v", got, err)
		}
		lengths[len(got)]++
	}
	if len(lengths) < 3 {
		t.Errorf("the failures were all alike: %v", lengths)
	}
}
