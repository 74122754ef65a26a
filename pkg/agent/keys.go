package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
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
	csr, err := newCSR(key)
	if err != nil {
		return nil, fmt.Errorf("create CSR: %w", err)
	}
	// crypto/ecdsa remembers as much again about a key that has signed, for as long as
	// it is at the same address. This one signs no more here.
	delivered := *key
	return &keyPair{key: &delivered, csr: csr}, nil
}

// oidECDSAWithSHA256 is RFC 5758 §3.2's.
var oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}

// newCSR makes a PKCS #10 request (RFC 2986 §4) without names and attributes. That
// of crypto/x509 verifies each signature that it makes, which costs twice as much as
// all the rest; the CA does so anyway.
func newCSR(key *ecdsa.PrivateKey) ([]byte, error) {
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	var info cryptobyte.Builder
	info.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		nothing := func(*cryptobyte.Builder) {}
		b.AddASN1Int64(0)                           // version 1
		b.AddASN1(cryptobyteasn1.SEQUENCE, nothing) // subject
		b.AddBytes(public)
		b.AddASN1(cryptobyteasn1.Tag(0).ContextSpecific().Constructed(), nothing) // attributes
	})
	signed, err := info.Bytes()
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(signed)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	var request cryptobyte.Builder
	request.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(signed)
		b.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(oidECDSAWithSHA256) })
		b.AddASN1BitString(signature)
	})
	return request.Bytes()
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
