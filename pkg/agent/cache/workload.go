package cache

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
		c.timers.set(w, now.Add(c.config.Linger))
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
	s = &slot{instance: i, key: key, identity: rendered, digest: digest}
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

// Restored is an SVID that was kept over a restart.
type Restored struct {
	Instance string
	// Digests are those of the workloads that had it.
	Digests []string
	Entry   string
	// EntryDigest is that of the entry it was issued under.
	EntryDigest [32]byte
	// DNSNames are those of its identity.
	DNSNames []string
	SVID     *identity.SVID
}

// Restore gives the cache what Export returned before a restart. Each SVID is
// served only to an instance that is attested again to be the same, with the
// same attributes, under an entry that gives the same identity; what is not
// claimed in time is dropped.
func (c *Cache) Restore(now time.Time, records []Restored) {
	c.Tick(now)
	for _, r := range records {
		if r.SVID.NotAfter().After(now.Round(0)) {
			c.restored[r.Instance] = append(c.restored[r.Instance], r)
		}
	}
	if len(c.restored) > 0 {
		c.until = now.Add(c.config.RestoreWindow)
	}
}

// claim serves a restored SVID.
func (c *Cache) claim(now time.Time, s *slot, digest string) bool {
	records := c.restored[s.instance.name]
	n := slices.IndexFunc(records, func(r Restored) bool {
		return r.Entry == s.key.entry && r.SVID.ID == s.identity.ID &&
			strings.Join(r.DNSNames, ",") == s.key.dnsNames &&
			slices.Contains(r.Digests, digest) && r.SVID.NotAfter().After(now.Round(0))
	})
	if n < 0 {
		return false
	}
	r := records[n]
	records = slices.Delete(records, n, n+1)
	if c.restored[s.instance.name] = records; len(records) == 0 {
		delete(c.restored, s.instance.name)
	}
	s.svid, s.issued, s.serial = r.SVID, r.EntryDigest, serial(r.SVID)
	changed := r.EntryDigest != s.digest || (c.bundle != nil && !anchored(r.SVID, c.bundle))
	if changed || !r.SVID.RenewAt.After(now.Round(0)) {
		c.ask(now, s, now, changed)
	} else {
		c.schedule(now, s)
	}
	return true
}

// abandon reports restored SVIDs of an instance that did not come back.
func (c *Cache) abandon(name string, records []Restored) {
	c.ready.Changed = true
	if c.instances[name] != nil {
		return
	}
	e := Ended{Instance: name}
	for _, r := range records {
		e.Serials = append(e.Serials, serial(r.SVID))
	}
	c.ready.Ended = append(c.ready.Ended, e)
}

// Export returns every SVID at hand, in a stable order.
func (c *Cache) Export() []Restored {
	var all []Restored
	for _, i := range c.sorted() {
		for _, s := range i.sorted() {
			if s.svid == nil {
				continue
			}
			r := Restored{
				Instance: i.name, Entry: s.key.entry, EntryDigest: s.issued,
				DNSNames: s.identity.DNSNames, SVID: s.svid,
			}
			for _, w := range s.users {
				r.Digests = append(r.Digests, w.digest)
			}
			all = append(all, r)
		}
	}
	for _, name := range sortedKeys(c.restored) {
		all = append(all, c.restored[name]...)
	}
	return all
}

// Stats are figures for metrics.
type Stats struct {
	Instances, Watches, Identities, SVIDs, InFlight, Pending int
	// MinNotAfter is when the first SVID expires; zero if there is none.
	MinNotAfter time.Time
	// Overdue are SVIDs whose renewal should have been done.
	Overdue int
	// Refused are identities whose last request was refused or failed.
	Refused int
	// Limited are workloads that lack an identity for want of room.
	Limited int
	// Full says that there is no room for another instance.
	Full bool
}

// Stats returns figures at a moment.
func (c *Cache) Stats(now time.Time) Stats {
	st := Stats{
		Instances: len(c.instances), Watches: len(c.watches), Identities: c.slots,
		InFlight: len(c.flights), Pending: len(c.pending),
		Limited: len(c.limited), Full: len(c.instances) >= c.config.MaxInstances,
	}
	for _, i := range c.instances {
		for _, s := range i.slots {
			if s.failures > 0 {
				st.Refused++
			}
			if s.svid == nil {
				continue
			}
			st.SVIDs++
			if st.MinNotAfter.IsZero() || s.svid.NotAfter().Before(st.MinNotAfter) {
				st.MinNotAfter = s.svid.NotAfter()
			}
			// A tenth of its life late is late.
			if late := s.svid.NotAfter().Sub(s.svid.RenewAt) / 5; s.svid.RenewAt.Add(late).Before(now.Round(0)) {
				st.Overdue++
			}
		}
	}
	return st
}

// Instance describes one workload instance.
type Instance struct {
	Name       string
	Announced  bool
	Watches    int
	Identities []Identity
}

// Identity describes one identity of an instance.
type Identity struct {
	ID    spiffeid.ID
	Entry string
	// SVID is nil if there is none at hand.
	SVID     *identity.SVID
	Asking   bool
	Due      time.Time
	Failures int
	Reason   string
}

// Instances describes all instances, by name.
func (c *Cache) Instances() []Instance {
	var all []Instance
	for _, i := range c.sorted() {
		d := Instance{Name: i.name, Announced: i.present}
		for _, w := range i.workloads {
			d.Watches += len(w.watches)
		}
		for _, s := range i.sorted() {
			d.Identities = append(d.Identities, Identity{
				ID: s.identity.ID, Entry: s.key.entry, SVID: s.svid, Asking: s.flight != 0 || s.pending,
				Due: s.due, Failures: s.failures, Reason: s.reason,
			})
		}
		all = append(all, d)
	}
	return all
}

// Has says whether a workload is present, which the caller needs to know to keep
// its attributes.
func (c *Cache) Has(name, digest string) bool {
	i := c.instances[name]
	return i != nil && slices.ContainsFunc(i.workloads, func(w *workload) bool { return w.digest == digest })
}

// serial returns the serial number of an SVID.
func serial(s *identity.SVID) []byte { return s.Chain[0].SerialNumber.Bytes() }

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
