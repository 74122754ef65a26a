package k8s

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/testing/protocmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
	"github.com/meshid/meshid/pkg/config"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	"github.com/meshid/meshid/test/fakes/containers"
)

func TestConformance(t *testing.T) {
	var w *world
	attesttest.Workload(t, attesttest.WorkloadConfig{
		Attestor: func(t *testing.T) attest.WorkloadAttestor {
			w = newWorld(t)
			w.run("a")
			return w.attestor
		},
		Mine: func(t *testing.T) (*peer.Peer, func()) {
			w.t = t
			return w.process(cgroupOf("a"))
		},
		Foreign: func(t *testing.T) *peer.Peer {
			w.t = t
			p, _ := w.process("0::/system.slice/ssh.service\n")
			return p
		},
	})
}

func TestAttest(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("orders")
	want := &attest.Facts{
		Workload: &attributesv1.Workload{K8S: &attributesv1.Kubernetes{
			Namespace: "shop", ServiceAccount: "orders-sa", PodName: "orders", PodUid: uid("orders"),
			Labels:    map[string]string{"app": "orders"},
			OwnerKind: "ReplicaSet", OwnerName: "orders-rs", OwnerUid: uid("orders-rs"),
			Container: "orders", ContainerId: id("orders"),
			Image: "registry.internal/shop/orders:1", ImageDigest: digest,
		}},
		Instance: "k8s:" + id("orders"),
		Rank:     attest.RankContainer,
	}
	if diff := cmp.Diff(want, w.attested(init), protocmp.Transform()); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
	// From now on nobody is asked.
	polls, asked := w.kubelet.count(), w.runtime.count(id("orders"))
	p, _ := w.process(strings.TrimSpace(cgroupOf("orders")) + "/sub\n")
	w.attested(p)
	if w.kubelet.count() != polls || w.runtime.count(id("orders")) != asked {
		t.Error("somebody is asked for a known container")
	}
}

// Init containers, those of `kubectl debug`, and restarted ones are containers of the
// pod as well.
func TestKindsOfContainers(t *testing.T) {
	w := newWorld(t)
	w.pod("web", nil, "web")
	w.kubelet.set(func() {
		spec := w.kubelet.pods[uid("web")]["spec"].(object)
		spec["initContainers"] = []object{{"name": "setup", "image": "setup:1"}}
	})
	path := func(name string) string {
		return "0::/kubepods/pod" + uid("web") + "/" + id(name) + "\n"
	}
	setup, _ := w.container("web", "setup", id("setup"), path("setup"), nil)
	if got := w.attested(setup).Workload.GetK8S().GetContainer(); got != "setup" {
		t.Errorf("container %s", got)
	}
	first, end := w.container("web", "web", id("web1"), path("web1"), nil)
	w.attested(first)
	end()
	w.runtime.set(func() { w.runtime.containers[id("web1")].status.State = cri.ContainerState_CONTAINER_EXITED })
	left, _ := w.process(path("web1"))
	w.refused(left, "knows no such container")
	second, _ := w.container("web", "web", id("web2"), path("web2"), nil)
	if got := w.attested(second).Instance; got != "k8s:"+id("web2") {
		t.Errorf("after the restart, instance %s", got)
	}

	// The list that is at hand does not have the ephemeral container yet.
	w.kubelet.set(func() {
		spec := w.kubelet.pods[uid("web")]["spec"].(object)
		spec["ephemeralContainers"] = []object{{"name": "debug", "image": "busybox"}}
	})
	debug, _ := w.container("web", "debug", id("debug"), path("debug"), nil)
	if got := w.attested(debug).Workload.GetK8S().GetContainer(); got != "debug" {
		t.Errorf("container %s", got)
	}
	// One that the pod does not have is none of the pod's.
	other, _ := w.container("web", "other", id("other"), path("other"), nil)
	w.attestor.wait = 100 * time.Millisecond
	w.refused(other, "try again")
}

