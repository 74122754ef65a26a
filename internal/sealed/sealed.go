// Package sealed encrypts what a program must find again after it was
// restarted and nobody else may read: with a key from the kernel's keyring or
// from a file that only this user can read, bound to a purpose and to a moment
// such as one boot of the machine. It does not know what it encrypts or where
// that is kept.
package sealed

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/meshid/meshid/internal/durable"
)

// ErrBroken is wrapped by Open's error if a box was not made by the same secret
// for the same purpose and binding, or has been changed since.
var ErrBroken = errors.New("sealed data cannot be opened")

// MinSecret is the least size of a secret in bytes.
const MinSecret = 16

// maxSecret bounds what is read from a file.
const maxSecret = 4096

// header starts each box: a format and its version.
const header = "meshid-sealed-1\n"

// Sealer encrypts and opens boxes. It may be used concurrently.
type Sealer struct {
	aead cipher.AEAD
}

// New returns a sealer whose AES-256 key is derived (HKDF-SHA256) from a secret
// of at least MinSecret bytes, for one purpose and one binding: what was sealed
// under others cannot be opened.
func New(secret []byte, purpose, binding string) (*Sealer, error) {
	if len(secret) < MinSecret {
		return nil, fmt.Errorf("sealing secret has %d bytes: at least %d are needed", len(secret), MinSecret)
	}
	key, err := hkdf.Key(sha256.New, secret, []byte(binding), "meshid sealed "+purpose, 32)
	if err != nil {
		return nil, fmt.Errorf("derive the sealing key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make the sealing cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("make the sealing cipher: %w", err)
	}
	return &Sealer{aead: aead}, nil
}

// Seal encrypts plain.
func (s *Sealer) Seal(plain []byte) []byte {
	box := make([]byte, len(header), len(header)+len(plain)+s.aead.Overhead())
	copy(box, header)
	return s.aead.Seal(box, nil, plain, []byte(header)) //nolint:gosec // G407: this AEAD makes a random nonce itself
}

// Open returns what was sealed in box. Its error wraps ErrBroken.
func (s *Sealer) Open(box []byte) ([]byte, error) {
	body, ok := bytes.CutPrefix(box, []byte(header))
	if !ok {
		return nil, fmt.Errorf("%w: not of this format", ErrBroken)
	}
	plain, err := s.aead.Open(nil, nil, body, []byte(header))
	if err != nil {
		return nil, fmt.Errorf("%w: wrong key, or changed", ErrBroken)
	}
	return plain, nil
}

// FileSecret reads a secret from a file, such as a systemd credential, that
// nobody but this user or root may read.
func FileSecret(path string) ([]byte, error) {
	secret, err := durable.ReadSecret(path, maxSecret)
	if err != nil {
		return nil, fmt.Errorf("read the sealing secret: %w", err)
	}
	if len(secret) < MinSecret {
		return nil, fmt.Errorf("sealing secret %s has %d bytes: at least %d are needed", path, len(secret), MinSecret)
	}
	return secret, nil
}

// BootID returns what names this boot of the machine.
func BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}
