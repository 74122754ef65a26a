// Package k8sattest holds the attestation of nodes and workloads to real Kubernetes: an
// API server for tokens, and in `make cluster-test` nodes with their kubelet, containerd
// and pods.
package k8sattest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	"github.com/meshid/meshid/pkg/store"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

func TestMain(m *testing.M) {
	if os.Getenv(onNode) != "" {
		os.Exit(attestOnNode()) //nolint:forbidigo // this is the program on the node
	}
	os.Exit(testkube.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// tokens verifies tokens in the words of node attestation, as the CA has it.
type tokens struct{ kube.TokenVerifier }

func (t tokens) Verify(ctx context.Context, token, audience string) (*k8spsat.Token, error) {
	id, err := t.TokenVerifier.Verify(ctx, token, audience)
	if errors.Is(err, kube.ErrToken) {
		err = errors.Join(attest.ErrRefused, err)
	}
	return (*k8spsat.Token)(id), err
}

// caRights are what the documents give to the CA, which is the user ca.
const caRights = `
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: meshid-ca-placement}
rules: [{apiGroups: [""], resources: [pods, nodes], verbs: [list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: meshid-ca-placement}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: meshid-ca-placement}
subjects: [{kind: User, name: ca, apiGroup: rbac.authorization.k8s.io}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: meshid-ca-reviews}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:auth-delegator"}
subjects: [{kind: User, name: ca, apiGroup: rbac.authorization.k8s.io}]
`

// agentRights are what they give to node agents of a service account.
func agentRights(namespace, account string) string {
	return fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: meshid-agent}
rules: [{apiGroups: [""], resources: [nodes/pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: meshid-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: meshid-agent}
subjects: [{kind: ServiceAccount, name: %s, namespace: %s}]
`, account, namespace)
}

// reviewer verifies by asking a cluster, with the right to do so and no other.
func reviewer(t *testing.T, s *testkube.APIServer) (*kube.Reviewer, *kube.Client) {
	t.Helper()
	return reviewerOf(t, "prod", s)
}

// reviewerOf is reviewer for a cluster of any name.
func reviewerOf(t *testing.T, cluster string, s *testkube.APIServer) (*kube.Reviewer, *kube.Client) {
	t.Helper()
	s.Apply(t, caRights)
	c, err := kube.Open(kube.Config{Name: cluster, Kubeconfig: s.UserKubeconfig(t, "ca")})
	if err != nil {
		t.Fatal(err)
	}
	return kube.NewReviewer(c), c
}

// offline verifies by the keys that a cluster publishes.
func offline(t *testing.T, s *testkube.APIServer) *kube.Keys {
	t.Helper()
	path := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(path, []byte(s.MustKubectl(t, "get", "--raw", "/openid/v1/jwks")), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := kube.NewKeys(kube.KeysConfig{Issuer: s.Issuer, File: path})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// halves are both halves of the method, with a real database between attempts.
type halves struct {
	verifier *k8spsat.Verifier
	database *store.DB
}

func newHalves(t *testing.T, namespace string, v kube.TokenVerifier, pods k8spsat.Pods) *halves {
	t.Helper()
	return newHalvesOf(t, namespace, k8spsat.Cluster{Config: k8spsat.ClusterConfig{Name: "prod"}, Tokens: tokens{v}, Pods: pods})
}

// newHalvesOf is newHalves for several clusters, whose agents are of the same name.
func newHalvesOf(t *testing.T, namespace string, clusters ...k8spsat.Cluster) *halves {
	t.Helper()
	var c k8spsat.Config
	for _, cluster := range clusters {
		c.Clusters = append(c.Clusters, k8spsat.ClusterConfig{Name: cluster.Config.Name, ServiceAccounts: []string{namespace + "/agent"}, JWKS: &k8spsat.JWKSConfig{}})
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	for i := range clusters {
		clusters[i].Config = c.Clusters[i]
	}
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "ca.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return &halves{
		verifier: k8spsat.NewVerifier(clusters, db),
		database: db,
	}
}

// attest attests with a token.
func (h *halves) attest(t *testing.T, token string) (*attributesv1.Node, error) {
	t.Helper()
	return h.attestTo(t, "prod", token)
}

// attestTo attests as a node of a cluster. It may be called concurrently.
func (h *halves) attestTo(t *testing.T, cluster, token string) (*attributesv1.Node, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return nil, err
	}
	a, err := k8spsat.NewAttester(k8spsat.AgentConfig{Cluster: cluster, TokenFile: file})
	if err != nil {
		return nil, err
	}
	evidence, err := a.Evidence(t.Context(), nil)
	if err != nil {
		return nil, err
	}
	binding := sha256.Sum256([]byte("key"))
	return h.verifier.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: binding[:]}, nil)
}

// C9: tokens that a real API server has signed, by TokenReview and by its keys.
func TestV_C9_RealTokens(t *testing.T) {
	s := testkube.Shared(t)
	other := testkube.StartAPIServer(t)
	review, _ := reviewer(t, s)
	for name, v := range map[string]kube.TokenVerifier{"by TokenReview": review, "offline": offline(t, s)} {
		t.Run(name, func(t *testing.T) {
			namespace := s.Namespace(t)
			pod := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: "node-1"})
			var node struct {
				Metadata struct {
					UID string `json:"uid"`
				} `json:"metadata"`
			}
			if err := s.Do(t.Context(), http.MethodGet, "/api/v1/nodes/node-1", nil, &node); err != nil {
				t.Fatal(err)
			}
			h := newHalves(t, namespace, v, nil)
			before := s.Requests(t, "POST", "tokenreviews")
			token := s.Token(t, pod, 10*time.Minute, "meshid")
			got, err := h.attest(t, token)
			if err != nil {
				t.Fatal(err)
			}
			want := &attributesv1.Node{
				Method: "k8s_psat", Id: "prod." + node.Metadata.UID,
				K8S: &attributesv1.K8SNode{
					Cluster: "prod", Name: "node-1", Uid: node.Metadata.UID,
					Namespace: namespace, ServiceAccount: "agent", PodName: "agent-x", PodUid: pod.UID,
				},
			}
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Errorf("node (-want +got):\n%s", diff)
			}
			reviews := 0
			if v == review {
				reviews = 1
			}
			if n := s.Requests(t, "POST", "tokenreviews") - before; n != reviews {
				t.Errorf("%d TokenReviews for one attestation, want %d", n, reviews)
			}

			unbound := pod
			unbound.UID = ""
			stranger := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "web", ServiceAccount: "web", Node: "node-1"})
			pending := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "pending", ServiceAccount: "agent"})
			elsewhere := other.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: "node-1"})
			for name, token := range map[string]string{
				"used before":             token,
				"for another audience":    s.Token(t, pod, 10*time.Minute, "istio-ca"),
				"for the API server":      s.Token(t, pod, 10*time.Minute),
				"bound to no pod":         s.Token(t, unbound, 10*time.Minute, "meshid"),
				"of a pod without a node": s.Token(t, pending, 10*time.Minute, "meshid"),
				"of another account":      s.Token(t, stranger, 10*time.Minute, "meshid"),
				"of another cluster":      other.Token(t, elsewhere, 10*time.Minute, "meshid"),
			} {
				n, err := h.attest(t, token)
				if n != nil || !errors.Is(err, attest.ErrRefused) {
					t.Errorf("%s: node %v, error %v", name, n, err)
				}
			}
			if _, err := h.attest(t, s.Token(t, pod, 10*time.Minute, "meshid")); err != nil {
				t.Errorf("the next token: %v", err)
			}
		})
	}
}

// C9: the API server accepts the token of a deleted pod for some more seconds, and its
// signature is good for longer. Who follows the cluster's pods is not misled.
func TestV_C9_RealDeletedPod(t *testing.T) {
	s := testkube.Shared(t)
	review, client := reviewer(t, s)
	pods := follow(t, client)
	for name, v := range map[string]kube.TokenVerifier{"by TokenReview": review, "offline": offline(t, s)} {
		t.Run(name, func(t *testing.T) {
			namespace := s.Namespace(t)
			pod := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: "node-1"})
			h := newHalves(t, namespace, v, pods)
			if _, err := h.attest(t, s.Token(t, pod, 10*time.Minute, "meshid")); err != nil {
				t.Fatal(err)
			}
			token := s.Token(t, pod, 10*time.Minute, "meshid")
			s.Review(t, token, "meshid") // which the API server remembers
			local.Await(t, "wait until the pod is known", func(context.Context) error {
				if found, _ := pods.Find("node-1", pod.UID); found == nil {
					return errors.New("not yet")
				}
				return nil
			})
			s.DeletePod(t, pod)
			local.Await(t, "wait until the pod is known to be deleted", func(context.Context) error {
				if pods.CheckPod("node-1", pod.UID) == nil {
					return errors.New("not yet")
				}
				return nil
			})
			still := s.Review(t, token, "meshid").Authenticated
			n, err := h.attest(t, token)
			if n != nil || !errors.Is(err, attest.ErrRefused) {
				t.Errorf("node %v, error %v", n, err)
			}
			if still && (err == nil || !strings.Contains(err.Error(), "deleted")) {
				t.Errorf("the API server still accepted the token, and it was refused for another reason: %v", err)
			}
		})
	}
}

// Keys are fetched from the cluster's own endpoint, with nothing but the right that each
// service account has.
func TestRealKeysFromURL(t *testing.T) {
	s := testkube.Shared(t)
	namespace := s.Namespace(t)
	pod := s.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: "node-1"})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(s.Token(t, pod, 10*time.Minute)), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := kube.NewKeys(kube.KeysConfig{Issuer: s.Issuer, URL: s.URL + "/openid/v1/jwks", CA: s.CAFile, TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newHalves(t, namespace, k, nil).attest(t, s.Token(t, pod, 10*time.Minute, "meshid")); err != nil {
		t.Error(err)
	}
}

// follow follows a cluster's pods until the test ends.
func follow(t *testing.T, c *kube.Client) *kube.Pods {
	t.Helper()
	pods, err := kube.NewPods(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		pods.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return pods
}
