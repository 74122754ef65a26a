package ca

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ErrInitialised is wrapped by Init's error when the trust domain has a root.
var ErrInitialised = errors.New("the trust domain has a root already")

// Init makes the first root of the trust domain, as Open would, and nothing else:
// for whoever wants to see it before anything is signed. It records why and who.
// The reference is that of the root's key.
func Init(ctx context.Context, cfg Config, why, actor string) (made Authority, reference string, err error) {
	cfg.Registerer = prometheus.NewRegistry()
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return made, "", fmt.Errorf("configure the authority: %w", err)
	}
	if cfg.Upstream != nil {
		return made, "", errors.New("the root is that of the upstream CA: it is made there")
	}
	t, err := cfg.Store.Trust(ctx)
	if err != nil {
		return made, "", fmt.Errorf("read the roots: %w", err)
	}
	if len(t.Roots) > 0 {
		return made, "", fmt.Errorf("%w: see it with: ca authority list; make another with: ca authority rotate", ErrInitialised)
	}
	c := &CA{cfg: cfg, log: cfg.Logger}
	s, err := c.createRoot(ctx, time.Now(), t, why, actor)
	if err != nil {
		return made, "", err
	}
	return Authority{ID: s.signer.id, Role: RoleRoot, State: s.signer.state, Certificate: s.signer.cert}, s.signer.reference, nil
}
