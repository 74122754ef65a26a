package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

// fakeVerifier establishes what it is told to.
type fakeVerifier struct {
	method string
	verify func(ctx context.Context, claim attest.Claim, challenge attest.Challenge) (*attributesv1.Node, error)
}

func (v *fakeVerifier) Method() string { return v.method }

func (v *fakeVerifier) Verify(ctx context.Context, claim attest.Claim, challenge attest.Challenge) (*attributesv1.Node, error) {
	return v.verify(ctx, claim, challenge)
}

func withVerifier(v attest.NodeVerifier) func(*Config) {
	return func(c *Config) { c.Verifiers = append(c.Verifiers, v) }
}

// 200 attestations with one token at the same time: one succeeds.
func TestV_C1_TokenOverTheWire(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Limits.Attestations = 1000 })
	token := h.token("n1", nil)
	conns := make([]func() error, 200)
	for i := range conns {
		key := newKey(t)
		if i%20 == 0 {
			conn := h.dial(nil, nil)
			for j := i; j < i+20; j++ {
				conns[j] = func() error { _, err := h.attest(conn, token, key); return err }
			}
		}
	}
	var won atomic.Int32
	var wg sync.WaitGroup
	for _, try := range conns {
		wg.Go(func() {
			switch err := try(); status.Code(err) {
			case codes.OK:
				won.Add(1)
			case codes.PermissionDenied:
			default:
				t.Errorf("attest: %v", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d attestations succeeded", won.Load())
	}
	success := 0
	for _, r := range h.records(ledgerv1.Event_EVENT_ATTEST) {
		if r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS {
			success++
		}
	}
	if success != 1 {
		t.Errorf("%d attestations are recorded as a success", success)
	}
}

func TestAttestRefused(t *testing.T) {
	result := func(n *attributesv1.Node, err error) *fakeVerifier {
		return &fakeVerifier{"fake", func(context.Context, attest.Claim, attest.Challenge) (*attributesv1.Node, error) { return n, err }}
	}
	node := func(id string) *attributesv1.Node { return &attributesv1.Node{Method: "fake", Id: id} }
	for name, tt := range map[string]struct {
		verifier *fakeVerifier
		change   func(*nodev1.AttestStart)
		want     codes.Code
	}{
		"good":             {verifier: result(node("n"), nil), want: codes.OK},
		"refused":          {verifier: result(nil, fmt.Errorf("canary: %w", attest.ErrRefused)), want: codes.PermissionDenied},
		"cannot tell":      {verifier: result(nil, errors.New("canary")), want: codes.Unavailable},
		"unknown method":   {change: func(s *nodev1.AttestStart) { s.Method = "x509pop\xc2\xa0" }, want: codes.InvalidArgument},
		"no method":        {change: func(s *nodev1.AttestStart) { s.Method = "" }, want: codes.InvalidArgument},
		"no CSR":           {change: func(s *nodev1.AttestStart) { s.Csr = nil }, want: codes.InvalidArgument},
		"broken proof":     {change: func(s *nodev1.AttestStart) { s.Csr[len(s.Csr)-1] ^= 1 }, want: codes.InvalidArgument},
		"long evidence":    {change: func(s *nodev1.AttestStart) { s.Evidence = make([]byte, maxEvidenceBytes+1) }, want: codes.InvalidArgument},
		"long version":     {change: func(s *nodev1.AttestStart) { s.AgentVersion = strings.Repeat("x", 65) }, want: codes.InvalidArgument},
		"hostile version":  {change: func(s *nodev1.AttestStart) { s.AgentVersion = "v1\x1b[2J" }, want: codes.InvalidArgument},
		"id climbs":        {verifier: result(node("../ca"), nil), want: codes.PermissionDenied},
		"id with slash":    {verifier: result(node("a/b"), nil), want: codes.PermissionDenied},
		"id empty":         {verifier: result(node(""), nil), want: codes.PermissionDenied},
		"id NUL":           {verifier: result(node("a\x00"), nil), want: codes.PermissionDenied},
		"id 4-byte rune":   {verifier: result(node("a\U0001F600"), nil), want: codes.PermissionDenied},
		"other method":     {verifier: result(&attributesv1.Node{Method: "join_token", Id: "n"}, nil), want: codes.PermissionDenied},
		"nil node":         {verifier: result(nil, nil), want: codes.PermissionDenied},
		"large attributes": {verifier: result(&attributesv1.Node{Method: "fake", Id: "n", Labels: map[string]string{"a": strings.Repeat("x", maxNodeAttributes)}}, nil), want: codes.PermissionDenied},
		"for ever challenging": {verifier: &fakeVerifier{"fake", func(ctx context.Context, _ attest.Claim, challenge attest.Challenge) (*attributesv1.Node, error) {
			for {
				if _, err := challenge(ctx, []byte("again")); err != nil {
					return nil, err
				}
			}
		}}, want: codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			v := tt.verifier
			if v == nil {
				v = result(node("n"), nil)
			}
			h := newHouse(t, withVerifier(v))
			start := &nodev1.AttestStart{Method: "fake", Csr: newCSR(t, newKey(t)), AgentVersion: "v0"}
			if tt.change != nil {
				tt.change(start)
			}
			stream, err := nodev1.NewNodeServiceClient(h.dial(nil, nil)).Attest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{Start: start}})
			for err == nil {
				var resp *nodev1.AttestResponse
				if resp, err = stream.Recv(); resp.GetIdentity() != nil {
					break
				}
				stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Response{Response: []byte("r")}})
			}
			h.wantCode(err, tt.want)
			if err != nil && strings.Contains(err.Error(), "canary") {
				t.Errorf("the caller learns what is inside: %v", err)
			}
			records := h.records(ledgerv1.Event_EVENT_ATTEST)
			if tt.want == codes.Unavailable {
				return // nothing was decided
			}
			want := ledgerv1.Outcome_OUTCOME_REFUSED
			if tt.want == codes.OK {
				want = ledgerv1.Outcome_OUTCOME_SUCCESS
			}
			if len(records) != 1 || records[0].GetOutcome() != want {
				t.Errorf("records are %v", records)
			}
		})
	}
}

