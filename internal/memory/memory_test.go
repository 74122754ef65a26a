package memory

import (
	"context"
	"log/slog"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

// After a burst, and after the next one, memory is given back.
func TestTend(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Tend(ctx, Limits{Calm: time.Millisecond}, slog.New(slog.DiscardHandler))
	}()
	defer func() {
		cancel()
		<-ended
	}()
	given := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/cycles/forced:gc-cycles"}} // debug.FreeOSMemory is one
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	var kept []byte
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for burst := range 3 {
		before := given()
		// One collection alone is no burst, and on a busy machine a single one may see
		// all that is allocated here: then it is done again.
		for deadline := time.Now().Add(time.Minute); given() == before; {
			if time.Now().After(deadline) {
				t.Fatalf("nothing was given back after burst %d", burst)
			}
			for range 64 {
				kept = make([]byte, 1<<20)
			}
			for soon := time.Now().Add(time.Second); given() == before && time.Now().Before(soon); {
				<-poll.C
			}
		}
	}
	runtime.KeepAlive(kept)
}

// In a burst the collector begins later, and as ever when it is over; where the
// operator has said when, as he said.
func TestTendRoom(t *testing.T) {
	for _, row := range []struct {
		name, gogc string
		raised     bool
	}{{"by default", "", true}, {"the operator's word", "100", false}} {
		t.Run(row.name, func(t *testing.T) {
			t.Setenv("GOGC", row.gogc)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				Tend(ctx, Limits{Calm: 100 * time.Millisecond, Room: 256 << 20}, slog.New(slog.DiscardHandler))
			}()
			defer func() {
				cancel()
				<-ended
			}()
			usual := read("/gc/gogc:percent")
			var kept []byte
			raised := false
			began := collections()
			for deadline := time.Now().Add(time.Minute); !raised && time.Now().Before(deadline); {
				for range 64 {
					kept = make([]byte, 1<<20)
				}
				raised = read("/gc/gogc:percent") > usual
				if !row.raised && collections() > began+10*burst {
					break
				}
			}
			if raised != row.raised {
				t.Fatalf("the collector begins later in a burst: %v, want %v", raised, row.raised)
			}
			poll := time.NewTicker(time.Millisecond)
			defer poll.Stop()
			for deadline := time.Now().Add(time.Minute); read("/gc/gogc:percent") != usual; <-poll.C {
				if time.Now().After(deadline) {
					t.Fatal("after the burst the collector still begins later")
				}
			}
			runtime.KeepAlive(kept)
		})
	}
}

// What the program's file takes is given back, and the program goes on.
func TestUnmapFile(t *testing.T) {
	before := resident(t)
	if err := (&programFile{}).unmap(); err != nil {
		t.Fatal(err)
	}
	if after := resident(t); before == 0 || after >= before {
		t.Errorf("%d KiB of the program's file before, %d afterwards", before, after)
	}
}

// resident returns how much of the program's file is in memory and could be given back,
// in KiB.
func resident(t *testing.T) (kib int) {
	t.Helper()
	all, err := fileMaps()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if !m.own {
			kib += m.resident
		}
	}
	return kib
}

// What may be allocated between two collections stays the same while a program grows,
// but for the smallest and the largest.
func TestPercent(t *testing.T) {
	const mib = 1 << 20
	for _, tc := range []struct {
		limits            Limits
		kept              uint64
		bursting, growing bool
		want              uint64
	}{
		{Limits{}, 50 * mib, true, true, 77},
		{Limits{Room: 40 * mib}, 10 * mib, false, true, 77},
		{Limits{Room: 40 * mib}, 10 * mib, true, false, 400},
		{Limits{Room: 40 * mib}, 100 * mib, true, false, 77},
		{Limits{Garbage: 6 * mib}, 0, false, true, 100},
		{Limits{Garbage: 6 * mib}, 6 * mib, true, true, 100},
		{Limits{Garbage: 6 * mib}, 12 * mib, true, true, 50},
		{Limits{Garbage: 6 * mib}, 24 * mib, false, true, 25},
		{Limits{Garbage: 6 * mib}, 40 * mib, false, true, 20},
		{Limits{Garbage: 6 * mib}, 8 * mib, true, false, 75},
		{Limits{Garbage: 6 * mib}, 40 * mib, true, false, 50},
	} {
		if got := tc.limits.percent(77, tc.kept, tc.bursting, tc.growing); got != tc.want {
			t.Errorf("%+v, %d kept, burst %v, growing %v: GOGC %d, want %d", tc.limits, tc.kept, tc.bursting, tc.growing, got, tc.want)
		}
	}
}

// The collector begins early while the program grows, and later once it does not.
func TestTendGarbage(t *testing.T) {
	t.Setenv("GOGC", "")
	usual := debug.SetGCPercent(77)
	defer debug.SetGCPercent(usual)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		Tend(ctx, Limits{Calm: time.Minute, Garbage: 1 << 20}, slog.New(slog.DiscardHandler))
	}()
	defer func() {
		cancel()
		<-ended
	}()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	var kept [][]byte
	await := func(what string, want uint64, grow int) {
		for deadline := time.Now().Add(time.Minute); read("/gc/gogc:percent") != want; <-poll.C {
			if time.Now().After(deadline) {
				t.Fatalf("%s: GOGC is %d, want %d", what, read("/gc/gogc:percent"), want)
			}
			if len(kept) < 64 {
				kept = append(kept, make([]byte, grow))
			}
			runtime.GC()
		}
	}
	await("it grows", 20, 8<<20)
	await("it does not", 50, 0)
	runtime.KeepAlive(kept)
}

// During a burst, what is too much of the program's file is given back, and what is not
// stays.
func TestTrim(t *testing.T) {
	n, err := residentFile()
	if err != nil || n == 0 {
		t.Fatalf("%d bytes of files, %v", n, err)
	}
	file := &programFile{}
	before := resident(t)
	if err := (Limits{File: 1 << 40}).trim(file); err != nil {
		t.Fatal(err)
	}
	if after := resident(t); after < before {
		t.Errorf("%d KiB of the program's file before, %d afterwards, far from the limit", before, after)
	}
	if err := (Limits{File: 1}).trim(file); err != nil {
		t.Fatal(err)
	}
	if after := resident(t); after >= before {
		t.Errorf("%d KiB of the program's file before, %d afterwards", before, after)
	}
}
