// Package placement answers the CA's question whether a workload runs on the node whose
// agent asks for it, by what Kubernetes itself says: an agent that was taken over gets
// the identities of pods that are bound to its node, and no others. It judges by what
// is in memory; it neither issues nor records anything.
package placement

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/server"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// Policy says whom to believe.
type Policy int

// Policies of a cluster. The zero value refuses most.
const (
	// Strict: only what the API server says counts. While it cannot be heard, nothing
	// of the cluster is issued.
	Strict Policy = iota
	// Seen: while the API server cannot be heard, agents are believed about pods that
	// were seen on their node before; see also Recall.
	Seen
	// Off: agents are believed.
	Off
)

// maxUID bounds a UID that an agent sends; those of Kubernetes have 36 bytes.
const maxUID = 128

// DefaultWait is how long a pod is waited for that the API server has not told of yet.
const DefaultWait = time.Second

// Cluster is one cluster.
type Cluster struct {
	// Name, as node.k8s.cluster has it.
	Name string
	// Pods are its pods; nil if Policy is Off.
	Pods   *kube.Pods
	Policy Policy
	// NodeLabel is the label that an operator gives to nodes of this cluster that have not
	// proven to be ones; its value is the node's name in the cluster. Empty for none.
	NodeLabel string
	// StaticPods are the namespaces of whose static pods nodes are believed: all that the
	// cluster says of such a pod, its node has written.
	StaticPods []string
}

// Config is what a Placement knows.
type Config struct {
	Clusters []Cluster
	// BelieveOthers has agents believed on nodes that are of none of the clusters.
	BelieveOthers bool
	// Wait bounds how long a batch waits for pods that are not known yet; DefaultWait by
	// default.
	Wait time.Duration
	// Registerer gets the metrics; nil for none.
	Registerer prometheus.Registerer
}

// Placement is a server.Placement by what clusters say.
type Placement struct {
	config  Config
	metrics *metrics
	// recalled are by the name of their cluster, until it is heard.
	recalled map[string]*atomic.Pointer[recalled]
}

var _ server.Placement = (*Placement)(nil)

// New returns a placement by the clusters, each of which is run by the caller.
func New(c Config) (*Placement, error) {
	if c.Wait == 0 {
		c.Wait = DefaultWait
	}
	m, err := newMetrics(c.Registerer)
	p := &Placement{config: c, metrics: m, recalled: make(map[string]*atomic.Pointer[recalled], len(c.Clusters))}
	for _, cluster := range c.Clusters {
		p.recalled[cluster.Name] = new(atomic.Pointer[recalled])
	}
	return p, err
}

// Place implements server.Placement. Names are checked against UIDs wherever there are
// both, since a name can be given again.
func (p *Placement) Place(ctx context.Context, node *attributesv1.Node, workloads []*attributesv1.Workload) []server.Placed {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, p.config.Wait)
	defer cancel()
	judge := p.judgeOf(ctx, node)
	placed := make([]server.Placed, len(workloads))
	for i, w := range workloads {
		placed[i] = judge(w)
		p.metrics.verdicts[placed[i].Verdict].Inc()
	}
	p.metrics.duration.Observe(time.Since(began).Seconds())
	return placed
}

func refuted(format string, args ...any) server.Placed {
	return server.Placed{Verdict: server.PlacementRefuted, Why: fmt.Sprintf(format, args...)}
}

func unknown(format string, args ...any) server.Placed {
	return server.Placed{Verdict: server.PlacementUnknown, Why: fmt.Sprintf(format, args...)}
}

