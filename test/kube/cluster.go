package kube

// A cluster is made of machines on this machine. Its control plane is a network
// namespace with the bridge that all are connected to, and each node has namespaces
// of its own for all but users: its network, its mounts (so that /run, /var/lib and
// /var/log are the node's), its processes and its name. So a path of a pod's
// hostPath, a socket's path and a process id are what they would be on a real node;
// and when the first process of a node is killed, the kernel ends all that runs
// there, and nothing stays mounted. What is left then are cgroups, which stop
// removes; and if the test was killed, the next cluster does.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
	"github.com/meshid/meshid/test/shop/image"
)

// Images that each node has.
const (
	// BusyBox has Debian's static BusyBox as /bin/busybox and /bin/sh.
	BusyBox = "meshid.test/busybox:1"

	pauseImage = "meshid.test/pause:1"
)

// Options say what cluster to start.
type Options struct {
	// Nodes is how many there are; 1 if it is 0.
	Nodes int
	// KubeProxy gives Services, and so the API server's own, addresses that work in
	// pods and on nodes.
	KubeProxy bool
	// APIServerArgs and ControllerArgs are more flags of the API server and of the
	// controller manager.
	APIServerArgs, ControllerArgs []string
}

// Cluster is a whole Kubernetes cluster. Besides what an API server does, its pods
// run, and find Services by their names. There is no way to the world outside.
type Cluster struct {
	*APIServer
	// Controllers and Scheduler are the programs of the control plane besides those
	// of APIServer.
	Controllers, Scheduler *local.Process
	Nodes                  []*Node
	// HostIP is the address of this machine in the cluster's network: what a test
	// listens on there, pods and nodes reach; and a test reaches all of theirs.
	HostIP string

	index   int // of the clusters on this machine
	stopDNS func()
	control *machine
	pause   string
	unlock  func()
}

// StartCluster starts a cluster for one test and waits until its nodes are ready.
// It needs root, and runs in `make cluster-test` only, which selects tests by the
// word Cluster in their names.
func StartCluster(t testing.TB, o Options) *Cluster {
	t.Helper()
	if !strings.Contains(t.Name(), "Cluster") {
		t.Fatal("a test that starts a cluster has the word Cluster in its name: make cluster-test selects by it")
	}
	if os.Getenv("MESHID_CLUSTER") != "1" {
		t.Skip("MESHID_CLUSTER=1 is needed (make cluster-test)")
	}
	require.Root(t)
	require.Kubernetes(t)
	for _, program := range []string{"containerd", "runc", "ip", "iptables", "nft", "nsenter", "unshare", "busybox", "gcc"} {
		require.Program(t, program)
	}
	if _, err := os.Stat(filepath.Join(cniPlugins, "ptp")); err != nil {
		require.Missing(t, "no CNI plugins (run scripts/install-kubernetes): %v", err)
	}
	c := claim(t)
	t.Cleanup(func() {
		c.stop(t)
		if t.Failed() || os.Getenv("MESHID_LOGS") != "" {
			c.printLogs(t)
		}
	})
	c.start(t, o)
	return c
}

const (
	cniPlugins = "/usr/lib/cni" // where Debian has them
	clusters   = 8              // that run on this machine at the same time, at most
)

// Addresses: nodes are in 10.(64+2i).0.0/24, pods of node n in 10.(65+2i).n.0/24.

func (c *Cluster) nodeIP(host int) string { return fmt.Sprintf("10.%d.0.%d", 64+2*c.index, host) }

func (c *Cluster) podRange(node int) string { return fmt.Sprintf("10.%d.%d.0/24", 65+2*c.index, node) }

func (c *Cluster) podRanges() string { return fmt.Sprintf("10.%d.0.0/16", 65+2*c.index) }

// link is the name of the interface that connects this machine with the cluster,
// and the beginning of what its cgroups are called.
func (c *Cluster) link() string { return fmt.Sprintf("mk%d", c.index) }

// claim takes the first number that no cluster has, and removes what a test that was
// killed left there.
func claim(t testing.TB) *Cluster {
	t.Helper()
	for i := range clusters {
		dir := filepath.Join(os.TempDir(), fmt.Sprintf("meshid-cluster-%d", i))
		lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = lock.Close()
			continue
		}
		c := &Cluster{index: i, unlock: func() { _ = lock.Close() }}
		c.remove(t, dir)
		if err := os.Mkdir(dir, 0o700); err != nil {
			c.unlock()
			t.Fatal(err)
		}
		c.APIServer = newAPIServer(t, dir)
		return c
	}
	t.Fatalf("%d clusters run already", clusters)
	return nil
}

