package k8sattest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// Both programs, as they are configured: an agent attests by its pod's token, at a CA
// that has the cluster verify it, and at one that verifies it by the cluster's keys. The
// agent reads the token again when the one that it had was refused.
func TestAgentAttestsByToken(t *testing.T) {
	s := testkube.Shared(t)
	reviewer(t, s) // the rights of the user ca
	namespace := s.Namespace(t)
	pod := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: "node-1"})
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(`
kubernetes:
  clusters:
    - {name: prod, kubeconfig: %[1]q}
node_attestation:
  k8s_psat:
    clusters:
      - {name: prod, service_accounts: [%[2]s/agent], token_review: {}}
      - name: edge
        service_accounts: [%[2]s/agent]
        jwks: {issuer: %[3]q, url: %[4]q, ca: %[5]q, token_file: %[6]q}
`, s.UserKubeconfig(t, "ca"), namespace, s.Issuer, s.URL+"/openid/v1/jwks", s.CAFile, write("ca-token", s.Token(t, pod, time.Hour)))})
	token := func() string { return s.Token(t, pod, 10*time.Minute, "meshid") }
	used := token()
	first := write("first", used)
	for _, cluster := range []string{"prod", "edge"} {
		c.StartAgent(t, "", local.AgentOptions{NodeAttestation: fmt.Sprintf("{k8s_psat: {cluster: %s, token_file: %s}}", cluster, write(cluster, token()))})
		if list := c.MustCommand(t, "node", "list"); !strings.Contains(list, "/node/k8s_psat/"+cluster+".") {
			t.Errorf("nodes:\n%s", list)
		}
	}
	// A token for somebody else, then the right one.
	if err := os.WriteFile(first, []byte(s.Token(t, pod, 10*time.Minute, "istio-ca")), 0o600); err != nil {
		t.Fatal(err)
	}
	a := c.LaunchAgent(t, "", local.AgentOptions{NodeAttestation: fmt.Sprintf("{k8s_psat: {cluster: prod, token_file: %s}}", first)})
	local.Await(t, "wait for the refusal", refusal(t, c, "istio-ca"))
	if err := os.WriteFile(first, []byte(used), 0o600); err != nil {
		t.Fatal(err)
	}
	a.AwaitConnected(t)
	if text := c.Log() + a.Log() + c.MustCommand(t, "ledger", "tail", "--dir", filepath.Join(c.DataDir, "ledger"), "-n", "50"); strings.Contains(text, strings.Split(used, ".")[2]) {
		t.Error("a token is in a log or in the ledger")
	}
}

// Whoever knows a pod by its name is told which entry gives it an identity, or why none
// does, without a number of a process.
func TestExplainPod(t *testing.T) {
	s := testkube.Shared(t)
	reviewer(t, s)
	namespace := s.Namespace(t)
	node := "node-" + namespace
	agent := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: node})
	s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "web", ServiceAccount: "web", Node: node})
	s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "far", ServiceAccount: "web", Node: node + "-2"})
	config := fmt.Sprintf(`
kubernetes: {clusters: [{name: prod, kubeconfig: %q}]}
node_attestation: {k8s_psat: {clusters: [{name: prod, service_accounts: [%s/agent], token_review: {}}]}}
`, s.UserKubeconfig(t, "ca"), namespace)
	c := local.StartCA(t, local.CAOptions{Config: config})
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c.StartAgent(t, "", local.AgentOptions{NodeAttestation: "{k8s_psat: {cluster: prod, token_file: " + write("token", s.Token(t, agent, 10*time.Minute, "meshid")) + "}}"})
	c.MustCommand(t, "entry", "apply", "-f", write("entries.yaml", fmt.Sprintf(`
- {name: shop, spiffe_id: 'spiffe://example.org/sa/{k8s.service_account}', nodes: 'node.k8s.cluster == "prod"', workloads: 'k8s.namespace == "%[1]s"'}
- {name: other, spiffe_id: 'spiffe://example.org/other', workloads: 'k8s.namespace == "%[1]s" && k8s.service_account == "batch"'}
`, namespace)))
	at := write("ca.yaml", "trust_domain: example.org\n"+config)
	out := c.MustCommand(t, "entry", "explain", "--config", at, "--pod", namespace+"/web")
	for _, want := range []string{"match entry/shop -> spiffe://example.org/sa/web", `entry/other: workloads: k8s.service_account == "batch"`, `"pod_name":"web"`} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	for _, refused := range []struct{ args, want string }{
		{"--pod " + namespace + "/none", "has no pod " + namespace + "/none; see: kubectl get pods -n " + namespace},
		{"--pod " + namespace + "/far", "The pod's node has not attested"},
		{"--pod web", "write NAMESPACE/NAME"},
		{"--pod " + namespace + "/web --container sidecar", "has no container \"sidecar\""},
		{"--pod " + namespace + "/web --cluster edge", "write one of prod"},
		{"--pod " + namespace + "/web --pid 1", "say what to explain"},
		{"", "say what to explain"},
		{"--pid 1", "say on which node"},
	} {
		out, err := c.Command(t, append([]string{"entry", "explain", "--config", at}, strings.Fields(refused.args)...)...)
		if err == nil || !strings.Contains(out+err.Error(), refused.want) {
			t.Errorf("%s: %v: %s, want %q", refused.args, err, out, refused.want)
		}
	}
}

// refusal waits for a record of a refusal that says why.
func refusal(t *testing.T, c *local.CA, why string) func(context.Context) error {
	return func(context.Context) error {
		tail := c.MustCommand(t, "ledger", "tail", "--dir", filepath.Join(c.DataDir, "ledger"), "-n", "50", "-o", "json")
		if !strings.Contains(tail, why) {
			return errors.New("no such record yet")
		}
		return nil
	}
}
