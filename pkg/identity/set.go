package identity

import (
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
	admins    map[spiffeid.ID]struct{}
}

// NewSet returns a set of entries. Of several with one name the last one stays.
func NewSet(entries ...*Entry) *Set {
	sorted := slices.Clone(entries)
	slices.SortStableFunc(sorted, byName)
	kept := sorted[:0]
	for i, e := range sorted {
		if i+1 == len(sorted) || sorted[i+1].Name() != e.Name() {
			kept = append(kept, e)
		}
	}
	return build(slices.Clip(kept))
}

// build makes a set of entries that are sorted and have unique names.
func build(sorted []*Entry) *Set {
	return &Set{
		sorted:    sorted,
		nodes:     newIndex(sorted, (*Entry).indexNodes),
		workloads: newIndex(sorted, (*Entry).indexWorkloads),
		admins:    adminIDs(sorted),
	}
}

func byName(a, b *Entry) int { return strings.Compare(a.Name(), b.Name()) }

func (e *Entry) indexNodes() [][]guard     { return e.nodeOptions }
func (e *Entry) indexWorkloads() [][]guard { return e.workloadOptions }

// With returns the set with entries added or replaced, and others removed. The
// receiver stays as it was. A name that is in both is added. A small change of a
// large set shares almost everything with it.
func (s *Set) With(upserts []*Entry, removed []string) *Set {
	changed := make(map[string]*Entry, len(upserts)+len(removed))
	for _, name := range removed {
		changed[name] = nil
	}
	for _, e := range upserts {
		changed[e.Name()] = e
	}
	var added, gone []*Entry
	for _, e := range changed {
		if e != nil {
			added = append(added, e)
		}
	}
	slices.SortFunc(added, byName)

	sorted := make([]*Entry, 0, len(s.sorted)+len(added))
	next := 0
	for _, e := range s.sorted {
		for next < len(added) && added[next].Name() < e.Name() {
			sorted = append(sorted, added[next])
			next++
		}
		if _, ok := changed[e.Name()]; ok {
			gone = append(gone, e)
			continue
		}
		sorted = append(sorted, e)
	}
	sorted = append(sorted, added[next:]...)

	// Many changes are cheaper made at once; that also chooses the index anew.
	if (len(added)+len(gone))*16 > len(sorted) {
		return build(sorted)
	}
	return &Set{
		sorted:    sorted,
		nodes:     s.nodes.with(added, gone, (*Entry).indexNodes),
		workloads: s.workloads.with(added, gone, (*Entry).indexWorkloads),
		admins:    adminIDs(sorted),
	}
}

// Get returns the entry with a name.
func (s *Set) Get(name string) (*Entry, bool) {
	i, ok := slices.BinarySearchFunc(s.sorted, name, func(e *Entry, name string) int { return strings.Compare(e.Name(), name) })
	if !ok {
		return nil, false
	}
	return s.sorted[i], true
}

// Len returns the number of entries.
func (s *Set) Len() int { return len(s.sorted) }

// All returns the entries, sorted by name.
func (s *Set) All() iter.Seq[*Entry] { return slices.Values(s.sorted) }

// AdminID reports whether an entry with admin: true gives this SPIFFE ID. No
// other entry may be allowed to give it: an ID is all that a certificate says.
func (s *Set) AdminID(id spiffeid.ID) bool {
	_, ok := s.admins[id]
	return ok
}

// MatchNode returns the entries for a node, sorted by name. The caller owns the
// slice.
func (s *Set) MatchNode(f *Facts) []*Entry {
	if f == nil || f.node == nil {
		return nil
	}
	return s.nodes.match(f, (*Entry).MatchNode)
}

// MatchWorkload returns the entries whose workload rule is true, sorted by name,
// whatever the node is. The caller owns the slice.
func (s *Set) MatchWorkload(f *Facts) []*Entry {
	if f == nil || f.workload == nil {
		return nil
	}
	return s.workloads.match(f, (*Entry).MatchWorkload)
}

