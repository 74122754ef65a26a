package keys

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"
)

// remote is a store of keys in a device or service that may be away, slow, or hang.
//
// One operation runs at a time. It is given up after a timeout; as there is no way
// to interrupt a device's library, it then goes on by itself, and until it has ended
// nothing else is asked. After a failure the connection is made anew, so that a
// device that was removed is found again when it is back.
type remote struct {
	scheme  string
	driver  driver
	uri     *uri.URI
	options Options
	files   *file // keys that were made before the device was configured

	busy chan struct{} // holds one token while an operation runs; it guards what follows
	open session
	// used is the hash of the PIN of this session, refused that of one that was refused.
	// It is not tried again: devices lock themselves after a few attempts.
	used    [sha256.Size]byte
	refused *[sha256.Size]byte
}

func (r *remote) Create(ctx context.Context, name string) (crypto.Signer, string, error) {
	if err := checkName(name); err != nil {
		return nil, "", err
	}
	type made struct {
		ref    string
		public crypto.PublicKey
	}
	m, err := do(r, ctx.Done(), max(r.timeout(), createTimeout), func(s session) (m made, err error) {
		m.ref, m.public, err = s.create(name, r.options.Kind)
		return m, err
	})
	if err != nil {
		return nil, "", fmt.Errorf("create key %q in %s: %w", name, r.scheme, err)
	}
	return &remoteSigner{store: r, ref: m.ref, public: m.public}, m.ref, nil
}

// Open finds the key, and fails if it is not there.
func (r *remote) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if strings.HasPrefix(ref, fileScheme+":") {
		return r.files.Open(ctx, ref)
	}
	if _, err := cutReference(r.scheme, ref); err != nil {
		return nil, err
	}
	public, err := do(r, ctx.Done(), r.timeout(), func(s session) (crypto.PublicKey, error) {
		signer, err := s.open(ref)
		if err != nil {
			return nil, err
		}
		return signer.Public(), nil
	})
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, err)
	}
	return &remoteSigner{store: r, ref: ref, public: public}, nil
}

func (r *remote) timeout() time.Duration {
	if r.options.Timeout > 0 {
		return r.options.Timeout
	}
	return defaultTimeout
}

// remoteSigner signs with a key of a remote store. It may be used concurrently.
type remoteSigner struct {
	store  *remote
	ref    string
	public crypto.PublicKey
}

func (s *remoteSigner) Public() crypto.PublicKey { return s.public }

// Sign finds the key anew each time: another one of its name is not used.
func (s *remoteSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := do(s.store, nil, s.store.timeout(), func(open session) ([]byte, error) {
		signer, err := open.open(s.ref)
		if err != nil {
			return nil, err
		}
		if pub, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(s.public) {
			return nil, fmt.Errorf("another key is in its place: %w", ErrNotFound)
		}
		return signer.Sign(random, digest, opts)
	})
	if err != nil {
		return nil, fmt.Errorf("sign with key %s: %w", s.ref, err)
	}
	return signature, nil
}

// do runs op with a session, and waits for it no longer than timeout or until done.
// Every error but ErrExists and ErrNotFound wraps ErrUnavailable.
func do[T any](r *remote, done <-chan struct{}, timeout time.Duration, op func(session) (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	var none T
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	late := func(what string) (T, error) {
		return none, fmt.Errorf("%s after %v: %w", what, timeout, ErrUnavailable)
	}
	select {
	case r.busy <- struct{}{}:
	case <-done:
		return late("given up")
	case <-deadline.C:
		return late("an earlier operation has not ended")
	}
	ended := make(chan outcome, 1)
	go func() { // it owns the token of busy, and ends when the device's library returns
		defer func() { <-r.busy }()
		var o outcome
		if o.err = r.connect(); o.err == nil {
			o.value, o.err = op(r.open)
		}
		if o.err != nil {
			o.err = r.failed(o.err)
		}
		ended <- o
	}()
	select {
	case o := <-ended:
		return o.value, o.err
	case <-done:
		return late("given up")
	case <-deadline.C:
		return late("no answer")
	}
}

// connect opens a session if there is none. The caller has the token of busy.
func (r *remote) connect() error {
	if r.open != nil {
		return nil
	}
	t := target{uri: r.uri, dir: r.options.Dir}
	var hash [sha256.Size]byte
	if r.options.Secret != "" {
		secret, err := readSecret(r.options.Secret)
		if err != nil {
			return err
		}
		defer clear(secret)
		if hash = sha256.Sum256(secret); r.refused != nil && *r.refused == hash {
			return fmt.Errorf("%s holds what was refused before, and is not tried again before it changes, so that the device does not lock: %w", r.options.Secret, ErrRefused)
		}
		t.secret = secret
	}
	opened, err := r.driver.open(t)
	if errors.Is(err, ErrRefused) {
		r.refused = &hash
	}
	if err != nil {
		return err
	}
	r.open, r.used, r.refused = opened, hash, nil
	return nil
}

// failed closes the session, unless the failure is an answer, and says what kind of
// failure it is. The caller has the token of busy.
func (r *remote) failed(err error) error {
	switch _, exists := errors.AsType[apiv1.AlreadyExistsError](err); {
	case exists:
		return fmt.Errorf("%w: %w", ErrExists, err)
	case errors.Is(err, ErrExists):
		return err
	}
	if r.open != nil {
		if errors.Is(err, ErrRefused) { // by a device that looks at the PIN when it signs
			used := r.used
			r.refused = &used
		}
		err = errors.Join(err, r.open.close())
		r.open = nil
	}
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", err, ErrUnavailable)
}

// Reachable says whether the device or service of a store answers and takes the PIN.
// It is nil for stores without one.
func Reachable(ctx context.Context, s Store) error {
	r, ok := s.(*remote)
	if !ok {
		return nil
	}
	if _, err := do(r, ctx.Done(), r.timeout(), func(session) (struct{}, error) { return struct{}{}, nil }); err != nil {
		return fmt.Errorf("ask %s: %w", r.scheme, err)
	}
	return nil
}
