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
	"errors"
	"math"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/server"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

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

// The listener speaks TLS 1.2 and 1.3, HTTP/2, with the CA's name in its certificate;
// and makes a new connection for each request, as ztunnel does.
func TestListener(t *testing.T) {
	m := newMesh(t)
	token := m.run("shop/web", "web-1", "n1")
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		var group sync.WaitGroup
		for range issueBurst / 2 {
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
