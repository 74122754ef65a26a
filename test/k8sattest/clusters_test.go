package k8sattest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	"github.com/meshid/meshid/pkg/placement"
	"github.com/meshid/meshid/pkg/server"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// oneOfTwo is one of two clusters in which everything has the same name.
type oneOfTwo struct {
	*testkube.APIServer
	name string
	pods *kube.Pods
	// agent is the pod of the node's agent, and cart another pod of the node.
	agent, cart testkube.Pod
	node        *attributesv1.Node
}

// token is one that the agent's pod has.
func (c *oneOfTwo) token(t *testing.T) string {
	t.Helper()
	return c.Token(t, c.agent, 10*time.Minute, "meshid")
}

// claim is what the agent says of its cart.
func (c *oneOfTwo) claim() []*attributesv1.Workload {
	return []*attributesv1.Workload{{K8S: &attributesv1.Kubernetes{
		Namespace: c.cart.Namespace, ServiceAccount: c.cart.ServiceAccount, PodName: c.cart.Name, PodUid: c.cart.UID,
	}}}
}

// known waits until the CA's side knows all that the cluster has.
func (c *oneOfTwo) known(t *testing.T) {
	t.Helper()
	local.Await(t, "wait until the pods of "+c.name+" are known", func(context.Context) error {
		_, why := c.pods.Behind(time.Now())
		for _, p := range []testkube.Pod{c.agent, c.cart} {
			if found, _ := c.pods.Find("node-1", p.UID); found == nil {
				why = errors.Join(why, errors.New(p.Name+" is not"))
			}
		}
		return why
	})
}

