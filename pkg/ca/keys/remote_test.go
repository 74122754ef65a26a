package keys

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.step.sm/crypto/kms/uri"
)

// device is a token that can be removed, hang, and refuse PINs.
type device struct {
	mu     sync.Mutex // guards what follows
	keys   map[string]crypto.Signer
	pin    string
	gone   bool
	hang   chan struct{} // non-nil: signatures wait for it
	logins int
}

func (d *device) set(change func(*device)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(d)
}

var errGone = errors.New("CKR_DEVICE_REMOVED")

func (d *device) login(t target) (session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.logins++
	switch {
	case d.gone:
		return nil, errGone
	case string(t.secret) != d.pin:
		return nil, errors.Join(errors.New("CKR_PIN_INCORRECT"), ErrRefused)
	}
	return &deviceSession{d}, nil
}

type deviceSession struct{ d *device }

func (s *deviceSession) create(name string, kind Kind) (string, crypto.PublicKey, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.keys["hsm:"+name] != nil {
		return "", nil, ErrExists
	}
	key, err := kind.Generate()
	if err != nil {
		return "", nil, err
	}
	s.d.keys["hsm:"+name] = key
	return "hsm:" + name, key.Public(), nil
}

func (s *deviceSession) open(ref string) (crypto.Signer, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.gone {
		return nil, errGone
	}
	if s.d.keys[ref] == nil {
		return nil, ErrNotFound
	}
	return &deviceSigner{s.d.keys[ref], s.d.hang}, nil
}

func (s *deviceSession) close() error { return nil }

type deviceSigner struct {
	crypto.Signer
	hang chan struct{}
}

// refusing is a device that looks at the PIN when it signs, and counts.
type refusing struct {
	*deviceSession
	refused *int
}

func (r refusing) open(ref string) (crypto.Signer, error) {
	signer, err := r.deviceSession.open(ref)
	return refusingSigner{signer, r.refused}, err
}

type refusingSigner struct {
	crypto.Signer
	refused *int
}

func (s refusingSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	*s.refused++
	return nil, ErrRefused
}

// A PIN that is refused by a signature is not tried again either, before it changes.
func TestRefusedWhenSigning(t *testing.T) {
	d, store, pin := plug(t, time.Minute)
	key, _, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	tried, login := 0, store.driver.open
	store.open = nil // as after a failure
	store.driver.open = func(t target) (session, error) {
		s, err := login(t)
		if err != nil {
			return nil, err
		}
		return refusing{s.(*deviceSession), &tried}, nil //nolint:forcetypeassert // it makes no others
	}
	for range 5 {
		if err := signs(key); !errors.Is(err, ErrRefused) || !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v", err)
		}
	}
	if tried != 1 {
		t.Errorf("the PIN was tried %d times", tried)
	}
	d.set(func(d *device) { d.pin = "5678" })
	writePIN(t, pin, "5678")
	if err := signs(key); !errors.Is(err, ErrRefused) || tried != 2 {
		t.Errorf("a new PIN: %v, tried %d times", err, tried)
	}
}

func (s *deviceSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if s.hang != nil {
		<-s.hang
	}
	return s.Signer.Sign(random, digest, opts)
}

// plug returns a store in a device, and the file of its PIN.
func plug(t *testing.T, timeout time.Duration) (*device, *remote, string) {
	t.Helper()
	d := &device{keys: make(map[string]crypto.Signer), pin: "1234"}
	pin := filepath.Join(t.TempDir(), "pin")
	writePIN(t, pin, "1234\n")
	u, err := uri.Parse("hsm:")
	if err != nil {
		t.Fatal(err)
	}
	return d, &remote{
		scheme: "hsm", driver: driver{open: d.login}, uri: u, busy: make(chan struct{}, 1), files: newFile(filepath.Join(t.TempDir(), "keys"), P256, ""),
		options: Options{Secret: pin, Kind: P256, Timeout: timeout},
	}, pin
}

func writePIN(t *testing.T, path, pin string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(pin), 0o600); err != nil {
		t.Fatal(err)
	}
}

func signs(key crypto.Signer) error {
	_, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
	return err
}

// Fault F28: a device that is removed and comes back is used again, without a restart.
func TestFault_F28_RemovedDeviceComesBack(t *testing.T) {
	d, store, _ := plug(t, time.Minute)
	key, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := store.Create(t.Context(), "root-1"); !errors.Is(err, ErrExists) || errors.Is(err, ErrUnavailable) {
		t.Errorf("created over: %v", err)
	}
	d.set(func(d *device) { d.gone = true })
	for range 3 {
		if err := signs(key); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
		if _, err := store.Open(t.Context(), ref); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
	}
	d.set(func(d *device) { d.gone = false })
	if err := signs(key); err != nil {
		t.Error(err)
	}
	if opened, err := store.Open(t.Context(), ref); err != nil || signs(opened) != nil {
		t.Error(err)
	}
}

