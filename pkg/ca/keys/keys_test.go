package keys

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func stores(t *testing.T) map[string]Store {
	t.Helper()
	return map[string]Store{"memory": Memory(), "file": File(filepath.Join(t.TempDir(), "below", "keys"))}
}

func TestCreateThenOpen(t *testing.T) {
	for name, store := range stores(t) {
		t.Run(name, func(t *testing.T) {
			made, ref, err := store.Create(t.Context(), "root-1")
			if err != nil {
				t.Fatal(err)
			}
			opened, err := store.Open(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			pub, ok := made.Public().(*ecdsa.PublicKey)
			if !ok || pub.Curve != elliptic.P256() || !pub.Equal(opened.Public()) {
				t.Fatal("another key")
			}
			digest := sha256.Sum256([]byte("x"))
			signature, err := opened.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err != nil || !ecdsa.VerifyASN1(pub, digest[:], signature) {
				t.Fatal("does not sign", err)
			}
			if _, _, err := store.Create(t.Context(), "root-1"); !errors.Is(err, ErrExists) {
				t.Errorf("created over: %v", err)
			}
			again, err := store.Open(t.Context(), ref)
			if err != nil || !pub.Equal(again.Public()) {
				t.Error("overwritten", err)
			}
		})
	}
}

func TestNamesAndReferences(t *testing.T) {
	for name, store := range stores(t) {
		t.Run(name, func(t *testing.T) {
			for _, bad := range []string{"", ".", "..", "../a", "a/b", "A", "a.b", "a\x00", "ä", strings.Repeat("a", 65)} {
				if _, _, err := store.Create(t.Context(), bad); err == nil {
					t.Errorf("created %q", bad)
				}
			}
			if _, _, err := store.Create(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			for _, bad := range []string{"", "a", "a.key", "http://a", "file:", "file:a", "file:../a.key", "file:/etc/passwd", "file:.key", "memory:"} {
				if _, err := store.Open(t.Context(), bad); err == nil {
					t.Errorf("opened %q", bad)
				}
			}
			missing := name + ":nobody"
			if name == "file" {
				missing += ".key"
			}
			if _, err := store.Open(t.Context(), missing); !errors.Is(err, ErrNotFound) {
				t.Errorf("got %v", err)
			}
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if _, _, err := store.Create(ended, "b"); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// Row K1: the modes do not depend on the umask. Not parallel: the umask is the
// process's.
func TestV_K1_ModesUnderAnyUmask(t *testing.T) {
	for _, umask := range []int{0o000, 0o077, 0o022, 0o277} {
		dir := filepath.Join(t.TempDir(), "keys")
		old := syscall.Umask(umask)
		_, ref, err := File(dir).Create(t.Context(), "root-1")
		syscall.Umask(old)
		if err != nil {
			t.Fatalf("umask %04o: %v", umask, err)
		}
		for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "root-1.key"): 0o600} {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := info.Mode().Perm(); got != want {
				t.Errorf("umask %04o: %s has mode %04o", umask, path, got)
			}
		}
		if _, err := File(dir).Open(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
}

// Row K1: what others could have read or replaced is refused, with the fix.
func TestV_K1_RefusesWhatOthersCanReach(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(dir, path string) error
		want  string
	}{
		"group can read":       {func(_, path string) error { return os.Chmod(path, 0o640) }, "chmod 0600"},
		"world can read":       {func(_, path string) error { return os.Chmod(path, 0o604) }, "chmod 0600"},
		"group can write":      {func(_, path string) error { return os.Chmod(path, 0o620) }, "chmod 0600"},
		"directory is shared":  {func(dir, _ string) error { return os.Chmod(dir, 0o750) }, "chmod 0700"},
		"directory is open":    {func(dir, _ string) error { return os.Chmod(dir, 0o707) }, "chmod 0700"},
		"file of another":      {func(_, path string) error { return os.Chown(path, 12345, -1) }, "chown"},
		"directory of another": {func(dir, _ string) error { return os.Chown(dir, 12345, -1) }, "chown"},
		"symbolic link": {func(dir, path string) error {
			return errors.Join(os.Rename(path, filepath.Join(dir, "real")), os.Symlink("real", path))
		}, "symbolic link"},
		"directory is a symbolic link": {func(dir, _ string) error {
			return errors.Join(os.Rename(dir, dir+"-real"), os.Symlink(dir+"-real", dir))
		}, "symbolic link"},
		"fifo":      {func(_, path string) error { return errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)) }, "regular file"},
		"directory": {func(_, path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) }, "regular file"},
		"gone":      {func(_, path string) error { return os.Remove(path) }, "backup"},
		"empty":     {func(_, path string) error { return os.Truncate(path, 0) }, "not PEM"},
		"torn":      {func(_, path string) error { return os.Truncate(path, 100) }, "not PEM"},
		"huge":      {func(_, path string) error { return os.Truncate(path, 1<<20) }, "bytes"},
		"two keys": {func(_, path string) error {
			content, err := os.ReadFile(path)
			return errors.Join(err, os.WriteFile(path, append(content, content...), 0o600))
		}, "more than one"},
		"public key": {func(_, path string) error {
			return rewrite(path, func(key crypto.Signer) *pem.Block {
				der, err := x509.MarshalPKIXPublicKey(key.Public())
				if err != nil {
					panic(err)
				}
				return &pem.Block{Type: "PUBLIC KEY", Bytes: der}
			})
		}, "private key"},
		"encrypted": {func(_, path string) error {
			return rewrite(path, func(crypto.Signer) *pem.Block {
				return &pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{0x30, 0}}
			})
		}, "encrypted"},
		"garbage in pem": {func(_, path string) error {
			return rewrite(path, func(crypto.Signer) *pem.Block {
				return &pem.Block{Type: "PRIVATE KEY", Bytes: []byte("not a key")}
			})
		}, "backup"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			_, ref, err := File(dir).Create(t.Context(), "root-1")
			if err != nil {
				t.Fatal(err)
			}
			if err := tc.spoil(dir, filepath.Join(dir, "root-1.key")); err != nil {
				if errors.Is(err, os.ErrPermission) && os.Getenv("REQUIRE_ALL") == "" {
					t.Skip("only root can give files away")
				}
				t.Fatal(err)
			}
			_, err = File(dir).Open(t.Context(), ref)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if !strings.Contains(err.Error(), dir) {
				t.Errorf("%q does not name the file", err)
			}
		})
	}
}

