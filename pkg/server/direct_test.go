package server

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// A workload without an agent gets what an entry gives it, and nothing else.
func TestIssueDirect(t *testing.T) {
	h := newHouse(t)
	h.apply(&entryv1.Entry{
		Name: "pods", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
		Nodes: `node.k8s.cluster == "prod"`, Workloads: `has(k8s.pod_uid) && !(k8s.namespace in ["kube-system"])`,
	})
	request := func(changes ...func(*Direct)) *Direct {
		d := &Direct{
			Node: &attributesv1.Node{Method: "istio", Id: "prod.n1", K8S: &attributesv1.K8SNode{Cluster: "prod", Name: "n1", Uid: "n1"}},
			Workload: &attributesv1.Workload{K8S: &attributesv1.Kubernetes{
				Namespace: "shop", ServiceAccount: "web", PodName: "web-1", PodUid: "uid-1",
			}},
			Instance: "k8s:uid-1", SPIFFEID: "spiffe://example.org/ns/shop/sa/web", CSR: newCSR(t, newKey(t)),
			TTL: 24 * time.Hour, Backdate: 30 * time.Second, Address: "10.0.0.1:1234",
		}
		for _, change := range changes {
			change(d)
		}
		return d
	}
	svid, err := h.server.IssueDirect(t.Context(), request())
	if err != nil {
		t.Fatal(err)
	}
	leaf := parseChain(t, svid.Chain)[0]
	if got := leaf.URIs[0].String(); got != "spiffe://example.org/ns/shop/sa/web" || len(leaf.URIs) != 1 {
		t.Errorf("URIs %v", leaf.URIs)
	}
	if back := time.Since(leaf.NotBefore); back > time.Minute {
		t.Errorf("backdated by %s", back)
	}
	if life := time.Until(leaf.NotAfter); life > time.Hour {
		t.Errorf("lives for %s: what is asked for does not raise it", life)
	}
	if len(svid.Roots) == 0 {
		t.Error("no roots")
	}
	records := h.records(ledgerv1.Event_EVENT_ISSUE)
	last := records[len(records)-1]
	if last.GetVerifiedBy() != "ca" || last.GetEntry().GetName() != "pods" || last.GetNode().GetAttributes().GetK8S().GetCluster() != "prod" {
		t.Errorf("the record is %v", last)
	}
	short, err := h.server.IssueDirect(t.Context(), request(func(d *Direct) { d.TTL = 10 * time.Minute }))
	if err != nil {
		t.Fatal(err)
	}
	if life := time.Until(parseChain(t, short.Chain)[0].NotAfter); life > 10*time.Minute {
		t.Errorf("lives for %s, 10 min were asked for", life)
	}
	if _, err := h.server.IssueDirect(t.Context(), request(func(d *Direct) { d.TTL = time.Second })); err != nil {
		t.Errorf("a short life is raised, not refused: %v", err)
	}

	// Whatever the entries give, and a key that was proved otherwise.
	key := newKey(t)
	any := request(func(d *Direct) { d.SPIFFEID, d.AnyID, d.CSR = "", true, nil })
	if any.PublicKey, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	if svid, err = h.server.IssueDirect(t.Context(), any); err != nil {
		t.Fatal(err)
	}
	leaf = parseChain(t, svid.Chain)[0]
	if got := leaf.URIs[0].String(); got != "spiffe://example.org/ns/shop/sa/web" || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("%s for another key", got)
	}
	if svid.RenewAt.Before(leaf.NotBefore) || svid.RenewAt.After(leaf.NotAfter) {
		t.Errorf("to be renewed at %s, it is valid from %s to %s", svid.RenewAt, leaf.NotBefore, leaf.NotAfter)
	}

	for name, c := range map[string]struct {
		change func(*Direct)
		reason string
	}{
		"no life that is long enough": {func(d *Direct) { d.MinLife = 2 * time.Hour }, reasonTemplate},
		"nothing for the node": {func(d *Direct) {
			d.AnyID, d.SPIFFEID, d.Node.K8S.Cluster = true, "", "test"
		}, reasonEntryUnknown},
		"nothing for the workload": {func(d *Direct) {
			d.AnyID, d.SPIFFEID, d.Workload.K8S.Namespace = true, "", "kube-system"
		}, reasonRule},
		"no key":            {func(d *Direct) { d.PublicKey = []byte{1} }, reasonCSR},
		"other identity":    {func(d *Direct) { d.SPIFFEID = "spiffe://example.org/ns/shop/sa/admin" }, reasonEntryUnknown},
		"other namespace":   {func(d *Direct) { d.SPIFFEID = "spiffe://example.org/ns/bank/sa/web" }, reasonEntryUnknown},
		"other domain":      {func(d *Direct) { d.SPIFFEID = "spiffe://evil.example/ns/shop/sa/web" }, reasonEntryUnknown},
		"no domain":         {func(d *Direct) { d.SPIFFEID = "spiffe:///ns/shop/sa/web" }, reasonEntryUnknown},
		"nothing asked for": {func(d *Direct) { d.SPIFFEID = "" }, reasonEntryUnknown},
		"other cluster":     {func(d *Direct) { d.Node.K8S.Cluster = "test" }, reasonNodeRule},
		"rule": {func(d *Direct) {
			d.Workload.K8S.Namespace, d.SPIFFEID = "kube-system", "spiffe://example.org/ns/kube-system/sa/web"
		}, reasonRule},
		"csr": {func(d *Direct) { d.CSR = []byte{1} }, reasonCSR},
	} {
		d := request(c.change)
		d.Instance = "k8s:" + name
		_, err := h.server.IssueDirect(t.Context(), d)
		if _, ok := errors.AsType[*DirectError](err); !ok {
			t.Errorf("%s: %v", name, err)
			continue
		}
		records := h.records(ledgerv1.Event_EVENT_ISSUE)
		if last := records[len(records)-1]; last.GetInstance() != d.Instance || last.GetReason() != c.reason || last.GetOutcome() != ledgerv1.Outcome_OUTCOME_REFUSED {
			t.Errorf("%s: the record is %v", name, last)
		}
	}

	admin, ctx := h.admin()
	if _, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: &adminv1.Quarantine{SpiffeId: "spiffe://example.org/ns/shop/sa/web", Reason: "test"}}); err != nil {
		t.Fatal(err)
	}
	_, err = h.server.IssueDirect(t.Context(), request())
	if refusal, ok := errors.AsType[*DirectError](err); !ok || refusal.Reason != nodev1.Reason_REASON_QUARANTINED {
		t.Errorf("in quarantine: %v", err)
	}
}

