package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/server/registry"
	"github.com/meshid/meshid/test/identitytest"
)

func (h *house) quarantine(q *adminv1.Quarantine) {
	h.t.Helper()
	admin, ctx := h.admin()
	q.Reason = "test"
	if _, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: q}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) lift(q *adminv1.Quarantine) {
	h.t.Helper()
	admin, ctx := h.admin()
	if _, err := admin.LiftQuarantine(ctx, &adminv1.LiftQuarantineRequest{Quarantine: q}); err != nil {
		h.t.Fatal(err)
	}
}

// An agent that keeps asking gets nothing from the answer on: by no key, no entry, no
// other node, and after no restart; until it is lifted. What is not named goes on.
func TestV_E3_QuarantinedIdentity(t *testing.T) {
	h := newHouse(t)
	twin := shopEntry("twin")
	twin.SpiffeId = "spiffe://example.org/app/web"
	h.apply(shopEntry("web"), shopEntry("other"), twin)
	a, b := h.join("n1", nil), h.join("n2", nil)
	q := &adminv1.Quarantine{SpiffeId: "spiffe://example.org/app/web"}
	h.quarantine(q)
	if n := identitytest.Metric(t, h.metrics, "meshid_ca_quarantines"); n != 1 {
		t.Errorf("%v quarantines in the metrics", n)
	}
	refused := func() {
		t.Helper()
		for _, agent := range []*testAgent{a, b} {
			res := agent.issue(agent.item("web", workload("web")), agent.item("other", workload("other")), agent.item("twin", workload("twin")))
			for _, i := range []int{0, 2} {
				if res[i].GetRefusal().GetReason() != nodev1.Reason_REASON_QUARANTINED {
					t.Errorf("%s: %v", agent.id, res[i])
				}
			}
			if res[1].GetSvid() == nil {
				t.Errorf("%s: one that is not quarantined: %v", agent.id, res[1])
			}
		}
	}
	for range 3 {
		refused()
	}
	h.stop()
	h.start()
	for _, agent := range []*testAgent{a, b} {
		agent.conn = h.dial(agent.key, agent.chain)
		agent.client = nodev1.NewNodeServiceClient(agent.conn)
	}
	refused()
	h.lift(q)
	if res := a.issue(a.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Errorf("lifted: %v", res[0])
	}
	if n := identitytest.Metric(t, h.metrics, "meshid_ca_quarantines"); n != 0 {
		t.Errorf("%v quarantines in the metrics", n)
	}
	var changes []bool
	for _, r := range h.records(ledgerv1.Event_EVENT_QUARANTINE) {
		if r.GetDetail() != "test" || r.GetActor() != "uid:0" || r.GetSpiffeId() != q.GetSpiffeId() || r.GetQuarantine().GetSpiffeId() != q.GetSpiffeId() {
			t.Errorf("record: %v", r)
		}
		changes = append(changes, r.GetQuarantine().GetLifted())
	}
	if len(changes) != 2 || changes[0] || !changes[1] {
		t.Errorf("lifted in the records: %v", changes)
	}
	found := false
	for _, r := range h.records(ledgerv1.Event_EVENT_ISSUE) {
		found = found || r.GetReason() == reasonQuarantined && r.GetSpiffeId() == q.GetSpiffeId() && r.GetOutcome() == ledgerv1.Outcome_OUTCOME_REFUSED
	}
	if !found {
		t.Error("refusals are not recorded")
	}
}

func keySum(c *x509.Certificate) []byte {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return sum[:]
}

