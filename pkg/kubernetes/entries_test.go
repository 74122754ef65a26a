package kubernetes_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(testkube.Main(m)) //nolint:forbidigo // as every TestMain
}

// crds are the kinds as they are shipped.
func crds(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(require.Repository() + "/deploy/kubernetes/crds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// startCA starts a CA that follows the cluster.
func startCA(t *testing.T, s *testkube.APIServer, more string) *local.CA {
	t.Helper()
	return local.StartCA(t, local.CAOptions{Config: fmt.Sprintf("kubernetes:\n  clusters:\n    - {name: prod, kubeconfig: %s, placement: 'off'%s}\n", s.Kubeconfig, more)})
}

// entries returns the names and the SPIFFE IDs of what is in force.
func entries(ctx context.Context, ca *local.CA) (string, error) {
	res, err := ca.Admin.ListEntries(ctx, &adminv1.ListEntriesRequest{})
	if err != nil {
		return "", err
	}
	var all []string
	for _, e := range res.GetEntries() {
		all = append(all, e.GetName()+"="+e.GetSpiffeId())
	}
	return strings.Join(all, " "), nil
}

func awaitEntries(t *testing.T, ca *local.CA, want string) {
	t.Helper()
	local.Await(t, "entries "+want, func(ctx context.Context) error {
		got, err := entries(ctx, ca)
		if err == nil && got != want {
			err = errors.New(got)
		}
		return err
	})
}

const webEntry = `
apiVersion: meshid.io/v1alpha1
kind: RegistrationEntry
metadata: {name: web}
spec:
  spiffeID: spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}
  workloads: has(k8s.pod_uid)
  nodes: node.method == "k8s_psat"
  ttl: 1h
`

// Objects become entries, their status says what became of them, and an API server that
// is away takes nothing out of force.
func TestRegistrationEntries(t *testing.T) {
	s := testkube.StartAPIServer(t)
	ca := startCA(t, s, ", entries: true")
	// The kinds come later than the CA: it says what is missing, and waits for them.
	local.Await(t, "the CA says that the kind is missing", func(context.Context) error {
		if out := ca.MustCommand(t, "status"); !strings.Contains(out, "deploy/kubernetes/crds.yaml") {
			return errors.New(out)
		}
		return nil
	})
	s.Apply(t, crds(t))
	local.Await(t, "apply an object of the new kind", func(context.Context) error {
		_, err := s.Kubectl(t, "get", "registrationentries")
		return err
	})
	s.Apply(t, webEntry)
	const web = "k8s/prod/web=spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}"
	awaitEntries(t, ca, web)
	condition := func(name, kind, want string) {
		t.Helper()
		local.Await(t, name+" "+kind+"="+want, func(context.Context) error {
			got, err := s.Kubectl(t, "get", "registrationentry", name, "-o",
				fmt.Sprintf(`jsonpath={.status.conditions[?(@.type==%q)].status} {.status.conditions[?(@.type==%q)].reason} {.status.conditions[?(@.type==%q)].message}`, kind, kind, kind))
			if err == nil && !strings.HasPrefix(got, want) {
				err = errors.New(got)
			}
			return err
		})
	}
	condition("web", "Accepted", "True Accepted")
	condition("web", "InForce", "True AllNodes")
	res, err := ca.Admin.ListEntries(t.Context(), &adminv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := res.GetEntries()[0].GetNodes(); got != `node.k8s.cluster == "prod" && (node.method == "k8s_psat")` {
		t.Errorf("it is for the nodes %s", got)
	}

	// What only the CA can judge is said in the status, and what was in force stays.
	s.MustKubectl(t, "patch", "registrationentry", "web", "--type=merge", "-p", `{"spec":{"workloads":"k8s.namespaces == \"x\""}}`)
	condition("web", "Accepted", "False Invalid entry \"k8s/prod/web\": workloads")
	condition("web", "InForce", "False EarlierVersion")
	awaitEntries(t, ca, web)

	// Administrators and others who write by the admin API leave it alone.
	if out, err := ca.Command(t, "entry", "delete", "k8s/prod/web"); err == nil || !strings.Contains(err.Error(), "declared in Kubernetes") {
		t.Errorf("%v, %s", err, out)
	}

	// While the API server is away, and when it is back with the same, nothing changes.
	s.Server.Kill()
	if got, err := entries(t.Context(), ca); err != nil || got != web {
		t.Errorf("%s, %v", got, err)
	}
	s.Server.Start(t)
	s.AwaitReady(t)
	s.MustKubectl(t, "patch", "registrationentry", "web", "--type=merge", "-p", `{"spec":{"workloads":"has(k8s.pod_uid)","spiffeID":"spiffe://example.org/pod/{k8s.pod_uid}"}}`)
	awaitEntries(t, ca, "k8s/prod/web=spiffe://example.org/pod/{k8s.pod_uid}")
	condition("web", "Accepted", "True Accepted")

	// What was deleted while the CA was away is deleted when it is back.
	ca.Kill()
	s.MustKubectl(t, "delete", "registrationentry", "web")
	ca.Start(t)
	ca.AwaitReady(t)
	awaitEntries(t, ca, "")
}

// The API server itself refuses what it can judge.
func TestAdmission(t *testing.T) {
	s := testkube.Shared(t)
	s.Apply(t, crds(t))
	local.Await(t, "the new kind", func(context.Context) error {
		_, err := s.Kubectl(t, "get", "registrationentries")
		return err
	})
	for name, c := range map[string]struct{ old, new, want string }{
		"no scheme":    {"spiffe://example.org/ns", "example.org/ns", "must begin with spiffe://"},
		"no workloads": {"  workloads: has(k8s.pod_uid)\n", "", "workloads"},
		"no duration":  {"ttl: 1h", "ttl: an hour", "must be a duration"},
		"too short":    {"ttl: 1h", "ttl: 1s", "between 10s and 24h"},
		"too long":     {"ttl: 1h", "ttl: 48h", "between 10s and 24h"},
		"typo":         {"ttl: 1h", "tll: 1h", "tll"},
		"long name":    {"{name: web}", "{name: " + strings.Repeat("x", 81) + "}", "metadata.name"},
	} {
		_, err := s.TryApply(t, strings.Replace(webEntry, c.old, c.new, 1), "--dry-run=server")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.TryApply(t, webEntry, "--dry-run=server"); err != nil {
		t.Error(err)
	}
}
