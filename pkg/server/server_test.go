package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/store"
	"github.com/meshid/meshid/test/identitytest"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// house is a whole CA: real store, journal and authority; its listener is in
// memory.
type house struct {
	t       testing.TB
	dir     string
	store   *store.DB
	journal *ledger.Journal
	ca      *ca.CA
	server  *Server
	health  *health.Tracker
	metrics *prometheus.Registry
	lis     *bufconn.Listener
	log     *identitytest.Log
	stop    func()
	lists   bool // from the next start on, it revokes by lists
}

func newHouse(t testing.TB, options ...func(*Config)) *house {
	t.Helper()
	h := &house{t: t, dir: t.TempDir(), log: new(identitytest.Log)}
	h.start(options...)
	t.Cleanup(func() { h.stop() })
	return h
}

// start starts the CA over what is in its directory; stop ends it, and start may
// be called again.
func (h *house) start(options ...func(*Config)) {
	t, ctx := h.t, h.t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	h.metrics = prometheus.NewRegistry()
	h.health, err = health.New(h.metrics, "meshid_ca", Conditions...)
	must(err)
	h.store, err = store.Open(ctx, filepath.Join(h.dir, "ca.db"))
	must(err)
	h.journal, err = ledger.Open(filepath.Join(h.dir, "ledger"), ledger.Options{SegmentBytes: 1 << 20})
	must(err)
	var server *Server
	h.ca, err = ca.Open(ctx, ca.Config{
		TrustDomain: td, Instance: "test", Keys: keys.File(filepath.Join(h.dir, "keys")), Store: h.store, Ledger: h.journal, Revocation: h.lists,
		Fleet: func() []rotation.Node {
			if server == nil {
				return nil
			}
			return server.Fleet()
		},
		Clock: func() error {
			if server == nil || server.cfg.Clock == nil {
				return nil
			}
			return server.cfg.Clock.Check()
		},
		OnChange: func() {
			if server != nil {
				server.BundleChanged()
			}
		},
	})
	must(err)
	cfg := Config{
		TrustDomain: td, CA: h.ca, Ledger: h.journal, Store: h.store,
		Verifiers: []attest.NodeVerifier{jointoken.NewVerifier(h.store)}, NewToken: jointoken.NewToken,
		Instance: "test", Version: "v0",
		Logger:     slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Registerer: h.metrics, Health: h.health,
	}
	for _, o := range options {
		o(&cfg)
	}
	server, err = New(ctx, cfg)
	must(err)
	h.server = server
	h.lis = bufconn.Listen(1 << 20)
	g := server.GRPC()
	runCtx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.Serve(h.lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("serve: %v", err)
		}
	})
	wg.Go(func() {
		if err := server.Run(runCtx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	if authority := h.ca; h.lists {
		wg.Go(func() {
			if err := authority.Run(runCtx); err != nil {
				t.Errorf("run the authority: %v", err)
			}
		})
	}
	h.stop = sync.OnceFunc(func() {
		cancel()
		g.Stop()
		wg.Wait()
		if err := h.journal.Close(); err != nil {
			t.Errorf("close journal: %v", err)
		}
		if err := h.store.Close(); err != nil {
			t.Errorf("close store: %v", err)
		}
	})
}

// admin is the admin API, called as root on the Unix socket would.
func (h *house) admin() (adminv1.AdminServiceServer, context.Context) {
	return h.server.AdminService(), context.WithValue(h.t.Context(), callerKey{},
		&caller{requestID: "test-request", actor: "uid:0", began: time.Now()})
}

func (h *house) apply(entries ...*entryv1.Entry) uint64 {
	h.t.Helper()
	admin, ctx := h.admin()
	resp, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: entries})
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.GetRevision()
}

// records returns the ledger's records of an event.
func (h *house) records(event ledgerv1.Event) []*ledgerv1.Record {
	h.t.Helper()
	var records []*ledgerv1.Record
	for e, err := range ledger.Scan(filepath.Join(h.dir, "ledger"), 0) {
		if err != nil {
			h.t.Fatal(err)
		}
		if e.Record.GetEvent() == event && e.Record.GetSpiffeId() != identity.CAID(td).String() {
			records = append(records, e.Record)
		}
	}
	return records
}

func shopEntry(name string) *entryv1.Entry {
	return &entryv1.Entry{
		Name: name, SpiffeId: "spiffe://example.org/app/" + name,
		Workloads: `docker.labels["app"] == "` + name + `" && docker.image.startsWith("registry.internal/")`,
	}
}

func workload(app string) *attributesv1.Workload {
	return &attributesv1.Workload{
		Unix: &attributesv1.Unix{Uid: 1000, Gid: 1000, Path: "/app", Sha256: "00"},
		Docker: &attributesv1.Docker{
			ContainerId: "c-" + app, Image: "registry.internal/shop/" + app, Labels: map[string]string{"app": app, "ns": "shop"},
		},
	}
}

