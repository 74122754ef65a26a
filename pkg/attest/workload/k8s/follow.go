package k8s

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// maxLoads bounds the containers that are being asked for because of an event. What is
// above is found at the next reconciliation.
const maxLoads = 1024

// blindReconcile is how often is asked if no cgroup can be watched.
const blindReconcile = 5 * time.Second

// The pauses after errors.
var (
	reconcileBackoff = backoff.Policy{Base: 100 * time.Millisecond, Max: 5 * time.Second}
	// sightBackoff is between questions about a container whose cgroup has been seen
	// and that the runtime does not know: it makes the cgroup first, and the pause
	// container of a pod is never one of the pod's.
	sightBackoff  = backoff.Policy{Base: 20 * time.Millisecond, Max: 500 * time.Millisecond}
	maxSightTries = 6
)

// follower is one call of Watch. Its goroutine owns what is not guarded.
type follower struct {
	*Attestor
	announcer *container.Announcer
	found     chan *container.Container
	seen      chan sighting
	opened    chan struct{} // capacity 1: events are told from now on
	lost      chan error    // nothing is told any more: by events for good if it is errNoEvents
	wg        sync.WaitGroup

	mu      sync.Mutex // guards loading
	loading map[string]bool
}

// sighting is the sign that a container is there.
type sighting struct {
	id   string
	made *task // nil if it was the cgroup that was seen
}

// Watch implements attest.InstanceWatcher. A container has ended if its init process
// has, and for no other reason. It returns nil when ctx ends.
func (a *Attestor) Watch(ctx context.Context, event func(attest.InstanceEvent)) error {
	ctx, cancel := context.WithCancel(ctx)
	f := &follower{
		Attestor:  a,
		announcer: container.NewAnnouncer(a.index, event),
		found:     make(chan *container.Container),
		seen:      make(chan sighting),
		opened:    make(chan struct{}, 1),
		lost:      make(chan error, 1),
		loading:   make(map[string]bool),
	}
	defer f.announcer.Close()
	defer f.wg.Wait()
	defer cancel()
	f.follow(ctx)
	return nil
}

// follow reconciles, follows the runtime's events or the tree, and hears of ends, until
// ctx ends.
func (f *follower) follow(ctx context.Context) {
	tries := backoff.New(reconcileBackoff)
	events, watching, blind, warned := true, false, false, false
	again := false // look again soon
	reconcile := time.NewTimer(0)
	defer reconcile.Stop()
	type outcome struct {
		ids []string
		err error
	}
	var reconciled chan outcome // while one is under way
	for {
		select {
		case <-ctx.Done():
			return
		case n := <-f.announcer.Deaths():
			f.announcer.Ended(n)
		case c := <-f.found:
			if c.Alive() == nil { // else the index holds it no more, or soon does not
				f.announcer.Started(ctx, f.current(c))
			}
		case s := <-f.seen:
			f.index.Forget(s.id)
			f.ask(ctx, s, maxSightTries)
		case <-f.opened:
			// What was made while the runtime began to tell is found when it does.
			again = true
			reconcile.Reset(0)
		case err := <-f.lost:
			events = !errors.Is(err, errNoEvents)
			watching = false
			reconcile.Reset(0)
		case <-reconcile.C:
			switch {
			case watching:
			case events:
				watching, blind = true, false
				f.watchEvents(ctx)
			default:
				watching = f.watchTree(ctx, !blind)
				blind = !watching
			}
			reconciled = make(chan outcome, 1)
			done := reconciled
			f.wg.Go(func() {
				ids, err := f.list(ctx)
				done <- outcome{ids, err}
			})
		case o := <-reconciled:
			reconciled = nil
			for _, id := range o.ids {
				if n := f.announcer.All()[id]; n == nil || n.Container.Alive() != nil {
					f.index.Forget(id)
					f.ask(ctx, sighting{id: id}, 1)
				}
			}
			f.refresh(ctx)
			next := f.config.Reconcile.Or(defaultReconcile)
			if blind || again {
				next = min(next, blindReconcile)
			}
			again = false
			if o.err != nil {
				next = min(next, tries.Next())
				if !warned {
					f.logger.WarnContext(ctx, "kubelet or container runtime cannot be asked, containers that start meanwhile have to wait", "err", o.err)
				}
				warned = true
			} else {
				if warned || tries.Failures() > 0 {
					f.logger.InfoContext(ctx, "following pods again", "containers", len(o.ids))
				}
				warned = false
				tries.Reset()
			}
			reconcile.Reset(next)
		}
	}
}

// list asks the kubelet for its pods and the runtime for its containers.
func (f *follower) list(ctx context.Context) ([]string, error) {
	err := f.pods.refresh(ctx)
	ids, listErr := f.runtime.list(ctx)
	return ids, errors.Join(err, listErr)
}

