package cache

import (
	"crypto/sha256"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// Quarantine is what must not be served, whatever entries say. It is immutable; nil
// is nothing.
type Quarantine struct {
	// IDs holds the SHA-256 of SPIFFE IDs, Keys that of public keys
	// (SubjectPublicKeyInfo), Serials serial numbers as big.Int.Bytes gives them.
	IDs, Keys map[[32]byte]struct{}
	Serials   map[string]struct{}
}

// identity says whether an identity is refused, whichever key it has.
func (q *Quarantine) identity(id spiffeid.ID) bool {
	if q == nil || len(q.IDs) == 0 {
		return false
	}
	_, yes := q.IDs[sha256.Sum256([]byte(id.String()))]
	return yes
}

// svid says whether this very SVID is refused.
func (q *Quarantine) svid(s *identity.SVID) bool {
	if q == nil {
		return false
	}
	_, serial := q.Serials[string(serial(s))]
	if serial || q.identity(s.ID) {
		return true
	}
	if len(q.Keys) == 0 {
		return false
	}
	_, key := q.Keys[sha256.Sum256(s.Chain[0].RawSubjectPublicKeyInfo)]
	return key
}

// reasonQuarantined is the reason of a slot that has nothing for this reason.
const reasonQuarantined = "quarantined by an operator"

// SetQuarantine replaces what must not be served. SVIDs that are refused are
// withdrawn and their keys dropped; they are asked for again with another key, if the
// identity itself is not refused. It returns how many were withdrawn.
func (c *Cache) SetQuarantine(now time.Time, q *Quarantine) int {
	c.Tick(now)
	c.quarantine = q
	n := 0
	for name, records := range c.restored {
		var left []Restored
		for _, r := range records {
			if q.svid(r.SVID) {
				c.ready.Changed = true
				n++
				continue
			}
			left = append(left, r)
		}
		if c.restored[name] = left; len(left) == 0 {
			delete(c.restored, name)
		}
	}
	for _, i := range c.sorted() {
		for _, s := range i.sorted() {
			before := s.refused
			s.refused = q.identity(s.identity.ID)
			taken := s.svid != nil && q.svid(s.svid)
			if taken {
				s.svid, s.unhinted, s.taken = nil, nil, true
				c.ready.Changed = true
				n++
			}
			switch {
			case s.refused:
				s.due = time.Time{}
			case taken || before:
				c.ask(now, s, now, s.serial != nil)
			}
			c.arm(s)
			if taken || before != s.refused {
				for _, w := range s.users {
					c.touch(w)
				}
			}
		}
	}
	return n
}

// withheld says whether the workload may not have what it was given under this slot,
// though an entry gives it the identity.
func (s *slot) withheld() bool { return s.refused || s.taken }
