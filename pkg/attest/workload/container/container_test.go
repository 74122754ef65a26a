package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	"github.com/meshid/meshid/pkg/attest/peer"
)

// id makes a container id.
func id(name string) string {
	return (fmt.Sprintf("%x", name) + strings.Repeat("0", 64))[:64]
}

func newSize() prometheus.Gauge {
	return prometheus.NewGauge(prometheus.GaugeOpts{Name: "containers", Help: "Containers in the index."})
}

// What is remembered of ids that nobody knows is bounded.
func TestAbsentIsBounded(t *testing.T) {
	asked := 0
	x := NewIndex(func(context.Context, string) (*Container, error) { asked++; return nil, ErrNotFound }, newSize())
	for n := range 3 * maxAbsent {
		for range 2 {
			if _, err := x.Get(t.Context(), id(fmt.Sprint(n))); !errors.Is(err, ErrNotFound) {
				t.Fatal(err)
			}
		}
	}
	if asked != 3*maxAbsent || len(x.absent) > maxAbsent {
		t.Errorf("asked %d times, remembers %d ids", asked, len(x.absent))
	}
}

// first marks the context of the first who asks.
type first struct{}

// Who waits for a question that another has given up asks it himself.
func TestLoadOfAnotherIsGivenUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	asking := make(chan struct{}, 2)
	x := NewIndex(func(ctx context.Context, _ string) (*Container, error) {
		asking <- struct{}{}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		default:
		}
		if ctx.Value(first{}) == nil {
			return nil, ErrNotFound
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}, newSize())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := x.Get(context.WithValue(ctx, first{}, true), id("A")); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-asking
	wg.Go(func() {
		if _, err := x.Get(t.Context(), id("A")); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	})
	cancel()
	wg.Wait()
}

// A run that is reported again with other facts is reported, and its end once.
func TestAnnouncer(t *testing.T) {
	p, end := attesttest.Sleeper(t, "sleep")
	c, err := New(id("A"), "x:A", nil, &Init{Process: p, Memberships: Memberships{"": "/x/" + id("A")}})
	if err != nil {
		t.Fatal(err)
	}
	x := NewIndex(func(context.Context, string) (*Container, error) { return c, nil }, newSize())
	if _, err := x.Get(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	var events []attest.InstanceEvent
	a := NewAnnouncer(x, func(e attest.InstanceEvent) { events = append(events, e) })
	defer a.Close()
	a.Started(t.Context(), c)
	a.Started(t.Context(), c)
	a.Started(t.Context(), x.Update(c, c.Workload))
	end()
	n := <-a.Deaths()
	a.Ended(n)
	a.Ended(n)
	if diff := cmp.Diff([]attest.InstanceEvent{{Instance: "x:A"}, {Instance: "x:A", Ended: true}}, events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	if len(x.All()) != 0 {
		t.Error("the index holds a container that has ended")
	}
}

// The engine may say that a container runs when its pid is another's already.
func TestV_D1_InitProcess(t *testing.T) {
	p, _ := attesttest.Sleeper(t, "sleep")
	now := time.Now()
	k := Kernel{}
	if _, err := k.Open(p.PID, now.Add(-time.Hour), id("A")); err == nil || !strings.Contains(err.Error(), "not its init process") {
		t.Errorf("a process that is younger than the container: %v", err)
	}
	init, err := k.Open(p.PID, now.Add(time.Second), id("A"))
	if err != nil {
		t.Fatal(err)
	}
	if len(init.Memberships) == 0 {
		t.Error("no cgroups")
	}
	if err := init.Process.Close(); err != nil {
		t.Error(err)
	}
	if _, err := k.Open(1<<22+5, now, id("A")); !errors.Is(err, peer.ErrGone) {
		t.Errorf("a process that is not there: %v", err)
	}
	if hasShim(os.Getpid(), []string{id("A")}) {
		t.Error("the test is taken for a shim")
	}

	boot := time.Unix(1000, 0)
	for ticks, want := range map[uint64]bool{0: true, 100: true, 1000: true, 1200: true, 1201: false, 1 << 60: false} {
		if got := startedBy(ticks, boot, time.Unix(1010, 0)); got != want {
			t.Errorf("%d ticks: %v", ticks, got)
		}
	}
}

func TestParseMemberships(t *testing.T) {
	got, err := ParseMemberships([]byte("12:cpu,cpuacct:/a:b c/\\x\n1:name=systemd:/\n0::/x (deleted)\n"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Memberships{"cpu,cpuacct": "/a:b c/\\x", "name=systemd": "/", "": "/x (deleted)"}, got); diff != "" {
		t.Error(diff)
	}
	if m, err := ParseMemberships(nil); err != nil || len(m) != 0 {
		t.Errorf("empty: %v, %v", m, err)
	}
	for _, text := range []string{"0::/", "x\n", "1:x\n", "0::\n", "0::x\n", "0::/a\n0::/b\n", "1:cpu:/a\n2:cpu:/b\n", "0:cpu:/a\n", "1::/a\n", "\n", strings.Repeat("1:x:/\n", 2)} {
		if m, err := ParseMemberships([]byte(text)); err == nil {
			t.Errorf("%q: %v", text, m)
		}
	}
	var many strings.Builder
	for n := range maxHierarchies + 1 {
		fmt.Fprintf(&many, "%d:c%d:/\n", n+1, n)
	}
	if _, err := ParseMemberships([]byte(many.String())); err == nil {
		t.Error("too many hierarchies are accepted")
	}
}

func FuzzCgroup(f *testing.F) {
	victim := id("B")
	f.Add("0::/docker/" + victim + "\n")
	f.Add("4:memory:/docker/" + id("A") + "/docker-" + victim + ".scope\n0::/\n")
	f.Add("0::/../x\n")
	c := &Container{ID: victim, roots: Memberships{"": "/docker/" + victim}}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := ParseMemberships([]byte(text))
		if err != nil {
			return
		}
		ids, err := m.Candidates()
		if err != nil {
			return
		}
		for _, id := range ids {
			if !IsID(id) || !strings.Contains(text, id) {
				t.Errorf("candidate %q", id)
			}
			for _, path := range m {
				if root, ok := rootOf(id, path); ok && (!below(path, root) || !strings.Contains(root, id)) {
					t.Errorf("root %q of %q", root, path)
				}
			}
		}
		if path := m[""]; c.holds(m) && path != "/docker/"+victim && !strings.HasPrefix(path, "/docker/"+victim+"/") {
			t.Errorf("%q is in the container", path)
		}
	})
}

func BenchmarkParseCgroup(b *testing.B) {
	text := []byte("9:name=systemd:/docker/" + id("A") + "\n4:memory:/docker/" + id("A") + "\n0::/\n")
	for b.Loop() {
		m, err := ParseMemberships(text)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := m.Candidates(); err != nil {
			b.Fatal(err)
		}
	}
}
