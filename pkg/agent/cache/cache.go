// Package cache decides, for one node, which X.509-SVIDs to have issued, when to
// renew them, and whom to tell. It is a pure state machine over entries ×
// workload instances × SVIDs: it starts no goroutine, does no I/O and never asks
// for the time, so the same calls give the same results. It does not know how a
// process is attested, what a key is, or that there is a network.
//
// The caller reports what happened through the methods that change the cache,
// and then takes what is to be done from Ready.
package cache

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// ErrFull is returned when a bound of Config does not allow one more.
var ErrFull = errors.New("agent is at its limit")

// Config bounds a cache. The zero value of each field means its default.
type Config struct {
	// MaxInstances bounds the workload instances (default 10,000).
	MaxInstances int
	// MaxIdentities bounds the identities of all instances (default 50,000).
	MaxIdentities int
	// MaxWorkloads bounds the different sets of attributes of one instance
	// (default 64).
	MaxWorkloads int
	// Linger is how long an instance that the runtime has not announced is kept
	// after its last stream, so that a stream that is opened again is answered
	// at once (default 5 s).
	Linger time.Duration
	// RestoreWindow is how long restored SVIDs wait for their instance to
	// attest itself again (default 2 min).
	RestoreWindow time.Duration
	// RetryMin and RetryMax bound the wait after the first failure and after
	// many (defaults 200 ms and 10 s).
	RetryMin, RetryMax time.Duration
	// RefusedMax is the longest wait after a refusal that names no time
	// (default 5 min).
	RefusedMax time.Duration
	// Random returns a number in [0, 1) for each wait that is to be jittered;
	// nil means always 0.5.
	Random func() float64
}

func (c Config) withDefaults() Config {
	c.MaxInstances = cmp.Or(c.MaxInstances, 10_000)
	c.MaxIdentities = cmp.Or(c.MaxIdentities, 50_000)
	c.MaxWorkloads = cmp.Or(c.MaxWorkloads, 64)
	c.Linger = cmp.Or(c.Linger, 5*time.Second)
	c.RestoreWindow = cmp.Or(c.RestoreWindow, 2*time.Minute)
	c.RetryMin = cmp.Or(c.RetryMin, 200*time.Millisecond)
	c.RetryMax = cmp.Or(c.RetryMax, 10*time.Second)
	c.RefusedMax = cmp.Or(c.RefusedMax, 5*time.Minute)
	if c.Random == nil {
		c.Random = func() float64 { return 0.5 }
	}
	return c
}

// WatchID names one open stream. The caller chooses it and does not use it twice.
type WatchID uint64

// Workload is one set of attributes that was attested in an instance. Processes
// of one container may differ in theirs, and then in the identities they have;
// they share the key of an identity that they both have.
type Workload struct {
	// Instance names what keys belong to.
	Instance string
	// Digest stands for the attributes: two workloads of an instance with the
	// same digest are one.
	Digest string
	Facts  *identity.Facts
}

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

// Publication is a snapshot for some streams.
type Publication struct {
	Watches  []WatchID
	Snapshot *identity.Snapshot
}

