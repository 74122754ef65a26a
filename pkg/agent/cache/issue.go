package cache

import (
	"bytes"
	"encoding/hex"
	"slices"
	"time"

	"github.com/meshid/meshid/pkg/identity"
)

// Kind says why an SVID is asked for.
type Kind int

// Kinds of requests.
const (
	// First: the instance has never had this identity.
	First Kind = iota
	// Renewal: the SVID has reached its renewal time.
	Renewal
	// Rotation: the SVID's authority or entry changed.
	Rotation
)

// String returns the kind's name.
func (k Kind) String() string {
	switch k {
	case First:
		return "first"
	case Renewal:
		return "renewal"
	case Rotation:
		return "rotation"
	default:
		return "unknown"
	}
}

// Request asks the caller to have one SVID issued and to report what became of
// it through Issued, Refused or Failed.
type Request struct {
	ID       uint64
	Instance string
	// Digest names the workload whose attributes are to be sent.
	Digest string
	// Identity is what the SVID must say.
	Identity *identity.Identity
	Kind     Kind
	// PreviousSerial is that of the SVID which is replaced, or nil.
	PreviousSerial []byte
	// Due is when it was to be asked for.
	Due time.Time
}

// flight is a request on its way.
type flight struct {
	slot   *slot
	digest [32]byte // of the entry as it was
	taint  []string // authorities that were ordered out meanwhile
}

// anchored says whether the end of the SVID's chain names a root of b as its
// issuer.
func anchored(s *identity.SVID, b *identity.Bundle) bool {
	top := s.Chain[len(s.Chain)-1]
	for _, r := range b.Roots {
		if bytes.Equal(top.RawIssuer, r.RawSubject) &&
			(len(top.AuthorityKeyId) == 0 || len(r.SubjectKeyId) == 0 || bytes.Equal(top.AuthorityKeyId, r.SubjectKeyId)) {
			return true
		}
	}
	return false
}

// Rotate orders that the SVIDs signed by an authority (its lower-case
// hexadecimal subject key identifier; empty means all) be replaced, spread over
// within, those that expire first going first.
func (c *Cache) Rotate(now time.Time, authority string, within time.Duration) int {
	c.Tick(now)
	within = max(within, 0)
	var affected []*slot
	for _, i := range c.sorted() {
		for _, s := range i.sorted() {
			if f, on := c.flights[s.flight]; on && authority != "" && len(f.taint) < 16 {
				f.taint = append(f.taint, authority)
				c.flights[s.flight] = f
			}
			if s.svid != nil && signedBy(s.svid, authority) {
				affected = append(affected, s)
			}
		}
	}
	slices.SortStableFunc(affected, func(a, b *slot) int { return a.svid.NotAfter().Compare(b.svid.NotAfter()) })
	for n, s := range affected {
		step := time.Duration(float64(within) * float64(n) / float64(len(affected)))
		c.ask(now, s, now.Add(step), true)
	}
	for _, records := range c.restored {
		for n := range records {
			if signedBy(records[n].SVID, authority) {
				records[n].EntryDigest = [32]byte{} // rotated once it is claimed
			}
		}
	}
	return len(affected)
}

func signedBy(s *identity.SVID, authority string) bool { return SignedBy(s.Chain, authority) }

// SignedBy says whether an authority (its lower-case hexadecimal subject key
// identifier; empty means any) signed a certificate of the chain.
func SignedBy(chain []*identity.Certificate, authority string) bool {
	return authority == "" || slices.ContainsFunc(chain, func(cert *identity.Certificate) bool {
		return hex.EncodeToString(cert.AuthorityKeyId) == authority
	})
}

