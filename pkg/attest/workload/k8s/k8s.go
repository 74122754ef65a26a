// Package k8s answers "which container of which pod is this process in, and what
// does Kubernetes say of it?"
//
// Package container finds the container of a process, and confirms it. What this
// package adds comes from two that run on the node, and from nobody else: no answer
// waits for the API server.
//
//  1. cri.go: the container runtime (containerd, CRI-O) is asked over CRI for a
//     container that is not known yet: its init process, and for which container of
//     which pod the kubelet had it made. Labels of images are not looked at.
//  2. pods.go, kubelet.go: the kubelet's list of its pods has the rest. The kubelet
//     knows a pod before it has a container made, so a pod that is not in the list
//     that is at hand is in the next one: the list is fetched when it is needed, once
//     for all who wait, and now and then for labels that have changed.
//  3. load.go: what both say must agree, with each other and with the cgroup that
//     the kubelet made for the pod.
//  4. events.go, tree.go, follow.go: containerd tells of each container when its first
//     process is there and does not run yet, so that all of this happens before a process
//     can ask. Where the runtime is another one, the kernel tells of new cgroups of
//     containers, and it has usually happened before.
//
// A kubelet or runtime that cannot be reached withdraws nothing: containers that are
// known are attested for as long as they run, the others get an error that says "try
// again".
package k8s

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
	"github.com/meshid/meshid/pkg/config"
)

// Name is the attestor's name.
const Name = "k8s"

// Defaults of Config.
const (
	defaultKubelet    = "https://127.0.0.1:10250"
	defaultCA         = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
	defaultOwn        = "/var/lib/kubelet/pki/kubelet.crt"
	defaultToken      = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path
	defaultCgroupRoot = "/sys/fs/cgroup"
	defaultReconcile  = 30 * time.Second
)

// Config of the attestor. The zero value is good in a pod that has the host's PID
// namespace and network.
type Config struct {
	// Address of this node's kubelet. "https://$NODE_IP:10250" uses the environment,
	// which the downward API can fill. "http://127.0.0.1:10255" is the read-only port,
	// where the kubelet has one: whoever listens there is believed.
	Kubelet string `yaml:"kubelet" default:"https://127.0.0.1:10250"`
	// Name of this node, which the kubelet's certificate must have; by default the
	// environment's NODE_NAME, else the host's name.
	NodeName string `yaml:"node_name"`
	// PEM file of the CAs that issue the kubelet's certificate, read again at each
	// call. By default the cluster's CA, from the folder of the service account, and,
	// if it is there, the certificate that the kubelet has made for itself, as kubeadm
	// sets it up: /var/lib/kubelet/pki/kubelet.crt. There is no way to believe any
	// certificate.
	KubeletCA string `yaml:"kubelet_ca" default:"the cluster's CA and the kubelet's own certificate"`
	// File of the agent's service account token, read again at each call. It needs the
	// right to get nodes/pods (Kubernetes 1.33 and newer) or nodes/proxy.
	TokenFile string `yaml:"token_file" default:"/var/run/secrets/kubernetes.io/serviceaccount/token"`
	// Unix socket of the container runtime (CRI); by default the first of the usual
	// ones of containerd, CRI-O, K3s, k0s, MicroK8s and cri-dockerd that answers.
	RuntimeSocket string `yaml:"runtime_socket"`
	// Where the host's cgroup file system is mounted: new pods are seen there.
	CgroupRoot string `yaml:"cgroup_root" default:"/sys/fs/cgroup"`
	// How often the kubelet and the runtime are asked for what no event tells, such as
	// changed labels.
	Reconcile config.Duration `yaml:"reconcile" default:"30s"`
}

// SettingError says which setting is wrong.
type SettingError struct{ Setting, Message string }

// Error implements error.
func (e *SettingError) Error() string { return e.Setting + ": " + e.Message }

// complete fills in the defaults and refuses what cannot be meant.
func (c *Config) complete() error {
	for _, d := range []struct {
		field     *string
		otherwise string
	}{{&c.Kubelet, defaultKubelet}, {&c.TokenFile, defaultToken}, {&c.CgroupRoot, defaultCgroupRoot}} {
		if *d.field == "" {
			*d.field = d.otherwise
		}
	}
	if strings.Contains(c.Kubelet, "$NODE_IP") {
		ip := os.Getenv("NODE_IP")
		if ip == "" {
			return &SettingError{"kubelet", "the environment has no NODE_IP; set it from status.hostIP, or write an address"}
		}
		if strings.Contains(ip, ":") {
			ip = "[" + ip + "]"
		}
		c.Kubelet = strings.ReplaceAll(c.Kubelet, "$NODE_IP", ip)
	}
	u, err := url.Parse(c.Kubelet)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return &SettingError{"kubelet", fmt.Sprintf("%.100q is no address of a kubelet; write https://HOST:10250", c.Kubelet)}
	}
	c.Kubelet = u.Scheme + "://" + u.Host
	if c.NodeName == "" {
		c.NodeName = os.Getenv("NODE_NAME")
	}
	if c.NodeName == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("find the host's name for node_name: %w", err)
		}
		c.NodeName = strings.ToLower(host)
	}
	d := c.Reconcile.Or(defaultReconcile)
	if d < time.Second || d > time.Hour {
		return &SettingError{"reconcile", fmt.Sprintf("%v is out of range; write a duration from 1s to 1h", d)}
	}
	c.Reconcile = config.Duration(d)
	return nil
}

