package conformance

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/test/local"
)

// TestV_B1_NamesInRequests: whatever names a CSR has, the certificate has those
// of the entry.
func TestV_B1_NamesInRequests(t *testing.T) {
	ignoredRequest(t, "v-b1", nameRequests(t))
}

// TestV_B3_ClaimsInRequests: authority, unknown critical extensions, constraints,
// and far too much of everything.
func TestV_B3_ClaimsInRequests(t *testing.T) {
	many := make([]string, 1000)
	for i := range many {
		many[i] = fmt.Sprintf("host-%d.evil.internal", i)
	}
	requests := authorityRequests()
	requests["unknown critical extension"] = asking(extensionOf([]int{1, 2, 3, 4, 5}, 0x05, 0x00))
	requests["name constraints"] = asking(extensionOf([]int{2, 5, 29, 30}, 0x30, 0x00))
	requests["a thousand names"] = &x509.CertificateRequest{DNSNames: many}
	requests["long name"] = &x509.CertificateRequest{Subject: pkix.Name{CommonName: strings.Repeat("x", 5000)}}
	ignoredRequest(t, "v-b3", requests)
}

// TestV_B12_NoControlBytes: DNS names come in neither through entries nor
// through what an agent says, unless they are DNS names.
func TestV_B12_NoControlBytes(t *testing.T) {
	w := shared(t)
	uid := newUser()
	bad := []string{
		"a\x00.internal", "a.internal\x00.evil", "a\n.internal", "a b.internal", "\x7f.internal", "ä.internal", "spiffe://example.org/x",
		"a@b.internal", "..", "a..internal", "-a.internal", "a.internal.", ".", "%41.internal", "a/b", strings.Repeat("x", 64) + ".internal", strings.Repeat("x.", 130) + "x",
	}
	for _, name := range bad {
		e := entry("v-b12", uid)
		e.DnsNames = []string{name}
		if err := w.tryApply(t, e); status.Code(err) != codes.InvalidArgument && status.Code(err) != codes.Internal { // gRPC itself refuses what is not UTF-8
			t.Errorf("entry with %q: %v", name, err)
		}
	}
	e := entry("v-b12-template", uid)
	e.Workloads = fmt.Sprintf(`unix.uid == %d && docker.image == "x"`, uid)
	e.DnsNames = []string{`{docker.labels["host"]}.internal`}
	w.apply(t, e)
	r := join(t, w.ca, "rogue-v-b12", nil)
	of := func(host string) *nodev1.IssueItem {
		i := item(e.GetName(), uid, csrOf(t, newKey(t), nil))
		i.Instance = fmt.Sprintf("v-b12-%.32x", host)
		i.Workload.Docker = &attributesv1.Docker{Image: "x", Labels: map[string]string{"host": host}}
		return i
	}
	// Of what stands in braces, all that would not be labels of a name.
	for _, host := range []string{
		"", ".", "..", "a\x00", "a\x00.evil", "a\n", "a b", "\x7f", "ä", "spiffe://example.org/x", "a@b", "a..b", "-a", "a-", "%41", "a/b", "*",
		strings.Repeat("x", 64), strings.Repeat("x.", 150) + "x",
	} {
		r.refused(t, of(host), nodev1.Reason_REASON_TEMPLATE)
	}
	_, chain := r.issued(t, of("good"))
	checkLeaf(t, chain, e.GetSpiffeId(), "good.internal")
}

