package k8s

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/test/fakes/containers"
)

// Containers are announced as their cgroups are made.
func TestWatch(t *testing.T) {
	w := newWorld(t)
	w.attestor.config.Reconcile = config.Duration(time.Hour)
	w.run("A")
	w.mkdir("A")
	events := w.watch()
	if e := next(t, events); e.Instance != "k8s:"+id("A") || e.Ended {
		t.Errorf("event %v", e)
	}
	until(t, "the cgroups are watched", func() bool { return testutil.ToFloat64(w.attestor.metrics.watched) == 3 })

	// As a runtime does it: the container is made, then its cgroup, then it runs.
	w.pod("B", map[string]string{"v": "1"}, "B")
	initB, endB := w.container("B", "B", id("B"), cgroupOf("B"), func(c *fakeContainer) { c.status.State = cri.ContainerState_CONTAINER_CREATED })
	w.mkdir("B")
	until(t, "the runtime is asked", func() bool { return w.runtime.count(id("B")) > 0 })
	none(t, events)
	w.runtime.set(func() { w.runtime.containers[id("B")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	if e := next(t, events); e.Instance != "k8s:"+id("B") || e.Ended {
		t.Errorf("event %v", e)
	}
	// It is known before it asks.
	polls, asked := w.kubelet.count(), w.runtime.count(id("B"))
	w.attested(initB)
	if w.kubelet.count() != polls || w.runtime.count(id("B")) != asked {
		t.Error("somebody is asked for an announced container")
	}
	endB()
	if e := next(t, events); e.Instance != "k8s:"+id("B") || !e.Ended {
		t.Errorf("event %v, want B's end", e)
	}
	if err := os.RemoveAll(filepath.Join(w.cgroups, "kubepods", "besteffort", "pod"+uid("B"))); err != nil {
		t.Fatal(err)
	}
	until(t, "the pod's cgroup is not watched any more", func() bool { return testutil.ToFloat64(w.attestor.metrics.watched) == 3 })
}

// D10: changed labels are found at the reconciliation, and reported.
func TestV_D10_KubernetesRelabelled(t *testing.T) {
	w := newWorld(t)
	w.attestor.config.Reconcile = config.Duration(50 * time.Millisecond)
	init, _ := w.run("A")
	events := w.watch()
	next(t, events)
	w.pod("A", map[string]string{"app": "other"}, "A")
	w.kubelet.set(func() { // a change of the pod's image is none of the container's
		w.kubelet.pods[uid("A")]["spec"].(object)["containers"] = []object{{"name": "A", "image": "evil"}}
	})
	e := next(t, events)
	if e.Ended || e.Workload.GetK8S().GetLabels()["app"] != "other" || e.Workload.GetK8S().GetImage() != "registry.internal/shop/A:1" {
		t.Errorf("event %v", e)
	}
	if got := w.attested(init).Workload.GetK8S().GetLabels()["app"]; got != "other" {
		t.Errorf("label %q", got)
	}
}

// Without the cgroup file system, and with containers that were missed, the
// reconciliation finds all.
func TestWatchBlind(t *testing.T) {
	w := newWorld(t)
	w.attestor.config.Reconcile = config.Duration(50 * time.Millisecond)
	w.attestor.config.CgroupRoot = filepath.Join(w.cgroups, "nowhere")
	events := w.watch()
	w.run("A")
	if e := next(t, events); e.Instance != "k8s:"+id("A") || e.Ended {
		t.Errorf("event %v", e)
	}
	w.container("A", "A", id("bad"), "0::/\n", nil)
	w.run("B")
	if e := next(t, events); e.Instance != "k8s:"+id("B") || e.Ended {
		t.Errorf("event %v", e)
	}
}

// I8: many pods come and go; each is told once, and nothing is left over.
func TestV_I8_KubernetesChurn(t *testing.T) {
	w := newWorld(t)
	events := w.watch()
	until(t, "the cgroups are watched", func() bool { return testutil.ToFloat64(w.attestor.metrics.watched) > 0 })
	const n = 40
	ends := make([]func(), n)
	for i := range n {
		name := fmt.Sprint("c", i)
		_, ends[i] = w.run(name)
		w.mkdir(name)
	}
	started := containers.Started(t, events, n)
	if polls := w.kubelet.count(); polls > n+2 {
		t.Errorf("the kubelet was asked %d times for %d pods", polls, n)
	}
	for _, end := range ends {
		end()
	}
	containers.Ended(t, events, started)
	if c := len(w.attestor.index.All()); c != 0 {
		t.Errorf("%d containers in the index", c)
	}
}
