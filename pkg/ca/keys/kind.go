package keys

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	"go.step.sm/crypto/keyutil"
	"go.step.sm/crypto/kms/apiv1"
)

// Kind is the kind of a new key, as it is configured.
type Kind string

// The kinds of keys.
const (
	P256    Kind = "ec-p256"
	P384    Kind = "ec-p384"
	RSA3072 Kind = "rsa-3072"
	RSA4096 Kind = "rsa-4096"
	Ed25519 Kind = "ed25519"
)

// kinds says how each library calls a kind.
var kinds = map[Kind]struct {
	kty, curve string
	bits       int
	signature  apiv1.SignatureAlgorithm
}{
	P256:    {"EC", "P-256", 0, apiv1.ECDSAWithSHA256},
	P384:    {"EC", "P-384", 0, apiv1.ECDSAWithSHA384},
	RSA3072: {"RSA", "", 3072, apiv1.SHA256WithRSA},
	RSA4096: {"RSA", "", 4096, apiv1.SHA256WithRSA},
	Ed25519: {"OKP", "Ed25519", 0, apiv1.PureEd25519},
}

// ParseKind returns the kind that text names; P-256 for "".
func ParseKind(text string) (Kind, error) {
	if text == "" {
		return P256, nil
	}
	if _, ok := kinds[Kind(text)]; ok {
		return Kind(text), nil
	}
	var names []string
	for k := range kinds {
		names = append(names, string(k))
	}
	slices.Sort(names)
	return "", fmt.Errorf("%.40q is not a kind of key; write one of %s", text, strings.Join(names, ", "))
}

// Algorithm is that of the kind's keys, as crypto/x509 calls it.
func (k Kind) Algorithm() x509.PublicKeyAlgorithm {
	switch kinds[k].kty {
	case "EC":
		return x509.ECDSA
	case "RSA":
		return x509.RSA
	case "OKP":
		return x509.Ed25519
	default:
		return x509.UnknownPublicKeyAlgorithm
	}
}

// Generate makes a key of the kind in memory.
func (k Kind) Generate() (crypto.Signer, error) {
	d := kinds[k]
	signer, err := keyutil.GenerateSigner(d.kty, d.curve, d.bits)
	if err != nil {
		return nil, fmt.Errorf("generate a key of kind %s: %w", k, err)
	}
	return signer, nil
}