// The API server's mirror of a static pod, and a pod that says that it is the mirror of
// another, are no pods of this node.
func TestStaticPods(t *testing.T) {
	w := newWorld(t)
	w.pod("etcd", nil, "etcd")
	hash := strings.ReplaceAll(uid("etcd"), "-", "")
	init, _ := w.container("etcd", "etcd", id("etcd"), "0::/kubepods/burstable/pod"+hash+"/"+id("etcd")+"\n", nil)
	w.static("etcd", id("etcd"))
	w.pod("fake", nil, "etcd")
	w.kubelet.set(func() {
		w.kubelet.pods[uid("fake")]["metadata"].(object)["annotations"] = object{"kubernetes.io/config.mirror": hash}
	})
	f := w.attested(init).Workload.GetK8S()
	if f.GetPodUid() != hash || f.GetPodName() != "etcd" {
		t.Errorf("facts %v", f)
	}
	if w.attestor.pods.get(uid("fake")) != nil {
		t.Error("a mirror is taken for a pod")
	}
}

// A pod that has ended gets nothing any more, even if its containers still run.
func TestPhases(t *testing.T) {
	for _, phase := range []string{"Failed", "Succeeded"} {
		t.Run(phase, func(t *testing.T) {
			w := newWorld(t)
			known, _ := w.run("A")
			w.attested(known)
			w.kubelet.set(func() { w.kubelet.pods[uid("A")]["status"].(object)["phase"] = phase })
			if err := w.attestor.pods.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.refused(known, phase)
			second, _ := w.container("A", "A", id("A2"), "0::/kubepods/pod"+uid("A")+"/"+id("A2")+"\n", nil)
			w.refused(second, phase)
		})
	}
	w := newWorld(t)
	pending, _ := w.run("A") // its first container runs before the kubelet says so
	w.kubelet.set(func() { w.kubelet.pods[uid("A")]["status"].(object)["phase"] = "Pending" })
	w.attested(pending)
}

// What the runtime, the kubelet and the kernel say must agree.
func TestV_D4_KubernetesContradictions(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(w *world, c *fakeContainer)
		want   string
	}{
		"the cgroup is of another pod": {func(w *world, c *fakeContainer) {
			w.processes.Set(c.pid, strings.Replace(cgroupOf("A"), uid("A"), uid("B"), 1))
		}, "its cgroup is in that of pod " + uid("B")},
		"the kubelet says it is of another pod": {func(w *world, _ *fakeContainer) {
			w.kubelet.set(func() {
				w.kubelet.pods[uid("B")]["status"].(object)["containerStatuses"] = []object{{"containerID": "containerd://" + id("A")}}
			})
		}, "the kubelet that it is of pod " + uid("B")},
		"the pod has another name": {func(_ *world, c *fakeContainer) { c.status.Labels[labelPodName] = "B" }, "calls that pod"},
		"another namespace":        {func(_ *world, c *fakeContainer) { c.status.Labels[labelNamespace] = "bank" }, "calls that pod"},
		"a container it has not":   {func(_ *world, c *fakeContainer) { c.status.Labels[labelContainer] = "x" }, "try again"},
		"a pod that is not there":  {func(_ *world, c *fakeContainer) { c.status.Labels[labelPodUID] = uid("x") }, "try again"},
		"no cgroup of its own":     {func(w *world, c *fakeContainer) { w.processes.Set(c.pid, "0::/\n") }, "hostPID: true"},
		"no such process":          {func(_ *world, c *fakeContainer) { c.pid = 1<<22 + 5 }, "hostPID: true"},
		"no process":               {func(_ *world, c *fakeContainer) { c.pid = 0 }, "does not tell the process"},
		"a pid that is a text":     {func(_ *world, c *fakeContainer) { c.info = `{"pid":"1"}` }, "does not tell the process"},
		"no verbose answer":        {func(_ *world, c *fakeContainer) { c.info = " " }, "does not tell the process"},
		"deep":                     {func(_ *world, c *fakeContainer) { c.info = strings.Repeat(`{"config":`, 100000) }, "does not tell the process"},
		"another's answer":         {func(_ *world, c *fakeContainer) { c.status.Id = id("B") }, "knows no such container"},
		"an unknown state":         {func(_ *world, c *fakeContainer) { c.status.State = cri.ContainerState_CONTAINER_UNKNOWN }, "try again"},
		"exited":                   {func(_ *world, c *fakeContainer) { c.status.State = cri.ContainerState_CONTAINER_EXITED }, "knows no such container"},
		"not the kubelet's":        {func(_ *world, c *fakeContainer) { c.status.Labels = nil }, "knows no such container"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.run("A")
			w.pod("B", nil, "B")
			w.runtime.set(func() { tc.change(w, w.runtime.containers[id("A")]) })
			p, _ := w.process(cgroupOf("A"))
			if tc.want == "try again" {
				w.attestor.wait = 200 * time.Millisecond
			}
			f, err := w.attestor.Attest(t.Context(), p)
			if err == nil || errors.Is(err, attest.ErrNotMine) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("facts %v, error %v, want one with %q", f, err, tc.want)
			}
		})
	}
}

