// Package registry is what the CA's issuing path reads: the registration
// entries that are in force, the nodes, and how both came to be what they are.
// It answers "what holds now, and what has changed since that revision" from
// memory. It does not know where any of this is stored, nor who asks.
package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/pkg/identity"
)

// Bounds of the history that deltas are computed from. An agent that is further
// behind gets a full snapshot.
const (
	maxChanges      = 1024
	maxChangedNames = 20_000
)

// Overlap is how long an agent's former X.509-SVID is still accepted after the
// new one has been used for the first time.
const Overlap = 5 * time.Minute

// Entries is one revision of all registration entries. It is immutable.
type Entries struct {
	Revision uint64
	// Set holds the entries that compiled: only they are ever in force.
	Set *identity.Set
	// Broken are stored entries that this version cannot compile, by name. They
	// are kept for the operator to see; nothing is issued under them.
	Broken map[string]*entryv1.Entry

	// By SPIFFE ID, the entries marked admin, and those marked downstream.
	admins, downstreams map[string]*identity.Entry
	changes             []change // oldest first; everything after since is in it
	since               uint64
}

// change is what one revision did to the entries.
type change struct {
	revision uint64
	before   []before
}

// before is an entry as it was before a change; entry is nil if there was none.
type before struct {
	name  string
	entry *identity.Entry
}

// Admin returns the entry marked admin whose SPIFFE ID is exactly id. Such
// entries have no templates, so that the answer survives a restart.
func (e *Entries) Admin(id string) (*identity.Entry, bool) {
	a, ok := e.admins[id]
	return a, ok
}

// Downstream returns the entry marked downstream whose SPIFFE ID is exactly id,
// likewise.
func (e *Entries) Downstream(id string) (*identity.Entry, bool) {
	d, ok := e.downstreams[id]
	return d, ok
}

// Downstreams returns the SPIFFE IDs of the entries marked downstream, sorted.
func (e *Entries) Downstreams() []string { return slices.Sorted(maps.Keys(e.downstreams)) }

// Names returns the names of all entries, broken ones included, sorted.
func (e *Entries) Names() []string {
	names := make([]string, 0, e.Set.Len()+len(e.Broken))
	for entry := range e.Set.All() {
		names = append(names, entry.Name())
	}
	names = append(names, slices.Collect(maps.Keys(e.Broken))...)
	slices.Sort(names)
	return names
}

// Proto returns the entry with this name, broken or not. It must not be changed.
func (e *Entries) Proto(name string) (*entryv1.Entry, bool) {
	if entry, ok := e.Set.Get(name); ok {
		return entry.Proto(), true
	}
	broken, ok := e.Broken[name]
	return broken, ok
}

// Delta returns what a node with these facts has to change to come from
// revision from to this one. It reports false if the history does not reach
// back that far, or if from is ahead: the node then needs a full snapshot.
//
// Only what the node is entitled to see is told: an entry that it did not have
// and does not get is in neither list.
func (e *Entries) Delta(from uint64, node *identity.Facts) (upserts []*identity.Entry, removed []string, ok bool) {
	if from < e.since || from > e.Revision {
		return nil, nil, false
	}
	var seen map[string]bool
	for _, c := range e.changes {
		if c.revision <= from {
			continue
		}
		for _, b := range c.before {
			if seen[b.name] {
				continue // the oldest change tells what the node had
			}
			if seen == nil {
				seen = make(map[string]bool)
			}
			seen[b.name] = true
			had := b.entry != nil && b.entry.MatchNode(node)
			now, exists := e.Set.Get(b.name)
			switch has := exists && now.MatchNode(node); {
			case has && b.entry != now:
				upserts = append(upserts, now)
			case had && !has:
				removed = append(removed, b.name)
			}
		}
	}
	slices.SortFunc(upserts, func(a, b *identity.Entry) int { return strings.Compare(a.Name(), b.Name()) })
	slices.Sort(removed)
	return upserts, removed, true
}