func (c *Cluster) start(t testing.TB, o Options) {
	t.Helper()
	c.pause = filepath.Join(c.dir, "pause")
	source := filepath.Join(require.Repository(), "test", "kube", "testdata", "pause.c")
	run(t, "gcc", "-O2", "-static", "-o", c.pause, source)

	c.control = startMachine(t, c.pause, "unshare", "--net")
	c.HostIP = c.nodeIP(254)
	ip := func(line string, args ...any) { c.control.ip(t, line, args...) }
	ip("link set lo up")
	ip("link add bridge type bridge")
	ip("addr add %s/24 dev bridge", c.nodeIP(1))
	ip("link set bridge up")
	ip("link add host type veth peer name %s netns %d", c.link(), os.Getpid())
	ip("link set host master bridge up")
	run(t, "ip", "addr", "add", c.HostIP+"/24", "dev", c.link())
	run(t, "ip", "link", "set", c.link(), "up")

	c.APIServer.start(t, place{wrap: c.control.enter("net"), host: c.nodeIP(1), port: "6443", args: o.APIServerArgs})
	c.Controllers = c.component(t, "kube-controller-manager", "controllers", slices.Concat([]string{
		"--service-account-private-key-file=" + filepath.Join(c.dir, "service-account.key"), "--root-ca-file=" + c.CAFile,
		"--cluster-signing-cert-file=" + c.CAFile, "--cluster-signing-key-file=" + writeFile(t, filepath.Join(c.dir, "ca.key"), keyPEM(t, c.authority.key)),
		"--use-service-account-credentials", "--node-monitor-grace-period=15s", "--kube-api-qps=200", "--kube-api-burst=400",
	}, o.ControllerArgs))
	c.Scheduler = c.component(t, "kube-scheduler", "scheduler", []string{"--kube-api-qps=200", "--kube-api-burst=400"})

	c.serveDNS(t)

	count := max(1, o.Nodes)
	for i := range count {
		c.Nodes = append(c.Nodes, newNode(t, c, i+1, o.KubeProxy))
	}
	for _, n := range c.Nodes {
		n.Boot(t)
	}
	c.ImportImage(t, image.Spec{Tag: pauseImage, Entrypoint: []string{"/pause"}, Files: map[string]string{"/pause": c.pause}})
	busybox := require.Program(t, "busybox")
	c.ImportImage(t, image.Spec{Tag: BusyBox, Entrypoint: []string{"/bin/sh"}, Files: map[string]string{"/bin/busybox": busybox, "/bin/sh": busybox}})
	for _, n := range c.Nodes {
		n.AwaitReady(t, true)
	}
}

// component starts a program of the control plane.
func (c *Cluster) component(t testing.TB, program, name string, args []string) *local.Process {
	t.Helper()
	config := c.UserKubeconfig(t, "system:"+program)
	p := local.New(slices.Concat(c.control.enter("net"), []string{
		c.program(program), "--kubeconfig=" + config, "--leader-elect=false", "--bind-address=127.0.0.1", "--cert-dir=" + filepath.Join(c.dir, name),
	}, args)...)
	p.Start(t)
	return p
}

// stop ends the cluster and removes all that it was.
func (c *Cluster) stop(t testing.TB) {
	t.Helper()
	for _, n := range c.Nodes {
		n.PowerOff(t)
	}
	if c.stopDNS != nil {
		c.stopDNS()
	}
	for _, p := range []*local.Process{c.Controllers, c.Scheduler} {
		if p != nil {
			p.Kill()
		}
	}
	c.APIServer.stop()
	if c.control != nil {
		c.control.kill()
	}
	c.remove(t, c.dir)
	c.unlock()
}

// remove removes what processes leave behind.
func (c *Cluster) remove(t testing.TB, dir string) {
	t.Helper()
	_ = exec.Command("ip", "link", "del", c.link()).Run() //nolint:gosec,noctx // it goes with the control plane's namespace, but later
	removeCgroups(t, c.link()+"-*")
	if err := os.RemoveAll(dir); err != nil {
		t.Errorf("remove what the cluster was: %v", err)
	}
}

