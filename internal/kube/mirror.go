package kube

import (
	"maps"
	"sync"
)

// Mirror is a Reader that keeps all that is in a collection. It may be used
// concurrently.
type Mirror[V any] struct {
	key     func(V) string
	changed func()
	same    func(a, b V) bool

	mu  sync.Mutex // guards what follows
	all map[string]V
}

// NewMirror returns a mirror that keeps values by their key, and calls changed, which
// must not block, when something has changed. same says which changes of a value are
// none; it may be nil.
func NewMirror[V any](key func(V) string, same func(a, b V) bool, changed func()) *Mirror[V] {
	if same == nil {
		same = func(V, V) bool { return false }
	}
	return &Mirror[V]{key: key, same: same, changed: changed, all: make(map[string]V)}
}

// All returns what there is, by its key. The caller owns the map.
func (m *Mirror[V]) All() map[string]V {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.all)
}

// Get returns the value of a key, and the zero value if there is none.
func (m *Mirror[V]) Get(key string) V {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all[key]
}

// Replace implements Reader.
func (m *Mirror[V]) Replace(all []V) {
	m.mu.Lock()
	clear(m.all)
	for _, v := range all {
		m.all[m.key(v)] = v
	}
	m.mu.Unlock()
	m.changed()
}

// Set implements Reader.
func (m *Mirror[V]) Set(v V) {
	m.mu.Lock()
	before, known := m.all[m.key(v)]
	m.all[m.key(v)] = v
	m.mu.Unlock()
	if !known || !m.same(before, v) {
		m.changed()
	}
}

// Delete implements Reader.
func (m *Mirror[V]) Delete(v V) {
	m.mu.Lock()
	delete(m.all, m.key(v))
	m.mu.Unlock()
	m.changed()
}
