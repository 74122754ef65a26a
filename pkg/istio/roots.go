package istio

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/internal/kube"
)

// What the control plane names things, and reads them by.
const (
	// DefaultRootsName is that of the ConfigMap that sidecars, gateways and ztunnel mount.
	DefaultRootsName = "istio-ca-root-cert"
	rootsKey         = "root-cert.pem"
	// labelConfig marks what belongs to Istio's configuration.
	labelConfig = "istio.io/config"
	// annotationSequence is the number of the trust bundle that was written.
	annotationSequence = "meshid.io/bundle-sequence"
)

const (
	// writers is how many ConfigMaps are written at the same time.
	writers = 8
	// recheck is how often all is compared without a reason, and how soon it is tried
	// again after a failure.
	recheck = time.Minute
	retry   = 2 * time.Second
	// newerGrace is how long a ConfigMap of a newer bundle than ours is left alone: another
	// CA of the trust domain has heard of a change before this one.
	newerGrace = 30 * time.Second
)

var (
	namespaces = kube.Path{Resource: kube.Resource{Version: "v1", Plural: "namespaces"}}
	configMaps = kube.Path{Resource: kube.Resource{Version: "v1", Plural: "configmaps"}}
)

// RootsConfig is what NewRoots needs.
type RootsConfig struct {
	Client *kube.Client
	// Bundle returns the roots, PEM, and the number of this bundle, which grows.
	Bundle func() (pem string, sequence uint64)
	// Name of the ConfigMaps; default DefaultRootsName.
	Name string
	// Selector of the namespaces, by label, as kubectl writes it; empty for all.
	Selector string
	Logger   *slog.Logger
	// Report is called with what is wrong, and with "" when all is well.
	Report func(problem string)
}

// Roots keeps the roots in a ConfigMap of each namespace, as istiod does while it is the
// CA. Changes by others are repaired when they happen.
type Roots struct {
	cfg  RootsConfig
	feed []*kube.Feed
	wake chan struct{} // capacity 1: look at the state

	mu         sync.Mutex // guards what follows
	namespaces map[string]bool
	written    map[string]*configMap // by namespace
	newer      map[string]time.Time  // since when one has a newer bundle than ours
}

// configMap is a ConfigMap, to be read and to be written.
type configMap struct {
	kube.Object
	Data map[string]string `json:"data"`
}

type namespace struct {
	kube.Object
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

// NewRoots returns what Run has to be called on. The client may list and watch
// namespaces and ConfigMaps, and create and patch ConfigMaps.
func NewRoots(cfg RootsConfig) *Roots {
	if cfg.Name == "" {
		cfg.Name = DefaultRootsName
	}
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	r := &Roots{
		cfg: cfg, wake: make(chan struct{}, 1),
		namespaces: make(map[string]bool), written: make(map[string]*configMap), newer: make(map[string]time.Time),
	}
	r.feed = []*kube.Feed{
		kube.Follow(cfg.Client, namespaces, kube.FollowOptions{Labels: cfg.Selector}, func(n *namespace) namespaceState {
			return namespaceState{n.Metadata.Name, n.Status.Phase != "Terminating" && n.Metadata.DeletionTimestamp == nil}
		}, kube.Reader[namespaceState](namespaceReader{r})),
		kube.Follow(cfg.Client, configMaps, kube.FollowOptions{Fields: "metadata.name=" + cfg.Name}, func(c *configMap) *configMap { return c },
			kube.Reader[*configMap](configMapReader{r})),
	}
	return r
}

// Changed says that the bundle may have changed. It never blocks.
func (r *Roots) Changed() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run keeps them until ctx ends.
func (r *Roots) Run(ctx context.Context) error {
	var feeds sync.WaitGroup
	defer feeds.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, f := range r.feed {
		feeds.Go(func() { f.Run(ctx) })
	}
	timer := time.NewTimer(recheck)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-timer.C:
		}
		timer.Reset(r.reconcile(ctx))
	}
}

