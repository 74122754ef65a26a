package istio

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/server"
)

const webID = "spiffe://example.org/ns/shop/sa/web"

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v (%v), want %v", what, got, err, want)
	}
}

// A sidecar gets the identity of its service account, in the form that Istio's clients
// read, with a record; whatever its request says besides.
func TestSidecar(t *testing.T) {
	m := newMesh(t)
	c := m.client(m.run("shop/web", "web-1", "n1"), webID)
	answer, err := c.call("")
	if err != nil {
		t.Fatal(err)
	}
	chain, roots := chainOf(t, answer)
	if len(chain) != 2 || len(roots) != 1 {
		t.Fatalf("%d certificates and %d roots", len(chain), len(roots))
	}
	leaf := chain[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != webID || len(leaf.DNSNames)+len(leaf.IPAddresses) != 0 {
		t.Errorf("names %v %v", leaf.URIs, leaf.DNSNames)
	}
	if leaf.Subject.String() != "" {
		t.Errorf("subject %v", leaf.Subject)
	}
	for _, e := range leaf.Extensions {
		if e.Id.String() == "2.5.29.17" && !e.Critical {
			t.Error("without a subject, the names must be critical: RFC 5280 §4.2.1.6")
		}
	}
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(roots[0])
	between.AddCert(chain[1])
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	// Capped, and not backdated by more than 30 s: ztunnel renews at half of it.
	if life := time.Until(leaf.NotAfter); life > time.Hour || life < 50*time.Minute {
		t.Errorf("lives for %v", life)
	}
	r := m.lastRecord()
	if back := r.GetTime().AsTime().Sub(leaf.NotBefore); back > maxBackdate+time.Second {
		t.Errorf("backdated by %v", back)
	}
	if r.GetOutcome() != ledgerv1.Outcome_OUTCOME_SUCCESS || r.GetSpiffeId() != webID || r.GetVerifiedBy() != "ca" || r.GetEntry().GetName() != "mesh" ||
		r.GetInstance() != "k8s:uid-web-1" || r.GetWorkload().GetK8S().GetLabels()["app"] != "web-1" || r.GetActor() != "" {
		t.Errorf("record %v", r)
	}
	if n := r.GetNode().GetAttributes(); n.GetMethod() != Method || n.GetK8S().GetCluster() != "prod" || n.GetK8S().GetName() != "n1" || n.GetK8S().GetUid() != "uid-n1" {
		t.Errorf("node %v", n)
	}
	if id := r.GetNode().GetId(); id != "spiffe://example.org/meshid/node/istio/prod.uid-n1" {
		t.Errorf("the node is %s, which is not how k8s_psat names it", id)
	}
	// Its own name is not needed, and none of the clients' habits is refused.
	c.names = nil
	for _, cluster := range []string{"", "prod", "Kubernetes"} {
		c.cluster = cluster
		if _, err := c.call(""); err != nil {
			t.Errorf("cluster %q: %v", cluster, err)
		}
	}
}

// The life that is asked for lowers the entry's, and is never refused.
func TestLife(t *testing.T) {
	m := newMesh(t)
	c := m.client(m.run("shop/web", "web-1", "n1"))
	for asked, want := range map[int64]time.Duration{
		0: time.Hour, 1: 10 * time.Second, 20: 20 * time.Second, 60: time.Minute, 600: 10 * time.Minute, 86400 * 365: time.Hour, math.MaxInt64: time.Hour,
	} {
		c.ttl = asked
		answer, err := c.call("")
		if err != nil {
			t.Errorf("%d s: %v", asked, err)
			continue
		}
		chain, _ := chainOf(t, answer)
		began := m.lastRecord().GetTime().AsTime()
		life, back := chain[0].NotAfter.Sub(began), began.Sub(chain[0].NotBefore)
		if life > want+2*time.Second || life < want-time.Minute && asked != 1 {
			t.Errorf("%d s were asked for, it lives for %v", asked, life)
		}
		if back > min(maxBackdate, want/4)+time.Second {
			t.Errorf("%d s were asked for, it is backdated by %v", asked, back)
		}
		// ztunnel renews there: if that is over already, it asks again at once, and for ever.
		if renewed := chain[0].NotBefore.Add(chain[0].NotAfter.Sub(chain[0].NotBefore) / 2).Sub(began); renewed < want/4 {
			t.Errorf("%d s were asked for, ztunnel renews it after %v", asked, renewed)
		}
	}
	c.ttl = -1
	_, err := c.call("")
	wantCode(t, "a negative life", err, codes.InvalidArgument)
}

// Keys of the kinds that Istio's clients make, and what is wrong with requests.
func TestRequests(t *testing.T) {
	m := newMesh(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": newKey(t), "P-384": p384, "RSA": rsaKey} {
		c := m.client(m.run("shop/web", "web-"+name, "n1"), webID)
		c.key = key
		if _, err := c.call(""); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := m.client(m.run("shop/web", "web-weak", "n1"), webID)
	fips140.WithoutEnforcement(func() { // it is for the CA to refuse weak keys
		if c.key, err = rsa.GenerateKey(rand.Reader, 1024); err != nil {
			t.Fatal(err)
		}
		_, err = c.call("")
	})
	wantCode(t, "RSA with 1,024 bits", err, codes.InvalidArgument)
	good := newCSR(t, newKey(t), webID)
	forged := []byte(good)
	forged[len(forged)/2] ^= 1
	for name, csr := range map[string]string{
		"nothing": "", "no PEM": "abc", "another block": strings.ReplaceAll(good, "CERTIFICATE REQUEST", "CERTIFICATE"),
		"two": good + good, "large": good + strings.Repeat("\n", maxCSR), "forged": string(forged),
		"another identity": newCSR(t, newKey(t), "spiffe://example.org/ns/shop/sa/admin"),
		"another domain":   newCSR(t, newKey(t), "spiffe://cluster.local/ns/shop/sa/web"),
		"two identities":   newCSR(t, newKey(t), webID, "spiffe://example.org/ns/shop/sa/admin"),
	} {
		c := m.client(m.run("shop/web", "web-"+strings.ReplaceAll(name, " ", ""), "n1"))
		_, err := c.send(&istiov1.IstioCertificateRequest{Csr: csr})
		wantCode(t, name, err, codes.InvalidArgument)
		if r := m.lastRecord(); r.GetReason() != server.DirectRequest || r.GetOutcome() != ledgerv1.Outcome_OUTCOME_REFUSED {
			t.Errorf("%s: the record is %v", name, r)
		}
	}
}

// Who cannot prove who it is gets nothing, and the ledger says why.
func TestCredentials(t *testing.T) {
	m := newMesh(t)
	good := m.run("shop/web", "web-1", "n1")
	moved := m.run("shop/web", "web-2", "n1")
	m.pods.change(func(pods map[string]*Pod) { pods["uid-web-2"] = &Pod{Node: "n2", Facts: pods["uid-web-2"].Facts} })
	borrowed := m.run("shop/web", "web-3", "n1")
	m.pods.change(func(pods map[string]*Pod) { pods["uid-web-3"] = &Pod{Node: "n1", Facts: pods["uid-web-1"].Facts} })
	gone := m.run("shop/web", "web-4", "n1")
	m.stop("web-4")
	reborn := m.run("shop/web", "web-6", "n1")
	m.pods.change(func(pods map[string]*Pod) {
		pods["uid-web-6"] = &Pod{Node: "n1", NodeUID: "another", Facts: pods["uid-web-6"].Facts}
	})
	m.tokens.known["unbound"] = &Token{Namespace: "shop", ServiceAccount: "web"}
	for name, c := range map[string]*client{
		"no token":        {m: m, conn: m.conn, key: newKey(t)},
		"unknown token":   {m: m, conn: m.conn, key: newKey(t), token: "x"},
		"other cluster":   {m: m, conn: m.conn, key: newKey(t), token: good, cluster: "test"},
		"node reborn":     {m: m, conn: m.conn, key: newKey(t), token: reborn},
		"pod elsewhere":   {m: m, conn: m.conn, key: newKey(t), token: moved},
		"pod of others":   {m: m, conn: m.conn, key: newKey(t), token: borrowed},
		"pod gone":        {m: m, conn: m.conn, key: newKey(t), token: gone},
		"not of a pod":    {m: m, conn: m.conn, key: newKey(t), token: "unbound"},
		"too large":       {m: m, conn: m.conn, key: newKey(t), token: strings.Repeat("x", maxToken+1)},
		"cluster's is no": {m: m, conn: m.conn, key: newKey(t), token: good, cluster: strings.Repeat("x", maxClusterID+1)},
	} {
		_, err := c.call("")
		wantCode(t, name, err, codes.Unauthenticated)
		if r := m.lastRecord(); r.GetReason() != server.DirectCredentials || r.GetOutcome() != ledgerv1.Outcome_OUTCOME_REFUSED || r.GetDetail() == "" {
			t.Errorf("%s: the record is %v", name, r)
		}
	}
	m.tokens.mu.Lock()
	m.tokens.failed = errors.New("no API server")
	m.tokens.mu.Unlock()
	_, err := m.client(m.run("shop/web", "web-5", "n1")).call("")
	wantCode(t, "no API server", err, codes.Unavailable)
}

// A token may be good for some time after its pod has gone, and its verdict is
// remembered: neither matters, the pod is looked up each time.
func TestTokenOfDeletedPod(t *testing.T) {
	m := newMesh(t)
	c := m.client(m.run("shop/web", "web-1", "n1"))
	for range 3 {
		if _, err := c.call(""); err != nil {
			t.Fatal(err)
		}
	}
	if n := m.tokens.count(); n != 1 {
		t.Errorf("the cluster was asked %d times about one token", n)
	}
	m.stop("web-1")
	_, err := c.call("")
	wantCode(t, "after its pod has gone", err, codes.Unauthenticated)
}

// A verdict about a token is good for a minute, and not for longer than the token.
func TestVerdictEndsWithItsToken(t *testing.T) {
	m := newMesh(t)
	soon := time.Now().Add(verdictLife / 2)
	for name, c := range map[string]struct{ expires, want time.Time }{
		"long": {time.Now().Add(time.Hour), time.Now().Add(verdictLife)}, "short": {soon, soon}, "unknown": {time.Time{}, time.Now().Add(verdictLife)},
	} {
		token := m.run("shop/web", "web-"+name, "n1")
		m.tokens.known[token].Expires = c.expires
		asked := m.client(token)
		if _, err := asked.call(""); err != nil {
			t.Fatal(err)
		}
		p := proof{token: token, clusterID: asked.cluster}
		v, ok := m.service.verdicts.get(p.key())
		if late := v.until.Sub(c.want); !ok || late < 0 || late > verdictLife/4 {
			t.Errorf("%s: the verdict is kept until %v, want %v", name, v.until, c.want)
		}
	}
}

// Codes are such that a client tries again at once where that helps, and only there.
func TestCodesOfRefusals(t *testing.T) {
	for _, c := range []struct {
		reason nodev1.Reason
		after  time.Duration
		want   codes.Code
	}{
		{nodev1.Reason_REASON_CSR, 0, codes.InvalidArgument},
		{nodev1.Reason_REASON_RULE_NOT_MATCHED, 0, codes.PermissionDenied},
		{nodev1.Reason_REASON_ENTRY_UNKNOWN, 0, codes.PermissionDenied},
		{nodev1.Reason_REASON_TEMPLATE, 0, codes.PermissionDenied},
		{nodev1.Reason_REASON_QUARANTINED, 0, codes.PermissionDenied},
		{nodev1.Reason_REASON_UNSPECIFIED, 0, codes.PermissionDenied},
		{nodev1.Reason_REASON_UNAVAILABLE, retrySoon, codes.Unavailable},            // a limit of the node
		{nodev1.Reason_REASON_UNAVAILABLE, retrySoon + 1, codes.FailedPrecondition}, // it cannot sign, or not record
	} {
		if got := issueRefusal(&server.DirectError{Reason: c.reason, RetryAfter: c.after}).code; got != c.want {
			t.Errorf("%v, to be tried again after %v: %v, want %v", c.reason, c.after, got, c.want)
		}
	}
	if got := issueRefusal(errors.New("unexpected")).code; got != codes.Internal {
		t.Errorf("what is not a refusal: %v", got)
	}

	m := newMesh(t)
	c := m.client(m.run("shop/web", "web-1", "n1"))
	if _, err := c.call(""); err != nil {
		t.Fatal(err)
	}
	if err := m.journal.Close(); err != nil {
		t.Fatal(err)
	}
	if answer, err := c.call(""); status.Code(err) != codes.FailedPrecondition || len(answer) != 0 {
		t.Errorf("without a ledger: %v and %d certificates, want %v", err, len(answer), codes.FailedPrecondition)
	}
}

// A pod that the cluster has not told of yet is waited for by event; so is one that a
// node's proxy asks for.
func TestNewPods(t *testing.T) {
	m := newMesh(t)
	m.service.patience = time.Minute
	for _, c := range []struct {
		ask     func() error
		appears func()
	}{
		{func() error {
			_, err := m.client(m.token(podOf("shop/web", "web-1", "n1"))).call("")
			return err
		}, func() { m.run("shop/web", "web-1", "n1") }},
		{func() error {
			_, err := m.client(m.run("istio-system/ztunnel", "ztunnel-1", "n1")).call("spiffe://example.org/ns/shop/sa/new")
			return err
		}, func() { m.run("shop/new", "new-1", "n1") }},
	} {
		answered := make(chan error, 1)
		go func() { answered <- c.ask() }()
		<-m.pods.blocked
		c.appears()
		if err := <-answered; err != nil {
			t.Error(err)
		}
	}
}

func podOf(account, name, node string) *Pod {
	m := &mesh{pods: &fakePods{pods: make(map[string]*Pod), changed: make(chan struct{})}, tokens: &fakeTokens{known: make(map[string]*Token)}}
	m.run(account, name, node)
	return m.pods.pods["uid-"+name]
}

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

// Entries, quarantines and limits are those of everybody.
func TestEntriesDecide(t *testing.T) {
	m := newMesh(t, func(_ *Config, c *server.Config) { c.Limits.IssueBurst, c.Limits.IssueRate = 4, 1 })
	_, err := m.client(m.run("kube-system/x", "x-1", "n1")).call("")
	wantCode(t, "no entry", err, codes.PermissionDenied)
	c := m.client(m.run("shop/web", "web-1", "n2"))
	if _, err := c.call(""); err != nil {
		t.Fatal(err)
	}
	if _, err := m.admin.AddQuarantine(t.Context(), &adminv1.AddQuarantineRequest{Quarantine: &adminv1.Quarantine{SpiffeId: webID, Reason: "test"}}); err != nil {
		t.Fatal(err)
	}
	_, err = c.call("")
	wantCode(t, "quarantined", err, codes.PermissionDenied)
	other := m.client(m.run("shop/app", "app-1", "n3"))
	var last error
	for range 10 {
		if _, last = other.call(""); last != nil {
			break
		}
	}
	wantCode(t, "over the node's limit", last, codes.Unavailable)
}

// A client that fails and comes again at once is answered without being read, and its
// records are few; it is served as soon as it is right.
func TestStorm(t *testing.T) {
	m := newMesh(t)
	bad := m.client("bad")
	for range 200 {
		_, err := bad.call("")
		wantCode(t, "a bad token", err, codes.Unauthenticated)
	}
	if n := m.tokens.count(); n > 100 {
		t.Errorf("a bad token was verified %d times of 200", n)
	}
	var overload int
	for i := range 3 * strikeBurst {
		_, err := m.client(fmt.Sprintf("bad-%d", i)).call("")
		if status.Code(err) == codes.ResourceExhausted {
			overload++
		}
	}
	if overload == 0 {
		t.Error("one address may show as many bad tokens as it likes")
	}
	if n := len(m.records()); n > 100 {
		t.Errorf("%d records of refusals", n)
	}
}

// The same for a client that may not have what it asks for: until an entry says so.
func TestStormOfDenied(t *testing.T) {
	m := newMesh(t)
	denied := m.client(m.run("kube-system/dns", "dns-1", "n1"))
	before := len(m.records())
	for range 100 {
		_, err := denied.call("")
		wantCode(t, "no entry", err, codes.PermissionDenied)
	}
	if n := len(m.records()) - before; n != 1 {
		t.Errorf("%d records of one refusal", n)
	}
	m.apply(&entryv1.Entry{
		Name: "dns", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
		Nodes: `node.method == "istio"`, Workloads: `has(k8s.pod_uid) && k8s.namespace == "kube-system"`,
	})
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := denied.call("")
		if err == nil {
			break
		}
		if wantCode(t, "not served yet", err, codes.PermissionDenied); time.Now().After(deadline) {
			t.Fatal("it is not served although there is an entry now")
		}
	}
}

// The memory of refusals ends in time, and with a success.
func TestPauses(t *testing.T) {
	r := newRefusals()
	key := hashOf("x")
	refused := &refusal{code: codes.Unauthenticated, text: "no", record: "x"}
	if err := r.check(key); err != nil {
		t.Fatal(err)
	}
	r.note(key, refused)
	p, _ := r.pauses.get(key)
	if p.length != firstPause {
		t.Errorf("the first pause is %v", p.length)
	}
	var again *refusal
	if err := r.check(key); !errors.As(err, &again) || !again.again || again.record != "" {
		t.Errorf("the answer is %v", err)
	}
	r.note(key, refused) // came at the same time
	if p.length != firstPause {
		t.Errorf("the pause was doubled: %v", p.length)
	}
	for range 20 {
		p.until = time.Now()
		r.note(key, refused)
	}
	if p.length != longestPause {
		t.Errorf("the longest pause is %v", p.length)
	}
	r.forget(key)
	if err := r.check(key); err != nil {
		t.Error(err)
	}
}

// What is remembered is bounded, and what is used stays.
func TestRecent(t *testing.T) {
	r := newRecent[int, int](8)
	for i := range 1000 {
		r.put(i, i)
		if _, ok := r.get(0); !ok {
			t.Fatalf("what is used was forgotten after %d", i)
		}
		if n := len(r.newer) + len(r.older); n > 8 {
			t.Fatalf("%d are remembered", n)
		}
	}
	if _, ok := r.get(1); ok {
		t.Error("what was not used is remembered")
	}
}

// Machines outside of the clusters renew with the certificate that they have, for the
// same identity, if that was switched on and an entry says so.
func TestRenewWithCertificate(t *testing.T) {
	for _, on := range []bool{false, true} {
		m := newMesh(t, func(c *Config, _ *server.Config) { c.RenewWithCertificate = on })
		m.apply(&entryv1.Entry{
			Name: "machines", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
			Nodes: `node.method == "istio" && node.id == "certificate"`, Workloads: `k8s.namespace == "shop"`,
		})
		first := m.client(m.run("shop/web", "web-1", "n1"))
		answer, err := first.call("")
		if err != nil {
			t.Fatal(err)
		}
		chain, _ := chainOf(t, answer)
		conn := m.dial(func(c *tls.Config) {
			c.Certificates = []tls.Certificate{{Certificate: [][]byte{chain[0].Raw, chain[1].Raw}, PrivateKey: first.key}}
		})
		defer conn.Close()
		c := &client{m: m, conn: conn, key: newKey(t), names: []string{webID}}
		answer, err = c.call("")
		if !on {
			wantCode(t, "switched off", err, codes.Unauthenticated)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if renewed, _ := chainOf(t, answer); renewed[0].URIs[0].String() != webID {
			t.Errorf("renewed %v", renewed[0].URIs)
		}
		_, err = c.call("spiffe://example.org/ns/shop/sa/admin")
		wantCode(t, "for another", err, codes.Unauthenticated)
		c.names = []string{"spiffe://example.org/ns/shop/sa/admin"}
		_, err = c.call("")
		wantCode(t, "with another's name", err, codes.InvalidArgument)
		c.names = nil
		if _, err := m.admin.AddQuarantine(t.Context(), &adminv1.AddQuarantineRequest{Quarantine: &adminv1.Quarantine{Serial: chain[0].SerialNumber.Bytes(), Reason: "stolen"}}); err != nil {
			t.Fatal(err)
		}
		_, err = c.call("")
		wantCode(t, "with a quarantined certificate", err, codes.Unauthenticated)
	}
}

// The listener speaks TLS 1.2 and 1.3, HTTP/2, with the CA's name in its certificate;
// and makes a new connection for each request, as ztunnel does.
func TestListener(t *testing.T) {
	m := newMesh(t)
	token := m.run("shop/web", "web-1", "n1")
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		var group sync.WaitGroup
		for range 20 {
			group.Go(func() {
				conn := m.dial(func(c *tls.Config) { c.MinVersion, c.MaxVersion = version, version })
				defer conn.Close()
				c := m.client(token)
				c.conn = conn
				if _, err := c.call(""); err != nil {
					t.Errorf("%s: %v", tls.VersionName(version), err)
				}
			})
		}
		group.Wait()
	}
	conn := m.dial(func(c *tls.Config) { c.ServerName = "another.svc" })
	defer conn.Close()
	c := m.client(token)
	c.conn = conn
	_, err := c.call("")
	wantCode(t, "another name", err, codes.Unavailable)
}

// A place in the network is no identity: without TLS there is no call, and from the CA's
// own machine none without a token. Istio's had that (CVE-2022-39388).
func TestV_E2_NoIdentityByAddress(t *testing.T) {
	m := newMesh(t)
	g := m.server.DirectGRPC(server.DirectListener{})
	istiov1.RegisterIstioCertificateServiceServer(g, m.service)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		<-served
	})
	m.run("istio-system/istiod", "istiod-1", "n1")
	for name, creds := range map[string]credentials.TransportCredentials{
		"plaintext": insecure.NewCredentials(),
		"TLS":       credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}),
	} {
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		c := &client{m: m, conn: conn, key: newKey(t)}
		for _, id := range []string{"", "spiffe://example.org/ns/istio-system/sa/istiod"} {
			if _, err := c.call(id); err == nil {
				t.Errorf("%s from the CA's own machine gives %q", name, id)
			}
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Tokens of an OpenID Connect provider are good for machines, by entries for them.
func TestOIDC(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var provider *httptest.Server
	down := true
	provider = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case down:
			w.WriteHeader(http.StatusInternalServerError)
		case r.URL.Path == "/.well-known/openid-configuration":
			_, _ = fmt.Fprintf(w, `{"issuer":%[1]q,"jwks_uri":"%[1]s/keys","authorization_endpoint":"x","id_token_signing_alg_values_supported":["RS256"]}`, provider.URL)
		default:
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "RS256", Use: "sig"}}})
		}
	}))
	defer provider.Close()
	token := func(change map[string]any) string {
		t.Helper()
		claims := map[string]any{
			"iss": provider.URL, "sub": "system:serviceaccount:vms:db", "aud": []string{DefaultAudience}, "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
		}
		maps.Copy(claims, change)
		text, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign(text)
		if err != nil {
			t.Fatal(err)
		}
		compact, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return compact
	}
	idp := NewOIDC(provider.URL, provider.Client())
	m := newMesh(t, func(c *Config, _ *server.Config) {
		c.Clusters = append(c.Clusters, Cluster{Name: "idp", Issuer: provider.URL, Tokens: idp})
	})
	m.apply(&entryv1.Entry{
		Name: "machines", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
		Nodes: `node.method == "istio" && node.id == "idp"`, Workloads: `k8s.namespace == "vms"`,
	})
	_, err = m.client(token(nil)).call("")
	wantCode(t, "no provider", err, codes.Unavailable)
	down = false
	idp.tried = time.Time{}
	answer, err := m.client(token(map[string]any{"jti": "1"})).call("")
	if err != nil {
		t.Fatal(err)
	}
	if chain, _ := chainOf(t, answer); chain[0].URIs[0].String() != "spiffe://example.org/ns/vms/sa/db" {
		t.Errorf("it is %v", chain[0].URIs)
	}
	for name, change := range map[string]map[string]any{
		"another audience": {"aud": "istiod"}, "expired": {"exp": 1}, "no service account": {"sub": "alice"}, "two parts": {"sub": "system:serviceaccount:vms"},
		"four parts": {"sub": "system:serviceaccount:vms:db:x"}, "another issuer": {"iss": "https://idp.example.org"},
	} {
		_, err := m.client(token(change)).call("")
		wantCode(t, name, err, codes.Unauthenticated)
	}
	_, err = m.client(token(map[string]any{"sub": "system:serviceaccount:shop:web"})).call("")
	wantCode(t, "another namespace", err, codes.PermissionDenied)
	_, err = m.client(token(map[string]any{"jti": "2"})).call("spiffe://example.org/ns/shop/sa/web")
	wantCode(t, "on behalf of others", err, codes.Unauthenticated)
}

// While a root is replaced, answers have both, and so does a mesh that moves from another
// CA: all in the last element.
func TestRootsInAnswers(t *testing.T) {
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	previous, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	m := newMesh(t, func(c *Config, _ *server.Config) { c.PreviousRoots = []*x509.Certificate{previous} })
	c := m.client(m.run("shop/web", "web-1", "n1"))
	roots := func() []*x509.Certificate {
		t.Helper()
		answer, err := c.call("")
		if err != nil {
			t.Fatal(err)
		}
		_, roots := chainOf(t, answer)
		return roots
	}
	if got := roots(); len(got) != 2 || !slices.ContainsFunc(got, previous.Equal) {
		t.Errorf("%d roots", len(got))
	}
	if _, err := m.admin.ChangeRotation(t.Context(), &adminv1.ChangeRotationRequest{Verb: "prepare"}); err != nil {
		t.Fatal(err)
	}
	if got := roots(); len(got) != 3 {
		t.Errorf("%d roots while one is prepared", len(got))
	}
}
