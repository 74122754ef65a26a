package helm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

type object = map[string]any

// agentPod is a pod of the agents' DaemonSet: this API server has nobody who makes it.
func agentPod(node, audience string) object {
	return object{
		"metadata": object{"name": "meshid-agent-" + node, "namespace": "meshid"},
		"spec": object{
			"serviceAccountName": "meshid-agent", "nodeName": node,
			"containers": []object{{"name": "agent", "image": "meshid/node-agent:1"}},
			"volumes": []object{
				{"name": "token", "projected": object{"sources": []object{{"serviceAccountToken": object{"path": "token", "audience": audience}}}}},
				{"name": "config", "projected": object{"sources": []object{{"configMap": object{"name": "meshid-agent"}}}}},
				{"name": "registry", "hostPath": object{"path": "/var/lib/kubelet/plugins_registry"}},
			},
		},
	}
}

// result is one check of `ca k8s check -o json`.
type result struct {
	Check   string `json:"check"`
	Outcome string `json:"outcome"`
	Detail  string `json:"detail"`
	Fix     string `json:"fix"`
}

// check runs `ca k8s check` with a configuration.
func check(t *testing.T, text string, args ...string) ([]result, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.yaml")
	if err := os.WriteFile(path, []byte("trust_domain: example.org\n"+text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), "ca"), append([]string{"k8s", "check", "--config", path, "-o", "json"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var report struct {
		Checks []result `json:"checks"`
	}
	if jsonErr := json.Unmarshal(out, &report); jsonErr != nil {
		t.Fatalf("%v: %v: %s%s", jsonErr, err, out, stderr.String())
	}
	return report.Checks, err
}

// manifest reads one of deploy/kubernetes.
func manifest(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(require.Repository(), "deploy", "kubernetes", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// `ca k8s check` finds each of the usual mistakes and says what to do, and finds nothing
// where there is none.
func TestCheckFindsTheUsualMistakes(t *testing.T) {
	s := kube.StartAPIServer(t, "--runtime-config=certificates.k8s.io/v1/clustertrustbundles=false")
	do := func(method, path string, in any) {
		t.Helper()
		err := s.Do(t.Context(), method, path, in, nil)
		if status, ok := errors.AsType[*kube.StatusError](err); ok && method == http.MethodDelete && status.Code == http.StatusNotFound {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.Apply(t, manifest(t, "crds.yaml"))
	s.Apply(t, manifest(t, "meshid.yaml"))
	csiNode := func(driver string) string {
		return "{apiVersion: storage.k8s.io/v1, kind: CSINode, metadata: {name: n1}, spec: {drivers: [{name: " + driver + ", nodeID: n1}]}}"
	}
	s.Apply(t, "{apiVersion: v1, kind: Node, metadata: {name: n1}}")
	s.Apply(t, csiNode("csi.meshid.io"))
	do(http.MethodPost, "/api/v1/namespaces/meshid/pods", agentPod("n1", "meshid"))

	kubeconfig := s.TokenKubeconfig(t, s.Token(t, kube.Pod{Namespace: "meshid", ServiceAccount: "meshid-ca"}, time.Hour))
	config := fmt.Sprintf(`node_attestation: {k8s_psat: {clusters: [{name: kubernetes, service_accounts: [meshid/meshid-agent], token_review: {}}]}}
kubernetes: {clusters: [{name: kubernetes, kubeconfig: %s, entries: true, bundle: {config_map: meshid-bundle, namespaces: kubernetes.io/metadata.name=meshid}}]}
`, kubeconfig)
	ca := local.StartCA(t, local.CAOptions{Config: config})
	run := func(t *testing.T, text string, args ...string) ([]result, error) {
		t.Helper()
		return check(t, text, append(args, "--admin-socket", ca.AdminSocket)...)
	}
	admin := []string{"--kubeconfig", s.Kubeconfig}

	t.Run("none", func(t *testing.T) {
		local.Await(t, "the bundle is published and nothing is wrong", func(context.Context) error {
			checks, err := run(t, config, admin...)
			for _, c := range checks {
				if c.Outcome != "ok" {
					return fmt.Errorf("%+v", c)
				}
			}
			return err
		})
	})
	t.Run("the CA's own account sees less", func(t *testing.T) {
		checks, err := run(t, config)
		skipped := 0
		for _, c := range checks {
			switch c.Outcome {
			case "skipped":
				skipped++
			case "failed":
				t.Errorf("%+v", c)
			}
		}
		if err != nil || skipped != 2 {
			t.Errorf("%d were skipped (%v), want the agents' configuration and the driver: %+v", skipped, err, checks)
		}
	})

	role := "/apis/rbac.authorization.k8s.io/v1/clusterroles/meshid-ca"
	var given object
	if err := s.Do(t.Context(), http.MethodGet, role, nil, &given); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name          string
		config        string
		spoil, mend   func()
		check         string // whose outcome is failed
		detail, fix   string // are in it
		othersFailToo bool
	}{
		{
			name:  "rights",
			spoil: func() { do(http.MethodPatch, role, object{"rules": []object{}}) },
			mend:  func() { do(http.MethodPatch, role, object{"rules": given["rules"]}) },
			check: "kubernetes: the CA may list pods", detail: "it may not", fix: `{apiGroups: [""], resources: [pods], verbs: [list]}`, othersFailToo: true,
		},
		{
			name:  "kinds",
			spoil: func() { do(http.MethodDelete, crd, nil) },
			mend:  func() { s.Apply(t, manifest(t, "crds.yaml")) },
			check: "kubernetes: the kind RegistrationEntry is there", fix: "crds.yaml",
		},
		{
			name:   "a kind that this version of Kubernetes does not have",
			config: strings.ReplaceAll(config, "bundle: {", "bundle: {cluster_trust_bundle: roots, "),
			check:  "kubernetes: the kind ClusterTrustBundle is there", fix: "feature gate", othersFailToo: true, // there is no right for it either
		},
		{
			name:   "audience",
			config: strings.ReplaceAll(config, "service_accounts:", "audience: ca, service_accounts:"),
			check:  "kubernetes: agents have a token for the right audience", detail: `for ["meshid"], and the CA takes those for "ca"`, fix: "audience",
		},
		{
			name:   "service account",
			config: strings.ReplaceAll(config, "meshid/meshid-agent", "meshid/agents"),
			check:  "kubernetes: agents run", detail: "no pod runs as meshid/agents", fix: "service_accounts",
		},
		{
			name:  "a node without agent",
			spoil: func() { s.Apply(t, "{apiVersion: v1, kind: Node, metadata: {name: n2}}") },
			mend:  func() { do(http.MethodDelete, "/api/v1/nodes/n2", nil) },
			check: "kubernetes: every node has an agent", detail: "n2", fix: "tolerations",
		},
		{
			name:  "a driver that the cluster does not know",
			spoil: func() { do(http.MethodDelete, "/apis/storage.k8s.io/v1/csidrivers/csi.meshid.io", nil) },
			mend:  func() { s.Apply(t, manifest(t, "meshid.yaml")) },
			check: "kubernetes: the CSI driver is registered", detail: "no CSIDriver", fix: "deploy/kubernetes/meshid.yaml",
		},
		{
			name: "a driver that the kubelet does not know",
			spoil: func() {
				do(http.MethodDelete, "/apis/storage.k8s.io/v1/csinodes/n1", nil)
				s.Apply(t, csiNode("csi.example.org"))
			},
			mend: func() {
				do(http.MethodDelete, "/apis/storage.k8s.io/v1/csinodes/n1", nil)
				s.Apply(t, csiNode("csi.meshid.io"))
			},
			check: "kubernetes: the CSI driver is registered", detail: "n1", fix: "kubelet_dir",
		},
		{
			name: "another driver of the agents",
			spoil: func() {
				s.Apply(t, "{apiVersion: v1, kind: ConfigMap, metadata: {name: meshid-agent, namespace: meshid}, data: {agent.yaml: '{csi: {driver: csi.example.org}, node_attestation: {k8s_psat: {cluster: kubernetes}}}'}}")
			},
			mend:  func() { s.Apply(t, manifest(t, "meshid.yaml")) },
			check: "kubernetes: the CSI driver is registered", detail: "no CSIDriver csi.example.org", fix: "deploy/kubernetes/meshid.yaml",
		},
		{
			name: "another name of the cluster at the agents",
			spoil: func() {
				s.Apply(t, "{apiVersion: v1, kind: ConfigMap, metadata: {name: meshid-agent, namespace: meshid}, data: {agent.yaml: 'node_attestation: {k8s_psat: {cluster: prod}}'}}")
			},
			mend:  func() { s.Apply(t, manifest(t, "meshid.yaml")) },
			check: "kubernetes: agents use this cluster's name", detail: `says "prod"`, fix: "cluster: kubernetes",
		},
		{
			name:   "another name of the cluster in the CA",
			config: strings.Replace(config, "name: kubernetes", "name: prod", 1),
			check:  "the clusters have the same names everywhere", detail: `"prod"`, fix: "one name",
		},
		{
			name:   "another bundle",
			config: strings.ReplaceAll(config, "meshid-bundle,", "meshid-bundle, key: other.pem,"),
			check:  "kubernetes: the trust bundle is published", detail: "another one than the CA's in meshid", fix: "log",
		},
		{
			name:   "no bundle",
			config: strings.ReplaceAll(config, "config_map: meshid-bundle", "config_map: meshid-bundle-2"),
			check:  "kubernetes: the trust bundle is published", othersFailToo: true, // there is no right for it either
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := c.config
			if text == "" {
				text = config
			}
			if c.spoil != nil {
				c.spoil()
				defer c.mend()
			}
			local.Await(t, "the mistake is found", func(context.Context) error { // RBAC and kinds take a moment
				checks, err := run(t, text, admin...)
				if err == nil {
					return errors.New("nothing is found")
				}
				if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
					return fmt.Errorf("exit code 1 is wanted: %w", err)
				}
				found := false
				for _, r := range checks {
					switch {
					case r.Outcome != "failed":
					case r.Check == c.check:
						found = true
						if !strings.Contains(r.Detail, c.detail) || !strings.Contains(r.Fix, c.fix) {
							return fmt.Errorf("%+v, want %q and %q", r, c.detail, c.fix)
						}
					case !c.othersFailToo:
						return fmt.Errorf("%+v", r)
					}
				}
				if !found {
					return fmt.Errorf("%q did not fail: %+v", c.check, checks)
				}
				return nil
			})
		})
	}
	t.Run("an API server that is away", func(t *testing.T) {
		s.Server.Kill()
		checks, err := run(t, config)
		last := checks[len(checks)-1]
		if err == nil || last.Check != "kubernetes: the API server answers" || last.Outcome != "failed" || last.Fix == "" {
			t.Errorf("%v: %+v", err, checks)
		}
	})
}

// rightsNeeded is a configuration that needs every right there is.
const rightsNeeded = `node_attestation: {k8s_psat: {clusters: [{name: kubernetes, service_accounts: [meshid/meshid-agent], token_review: {}}]}}
kubernetes:
  clusters:
    - name: kubernetes
      kubeconfig: %s
      entries: true
      trust_bundles: true
      bundle: {config_map: meshid-bundle, namespaces: kubernetes.io/metadata.name=meshid, cluster_trust_bundle: 'meshid.io:svid:bundle'}
      pod_certificates: {signer: meshid.io/svid}
istio:
  listen: %s
  dns_names: [ca.mesh-ca.svc]
  clusters: [{name: kubernetes, roots: {keep: true}, istiod: {keep: true}}]
`

// An account with no right at all, to which the fixes of `ca k8s check` are applied as
// they are printed, has what the CA needs: nothing is missing among them, and all is
// written then that the settings ask for.
func TestCheckSaysWhichRightsAreMissing(t *testing.T) {
	s := kube.StartAPIServer(t)
	s.Apply(t, manifest(t, "crds.yaml"))
	s.Account(t, "meshid", "meshid-ca")
	s.Account(t, "istio-system", "istiod-service-account")
	s.Apply(t, `
apiVersion: meshid.io/v1alpha1
kind: TrustBundle
metadata: {name: mesh}
spec:
  configMap: {name: roots, namespaceSelector: kubernetes.io/metadata.name=istio-system}
  clusterTrustBundle: {name: "mesh.example.org:ca:roots"}
---
apiVersion: meshid.io/v1alpha1
kind: RegistrationEntry
metadata: {name: istiod}
spec:
  spiffeID: spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}
  nodes: node.method == "istio" && node.id == "kubernetes"
  workloads: k8s.namespace == "istio-system" && k8s.service_account == "istiod-service-account" && !has(k8s.pod_uid)
  dnsNames: [istiod.istio-system.svc]
`)
	kubeconfig := s.TokenKubeconfig(t, s.Token(t, kube.Pod{Namespace: "meshid", ServiceAccount: "meshid-ca"}, time.Hour))
	config := fmt.Sprintf(rightsNeeded, kubeconfig, local.FreeAddress(t))
	const inCluster, inNamespace = "add to the ClusterRole of the CA's service account: ", "add to a Role in istio-system that is bound to the CA's service account: "
	apply := func(kind, namespace string, rules []string) {
		t.Helper()
		s.Apply(t, fmt.Sprintf(`
{apiVersion: rbac.authorization.k8s.io/v1, kind: %[1]s, metadata: {name: ca%[2]s}, rules: [%[3]s]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: %[1]sBinding
metadata: {name: ca%[2]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: %[1]s, name: ca}
subjects: [{kind: ServiceAccount, namespace: meshid, name: meshid-ca}]
`, kind, namespace, strings.Join(rules, ", ")))
	}
	missing := func() (checks []string, cluster, istio []string) {
		t.Helper()
		all, _ := check(t, config)
		for _, c := range all {
			if c.Outcome != "failed" || !strings.Contains(c.Check, "the CA may ") {
				continue
			}
			checks = append(checks, strings.TrimPrefix(c.Check, "kubernetes: the CA may "))
			rule, ok := strings.CutPrefix(c.Fix, inCluster)
			if ok {
				cluster = append(cluster, rule)
			} else if rule, ok = strings.CutPrefix(c.Fix, inNamespace); ok {
				istio = append(istio, rule)
			}
			if !ok {
				t.Errorf("%s: the fix is %q", c.Check, c.Fix)
			}
		}
		return checks, cluster, istio
	}

	before, cluster, istio := missing()
	for _, want := range []string{
		"patch secrets istiod-tls in istio-system", "create secrets in istio-system", "attest signers.certificates.k8s.io meshid.io/svid", "sign signers.certificates.k8s.io meshid.io/svid",
		"create clustertrustbundles.certificates.k8s.io", "create tokenreviews.authentication.k8s.io", "patch configmaps istio-ca-root-cert", "patch podcertificaterequests.certificates.k8s.io/status",
	} {
		if !slices.Contains(before, want) {
			t.Errorf("it is not found that the CA may not %s: %q", want, before)
		}
	}
	rules := cluster
	apply("ClusterRole", "", rules)
	apply("Role", ", namespace: istio-system", istio)
	local.Await(t, "the rights that TrustBundle objects need are found too", func(context.Context) error { // they can be read now
		checks, more, _ := missing()
		if !slices.Contains(checks, "attest signers.certificates.k8s.io mesh.example.org/ca") || !slices.Contains(checks, "patch configmaps roots") || len(checks) != len(more) {
			return fmt.Errorf("missing are %q", checks)
		}
		cluster = more
		return nil
	})
	// For a signer, the whole domain's right is as good.
	for i, rule := range cluster {
		cluster[i] = strings.Replace(rule, "mesh.example.org/ca", "mesh.example.org/*", 1)
	}
	apply("ClusterRole", "", append(rules, cluster...))
	local.Await(t, "no right is missing", func(context.Context) error {
		if checks, _, _ := missing(); len(checks) > 0 {
			return fmt.Errorf("missing are %q", checks)
		}
		return nil
	})

	ca := local.StartCA(t, local.CAOptions{Config: config})
	for _, path := range []string{
		"/api/v1/namespaces/istio-system/secrets/istiod-tls", "/api/v1/namespaces/istio-system/configmaps/istio-ca-root-cert",
		"/api/v1/namespaces/istio-system/configmaps/roots", "/api/v1/namespaces/meshid/configmaps/meshid-bundle",
		"/apis/certificates.k8s.io/v1/clustertrustbundles/meshid.io:svid:bundle", "/apis/certificates.k8s.io/v1/clustertrustbundles/mesh.example.org:ca:roots",
	} {
		local.Await(t, "the CA writes "+path, func(ctx context.Context) error { return s.Do(ctx, http.MethodGet, path, nil, nil) })
	}
	local.Await(t, "the objects have their status", func(context.Context) error {
		for _, object := range []string{"trustbundle/mesh", "registrationentry/istiod"} {
			if status, err := s.Kubectl(t, "get", object, "-o", "jsonpath={.status.conditions[0].status}"); status != "True" {
				return errors.Join(fmt.Errorf("%s: %q", object, status), err)
			}
		}
		return nil
	})
	local.Await(t, "nothing is wrong with the cluster", func(context.Context) error {
		for line := range strings.Lines(ca.MustCommand(t, "status")) {
			if strings.HasPrefix(line, "condition ") && !strings.HasSuffix(strings.TrimSpace(line), ": ok") {
				return errors.New(line)
			}
		}
		return nil
	})
}

const crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/registrationentries.meshid.io"
