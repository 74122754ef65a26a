package main

import (
	"context"
	"runtime"
	"runtime/metrics"
	"testing"
	"time"
)

// After a burst, and after the next one, memory is given back.
func TestTendMemory(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tendMemory(ctx, time.Millisecond)
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
		for range 64 {
			kept = make([]byte, 1<<20)
		}
		for deadline := time.Now().Add(time.Minute); given() == before; <-poll.C {
			if time.Now().After(deadline) {
				t.Fatalf("nothing was given back after burst %d", burst)
			}
		}
	}
	runtime.KeepAlive(kept)
}