// D11: labels are bytes; a pod with too many is refused, not attested with less.
func TestV_D11_KubernetesLabels(t *testing.T) {
	labels := map[string]string{
		"app": "web", "APP": "admin", "a:b": "c=d", "x/y": "1:2", "nl": "web\nadmin=true",
		"": "empty", "empty": "", "utf8": "ä\u2028", "quote": `"},{"`,
	}
	w := newWorld(t)
	w.pod("A", labels, "A")
	init, _ := w.container("A", "A", id("A"), cgroupOf("A"), nil)
	if diff := cmp.Diff(labels, w.attested(init).Workload.GetK8S().GetLabels()); diff != "" {
		t.Errorf("labels (-given +attested):\n%s", diff)
	}
	many := map[string]string{}
	for n := range maxLabelCount + 1 {
		many[fmt.Sprint(n)] = ""
	}
	for name, labels := range map[string]map[string]string{
		"1 MB": {"x": strings.Repeat("x", 1<<20)},
		"key":  {strings.Repeat("x", maxLabels+1): ""},
		"many": many,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.pod("big", labels, "big")
			big, _ := w.container("big", "big", id("big"), cgroupOf("big"), nil)
			good, _ := w.run("good")
			w.refused(big, "labels")
			w.attested(good) // one bad pod does not stop the others
		})
	}
}

// D12: who builds an image gives its containers neither label nor pod.
func TestV_D12_KubernetesImages(t *testing.T) {
	for name, tc := range map[string]struct {
		inPod, requested, runtime, want string
	}{
		"told by the runtime":             {"registry.internal/shop/a:2", "evil/a:1", "docker.io/evil/a:1", "evil/a:1"},
		"the pod's, which means the same": {"busybox", "", "docker.io/library/busybox:latest", "busybox"},
		"of a user":                       {"evil/a:1", "", "docker.io/evil/a:1", "evil/a:1"},
		// The pod was changed while its old container is being stopped.
		"not the pod's": {"registry.internal/shop/a:2", "", "docker.io/evil/a:1", "docker.io/evil/a:1"},
		"a digest":      {"r.example/a@" + digest, "", "r.example/a@" + digest, "r.example/a@" + digest},
		"a port":        {"localhost:5000/a", "", "localhost:5000/a:latest", "localhost:5000/a"},
		"localhost":     {"localhost/a", "", "localhost/a:latest", "localhost/a"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			init, _ := w.run("a")
			w.kubelet.set(func() {
				w.kubelet.pods[uid("a")]["spec"].(object)["containers"] = []object{{"name": "a", "image": tc.inPod}}
			})
			w.runtime.set(func() {
				w.runtime.containers[id("a")].status.Image = &cri.ImageSpec{Image: tc.runtime, UserSpecifiedImage: tc.requested}
			})
			if got := w.attested(init).Workload.GetK8S().GetImage(); got != tc.want {
				t.Errorf("image %q, want %q", got, tc.want)
			}
		})
	}
	for _, tc := range []struct{ ref, id, want string }{
		{"docker.io/library/busybox@" + digest, "sha256:" + id("x"), digest},
		{"sha256:" + id("x"), "", "sha256:" + id("x")},
		{"busybox:latest", "sha256:" + id("x"), "sha256:" + id("x")},
		{"busybox@sha256:short", "", ""},
		{"x@" + strings.ToUpper(digest), "md5:x", ""},
	} {
		if got := digestOf(tc.ref, tc.id); got != tc.want {
			t.Errorf("%q and %q: digest %q, want %q", tc.ref, tc.id, got, tc.want)
		}
	}
}

