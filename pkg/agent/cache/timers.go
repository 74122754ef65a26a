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
