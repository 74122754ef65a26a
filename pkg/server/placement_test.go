package server

import (
	"context"
	"strings"
	"testing"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// placements answers by the pod's UID; what it does not know has no answer.
type placements map[string]Placed

func (p placements) Place(_ context.Context, _ *attributesv1.Node, workloads []*attributesv1.Workload) []Placed {
	var answers []Placed
	for _, w := range workloads {
		answer, ok := p[w.GetK8S().GetPodUid()]
		if !ok {
			return answers
		}
		answers = append(answers, answer)
	}
	return answers
}

// What the platform says of a pod goes before what its node's agent says.
func TestPlacement(t *testing.T) {
	pod := func(uid, account string) *attributesv1.Workload {
		return &attributesv1.Workload{K8S: &attributesv1.Kubernetes{Namespace: "shop", ServiceAccount: account, PodUid: uid}}
	}
	h := newHouse(t, func(c *Config) {
		c.Placement = placements{
			"here":    {Verdict: PlacementVerified},
			"liar":    {Verdict: PlacementVerified, Workload: pod("liar", "web")},
			"away":    {Verdict: PlacementRefuted, Why: "pod away runs on node n2"},
			"trusted": {Verdict: PlacementClaimed, Why: "the informer is behind"},
			"new":     {Verdict: PlacementUnknown, Why: "pod new has not been seen"},
		}
	})
	h.apply(&entryv1.Entry{
		Name: "pods", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}", Workloads: "has(k8s.pod_uid)",
	}, &entryv1.Entry{
		Name: "host", SpiffeId: "spiffe://example.org/host", Workloads: "unix.uid == 7",
	})
	a := h.join("n1", nil)
	for _, c := range []struct {
		entry string
		w     *attributesv1.Workload
		id    string
		why   nodev1.Reason
		by    string
	}{
		{"pods", pod("here", "web"), "spiffe://example.org/ns/shop/sa/web", 0, "ca"},
		{"pods", pod("liar", "admin"), "spiffe://example.org/ns/shop/sa/web", 0, "ca"},
		{"pods", pod("away", "web"), "", nodev1.Reason_REASON_RULE_NOT_MATCHED, "agent"},
		{"pods", pod("trusted", "web"), "spiffe://example.org/ns/shop/sa/web", 0, "agent"},
		{"pods", pod("new", "web"), "", nodev1.Reason_REASON_UNAVAILABLE, "agent"},
		{"pods", pod("nobody", "web"), "", nodev1.Reason_REASON_UNAVAILABLE, "agent"},
		// Entries that do not rest on Kubernetes do not depend on it.
		{"host", &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 7}, K8S: pod("away", "web").GetK8S()}, "spiffe://example.org/host", 0, "agent"},
	} {
		item := a.item(c.entry, c.w)
		item.Instance = "k8s:" + c.w.GetK8S().GetPodUid()
		res := a.issue(item)[0]
		if res.GetSvid().GetSpiffeId() != c.id || res.GetRefusal().GetReason() != c.why {
			t.Errorf("pod %s: %v", c.w.GetK8S().GetPodUid(), res)
		}
		records := h.records(ledgerv1.Event_EVENT_ISSUE)
		last := records[len(records)-1]
		if last.GetVerifiedBy() != c.by || last.GetSpiffeId() != c.id {
			t.Errorf("pod %s: the record is %v", c.w.GetK8S().GetPodUid(), last)
		}
		if c.id == "" && last.GetReason() != reasonPlacement {
			t.Errorf("pod %s: the reason is %q", c.w.GetK8S().GetPodUid(), last.GetReason())
		}
		if uid := c.w.GetK8S().GetPodUid(); uid == "trusted" && !strings.Contains(last.GetDetail(), "behind") {
			t.Errorf("the record does not say that the agent was believed: %v", last)
		}
	}
}
