package cache

import (
	"container/heap"
	"time"
)

// deadline is a moment that may carry both clocks. It has come when either of
// them says so: the monotonic one stands still while the machine sleeps, the
// wall clock can be set.
type deadline time.Time

func (d deadline) after(now time.Time) bool {
	t := time.Time(d)
	return t.After(now) && t.Round(0).After(now.Round(0))
}

// timer is the place of its owner among the timers.
type timer struct {
	at    time.Time
	wall  int64 // of at; what the heap is ordered by
	index int   // in the heap, plus 1; 0: not armed
}

func (t *timer) armed() bool        { return t.index > 0 }
func (t *timer) deadline() deadline { return deadline(t.at) }
func (t *timer) place() *timer      { return t }

// owner is a slot or a workload.
type owner interface {
	deadline() deadline
	place() *timer
}

// timers is a heap, soonest first.
type timers []owner

// set arms, moves or (with the zero time) disarms the timer of o.
func (h *timers) set(o owner, at time.Time) {
	t := o.place()
	switch {
	case at.IsZero() && t.armed():
		heap.Remove(h, t.index-1)
		t.at, t.wall = at, 0
	case at.IsZero():
	case t.armed():
		t.at, t.wall = at, at.UnixNano()
		heap.Fix(h, t.index-1)
	default:
		t.at, t.wall = at, at.UnixNano()
		heap.Push(h, o)
	}
}

// Len, Less, Swap, Push and Pop implement heap.Interface.

func (h timers) Len() int           { return len(h) }
func (h timers) Less(i, j int) bool { return h[i].place().wall < h[j].place().wall }

func (h timers) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place().index, h[j].place().index = i+1, j+1
}

// Push appends x, an owner.
func (h *timers) Push(x any) {
	o, ok := x.(owner)
	if !ok {
		return
	}
	o.place().index = len(*h) + 1
	*h = append(*h, o)
}

// Pop removes the last owner.
func (h *timers) Pop() any {
	last := len(*h) - 1
	o := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	o.place().index = 0
	return o
}

// Tick does what is due. Every method that is given a time does so too.
func (c *Cache) Tick(now time.Time) {
	c.rebase(now)
	for len(c.timers) > 0 && !c.timers[0].deadline().after(now) {
		switch o := c.timers[0].(type) {
		case *slot:
			c.fire(now, o)
		case *workload:
			c.drop(o)
		}
	}
	if !c.until.IsZero() && !deadline(c.until).after(now) {
		c.until = time.Time{}
		for _, name := range sortedKeys(c.restored) {
			c.abandon(name, c.restored[name])
		}
		c.restored = make(map[string][]Restored)
	}
}

// rebase keeps deadlines right when the wall clock is set, or ran on while the
// machine slept: whichever of the two clocks says that a deadline has come is
// believed.
func (c *Cache) rebase(now time.Time) {
	if c.clock.IsZero() {
		c.clock = now
		return
	}
	step := now.Round(0).Sub(c.clock.Round(0)) - now.Sub(c.clock)
	if step.Abs() < time.Second {
		return
	}
	c.clock = now
	soonest := func(t time.Time) time.Time {
		return now.Add(min(t.Sub(now), t.Round(0).Sub(now.Round(0))))
	}
	for _, i := range c.instances {
		for _, s := range i.slots {
			if !s.due.IsZero() {
				s.due = soonest(s.due)
			}
			c.arm(s)
		}
		for _, w := range i.workloads {
			if w.armed() {
				c.timers.set(w, soonest(w.at))
			}
		}
	}
}
