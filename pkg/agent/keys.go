package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// poolSize is how many keys are kept ready: a burst of first X.509-SVIDs does not
// wait for them.
const poolSize = 64

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
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("create CSR: %w", err)
	}
	return &keyPair{key: key, csr: csr}, nil
}

// keyPool keeps some key pairs ready.
type keyPool struct {
	ready chan *keyPair
	took  prometheus.Observer
}

func newKeyPool(took prometheus.Observer) *keyPool {
	return &keyPool{ready: make(chan *keyPair, poolSize), took: took}
}

// Run fills the pool until ctx ends.
func (p *keyPool) Run(ctx context.Context) error {
	for {
		k, err := p.generate()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case p.ready <- k:
		}
	}
}

// take returns a key pair that nobody else has been given.
func (p *keyPool) take() (*keyPair, error) {
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
