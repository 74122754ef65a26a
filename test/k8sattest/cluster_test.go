package k8sattest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/k8s"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// onNode is set to the settings of attestOnNode where this program runs on a node.
const onNode = "MESHID_TEST_ON_NODE"

// nodeSettings say what attestOnNode does.
type nodeSettings struct {
	Kubelet   string `json:"kubelet"`
	NodeName  string `json:"node_name"`
	KubeletCA string `json:"kubelet_ca"`
	TokenFile string `json:"token_file"`
	Report    string `json:"report"` // the file that it writes to
}

// report is a line of the report: an event of the attestor, and the facts of each
// process of the instance that started.
type report struct {
	Instance string                   `json:"instance"`
	Ended    bool                     `json:"ended"`
	Facts    *attributesv1.Kubernetes `json:"facts"`
	Attested map[int]string           `json:"attested"` // the instance of each process, or the error
}

// attestOnNode is the program on the node: it follows the node's containers, attests each
// process of those that start, and reports, until it is told to end.
func attestOnNode() int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var s nodeSettings
	if err := json.Unmarshal([]byte(os.Getenv(onNode)), &s); err != nil {
		return fail(err)
	}
	out, err := os.OpenFile(s.Report, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fail(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c := k8s.Config{Kubelet: s.Kubelet, NodeName: s.NodeName, KubeletCA: s.KubeletCA, TokenFile: s.TokenFile}
	a, err := k8s.New(c, slog.New(slog.NewTextHandler(os.Stderr, nil)), nil)
	if err != nil {
		return fail(err)
	}
	lines := json.NewEncoder(out)
	err = a.Watch(ctx, func(e attest.InstanceEvent) {
		r := report{Instance: e.Instance, Ended: e.Ended, Facts: e.Workload.GetK8S()}
		if !e.Ended {
			r.Attested = attestAll(ctx, a, r.Facts.GetContainerId())
		}
		if err := lines.Encode(r); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	})
	if err := errors.Join(err, a.Close(), out.Close()); err != nil {
		return fail(err)
	}
	return 0
}

// attestAll attests all processes whose cgroup is named after a container.
func attestAll(ctx context.Context, a *k8s.Attestor, container string) map[int]string {
	found := make(map[int]string)
	paths, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), container) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		p, err := peer.Open(pid)
		if err != nil {
			continue // it has ended
		}
		facts, err := a.Attest(ctx, p)
		switch {
		case err == nil:
			found[pid] = facts.Instance
		case !errors.Is(err, peer.ErrGone):
			found[pid] = err.Error()
		}
		_ = p.Close()
	}
	return found
}

// onCluster is the attestor on a node of a cluster.
type onCluster struct {
	t       *testing.T
	process testkube.Program
	file    string

	mu      sync.Mutex // guards what follows
	read    int64
	reports []report
}

// startOnNode starts the attestor on a node, as an agent that may do what it needs.
func startOnNode(t *testing.T, c *testkube.Cluster, n *testkube.Node) *onCluster {
	t.Helper()
	c.Apply(t, agentRights("kube-public", "default"))
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte(c.Token(t, testkube.Pod{Namespace: "kube-public"}, time.Hour)), 0o600); err != nil {
		t.Fatal(err)
	}
	o := &onCluster{t: t, file: filepath.Join(dir, "report")}
	settings, err := json.Marshal(nodeSettings{
		Kubelet: "https://" + n.IP + ":10250", NodeName: n.Name, KubeletCA: c.CAFile, TokenFile: token, Report: o.file,
	})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o.process = testkube.Program{Process: local.New(n.Enter("env", onNode+"="+string(settings), self)...)}
	o.process.Start(t)
	t.Cleanup(func() {
		o.process.Kill()
		if t.Failed() {
			t.Logf("log of the attestor:\n%s", o.process.Log())
		}
	})
	return o
}

// all returns what was reported until now.
func (o *onCluster) all() []report {
	o.t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	f, err := os.Open(o.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		o.t.Fatal(err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.NewSectionReader(f, o.read, 1<<30))
	if err != nil {
		o.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if !strings.HasSuffix(line, "\n") {
			break // being written
		}
		var r report
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			o.t.Fatal(err)
		}
		o.reports, o.read = append(o.reports, r), o.read+int64(len(line))
	}
	return slices.Clone(o.reports)
}

// await waits for a report.
func (o *onCluster) await(what string, ok func(r report) bool) report {
	o.t.Helper()
	var found report
	local.Await(o.t, what, func(context.Context) error {
		all := o.all()
		i := slices.IndexFunc(all, ok)
		if i < 0 {
			return fmt.Errorf("%d reports, and not that one", len(all))
		}
		found = all[i]
		return nil
	})
	return found
}

// is returns whether a report is of a pod's container that has started.
func is(pod, container string) func(report) bool {
	return func(r report) bool {
		return !r.Ended && r.Facts.GetPodName() == pod && r.Facts.GetContainer() == container
	}
}