// TestV_E1_RogueAgentGetsItsOwnOnly: an agent that asks for every entry there is,
// with attributes that fit each, gets what its node is entitled to, and nothing
// else by any name.
func TestV_E1_RogueAgentGetsItsOwnOnly(t *testing.T) {
	w := shared(t)
	entitled := make(map[string]bool)
	var entries []*entryv1.Entry
	rules := []struct {
		nodes string
		mine  bool
	}{
		{"", true},
		{`node.labels["zone"] == "a"`, true},
		{`node.id == "rogue-v-e1" && node.method == "join_token"`, true},
		{`node.labels["zone"] == "b"`, false},
		{`node.labels["role"] == "db"`, false},
		{`node.id == "shared"`, false},
		{`node.id.startsWith("rogue-v-e1-")`, false},
		{`node.x509pop.subject_cn == "rogue-v-e1"`, false},
	}
	for i := range 5 * len(rules) {
		e := entry(fmt.Sprintf("v-e1-%d", i), 70_000+uint32(i))
		e.Nodes = rules[i%len(rules)].nodes
		entitled[e.GetName()] = rules[i%len(rules)].mine
		entries = append(entries, e)
	}
	admin := entry("v-e1-admin", 70_999)
	admin.Admin, admin.Nodes = true, `node.id == "shared"`
	w.apply(t, append(entries, admin)...)

	r := join(t, w.ca, "rogue-v-e1", map[string]string{"zone": "a"})
	got, want := make(map[string]string), make(map[string]string)
	var items []*nodev1.IssueItem
	for i, e := range entries {
		items = append(items, item(e.GetName(), 70_000+uint32(i), csrOf(t, newKey(t), nil)))
		if entitled[e.GetName()] {
			want[e.GetName()] = e.GetSpiffeId()
		}
	}
	for _, name := range []string{"v-e1-admin", "", "*", "V-E1-0", "v-e1-3 ", "v-e1-3\x00", "../v-e1-3", "spiffe://" + td + "/v-e1-3", strings.Repeat("x", 5000)} {
		items = append(items, item(name, 70_999, csrOf(t, newKey(t), nil)))
	}
	for i, result := range r.issue(t, items...) {
		if svid := result.GetSvid(); svid != nil {
			got[items[i].GetEntry()] = svid.GetSpiffeId()
			checkLeaf(t, parseAll(t, svid.GetChain()), svid.GetSpiffeId())
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("entitled to -, issued +:\n%s", diff)
	}

	// Of the others it is not told either.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := r.client.Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{}}}); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.GetSnapshot() == nil {
			continue
		}
		for _, e := range m.GetSnapshot().GetEntries() {
			if mine, ours := entitled[e.GetName()]; ours && !mine || e.GetName() == "v-e1-admin" {
				t.Errorf("it is told of %s", e.GetName())
			}
		}
		break
	}

	// Nor can it do what operators do, with its own identity or one it got.
	i := item("v-e1-0", 70_000, csrOf(t, newKey(t), nil))
	i.Instance = "another"
	key := newKey(t)
	i.Csr = csrOf(t, key, nil)
	workload, _ := r.issued(t, i)
	for what, conn := range map[string]*grpc.ClientConn{
		"node": dialCA(t, w.ca, r.svid), "workload": dialCA(t, w.ca, svidOf(t, workload.GetChain(), key)),
	} {
		if _, err := adminv1.NewAdminServiceClient(conn).CreateToken(ctx, &adminv1.CreateTokenRequest{}); !turnedAway(err) {
			t.Errorf("%s makes a token: %v", what, err)
		}
		if _, err := adminv1.NewAdminServiceClient(conn).ListEntries(ctx, &adminv1.ListEntriesRequest{}); !turnedAway(err) {
			t.Errorf("%s lists entries: %v", what, err)
		}
	}
	if _, err := nodev1.NewNodeServiceClient(dialCA(t, w.ca, svidOf(t, workload.GetChain(), key))).Issue(ctx, &nodev1.IssueRequest{Items: items[:1]}); !turnedAway(err) {
		t.Errorf("a workload has something issued: %v", err)
	}
}

