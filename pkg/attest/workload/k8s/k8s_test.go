package k8s

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/config"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	"github.com/meshid/meshid/test/self"
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
	w.attested(init)
	w.refused(bad)
	before := self.Descriptors(t)
	for range 100 {
		w.attested(init)
		w.refused(bad)
		if _, err := w.attestor.index.Refresh(t.Context(), id("A")); err != nil {
			t.Fatal(err)
		}
	}
	if n := self.Descriptors(t); n > before+2 { // connections come and go
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
