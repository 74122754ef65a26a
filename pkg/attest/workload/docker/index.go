package docker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/pkg/attest/peer"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

const (
	// maxContainers bounds the index; a container above it is refused. Each has
	// a descriptor.
	maxContainers = 4096
	// maxAbsent bounds what is remembered of ids that the engine does not know,
	// and absentFor how long: a process can have any name in its cgroup path. An
	// id becomes known by its start event, whatever is remembered.
	maxAbsent = 1024
	absentFor = 10 * time.Second
	// maxLoads bounds the containers that are being asked for at a time.
	maxLoads = 8
)

// index holds the running containers by id. It is safe for concurrent use.
type index struct {
	load    func(ctx context.Context, id string) (*container, error)
	slots   chan struct{} // one for each load under way
	metrics *metrics

	mu         sync.Mutex // guards what follows
	closed     bool
	containers map[string]*container
	absent     map[string]time.Time // until when
	loads      map[string]*loading
}

// loading is one container being loaded, for all who ask meanwhile.
type loading struct {
	done chan struct{} // closed when what follows is set
	c    *container
	err  error
}

func newIndex(load func(context.Context, string) (*container, error), m *metrics) *index {
	return &index{
		load: load, slots: make(chan struct{}, maxLoads), metrics: m,
		containers: make(map[string]*container),
		absent:     make(map[string]time.Time),
		loads:      make(map[string]*loading),
	}
}

// get returns a running container, from the index or from the engine, or
// errNoContainer. Any other error means "try again".
func (x *index) get(ctx context.Context, id string) (*container, error) {
	now := time.Now()
	x.mu.Lock()
	c := x.containers[id]
	until, absent := x.absent[id]
	x.mu.Unlock()
	switch {
	case c != nil && c.alive() == nil:
		return c, nil
	case absent && now.Before(until):
		return nil, errNoContainer
	}
	return x.refresh(ctx, id)
}

// refresh asks the engine, once for all who want the same container, and puts
// the answer into the index.
func (x *index) refresh(ctx context.Context, id string) (*container, error) {
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
			if l.err == nil || errors.Is(l.err, errNoContainer) {
				return l.c, l.err
			}
			if err := ctx.Err(); err != nil {
				return nil, l.err
			}
			if !errors.Is(l.err, context.Canceled) {
				return nil, l.err // the engine's trouble, and not the other's haste
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// fill loads a container for l and those who wait for it.
func (x *index) fill(ctx context.Context, id string, l *loading) {
	select {
	case x.slots <- struct{}{}:
		l.c, l.err = x.load(ctx, id)
		<-x.slots
	case <-ctx.Done():
		l.err = ctx.Err()
	}
	var unused []*container
	x.mu.Lock()
	delete(x.loads, id)
	switch {
	case l.err == nil:
		l.c, unused, l.err = x.put(l.c)
	case errors.Is(l.err, errNoContainer):
		x.remember(id)
		if c := x.containers[id]; c != nil && c.alive() != nil {
			delete(x.containers, id)
			unused = append(unused, c)
		}
	}
	x.metrics.containers.Set(float64(len(x.containers)))
	x.mu.Unlock()
	close(l.done)
	for _, c := range unused {
		_ = c.init.process.Close()
	}
}

// put puts c in. It returns what is in the index now, and those whose init
// process is not needed any more. x.mu is held.
func (x *index) put(c *container) (in *container, unused []*container, err error) {
	if x.closed {
		return nil, []*container{c}, errors.New("the attestor is closed")
	}
	old := x.containers[c.id]
	if old == nil && len(x.containers) >= maxContainers {
		// Without Watch, nobody takes out those that have ended.
		for id, o := range x.containers {
			if o.alive() != nil {
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
	case old.init.process.PID == c.init.process.PID && old.alive() == nil:
		// The same run, asked for again: who holds old goes on with its process.
		unused = append(unused, c)
		in = old
		if !proto.Equal(old.facts, c.facts) {
			in = &container{id: c.id, facts: c.facts, roots: c.roots, init: old.init}
		}
	default:
		unused = append(unused, old)
	}
	x.containers[c.id] = in
	delete(x.absent, c.id)
	return in, unused, nil
}

// remember notes that the engine does not know id. x.mu is held.
func (x *index) remember(id string) {
	if len(x.absent) >= maxAbsent {
		clear(x.absent) // each costs one call more
	}
	x.absent[id] = time.Now().Add(absentFor)
}

// forget makes the next get of id ask the engine, if it was not known.
func (x *index) forget(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.absent, id)
}

// remove takes c out if it is still what the index holds.
func (x *index) remove(c *container) {
	x.mu.Lock()
	held := x.containers[c.id] == c
	if held {
		delete(x.containers, c.id)
		x.metrics.containers.Set(float64(len(x.containers)))
	}
	x.mu.Unlock()
	if held {
		_ = c.init.process.Close()
	}
}

// all returns the containers that are in the index.
func (x *index) all() map[string]*container {
	x.mu.Lock()
	defer x.mu.Unlock()
	return maps.Clone(x.containers)
}

// close empties the index for good.
func (x *index) close() error {
	x.mu.Lock()
	old := x.containers
	x.containers, x.closed = nil, true
	x.metrics.containers.Set(0)
	x.mu.Unlock()
	var err error
	for _, c := range old {
		err = errors.Join(err, c.init.process.Close())
	}
	return err
}

// load asks the engine for a container and the kernel for its init process.
func (a *Attestor) load(ctx context.Context, id string) (*container, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	i, err := a.engine.inspectContainer(ctx, id)
	if err != nil {
		return nil, err
	}
	fromImage, err := a.engine.imageLabels(ctx, i.Image)
	if err != nil {
		return nil, err
	}
	init, err := a.processes.open(id, i.State.Pid, i.State.StartedAt)
	switch {
	case errors.Is(err, peer.ErrGone):
		return nil, errEnded // the engine has not heard of it yet
	case err != nil:
		return nil, err
	}
	c := &container{
		id:   id,
		init: init,
		facts: &attributesv1.Docker{
			ContainerId: id,
			Name:        strings.TrimPrefix(i.Name, "/"),
			Image:       i.Config.Image,
			ImageDigest: i.Image,
			Labels:      ownLabels(i.Config.Labels, fromImage),
			ImageLabels: fromImage,
		},
	}
	if c.roots, err = roots(id, init.memberships); err != nil {
		return nil, errors.Join(err, init.process.Close())
	}
	return c, nil
}