// judgeOf returns who judges the workloads of a node.
func (p *Placement) judgeOf(ctx context.Context, node *attributesv1.Node) func(*attributesv1.Workload) server.Placed {
	always := func(answer server.Placed) func(*attributesv1.Workload) server.Placed {
		return func(*attributesv1.Workload) server.Placed { return answer }
	}
	cluster, name, uid, why := p.locate(node)
	switch {
	case cluster == nil && p.config.BelieveOthers:
		return always(server.Placed{Verdict: server.PlacementClaimed, Why: why})
	case cluster == nil:
		return always(refuted("%s", why))
	case cluster.Policy == Off:
		return always(server.Placed{Verdict: server.PlacementClaimed, Why: "placement is off for cluster " + cluster.Name})
	}
	j := &judge{cluster: cluster, node: name, nodeUID: uid, recalled: p.recalled[cluster.Name]}
	j.ctx, j.why = ctx, cluster.behind()
	if j.why == nil && j.recalled.Load() != nil {
		j.recalled.Store(nil) // nothing counts any more but what the cluster says
	}
	if j.why != nil && !errors.Is(j.why, kube.ErrReading) {
		// Nothing that is waited for would come.
		var cancel context.CancelFunc
		j.ctx, cancel = context.WithCancel(ctx)
		cancel()
	}
	if uid != "" {
		cluster.Pods.AwaitNode(j.ctx, name)
	}
	return j.place
}

// locate says which node of which cluster a node is; why there is none, if it is of none.
func (p *Placement) locate(node *attributesv1.Node) (cluster *Cluster, name, uid, why string) {
	if k := node.GetK8S(); k != nil {
		for i := range p.config.Clusters {
			if c := &p.config.Clusters[i]; c.Name == k.GetCluster() {
				return c, k.GetName(), k.GetUid(), ""
			}
		}
		return nil, "", "", fmt.Sprintf("cluster %q is not one of those whose API servers are asked", k.GetCluster())
	}
	for i := range p.config.Clusters {
		c := &p.config.Clusters[i]
		if name := node.GetLabels()[c.NodeLabel]; c.NodeLabel != "" && name != "" {
			return c, name, "", ""
		}
	}
	return nil, "", "", "the node is not known to be one of a cluster"
}

// behind says why what is known of the cluster may be old; nil if it is not.
func (c *Cluster) behind() error {
	since, why := c.Pods.Behind(time.Now())
	if why == nil || errors.Is(why, kube.ErrReading) {
		return why
	}
	return fmt.Errorf("the API server of cluster %s has not been heard since %s: %w", c.Name, since.UTC().Format(time.RFC3339), why)
}

// judge judges the workloads of one node.
type judge struct {
	cluster  *Cluster
	node     string
	nodeUID  string // empty if only the name is known
	recalled *atomic.Pointer[recalled]
	ctx      context.Context //nolint:containedctx // of one call; done if nothing is waited for
	why      error           // why the cluster was behind when the call began
}

func (j *judge) place(w *attributesv1.Workload) server.Placed {
	claimed := w.GetK8S()
	uid := claimed.GetPodUid()
	if uid == "" || len(uid) > maxUID {
		return refuted("the agent names no pod")
	}
	// Once a pod is bound it stays on its node, so that another node is an answer.
	pod, deleted := j.cluster.Pods.AwaitPod(j.ctx, j.node, uid, func(pod *kube.Pod) bool {
		return pod.Node() != "" && (pod.Node() != j.node || differs(pod, claimed) == "")
	})
	behind := j.why
	if behind != nil {
		behind = j.cluster.behind() // which it may not be any more
	}
	nodeUID := j.cluster.Pods.NodeUID(j.node)
	switch {
	case j.nodeUID != "" && nodeUID != "" && nodeUID != j.nodeUID:
		return refuted("node %s of cluster %s is another one by now: its UID is %s, that of the attested one was %s", j.node, j.cluster.Name, nodeUID, j.nodeUID)
	case j.nodeUID != "" && nodeUID == "" && behind == nil:
		return unknown("cluster %s has no node %s", j.cluster.Name, j.node)
	case deleted:
		return refuted("pod %s was deleted", uid)
	case pod == nil && behind != nil:
		return j.unseen(w, behind)
	case pod == nil:
		return unknown("cluster %s has no pod %s", j.cluster.Name, uid)
	case pod.Node() == "":
		return unknown("pod %s is not bound to a node yet", uid)
	case pod.Node() != j.node:
		return refuted("pod %s runs on node %s", uid, pod.Node())
	case pod.Namespace() != claimed.GetNamespace() || pod.Name != claimed.GetPodName() || pod.ServiceAccount() != claimed.GetServiceAccount():
		return refuted("pod %s is %s/%s with service account %q", uid, pod.Namespace(), pod.Name, pod.ServiceAccount())
	case pod.Over(time.Now()):
		return refuted("pod %s has ended", uid)
	case pod.Static() && !slices.Contains(j.cluster.StaticPods, pod.Namespace()):
		return refuted("pod %s/%s is a static pod, of which node %s could say anything: write static_pods: [%s] for the cluster if its nodes are to be believed",
			pod.Namespace(), pod.Name, j.node, pod.Namespace())
	case behind != nil && j.cluster.Policy == Strict:
		return unknown("%v", behind)
	case behind != nil:
		return server.Placed{Verdict: server.PlacementClaimed, Workload: facts(w, pod), Why: behind.Error()}
	case differs(pod, claimed) != "":
		return unknown("pod %s %s", uid, differs(pod, claimed))
	case pod.Static():
		return server.Placed{Verdict: server.PlacementClaimed, Workload: facts(w, pod), Why: "it is a static pod, and its node's word"}
	default:
		return server.Placed{Verdict: server.PlacementVerified, Workload: facts(w, pod)}
	}
}

