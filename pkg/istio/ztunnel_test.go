package istio

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshid/meshid/pkg/server"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"
)

// ztunnel gets the identities of the pods on its node, and no others: by an enumeration
// of all.
func TestZtunnel(t *testing.T) {
	m := newMesh(t)
	nodes := []string{"n1", "n2", "n3"}
	zt := make(map[string]*client)
	on := make(map[string]map[string]bool)
	var all []string
	for i, node := range nodes {
		zt[node] = m.client(m.run("istio-system/ztunnel", "ztunnel-"+node, node))
		on[node] = make(map[string]bool)
		for j := range 5 {
			account := fmt.Sprintf("shop/app%d", i+j) // some accounts run on two nodes
			m.run(account, fmt.Sprintf("app%d-%s", i+j, node), node)
			id := spiffeIDOf(td, "shop", fmt.Sprintf("app%d", i+j))
			on[node][id] = true
			all = append(all, id)
		}
	}
	for _, node := range nodes {
		for _, id := range all {
			c := zt[node]
			c.key, c.names = newKey(t), []string{id}
			answer, err := c.call(id)
			if !on[node][id] {
				wantCode(t, id+" on "+node, err, codes.Unauthenticated)
				if err != nil && !strings.Contains(err.Error(), "request impersonation authentication failure") {
					t.Errorf("%s on %s: %v", id, node, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s on %s: %v", id, node, err)
				continue
			}
			chain, _ := chainOf(t, answer)
			if got := chain[0].URIs[0].String(); got != id {
				t.Errorf("%s on %s: it is %s", id, node, got)
			}
			r := m.lastRecord()
			if r.GetActor() != "spiffe://example.org/ns/istio-system/sa/ztunnel" || r.GetVerifiedBy() != "ca" ||
				r.GetNode().GetAttributes().GetK8S().GetPodName() != "ztunnel-"+node || !strings.HasSuffix(r.GetWorkload().GetK8S().GetPodName(), "-"+node) {
				t.Errorf("%s on %s: the record is %v", id, node, r)
			}
		}
	}
	// Its own identity it gets as everybody else.
	own := zt["n1"]
	own.key, own.names = newKey(t), nil
	if _, err := own.call(""); err != nil {
		t.Error(err)
	}
}

// What a node's proxy may not ask for, and who may not ask.
func TestImpersonation(t *testing.T) {
	m := newMesh(t)
	m.run("shop/web", "web-1", "n1")
	ztunnel := m.run("istio-system/ztunnel", "ztunnel-1", "n1")
	for _, id := range []string{
		"spiffe://evil.example/ns/shop/sa/web", "spiffe:///ns/shop/sa/web", "spiffe://example.org/ns/shop/sa/web/x", "spiffe://example.org/ns/shop/sa",
		"spiffe://example.org/shop/ns/sa/web", "spiffe://example.org/ns//sa/web", "spiffe://example.org/ns/shop/sa/", "/ns/shop/sa/web", "shop/web",
		"spiffe://EXAMPLE.org/ns/shop/sa/web", "spiffe://example.org/ns/shop/sa/..", "spiffe://example.org/ns/%73hop/sa/web", "spiffe://example.org/ns/shop/sa/web?x",
		"spiffe://example.org/meshid/ca", "spiffe://example.org", strings.Repeat("x", 4096), "spiffe://example.org/ns/shop/sa/web ",
		"spiffe://example.org/ns/bank/sa/web",
	} {
		c := m.client(ztunnel)
		_, err := c.call(id)
		wantCode(t, id, err, codes.Unauthenticated)
	}
	c := m.client(ztunnel)
	_, err := c.send(&istiov1.IstioCertificateRequest{Csr: newCSR(t, c.key), Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{keyImpersonated: structpb.NewNumberValue(1)}}})
	wantCode(t, "a number", err, codes.Unauthenticated)
	// Its name does not help another account, nor its account another namespace's.
	for _, account := range []string{"shop/web", "shop/ztunnel", "istio-system/istiod"} {
		_, err := m.client(m.run(account, strings.ReplaceAll(account, "/", "-"), "n1")).call(webID)
		wantCode(t, account, err, codes.Unauthenticated)
		if r := m.lastRecord(); r.GetReason() != server.DirectPlacement || r.GetSpiffeId() != webID || r.GetActor() != spiffeIDOf(td, strings.Split(account, "/")[0], strings.Split(account, "/")[1]) {
			t.Errorf("%s: the record is %v", account, r)
		}
	}
	m.pods.change(func(map[string]*Pod) { m.pods.failed = errors.New("no API server") })
	_, err = m.client(ztunnel).call(webID)
	wantCode(t, "no API server", err, codes.Unavailable)
}
