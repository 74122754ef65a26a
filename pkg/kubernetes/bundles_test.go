package kubernetes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// configMapIn reads a ConfigMap.
func configMapIn(ctx context.Context, s *kube.APIServer, namespace, name string) (map[string]string, error) {
	var c struct {
		Data map[string]string `json:"data"`
	}
	err := s.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/configmaps/"+name, nil, &c)
	return c.Data, err
}

func awaitConfigMap(t *testing.T, s *kube.APIServer, namespace, name, key, want string) {
	t.Helper()
	local.Await(t, "ConfigMap "+namespace+"/"+name, func(ctx context.Context) error {
		data, err := configMapIn(ctx, s, namespace, name)
		if err == nil && strings.TrimSpace(data[key]) != strings.TrimSpace(want) {
			err = fmt.Errorf("it has %q", data)
		}
		return err
	})
}

func awaitClusterBundle(t *testing.T, s *kube.APIServer, name, signer, want string) {
	t.Helper()
	local.Await(t, "ClusterTrustBundle "+name, func(ctx context.Context) error {
		var b struct {
			Spec struct{ SignerName, TrustBundle string } `json:"spec"`
		}
		err := s.Do(ctx, http.MethodGet, "/apis/certificates.k8s.io/v1/clustertrustbundles/"+name, nil, &b)
		if err == nil && (strings.TrimSpace(b.Spec.TrustBundle) != strings.TrimSpace(want) || b.Spec.SignerName != signer) {
			err = fmt.Errorf("it has %+v", b)
		}
		return err
	})
}