// Issued reports a verified SVID for a request. It returns false if nobody
// wants it any more: the caller forgets the key.
func (c *Cache) Issued(now time.Time, request uint64, svid *identity.SVID) bool {
	c.Tick(now)
	f, s := c.land(request)
	if s == nil {
		return false
	}
	if refused := c.quarantine.svid(svid); s.gone || refused || svid.ID != s.identity.ID {
		if c.instances[s.instance.name] == nil {
			c.ready.Ended = append(c.ready.Ended, Ended{Instance: s.instance.name, Serials: [][]byte{serial(svid)}})
		}
		switch {
		case s.gone || s.refused:
		case refused:
			c.retry(s, reasonQuarantined, now.Add(c.delay(s.failures+1)))
		default:
			c.retry(s, "issued for another identity", now.Add(c.delay(s.failures+1)))
		}
		return false
	}
	s.svid, s.unhinted, s.issued, s.serial, s.taken = svid, nil, f.digest, serial(svid), false
	s.failures, s.reason, s.transport, s.rotate = 0, "", false, false
	s.remedy = s.remedy.next()
	c.ready.Changed = true
	c.schedule(now, s)
	if f.digest != s.digest || slices.ContainsFunc(f.taint, func(a string) bool { return signedBy(svid, a) }) {
		c.ask(now, s, now, true)
	}
	for _, w := range s.users {
		c.touch(w)
	}
	return true
}

// remedy is what was done about the refusal of an SVID.
type remedy uint8

const (
	remedyNone remedy = iota
	remedyAsked
	remedyHad // the SVID at hand was issued because the one before was refused
)

// next is what follows once an SVID is issued.
func (r remedy) next() remedy {
	if r == remedyAsked {
		return remedyHad
	}
	return remedyNone
}

// Reject says that the proxy of a stream refuses the SVID with this serial number.
// It is issued anew, once: the one that is issued in its place is not replaced
// before its time. It returns false if there is nothing to be done.
func (c *Cache) Reject(now time.Time, id WatchID, serial []byte) bool {
	c.Tick(now)
	w := c.watches[id]
	if w == nil {
		return false
	}
	for _, s := range w.slots {
		if s.svid == nil || !bytes.Equal(s.serial, serial) || s.remedy != remedyNone {
			continue
		}
		s.remedy = remedyAsked
		c.ask(now, s, now, true)
		return true
	}
	return false
}

// schedule plans the renewal of the SVID at hand.
func (c *Cache) schedule(now time.Time, s *slot) {
	s.planned = now.Add(RenewIn(now, s.svid.RenewAt, s.svid.NotAfter()))
	s.due = s.planned
	c.arm(s)
}

// RenewIn returns how long from now an SVID is to be renewed. It is what the CA
// said, unless the two clocks differ so much that it would be far too early or
// too late: then it is a part of the life that the SVID has after renewAt, which
// does not depend on a clock.
func RenewIn(now, renewAt, notAfter time.Time) time.Duration {
	now = now.Round(0)
	rest := notAfter.Sub(renewAt)
	if rest <= 0 || renewAt.IsZero() {
		return max(notAfter.Sub(now)/2, time.Second)
	}
	soonest := max(min(rest/4, notAfter.Sub(now)/2), time.Second)
	return max(min(renewAt.Sub(now), 3*rest), soonest)
}

// Refused reports that the CA refused a request. retryAfter is when it may be
// made again; a negative one means not before something changes, and then it is
// made rarely.
func (c *Cache) Refused(now time.Time, request uint64, reason string, retryAfter time.Duration) {
	c.Tick(now)
	f, s := c.land(request)
	if s == nil || s.gone {
		return
	}
	s.transport = false
	random := c.config.Random()
	wait := time.Duration(float64(refusedMax) * (0.5 + random/2))
	if retryAfter >= 0 {
		// Never sooner than said, and never all at once.
		wait = max(retryAfter+time.Duration(float64(retryAfter)*random/4), c.delay(s.failures+1))
	}
	if f.digest != s.digest { // what was refused is not what would be asked for now
		wait = min(wait, c.delay(1))
	}
	c.retry(s, reason, now.Add(wait))
}

// Failed reports that a request has had no answer, or none that can be used.
func (c *Cache) Failed(now time.Time, request uint64, reason string) {
	c.Tick(now)
	_, s := c.land(request)
	if s == nil || s.gone {
		return
	}
	s.transport = true
	c.retry(s, reason, now.Add(c.delay(s.failures+1)))
}

// Resume says that the CA can be reached again: what no SVID is at hand for is
// not kept waiting.
func (c *Cache) Resume(now time.Time) {
	c.Tick(now)
	for _, i := range c.sorted() {
		for _, s := range i.sorted() {
			if s.transport && s.svid == nil && s.flight == 0 {
				c.ask(now, s, now, s.rotate)
			}
		}
	}
}