// TestV_E2_NoIdentityByPosition: to be on the same machine is worth nothing at
// any listener of the CA.
func TestV_E2_NoIdentityByPosition(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("v-e2", uid))
	want := []string{w.ca.Listen, w.ca.Metrics}
	slices.Sort(want)
	if diff := cmp.Diff(want, listening(t, w.ca.PID())); diff != "" {
		t.Fatal(diff)
	}
	conns := map[string]*grpc.ClientConn{"no certificate": dialCA(t, w.ca, nil)}
	for _, address := range want {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns["plain text to "+address] = conn
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// What proxies add, and what one might believe.
	ctx = header(ctx, "true")
	for what, conn := range conns {
		node, admin := nodev1.NewNodeServiceClient(conn), adminv1.NewAdminServiceClient(conn)
		for method, err := range map[string]error{
			"Issue": func() error {
				_, err := node.Issue(ctx, &nodev1.IssueRequest{Items: []*nodev1.IssueItem{item("v-e2", uid, csrOf(t, newKey(t), nil))}})
				return err
			}(),
			"Renew": func() error {
				_, err := node.Renew(ctx, &nodev1.RenewRequest{Csr: csrOf(t, newKey(t), nil)})
				return err
			}(),
			"Sync": func() error {
				s, err := node.Sync(ctx)
				if err != nil {
					return err
				}
				_ = s.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{}}}) // Recv says why it failed
				_, err = s.Recv()
				return err
			}(),
			"Attest": func() error {
				_, err := attestWith(ctx, conn, &nodev1.AttestStart{Method: "join_token", Csr: csrOf(t, newKey(t), nil)})
				return err
			}(),
			"CreateToken": func() error {
				_, err := admin.CreateToken(ctx, &adminv1.CreateTokenRequest{})
				return err
			}(),
		} {
			if err == nil {
				t.Errorf("%s: %s is served", what, method)
			}
			if strings.HasPrefix(what, "no") && method != "Attest" && !turnedAway(err) {
				t.Errorf("%s: %s: %v", what, method, err)
			}
		}
	}
	// The admin socket is root's.
	conn, err := grpc.NewClient("passthrough:///admin", callerOf(t, w.ca.AdminSocket, uid).dialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := adminv1.NewAdminServiceClient(conn).CreateToken(ctx, &adminv1.CreateTokenRequest{}); err == nil {
		t.Error("another user makes a token")
	}
}