// Fault F28: a device that hangs is given up after the timeout; nothing else piles up
// behind it, and it is used again once it answers.
func TestFault_F28_HangingDevice(t *testing.T) {
	d, store, _ := plug(t, 50*time.Millisecond)
	key, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	hang := make(chan struct{})
	d.set(func(d *device) { d.hang = hang })
	for range 3 {
		if err := signs(key); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
	}
	if _, err := store.Open(t.Context(), ref); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "earlier") {
		t.Errorf("got %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := store.Open(ended, ref); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	close(hang)
	store.options.Timeout = time.Minute // it is back: the machine may be loaded
	if err := signs(key); err != nil {
		t.Error(err)
	}
}

// Row K6: a wrong PIN is tried once, so that the device does not lock itself, and the
// right one is taken as soon as it is in the file.
func TestV_K6_WrongPINIsTriedOnce(t *testing.T) {
	d, store, pin := plug(t, time.Minute)
	writePIN(t, pin, "4321")
	for range 3 {
		_, _, err := store.Create(t.Context(), "root-1")
		if !errors.Is(err, ErrRefused) || !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
		if strings.Contains(err.Error(), "4321") {
			t.Errorf("%q holds the PIN", err)
		}
	}
	if d.logins != 1 {
		t.Errorf("the wrong PIN was tried %d times", d.logins)
	}
	writePIN(t, pin, "1234")
	key, _, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := signs(key); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(pin, 0o644); err != nil {
		t.Fatal(err)
	}
	d.set(func(d *device) { d.gone = true })
	_ = signs(key)
	d.set(func(d *device) { d.gone = false })
	if err := signs(key); err == nil || !strings.Contains(err.Error(), "key_secret_file") {
		t.Errorf("a PIN that others can read is used: %v", err)
	}
}

// Row K6: an object that is gone, or another one in its place, is not signed with.
func TestV_K6_MissingOrOtherObject(t *testing.T) {
	d, store, _ := plug(t, time.Minute)
	key, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	other, err := P256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	d.set(func(d *device) { d.keys[ref] = other })
	if err := signs(key); !errors.Is(err, ErrNotFound) {
		t.Errorf("another key was used: %v", err)
	}
	d.set(func(d *device) { delete(d.keys, ref) })
	if err := signs(key); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if _, err := store.Open(t.Context(), ref); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

// A root's key that was made in a file is opened until its rotation is over.
func TestRemoteOpensFiles(t *testing.T) {
	_, store, _ := plug(t, time.Minute)
	made, ref, err := store.files.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	opened, err := store.Open(t.Context(), ref)
	if err != nil || !equal(made, opened) {
		t.Error(err)
	}
}

func equal(a, b crypto.Signer) bool {
	pub, ok := a.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(b.Public())
}

func TestV_K8_BadLocations(t *testing.T) {
	for location, want := range map[string]string{
		"hsm:":               "scheme is one of",
		"root.key":           "scheme is one of",
		"file:/etc/root.key": "file: alone",
		"pkcs11:token=ca":    "module-path",
		"pkcs11:module-path=/x;token=ca;pin-value=87654": "key_secret_file",
		"pkcs11:module-path=/x;token=ca?pin-value=87654": "key_secret_file",
		"pkcs11:module-path=/x;tokn=ca":                  `"tokn"`,
		"pkcs11:%zz":                                     "cannot be read",
		"tpmkms:storage-directory=/x":                    "storage-directory",
		"awskms:":                                        "region",
	} {
		_, err := New(location, Options{Dir: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", location, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "87654") {
			t.Errorf("%q holds the PIN", err)
		}
	}
	if _, err := ParseKind("p256"); err == nil || !strings.Contains(err.Error(), "ec-p256, ec-p384, ed25519") {
		t.Errorf("got %v", err)
	}
}

func TestKinds(t *testing.T) {
	for kind := range kinds {
		store, err := New("file:", Options{Dir: filepath.Join(t.TempDir(), "keys"), Kind: kind})
		if err != nil {
			t.Fatal(err)
		}
		made, ref, err := store.Create(t.Context(), "root-1")
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := store.Open(t.Context(), ref); err != nil || !equal(made, opened) {
			t.Error(kind, err)
		}
	}
}

// Row K6: the file on the disk is of no use without the passphrase, and a wrong one
// says what to do.
func TestV_K6_EncryptedFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	secret := filepath.Join(t.TempDir(), "passphrase")
	writePIN(t, secret, "correct horse battery\n")
	store := newFile(dir, P256, secret)
	made, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(dir, "root-1.key"))
	if err != nil || !strings.HasPrefix(string(content), "-----BEGIN ENCRYPTED PRIVATE KEY-----") {
		t.Fatalf("it is not encrypted: %v", err)
	}
	if opened, err := store.Open(t.Context(), ref); err != nil || !equal(made, opened) {
		t.Error(err)
	}
	if _, err := File(dir).Open(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "key_secret_file") {
		t.Errorf("got %v", err)
	}
	writePIN(t, secret, "a wrong passphrase")
	if _, err := store.Open(t.Context(), ref); !errors.Is(err, ErrRefused) || strings.Contains(err.Error(), "a wrong passphrase") {
		t.Errorf("got %v", err)
	}
	writePIN(t, secret, "short")
	if _, _, err := store.Create(t.Context(), "root-2"); err == nil || !strings.Contains(err.Error(), "16 or more") {
		t.Errorf("got %v", err)
	}
	// A key from before that is not encrypted is opened until its rotation.
	if _, _, err := File(dir).Create(t.Context(), "root-3"); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), "file:root-3.key"); err != nil {
		t.Error(err)
	}
}