func TestAttestProtocol(t *testing.T) {
	h := newHouse(t)
	client := nodev1.NewNodeServiceClient(h.dial(nil, nil))
	for name, first := range map[string]*nodev1.AttestRequest{
		"response first": {Step: &nodev1.AttestRequest_Response{Response: []byte("x")}},
		"nothing":        {},
	} {
		stream, err := client.Attest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		stream.Send(first)
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The agent leaves without a word.
	stream, err := client.Attest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.CloseSend()
	if _, err := stream.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("an attestation without start: %v", err)
	}
}

// An attestation has 10 s, whatever the caller does, and only so many places.
func TestAttestIsBounded(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Limits.Attestations = 8 })
	client := nodev1.NewNodeServiceClient(h.dial(nil, nil))
	// A quarter of the places are for one address: two of these silent streams get
	// one, until they take too long or say that they are done.
	const streams = 16
	ended := make(chan error, streams)
	var open []nodev1.NodeService_AttestClient
	for range streams {
		stream, err := client.Attest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, stream)
		go func() {
			_, err := stream.Recv()
			ended <- err
		}()
	}
	refused := 0
	for i := range streams {
		err := <-ended
		if err == nil {
			t.Error("a silent attestation succeeded")
		}
		if status.Code(err) == codes.ResourceExhausted {
			refused++
		}
		if i+1 == streams-2 { // no more than these two can have a place
			for _, s := range open {
				if err := s.CloseSend(); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if refused == 0 {
		t.Error("no stream was refused")
	}
}

func TestAttestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{tasks: newTasks()}
		block := make(chan struct{})
		a := &attestation{s: s, c: &caller{}, stream: &silentStream{block: block}}
		ctx, cancel := context.WithTimeout(t.Context(), attestTimeout)
		defer cancel()
		began := time.Now()
		_, err := a.receive(ctx)
		if took := time.Since(began); err == nil || took != attestTimeout {
			t.Errorf("receive returned %v after %v", err, took)
		}
		close(block)
		s.tasks.wait()
		if _, err := a.receive(t.Context()); err == nil {
			t.Error("a goroutine was started after the end")
		}
	})
}

// silentStream never receives.
type silentStream struct {
	nodev1.NodeService_AttestServer
	block chan struct{}
}

func (s *silentStream) Recv() (*nodev1.AttestRequest, error) {
	<-s.block
	return nil, io.EOF
}