const pods = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart, tier: gold}}
    spec:
      serviceAccountName: cart
      terminationGracePeriodSeconds: 1
      initContainers:
      - {name: setup, image: ` + testkube.BusyBox + `, command: [/bin/sh, -c, "busybox sleep 1"]}
      containers:
      - name: app
        image: ` + testkube.BusyBox + `
        command: [/bin/sh, -c, "busybox sleep 100000 & busybox sleep 100000"]
      - name: log
        image: ` + testkube.BusyBox + `
        command: [/bin/sh, -c, "busybox sleep 100000"]
        resources: {requests: {memory: 1Mi}}
`

const static = `
apiVersion: v1
kind: Pod
metadata: {name: etcd, namespace: kube-system}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: etcd, image: ` + testkube.BusyBox + `, command: [/bin/sh, -c, "busybox sleep 100000"]}]
`

// F49 to F51 and F65 in earnest: a real kubelet, a real containerd, real cgroups. Each
// container of each pod is announced with its facts and its processes are attested, and
// nothing else; what was announced ends when it ends, whoever is away.
func TestFault_F49_ClusterAttestation(t *testing.T) {
	c := testkube.StartCluster(t, testkube.Options{})
	n := c.Nodes[0]
	o := startOnNode(t, c, n)
	c.Account(t, "shop", "cart")
	c.Apply(t, pods)
	running := c.AwaitPods(t, "shop", "app=cart", 3)
	for _, p := range running {
		for _, container := range []string{"setup", "app", "log"} {
			r := o.await("wait for "+p.Metadata.Name+"/"+container, is(p.Metadata.Name, container))
			f := r.Facts
			if f.GetNamespace() != "shop" || f.GetServiceAccount() != "cart" || f.GetPodUid() != p.Metadata.UID ||
				f.GetLabels()["tier"] != "gold" || f.GetOwnerKind() != "ReplicaSet" || !strings.HasPrefix(f.GetOwnerName(), "cart-") ||
				f.GetImage() != testkube.BusyBox || !strings.HasPrefix(f.GetImageDigest(), "sha256:") ||
				r.Instance != "k8s:"+f.GetContainerId() {
				t.Errorf("%s/%s: %v", p.Metadata.Name, container, f)
			}
			for pid, instance := range r.Attested {
				if instance != r.Instance {
					t.Errorf("process %d of %s/%s: %s", pid, p.Metadata.Name, container, instance)
				}
			}
			if len(r.Attested) == 0 && container != "setup" { // which may have ended by then
				t.Errorf("no process of %s/%s was attested", p.Metadata.Name, container)
			}
		}
		o.await("wait for the end of the init container", func(r report) bool {
			return r.Ended && r.Instance == o.await("", is(p.Metadata.Name, "setup")).Instance
		})
	}

	// A pod from the kubelet's own files: its UID is the kubelet's, not the mirror's.
	if err := os.WriteFile(filepath.Join(n.StaticPods, "etcd.yaml"), []byte(static), 0o600); err != nil {
		t.Fatal(err)
	}
	r := o.await("wait for the static pod", is("etcd-"+n.Name, "etcd"))
	if uid := r.Facts.GetPodUid(); len(uid) != 32 || len(r.Attested) == 0 {
		t.Errorf("static pod with UID %s, attested %v", uid, r.Attested)
	}

	// While the kubelet is away, an end is an end, and nothing else ends.
	victim, others := running[0], running[1:]
	before := o.await("", is(victim.Metadata.Name, "log"))
	n.Kubelet.Kill()
	c.KillContainer(t, victim, "log")
	o.await("wait for the end", func(r report) bool { return r.Ended && r.Instance == before.Instance })
	n.StartKubelet(t)
	after := o.await("wait until it is started again", func(r report) bool {
		return is(victim.Metadata.Name, "log")(r) && r.Instance != before.Instance
	})
	if after.Facts.GetPodUid() != before.Facts.GetPodUid() || after.Facts.GetContainerId() == before.Facts.GetContainerId() {
		t.Errorf("started again as %v", after.Facts)
	}
	for _, p := range others {
		if i := slices.IndexFunc(o.all(), func(r report) bool {
			return r.Ended && r.Instance == o.await("", is(p.Metadata.Name, "app")).Instance
		}); i >= 0 {
			t.Errorf("a container of %s ended, which runs", p.Metadata.Name)
		}
	}

	// And containerd's restart.
	n.Containerd.Kill()
	n.StartContainerd(t)
	c.MustKubectl(t, "scale", "-n", "shop", "deployment/cart", "--replicas=4")
	for _, p := range c.AwaitPods(t, "shop", "app=cart", 4) {
		o.await("wait for "+p.Metadata.Name, is(p.Metadata.Name, "app"))
	}
	c.MustKubectl(t, "scale", "-n", "shop", "deployment/cart", "--replicas=0")
	for _, r := range o.all() {
		if !r.Ended && r.Facts.GetNamespace() == "shop" {
			o.await("wait for the end of "+r.Facts.GetPodName()+"/"+r.Facts.GetContainer(), func(e report) bool { return e.Ended && e.Instance == r.Instance })
		}
	}
}
