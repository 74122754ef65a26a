package k8s

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
	"github.com/meshid/meshid/test/fakes/containers"
)

// BenchmarkKubeletPods decodes what a kubelet answers of a full node: 110 pods, of ten
// kilobytes each as in clusters. An agent does it once a reconciliation (30 s), and when
// a process waits whose pod is not in the list that is at hand.
func BenchmarkKubeletPods(b *testing.B) {
	type object = map[string]any
	var environment []object
	for i := range 60 {
		environment = append(environment, object{"name": fmt.Sprintf("SETTING_%02d", i), "value": strings.Repeat("x", 80)})
	}
	var items []object
	for i := range 110 {
		status := func(name string) object {
			return object{"name": name, "containerID": fmt.Sprintf("containerd://%064d", i), "image": "registry.example.org/shop/cart:1.2.3", "ready": true}
		}
		items = append(items, object{
			"metadata": object{
				"namespace": "shop", "name": fmt.Sprintf("cart-6d4cf56db6-%05d", i), "uid": fmt.Sprintf("7d8f1f2e-0000-4000-8000-%012d", i),
				"labels":          object{"app": "cart", "pod-template-hash": "6d4cf56db6", "app.kubernetes.io/name": "cart", "app.kubernetes.io/part-of": "shop"},
				"annotations":     object{"kubernetes.io/config.seen": "2026-01-01T00:00:00Z", "checksum/config": strings.Repeat("0", 64)},
				"ownerReferences": []object{{"kind": "ReplicaSet", "name": "cart-6d4cf56db6", "uid": "9a0e", "controller": true}},
			},
			"spec": object{
				"serviceAccountName": "cart", "nodeName": "node-1", "volumes": environment[:20],
				"containers": []object{{"name": "app", "image": "registry.example.org/shop/cart:1.2.3", "env": environment}, {"name": "envoy", "image": "envoy:v1", "env": environment[:20]}},
			},
			"status": object{"phase": "Running", "containerStatuses": []object{status("app"), status("envoy")}},
		})
	}
	text, err := json.Marshal(object{"kind": "PodList", "apiVersion": "v1", "items": items})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		list, err := decodePods(bytes.NewReader(text))
		if err != nil || len(list) != 110 {
			b.Fatalf("%d pods, %v", len(list), err)
		}
	}
}

// realCgroup also reads the peer's real cgroup file, for the cost of it.
type realCgroup struct{ *containers.Processes }

func (r realCgroup) Cgroup(p *peer.Peer) ([]byte, error) {
	if _, err := (container.Kernel{}).Cgroup(p); err != nil {
		return nil, err
	}
	return r.Processes.Cgroup(p)
}

// What a process of a known container costs, and what a node's list of pods does.
func BenchmarkAttestWarm(b *testing.B) {
	w := newWorld(b)
	w.attestor.processes = realCgroup{w.processes}
	init, _ := w.run("A")
	w.attested(init)
	for b.Loop() {
		if _, err := w.attestor.Attest(b.Context(), init); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPods(b *testing.B) {
	for _, n := range []int{110, 2000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			for i := range n {
				w.pod(fmt.Sprint("p", i), map[string]string{"app": "web", "pod-template-hash": "577f984bdf"}, "app", "sidecar")
			}
			if _, err := w.attestor.kubelet.pods(b.Context()); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := w.attestor.kubelet.pods(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