// TestV_E9_NothingFeedsItsOwnEntitlement: whatever an agent reports, claims about itself
// or asks for in the CSR of a renewal, its node's attributes and the entries that it
// may have stay as they were.
func TestV_E9_NothingFeedsItsOwnEntitlement(t *testing.T) {
	w := shared(t)
	uid := newUser()
	mine, others := entry("v-e9-mine", uid), entry("v-e9-others", uid)
	mine.Nodes, others.Nodes = `node.labels["zone"] == "a"`, `node.labels["zone"] == "b" || node.id == "shared" || node.method == "x509pop"`
	w.apply(t, mine, others)
	r := join(t, w.ca, "rogue-v-e9", map[string]string{"zone": "a"})
	id := r.svid.ID.String()
	// told returns what the CA says of this node, after the messages.
	told := func(hello *nodev1.Hello, messages ...*nodev1.SyncRequest) *nodev1.Snapshot {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		s, err := r.client.Sync(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range append([]*nodev1.SyncRequest{{Message: &nodev1.SyncRequest_Hello{Hello: hello}}}, messages...) {
			if err := s.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		for {
			m, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if m.GetSnapshot() != nil {
				return m.GetSnapshot()
			}
		}
	}
	isolated := func(what string, snapshot *nodev1.Snapshot, want *attributesv1.Node) {
		t.Helper()
		if diff := cmp.Diff(want, snapshot.GetNode(), protocmp.Transform()); diff != "" {
			t.Errorf("%s: the node's attributes -before +after:\n%s", what, diff)
		}
		for _, e := range snapshot.GetEntries() {
			if e.GetName() == others.GetName() {
				t.Errorf("%s: it is told of %s", what, e.GetName())
			}
		}
		i := item(mine.GetName(), uid, csrOf(t, newKey(t), nil))
		i.Instance = what
		r.issued(t, i)
		i = item(others.GetName(), uid, csrOf(t, newKey(t), nil))
		i.Instance = what
		r.refused(t, i, nodev1.Reason_REASON_ENTRY_UNKNOWN)
	}
	before := told(&nodev1.Hello{}).GetNode()
	if before.GetLabels()["zone"] != "a" {
		t.Fatalf("the node is %v", before)
	}
	isolated("at first", told(&nodev1.Hello{}), before)

	// All that an agent may report, as bold as can be.
	workload := item(others.GetName(), uid, nil).GetWorkload()
	reports := []*nodev1.SyncRequest{
		{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{Revision: math.MaxUint64, BundleSequence: math.MaxUint64}}},
		{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: &nodev1.BundleAcks{Streams: math.MaxUint32, Sequence: math.MaxUint64, Acknowledged: math.MaxUint32}}},
		{Message: &nodev1.SyncRequest_InstancesEnded{InstancesEnded: &nodev1.InstancesEnded{Instances: []*nodev1.InstancesEnded_Instance{{Instance: "docker:x", Serials: [][]byte{{1}}}}}}},
		{Message: &nodev1.SyncRequest_Inspected{Inspected: &nodev1.Inspected{Request: 1, Workload: workload, Instance: "docker:x"}}},
	}
	bold := &nodev1.Hello{AgentVersion: `shared", "zone": "b`, Epoch: "x", Revision: math.MaxUint64, BundleSequence: math.MaxUint64, Rotated: math.MaxUint64}
	isolated("after reports", told(bold, reports...), before)

	// A renewal that asks to be another node.
	key := newKey(t)
	renewal, err := r.client.Renew(t.Context(), &nodev1.RenewRequest{
		Csr: csrOf(t, key, &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: "shared"}, URIs: []*url.URL{{Scheme: "spiffe", Host: td, Path: "/meshid/node/join_token/shared"}},
		}),
		PreviousSerial: r.svid.Certificates[0].SerialNumber.Bytes(),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.svid = svidOf(t, renewal.GetIdentity().GetChain(), key)
	if got := r.svid.ID.String(); got != id {
		t.Fatalf("renewed as %s", got)
	}
	r.client = nodev1.NewNodeServiceClient(dialCA(t, w.ca, r.svid))
	isolated("after a renewal", told(&nodev1.Hello{}), before)

	nodes, err := w.ca.Admin.ListNodes(t.Context(), &adminv1.ListNodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes.GetNodes() {
		if n.GetId() == id {
			if diff := cmp.Diff(before, n.GetAttributes(), protocmp.Transform()); diff != "" {
				t.Errorf("operators are shown -before +after:\n%s", diff)
			}
		}
	}
}

// TestV_E7_BanBites: streams end, all is withdrawn, and nothing is renewed or
// attested again before the ban is lifted.
func TestV_E7_BanBites(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	w.apply(t, entry("v-e7", uid))
	s := w.as(t, uid).stream(t)
	s.next(t)
	r := join(t, w.ca, "rogue-v-e7", nil)
	sync, err := r.client.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := sync.Send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := sync.Recv(); err != nil {
		t.Fatal(err)
	}
	ids := []string{w.agent.NodeID, r.svid.ID.String()}
	// An agent of ours leaves with a report; the rogue is told, and says nothing.
	for i, want := range []string{"1 of 1 nodes, 1 of 1 streams have acknowledged\nout of use: time to effect p50 ", "0 of 0 streams have acknowledged, 1 agents are too old to say\n"} {
		if out, err := w.ca.Command(t, "node", "ban", ids[i], "--reason", "stolen", "--wait", "--timeout", "60s"); err != nil || !strings.Contains(out, want) {
			t.Errorf("%v\n%s", err, out)
		}
	}
	// From the answer on nothing is issued, and the stream is ended for it.
	if _, err := r.client.Issue(t.Context(), &nodev1.IssueRequest{Items: []*nodev1.IssueItem{item("v-e7", uid, csrOf(t, newKey(t), nil))}}); !turnedAway(err) {
		t.Errorf("issue: %v", err)
	}
	if _, err := r.client.Renew(t.Context(), &nodev1.RenewRequest{
		Csr: csrOf(t, newKey(t), nil), PreviousSerial: r.svid.Certificates[0].SerialNumber.Bytes(),
	}); !turnedAway(err) {
		t.Errorf("renew: %v", err)
	}
	for {
		if _, err := sync.Recv(); err != nil {
			if !turnedAway(err) {
				t.Errorf("stream: %v", err)
			}
			break
		}
	}
	if err := s.end(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("workload: %v", err)
	}
	again := func() error {
		_, err := attestNode(t.Context(), dialCA(t, w.ca, nil), newToken(t, w.ca, "rogue-v-e7", nil), csrOf(t, newKey(t), nil))
		return err
	}
	if err := again(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("attested again: %v", err)
	}
	if _, err := w.ca.Admin.UnbanNode(t.Context(), &adminv1.UnbanNodeRequest{Id: ids[1]}); err != nil {
		t.Fatal(err)
	}
	if err := again(); err != nil {
		t.Errorf("no longer banned: %v", err)
	}
}

// TestV_E3_QuarantineBites: seen from the workload, from an operator and from an agent
// that keeps asking.
func TestV_E3_QuarantineBites(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	w.apply(t, entry("v-e3-q", uid))
	s := w.as(t, uid).stream(t)
	id := s.next(t).GetSvids()[0].GetSpiffeId()
	r := join(t, w.ca, "rogue-v-e3-q", nil)
	ask := func() *nodev1.IssueResult {
		t.Helper()
		return r.issue(t, item("v-e3-q", uid, csrOf(t, newKey(t), nil)))[0]
	}
	if ask().GetSvid() == nil {
		t.Fatal("the rogue is not entitled: this test shows nothing")
	}
	out, err := w.ca.Command(t, "quarantine", "add", "--spiffe-id", id, "--reason", "test", "--wait", "--timeout", "60s")
	// Of the rogue, which has no stream, nothing is heard.
	if err != nil || !strings.Contains(out, "carried out on 1 of 2 nodes, 1 of 1 streams have acknowledged\nout of use: time to effect p50 ") || !strings.Contains(out, "rogue-v-e3-q: not connected") {
		t.Errorf("%v\n%s", err, out)
	}
	for range 3 {
		if got := ask().GetRefusal().GetReason(); got != nodev1.Reason_REASON_QUARANTINED {
			t.Errorf("the rogue: %v", got)
		}
	}
	if err := s.end(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("workload: %v", err)
	}
	if out := w.ca.MustCommand(t, "quarantine", "list"); !strings.Contains(out, id) || !strings.Contains(out, "uid:0") {
		t.Errorf("list:\n%s", out)
	}
	w.ca.MustCommand(t, "quarantine", "lift", "--spiffe-id", id)
	if got := w.as(t, uid).stream(t).next(t).GetSvids()[0].GetSpiffeId(); got != id {
		t.Errorf("lifted: %s", got)
	}
}

// TestV_K4_KeysStayOnTheNode: the CA has never seen the key of a workload: it is
// neither in its memory nor in its files nor in what it says.
func TestV_K4_KeysStayOnTheNode(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	w.apply(t, entry("v-k4", uid))
	c := w.as(t, uid)
	s := c.stream(t)
	var secrets [][]byte
	for range 3 {
		key, err := x509.ParsePKCS8PrivateKey(s.next(t).GetSvids()[0].GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		private, err := key.(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		words := slices.Clone(private) // as a number is in the memory of this machine
		slices.Reverse(words)
		secrets = append(secrets, private, words)
		w.rotate(t)
	}
	s.next(t)
	has := func(b []byte) bool {
		return slices.ContainsFunc(secrets, func(secret []byte) bool { return bytes.Contains(b, secret) })
	}
	// The agent has the last ones, so they would be found.
	if !inMemory(t, w.agent.PID(), has) {
		t.Fatal("no key is found in the agent's memory: this test cannot find keys")
	}
	if inMemory(t, w.ca.PID(), has) {
		t.Error("the CA has a workload's key in its memory")
	}
	for _, path := range append(filesBelow(t, w.ca.Dir), filesBelow(t, w.agent.Dir)...) {
		if has(readFile(t, path)) {
			t.Errorf("%s has a workload's key in plain", path)
		}
	}
	if has([]byte(w.ca.Log())) || has([]byte(w.agent.Log())) {
		t.Error("a log has a workload's key")
	}
}

// inMemory says whether something is found in the memory that a process may write.
func inMemory(t *testing.T, pid int, has func([]byte) bool) bool {
	t.Helper()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found, total := false, 0
	for line := range strings.Lines(string(readFile(t, fmt.Sprintf("/proc/%d/maps", pid)))) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		const step = 4 << 20
		buf := make([]byte, step+64) // a secret may lie across two steps
		for at := from; at < to; at += step {
			n, err := mem.ReadAt(buf[:min(to-at, step+64)], int64(at))
			if n == 0 && err != nil {
				continue // not readable
			}
			total += n
			found = found || has(buf[:n])
		}
	}
	if total == 0 {
		t.Fatal("its memory cannot be read")
	}
	return found
}