// What a verifier is given is bound to the key of the CSR.
func TestAttestBinding(t *testing.T) {
	var got []byte
	v := &fakeVerifier{"fake", func(_ context.Context, c attest.Claim, _ attest.Challenge) (*attributesv1.Node, error) {
		got = c.Binding
		return &attributesv1.Node{Method: "fake", Id: "n"}, nil
	}}
	h := newHouse(t, withVerifier(v))
	key := newKey(t)
	stream, err := nodev1.NewNodeServiceClient(h.dial(nil, nil)).Attest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{Start: &nodev1.AttestStart{Method: "fake", Csr: newCSR(t, key)}}})
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	leaf := parseChain(t, resp.GetIdentity().GetChain())[0]
	if want := sha256.Sum256(leaf.RawSubjectPublicKeyInfo); string(got) != string(want[:]) || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the binding is not that of the certified key")
	}
	if life := time.Until(leaf.NotAfter); life > defaultAgent || life < defaultAgent-time.Minute {
		t.Errorf("the agent's X.509-SVID lives %v", life)
	}
}

// renew replaces the agent's X.509-SVID and returns the answer without using it.
func (a *testAgent) renew() (*nodev1.AgentIdentity, error) {
	a.h.t.Helper()
	key := newKey(a.h.t)
	resp, err := a.client.Renew(a.h.t.Context(), &nodev1.RenewRequest{Csr: newCSR(a.h.t, key), PreviousSerial: a.serial()})
	if err != nil {
		return nil, err
	}
	a.key = key
	return resp.GetIdentity(), nil
}

func TestRenew(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	old := *a
	old.conn = nil
	next, err := a.renew()
	if err != nil {
		t.Fatal(err)
	}
	// Until the new one is used, the old connection is as good.
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{}); err != nil {
		t.Errorf("the old one before the new one is used: %v", err)
	}
	a.use(next)
	if a.id != old.id {
		t.Errorf("renewed as %s", a.id)
	}
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{}); err != nil {
		t.Fatal(err)
	}
	records := h.records(ledgerv1.Event_EVENT_RENEW_AGENT)
	if len(records) != 1 || string(records[0].GetPreviousSerial()) != string(old.serial()) || records[0].GetNode().GetId() != a.id {
		t.Errorf("records are %v", records)
	}
	// In the overlap, the old one still issues.
	node, _ := h.server.registry.Node(a.id)
	if _, verdict := h.server.registry.Authenticate(a.id, old.serial(), time.Now().Add(registry.Overlap/2)); verdict != registry.Accepted {
		t.Errorf("in the overlap: %v", verdict)
	}
	if _, verdict := h.server.registry.Authenticate(a.id, old.serial(), node.PreviousUntil); verdict != registry.Superseded {
		t.Errorf("after the overlap: %v", verdict)
	}
	// The serial must be that of the connection.
	_, err = a.client.Renew(t.Context(), &nodev1.RenewRequest{Csr: newCSR(t, newKey(t)), PreviousSerial: old.serial()})
	h.wantCode(err, codes.InvalidArgument)
	_, err = a.client.Renew(t.Context(), &nodev1.RenewRequest{Csr: []byte("x"), PreviousSerial: a.serial()})
	h.wantCode(err, codes.InvalidArgument)
}

// An answer that was lost is no clone: as long as the new one was never used,
// the agent renews with the old one again.
func TestRenewAnswerLost(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	key := a.key
	lost, err := a.renew()
	if err != nil {
		t.Fatal(err)
	}
	lostKey := a.key
	a.key = key
	again, err := a.renew()
	if err != nil {
		t.Fatalf("renewal after a lost answer: %v", err)
	}
	newest := a.key
	a.use(again)
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{}); err != nil {
		t.Fatal(err)
	}
	// The one that was lost has never been anybody's.
	a.key = lostKey
	a.use(lost)
	_, err = a.client.Issue(t.Context(), &nodev1.IssueRequest{})
	h.wantCode(err, codes.Unauthenticated)
	a.key = newest
}