// The bundle is where the configuration and the objects say, follows a rotation, is
// repaired, and goes with its object.
func TestTrustBundles(t *testing.T) {
	s := kube.StartAPIServer(t)
	s.Apply(t, crds(t))
	local.Await(t, "the new kind", func(context.Context) error {
		_, err := s.Kubectl(t, "get", "trustbundles")
		return err
	})
	s.MustKubectl(t, "create", "namespace", "shop")
	s.MustKubectl(t, "label", "namespace", "shop", "mesh=yes")
	ca := startCA(t, s, ", trust_bundles: true, bundle: {config_map: meshid-bundle, namespaces: mesh=yes, cluster_trust_bundle: 'meshid.io:svid:bundle'}")
	bundle := ca.MustCommand(t, "bundle", "show")
	awaitConfigMap(t, s, "shop", "meshid-bundle", "bundle.pem", bundle)
	awaitClusterBundle(t, s, "meshid.io:svid:bundle", "meshid.io/svid", bundle)
	if _, err := configMapIn(t.Context(), s, "default", "meshid-bundle"); err == nil {
		t.Error("a namespace that was not chosen has it")
	}

	s.Apply(t, `
apiVersion: meshid.io/v1alpha1
kind: TrustBundle
metadata: {name: mesh}
spec:
  configMap: {name: roots, key: ca.crt, namespaceSelector: mesh=yes}
  clusterTrustBundle: {name: mesh-roots}
`)
	awaitConfigMap(t, s, "shop", "roots", "ca.crt", bundle)
	awaitClusterBundle(t, s, "mesh-roots", "", bundle)
	published := func(want string) {
		t.Helper()
		local.Await(t, "status "+want, func(context.Context) error {
			got, err := s.Kubectl(t, "get", "trustbundle", "mesh", "-o", "json")
			if err != nil {
				return err
			}
			var o struct {
				Status struct {
					Namespaces int      `json:"namespaces"`
					Roots      []string `json:"roots"`
					Conditions []struct {
						Status  string `json:"status"`
						Message string `json:"message"`
					} `json:"conditions"`
				} `json:"status"`
			}
			if err := json.Unmarshal([]byte(got), &o); err != nil || len(o.Status.Conditions) == 0 {
				return errors.Join(err, errors.New("no status yet"))
			}
			if text := fmt.Sprintf("%d %d %s", o.Status.Namespaces, len(o.Status.Roots), o.Status.Conditions[0].Status); text != want {
				return fmt.Errorf("it is %s: %+v", text, o.Status)
			}
			return nil
		})
	}
	published("1 1 True")

	// What others write is repaired; a namespace that comes later has it too.
	s.MustKubectl(t, "-n", "shop", "patch", "configmap", "roots", "--type=merge", "-p", `{"data":{"ca.crt":"evil"}}`)
	awaitConfigMap(t, s, "shop", "roots", "ca.crt", bundle)
	s.MustKubectl(t, "patch", "clustertrustbundle", "mesh-roots", "--type=merge", "-p", `{"spec":{"trustBundle":`+quote(otherRoot(t))+`}}`)
	awaitClusterBundle(t, s, "mesh-roots", "", bundle)
	s.MustKubectl(t, "create", "namespace", "later")
	s.MustKubectl(t, "label", "namespace", "later", "mesh=yes")
	awaitConfigMap(t, s, "later", "roots", "ca.crt", bundle)
	published("2 1 True")

	// Both roots are there while the root changes.
	ca.MustCommand(t, "authority", "prepare")
	both := ca.MustCommand(t, "bundle", "show")
	if strings.Count(both, "BEGIN") != 2 {
		t.Fatalf("the bundle has %d roots", strings.Count(both, "BEGIN"))
	}
	awaitCount(t, s, "shop", 2)
	published("2 2 True")

	// What is somebody else's is left alone, and does not go with the object.
	s.Apply(t, `
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: shop}
data: {Corefile: ".:53 {}"}
---
apiVersion: certificates.k8s.io/v1
kind: ClusterTrustBundle
metadata: {name: others}
spec:
  trustBundle: `+quote(otherRoot(t))+`
---
apiVersion: meshid.io/v1alpha1
kind: TrustBundle
metadata: {name: greedy}
spec:
  configMap: {name: coredns, key: Corefile, namespaceSelector: mesh=yes}
  clusterTrustBundle: {name: others}
`)
	awaitConfigMap(t, s, "later", "coredns", "Corefile", both) // where it is nobody's
	local.Await(t, "status of the greedy one", func(context.Context) error {
		got, err := s.Kubectl(t, "get", "trustbundle", "greedy", "-o", "jsonpath={.status.conditions[0].reason} {.status.conditions[0].message}")
		if err == nil && !strings.HasPrefix(got, "Failed the ConfigMap coredns is there already in namespace shop") {
			err = errors.New(got)
		}
		return err
	})
	for _, object := range [][]string{{"configmap", "coredns", "-n", "shop"}, {"clustertrustbundle", "others"}} {
		got := s.MustKubectl(t, append([]string{"get", "-o", "jsonpath={.metadata.ownerReferences}{.data}{.spec.trustBundle}"}, object...)...)
		if strings.Contains(got, "greedy") || strings.TrimSpace(got) == strings.TrimSpace(both) || strings.Contains(got, "Corefile") && !strings.Contains(got, ":53") {
			t.Errorf("%s was taken over: %s", object, got)
		}
	}

	// What cannot be written is said.
	s.MustKubectl(t, "patch", "trustbundle", "mesh", "--type=merge", "-p", `{"spec":{"clusterTrustBundle":{"name":"no:"}}}`)
	published("2 2 False")
	owner := s.MustKubectl(t, "-n", "shop", "get", "configmap", "roots", "-o", "jsonpath={.metadata.ownerReferences[0].kind}/{.metadata.ownerReferences[0].name}")
	if owner != "TrustBundle/mesh" {
		t.Errorf("the ConfigMap belongs to %q: it would stay", owner)
	}
}

// awaitCount waits for a number of roots in the ConfigMaps of a namespace.
func awaitCount(t *testing.T, s *kube.APIServer, namespace string, want int) {
	t.Helper()
	for name, key := range map[string]string{"roots": "ca.crt", "meshid-bundle": "bundle.pem"} {
		local.Await(t, "roots in "+name, func(ctx context.Context) error {
			data, err := configMapIn(ctx, s, namespace, name)
			if n := strings.Count(data[key], "BEGIN"); err == nil && n != want {
				err = fmt.Errorf("there are %d", n)
			}
			return err
		})
	}
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		return ""
	}
	return string(b)
}

// otherRoot is a root of somebody else, PEM.
func otherRoot(t *testing.T) string {
	t.Helper()
	return local.StartCA(t, local.CAOptions{}).MustCommand(t, "bundle", "show")
}
