package kubernetes

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

const (
	podCart = `{"metadata":{"uid":"p1","namespace":"shop","name":"cart"},"spec":{"nodeName":"n1","serviceAccountName":"cart","containers":[{"name":"app"}]},"status":{"phase":"Running"}}`
	nodeOne = `{"metadata":{"name":"n1","uid":"nu1"}}`
)

// cartRequest is a request for podCart on nodeOne that has waited long enough to be denied.
func cartRequest() *podRequest {
	r := &podRequest{podCertificateRequest: new(podCertificateRequest), seen: time.Now().Add(-secondLook)}
	r.Metadata.Namespace = "shop"
	r.Spec.PodName, r.Spec.PodUID, r.Spec.ServiceAccountName, r.Spec.NodeName, r.Spec.NodeUID = "cart", "p1", "cart", "n1", "nu1"
	return r
}

// followPods runs the pods of a server until the test ends.
func followPods(t *testing.T, api *kubeapi.Server) (*kube.Client, *kube.Pods) {
	t.Helper()
	client, err := kube.Open(kube.Config{Name: "prod", Kubeconfig: api.Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	pods, err := kube.NewPods(client, nil)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() { pods.Run(t.Context()) })
	t.Cleanup(done.Wait)
	return client, pods
}

// until waits for what will be so.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	patience, look := time.After(time.Minute), time.NewTicker(time.Millisecond)
	defer look.Stop()
	for !ok() {
		select {
		case <-look.C:
		case <-patience:
			t.Fatalf("%s: not so within a minute", what)
		}
	}
}

// While the cluster cannot be heard, pods that were seen before are served, or nobody is,
// as its placement says.
func TestClusterThatIsNotHeard(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("nodes", nodeOne)
	api.Set("pods", podCart)
	client, pods := followPods(t, api)
	heard := func() bool { _, why := pods.Behind(time.Now()); return why == nil }
	until(t, "the cluster is heard", heard)
	check := func(strict bool) error {
		p, err := NewPodCertificates(PodCertificatesConfig{Client: client, Pods: pods, Strict: strict})
		if err != nil {
			t.Fatal(err)
		}
		return p.checkPod(t.Context(), cartRequest(), &server.Direct{Workload: new(attributesv1.Workload)})
	}
	if err := check(true); err != nil {
		t.Errorf("while it is heard: %v", err)
	}
	api.Down(true)
	until(t, "the cluster is not heard", func() bool { return !heard() })
	if err := check(false); err != nil {
		t.Errorf("of a pod that was seen: %v", err)
	}
	if _, waits := errors.AsType[*later](check(true)); !waits {
		t.Error("strict, and it does not wait")
	}
}

// A request is denied for good for what the cluster says, and never for what this CA has
// not heard yet. Pods and nodes are followed apart: one may be known and the other not.
func TestPodIsNotHeardOfYet(t *testing.T) {
	for name, c := range map[string]struct {
		pods, nodes bool // have been read
		podUID      string
		nodeUID     string
		want        string // the denial; empty if it is to wait
	}{
		"nothing was read":                 {false, false, "p1", "nu1", ""},
		"the nodes were not":               {true, false, "p1", "nu1", ""},
		"the nodes were not, nor the pod":  {true, false, "p2", "nu1", ""},
		"the pods were not":                {false, true, "p1", "nu1", ""},
		"all was read, and not the pod":    {true, true, "p2", "nu1", "there is no pod p2"},
		"all was read, and another node":   {true, true, "p1", "nu2", "does not have the UID nu2"},
		"the pod has ended":                {true, true, "p4", "nu1", "has ended"},
		"the pod is another's in any case": {true, false, "p3", "nu1", "is not on node n1"},
	} {
		t.Run(name, func(t *testing.T) {
			api := kubeapi.New(t)
			api.Set("nodes", nodeOne)
			api.Set("pods", podCart)
			api.Set("pods", strings.NewReplacer("p1", "p3", "cart", "other", "n1", "n2").Replace(podCart))
			api.Set("pods", strings.NewReplacer("p1", "p4", `"name":"cart"`, `"name":"done"`, "Running", "Succeeded").Replace(podCart))
			for collection, read := range map[string]bool{"pods": c.pods, "nodes": c.nodes} {
				if !read {
					api.Hold(collection)
				}
			}
			client, pods := followPods(t, api)
			until(t, "pods and nodes are read", func() bool {
				p, n := pods.State()
				return p.Current == c.pods && n.Current == c.nodes
			})
			p, err := NewPodCertificates(PodCertificatesConfig{Client: client, Pods: pods, Signer: "meshid.io/svid"})
			if err != nil {
				t.Fatal(err)
			}
			r := cartRequest()
			r.Spec.PodUID, r.Spec.NodeUID = c.podUID, c.nodeUID
			if name := map[string]string{"p3": "other", "p4": "done"}[c.podUID]; name != "" {
				r.Spec.PodName = name
			}
			err = p.checkPod(t.Context(), r, &server.Direct{Workload: new(attributesv1.Workload)})
			refused, denied := errors.AsType[*denial](err)
			_, waits := errors.AsType[*later](err)
			switch {
			case c.want == "" && !waits:
				t.Errorf("%v, want it to wait", err)
			case c.want != "" && (!denied || !strings.Contains(refused.message, c.want)):
				t.Errorf("%v, want a denial: %s", err, c.want)
			}
		})
	}
}
