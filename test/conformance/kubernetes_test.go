package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// cluster is a real API server, and a CA that asks it with the rights that the documents
// give it.
type cluster struct {
	api *kube.APIServer
	ca  *local.CA
}

// startCluster starts both. policy is the cluster's setting placement.
func startCluster(t *testing.T, policy string) *cluster {
	t.Helper()
	api := kube.StartAPIServer(t)
	api.MustKubectl(t, "create", "namespace", "meshid")
	for _, account := range []string{"meshid-ca", "agent"} {
		api.MustKubectl(t, "create", "serviceaccount", "-n", "meshid", account)
	}
	page, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	rights := regexp.MustCompile("(?ms)^```yaml\n([^`]*meshid-ca-placement[^`]*)^```").FindSubmatch(page)
	if rights == nil {
		t.Fatal("docs/kubernetes.md does not say which rights the CA needs")
	}
	api.Apply(t, string(rights[1]))
	token := api.Token(t, kube.Pod{Namespace: "meshid", ServiceAccount: "meshid-ca"}, time.Hour)
	c := &cluster{api: api}
	c.ca = local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(`
kubernetes:
  clusters: [{name: prod, kubeconfig: %s, placement: %s}]
node_attestation:
  k8s_psat:
    clusters: [{name: prod, service_accounts: [meshid/agent], token_review: {kubeconfig: %s}}]
`, api.TokenKubeconfig(t, token), policy, api.Kubeconfig)})
	c.ca.Apply(t, `
- name: accounts
  spiffe_id: spiffe://`+td+`/ns/{k8s.namespace}/sa/{k8s.service_account}
  workloads: has(k8s.pod_uid)
- name: apps
  spiffe_id: spiffe://`+td+`/app/{k8s.labels["app"]}
  workloads: k8s.labels["app"] != "" && k8s.namespace.startsWith("team-")
  accept_weak: true
`)
	return c
}

