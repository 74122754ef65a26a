//go:build pkcs11 && cgo

package keys

import (
	"crypto/elliptic"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ThalesGroup/crypto11"

	"github.com/meshid/meshid/test/require"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// newToken makes a SoftHSM token, and returns a store in it, its folder and the file
// of its PIN. The library reads its configuration from the environment.
func newToken(t *testing.T, kind Kind) (store *remote, tokens, pin string) {
	t.Helper()
	if _, err := os.Stat(softHSM); err != nil {
		require.Missing(t, "no SoftHSM (package softhsm2): %v", err)
	}
	dir := t.TempDir()
	tokens = filepath.Join(dir, "tokens")
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := errors.Join(os.Mkdir(tokens, 0o700), os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	if out, err := exec.Command(require.Program(t, "softhsm2-util"), "--init-token", "--free", "--label", "ca", "--so-pin", "5678", "--pin", "1234").CombinedOutput(); err != nil { //nolint:gosec // the program that was asked for
		t.Fatalf("%v: %s", err, out)
	}
	pin = filepath.Join(dir, "pin")
	writePIN(t, pin, "1234")
	s, err := New("pkcs11:module-path="+softHSM+";token=ca", Options{Dir: dir, Secret: pin, Kind: kind, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	store = s.(*remote) //nolint:forcetypeassert // it is one
	t.Cleanup(func() {  // the library is closed, so that the next test's configuration is read
		store.busy <- struct{}{}
		if store.open != nil {
			_ = store.open.close()
		}
	})
	return store, tokens, pin
}

func TestPKCS11Kinds(t *testing.T) {
	for _, kind := range []Kind{P256, P384, RSA3072, RSA4096} {
		t.Run(string(kind), func(t *testing.T) {
			store, _, _ := newToken(t, kind)
			key, ref, err := store.Create(t.Context(), "root-1")
			if err != nil {
				t.Fatal(err)
			}
			if err := signs(key); err != nil {
				t.Error(err)
			}
			if opened, err := store.Open(t.Context(), ref); err != nil || !equal(key, opened) {
				t.Error(err)
			}
			if _, _, err := store.Create(t.Context(), "root-1"); !errors.Is(err, ErrExists) {
				t.Errorf("created over: %v", err)
			}
		})
	}
	store, _, _ := newToken(t, Ed25519)
	if _, _, err := store.Create(t.Context(), "root-1"); err == nil || !strings.Contains(err.Error(), "root_key_type") {
		t.Errorf("got %v", err)
	}
}

// Fault F28: the token's folder is moved away and back.
func TestFault_F28_TokenMovedAway(t *testing.T) {
	store, tokens, _ := newToken(t, P256)
	key, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	if err := signs(key); !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if _, err := store.Open(t.Context(), ref); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	if err := signs(key); err != nil {
		t.Error(err)
	}
}

// Row K6: against a real token.
func TestV_K6_Token(t *testing.T) {
	store, _, pin := newToken(t, P256)
	key, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	duplicate := func(id []byte) {
		t.Helper()
		public, err := crypto11.NewAttributeSetWithIDAndLabel(id, []byte("root-1"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = do(store, nil, time.Minute, func(s session) (crypto11.Signer, error) {
			return s.(token).GenerateECDSAKeyPairWithAttributes(public, public.Copy(), elliptic.P256()) //nolint:forcetypeassert // it is one
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// Another key of the same label does not matter.
	duplicate([]byte("another"))
	if err := signs(key); err != nil {
		t.Error(err)
	}
	// One of the same label and identifier does: which one is ours?
	id, err := hex.DecodeString(strings.TrimPrefix(strings.Split(ref, ";")[0], "pkcs11:id="))
	if err != nil {
		t.Fatal(err)
	}
	duplicate(id)
	if err := signs(key); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "2 keys") {
		t.Errorf("got %v", err)
	}
	if _, err := store.Open(t.Context(), "pkcs11:id=0102;object=root-1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	writePIN(t, pin, "4321")
	if _, err := store.Open(t.Context(), ref); !errors.Is(err, ErrRefused) || strings.Contains(err.Error(), "4321") {
		t.Errorf("got %v", err)
	}
}
