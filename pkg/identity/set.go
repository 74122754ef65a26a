package identity

import (
	"hash/maphash"
	"iter"
	"maps"
	"slices"
	"strings"

	"cel.dev/cel-go/common/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Set is an immutable set of entries with unique names, indexed so that a match
// looks at the few entries whose rules can be true. It may be used concurrently.
type Set struct {
	sorted    []*Entry // by name
	nodes     *index
	workloads *index
	reserved  map[spiffeid.ID]reservation
}

// reservation is what comes with a SPIFFE ID, beside what peers make of it: only
// entries that say so may give it.
type reservation struct{ admin, downstream bool }

// NewSet returns a set of entries. Of several with one name the last one stays.
func NewSet(entries ...*Entry) *Set {
	sorted := slices.Clone(entries)
	slices.SortStableFunc(sorted, byName)
	kept := sorted[:0]
	for i, e := range sorted {
		if i+1 == len(sorted) || sorted[i+1].name != e.name {
			kept = append(kept, e)
		}
	}
	return build(slices.Clip(kept))
}

// build makes a set of entries that are sorted and have unique names.
func build(sorted []*Entry) *Set {
	return &Set{
		sorted:    sorted,
		nodes:     newIndex(sorted, (*Entry).nodesRule),
		workloads: newIndex(sorted, (*Entry).workloadsRule),
		reserved:  reservedIDs(sorted),
	}
}

func byName(a, b *Entry) int { return strings.Compare(a.name, b.name) }

func (e *Entry) nodesRule() *expr     { return e.nodes }
func (e *Entry) workloadsRule() *expr { return e.workloads }

// With returns the set with entries added or replaced, and others removed. The
// receiver stays as it was. A name that is in both is added. A small change of a
// large set shares almost everything with it.
func (s *Set) With(upserts []*Entry, removed []string) *Set {
	changed := make(map[string]*Entry, len(upserts)+len(removed))
	for _, name := range removed {
		changed[name] = nil
	}
	for _, e := range upserts {
		changed[e.name] = e
	}
	var added, gone []*Entry
	sorted := make([]*Entry, 0, len(s.sorted)+len(changed))
	rest := s.sorted
	for _, name := range slices.Sorted(maps.Keys(changed)) {
		i, old := find(rest, name)
		sorted = append(sorted, rest[:i]...)
		rest = rest[i:]
		if old {
			gone = append(gone, rest[0])
			rest = rest[1:]
		}
		if e := changed[name]; e != nil {
			added = append(added, e)
			sorted = append(sorted, e)
		}
	}
	sorted = append(sorted, rest...)

	// Many changes are cheaper made at once; that also chooses the index anew.
	if (len(added)+len(gone))*16 > len(sorted) {
		return build(sorted)
	}
	reserved := s.reserved
	if slices.ContainsFunc(added, (*Entry).reserves) || slices.ContainsFunc(gone, (*Entry).reserves) {
		reserved = reservedIDs(sorted)
	}
	return &Set{
		sorted:    sorted,
		nodes:     s.nodes.with(added, gone, (*Entry).nodesRule),
		workloads: s.workloads.with(added, gone, (*Entry).workloadsRule),
		reserved:  reserved,
	}
}

// find returns where a name is or would be among sorted entries.
func find(sorted []*Entry, name string) (int, bool) {
	return slices.BinarySearchFunc(sorted, name, func(e *Entry, name string) int { return strings.Compare(e.name, name) })
}

// Get returns the entry with a name.
func (s *Set) Get(name string) (*Entry, bool) {
	i, ok := find(s.sorted, name)
	if !ok {
		return nil, false
	}
	return s.sorted[i], true
}

// Len returns the number of entries.
func (s *Set) Len() int { return len(s.sorted) }

// All returns the entries, sorted by name.
func (s *Set) All() iter.Seq[*Entry] { return slices.Values(s.sorted) }

// Reserved says which mark the entries of this SPIFFE ID have ("admin", or
// "downstream") that e does not have; "" if e may give it. An ID is all that a
// certificate says: whoever has it has what comes with it.
func (s *Set) Reserved(id spiffeid.ID, e *Entry) string {
	switch r := s.reserved[id]; {
	case r.admin && !e.Admin():
		return "admin"
	case r.downstream && !e.Downstream():
		return "downstream"
	default:
		return ""
	}
}

func (e *Entry) reserves() bool { return e.Admin() || e.Downstream() }

// MatchNode returns the entries for a node, sorted by name. The caller owns the
// slice.
func (s *Set) MatchNode(f *Facts) []*Entry {
	if f == nil || f.node == nil {
		return nil
	}
	return s.nodes.match(f, (*Entry).nodesRule)
}

// MatchWorkload returns the entries whose workload rule is true, sorted by name,
// whatever the node is. The caller owns the slice.
func (s *Set) MatchWorkload(f *Facts) []*Entry {
	if f == nil || f.workload == nil {
		return nil
	}
	return s.workloads.match(f, (*Entry).workloadsRule)
}

func reservedIDs(entries []*Entry) map[spiffeid.ID]reservation {
	ids := map[spiffeid.ID]reservation{}
	for _, e := range entries {
		if e.reserves() {
			r := ids[e.staticID]
			ids[e.staticID] = reservation{admin: r.admin || e.Admin(), downstream: r.downstream || e.Downstream()}
		}
	}
	return ids
}

// index finds entries by one option of each. It is immutable once it is in a
// Set.
type index struct {
	keys map[string]*keyIndex
	rest []*Entry // no option: they are always tried
}

// keyIndex are the entries that are found by one fact. The buckets are spread
// over many small maps, of which a change copies one.
type keyIndex struct {
	fact   *factRef
	prefix int
	shards [shards]map[guardValue][]*Entry
	values int // buckets in all shards
}

const shards = 64

var shardSeed = maphash.MakeSeed()

func shardOf(v guardValue) int {
	return int(maphash.Comparable(shardSeed, v) % shards)
}

func (k *keyIndex) bucket(v guardValue) []*Entry { return k.shards[shardOf(v)][v] }

// bucketID names a bucket.
type bucketID struct {
	key   string
	value guardValue
}

// newIndex puts each entry under the option that it shares with the fewest
// others.
func newIndex(entries []*Entry, rule func(*Entry) *expr) *index {
	counts := map[bucketID]int{}
	for _, e := range entries {
		for _, option := range rule(e).lookups() {
			for i := range option {
				counts[bucketID{option[i].key(), option[i].value}]++
			}
		}
	}
	ed := &indexEdit{index: &index{keys: map[string]*keyIndex{}}}
	for _, e := range entries {
		ed.add(e, rule(e).lookups(), func(id bucketID) int { return counts[id] })
	}
	return ed.index
}

// with returns a changed copy. What was not changed is shared.
func (ix *index) with(added, gone []*Entry, rule func(*Entry) *expr) *index {
	ed := &indexEdit{
		index:   &index{keys: maps.Clone(ix.keys), rest: slices.Clip(ix.rest)},
		shared:  true,
		keys:    map[*keyIndex]*[shards]bool{},
		buckets: map[bucketID]bool{},
	}
	fromRest := map[*Entry]bool{}
	for _, e := range gone {
		if options := rule(e).lookups(); len(options) > 0 {
			ed.remove(e, options)
		} else {
			fromRest[e] = true
		}
	}
	if len(fromRest) > 0 {
		ed.index.rest = slices.DeleteFunc(slices.Clone(ix.rest), func(e *Entry) bool { return fromRest[e] })
	}
	for _, e := range added {
		ed.add(e, rule(e).lookups(), ed.size)
	}
	return ed.index
}

// indexEdit changes an index before it is put into a Set.
type indexEdit struct {
	index *index
	// shared says that the index began as the copy of another one. What has
	// been copied since, and may be changed, is in keys (with its shards) and
	// in buckets.
	shared  bool
	keys    map[*keyIndex]*[shards]bool
	buckets map[bucketID]bool
}

// key returns the index of a guard's fact, which may be changed.
func (ed *indexEdit) key(g *guard, key string) *keyIndex {
	k := ed.index.keys[key]
	switch {
	case k == nil:
		k = &keyIndex{fact: g.fact, prefix: g.prefix}
	case !ed.shared || ed.keys[k] != nil:
		return k
	default:
		copied := *k
		k = &copied
	}
	if ed.shared {
		ed.keys[k] = &[shards]bool{}
	}
	ed.index.keys[key] = k
	return k
}

// bucket returns a bucket that may be appended to or changed, and the shard that
// it is to be put into, which may be changed too.
func (ed *indexEdit) bucket(k *keyIndex, id bucketID) (map[guardValue][]*Entry, []*Entry) {
	i := shardOf(id.value)
	shard := k.shards[i]
	if copied := ed.keys[k]; ed.shared && !copied[i] {
		copied[i] = true
		shard = maps.Clone(shard)
	}
	if shard == nil {
		shard = map[guardValue][]*Entry{}
	}
	k.shards[i] = shard
	b := shard[id.value]
	if ed.shared && !ed.buckets[id] {
		ed.buckets[id] = true
		b = slices.Clone(b)
	}
	return shard, b
}

// size returns how full a bucket is.
func (ed *indexEdit) size(id bucketID) int {
	if k := ed.index.keys[id.key]; k != nil {
		return len(k.bucket(id.value))
	}
	return 0
}

// add adds an entry; size says how full a bucket is or will be.
func (ed *indexEdit) add(e *Entry, options [][]guard, size func(bucketID) int) {
	var best []guard
	bestSize := 0
	for _, option := range options {
		total := 0
		for i := range option {
			total += 1 + size(bucketID{option[i].key(), option[i].value})
		}
		if best == nil || total < bestSize {
			best, bestSize = option, total
		}
	}
	if best == nil {
		ed.index.rest = append(ed.index.rest, e)
		return
	}
	for i := range best {
		id := bucketID{best[i].key(), best[i].value}
		k := ed.key(&best[i], id.key)
		shard, b := ed.bucket(k, id)
		if len(b) == 0 {
			k.values++
		}
		if len(b) == 0 || b[len(b)-1] != e { // an option may name a value twice
			b = append(b, e)
		}
		shard[id.value] = b
	}
}

// remove takes an entry out of every bucket that it may be in.
func (ed *indexEdit) remove(e *Entry, options [][]guard) {
	for _, option := range options {
		for i := range option {
			id := bucketID{option[i].key(), option[i].value}
			if k := ed.index.keys[id.key]; k == nil || !slices.Contains(k.bucket(id.value), e) {
				continue
			}
			k := ed.key(&option[i], id.key)
			shard, b := ed.bucket(k, id)
			b = slices.DeleteFunc(b, func(o *Entry) bool { return o == e })
			if len(b) > 0 {
				shard[id.value] = b
				continue
			}
			delete(shard, id.value)
			if k.values--; k.values == 0 {
				delete(ed.index.keys, id.key)
			}
		}
	}
}

// lookups returns the options of a rule; none if there is no rule.
func (x *expr) lookups() [][]guard {
	if x == nil {
		return nil
	}
	return x.options
}

// match returns the entries whose rule is true, sorted by name. No rule is true.
// A rule that many entries have is evaluated once.
func (ix *index) match(f *Facts, rule func(*Entry) *expr) []*Entry {
	var found []*Entry
	known := map[*expr]bool{nil: true}
	try := func(entries []*Entry) {
		for _, e := range entries {
			x := rule(e)
			holds, ok := known[x]
			if !ok {
				holds = x.holds(f)
				known[x] = holds
			}
			if holds {
				found = append(found, e)
			}
		}
	}
	for _, k := range ix.keys {
		try(k.candidates(f))
	}
	try(ix.rest)
	slices.SortFunc(found, byName)
	return slices.Compact(found) // an entry may have been found by two facts
}

// candidates returns the entries that the fact's value leads to.
func (k *keyIndex) candidates(f *Facts) []*Entry {
	v, err := k.fact.get(f)
	if err != nil {
		return nil
	}
	var value guardValue
	switch v := v.(type) {
	case types.String:
		value.text = string(v)
	case string:
		value.text = v
	case types.Int:
		value.number = int64(v)
	}
	if k.prefix != whole {
		if len(value.text) < k.prefix {
			return nil
		}
		value.text = value.text[:k.prefix]
	}
	return k.bucket(value)
}
