package k8spsat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// DefaultTokenFile is where the agent's manifest mounts the projected token.
const DefaultTokenFile = "/var/run/secrets/meshid/token" //nolint:gosec // a path

// AgentConfig says which cluster this node is in, and where its token is.
type AgentConfig struct {
	// Name of the cluster, as the CA's configuration has it.
	Cluster string `yaml:"cluster"`
	// File of the projected service account token, read at each attestation. Its
	// audience is what the CA wants, meshid by default.
	TokenFile string `yaml:"token_file" default:"/var/run/secrets/meshid/token"`
}

// Attester is the agent's half. It is not for concurrent use.
type Attester struct{ config AgentConfig }

// NewAttester returns the agent's half. It reads nothing yet.
func NewAttester(c AgentConfig) (*Attester, error) {
	if c.Cluster == "" {
		return nil, errors.New("cluster is missing; write its name as the CA's configuration has it")
	}
	if err := CheckCluster(c.Cluster); err != nil {
		return nil, err
	}
	if c.TokenFile == "" {
		c.TokenFile = DefaultTokenFile
	}
	return &Attester{config: c}, nil
}

// Method returns "k8s_psat".
func (*Attester) Method() string { return Method }

// Evidence returns the token as it is in the file now. It cannot be bound to a key.
func (a *Attester) Evidence(context.Context, []byte) ([]byte, error) {
	f, err := os.Open(a.config.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("%s: read the service account token: %w; mount a projected volume with it, for audience %q", Method, err, DefaultAudience)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	token, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: read the service account token: %w", Method, err)
	case len(token) > maxToken:
		return nil, fmt.Errorf("%s: %s has more than %d bytes: it is no service account token", Method, a.config.TokenFile, maxToken)
	}
	token = bytes.TrimSpace(token)
	if bytes.Count(token, []byte(".")) != 2 {
		return nil, fmt.Errorf("%s: %s holds no service account token", Method, a.config.TokenFile)
	}
	return encode(a.config.Cluster, string(token)), nil
}

// Respond fails: the method has no challenge.
func (*Attester) Respond(context.Context, []byte, []byte) ([]byte, error) {
	return nil, fmt.Errorf("%s: the CA sent a challenge, but this method has none", Method)
}