// A pod that the kubelet does not list yet is waited for, with few questions however
// many wait, and the answer comes when the kubelet has it.
func TestWaitForPod(t *testing.T) {
	w := newWorld(t)
	init, _ := w.container("late", "late", id("late"), cgroupOf("late"), nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			f, err := w.attestor.Attest(t.Context(), init)
			if err != nil || f.Workload.GetK8S().GetPodName() != "late" {
				t.Errorf("facts %v, error %v", f, err)
			}
		})
	}
	until(t, "the kubelet is asked twice", func() bool { return w.kubelet.count() >= 2 })
	w.pod("late", nil, "late")
	wg.Wait()
	if n := w.kubelet.count(); n > 20 {
		t.Errorf("asked the kubelet %d times", n)
	}
}

// A container that is being started is waited for.
func TestWaitForStart(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("A")
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_CREATED })
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Error(err)
		}
	})
	until(t, "the runtime is asked twice", func() bool { return w.runtime.count(id("A")) >= 2 })
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	wg.Wait()
}

// A container that was seen to be made is asked about now and then until a process of it
// waits: that one is not kept waiting for the next time.
func TestWaitForStartIsShort(t *testing.T) {
	usual := startBackoff
	startBackoff = backoff.Policy{Base: 1000 * time.Hour, Max: 1000 * time.Hour}
	t.Cleanup(func() { startBackoff = usual })
	w := newWorld(t)
	w.attestor.wait = time.Hour
	init, _ := w.run("A")
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_CREATED })
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := w.attestor.index.Get(t.Context(), id("A")); err != nil { // as Watch does
			t.Error(err)
		}
	})
	until(t, "the runtime is asked", func() bool { return w.runtime.count(id("A")) >= 1 })
	wg.Go(func() {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Error(err)
		}
	})
	until(t, "the runtime is asked again", func() bool { return w.runtime.count(id("A")) >= 3 })
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	wg.Wait()
	if n := len(w.attestor.wanted.byID); n != 0 {
		t.Errorf("%d containers are still waited for", n)
	}
}

// A process is served although whoever asked first about its container has given up.
func TestWaitForStartOutlivesOthers(t *testing.T) {
	w := newWorld(t)
	w.attestor.wait = time.Hour
	init, _ := w.run("A")
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_CREATED })
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	var first, second sync.WaitGroup
	first.Go(func() {
		if _, err := w.attestor.index.Get(ctx, id("A")); !errors.Is(err, errCreated) {
			t.Errorf("a container that has not been started: %v", err)
		}
	})
	until(t, "the runtime is asked", func() bool { return w.runtime.count(id("A")) >= 1 })
	second.Go(func() {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Error(err)
		}
	})
	until(t, "the process waits", func() bool {
		w.attestor.wanted.mu.Lock()
		defer w.attestor.wanted.mu.Unlock()
		held := w.attestor.wanted.byID[id("A")]
		return held != nil && held.waited
	})
	until(t, "the runtime has said that it was not started", func() bool { return w.runtime.count(id("A")) >= 2 })
	giveUp()
	first.Wait()
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	second.Wait()
}

// One pod that does not come costs the others nothing.
func TestWaitsAreApart(t *testing.T) {
	w := newWorld(t)
	ghost, _ := w.container("ghost", "ghost", id("ghost"), cgroupOf("ghost"), nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if f, err := w.attestor.Attest(ctx, ghost); err == nil || !strings.Contains(err.Error(), "try again") {
			t.Errorf("facts %v, error %v", f, err)
		}
	})
	until(t, "the kubelet is asked", func() bool { return w.kubelet.count() >= 1 })
	init, _ := w.run("A")
	w.attested(init)
	cancel()
	wg.Wait()
}