// with returns the next revision.
func (e *Entries) with(revision uint64, upserts []*identity.Entry, removed []string) *Entries {
	next := &Entries{Revision: revision, Set: e.Set, Broken: e.Broken, since: e.since}
	if len(upserts) == 0 && len(removed) == 0 {
		next.admins, next.downstreams, next.changes = e.admins, e.downstreams, e.changes
		return next
	}
	c := change{revision: revision, before: make([]before, 0, len(upserts)+len(removed))}
	note := func(name string) {
		old, ok := e.Set.Get(name)
		if !ok {
			old = nil
		}
		c.before = append(c.before, before{name, old})
	}
	for _, u := range upserts {
		note(u.Name())
	}
	for _, name := range removed {
		note(name)
	}
	next.Set = e.Set.With(upserts, removed)
	next.Broken = maps.Clone(e.Broken)
	for _, b := range c.before {
		delete(next.Broken, b.name)
	}
	next.admins, next.downstreams = marked(next.Set, (*identity.Entry).Admin), marked(next.Set, (*identity.Entry).Downstream)
	next.changes = append(slices.Clone(e.changes), c)
	names := 0
	for i, c := range slices.Backward(next.changes) {
		names += len(c.before)
		if len(next.changes)-i > maxChanges || names > maxChangedNames {
			next.since = c.revision
			next.changes = slices.Clone(next.changes[i+1:])
			break
		}
	}
	return next
}

// marked returns the entries of a set that have a mark, by SPIFFE ID.
func marked(set *identity.Set, has func(*identity.Entry) bool) map[string]*identity.Entry {
	entries := make(map[string]*identity.Entry)
	for entry := range set.All() {
		if has(entry) {
			entries[entry.Proto().GetSpiffeId()] = entry
		}
	}
	return entries
}

// State says whether a node may use the CA.
type State string

// States of a node.
const (
	Active State = "active"
	// Evicted: the node must attest again.
	Evicted State = "evicted"
	// Banned: the node may not attest until the ban is lifted.
	Banned State = "banned"
)

// Node is what the CA knows about one node. It is immutable.
type Node struct {
	// ID is the node's SPIFFE ID.
	ID          string
	Attributes  *attributesv1.Node
	State       State
	StateReason string
	AttestedAt  time.Time
	// Serial is that of the newest X.509-SVID issued to the agent.
	Serial   []byte
	NotAfter time.Time
	// Confirmed: the agent has authenticated with Serial. Until then it may
	// never have received it, and Previous is as good.
	Confirmed bool
	// Previous is the serial before, accepted until PreviousUntil.
	Previous      []byte
	PreviousUntil time.Time
	AgentVersion  string
	Address       string
	LastSeen      time.Time
}

// Epoch returns the store's epoch as this node sees it: it is another one as
// soon as what was attested of the node is another, since the node may then be
// entitled to other entries.
func (n *Node) Epoch(epoch string) string {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(n.Attributes)
	if err != nil {
		return epoch + "-unknown" // attributes with invalid UTF-8 do not get here
	}
	sum := sha256.Sum256(raw)
	return epoch + "-" + hex.EncodeToString(sum[:8])
}

// Touch is what is written down about a node now and then, not at each request.
type Touch struct {
	ID            string
	Serial        []byte // the row is left alone if it has another by now
	Confirmed     bool
	PreviousUntil time.Time
	LastSeen      time.Time
}

// Token is a join token without its secret.
type Token struct {
	SHA256    [32]byte
	NodeName  string
	CreatedBy string
	Labels    map[string]string
	CreatedAt time.Time
	ExpiresAt time.Time
}

// Registry holds the current entries and nodes. All methods may be called
// concurrently; what they return is immutable.
type Registry struct {
	epoch   string
	entries atomic.Pointer[Entries]
	// quarantines is nil while there has been none.
	quarantines atomic.Pointer[Quarantines]

	changing sync.Mutex // held while entries or quarantines are replaced

	mu    sync.RWMutex // guards what follows
	nodes map[string]*slot
}

// slot is one node and what is noted about it at each request.
type slot struct {
	node    *Node // guarded by Registry.mu
	seen    atomic.Int64
	touched atomic.Bool
}

func newSlot(n *Node) *slot {
	s := &slot{node: n}
	if !n.LastSeen.IsZero() {
		s.seen.Store(n.LastSeen.UnixNano())
	}
	return s
}

// New returns a registry with these entries, none of which has a history yet.
func New(epoch string, revision uint64, set *identity.Set, broken map[string]*entryv1.Entry, nodes []*Node) *Registry {
	r := &Registry{epoch: epoch, nodes: make(map[string]*slot, len(nodes))}
	r.entries.Store(&Entries{
		Revision: revision, Set: set, Broken: broken, since: revision,
		admins: marked(set, (*identity.Entry).Admin), downstreams: marked(set, (*identity.Entry).Downstream),
	})
	for _, n := range nodes {
		r.nodes[n.ID] = newSlot(n)
	}
	return r
}