// A key is refused under each name, a workload's and a node's.
func TestV_E3_QuarantinedKey(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"), shopEntry("other"))
	a := h.join("n1", nil)
	key := newKey(t)
	item := a.item("web", workload("web"))
	item.Csr = newCSR(t, key)
	res := a.issue(item)
	leaf, err := x509.ParseCertificate(res[0].GetSvid().GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	h.quarantine(&adminv1.Quarantine{KeySha256: keySum(leaf)})
	other := a.item("other", workload("other"))
	other.Csr = item.GetCsr()
	nobody := a.item("no-such-entry", workload("other"))
	nobody.Csr = item.GetCsr()
	for i, r := range a.issue(item, other, nobody) {
		if r.GetRefusal().GetReason() != nodev1.Reason_REASON_QUARANTINED {
			t.Errorf("item %d: %v", i, r)
		}
	}
	if res := a.issue(a.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Errorf("another key: %v", res[0])
	}
	_, err = h.attest(h.dial(nil, nil), h.token("n9", nil), key)
	h.wantCode(err, codes.PermissionDenied)
	_, err = a.client.Renew(t.Context(), &nodev1.RenewRequest{Csr: newCSR(t, key), PreviousSerial: a.serial()})
	h.wantCode(err, codes.PermissionDenied)
}

// A node's own certificate, key and name: its stream ends, its calls are refused; only
// by its name it may not come back.
func TestV_E7_QuarantinedNode(t *testing.T) {
	for name, row := range map[string]struct {
		what func(a *testAgent) *adminv1.Quarantine
		code codes.Code
		back bool
	}{
		"serial": {func(a *testAgent) *adminv1.Quarantine {
			return &adminv1.Quarantine{Serial: append([]byte{0}, a.serial()...)}
		}, codes.Unauthenticated, true},
		"key":  {func(a *testAgent) *adminv1.Quarantine { return &adminv1.Quarantine{KeySha256: keySum(a.chain[0])} }, codes.Unauthenticated, true},
		"name": {func(a *testAgent) *adminv1.Quarantine { return &adminv1.Quarantine{SpiffeId: a.id} }, codes.PermissionDenied, false},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			a := h.join("n1", nil)
			s := a.sync(&nodev1.Hello{})
			s.next()
			h.quarantine(row.what(a))
			if m := s.next(); m.GetEvicted() == nil || m.GetEvicted().GetBanned() == row.back {
				t.Errorf("told: %v", m)
			}
			h.wantCode(s.end(), codes.Unauthenticated)
			h.wantCode(h.reconnectAndIssue(a), row.code)
			_, err := h.attest(h.dial(nil, nil), h.token("n1", nil), newKey(t))
			if row.back != (err == nil) {
				t.Errorf("attested again: %v", err)
			}
		})
	}
}

// An admin's certificate opens neither the API nor the console any more.
func TestV_E3_QuarantinedAdmin(t *testing.T) {
	h := newHouse(t)
	ops := shopEntry("ops")
	ops.Admin = true
	h.apply(ops)
	a := h.join("n1", nil)
	key := newKey(t)
	item := a.item("ops", workload("ops"))
	item.Csr = newCSR(t, key)
	chain := parseChain(t, a.issue(item)[0].GetSvid().GetChain())
	client := adminv1.NewAdminServiceClient(h.dial(key, chain))
	use := func() (overAPI, toConsole error) {
		_, overAPI = client.ListEntries(t.Context(), &adminv1.ListEntriesRequest{})
		_, toConsole = h.server.Admin(t.Context(), &tls.ConnectionState{PeerCertificates: chain})
		return overAPI, toConsole
	}
	for _, q := range []*adminv1.Quarantine{
		{SpiffeId: "spiffe://example.org/app/ops"}, {KeySha256: keySum(chain[0])}, {Serial: chain[0].SerialNumber.Bytes()},
	} {
		if api, console := use(); api != nil || console != nil {
			t.Fatalf("before: %v, %v", api, console)
		}
		h.quarantine(q)
		if api, console := use(); api == nil || console == nil {
			t.Errorf("%v: %v, %v", q, api, console)
		}
		h.lift(q)
	}
}

// Agents are told at once, and first of all; who has carried it out is known, and so
// is who has not. An agent that comes later is told too, and one is told of no names.
func TestV_E3_QuarantineIsPushed(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	a, b := h.join("n1", nil), h.join("n2", nil)
	first := a.sync(&nodev1.Hello{})
	first.next()
	q := &adminv1.Quarantine{SpiffeId: "spiffe://example.org/app/web"}
	h.quarantine(q)
	sum := sha256.Sum256([]byte(q.GetSpiffeId()))
	told := first.next().GetQuarantines()
	if len(told.GetSpiffeIdSha256()) != 1 || !bytes.Equal(told.GetSpiffeIdSha256()[0], sum[:]) || told.GetSequence() == 0 {
		t.Errorf("told: %v", told)
	}
	second := b.sync(&nodev1.Hello{})
	if m := second.next().GetQuarantines(); m.GetSequence() != told.GetSequence() {
		t.Errorf("the first message to one that comes later: %v", m)
	}
	inForce := func(nodes, done uint32, lagging ...string) func() bool {
		return func() bool {
			l, err := admin.ListQuarantines(ctx, &adminv1.ListQuarantinesRequest{})
			return err == nil && l.GetNodes() == nodes && l.GetNodesInForce() == done && len(l.GetLagging()) == len(lagging) &&
				(len(lagging) == 0 || l.GetLagging()[0] == lagging[0])
		}
	}
	first.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{QuarantineSequence: told.GetSequence()}}})
	if !h.eventually(inForce(2, 1, b.id)) {
		t.Error("one of two: the other is not named")
	}
	second.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{QuarantineSequence: told.GetSequence()}}})
	if !h.eventually(inForce(2, 2)) {
		t.Error("not both")
	}
	h.lift(q)
	if m := first.next().GetQuarantines(); len(m.GetSpiffeIdSha256()) != 0 || m.GetSequence() <= told.GetSequence() {
		t.Errorf("lifted: %v", m)
	}
	h.stop()
	h.start()
	a.conn = h.dial(a.key, a.chain)
	a.client = nodev1.NewNodeServiceClient(a.conn)
	// There is none any more: whoever had some is told, whoever had none is not.
	if m := a.sync(&nodev1.Hello{QuarantineSequence: told.GetSequence()}).next(); m.GetQuarantines() == nil {
		t.Errorf("after a restart: %v", m)
	}
}

