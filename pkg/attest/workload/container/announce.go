package container

import (
	"context"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/pkg/attest"
)

// Announcer tells of containers that start and end, each once, for one call of
// attest.InstanceWatcher. A container ends when its init process does, whether the
// runtime can be reached or not. All methods are called from one goroutine.
type Announcer struct {
	index *Index
	event func(attest.InstanceEvent)
	// announced are the runs that were reported and have not ended, by id.
	announced map[string]*Announced
	// deaths tells of init processes that have ended.
	deaths chan *Announced
	wg     sync.WaitGroup // the goroutines that send on deaths
}

// Announced is a run of a container that was reported.
type Announced struct {
	Container *Container
	stop      context.CancelFunc // ends the goroutine that waits for its end
}

// NewAnnouncer returns an Announcer that calls event.
func NewAnnouncer(x *Index, event func(attest.InstanceEvent)) *Announcer {
	return &Announcer{index: x, event: event, announced: make(map[string]*Announced), deaths: make(chan *Announced)}
}

// Close ends the goroutines.
func (a *Announcer) Close() {
	for _, n := range a.announced {
		n.stop()
	}
	a.wg.Wait()
}

// All returns the runs that were reported and have not ended, by id. It must not be
// modified.
func (a *Announcer) All() map[string]*Announced { return a.announced }

// Deaths is where runs come from whose init process has ended: who receives one
// calls Ended.
func (a *Announcer) Deaths() <-chan *Announced { return a.deaths }

// Started reports c, unless it was reported just so. ctx gives values only.
func (a *Announcer) Started(ctx context.Context, c *Container) {
	if n := a.announced[c.ID]; n != nil {
		switch {
		case n.Container == c:
			return
		case n.Container.Init == c.Init: // the same run
			changed := !proto.Equal(n.Container.Workload, c.Workload)
			n.Container = c
			if changed {
				a.report(c)
			}
			return
		default: // started again, and its end was not heard of yet
			a.Ended(n)
		}
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	n := &Announced{Container: c, stop: stop}
	a.announced[c.ID] = n
	a.wg.Go(func() {
		select {
		case <-c.Init.Process.Done():
		case <-ctx.Done():
			return
		}
		select {
		case a.deaths <- n:
		case <-ctx.Done():
		}
	})
	a.report(c)
}

// report says that c is there.
func (a *Announcer) report(c *Container) {
	a.event(attest.InstanceEvent{Instance: c.Instance, Workload: c.Workload})
}

// Ended reports the end of n, once.
func (a *Announcer) Ended(n *Announced) {
	n.stop()
	if a.announced[n.Container.ID] != n {
		return
	}
	delete(a.announced, n.Container.ID)
	a.index.Remove(n.Container)
	a.event(attest.InstanceEvent{Instance: n.Container.Instance, Ended: true})
}
