//go:build yubikey && cgo

package keys

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/go-piv/piv-go/v2/piv"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/yubikey"

	"github.com/meshid/meshid/internal/durable"
)

// card is a session with a YubiKey's PIV application. Keys are in its 20 slots for
// retired ones, 82 to 95 in hexadecimal: root-1 is in the first.
type card struct{ manager }

const firstSlot, slots = 0x82, 20

// openYubiKey refuses to do without a PIN: the library would try the one that all
// YubiKeys have at first, and of three that are wrong the card locks itself.
func openYubiKey(t target) (session, error) {
	if len(t.secret) == 0 {
		return nil, errors.New("the PIN is needed: write the file that holds it into authority.key_secret_file")
	}
	o := apiv1.Options{Type: apiv1.YubiKey, Pin: string(t.secret)}
	if serial := t.uri.Get("serial"); serial != "" {
		o.URI = "yubikey:serial=" + serial
	}
	if path := t.uri.Get("management-key-file"); path != "" {
		key, err := durable.ReadSecret(path, maxSecretBytes)
		if err != nil {
			return nil, fmt.Errorf("management-key-file: %w", err)
		}
		defer clear(key)
		o.ManagementKey = strings.TrimSpace(string(key))
	}
	m, err := yubikey.New(context.Background(), o)
	if err != nil {
		return nil, err
	}
	return card{manager{KeyManager: m}}, nil
}

// slotOf is where a key of a name is.
func slotOf(name string) (string, error) {
	text, ok := strings.CutPrefix(name, "root-")
	n, err := strconv.Atoi(text)
	if !ok || err != nil || n < 1 || n > slots {
		return "", fmt.Errorf("there is no slot for a key of this name: root-1 to root-%d are in the slots %x to %x", slots, firstSlot, firstSlot+slots-1)
	}
	return fmt.Sprintf("yubikey:slot-id=%x", firstSlot+n-1), nil
}

// create never replaces a key: a YubiKey would.
func (c card) create(name string, kind Kind) (string, crypto.PublicKey, error) {
	slot, err := slotOf(name)
	if err != nil {
		return "", nil, err
	}
	_, err = c.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: slot})
	if err == nil {
		return "", nil, ErrExists
	}
	if _, free := errors.AsType[apiv1.NotFoundError](err); !free {
		return "", nil, fmt.Errorf("look whether %s is free: %w", slot, err)
	}
	c.nameOf = func(string) string { return slot }
	return c.manager.create(name, kind)
}

func (c card) open(ref string) (crypto.Signer, error) {
	signer, err := c.manager.open(ref)
	if err != nil {
		return nil, err
	}
	return pinSigner{signer}, nil
}

// pinSigner says of a PIN that was wrong that it was: a card is asked for it only when
// it signs.
type pinSigner struct{ crypto.Signer }

// Sign implements crypto.Signer.
func (s pinSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := s.Signer.Sign(random, digest, opts)
	if _, wrong := errors.AsType[piv.AuthErr](err); wrong {
		return nil, fmt.Errorf("%w: %w", err, ErrRefused)
	}
	return signature, err
}