// A copy of an agent's key is found out when either of the two renews.
func TestRenewByClone(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	clone := *a
	clone.conn = h.dial(a.key, a.chain)
	clone.client = nodev1.NewNodeServiceClient(clone.conn)
	next, err := a.renew()
	if err != nil {
		t.Fatal(err)
	}
	a.use(next)
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = clone.renew()
	h.wantCode(err, codes.Unauthenticated)
	records := h.records(ledgerv1.Event_EVENT_RENEW_AGENT)
	last := records[len(records)-1]
	if last.GetReason() != reasonClone || last.GetOutcome() != ledgerv1.Outcome_OUTCOME_REFUSED || last.GetNode().GetId() != a.id {
		t.Errorf("record is %v", last)
	}
	severity := func() health.Severity {
		for _, c := range h.health.Conditions() {
			if c.Name == conditionClone {
				return c.Severity
			}
		}
		return health.Error
	}
	if severity() != health.Warning {
		t.Error("no condition reports the clone")
	}
	// Older than the one before: refused at the gate, and noticed there.
	if next, err = a.renew(); err != nil {
		t.Fatal(err)
	}
	a.use(next)
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = clone.renew()
	h.wantCode(err, codes.Unauthenticated)
	_, err = clone.client.Issue(t.Context(), &nodev1.IssueRequest{})
	h.wantCode(err, codes.Unauthenticated)
	admin, ctx := h.admin()
	if _, err := admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: a.id, Reason: "cloned"}); err != nil {
		t.Fatal(err)
	}
	if severity() != health.OK {
		t.Error("the condition stays after the eviction")
	}
}

// Eviction and ban are in force at once: the stream is told and ends, nothing is
// issued or renewed, the connection is closed.
func TestV_E7_EvictAndBan(t *testing.T) {
	for _, ban := range []bool{false, true} {
		t.Run(fmt.Sprintf("ban=%v", ban), func(t *testing.T) {
			h := newHouse(t)
			h.apply(shopEntry("web"))
			a, other := h.join("n1", nil), h.join("n2", nil)
			s, so := a.sync(&nodev1.Hello{}), other.sync(&nodev1.Hello{})
			if s.next().GetSnapshot() == nil || so.next().GetSnapshot() == nil {
				t.Fatal("no snapshot")
			}
			admin, ctx := h.admin()
			began := time.Now()
			var err error
			if ban {
				_, err = admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: a.id, Reason: "stolen"})
			} else {
				_, err = admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: a.id, Reason: "stolen"})
			}
			if err != nil {
				t.Fatal(err)
			}
			e := s.next().GetEvicted()
			if e.GetReason() != "stolen" || e.GetBanned() != ban {
				t.Errorf("the agent is told %v", e)
			}
			h.wantCode(s.end(), codes.Unauthenticated)
			t.Logf("told and ended after %v", time.Since(began))
			want := codes.Unauthenticated
			if ban {
				want = codes.PermissionDenied
			}
			err = status.Error(codes.Unavailable, "not asked yet")
			for status.Code(err) == codes.Unavailable { // the connection is being closed
				_, err = a.client.Issue(t.Context(), &nodev1.IssueRequest{Items: []*nodev1.IssueItem{a.item("web", workload("web"))}})
			}
			h.wantCode(err, want)
			_, err = a.renew()
			h.wantCode(err, want)
			_, err = h.dialSync(a)
			h.wantCode(err, want)
			h.server.conns.mu.Lock()
			tracked := len(h.server.conns.byID[a.id])
			h.server.conns.mu.Unlock()
			if tracked > 1 { // the one that was made by the calls above
				t.Errorf("%d connections are left", tracked)
			}
			// The other node is not affected.
			if res := other.issue(other.item("web", workload("web"))); res[0].GetSvid() == nil {
				t.Error(res[0])
			}
			event := ledgerv1.Event_EVENT_EVICT
			if ban {
				event = ledgerv1.Event_EVENT_BAN
			}
			if r := h.records(event); len(r) != 1 || r[0].GetNode().GetId() != a.id || r[0].GetActor() != "uid:0" || r[0].GetDetail() != "stolen" {
				t.Errorf("records are %v", r)
			}
			// It survives a restart.
			h.stop()
			h.start()
			_, err = h.attest(h.dial(nil, nil), h.token("n1", nil), newKey(t))
			if ban {
				h.wantCode(err, codes.PermissionDenied)
				admin, ctx := h.admin()
				if _, err := admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: a.id}); status.Code(statusOf(err, "").Err()) != codes.FailedPrecondition {
					t.Errorf("a ban was turned into an eviction: %v", err)
				}
				if _, err := admin.UnbanNode(ctx, &adminv1.UnbanNodeRequest{Id: a.id}); err != nil {
					t.Fatal(err)
				}
				if _, err := admin.UnbanNode(ctx, &adminv1.UnbanNodeRequest{Id: a.id}); err == nil {
					t.Error("unbanned twice")
				}
				_, err = h.attest(h.dial(nil, nil), h.token("n1", nil), newKey(t))
				if len(h.records(ledgerv1.Event_EVENT_UNBAN)) != 1 {
					t.Error("no record of the lifted ban")
				}
			}
			if err != nil {
				t.Errorf("attest again: %v", err)
			}
		})
	}
}

