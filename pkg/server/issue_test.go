package server

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/identity"
)

// A rogue agent asks for every entry there is, with attributes that fit each,
// and for names that are nobody's. What it gets is what it is entitled to.
func TestV_E1_RogueAgentEnumeratesAllEntries(t *testing.T) {
	h := newHouse(t)
	var entries []*entryv1.Entry
	entitled := make(map[string]bool)
	for i := range 40 {
		e := shopEntry(fmt.Sprintf("app%d", i))
		switch i % 4 {
		case 0: // all nodes
			entitled[e.GetName()] = true
		case 1:
			e.Nodes = `node.labels["zone"] == "a"`
			entitled[e.GetName()] = true
		case 2:
			e.Nodes = `node.labels["zone"] == "b"`
		case 3:
			e.Nodes = `node.id == "other"`
		}
		entries = append(entries, e)
	}
	entries = append(entries, &entryv1.Entry{
		Name: "ops", SpiffeId: "spiffe://example.org/ops", Nodes: `node.id == "other"`, Workloads: `unix.uid == 1000 && unix.path == "/app"`, Admin: true,
	}, &entryv1.Entry{
		Name: "mimic", SpiffeId: `spiffe://example.org/{docker.labels["app"]}`, Workloads: `docker.labels["mimic"] == "1" && docker.image.startsWith("registry.internal/")`,
	})
	h.apply(entries...)
	a := h.join("rogue", map[string]string{"zone": "a"})

	var items []*nodev1.IssueItem
	for _, e := range entries {
		name := strings.TrimPrefix(e.GetSpiffeId(), "spiffe://example.org/app/")
		items = append(items, a.item(e.GetName(), workload(name)))
	}
	for _, name := range []string{"", "*", "App0", "app0 ", "app0\x00", strings.Repeat("x", 128), "spiffe://example.org/app/app2", "../app2"} {
		items = append(items, a.item(name, workload("app2")))
		items[len(items)-1].Instance = "x"
	}
	got := make(map[string]bool)
	for i, r := range a.issue(items...) {
		if svid := r.GetSvid(); svid != nil {
			got[items[i].GetEntry()] = true
			if want := "spiffe://example.org/app/" + items[i].GetEntry(); svid.GetSpiffeId() != want {
				t.Errorf("entry %s gave %s", items[i].GetEntry(), svid.GetSpiffeId())
			}
		}
	}
	for name := range entitled {
		if !got[name] {
			t.Errorf("%s: was refused", name)
		}
	}
	for name := range got {
		if !entitled[name] {
			t.Errorf("%s: was issued", name)
		}
	}
	// A node is not told of entries that are not its own, by name or by answer.
	snap := a.sync(&nodev1.Hello{}).next().GetSnapshot()
	for _, e := range snap.GetEntries() {
		if !entitled[e.GetName()] && e.GetName() != "mimic" {
			t.Errorf("the snapshot has %s", e.GetName())
		}
	}
	res := a.issue(a.item("ops", workload("x")), a.item("no-such-entry", workload("x")))
	x, y := res[0].GetRefusal(), res[1].GetRefusal()
	if x.GetReason() != y.GetReason() || x.GetMessage() != y.GetMessage() {
		t.Errorf("an entry of other nodes (%v) and none (%v) can be told apart", x, y)
	}
	// An entry whose template comes out as an admin's name, or a system's.
	for app, want := range map[string]nodev1.Reason{
		"ops": nodev1.Reason_REASON_TEMPLATE, "..": nodev1.Reason_REASON_TEMPLATE, "a/b": nodev1.Reason_REASON_TEMPLATE, "": nodev1.Reason_REASON_TEMPLATE,
	} {
		w := workload(app)
		w.Docker.Labels["mimic"] = "1"
		item := a.item("mimic", w)
		item.Instance = "mimic-" + hex.EncodeToString([]byte(app))
		if r := a.issue(item)[0].GetRefusal(); r.GetReason() != want {
			t.Errorf("mimic of %q: %v", app, r)
		}
	}
}

