package server

import (
	"context"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// Placement knows from the platform itself, such as a Kubernetes API server, which
// workloads run on which node: an agent that was taken over cannot name a workload
// that is not there. It is called concurrently.
type Placement interface {
	// Place looks workloads up that the agent of a node says it has, and answers
	// each, in order. It answers from memory; only for what the platform has not told
	// of yet it may wait, for as long as its policy says, or until ctx ends.
	Place(ctx context.Context, node *attributesv1.Node, workloads []*attributesv1.Workload) []Placed
}

// PlacementFacts is the kind of facts that a Placement judges: only entries that use
// them are affected.
const PlacementFacts = "k8s"

// Placed is what the platform says of one workload.
type Placed struct {
	Verdict PlacementVerdict
	// Workload are the facts to judge by, where the platform's own are better than the
	// agent's; nil: as the agent sent them.
	Workload *attributesv1.Workload
	// Why the workload was refused, or the agent was believed.
	Why string
}

// PlacementVerdict says whose word it is that a workload runs on a node.
type PlacementVerdict int

// Verdicts of a Placement. The zero value refuses.
const (
	// PlacementUnknown: the platform's word cannot be had now. It is refused; the agent
	// may try again.
	PlacementUnknown PlacementVerdict = iota
	// PlacementRefuted: the workload is not on that node, or is not what the agent says.
	PlacementRefuted
	// PlacementVerified: the platform itself says so.
	PlacementVerified
	// PlacementClaimed: the agent is believed, as the policy says.
	PlacementClaimed
)

// place asks where the workloads of a batch run, as far as an entry depends on it:
// one answer an item, nil for the others.
func (b *batch) place(ctx context.Context, items []*nodev1.IssueItem) []*Placed {
	placement := b.s.cfg.Placement
	if placement == nil {
		return nil
	}
	var workloads []*attributesv1.Workload
	var of []int
	for i, item := range items {
		if item.GetWorkload().GetK8S() == nil || checkItem(item) != "" {
			continue
		}
		if entry, ok := b.entries.Set.Get(item.GetEntry()); ok && entry.Uses(PlacementFacts) {
			workloads, of = append(workloads, item.GetWorkload()), append(of, i)
		}
	}
	if len(workloads) == 0 {
		return nil
	}
	placed := make([]*Placed, len(items))
	answers := placement.Place(ctx, b.c.node.Attributes, workloads)
	for i, item := range of {
		placed[item] = new(Placed) // refuses, if there is no answer
		if i < len(answers) {
			placed[item] = &answers[i]
		}
	}
	return placed
}