// C9 and E1 with two clusters, whose issuer, nodes, namespaces, service accounts and pods
// all have the same names: what is of one is never accepted for the other, and one that is
// away takes nothing from the other.
func TestV_C9_TwoClusters(t *testing.T) {
	const namespace, issuer = "meshid", "https://kubernetes.default.svc.cluster.local" // what installers write
	a, b := &oneOfTwo{name: "a"}, &oneOfTwo{name: "b"}
	for _, c := range []*oneOfTwo{a, b} {
		c.APIServer = testkube.StartAPIServer(t, "--service-account-issuer="+issuer)
	}
	verifiers := map[string][]k8spsat.Cluster{}
	var placed []placement.Cluster
	for _, c := range []*oneOfTwo{a, b} {
		review, client := reviewerOf(t, c.name, c.APIServer)
		c.pods = follow(t, client)
		c.agent = c.CreatePod(t, testkube.Pod{Namespace: namespace, Name: "agent-x", ServiceAccount: "agent", Node: "node-1"})
		c.cart = c.CreatePod(t, testkube.Pod{Namespace: "shop", Name: "cart-0", ServiceAccount: "cart", Node: "node-1"})
		c.known(t)
		for how, v := range map[string]kube.TokenVerifier{"by TokenReview": review, "offline": offline(t, c.APIServer)} {
			verifiers[how] = append(verifiers[how], k8spsat.Cluster{Config: k8spsat.ClusterConfig{Name: c.name}, Tokens: tokens{v}, Pods: c.pods})
		}
		placed = append(placed, placement.Cluster{Name: c.name, Pods: c.pods, Policy: placement.Seen})
	}
	place, err := placement.New(placement.Config{Clusters: placed, Wait: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}

	halves := map[string]*halves{}
	for how, clusters := range verifiers {
		h := newHalvesOf(t, namespace, clusters...)
		halves[how] = h
		for _, c := range []*oneOfTwo{a, b} {
			other := a
			if c == a {
				other = b
			}
			token := c.token(t)
			if n, err := h.attestTo(t, other.name, token); n != nil || !errors.Is(err, attest.ErrRefused) {
				t.Errorf("%s: a token of %s for %s: node %v, error %v", how, c.name, other.name, n, err)
			}
			node, err := h.attestTo(t, c.name, token) // which that has not used up
			if err != nil {
				t.Fatalf("%s: a token of %s for itself: %v", how, c.name, err)
			}
			if got := node.GetK8S(); got.GetCluster() != c.name || got.GetPodUid() != c.agent.UID || node.GetId() != c.name+"."+got.GetUid() {
				t.Errorf("%s: node %v", how, node)
			}
			c.node = node
		}
	}
	if a.node.GetId() == b.node.GetId() || a.node.GetK8S().GetUid() == b.node.GetK8S().GetUid() {
		t.Errorf("both nodes are %s", a.node.GetId())
	}

	verdict := func(c *oneOfTwo, node *attributesv1.Node) server.PlacementVerdict {
		return place.Place(t.Context(), node, c.claim())[0].Verdict
	}
	elsewhere := func(node *attributesv1.Node, cluster string) *attributesv1.Node { // as one who lies would have it
		k := node.GetK8S()
		return &attributesv1.Node{Method: node.GetMethod(), Id: node.GetId(), K8S: &attributesv1.K8SNode{Cluster: cluster, Name: k.GetName(), Uid: k.GetUid()}}
	}
	apart := func() {
		t.Helper()
		for what, got := range map[string]server.PlacementVerdict{
			"the cart of b on the node of a":         verdict(b, a.node),
			"the cart of a on the node of b":         verdict(a, b.node),
			"the cart of b on a's node, called b's":  verdict(b, elsewhere(a.node, "b")),
			"the cart of a on the node of a third":   verdict(a, elsewhere(a.node, "c")),
			"the cart of a on b's node, called a's":  verdict(a, elsewhere(b.node, "a")),
			"the cart of a on a node of no cluster":  verdict(a, &attributesv1.Node{Method: "x509pop", Id: "m"}),
			"the cart of a on a's node, called none": verdict(a, elsewhere(a.node, "")),
		} {
			if got != server.PlacementUnknown && got != server.PlacementRefuted {
				t.Errorf("%s: verdict %v", what, got)
			}
		}
	}
	both := func(wantA, wantB server.PlacementVerdict) {
		t.Helper()
		if gotA, gotB := verdict(a, a.node), verdict(b, b.node); gotA != wantA || gotB != wantB {
			t.Errorf("each cart on its own node: verdicts %v and %v, want %v and %v", gotA, gotB, wantA, wantB)
		}
		apart()
	}
	both(server.PlacementVerified, server.PlacementVerified)

	// One is away: nobody knows what its tokens are worth, and what was seen of it goes on.
	// Of the other all is as before, also while many wait for the one that is away.
	token := b.token(t)
	b.Server.Kill()
	local.Await(t, "wait until b is known to be away", func(context.Context) error {
		if _, why := b.pods.Behind(time.Now()); why == nil {
			return errors.New("not yet")
		}
		return nil
	})
	var waiting sync.WaitGroup
	for range 20 {
		waiting.Go(func() {
			h := halves["by TokenReview"]
			if n, err := h.attestTo(t, "b", token); n != nil || err == nil || errors.Is(err, attest.ErrRefused) {
				t.Errorf("a token of b while it is away: node %v, error %v", n, err)
			}
		})
	}
	for how, h := range halves {
		if _, err := h.attestTo(t, "a", a.token(t)); err != nil {
			t.Errorf("%s: a while b is away: %v", how, err)
		}
	}
	waiting.Wait()
	if _, err := halves["offline"].attestTo(t, "b", token); err != nil {
		t.Errorf("b's keys are known while it is away: %v", err)
	}
	both(server.PlacementVerified, server.PlacementClaimed)
	a.cart = a.CreatePod(t, testkube.Pod{Namespace: "shop", Name: "cart-1", ServiceAccount: "cart", Node: "node-1"})
	a.known(t)
	both(server.PlacementVerified, server.PlacementClaimed)

	b.Server.Start(t)
	b.AwaitReady(t)
	b.known(t)
	if _, err := halves["by TokenReview"].attestTo(t, "b", b.token(t)); err != nil {
		t.Errorf("b is back: %v", err)
	}
	both(server.PlacementVerified, server.PlacementVerified)
}
