package istio

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/pkg/store"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const caName = "ca.mesh-ca.svc"

// mesh is a whole CA with a listener for Istio's clients, and a cluster that the test
// makes up.
type mesh struct {
	t       testing.TB
	store   *store.DB
	journal *ledger.Journal
	ledger  string
	ca      *ca.CA
	server  *server.Server
	service *Service
	tokens  *fakeTokens
	pods    *fakePods
	lis     *bufconn.Listener
	conn    *grpc.ClientConn
	admin   adminv1.AdminServiceClient
}

func newMesh(t testing.TB, options ...func(*Config, *server.Config)) *mesh {
	t.Helper()
	ctx, dir := t.Context(), t.TempDir()
	m := &mesh{
		t: t, ledger: filepath.Join(dir, "ledger"), tokens: &fakeTokens{known: make(map[string]*Token)},
		pods: &fakePods{pods: make(map[string]*Pod), changed: make(chan struct{}), blocked: make(chan struct{}, 1)},
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	registry := prometheus.NewRegistry()
	tracker, err := health.New(registry, "meshid_ca", server.Conditions...)
	must(err)
	m.store, err = store.Open(ctx, filepath.Join(dir, "ca.db"))
	must(err)
	m.journal, err = ledger.Open(m.ledger, ledger.Options{})
	must(err)
	m.ca, err = ca.Open(ctx, ca.Config{
		TrustDomain: td, Instance: "test", Keys: keys.File(filepath.Join(dir, "keys")), Store: m.store, Ledger: m.journal,
		DNSNames: []string{caName, "istiod.istio-system.svc"},
		OnChange: func() {
			if m.server != nil {
				m.server.BundleChanged()
			}
		},
	})
	must(err)
	logger := slog.New(slog.DiscardHandler)
	cfg := Config{
		TrustDomain: td, NodeProxies: []string{"istio-system/ztunnel"}, Logger: logger, Registerer: registry,
		Clusters: []Cluster{{Name: "prod", Aliases: []string{"Kubernetes"}, Default: true, Tokens: m.tokens, Pods: m.pods}},
	}
	serverCfg := server.Config{
		TrustDomain: td, CA: m.ca, Ledger: m.journal, Store: m.store, Instance: "test", Version: "v0",
		Logger: logger, Registerer: registry, Health: tracker,
	}
	for _, o := range options {
		o(&cfg, &serverCfg)
	}
	m.server, err = server.New(ctx, serverCfg)
	must(err)
	cfg.Issuer = m.server
	m.service, err = New(cfg)
	must(err)
	m.service.patience = 10 * time.Millisecond
	g := m.server.DirectGRPC(server.DirectListener{})
	istiov1.RegisterIstioCertificateServiceServer(g, m.service)
	m.lis = bufconn.Listen(1 << 20)
	runCtx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = m.server.Run(runCtx) })
	running.Go(func() { _ = m.ca.Run(runCtx) })
	running.Go(func() { _ = g.Serve(m.lis) })
	m.conn = m.dial(nil)
	// Its path must be short.
	socket := filepath.Join(shortDir(t), "admin.sock")
	adminLis, err := peer.Listen(ctx, socket, peer.Options{Mode: 0o600, Logger: logger})
	must(err)
	admin := m.server.AdminGRPC()
	running.Go(func() { _ = admin.Serve(adminLis) })
	adminConn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(err)
	m.admin = adminv1.NewAdminServiceClient(adminConn)
	t.Cleanup(func() {
		_, _ = m.conn.Close(), adminConn.Close()
		g.Stop()
		admin.Stop()
		cancel()
		running.Wait()
		if err := m.journal.Close(); err != nil {
			t.Error(err)
		}
		if err := m.store.Close(); err != nil {
			t.Error(err)
		}
	})
	m.apply(&entryv1.Entry{
		Name: "mesh", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
		Nodes: `node.method == "istio"`, Workloads: `has(k8s.pod_uid) && k8s.namespace != "kube-system"`,
	})
	return m
}

