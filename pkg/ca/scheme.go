package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
)

// scheme is how the key of an intermediate signs leaves, and how that is checked. It
// is immutable. P-256 is what the path of a signature is made for; the other kinds are
// for those whose rules, or whose upstream CA, insist on them.
type scheme struct {
	// algorithm is the AlgorithmIdentifier of its signatures, DER.
	algorithm []byte
	// hash is that of what is signed; 0 if the key hashes by itself.
	hash crypto.Hash
	// verify returns an error unless the signature is one of tbs by the key.
	verify func(tbs, signature []byte) error
}

// DER of the AlgorithmIdentifiers, but for that of P-256: it is in encode.go.
var (
	// ecdsa-with-SHA384, without parameters (RFC 5758 §3.2).
	derECDSAWithSHA384 = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03}
	// sha256WithRSAEncryption, with NULL as parameters (RFC 4055 §5).
	derSHA256WithRSA = []byte{0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00}
	// id-Ed25519, without parameters (RFC 8410 §3).
	derEd25519 = []byte{0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70}
)

func schemeOf(key crypto.Signer) (*scheme, error) {
	verdict := func(ok bool) error {
		if !ok {
			return errBadSignature
		}
		return nil
	}
	switch pub := key.Public().(type) {
	case *ecdsa.PublicKey:
		if private, ok := key.(*ecdsa.PrivateKey); ok && pub.Curve == elliptic.P256() {
			checker, err := newSignatureChecker(private)
			if err != nil {
				return nil, err
			}
			return &scheme{derSignatureAlgorithm, crypto.SHA256, func(tbs, signature []byte) error {
				digest := sha256.Sum256(tbs)
				return checker.check(&digest, signature)
			}}, nil
		}
		if pub.Curve == elliptic.P384() {
			return &scheme{derECDSAWithSHA384, crypto.SHA384, func(tbs, signature []byte) error {
				digest := sha512.Sum384(tbs)
				return verdict(ecdsa.VerifyASN1(pub, digest[:], signature))
			}}, nil
		}
	case *rsa.PublicKey:
		return &scheme{derSHA256WithRSA, crypto.SHA256, func(tbs, signature []byte) error {
			digest := sha256.Sum256(tbs)
			return verdict(rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature) == nil)
		}}, nil
	case ed25519.PublicKey:
		return &scheme{derEd25519, 0, func(tbs, signature []byte) error {
			return verdict(ed25519.Verify(pub, tbs, signature))
		}}, nil
	}
	return nil, fmt.Errorf("intermediates with keys of kind %s are not supported", algorithmOf(key.Public()))
}

// sign signs tbs with the key that the scheme is of.
func (s *scheme) sign(key crypto.Signer, tbs []byte) ([]byte, error) {
	switch s.hash {
	case crypto.SHA256:
		digest := sha256.Sum256(tbs)
		return key.Sign(rand.Reader, digest[:], s.hash)
	case crypto.SHA384:
		digest := sha512.Sum384(tbs)
		return key.Sign(rand.Reader, digest[:], s.hash)
	default:
		return key.Sign(rand.Reader, tbs, s.hash)
	}
}