// An entry that is deleted, or changed, is so from the answer of the admin API on.
func TestV_E3_EntryDeletedRefusedAtOnce(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	admin, ctx := h.admin()
	if res := a.issue(a.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Fatal(res[0])
	}
	narrowed := shopEntry("web")
	narrowed.Workloads += ` && unix.uid == 7`
	h.apply(narrowed)
	if res := a.issue(a.item("web", workload("web"))); res[0].GetRefusal().GetReason() != nodev1.Reason_REASON_RULE_NOT_MATCHED {
		t.Errorf("after narrowing: %v", res[0])
	}
	if _, err := admin.DeleteEntries(ctx, &adminv1.DeleteEntriesRequest{Names: []string{"web"}}); err != nil {
		t.Fatal(err)
	}
	if res := a.issue(a.item("web", workload("web"))); res[0].GetRefusal().GetReason() != nodev1.Reason_REASON_ENTRY_UNKNOWN {
		t.Errorf("after deletion: %v", res[0])
	}
}

// Each kind of refusal: what the agent is told, and what the ledger keeps.
func TestRefusals(t *testing.T) {
	h := newHouse(t)
	templated := shopEntry("templated")
	templated.SpiffeId = `spiffe://example.org/{docker.labels["ns"]}/x`
	other := shopEntry("other")
	other.Nodes = `node.id == "other"`
	h.apply(shopEntry("web"), templated, other)
	a := h.join("n1", nil)
	good := func(entry string) *nodev1.IssueItem { return a.item(entry, workload(entry)) }
	csrOf := func(change func(*nodev1.IssueItem)) *nodev1.IssueItem {
		item := good("web")
		change(item)
		return item
	}
	badLabel := workload("templated")
	badLabel.Docker.Labels["ns"] = "../../meshid/ca"
	big := workload("web")
	big.Docker.Labels["big"] = strings.Repeat("x", maxAttributeBytes)
	for name, tt := range map[string]struct {
		item   *nodev1.IssueItem
		reason nodev1.Reason
		record string // reason in the ledger
		detail string
	}{
		"no entry":      {good("nobody"), nodev1.Reason_REASON_ENTRY_UNKNOWN, reasonEntryUnknown, ""},
		"other node":    {good("other"), nodev1.Reason_REASON_ENTRY_UNKNOWN, reasonNodeRule, `node.id == "other"`},
		"rule":          {a.item("web", workload("db")), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonRule, `docker.labels["app"] == "web"`},
		"template":      {a.item("templated", badLabel), nodev1.Reason_REASON_TEMPLATE, reasonTemplate, "ns"},
		"no CSR":        {csrOf(func(i *nodev1.IssueItem) { i.Csr = nil }), nodev1.Reason_REASON_CSR, reasonCSR, "request"},
		"garbage CSR":   {csrOf(func(i *nodev1.IssueItem) { i.Csr = []byte("\xff\xfe garbage") }), nodev1.Reason_REASON_CSR, reasonCSR, "request"},
		"broken proof":  {csrOf(func(i *nodev1.IssueItem) { i.Csr[len(i.Csr)-1] ^= 1 }), nodev1.Reason_REASON_CSR, reasonCSR, ""},
		"no instance":   {csrOf(func(i *nodev1.IssueItem) { i.Instance = "" }), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "instance"},
		"long instance": {csrOf(func(i *nodev1.IssueItem) { i.Instance = strings.Repeat("x", maxInstanceBytes+1) }), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "instance"},
		"no start time": {csrOf(func(i *nodev1.IssueItem) {
			i.Process = &attributesv1.Process{StartTime: &timestamppb.Timestamp{Nanos: -1}}
		}), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "start time"},
		"long entry":     {csrOf(func(i *nodev1.IssueItem) { i.Entry = strings.Repeat("x", maxNameBytes+1) }), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "name"},
		"long serial":    {csrOf(func(i *nodev1.IssueItem) { i.PreviousSerial = make([]byte, 21) }), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "serial"},
		"no workload":    {csrOf(func(i *nodev1.IssueItem) { i.Workload = nil }), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "attributes"},
		"big attributes": {a.item("web", big), nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, "attributes"},
	} {
		t.Run(name, func(t *testing.T) {
			a := h.join(strings.ReplaceAll(name, " ", "-"), nil) // or it would be counted with the one before
			before := len(h.records(ledgerv1.Event_EVENT_ISSUE))
			// A good one in the same batch is not affected.
			res := a.issue(tt.item, good("web"))
			if got := res[0].GetRefusal(); got.GetReason() != tt.reason || res[1].GetSvid() == nil {
				t.Fatalf("results are %v", res)
			}
			records := h.records(ledgerv1.Event_EVENT_ISSUE)[before:]
			refused := records[0]
			if refused.GetOutcome() != ledgerv1.Outcome_OUTCOME_REFUSED {
				refused = records[1]
			}
			if len(records) != 2 || refused.GetReason() != tt.record || !strings.Contains(refused.GetDetail(), tt.detail) ||
				refused.GetNode().GetId() != a.id || refused.GetCertificate() != nil {
				t.Errorf("record is %v", refused)
			}
		})
	}
}