// differs says in what the cluster does not know the container that an agent claims; empty
// if it does. Its id is compared once the node has reported one. What was reported before
// a restart differs until the node has reported again.
func differs(pod *kube.Pod, claimed *attributesv1.Kubernetes) string {
	if claimed.GetContainer() == "" {
		return ""
	}
	c, ok := pod.Container(claimed.GetContainer())
	switch {
	case !ok:
		return fmt.Sprintf("has no container %.64s", claimed.GetContainer())
	case c.ID != "" && !is(c, claimed):
		return fmt.Sprintf("has %.64s for its container %s, and not %.64s", c.ID, claimed.GetContainer(), claimed.GetContainerId())
	case claimed.GetImage() != "" && claimed.GetImage() != c.Image() && (claimed.GetImage() != c.RunsImage() || !is(c, claimed)):
		return fmt.Sprintf("asks for the image %.256s in its container %s, and not for %.256s", c.Image(), claimed.GetContainer(), claimed.GetImage())
	default:
		return ""
	}
}

// is says whether the agent means the container that its node has reported.
func is(c kube.Container, claimed *attributesv1.Kubernetes) bool {
	return claimed.GetContainerId() == "" || claimed.GetContainerId() == c.ID
}

// Facts are what the API server says of a pod as a whole.
func Facts(pod *kube.Pod) *attributesv1.Kubernetes {
	k := &attributesv1.Kubernetes{
		Namespace: pod.Namespace(), ServiceAccount: pod.ServiceAccount(), PodName: pod.Name, PodUid: pod.UID, Labels: pod.Labels(),
	}
	k.OwnerKind, k.OwnerName, k.OwnerUid = pod.Owner()
	return k
}

// facts are those to judge a workload by: of its pod, what the API server says. The UID
// stays the one that the node knows the pod by. The image is the one that the pod asks
// for, or unknown: a node can report any other.
func facts(w *attributesv1.Workload, pod *kube.Pod) *attributesv1.Workload {
	claimed, k := w.GetK8S(), Facts(pod)
	k.PodUid = claimed.GetPodUid()
	if c, ok := pod.Container(claimed.GetContainer()); ok {
		k.Container, k.ContainerId = claimed.GetContainer(), claimed.GetContainerId()
		if claimed.GetImage() == c.Image() { // else it is a name that the node has reported, and its word alone
			k.Image = c.Image()
		}
		k.ImageDigest = claimed.GetImageDigest() // until the node has reported it to the cluster
		if c.ImageDigest() != "" && is(c, claimed) {
			k.ImageDigest = c.ImageDigest()
		}
	}
	placed := proto.CloneOf(w)
	placed.K8S = k
	return placed
}
