package istio

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

// discoveryPause is how long after a provider did not answer it is asked again.
const discoveryPause = 2 * time.Second

// OIDC verifies tokens of an OpenID Connect provider whose subjects are service
// accounts, "system:serviceaccount:<namespace>:<name>", as Istio has it for machines
// outside of clusters.
type OIDC struct {
	issuer string
	client *http.Client

	mu       sync.Mutex // guards what follows
	verifier *oidc.IDTokenVerifier
	tried    time.Time
	err      error
}

// NewOIDC returns the Tokens of a provider, which is asked by client for its keys when
// they are needed.
func NewOIDC(issuer string, client *http.Client) *OIDC { return &OIDC{issuer: issuer, client: client} }

// Verify implements Tokens.
func (o *OIDC) Verify(ctx context.Context, token string, audiences []string) (*Token, error) {
	ctx = oidc.ClientContext(ctx, o.client)
	verifier, err := o.discover(ctx)
	if err != nil {
		return nil, err
	}
	verified, err := verifier.Verify(ctx, token)
	switch {
	case err != nil && (ctx.Err() != nil || strings.Contains(err.Error(), "fetching keys")): // go-oidc has no type for it
		return nil, fmt.Errorf("keys of %s: %w", o.issuer, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrToken, err)
	case !slices.ContainsFunc(verified.Audience, func(a string) bool { return slices.Contains(audiences, a) }):
		return nil, fmt.Errorf("%w: it is for %.200q, want one of %q", ErrToken, verified.Audience, audiences)
	}
	account, ok := strings.CutPrefix(verified.Subject, "system:serviceaccount:")
	namespace, name, two := strings.Cut(account, ":")
	if !ok || !two || namespace == "" || name == "" || strings.Contains(name, ":") {
		return nil, fmt.Errorf("%w: its subject %.200q is no service account", ErrToken, verified.Subject)
	}
	return &Token{Namespace: namespace, ServiceAccount: name, Expires: verified.Expiry}, nil
}

// discover returns the verifier with the provider's keys. The keys are fetched again by
// it when a token is signed with one that is not known.
func (o *OIDC) discover(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.verifier != nil {
		return o.verifier, nil
	}
	if time.Since(o.tried) < discoveryPause {
		return nil, o.err
	}
	// The context goes into the key set, which outlives this call.
	provider, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), o.client), o.issuer)
	o.tried = time.Now()
	if err != nil {
		o.err = fmt.Errorf("discover %s: %w", o.issuer, err)
		return nil, o.err
	}
	o.verifier = provider.VerifierContext(oidc.ClientContext(context.WithoutCancel(ctx), o.client), &oidc.Config{SkipClientIDCheck: true})
	return o.verifier, nil
}

// CheckIssuer checks the address of a provider.
func CheckIssuer(issuer string) error {
	if !strings.HasPrefix(issuer, "https://") {
		return errors.New("it must begin with https://: who can change its keys on the way, can be everybody")
	}
	return nil
}