// reconcile writes what is not as it should be, and returns when to look again.
func (r *Roots) reconcile(ctx context.Context) time.Duration {
	for _, f := range r.feed {
		if s := f.State(); !s.Synced { // what is there is not known: nothing is wrong yet
			if s.Err != nil {
				r.cfg.Report(fmt.Sprintf("the roots cannot be kept in cluster %s: %v", r.cfg.Client.Name(), s.Err))
			}
			return retry
		}
	}
	pem, sequence := r.cfg.Bundle()
	due := r.due(time.Now(), pem, sequence)
	var group errgroup.Group
	group.SetLimit(writers)
	var mu sync.Mutex // guards failed
	var failed []error
	for _, namespace := range due {
		group.Go(func() error {
			if err := r.write(ctx, namespace, pem, sequence); err != nil && ctx.Err() == nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, err)
			}
			return nil
		})
	}
	_ = group.Wait() // the errors are in failed
	if len(failed) > 0 {
		r.cfg.Logger.WarnContext(ctx, "roots cannot be written", "cluster", r.cfg.Client.Name(), "namespaces", len(failed), "err", failed[0])
		r.cfg.Report(fmt.Sprintf("the roots cannot be written in %d namespaces of cluster %s: %v", len(failed), r.cfg.Client.Name(), failed[0]))
		return retry
	}
	if len(due) > 0 {
		r.cfg.Logger.InfoContext(ctx, "roots written", "cluster", r.cfg.Client.Name(), "namespaces", len(due), "sequence", sequence)
	}
	r.cfg.Report("")
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.newer) > 0 {
		return retry
	}
	return recheck
}

// due returns the namespaces whose ConfigMap is not as it should be.
func (r *Roots) due(now time.Time, pem string, sequence uint64) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var due []string
	for _, namespace := range slices.Sorted(maps.Keys(r.namespaces)) {
		if !r.namespaces[namespace] {
			continue
		}
		c := r.written[namespace]
		if c != nil && c.Data[rootsKey] == pem && c.Metadata.Labels[labelConfig] == "true" {
			delete(r.newer, namespace)
			continue
		}
		if c != nil {
			if theirs, err := strconv.ParseUint(c.Metadata.Annotations[annotationSequence], 10, 64); err == nil && theirs > sequence {
				since, known := r.newer[namespace]
				if !known {
					r.newer[namespace] = now
				}
				if !known || now.Sub(since) < newerGrace {
					continue
				}
			}
		}
		delete(r.newer, namespace)
		due = append(due, namespace)
	}
	return due
}

// write sets what belongs to us in the ConfigMap of a namespace, and nothing else. A
// namespace that has gone needs none.
func (r *Roots) write(ctx context.Context, namespace, pem string, sequence uint64) error {
	path := configMaps
	path.Namespace, path.Name = namespace, r.cfg.Name
	object := &configMap{
		Object: kube.Object{APIVersion: "v1", Kind: "ConfigMap", Metadata: kube.Meta{
			Name: r.cfg.Name, Namespace: namespace, Labels: map[string]string{labelConfig: "true"},
			Annotations: map[string]string{annotationSequence: strconv.FormatUint(sequence, 10)},
		}},
		Data: map[string]string{rootsKey: pem},
	}
	err := r.cfg.Client.Apply(ctx, path, object, nil)
	if errors.Is(err, kube.ErrNotFound) {
		return nil
	}
	if err != nil && !r.living(namespace) {
		return nil
	}
	return err
}

func (r *Roots) living(namespace string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.namespaces[namespace]
}

type namespaceState struct {
	name string
	live bool
}

type namespaceReader struct{ *Roots }

// Replace implements kube.Reader.
func (r namespaceReader) Replace(all []namespaceState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.namespaces)
	for _, n := range all {
		r.namespaces[n.name] = n.live
	}
	r.Changed()
}

// Set implements kube.Reader.
func (r namespaceReader) Set(n namespaceState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.namespaces[n.name] = n.live
	r.Changed()
}

// Delete implements kube.Reader.
func (r namespaceReader) Delete(n namespaceState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.namespaces, n.name)
	r.Changed()
}

type configMapReader struct{ *Roots }

// Replace implements kube.Reader.
func (r configMapReader) Replace(all []*configMap) {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.written)
	for _, c := range all {
		r.written[c.Metadata.Namespace] = c
	}
	r.Changed()
}

// Set implements kube.Reader.
func (r configMapReader) Set(c *configMap) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written[c.Metadata.Namespace] = c
	r.Changed()
}

// Delete implements kube.Reader.
func (r configMapReader) Delete(c *configMap) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.written, c.Metadata.Namespace)
	r.Changed()
}

// EncodeRoots writes roots as Istio's clients read them, in an order that all CAs of a
// trust domain have in common.
func EncodeRoots(roots []*x509.Certificate) string {
	sorted := slices.Clone(roots)
	slices.SortFunc(sorted, func(a, b *x509.Certificate) int {
		if !a.NotBefore.Equal(b.NotBefore) {
			return a.NotBefore.Compare(b.NotBefore)
		}
		return bytes.Compare(a.Raw, b.Raw)
	})
	sorted = slices.CompactFunc(sorted, func(a, b *x509.Certificate) bool { return bytes.Equal(a.Raw, b.Raw) })
	return encodeRoots(sorted)
}
