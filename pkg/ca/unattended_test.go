package ca

import (
	"context"
	"crypto"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
)

// proxy is one end of the mesh: it has an X.509-SVID and a trust bundle, which are
// as old as its streams are slow.
type proxy struct {
	name string

	mu       sync.Mutex // guards what follows
	svid     *x509svid.SVID
	root     string
	renewAt  time.Time
	bundle   *x509bundle.Bundle
	sequence uint64
	late     time.Time // until then it takes no bundle
	current  uint64    // sequence of the bundle in force in its agent
}

func (p *proxy) node() rotation.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := rotation.Node{ID: p.name, Connected: true, Sequence: p.current, Streams: 1, AckSequence: p.current, Counted: true, Held: map[string]uint32{p.root: 1}}
	if p.sequence >= p.current {
		n.Acknowledged = 1
	}
	return n
}

// follow takes the bundle that is in force, and a new X.509-SVID if it is time.
func (p *proxy) follow(t *testing.T, f *fixture) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	roots, sequence := f.Bundle()
	p.current = sequence
	if now.After(p.late) {
		p.bundle, p.sequence = x509bundle.FromX509Authorities(testDomain, roots), sequence
	}
	if now.Before(p.renewAt) {
		return
	}
	key := newKey(t)
	leaf, above, signed := f.issue(t, now, &Request{ID: id("/" + p.name), Key: parseKey(t, key), TTL: DefaultMaxTTL})
	if life := signed.NotAfter.Sub(now); life < DefaultMaxTTL-2*time.Second {
		t.Errorf("an X.509-SVID lives for %s only", life)
	}
	p.svid = &x509svid.SVID{ID: id("/" + p.name), Certificates: parseAll(t, [][]byte{leaf.Raw, above.Raw}), PrivateKey: crypto.Signer(key)}
	p.renewAt = signed.RenewAt
	p.root = fmt.Sprintf("%x", above.AuthorityKeyId)
}

func (p *proxy) source() (*x509svid.SVID, *x509bundle.Bundle) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.svid, p.bundle
}

// handshake is mutual TLS between two proxies, each with what it has.
func handshake(ctx context.Context, client, server *proxy) error {
	clientSVID, clientBundle := client.source()
	serverSVID, serverBundle := server.source()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() {
		s := tls.Server(b, tlsconfig.MTLSServerConfig(serverSVID, serverBundle, tlsconfig.AuthorizeID(clientSVID.ID)))
		err := s.HandshakeContext(ctx)
		if err == nil {
			_, err = s.Write([]byte{1})
		}
		done <- err
	}()
	c := tls.Client(a, tlsconfig.MTLSClientConfig(clientSVID, clientBundle, tlsconfig.AuthorizeID(serverSVID.ID)))
	err := c.HandshakeContext(ctx)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if err != nil {
		return fmt.Errorf("client %s: %w", client.name, err)
	}
	if err := <-done; err != nil {
		return fmt.Errorf("server %s: %w", server.name, err)
	}
	return nil
}

// Three years without anybody: roots and intermediates rotate by themselves, the CA
// restarts now and then, proxies are late by days. No handshake fails, no X.509-SVID
// is shorter than asked for, and the bundle never has more than three roots.
func TestFault_F27_ThreeYearsUnattended(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		proxies := []*proxy{{name: "a"}, {name: "b"}, {name: "c"}}
		store := &memoryStore{}
		cfg := Config{
			Store: store, Keys: keys.Memory(), RootLife: 90 * 24 * time.Hour,
			Fleet: func() (all []rotation.Node) {
				for _, p := range proxies {
					all = append(all, p.node())
				}
				return all
			},
			OnRetiring: func(root string, _ bool) {
				for _, p := range proxies {
					p.mu.Lock()
					if p.root == root {
						p.renewAt = time.Time{}
					}
					p.mu.Unlock()
				}
			},
		}
		start := func() (*fixture, func()) {
			f := open(t, cfg)
			f.nap = time.Hour
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = f.Run(ctx) })
			return f, func() { cancel(); running.Wait() }
		}
		f, stop := start()
		cfg = f.cfg
		begun, most, handshakes := time.Now(), 0, 0
		for step := 0; time.Since(begun) < 3*365*24*time.Hour; step++ {
			if step%300 == 299 { // a new process
				stop()
				f, stop = start()
			}
			for _, p := range proxies {
				if random.IntN(50) == 0 {
					p.mu.Lock()
					p.late = time.Now().Add(time.Duration(random.IntN(100)) * time.Hour)
					p.mu.Unlock()
				}
				p.follow(t, f)
			}
			s := f.state.Load()
			for i, p := range proxies {
				// All of them while something moves, else one after the other.
				if len(s.roots) == 1 && i != step%len(proxies) {
					continue
				}
				if err := handshake(t.Context(), p, proxies[(i+1)%len(proxies)]); err != nil {
					t.Fatalf("after %s: %v; roots are %s", time.Since(begun), err, states(t, store))
				}
				handshakes++
			}
			most = max(most, len(s.bundle))
			if len(s.bundle) > rotation.MaxRoots {
				t.Fatalf("%d roots in the bundle", len(s.bundle))
			}
			if warning, failure := f.Health(time.Now()); failure != nil {
				t.Fatalf("after %s: %v, %v", time.Since(begun), failure, warning)
			}
			f.FleetChanged()
			time.Sleep(8 * time.Hour)
			synctest.Wait()
		}
		stop()
		if n := len(store.roots); n < 12 {
			t.Errorf("only %d roots in three years", n)
		}
		t.Logf("%d roots one after the other, at most %d in the bundle, %d handshakes, none failed", len(store.roots), most, handshakes)
	})
}
