package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/identity"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// FuzzSVID: whatever the CA sends in place of an X.509-SVID, the agent neither
// panics nor takes one that is for another ID or key.
func FuzzSVID(f *testing.F) {
	root := newAuthority(f, "root", nil)
	intermediate := newAuthority(f, "intermediate", root)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	id, err := identity.ParseID("spiffe://example.org/web")
	if err != nil {
		f.Fatal(err)
	}
	good, err := intermediate.sign(key.Public(), leaf{uris: []string{id.String()}, ttl: time.Hour})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, intermediate.cert.Raw)
	f.Add(intermediate.cert.Raw, good)
	f.Add([]byte{}, []byte{0x30})
	parser := &certificates{}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		chain, err := parser.chain([][]byte{first, second})
		if err != nil {
			return
		}
		_, err = parser.verify(time.Now(), chain, []*x509.Certificate{root.cert}, expectation{
			key: key, id: exactly(id), usage: x509.ExtKeyUsageClientAuth, maxLife: 2 * time.Hour,
		})
		if err != nil {
			return
		}
		if uri, err := uriSAN(chain[0]); err != nil || uri != id.String() || !key.PublicKey.Equal(chain[0].PublicKey) {
			t.Errorf("accepted %q, %v", uri, err)
		}
	})
}

// FuzzBundle: a bundle that is accepted has at least one root, all of them of
// this trust domain.
func FuzzBundle(f *testing.F) {
	root := newAuthority(f, "root", nil)
	f.Add("example.org", root.cert.Raw)
	f.Add("", []byte{})
	f.Fuzz(func(t *testing.T, td string, der []byte) {
		b, err := parseBundle(testTD, &nodev1.Bundle{TrustDomain: td, Sequence: 1, Roots: [][]byte{der}})
		if err != nil {
			return
		}
		if len(b.Roots) != 1 || td != testTD.Name() || !b.Roots[0].IsCA {
			t.Errorf("accepted %+v", b)
		}
	})
}
