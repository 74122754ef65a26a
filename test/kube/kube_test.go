package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/test/local"
)

func TestMain(m *testing.M) {
	os.Exit(Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// A token says which pod and which node it belongs to, and is good for whom it was
// issued for only.
func TestTokenOfPod(t *testing.T) {
	s := Shared(t)
	pod := s.CreatePod(t, Pod{Namespace: s.Namespace(t), Name: "cart", ServiceAccount: "cart", Node: "node-1"})
	token := s.Token(t, pod, 10*time.Minute, "mesh-ca")

	r := s.Review(t, token, "mesh-ca")
	if !r.Authenticated {
		t.Fatalf("not authenticated: %s", r.Error)
	}
	if got, want := r.User.Username, "system:serviceaccount:"+pod.Namespace+":cart"; got != want {
		t.Errorf("user %q, want %q", got, want)
	}
	for key, want := range map[string]string{"pod-name": "cart", "pod-uid": pod.UID, "node-name": "node-1"} {
		if diff := cmp.Diff([]string{want}, r.User.Extra["authentication.kubernetes.io/"+key]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", key, diff)
		}
	}
	if r := s.Review(t, token, "another-ca"); r.Authenticated {
		t.Error("good for another audience")
	}
	if r := s.Review(t, token); r.Authenticated {
		t.Error("good for the API server itself")
	}
}

func TestDeletePod(t *testing.T) {
	s := Shared(t)
	pod := s.CreatePod(t, Pod{Namespace: s.Namespace(t), Name: "cart", Node: "node-1"})
	s.DeletePod(t, pod)
	err := s.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/"+pod.Namespace+"/pods/cart", nil, nil)
	if status, ok := errors.AsType[*StatusError](err); !ok || status.Code != http.StatusNotFound || status.Reason != "NotFound" {
		t.Errorf("got %v, want 404 NotFound", err)
	}
}

// Everybody can verify tokens by the published keys, given the issuer and its root.
func TestIssuerDiscovery(t *testing.T) {
	s := Shared(t)
	root, err := os.ReadFile(s.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	token := s.Token(t, Pod{Namespace: s.Namespace(t)}, 10*time.Minute)
	get := func(url string, out any) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", url, resp.Status)
		}
		if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
			t.Fatal(err)
		}
	}
	var discovery struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	get(s.Issuer+"/.well-known/openid-configuration", &discovery)
	if discovery.Issuer != s.Issuer {
		t.Errorf("issuer %q, want %q", discovery.Issuer, s.Issuer)
	}
	var keys struct{ Keys []any }
	get(discovery.Keys, &keys)
	if len(keys.Keys) != 1 {
		t.Errorf("%d keys, want 1", len(keys.Keys))
	}
}

// Nobody may do what RBAC does not give him.
func TestRBAC(t *testing.T) {
	s := Shared(t)
	namespace := s.Namespace(t)
	pod := s.CreatePod(t, Pod{Namespace: namespace, Name: "agent", ServiceAccount: "agent"})
	byToken := s.TokenKubeconfig(t, s.Token(t, pod, 10*time.Minute))
	byCertificate := s.UserKubeconfig(t, "jane", "operators")
	get := func(kubeconfig string) error {
		_, err := s.Kubectl(t, "--kubeconfig", kubeconfig, "get", "pods", "-n", namespace)
		return err
	}
	for _, kubeconfig := range []string{byToken, byCertificate} {
		if err := get(kubeconfig); err == nil || !strings.Contains(err.Error(), "Forbidden") {
			t.Errorf("got %v, want Forbidden", err)
		}
	}
	s.Apply(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: pods, namespace: `+namespace+`}
rules: [{apiGroups: [""], resources: [pods], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: pods, namespace: `+namespace+`}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: pods}
subjects:
- {kind: ServiceAccount, name: agent, namespace: `+namespace+`}
- {kind: Group, name: operators, apiGroup: rbac.authorization.k8s.io}
`)
	for _, kubeconfig := range []string{byToken, byCertificate} {
		local.Await(t, "wait for the binding", func(context.Context) error { return get(kubeconfig) })
	}
}

// The kinds that hand out certificates and roots are there.
func TestCertificateKinds(t *testing.T) {
	s := Shared(t)
	kinds := strings.Fields(s.MustKubectl(t, "api-resources", "--api-group=certificates.k8s.io", "-o", "name"))
	for _, want := range []string{"certificatesigningrequests", "clustertrustbundles", "podcertificaterequests"} {
		if !slices.Contains(kinds, want+".certificates.k8s.io") {
			t.Errorf("no %s in %v", want, kinds)
		}
	}
}

func TestRequests(t *testing.T) {
	s := Shared(t)
	before := s.Requests(t, "POST", "tokenreviews")
	s.Review(t, "no token")
	if got := s.Requests(t, "POST", "tokenreviews"); got != before+1 {
		t.Errorf("%d requests, want %d", got, before+1)
	}
}

// An API server that was killed comes back at the same address with what it knew; one
// that is paused answers nobody until it goes on.
func TestFaults(t *testing.T) {
	s := StartAPIServer(t)
	namespace := s.Namespace(t)
	s.Server.Kill()
	if err := s.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace, nil, nil); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("while it is down: %v, want that the connection is refused", err)
	}
	s.Server.Start(t)
	s.AwaitReady(t)
	if err := s.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace, nil, nil); err != nil {
		t.Error(err)
	}

	s.Server.Signal(t, syscall.SIGSTOP)
	local.Await(t, "wait until it has stopped", func(context.Context) error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.Server.PID()))
		if err == nil && !strings.Contains(string(stat), ") T ") {
			err = errors.New("it runs")
		}
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := s.Do(ctx, http.MethodGet, "/readyz", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it is paused: %v, want no answer", err)
	}
	s.Server.Signal(t, syscall.SIGCONT)
	s.AwaitReady(t)

	s.Etcd.Kill()
	s.Etcd.Start(t)
	s.AwaitReady(t)
	if err := s.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace, nil, nil); err != nil {
		t.Errorf("after etcd was killed: %v", err)
	}
}

// Pods of nodes that kwok plays are said to run, have tokens, and go when they are
// deleted.
func TestFakeNodes(t *testing.T) {
	s := Shared(t)
	pods := s.StartFakeNodes(t, 10, 200)
	if len(pods) != 200 {
		t.Fatalf("%d pods, want 200", len(pods))
	}
	r := s.Review(t, s.Token(t, pods[123], 10*time.Minute, "mesh-ca"), "mesh-ca")
	if got := r.User.Extra["authentication.kubernetes.io/node-name"]; !slices.Equal(got, []string{pods[123].Node}) {
		t.Errorf("node %q, want %q", got, pods[123].Node)
	}
	path := "/api/v1/namespaces/" + pods[0].Namespace + "/pods/" + pods[0].Name
	if err := s.Do(t.Context(), http.MethodDelete, path, nil, nil); err != nil {
		t.Fatal(err)
	}
	local.Await(t, "wait until the pod is gone", func(ctx context.Context) error {
		err := s.Do(ctx, http.MethodGet, path, nil, nil)
		if status, ok := errors.AsType[*StatusError](err); ok && status.Code == http.StatusNotFound {
			return nil
		}
		return errors.Join(errors.New("it is there"), err)
	})
}

// BenchmarkFakeNodes says how long a fleet takes to appear.
func BenchmarkFakeNodes(b *testing.B) {
	for b.Loop() {
		StartAPIServer(b).StartFakeNodes(b, 50, 2000)
	}
}
