package bench

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/local"
)

// demand is a CA, and nodes that ask it for one X.509-SVID after the other.
type demand struct {
	ca    *local.CA
	nodes []*node
	pools [][]*nodev1.IssueItem // of each node: a key is of one node
	count int                   // nodes that there were

	times  []time.Duration // of all calls
	issued int
	cpu    time.Duration // of the CA
	took   time.Duration
}

// onDisk is a CA whose folder is where folders for tests are.
func onDisk(b *testing.B) *local.CA { return local.StartCA(b, local.CAOptions{}) }

// inMemory is a CA whose folder is in memory: an fsync costs nothing.
func inMemory(b *testing.B) *local.CA {
	dir, err := os.MkdirTemp("/dev/shm", "meshid-bench") //nolint:usetesting // in memory
	must(b, err)
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return local.StartCA(b, local.CAOptions{Wrap: []string{"/bin/sh", "-c", `exec "$@" --data-dir ` + filepath.Join(dir, "ca"), "sh"}})
}

func newDemand(b *testing.B, ca *local.CA, callers int) *demand {
	b.Helper()
	apply(b, ca, everybody)
	return &demand{ca: ca, nodes: make([]*node, callers), pools: make([][]*nodev1.IssueItem, callers)}
}

// prepare makes sure that each node may ask for so many more, and has so many keys.
func (l *demand) prepare(b *testing.B, more, keys int) {
	b.Helper()
	for i, n := range l.nodes {
		if n == nil || n.used+more > perNode {
			l.nodes[i], l.pools[i] = attestNode(b, l.ca, fmt.Sprint("node-", l.count)), items(b, keys)
			l.count++
		}
		l.nodes[i].used += more
	}
}

// run has each caller ask each times, and, if pace is not 0, not more often than
// that: what is late does not make the next come later.
func (l *demand) run(b *testing.B, each int, pace time.Duration) {
	b.Helper()
	l.prepare(b, each, 8)
	times := make([][]time.Duration, len(l.nodes))
	var wg sync.WaitGroup
	began, cpu := time.Now(), processorTime(b, l.ca.PID())
	for i, n := range l.nodes {
		wg.Go(func() {
			for k := range each {
				due := time.Now()
				if pace > 0 {
					due = began.Add(pace*time.Duration(k) + pace*time.Duration(i)/time.Duration(len(l.nodes)))
					<-time.After(time.Until(due))
				}
				answer, err := n.client.Issue(context.Background(), &nodev1.IssueRequest{Items: l.pools[i][k%8 : k%8+1]})
				times[i] = append(times[i], time.Since(due))
				if err != nil || answer.GetResults()[0].GetSvid() == nil {
					b.Errorf("nothing is issued: %v %v", answer, err)
					return
				}
			}
		})
	}
	wg.Wait()
	l.took += time.Since(began)
	l.cpu += processorTime(b, l.ca.PID()) - cpu
	for _, t := range times {
		l.times = append(l.times, t...)
		l.issued += len(t)
	}
}

// quantile returns how long a share of the calls took at most.
func (l *demand) quantile(q float64) time.Duration {
	slices.Sort(l.times)
	return l.times[int(math.Ceil(q*float64(len(l.times))))-1]
}

// mean returns how long a call took on the average.
func (l *demand) mean() time.Duration {
	var sum time.Duration
	for _, t := range l.times {
		sum += t
	}
	return sum / time.Duration(len(l.times))
}

// syncs are the number of times that a CA has made records durable, and the time
// that the disk took for it.
type syncs struct{ count, seconds float64 }

func newSyncs(b testing.TB, ca *local.CA) syncs {
	b.Helper()
	const name = "meshid_ca_ledger_fsync_duration_seconds"
	return syncs{metric(b, ca.Metrics, name+"_count"), metric(b, ca.Metrics, name+"_sum")}
}

// mean returns the time of one of those since then.
func (s syncs) mean(b testing.TB, ca *local.CA) time.Duration {
	b.Helper()
	now := newSyncs(b, ca)
	return time.Duration((now.seconds - s.seconds) / (now.count - s.count) * float64(time.Second))
}

func milliseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// BenchmarkDurable compares how long one X.509-SVID takes, gRPC and all, with the
// ledger on a disk, where each is durable first, with the same on a file system in
// memory, where durability costs nothing: at the same load, by turns. What the disk
// itself takes is reported beside it, as the CA measures each fdatasync, and what
// somebody waits for above that: on the average, both.
func BenchmarkDurable(b *testing.B) {
	for _, c := range []struct {
		name    string
		callers int
		pace    time.Duration
	}{
		{"alone", 1, 0},
		{"400-a-second", 16, 40 * time.Millisecond},
		{"16-at-once", 16, 0},
		{"64-at-once", 64, 0},
	} {
		b.Run(c.name, func(b *testing.B) {
			disk, memory := newDemand(b, onDisk(b), c.callers), newDemand(b, inMemory(b), c.callers)
			each := max(1, 256/c.callers)
			for _, l := range []*demand{disk, memory} {
				l.run(b, each, 0) // what is made once is made
				l.times, l.issued, l.cpu, l.took = nil, 0, 0, 0
			}
			syncs := newSyncs(b, disk.ca)
			for b.Loop() {
				disk.run(b, each, c.pace)
				memory.run(b, each, c.pace)
			}
			for _, q := range []struct {
				name string
				of   float64
			}{{"p50", .5}, {"p99", .99}} {
				d, m := disk.quantile(q.of), memory.quantile(q.of)
				b.ReportMetric(milliseconds(d), q.name+"-ms")
				b.ReportMetric(float64(d)/float64(m), q.name+"-x-memory")
			}
			one := syncs.mean(b, disk.ca)
			b.ReportMetric(milliseconds(one), "fdatasync-ms")
			b.ReportMetric(milliseconds(disk.mean()-memory.mean()), "above-memory-ms")
			b.ReportMetric(milliseconds(disk.mean()-memory.mean()-one), "above-fdatasync-ms")
			b.ReportMetric(float64(disk.cpu)/float64(memory.cpu), "cpu-x-memory")
			only(b)
		})
	}
}

// BenchmarkSustained is how many X.509-SVIDs a CA issues, each durable first, when
// as many are asked for as it can: with one in a call, and with batches as agents
// make them. The callers take their share of the processors.
func BenchmarkSustained(b *testing.B) {
	b.Run("one-at-a-time", func(b *testing.B) {
		l := newDemand(b, onDisk(b), 64)
		l.run(b, 16, 0)
		l.times, l.issued, l.cpu, l.took = nil, 0, 0, 0
		for b.Loop() {
			l.run(b, 64, 0)
		}
		b.ReportMetric(float64(l.issued)/l.took.Seconds(), "SVIDs/s")
		b.ReportMetric(float64(l.cpu.Microseconds())/float64(l.issued), "CA-µs/SVID")
		b.ReportMetric(milliseconds(l.quantile(.5)), "p50-ms")
		b.ReportMetric(milliseconds(l.quantile(.99)), "p99-ms")
		only(b)
	})
	for _, size := range []int{16, 64} {
		b.Run(fmt.Sprint("batches-of-", size), func(b *testing.B) {
			l := newDemand(b, onDisk(b), 8)
			b.ResetTimer()
			for b.Loop() {
				l.batches(b, size, max(1, 512/size))
			}
			b.ReportMetric(float64(l.issued)/l.took.Seconds(), "SVIDs/s")
			b.ReportMetric(float64(l.cpu.Microseconds())/float64(l.issued), "CA-µs/SVID")
			b.ReportMetric(milliseconds(l.quantile(.5)), "p50-ms")
			b.ReportMetric(milliseconds(l.quantile(.99)), "p99-ms")
			only(b)
		})
	}
}

// batches has each caller ask each times for size at once.
func (l *demand) batches(b *testing.B, size, each int) {
	b.Helper()
	l.prepare(b, each*size, size)
	var mu sync.Mutex
	var wg sync.WaitGroup
	began, cpu := time.Now(), processorTime(b, l.ca.PID())
	for i, n := range l.nodes {
		wg.Go(func() {
			for range each {
				start := time.Now()
				answer, err := n.client.Issue(context.Background(), &nodev1.IssueRequest{Items: l.pools[i]})
				took := time.Since(start)
				if err != nil || answer.GetResults()[size-1].GetSvid() == nil {
					b.Errorf("nothing is issued: %v %v", answer, err)
					return
				}
				mu.Lock()
				l.times = append(l.times, took)
				l.issued += size
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	l.took += time.Since(began)
	l.cpu += processorTime(b, l.ca.PID()) - cpu
}
