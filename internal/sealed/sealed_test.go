package sealed

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/meshid/meshid/internal/durable"
)

func TestSealOpen(t *testing.T) {
	secret := bytes.Repeat([]byte{7}, 32)
	s, err := New(secret, "cache", "boot-1")
	if err != nil {
		t.Fatal(err)
	}
	plain := []byte("the key of a workload")
	box := s.Seal(plain)
	if bytes.Contains(box, plain) {
		t.Error("the box shows what is in it")
	}
	if bytes.Equal(box, s.Seal(plain)) {
		t.Error("two boxes with the same content are equal")
	}
	got, err := s.Open(box)
	if err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("Open = %q, %v", got, err)
	}
	other := func(secret []byte, purpose, binding string) *Sealer {
		t.Helper()
		o, err := New(secret, purpose, binding)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	for name, o := range map[string]*Sealer{
		"other secret":  other(bytes.Repeat([]byte{8}, 32), "cache", "boot-1"),
		"other purpose": other(secret, "else", "boot-1"),
		"other boot":    other(secret, "cache", "boot-2"),
	} {
		if _, err := o.Open(box); !errors.Is(err, ErrBroken) {
			t.Errorf("%s: Open = %v, want ErrBroken", name, err)
		}
	}
	for n := range box {
		broken := bytes.Clone(box)
		broken[n] ^= 1
		if _, err := s.Open(broken); !errors.Is(err, ErrBroken) {
			t.Errorf("byte %d flipped: Open = %v, want ErrBroken", n, err)
		}
		if _, err := s.Open(box[:n]); !errors.Is(err, ErrBroken) {
			t.Errorf("cut to %d bytes: Open = %v, want ErrBroken", n, err)
		}
	}
	if _, err := New(secret[:MinSecret-1], "cache", ""); err == nil {
		t.Error("a short secret was accepted")
	}
}

func TestFileSecret(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "seal")
	want := bytes.Repeat([]byte{3}, 32)
	for _, tc := range []struct {
		name   string
		data   []byte
		mode   os.FileMode
		ok     bool
		unsafe bool
	}{
		{"good", want, 0o600, true, false},
		{"short", want[:8], 0o600, false, false},
		{"readable by others", want, 0o644, false, true},
		{"huge", make([]byte, maxSecret+1), 0o600, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, tc.data, tc.mode); err != nil {
				t.Fatal(err)
			}
			got, err := FileSecret(path)
			if (err == nil) != tc.ok || errors.Is(err, durable.ErrUnsafe) != tc.unsafe {
				t.Fatalf("FileSecret = %v", err)
			}
			if tc.ok && !bytes.Equal(got, want) {
				t.Error("other bytes than were written")
			}
		})
	}
	if _, err := FileSecret(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func TestKeyringSecret(t *testing.T) {
	const name = "meshid:sealed-test"
	first, err := KeyringSecret(name)
	if errors.Is(err, ErrNoKeyring) {
		t.Logf("this kernel or container gives no keyring, and says so: %v", err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := RemoveKeyringSecret(name); err != nil {
			t.Error(err)
		}
	})
	second, err := KeyringSecret(name)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 32 || !bytes.Equal(first, second) {
		t.Errorf("the key did not stay: %d and %d bytes", len(first), len(second))
	}
	if err := RemoveKeyringSecret(name); err != nil {
		t.Fatal(err)
	}
	third, err := KeyringSecret(name)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first, third) {
		t.Error("a removed key came back")
	}
}

func TestBootID(t *testing.T) {
	a, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	b, err := BootID()
	if err != nil || a != b || len(a) < 32 {
		t.Errorf("BootID = %q, then %q, %v", a, b, err)
	}
}
