package server

import (
	"context"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
	"github.com/meshid/meshid/pkg/server/registry"
	"github.com/meshid/meshid/test/identitytest"
)

// newListHouse is a CA that revokes by lists.
func newListHouse(t testing.TB) *house {
	t.Helper()
	h := &house{t: t, dir: t.TempDir(), log: new(identitytest.Log), lists: true}
	h.start()
	t.Cleanup(func() { h.stop() })
	return h
}

// proxies says that an agent and its proxies have what the CA has in force.
func (s *testStream) proxies(streams uint32) {
	s.a.h.t.Helper()
	_, sequence := s.a.h.ca.Bundle()
	h := s.a.h
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{
		Revision: h.server.registry.Entries().Revision, BundleSequence: sequence, QuarantineSequence: 1 << 62,
	}}})
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: &nodev1.BundleAcks{
		Streams: streams, Acknowledged: streams, Sequence: sequence, Counted: true,
	}}})
}

// follows has an agent without a test of its own acknowledge whatever it is sent.
func (s *testStream) follows(streams uint32) {
	go func() {
		for {
			if _, err := s.stream.Recv(); err != nil {
				return
			}
			_, sequence := s.a.h.ca.Bundle()
			for _, m := range []*nodev1.SyncRequest{
				{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{Revision: 1 << 62, BundleSequence: sequence, QuarantineSequence: 1 << 62}}},
				{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: &nodev1.BundleAcks{Streams: streams, Acknowledged: streams, Sequence: sequence, Counted: true}}},
			} {
				if s.stream.Send(m) != nil {
					return
				}
			}
		}
	}()
}

// revoked are the serial numbers on the lists in force, and the issuers of the lists.
func (h *house) revoked() (serials, issuers []string) {
	h.t.Helper()
	for _, l := range h.server.bundle().GetRevocationLists() {
		list, err := x509.ParseRevocationList(l.GetList())
		if err != nil {
			h.t.Fatal(err)
		}
		issuer, err := x509.ParseCertificate(l.GetIssuer())
		if err != nil {
			h.t.Fatal(err)
		}
		issuers = append(issuers, string(issuer.SubjectKeyId))
		for _, r := range list.RevokedCertificateEntries {
			serials = append(serials, r.SerialNumber.String())
		}
	}
	return serials, issuers
}

// served issues what an entry gives, again until the CA signs.
func (a *testAgent) served(name string) *x509.Certificate {
	a.h.t.Helper()
	var leaf *x509.Certificate
	if !a.h.eventually(func() bool {
		res := a.issue(a.item(name, workload(name)))
		if res[0].GetSvid() == nil {
			if res[0].GetRefusal().GetReason() != nodev1.Reason_REASON_UNAVAILABLE {
				a.h.t.Fatalf("refused: %v", res[0])
			}
			return false
		}
		leaf = parseChain(a.h.t, res[0].GetSvid().GetChain())[0]
		return true
	}) {
		a.h.t.Fatal("the CA does not sign")
	}
	return leaf
}

