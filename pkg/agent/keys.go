package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/internal/pkcs10"
)

const (
	// poolSize is how many keys are kept ready, in memory: a burst of first
	// X.509-SVIDs does not wait for them. One has a kilobyte.
	poolSize = 256
	// calm is how long no key was wanted before the pool is filled again: in a
	// burst the processors have better things to do.
	calm = 250 * time.Millisecond
)

// keyPair is a fresh key and the CSR that proves its possession. It is used once.
type keyPair struct {
	key *ecdsa.PrivateKey
	csr []byte
}

// newKeyPair makes a P-256 key, which never leaves this process in clear, and a
// CSR that says nothing: all but the public key is the CA's business.
func newKeyPair() (*keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	csr, err := pkcs10.Sign(key, pkcs10.Names{})
	if err != nil {
		return nil, fmt.Errorf("create CSR: %w", err)
	}
	// crypto/ecdsa remembers as much again about a key that has signed, for as long as
	// it is at the same address. This one signs no more here.
	delivered := *key
	return &keyPair{key: &delivered, csr: csr}, nil
}

// keyPool keeps some key pairs ready.
type keyPool struct {
	ready chan *keyPair
	taken chan struct{} // capacity 1: one was wanted
	took  prometheus.Observer
}

func newKeyPool(took prometheus.Observer) *keyPool {
	return &keyPool{ready: make(chan *keyPair, poolSize), taken: make(chan struct{}, 1), took: took}
}

// Run fills the pool, and again whenever it has been calm after one was taken, until
// ctx ends.
func (p *keyPool) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.taken:
			timer.Reset(calm)
		case <-timer.C:
			if err := p.fill(ctx); err != nil {
				return err
			}
		}
	}
}

// fill makes keys until there is room for no more, or one is wanted.
func (p *keyPool) fill(ctx context.Context) error {
	for len(p.taken) == 0 && ctx.Err() == nil {
		k, err := p.generate()
		if err != nil {
			return err
		}
		select {
		case p.ready <- k:
		default:
			return nil
		}
	}
	return nil
}

// take returns a key pair that nobody else has been given.
func (p *keyPool) take() (*keyPair, error) {
	signal(p.taken)
	select {
	case k := <-p.ready:
		return k, nil
	default:
		return p.generate()
	}
}

func (p *keyPool) generate() (*keyPair, error) {
	start := time.Now()
	k, err := newKeyPair()
	if err == nil {
		p.took.Observe(time.Since(start).Seconds())
	}
	return k, err
}