func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "istio") //nolint:usetesting // t.TempDir is too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// apply puts entries into force.
func (m *mesh) apply(entries ...*entryv1.Entry) {
	m.t.Helper()
	if _, err := m.admin.ApplyEntries(m.t.Context(), &adminv1.ApplyEntriesRequest{Entries: entries}); err != nil {
		m.t.Fatal(err)
	}
}

// dial connects as Istio's clients do: TLS, the CA's name, its root.
func (m *mesh) dial(change func(*tls.Config)) *grpc.ClientConn {
	m.t.Helper()
	roots := x509.NewCertPool()
	bundle, _ := m.ca.Bundle()
	for _, c := range bundle {
		roots.AddCert(c)
	}
	config := &tls.Config{RootCAs: roots, ServerName: caName, MinVersion: tls.VersionTLS12}
	if change != nil {
		change(config)
	}
	conn, err := grpc.NewClient("passthrough:ca", grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return m.lis.DialContext(ctx) }))
	if err != nil {
		m.t.Fatal(err)
	}
	return conn
}

// client is one of Istio's clients.
type client struct {
	m       *mesh
	conn    *grpc.ClientConn
	token   string
	cluster string
	key     crypto.Signer
	// names are the URI names in its CSRs.
	names []string
	ttl   int64
}

func (m *mesh) client(token string, names ...string) *client {
	return &client{m: m, conn: m.conn, token: token, cluster: "Kubernetes", key: newKey(m.t), names: names, ttl: 86400}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key crypto.Signer, names ...string) string {
	t.Helper()
	request := &x509.CertificateRequest{}
	// pilot-agent's subject is an empty organization.
	request.RawSubject = []byte{0x30, 0x0d, 0x31, 0x0b, 0x30, 0x09, 0x06, 0x03, 0x55, 0x04, 0x0a, 0x13, 0x02, 0x20, 0x20}
	for _, name := range names {
		u, err := url.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		request.URIs = append(request.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, request, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// call asks for a certificate; impersonated is empty for the client's own.
func (c *client) call(impersonated string) ([]string, error) {
	c.m.t.Helper()
	return c.send(&istiov1.IstioCertificateRequest{Csr: newCSR(c.m.t, c.key, c.names...), ValidityDuration: c.ttl, Metadata: impersonate(impersonated)})
}

func (c *client) send(req *istiov1.IstioCertificateRequest) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if c.token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
	}
	if c.cluster != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "clusterid", c.cluster)
	}
	resp, err := istiov1.NewIstioCertificateServiceClient(c.conn).CreateCertificate(ctx, req)
	return resp.GetCertChain(), err
}

func impersonate(id string) *structpb.Struct {
	if id == "" {
		return nil
	}
	return &structpb.Struct{Fields: map[string]*structpb.Value{keyImpersonated: structpb.NewStringValue(id)}}
}

// chainOf reads an answer as ztunnel does: one certificate an element, the roots in the
// last.
func chainOf(t testing.TB, answer []string) (chain, roots []*x509.Certificate) {
	t.Helper()
	if len(answer) < 2 {
		t.Fatalf("%d elements", len(answer))
	}
	for i, element := range answer {
		var certs []*x509.Certificate
		for rest := []byte(element); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			certs = append(certs, c)
		}
		if i == len(answer)-1 {
			return chain, certs
		}
		if len(certs) != 1 {
			t.Fatalf("element %d has %d certificates", i, len(certs))
		}
		chain = append(chain, certs...)
	}
	return chain, roots
}

func (m *mesh) records() []*ledgerv1.Record {
	m.t.Helper()
	var records []*ledgerv1.Record
	for e, err := range ledger.Scan(m.ledger, 0) {
		if err != nil {
			m.t.Fatal(err)
		}
		if r := e.Record; r.GetEvent() == ledgerv1.Event_EVENT_ISSUE && r.GetInstance() != "ca" {
			records = append(records, r)
		}
	}
	return records
}