// Ended is an instance whose keys were dropped.
type Ended struct {
	Instance string
	Serials  [][]byte
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

// Ready is what is to be done.
type Ready struct {
	// Issue are requests, most urgent first.
	Issue []Request
	// Publish are snapshots for streams, in the order of the causes.
	Publish []Publication
	// Closed are streams whose instance has ended.
	Closed []WatchID
	// Ended are instances whose keys were dropped.
	Ended []Ended
	// Events are to be logged.
	Events []Event
	// Changed is set when Export would return other SVIDs than before.
	Changed bool
	// Waiting is how many requests wait for room in Issue.
	Waiting int
	// Next is when Tick has something to do; zero means never.
	Next time.Time
}

// Cache is the state machine. It is not safe for concurrent use.
type Cache struct {
	config Config

	entries *identity.Set // nil until known
	bundle  *identity.Bundle

	instances map[string]*instance
	watches   map[WatchID]*workload
	flights   map[uint64]flight
	restored  map[string][]Restored // by instance
	until     time.Time             // the restored are dropped then

	slots    int // of all instances
	requests uint64
	timers   timers
	pending  []*slot // due, not in flight; may hold dropped ones
	dirty    []*workload
	limited  map[*workload]struct{} // lack an identity for want of room
	freed    bool                   // room was made since limited were tried
	clock    time.Time              // reading to which deadlines are relative

	ready Ready // collected since the last Ready
}

// flight is a request on its way.
type flight struct {
	slot   *slot
	digest [32]byte // of the entry as it was
	taint  []string // authorities that were ordered out meanwhile
}

// New returns an empty cache.
func New(c Config) *Cache {
	return &Cache{
		config:    c.withDefaults(),
		instances: make(map[string]*instance),
		watches:   make(map[WatchID]*workload),
		flights:   make(map[uint64]flight),
		restored:  make(map[string][]Restored),
		limited:   make(map[*workload]struct{}),
	}
}

// instance is a workload instance that is present.
type instance struct {
	name      string
	announced string // digest of the workload that the runtime announced
	present   bool   // the runtime announced it
	// generation grows when what the runtime announces changes: older
	// workloads are kept only for their streams.
	generation int
	workloads  []*workload // in the order of arrival
	slots      map[slotKey]*slot
}

// workload is a Workload with the streams that ask as it.
type workload struct {
	instance   *instance
	digest     string
	facts      *identity.Facts
	generation int // of the instance when it was last attested

	watches []WatchID
	fresh   []WatchID // have not been told the current snapshot
	slots   []*slot   // by entry name
	lost    []spiffeid.ID
	last    *identity.Snapshot
	dirty   bool
	gone    bool
	warned  map[string]struct{} // events that were reported

	timer // when it is dropped, if nothing holds it
}

// slotKey tells the identities of one instance apart.
type slotKey struct{ entry, id, dnsNames string }

// slot is one identity of one instance: what it is to be, and the SVID at hand.
type slot struct {
	instance *instance
	key      slotKey
	identity *identity.Identity
	digest   [32]byte    // of the entry in force
	users    []*workload // in the order of arrival

	svid     *identity.SVID // nil: none at hand
	unhinted *identity.SVID // svid without its hint, once it was needed
	issued   [32]byte       // digest of the entry that svid was issued under
	serial   []byte         // of the last SVID, also after it has expired

	due       time.Time // when to ask; zero while pending or in flight
	planned   time.Time // when it was to be asked for
	flight    uint64    // 0: none
	rotate    bool      // the next request is a rotation
	pending   bool
	gone      bool
	transport bool // the last attempt failed on its way
	failures  int
	reason    string // of the last failure

	timer
}

// SetBundle replaces the trust bundle. SVIDs whose chain ends at a root that is
// in it no more are rotated.
func (c *Cache) SetBundle(now time.Time, b *identity.Bundle) {
	c.Tick(now)
	c.bundle = b
	for _, i := range c.sorted() {
		for _, w := range i.workloads {
			c.touch(w)
		}
		for _, s := range i.sorted() {
			if s.svid != nil && !anchored(s.svid, b) {
				c.ask(now, s, now, true)
			}
		}
	}
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

// SetEntries replaces the entries. changed are the names of those that were
// added, changed or removed; nil means that any may have been.
func (c *Cache) SetEntries(now time.Time, set *identity.Set, changed []string) {
	c.Tick(now)
	if c.entries == nil {
		changed = nil
	}
	c.entries = set
	for _, i := range c.sorted() {
		for _, w := range i.workloads {
			c.evaluate(now, w, changed)
		}
	}
}

// Replace replaces the entries, and the facts of every workload by what facts
// returns, as is needed when attributes of the node changed.
func (c *Cache) Replace(now time.Time, set *identity.Set, facts func(instance, digest string) *identity.Facts) {
	c.Tick(now)
	c.entries = set
	for _, i := range c.sorted() {
		for _, w := range i.workloads {
			w.facts = facts(i.name, w.digest)
			c.evaluate(now, w, nil)
		}
	}
}

// Attach adds a stream, or moves it if it was attached as another workload. The
// error wraps ErrFull, and the stream is then as it was.
func (c *Cache) Attach(now time.Time, id WatchID, l Workload) error {
	c.Tick(now)
	w, err := c.enter(now, l)
	if err != nil {
		return err
	}
	old := c.watches[id]
	if old == w {
		return nil
	}
	if old != nil && old.last != nil {
		for _, s := range old.last.SVIDs { // what the stream was given and loses
			w.lose(s.ID)
		}
		w.lost = appendMissing(w.lost, old.last.Withdrawn...)
	}
	w.watches = append(w.watches, id)
	w.fresh = append(w.fresh, id)
	c.watches[id] = w
	c.hold(now, w)
	c.touch(w)
	if old != nil {
		c.leave(now, old, id)
	}
	return nil
}

// Detach removes a stream.
func (c *Cache) Detach(now time.Time, id WatchID) {
	c.Tick(now)
	if w := c.watches[id]; w != nil {
		delete(c.watches, id)
		c.leave(now, w, id)
	}
}

// leave takes a stream from a workload.
func (c *Cache) leave(now time.Time, w *workload, id WatchID) {
	w.watches = deleteOne(w.watches, id)
	w.fresh = deleteOne(w.fresh, id)
	c.hold(now, w)
}

// Announce says that the runtime knows an instance, with the attributes that
// are known without a process. Keys are then kept until End. It returns the
// streams of an instance whose announced attributes changed: what was attested
// of them may hold no more. The error wraps ErrFull.
func (c *Cache) Announce(now time.Time, l Workload) ([]WatchID, error) {
	c.Tick(now)
	w, err := c.enter(now, l)
	if err != nil {
		return nil, err
	}
	i := w.instance
	before, known := i.announced, i.present
	i.announced, i.present = l.Digest, true
	if !known || before == l.Digest {
		for _, o := range i.workloads {
			c.hold(now, o)
		}
		return nil, nil
	}
	i.generation++
	w.generation = i.generation
	for _, o := range slices.Clone(i.workloads) {
		if c.hold(now, o); o.armed() {
			c.drop(o) // what was attested of it holds no more, and nobody asks
		}
	}
	var stale []WatchID
	for _, o := range i.workloads {
		stale = append(stale, o.watches...)
	}
	slices.Sort(stale)
	return stale, nil
}

// End says that an instance has ended: its keys are dropped and its streams
// closed at once.
func (c *Cache) End(now time.Time, name string) {
	c.Tick(now)
	if unclaimed := c.restored[name]; unclaimed != nil {
		delete(c.restored, name)
		c.abandon(name, unclaimed)
	}
	i := c.instances[name]
	if i == nil {
		return
	}
	i.present = false
	for _, w := range slices.Clone(i.workloads) {
		for _, id := range w.watches {
			delete(c.watches, id)
			c.ready.Closed = append(c.ready.Closed, id)
		}
		w.watches, w.fresh = nil, nil
		c.drop(w)
	}
}

// Evict withdraws everything: the node has lost its identity.
func (c *Cache) Evict(now time.Time) {
	c.Tick(now)
	c.restored = make(map[string][]Restored)
	c.SetEntries(now, identity.NewSet(), nil)
	c.ready.Changed = true
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
func SignedBy(chain []*x509.Certificate, authority string) bool {
	return authority == "" || slices.ContainsFunc(chain, func(cert *x509.Certificate) bool {
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
	if s.gone || svid.ID != s.identity.ID {
		if c.instances[s.instance.name] == nil {
			c.ready.Ended = append(c.ready.Ended, Ended{Instance: s.instance.name, Serials: [][]byte{serial(svid)}})
		}
		if !s.gone {
			c.retry(s, "issued for another identity", now.Add(c.delay(s.failures+1)))
		}
		return false
	}
	s.svid, s.unhinted, s.issued, s.serial = svid, nil, f.digest, serial(svid)
	s.failures, s.reason, s.transport, s.rotate = 0, "", false, false
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
	wait := time.Duration(float64(c.config.RefusedMax) * (0.5 + random/2))
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
	bound := c.config.RetryMin
	for range min(failures, 64) - 1 {
		if bound >= c.config.RetryMax/2 {
			bound = c.config.RetryMax
			break
		}
		bound *= 2
	}
	return max(time.Duration(float64(bound)*c.config.Random()), c.config.RetryMin/4)
}

// retry plans another attempt.
func (c *Cache) retry(s *slot, reason string, at time.Time) {
	s.failures++
	s.reason = reason
	s.due = at
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
	if !s.pending {
		s.pending = true
		c.pending = append(c.pending, s)
	}
}

// ask plans a request at a time, or sooner if it is planned so.
func (c *Cache) ask(now time.Time, s *slot, at time.Time, rotate bool) {
	s.rotate = s.rotate || rotate
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

// Ready returns what is to be done and forgets it. At most room requests are
// returned; the others stay.
func (c *Cache) Ready(now time.Time, room int) Ready {
	c.Tick(now)
	if c.freed && len(c.limited) > 0 {
		c.freed = false
		for _, i := range c.sorted() {
			for _, w := range i.workloads {
				if _, ok := c.limited[w]; ok {
					delete(c.limited, w)
					c.evaluate(now, w, nil)
				}
			}
		}
	}
	c.depart(room)
	dirty := c.dirty
	c.dirty = nil
	for _, w := range dirty {
		w.dirty = false
		c.publish(now, w)
	}
	r := c.ready
	c.ready = Ready{}
	r.Waiting = len(c.pending)
	if len(c.timers) > 0 {
		r.Next = time.Time(c.timers[0].deadline())
	}
	if !c.until.IsZero() && (r.Next.IsZero() || c.until.Before(r.Next)) {
		r.Next = c.until
	}
	return r
}

// depart makes requests of what is pending: first for those who have nothing,
// in the order they came, then for those who lose theirs first.
func (c *Cache) depart(room int) {
	c.pending = slices.DeleteFunc(c.pending, func(s *slot) bool { return s.gone })
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
	next.Denied = len(w.slots) == 0 && !limited
	if w.last != nil {
		for _, s := range w.last.SVIDs {
			w.lose(s.ID)
		}
	}
	// What has merely expired is not withdrawn: the workload is entitled to it
	// still, its verifiers see that it is expired by clocks of their own, and this
	// machine's clock may be wrong.
	w.lost = slices.DeleteFunc(w.lost, func(id spiffeid.ID) bool {
		return slices.ContainsFunc(w.slots, func(s *slot) bool { return s.identity.ID == id })
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

func (c *Cache) sorted() []*instance {
	all := make([]*instance, 0, len(c.instances))
	for _, i := range c.instances {
		all = append(all, i)
	}
	slices.SortFunc(all, func(a, b *instance) int { return strings.Compare(a.name, b.name) })
	return all
}

func (i *instance) sorted() []*slot {
	all := make([]*slot, 0, len(i.slots))
	for _, s := range i.slots {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *slot) int {
		return cmp.Or(strings.Compare(a.key.entry, b.key.entry), strings.Compare(a.key.id, b.key.id),
			strings.Compare(a.key.dnsNames, b.key.dnsNames))
	})
	return all
}

func deleteOne(ids []WatchID, id WatchID) []WatchID {
	if n := slices.Index(ids, id); n >= 0 {
		return slices.Delete(ids, n, n+1)
	}
	return ids
}
