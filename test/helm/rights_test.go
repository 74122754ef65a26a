package helm

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// rule is one of a role.
type rule struct {
	Groups    []string `yaml:"apiGroups"`
	Resources []string `yaml:"resources"`
	Names     []string `yaml:"resourceNames"`
	Verbs     []string `yaml:"verbs"`
}

// given are the rights that manifests give to the CA's account, as `ca k8s check` names
// them.
func given(t *testing.T, manifests string) (all []string) {
	t.Helper()
	for text := range strings.SplitSeq(manifests, "\n---\n") {
		var role struct {
			Kind     string `yaml:"kind"`
			Metadata struct {
				Name      string `yaml:"name"`
				Namespace string `yaml:"namespace"`
			} `yaml:"metadata"`
			Rules []rule `yaml:"rules"`
		}
		if err := yaml.Unmarshal([]byte(text), &role); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(role.Metadata.Name, "meshid-ca") {
			continue
		}
		for _, r := range role.Rules {
			for _, group := range r.Groups {
				for _, resource := range r.Resources {
					for _, verb := range r.Verbs {
						for _, name := range append(r.Names, "")[:max(1, len(r.Names))] {
							what, sub, _ := strings.Cut(resource, "/")
							if group != "" {
								what += "." + group
							}
							if sub != "" {
								what += "/" + sub
							}
							if name != "" {
								what += " " + name
							}
							if role.Kind == "Role" {
								what += " in " + role.Metadata.Namespace
							}
							all = append(all, verb+" "+what)
						}
					}
				}
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// outside is the configuration that the chart makes of values, for a CA that is in no
// pod: clusters and upstream CAs are reached by these kubeconfigs, by name; "" is that of
// the rest. Settings that somebody else writes are left out.
func outside(t *testing.T, text string, kubeconfigs map[string]string, without ...string) string {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal([]byte(text), &config); err != nil {
		t.Fatal(err)
	}
	for _, setting := range without {
		delete(config, setting)
	}
	reach := func(section any, name string) {
		if s, ok := section.(map[string]any); ok {
			s["kubeconfig"] = kubeconfigs[""]
			if other := kubeconfigs[name]; other != "" {
				s["kubeconfig"] = other
			}
		}
	}
	if k, ok := config["kubernetes"].(map[string]any); ok {
		clusters, _ := k["clusters"].([]any)
		for _, c := range clusters {
			reach(c, fmt.Sprint(c.(map[string]any)["name"])) //nolint:forcetypeassert // the chart's own
		}
	}
	if u, ok := config["upstream"].(map[string]any); ok {
		for kind, section := range u {
			reach(section, kind)
		}
	}
	out, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// configuration is the file of a ConfigMap among manifests.
func configuration(t *testing.T, manifests, file string) string {
	t.Helper()
	for text := range strings.SplitSeq(manifests, "\n---\n") {
		var d document
		if err := yaml.Unmarshal([]byte(text), &d); err != nil {
			t.Fatal(err)
		}
		if config, ok := d.Data[file]; ok {
			return config
		}
	}
	t.Fatalf("no ConfigMap has %s", file)
	return ""
}

// Whatever the values are, the chart gives the CA's account the rights that its
// configuration needs, and no other.
func TestChartGivesTheRightsThatAreNeeded(t *testing.T) {
	s := kube.StartAPIServer(t)
	s.Apply(t, manifest(t, "crds.yaml"))
	for _, namespace := range []string{"meshid", "istio-system", "trust", "issuing"} {
		s.Apply(t, "{apiVersion: v1, kind: Namespace, metadata: {name: "+namespace+"}}")
	}
	s.Account(t, "meshid", "meshid-ca")
	kubeconfig := s.TokenKubeconfig(t, s.Token(t, kube.Pod{Namespace: "meshid", ServiceAccount: "meshid-ca"}, time.Hour))
	for _, c := range []struct {
		name, values string
		has, hasNot  string // rights, for those who read this
		fix          string // of what is wrong but for rights
	}{
		{name: "no kinds", values: "{entries: false}", has: "patch configmaps meshid-bundle", hasNot: "list registrationentries.meshid.io"},
		{name: "default", values: "{}", has: "list pods", hasNot: "create certificatesigningrequests.certificates.k8s.io"},
		{
			name: "Istio", values: "{istio: {enabled: true, keepRoots: true, keepIstiodCertificate: true, namespace: istio-system}}",
			has: "patch secrets istiod-tls in istio-system", hasNot: "get secrets",
		},
		{name: "podCertificate volumes", values: "{podCertificates: true}", has: "sign signers.certificates.k8s.io meshid.io/svid", hasNot: "patch clustertrustbundles.certificates.k8s.io"},
		{
			name: "a signer of Kubernetes", values: `{ca: {config: {upstream: {k8scsr: {signer: ca.example.org/mesh, roots: {trust_bundle: 'ca.example.org:mesh:roots'}}}}}}`,
			has: "delete certificatesigningrequests.certificates.k8s.io", hasNot: "approve signers.certificates.k8s.io ca.example.org/mesh",
		},
		{
			name:   "a signer of Kubernetes that approves nothing itself",
			values: `{ca: {config: {upstream: {k8scsr: {signer: issuers.cert-manager.io/issuing.mesh, approve: true, roots: {config_map: {namespace: trust, name: roots}}}}}}}`,
			has:    "approve signers.certificates.k8s.io issuers.cert-manager.io/issuing.mesh", hasNot: "get configmaps",
		},
		{
			name: "cert-manager", values: `{ca: {config: {upstream: {certmanager: {namespace: issuing, issuer: {name: mesh}}}}}}`,
			has: "create certificaterequests.cert-manager.io in issuing", hasNot: "create certificaterequests.cert-manager.io", fix: "install cert-manager",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			manifests := render(t, "--values="+values(t, c.values))
			s.Apply(t, manifests)
			rights := given(t, manifests)
			if !slices.Contains(rights, c.has) || slices.Contains(rights, c.hasNot) {
				t.Errorf("it gives %q, want %q and not %q", rights, c.has, c.hasNot)
			}
			config := outside(t, configuration(t, manifests, "ca.yaml"), map[string]string{"": kubeconfig}, "trust_domain")
			local.Await(t, "the rights are given", func(context.Context) error { // RBAC takes a moment
				checks, _ := check(t, config)
				var needed []string
				fixed := c.fix == ""
				for _, r := range checks {
					_, right, ok := strings.Cut(r.Check, ": the CA may ")
					if ok {
						needed = append(needed, right)
					}
					if ok && r.Outcome != "ok" {
						return fmt.Errorf("%+v", r)
					}
					fixed = fixed || r.Outcome == "failed" && strings.Contains(r.Fix, c.fix)
				}
				slices.Sort(needed)
				if diff := cmp.Diff(slices.Compact(needed), rights); diff != "" {
					t.Fatalf("-needed +given\n%s", diff)
				}
				if !fixed {
					t.Fatalf("nothing says %q: %+v", c.fix, checks)
				}
				return nil
			})
		})
	}
	t.Run("an upstream CA that is reached otherwise", func(t *testing.T) {
		with := given(t, render(t, "--values="+values(t, `{ca: {config: {upstream: {k8scsr: {kubeconfig: /etc/other, signer: ca.example.org/mesh}}}}}`)))
		if diff := cmp.Diff(given(t, render(t)), with); diff != "" {
			t.Errorf("it takes rights here: -default +with\n%s", diff)
		}
	})
}

// A CA serves another cluster, in which the chart has put agents alone and an account for
// the CA: by the commands of docs/kubernetes.md, on two real API servers.
func TestAgentsOfACAElsewhere(t *testing.T) {
	book := &handbook{all: commands(t, "kubernetes.md", "edge"), run: make(map[string]bool)}
	at := func() installation { return installation{&kube.Cluster{APIServer: kube.StartAPIServer(t)}, t, book} }
	here, edge := at(), at()
	here.Apply(t, "{apiVersion: v1, kind: Namespace, metadata: {name: meshid}}")
	notes := here.shell("helm install meshid deploy/helm/meshid --namespace meshid --set trustDomain=example.org --no-hooks") // there is nobody who runs a Job
	_, notes, _ = strings.Cut(notes, "\nkubectl apply")
	first, _, found := strings.Cut(notes, "\nEND\n")
	here.shell("kubectl apply" + first + "\nEND\n") // the first entry, as they say
	if out := here.MustKubectl(t, "get", "registrationentries", "-o", "name"); !found || !strings.Contains(out, "/pods") {
		t.Errorf("the notes declare %q: %s", out, first)
	}
	if notes := edge.documented("ca.enabled=false"); !strings.Contains(notes, "attest at the CA at ca.example.org:8443") {
		t.Errorf("the notes are %s", notes)
	}
	for kind, want := range map[string]string{"statefulsets": "", "daemonsets": "daemonset.apps/meshid-agent"} {
		if out := strings.TrimSpace(edge.MustKubectl(t, "get", kind, "-A", "-o", "name")); out != want {
			t.Errorf("there are the %s %q", kind, out)
		}
	}

	// There is no controller here that makes tokens.
	token := edge.Token(t, kube.Pod{Namespace: "meshid", ServiceAccount: "meshid-ca"}, time.Hour)
	root, err := os.ReadFile(edge.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	data := object{"token": base64.StdEncoding.EncodeToString([]byte(token)), "ca.crt": base64.StdEncoding.EncodeToString(root)}
	if err := edge.Do(t.Context(), http.MethodPatch, "/api/v1/namespaces/meshid/secrets/meshid-ca", object{"data": data}, nil); err != nil {
		t.Fatal(err)
	}
	made := edge.shell(edge.command("get secret meshid-ca") + "; cat edge.kubeconfig")
	here.shell("cat >edge.kubeconfig <<'END'\n" + made + "\nEND\n" + here.command("create secret generic edge"))
	here.documented("kubeconfigSecret=edge", "--no-hooks")
	for _, line := range book.all {
		if !book.run[line] {
			t.Errorf("no test runs this command: %s", line)
		}
	}

	// What the CA's pod would have, for a CA here.
	stored := here.MustKubectl(t, "get", "secret", "edge", "-n", "meshid", "-o", "go-template={{.data.kubeconfig | base64decode}}")
	path := filepath.Join(t.TempDir(), "edge.kubeconfig")
	if err := os.WriteFile(path, []byte(stored), 0o600); err != nil {
		t.Fatal(err)
	}
	text := here.MustKubectl(t, "get", "configmap", "meshid-ca", "-n", "meshid", "-o", `go-template={{index .data "ca.yaml"}}`)
	config := outside(t, text, map[string]string{
		"": here.TokenKubeconfig(t, here.Token(t, kube.Pod{Namespace: "meshid", ServiceAccount: "meshid-ca"}, time.Hour)), "edge": path,
	}, "trust_domain", "metrics_listen")
	ca := local.StartCA(t, local.CAOptions{Config: config})
	edge.Apply(t, "{apiVersion: meshid.io/v1alpha1, kind: RegistrationEntry, metadata: {name: pods}, spec: {spiffeID: 'spiffe://example.org/edge/{k8s.namespace}', workloads: has(k8s.pod_uid)}}")
	local.Await(t, "the CA serves the other cluster", func(context.Context) error {
		checks, _ := check(t, config, "--admin-socket", ca.AdminSocket)
		seen := 0
		for _, r := range checks {
			if r.Outcome == "failed" && !strings.Contains(r.Check, ": agents run") { // nobody makes pods here
				return fmt.Errorf("%+v", r)
			}
			if strings.HasPrefix(r.Check, "edge: ") {
				seen++
			}
		}
		if status, err := edge.Kubectl(t, "get", "registrationentry/pods", "-o", "jsonpath={.status.conditions[0].status}"); status != "True" || seen == 0 {
			return errors.Join(fmt.Errorf("accepted is %q, %d checks", status, seen), err)
		}
		_, err := edge.Kubectl(t, "get", "configmap", "-n", "meshid", "meshid-bundle") // what its agents wait for
		return err
	})
}
