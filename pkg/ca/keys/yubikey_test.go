//go:build yubikey && cgo

package keys

import (
	"crypto"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/go-piv/piv-go/v2/piv"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/softkms"
)

// No YubiKey is there: what is tested is what stands between the store and the library.

// pivLibrary is the library with a card of which some slots are taken.
type pivLibrary struct {
	apiv1.KeyManager
	keys  map[string]crypto.Signer
	gone  error
	wrong bool // the PIN
}

func (p *pivLibrary) GetPublicKey(r *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	if p.gone != nil {
		return nil, p.gone
	}
	if key := p.keys[r.Name]; key != nil {
		return key.Public(), nil
	}
	return nil, apiv1.NotFoundError{Message: "data object or application not found"}
}

func (p *pivLibrary) CreateKey(r *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	made, err := (&softkms.SoftKMS{}).CreateKey(r)
	if err != nil {
		return nil, err
	}
	signer, ok := made.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("no key")
	}
	p.keys[r.Name] = signer // whatever is there
	return &apiv1.CreateKeyResponse{Name: r.Name, PublicKey: made.PublicKey}, nil
}

func (p *pivLibrary) CreateSigner(r *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	if p.keys[r.SigningKey] == nil {
		return nil, apiv1.NotFoundError{Message: "data object or application not found"}
	}
	return pivSigner{p.keys[r.SigningKey], p}, nil
}

type pivSigner struct {
	crypto.Signer
	card *pivLibrary
}

func (s pivSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if s.card.wrong {
		return nil, piv.AuthErr{Retries: 2}
	}
	return s.Signer.Sign(random, digest, opts)
}

func TestYubiKey(t *testing.T) {
	library := &pivLibrary{keys: make(map[string]crypto.Signer)}
	c := card{manager{KeyManager: library}}
	ref, public, err := c.create("root-1", P256)
	if err != nil || ref != "yubikey:slot-id=82" {
		t.Fatalf("%q, %v", ref, err)
	}
	if _, _, err := c.create("root-1", P256); !errors.Is(err, ErrExists) {
		t.Errorf("a key was replaced: %v", err)
	}
	if ref, _, err := c.create("root-20", P384); err != nil || ref != "yubikey:slot-id=95" {
		t.Errorf("%q, %v", ref, err)
	}
	for _, name := range []string{"root-0", "root-21", "root-x", "other"} {
		if _, _, err := c.create(name, P256); err == nil || !strings.Contains(err.Error(), "no slot") {
			t.Errorf("%s: %v", name, err)
		}
	}
	library.gone = errors.New("the card was removed")
	if _, _, err := c.create("root-2", P256); !errors.Is(err, library.gone) || len(library.keys) != 2 {
		t.Errorf("it was not known whether the slot is free: %v", err)
	}
	library.gone = nil
	if _, err := c.open("yubikey:slot-id=90"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	key, err := c.open(ref)
	if err != nil || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(public) { //nolint:forcetypeassert // all keys have it
		t.Fatal(err)
	}
	sign := func() error {
		_, err := key.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		return err
	}
	if err := sign(); err != nil {
		t.Error(err)
	}
	library.wrong = true
	if err := sign(); !errors.Is(err, ErrRefused) {
		t.Errorf("%v", err)
	}
	if _, err := openYubiKey(target{}); err == nil || !strings.Contains(err.Error(), "key_secret_file") {
		t.Errorf("without a PIN: %v", err)
	}
}
