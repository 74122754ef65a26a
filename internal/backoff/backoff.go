// Package backoff answers how long to wait before the next attempt: full
// jitter over an exponentially growing bound, so that many who failed together
// do not come back together. It does not know what is attempted.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Policy says how the bound grows. The zero value is not useful.
type Policy struct {
	// Base bounds the first wait, Max all of them.
	Base, Max time.Duration
}

// Bound returns the longest wait after the given number of failures: Base after
// the first, doubling with each further one up to Max. Numbers below 1 count
// as 1.
func (p Policy) Bound(failures int) time.Duration {
	d := min(p.Base, p.Max)
	for range min(failures, 64) - 1 {
		if d >= p.Max/2 {
			return p.Max
		}
		d *= 2
	}
	return d
}

// Delay returns the wait after the given number of failures. random is a number
// in [0, 1) that the caller drew; the result grows with it from 0 to Bound.
func (p Policy) Delay(failures int, random float64) time.Duration {
	return time.Duration(float64(p.Bound(failures)) * random)
}

// Backoff counts failures under a policy. It is not safe for concurrent use.
type Backoff struct {
	policy   Policy
	failures int
}

// New returns a back-off that has counted no failure.
func New(p Policy) *Backoff { return &Backoff{policy: p} }

// Next counts one failure and returns how long to wait before the next attempt.
func (b *Backoff) Next() time.Duration {
	b.failures++
	return b.policy.Delay(b.failures, rand.Float64()) //nolint:gosec // jitter is no secret
}

// Failures returns the number of failures since the last Reset.
func (b *Backoff) Failures() int { return b.failures }

// Reset is called after a success.
func (b *Backoff) Reset() { b.failures = 0 }

// Wait waits for d, or until ctx ends and then returns the reason.
func Wait(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
