package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/audit"
	"github.com/meshid/meshid/pkg/ledger"
)

// callAs makes a call of the admin API through the gate, as a process of a user
// would make it.
func (h *house) callAs(uid uint32, method string, req any, call func(context.Context) error) error {
	ctx := grpcpeer.NewContext(h.t.Context(), &grpcpeer.Peer{AuthInfo: peer.AuthInfo{Peer: peer.ForTest(1, uid, uid)}})
	_, err := h.server.interceptUnary(ctx, req, &grpc.UnaryServerInfo{FullMethod: method},
		func(ctx context.Context, _ any) (any, error) { return nil, call(ctx) })
	return err
}

// TestV_J4_EveryDecisionIsARecord goes through all that a CA decides, with secrets
// planted wherever a request has room: each decision is a record with what it
// rested on, each issuance is judged to be what its record says, and no byte of the
// journal is a secret.
func TestV_J4_EveryDecisionIsARecord(t *testing.T) {
	h := newHouse(t)
	operator := shopEntry("operator")
	operator.SpiffeId, operator.Admin, operator.DnsNames = "spiffe://example.org/operator", true, nil
	templated := shopEntry("templated")
	templated.Workloads = `docker.image.startsWith("registry.internal/shop/")`
	templated.SpiffeId = `spiffe://example.org/{docker.labels["role"]}`
	elsewhere := shopEntry("elsewhere")
	elsewhere.Nodes = `node.labels["zone"] == "b"`
	h.apply(shopEntry("web"), operator, templated, elsewhere)
	h.stop()
	h.start()

	secrets := map[string][]byte{}
	plant := func(name string, secret []byte) { secrets[name] = secret }
	token := h.token("n1", map[string]string{"zone": "a"})
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, "meshid_jt_"))
	if err != nil {
		t.Fatal(err)
	}
	plant("token", []byte(token))
	plant("token's bytes", raw)
	conn := h.dial(nil, nil)
	a := &testAgent{h: h, key: newKey(t)}
	got, err := h.attest(conn, token, a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.use(got)
	if _, err := h.attest(conn, token, newKey(t)); err == nil {
		t.Fatal("a token was used twice")
	}
	renewed, err := a.renew()
	if err != nil {
		t.Fatal(err)
	}
	a.use(renewed)

	// A CSR full of what is none of the CA's business.
	key := newKey(t)
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	plant("key", scalar)
	const canary = "canary-5e5fb4ac-in-a-csr"
	plant("csr", []byte(canary))
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: canary}, DNSNames: []string{canary + ".example.org"}, EmailAddresses: []string{canary + "@example.org"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	first := a.item("web", workload("web"))
	first.Csr, first.Process = csr, &attributesv1.Process{Pid: 4711, StartTime: timestamppb.Now()}
	badCSR := a.item("web", workload("web"))
	badCSR.Csr = append(bytes.Clone(csr), []byte(canary)...)
	role := func(name, role string) *nodev1.IssueItem {
		item := a.item(name, workload("web"))
		item.Workload.Docker.Labels["role"], item.Instance = role, "docker:"+role
		return item
	}
	results := a.issue(first, a.item("web", workload("db")), a.item("elsewhere", workload("elsewhere")),
		a.item("nobody", workload("web")), role("templated", "../x"), role("templated", "operator"), role("templated", "clerk"), badCSR)
	for i, wantSVID := range []bool{true, false, false, false, false, false, true, false} {
		if (results[i].GetSvid() != nil) != wantSVID {
			t.Errorf("item %d is %v", i, results[i])
		}
	}

	// Operators, some of whom may not.
	admin := h.server.AdminService()
	const evict, apply = adminv1.AdminService_EvictNode_FullMethodName, adminv1.AdminService_ApplyEntries_FullMethodName
	err = h.callAs(0, evict, nil, func(ctx context.Context) error {
		_, err := admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: token})
		return err
	})
	h.wantCode(err, codes.NotFound)
	err = h.callAs(4242, apply, nil, func(context.Context) error {
		t.Error("a stranger was let in")
		return nil
	})
	h.wantCode(err, codes.PermissionDenied)
	broken := &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{{Name: token, SpiffeId: token, Workloads: token}}, DryRun: true}
	for _, dry := range []bool{true, false} {
		broken.DryRun = dry
		err = h.callAs(0, apply, broken, func(ctx context.Context) error {
			_, err := admin.ApplyEntries(ctx, broken)
			return err
		})
		h.wantCode(err, codes.InvalidArgument)
	}
	_, ctx := h.admin()
	if _, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.RotateIntermediate(ctx, &adminv1.RotateIntermediateRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"elsewhere"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.BanNode(ctx, &adminv1.BanNodeRequest{Id: a.id, Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	h.wantCode(h.reconnectAndIssue(a), codes.PermissionDenied)
	if _, err := admin.UnbanNode(ctx, &adminv1.UnbanNodeRequest{Id: a.id}); err != nil {
		t.Fatal(err)
	}
	h.stop()

	dir := filepath.Join(h.dir, "ledger")
	found := map[string]*ledgerv1.Record{}
	judged := map[audit.Result]int{}
	for e, err := range ledger.Scan(dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		r := e.Record
		if r.GetInstance() == "ca" { // its own X.509-SVID
			continue
		}
		found[strings.Join(slices.DeleteFunc([]string{
			strings.TrimPrefix(r.GetEvent().String(), "EVENT_"), strings.TrimPrefix(r.GetOutcome().String(), "OUTCOME_"), r.GetReason(),
		}, func(s string) bool { return s == "" }), " ")] = r
		if r.GetVersion() != recordVersion || !r.GetTime().IsValid() || r.GetTrustDomain() != "example.org" || r.GetCaInstance() != "test" {
			t.Errorf("record %d lacks what each has: %v", e.Index, r)
		}
		if r.GetEvent() != ledgerv1.Event_EVENT_ISSUE {
			continue
		}
		v, err := audit.Judge(t.Context(), dir, e.Index, nil)
		if err != nil {
			t.Fatal(err)
		}
		if judged[v.Result]++; v.Result == audit.Different {
			t.Errorf("record %d is judged otherwise: %q, %v", e.Index, v.Problems, r)
		}
	}
	// That there was no entry "nobody" cannot be known here: the start of a CA, which
	// package main records, is not in this journal. And there is the CSR.
	if judged[audit.Same] != 6 || judged[audit.NotJudged] != 2 {
		t.Errorf("judged: %v", judged)
	}
	for name, holds := range map[string]func(*ledgerv1.Record) bool{
		"ENTRY_APPLIED SUCCESS": func(r *ledgerv1.Record) bool {
			return r.GetDefinition().GetName() == r.GetEntry().GetName() && r.GetDiff() != ""
		},
		"ENTRY_LOADED SUCCESS": func(r *ledgerv1.Record) bool {
			return r.GetDefinition() != nil && len(r.GetEntry().GetDigest()) == 32 && r.GetEntry().GetRevision() == 2
		},
		"ENTRY_DELETED SUCCESS": func(r *ledgerv1.Record) bool {
			return r.GetDefinition().GetName() == "elsewhere" && r.GetActor() == "uid:0"
		},
		"TOKEN_CREATED SUCCESS": func(r *ledgerv1.Record) bool {
			return r.GetTokenExpires() != nil && r.GetNode().GetAttributes().GetLabels()["zone"] == "a"
		},
		"TOKEN_USED SUCCESS":             func(r *ledgerv1.Record) bool { return len(r.GetTokenSha256()) == 32 && r.GetNode().GetId() == a.id },
		"TOKEN_USED REFUSED attestation": func(r *ledgerv1.Record) bool { return len(r.GetTokenSha256()) == 32 },
		"ATTEST SUCCESS": func(r *ledgerv1.Record) bool {
			return r.GetVerifiedBy() == "ca" && len(r.GetEvidenceSha256()) == 32 && r.GetKind() == ledgerv1.Kind_KIND_FIRST
		},
		"ATTEST REFUSED attestation": func(r *ledgerv1.Record) bool { return strings.Contains(r.GetDetail(), "used before") },
		"RENEW_AGENT SUCCESS": func(r *ledgerv1.Record) bool {
			return r.GetKind() == ledgerv1.Kind_KIND_RENEWAL && len(r.GetPreviousSerial()) > 0 && r.GetCertificate() != nil
		},
		"ISSUE SUCCESS": func(r *ledgerv1.Record) bool {
			return slices.Equal(r.GetAttestors(), []string{"unix", "docker"}) && r.GetAuthority().GetSha256() != nil
		},
		"ISSUE REFUSED rule_not_matched": func(r *ledgerv1.Record) bool {
			return r.GetMiss().GetField() == "workloads" && r.GetMiss().GetWhy() != ""
		},
		"ISSUE REFUSED node_rule_not_matched": func(r *ledgerv1.Record) bool { return r.GetMiss().GetField() == "nodes" },
		"ISSUE REFUSED entry_unknown":         func(r *ledgerv1.Record) bool { return r.GetEntry().GetName() == "nobody" },
		"ISSUE REFUSED template":              func(r *ledgerv1.Record) bool { return r.GetDetail() != "" },
		"ISSUE REFUSED csr":                   func(r *ledgerv1.Record) bool { return r.GetWorkload() != nil },
		"CALL_REFUSED REFUSED denied": func(r *ledgerv1.Record) bool {
			return r.GetCall() == "Issue" && r.GetNode().GetId() == a.id || r.GetActor() == "uid:4242"
		},
		"CALL_REFUSED REFUSED not_found": func(r *ledgerv1.Record) bool { return r.GetCall() == "EvictNode" && r.GetActor() == "uid:0" },
		"CALL_REFUSED REFUSED invalid":   func(r *ledgerv1.Record) bool { return r.GetCall() == "ApplyEntries" },
		"RENEWAL_ORDERED SUCCESS":        func(r *ledgerv1.Record) bool { return r.GetOrder() != nil && r.GetActor() == "uid:0" },
		"BAN SUCCESS":                    func(r *ledgerv1.Record) bool { return r.GetDetail() == "stolen" },
		"UNBAN SUCCESS":                  func(r *ledgerv1.Record) bool { return r.GetNode().GetId() == a.id },
		"AUTHORITY SUCCESS":              func(r *ledgerv1.Record) bool { return r.GetAuthority().GetState() != "" },
		"BUNDLE SUCCESS":                 func(r *ledgerv1.Record) bool { return len(r.GetBundle().GetRoots()) == 1 },
	} {
		r, ok := found[name]
		if !ok {
			t.Errorf("there is no record of %s", name)
		} else if !holds(r) {
			t.Errorf("the record of %s is %v", name, r)
		}
	}

	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	looked := 0
	for _, f := range files {
		content, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		looked += len(content)
		for name, secret := range secrets {
			for _, form := range [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(base64.StdEncoding.EncodeToString(secret))} {
				if bytes.Contains(content, form) {
					t.Errorf("the %s is in %s", name, f.Name())
				}
			}
		}
	}
	if looked < 4096 {
		t.Errorf("only %d bytes were looked at", looked)
	}
}

// reconnectAndIssue asks for an X.509-SVID over a new connection.
func (h *house) reconnectAndIssue(a *testAgent) error {
	conn := h.dial(a.key, a.chain)
	defer conn.Close()
	_, err := nodev1.NewNodeServiceClient(conn).Issue(h.t.Context(), &nodev1.IssueRequest{})
	return err
}

// Names of attestors are those of the attributes' fields, in their order.
func TestAttestorsOf(t *testing.T) {
	for _, tc := range []struct {
		w    *attributesv1.Workload
		want string
	}{
		{nil, ""},
		{&attributesv1.Workload{}, ""},
		{&attributesv1.Workload{Unix: &attributesv1.Unix{}}, "unix"},
		{workload("web"), "unix docker"},
		{&attributesv1.Workload{Docker: &attributesv1.Docker{}, Ext: map[string]*attributesv1.Values{"b": {}, "a": {}}}, "docker a b"},
	} {
		for range 2 { // the second time from what is known
			if got := strings.Join(attestorsOf(tc.w), " "); got != tc.want {
				t.Errorf("attestors of %v are %q, want %q", tc.w, got, tc.want)
			}
		}
	}
}
