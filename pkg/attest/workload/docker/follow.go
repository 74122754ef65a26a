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
	"github.com/meshid/meshid/pkg/attest/workload/container"
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
	announcer *container.Announcer
	wg        sync.WaitGroup // the goroutine that reads the event stream
}

// Watch implements attest.InstanceWatcher. A container has ended if its init
// process has, or if the engine lists its containers without it. It returns nil
// when ctx ends.
func (a *Attestor) Watch(ctx context.Context, event func(attest.InstanceEvent)) error {
	f := &follower{Attestor: a, announcer: container.NewAnnouncer(a.index, event)}
	defer f.wg.Wait()
	defer f.announcer.Close()
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
		case n := <-f.announcer.Deaths():
			f.announcer.Ended(n)
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
	f.logger.InfoContext(ctx, "following the docker engine", "containers", len(f.announcer.All()))
	for {
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case n := <-f.announcer.Deaths():
			f.announcer.Ended(n)
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
	before := f.index.All()
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
			f.index.Remove(c)
		}
	}
	for id, n := range f.announcer.All() {
		if !running[id] {
			f.announcer.Ended(n)
		}
	}

	var mu sync.Mutex // guards found
	var found []*container.Container
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxLoads)
	for _, id := range ids {
		g.Go(func() error {
			c, err := f.look(gctx, id, f.index.Refresh) // its name may have changed
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
		f.announcer.Started(ctx, c)
	}
	return nil
}

// look finds a container with get, which is the index's. One that ended meanwhile
// is nil, and so is one that cannot be attested for a reason of its own: that is
// logged, and must not stop the others.
func (f *follower) look(ctx context.Context, id string, get func(context.Context, string) (*container.Container, error)) (*container.Container, error) {
	f.index.Forget(id)
	c, err := get(ctx, id)
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, container.ErrNotFound), errors.Is(err, container.ErrEnded):
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
	get := f.index.Refresh
	switch c.action {
	case actionStart:
		get = f.index.Get // a run that is known and lives is the one that was started
		fallthrough
	case actionRename:
		found, err := f.look(ctx, c.id, get)
		if err != nil {
			return fmt.Errorf("after event %s: %w", c.action, err)
		}
		if found != nil {
			f.announcer.Started(ctx, found)
		}
		return nil
	case actionDie, actionDestroy:
		// It may be an old event of a container that has been started again,
		// so the init process decides.
		if n := f.announcer.All()[c.id]; n != nil && n.Container.Alive() != nil {
			f.announcer.Ended(n)
		}
		return nil
	default:
		return nil
	}
}
