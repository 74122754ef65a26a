package keys

import (
	"crypto"
	"errors"
	"fmt"

	"go.step.sm/crypto/kms/apiv1"
)

// manager is a session with a key manager of go.step.sm/crypto/kms.
type manager struct {
	apiv1.KeyManager
	// nameOf makes the URI of a new key from its name.
	nameOf func(name string) string
	// level is where new keys are kept, if the manager has a choice.
	level apiv1.ProtectionLevel
	// absent reports whether an error of CreateSigner says that there is no such key;
	// nil if that is an apiv1.NotFoundError.
	absent func(error) bool
}

func (m manager) create(name string, kind Kind) (string, crypto.PublicKey, error) {
	d := kinds[kind]
	made, err := m.CreateKey(&apiv1.CreateKeyRequest{Name: m.nameOf(name), SignatureAlgorithm: d.signature, Bits: d.bits, ProtectionLevel: m.level})
	if err != nil {
		return "", nil, fmt.Errorf("a key of kind %s: %w", kind, err)
	}
	return made.Name, made.PublicKey, nil
}

func (m manager) open(ref string) (crypto.Signer, error) {
	signer, err := m.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: ref})
	if _, gone := errors.AsType[apiv1.NotFoundError](err); gone || err != nil && m.absent != nil && m.absent(err) {
		return nil, fmt.Errorf("%w: %w", err, ErrNotFound)
	}
	return signer, err
}

func (m manager) close() error { return m.Close() }
