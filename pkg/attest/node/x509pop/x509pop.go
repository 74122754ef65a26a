// Package x509pop answers "which machine is this?" by a certificate that the
// machine already has, such as one from the company's device CA: the agent shows
// the certificate and proves that it holds the private key.
//
// What is sent, version 1, numbers big-endian:
//
//	evidence   0x01, then for each certificate, leaf first, its length in two
//	           bytes and its DER
//	challenge  0x01, 32 random bytes
//	response   0x01, a signature by the leaf's key over
//	           label (64 bytes), the challenge's 32 bytes, the SHA-256 of the
//	           public key that is to be certified, the SHA-256 of the leaf's DER
//
// The label fills 64 bytes so that no signature made for TLS, where a peer
// chooses the first 32 bytes at most, can pass for a response, nor the reverse.
//
// The node's id is the SHA-256 of the whole leaf: two certificates with the same
// key, name or serial number are two nodes.
package x509pop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
)

// Method is the method's name.
const Method = "x509pop"

// Limits of what is read from an agent, and so of a machine's chain.
const (
	// MaxCertificates of a chain, leaf included.
	MaxCertificates = 8
	// MaxEvidence is the size of the whole chain, in bytes.
	MaxEvidence = 32 << 10
	// maxSignature: an RSA key of 4096 bits signs with 512 bytes.
	maxSignature = 512
)

const (
	version   = 1
	nonceSize = 32
	labelSize = 64
	label     = "meshid x509pop: proof of possession of a machine key, version 1"
)

// encodeChain makes the evidence of a chain.
func encodeChain(chain [][]byte) ([]byte, error) {
	if len(chain) == 0 || len(chain) > MaxCertificates {
		return nil, fmt.Errorf("chain has %d certificates, want 1 to %d", len(chain), MaxCertificates)
	}
	out := []byte{version}
	for _, der := range chain {
		if len(der) > 0xffff {
			return nil, fmt.Errorf("certificate has %d bytes, at most %d fit", len(der), 0xffff)
		}
		out = binary.BigEndian.AppendUint16(out, uint16(len(der))) //nolint:gosec // checked above
		out = append(out, der...)
	}
	if len(out) > MaxEvidence {
		return nil, fmt.Errorf("chain has %d bytes, at most %d are allowed", len(out), MaxEvidence)
	}
	return out, nil
}

// decodeChain is the inverse of encodeChain, for the bytes of strangers.
func decodeChain(evidence []byte) ([][]byte, error) {
	switch {
	case len(evidence) == 0:
		return nil, errors.New("evidence is empty")
	case len(evidence) > MaxEvidence:
		return nil, fmt.Errorf("evidence has %d bytes, at most %d are allowed", len(evidence), MaxEvidence)
	case evidence[0] != version:
		return nil, fmt.Errorf("evidence has version %d, want %d", evidence[0], version)
	}
	var chain [][]byte
	for rest := evidence[1:]; len(rest) > 0; {
		if len(chain) == MaxCertificates {
			return nil, fmt.Errorf("chain has more than %d certificates", MaxCertificates)
		}
		if len(rest) < 2 {
			return nil, errors.New("evidence is cut off")
		}
		n := int(binary.BigEndian.Uint16(rest))
		if n == 0 || n > len(rest)-2 {
			return nil, errors.New("evidence is cut off")
		}
		chain = append(chain, rest[2:2+n])
		rest = rest[2+n:]
	}
	if len(chain) == 0 {
		return nil, errors.New("evidence has no certificate")
	}
	return chain, nil
}

// encodeBytes puts the version before a challenge or a signature.
func encodeBytes(b []byte) []byte { return append([]byte{version}, b...) }

// decodeChallenge is for the agent, which does not trust the CA's bytes either.
func decodeChallenge(b []byte) (nonce []byte, err error) {
	if len(b) != 1+nonceSize || b[0] != version {
		return nil, errors.New("challenge is not of version 1")
	}
	return b[1:], nil
}

// decodeResponse is the inverse of encodeBytes for a signature.
func decodeResponse(b []byte) (signature []byte, err error) {
	if len(b) < 2 || len(b) > 1+maxSignature || b[0] != version {
		return nil, errors.New("response is not of version 1")
	}
	return b[1:], nil
}

// statement is what is signed.
func statement(nonce, binding, leaf []byte) ([]byte, error) {
	if len(nonce) != nonceSize || len(binding) != sha256.Size {
		return nil, errors.New("nonce or binding has the wrong length")
	}
	m := make([]byte, labelSize, labelSize+nonceSize+2*sha256.Size)
	copy(m, label)
	m = append(m, nonce...)
	m = append(m, binding...)
	sum := sha256.Sum256(leaf)
	return append(m, sum[:]...), nil
}

// checkKey is the key policy, for each certificate of a chain. It also bounds
// what one verification costs.
func checkKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return fmt.Errorf("RSA key of %d bits, want 2048 to 4096", n)
		}
		if k.E != 65537 {
			return fmt.Errorf("RSA key with exponent %d, want 65537", k.E)
		}
		return nil
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
			return nil
		default:
			return errors.New("ECDSA key on a curve other than P-256, P-384 and P-521")
		}
	case ed25519.PublicKey:
		return nil
	default:
		return fmt.Errorf("key of type %T, want RSA, ECDSA or Ed25519", pub)
	}
}

// sign signs a statement in the one way that its key's kind has here.
func sign(key crypto.Signer, m []byte) ([]byte, error) {
	switch pub := key.Public().(type) {
	case *rsa.PublicKey:
		d := sha256.Sum256(m)
		return key.Sign(rand.Reader, d[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256})
	case *ecdsa.PublicKey:
		d, hash := digest(pub, m)
		return key.Sign(rand.Reader, d, hash)
	case ed25519.PublicKey:
		return key.Sign(rand.Reader, m, crypto.Hash(0))
	default:
		return nil, fmt.Errorf("key of type %T, want RSA, ECDSA or Ed25519", pub)
	}
}

// verify is the inverse of sign.
func verify(pub crypto.PublicKey, m, signature []byte) bool {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		d := sha256.Sum256(m)
		return rsa.VerifyPSS(k, crypto.SHA256, d[:], signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	case *ecdsa.PublicKey:
		d, _ := digest(k, m)
		return ecdsa.VerifyASN1(k, d, signature)
	case ed25519.PublicKey:
		return ed25519.Verify(k, m, signature)
	default:
		return false
	}
}

// digest hashes for an ECDSA key with the SHA-2 of its strength.
func digest(k *ecdsa.PublicKey, m []byte) ([]byte, crypto.Hash) {
	switch k.Curve {
	case elliptic.P521():
		d := sha512.Sum512(m)
		return d[:], crypto.SHA512
	case elliptic.P384():
		d := sha512.Sum384(m)
		return d[:], crypto.SHA384
	default:
		d := sha256.Sum256(m)
		return d[:], crypto.SHA256
	}
}

// checkLeaf refuses a certificate that is not one of a machine.
func checkLeaf(c *x509.Certificate) error {
	switch {
	case c.IsCA:
		return errors.New("is a CA certificate")
	case c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("may sign certificates or revocation lists")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("key usage lacks digitalSignature")
	default:
		return nil
	}
}