// refresh reports what has changed in the pods of containers that are known, and
// forgets those that have ended before they were reported.
func (f *follower) refresh(ctx context.Context) {
	for id, c := range f.index.All() {
		if f.announcer.All()[id] == nil && c.Alive() != nil {
			f.index.Remove(c)
		}
	}
	for _, n := range f.announcer.All() {
		f.announcer.Started(ctx, f.current(n.Container))
	}
}

// current returns c with what the kubelet says of its pod now.
func (f *follower) current(c *container.Container) *container.Container {
	p := f.pods.get(c.Workload.GetK8S().GetPodUid())
	if p == nil || p.refused != "" || p.over() {
		return c // nothing is concluded from what is missing
	}
	if held := f.index.Update(c, again(c.Workload, p)); held != nil && held.Init == c.Init {
		return held
	}
	return c
}

// watchEvents follows what the runtime tells, if it does.
func (f *follower) watchEvents(ctx context.Context) {
	f.wg.Go(func() {
		tries := backoff.New(eventsBackoff)
		for {
			err := f.runtime.tasks(ctx, func() {
				tries.Reset()
				f.metrics.events.Set(1)
				select {
				case f.opened <- struct{}{}:
				default:
				}
			}, func(t task) {
				s := sighting{id: t.id}
				if t.pid != 0 {
					s.made = &t
				}
				select {
				case f.seen <- s:
				case <-ctx.Done():
				}
			})
			f.metrics.events.Set(0)
			if errors.Is(err, errNoEvents) {
				f.lost <- err
				return
			}
			if backoff.Wait(ctx, tries.Next()) != nil {
				return
			}
		}
	})
}

// watchTree begins to follow the kubelet's cgroups. It says whether it does.
func (f *follower) watchTree(ctx context.Context, warn bool) bool {
	t, ids, err := openTree(f.config.CgroupRoot, f.metrics)
	if err != nil {
		if warn {
			f.logger.WarnContext(ctx, "new pods are not seen before they ask, or only at the next reconciliation", "err", err)
		}
		return false
	}
	for _, id := range ids {
		f.ask(ctx, sighting{id: id}, 1)
	}
	f.wg.Go(func() {
		err := t.run(ctx, func(id string) {
			select {
			case f.seen <- sighting{id: id}:
			case <-ctx.Done():
			}
		})
		if err = errors.Join(err, t.close()); err != nil && ctx.Err() == nil {
			f.logger.WarnContext(ctx, "lost sight of the kubelet's cgroups", "err", err)
		}
		f.lost <- errNoEvents
	})
	return true
}

// ask asks for a container, at most so many times while it is not known, and hands it
// to follow.
func (f *follower) ask(ctx context.Context, s sighting, times int) {
	id, release := s.id, f.wanted.hold(s.id, false, s.made)
	f.mu.Lock()
	busy := f.loading[id] || len(f.loading) >= maxLoads
	if !busy {
		f.loading[id] = true
	}
	f.mu.Unlock()
	if busy {
		release() // who asks already has been told
		return
	}
	f.wg.Go(func() {
		defer release()
		defer func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			delete(f.loading, id)
		}()
		if s.made != nil {
			times = 1 // the runtime knows it, or it is a pod's sandbox
			f.wg.Go(func() { f.expect(ctx, s.made) })
		}
		began := time.Now()
		c, err := f.sight(ctx, id, times)
		switch {
		case err == nil:
			f.metrics.asking.Observe(time.Since(began).Seconds())
			select {
			case f.found <- c:
			case <-ctx.Done():
			}
		case errors.Is(err, container.ErrNotFound), errors.Is(err, container.ErrEnded), ctx.Err() != nil:
		default:
			f.logger.WarnContext(ctx, "container cannot be attested", "container", id, "err", err)
		}
	})
}

// expect has the kubelet asked for the pod of a task, if it is not known: usually that of
// the pod's sandbox, long before its first container is made.
func (f *follower) expect(ctx context.Context, made *task) {
	p, err := peer.Open(made.pid)
	if err != nil {
		return // it has ended
	}
	defer p.Close() //nolint:errcheck // nothing was written
	memberships, err := container.Read(f.processes, p)
	if err != nil {
		return
	}
	if uid, ok := podOf(memberships); ok && f.pods.get(uid) == nil {
		_ = f.pods.refresh(ctx) // who waits for the pod asks again, and says why not
	}
}

// sight gets a container that has been seen.
func (f *follower) sight(ctx context.Context, id string, times int) (*container.Container, error) {
	tries := backoff.New(sightBackoff)
	for {
		c, err := f.index.Get(ctx, id)
		if err == nil || tries.Failures()+1 >= times || errors.Is(err, container.ErrEnded) {
			return c, err
		}
		if waitErr := backoff.Wait(ctx, tries.Next()); waitErr != nil {
			return nil, fmt.Errorf("%w: %w", waitErr, err)
		}
		f.index.Forget(id)
	}
}
