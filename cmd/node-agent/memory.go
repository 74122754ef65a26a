package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// An agent is on every machine and has little to do: its memory is dearer than its
// collector's time. And what it has to do comes in bursts, a machine's processes
// all starting at once: what was needed for one is given back when it is over.
const (
	// gcPercent is GOGC where the operator sets none.
	gcPercent = 50
	// calm is how long nothing was collected before memory is given back.
	calm = 5 * time.Second
)

// tendMemory gives memory back to the machine once nothing was collected for calm
// after a burst, until ctx ends. It polls nothing: it is woken by the collector.
func tendMemory(ctx context.Context, calm time.Duration) {
	collected := make(chan struct{}, 1)
	tellCollections(ctx, collected)
	timer := time.NewTimer(calm)
	defer timer.Stop()
	for given := uint64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-collected:
			timer.Reset(calm)
		case <-timer.C:
			// Those that were forced, our own too, are not counted. One alone
			// is no burst: the runtime collects every two minutes whatever
			// happens.
			if n := collections(); n > given+1 {
				given = n
				debug.FreeOSMemory()
			}
		}
	}
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

// collections counts the garbage collections that the runtime began by itself.
func collections() uint64 {
	s := []metrics.Sample{{Name: "/gc/cycles/automatic:gc-cycles"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
