package kubernetes

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

// Whatever an object says of nodes, it counts for those of its own cluster.
func TestEntriesStayInTheirCluster(t *testing.T) {
	client, err := kube.Open(kube.Config{Name: "prod", Kubeconfig: kubeapi.New(t).Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	e := NewEntries(EntriesConfig{Client: client})
	facts := func(cluster string) *identity.Facts {
		return identity.NewFacts(&attributesv1.Node{Method: "k8s_psat", K8S: &attributesv1.K8SNode{Cluster: cluster, Name: "n1"}}, nil)
	}
	for nodes, own := range map[string]bool{
		"":                                    true,
		`node.k8s.name == "n1"`:               true,
		`node.k8s.name == "n2" || true`:       true,
		"true // of all":                      false,
		"true // of all\n":                    true,
		"true) || (true":                      false,
		"true)||(true //":                     false,
		"false) || true //":                   false,
		"false) || has(node.k8s) || (false":   false,
		`true) ? true : ("a" == "a"`:          false,
		"true\n) || (\ntrue":                  false,
		`node.k8s.name == """n1""") || (true`: false,
	} {
		o := &registrationEntry{Spec: entrySpec{
			SpiffeID: "spiffe://example.org/ns/{k8s.namespace}/app", Workloads: "has(k8s.pod_uid)", Nodes: nodes,
		}}
		o.Metadata.Name = "web"
		declared, problem := e.entry(o)
		entry, err := identity.Compile(spiffeid.RequireTrustDomainFromString("example.org"), declared)
		if problem != "" && err == nil {
			t.Errorf("%q would be put into force, although %s", nodes, problem)
		}
		if err != nil {
			if own {
				t.Errorf("%q: %s, %v", nodes, problem, err)
			}
			continue
		}
		if entry.MatchNode(facts("test")) {
			t.Errorf("%q: in force as %s, for the nodes of another cluster", nodes, declared.GetNodes())
		}
		if entry.MatchNode(facts("prod")) != own {
			t.Errorf("%q: for the nodes of its cluster: %t", nodes, !own)
		}
	}
}
