package placement

import (
	"fmt"
	"iter"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/pkg/server"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// A CA that starts while the API server of a cluster is away has seen none of its pods.
// What it needs to go on is in its own ledger, which cannot be changed unseen: who was
// verified by the cluster, where, and as what. It counts for as long as the X.509-SVID
// that was issued then is good, and for exactly those facts. So nobody gets more by a
// restart than to replace what he holds, for one life more, and a pod that was deleted
// before is gone when it would have been. What was only claimed does not count: else one
// claim could follow on another.

// Verified is a workload that its cluster had verified before this CA was started.
type Verified struct {
	Node     *attributesv1.Node
	Workload *attributesv1.Kubernetes
	// NotAfter is when the X.509-SVID ends that was issued to it.
	NotAfter time.Time
}

// maxRecalled bounds the containers that are recalled; what is beyond it is not known.
const maxRecalled = 1 << 16

type recalledKey struct{ node, nodeUID, podUID, container, containerID string }

// recalled are the workloads of one cluster.
type recalled map[recalledKey]Verified

// Recall has placement believe the agents about these workloads while their clusters have
// not been heard since the start, as the policy Seen says; it replaces what was recalled
// before. Of the same workload the last one counts.
func (p *Placement) Recall(all iter.Seq[Verified], now time.Time) {
	byCluster, total := make(map[string]recalled), 0
	for v := range all {
		cluster, node, nodeUID, _ := p.locate(v.Node)
		if cluster == nil || cluster.Policy != Seen || v.Workload.GetPodUid() == "" || !now.Before(v.NotAfter) {
			continue
		}
		workloads := byCluster[cluster.Name]
		if workloads == nil {
			workloads = make(recalled)
			byCluster[cluster.Name] = workloads
		}
		key := keyOf(node, nodeUID, v.Workload)
		if _, known := workloads[key]; !known {
			if total == maxRecalled {
				continue
			}
			total++
		}
		workloads[key] = v
	}
	for name, at := range p.recalled {
		workloads := byCluster[name]
		at.Store(&workloads)
	}
}

func keyOf(node, nodeUID string, w *attributesv1.Kubernetes) recalledKey {
	return recalledKey{node, nodeUID, w.GetPodUid(), w.GetContainer(), w.GetContainerId()}
}

// unseen judges a workload whose pod has not been seen, while the cluster is not heard.
func (j *judge) unseen(w *attributesv1.Workload, behind error) server.Placed {
	claimed := w.GetK8S()
	pods, _ := j.cluster.Pods.State()
	all := j.recalled.Load()
	if all == nil || pods.Synced {
		return unknown("pod %s has not been seen: %v", claimed.GetPodUid(), behind)
	}
	v, ok := (*all)[keyOf(j.node, j.nodeUID, claimed)]
	was := v.Workload
	switch {
	case !ok || !time.Now().Before(v.NotAfter):
		return unknown("pod %s has not been seen, and has no X.509-SVID from before this CA was started: %v", claimed.GetPodUid(), behind)
	case was.GetNamespace() != claimed.GetNamespace() || was.GetPodName() != claimed.GetPodName() || was.GetServiceAccount() != claimed.GetServiceAccount():
		return refuted("pod %s was %s/%s with service account %q", claimed.GetPodUid(), was.GetNamespace(), was.GetPodName(), was.GetServiceAccount())
	}
	placed := proto.CloneOf(w)
	placed.K8S = proto.CloneOf(was)
	return server.Placed{Verdict: server.PlacementClaimed, Workload: placed, Why: fmt.Sprintf(
		"it was verified before this CA was started, for an X.509-SVID that is good until %s; %v", v.NotAfter.UTC().Format(time.RFC3339), behind)}
}
