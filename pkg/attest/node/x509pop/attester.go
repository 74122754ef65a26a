package x509pop

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
)

// AgentConfig says where the machine's certificate is. Both files are read at
// each attestation, so that the machine's own renewal takes effect.
type AgentConfig struct {
	// Certificate is the path of a PEM file: the machine's certificate, then its
	// intermediates.
	Certificate string `yaml:"certificate"`
	// Key is the path of the private key, PEM.
	Key string `yaml:"key"`
}

// Attester is the agent's half. It is not for concurrent use.
type Attester struct {
	config AgentConfig
	pair   *tls.Certificate // of the attempt that is under way
}

// NewAttester returns the agent's half. It reads nothing yet; Check does.
func NewAttester(c AgentConfig) (*Attester, error) {
	if c.Certificate == "" || c.Key == "" {
		return nil, errors.New("x509pop: set certificate and key to the paths of the machine's certificate and private key")
	}
	return &Attester{config: c}, nil
}

// Method returns "x509pop".
func (*Attester) Method() string { return Method }

// Evidence returns the machine's chain. Only the response is bound to the key.
func (a *Attester) Evidence(context.Context, []byte) ([]byte, error) {
	pair, evidence, err := a.load()
	if err != nil {
		return nil, err
	}
	a.pair = pair
	return evidence, nil
}

// Respond signs the challenge with the machine's key.
func (a *Attester) Respond(_ context.Context, binding, challenge []byte) ([]byte, error) {
	nonce, err := decodeChallenge(challenge)
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w", err)
	}
	pair := a.pair
	a.pair = nil
	if pair == nil {
		return nil, errors.New("x509pop: challenge before the evidence was sent, or a second one")
	}
	m, err := statement(nonce, binding, pair.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w", err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("x509pop: key %s cannot sign", a.config.Key)
	}
	signature, err := sign(key, m)
	if err != nil {
		return nil, fmt.Errorf("x509pop: sign with %s: %w", a.config.Key, err)
	}
	return encodeBytes(signature), nil
}

// load reads the files and makes the checks that the CA will make, so that a
// mistake is named where it can be mended.
func (a *Attester) load() (*tls.Certificate, []byte, error) {
	st, err := os.Stat(a.config.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("x509pop: %w", err)
	}
	if st.Mode()&0o007 != 0 {
		return nil, nil, fmt.Errorf("x509pop: key %s has mode %#o, so every user of the machine can be this machine: chmod it to 0600", a.config.Key, st.Mode().Perm())
	}
	pair, err := tls.LoadX509KeyPair(a.config.Certificate, a.config.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("x509pop: load %s and %s: %w", a.config.Certificate, a.config.Key, err)
	}
	if err := checkLeaf(pair.Leaf); err != nil {
		return nil, nil, fmt.Errorf("x509pop: certificate %s: %w", a.config.Certificate, err)
	}
	if err := checkKey(pair.Leaf.PublicKey); err != nil {
		return nil, nil, fmt.Errorf("x509pop: certificate %s: %w", a.config.Certificate, err)
	}
	evidence, err := encodeChain(pair.Certificate)
	if err != nil {
		return nil, nil, fmt.Errorf("x509pop: certificate %s: %w", a.config.Certificate, err)
	}
	return &pair, evidence, nil
}
