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
