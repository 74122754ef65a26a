package kubernetes

import (
	"context"
	"sync"
	"time"

	"github.com/meshid/meshid/internal/kube"
)

// waker wakes a loop. What wakes it while it is busy is one wake-up more, not several.
type waker chan struct{}

func newWaker() waker { return make(waker, 1) }

// wake never blocks.
func (w waker) wake() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// loop runs the feeds and calls reconcile, which says when to look again at the latest,
// whenever w is woken, until ctx ends. Changes are collected for settle before.
func loop(ctx context.Context, w waker, settle time.Duration, reconcile func(context.Context) time.Duration, feeds ...*kube.Feed) {
	var following sync.WaitGroup
	defer following.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, f := range feeds {
		following.Go(func() { f.Run(ctx) })
	}
	timer := time.NewTimer(recheck)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w:
			if settle > 0 {
				select {
				case <-ctx.Done():
					return
				case <-time.After(settle):
				}
			}
		case <-timer.C:
		}
		timer.Reset(reconcile(ctx))
	}
}
