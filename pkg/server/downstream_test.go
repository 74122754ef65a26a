package server

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	downstreamv1 "github.com/meshid/meshid/proto/downstream/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// A CA below gets what its entry allows it, and nothing that its request says.
func TestDownstream(t *testing.T) {
	h := newHouse(t)
	const id = "spiffe://example.org/below"
	h.apply(&entryv1.Entry{Name: "below", SpiffeId: id, Workloads: `unix.uid == 1000 && unix.path == "/app"`, Downstream: true},
		&entryv1.Entry{Name: "thief", SpiffeId: id, Workloads: `unix.uid == 1000 && unix.path == "/app"`})
	a := h.join("n1", nil)
	key := newKey(t)
	item, stolen := a.item("below", workload("web")), a.item("thief", workload("web"))
	item.Csr = newCSR(t, key)
	res := a.issue(item, stolen)
	if res[1].GetSvid() != nil {
		t.Error("an entry without the mark gives the SPIFFE ID of one that has it")
	}
	client := downstreamv1.NewDownstreamServiceClient(h.dial(key, parseChain(t, res[0].GetSvid().GetChain())))

	for name, req := range map[string]*downstreamv1.MintRequest{
		"no CSR":  {Life: durationpb.New(time.Hour)},
		"no life": {Csr: newCSR(t, newKey(t))},
	} {
		if _, err := client.Mint(t.Context(), req); err == nil {
			t.Errorf("%s: signed", name)
		} else {
			h.wantCode(err, codes.InvalidArgument)
		}
	}

	lower := newKey(t)
	minted, err := client.Mint(t.Context(), &downstreamv1.MintRequest{Csr: newCSR(t, lower), Life: durationpb.New(100 * 365 * 24 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	c := parseChain(t, minted.GetChain())[0]
	roots, _ := h.ca.Bundle()
	switch {
	case !c.IsCA || !c.MaxPathLenZero || c.MaxPathLen != 0 || !lower.PublicKey.Equal(c.PublicKey):
		t.Error("it is no CA of path length 0 for the key")
	case len(c.URIs) != 1 || c.URIs[0].String() != td.IDString() || len(c.DNSNames) > 0:
		t.Errorf("it is named %v %v", c.URIs, c.DNSNames)
	case time.Until(c.NotAfter) > 8*24*time.Hour:
		t.Errorf("it lives until %s", c.NotAfter)
	case c.CheckSignatureFrom(roots[0]) != nil:
		t.Error("it is not below the root")
	}
	found := false
	for _, r := range h.records(ledgerv1.Event_EVENT_AUTHORITY) {
		if r.GetActor() == id && r.GetAuthority().GetRole() == "intermediate" {
			found = string(r.GetCertificate().GetSerial()) == string(c.SerialNumber.Bytes())
		}
	}
	if !found {
		t.Error("there is no record of it")
	}
	// What it signs is of its own mesh: it makes nobody an administrator here.
	h.apply(&entryv1.Entry{Name: "ops", SpiffeId: "spiffe://example.org/ops", Workloads: "unix.uid == 0", Admin: true})
	boss := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{td.ID().URL().JoinPath("ops")}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}, c, boss.Public(), lower)
	if err != nil {
		t.Fatal(err)
	}
	forged := parseChain(t, [][]byte{der, c.Raw})
	_, err = adminv1.NewAdminServiceClient(h.dial(boss, forged)).GetStatus(t.Context(), &adminv1.GetStatusRequest{})
	h.wantCode(err, codes.PermissionDenied)
	if id, err := h.server.Admin(t.Context(), &tls.ConnectionState{PeerCertificates: forged}); err == nil {
		t.Errorf("%s looks at the console", id)
	}

	// Nobody knows yet what is in force below, and its intermediate lives.
	fleet := func() (connected, counted bool, sequence uint64) {
		for _, n := range h.server.Fleet() {
			if n.ID == id {
				return n.Connected, n.Counted, n.Sequence
			}
		}
		t.Error("the CA below is not among the nodes")
		return false, false, 0
	}
	r, err := h.ca.Rotation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range r.Inputs.Nodes {
		if n.ID == id && !n.Lease.Equal(c.NotAfter) {
			t.Errorf("it is waited for until %s, and its intermediate lives until %s", n.Lease, c.NotAfter)
		}
	}
	stream, err := client.Follow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	told, err := stream.Recv()
	if err != nil || len(told.GetRoots()) != 1 {
		t.Fatalf("%v %v", told, err)
	}
	if connected, counted, sequence := fleet(); !connected || counted || sequence != 0 {
		t.Error("it counts as if it had said something")
	}
	if err := stream.Send(&downstreamv1.FollowRequest{Acknowledged: told.GetSequence(), Held: []string{"00ff"}}); err != nil {
		t.Fatal(err)
	}
	if !h.eventually(func() bool {
		connected, counted, sequence := fleet()
		return connected && counted && sequence == told.GetSequence()
	}) {
		t.Error("what it has acknowledged does not count")
	}
	// Who waits for it is told what it waits for, and whose intermediate is in use.
	const waits = "1 nodes: spiffe://example.org/below/n7"
	if err := stream.Send(&downstreamv1.FollowRequest{WaitsFor: waits}); err != nil {
		t.Fatal(err)
	}
	boss1, bossCtx := h.admin()
	if !h.eventually(func() bool {
		answer, err := boss1.GetRotation(bossCtx, &adminv1.GetRotationRequest{})
		l := answer.GetRotation().GetLaggards()
		return err == nil && slices.ContainsFunc(l, func(l *adminv1.Laggard) bool { return l.GetNodeId() == id && l.GetBelow() && l.GetWaitsFor() == waits })
	}) {
		t.Error("what it waits for is not said")
	}
	list, err := boss1.ListAuthorities(bossCtx, &adminv1.ListAuthoritiesRequest{})
	if b := list.GetBelow(); err != nil || len(b) != 1 || b[0].GetSpiffeId() != id || !b[0].GetCurrent() || !b[0].GetConnected() || !b[0].GetEntry() ||
		!b[0].GetNotAfter().AsTime().Equal(c.NotAfter) {
		t.Errorf("of its intermediate is said: %v, %v", list.GetBelow(), err)
	}
	// A second process of it has not.
	second, err := client.Follow(t.Context())
	if err == nil {
		_, err = second.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, counted, sequence := fleet(); counted || sequence != 0 {
		t.Error("one of its processes speaks for another")
	}

	// The rate is bounded, and so is the right.
	for range mintBurst + 1 {
		if _, err = client.Mint(t.Context(), &downstreamv1.MintRequest{Csr: newCSR(t, newKey(t)), Life: durationpb.New(time.Hour)}); err != nil {
			break
		}
	}
	h.wantCode(err, codes.ResourceExhausted)
	admin, ctx := h.admin()
	deleted, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"below"}})
	if err != nil {
		t.Fatal(err)
	}
	gone, err := admin.ListWithdrawals(ctx, &adminv1.ListWithdrawalsRequest{Id: deleted.GetWithdrawal()})
	if err != nil || len(gone.GetWithdrawals()) != 1 {
		t.Fatal(gone, err)
	}
	if b := gone.GetWithdrawals()[0].GetBelow(); len(b) == 0 || b[0].GetSpiffeId() != id || b[0].GetEntry() || !b[0].GetNotAfter().AsTime().After(time.Now()) {
		t.Errorf("of what lives on is said: %v", b)
	}
	_, err = stream.Recv()
	h.wantCode(err, codes.PermissionDenied)
	_, err = client.Mint(t.Context(), &downstreamv1.MintRequest{Csr: newCSR(t, newKey(t)), Life: durationpb.New(time.Hour)})
	h.wantCode(err, codes.PermissionDenied)
	for _, n := range h.server.Fleet() {
		if n.ID == id {
			t.Error("a CA without an entry is waited for")
		}
	}
}
