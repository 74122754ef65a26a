// Package jointoken answers "which machine is this?" by a secret that an
// operator made for it and that can be used once.
//
// The token itself says nothing but that its holder is meant: the node's name,
// its labels and who made it come from the row that the CA stored when the token
// was made. The CA keeps only the token's SHA-256.
//
// What is sent (the wire format, version 1): one byte 0x01 and the 32 bytes of
// the token. It is a secret on its way to the CA, so the agent sends it only
// over TLS that has authenticated the CA. There is no challenge.
package jointoken

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// Method is the method's name.
const Method = "join_token"

const (
	// prefix lets people and secret scanners tell what the string is.
	prefix  = "meshid_jt_"
	size    = 32 // bytes of randomness
	version = 1
)

// Why a token is refused; Tokens.ConsumeToken wraps one of them.
var (
	ErrUnknown = errors.New("join token is unknown")
	ErrUsed    = errors.New("join token was used before")
	ErrExpired = errors.New("join token has expired")
)

// Token is what was stored when the token was made.
type Token struct {
	// NodeName is the id of the node under this method.
	NodeName string
	// CreatedBy is the operator who made it.
	CreatedBy string
	Labels    map[string]string
	ExpiresAt time.Time
}

// Tokens are the tokens that were made.
type Tokens interface {
	// ConsumeToken uses up the token with this SHA-256, durably: of any number
	// of concurrent calls, on all CAs, one succeeds. The error wraps ErrUnknown,
	// ErrUsed or ErrExpired; any other means that it is not known whether the
	// token is good.
	ConsumeToken(ctx context.Context, sha256 [32]byte, now time.Time) (*Token, error)
}

// NewToken makes a token: the secret for the machine, and the SHA-256 to store.
func NewToken() (secret string, sum [32]byte, err error) {
	raw := make([]byte, size)
	if _, err := rand.Read(raw); err != nil {
		return "", sum, fmt.Errorf("make join token: %w", err)
	}
	return prefix + base64.RawURLEncoding.EncodeToString(raw), sha256.Sum256(raw), nil
}

// parse returns the bytes of a token. Its errors do not repeat it.
func parse(secret string) ([]byte, error) {
	secret = strings.TrimSpace(secret) // a file ends with a line feed
	text, ok := strings.CutPrefix(secret, prefix)
	if !ok {
		return nil, fmt.Errorf("join token does not begin with %q: make one with `ca token create`", prefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != size || strings.ContainsAny(text, "\r\n") { // which base64 skips
		return nil, errors.New("join token is cut off or altered: copy it again, or make a new one with `ca token create`")
	}
	return raw, nil
}

// Attester is the agent's half. It holds a secret.
type Attester struct{ secret string }

// NewAttester returns the agent's half for a token.
func NewAttester(token string) *Attester { return &Attester{secret: token} }

// Method returns "join_token".
func (*Attester) Method() string { return Method }

// Evidence returns the token. It cannot be bound to a key.
func (a *Attester) Evidence(context.Context, []byte) ([]byte, error) {
	raw, err := parse(a.secret)
	if err != nil {
		return nil, err
	}
	return encode(raw), nil
}

// Respond fails: the method has no challenge.
func (*Attester) Respond(context.Context, []byte, []byte) ([]byte, error) {
	return nil, errors.New("join token: the CA sent a challenge, but this method has none")
}

// LogValue hides the token.
func (*Attester) LogValue() slog.Value { return slog.StringValue("[join token]") }

// String hides the token.
func (*Attester) String() string { return "[join token]" }

// GoString hides the token.
func (*Attester) GoString() string { return "[join token]" }

// Verifier is the CA's half. It is safe for concurrent use.
type Verifier struct{ tokens Tokens }

// NewVerifier returns the CA's half over the stored tokens.
func NewVerifier(tokens Tokens) *Verifier { return &Verifier{tokens: tokens} }

// Method returns "join_token".
func (*Verifier) Method() string { return Method }

// Verify uses the token up. Nothing compares the secret: it is looked up by its
// hash, so that the time it takes tells nothing about a stored token.
func (v *Verifier) Verify(ctx context.Context, claim attest.Claim, _ attest.Challenge) (*attributesv1.Node, error) {
	raw, err := decode(claim.Evidence)
	if err != nil {
		return nil, fmt.Errorf("join token: %w: %w", attest.ErrRefused, err)
	}
	now := time.Now()
	t, err := v.tokens.ConsumeToken(ctx, sha256.Sum256(raw), now)
	switch {
	case errors.Is(err, ErrUnknown), errors.Is(err, ErrUsed), errors.Is(err, ErrExpired):
		return nil, fmt.Errorf("join token: %w: %w", attest.ErrRefused, err)
	case err != nil:
		return nil, fmt.Errorf("join token: %w", err)
	case !now.Before(t.ExpiresAt):
		return nil, fmt.Errorf("join token: %w: %w", attest.ErrRefused, ErrExpired)
	case t.NodeName == "":
		return nil, fmt.Errorf("join token: %w: it was stored without a node name", attest.ErrRefused)
	}
	return &attributesv1.Node{
		Method:    Method,
		Id:        t.NodeName,
		Labels:    maps.Clone(t.Labels),
		JoinToken: &attributesv1.JoinToken{CreatedBy: t.CreatedBy},
	}, nil
}

// TokenSHA256 returns the SHA-256 of the token in the evidence, by which records
// name it, and false if no token is in it.
func (*Verifier) TokenSHA256(evidence []byte) (sum [32]byte, ok bool) {
	raw, err := decode(evidence)
	if err != nil {
		return sum, false
	}
	return sha256.Sum256(raw), true
}

// encode makes the evidence of a token.
func encode(raw []byte) []byte { return append([]byte{version}, raw...) }

// decode is the inverse of encode, for the bytes of strangers.
func decode(evidence []byte) ([]byte, error) {
	switch {
	case len(evidence) == 0:
		return nil, errors.New("evidence is empty")
	case evidence[0] != version:
		return nil, fmt.Errorf("evidence has version %d, want %d", evidence[0], version)
	case len(evidence) != 1+size:
		return nil, fmt.Errorf("evidence has %d bytes, want %d", len(evidence), 1+size)
	}
	return evidence[1:], nil
}
