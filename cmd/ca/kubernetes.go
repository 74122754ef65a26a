package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/kubernetes"
	"github.com/meshid/meshid/pkg/placement"
	"github.com/meshid/meshid/pkg/server"
)

// maxClusters bounds the list of clusters: the pods of each are in memory.
const maxClusters = 64

// recallInterval is how often a CA that starts looks whether its clusters answer.
const recallInterval = 500 * time.Millisecond

// placementPolicies are the values of the setting placement.
var placementPolicies = map[string]placement.Policy{
	"": placement.Seen, "seen": placement.Seen, "strict": placement.Strict, "off": placement.Off,
}

// clusters are the API servers that are asked, and what is followed there.
type clusters struct {
	// clients are by the name of the cluster.
	clients map[string]*kube.Client
	pods    []clusterPods
	// kept are the clusters in which something is declared or published.
	kept []keptCluster

	mu sync.Mutex // guards what follows
	// changed are told that the trust bundle may have changed.
	changed []func()
	// placed is what the server asks; nil if no cluster is configured. placement is the
	// same.
	placed    server.Placement
	placement *placement.Placement
}

type clusterPods struct {
	name   string
	pods   *kube.Pods
	strict bool // nothing is issued while they may be old
}

// openClusters checks the settings, and makes the clients. It touches nothing but the
// files that settings name.
func openClusters(v *validated, reg prometheus.Registerer, logger *slog.Logger) (*clusters, error) {
	var problems []error
	bad := func(path, format string, args ...any) {
		problems = append(problems, v.file.Errorf(path, format, args...))
	}
	s := &v.Kubernetes
	if len(s.Clusters) > maxClusters {
		bad("kubernetes.clusters", "%d are too many; write %d at most", len(s.Clusters), maxClusters)
		return nil, errors.Join(problems...)
	}
	if s.OtherNodes != "" && s.OtherNodes != "refuse" && s.OtherNodes != "believe" {
		bad("kubernetes.other_nodes", "%q is neither refuse nor believe", s.OtherNodes)
	}
	all := &clusters{clients: map[string]*kube.Client{}}
	config := placement.Config{BelieveOthers: s.OtherNodes == "believe", Registerer: reg}
	names, labels := map[string]int{}, map[string]int{}
	for i, c := range s.Clusters {
		at := fmt.Sprintf("kubernetes.clusters[%d]", i)
		if !exportName.MatchString(c.Name) {
			bad(at+".name", "%q is no name of a cluster; write up to 32 of a-z, 0-9, _ and -, a letter first", c.Name)
			continue
		}
		if other, taken := names[c.Name]; taken {
			bad(at+".name", "%q is the name of kubernetes.clusters[%d] already; write another one", c.Name, other)
			continue
		}
		names[c.Name] = i
		policy, ok := placementPolicies[c.Placement]
		if !ok {
			bad(at+".placement", "%q is none of seen, strict, off", c.Placement)
		}
		if other, taken := labels[c.NodeLabel]; taken && c.NodeLabel != "" {
			bad(at+".node_label", "%q is that of kubernetes.clusters[%d] already; write another one", c.NodeLabel, other)
		}
		labels[c.NodeLabel] = i
		client, err := openCluster(c, reg, logger)
		if err != nil {
			setting := ".kubeconfig"
			if c.Kubeconfig == "" {
				setting = "" // there is nothing to point at
			}
			bad(at+setting, "%v", err)
			continue
		}
		all.clients[c.Name] = client
		if c.Bundle.Key == "" {
			c.Bundle.Key = "bundle.pem"
		}
		if name := c.Bundle.ClusterTrustBundle; name != "" {
			if err := kubernetes.CheckClusterBundleName(name); err != nil {
				bad(at+".bundle.cluster_trust_bundle", "%v", err)
			}
		}
		signer := c.PodCertificates.Signer
		if err := kubernetes.CheckSigner(signer); signer != "" && err != nil {
			bad(at+".pod_certificates.signer", "%v", err)
		}
		kept := keptCluster{client: client, settings: c}
		followed := placement.Cluster{Name: c.Name, Policy: policy, NodeLabel: c.NodeLabel, StaticPods: c.StaticPods}
		if policy != placement.Off || signer != "" {
			pods, err := kube.NewPods(client, reg)
			if err != nil {
				return nil, err
			}
			all.pods = append(all.pods, clusterPods{c.Name, pods, policy == placement.Strict})
			if policy != placement.Off {
				followed.Pods = pods
			}
			kept.certificates = kubernetes.PodCertificatesConfig{Client: client, Pods: pods, Strict: policy == placement.Strict, Signer: signer, Instance: v.Instance, Registerer: reg}
		}
		all.kept = append(all.kept, kept)
		config.Clusters = append(config.Clusters, followed)
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	if len(s.Clusters) == 0 {
		if s.OtherNodes != "" {
			bad("kubernetes.other_nodes", "there are no clusters beside which nodes could be others: write kubernetes.clusters")
		}
		return all, errors.Join(problems...)
	}
	placed, err := placement.New(config)
	all.placed, all.placement = placed, placed
	return all, err
}

func openCluster(c clusterSettings, reg prometheus.Registerer, logger *slog.Logger) (*kube.Client, error) {
	if c.Context != "" && c.Kubeconfig == "" {
		return nil, errors.New("context is one of a kubeconfig: write kubeconfig")
	}
	return kube.Open(kube.Config{
		Name: c.Name, Kubeconfig: c.Kubeconfig, Context: c.Context,
		UserAgent: "meshid-ca/" + cli.Version(), Logger: logger, Registerer: reg,
	})
}

// conditions are those of the clusters whose pods are followed.
func (c *clusters) conditions() []string {
	var names []string
	for _, p := range c.pods {
		names = append(names, p.condition())
	}
	for _, k := range c.kept {
		for _, p := range k.parts(nil, nil) {
			names = append(names, p.condition)
		}
	}
	return names
}

// keptCluster is a cluster in which something is declared or published.
type keptCluster struct {
	client   *kube.Client
	settings clusterSettings
	// certificates is what is needed to answer PodCertificateRequest objects, but for what
	// belongs to the server.
	certificates kubernetes.PodCertificatesConfig
}

// keptPart is one thing that is kept. Its condition is a warning while it is not.
type keptPart struct {
	condition string
	open      func(report func(string), logger *slog.Logger) (run func(context.Context) error, changed func())
}

// parts lists what is kept in a cluster.
func (k keptCluster) parts(srv *server.Server, bundle kubernetes.Bundle) []keptPart {
	var all []keptPart
	add := func(wanted bool, what string, open func(report func(string), logger *slog.Logger) (run func(context.Context) error, changed func())) {
		if wanted {
			all = append(all, keptPart{"kubernetes_" + what + "_" + k.client.Name(), open})
		}
	}
	s := k.settings
	add(s.Entries, "entries", func(report func(string), logger *slog.Logger) (func(context.Context) error, func()) {
		e := kubernetes.NewEntries(kubernetes.EntriesConfig{Client: k.client, Server: srv, Logger: logger, Report: report})
		return e.Run, func() {}
	})
	add(s.TrustBundles, "trust_bundles", func(report func(string), logger *slog.Logger) (func(context.Context) error, func()) {
		t := kubernetes.NewTrustBundles(kubernetes.TrustBundlesConfig{Client: k.client, Bundle: bundle, Logger: logger, Report: report})
		return t.Run, t.Changed
	})
	add(s.Bundle.ConfigMap != "", "config_map", func(report func(string), logger *slog.Logger) (func(context.Context) error, func()) {
		c := kubernetes.NewConfigMaps(kubernetes.ConfigMapsConfig{
			Client: k.client, Bundle: bundle, Name: s.Bundle.ConfigMap, Key: s.Bundle.Key, Selector: s.Bundle.Namespaces, Logger: logger,
			Report: func(problem string, _ int) { report(problem) },
		})
		return c.Run, c.Changed
	})
	add(s.Bundle.ClusterTrustBundle != "", "cluster_trust_bundle", func(report func(string), logger *slog.Logger) (func(context.Context) error, func()) {
		b := kubernetes.NewClusterBundle(kubernetes.ClusterBundleConfig{
			Client: k.client, Bundle: bundle, Name: s.Bundle.ClusterTrustBundle, Logger: logger, Report: report,
		})
		return b.Run, b.Changed
	})
	add(s.PodCertificates.Signer != "", "pod_certificates", func(report func(string), logger *slog.Logger) (func(context.Context) error, func()) {
		config := k.certificates
		config.Issuer, config.Logger, config.Report = srv, logger, report
		c, err := kubernetes.NewPodCertificates(config) // here: its metrics are there when the first scrape comes
		return func(ctx context.Context) error {
			if err != nil {
				return err
			}
			return c.Run(ctx)
		}, func() {}
	})
	return all
}

// recall has placement know what clusters had said before this CA was started, if one of
// them is away now. It returns when that is done, or all have been read.
func (c *clusters) recall(ctx context.Context, verified iter.Seq2[placement.Verified, error], logger *slog.Logger) {
	ticker := time.NewTicker(recallInterval)
	defer ticker.Stop()
	for {
		read, away := true, false
		for _, p := range c.pods {
			pods, _ := p.pods.State()
			read, away = read && pods.Synced, away || !pods.Synced && pods.Err != nil
		}
		if read {
			return
		}
		if away {
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
	var failed error
	number := 0
	c.placement.Recall(func(yield func(placement.Verified) bool) {
		for v, err := range verified {
			if failed = err; err != nil || !yield(v) {
				return
			}
			number++
		}
	}, time.Now())
	if failed != nil && ctx.Err() == nil {
		logger.WarnContext(ctx, "what clusters that are away had said of pods before this start is not known in full", "err", failed)
	}
	logger.InfoContext(ctx, "a cluster is away: what it had said of pods is taken from the ledger", "records", number)
}

// run follows the pods, and keeps all that is declared and published in the clusters,
// until ctx ends.
func (c *clusters) run(ctx context.Context, group *errgroup.Group, srv *server.Server, authority *ca.CA, t *health.Tracker, logger *slog.Logger) {
	for _, p := range c.pods {
		group.Go(func() error { p.run(ctx, t, logger); return nil })
	}
	bundle := func() (string, uint64) {
		roots, sequence := authority.Bundle()
		return kubernetes.EncodeBundle(roots), sequence
	}
	var changed []func()
	for _, k := range c.kept {
		for _, p := range k.parts(srv, bundle) {
			run, wake := p.open(reportTo(t, p.condition), logger)
			changed = append(changed, wake)
			group.Go(func() error { return run(ctx) })
		}
	}
	c.mu.Lock()
	c.changed = changed
	c.mu.Unlock()
}

// bundleChanged tells all that publish the trust bundle.
func (c *clusters) bundleChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, wake := range c.changed {
		wake()
	}
}

// reportTo keeps a condition.
func reportTo(t *health.Tracker, condition string) func(problem string) {
	return func(problem string) {
		if problem == "" {
			t.Clear(condition)
		} else {
			t.Set(condition, health.Warning, problem)
		}
	}
}

func (p clusterPods) condition() string { return "kubernetes_" + p.name }

// run follows a cluster's pods, and keeps its condition, until ctx ends.
func (p clusterPods) run(ctx context.Context, t *health.Tracker, logger *slog.Logger) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.pods.Run(ctx)
	}()
	ticker := time.NewTicker(healthInterval)
	defer ticker.Stop()
	before := true // it begins with a list
	for {
		since, why := p.pods.Behind(time.Now())
		if why != nil {
			t.Set(p.condition(), health.Warning, fmt.Sprintf("the pods of cluster %s may be old since %s, and new ones are not known: %v", p.name, since.UTC().Format(time.RFC3339), why))
		} else {
			t.Clear(p.condition())
		}
		if behind := why != nil; behind != before {
			before = behind
			if behind {
				logger.WarnContext(ctx, "the pods of a cluster are not known any more", "cluster", p.name, "err", why)
			} else {
				pods, nodes := p.pods.Len()
				logger.InfoContext(ctx, "the pods of a cluster are known", "cluster", p.name, "pods", pods, "nodes", nodes)
			}
		}
		select {
		case <-done:
			return
		case <-ticker.C:
		}
	}
}
