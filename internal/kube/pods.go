package kube

import (
	"cmp"
	"context"
	"iter"
	"maps"
	"strings"
	"sync"
	"time"
	"unique"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// graceSlack is how long after the end of its grace a pod that is being deleted still
	// counts as there: the clocks of the cluster and of this machine differ, and its last
	// container ends a little later.
	graceSlack = 30 * time.Second
	// tombstoneLife is how long a pod's UID is remembered after the pod was deleted, and
	// maxTombstones how many: later, and beyond, it is one that was never heard of.
	tombstoneLife = 10 * time.Minute
	maxTombstones = 1 << 16
	// maxWaiting bounds the calls that wait for pods at the same time, maxWaitingNode
	// those of one node, so that a node that makes UIDs up takes nobody's place.
	maxWaiting     = 1 << 14
	maxWaitingNode = 1 << 9
)

// text is a string that many pods have in common, and that is kept once.
type text = unique.Handle[string]

// Pod is what the cluster says of a pod. It does not change.
type Pod struct {
	// UID is the API server's.
	UID string
	// StaticUID is the UID that the node knows a static pod by, which its kubelet made
	// from a file; empty for other pods.
	StaticUID string
	Name      string

	namespace, serviceAccount, node text
	ownerKind, ownerName, ownerUID  text
	labels                          []label
	containers                      []Container
	finished, static                bool
	// Unix seconds: when it was made, and when its grace ends, if it is being deleted.
	made, ends int64
}

type label struct{ key, value text }

// Container is one of a pod's containers, also one that only initializes or debugs it.
type Container struct {
	name, image, runs, digest text
	// ID is the container's in the runtime, without the runtime's name; empty until the
	// node has reported it.
	ID string
}

// Image is the image reference that the pod asks for. It can be changed while the
// container runs.
func (c Container) Image() string { return c.image.Value() }

// RunsImage is the runtime's name of the image that runs, as the node has reported it;
// empty until then.
func (c Container) RunsImage() string { return c.runs.Value() }

// ImageDigest is "sha256:" and 64 hexadecimal digits, as the node has reported it;
// empty until then.
func (c Container) ImageDigest() string { return c.digest.Value() }

// Namespace of the pod.
func (p *Pod) Namespace() string { return p.namespace.Value() }

// ServiceAccount is its name; empty for a static pod.
func (p *Pod) ServiceAccount() string { return p.serviceAccount.Value() }

// Static says whether the cluster's object is a node's own word: a kubelet that runs a pod
// from a file writes the object for it, with the namespace, name and labels that it likes.
// It cannot write a service account into it, which all other pods have.
func (p *Pod) Static() bool { return p.static }

// Node is the name of the node that the pod is bound to; empty before that.
func (p *Pod) Node() string { return p.node.Value() }

// Labels returns a copy of the pod's labels.
func (p *Pod) Labels() map[string]string {
	labels := make(map[string]string, len(p.labels))
	for _, l := range p.labels {
		labels[l.key.Value()] = l.value.Value()
	}
	return labels
}

// Owner returns the controller that made the pod; all are empty if none did.
func (p *Pod) Owner() (kind, name, uid string) {
	return p.ownerKind.Value(), p.ownerName.Value(), p.ownerUID.Value()
}

// Container returns the container of that name.
func (p *Pod) Container(name string) (Container, bool) {
	for _, c := range p.containers {
		if c.name.Value() == name {
			return c, true
		}
	}
	return Container{}, false
}

// Over says whether the pod runs no more: all its containers have ended for good, or it
// was to be gone by now. A pod whose deletion was asked for is not over before its grace
// is.
func (p *Pod) Over(now time.Time) bool {
	return p.finished || p.ends != 0 && now.After(time.Unix(p.ends, 0).Add(graceSlack))
}

