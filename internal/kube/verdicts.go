package kube

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"time"
)

// Verdicts remembers what a TokenVerifier said, for callers who are shown the same token
// again and again. That a token was taken back is seen when its verdict is forgotten.
type Verdicts struct {
	verifier TokenVerifier
	life     time.Duration
	size     int

	mu      sync.Mutex // guards what follows
	known   map[[sha256.Size]byte]*verdict
	inOrder [][sha256.Size]byte // as they came, the oldest first
}

// verdict is one answer, for all who ask meanwhile.
type verdict struct {
	done  chan struct{} // closed when what follows is set
	id    *TokenIdentity
	err   error
	until time.Time
}

// NewVerdicts returns a TokenVerifier that remembers at most size verdicts of another,
// each for life and no longer than the token is good. Refusals are remembered as well;
// that it is not known whether a token is good is not.
func NewVerdicts(v TokenVerifier, size int, life time.Duration) *Verdicts {
	return &Verdicts{verifier: v, life: life, size: max(size, 1), known: make(map[[sha256.Size]byte]*verdict)}
}

// Verify implements TokenVerifier. Of those who ask for the same token at the same time,
// one has it verified.
func (v *Verdicts) Verify(ctx context.Context, token, audience string) (*TokenIdentity, error) {
	// A token cannot have a NUL in it that counts.
	key := sha256.Sum256([]byte(audience + "\x00" + token))
	for {
		now := time.Now()
		v.mu.Lock()
		found := v.known[key]
		if found == nil {
			found = v.begin(key)
			v.mu.Unlock()
			v.fill(ctx, key, found, token, audience)
			return found.id, found.err
		}
		v.mu.Unlock()
		select {
		case <-found.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		switch {
		case now.Before(found.until):
			return found.id, found.err
		case !errors.Is(found.err, context.Canceled) && !found.until.IsZero():
			v.forget(key, found) // it was good for long enough
		case found.err != nil && !errors.Is(found.err, context.Canceled):
			return nil, found.err // nobody knows, which is not remembered
		}
	}
}

// begin makes room for a verdict. v.mu is held.
func (v *Verdicts) begin(key [sha256.Size]byte) *verdict {
	for len(v.inOrder) >= v.size { // also those that were forgotten since
		delete(v.known, v.inOrder[0])
		v.inOrder = v.inOrder[1:]
	}
	found := &verdict{done: make(chan struct{})}
	v.known[key] = found
	v.inOrder = append(v.inOrder, key)
	return found
}

// fill has a token verified.
func (v *Verdicts) fill(ctx context.Context, key [sha256.Size]byte, found *verdict, token, audience string) {
	found.id, found.err = v.verifier.Verify(ctx, token, audience)
	switch {
	case found.err == nil:
		found.until = time.Now().Add(v.life)
		if found.id.ExpiresAt.Before(found.until) {
			found.until = found.id.ExpiresAt
		}
	case errors.Is(found.err, ErrToken):
		found.until = time.Now().Add(v.life)
	default:
		v.forget(key, found)
	}
	close(found.done)
}

// forget takes a verdict out.
func (v *Verdicts) forget(key [sha256.Size]byte, found *verdict) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.known[key] == found {
		delete(v.known, key)
	}
}