// testAgent is an agent by hand: it sends what it is told to.
type testAgent struct {
	h      *house
	id     string
	key    *ecdsa.PrivateKey
	chain  []*x509.Certificate
	bundle *nodev1.Bundle
	conn   *grpc.ClientConn
	client nodev1.NodeServiceClient
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newCSR(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func parseChain(t testing.TB, ders [][]byte) []*x509.Certificate {
	t.Helper()
	chain := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain[i] = cert
	}
	return chain
}

// dial connects with a client certificate, or without one.
func (h *house) dial(key *ecdsa.PrivateKey, chain []*x509.Certificate, options ...func(*tls.Config)) *grpc.ClientConn {
	h.t.Helper()
	roots, _ := h.ca.Bundle()
	bundle := x509bundle.FromX509Authorities(td, roots)
	var cfg *tls.Config
	if key == nil {
		cfg = tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(identity.CAID(td)))
	} else {
		id, err := x509svid.IDFromCert(chain[0])
		if err != nil {
			h.t.Fatal(err)
		}
		cfg = tlsconfig.MTLSClientConfig(&x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle, tlsconfig.AuthorizeID(identity.CAID(td)))
	}
	for _, o := range options {
		o(cfg)
	}
	conn, err := grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return h.lis.DialContext(ctx) }),
		grpc.WithNoProxy())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

// token makes a join token, for an hour or for ttl.
func (h *house) token(name string, labels map[string]string, ttl ...time.Duration) string {
	h.t.Helper()
	admin, ctx := h.admin()
	req := &adminv1.CreateTokenRequest{NodeName: name, Labels: labels}
	for _, d := range ttl {
		req.Ttl = durationpb.New(d)
	}
	resp, err := admin.CreateToken(ctx, req)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.GetToken()
}

// attest attests with a join token over a connection without a certificate.
func (h *house) attest(conn *grpc.ClientConn, token string, key *ecdsa.PrivateKey) (*nodev1.AgentIdentity, error) {
	h.t.Helper()
	evidence, err := jointoken.NewAttester(token).Evidence(h.t.Context(), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), 20*time.Second)
	defer cancel()
	stream, err := nodev1.NewNodeServiceClient(conn).Attest(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{Start: &nodev1.AttestStart{
		Method: "join_token", Evidence: evidence, Csr: newCSR(h.t, key), AgentVersion: "v0",
	}}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	return resp.GetIdentity(), nil
}

// join makes a node that has attested and is connected.
func (h *house) join(name string, labels map[string]string) *testAgent {
	h.t.Helper()
	a := &testAgent{h: h, key: newKey(h.t)}
	conn := h.dial(nil, nil)
	got, err := h.attest(conn, h.token(name, labels), a.key)
	if err != nil {
		h.t.Fatal(err)
	}
	conn.Close()
	a.use(got)
	return a
}

// use has the agent use this X.509-SVID from now on, over a new connection.
func (a *testAgent) use(id *nodev1.AgentIdentity) {
	a.h.t.Helper()
	a.chain, a.bundle = parseChain(a.h.t, id.GetChain()), id.GetBundle()
	a.id = a.chain[0].URIs[0].String()
	if a.conn != nil {
		a.conn.Close()
	}
	a.conn = a.h.dial(a.key, a.chain)
	a.client = nodev1.NewNodeServiceClient(a.conn)
}

func (a *testAgent) serial() []byte { return a.chain[0].SerialNumber.Bytes() }

func (a *testAgent) item(entry string, w *attributesv1.Workload) *nodev1.IssueItem {
	a.h.t.Helper()
	return &nodev1.IssueItem{
		Entry: entry, Csr: newCSR(a.h.t, newKey(a.h.t)), Instance: "docker:" + entry, Workload: w, Kind: nodev1.IssueKind_ISSUE_KIND_FIRST,
	}
}

func (a *testAgent) issue(items ...*nodev1.IssueItem) []*nodev1.IssueResult {
	a.h.t.Helper()
	resp, err := a.client.Issue(a.h.t.Context(), &nodev1.IssueRequest{Items: items})
	if err != nil {
		a.h.t.Fatal(err)
	}
	if len(resp.GetResults()) != len(items) {
		a.h.t.Fatalf("%d results for %d items", len(resp.GetResults()), len(items))
	}
	return resp.GetResults()
}

// testStream is an open Sync stream.
type testStream struct {
	a      *testAgent
	stream grpc.BidiStreamingClient[nodev1.SyncRequest, nodev1.SyncResponse]
}

func (a *testAgent) sync(hello *nodev1.Hello) *testStream {
	a.h.t.Helper()
	stream, err := a.client.Sync(a.h.t.Context())
	if err != nil {
		a.h.t.Fatal(err)
	}
	s := &testStream{a, stream}
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: hello}})
	return s
}

