package kube

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshid/meshid/test/local"
)

// Node is a machine of a cluster, with a containerd and a kubelet whose paths are
// where they are everywhere: /run/containerd/containerd.sock, /var/lib/kubelet,
// /var/log/pods.
type Node struct {
	// Name is node-1 and so on, and the node's host name.
	Name, IP string
	// StaticPods is the folder, here and there, whose manifests the kubelet runs.
	StaticPods string
	// Containerd, Kubelet and KubeProxy are the node's programs, as they were last
	// started; KubeProxy has no Process if the cluster has none.
	Containerd, Kubelet, KubeProxy Program

	cluster     *Cluster
	number      int
	dir         string
	machine     *machine // nil while it is off
	proxy       bool
	certificate certificate // of the cluster's CA, for the kubelet
}

// Program is a program on a node. What is sent to it arrives there.
type Program struct{ *local.Process }

// Kill kills the program and waits for its end. It may have ended.
func (p Program) Kill() {
	_ = syscall.Kill(-p.PID(), syscall.SIGKILL)
	<-p.Done()
}

func newNode(t testing.TB, c *Cluster, number int, proxy bool) *Node {
	t.Helper()
	n := &Node{Name: fmt.Sprint("node-", number), IP: c.nodeIP(10 + number), cluster: c, number: number, proxy: proxy}
	n.dir = filepath.Join(c.dir, n.Name)
	n.StaticPods = filepath.Join(n.dir, "static")
	for _, d := range []string{"lib", "log", "cni", "static"} {
		if err := os.MkdirAll(filepath.Join(n.dir, d), 0o755); err != nil { //nolint:gosec // as they are on a machine
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(n.dir, "cni", "10-pods.conflist"), fmt.Appendf(nil, `{
  "cniVersion": "0.4.0", "name": "pods",
  "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": %q, "routes": [{"dst": "0.0.0.0/0"}]}}]
}`, c.podRange(number)))
	writeFile(t, filepath.Join(n.dir, "containerd.toml"), fmt.Appendf(nil, `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  disable_apparmor = true
  restrict_oom_score_adj = true # where root may not lower it
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, pauseImage, cniPlugins, filepath.Join(n.dir, "cni")))
	cert := c.authority.issue(t, n.dir, "kubelet", pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}}, n.Name, n.IP)
	kubeconfig(t, filepath.Join(n.dir, "kubelet.kubeconfig"), c.URL, c.CAFile, cert.user())
	n.certificate = cert
	n.configureKubelet(t, false)
	return n
}

// KubeletCertificate starts the kubelet again, with a certificate that it makes itself,
// as kubeadm sets it up, or with that of the cluster's CA, which it has at first.
func (n *Node) KubeletCertificate(t testing.TB, selfSigned bool) {
	t.Helper()
	n.Kubelet.Kill()
	n.configureKubelet(t, selfSigned)
	n.StartKubelet(t)
}

func (n *Node) configureKubelet(t testing.TB, selfSigned bool) {
	t.Helper()
	serving := fmt.Sprintf("tlsCertFile: %q\ntlsPrivateKeyFile: %q", n.certificate.cert, n.certificate.key)
	if selfSigned {
		serving = "" // it makes one below /var/lib/kubelet/pki
	}
	// Nothing is evicted or collected for want of space: that would be this
	// machine's want.
	writeFile(t, filepath.Join(n.dir, "kubelet.yaml"), fmt.Appendf(nil, `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
address: %[1]s
readOnlyPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %[2]q}}
authorization: {mode: Webhook}
%[3]s
clusterDNS: [%[6]s]
clusterDomain: %[7]s
staticPodPath: %[4]q
volumePluginDir: /var/lib/kubelet/volume-plugins
cgroupRoot: /%[5]s
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
resolvConf: ""
enforceNodeAllocatable: []
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.available: 0%%}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 4s
fileCheckFrequency: 2s
syncFrequency: 10s
maxPods: 250
`, n.IP, n.cluster.CAFile, serving, n.StaticPods, n.cgroup(), n.cluster.HostIP, clusterDomain))
}

func (n *Node) cgroup() string { return fmt.Sprintf("%s-%s", n.cluster.link(), n.Name) }

// Boot starts a node that is off. What it had on its disk is there, nothing runs.
// It does not wait until the node is ready.
func (n *Node) Boot(t testing.TB) {
	t.Helper()
	c := n.cluster
	n.machine = startMachine(t, c.pause, "unshare", "--net", "--uts", "--ipc", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child",
		"sh", "-ec", fmt.Sprintf(`mount --make-rshared /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind %[1]s/lib /var/lib
mount --bind %[1]s/log /var/log
echo %[2]s >/proc/sys/kernel/hostname
exec "$0"`, n.dir, n.Name))

	c.control.ip(t, "link add %s type veth peer name eth0 netns %d", n.Name, n.machine.pid)
	c.control.ip(t, "link set %s master bridge up", n.Name)
	n.machine.ip(t, "link set lo up")
	n.machine.ip(t, "addr add %s/24 dev eth0", n.IP)
	n.machine.ip(t, "link set eth0 up")
	for _, other := range c.Nodes {
		if other != n {
			n.machine.ip(t, "route add %s via %s", c.podRange(other.number), other.IP)
		}
	}
	c.control.ip(t, "route replace %s via %s", c.podRange(n.number), n.IP)
	run(t, "ip", "route", "replace", c.podRange(n.number), "via", n.IP)
	run(t, n.Enter("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")...)
	makeCgroups(t, n.cgroup())

	n.StartContainerd(t)
	n.StartKubelet(t)
	if n.proxy {
		n.KubeProxy = n.start(t, c.program("kube-proxy"), "--kubeconfig="+c.UserKubeconfig(t, "system:kube-proxy"),
			"--hostname-override="+n.Name, "--proxy-mode=nftables", "--cluster-cidr="+c.podRanges(),
			// What they set belongs to the whole machine.
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
	}
}

// StartContainerd starts containerd, also again after Kill, and waits until it
// serves.
func (n *Node) StartContainerd(t testing.TB) {
	t.Helper()
	n.Containerd = n.start(t, "containerd", "--config="+filepath.Join(n.dir, "containerd.toml"))
	local.Await(t, "wait for containerd", func(context.Context) error {
		select {
		case <-n.Containerd.Done():
			t.Fatalf("containerd has ended:\n%s", n.Containerd.Log())
		default:
		}
		if !strings.Contains(n.Containerd.Log(), "Start streaming server") { // the last that its CRI service does before it answers
			return errors.New("it does not serve yet")
		}
		return nil
	})
}

// StartKubelet starts the kubelet, also again after Kill. It needs containerd.
func (n *Node) StartKubelet(t testing.TB) {
	t.Helper()
	n.Kubelet = n.start(t, n.cluster.program("kubelet"), "--config="+filepath.Join(n.dir, "kubelet.yaml"),
		"--kubeconfig="+filepath.Join(n.dir, "kubelet.kubeconfig"), "--hostname-override="+n.Name, "--node-ip="+n.IP)
}

func (n *Node) start(t testing.TB, args ...string) Program {
	t.Helper()
	p := Program{local.New(n.Enter(args...)...)}
	p.Start(t)
	return p
}

// PowerOff ends all that runs on the node, at once.
func (n *Node) PowerOff(t testing.TB) {
	t.Helper()
	if n.machine == nil {
		return
	}
	n.machine.kill()
	n.machine = nil
	for _, p := range []Program{n.Containerd, n.Kubelet, n.KubeProxy} {
		if p.Process != nil {
			p.Kill() // what started it there
		}
	}
	removeCgroups(t, n.cgroup())
}

// Enter returns the arguments that run a program of this machine on the node: its
// files are this machine's, but for /run, /var/lib and /var/log.
func (n *Node) Enter(args ...string) []string {
	return append(n.machine.enter("mount", "uts", "ipc", "net", "pid"), args...)
}

// Exec runs a program on the node and returns what it prints.
func (n *Node) Exec(t testing.TB, args ...string) (string, error) {
	t.Helper()
	return execute(t.Context(), "", n.Enter(args...)...)
}

// Disconnect cuts the node off from all others. What runs there goes on.
func (n *Node) Disconnect(t testing.TB) {
	t.Helper()
	n.cluster.control.ip(t, "link set %s down", n.Name)
}

// Connect ends what Disconnect began.
func (n *Node) Connect(t testing.TB) {
	t.Helper()
	n.cluster.control.ip(t, "link set %s up", n.Name)
}

// AwaitReady waits until the API server says that the node is ready, or that it is
// not.
func (n *Node) AwaitReady(t testing.TB, want bool) {
	t.Helper()
	local.Await(t, fmt.Sprintf("wait until %s is ready: %v", n.Name, want), func(ctx context.Context) error {
		var node struct {
			Status struct {
				Conditions []Condition `json:"conditions"`
			} `json:"status"`
		}
		if err := n.cluster.Do(ctx, http.MethodGet, "/api/v1/nodes/"+n.Name, nil, &node); err != nil {
			return err
		}
		ready := slices.ContainsFunc(node.Status.Conditions, func(c Condition) bool { return c.Type == "Ready" && c.Status == "True" })
		if ready != want {
			return fmt.Errorf("its conditions are %v", node.Status.Conditions)
		}
		return nil
	})
}

const cgroupRoot = "/sys/fs/cgroup"

// hierarchies are the roots of all hierarchies of cgroups: one for each controller,
// or one for all.
func hierarchies(t testing.TB) []string {
	t.Helper()
	found, err := filepath.Glob(cgroupRoot + "/*/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cgroupRoot + "/cgroup.controllers"); err == nil {
		found = []string{cgroupRoot + "/cgroup.procs"}
	}
	for i := range found {
		found[i] = filepath.Dir(found[i])
	}
	return found
}

// cgroups returns those whose name matches, in all hierarchies.
func cgroups(t testing.TB, pattern string) []string {
	t.Helper()
	var all []string
	for _, h := range hierarchies(t) {
		found, err := filepath.Glob(filepath.Join(h, pattern))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

func makeCgroups(t testing.TB, name string) {
	t.Helper()
	for _, h := range hierarchies(t) {
		dir := filepath.Join(h, name)
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // as the others are
			t.Fatal(err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // which start empty in version 1, and then nothing may run
			all, err := os.ReadFile(filepath.Join(h, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), all, 0o600) //nolint:gosec // the name is ours
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// removeCgroups removes cgroups whose processes are dead or dying.
func removeCgroups(t testing.TB, pattern string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		var failed error
		for _, root := range cgroups(t, pattern) {
			var dirs []string
			err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return err
			})
			failed = errors.Join(failed, err)
			for _, dir := range slices.Backward(dirs) {
				failed = errors.Join(failed, os.Remove(dir))
			}
		}
		if failed == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("remove cgroups: %v", failed)
			return
		}
	}
}
