// Package containers is what attestors of containers are tested with: real processes
// whose cgroup files say what a test wants, and what an attestor tells of instances.
package containers

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// patience bounds how long a test waits for what comes for sure.
const patience = time.Minute

// ID makes a container id.
func ID(name string) string {
	return (fmt.Sprintf("%x", name) + strings.Repeat("0", 64))[:64]
}

// Processes is a container.Processes for real processes with cgroup files of tests.
type Processes struct {
	mu      sync.Mutex     // guards what follows
	cgroups map[int]string // by pid
}

var _ container.Processes = (*Processes)(nil)

// NewProcesses returns none.
func NewProcesses() *Processes { return &Processes{cgroups: map[int]string{}} }

// Set says what a process's cgroup file has in it.
func (f *Processes) Set(pid int, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cgroups[pid] = text
}

// Start starts a Sleeper with this cgroup file.
func (f *Processes) Start(t testing.TB, cgroup string) (p *peer.Peer, end func()) {
	t.Helper()
	p, end = attesttest.Sleeper(t, "sleep")
	f.Set(p.PID, cgroup)
	return p, end
}

func (f *Processes) text(pid int) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	text, ok := f.cgroups[pid]
	if !ok {
		return "", fmt.Errorf("process %d: %w", pid, peer.ErrGone)
	}
	return text, nil
}

// Cgroup implements container.Processes.
func (f *Processes) Cgroup(p *peer.Peer) ([]byte, error) {
	if err := p.Alive(); err != nil {
		return nil, err
	}
	text, err := f.text(p.PID)
	return []byte(text), err
}

// Open implements container.Processes. Any process may be the init process.
func (f *Processes) Open(pid int, _ time.Time, _ ...string) (*container.Init, error) {
	p, err := peer.Open(pid)
	if err != nil {
		return nil, err
	}
	text, err := f.text(pid)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	m, err := container.ParseMemberships([]byte(text))
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &container.Init{Process: p, Memberships: m}, nil
}

// Watch runs an attestor's Watch until the test ends, and returns its events.
func Watch(t testing.TB, w attest.InstanceWatcher) <-chan attest.InstanceEvent {
	t.Helper()
	events := make(chan attest.InstanceEvent, 1000)
	ctx := t.Context()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.Watch(ctx, func(e attest.InstanceEvent) { events <- e }); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(wg.Wait) // the context has ended by then
	return events
}

// Next returns the next event.
func Next(t testing.TB, events <-chan attest.InstanceEvent) attest.InstanceEvent {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(patience):
		t.Fatalf("no event within %v", patience)
		return attest.InstanceEvent{}
	}
}

// Started takes the events of n starts: how many of each instance.
func Started(t testing.TB, events <-chan attest.InstanceEvent, n int) map[string]int {
	t.Helper()
	started := map[string]int{}
	for range n {
		started[Next(t, events).Instance]++
	}
	return started
}

// Ended takes as many events of ends, and fails the test unless each start has its own.
func Ended(t testing.TB, events <-chan attest.InstanceEvent, started map[string]int) {
	t.Helper()
	for range len(started) {
		e := Next(t, events)
		if !e.Ended {
			t.Errorf("event %v", e)
		}
		started[e.Instance]--
	}
	for instance, left := range started {
		if left != 0 {
			t.Errorf("%s: %d starts without an end", instance, left)
		}
	}
}