// A hostile agent cannot fill the disk with refusals; nothing of them is lost.
func TestRefusalsAreAggregated(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	items := make([]*nodev1.IssueItem, 500)
	for i := range items {
		items[i] = &nodev1.IssueItem{Entry: "nobody", Instance: "i", Workload: workload("web")}
		if i >= 250 {
			items[i].Entry = fmt.Sprintf("nobody%d", i)
		}
	}
	for range 4 {
		a.issue(items...)
	}
	if n := len(h.records(ledgerv1.Event_EVENT_ISSUE)); n != refusalBurst {
		t.Errorf("%d records, want %d", n, refusalBurst)
	}
	for _, r := range h.server.refusals.summaries(time.Now().Add(refusalWindow + time.Second)) {
		if r.GetWorkload() != nil || r.GetNode().GetId() != a.id {
			t.Errorf("summary is %v", r)
		}
	}
}

func TestRefusalSummaries(t *testing.T) {
	l := newRefusalLog()
	now := time.Unix(1_700_000_000, 0)
	refusal := func(entry string) *ledgerv1.Record {
		return &ledgerv1.Record{Event: ledgerv1.Event_EVENT_ISSUE, Reason: reasonRule, Entry: &ledgerv1.EntryRef{Name: entry}}
	}
	recorded := 0
	for range 1000 {
		if l.admit(now, "n", false, refusal("a")) {
			recorded++
		}
	}
	for i := range 100 {
		if l.admit(now, "n", false, refusal(fmt.Sprint(i))) {
			recorded++
		}
	}
	if recorded != refusalBurst {
		t.Errorf("%d recorded", recorded)
	}
	if got := l.summaries(now.Add(refusalWindow - 1)); len(got) != 0 {
		t.Errorf("summaries before their time: %v", got)
	}
	var details []string
	for _, r := range l.summaries(now.Add(refusalWindow)) {
		details = append(details, r.GetDetail())
	}
	if len(details) != 2 || !strings.HasPrefix(details[0], "999 more like this") || !strings.HasPrefix(details[1], "69 more of several kinds") {
		t.Errorf("summaries are %q", details)
	}
	if len(l.sources) != 0 {
		t.Error("what is over is not forgotten")
	}
	// Addresses are bounded, whoever they are.
	for i := range 3 * refusalSources {
		l.admit(now, fmt.Sprint(i), true, refusal("a"))
	}
	if len(l.sources) > refusalSources+1 {
		t.Errorf("%d sources are remembered", len(l.sources))
	}
}

