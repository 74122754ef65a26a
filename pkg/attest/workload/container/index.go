package container

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

const (
	// maxContainers bounds the index; a container above it is refused. Each has
	// a descriptor.
	maxContainers = 4096
	// maxAbsent bounds what is remembered of ids that the runtime does not know,
	// and absentFor how long: a process can have any name in its cgroup path. An
	// id becomes known by its start event, whatever is remembered.
	maxAbsent = 1024
	absentFor = 10 * time.Second
)

// Index holds the running containers by id. It is safe for concurrent use.
type Index struct {
	load func(ctx context.Context, id string) (*Container, error)
	size prometheus.Gauge // how many it holds

	mu         sync.Mutex // guards what follows
	closed     bool
	containers map[string]*Container
	absent     map[string]time.Time // until when
	loads      map[string]*loading
}

// loading is one container being loaded, for all who ask meanwhile.
type loading struct {
	done chan struct{} // closed when what follows is set
	c    *Container
	err  error
}

// NewIndex returns an empty index. load asks the runtime for a container and the
// kernel for its init process, for many containers at a time; its error wraps
// ErrNotFound, or means "try again". size counts the containers.
func NewIndex(load func(ctx context.Context, id string) (*Container, error), size prometheus.Gauge) *Index {
	return &Index{
		load: load, size: size,
		containers: make(map[string]*Container),
		absent:     make(map[string]time.Time),
		loads:      make(map[string]*loading),
	}
}

// Get returns a running container, from the index or from the runtime, or
// ErrNotFound. Any other error means "try again".
func (x *Index) Get(ctx context.Context, id string) (*Container, error) {
	now := time.Now()
	x.mu.Lock()
	c := x.containers[id]
	until, absent := x.absent[id]
	x.mu.Unlock()
	switch {
	case c != nil && c.Alive() == nil:
		return c, nil
	case absent && now.Before(until):
		return nil, ErrNotFound
	}
	return x.Refresh(ctx, id)
}

// Refresh asks the runtime, once for all who want the same container, and puts
// the answer into the index.
func (x *Index) Refresh(ctx context.Context, id string) (*Container, error) {
	for {
		x.mu.Lock()
		l := x.loads[id]
		if l == nil {
			l = &loading{done: make(chan struct{})}
			x.loads[id] = l
			x.mu.Unlock()
			x.fill(ctx, id, l)
			return l.c, l.err
		}
		x.mu.Unlock()
		select {
		case <-l.done:
			if l.err == nil || errors.Is(l.err, ErrNotFound) {
				return l.c, l.err
			}
			if err := ctx.Err(); err != nil {
				return nil, l.err
			}
			if !errors.Is(l.err, context.Canceled) {
				return nil, l.err // the runtime's trouble, and not the other's haste
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// fill loads a container for l and those who wait for it.
func (x *Index) fill(ctx context.Context, id string, l *loading) {
	l.c, l.err = x.load(ctx, id)
	var unused []*Container
	x.mu.Lock()
	delete(x.loads, id)
	switch {
	case l.err == nil:
		l.c, unused, l.err = x.put(l.c)
	case errors.Is(l.err, ErrNotFound):
		x.remember(id)
		if c := x.containers[id]; c != nil && c.Alive() != nil {
			delete(x.containers, id)
			unused = append(unused, c)
		}
	}
	x.size.Set(float64(len(x.containers)))
	x.mu.Unlock()
	close(l.done)
	for _, c := range unused {
		_ = c.Init.Process.Close()
	}
}

// put puts c in. It returns what is in the index now, and those whose init
// process is not needed any more. x.mu is held.
func (x *Index) put(c *Container) (in *Container, unused []*Container, err error) {
	if x.closed {
		return nil, []*Container{c}, errors.New("the attestor is closed")
	}
	old := x.containers[c.ID]
	if old == nil && len(x.containers) >= maxContainers {
		// Without Watch, nobody takes out those that have ended.
		for id, o := range x.containers {
			if o.Alive() != nil {
				delete(x.containers, id)
				unused = append(unused, o)
			}
		}
		if len(x.containers) >= maxContainers {
			return nil, append(unused, c), fmt.Errorf("%d containers run: limit reached", maxContainers)
		}
	}
	in = c
	switch {
	case old == nil:
	case old.Init.Process.PID == c.Init.Process.PID && old.Alive() == nil:
		// The same run, asked for again: who holds old goes on with its process.
		unused = append(unused, c)
		in = old
		if !proto.Equal(old.Workload, c.Workload) {
			in = old.With(c.Workload)
		}
	default:
		unused = append(unused, old)
	}
	x.containers[c.ID] = in
	delete(x.absent, c.ID)
	return in, unused, nil
}

// remember notes that the runtime does not know id. x.mu is held.
func (x *Index) remember(id string) {
	if len(x.absent) >= maxAbsent {
		clear(x.absent) // each costs one call more
	}
	x.absent[id] = time.Now().Add(absentFor)
}

// Forget makes the next get of id ask the runtime, if it was not known.
func (x *Index) Forget(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.absent, id)
}

// Remove takes c out if it is still what the index holds.
func (x *Index) Remove(c *Container) {
	x.mu.Lock()
	held := x.containers[c.ID] == c
	if held {
		delete(x.containers, c.ID)
		x.size.Set(float64(len(x.containers)))
	}
	x.mu.Unlock()
	if held {
		_ = c.Init.Process.Close()
	}
}

// Update gives c other facts, if it is still what the index holds, and returns what
// it holds now.
func (x *Index) Update(c *Container, facts *attributesv1.Workload) *Container {
	x.mu.Lock()
	defer x.mu.Unlock()
	held := x.containers[c.ID]
	if held != c {
		return held
	}
	x.containers[c.ID] = c.With(facts)
	return x.containers[c.ID]
}

// All returns the containers that are in the index.
func (x *Index) All() map[string]*Container {
	x.mu.Lock()
	defer x.mu.Unlock()
	return maps.Clone(x.containers)
}

// Close empties the index for good.
func (x *Index) Close() error {
	x.mu.Lock()
	old := x.containers
	x.containers, x.closed = nil, true
	x.size.Set(0)
	x.mu.Unlock()
	var err error
	for _, c := range old {
		err = errors.Join(err, c.Init.Process.Close())
	}
	return err
}
