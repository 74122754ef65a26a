package stepca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

// signer reads the provisioner's key, which may have been replaced, and until when
// it may be used; zero for always.
func (s *CA) signer() (_ jose.Signer, notAfter time.Time, _ error) {
	o := (&jose.SignerOptions{}).WithType("JWT")
	if s.config.Certificate != "" {
		return x5cSigner(s.config, o)
	}
	data, err := upstream.ReadSecret(s.config.Key)
	if err != nil {
		return nil, notAfter, fmt.Errorf("key: %w", err)
	}
	defer clear(data)
	key, err := s.readJWK(data)
	if err != nil {
		return nil, notAfter, fmt.Errorf("key: %s: %w", s.config.Key, err)
	}
	signer, err := newSigner(key.Key, *key, o)
	return signer, notAfter, err
}

// x5cSigner signs with a certificate's key, and shows the certificates.
func x5cSigner(c Config, o *jose.SignerOptions) (_ jose.Signer, notAfter time.Time, _ error) {
	pair, err := upstream.ReadPair(c.Certificate, c.Key)
	if err != nil {
		return nil, notAfter, err
	}
	chain := make([]string, len(pair.Certificate))
	for i, der := range pair.Certificate {
		chain[i] = base64.StdEncoding.EncodeToString(der)
	}
	signer, err := newSigner(pair.PrivateKey, pair.PrivateKey, o.WithHeader("x5c", chain))
	return signer, pair.Leaf.NotAfter, err
}

// readJWK reads a JWK, which may be encrypted with a password.
func (s *CA) readJWK(data []byte) (*jose.JSONWebKey, error) {
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, errors.New("it is PEM: a JWK provisioner's key is a JWK; for an X5C provisioner, set certificate too")
	}
	encrypted, err := parseEncrypted(string(bytes.TrimSpace(data)), []jose.KeyAlgorithm{jose.PBES2_HS256_A128KW, jose.PBES2_HS384_A192KW, jose.PBES2_HS512_A256KW},
		[]jose.ContentEncryption{jose.A128GCM, jose.A256GCM, jose.A128CBC_HS256, jose.A256CBC_HS512})
	if err == nil {
		if s.config.PasswordFile == "" {
			return nil, errors.New("it is encrypted: set password_file to the path of its password")
		}
		password, err := upstream.ReadSecret(s.config.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("password_file: %w", err)
		}
		defer clear(password)
		if data, err = encrypted.Decrypt(bytes.TrimRight(password, "\r\n")); err != nil {
			return nil, fmt.Errorf("the password in %s does not open it", s.config.PasswordFile)
		}
		defer clear(data)
	} else if s.config.PasswordFile != "" {
		return nil, errors.New("it is not encrypted: remove password_file")
	}
	var key jose.JSONWebKey
	if err := json.Unmarshal(data, &key); err != nil || !key.Valid() || key.IsPublic() {
		return nil, errors.New("it is no private JWK: write that of the provisioner, with its kid") // the library's error may quote it
	}
	if key.KeyID == "" {
		return nil, errors.New(`the JWK has no "kid": add that of the provisioner`)
	}
	return &key, nil
}

// parseEncrypted reads both forms of a JWE.
func parseEncrypted(text string, keys []jose.KeyAlgorithm, contents []jose.ContentEncryption) (*jose.JSONWebEncryption, error) {
	if strings.HasPrefix(text, "{") {
		return jose.ParseEncryptedJSON(text, keys, contents)
	}
	return jose.ParseEncryptedCompact(text, keys, contents)
}

// newSigner signs with as, which is private or holds it.
func newSigner(private, as any, o *jose.SignerOptions) (jose.Signer, error) {
	var algorithm jose.SignatureAlgorithm
	switch k := private.(type) {
	case *ecdsa.PrivateKey:
		algorithm = map[int]jose.SignatureAlgorithm{256: jose.ES256, 384: jose.ES384, 521: jose.ES512}[k.Curve.Params().BitSize]
	case *rsa.PrivateKey:
		algorithm = jose.RS256
	case ed25519.PrivateKey:
		algorithm = jose.EdDSA
	}
	if algorithm == "" {
		return nil, fmt.Errorf("key: a key of type %T cannot sign tokens: use P-256, RSA or Ed25519", private)
	}
	return jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: as}, o)
}
