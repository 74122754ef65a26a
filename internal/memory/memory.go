// Package memory answers what a program that waits for most of its life can give
// back to the machine, and when. It does not know what the program waits for.
package memory

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Calm is how long nothing was collected when a burst is over.
const Calm = 5 * time.Second

// burst is how many collections without calm between them are more than a start is made of.
const burst = 20

// Limits are what Tend keeps a program to. What they say of collections gives way to the
// operator's GOGC.
type Limits struct {
	// Calm is how long nothing was collected when a burst is over.
	Calm time.Duration
	// Room is how many bytes may be allocated between two collections during a burst,
	// also where the heap that is kept is smaller: a program that keeps little would
	// otherwise spend its time on collecting. 0 leaves GOGC as it is.
	Room uint64
	// Garbage is how many bytes may be allocated between two collections while the
	// program grows, about, where GOGC allows for a half or all of what is kept: it
	// has that much more than it needs at the most. 0 is no limit.
	Garbage uint64
	// File is how many bytes of the program's file are in its memory during a burst
	// at the most, about: it is looked at with each collection. 0 is no limit.
	File uint64
}

// Tend keeps the program to its limits, and gives memory back to the machine once
// nothing was collected for a while after the start, and after each burst of work, until
// ctx ends. It polls nothing: it is woken by the collector.
func Tend(ctx context.Context, l Limits, log *slog.Logger) {
	collected := make(chan struct{}, 1)
	tellCollections(ctx, collected)
	timer := time.NewTimer(l.Calm)
	defer timer.Stop()
	usual := read("/gc/gogc:percent")
	if os.Getenv("GOGC") != "" {
		l.Room, l.Garbage = 0, 0
	}
	percent, most := usual, uint64(0) // most that was kept since it was calm
	pace := func(bursting bool) {
		kept := read("/gc/heap/live:bytes") + read("/memory/classes/heap/stacks:bytes")
		growing := kept > most+l.Garbage/8
		most = max(most, kept)
		if to := l.percent(usual, kept, bursting, growing); to != percent {
			percent = to
			debug.SetGCPercent(int(to)) //nolint:gosec // G115: Room, in percent of what is at least a page
		}
	}
	file := &programFile{}
	pace(false)
	for given := uint64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-collected:
			timer.Reset(l.Calm)
			pace(collections() > given+burst)
			if err := l.trim(file); err != nil {
				log.DebugContext(ctx, "pages of the program's file stay in memory", "err", err)
			}
		case <-timer.C:
			// One collection alone is no burst: the runtime collects every two
			// minutes whatever happens.
			if n := collections(); n > given+1 {
				given = n
				runtime.GC() // what is in a sync.Pool outlives one
				debug.FreeOSMemory()
				most = 0
				pace(false)
				if err := file.unmap(); err != nil {
					log.DebugContext(ctx, "pages of the program's file stay in memory", "err", err)
				}
			}
		}
	}
}

// percent returns the GOGC that keeps to the limits, where it usually is usual and kept
// bytes were kept by the last collection.
func (l Limits) percent(usual, kept uint64, bursting, growing bool) uint64 {
	kept = max(kept, 1<<20)
	switch {
	case l.Garbage > 0:
		// To collect often costs little while there is little. Where there is much,
		// the processor's time is dearer, and more so if what is made replaces
		// something: then the program gets no larger by it.
		least := uint64(50)
		if growing {
			least = 20
		}
		return min(max(l.Garbage*100/kept, least), 100)
	case l.Room > 0 && bursting:
		return max(usual, l.Room*100/kept)
	default:
		return usual
	}
}

// trim gives back pages of the program's file if there are too many.
func (l Limits) trim(file *programFile) error {
	if l.File == 0 {
		return nil
	}
	if n, err := residentFile(); err != nil || n <= l.File {
		return err
	}
	return file.unmap()
}

// residentFile returns how many bytes of files are in memory, from statm of
// proc_pid_statm(5).
func residentFile() (uint64, error) {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(statm))
	if len(f) < 3 {
		return 0, fmt.Errorf("read /proc/self/statm: %q", statm)
	}
	pages, err := strconv.ParseUint(f[2], 10, 32)
	return pages * uint64(os.Getpagesize()), err //nolint:gosec // not negative
}

// tellCollections sends to collected after each collection, until ctx ends.
func tellCollections(ctx context.Context, collected chan<- struct{}) {
	type witness [64]byte // large enough to be an object of its own
	runtime.AddCleanup(new(witness), func(struct{}) {
		if ctx.Err() != nil {
			return
		}
		select {
		case collected <- struct{}{}:
		default:
		}
		tellCollections(ctx, collected)
	}, struct{}{})
}

// collections counts the garbage collections that the runtime began by itself: those
// that were forced, our own too, are not counted.
func collections() uint64 { return read("/gc/cycles/automatic:gc-cycles") }

// read reads one of the runtime's metrics, a number.
func read(name string) uint64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// programFile is the program's own file in its memory.
type programFile struct{ maps []fileMap }

// unmap has the kernel take the pages of the program's file out of the program's
// memory. Most were needed once, at the start, and each came with its neighbours,
// sixteen pages and more; what is needed again is there again without the disk, for as
// long as the kernel has it in its cache.
func (f *programFile) unmap() error {
	var err error
	if f.maps == nil { // they stay as they are: addresses are relocated before anything runs
		f.maps, err = fileMaps()
	}
	for _, m := range f.maps {
		if m.own {
			continue
		}
		if _, _, no := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); no != 0 {
			err = errors.Join(err, fmt.Errorf("give back pages of the program's file: %w", no))
		}
	}
	return err
}

// fileMap is a part of the program's file in memory that cannot be written.
type fileMap struct {
	start, end uintptr
	resident   int // KiB
	// own: there are pages in it that are not the file's any more. In programs that are
	// position independent addresses were relocated there.
	own bool
}

// fileMaps returns those of this process, from smaps of proc_pid_smaps(5).
func fileMaps() ([]fileMap, error) {
	file, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("find the program's file: %w", err)
	}
	smaps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil, fmt.Errorf("find where the program's file is in memory: %w", err)
	}
	defer smaps.Close() //nolint:errcheck // only read from
	var all []fileMap
	ours := false
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 {
			continue
		}
		if start, end, ok := addresses(f[0]); ok {
			// start-end permissions offset device inode path
			ours = len(f) > 5 && strings.Join(f[5:], " ") == file && !strings.Contains(f[1], "w")
			if ours {
				all = append(all, fileMap{start: start, end: end, own: true})
			}
			continue
		}
		if !ours {
			continue
		}
		kib, err := strconv.Atoi(f[1])
		switch last := &all[len(all)-1]; f[0] {
		case "Rss:":
			last.resident = kib
		case "Anonymous:":
			last.own = err != nil || kib != 0
		default:
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("find where the program's file is in memory: %w", err)
	}
	return all, nil
}

// addresses returns both ends of a mapping.
func addresses(field string) (start, end uintptr, ok bool) {
	first, last, ok := strings.Cut(field, "-")
	if !ok {
		return 0, 0, false
	}
	s, err := strconv.ParseUint(first, 16, strconv.IntSize)
	if err != nil {
		return 0, 0, false
	}
	e, err := strconv.ParseUint(last, 16, strconv.IntSize)
	return uintptr(s), uintptr(e), err == nil
}