// With a ledger that cannot write, nothing leaves the CA.
func TestV_J5_F12_NothingWithoutARecord(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	token := h.token("n2", nil)
	admin, ctx := h.admin()
	if err := h.journal.Close(); err != nil {
		t.Fatal(err)
	}
	r := a.issue(a.item("web", workload("web")))[0].GetRefusal()
	if r.GetReason() != nodev1.Reason_REASON_UNAVAILABLE || r.GetRetryAfter().AsDuration() <= 0 {
		t.Errorf("Issue: %v", r)
	}
	_, err := a.client.Renew(t.Context(), &nodev1.RenewRequest{Csr: newCSR(t, newKey(t)), PreviousSerial: a.serial()})
	h.wantCode(err, codes.Unavailable)
	_, err = h.attest(h.dial(nil, nil), token, newKey(t))
	h.wantCode(err, codes.Unavailable)
	// No change without a record either.
	_, err = admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("db")}})
	if err == nil || h.server.registry.Entries().Set.Len() != 1 {
		t.Errorf("ApplyEntries = %v, %d entries in force", err, h.server.registry.Entries().Set.Len())
	}
	if entries, _, err := h.store.Entries(t.Context()); err != nil || len(entries) != 1 {
		t.Errorf("%d entries are stored, %v", len(entries), err)
	}
	if _, err := admin.CreateToken(ctx, &adminv1.CreateTokenRequest{}); err == nil {
		t.Error("a token was made without a record")
	}
	// A withdrawal bites all the same, and says what is missing.
	_, err = admin.EvictNode(ctx, &adminv1.EvictNodeRequest{Id: a.id})
	if err == nil || !strings.Contains(err.Error(), "in force") {
		t.Errorf("EvictNode = %v", err)
	}
	_, err = a.client.Issue(t.Context(), &nodev1.IssueRequest{})
	if err == nil {
		t.Error("an evicted node is served")
	}
}

func TestIssueLimits(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Limits.IssueBurst, c.Limits.IssueRate = 10, 1 })
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	_, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{Items: make([]*nodev1.IssueItem, maxItems+1)})
	h.wantCode(err, codes.InvalidArgument)
	if res := a.issue(); len(res) != 0 {
		t.Errorf("results of nothing: %v", res)
	}
	items := make([]*nodev1.IssueItem, 12)
	for i := range items {
		items[i] = a.item("web", workload("web"))
	}
	res := a.issue(items...)
	for i, r := range res {
		if i < 10 && r.GetSvid() == nil {
			t.Errorf("item %d: %v", i, r)
		}
		if i >= 10 && (r.GetRefusal().GetReason() != nodev1.Reason_REASON_UNAVAILABLE || r.GetRefusal().GetRetryAfter().AsDuration() < time.Second) {
			t.Errorf("item %d: %v", i, r)
		}
	}
	// In flight: a full house is refused as a whole.
	use := h.server.useOf(a.id)
	use.inFlight.Add(int32(h.server.cfg.Limits.IssueRequests))
	if r := a.issue(a.item("web", workload("web")))[0].GetRefusal(); r.GetReason() != nodev1.Reason_REASON_UNAVAILABLE {
		t.Errorf("with all requests in flight: %v", r)
	}
	use.inFlight.Add(-int32(h.server.cfg.Limits.IssueRequests))
	// More than a message may have.
	big := &attributesv1.Workload{Ext: map[string]*attributesv1.Values{"x": {Values: map[string]string{"y": strings.Repeat("z", maxMessage)}}}}
	_, err = a.client.Issue(t.Context(), &nodev1.IssueRequest{Items: []*nodev1.IssueItem{{Workload: big}}})
	h.wantCode(err, codes.ResourceExhausted)
}

func TestBucket(t *testing.T) {
	b := newBucket(10, 5)
	now := time.Unix(0, 0)
	for i, tt := range []struct {
		after time.Duration
		n     int
		got   int
		wait  time.Duration
	}{
		{0, 3, 3, 0},
		{0, 3, 2, time.Second},
		{0, 1, 0, time.Second},
		{100 * time.Millisecond, 1, 1, 0},
		{time.Hour, 100, 5, 9500 * time.Millisecond},
		{0, 10000, 0, time.Minute},
		{-time.Hour, 1, 0, time.Second}, // the clock goes back: nothing is given, nothing is lost
		{100 * time.Millisecond, 1, 1, 0},
	} {
		now = now.Add(tt.after)
		got, wait := b.take(now, tt.n)
		if got != tt.got || (wait-tt.wait).Abs() > time.Millisecond {
			t.Errorf("step %d: took %d, wait %v; want %d, %v", i, got, wait, tt.got, tt.wait)
		}
	}
}

