package k8s

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// maxWait bounds how long a container is waited for on behalf of one who has no
// deadline himself.
const maxWait = 2 * time.Second

// The pauses between questions about a container that is being started, unless an event
// tells. As long as nobody waits for it they are long. Who asks on its behalf is a process
// of it, so that it has been started and the runtime is about to say so.
var (
	startBackoff  = backoff.Policy{Base: 100 * time.Millisecond, Max: time.Second}
	wantedBackoff = backoff.Policy{Base: 10 * time.Millisecond, Max: 40 * time.Millisecond}
)

// load asks the runtime for a container, the kubelet for its pod, and the kernel for
// its init process.
func (a *Attestor) load(ctx context.Context, id string) (*container.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, a.wait)
	defer cancel()
	r, err := a.started(ctx, id)
	if err != nil {
		return nil, err
	}
	p, err := a.pods.await(ctx, r.podUID, r.container)
	if err != nil {
		return nil, err
	}
	facts, err := facts(id, r, p)
	if err != nil {
		return nil, err
	}
	if owner, ok := a.pods.owner(id); ok && owner != p.uid {
		return nil, fmt.Errorf("the container runtime says that it is of pod %s, the kubelet that it is of pod %s", p.uid, owner)
	}
	init, err := a.processes.Open(r.pid, r.startedAt, id, r.sandbox)
	switch {
	case errors.Is(err, peer.ErrGone):
		return nil, fmt.Errorf("%w, or this agent does not see it: it needs the host's PID namespace (hostPID: true)", container.ErrEnded)
	case err != nil:
		return nil, err
	}
	c, err := container.New(id, Name+":"+id, facts, init)
	if err != nil {
		err = fmt.Errorf("%w, or this agent does not have the host's PID namespace (hostPID: true)", err)
	} else if uid, ok := podAround(c.Roots()); ok && uid != p.uid {
		err = fmt.Errorf("the container runtime says that it is of pod %s, its cgroup is in that of pod %s", p.uid, uid)
	}
	if err != nil {
		return nil, errors.Join(err, init.Process.Close())
	}
	return c, nil
}

// started asks for a container, again and again while it is being started.
func (a *Attestor) started(ctx context.Context, id string) (*running, error) {
	defer a.wanted.hold(id, false, nil)()
	tries, hurried := backoff.New(startBackoff), false
	for created := false; ; created = true {
		waited, made, news := a.wanted.look(id)
		if waited && !hurried {
			tries, hurried = backoff.New(wantedBackoff), true
		}
		r, err := a.runtime.container(ctx, id, made)
		cut := created && ctx.Err() != nil // what is known of it stays
		if !errors.Is(err, errCreated) && !cut {
			return r, err
		}
		pause := time.NewTimer(tries.Next())
		select {
		case <-pause.C:
		case <-news:
		case <-ctx.Done():
		}
		pause.Stop()
		if ctx.Err() != nil {
			return nil, errCreated
		}
	}
}

// wanted are containers that are being asked for, with what has become known of them
// meanwhile. It is safe for concurrent use.
type wanted struct {
	mu   sync.Mutex // guards what follows
	byID map[string]*want
}

type want struct {
	holders int
	waited  bool          // a process waits for it
	made    *task         // nil if no event has told
	news    chan struct{} // closed when one of the above is set
}

// hold notes a container until release is called: for one who asks for it, or for a
// process that waits for it, or because an event has told of it.
func (w *wanted) hold(id string, waits bool, made *task) (release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.byID == nil {
		w.byID = make(map[string]*want)
	}
	held := w.byID[id]
	if held == nil {
		held = &want{news: make(chan struct{})}
		w.byID[id] = held
	}
	held.holders++
	if waits && !held.waited || made != nil && held.made == nil {
		held.waited = held.waited || waits
		if held.made == nil {
			held.made = made
		}
		close(held.news)
		held.news = make(chan struct{})
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if held.holders--; held.holders == 0 {
			delete(w.byID, id)
		}
	}
}

// look returns what is known of a container that the caller holds. news is closed when
// there is more.
func (w *wanted) look(id string) (waited bool, made *task, news <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	held := w.byID[id]
	return held.waited, held.made, held.news
}

// facts are what is attested of a container.
func facts(id string, r *running, p *pod) (*attributesv1.Workload, error) {
	inPod, ok := p.containers[r.container]
	switch {
	case !ok:
		return nil, fmt.Errorf("pod %s/%s has no container %s", p.namespace, p.name, r.container)
	case p.namespace != r.namespace || p.name != r.podName:
		return nil, fmt.Errorf("the container runtime says that it is of pod %s/%s, the kubelet calls that pod %s/%s", r.namespace, r.podName, p.namespace, p.name)
	case p.refused != "":
		return nil, fmt.Errorf("pod %s/%s %s", p.namespace, p.name, p.refused)
	case p.over():
		return nil, fmt.Errorf("pod %s/%s has ended (phase %s)", p.namespace, p.name, p.phase)
	}
	return &attributesv1.Workload{K8S: &attributesv1.Kubernetes{
		Namespace: p.namespace, ServiceAccount: p.serviceAccount, PodName: p.name, PodUid: p.uid, Labels: p.labels,
		OwnerKind: p.owner.Kind, OwnerName: p.owner.Name, OwnerUid: p.owner.UID,
		Container: r.container, ContainerId: id, Image: r.reference(inPod), ImageDigest: r.digest,
	}}, nil
}

// again returns the facts of a known container by what the kubelet says of its pod
// now: what belongs to the run of the container stays.
func again(old *attributesv1.Workload, p *pod) *attributesv1.Workload {
	k := old.GetK8S()
	return &attributesv1.Workload{K8S: &attributesv1.Kubernetes{
		Namespace: p.namespace, ServiceAccount: p.serviceAccount, PodName: p.name, PodUid: p.uid, Labels: p.labels,
		OwnerKind: p.owner.Kind, OwnerName: p.owner.Name, OwnerUid: p.owner.UID,
		Container: k.GetContainer(), ContainerId: k.GetContainerId(), Image: k.GetImage(), ImageDigest: k.GetImageDigest(),
	}}
}
