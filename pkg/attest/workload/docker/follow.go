package docker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/pkg/attest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

const (
	// overlap is how far back the event stream begins: the engine subscribes us
	// some time after it was asked to. Events that come twice do no harm.
	overlap = 5 * time.Second
	// The pause before the engine is asked again after an error.
	minPause = 50 * time.Millisecond
	maxPause = 5 * time.Second
)

// follower is one call of Watch. Its goroutine owns all fields.
type follower struct {
	*Attestor
	event func(attest.InstanceEvent)
	// announced are the runs that were reported and have not ended, by id.
	announced map[string]*announced
	// deaths tells of init processes that have ended.
	deaths chan *announced
	wg     sync.WaitGroup // the goroutines that send on deaths
}

// announced is a run of a container that was reported.
type announced struct {
	c    *container
	stop context.CancelFunc // ends the goroutine that waits for its end
}

// Watch implements attest.InstanceWatcher. A container has ended if its init
// process has, or if the engine lists its containers without it. It returns nil
// when ctx ends.
func (a *Attestor) Watch(ctx context.Context, event func(attest.InstanceEvent)) error {
	f := &follower{
		Attestor:  a,
		event:     event,
		announced: make(map[string]*announced),
		deaths:    make(chan *announced),
	}
	defer f.close()
	var pause time.Duration
	lost := false
	for {
		connected, err := f.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if connected {
			pause = 0
		}
		if connected || !lost {
			a.logger.WarnContext(ctx, "lost the docker engine, containers that start meanwhile have to wait", "err", err)
			lost = true
		}
		pause = min(max(2*pause, minPause), maxPause)
		if err := f.wait(ctx, pause/2+rand.N(pause)); err != nil { //nolint:gosec // spreads load, no secret
			return nil
		}
	}
}

// close ends the goroutines.
func (f *follower) close() {
	for _, n := range f.announced {
		n.stop()
	}
	f.wg.Wait()
}

// wait waits, and hears of deaths meanwhile.
func (f *follower) wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			return nil
		case n := <-f.deaths:
			f.ended(n)
		}
	}
}

// follow opens the event stream, lists what runs, and follows the events until
// an error. connected says whether it got as far as that.
func (f *follower) follow(ctx context.Context) (connected bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// First the stream, then the list: what starts between them is in both.
	stream, err := f.engine.events(ctx, time.Now().Add(-overlap))
	if err != nil {
		return false, err
	}
	changes := make(chan change)
	var streamErr error // read after changes is closed
	f.wg.Go(func() {
		defer close(changes)
		defer stream.close()
		for {
			c, err := stream.next()
			if err != nil {
				streamErr = err
				return
			}
			select {
			case changes <- c:
			case <-ctx.Done():
				return
			}
		}
	})
	if err := f.list(ctx); err != nil {
		return false, err
	}
	f.metrics.connected.Set(1)
	defer f.metrics.connected.Set(0)
	f.logger.InfoContext(ctx, "following the docker engine", "containers", len(f.announced))
	for {
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case n := <-f.deaths:
			f.ended(n)
		case c, ok := <-changes:
			if !ok {
				return true, streamErr
			}
			if err := f.apply(ctx, c); err != nil {
				return true, err
			}
		}
	}
}

// list makes the index what the engine says that runs.
func (f *follower) list(ctx context.Context) error {
	before := f.index.all()
	ids, err := f.engine.running(ctx)
	if err != nil {
		return err
	}
	running := make(map[string]bool, len(ids))
	for _, id := range ids {
		running[id] = true
	}
	for id, c := range before {
		if !running[id] {
			f.index.remove(c)
		}
	}
	for id, n := range f.announced {
		if !running[id] {
			f.ended(n)
		}
	}

	var mu sync.Mutex // guards found
	var found []*container
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxLoads)
	for _, id := range ids {
		g.Go(func() error {
			c, err := f.look(gctx, id, f.index.refresh) // its name may have changed
			if err != nil || c == nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			found = append(found, c)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, c := range found {
		f.started(ctx, c)
	}
	return nil
}

// look finds a container with get, which is the index's. One that ended meanwhile
// is nil, and so is one that cannot be attested for a reason of its own: that is
// logged, and must not stop the others.
func (f *follower) look(ctx context.Context, id string, get func(context.Context, string) (*container, error)) (*container, error) {
	f.index.forget(id)
	c, err := get(ctx, id)
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, errNoContainer), errors.Is(err, errEnded):
		return nil, nil //nolint:nilnil // documented
	case errors.Is(err, errUnreachable), ctx.Err() != nil:
		return nil, err
	default:
		f.logger.WarnContext(ctx, "container cannot be attested", "container", id, "err", err)
		return nil, nil //nolint:nilnil // documented
	}
}

// apply follows one event.
func (f *follower) apply(ctx context.Context, c change) error {
	get := f.index.refresh
	switch c.action {
	case actionStart:
		get = f.index.get // a run that is known and lives is the one that was started
		fallthrough
	case actionRename:
		found, err := f.look(ctx, c.id, get)
		if err != nil {
			return fmt.Errorf("after event %s: %w", c.action, err)
		}
		if found != nil {
			f.started(ctx, found)
		}
		return nil
	case actionDie, actionDestroy:
		// It may be an old event of a container that has been started again,
		// so the init process decides.
		if n := f.announced[c.id]; n != nil && n.c.alive() != nil {
			f.ended(n)
		}
		return nil
	default:
		return nil
	}
}

// started reports c, unless it was reported just so.
func (f *follower) started(ctx context.Context, c *container) {
	if n := f.announced[c.id]; n != nil {
		switch {
		case n.c == c:
			return
		case n.c.init == c.init: // the same run with another name
			n.c = c
			f.report(c)
			return
		default: // started again, and its end was not heard of yet
			f.ended(n)
		}
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	n := &announced{c: c, stop: stop}
	f.announced[c.id] = n
	f.wg.Go(func() {
		select {
		case <-c.init.process.Done():
		case <-ctx.Done():
			return
		}
		select {
		case f.deaths <- n:
		case <-ctx.Done():
		}
	})
	f.report(c)
}

// report says that c is there.
func (f *follower) report(c *container) {
	f.event(attest.InstanceEvent{Instance: c.instance(), Workload: &attributesv1.Workload{Docker: c.facts}})
}

// ended reports the end of n, once.
func (f *follower) ended(n *announced) {
	n.stop()
	if f.announced[n.c.id] != n {
		return
	}
	delete(f.announced, n.c.id)
	f.index.remove(n.c)
	f.event(attest.InstanceEvent{Instance: n.c.instance(), Ended: true})
}