// The same key in two instances is refused; in the same instance it is not.
func TestV_B4_KeyOfAnotherInstance(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	csr := newCSR(t, newKey(t))
	item := func(instance string) *nodev1.IssueItem {
		return &nodev1.IssueItem{Entry: "web", Csr: csr, Instance: instance, Workload: workload("web")}
	}
	for i, want := range map[string]bool{"one": true} {
		if res := a.issue(item(i)); (res[0].GetSvid() != nil) != want {
			t.Errorf("%s: %v", i, res[0])
		}
	}
	if res := a.issue(item("two")); res[0].GetRefusal().GetReason() != nodev1.Reason_REASON_CSR {
		t.Errorf("the key of another instance: %v", res[0])
	}
	if res := a.issue(item("one")); res[0].GetSvid() == nil {
		t.Errorf("the same instance again: %v", res[0])
	}
}

// What is in the CSR beside the key comes out nowhere.
func TestV_B1_B3_NothingFromTheCSR(t *testing.T) {
	h := newHouse(t)
	e := shopEntry("web")
	e.DnsNames = []string{"web.shop.internal"}
	h.apply(e)
	a := h.join("n1", nil)
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(nil, &x509.CertificateRequest{
		DNSNames: []string{"evil.example.org"}, EmailAddresses: []string{"a@example.org"}, URIs: a.chain[0].URIs,
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	item := a.item("web", workload("web"))
	item.Csr = csr
	res := a.issue(item)
	if res[0].GetSvid() == nil {
		t.Fatal(res[0])
	}
	leaf := parseChain(t, res[0].GetSvid().GetChain())[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/app/web" || len(leaf.EmailAddresses) != 0 ||
		len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != "web.shop.internal" || leaf.IsCA {
		t.Errorf("certificate is for %v %v %v", leaf.URIs, leaf.DNSNames, leaf.EmailAddresses)
	}
}

// Secrets that pass through the server are in no log, record or error.
func TestV_J4_NoSecretsInLogs(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	token := h.token("n1", nil)
	key := newKey(t)
	conn := h.dial(nil, nil)
	if _, err := h.attest(conn, token, key); err != nil {
		t.Fatal(err)
	}
	_, second := h.attest(conn, token, newKey(t)) // refused: it was used
	if second == nil {
		t.Fatal("a token was used twice")
	}
	a := h.join("n2", nil)
	const canary = "canary-5e5fb4ac"
	item := a.item("web", workload("web"))
	item.Csr = []byte(canary)
	res := a.issue(item)
	admin, ctx := h.admin()
	tokens, err := admin.ListTokens(ctx, &adminv1.ListTokensRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var records []string
	for event := range ledgerv1.Event_name {
		for _, r := range h.records(ledgerv1.Event(event)) {
			records = append(records, r.String())
		}
	}
	families, err := h.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	raw := strings.TrimPrefix(token, "meshid_jt_")
	for where, text := range map[string]string{
		"log": h.log.String(), "records": strings.Join(records, "\n"), "error": second.Error(), "results": fmt.Sprint(res),
		"tokens": tokens.String(), "metrics": fmt.Sprint(families),
	} {
		for _, secret := range []string{canary, token, raw, hex.EncodeToString(scalar)} {
			if strings.Contains(text, secret) {
				t.Errorf("the %s has a secret", where)
			}
		}
	}
	if !strings.Contains(h.log.String(), "node attested") {
		t.Error("the log was not looked at")
	}
}

// Many agents at once, with entries changing under them: every answer is one of
// the two that the entry allowed, and every certificate is in the ledger.
func TestIssueUnderChange(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	agents := []*testAgent{h.join("n1", nil), h.join("n2", nil)}
	stop := make(chan struct{})
	var change, use sync.WaitGroup
	change.Go(func() {
		admin, ctx := h.admin()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			e := shopEntry("web")
			if i%2 == 0 {
				e.SpiffeId += "-2"
			}
			if _, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{e}}); err != nil {
				t.Errorf("apply: %v", err)
			}
		}
	})
	var mu sync.Mutex
	issued := make(map[string]bool)
	for _, a := range agents {
		use.Go(func() {
			for range 5 {
				items := make([]*nodev1.IssueItem, 8)
				for i := range items {
					items[i] = a.item("web", workload("web"))
				}
				for _, r := range a.issue(items...) {
					switch id := r.GetSvid().GetSpiffeId(); id {
					case "spiffe://example.org/app/web", "spiffe://example.org/app/web-2":
						leaf := parseChain(t, r.GetSvid().GetChain())[0]
						mu.Lock()
						issued[string(leaf.SerialNumber.Bytes())] = true
						mu.Unlock()
					default:
						t.Errorf("result is %v", r)
					}
				}
			}
		})
	}
	use.Wait()
	close(stop)
	change.Wait()
	recorded := 0
	for _, r := range h.records(ledgerv1.Event_EVENT_ISSUE) {
		if !issued[string(r.GetCertificate().GetSerial())] {
			t.Errorf("a record of a certificate that nobody got: %v", r.GetCertificate())
		}
		recorded++
	}
	if recorded != len(issued) || len(issued) != 80 {
		t.Errorf("%d certificates, %d records", len(issued), recorded)
	}
}

// FuzzDecide feeds items with random attributes and CSRs to the path of an SVID.
// Whatever comes, it answers, and an SVID is only ever one that the entry names.
func FuzzDecide(f *testing.F) {
	h := newHouse(f)
	e := shopEntry("t")
	e.SpiffeId, e.Workloads = `spiffe://example.org/t/{docker.labels["ns"]}`, `docker.labels["app"] == "t" && docker.image.startsWith("registry.internal/")`
	h.apply(e, shopEntry("web"))
	a := h.join("n1", nil)
	node, _ := h.server.registry.Node(a.id)
	good := newCSR(f, newKey(f))
	f.Add("web", "i", "web", "shop", "registry.internal/x", good, int64(1))
	f.Add("t", "i", "t", "../meshid/ca", "registry.internal/", good, int64(2))
	f.Add("t", "", "t", "%2e", "", []byte{0x30, 0x80}, int64(3))
	f.Fuzz(func(t *testing.T, entry, instance, app, ns, image string, csr []byte, seed int64) {
		w := &attributesv1.Workload{Docker: &attributesv1.Docker{Image: image, Labels: map[string]string{"app": app, "ns": ns}}}
		if rand.New(rand.NewPCG(uint64(seed), 0)).IntN(8) == 0 {
			w.Docker = nil
		}
		c := &caller{requestID: "fuzz", node: node, began: time.Now()}
		b := &batch{s: h.server, c: c, entries: h.server.registry.Entries(), node: nodeRef(node, "")}
		var d decision
		b.decide(t.Context(), &d, &nodev1.IssueItem{Entry: entry, Instance: instance, Workload: w, Csr: csr}, nil)
		if (d.signed == nil) == (d.refusal == nil) {
			t.Fatalf("decision is %+v", d)
		}
		if d.signed == nil {
			return
		}
		resp, err := h.server.record(context.Background(), c, []decision{d})
		if err != nil {
			t.Fatal(err)
		}
		id := resp.GetResults()[0].GetSvid().GetSpiffeId()
		if id != "spiffe://example.org/app/web" && id != "spiffe://example.org/t/"+ns {
			t.Fatalf("issued %q", id)
		}
		if _, err := identity.ParseID(id); err != nil {
			t.Fatal(err)
		}
	})
}
