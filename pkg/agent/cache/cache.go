// Package cache decides, for one node, which X.509-SVIDs to have issued, when to
// renew them, and whom to tell. It is a pure state machine over entries ×
// workload instances × SVIDs: it starts no goroutine, does no I/O and never asks
// for the time, so the same calls give the same results. It does not know how a
// process is attested, what a key is, or that there is a network.
//
// The caller reports what happened through the methods that change the cache,
// and then takes what is to be done from Ready. Each file answers one question:
// cache.go what may happen to a cache, workload.go what a workload is to have,
// issue.go when an SVID is asked for, publish.go what streams are told,
// restore.go what outlives a restart, timers.go when something is due, and
// stats.go how things stand. What is quarantined (quarantine.go) is served to nobody.
package cache

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
)

// ErrFull is returned when a bound of Config does not allow one more.
var ErrFull = errors.New("agent is at its limit")

const (
	// linger is how long an instance that the runtime has not announced is kept
	// after its last stream, so that a stream that is opened again is answered
	// at once.
	linger = 5 * time.Second
	// restoreWindow is how long restored SVIDs wait for their instance to
	// attest itself again.
	restoreWindow = 2 * time.Minute
	// retryMin and retryMax bound the wait after the first failure and after many.
	retryMin, retryMax = 200 * time.Millisecond, 10 * time.Second
	// refusedMax is the longest wait after a refusal that names no time.
	refusedMax = 5 * time.Minute
)

// Config bounds a cache. The zero value of each field means its default.
type Config struct {
	// MaxInstances bounds the workload instances (default 10,000).
	MaxInstances int
	// MaxIdentities bounds the identities of all instances (default 50,000).
	MaxIdentities int
	// MaxWorkloads bounds the different sets of attributes of one instance
	// (default 64).
	MaxWorkloads int
	// Random returns a number in [0, 1) for each wait that is to be jittered;
	// nil means always 0.5.
	Random func() float64
}

func (c Config) withDefaults() Config {
	c.MaxInstances = cmp.Or(c.MaxInstances, 10_000)
	c.MaxIdentities = cmp.Or(c.MaxIdentities, 50_000)
	c.MaxWorkloads = cmp.Or(c.MaxWorkloads, 64)
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

// Ended is an instance whose keys were dropped.
type Ended struct {
	Instance string
	Serials  [][]byte
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

	entries    *identity.Set // nil until known
	quarantine *Quarantine
	bundle     *identity.Bundle

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
	remedy    remedy
	pending   bool
	gone      bool
	refused   bool // the identity is quarantined: it is not asked for
	taken     bool // its SVID was quarantined, and there is no other yet
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
