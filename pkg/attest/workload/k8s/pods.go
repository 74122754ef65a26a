package k8s

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	// The pause between two lists that are fetched because somebody waits for a pod
	// that is not in them. It grows while they bring nothing.
	minGap = 10 * time.Millisecond
	maxGap = time.Second
)

// errNoPod says that the kubelet does not know a pod, or not yet.
var errNoPod = errors.New("the kubelet does not know it yet, try again")

// pods are the pods of this node as the kubelet last listed them. It is safe for
// concurrent use.
type pods struct {
	fetch   func(ctx context.Context) ([]*pod, error)
	metrics *metrics
	wg      sync.WaitGroup // polls

	mu     sync.Mutex // guards what follows
	closed bool
	byUID  map[string]*pod
	owners map[string]string // UID of the pod by container id, as far as the kubelet tells
	poll   *poll             // under way
	gap    time.Duration     // before the next poll on behalf of one who waits
	ended  time.Time         // of the last poll
	judged time.Time         // the poll that gap was last set by
}

// poll is one list being fetched, for all who wait for it.
type poll struct {
	done chan struct{} // closed when err is set
	err  error
}

func newPods(fetch func(context.Context) ([]*pod, error), m *metrics) *pods {
	return &pods{fetch: fetch, metrics: m, gap: minGap}
}

// close waits for the polls.
func (p *pods) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.wg.Wait()
}

// get returns a pod, nil if it was not in the list.
func (p *pods) get(uid string) *pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byUID[uid]
}

// owner returns the UID of the pod that the kubelet says a container is of.
func (p *pods) owner(id string) (uid string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	uid, ok = p.owners[id]
	return uid, ok
}

// has returns a pod that has a container of this name, nil if there is none.
func (p *pods) has(uid, container string) *pod {
	found := p.get(uid)
	if found == nil {
		return nil
	}
	if _, ok := found.containers[container]; !ok {
		return nil // an ephemeral container is added later
	}
	return found
}

// await returns a pod that has a container of this name, and waits until the kubelet
// lists it or ctx ends.
func (p *pods) await(ctx context.Context, uid, container string) (*pod, error) {
	for {
		if found := p.has(uid, container); found != nil {
			return found, nil
		}
		if err := p.pause(ctx); err != nil {
			return nil, fmt.Errorf("pod %s, container %s: %w", uid, container, errNoPod)
		}
		if err := p.refresh(ctx); err != nil {
			return nil, err
		}
		p.judge(p.has(uid, container) != nil)
	}
}

// judge sets the gap by whether the last list brought what was waited for. It grows
// once a list, however many wait.
func (p *pods) judge(found bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case found:
		p.gap = minGap
	case p.judged != p.ended:
		p.gap = min(2*p.gap, maxGap)
	}
	p.judged = p.ended
}

// pause waits for the gap after the last poll that brought nothing, unless another
// poll has ended meanwhile.
func (p *pods) pause(ctx context.Context) error {
	p.mu.Lock()
	rest := time.Until(p.ended.Add(p.gap))
	p.mu.Unlock()
	if rest <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(rest)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// refresh fetches the list, or waits for one that is being fetched.
func (p *pods) refresh(ctx context.Context) error {
	p.mu.Lock()
	running := p.poll
	if running == nil {
		if p.closed {
			p.mu.Unlock()
			return errors.New("the attestor is closed")
		}
		running = &poll{done: make(chan struct{})}
		p.poll = running
		// It is for all who wait, so that it does not end with the first of them.
		detached := context.WithoutCancel(ctx)
		p.wg.Go(func() { p.run(detached, running) })
	}
	p.mu.Unlock()
	select {
	case <-running.done:
		return running.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errKubelet, ctx.Err())
	}
}

// run fetches the list.
func (p *pods) run(ctx context.Context, running *poll) {
	list, err := p.fetch(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.poll, p.ended = nil, time.Now()
	running.err = err
	close(running.done)
	if err != nil {
		return // the list that is at hand is not made worse by it
	}
	p.byUID, p.owners = make(map[string]*pod, len(list)), make(map[string]string)
	for _, found := range list {
		p.byUID[found.uid] = found
		for _, id := range found.ids {
			p.owners[id] = found.uid
		}
	}
	p.metrics.pods.Set(float64(len(list)))
}
