package istio

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"testing"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/istio"
	"github.com/meshid/meshid/pkg/kubernetes"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

type object = map[string]any

// configMap is what a pod would mount.
type configMap struct {
	Metadata struct {
		Labels map[string]string `json:"labels"`
	} `json:"metadata"`
	Data map[string]string `json:"data"`
}

func rootsIn(ctx context.Context, s *testkube.APIServer, namespace string) (*configMap, error) {
	c := new(configMap)
	return c, s.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/configmaps/istio-ca-root-cert", nil, c)
}

// awaitRoots waits until the roots are in a namespace.
func awaitRoots(t *testing.T, s *testkube.APIServer, namespace, want string) {
	t.Helper()
	local.Await(t, "wait for the roots in "+namespace, func(ctx context.Context) error {
		c, err := rootsIn(ctx, s, namespace)
		if err == nil && (c.Data["root-cert.pem"] != want || c.Metadata.Labels["istio.io/config"] != "true") {
			err = fmt.Errorf("it has %v and %q", c.Metadata.Labels, c.Data)
		}
		return err
	})
}

// The roots are in each namespace, also in a new one; what others change is repaired,
// and what others add stays. Two CAs at once do not fight.
func TestRoots(t *testing.T) {
	s := testkube.Shared(t)
	client := func(name string) *kube.Client {
		c, err := kube.Open(kube.Config{Name: name, Kubeconfig: s.Kubeconfig})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := s.Namespace(t)
	roots := make([]*kubernetes.ConfigMaps, 2)
	bundles := []chan func() (string, uint64){make(chan func() (string, uint64), 1), make(chan func() (string, uint64), 1)}
	for i := range roots {
		bundles[i] <- func() (string, uint64) { return "one", 1 }
		roots[i] = kubernetes.NewConfigMaps(kubernetes.ConfigMapsConfig{
			Client: client(fmt.Sprint("ca", i)), Name: istio.DefaultRootsName, Key: istio.RootsKey, Labels: istio.Labels, Logger: slog.New(slog.DiscardHandler),
			Bundle: func() (string, uint64) {
				f := <-bundles[i]
				defer func() { bundles[i] <- f }()
				return f()
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- roots[i].Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	awaitRoots(t, s, first, "one")
	second := s.Namespace(t)
	awaitRoots(t, s, second, "one")
	at := "/api/v1/namespaces/" + second + "/configmaps/istio-ca-root-cert"
	patch := func(what object) {
		t.Helper()
		if err := s.Do(t.Context(), http.MethodPatch, at, what, nil); err != nil {
			t.Fatal(err)
		}
	}
	patch(object{"data": object{"root-cert.pem": "evil", "of-others": "stays"}})
	awaitRoots(t, s, second, "one")
	patch(object{"metadata": object{"labels": object{"istio.io/config": nil}}})
	awaitRoots(t, s, second, "one")
	if err := s.Do(t.Context(), http.MethodDelete, at, nil, nil); err != nil {
		t.Fatal(err)
	}
	awaitRoots(t, s, second, "one")
	patch(object{"data": object{"of-others": "stays"}})

	// One CA has heard of a new root, and the other has not.
	writes := s.Requests(t, "APPLY", "configmaps")
	<-bundles[0]
	bundles[0] <- func() (string, uint64) { return "one and two", 2 }
	roots[0].Changed()
	awaitRoots(t, s, first, "one and two")
	awaitRoots(t, s, second, "one and two")
	roots[1].Changed()
	<-bundles[1]
	bundles[1] <- func() (string, uint64) { return "one and two", 2 }
	roots[1].Changed()
	awaitRoots(t, s, first, "one and two")
	if c, err := rootsIn(t.Context(), s, second); err != nil || c.Data["of-others"] != "stays" {
		t.Errorf("what others have written: %v %v", c, err)
	}
	t.Logf("%d writes for a new root in all namespaces by two CAs", s.Requests(t, "APPLY", "configmaps")-writes)
	var status *testkube.StatusError
	if _, err := rootsIn(t.Context(), s, "none"); !errors.As(err, &status) {
		t.Error(err)
	}
}