// delay is full jitter below a bound that doubles with each failure, but never
// nothing.
func (c *Cache) delay(failures int) time.Duration {
	bound := retryMin
	for range min(failures, 64) - 1 {
		if bound >= retryMax/2 {
			bound = retryMax
			break
		}
		bound *= 2
	}
	return max(time.Duration(float64(bound)*c.config.Random()), retryMin/4)
}

// retry plans another attempt.
func (c *Cache) retry(s *slot, reason string, at time.Time) {
	s.failures++
	s.reason = reason
	s.due = at
	if s.refused {
		s.due = time.Time{} // asked for when it is lifted
	}
	c.arm(s)
}

// land takes a request out of the air.
func (c *Cache) land(request uint64) (flight, *slot) {
	f, ok := c.flights[request]
	if !ok {
		return flight{}, nil
	}
	delete(c.flights, request)
	f.slot.flight = 0
	return f, f.slot
}

// fire handles a slot whose time has come.
func (c *Cache) fire(now time.Time, s *slot) {
	if s.svid != nil && !s.svid.NotAfter().After(now.Round(0)) {
		s.svid, s.unhinted = nil, nil
		c.ready.Changed = true
		for _, w := range s.users {
			c.touch(w)
		}
	}
	if !s.due.IsZero() && !deadline(s.due).after(now) {
		s.due = time.Time{}
		if s.flight == 0 {
			c.enqueue(s)
		}
	}
	c.arm(s)
}

// enqueue puts a slot among those to ask for.
func (c *Cache) enqueue(s *slot) {
	if !s.pending && !s.refused {
		s.pending = true
		c.pending = append(c.pending, s)
	}
}

// ask plans a request at a time, or sooner if it is planned so.
func (c *Cache) ask(now time.Time, s *slot, at time.Time, rotate bool) {
	s.rotate = s.rotate || rotate
	if s.refused {
		return // asked for when it is lifted
	}
	if s.flight != 0 || s.pending {
		return // its answer is checked against what has changed meanwhile
	}
	if s.due.IsZero() || at.Before(s.due) {
		s.due, s.planned = at, at
	}
	if !deadline(s.due).after(now) {
		s.due = time.Time{}
		c.enqueue(s)
	}
	c.arm(s)
}

// arm sets the slot's timer to whatever comes first.
func (c *Cache) arm(s *slot) {
	at := s.due
	if s.svid != nil && (at.IsZero() || s.svid.NotAfter().Before(at)) {
		at = s.svid.NotAfter()
	}
	if s.gone {
		at = time.Time{}
	}
	c.timers.set(s, at)
}

// depart makes requests of what is pending: first for those who have nothing,
// in the order they came, then for those who lose theirs first.
func (c *Cache) depart(room int) {
	c.pending = slices.DeleteFunc(c.pending, func(s *slot) bool {
		if s.refused {
			s.pending = false
		}
		return s.gone || s.refused
	})
	if room <= 0 || len(c.pending) == 0 {
		return
	}
	if len(c.pending) > 1 {
		slices.SortStableFunc(c.pending, func(a, b *slot) int {
			switch {
			case a.svid == nil && b.svid == nil:
				return 0
			case a.svid == nil:
				return -1
			case b.svid == nil:
				return 1
			default:
				return a.svid.NotAfter().Compare(b.svid.NotAfter())
			}
		})
	}
	n := min(room, len(c.pending))
	for _, s := range c.pending[:n] {
		c.requests++
		s.pending, s.flight = false, c.requests
		c.flights[s.flight] = flight{slot: s, digest: s.digest}
		kind := Renewal
		switch {
		case s.serial == nil:
			kind = First
		case s.rotate:
			kind = Rotation
		}
		c.ready.Issue = append(c.ready.Issue, Request{
			ID:             s.flight,
			Instance:       s.instance.name,
			Digest:         s.asker().digest,
			Identity:       s.identity,
			Kind:           kind,
			PreviousSerial: s.serial,
			Due:            s.planned,
		})
	}
	c.pending = slices.Delete(c.pending, 0, n)
}

// asker is the workload whose attributes are sent: one that a stream has asked
// as, if there is one, since more is known of it.
func (s *slot) asker() *workload {
	for _, w := range s.users {
		if len(w.watches) > 0 {
			return w
		}
	}
	return s.users[0]
}

// serial returns the serial number of an SVID.
func serial(s *identity.SVID) []byte { return s.Chain[0].SerialNumber.Bytes() }
