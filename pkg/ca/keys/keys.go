// Package keys answers where the private keys of authorities live, and hands
// them out as signers. It does not know what is signed with them, nor which
// certificate belongs to which key.
package keys

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
)

// Store keeps private keys under references. A key, once created, is never
// changed or overwritten. All methods may be called concurrently.
type Store interface {
	// Create makes a new key and keeps it durably before it returns. The
	// reference finds it again after a restart. The name is a hint for people,
	// of lower-case letters, digits and hyphens; a name that is taken gives
	// ErrExists.
	Create(ctx context.Context, name string) (signer crypto.Signer, ref string, err error)
	// Open returns the key that ref names. An unknown one gives ErrNotFound.
	Open(ctx context.Context, ref string) (crypto.Signer, error)
}

var (
	// ErrExists is returned by Create when the name is taken.
	ErrExists = errors.New("a key of this name exists")
	// ErrNotFound is returned by Open when there is no such key.
	ErrNotFound = errors.New("there is no such key")
	// ErrUnavailable is wrapped by the errors of Create, Open and of a signer's Sign
	// when the place where the key lives does not answer, or not in time. It may
	// answer later.
	ErrUnavailable = errors.New("it does not answer")
	// ErrRefused is wrapped when that place refuses the PIN or the passphrase. It is
	// an ErrUnavailable too: once the file that holds it is corrected, it answers.
	ErrRefused = fmt.Errorf("the PIN or passphrase is refused: correct the file: %w", ErrUnavailable)
)

const maxNameLength = 64

// checkName holds names to what is a safe file name everywhere.
func checkName(name string) error {
	if name == "" || len(name) > maxNameLength {
		return fmt.Errorf("key name %q: write 1 to %d characters", name, maxNameLength)
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("key name %q: only lower-case letters, digits and hyphens are allowed", name)
		}
	}
	return nil
}

// cutReference splits "scheme:rest" and requires the scheme.
func cutReference(scheme, ref string) (string, error) {
	rest, ok := strings.CutPrefix(ref, scheme+":")
	if !ok {
		return "", fmt.Errorf("key reference %q: this store only has keys of the form %s:…", ref, scheme)
	}
	return rest, nil
}