func (c *Cluster) printLogs(t testing.TB) {
	t.Helper()
	print := func(name, where string, p *local.Process) {
		if p != nil {
			t.Logf("last lines of %s on %s:\n%s", name, where, lastLines(p.Log(), 100))
		}
	}
	print("kube-apiserver", "the control plane", c.Server)
	print("kube-controller-manager", "the control plane", c.Controllers)
	print("kube-scheduler", "the control plane", c.Scheduler)
	for _, n := range c.Nodes {
		print("containerd", n.Name, n.Containerd.Process)
		print("kubelet", n.Name, n.Kubelet.Process)
		print("kube-proxy", n.Name, n.KubeProxy.Process)
	}
}

func lastLines(s string, n int) string {
	lines := strings.SplitAfter(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// ImportImage makes an image out of files of this machine and puts it onto each
// node, under its tag, which names a registry that does not exist.
func (c *Cluster) ImportImage(t testing.TB, spec image.Spec) {
	t.Helper()
	im, err := image.Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close() //nolint:errcheck // it was read
	archive, err := os.Create(filepath.Join(c.dir, "image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(im.WriteArchive(archive), archive.Close()); err != nil {
		t.Fatal(err)
	}
	var g errgroup.Group
	for _, n := range c.Nodes {
		g.Go(func() error {
			_, err := n.Exec(t, "ctr", "--namespace=k8s.io", "images", "import", archive.Name())
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// ImportEnvoy puts the real Envoy onto each node and returns its image's tag.
func (c *Cluster) ImportEnvoy(t testing.TB) string {
	t.Helper()
	envoy := require.Envoy(t)
	files, err := image.Libraries(t.Context(), envoy)
	if err != nil {
		t.Fatal(err)
	}
	files["/bin/envoy"] = envoy
	const tag = "meshid.test/envoy:1"
	c.ImportImage(t, image.Spec{Tag: tag, Entrypoint: []string{"/bin/envoy"}, Files: files})
	return tag
}

// AwaitPods waits until as many pods match the selector as are wanted, all of them
// ready, and returns them.
func (c *Cluster) AwaitPods(t testing.TB, namespace, selector string, want int) []RunningPod {
	t.Helper()
	var pods []RunningPod
	local.Await(t, fmt.Sprintf("wait for %d pods %s", want, selector), func(ctx context.Context) error {
		var list struct {
			Items []RunningPod `json:"items"`
		}
		if err := c.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods?labelSelector="+selector, nil, &list); err != nil {
			return err
		}
		pods = list.Items
		ready := 0
		for _, p := range pods {
			if p.Ready() {
				ready++
			}
		}
		if ready != want || len(pods) != want {
			text, err := json.Marshal(pods)
			return errors.Join(fmt.Errorf("there are %d, ready are %d: %s", len(pods), ready, text), err)
		}
		return nil
	})
	return pods
}

// RunningPod is what the API server knows of a pod.
type RunningPod struct {
	Metadata struct {
		Name              string `json:"name"`
		UID               string `json:"uid"`
		DeletionTimestamp string `json:"deletionTimestamp,omitempty"`
	} `json:"metadata"`
	Spec struct {
		NodeName string `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		Phase      string            `json:"phase"`
		PodIP      string            `json:"podIP"`
		Conditions []Condition       `json:"conditions"`
		Containers []ContainerStatus `json:"containerStatuses"`
	} `json:"status"`
}

// ContainerStatus is what the API server knows of a container.
type ContainerStatus struct {
	Name         string `json:"name"`
	ContainerID  string `json:"containerID"` // containerd://…
	RestartCount int    `json:"restartCount"`
	State        any    `json:"state"`
	LastState    any    `json:"lastState"` // how the one before it ended
}

// Condition is a condition of an object's status.
type Condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"` // True, False or Unknown
	Message string `json:"message,omitempty"`
}

// Ready says whether all of its containers are, and nobody deletes it.
func (p *RunningPod) Ready() bool {
	return p.Metadata.DeletionTimestamp == "" && slices.ContainsFunc(p.Status.Conditions, func(c Condition) bool {
		return c.Type == "Ready" && c.Status == "True"
	})
}

// Node returns the node that a pod is on.
func (c *Cluster) Node(t testing.TB, p RunningPod) *Node {
	t.Helper()
	i := slices.IndexFunc(c.Nodes, func(n *Node) bool { return n.Name == p.Spec.NodeName })
	if i < 0 {
		t.Fatalf("pod %s is on no node", p.Metadata.Name)
	}
	return c.Nodes[i]
}

// PIDs returns the processes of a pod's container, as this machine numbers them.
func (c *Cluster) PIDs(t testing.TB, p RunningPod, container string) []int {
	t.Helper()
	i := slices.IndexFunc(p.Status.Containers, func(s ContainerStatus) bool { return s.Name == container })
	if i < 0 {
		t.Fatalf("pod %s has no container %s", p.Metadata.Name, container)
	}
	id := strings.TrimPrefix(p.Status.Containers[i].ContainerID, "containerd://")
	var pids []int
	for _, root := range cgroups(t, c.Node(t, p).cgroup()) {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() || d.Name() != id {
				return err
			}
			text, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for line := range strings.Lines(string(text)) {
				if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a container that ends
			t.Fatal(err)
		}
	}
	return pids
}

// KillContainer kills all processes of a pod's container, as nothing but a crash
// does.
func (c *Cluster) KillContainer(t testing.TB, p RunningPod, container string) {
	t.Helper()
	pids := c.PIDs(t, p, container)
	if len(pids) == 0 {
		t.Fatalf("container %s of pod %s has no process", container, p.Metadata.Name)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
}

// Dial connects to a TCP address from within the network of a pod.
func (c *Cluster) Dial(ctx context.Context, t testing.TB, from RunningPod, address string) (net.Conn, error) {
	t.Helper()
	pids := c.PIDs(t, from, from.Status.Containers[0].Name)
	if len(pids) == 0 {
		return nil, fmt.Errorf("pod %s has no process", from.Metadata.Name)
	}
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pids[0]))
	if err != nil {
		return nil, err
	}
	defer namespace.Close() //nolint:errcheck // it was read
	type result struct {
		conn net.Conn
		err  error
	}
	dialled := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine, and nobody else gets into the pod
		r := result{err: unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET)}
		if r.err == nil {
			r.conn, r.err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
		dialled <- r
	}()
	r := <-dialled
	return r.conn, r.err
}

// machine is a set of namespaces, held by a process that waits.
type machine struct {
	holder *local.Process
	pid    int // of the process that waits, as this machine numbers it
}

// startMachine runs a program that makes namespaces and becomes, or starts, pause.
func startMachine(t testing.TB, pause string, args ...string) *machine {
	t.Helper()
	m := &machine{holder: local.New(append(args, pause)...)}
	m.holder.Start(t)
	local.Await(t, "make namespaces", func(context.Context) error {
		select {
		case <-m.holder.Done():
			t.Fatalf("%v has ended: %s", args, m.holder.Log())
		default:
		}
		pid := m.holder.PID()
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			return err
		}
		if child, err := strconv.Atoi(strings.TrimSpace(string(children))); err == nil {
			pid = child
		}
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err == nil && exe != pause {
			err = fmt.Errorf("%s still prepares them", exe)
		}
		m.pid = pid
		return err
	})
	return m
}

// enter returns what stands before a program that runs in these namespaces.
func (m *machine) enter(namespaces ...string) []string {
	args := []string{"nsenter"}
	for _, n := range namespaces {
		args = append(args, fmt.Sprintf("--%s=/proc/%d/ns/%s", n, m.pid, strings.Replace(n, "mount", "mnt", 1)))
	}
	return args
}

func (m *machine) ip(t testing.TB, line string, args ...any) {
	t.Helper()
	run(t, slices.Concat(m.enter("net"), []string{"ip"}, strings.Fields(fmt.Sprintf(line, args...)))...)
}

// kill ends all that runs in the machine's namespace of processes, if it has one.
func (m *machine) kill() {
	_ = syscall.Kill(m.pid, syscall.SIGKILL) // it may have ended
	<-m.holder.Done()
}

// run runs a program that cannot fail.
func run(t testing.TB, args ...string) {
	t.Helper()
	if _, err := execute(t.Context(), "", args...); err != nil {
		t.Fatal(err)
	}
}