// A node that is banned gets nothing for workloads without an agent either.
func TestIssueDirectFromBannedNode(t *testing.T) {
	h := newHouse(t)
	h.apply(&entryv1.Entry{Name: "pods", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/web", Workloads: "has(k8s.pod_uid)"})
	a := h.join("n1", nil)
	issue := func() error {
		_, err := h.server.IssueDirect(t.Context(), &Direct{
			Node:     &attributesv1.Node{Method: "istio", Id: "n1"},
			Workload: &attributesv1.Workload{K8S: &attributesv1.Kubernetes{Namespace: "shop", PodUid: "uid"}},
			Instance: "k8s:uid", SPIFFEID: "spiffe://example.org/ns/shop/sa/web", CSR: newCSR(t, newKey(t)),
		})
		return err
	}
	if err := issue(); err != nil {
		t.Fatal(err)
	}
	admin, ctx := h.admin()
	if _, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: a.chain[0].URIs[0].String(), Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	if err := issue(); err == nil {
		t.Error("a banned node's workload was served")
	}
	records := h.records(ledgerv1.Event_EVENT_ISSUE)
	if last := records[len(records)-1]; last.GetReason() != reasonBanned {
		t.Errorf("the record is %v", last)
	}
}

// Clients that ask every 15 s whether the connection is alive are not sent away: Istio's
// do so every 30 s, and so does whatever stands between.
func TestDirectKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		g := (&Server{}).DirectGRPC(DirectListener{}, grpc.Creds(insecure.NewCredentials()), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			defer close(ended)
			for {
				if err := stream.RecvMsg(new(emptypb.Empty)); err != nil {
					return err
				}
				if err := stream.SendMsg(new(emptypb.Empty)); err != nil {
					return err
				}
			}
		}))
		lis := bufconn.Listen(1 << 16)
		served := make(chan error)
		go func() { served <- g.Serve(lis) }()
		conn, err := grpc.NewClient("passthrough:ca", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second}))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/a/b")
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := errors.Join(stream.SendMsg(new(emptypb.Empty)), stream.RecvMsg(new(emptypb.Empty))); err != nil {
				t.Fatal(err)
			}
			time.Sleep(4 * time.Minute) // of the bubble's clock
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		<-ended
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}