// What was signed and recorded while the quarantine was added is not handed out: no
// answer that was asked for afterwards has it, whoever races.
func TestV_E3_QuarantineRaces(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	items := make([]*nodev1.IssueItem, 32)
	for i := range items {
		items[i] = a.item("web", workload("web"))
	}
	var wg sync.WaitGroup
	added := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				over := false
				select {
				case <-added:
					over = true
				default:
				}
				resp, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{Items: items})
				if err != nil {
					t.Error(err)
					return
				}
				if !over {
					continue
				}
				for _, r := range resp.GetResults() {
					if r.GetSvid() != nil {
						t.Error("issued after the answer")
					}
				}
				return
			}
		})
	}
	h.quarantine(&adminv1.Quarantine{SpiffeId: "spiffe://example.org/app/web"})
	close(added)
	wg.Wait()
}

// brokenQuarantines is a store that cannot write them.
type brokenQuarantines struct{ Store }

func (brokenQuarantines) PutQuarantines(context.Context, ...*registry.Quarantine) error {
	return errors.New("disk full")
}

// With a store that cannot write it is in force all the same, and that it would be
// forgotten is said, to the caller and in the health, until it is written.
func TestQuarantineIsNotWritten(t *testing.T) {
	var real Store
	h := newHouse(t, func(c *Config) { real = c.Store; c.Store = brokenQuarantines{c.Store} })
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	admin, ctx := h.admin()
	add := &adminv1.AddQuarantineRequest{Quarantine: &adminv1.Quarantine{SpiffeId: "spiffe://example.org/app/web", Reason: "test"}}
	_, err := admin.AddQuarantine(ctx, add)
	if code := statusOf(err, "").Code(); code != codes.Unavailable {
		t.Errorf("code %v", code)
	}
	if res := a.issue(a.item("web", workload("web"))); res[0].GetRefusal().GetReason() != nodev1.Reason_REASON_QUARANTINED {
		t.Error(res[0])
	}
	severity := func() health.Severity {
		for _, c := range h.health.Conditions() {
			if c.Name == conditionQuarantine {
				return c.Severity
			}
		}
		return health.OK
	}
	if severity() != health.Error {
		t.Error("nothing in the health")
	}
	h.server.cfg.Store = real
	if _, err := admin.AddQuarantine(ctx, add); err != nil || severity() != health.OK {
		t.Errorf("again: %v, %v", err, severity())
	}
}

func TestQuarantineIsChecked(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	for name, q := range map[string]*adminv1.Quarantine{
		"nothing":      {Reason: "x"},
		"no reason":    {SpiffeId: "spiffe://example.org/web"},
		"two":          {SpiffeId: "spiffe://example.org/web", Serial: []byte{1}, Reason: "x"},
		"foreign":      {SpiffeId: "spiffe://elsewhere.org/web", Reason: "x"},
		"no SPIFFE ID": {SpiffeId: "web", Reason: "x"},
		"the CA":       {SpiffeId: "spiffe://example.org/meshid/ca", Reason: "x"},
		"short key":    {KeySha256: []byte{1}, Reason: "x"},
		"long serial":  {Serial: make([]byte, 21), Reason: "x"},
	} {
		if _, err := admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: q}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	_, err := admin.LiftQuarantine(ctx, &adminv1.LiftQuarantineRequest{Quarantine: &adminv1.Quarantine{SpiffeId: "spiffe://example.org/web"}})
	if code := statusOf(err, "").Code(); code != codes.NotFound {
		t.Errorf("code %v", code)
	}
}
