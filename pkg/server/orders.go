package server

import (
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// Bounds of what is remembered: what is older has been renewed by itself.
const (
	maxOrders   = 16
	maxOrderAge = maxRotateWithin
)

// orders remembers orders to renew for the nodes that have no stream when they
// are given, or lose it before they have heard of them.
type orders struct {
	mu   sync.Mutex // guards what follows
	last uint64
	list []madeOrder // oldest first
}

type madeOrder struct {
	rotate *nodev1.Rotate
	made   time.Time
}

// add makes an order and remembers it. Sequences are times, so that they grow
// over a restart too.
func (o *orders) add(now time.Time, authority string, within time.Duration) *nodev1.Rotate {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.last = max(o.last+1, uint64(now.UnixNano()))
	r := &nodev1.Rotate{Authority: authority, Within: durationpb.New(within), Sequence: o.last}
	if len(o.list) == maxOrders {
		// The two oldest become one that is as wide as both.
		if o.list[1].rotate.GetAuthority() != o.list[0].rotate.GetAuthority() {
			wide := o.list[1].rotate
			o.list[1].rotate = &nodev1.Rotate{Within: wide.GetWithin(), Sequence: wide.GetSequence()}
		}
		o.list = append(o.list[:0], o.list[1:]...)
	}
	o.list = append(o.list, madeOrder{r, now})
	return r
}

// missed returns one order that includes all that a node, which attested at
// attested, has not carried out; nil if there is none.
func (o *orders) missed(now, attested time.Time, carriedOut uint64) *nodev1.Rotate {
	o.mu.Lock()
	defer o.mu.Unlock()
	var all *nodev1.Rotate
	for _, m := range o.list {
		if m.rotate.GetSequence() <= carriedOut || m.made.Before(attested) || now.Sub(m.made) > maxOrderAge {
			continue
		}
		if all != nil && all.GetAuthority() != m.rotate.GetAuthority() {
			all = &nodev1.Rotate{Within: m.rotate.GetWithin(), Sequence: m.rotate.GetSequence()}
			continue
		}
		all = m.rotate
	}
	return all
}