// F49: a kubelet or runtime that is gone, hangs or talks nonsense: what is known goes
// on, the rest is told to try again, nothing is withdrawn.
func TestFault_F49_KubeletAndRuntime(t *testing.T) {
	const nonsense = `{"kind":"PodList","items":[`
	for name, fail := range map[string]struct {
		begin, end func(w *world)
		want       string
	}{
		"kubelet hangs": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.hang = make(chan struct{}) }) },
			func(w *world) { w.kubelet.set(func() { close(w.kubelet.hang); w.kubelet.hang = nil }) }, "try again",
		},
		"kubelet fails": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = http.StatusInternalServerError }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = 0 }) }, "try again",
		},
		"kubelet forbids": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = http.StatusForbidden }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = 0 }) }, "nodes/pods",
		},
		"kubelet redirects": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = http.StatusFound }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = 0 }) }, "302",
		},
		"another token": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.token = "other" }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.token = "good" }) }, "does not know the token",
		},
		"half a list": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.raw = nonsense }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.raw = "" }) }, "try again",
		},
		"runtime hangs": {
			func(w *world) { w.runtime.set(func() { w.runtime.hang = make(chan struct{}) }) },
			func(w *world) { w.runtime.set(func() { close(w.runtime.hang); w.runtime.hang = nil }) }, "try again",
		},
		"runtime fails": {
			func(w *world) { w.runtime.set(func() { w.runtime.err = errors.New("disk full") }) },
			func(w *world) { w.runtime.set(func() { w.runtime.err = nil }) }, "disk full",
		},
		"runtime is gone": {
			func(w *world) { w.runtime.stop() },
			func(w *world) { w.runtime.listen(t) }, "try again",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			known, _ := w.run("known")
			before := w.attested(known)
			events := w.watch()
			next(t, events)
			fail.begin(w)
			fresh, _ := w.run("fresh")
			ctx := t.Context()
			if strings.HasSuffix(name, "hangs") { // the agent's patience, made short
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				defer cancel()
			}
			f, err := w.attestor.Attest(ctx, fresh)
			if err == nil || errors.Is(err, attest.ErrNotMine) || !strings.Contains(err.Error(), fail.want) {
				t.Errorf("facts %v, error %v", f, err)
			}
			if diff := cmp.Diff(before, w.attested(known), protocmp.Transform()); diff != "" {
				t.Errorf("facts of a known container changed:\n%s", diff)
			}
			none(t, events)
			fail.end(w)
			until(t, "the container is attested", func() bool {
				_, err := w.attestor.Attest(t.Context(), fresh)
				return err == nil
			})
		})
	}
}

// F50: a runtime that still lists a container whose process has ended, or whose pid is
// another's.
func TestFault_F50_StaleContainer(t *testing.T) {
	w := newWorld(t)
	init, end := w.run("A")
	p, _ := w.process(cgroupOf("A"))
	w.attested(p)
	end()
	<-init.Done()
	if f, err := w.attestor.Attest(t.Context(), p); err == nil || errors.Is(err, attest.ErrNotMine) || errors.Is(err, peer.ErrGone) {
		t.Errorf("facts %v, error %v of a container that has ended", f, err)
	}
	other, _ := w.process("0::/user.slice\n")
	w.runtime.set(func() { w.runtime.containers[id("A")].pid = other.PID })
	w.refused(p, "no cgroup of its name")
}

// F65: the kubelet forgets its pods, or the list is empty, for however long: nobody
// loses anything.
func TestFault_F65_MissingPods(t *testing.T) {
	w := newWorld(t)
	init, end := w.run("A")
	events := w.watch()
	if e := next(t, events); e.Instance != "k8s:"+id("A") || e.Ended || e.Workload.GetK8S().GetPodName() != "A" {
		t.Errorf("event %v", e)
	}
	for _, raw := range []string{`{"kind":"PodList","items":null}`, `{"kind":"PodList","items":[]}`} {
		w.kubelet.set(func() { w.kubelet.raw = raw })
		if err := w.attestor.pods.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.attested(init)
	}
	w.runtime.set(func() { clear(w.runtime.containers) })
	w.attested(init)
	none(t, events)
	end() // but its end is known
	if e := next(t, events); !e.Ended || e.Instance != "k8s:"+id("A") {
		t.Errorf("event %v, want the end", e)
	}
}

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
	started := map[string]int{}
	for range n {
		started[next(t, events).Instance]++
	}
	if polls := w.kubelet.count(); polls > n+2 {
		t.Errorf("the kubelet was asked %d times for %d pods", polls, n)
	}
	for _, end := range ends {
		end()
	}
	for range n {
		e := next(t, events)
		if !e.Ended {
			t.Errorf("event %v", e)
		}
		started[e.Instance]--
	}
	for instance, left := range started {
		if left != 0 {
			t.Errorf("%s: %d starts without an end", instance, left)
		}
	}
	if c := len(w.attestor.index.All()); c != 0 {
		t.Errorf("%d containers in the index", c)
	}
}