func rewrite(path string, with func(crypto.Signer) *pem.Block) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	key, err := newFile("", P256, "").parse(path, bytes.Clone(content))
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(with(key)), 0o600)
}

// Row K3: a kill before any step of the write leaves no key or a whole one, and
// the next start gets its key.
func TestV_K3_KilledAtEachStep(t *testing.T) {
	killed := errors.New("killed")
	var steps []string
	counting := &file{dir: filepath.Join(t.TempDir(), "keys"), kind: P256, step: func(s string) error {
		steps = append(steps, s)
		return nil
	}}
	if _, _, err := counting.Create(t.Context(), "root-1"); err != nil {
		t.Fatal(err)
	}
	if len(steps) < 7 {
		t.Fatalf("steps %q", steps)
	}
	for i, step := range steps {
		t.Run(fmt.Sprint(i, " ", step), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			n := 0
			f := &file{dir: dir, kind: P256, step: func(string) error {
				if n++; n > i {
					return killed
				}
				return nil
			}}
			if _, _, err := f.Create(t.Context(), "root-1"); !errors.Is(err, killed) {
				t.Fatalf("got %v", err)
			}
			fresh := File(dir)
			_, err := fresh.Open(t.Context(), "file:root-1.key")
			if err != nil && !errors.Is(err, ErrNotFound) {
				t.Fatalf("a torn key: %v", err)
			}
			_, ref, createErr := fresh.Create(t.Context(), "root-1")
			switch {
			case err == nil && !errors.Is(createErr, ErrExists):
				t.Fatalf("overwrote a key: %v", createErr)
			case err != nil && createErr != nil:
				t.Fatal(createErr)
			case createErr == nil:
				if _, err := fresh.Open(t.Context(), ref); err != nil {
					t.Fatal(err)
				}
				if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 0 {
					t.Errorf("left behind: %v %v", left, err)
				}
			}
		})
	}
}

// Keys that an operator brings may be of other kinds and encodings.
func TestOpenOtherEncodings(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	content := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	if err := os.WriteFile(filepath.Join(dir, "root-1.key"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	opened, err := File(dir).Open(t.Context(), "file:root-1.key")
	if err != nil || !key.PublicKey.Equal(opened.Public()) {
		t.Fatal(err)
	}
}

// No error quotes what a key file holds.
func TestErrorsHoldNoSecret(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if _, _, err := File(dir).Create(t.Context(), "root-1"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "root-1.key")
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range content {
		if err := os.WriteFile(path, content[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := File(dir).Open(t.Context(), "file:root-1.key")
		if err == nil {
			continue // the end marker's last newline
		}
		for line := range bytes.SplitSeq(content, []byte("\n")) {
			if len(line) > 20 && !bytes.HasPrefix(line, []byte("---")) && strings.Contains(err.Error(), string(line[:20])) {
				t.Fatalf("%q quotes the key", err)
			}
		}
	}
}