func (s *testStream) send(m *nodev1.SyncRequest) {
	s.a.h.t.Helper()
	if err := s.stream.Send(m); err != nil {
		s.a.h.t.Fatal(err)
	}
}

func (s *testStream) applied(revision uint64) {
	s.a.h.t.Helper()
	s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{Revision: revision, BundleSequence: 1}}})
}

// next returns the next message that is not a bundle.
func (s *testStream) next() *nodev1.SyncResponse {
	s.a.h.t.Helper()
	for {
		m, err := s.stream.Recv()
		if err != nil {
			s.a.h.t.Fatalf("sync: %v", err)
		}
		if m.GetBundle() == nil {
			return m
		}
	}
}

// end returns the status that the stream ends with.
func (s *testStream) end() error {
	for {
		if _, err := s.stream.Recv(); err != nil {
			return err
		}
	}
}

func (h *house) wantCode(err error, want codes.Code) {
	h.t.Helper()
	if got := status.Code(err); got != want {
		h.t.Errorf("code is %v (%v), want %v", got, err, want)
	}
}

func names(entries []*entryv1.Entry) []string {
	all := make([]string, 0, len(entries))
	for _, e := range entries {
		all = append(all, e.GetName())
	}
	return all
}

func TestJoinIssueSync(t *testing.T) {
	h := newHouse(t)
	rev := h.apply(shopEntry("web"))
	a := h.join("n1", map[string]string{"zone": "a"})
	if a.id != "spiffe://example.org/meshid/node/join_token/n1" {
		t.Errorf("node is %s", a.id)
	}
	s := a.sync(&nodev1.Hello{AgentVersion: "v0"})
	m, err := s.stream.Recv()
	if err != nil || len(m.GetBundle().GetRoots()) != 1 {
		t.Fatalf("first message is %v, %v, want the bundle", m, err)
	}
	snap := s.next().GetSnapshot()
	if snap == nil || snap.GetRevision() != rev || len(snap.GetEntries()) != 1 || snap.GetNode().GetLabels()["zone"] != "a" {
		t.Fatalf("snapshot is %v", snap)
	}
	res := a.issue(a.item("web", workload("web")))
	svid := res[0].GetSvid()
	if svid.GetSpiffeId() != "spiffe://example.org/app/web" {
		t.Fatalf("result is %v", res[0])
	}
	roots, _ := h.ca.Bundle()
	id, _, err := x509svid.ParseAndVerify(svid.GetChain(), x509bundle.FromX509Authorities(td, roots))
	if err != nil || id.String() != svid.GetSpiffeId() {
		t.Fatalf("certificate is for %v: %v", id, err)
	}
	leaf := parseChain(t, svid.GetChain())[0]
	records := h.records(ledgerv1.Event_EVENT_ISSUE)
	if len(records) != 1 {
		t.Fatalf("%d records", len(records))
	}
	r := records[0]
	if !bytes.Equal(r.GetCertificate().GetSerial(), leaf.SerialNumber.Bytes()) || r.GetNode().GetId() != a.id ||
		r.GetEntry().GetName() != "web" || r.GetEntry().GetRevision() != rev || r.GetWorkload().GetDocker().GetContainerId() != "c-web" ||
		r.GetOutcome() != ledgerv1.Outcome_OUTCOME_SUCCESS || r.GetInstance() != "docker:web" || r.GetKind() != ledgerv1.Kind_KIND_FIRST ||
		r.GetRequestId() == "" || r.GetCaInstance() != "test" || r.GetVersion() != 1 || r.GetTrustDomain() != "example.org" {
		t.Errorf("record is %v", r)
	}
}

// eventually reports whether something comes true in 10 s, looking whenever
// others had a chance to run.
func (h *house) eventually(cond func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(10 * time.Second)
	defer limit.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-limit.C:
			return false
		}
	}
	return true
}

// When the CA stops, streams end in a way that has agents come back.
func TestShutdown(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	s := a.sync(&nodev1.Hello{})
	s.next()
	h.server.hub.shutdown()
	h.wantCode(s.end(), codes.Unavailable)
	_, err := h.dialSync(a)
	h.wantCode(err, codes.Unavailable)
}

func TestConfig(t *testing.T) {
	if _, err := New(t.Context(), Config{}); err == nil {
		t.Error("a server of nothing was made")
	}
	h := newHouse(t)
	good := h.server.cfg
	for name, change := range map[string]func(*Config){
		"long agent TTL": func(c *Config) { c.AgentTTL = 25 * time.Hour },
		"short":          func(c *Config) { c.AgentTTL = time.Second },
		"twice":          func(c *Config) { c.Verifiers = append(c.Verifiers, c.Verifiers...) },
		"registered":     func(*Config) {},
	} {
		cfg := good
		change(&cfg)
		if _, err := New(t.Context(), cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
