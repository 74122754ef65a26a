package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/pkg/ca/keys"
)

// hsm is a key store that can be away or slow.
type hsm struct {
	keys.Store
	away atomic.Bool
	slow atomic.Int64 // time.Duration of a signature
}

func (h *hsm) answer() error {
	if h.away.Load() {
		return fmt.Errorf("token not present: %w", keys.ErrUnavailable)
	}
	return nil
}

func (h *hsm) Create(ctx context.Context, name string) (crypto.Signer, string, error) {
	if err := h.answer(); err != nil {
		return nil, "", err
	}
	signer, ref, err := h.Store.Create(ctx, name)
	return &hsmSigner{signer, h}, ref, err
}

func (h *hsm) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if err := h.answer(); err != nil {
		return nil, err
	}
	signer, err := h.Store.Open(ctx, ref)
	return &hsmSigner{signer, h}, err
}

type hsmSigner struct {
	crypto.Signer
	h *hsm
}

func (s *hsmSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	time.Sleep(time.Duration(s.h.slow.Load()))
	if err := s.h.answer(); err != nil {
		return nil, err
	}
	return s.Signer.Sign(random, digest, opts)
}

// issues proves that the CA issues what verifies.
func (f *fixture) issues(t *testing.T) {
	t.Helper()
	now := time.Now()
	leaf, intermediate, _ := f.issue(t, now, &Request{ID: id("/app"), Key: parseKey(t, newKey(t))})
	if err := f.verify(now, leaf, intermediate); err != nil {
		t.Error(err)
	}
}

// Fault F28: started while the HSM is away, the CA is there, says that it cannot
// sign, and signs as soon as the HSM is back.
func TestFault_F28_AwayAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, h := &memoryStore{}, &hsm{Store: keys.Memory()}
		first := open(t, Config{Store: store, Keys: h})
		before, sequence := first.Bundle()
		h.away.Store(true)
		f := open(t, Config{Store: store, Keys: h})
		f.run(t)
		if after, s := f.Bundle(); len(after) != 1 || !after[0].Equal(before[0]) || s != sequence {
			t.Errorf("another bundle: sequence %d", s)
		}
		if _, err := f.Sign(time.Now(), &Request{ID: id("/app"), Key: parseKey(t, newKey(t))}); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("Sign = %v", err)
		}
		if _, failure := f.Health(time.Now()); failure == nil || !strings.Contains(failure.Error(), "token not present") {
			t.Errorf("health: %v", failure)
		}
		if err := f.CheckRootKey(); !errors.Is(err, keys.ErrUnavailable) {
			t.Errorf("CheckRootKey = %v", err)
		}
		h.away.Store(false)
		time.Sleep(longestRetry)
		synctest.Wait()
		f.issues(t)
		if warning, failure := f.Health(time.Now()); warning != nil || failure != nil {
			t.Errorf("health: %v, %v", warning, failure)
		}
		if err := f.CheckRootKey(); err != nil {
			t.Error(err)
		}
	})
}

// Fault F28: removed while the CA runs, the HSM is missed when the intermediate is
// renewed, and leaves are signed until it ends.
func TestFault_F28_RemovedWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hsm{Store: keys.Memory()}
		f := open(t, Config{Keys: h})
		f.run(t)
		h.away.Store(true)
		if err := f.CheckRootKey(); !errors.Is(err, keys.ErrUnavailable) {
			t.Errorf("CheckRootKey = %v", err)
		}
		time.Sleep(DefaultIntermediateLife * 3 / 4)
		f.issues(t)
		if warning, failure := f.Health(time.Now()); failure != nil || warning == nil || !strings.Contains(warning.Error(), "token not present") {
			t.Errorf("health: %v, %v", warning, failure)
		}
		time.Sleep(DefaultIntermediateLife / 2)
		if _, failure := f.Health(time.Now()); failure == nil || !strings.Contains(failure.Error(), "token not present") {
			t.Errorf("health: %v", failure)
		}
		h.away.Store(false)
		time.Sleep(longestRetry)
		synctest.Wait()
		f.issues(t)
	})
}

// Fault F28: while an HSM takes its time to sign an intermediate, leaves are issued.
func TestFault_F28_SlowHSMHoldsUpNoLeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &hsm{Store: keys.Memory()}
		f := open(t, Config{Keys: h})
		h.slow.Store(int64(5 * time.Second))
		rotated := make(chan error, 1)
		go func() {
			_, err := f.RotateIntermediate(t.Context())
			rotated <- err
		}()
		synctest.Wait() // it waits for the HSM now
		start := time.Now()
		f.issues(t)
		if took := time.Since(start); took != 0 {
			t.Errorf("a leaf waited for %v", took)
		}
		select {
		case err := <-rotated:
			t.Fatalf("the HSM was not asked: %v", err)
		default:
		}
		if err := <-rotated; err != nil {
			t.Error(err)
		}
	})
}

// Row K6: a root of each kind of key signs intermediates that verify.
func TestV_K6_RootKeyKinds(t *testing.T) {
	for _, kind := range []keys.Kind{keys.P256, keys.P384, keys.RSA3072, keys.Ed25519} {
		t.Run(string(kind), func(t *testing.T) {
			ks, err := keys.New("file:", keys.Options{Dir: t.TempDir() + "/keys", Kind: kind})
			if err != nil {
				t.Fatal(err)
			}
			store := &memoryStore{}
			open(t, Config{Keys: ks, Store: store}).issues(t)
			open(t, Config{Keys: ks, Store: store}).issues(t)
		})
	}
}
