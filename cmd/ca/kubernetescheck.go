package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	"github.com/meshid/meshid/pkg/kubernetes"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

func newKubernetesCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "k8s", Short: "See whether Kubernetes is set up as the CA needs it", Args: cobra.NoArgs}
	cmd.AddCommand(newKubernetesCheckCommand())
	return cmd
}

func newKubernetesCheckCommand() *cobra.Command {
	var path, kubeconfig string
	var timeout time.Duration
	var output cli.OutputFlag
	c := &clientFlags{}
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Find the usual mistakes, and say how to repair each",
		Long: `check looks at each cluster of the configuration as the CA sees it: does its API server
answer, does the CA have the rights that its settings and the cluster's objects need, are tokens reviewed, are the kinds
there, do agents run on all nodes with a token for the right audience and under the cluster's
right name, is the published trust bundle the CA's present one, is the CSI driver registered.
Of an upstream CA that is a signer of Kubernetes or an issuer of cert-manager, it looks at the
kind and the rights; ca upstream check tries it. It changes nothing.

What the CA itself may not see is skipped, unless --kubeconfig names that of somebody who may.
The exit code is 1 if a check failed.`,
		Example: `  kubectl -n meshid exec meshid-ca-0 -- ca k8s check
  ca k8s check --config ca.yaml --kubeconfig ~/.kube/config -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := output.Format()
			if err != nil {
				return err
			}
			v, err := loadSettings(path, true, overrides{})
			if err != nil {
				return err
			}
			quiet := slog.New(slog.DiscardHandler)
			all, err := openClusters(v, nil, quiet)
			if err != nil {
				return err
			}
			var attestation k8spsat.Config
			if v.NodeAttestation.K8sPSAT.Present() {
				if err := v.NodeAttestation.K8sPSAT.Decode(&attestation); err != nil {
					return err
				}
			}
			above, err := openUpstreamCluster(v, quiet)
			if err != nil {
				return err
			}
			if len(v.Kubernetes.Clusters) == 0 && above == nil {
				return fmt.Errorf("%s names no cluster: write kubernetes.clusters (see docs/kubernetes.md)", path)
			}
			plan, err := planIstio(v, all.names())
			if err != nil {
				return err
			}
			report := &clusterReport{cmd: cmd, format: format, timeout: timeout}
			if len(v.Kubernetes.Clusters) > 0 {
				report.run("the clusters have the same names everywhere", sameNames(v, &attestation), nil)
			}
			for _, s := range v.Kubernetes.Clusters {
				t := &clusterTrial{settings: s, istio: plan, client: all.clients[s.Name], bundle: func(ctx context.Context) (string, error) { return ownBundle(ctx, c) }}
				if i := slices.IndexFunc(attestation.Clusters, func(a k8spsat.ClusterConfig) bool { return a.Name == s.Name }); i >= 0 {
					t.attestation = &attestation.Clusters[i]
				}
				t.looking = t.client
				if kubeconfig != "" {
					if t.looking, err = openCluster(clusterSettings{Name: s.Name, Kubeconfig: kubeconfig}, nil, quiet); err != nil {
						return fmt.Errorf("--kubeconfig: %w", err)
					}
				}
				t.check(report)
			}
			if above != nil {
				above.check(report)
			}
			return report.end()
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file")
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file of somebody who sees more of the cluster than the CA does")
	cmd.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "how long one check may take")
	output.Add(cmd, "text", "json")
	c.add(cmd)
	return cmd
}

// clusterReport makes checks and says how they went.
type clusterReport struct {
	cmd     *cobra.Command
	format  string
	timeout time.Duration
	checks  []*check
	failed  int
}

// run makes one check. fix is asked for only if it failed, and is what to do about err.
func (r *clusterReport) run(name string, what func(context.Context) (string, error), fix func(err error) string) bool {
	ctx, cancel := context.WithTimeout(r.cmd.Context(), r.timeout)
	defer cancel()
	detail, err := what(ctx)
	c := &check{Check: name, Outcome: "ok", Detail: detail}
	switch {
	case errors.Is(err, errSkipped):
		c.Outcome = "skipped"
	case err != nil:
		r.failed++
		c.Outcome, c.Detail = "failed", err.Error()
		if mistake, ok := errors.AsType[*mistake](err); ok {
			c.Fix = mistake.fix
		} else if fix != nil {
			c.Fix = fix(err)
		}
	}
	r.checks = append(r.checks, c)
	if r.format == "text" {
		printCheck(r.cmd.OutOrStdout(), c)
	}
	return err == nil
}

func (r *clusterReport) end() error {
	if r.format == "json" {
		if err := cli.JSON(r.cmd.OutOrStdout(), map[string]any{"checks": r.checks, "failed": r.failed}); err != nil {
			return err
		}
	}
	if err := r.cmd.Context().Err(); err != nil {
		return err
	}
	if r.failed > 0 {
		return &cli.ExitError{Code: 1}
	}
	return nil
}

// mistake is one whose fix is known where it is found.
type mistake struct{ what, fix string }

func (m *mistake) Error() string { return m.what }

// sameNames: a cluster that attests under a name that placement does not know has agents
// that are believed, or refused.
func sameNames(v *validated, attestation *k8spsat.Config) func(context.Context) (string, error) {
	return func(context.Context) (string, error) {
		var names []string
		for _, c := range v.Kubernetes.Clusters {
			names = append(names, c.Name)
		}
		for _, c := range attestation.Clusters {
			if !slices.Contains(names, c.Name) {
				return "", &mistake{
					fmt.Sprintf("node_attestation.k8s_psat has the cluster %q, kubernetes.clusters has %q", c.Name, names),
					"write one name in both: without it, where pods of this cluster run cannot be verified",
				}
			}
		}
		return strings.Join(names, ", "), nil
	}
}

// ownBundle is the trust bundle of the CA that runs.
func ownBundle(ctx context.Context, c *clientFlags) (string, error) {
	answer, err := call(ctx, c, adminv1.AdminServiceClient.GetBundle, &adminv1.GetBundleRequest{})
	if err != nil {
		return "", err
	}
	roots, err := x509.ParseCertificates(slices.Concat(answer.GetRoots()...))
	return kubernetes.EncodeBundle(roots), err
}

// clusterTrial looks at one cluster.
type clusterTrial struct {
	settings    clusterSettings
	istio       *istioPlan             // nil without a CA for Istio
	attestation *k8spsat.ClusterConfig // nil if its nodes attest otherwise
	client      *kube.Client           // the CA's
	looking     *kube.Client           // that of who looks; the CA's if nobody else does
	bundle      func(context.Context) (string, error)

	agents  []agentPod
	driver  string // of the agents, if their configuration was seen and says so
	nodes   []string
	bundles []trustBundle // the TrustBundle objects
}

// defaultDriver is the name of the agents' CSI driver if theirs is not known.
const defaultDriver = "csi.meshid.io"

// maxSkew is by how much clocks may differ before it is a mistake.
const maxSkew = 30 * time.Second

func (t *clusterTrial) check(r *clusterReport) {
	run := func(name string, what func(context.Context) (string, error), fix func(error) string) bool {
		return r.run(t.settings.Name+": "+name, what, fix)
	}
	say := func(text string) func(error) string { return func(error) string { return text } }
	var version string
	var clock time.Duration
	if !run("the API server answers", func(ctx context.Context) (string, error) {
		before := time.Now()
		v, now, err := t.client.Server(ctx)
		// Its time is cut to a second, and was told between the two.
		clock = now.Add(500 * time.Millisecond).Sub(before.Add(time.Since(before) / 2))
		version = v
		return version, err
	}, say(answersFix)) {
		return // whatever else is wrong is not known
	}
	run("the clocks agree", func(context.Context) (string, error) {
		if clock.Abs() > maxSkew {
			return "", fmt.Errorf("the API server's clock is %s from this one", clock.Round(time.Second))
		}
		return "", nil
	}, say("set both by NTP: what one signs is not valid yet, or not any more, for the other"))
	if t.settings.Entries {
		run("the kind RegistrationEntry is there", t.kind("registrationentries"), kindFix)
	}
	if t.settings.TrustBundles {
		run("the kind TrustBundle is there", t.readTrustBundles, kindFix)
	}
	if t.settings.Bundle.ClusterTrustBundle != "" || slices.ContainsFunc(t.bundles, func(b trustBundle) bool { return b.Spec.ClusterTrustBundle.Name != "" }) {
		run("the kind ClusterTrustBundle is there", t.certificatesKind("clustertrustbundles"), certificatesKindFix)
	}
	if t.settings.PodCertificates.Signer != "" {
		run("the kind PodCertificateRequest is there", t.certificatesKind("podcertificaterequests"), certificatesKindFix)
	}
	for _, n := range t.rights() {
		run("the CA may "+n.String(), func(ctx context.Context) (string, error) { return may(ctx, t.client, n) }, nil)
	}
	if t.attestation != nil && t.attestation.TokenReview != nil {
		run("tokens are reviewed", t.reviews, say("bind the ClusterRole system:auth-delegator to the CA's service account"))
	}
	if t.attestation != nil {
		if run("agents run", t.findAgents, nil) {
			run("agents have a token for the right audience", t.audience, nil)
			run("agents use this cluster's name", t.agentsName, nil)
			run("every node has an agent", t.everyNode, nil)
			run("the CSI driver is registered", t.registered, nil)
		}
	}
	if t.settings.Bundle.ConfigMap != "" {
		run("the trust bundle is published", t.published, say("give the CA the rights to ConfigMaps above"))
	}
}

// answersFix is what to do about an API server that does not answer.
const answersFix = "see that the address is right and reachable, and that the kubeconfig's credentials and CA are those of this cluster"

// reviews has a token reviewed that is none.
func (t *clusterTrial) reviews(ctx context.Context) (string, error) {
	client := t.client
	if s := t.attestation.TokenReview; *s != (k8spsat.TokenReviewConfig{}) {
		var err error
		if client, err = openCluster(clusterSettings{Name: t.settings.Name, Kubeconfig: s.Kubeconfig, Context: s.Context}, nil, slog.New(slog.DiscardHandler)); err != nil {
			return "", err
		}
	}
	return "", kube.NewReviewer(client).Try(ctx)
}

func (t *clusterTrial) kind(plural string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		path := kube.Path{Resource: kube.Resource{Group: kubernetes.Group, Version: kubernetes.Version, Plural: plural}}
		err := t.client.List(ctx, path, kube.Selection{Limit: 1}, new(kube.Page[kube.Object]))
		return kubernetes.Version, err
	}
}

func kindFix(err error) string {
	if errors.Is(err, kube.ErrNotFound) {
		return "kubectl apply --server-side -f deploy/kubernetes/crds.yaml, of this version of meshid: " + cli.Version()
	}
	return errorSaysFix
}

const errorSaysFix = "the error says what is wrong; a missing right is among those below"

func (t *clusterTrial) certificatesKind(plural string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		r, err := kubernetes.CertificatesResource(ctx, t.client, plural)
		return r.Version, err
	}
}

func certificatesKindFix(err error) string {
	if errors.Is(err, kube.ErrNotFound) {
		return "it comes with Kubernetes 1.37; before, enable the feature gate of its name at the API server, and its version by --runtime-config; or remove the setting"
	}
	return errorSaysFix
}

// trustBundle is a TrustBundle object, as far as it says what the CA has to write.
type trustBundle struct {
	kube.Object
	Spec struct {
		ConfigMap struct {
			Name string `json:"name"`
		} `json:"configMap"`
		ClusterTrustBundle struct {
			Name string `json:"name"`
		} `json:"clusterTrustBundle"`
	} `json:"spec"`
}

func (t *clusterTrial) readTrustBundles(ctx context.Context) (detail string, err error) {
	path := kube.Path{Resource: kube.Resource{Group: kubernetes.Group, Version: kubernetes.Version, Plural: "trustbundles"}}
	t.bundles, err = listAll[trustBundle](ctx, t.client, path, kube.Selection{})
	return kubernetes.Version, err
}

// agentPod is a pod of a node agent, as far as it is looked at.
type agentPod struct {
	kube.Object
	Spec struct {
		NodeName       string      `json:"nodeName"`
		ServiceAccount string      `json:"serviceAccountName"`
		Volumes        []podVolume `json:"volumes"`
	} `json:"spec"`
}

type podVolume struct {
	HostPath struct {
		Path string `json:"path"`
	} `json:"hostPath"`
	ConfigMap struct {
		Name string `json:"name"`
	} `json:"configMap"`
	Projected struct {
		Sources []struct {
			ServiceAccountToken struct {
				Audience string `json:"audience"`
			} `json:"serviceAccountToken"`
			ConfigMap struct {
				Name string `json:"name"`
			} `json:"configMap"`
		} `json:"sources"`
	} `json:"projected"`
}

// listAll reads all pages of a collection.
func listAll[T any](ctx context.Context, c *kube.Client, p kube.Path, s kube.Selection) (all []T, err error) {
	s.Limit = 500
	for {
		var page kube.Page[T]
		if err := c.List(ctx, p, s, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Items...)
		if s.Continue = page.Metadata.Continue; s.Continue == "" {
			return all, nil
		}
	}
}

func core(plural, namespace string) kube.Path {
	return kube.Path{Resource: kube.Resource{Version: "v1", Plural: plural}, Namespace: namespace}
}

func (t *clusterTrial) findAgents(ctx context.Context) (string, error) {
	for _, account := range t.attestation.ServiceAccounts {
		namespace, name, _ := strings.Cut(account, "/")
		pods, err := listAll[agentPod](ctx, t.looking, core("pods", namespace), kube.Selection{Fields: "spec.serviceAccountName=" + name})
		if err != nil {
			return "", err
		}
		t.agents = append(t.agents, slices.DeleteFunc(pods, func(p agentPod) bool { return p.Spec.NodeName == "" })...)
	}
	if len(t.agents) == 0 {
		return "", &mistake{
			fmt.Sprintf("no pod runs as %s", strings.Join(t.attestation.ServiceAccounts, " or ")),
			"install the agents' DaemonSet, or write the namespace and name of its service account to node_attestation.k8s_psat.clusters[].service_accounts",
		}
	}
	return fmt.Sprintf("%d pods", len(t.agents)), nil
}

func (t *clusterTrial) audience(context.Context) (string, error) {
	want := t.attestation.Audience
	if want == "" {
		want = k8spsat.DefaultAudience
	}
	for _, p := range t.agents {
		var got []string
		for _, v := range p.Spec.Volumes {
			for _, s := range v.Projected.Sources {
				if s.ServiceAccountToken.Audience != "" {
					got = append(got, s.ServiceAccountToken.Audience)
				}
			}
		}
		if !slices.Contains(got, want) {
			return "", &mistake{
				fmt.Sprintf("pod %s has tokens for %q, and the CA takes those for %q", p.Metadata.Name, got, want),
				"write one audience in the DaemonSet's projected volume and in node_attestation.k8s_psat.clusters[].audience",
			}
		}
	}
	return want, nil
}

// agentsName looks into the agents' configuration.
func (t *clusterTrial) agentsName(ctx context.Context) (string, error) {
	seen := map[string]bool{}
	for _, p := range t.agents {
		for _, name := range p.configMaps() {
			at := p.Metadata.Namespace + "/" + name
			if seen[at] || name == t.settings.Bundle.ConfigMap {
				continue
			}
			seen[at] = true
			path := core("configmaps", p.Metadata.Namespace)
			path.Name = name
			var object struct {
				Data map[string]string `json:"data"`
			}
			if err := t.looking.Get(ctx, path, &object); err != nil {
				if errors.Is(err, kube.ErrDenied) {
					return "the CA may not read the agents' configuration; --kubeconfig names somebody who may", errSkipped
				}
				return "", err
			}
			for file, text := range object.Data {
				var agent struct {
					CSI struct {
						Driver string `yaml:"driver"`
					} `yaml:"csi"`
					NodeAttestation struct {
						PSAT struct {
							Cluster string `yaml:"cluster"`
						} `yaml:"k8s_psat"`
					} `yaml:"node_attestation"`
				}
				if !strings.HasSuffix(file, ".yaml") || yaml.Unmarshal([]byte(text), &agent) != nil || agent.NodeAttestation.PSAT.Cluster == "" {
					continue
				}
				if got := agent.NodeAttestation.PSAT.Cluster; got != t.settings.Name {
					return "", &mistake{
						fmt.Sprintf("ConfigMap %s says %q", at, got),
						fmt.Sprintf("write node_attestation.k8s_psat.cluster: %s there, or that name to ca.yaml", t.settings.Name),
					}
				}
				t.driver = agent.CSI.Driver
				return "", nil
			}
		}
	}
	return "no ConfigMap of theirs has a configuration", errSkipped
}

func (p *agentPod) configMaps() (names []string) {
	for _, v := range p.Spec.Volumes {
		if v.ConfigMap.Name != "" {
			names = append(names, v.ConfigMap.Name)
		}
		for _, s := range v.Projected.Sources {
			if s.ConfigMap.Name != "" {
				names = append(names, s.ConfigMap.Name)
			}
		}
	}
	return names
}

func (t *clusterTrial) everyNode(ctx context.Context) (string, error) {
	nodes, err := listAll[kube.Object](ctx, t.looking, core("nodes", ""), kube.Selection{})
	if err != nil {
		return "", err
	}
	var without []string
	for _, n := range nodes {
		t.nodes = append(t.nodes, n.Metadata.Name)
		if !slices.ContainsFunc(t.agents, func(p agentPod) bool { return p.Spec.NodeName == n.Metadata.Name }) {
			without = append(without, n.Metadata.Name)
		}
	}
	if len(without) > 0 {
		return "", &mistake{
			fmt.Sprintf("%d of %d nodes have none: %s", len(without), len(nodes), some(without)),
			"see the DaemonSet's nodeSelector and tolerations, and its events: kubectl describe daemonset",
		}
	}
	return fmt.Sprintf("%d nodes", len(nodes)), nil
}

// some are the first of many names.
func some(names []string) string {
	if len(names) > 5 {
		return strings.Join(names[:5], ", ") + ", …"
	}
	return strings.Join(names, ", ")
}

// registered: the cluster knows the driver, and the kubelet of each agent's node does.
func (t *clusterTrial) registered(ctx context.Context) (string, error) {
	driver := cmp.Or(t.driver, defaultDriver)
	mounts := func(p agentPod) bool {
		return slices.ContainsFunc(p.Spec.Volumes, func(v podVolume) bool { return filepath.Base(v.HostPath.Path) == "plugins_registry" })
	}
	if !slices.ContainsFunc(t.agents, mounts) {
		return "the agents are no driver", errSkipped
	}
	storage := func(plural string) kube.Path {
		return kube.Path{Resource: kube.Resource{Group: "storage.k8s.io", Version: "v1", Plural: plural}}
	}
	path := storage("csidrivers")
	path.Name = driver
	err := t.looking.Get(ctx, path, new(kube.Object))
	type csiNode struct {
		kube.Object
		Spec struct {
			Drivers []struct {
				Name string `json:"name"`
			} `json:"drivers"`
		} `json:"spec"`
	}
	var nodes []csiNode
	if err == nil {
		nodes, err = listAll[csiNode](ctx, t.looking, storage("csinodes"), kube.Selection{})
	}
	switch {
	case errors.Is(err, kube.ErrDenied):
		return "the CA may not see drivers; --kubeconfig names somebody who may", errSkipped
	case errors.Is(err, kube.ErrNotFound):
		return "", &mistake{"there is no CSIDriver " + driver, "apply that of deploy/kubernetes/meshid.yaml: without it, the kubelet refuses the volumes of pods"}
	case err != nil:
		return "", err
	}
	var without []string
	for _, p := range t.agents {
		known := slices.ContainsFunc(nodes, func(n csiNode) bool {
			return n.Metadata.Name == p.Spec.NodeName && slices.ContainsFunc(n.Spec.Drivers, func(d struct {
				Name string `json:"name"`
			},
			) bool {
				return d.Name == driver
			})
		})
		if mounts(p) && !known {
			without = append(without, p.Spec.NodeName)
		}
	}
	if len(without) > 0 {
		return "", &mistake{
			"the kubelets of these nodes do not know it: " + some(without),
			"see that csi is in agent.yaml, and that kubelet_dir and the agent's mounts are the kubelet's --root-dir; the agent's log says more",
		}
	}
	return "", nil
}

// published: who mounts the bundle trusts the CA that runs.
func (t *clusterTrial) published(ctx context.Context) (string, error) {
	name, key := t.settings.Bundle.ConfigMap, t.settings.Bundle.Key
	if key == "" {
		key = "bundle.pem"
	}
	type configMap struct {
		kube.Object
		Data map[string]string `json:"data"`
	}
	found, err := listAll[configMap](ctx, t.client, core("configmaps", ""), kube.Selection{Fields: "metadata.name=" + name})
	if err != nil {
		return "", err
	}
	const fix = "see that the CA runs, its log, and its condition kubernetes_config_map_…: ca status"
	if len(found) == 0 {
		return "", &mistake{"no namespace has the ConfigMap " + name, fix + "; agents of new nodes wait for it"}
	}
	own, err := t.bundle(ctx)
	if err != nil {
		return fmt.Sprintf("%d namespaces have it; whether it is the present one is not known: %v", len(found), err), errSkipped
	}
	var old []string
	for _, c := range found {
		if c.Data[key] != own {
			old = append(old, c.Metadata.Namespace)
		}
	}
	if len(old) > 0 {
		return "", &mistake{"it is another one than the CA's in " + some(old), fix}
	}
	return fmt.Sprintf("%d namespaces", len(found)), nil
}
