package upstream

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Use is what a CA is wanted for.
type Use struct {
	TrustDomain spiffeid.TrustDomain
	// Leaves: it signs each X.509-SVID.
	Leaves bool
	// Pins are the SHA-256 of the roots that may be trusted; none for those of its
	// first answer.
	Pins [][sha256.Size]byte
	// KeyType is the kind of key of the intermediates.
	KeyType x509.PublicKeyAlgorithm
	// Lives are those of X.509-SVIDs, by the name of the setting that says them.
	Lives map[string]time.Duration
}

// UseChecker is a CA whose own settings may not go together with what it is used for.
type UseChecker interface {
	// CheckUse says what can never work, without asking anybody: the error begins with
	// the name of the setting, and says what to write.
	CheckUse(u Use) error
}

// CheckUse says what of a use can never work with a CA, so that it is found before it is
// needed. Nobody is asked, and no process is started.
func CheckUse(ca CA, u Use) error {
	if checker, ok := ca.(UseChecker); ok {
		if err := checker.CheckUse(u); err != nil {
			return err
		}
	}
	if _, ok := ca.(LeafSigner); u.Leaves && !ok {
		return errors.New("leaves: it signs intermediates only: remove leaves")
	}
	if _, process := ca.(io.Closer); process {
		return nil // what it can do is known when it runs
	}
	can := ca.Capabilities()
	if !u.Leaves {
		if can.KeyTypes != nil && !slices.Contains(can.KeyTypes, u.KeyType) {
			return fmt.Errorf("authority.intermediate_key_type: it certifies keys of the kinds %v, not %s", can.KeyTypes, u.KeyType)
		}
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(u.Lives)) {
		if life := u.Lives[name]; life < can.MinTTL {
			return fmt.Errorf("%s: it signs X.509-SVIDs for %s at least, and this is %s: write %[2]s or more, or remove leaves", name, can.MinTTL, life)
		}
	}
	return nil
}

// CheckRoots holds the roots that the setting name says, all that a CA has, to a use.
func (u Use) CheckRoots(name string, roots []*x509.Certificate) error {
	for _, r := range roots {
		if err := CheckRoot(u.TrustDomain, r); err != nil {
			return fmt.Errorf("%s: %.100q: %w", name, r.Subject, err)
		}
	}
	pinned := func(r *x509.Certificate) bool { return slices.Contains(u.Pins, sha256.Sum256(r.Raw)) }
	if len(u.Pins) > 0 && len(roots) > 0 && !slices.ContainsFunc(roots, pinned) {
		sum := sha256.Sum256(roots[0].Raw)
		return fmt.Errorf("%s: none of the roots there is among those of upstream.roots_sha256: compare what that is, %s, with what the operators of that CA say, then write it there",
			name, hex.EncodeToString(sum[:]))
	}
	return nil
}

// CheckRootsFile is CheckRoots of the PEM file at path; there are none if that is "".
func (u Use) CheckRootsFile(name, path string) error {
	if path == "" {
		return nil
	}
	roots, err := ReadCertificates(path)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return u.CheckRoots(name, roots)
}
