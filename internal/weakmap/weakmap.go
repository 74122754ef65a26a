// Package weakmap keeps what was made of a thing for as long as something else holds that
// thing. It does not know what it keeps.
package weakmap

import (
	"runtime"
	"sync"
	"weak"
)

// Map has a V for each *K for as long as something else holds the *K, which no V may.
// The zero value is empty. It may be used concurrently.
type Map[K, V any] struct {
	mu sync.Mutex // guards m
	m  map[weak.Pointer[K]]*V
}

// Get returns k's value, a new zero one at first.
func (w *Map[K, V]) Get(k *K) *V {
	key := weak.Make(k)
	w.mu.Lock()
	defer w.mu.Unlock()
	if v := w.m[key]; v != nil {
		return v
	}
	if w.m == nil {
		w.m = make(map[weak.Pointer[K]]*V)
	}
	v := new(V)
	w.m[key] = v
	runtime.AddCleanup(k, w.drop, key)
	return v
}

// Len returns how many there are, some of which may go soon.
func (w *Map[K, V]) Len() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.m)
}

func (w *Map[K, V]) drop(key weak.Pointer[K]) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.m, key)
}
