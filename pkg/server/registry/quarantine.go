package registry

import (
	"bytes"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"
)

// Quarantine says that an identity, a key or a certificate is refused: one of the
// first three fields is set. It is immutable.
type Quarantine struct {
	SPIFFEID string
	// KeySHA256 is that of the public key (SubjectPublicKeyInfo).
	KeySHA256 []byte
	Serial    []byte
	Reason    string
	CreatedBy string
	CreatedAt time.Time
}

// Name says what is refused; no two quarantines have the same.
func (q *Quarantine) Name() string {
	switch {
	case q.SPIFFEID != "":
		return q.SPIFFEID
	case len(q.KeySHA256) > 0:
		return keyName(q.KeySHA256)
	default:
		return serialName(q.Serial)
	}
}

func keyName(sum []byte) string { return "key " + hex.EncodeToString(sum) }

func serialName(serial []byte) string {
	return "serial " + hex.EncodeToString(bytes.TrimLeft(serial, "\x00"))
}

// Quarantines are all quarantines of a moment. They are immutable; nil has none.
type Quarantines struct {
	// Sequence grows with each change, over restarts too.
	Sequence uint64

	byName map[string]*Quarantine
}

// Of returns the quarantine of an identity, of a key, given by its SHA-256, or of a
// certificate, in this order. What is empty is not looked for.
func (q *Quarantines) Of(id string, key, serial []byte) (*Quarantine, bool) {
	if q == nil || len(q.byName) == 0 {
		return nil, false
	}
	if found, ok := q.byName[id]; ok {
		return found, true
	}
	if len(key) > 0 {
		if found, ok := q.byName[keyName(key)]; ok {
			return found, true
		}
	}
	if len(serial) > 0 {
		if found, ok := q.byName[serialName(serial)]; ok {
			return found, true
		}
	}
	return nil, false
}

// Get returns the quarantine with a name.
func (q *Quarantines) Get(name string) (*Quarantine, bool) {
	if q == nil {
		return nil, false
	}
	found, ok := q.byName[name]
	return found, ok
}

// Len returns how many there are.
func (q *Quarantines) Len() int {
	if q == nil {
		return 0
	}
	return len(q.byName)
}

// All returns them, the oldest first.
func (q *Quarantines) All() []*Quarantine {
	if q == nil {
		return nil
	}
	return slices.SortedFunc(maps.Values(q.byName), func(a, b *Quarantine) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.Name(), b.Name())
	})
}

// Quarantines returns the quarantines that are in force.
func (r *Registry) Quarantines() *Quarantines { return r.quarantines.Load() }

// ChangeQuarantines puts quarantines into force, and out of it.
func (r *Registry) ChangeQuarantines(now time.Time, add []*Quarantine, lift ...*Quarantine) {
	r.changing.Lock()
	defer r.changing.Unlock()
	old := r.quarantines.Load()
	next := &Quarantines{Sequence: uint64(max(now.UnixNano(), 1)), byName: make(map[string]*Quarantine)}
	if old != nil {
		next.Sequence = max(next.Sequence, old.Sequence+1)
		maps.Copy(next.byName, old.byName)
	}
	for _, q := range add {
		next.byName[q.Name()] = q
	}
	for _, q := range lift {
		delete(next.byName, q.Name())
	}
	r.quarantines.Store(next)
}