// What is withdrawn is on the lists when the command answers, nothing else is, and the
// withdrawal is over when every live proxy goes by them, also on nodes that never had it.
func TestV_E3_WithdrawnIsRevoked(t *testing.T) {
	for name, withdraw := range map[string]func(h *house, a *testAgent, leaf *x509.Certificate) string{
		"identity": func(h *house, _ *testAgent, leaf *x509.Certificate) string {
			return h.withdraw(&adminv1.Quarantine{SpiffeId: leaf.URIs[0].String()})
		},
		"key": func(h *house, _ *testAgent, leaf *x509.Certificate) string {
			return h.withdraw(&adminv1.Quarantine{KeySha256: keySum(leaf)})
		},
		"serial": func(h *house, _ *testAgent, leaf *x509.Certificate) string {
			return h.withdraw(&adminv1.Quarantine{Serial: leaf.SerialNumber.Bytes()})
		},
		"entry": func(h *house, _ *testAgent, _ *x509.Certificate) string {
			admin, ctx := h.admin()
			answer, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"web"}})
			if err != nil {
				h.t.Fatal(err)
			}
			return answer.GetWithdrawal()
		},
		"node": func(h *house, a *testAgent, _ *x509.Certificate) string {
			admin, ctx := h.admin()
			answer, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: a.id, Reason: "test"})
			if err != nil {
				h.t.Fatal(err)
			}
			return answer.GetWithdrawal()
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newListHouse(t)
			h.apply(shopEntry("web"), shopEntry("other"))
			a, b := h.join("n1", nil), h.join("n2", nil)
			first, second := a.sync(&nodev1.Hello{}), b.sync(&nodev1.Hello{})
			first.next()
			second.next()
			leaf, other := a.served("web"), b.served("other")
			first.proxies(1)
			second.proxies(2)
			began := time.Now()
			id := withdraw(h, a, leaf)
			serials, _ := h.revoked()
			if !slices.Contains(serials, leaf.SerialNumber.String()) || slices.Contains(serials, other.SerialNumber.String()) {
				t.Errorf("on the lists: %v", serials)
			}
			if name == "node" != slices.Contains(serials, a.chain[0].SerialNumber.String()) || slices.Contains(serials, b.chain[0].SerialNumber.String()) {
				t.Errorf("of agents: %v", serials)
			}
			if name != "node" {
				first.proxies(1)
			}
			w := h.withdrawal(id, func(w *adminv1.Withdrawal) bool {
				return len(w.GetLaggards()) == 1 && w.GetLaggards()[0].GetNodeId() == b.id
			})
			if w.GetState() != "pending" || w.GetRevoked() != uint32(len(serials)) || w.GetNotRevoked() != "" {
				t.Errorf("%v", w)
			}
			second.proxies(2)
			w = h.withdrawal(id, func(w *adminv1.Withdrawal) bool { return w.GetState() != "pending" })
			if w.GetState() != "complete" || w.GetRevocationNodes() != w.GetRevocationNodesInForce() || w.GetRevocationNodes() == 0 {
				t.Errorf("%v", w)
			}
			if n := identitytest.Metric(t, h.metrics, "meshid_ca_revocation_effect_seconds"); n < 2 {
				t.Errorf("%v streams measured", n)
			}
			h.stop()
			records := h.records(ledgerv1.Event_EVENT_REVOKED)
			if len(records) != len(serials) {
				t.Fatalf("%d records", len(records))
			}
			for _, r := range records {
				if r.GetTime().AsTime().Before(began.Add(-time.Second)) || r.GetActor() != "uid:0" || r.GetDetail() == "" || r.GetNode().GetId() != a.id {
					t.Errorf("record: %v", r)
				}
			}
			if over := h.records(ledgerv1.Event_EVENT_WITHDRAWN); len(over) != 1 || !strings.Contains(over[0].GetDetail(), fmt.Sprintf("%d certificates revoked, in force on", len(serials))) {
				t.Errorf("end: %v", over)
			}
		})
	}
}

// withdraw quarantines, and returns the withdrawal.
func (h *house) withdraw(q *adminv1.Quarantine) string {
	h.t.Helper()
	admin, ctx := h.admin()
	q.Reason = "test"
	answer, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: q})
	if err != nil {
		h.t.Fatal(err)
	}
	return answer.GetWithdrawal()
}

// What a node that may attest itself again has got since then is not revoked with the
// rest, however late that is looked at again.
func TestEvictedNodeComesBack(t *testing.T) {
	h := newListHouse(t)
	h.apply(shopEntry("web"))
	h.server.revocations.mu.Lock()
	h.server.revocations.secondLook = 0
	h.server.revocations.mu.Unlock()
	a := h.join("n1", nil)
	before := a.served("web")
	admin, ctx := h.admin()
	if _, err := admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: a.id, Reason: "test"}); err != nil {
		t.Fatal(err)
	}
	again := h.join("n1", nil)
	after := again.served("web")
	if !h.eventually(func() bool {
		h.server.revocations.mu.Lock()
		defer h.server.revocations.mu.Unlock()
		return len(h.server.revocations.waiting) == 0
	}) {
		t.Fatal("nobody looks again")
	}
	serials, _ := h.revoked()
	if !slices.Contains(serials, before.SerialNumber.String()) || slices.Contains(serials, after.SerialNumber.String()) {
		t.Errorf("on the lists: %v", serials)
	}
}