// rogueNode attests as the agent of a node, whose pod's token it has.
func (c *cluster) rogueNode(t *testing.T, node string) *rogue {
	t.Helper()
	pod := c.api.CreatePod(t, kube.Pod{Namespace: "meshid", Name: "agent-" + node, ServiceAccount: "agent", Node: node})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(c.api.Token(t, pod, time.Hour, "meshid")), 0o600); err != nil {
		t.Fatal(err)
	}
	attester, err := k8spsat.NewAttester(k8spsat.AgentConfig{Cluster: "prod", TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	evidence, err := attester.Evidence(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	identity, err := attestWith(t.Context(), dialCA(t, c.ca, nil), &nodev1.AttestStart{
		Method: k8spsat.Method, Evidence: evidence, Csr: csrOf(t, key, nil), AgentVersion: "rogue",
	})
	if err != nil {
		t.Fatal(err)
	}
	svid := svidOf(t, identity.GetChain(), key)
	return &rogue{svid: svid, client: nodev1.NewNodeServiceClient(dialCA(t, c.ca, svid))}
}

// podItem asks for an entry as if for a container of a pod that runs here.
func podItem(t testing.TB, entry string, pod kube.Pod, change ...func(*attributesv1.Kubernetes)) *nodev1.IssueItem {
	t.Helper()
	i := item(entry, 70_000, csrOf(t, newKey(t), nil))
	k := &attributesv1.Kubernetes{
		Namespace: pod.Namespace, ServiceAccount: pod.ServiceAccount, PodName: pod.Name, PodUid: pod.UID, Labels: pod.Labels,
		Container: "c0", ContainerId: strings.Repeat("0", 64), Image: "example.org/app:1",
	}
	for _, c := range change {
		c(k)
	}
	i.Workload.K8S, i.Instance = k, "k8s:"+pod.UID+"/c0"
	return i
}

// awaitRecord waits until the newest record of what was issued for a pod says whose word
// it was that the pod is there.
func (c *cluster) awaitRecord(t *testing.T, pod kube.Pod, by, detail string) {
	t.Helper()
	id := "spiffe://" + td + "/ns/" + pod.Namespace + "/sa/" + pod.ServiceAccount
	local.Await(t, "the newest record has verified_by: "+by, func(context.Context) error {
		var found struct {
			Record struct {
				VerifiedBy string `json:"verified_by"`
				Detail     string `json:"detail"`
			} `json:"record"`
		}
		out, err := c.ca.Command(t, "ledger", "find", "--event", "issue", "--outcome", "success", "--spiffe-id", id, "--limit", "1", "-o", "jsonl")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &found); err != nil {
			return fmt.Errorf("not in the index yet: %w: %s", err, out)
		}
		if r := found.Record; r.VerifiedBy != by || !strings.Contains(r.Detail, detail) {
			return fmt.Errorf("it has %s, and says %q", r.VerifiedBy, r.Detail)
		}
		return nil
	})
}

// An agent that has the whole cluster on its lips gets the identities of the pods of its
// node, whatever else it says.
func TestV_E1_E9_RogueNodeOfKubernetes(t *testing.T) {
	c := startCluster(t, "strict")
	var all []kube.Pod
	for _, node := range []string{"n1", "n2", "n3"} {
		for i := range 4 {
			account := fmt.Sprintf("sa-%s-%d", node, i)
			all = append(all, c.api.CreatePod(t, kube.Pod{
				Namespace: fmt.Sprint("team-", i%2), Name: fmt.Sprintf("pod-%s-%d", node, i), ServiceAccount: account, Node: node,
				Labels: map[string]string{"app": account},
			}))
		}
	}
	ended := c.api.CreatePod(t, kube.Pod{Namespace: "team-0", Name: "ended", ServiceAccount: "ended", Node: "n1", Labels: map[string]string{"app": "ended"}})
	if err := c.api.Do(t.Context(), http.MethodPatch, "/api/v1/namespaces/team-0/pods/ended/status", map[string]any{"status": map[string]any{"phase": "Succeeded"}}, nil); err != nil {
		t.Fatal(err)
	}
	deleted := c.api.CreatePod(t, kube.Pod{Namespace: "team-0", Name: "again", ServiceAccount: "again", Node: "n1", Labels: map[string]string{"app": "again"}})
	r := c.rogueNode(t, "n1")
	r.issued(t, podItem(t, "accounts", deleted))
	c.awaitRecord(t, deleted, "ca", "")
	c.api.DeletePod(t, deleted)
	again := c.api.CreatePod(t, kube.Pod{Namespace: "team-0", Name: "again", ServiceAccount: "again", Node: "n2"})

	var items []*nodev1.IssueItem
	ask := func(pod kube.Pod, change ...func(*attributesv1.Kubernetes)) {
		for _, entry := range []string{"accounts", "apps"} {
			items = append(items, podItem(t, entry, pod, change...))
		}
	}
	want := map[string]bool{}
	for _, pod := range all {
		ask(pod)
		if pod.Node == "n1" {
			want["spiffe://"+td+"/ns/"+pod.Namespace+"/sa/"+pod.ServiceAccount] = true
			want["spiffe://"+td+"/app/"+pod.Labels["app"]] = true
		}
		// As one of its own, with that one's UID; and with labels that somebody else has.
		ask(pod, func(k *attributesv1.Kubernetes) { k.PodUid = all[0].UID })
		ask(all[0], func(k *attributesv1.Kubernetes) { k.Labels = pod.Labels })
		ask(all[1], func(k *attributesv1.Kubernetes) { k.Namespace, k.ServiceAccount = pod.Namespace, pod.ServiceAccount })
		ask(pod, func(k *attributesv1.Kubernetes) { k.Container, k.ContainerId, k.Image = "", "", "" })
		ask(pod, func(k *attributesv1.Kubernetes) { k.Container = "debug" })
	}
	ask(ended)
	ask(deleted)
	ask(again)
	ask(kube.Pod{Namespace: "kube-system", Name: "made-up", ServiceAccount: "admin", UID: "made-up", Labels: map[string]string{"app": "admin"}})
	got := map[string]bool{}
	for batch := range slices.Chunk(items, 40) { // within what a node may ask for at once
		for _, result := range r.issue(t, batch...) {
			if svid := result.GetSvid(); svid != nil {
				got[svid.GetSpiffeId()] = true
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pods of the node -, issued +:\n%s", diff)
	}

	// The other nodes are not the worse for it.
	other := c.rogueNode(t, "n2")
	for _, pod := range append(all[4:8:8], again) {
		other.issued(t, podItem(t, "accounts", pod))
	}
}

func (c *cluster) awaitHealth(t *testing.T, severity string) {
	t.Helper()
	local.Await(t, "the condition of the cluster is "+severity, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.ca.Metrics+"/livez", nil)
		if err != nil {
			return err
		}
		body, err := get(http.DefaultClient, req)
		if err != nil {
			return err
		}
		var state struct {
			Conditions []struct {
				Name     string `json:"name"`
				Severity string `json:"severity"`
				Message  string `json:"message"`
			} `json:"conditions"`
		}
		if err := json.Unmarshal([]byte(body), &state); err != nil {
			return err
		}
		for _, condition := range state.Conditions {
			if condition.Name == "kubernetes_prod" {
				if condition.Severity == severity {
					return nil
				}
				return fmt.Errorf("it is %s: %s", condition.Severity, condition.Message)
			}
		}
		return fmt.Errorf("there is none: %s", body)
	})
}

// The API server stands still, dies and comes back while X.509-SVIDs are issued: pods
// that were seen are served, and the record says that it was the agent's word.
func TestFault_F65_APIServer(t *testing.T) {
	// A connection that stands still is found within seconds, not within a minute.
	t.Setenv("HTTP2_READ_IDLE_TIMEOUT_SECONDS", "1")
	t.Setenv("HTTP2_PING_TIMEOUT_SECONDS", "1")
	c := startCluster(t, "seen")
	pod := c.api.CreatePod(t, kube.Pod{Namespace: "team-0", Name: "web", ServiceAccount: "web", Node: "n1"})
	r := c.rogueNode(t, "n1")
	unknown := kube.Pod{Namespace: "team-0", Name: "new", ServiceAccount: "web", UID: "not-seen"}
	c.awaitHealth(t, "ok")
	served := func(by, detail string) {
		t.Helper()
		r.issued(t, podItem(t, "accounts", pod))
		c.awaitRecord(t, pod, by, detail)
		r.refused(t, podItem(t, "accounts", unknown), nodev1.Reason_REASON_UNAVAILABLE)
	}
	served("ca", "")

	c.api.Server.Signal(t, syscall.SIGSTOP)
	c.awaitHealth(t, "warning")
	served("agent", "has not been heard since")
	c.api.Server.Signal(t, syscall.SIGCONT)
	c.awaitHealth(t, "ok")
	served("ca", "")

	c.api.Server.Kill()
	c.awaitHealth(t, "warning")
	served("agent", "has not been heard since")
	c.api.Server.Start(t)
	c.api.AwaitReady(t)
	c.awaitHealth(t, "ok")
	served("ca", "")
	next := c.api.CreatePod(t, kube.Pod{Namespace: "team-0", Name: "next", ServiceAccount: "web", Node: "n1"})
	r.issued(t, podItem(t, "accounts", next))
	c.api.DeletePod(t, pod)
	local.Await(t, "a deleted pod is refused", func(context.Context) error {
		if svid := r.issue(t, podItem(t, "accounts", pod))[0].GetSvid(); svid != nil {
			return fmt.Errorf("%s was issued", svid.GetSpiffeId())
		}
		return nil
	})
}

// metric reads one of the CA's metrics; labels are not looked at.
func (c *cluster) metric(ctx context.Context, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.ca.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	body, err := get(http.DefaultClient, req)
	if err != nil {
		return 0, err
	}
	found := regexp.MustCompile(`(?m)^` + name + `(?:\{[^}]*\})? (\S+)$`).FindStringSubmatch(body)
	if found == nil {
		return 0, fmt.Errorf("there is no metric %s", name)
	}
	return strconv.ParseFloat(found[1], 64)
}

// What 2,000 pods of a real API server take in the CA: while they come, and when it
// starts and they are there.
func TestMemoryOfPods(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 2,000 pods")
	}
	c := startCluster(t, "strict")
	c.awaitHealth(t, "ok")
	peak := func() int {
		t.Helper()
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.ca.PID()))
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
		if found == nil {
			t.Fatalf("no VmHWM in %s", status)
		}
		kilobytes, err := strconv.Atoi(string(found[1]))
		if err != nil {
			t.Fatal(err)
		}
		return kilobytes >> 10
	}
	none := peak()
	pods := c.api.StartFakeNodes(t, 50, 2000)
	known := func() {
		t.Helper()
		local.Await(t, "the CA knows all pods", func(ctx context.Context) error {
			known, err := c.metric(ctx, "meshid_ca_kubernetes_pods")
			if err == nil && int(known) < len(pods) {
				err = fmt.Errorf("it knows %v of %d", known, len(pods))
			}
			return err
		})
	}
	known()
	came := peak()
	c.ca.Kill()
	c.ca.Start(t)
	c.ca.AwaitReady(t)
	known()
	listed := peak()
	const most = 100 // MiB
	t.Logf("%d pods: at most %d MiB without, %d when they came, %d when they were listed", len(pods), none, came, listed)
	if came-none > most || listed-none > most {
		t.Errorf("%d pods take %d and %d MiB, want %d at most", len(pods), came-none, listed-none, most)
	}
}
