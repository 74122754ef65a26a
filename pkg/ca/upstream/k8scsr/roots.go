package k8scsr

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	// lookEvery is how often the roots are looked at.
	lookEvery = time.Minute
	// rootsTimeout bounds a look that nobody waits for.
	rootsTimeout = 30 * time.Second
)

// roots reads the configured roots, at least one.
func (s *CA) roots(ctx context.Context) ([]*x509.Certificate, error) {
	c := s.config.Roots
	if c.File != "" {
		all, err := upstream.ReadCertificates(c.File)
		if err != nil {
			return nil, fmt.Errorf("roots.file: %w", err)
		}
		return all, nil
	}
	text, err := s.published(ctx)
	if err != nil {
		return nil, failed("read the roots", err)
	}
	all, err := upstream.ParseChain(upstream.MaxRoots, text)
	if err == nil && len(all) == 0 {
		err = errors.New("there is no certificate in it")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", upstream.ErrDenied, c.where(), err)
	}
	return all, nil
}

func (r *Roots) where() string {
	if r.TrustBundle != "" {
		return "the ClusterTrustBundle " + r.TrustBundle
	}
	return fmt.Sprintf("the key %s of the ConfigMap %s/%s", r.ConfigMap.Key, r.ConfigMap.Namespace, r.ConfigMap.Name)
}

// published reads the roots as the cluster has them.
func (s *CA) published(ctx context.Context) (string, error) {
	c := s.config.Roots
	if c.TrustBundle == "" {
		var m struct {
			Data map[string]string `json:"data"`
		}
		err := s.client.Get(ctx, kube.Path{Resource: kube.Resource{Version: "v1", Plural: "configmaps"}, Namespace: c.ConfigMap.Namespace, Name: c.ConfigMap.Name}, &m)
		return m.Data[c.ConfigMap.Key], err
	}
	var b struct {
		Spec struct {
			TrustBundle string `json:"trustBundle"`
		} `json:"spec"`
	}
	at := kube.Path{Resource: kube.Resource{Group: apiGroup, Version: "v1", Plural: "clustertrustbundles"}, Name: c.TrustBundle}
	err := s.client.Get(ctx, at, &b)
	if errors.Is(err, kube.ErrNotFound) { // v1 came with Kubernetes 1.37
		at.Version = "v1beta1"
		err = s.client.Get(ctx, at, &b)
	}
	return b.Spec.TrustBundle, err
}

// WatchRoots implements upstream.RootWatcher.
func (s *CA) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	return upstream.LookForRoots(ctx, func(ctx context.Context) ([]*x509.Certificate, time.Duration, error) {
		ctx, cancel := context.WithTimeout(ctx, rootsTimeout)
		defer cancel()
		roots, err := s.roots(ctx)
		return roots, lookEvery, err
	}, changed)
}