// dialSync opens a stream and waits for the first answer.
func (h *house) dialSync(a *testAgent) (*nodev1.SyncResponse, error) {
	stream, err := a.client.Sync(h.t.Context())
	if err != nil {
		return nil, err
	}
	stream.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{}}})
	return stream.Recv()
}

// A node that attests again: what it had before is worth nothing.
func TestAttestAgain(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	s := a.sync(&nodev1.Hello{})
	s.next()
	b := h.join("n1", map[string]string{"zone": "b"})
	if b.id != a.id {
		t.Fatalf("%s and %s", a.id, b.id)
	}
	h.wantCode(s.end(), codes.Unauthenticated)
	_, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{})
	h.wantCode(err, codes.Unauthenticated)
	if res := b.issue(b.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Error(res[0])
	}
}

func TestAdminNodeErrors(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	for name, err := range map[string]error{
		"evict": second(admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: "spiffe://example.org/x"})),
		"ban":   second(admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: ""})),
		"unban": second(admin.UnbanNode(ctx, &adminv1.UnbanNodeRequest{Id: "\xff"})),
		"token": second(admin.DeleteToken(ctx, &adminv1.DeleteTokenRequest{Id: "00000000"})),
	} {
		if got := statusOf(err, "").Code(); got != codes.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := second(admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Reason: strings.Repeat("x", 1000)})); statusOf(err, "").Code() != codes.InvalidArgument {
		t.Errorf("long reason: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestTokensOfAdmin(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	for name, req := range map[string]*adminv1.CreateTokenRequest{
		"climbing":     {NodeName: "../x"},
		"slash":        {NodeName: "a/b"},
		"long ttl":     {Ttl: durationOf(maxTokenTTL + 1)},
		"negative ttl": {Ttl: durationOf(-1)},
		"zero ttl":     {Ttl: durationOf(0)},
		"empty label":  {Labels: map[string]string{"": "x"}},
		"long label":   {Labels: map[string]string{"x": strings.Repeat("x", 257)}},
	} {
		if err := second(admin.CreateToken(ctx, req)); statusOf(err, "").Code() != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	made, err := admin.CreateToken(ctx, &adminv1.CreateTokenRequest{Labels: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.ParseID(made.GetNodeId())
	if err != nil || !strings.HasPrefix(id.Path(), "/meshid/node/join_token/") {
		t.Errorf("random node is %v, %v", id, err)
	}
	list, err := admin.ListTokens(ctx, &adminv1.ListTokensRequest{})
	if err != nil || len(list.GetTokens()) != 1 {
		t.Fatalf("tokens are %v, %v", list, err)
	}
	tok := list.GetTokens()[0]
	if len(tok.GetId()) != 8 || tok.GetNodeId() != made.GetNodeId() || tok.GetCreatedBy() != "uid:0" || tok.GetLabels()["a"] != "b" {
		t.Errorf("token is %v", tok)
	}
	if _, err := admin.DeleteToken(ctx, &adminv1.DeleteTokenRequest{Id: tok.GetId()}); err != nil {
		t.Fatal(err)
	}
	_, err = h.attest(h.dial(nil, nil), made.GetToken(), newKey(t))
	h.wantCode(err, codes.PermissionDenied)
	if len(h.records(ledgerv1.Event_EVENT_TOKEN_CREATED)) != 1 || len(h.records(ledgerv1.Event_EVENT_TOKEN_DELETED)) != 1 {
		t.Error("tokens are not recorded")
	}
}
