package server

import (
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

func TestStatusAndNodes(t *testing.T) {
	h := newHouse(t)
	short := shopEntry("short")
	short.Ttl = durationOf(10 * time.Minute)
	h.apply(shopEntry("web"), short)
	a := h.join("n1", map[string]string{"zone": "a"})
	a.issue(a.item("web", workload("web")), a.item("nobody", workload("web")))
	s := a.sync(&nodev1.Hello{AgentVersion: "v9"})
	s.next()
	s.applied(7)
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: &nodev1.BundleAcks{Streams: 3, Sequence: 1, Acknowledged: 2}}})
	admin, ctx := h.admin()
	var nodes *adminv1.ListNodesResponse
	if !h.eventually(func() bool {
		var err error
		nodes, err = admin.ListNodes(ctx, &adminv1.ListNodesRequest{})
		return err == nil && nodes.GetNodes()[0].GetStreams() == 3
	}) {
		t.Fatalf("nodes are %v", nodes)
	}
	n := nodes.GetNodes()[0]
	if n.GetId() != a.id || n.GetState() != "active" || !n.GetConnected() || n.GetAgentVersion() != "v9" || n.GetRevision() != 7 ||
		n.GetBundleSequence() != 1 || n.GetStreamsAcknowledged() != 2 || string(n.GetSvidSerial()) != string(a.serial()) {
		t.Errorf("node is %v", n)
	}
	st, err := admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
	if err != nil || st.GetEntries() != 2 || st.GetNodes() != 1 || st.GetNodesConnected() != 1 || st.GetIssued() != 1 || st.GetRefused() != 1 ||
		st.GetOutageBudget().AsDuration() != 5*time.Minute || st.GetRecords() == 0 || len(st.GetConditions()) != len(Conditions) || st.GetBundleSequence() != 1 {
		t.Errorf("status is %v, %v", st, err)
	}
	bundle, err := admin.GetBundle(ctx, &adminv1.GetBundleRequest{})
	if err != nil || len(bundle.GetRoots()) != 1 || bundle.GetTrustDomain() != "example.org" {
		t.Errorf("bundle is %v, %v", bundle, err)
	}
	authorities, err := admin.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil || len(authorities.GetAuthorities()) != 2 {
		t.Errorf("authorities are %v, %v", authorities, err)
	}
}
