package k8scsr

import (
	"context"
	"sync"

	"github.com/meshid/meshid/internal/kube"
)

// watch follows the requests of this process for as long as anybody waits for one.
type watch struct {
	mu      sync.Mutex // guards what follows, and the waiters
	waiting map[string]*waiter
	feed    *kube.Feed // nil while nobody waits
	stop    context.CancelFunc
	done    chan struct{} // closed when the feed has ended
}

// waiter is who waits for a request.
type waiter struct {
	changed chan struct{} // capacity 1: last or gone is another
	last    *request      // nil while the request was not seen
	gone    bool
}

// await has a request waited for, by name, until leave is called.
func (s *CA) await(ctx context.Context, name string) (w *waiter, leave func()) {
	t := &s.watch
	w = &waiter{changed: make(chan struct{}, 1)}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting[name] = w
	if t.feed == nil {
		// It goes on for others after the first has its answer.
		ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
		feed := kube.Follow(s.client, s.requests, kube.FollowOptions{Labels: process + "=" + s.mine}, func(r *request) *request { return r }, t)
		done := make(chan struct{})
		t.feed, t.stop, t.done = feed, stop, done
		go func() {
			defer close(done)
			feed.Run(ctx)
		}()
	}
	return w, func() { t.leave(name) }
}

// leave ends the watch with the last who waits.
func (t *watch) leave(name string) {
	t.mu.Lock()
	delete(t.waiting, name)
	stop, done := t.stop, t.done
	last := len(t.waiting) == 0
	if last {
		t.feed, t.stop, t.done = nil, nil, nil
	}
	t.mu.Unlock()
	if last {
		stop()
		<-done
	}
}

// err is why nothing is heard, if that is known.
func (t *watch) err() error {
	t.mu.Lock()
	feed := t.feed
	t.mu.Unlock()
	return feed.State().Err // who waits keeps it
}

// state is what was last seen of a request.
func (t *watch) state(w *waiter) (last *request, gone bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return w.last, w.gone
}

// saw tells who waits for r. The caller holds the lock.
func (t *watch) saw(r *request, gone bool) {
	w := t.waiting[r.Metadata.Name]
	if w == nil {
		return
	}
	w.last, w.gone = r, gone
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// Replace implements kube.Reader. A request that is not in a list may not have been
// made when that was read, unless it was seen before.
func (t *watch) Replace(all []*request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	there := make(map[string]bool, len(all))
	for _, r := range all {
		there[r.Metadata.Name] = true
		t.saw(r, false)
	}
	for name, w := range t.waiting {
		if w.last != nil && !there[name] {
			t.saw(w.last, true)
		}
	}
}

// Set implements kube.Reader.
func (t *watch) Set(r *request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.saw(r, false)
}

// Delete implements kube.Reader.
func (t *watch) Delete(r *request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.saw(r, true)
}