func adminIDs(entries []*Entry) map[spiffeid.ID]struct{} {
	ids := map[spiffeid.ID]struct{}{}
	for _, e := range entries {
		if e.Admin() {
			ids[e.staticID] = struct{}{}
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

// keyIndex are the entries that are found by one fact.
type keyIndex struct {
	fact    *factRef
	prefix  int
	buckets map[guardValue][]*Entry
}

// bucketID names a bucket.
type bucketID struct {
	key   string
	value guardValue
}

// newIndex puts each entry under the option that it shares with the fewest
// others.
func newIndex(entries []*Entry, options func(*Entry) [][]guard) *index {
	counts := map[bucketID]int{}
	for _, e := range entries {
		for _, option := range options(e) {
			for i := range option {
				counts[bucketID{option[i].key(), option[i].value}]++
			}
		}
	}
	ix := &index{keys: map[string]*keyIndex{}}
	for _, e := range entries {
		ix.add(e, options(e), func(id bucketID) int { return counts[id] }, func(k *keyIndex) *keyIndex { return k })
	}
	return ix
}

// with returns a changed copy. What was not changed is shared.
func (ix *index) with(added, gone []*Entry, options func(*Entry) [][]guard) *index {
	n := &index{keys: maps.Clone(ix.keys), rest: ix.rest}
	own := map[*keyIndex]bool{}
	mine := func(k *keyIndex) *keyIndex {
		if own[k] {
			return k
		}
		c := &keyIndex{fact: k.fact, prefix: k.prefix, buckets: maps.Clone(k.buckets)}
		own[c] = true
		return c
	}
	if slices.ContainsFunc(gone, func(e *Entry) bool { return len(options(e)) == 0 }) {
		n.rest = slices.DeleteFunc(slices.Clone(n.rest), func(e *Entry) bool { return slices.Contains(gone, e) })
	} else {
		n.rest = slices.Clip(n.rest)
	}
	for _, e := range gone {
		n.remove(e, options(e), mine)
	}
	size := func(id bucketID) int {
		if k := n.keys[id.key]; k != nil {
			return len(k.buckets[id.value])
		}
		return 0
	}
	for _, e := range added {
		n.add(e, options(e), size, mine)
	}
	return n
}

// add adds an entry. size estimates how full a bucket is or will be; mine makes
// a keyIndex writable.
func (ix *index) add(e *Entry, options [][]guard, size func(bucketID) int, mine func(*keyIndex) *keyIndex) {
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
		ix.rest = append(ix.rest, e)
		return
	}
	for i := range best {
		g := &best[i]
		key := g.key()
		k := ix.keys[key]
		if k == nil {
			k = &keyIndex{fact: g.fact, prefix: g.prefix, buckets: map[guardValue][]*Entry{}}
		}
		k = mine(k)
		ix.keys[key] = k
		if bucket := k.buckets[g.value]; !slices.Contains(bucket, e) {
			// Clipped, so that a bucket shared with another set is copied.
			k.buckets[g.value] = append(slices.Clip(bucket), e)
		}
	}
}

// remove takes an entry out of every bucket that it may be in.
func (ix *index) remove(e *Entry, options [][]guard, mine func(*keyIndex) *keyIndex) {
	for _, option := range options {
		for i := range option {
			g := &option[i]
			k := ix.keys[g.key()]
			if k == nil || !slices.Contains(k.buckets[g.value], e) {
				continue
			}
			k = mine(k)
			ix.keys[g.key()] = k
			left := slices.DeleteFunc(slices.Clone(k.buckets[g.value]), func(o *Entry) bool { return o == e })
			if len(left) > 0 {
				k.buckets[g.value] = left
				continue
			}
			if delete(k.buckets, g.value); len(k.buckets) == 0 {
				delete(ix.keys, g.key())
			}
		}
	}
}

// match returns the entries that hold, sorted by name.
func (ix *index) match(f *Facts, holds func(*Entry, *Facts) bool) []*Entry {
	var found []*Entry
	try := func(entries []*Entry) {
		for _, e := range entries {
			if holds(e, f) {
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
	return k.buckets[value]
}
