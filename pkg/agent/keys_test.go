package agent

import (
	"context"
	"crypto/x509"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The CSR is what crypto/x509 reads, proves the key, and says nothing else.
func TestNewKeyPair(t *testing.T) {
	pair, err := newKeyPair()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(pair.csr)
	if err != nil {
		t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil {
		t.Error(err)
	}
	if csr.SignatureAlgorithm != x509.ECDSAWithSHA256 || !pair.key.PublicKey.Equal(csr.PublicKey) {
		t.Errorf("signed with %v, for %v", csr.SignatureAlgorithm, csr.PublicKey)
	}
	if len(csr.Subject.Names)+len(csr.Extensions)+len(csr.URIs)+len(csr.DNSNames) > 0 || csr.Version != 0 {
		t.Errorf("says %+v", csr)
	}
}

// The pool is full when nobody wants a key, is filled again when it has been calm,
// and gives no key twice, also when it is empty.
func TestKeyPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newKeyPool(prometheus.ObserverFunc(func(float64) {}))
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { ended <- p.Run(ctx) }()
		synctest.Wait()
		if n := len(p.ready); n != poolSize {
			t.Fatalf("%d keys are ready, not %d", n, poolSize)
		}
		seen := make(map[string]bool)
		for range poolSize + 10 {
			k, err := p.take()
			if err != nil {
				t.Fatal(err)
			}
			if seen[string(k.csr)] {
				t.Fatal("a key was given twice")
			}
			seen[string(k.csr)] = true
		}
		synctest.Wait()
		if n := len(p.ready); n != 0 {
			t.Errorf("%d keys were made in a burst", n)
		}
		time.Sleep(2 * calm) // of the bubble
		synctest.Wait()
		if n := len(p.ready); n != poolSize {
			t.Errorf("%d keys are ready after the burst", n)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
