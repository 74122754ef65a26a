package memory

import (
	"context"
	"log/slog"
	"runtime"
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
		Tend(ctx, time.Millisecond, 0, slog.New(slog.DiscardHandler))
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
				Tend(ctx, 100*time.Millisecond, 256<<20, slog.New(slog.DiscardHandler))
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
	if err := unmapFile(); err != nil {
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
