package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/store"
)

// psatVerifier makes the CA's half of k8s_psat, with what verifies each cluster's
// tokens, and its pods where they are followed. It talks to no cluster yet.
func psatVerifier(s config.Section, db *store.DB, kubernetes *clusters, reg prometheus.Registerer, logger *slog.Logger) (*k8spsat.Verifier, error) {
	var c k8spsat.Config
	if err := s.Decode(&c); err != nil {
		return nil, err
	}
	if err := c.Check(); err != nil {
		if bad, ok := errors.AsType[*k8spsat.SettingError](err); ok {
			return nil, s.Errorf(bad.Setting, "%s", bad.Message)
		}
		return nil, err
	}
	var all []k8spsat.Cluster
	for i, cluster := range c.Clusters {
		tokens, setting, err := psatTokens(cluster, kubernetes, reg, logger)
		if err != nil {
			return nil, s.Errorf(fmt.Sprintf("clusters[%d].%s", i, setting), "%v", err)
		}
		verified := k8spsat.Cluster{Config: cluster, Tokens: clusterTokens{tokens}}
		for _, p := range kubernetes.pods {
			if p.name == cluster.Name {
				verified.Pods = p.pods
			}
		}
		all = append(all, verified)
	}
	return k8spsat.NewVerifier(all, db), nil
}

// psatTokens returns what verifies a cluster's tokens, or the setting that is wrong.
func psatTokens(c k8spsat.ClusterConfig, kubernetes *clusters, reg prometheus.Registerer, logger *slog.Logger) (tokens kube.TokenVerifier, setting string, err error) {
	if c.JWKS != nil {
		keys, err := kube.NewKeys(kube.KeysConfig(*c.JWKS))
		return keys, "jwks", err
	}
	if client, ok := kubernetes.clients[c.Name]; ok && *c.TokenReview == (k8spsat.TokenReviewConfig{}) {
		return kube.NewReviewer(client), "", nil
	}
	client, err := kube.Open(kube.Config{
		Name: c.Name, Kubeconfig: c.TokenReview.Kubeconfig, Context: c.TokenReview.Context,
		UserAgent: "meshid-ca/" + cli.Version(), Logger: logger, Registerer: reg,
	})
	if err != nil {
		return nil, "token_review", err
	}
	return kube.NewReviewer(client), "", nil
}

// clusterTokens says what a cluster's tokens prove in the words of node attestation.
type clusterTokens struct{ kube.TokenVerifier }

// Verify implements k8spsat.Tokens.
func (t clusterTokens) Verify(ctx context.Context, token, audience string) (*k8spsat.Token, error) {
	id, err := t.TokenVerifier.Verify(ctx, token, audience)
	if errors.Is(err, kube.ErrToken) {
		err = fmt.Errorf("%w: %w", attest.ErrRefused, err)
	}
	return (*k8spsat.Token)(id), err
}