func (m *mesh) lastRecord() *ledgerv1.Record {
	m.t.Helper()
	all := m.records()
	if len(all) == 0 {
		m.t.Fatal("no record")
	}
	return all[len(all)-1]
}

// fakeTokens verifies what it was told of.
type fakeTokens struct {
	mu     sync.Mutex // guards what follows
	known  map[string]*Token
	asked  int
	failed error
}

func (f *fakeTokens) Verify(_ context.Context, token string, audiences []string) (*Token, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.failed != nil {
		return nil, f.failed
	}
	t, ok := f.known[token]
	if !ok || len(audiences) != 1 || audiences[0] != DefaultAudience {
		return nil, fmt.Errorf("%w: unknown", ErrToken)
	}
	return t, nil
}

func (f *fakeTokens) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

// fakePods is a cluster's pods.
type fakePods struct {
	mu      sync.Mutex // guards what follows
	pods    map[string]*Pod
	failed  error
	changed chan struct{}
	blocked chan struct{} // gets a value when a call begins to wait
}

func (f *fakePods) find(ctx context.Context, match func(*Pod) bool) (*Pod, error) {
	for {
		f.mu.Lock()
		var found *Pod
		for _, p := range f.pods {
			if match(p) && (found == nil || p.Facts.GetPodUid() < found.Facts.GetPodUid()) {
				found = p
			}
		}
		changed, failed := f.changed, f.failed
		f.mu.Unlock()
		switch {
		case failed != nil:
			return nil, failed
		case found != nil:
			return found, nil
		}
		if ctx.Err() == nil {
			select {
			case f.blocked <- struct{}{}:
			default:
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ErrNoPod
		}
	}
}

func (f *fakePods) Pod(ctx context.Context, uid string) (*Pod, error) {
	return f.find(ctx, func(p *Pod) bool { return p.Facts.GetPodUid() == uid })
}

func (f *fakePods) OnNode(ctx context.Context, namespace, account, node string) (*Pod, error) {
	return f.find(ctx, func(p *Pod) bool {
		return p.Facts.GetNamespace() == namespace && p.Facts.GetServiceAccount() == account && p.Node == node
	})
}

func (f *fakePods) change(fn func(pods map[string]*Pod)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(f.pods)
	close(f.changed)
	f.changed = make(chan struct{})
}

// run has a pod run, and returns the token of its service account.
func (m *mesh) run(account, name, node string) (token string) {
	namespace, sa, _ := strings.Cut(account, "/")
	p := &Pod{Node: node, Facts: &attributesv1.Kubernetes{
		Namespace: namespace, ServiceAccount: sa, PodName: name, PodUid: "uid-" + name, Labels: map[string]string{"app": name},
	}}
	m.pods.change(func(pods map[string]*Pod) { pods[p.Facts.GetPodUid()] = p })
	return m.token(p)
}

func (m *mesh) token(p *Pod) string {
	token := "token-" + p.Facts.GetPodUid()
	m.tokens.mu.Lock()
	defer m.tokens.mu.Unlock()
	m.tokens.known[token] = &Token{
		Namespace: p.Facts.GetNamespace(), ServiceAccount: p.Facts.GetServiceAccount(), PodName: p.Facts.GetPodName(), PodUID: p.Facts.GetPodUid(),
		NodeName: p.Node, NodeUID: "uid-" + p.Node, Expires: time.Now().Add(time.Hour),
	}
	return token
}

func (m *mesh) stop(name string) {
	m.pods.change(func(pods map[string]*Pod) { delete(pods, "uid-"+name) })
}

const webID = "spiffe://example.org/ns/shop/sa/web"

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v (%v), want %v", what, got, err, want)
	}
}

func podOf(account, name, node string) *Pod {
	m := &mesh{pods: &fakePods{pods: make(map[string]*Pod), changed: make(chan struct{})}, tokens: &fakeTokens{known: make(map[string]*Token)}}
	m.run(account, name, node)
	return m.pods.pods["uid-"+name]
}
