package sds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"time"

	"github.com/meshid/meshid/pkg/identity"
)

// maxTombstones bounds the tombstones that are kept.
const maxTombstones = 1024

// tombstoneNotBefore and tombstoneNotAfter lie so far back that no clock that was
// set wrong brings them to life.
var (
	tombstoneNotBefore = time.Date(1990, time.January, 1, 0, 0, 0, 0, time.UTC)
	tombstoneNotAfter  = tombstoneNotBefore.Add(24 * time.Hour)
)

// graveyard makes tombstones: certificates that have long expired, for the SPIFFE
// IDs of identities that were withdrawn. A proxy keeps a secret through silence,
// errors and removals, but it takes a tombstone for a newer one, and with it no
// handshake succeeds any more. They are signed by a CA that nobody trusts and
// whose key exists only here.
type graveyard struct {
	mu     sync.Mutex // guards what follows
	ca     *x509.Certificate
	caKey  *ecdsa.PrivateKey
	key    *ecdsa.PrivateKey // of all the tombstones: it opens nothing
	serial int64
	known  map[string]*secret
}

func newGraveyard() *graveyard { return &graveyard{known: make(map[string]*secret)} }

// tombstone returns the tombstone of a SPIFFE ID. It is the same one each time,
// unless there are too many.
func (g *graveyard) tombstone(id string) (*secret, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t := g.known[id]; t != nil {
		return t, nil
	}
	if err := g.open(); err != nil {
		return nil, fmt.Errorf("make tombstone: %w", err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		return nil, fmt.Errorf("make tombstone: %w", err)
	}
	g.serial++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          big.NewInt(g.serial),
		NotBefore:             tombstoneNotBefore,
		NotAfter:              tombstoneNotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{uri},
	}, g.ca, g.key.Public(), g.caKey)
	if err != nil {
		return nil, fmt.Errorf("make tombstone of %s: %w", id, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make tombstone of %s: %w", id, err)
	}
	t, err := newLeaf(id, identity.NewCertificates(leaf), g.key)
	if err != nil {
		return nil, err
	}
	t.tombstone = true
	if len(g.known) >= maxTombstones {
		clear(g.known)
	}
	g.known[id] = t
	return t, nil
}

// open makes the CA at first use: most agents never withdraw anything.
func (g *graveyard) open() error {
	if g.ca != nil {
		return nil
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "withdrawn identities"},
		NotBefore:             tombstoneNotBefore,
		NotAfter:              tombstoneNotAfter,
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	g.ca, g.caKey, g.key, g.serial = ca, caKey, key, 1
	return nil
}