// The usual sockets are tried in turn: one that is not there, one at which nobody who
// knows CRI listens, the right one.
func TestRuntimeIsFound(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("A")
	deaf := filepath.Join(t.TempDir(), "deaf.sock")
	if err := os.WriteFile(deaf, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w.attestor.runtime.sockets = []string{filepath.Join(t.TempDir(), "none.sock"), deaf, w.runtime.socket}
	w.attested(init)
	w.attestor.runtime.sockets = []string{filepath.Join(t.TempDir(), "none.sock"), filepath.Join(t.TempDir(), "none2.sock")}
	w.attestor.runtime.conn = nil
	fresh, _ := w.run("B")
	w.refused(fresh, "set runtime_socket")
}

// The kubelet is believed only if its certificate is the right one.
func TestKubeletCertificate(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("A")
	w.attestor.kubelet.config.NodeName = "other.example"
	w.refused(init, "kubelet_ca", "other.example")
	if n := w.kubelet.count(); n != 0 {
		t.Error("the token was sent to whoever answered")
	}
	w.attestor.kubelet.config.NodeName = "example.com" // which is in it, and it is its own CA
	w.attestor.kubelet.client = nil
	w.attested(init)
}

// CAs and token are read again at each call.
func TestFilesAreReadAgain(t *testing.T) {
	w := newWorld(t)
	k := newKubelet(w.attestor.config, w.attestor.metrics)
	if _, err := k.pods(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.kubelet.set(func() { w.kubelet.token = "newer" })
	if err := os.WriteFile(w.attestor.config.TokenFile, []byte("newer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.pods(t.Context()); err != nil {
		t.Error(err)
	}
	for name, text := range map[string]string{"nothing": "", "no certificate": "x"} {
		if err := os.WriteFile(w.attestor.config.KubeletCA, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := k.pods(t.Context()); err == nil {
			t.Errorf("%s in kubelet_ca is accepted", name)
		}
	}
}

func TestSettings(t *testing.T) {
	t.Setenv("NODE_IP", "")
	t.Setenv("NODE_NAME", "n1")
	for name, tc := range map[string]struct {
		c       Config
		setting string
	}{
		"no scheme":  {Config{Kubelet: "127.0.0.1:10250"}, "kubelet"},
		"no port":    {Config{Kubelet: "https://127.0.0.1"}, "kubelet"},
		"a path":     {Config{Kubelet: "https://127.0.0.1:10250/pods"}, "kubelet"},
		"no NODE_IP": {Config{Kubelet: "https://$NODE_IP:10250"}, "kubelet"},
		"too often":  {Config{Reconcile: config.Duration(time.Millisecond)}, "reconcile"},
	} {
		err := tc.c.complete()
		if e, ok := errors.AsType[*SettingError](err); !ok || e.Setting != tc.setting {
			t.Errorf("%s: error %v, want one about %s", name, err, tc.setting)
		}
	}
	// The read-only port is used because it was asked for, and warned of.
	var log strings.Builder
	a, err := New(Config{Kubelet: "http://127.0.0.1:10255"}, slog.New(slog.NewTextHandler(&log, nil)), nil)
	if err != nil || !strings.Contains(log.String(), "believed") {
		t.Errorf("log %q, error %v", log.String(), err)
	} else if err := a.Close(); err != nil {
		t.Error(err)
	}
	t.Setenv("NODE_IP", "fd00::1")
	c := Config{Kubelet: "https://$NODE_IP:10250/"}
	if err := c.complete(); err != nil || c.Kubelet != "https://[fd00::1]:10250" || c.NodeName != "n1" {
		t.Errorf("config %+v, error %v", c, err)
	}
}

func TestDecodePods(t *testing.T) {
	for name, text := range map[string]string{
		"empty":        "",
		"nothing":      "{}",
		"other":        `{"kind":"Pod","items":[]}`,
		"no items":     `{"kind":"PodList"}`,
		"items twice":  `{"kind":"PodList","items":[],"items":[]}`,
		"items a text": `{"kind":"PodList","items":"x"}`,
		"cut off":      `{"kind":"PodList","items":[{"metadata":{}}`,
		"a list":       `[]`,
		"uid a number": `{"kind":"PodList","items":[{"metadata":{"uid":1}}]}`,
		"twice":        `{"kind":"PodList","items":[{"metadata":{"uid":"a","name":"a","namespace":"n"}},{"metadata":{"uid":"a","name":"b","namespace":"n"}}]}`,
	} {
		if list, err := decodePods(strings.NewReader(text)); err == nil {
			t.Errorf("%s: %v", name, list)
		}
	}
	list, err := decodePods(strings.NewReader(`{"kind":"PodList","apiVersion":"v1","metadata":{"x":[1]},"items":[{"metadata":{"name":"nameless"}},{"metadata":{"uid":"a","name":"a","namespace":"n"}}]}`))
	if err != nil || len(list) != 1 || list[0].uid != "a" {
		t.Errorf("%v, %v", list, err)
	}
}

func FuzzPods(f *testing.F) {
	f.Add(`{"kind":"PodList","items":[{"metadata":{"uid":"a","name":"a","namespace":"n","labels":{"a":"b"}},"status":{"containerStatuses":[{"containerID":"x://y"}]}}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		list, err := decodePods(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, p := range list {
			if p.uid == "" || p.name == "" || p.namespace == "" {
				t.Errorf("pod %+v", p)
			}
		}
	})
}

// Environment variables hold secrets: there is nowhere to put them.
func TestEnvironmentIsNotRead(t *testing.T) {
	var walk func(reflect.Type)
	walk = func(ty reflect.Type) {
		switch ty.Kind() {
		case reflect.Struct:
			for f := range ty.Fields() {
				if strings.HasPrefix(strings.ToLower(f.Name), "env") {
					t.Errorf("field %s.%s", ty, f.Name)
				}
				walk(f.Type)
			}
		case reflect.Interface:
			t.Errorf("a field of %s can hold anything", ty)
		case reflect.Map, reflect.Slice, reflect.Pointer:
			walk(ty.Elem())
		default:
		}
	}
	walk(reflect.TypeFor[item]())
	w := newWorld(t)
	init, _ := w.run("A")
	if f := w.attested(init); strings.Contains(f.Workload.String(), "canary") {
		t.Errorf("facts %v", f)
	}
}

// D17: nothing is left over, wherever it ends.
func TestV_D17_KubernetesDescriptors(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("A")
	w.run("bad")
	bad, _ := w.process(cgroupOf("bad"))
	w.processes.Set(w.runtime.containers[id("bad")].pid, "0::/\n")
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	w.attested(init)
	w.refused(bad)
	before := count()
	for range 100 {
		w.attested(init)
		w.refused(bad)
		if _, err := w.attestor.index.Refresh(t.Context(), id("A")); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(); n > before+2 { // connections come and go
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

func TestNew(t *testing.T) {
	a, err := New(Config{}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a.Name() != "k8s" {
		t.Error(a.Name())
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := a.index.Get(t.Context(), id("A")); err == nil {
		t.Error("a closed attestor finds a container")
	}
}

var _ attest.InstanceWatcher = (*Attestor)(nil)

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

// Check says what answers, and what to change if something does not.
func TestCheck(t *testing.T) {
	w := newWorld(t)
	w.run("A")
	found, err := w.attestor.Check(t.Context())
	if want := "has 1 pods, the container runtime 1 containers"; err != nil || !strings.Contains(found, want) {
		t.Errorf("%q (%v), want %q", found, err, want)
	}
	w.kubelet.set(func() { w.kubelet.code = http.StatusForbidden })
	if _, err := w.attestor.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "nodes/pods") {
		t.Errorf("%v, want what right is missing", err)
	}
	w.kubelet.set(func() { w.kubelet.code = 0 })
	w.attestor.runtime.sockets = []string{filepath.Join(t.TempDir(), "none.sock")}
	w.attestor.runtime.conn = nil
	if _, err := w.attestor.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "runtime_socket") {
		t.Errorf("%v, want which setting names the socket", err)
	}
}
