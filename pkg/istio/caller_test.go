package istio

import (
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshid/meshid/pkg/server"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

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
	for token, account := range map[string]string{"other namespace": "bank/web", "other account": "shop/admin"} {
		namespace, name, _ := strings.Cut(account, "/")
		m.tokens.known[token] = &Token{Namespace: namespace, ServiceAccount: name, PodName: "web-1", PodUID: "uid-web-1", NodeName: "n1", NodeUID: "uid-n1"}
	}
	m.tokens.known["unbound"] = &Token{Namespace: "shop", ServiceAccount: "web"}
	for name, c := range map[string]*client{
		"no token":        {m: m, conn: m.conn, key: newKey(t)},
		"unknown token":   {m: m, conn: m.conn, key: newKey(t), token: "x"},
		"other cluster":   {m: m, conn: m.conn, key: newKey(t), token: good, cluster: "test"},
		"node reborn":     {m: m, conn: m.conn, key: newKey(t), token: reborn},
		"pod elsewhere":   {m: m, conn: m.conn, key: newKey(t), token: moved},
		"pod of others":   {m: m, conn: m.conn, key: newKey(t), token: borrowed},
		"other namespace": {m: m, conn: m.conn, key: newKey(t), token: "other namespace"},
		"other account":   {m: m, conn: m.conn, key: newKey(t), token: "other account"},
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
