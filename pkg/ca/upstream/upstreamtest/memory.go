package upstreamtest

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

// Memory is an upstream CA in memory, for the tests of those who use one: how it
// behaves, and which CA it is, can change at any time. All methods may be called
// concurrently.
type Memory struct {
	Limits upstream.Capabilities

	mu        sync.Mutex // guards what follows
	authority *Authority
	behaviour Behaviour
	extra     []*x509.Certificate
	calls     int
	changed   chan struct{} // closed when authority or extra is replaced
}

// NewMemory returns a CA that answers as a does and behaves as b.
func NewMemory(a *Authority, b Behaviour) *Memory {
	return &Memory{authority: a, behaviour: b, changed: make(chan struct{})}
}

// Become replaces the CA. Roots of others that it announces, beside its own, are
// in extra.
func (m *Memory) Become(a *Authority, b Behaviour, extra ...*x509.Certificate) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.authority, m.behaviour, m.extra = a, b, extra
	close(m.changed)
	m.changed = make(chan struct{})
}

// Calls returns how often something was asked for.
func (m *Memory) Calls() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls
}

// Capabilities returns Limits.
func (m *Memory) Capabilities() upstream.Capabilities { return m.Limits }

// Mint implements upstream.CA.
func (m *Memory) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	return m.answer(ctx, r, (*Authority).Answer)
}

// SignLeaf implements upstream.LeafSigner.
func (m *Memory) SignLeaf(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	return m.answer(ctx, r, (*Authority).Leaf)
}

func (m *Memory) answer(ctx context.Context, r *upstream.Request, answer func(*Authority, []byte, time.Duration) (chain, roots []*x509.Certificate)) (*upstream.Minted, error) {
	m.mu.Lock()
	m.calls++
	a, b, extra := m.authority, m.behaviour, m.extra
	m.mu.Unlock()
	switch b { //nolint:exhaustive // the others are answers
	case Slow:
		<-ctx.Done()
		return nil, fmt.Errorf("%w: %w", upstream.ErrUnavailable, context.Cause(ctx))
	case RateLimited:
		return nil, &upstream.RateLimitError{RetryAfter: RetryAfter, Err: errors.New("too many requests")}
	case Denied:
		return nil, fmt.Errorf("%w: not for you", upstream.ErrDenied)
	case Gone:
		return nil, fmt.Errorf("%w: connection refused", upstream.ErrUnavailable)
	case Garbage:
		return nil, errors.New("the answer is not JSON")
	}
	chain, roots := answer(a, r.CSR, r.TTL)
	return &upstream.Minted{Chain: chain, Roots: append(roots, extra...)}, nil
}

// WatchRoots implements upstream.RootWatcher.
func (m *Memory) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	for {
		m.mu.Lock()
		roots, next := append([]*x509.Certificate{m.authority.Root}, m.extra...), m.changed
		m.mu.Unlock()
		if err := changed(roots); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-next:
		}
	}
}
