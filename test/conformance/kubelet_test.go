package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// Whoever has taken a node over has its kubelet's credentials too. With them he writes
// into the API server what a kubelet may: pods that it runs from files, with the namespace
// and labels that he likes, and which images its pods run. None of it gives him a name.
func TestV_E9_RogueKubelet(t *testing.T) {
	c := startCluster(t, "strict")
	c.ca.Apply(t, `
- name: images
  spiffe_id: spiffe://`+td+`/image/payments
  workloads: k8s.image == "registry.internal/payments:1"
`)
	victim := c.api.CreatePod(t, kube.Pod{Namespace: "team-0", Name: "victim", ServiceAccount: "victim", Node: "n2", Labels: map[string]string{"app": "victim"}})
	own := c.api.CreatePod(t, kube.Pod{Namespace: "team-1", Name: "own", ServiceAccount: "own", Node: "n1", Labels: map[string]string{"app": "own"}})
	r := c.rogueNode(t, "n1")
	kubelet := func(args ...string) (string, error) {
		return c.api.Kubectl(t, append(args, "--as=system:node:n1", "--as-group=system:nodes")...)
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := kubelet(args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	const hash = "0123456789abcdef0123456789abcdef"
	mirror := fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata:
  name: static-n1
  namespace: team-0
  labels: {app: victim}
  annotations: {kubernetes.io/config.mirror: %s, kubernetes.io/config.source: file, kubernetes.io/config.hash: %s}
  ownerReferences: [{apiVersion: v1, kind: Node, name: n1, uid: %s, controller: true}]
spec:
  nodeName: n1
  containers: [{name: c0, image: "example.org/app:1"}]
`, hash, hash, must("get", "node", "n1", "-o", "jsonpath={.metadata.uid}"))
	file := filepath.Join(t.TempDir(), "mirror.yaml")
	if err := os.WriteFile(file, []byte(mirror), 0o600); err != nil {
		t.Fatal(err)
	}
	// What admission refuses is none of our business; if it allowed it, all would be lost.
	if err := os.WriteFile(file+".account", []byte(strings.Replace(mirror, "spec:", "spec:\n  serviceAccountName: victim", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := kubelet("create", "-f", file+".account"); err == nil {
		t.Fatalf("a kubelet may give a service account to a static pod: %s", out)
	}
	must("create", "-f", file)
	id := strings.Repeat("1", 64)
	var pod map[string]any
	if err := json.Unmarshal([]byte(must("get", "pod", "-n", "team-1", "own", "-o", "json")), &pod); err != nil {
		t.Fatal(err)
	}
	pod["status"] = map[string]any{"phase": "Running", "containerStatuses": []map[string]any{{
		"name": "c0", "image": "registry.internal/payments:1", "imageID": "", "containerID": "containerd://" + id, "ready": true, "restartCount": 0,
	}}}
	text, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".status", text, 0o600); err != nil {
		t.Fatal(err)
	}
	must("replace", "--raw", "/api/v1/namespaces/team-1/pods/own/status", "-f", file+".status")

	static := kube.Pod{Namespace: "team-0", Name: "static-n1", UID: hash, Labels: victim.Labels}
	mirrored := static
	mirrored.UID = must("get", "pod", "-n", "team-0", "static-n1", "-o", "jsonpath={.metadata.uid}")
	container := func(k *attributesv1.Kubernetes) { k.ContainerId = id }
	image := func(k *attributesv1.Kubernetes) { k.Image = "registry.internal/payments:1" }
	r.issued(t, podItem(t, "apps", own, container)) // so that the status was heard of
	for what, item := range map[string]*nodev1.IssueItem{
		"its static pod":                   podItem(t, "apps", static),
		"its static pod, by the other UID": podItem(t, "apps", mirrored),
		"an image":                         podItem(t, "images", own, container, image),
	} {
		local.Await(t, "an answer about "+what, func(context.Context) error {
			result := r.issue(t, item)[0]
			if svid := result.GetSvid(); svid != nil {
				t.Errorf("for %s: %s was issued", what, svid.GetSpiffeId())
			}
			if result.GetRefusal().GetReason() == nodev1.Reason_REASON_UNAVAILABLE { // it was not heard of yet
				return errors.New(result.GetRefusal().GetMessage())
			}
			return nil
		})
	}
}
