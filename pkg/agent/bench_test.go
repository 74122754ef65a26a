package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// benchAgent is an agent in real time, with entries for uids 0 to n-1.
func benchAgent(b *testing.B, n int) *harness {
	b.Helper()
	ca := newFakeCA(b)
	h := newHarness(b, ca, filepath.Join(b.TempDir(), "agent"), func(c *Config) { c.Logger = discard })
	b.Cleanup(ca.close)
	h.start()
	b.Cleanup(h.stop)
	for uid := range n {
		ca.mu.Lock()
		e := uidEntry(fmt.Sprint("e", uid), fmt.Sprint("/e/", uid), uid)
		ca.entries[e.GetName()] = e
		ca.mu.Unlock()
	}
	ca.mu.Lock()
	ca.revision++
	ca.push(ca.snapshot())
	ca.mu.Unlock()
	for h.Status().Entries != n {
		runtime.Gosched()
		ca.mu.Lock()
		if len(ca.syncs) > 0 && h.Status().Entries == 0 {
			ca.push(ca.snapshot())
		}
		ca.mu.Unlock()
	}
	return h
}

// await waits for the first X.509-SVID.
func await(b testing.TB, w *identity.Watch) {
	for {
		if s := w.Snapshot(); s != nil && len(s.SVIDs) > 0 {
			return
		}
		select {
		case <-w.Changed():
		case <-w.Done():
			b.Error(w.Err())
			return
		}
	}
}

// BenchmarkAtHand: a process opens a stream, and what it may have is at hand.
func BenchmarkAtHand(b *testing.B) {
	h := benchAgent(b, 1)
	p := peer.ForTest(1, 0, 0)
	first, err := h.Subscribe(context.Background(), p)
	if err != nil {
		b.Fatal(err)
	}
	await(b, first)
	b.ReportAllocs()
	for b.Loop() {
		w, err := h.Subscribe(context.Background(), p)
		if err != nil {
			b.Fatal(err)
		}
		await(b, w)
		w.Close()
	}
}

// BenchmarkBurst: 200 processes open their streams at the same instant; how long
// until the last has its X.509-SVID, at hand or issued.
func BenchmarkBurst(b *testing.B) {
	for _, kind := range []string{"at hand", "issued"} {
		b.Run(kind, func(b *testing.B) {
			const n = 200
			h := benchAgent(b, n)
			var keep []*identity.Watch
			if kind == "at hand" {
				for uid := range uint32(n) {
					w, err := h.Subscribe(context.Background(), peer.ForTest(1, uid, uid))
					if err != nil {
						b.Fatal(err)
					}
					keep = append(keep, w)
				}
				for _, w := range keep {
					await(b, w)
				}
			}
			for b.Loop() {
				var all sync.WaitGroup
				watches := make([]*identity.Watch, n)
				for uid := range uint32(n) {
					all.Go(func() {
						w, err := h.Subscribe(context.Background(), peer.ForTest(1, uid, uid))
						if err != nil {
							b.Error(err)
							return
						}
						await(b, w)
						watches[uid] = w
					})
				}
				all.Wait()
				b.StopTimer()
				for uid, w := range watches {
					w.Close()
					if kind == "issued" {
						h.mu.Lock()
						h.cache.End(time.Now(), fmt.Sprintf("unix:%d:%d:/bin/app", uid, uid))
						h.settle(time.Now())
						h.mu.Unlock()
					}
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkMemory reports what an open stream costs here.
func BenchmarkMemory(b *testing.B) {
	h := benchAgent(b, 1)
	first, err := h.Subscribe(context.Background(), peer.ForTest(1, 0, 0))
	if err != nil {
		b.Fatal(err)
	}
	await(b, first)
	for b.Loop() {
		const n = 5000
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		p := peer.ForTest(1, 0, 0)
		watches := make([]*identity.Watch, n)
		for i := range watches {
			w, err := h.Subscribe(context.Background(), p)
			if err != nil {
				b.Fatal(err)
			}
			watches[i] = w
		}
		for _, w := range watches {
			await(b, w)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/stream")
		for _, w := range watches {
			w.Close()
		}
	}
}
