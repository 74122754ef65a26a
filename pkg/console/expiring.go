package console

import (
	"crypto/sha256"
	"sync"
	"time"
)

// expiring remembers values until they end, at most max of them. They are found by
// the hash of a secret, so that who reads this memory cannot use it.
type expiring[V any] struct {
	max int

	mu  sync.Mutex // guards all
	all map[[32]byte]held[V]
}

type held[V any] struct {
	value V
	ends  time.Time
}

func newExpiring[V any](limit int) *expiring[V] {
	return &expiring[V]{max: limit, all: make(map[[32]byte]held[V])}
}

// keyOf is the key of a secret.
func keyOf(secret string) [32]byte { return sha256.Sum256([]byte(secret)) }

// add adds a value, unless there are too many.
func (e *expiring[V]) add(key [32]byte, value V, now, ends time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forget(now)
	if len(e.all) >= e.max {
		return false
	}
	e.all[key] = held[V]{value, ends}
	return true
}

// displace adds a value. If there are too many, the one that ends first ends now.
func (e *expiring[V]) displace(key [32]byte, value V, now, ends time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forget(now)
	for len(e.all) >= e.max {
		var first [32]byte
		var at time.Time
		for k, v := range e.all {
			if at.IsZero() || v.ends.Before(at) {
				first, at = k, v.ends
			}
		}
		delete(e.all, first)
	}
	e.all[key] = held[V]{value, ends}
}

// forget removes what has ended. The caller holds mu.
func (e *expiring[V]) forget(now time.Time) {
	for k, v := range e.all {
		if !now.Before(v.ends) {
			delete(e.all, k)
		}
	}
}

// get returns a value that has not ended.
func (e *expiring[V]) get(key [32]byte, now time.Time) (value V, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	found, ok := e.all[key]
	if !ok || !now.Before(found.ends) {
		return value, false
	}
	return found.value, true
}

// take removes a value, and returns it if it had not ended.
func (e *expiring[V]) take(key [32]byte, now time.Time) (value V, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	found, ok := e.all[key]
	delete(e.all, key)
	if !ok || !now.Before(found.ends) {
		return value, false
	}
	return found.value, true
}

// count returns how many there are.
func (e *expiring[V]) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.all)
}
