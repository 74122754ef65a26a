package cache

import (
	"encoding/hex"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// Stats are figures for metrics.
type Stats struct {
	Instances, Identities, SVIDs int
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
		Instances: len(c.instances), Identities: c.slots,
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
			reason := s.reason
			if s.refused {
				reason = reasonQuarantined
			}
			d.Identities = append(d.Identities, Identity{
				ID: s.identity.ID, Entry: s.key.entry, SVID: s.svid, Asking: s.flight != 0 || s.pending,
				Due: s.due, Failures: s.failures, Reason: reason,
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

// Roots counts the X.509-SVIDs in use by the key identifiers, in lower-case
// hexadecimal, of the roots that they chain to.
func (c *Cache) Roots() map[string]int {
	raw := make(map[string]int)
	for _, i := range c.instances {
		for _, s := range i.slots {
			if s.svid != nil {
				raw[string(s.svid.Chain[len(s.svid.Chain)-1].AuthorityKeyId)]++
			}
		}
	}
	named := make(map[string]int, len(raw))
	for id, n := range raw {
		named[hex.EncodeToString([]byte(id))] = n
	}
	return named
}
