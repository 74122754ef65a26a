// Package helm shows the chart by the real helm: what it renders, and in whole
// clusters what it installs. It answers "does deploy/helm/meshid do what it says".
package helm

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

var update = flag.Bool("update", false, "write the generated manifests")

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(local.Main(m)) //nolint:forbidigo // as every TestMain
}

// patience bounds each call of helm.
const patience = 5 * time.Minute

var chart = filepath.Join(require.Repository(), "deploy", "helm", "meshid")

// run runs helm and returns what it prints.
func run(t testing.TB, env []string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	home := t.TempDir()
	cmd := exec.CommandContext(ctx, require.Tool(t, "helm"), args...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	cmd.Env = append(cmd.Env, env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("helm %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(out), err
}

// render returns the manifests that the chart makes of values.
func render(t testing.TB, args ...string) string {
	t.Helper()
	out, err := run(t, nil, append([]string{"template", "meshid", chart, "--no-hooks", "--namespace=meshid", "--set=trustDomain=example.org"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// The plain manifests are what the chart makes of its own values, with the namespace
// that Helm makes of its own.
func TestManifests(t *testing.T) {
	crds, err := os.ReadFile(filepath.Join(require.Repository(), "deploy", "kubernetes", "crds.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	want := `# Generated from deploy/helm/meshid by make generate: all of meshid, for the trust domain example.org.
# Write your own trust domain and the registry that has your images:
#
#   sed -e 's/example\.org/prod.example.com/; s,image: meshid/,image: registry.example.com/meshid/,' meshid.yaml | kubectl apply --server-side -f -
#
# The kinds are in crds.yaml, which is applied first.
---
apiVersion: v1
kind: Namespace
metadata:
  name: meshid
  labels:
    pod-security.kubernetes.io/enforce: privileged # for the agents; the CA's pods are restricted ones
` + strings.ReplaceAll(render(t), "app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl")
	compare(t, filepath.Join(require.Repository(), "deploy", "kubernetes", "meshid.yaml"), want)
	compare(t, filepath.Join(chart, "crds", "crds.yaml"), "# Generated from deploy/kubernetes/crds.yaml by make generate.\n"+string(crds))
	alerts, err := os.ReadFile(filepath.Join(require.Repository(), "deploy", "prometheus", "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	compare(t, filepath.Join(chart, "files", "alerts.yaml"), "# Generated from deploy/prometheus/alerts.yaml by make generate.\n"+string(alerts))
	dashboards, err := filepath.Glob(filepath.Join(require.Repository(), "deploy", "grafana", "*.json"))
	if err != nil || len(dashboards) == 0 {
		t.Fatalf("there are no dashboards: %v", err)
	}
	for _, path := range dashboards {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, text); err != nil {
			t.Fatal(err)
		}
		compare(t, filepath.Join(chart, "files", "dashboards", filepath.Base(path)), compact.String()+"\n")
	}
}

// compare compares a file with what it should be, or writes it.
func compare(t *testing.T, path, want string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("%s is not what it should be; run make generate\n%s", path, diff)
	}
}

// everything is what changes as much as values can.
const everything = `
trustDomain: prod.example.org
clusterName: prod
image: {registry: registry.example.com, tag: v1, pullPolicy: Always, pullSecrets: [pull]}
ca:
  config: {svid: {default_ttl: 10m}}
  storage: {size: 1Gi, className: fast}
  service: {type: LoadBalancer, annotations: {example.org/a: b}}
  nodeSelector: {a: b}
  tolerations: [{operator: Exists}]
  affinity: {nodeAffinity: {}}
  volumes: [{name: pin, secret: {secretName: pin}}]
  volumeMounts: [{name: pin, mountPath: /etc/pin}]
  maxUnavailable: 0
agent: {csi: false, nodesProxy: true, caAddress: 'ca.example.org:8443', runtimeSocket: /run/crio/crio.sock, maxUnavailable: 1}
networkPolicy: {caFrom: [{ipBlock: {cidr: 10.0.0.0/8}}], metricsFrom: [{namespaceSelector: {}}]}
serviceMonitor: {enabled: true, labels: {release: prometheus}}
bundleNamespaces: mesh=yes
trustBundles: true
podCertificates: true
clusters: [{name: edge, kubeconfigSecret: edge}, {name: edge_2, kubeconfigSecret: edge-2}]
prometheusRule: {enabled: true, labels: {release: prometheus}}
dashboards: {enabled: true, labels: {grafana_dashboard: "yes"}}
istio: {enabled: true, nodeProxies: [istio-system/ztunnel], keepRoots: true, keepIstiodCertificate: true, previousRoots: "-----BEGIN CERTIFICATE-----"}
`

func values(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLint(t *testing.T) {
	for _, args := range [][]string{
		{"--set=trustDomain=example.org"},
		{"--values=" + values(t, everything)},
		{"--set=trustDomain=example.org,agent.enabled=false,networkPolicy.enabled=false"},
		{"--set=trustDomain=example.org,ca.enabled=false,agent.caAddress=ca.example.org:8443,serviceMonitor.enabled=true"},
	} {
		if out, err := run(t, nil, append([]string{"lint", "--strict", chart}, args...)...); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// document is an object of the chart, as far as it is looked at here.
type document struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name string `yaml:"name"`
	} `yaml:"metadata"`
	Data map[string]string `yaml:"data"`
	Spec struct {
		Template any `yaml:"template"`
	} `yaml:"spec"`
}

// documents are the objects that the chart makes of values.
func documents(t testing.TB, args ...string) []document {
	t.Helper()
	return parse(t, render(t, args...))
}

func parse(t testing.TB, manifests string) (all []document) {
	t.Helper()
	for text := range strings.SplitSeq(manifests, "\n---\n") {
		var d document
		if err := yaml.Unmarshal([]byte(text), &d); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		all = append(all, d)
	}
	return all
}

// Whatever the values are, the programs accept the configuration that the chart
// writes.
func TestChartConfiguration(t *testing.T) {
	for name, args := range map[string][]string{
		"default":    nil,
		"everything": {"--values=" + values(t, everything)},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write := func(name string, data []byte) string {
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, data, 0o600); err != nil {
					t.Fatal(err)
				}
				return path
			}
			root := identitytest.NewAuthority(t, "example.org")
			bundle := write("bundle.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Cert.Raw}))
			kubeconfig := write("kubeconfig", []byte(`{apiVersion: v1, kind: Config, clusters: [{name: a, cluster: {server: 'https://10.96.0.1'}}],
contexts: [{name: a, context: {cluster: a}}], current-context: a}`))
			found := 0
			for _, d := range documents(t, args...) {
				for program, file := range map[string]string{"ca": "ca.yaml", "node-agent": "agent.yaml"} {
					text, ok := d.Data[file]
					if d.Kind != "ConfigMap" || !ok {
						continue
					}
					found++
					// This is no pod: its files are elsewhere, and it has no service account.
					text = outside(t, text, map[string]string{"": kubeconfig})
					text = strings.NewReplacer("/etc/meshid/bundle.pem", bundle, "/etc/meshid/previous-roots.pem", bundle).Replace(text)
					cmd := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), program), "check", "--config", write(file, []byte(text)))
					cmd.Env = append(os.Environ(), "NODE_NAME=n", "NODE_IP=10.0.0.1")
					// The agent goes on to look for the CA, which there is none of.
					if out, err := cmd.CombinedOutput(); !strings.HasPrefix(string(out), "the configuration is valid") {
						t.Errorf("%s: %v: %s\n%s", program, err, out, text)
					}
				}
			}
			if found != 2 {
				t.Errorf("%d configurations, want 2", found)
			}
		})
	}
}

// A mistake in the values is found before anything is installed.
func TestValuesAreStrict(t *testing.T) {
	for name, c := range map[string]struct{ values, want string }{
		"no trust domain":  {"{}", "trustDomain is missing: write"},
		"not one":          {"trustDomain: Example.org", "trustDomain"},
		"empty label":      {"trustDomain: a..b", "trustDomain"},
		"label of a dash":  {"trustDomain: -.example.org", "trustDomain"},
		"another domain":   {"{trustDomain: example.org, ca: {config: {trust_domain: a.example}}}", "ca.config.trust_domain"},
		"another port":     {"{trustDomain: example.org, ca: {config: {listen: ':9443'}}}", "ca.config.listen"},
		"another socket":   {"{trustDomain: example.org, agent: {config: {socket: /tmp/agent.sock}}}", "agent.config.socket"},
		"misspelt":         {"{trustDomain: example.org, agents: {}}", "agents"},
		"misspelt deeper":  {"{trustDomain: example.org, ca: {storage: {class: fast}}}", "class"},
		"another type":     {"{trustDomain: example.org, agent: {csi: 'yes'}}", "csi"},
		"cluster's name":   {"{trustDomain: example.org, clusterName: 'Prod 1'}", "clusterName"},
		"two CAs":          {"{trustDomain: example.org, ca: {maxUnavailable: 2}}", "maxUnavailable"},
		"no such service":  {"{trustDomain: example.org, ca: {service: {type: ExternalName}}}", "type"},
		"relative path":    {"{trustDomain: example.org, agent: {kubeletDir: var/lib/kubelet}}", "kubeletDir"},
		"no address":       {"{trustDomain: example.org, agent: {caAddress: ca.example.org}}", "caAddress"},
		"share of nothing": {"{trustDomain: example.org, agent: {maxUnavailable: 200%}}", "maxUnavailable"},
		"agents of no CA":  {"{trustDomain: example.org, ca: {enabled: false}}", "agent.caAddress is missing"},
		"no kubeconfig":    {"{trustDomain: example.org, clusters: [{name: edge}]}", "kubeconfigSecret"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := run(t, nil, "template", "meshid", chart, "--values="+values(t, c.values))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error that names %s", err, c.want)
			}
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
				t.Errorf("helm did not say so itself: %v", err)
			}
		})
	}
}

// Alerts and dashboards that the chart brings are those of deploy, and go by the jobs that
// Prometheus gives to what the chart's monitors find.
func TestMonitors(t *testing.T) {
	read := func(elem ...string) []byte {
		data, err := os.ReadFile(filepath.Join(append([]string{require.Repository(), "deploy"}, elem...)...))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	var alerts map[string]any
	if err := yaml.Unmarshal(read("prometheus", "alerts.yaml"), &alerts); err != nil {
		t.Fatal(err)
	}
	found := make(map[string]int)
	jobs := make(map[string]string) // by kind of monitor
	names := make(map[string]string)
	manifests, err := run(t, nil, "template", "prod", chart, "--no-hooks", "--values="+values(t, everything))
	if err != nil {
		t.Fatal(err)
	}
	for text := range strings.SplitSeq(manifests, "\n---\n") {
		var object struct {
			Kind     string `yaml:"kind"`
			Metadata struct {
				Name   string            `yaml:"name"`
				Labels map[string]string `yaml:"labels"`
			} `yaml:"metadata"`
			Data map[string]string `yaml:"data"`
			Spec map[string]any    `yaml:"spec"`
		}
		if err := yaml.Unmarshal([]byte(text), &object); err != nil {
			t.Fatal(err)
		}
		switch object.Kind {
		case "ServiceMonitor", "PodMonitor":
			label, _ := object.Spec["jobLabel"].(string)
			selector, _ := object.Spec["selector"].(map[string]any)
			labels, _ := selector["matchLabels"].(map[string]any)
			jobs[object.Kind], _ = labels[label].(string)
			names[object.Kind] = object.Metadata.Name
		case "PrometheusRule":
			if diff := cmp.Diff(alerts, object.Spec); diff != "" {
				t.Errorf("-deploy/prometheus +chart\n%s", diff)
			}
			if object.Metadata.Labels["release"] != "prometheus" {
				t.Errorf("its labels are %v", object.Metadata.Labels)
			}
		case "ConfigMap":
			for file, text := range object.Data {
				name, ok := strings.CutPrefix(file, "meshid-")
				if !ok {
					continue
				}
				var want, got any
				if err := errors.Join(json.Unmarshal(read("grafana", name), &want), json.Unmarshal([]byte(text), &got)); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got); diff != "" || object.Metadata.Labels["grafana_dashboard"] != "yes" {
					t.Errorf("%s, labels %v: -deploy/grafana +chart\n%s", name, object.Metadata.Labels, diff)
				}
				found["dashboards"]++
			}
		default:
		}
		found[object.Kind]++
	}
	if found["PrometheusRule"] != 1 || found["dashboards"] != 6 {
		t.Errorf("found %v", found)
	}
	if diff := cmp.Diff(map[string]string{"ServiceMonitor": "meshid-ca", "PodMonitor": "meshid-agent"}, jobs); diff != "" {
		t.Errorf("jobs: -want +got\n%s", diff)
	}
	if !strings.Contains(string(read("prometheus", "alerts.yaml")), `job=~"meshid-ca|meshid-agent"`) {
		t.Error("the alerts go by other jobs")
	}
	if names["ServiceMonitor"] != "prod-meshid-ca" {
		t.Errorf("the release is another one: %v", names)
	}
}

// A cluster in which the agents' right does not exist yet is told so, before an agent
// fails on every node.
func TestOldKubernetes(t *testing.T) {
	args := []string{"template", "meshid", chart, "--namespace=meshid", "--set=trustDomain=example.org", "--kube-version"}
	if _, err := run(t, nil, append(args, "v1.32.5")...); err == nil || !strings.Contains(err.Error(), "agent.nodesProxy is missing") {
		t.Errorf("got %v", err)
	}
	for _, more := range [][]string{{"v1.32.5-gke.100", "--set=agent.nodesProxy=true"}, {"v1.33.0-eks-1234"}, {"v1.37.1"}, {"v1.30.0", "--set=agent.enabled=false"}} {
		if _, err := run(t, nil, append(args, more...)...); err != nil {
			t.Errorf("%q: %v", more, err)
		}
	}
}

// Changed configuration is another pod; nothing else is.
func TestChecksums(t *testing.T) {
	checksums := func(args ...string) (found []string) {
		for line := range strings.Lines(render(t, args...)) {
			if _, sum, ok := strings.Cut(line, "checksum/config: "); ok {
				found = append(found, strings.TrimSpace(sum))
			}
		}
		if len(found) != 2 {
			t.Fatalf("%d checksums, want that of the CA and that of the agents", len(found))
		}
		return found
	}
	before := checksums()
	if after := checksums("--set=networkPolicy.enabled=false"); after[0] != before[0] || after[1] != before[1] {
		t.Error("something else than the configuration starts pods again")
	}
	after := checksums("--set=ca.config.svid.default_ttl=10m")
	if changed := []bool{after[0] != before[0], after[1] != before[1]}; changed[0] == changed[1] {
		t.Errorf("changed pods: %v, want the CA's alone", changed)
	}
}

// A real API server accepts all of it, and what the CA's pod may do and may not is what
// the chart says.
func TestAPIServerAcceptsManifests(t *testing.T) {
	s := kube.StartAPIServer(t)
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(require.Repository(), "deploy", "kubernetes", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	s.Apply(t, read("crds.yaml"))
	s.Apply(t, read("meshid.yaml"))

	t.Run("the CA's pods are restricted ones", func(t *testing.T) {
		s.Apply(t, "{apiVersion: v1, kind: Namespace, metadata: {name: strict, labels: {pod-security.kubernetes.io/enforce: restricted}}}")
		for _, account := range []string{"meshid-ca", "meshid-agent", "default"} {
			s.Apply(t, "{apiVersion: v1, kind: ServiceAccount, metadata: {name: "+account+", namespace: strict}}")
		}
		hooks, err := run(t, nil, "template", "meshid", chart, "--namespace=meshid", "--set=trustDomain=example.org", "--show-only=templates/ca-check.yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range append(documents(t), parse(t, hooks)...) {
			if d.Kind != "StatefulSet" && d.Kind != "DaemonSet" && d.Kind != "Job" {
				continue
			}
			pod, ok := d.Spec.Template.(map[string]any)
			if !ok {
				t.Fatalf("%s has no template", d.Metadata.Name)
			}
			pod["apiVersion"], pod["kind"] = "v1", "Pod"
			pod["metadata"] = map[string]any{"name": d.Metadata.Name, "namespace": "strict"}
			if spec, ok := pod["spec"].(map[string]any); ok && d.Kind == "StatefulSet" {
				volumes, _ := spec["volumes"].([]any)
				spec["volumes"] = append(volumes, map[string]any{"name": "data", "emptyDir": map[string]any{}}) // a claim's, there
			}
			err := s.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/strict/pods?dryRun=All", pod, nil)
			if want := d.Kind != "DaemonSet"; (err == nil) != want {
				t.Errorf("%s: %v", d.Metadata.Name, err)
			} else if err != nil && !strings.Contains(err.Error(), "PodSecurity") {
				t.Errorf("%s is refused for another reason: %v", d.Metadata.Name, err)
			}
		}
	})
	t.Run("rights", func(t *testing.T) {
		for account, rights := range map[string]map[string]bool{
			"meshid-ca": {
				"create tokenreviews.authentication.k8s.io": true, "list pods": true, "watch pods": true, "list nodes": true,
				"watch nodes": true, "list registrationentries.meshid.io": true, "patch registrationentries.meshid.io --subresource=status": true,
				"get secrets": false, "list secrets": false, "create pods": false, "delete pods": false, "get nodes --subresource=proxy": false,
				"create registrationentries.meshid.io": false, "patch registrationentries.meshid.io": false, "create serviceaccounts --subresource=token": false,
				"update pods": false, "impersonate users": false, "create clusterrolebindings.rbac.authorization.k8s.io": false,
				"create pods --subresource=exec": false, "list configmaps/meshid-bundle": true, "watch configmaps/meshid-bundle": true,
				"patch configmaps/meshid-bundle": true, "patch configmaps/coredns": false, "list configmaps": false, "delete configmaps/meshid-bundle": false,
			},
			"meshid-agent": {
				"get nodes --subresource=pods": true, "get nodes --subresource=proxy": false, "list pods": false, "get pods": false,
				"get secrets": false, "get nodes": false, "create tokenreviews.authentication.k8s.io": false,
			},
		} {
			for right, want := range rights {
				args := append([]string{"auth", "can-i", "--as=system:serviceaccount:meshid:" + account, "--all-namespaces"}, strings.Fields(right)...)
				out, err := s.Kubectl(t, args...)
				if got := strings.HasPrefix(out, "yes"); got != want {
					t.Errorf("%s: %s: %v, want %v (%v)", account, right, got, want, err)
				}
			}
		}
	})
}