// Epoch returns the store's epoch.
func (r *Registry) Epoch() string { return r.epoch }

// Entries returns the entries that are in force.
func (r *Registry) Entries() *Entries { return r.entries.Load() }

// Apply puts a revision into force. Revisions must be applied in their order.
func (r *Registry) Apply(revision uint64, upserts []*identity.Entry, removed []string) {
	r.changing.Lock()
	defer r.changing.Unlock()
	r.entries.Store(r.entries.Load().with(revision, upserts, removed))
}

// Advance notes a revision that changed no entry; an older one is ignored. It
// reports whether there was something to note.
func (r *Registry) Advance(revision uint64) bool {
	r.changing.Lock()
	defer r.changing.Unlock()
	e := r.entries.Load()
	if revision <= e.Revision {
		return false
	}
	r.entries.Store(e.with(revision, nil, nil))
	return true
}

// Node returns the node with this SPIFFE ID.
func (r *Registry) Node(id string) (*Node, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	s, ok := r.nodes[id]
	if !ok {
		return nil, false
	}
	return s.node, true
}

// PutNode replaces or adds a node. The caller has made sure that nobody else
// changes the same node meanwhile.
func (r *Registry) PutNode(n *Node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s, ok := r.nodes[n.ID]; ok {
		s.node = n
		return
	}
	r.nodes[n.ID] = newSlot(n)
}

// Nodes returns all nodes, sorted by SPIFFE ID, each with its last sighting.
func (r *Registry) Nodes() []*Node {
	r.mu.RLock()
	nodes := make([]*Node, 0, len(r.nodes))
	for _, s := range r.nodes {
		n := *s.node
		n.LastSeen = time.Unix(0, s.seen.Load())
		nodes = append(nodes, &n)
	}
	r.mu.RUnlock()
	slices.SortFunc(nodes, func(a, b *Node) int { return strings.Compare(a.ID, b.ID) })
	return nodes
}

// CountNodes returns the number of nodes.
func (r *Registry) CountNodes() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.nodes)
}

// CountNodesByState returns how many nodes are in which state.
func (r *Registry) CountNodesByState() map[State]int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	count := make(map[State]int, 3)
	for _, s := range r.nodes {
		count[s.node.State]++
	}
	return count
}

// Verdict is what Authenticate found out about a node's X.509-SVID.
type Verdict int

// Verdicts.
const (
	Accepted Verdict = iota
	// Unknown: there is no such node.
	Unknown
	// Inactive: the node is evicted or banned; see its State.
	Inactive
	// Superseded: the node has a newer X.509-SVID than the one presented.
	Superseded
)

// Authenticate says whether the node may act with the X.509-SVID that has this
// serial, and notes that it was seen. The first use of a new serial confirms
// it, which bounds the life of the former one.
func (r *Registry) Authenticate(id string, serial []byte, now time.Time) (*Node, Verdict) {
	r.mu.RLock()
	s, ok := r.nodes[id]
	var n *Node
	if ok {
		n = s.node
	}
	r.mu.RUnlock()
	if !ok {
		return nil, Unknown
	}
	if n.State != Active {
		return n, Inactive
	}
	switch {
	case string(serial) == string(n.Serial):
		if !n.Confirmed {
			n = r.confirm(s, n, now)
		}
	case len(n.Previous) > 0 && string(serial) == string(n.Previous) && now.Before(n.PreviousUntil):
	default:
		return n, Superseded
	}
	s.seen.Store(now.UnixNano())
	if !s.touched.Load() {
		s.touched.Store(true)
	}
	return n, Accepted
}

// confirm notes that the newest serial was used.
func (r *Registry) confirm(s *slot, n *Node, now time.Time) *Node {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.node != n {
		return s.node // changed meanwhile: the next request confirms
	}
	c := *n
	c.Confirmed = true
	if until := now.Add(Overlap); until.Before(c.PreviousUntil) {
		c.PreviousUntil = until
	}
	s.node = &c
	return &c
}

// TakeTouched returns what has been noted about nodes since the last call.
func (r *Registry) TakeTouched() []Touch {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var touched []Touch
	for _, s := range r.nodes {
		if s.touched.CompareAndSwap(true, false) {
			touched = append(touched, Touch{
				ID: s.node.ID, Serial: s.node.Serial, Confirmed: s.node.Confirmed,
				PreviousUntil: s.node.PreviousUntil, LastSeen: time.Unix(0, s.seen.Load()),
			})
		}
	}
	return touched
}
