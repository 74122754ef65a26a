package cache

import (
	"slices"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/identity"
)

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
		c.until = now.Add(restoreWindow)
	}
}

// claim serves a restored SVID.
func (c *Cache) claim(now time.Time, s *slot, digest string) bool {
	records := c.restored[s.instance.name]
	n := slices.IndexFunc(records, func(r Restored) bool {
		return r.Entry == s.key.entry && r.SVID.ID == s.identity.ID &&
			strings.Join(r.DNSNames, ",") == s.key.dnsNames &&
			slices.Contains(r.Digests, digest) && !c.quarantine.svid(r.SVID) && r.SVID.NotAfter().After(now.Round(0))
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