// podObject are the fields of a pod that are looked at.
type podObject struct {
	Object
	Spec struct {
		NodeName            string          `json:"nodeName"`
		ServiceAccountName  string          `json:"serviceAccountName"`
		InitContainers      []specContainer `json:"initContainers"`
		Containers          []specContainer `json:"containers"`
		EphemeralContainers []specContainer `json:"ephemeralContainers"`
	} `json:"spec"`
	Status struct {
		Phase               string            `json:"phase"`
		InitContainers      []statusContainer `json:"initContainerStatuses"`
		Containers          []statusContainer `json:"containerStatuses"`
		EphemeralContainers []statusContainer `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

type specContainer struct {
	Name  string `json:"name"`
	Image string `json:"image"`
}

type statusContainer struct {
	Name        string `json:"name"`
	Image       string `json:"image"`
	ImageID     string `json:"imageID"`
	ContainerID string `json:"containerID"`
}

// mirrorAnnotation is on the API's copy of a static pod, and is the UID that the node
// knows it by.
const mirrorAnnotation = "kubernetes.io/config.mirror"

// newPod keeps what is needed of a pod.
func newPod(o *podObject) *Pod {
	m := &o.Metadata
	p := &Pod{
		UID: m.UID, Name: m.Name,
		namespace: unique.Make(m.Namespace), serviceAccount: unique.Make(o.Spec.ServiceAccountName), node: unique.Make(o.Spec.NodeName),
		finished: o.Status.Phase == "Succeeded" || o.Status.Phase == "Failed",
	}
	var controller Owner
	for _, owner := range m.OwnerReferences {
		if owner.Controller {
			controller = owner
		}
	}
	p.ownerKind, p.ownerName, p.ownerUID = unique.Make(controller.Kind), unique.Make(controller.Name), unique.Make(controller.UID)
	// Whoever may create pods may also write the annotation. What makes it true is that
	// the node is the pod's controller, which only the node itself may say (admission
	// plug-in NodeRestriction), and then of pods without service account only.
	if uid := m.Annotations[mirrorAnnotation]; uid != "" && controller.Kind == "Node" && controller.Name == o.Spec.NodeName && o.Spec.ServiceAccountName == "" {
		p.StaticUID = uid
	}
	p.static = m.Annotations[mirrorAnnotation] != "" || o.Spec.ServiceAccountName == ""
	if m.CreationTimestamp != nil {
		p.made = m.CreationTimestamp.Unix()
	}
	if m.DeletionTimestamp != nil {
		p.ends = m.DeletionTimestamp.Unix()
	}
	p.labels = make([]label, 0, len(m.Labels))
	for key, value := range m.Labels {
		p.labels = append(p.labels, label{unique.Make(key), unique.Make(value)})
	}
	p.containers = make([]Container, 0, len(o.Spec.InitContainers)+len(o.Spec.Containers)+len(o.Spec.EphemeralContainers))
	for _, kind := range []struct {
		spec   []specContainer
		status []statusContainer
	}{
		{o.Spec.InitContainers, o.Status.InitContainers},
		{o.Spec.Containers, o.Status.Containers},
		{o.Spec.EphemeralContainers, o.Status.EphemeralContainers},
	} {
		for _, c := range kind.spec {
			kept := Container{name: unique.Make(c.Name), image: unique.Make(c.Image), runs: unique.Make(""), digest: unique.Make("")}
			for _, s := range kind.status {
				if s.Name == c.Name {
					kept.ID, kept.runs, kept.digest = containerID(s.ContainerID), unique.Make(s.Image), unique.Make(imageDigest(s.ImageID))
				}
			}
			p.containers = append(p.containers, kept)
		}
	}
	return p
}

// containerID cuts the runtime's name off: "containerd://4f2c…".
func containerID(id string) string {
	_, id, _ = strings.Cut(id, "://")
	return id
}

// imageDigest takes the content address out of what a runtime says an image is:
// "registry.internal/shop/web@sha256:…", or only "sha256:…".
func imageDigest(id string) string {
	if i := strings.LastIndexAny(id, "@/"); i >= 0 {
		id = id[i+1:]
	}
	if digest, ok := strings.CutPrefix(id, "sha256:"); ok && len(digest) == 64 {
		return id
	}
	return ""
}

// Pods follows the pods and nodes of a cluster. Its methods may be called concurrently.
//
// Only the API server makes anything of it go: while it cannot be heard, all that was
// known stays known, and State says since when it may be old.
type Pods struct {
	pods, nodes *Feed

	mu sync.RWMutex // guards what follows; what the maps point to does not change
	// byUID is of all pods, byNode of those of each node, byStatic of its static pods by
	// the UID that it knows them by.
	byUID    map[string]*Pod
	byNode   map[text]map[string]*Pod
	byStatic map[staticKey]*Pod
	// nodeUIDs is of all nodes, by name.
	nodeUIDs map[string]string
	gone     tombstones
	// waiting has what is closed when a pod or a node changes; waits counts the calls of
	// each node that wait.
	waiting map[string]*waiter
	waits   map[string]int
	total   int
}

type staticKey struct {
	node text
	uid  string
}

// waiter is who waits for one pod or node.
type waiter struct {
	changed chan struct{}
	calls   int
}

// NewPods returns what follows the pods and nodes of a client's cluster, which must let
// it list and watch both. It registers its metrics; reg may be nil.
func NewPods(c *Client, reg prometheus.Registerer) (*Pods, error) {
	p := newPods()
	p.pods = Follow(c, Path{Resource: Resource{Version: "v1", Plural: "pods"}}, FollowOptions{}, newPod, Reader[*Pod](podReader{p}))
	p.nodes = Follow(c, Path{Resource: Resource{Version: "v1", Plural: "nodes"}}, FollowOptions{MetadataOnly: true},
		func(o *Object) nodeName { return nodeName{o.Metadata.Name, o.Metadata.UID} }, Reader[nodeName](nodeReader{p}))
	return p, p.register(c.name, reg)
}

func newPods() *Pods {
	return &Pods{
		byUID: map[string]*Pod{}, byNode: map[text]map[string]*Pod{}, byStatic: map[staticKey]*Pod{}, nodeUIDs: map[string]string{},
		waiting: map[string]*waiter{}, waits: map[string]int{},
	}
}

// Run follows until ctx ends.
func (p *Pods) Run(ctx context.Context) {
	var both sync.WaitGroup
	both.Go(func() { p.pods.Run(ctx) })
	both.Go(func() { p.nodes.Run(ctx) })
	both.Wait()
}

// State returns how far the pods and the nodes are.
func (p *Pods) State() (pods, nodes FeedState) { return p.pods.State(), p.nodes.State() }

// Behind says since when what is known may be old, and why; nil if it is not.
func (p *Pods) Behind(now time.Time) (since time.Time, why error) {
	pods, nodes := p.State()
	if since, why = pods.Behind(now); why != nil {
		return since, why
	}
	return nodes.Behind(now)
}

// Len returns how many pods and nodes are known.
func (p *Pods) Len() (pods, nodes int) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return len(p.byUID), len(p.nodeUIDs)
}

// Find returns the pod with a UID; where a static pod of the node has it, that. Nil if
// there is none: was says whether there was one, which was deleted.
func (p *Pods) Find(node, uid string) (found *Pod, was bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.find(node, uid)
}

func (p *Pods) find(node, uid string) (found *Pod, was bool) {
	if found = p.byUID[uid]; found == nil {
		found = p.byStatic[staticKey{unique.Make(node), uid}]
	}
	return found, found == nil && p.gone.has(uid, time.Now())
}

// NodeUID returns the UID of the node of that name; empty if there is none.
func (p *Pods) NodeUID(name string) string {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.nodeUIDs[name]
}

// OnNode returns the pods that are bound to a node. What it returns may be iterated
// while pods come and go.
func (p *Pods) OnNode(name string) iter.Seq[*Pod] {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return maps.Values(maps.Clone(p.byNode[unique.Make(name)]))
}

// AwaitPod is Find that waits until the pod is known and satisfies until, or is known
// to be deleted, or ctx ends. It does not wait if too many do already.
func (p *Pods) AwaitPod(ctx context.Context, node, uid string, until func(*Pod) bool) (found *Pod, was bool) {
	p.await(ctx, node, uid, func() bool {
		found, was = p.find(node, uid)
		return was || found != nil && until(found)
	})
	return found, was
}

// AwaitNode is NodeUID that waits until the node is known, or ctx ends.
func (p *Pods) AwaitNode(ctx context.Context, name string) (uid string) {
	p.await(ctx, name, nodeKey(name), func() bool {
		uid = p.nodeUIDs[name]
		return uid != ""
	})
	return uid
}

// AwaitAccount returns a pod of a service account that runs on a node: of several the
// oldest, so that it is the same one while it runs. It waits until there is one, or ctx
// ends, and then returns nil.
func (p *Pods) AwaitAccount(ctx context.Context, node, namespace, serviceAccount string) (oldest *Pod) {
	p.await(ctx, node, podsKey(node), func() bool {
		oldest = nil
		now := time.Now()
		for _, pod := range p.byNode[unique.Make(node)] {
			if pod.Namespace() != namespace || pod.ServiceAccount() != serviceAccount || pod.Over(now) {
				continue
			}
			if oldest == nil || cmp.Or(cmp.Compare(pod.made, oldest.made), cmp.Compare(pod.UID, oldest.UID)) < 0 {
				oldest = pod
			}
		}
		return oldest != nil
	})
	return oldest
}

// nodeKey and podsKey are those of a node and of any of its pods in waiting: no UID has
// a slash.
func nodeKey(name string) string { return "node/" + name }
func podsKey(node string) string { return "pods/" + node }

// await calls done, under the lock, until it is true: at once, and whenever what has the
// key changes.
func (p *Pods) await(ctx context.Context, node, key string, done func() bool) {
	for {
		p.mu.RLock()
		ok := done()
		p.mu.RUnlock()
		if ok || ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		if done() || p.total >= maxWaiting || p.waits[node] >= maxWaitingNode {
			p.mu.Unlock()
			return
		}
		w := p.waiting[key]
		if w == nil {
			w = &waiter{changed: make(chan struct{})}
			p.waiting[key] = w
		}
		w.calls++
		p.waits[node]++
		p.total++
		p.mu.Unlock()
		select {
		case <-w.changed:
		case <-ctx.Done():
		}
		p.mu.Lock()
		p.total--
		if p.waits[node]--; p.waits[node] == 0 {
			delete(p.waits, node)
		}
		if w.calls--; w.calls == 0 && p.waiting[key] == w {
			delete(p.waiting, key)
		}
		p.mu.Unlock()
	}
}

// wake wakes who waits. The caller holds the lock.
func (p *Pods) wake(key string) {
	if len(p.waiting) == 0 {
		return
	}
	if w := p.waiting[key]; w != nil {
		delete(p.waiting, key)
		close(w.changed)
	}
}

// set puts a pod in the place of what had its UID. The caller holds the lock.
func (p *Pods) set(pod *Pod) {
	if old := p.byUID[pod.UID]; old != nil {
		p.remove(old)
	}
	p.byUID[pod.UID] = pod
	if pod.Node() != "" {
		if p.byNode[pod.node] == nil {
			p.byNode[pod.node] = map[string]*Pod{}
		}
		p.byNode[pod.node][pod.UID] = pod
		p.wake(podsKey(pod.Node()))
	}
	p.wake(pod.UID)
	if pod.StaticUID != "" {
		p.byStatic[staticKey{pod.node, pod.StaticUID}] = pod
		p.wake(pod.StaticUID)
	}
}

// remove takes a pod out. The caller holds the lock.
func (p *Pods) remove(pod *Pod) {
	delete(p.byUID, pod.UID)
	delete(p.byNode[pod.node], pod.UID)
	if len(p.byNode[pod.node]) == 0 {
		delete(p.byNode, pod.node)
	}
	if key := (staticKey{pod.node, pod.StaticUID}); p.byStatic[key] == pod {
		delete(p.byStatic, key)
	}
}

// deleted takes a pod out that was deleted. The caller holds the lock.
func (p *Pods) deleted(uid string, now time.Time) {
	if pod := p.byUID[uid]; pod != nil {
		p.remove(pod)
	}
	p.gone.add(uid, now)
	p.wake(uid)
}

// podReader is the Reader of the pods.
type podReader struct{ *Pods }

// Set implements Reader.
func (p podReader) Set(pod *Pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(pod)
}

// Delete implements Reader.
func (p podReader) Delete(pod *Pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deleted(pod.UID, time.Now())
}

// Replace implements Reader.
func (p podReader) Replace(all []*Pod) {
	listed := make(map[string]bool, len(all))
	for _, pod := range all {
		listed[pod.UID] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for uid := range p.byUID {
		if !listed[uid] {
			p.deleted(uid, now)
		}
	}
	for _, pod := range all {
		p.set(pod)
	}
}

// nodeName is what is kept of a node.
type nodeName struct{ name, uid string }

// nodeReader is the Reader of the nodes.
type nodeReader struct{ *Pods }

// Set implements Reader.
func (p nodeReader) Set(n nodeName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.nodeUIDs[n.name] = n.uid
	p.wake(nodeKey(n.name))
}

// Delete implements Reader.
func (p nodeReader) Delete(n nodeName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.nodeUIDs, n.name)
}

// Replace implements Reader.
func (p nodeReader) Replace(all []nodeName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.nodeUIDs)
	for _, n := range all {
		p.nodeUIDs[n.name] = n.uid
		p.wake(nodeKey(n.name))
	}
}

// tombstones are the UIDs of pods that were deleted lately.
type tombstones struct {
	at    map[string]time.Time
	order []tombstone // oldest first
}

type tombstone struct {
	uid string
	at  time.Time
}

func (t *tombstones) has(uid string, now time.Time) bool {
	at, ok := t.at[uid]
	return ok && now.Sub(at) < tombstoneLife
}

func (t *tombstones) add(uid string, now time.Time) {
	if t.at == nil {
		t.at = map[string]time.Time{}
	}
	t.at[uid] = now
	t.order = append(t.order, tombstone{uid, now})
	old := 0
	for old < len(t.order) && (now.Sub(t.order[old].at) >= tombstoneLife || len(t.order)-old > maxTombstones) {
		if at := t.at[t.order[old].uid]; at.Equal(t.order[old].at) {
			delete(t.at, t.order[old].uid)
		}
		old++
	}
	t.order = t.order[old:]
}
