package cache

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/identity"
)

// enter returns the workload, made if it is new.
func (c *Cache) enter(now time.Time, l Workload) (*workload, error) {
	i := c.instances[l.Instance]
	if i == nil {
		if len(c.instances) >= c.config.MaxInstances {
			return nil, ErrFull
		}
		i = &instance{name: l.Instance, slots: make(map[slotKey]*slot)}
	}
	for _, w := range i.workloads {
		if w.digest == l.Digest {
			w.generation = i.generation
			return w, nil
		}
	}
	if len(i.workloads) >= c.config.MaxWorkloads {
		n := slices.IndexFunc(i.workloads, func(w *workload) bool {
			return len(w.watches) == 0 && (!i.present || w.digest != i.announced)
		})
		if n < 0 {
			return nil, ErrFull
		}
		c.drop(i.workloads[n])
	}
	w := &workload{instance: i, digest: l.Digest, facts: l.Facts, generation: i.generation}
	i.workloads = append(i.workloads, w)
	c.instances[i.name] = i
	c.evaluate(now, w, nil)
	return w, nil
}

// hold starts the linger of a workload that nothing holds any more, and stops
// it when something does again.
func (c *Cache) hold(now time.Time, w *workload) {
	switch {
	case w.gone:
	case len(w.watches) > 0 || (w.instance.present && w.generation == w.instance.generation):
		c.timers.set(w, time.Time{})
	case !w.armed():
		c.timers.set(w, now.Add(linger))
	}
}

// drop removes a workload that has no streams, with its keys; the last one takes
// the instance along.
func (c *Cache) drop(w *workload) {
	i := w.instance
	c.timers.set(w, time.Time{})
	i.workloads = slices.DeleteFunc(i.workloads, func(o *workload) bool { return o == w })
	if len(i.workloads) == 0 {
		var serials [][]byte
		for _, s := range i.sorted() {
			if s.svid != nil {
				serials = append(serials, serial(s.svid))
			}
		}
		delete(c.instances, i.name)
		if len(serials) > 0 {
			c.ready.Ended = append(c.ready.Ended, Ended{Instance: i.name, Serials: serials})
		}
	}
	w.gone = true
	delete(c.limited, w)
	for _, s := range w.slots {
		c.release(s, w)
	}
	w.slots, w.last, w.facts = nil, nil, nil
}

// evaluate finds out which identities the workload has under the entries in
// force. changed are the entries that may give others than before; nil means
// all.
func (c *Cache) evaluate(now time.Time, w *workload, changed []string) {
	if c.entries == nil {
		return
	}
	_, limited := c.limited[w]
	if limited {
		changed = nil
		delete(c.limited, w)
	}
	var next []*slot
	if changed == nil {
		for _, e := range c.entries.MatchWorkload(w.facts) {
			if s := c.slotFor(now, w, e); s != nil {
				next = append(next, s)
			}
		}
	} else {
		for _, s := range w.slots {
			if !slices.Contains(changed, s.key.entry) {
				next = append(next, s)
			}
		}
		kept := len(next)
		for _, name := range changed {
			delete(w.warned, string(Template)+"\x00"+name)
			delete(w.warned, string(DuplicateHint)+"\x00"+name)
			if e, ok := c.entries.Get(name); ok && e.MatchWorkload(w.facts) {
				if s := c.slotFor(now, w, e); s != nil {
					next = append(next, s)
				}
			}
		}
		if kept == len(next) && kept == len(w.slots) {
			return // none of them concerns this workload
		}
	}
	slices.SortFunc(next, func(a, b *slot) int { return strings.Compare(a.key.entry, b.key.entry) })
	next = slices.Compact(next)
	lost := slices.DeleteFunc(slices.Clone(w.slots), func(s *slot) bool { return slices.Contains(next, s) })
	previous := w.slots
	w.slots = next
	bequeath := slices.Clone(lost)
	for _, s := range next {
		if !slices.Contains(previous, s) {
			s.users = append(s.users, w)
			bequeath = c.inherit(s, bequeath)
		}
	}
	for _, s := range lost {
		c.release(s, w)
	}
	for _, r := range c.restored[w.instance.name] {
		if slices.Contains(r.Digests, w.digest) && !slices.ContainsFunc(next, func(s *slot) bool { return s.identity.ID == r.SVID.ID }) {
			w.lose(r.SVID.ID) // it was served before the restart
		}
	}
	c.touch(w)
}

// slotFor returns the slot of the identity that an entry gives the workload, or
// nil if it gives none.
func (c *Cache) slotFor(now time.Time, w *workload, e *identity.Entry) *slot {
	rendered, err := e.Render(w.facts)
	if err != nil {
		c.warn(w, Template, e.Name(), err.Error())
		return nil
	}
	i := w.instance
	key := slotKey{entry: e.Name(), id: rendered.ID.String(), dnsNames: strings.Join(rendered.DNSNames, ",")}
	digest := e.Digest()
	s := i.slots[key]
	if s != nil {
		if s.digest != digest {
			s.identity, s.digest = rendered, digest
			s.failures, s.reason, s.transport = 0, "", false
			c.ask(now, s, now, true)
		}
		return s
	}
	if c.slots >= c.config.MaxIdentities {
		c.limited[w] = struct{}{}
		c.warn(w, Capacity, e.Name(), "no room for one more identity")
		return nil
	}
	s = &slot{instance: i, key: key, identity: rendered, digest: digest, refused: c.quarantine.identity(rendered.ID)}
	i.slots[key] = s
	c.slots++
	if !c.claim(now, s, w.digest) {
		c.ask(now, s, now, false)
	}
	return s
}

// inherit serves what one of the identities that the workload loses has at hand,
// until the new identity with the same SPIFFE ID has its own SVID. It returns the
// lost ones that are left: each has one heir. All belong to one instance.
func (c *Cache) inherit(s *slot, lost []*slot) []*slot {
	if s.svid != nil || s.serial != nil {
		return lost
	}
	for n, p := range lost {
		if p.svid != nil && p.identity.ID == s.identity.ID {
			s.svid, s.issued, s.serial, s.rotate = p.svid, p.issued, p.serial, true
			c.arm(s)
			return slices.Delete(lost, n, n+1)
		}
	}
	return lost
}

// release takes a workload from a slot; a slot that nobody needs is dropped
// with its key.
func (c *Cache) release(s *slot, w *workload) {
	s.users = slices.DeleteFunc(s.users, func(o *workload) bool { return o == w })
	if len(s.users) > 0 || s.gone {
		return
	}
	s.gone = true
	delete(s.instance.slots, s.key)
	c.slots--
	c.freed = true
	if s.svid != nil {
		c.ready.Changed = true
	}
	s.svid, s.unhinted = nil, nil
	c.arm(s)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
