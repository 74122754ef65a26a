package cache

import (
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// Publication is a snapshot for some streams.
type Publication struct {
	Watches  []WatchID
	Snapshot *identity.Snapshot
}

// EventKind is a closed set.
type EventKind string

// Kinds of events.
const (
	// DuplicateHint: two entries give one instance identities with the same
	// hint; the second one's hint is dropped (Workload API §5.2.1).
	DuplicateHint EventKind = "duplicate_hint"
	// Template: an entry matches, and its template gives no legal name.
	Template EventKind = "template"
	// Capacity: MaxIdentities does not allow an identity that an entry gives.
	Capacity EventKind = "capacity"
)

// Event is something that an operator should hear of. It is reported once for
// each workload until the entry changes.
type Event struct {
	Kind     EventKind
	Instance string
	Entry    string
	Detail   string
}

// touch notes that a workload's snapshot may have changed.
func (c *Cache) touch(w *workload) {
	if !w.dirty && !w.gone {
		w.dirty = true
		c.dirty = append(c.dirty, w)
	}
}

// publish makes a workload's snapshot and gives it to its streams if it differs
// from the one they have.
func (c *Cache) publish(now time.Time, w *workload) {
	if w.gone || len(w.watches) == 0 || c.bundle == nil || c.entries == nil {
		return
	}
	next := &identity.Snapshot{Bundle: c.bundle}
	hints := make(map[string]string, len(w.slots))
	for _, s := range w.slots {
		if s.refused {
			w.lose(s.identity.ID) // it may have been served before a restart
		}
		if s.svid == nil || !s.svid.NotAfter().After(now.Round(0)) {
			continue
		}
		svid := s.svid
		if svid.Hint != "" {
			if first, taken := hints[svid.Hint]; taken {
				c.warn(w, DuplicateHint, s.identity.Entry.Name(),
					fmt.Sprintf("hint %q is already that of entry %s", svid.Hint, first))
				svid = s.withoutHint()
			} else {
				hints[svid.Hint] = s.identity.Entry.Name()
			}
		}
		next.SVIDs = append(next.SVIDs, svid)
	}
	_, limited := c.limited[w]
	next.Denied = !limited && !slices.ContainsFunc(w.slots, func(s *slot) bool { return !s.refused })
	if w.last != nil {
		for _, s := range w.last.SVIDs {
			w.lose(s.ID)
		}
	}
	// What has merely expired is not withdrawn: the workload is entitled to it
	// still, its verifiers see that it is expired by clocks of their own, and this
	// machine's clock may be wrong.
	w.lost = slices.DeleteFunc(w.lost, func(id spiffeid.ID) bool {
		return slices.ContainsFunc(w.slots, func(s *slot) bool { return s.identity.ID == id && !s.withheld() })
	})
	next.Withdrawn = slices.Clone(w.lost)
	if w.last != nil && same(w.last, next) {
		if len(w.fresh) > 0 {
			c.ready.Publish = append(c.ready.Publish, Publication{Watches: w.fresh, Snapshot: w.last})
			w.fresh = nil
		}
		return
	}
	w.last, w.fresh = next, nil
	c.ready.Publish = append(c.ready.Publish, Publication{Watches: slices.Clone(w.watches), Snapshot: next})
}

// withoutHint returns the SVID at hand without its hint: always the same value,
// since consumers key by the pointer.
func (s *slot) withoutHint() *identity.SVID {
	if s.unhinted == nil {
		plain := *s.svid
		plain.Hint = ""
		s.unhinted = &plain
	}
	return s.unhinted
}

func same(a, b *identity.Snapshot) bool {
	return a.Bundle == b.Bundle && a.Denied == b.Denied &&
		slices.Equal(a.SVIDs, b.SVIDs) && slices.Equal(a.Withdrawn, b.Withdrawn)
}

// maxLost bounds how many lost identities a workload is told of; the oldest are
// forgotten.
const maxLost = 256

func (w *workload) lose(id spiffeid.ID) {
	w.lost = appendMissing(w.lost, id)
	if len(w.lost) > maxLost {
		w.lost = slices.Delete(w.lost, 0, len(w.lost)-maxLost)
	}
}

func appendMissing(to []spiffeid.ID, ids ...spiffeid.ID) []spiffeid.ID {
	for _, id := range ids {
		if !slices.Contains(to, id) {
			to = append(to, id)
		}
	}
	return to
}

// warn reports an event once.
func (c *Cache) warn(w *workload, kind EventKind, entry, detail string) {
	key := string(kind) + "\x00" + entry
	if _, known := w.warned[key]; known {
		return
	}
	if w.warned == nil {
		w.warned = make(map[string]struct{})
	}
	w.warned[key] = struct{}{}
	c.ready.Events = append(c.ready.Events, Event{Kind: kind, Instance: w.instance.name, Entry: entry, Detail: detail})
}
