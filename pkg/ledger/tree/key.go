package tree

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"github.com/meshid/meshid/internal/durable"
)

// maxKeyBytes bounds a key file.
const maxKeyBytes = 4 << 10

// Key signs the checkpoints of one log. Its name is the log's origin.
type Key struct {
	signer   note.Signer
	verifier note.Verifier
	vkey     string
}

// Origin makes the name of a log from that of its trust domain and its CA
// instance: what may not be in a key's name is replaced.
func Origin(trustDomain, instance string) string {
	return trustDomain + "/" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("-._", r):
			return r
		default:
			return '-'
		}
	}, instance)
}

// ReadKey reads a log's key. Nobody else may have access to the file; the error is
// that of durable.ReadSecret.
func ReadKey(path string) (*Key, error) {
	b, err := durable.ReadSecret(path, maxKeyBytes)
	if err != nil {
		return nil, fmt.Errorf("key of the ledger's tree: %w", err)
	}
	defer clear(b)
	k, err := parseKey(strings.TrimSpace(string(b)))
	if err != nil {
		// Without the cause, which may quote the key.
		return nil, fmt.Errorf("key of the ledger's tree: %s holds no signing key of a log: restore it from a backup", path)
	}
	return k, nil
}

// newKey makes a key, and returns the content of its file.
func newKey(origin string) (*Key, []byte, error) {
	secret, _, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		return nil, nil, fmt.Errorf("make the key of the ledger's tree: %w", err)
	}
	k, err := parseKey(secret)
	if err != nil {
		return nil, nil, errors.New("make the key of the ledger's tree: it cannot be read")
	}
	return k, []byte(secret + "\n"), nil
}

// createKey makes the key file.
func createKey(path string, content []byte) error {
	if err := durable.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make the key of the ledger's tree: %w", err)
	}
	if err := durable.CreateFile(path, content, 0o600); err != nil {
		return fmt.Errorf("make the key of the ledger's tree: %w", err)
	}
	return nil
}

// parseKey reads a signed-note private key: PRIVATE+KEY+<name>+<hash>+<key>.
func parseKey(secret string) (*Key, error) {
	signer, err := note.NewSigner(secret)
	if err != nil {
		return nil, err
	}
	// Neither name nor hash has a +; the last field may have.
	fields := strings.SplitN(secret, "+", 5)
	seed, err := base64.StdEncoding.DecodeString(fields[len(fields)-1])
	if err != nil || len(seed) != 1+ed25519.SeedSize {
		return nil, errors.New("not an Ed25519 key")
	}
	defer clear(seed)
	public, ok := ed25519.NewKeyFromSeed(seed[1:]).Public().(ed25519.PublicKey)
	if !ok {
		return nil, errors.New("not an Ed25519 key")
	}
	vkey, err := note.NewEd25519VerifierKey(signer.Name(), public)
	if err != nil {
		return nil, err
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, err
	}
	return &Key{signer: signer, verifier: verifier, vkey: vkey}, nil
}

// String returns the verifier key: <origin>+<hash>+<public key>, as C2SP
// signed-note has it. It is no secret.
func (k *Key) String() string { return k.vkey }

// Origin returns the log's name.
func (k *Key) Origin() string { return k.signer.Name() }

// Verifier returns what checks the log's signatures.
func (k *Key) Verifier() note.Verifier { return k.verifier }

// ParseVerifierKey reads what Key.String has written.
func ParseVerifierKey(s string) (note.Verifier, error) {
	v, err := note.NewVerifier(strings.TrimSpace(s))
	if err != nil {
		return nil, fmt.Errorf("%.200q is not a log's key: write it as `ca ledger key` prints it, <origin>+<8 hexadecimal digits>+<base64>", s)
	}
	return v, nil
}
