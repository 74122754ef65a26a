package ca

import (
	"encoding/binary"
	"hash/maphash"
	"sync"
	"time"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// maxLiveKeys bounds the memory of liveKeys: some 50 MB, a million live leaves.
const maxLiveKeys = 1 << 20

// liveKeys remembers which workload instance has a live certificate for which
// public key, so that a key which turns up in a second instance is refused: one
// of the two is not its owner's. It covers what this process has signed.
//
// It has two generations a shard. The older one is dropped when the newer one is
// as old as the longest life, so nothing that lives is forgotten; except that a
// full generation is replaced at once. Locks are held for one map access.
type liveKeys struct {
	life   int64 // seconds
	limit  int   // of one generation of one shard
	seed   maphash.Seed
	shards [64]liveShard
}

type liveShard struct {
	mu           sync.Mutex // guards what follows
	newer, older map[keyPrefix]holder
	since        int64 // when newer was begun
	_            [24]byte
}

// keyPrefix is half of a SHA-256: two keys with the same one cost 2^64 to find
// and would only make the one who found them refused.
type keyPrefix [16]byte

type holder struct {
	owner    uint64
	notAfter int64
}

func newLiveKeys(life time.Duration, limit int) *liveKeys {
	l := &liveKeys{life: int64(life/time.Second) + 1, seed: maphash.MakeSeed()}
	l.limit = max(limit/2/len(l.shards), 1)
	for i := range l.shards {
		l.shards[i].newer = make(map[keyPrefix]holder)
	}
	return l
}

// owner identifies the instance that a record is about.
func (l *liveKeys) owner(r *ledgerv1.Record) uint64 {
	var h maphash.Hash
	h.SetSeed(l.seed)
	node, instance := r.GetNode().GetId(), r.GetInstance()
	if node == "" && instance == "" {
		// Nothing tells instances apart: each identity is one.
		_, _ = h.WriteString(r.GetSpiffeId())
		_ = h.WriteByte(1)
		return h.Sum64()
	}
	_, _ = h.WriteString(node)
	_ = h.WriteByte(0)
	_, _ = h.WriteString(instance)
	return h.Sum64()
}

// claim reports whether owner may have a certificate for the key that lives
// until notAfter, and remembers it if so.
func (l *liveKeys) claim(key *[32]byte, owner uint64, now, notAfter int64) bool {
	prefix := keyPrefix(key[:16])
	shard := &l.shards[binary.LittleEndian.Uint16(key[16:])%uint16(len(l.shards))]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if age := now - shard.since; age > l.life || age < -l.life || len(shard.newer) >= l.limit {
		shard.older, shard.newer, shard.since = shard.newer, make(map[keyPrefix]holder), now
	}
	known, ok := shard.newer[prefix]
	if !ok {
		known, ok = shard.older[prefix]
	}
	if ok && known.owner != owner && known.notAfter >= now {
		return false
	}
	if ok && known.owner == owner {
		notAfter = max(notAfter, known.notAfter)
	}
	shard.newer[prefix] = holder{owner: owner, notAfter: notAfter}
	return true
}
