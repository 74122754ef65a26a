//go:build pkcs11 && cgo

package keys

import (
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
	"go.step.sm/crypto/kms/uri"
)

// poolWait bounds the wait for one of the token's sessions.
const poolWait = 10 * time.Second

// token is a session with a PKCS#11 token. It uses crypto11, as
// go.step.sm/crypto/kms/pkcs11 does, and not that package, which takes the first of
// several keys of one name.
type token struct{ *crypto11.Context }

func openPKCS11(t target) (session, error) {
	c := crypto11.Config{
		Path: t.uri.Get("module-path"), TokenLabel: t.uri.Get("token"), TokenSerial: t.uri.Get("serial"),
		Pin: string(t.secret), LoginNotSupported: t.secret == nil, MaxSessions: 4, PoolWaitTimeout: poolWait,
	}
	if text := t.uri.Get("slot-id"); text != "" {
		slot, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("slot-id=%s is not a number", text)
		}
		c.SlotNumber = &slot
	}
	if _, err := os.Stat(c.Path); err != nil {
		return nil, fmt.Errorf("module-path: %w", err)
	}
	opened, err := crypto11.Configure(&c)
	if code, ok := errors.AsType[pkcs11.Error](err); ok {
		switch code {
		case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED:
			return nil, fmt.Errorf("log in to the token: %w: %w", err, ErrRefused)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open the token: %w", err)
	}
	return token{opened}, nil
}

// create gives the key an identifier (CKA_ID) of its own: it is found by that and by
// its label, and other objects of the same label do not matter.
func (t token) create(name string, kind Kind) (string, crypto.PublicKey, error) {
	same, err := t.FindKeyPairs(nil, []byte(name))
	if err != nil {
		return "", nil, fmt.Errorf("look for a key of this name: %w", err)
	}
	if len(same) > 0 {
		return "", nil, ErrExists
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	public, err := crypto11.NewAttributeSetWithIDAndLabel(id, []byte(name))
	if err != nil {
		return "", nil, err
	}
	private := public.Copy()
	for attribute, value := range map[crypto11.AttributeType]bool{
		crypto11.CkaSensitive: true, crypto11.CkaExtractable: false, crypto11.CkaDecrypt: false, crypto11.CkaUnwrap: false,
	} {
		if err := private.Set(attribute, value); err != nil {
			return "", nil, err
		}
	}
	var signer crypto.Signer
	switch kind {
	case P256:
		signer, err = t.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P256())
	case P384:
		signer, err = t.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P384())
	case RSA3072, RSA4096:
		signer, err = t.GenerateRSAKeyPairWithAttributes(public, private, kinds[kind].bits)
	default:
		return "", nil, fmt.Errorf("keys of kind %s are not made in PKCS#11 tokens: choose another authority.root_key_type", kind)
	}
	if err != nil {
		return "", nil, fmt.Errorf("make a key of kind %s: %w", kind, err)
	}
	return "pkcs11:id=" + hex.EncodeToString(id) + ";object=" + name, signer.Public(), nil
}

func (t token) open(ref string) (crypto.Signer, error) {
	u, err := uri.ParseWithScheme("pkcs11", ref)
	if err != nil {
		return nil, err
	}
	id, err := hex.DecodeString(u.Get("id"))
	if err != nil || len(id) == 0 || u.Get("object") == "" {
		return nil, fmt.Errorf("the reference lacks id or object: restore the store from a backup: %w", ErrNotFound)
	}
	found, err := t.FindKeyPairs(id, []byte(u.Get("object")))
	switch {
	case err != nil:
		return nil, fmt.Errorf("look for the key: %w", err)
	case len(found) == 0:
		return nil, fmt.Errorf("the token has no such object: restore the token from a backup: %w", ErrNotFound)
	case len(found) > 1:
		return nil, fmt.Errorf("the token has %d keys with this id and label: remove those that are not the CA's: %w", len(found), ErrNotFound)
	}
	return found[0], nil
}

func (t token) close() error { return t.Close() }