// index is the search index, over the journal itself.
type index struct {
	Records
	h *house
}

func (i *index) Who(_ context.Context, q search.Holders) (found []search.Found, _ search.Position, _ error) {
	for _, r := range i.h.records(ledgerv1.Event_EVENT_ISSUE) {
		if slices.Contains(q.Authorities, r.GetAuthority().GetId()) && r.GetCertificate().GetNotAfter().AsTime().After(q.At) {
			found = append(found, search.Found{Entry: ledger.Entry{Record: r}})
		}
	}
	return found, search.Position{}, nil
}

// What an earlier process of the CA signed cannot be put on a list any more. If something
// of it is withdrawn, all that its intermediate signed is renewed, and then refused; also
// if the CA is started once more meanwhile.
func TestV_E3_WithdrawnAfterARestart(t *testing.T) {
	h := newListHouse(t)
	h.apply(shopEntry("web"), shopEntry("other"))
	a := h.join("n1", nil)
	web, other := a.served("web"), a.served("other")
	quick := func(s *Server) {
		s.revocations.mu.Lock()
		defer s.revocations.mu.Unlock()
		s.revocations.abandonAfter = 0
	}
	restart := func() *testStream {
		h.stop()
		h.start(func(c *Config) { c.Records = &index{h: h} })
		a.conn = h.dial(a.key, a.chain)
		a.client = nodev1.NewNodeServiceClient(a.conn)
		s := a.sync(&nodev1.Hello{})
		s.follows(1)
		return s
	}
	restart()
	quick(h.server)
	fresh := a.served("other")
	_, issuers := h.revoked()
	if !slices.Contains(issuers, string(web.AuthorityKeyId)) || !slices.Contains(issuers, string(fresh.AuthorityKeyId)) {
		t.Fatal("an issuer has no list")
	}
	id := h.withdraw(&adminv1.Quarantine{SpiffeId: web.URIs[0].String()})
	h.withdrawal(id, func(w *adminv1.Withdrawal) bool {
		return w.GetState() == "pending" && strings.Contains(w.GetNotRevoked(), "what it signed is renewed, and refused from")
	})
	h.withdrawal(id, func(w *adminv1.Withdrawal) bool { return w.GetState() == "complete" && w.GetNotRevoked() == "" })
	if _, issuers := h.revoked(); slices.Contains(issuers, string(other.AuthorityKeyId)) || !slices.Contains(issuers, string(fresh.AuthorityKeyId)) {
		t.Error("what the earlier intermediate signed is not refused, or what is new is")
	}
	// By now nothing is left to do, whatever is quarantined.
	again := &revocation{match: h.server.refusedNow, at: time.Now()}
	bequeathed, err := h.ca.Bequeathed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(bequeathed) > 0 {
		if lefts, err := h.server.inherited(t.Context(), bequeathed, []*revocation{again}); err != nil || lefts[again] != "" {
			t.Errorf("%q, %v", lefts[again], err)
		}
	}
	if orders := h.server.orders.list; len(orders) != 1 || orders[0].rotate.GetAuthority() != fmt.Sprintf("%x", other.AuthorityKeyId) {
		t.Errorf("orders: %v", orders)
	}
	// It is withdrawn, and the CA is started again before it gets to it.
	h.withdraw(&adminv1.Quarantine{Serial: new(big.Int).Add(fresh.SerialNumber, big.NewInt(1)).Bytes()}) // of nobody
	h.server.registry.ChangeQuarantines(time.Now(), nil)
	third := a.served("other")
	if err := h.store.PutQuarantines(t.Context(), quarantineOf(third)); err != nil {
		t.Fatal(err)
	}
	restart()
	quick(h.server)
	if !h.eventually(func() bool {
		_, issuers := h.revoked()
		return !slices.Contains(issuers, string(third.AuthorityKeyId))
	}) {
		t.Error("what was withdrawn before the start is believed")
	}
}

func quarantineOf(leaf *x509.Certificate) *registry.Quarantine {
	return &registry.Quarantine{Serial: leaf.SerialNumber.Bytes(), Reason: "test", CreatedBy: "uid:0", CreatedAt: time.Now()}
}