// Attestor attests containers of pods. It is safe for concurrent use.
type Attestor struct {
	config    Config
	runtime   *runtime
	kubelet   *kubelet
	pods      *pods
	index     *container.Index
	wanted    wanted
	processes container.Processes
	wait      time.Duration // maxWait
	logger    *slog.Logger
	metrics   *metrics
}

// New returns the attestor. It needs neither kubelet nor runtime to be there yet,
// and Attest works without Watch, only slower. An error may be a *SettingError.
func New(c Config, logger *slog.Logger, reg prometheus.Registerer) (*Attestor, error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	m, err := newMetrics(reg)
	if err != nil {
		return nil, fmt.Errorf("k8s: %w", err)
	}
	if strings.HasPrefix(c.Kubelet, "http:") {
		logger.Warn("whoever answers at the kubelet's read-only port is believed: use its port with TLS, and kubelet_ca", "address", c.Kubelet)
	}
	a := &Attestor{
		config:    c,
		runtime:   newRuntime(c.RuntimeSocket, m),
		kubelet:   newKubelet(c, m),
		processes: container.Kernel{},
		wait:      maxWait,
		logger:    logger,
		metrics:   m,
	}
	a.pods = newPods(a.kubelet.pods, m)
	a.index = container.NewIndex(a.load, m.containers)
	return a, nil
}

// Check asks the kubelet and the container runtime once, and says what they know. Its
// errors say what to change.
func (a *Attestor) Check(ctx context.Context) (string, error) {
	pods, err := a.kubelet.pods(ctx)
	if err != nil {
		return "", err
	}
	ids, err := a.runtime.list(ctx)
	if err != nil {
		return "", fmt.Errorf("%w; see that the runtime runs, that the folder of its socket is mounted, and that runtime_socket names it", err)
	}
	return fmt.Sprintf("the kubelet at %s has %d pods, the container runtime %d containers", a.config.Kubelet, len(pods), len(ids)), nil
}

// Name returns "k8s".
func (*Attestor) Name() string { return Name }

// Close forgets all containers and closes connections. Watch has returned before.
func (a *Attestor) Close() error {
	a.pods.close()
	return errors.Join(a.runtime.close(), a.index.Close())
}

// Attest returns the facts about p's container, or attest.ErrNotMine if p is in
// none of this node's pods. The facts must not be modified.
func (a *Attestor) Attest(ctx context.Context, p *peer.Peer) (*attest.Facts, error) {
	memberships, err := container.Read(a.processes, p)
	if err != nil {
		return nil, fmt.Errorf("k8s: %w", err)
	}
	c, err := a.find(ctx, p, memberships)
	if errors.Is(err, attest.ErrNotMine) {
		// A process in a pod's cgroup is in a pod, or wants to pass for one. It is not
		// left with what others know of it because the runtime is slow.
		if uid, ok := podOf(memberships); ok {
			a.askAgain(memberships)
			return nil, fmt.Errorf("k8s: process %d is in the cgroup of pod %s, and the container runtime knows no such container: try again", p.PID, uid)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("k8s: %w", err)
	}
	if pod := a.pods.get(c.Workload.GetK8S().GetPodUid()); pod.over() {
		return nil, fmt.Errorf("k8s: process %d: pod %s/%s has ended (phase %s), and its containers are being stopped", p.PID, pod.namespace, pod.name, pod.phase)
	}
	return &attest.Facts{Workload: c.Workload, Instance: c.Instance, Rank: attest.RankContainer}, nil
}

// find finds the container of a process that waits for it. The runtime may take longer
// to say that it has been started than the one who asked it first would wait.
func (a *Attestor) find(ctx context.Context, p *peer.Peer, memberships container.Memberships) (*container.Container, error) {
	ids, err := memberships.Candidates()
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", p.PID, err)
	}
	for _, id := range ids {
		defer a.wanted.hold(id, true, nil)()
	}
	for {
		c, err := a.index.Find(ctx, p, memberships)
		if !errors.Is(err, errCreated) || ctx.Err() != nil {
			return c, err
		}
	}
}

// askAgain makes the next question about the containers that the memberships name
// go to the runtime.
func (a *Attestor) askAgain(memberships container.Memberships) {
	ids, err := memberships.Candidates()
	if err != nil {
		return
	}
	for _, id := range ids {
		a.index.Forget(id)
	}
}
