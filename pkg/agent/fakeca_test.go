package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/identity"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

var testTD = spiffeid.RequireTrustDomainFromString("example.org")

// authority is a root or an intermediate of the tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (a *authority) id() string { return hex.EncodeToString(a.cert.SubjectKeyId) }

// leaf is what a test certificate says; the zero value of a field means what a
// good CA would say.
type leaf struct {
	uris      []string
	dnsNames  []string
	notBefore time.Time
	ttl       time.Duration
	change    func(*x509.Certificate)
}

func newAuthority(t testing.TB, name string, parent *authority) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: newSerial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{testTD.ID().URL()},
	}
	issuer, signer := template, key
	if parent != nil {
		issuer, signer = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert: cert, key: key}
}

func newSerial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err)
	}
	return n.SetBit(n, 119, 1)
}

func (a *authority) sign(pub crypto.PublicKey, l leaf) ([]byte, error) {
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: newSerial(), NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(l.ttl),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    l.dnsNames,
	}
	if !l.notBefore.IsZero() {
		template.NotBefore = l.notBefore
	}
	for _, s := range l.uris {
		u, err := url.Parse(s)
		if err != nil {
			return nil, err
		}
		template.URIs = append(template.URIs, u)
	}
	if l.change != nil {
		l.change(template)
	}
	return x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key)
}

// fakeCA is the CA in memory. It keeps to the protocol unless a test tells it
// not to.
type fakeCA struct {
	nodev1.UnimplementedNodeServiceServer
	t        testing.TB
	root     *authority
	roots    []*authority // of the bundle
	sequence uint64
	lists    []*nodev1.RevocationList // of the bundle

	mu           sync.Mutex // guards what follows, and the above once it serves
	intermediate *authority
	ttl          time.Duration // of workloads; 0: 1 h
	agentTTL     time.Duration // 0: 2 h
	epoch        string
	revision     uint64
	entries      map[string]*entryv1.Entry
	node         *attributesv1.Node
	syncs        map[chan *nodev1.SyncResponse]struct{}
	attestations int
	renewals     int
	sessions     int
	items        []*nodev1.IssueItem
	batches      int
	keys         map[string]string // SPKI → instance
	heard        []*nodev1.SyncRequest
	refuseItem   func(*nodev1.IssueItem) *nodev1.Refusal
	refuseAttest error
	refuseSync   error
	refuseRenew  error
	welcome      bool // it asks for reports of withdrawals
	tamper       func(*leaf, *nodev1.IssueItem)
	issueGate    chan struct{} // if not nil, Issue waits for it

	listener *bufconn.Listener
	server   *grpc.Server
	net      *network
}

func newFakeCA(t testing.TB) *fakeCA {
	t.Helper()
	root := newAuthority(t, "root 1", nil)
	ca := &fakeCA{
		t: t, root: root, roots: []*authority{root}, sequence: 1,
		intermediate: newAuthority(t, "intermediate 1", root),
		epoch:        "epoch-1", revision: 1,
		entries:  make(map[string]*entryv1.Entry),
		node:     &attributesv1.Node{Method: "join_token", Id: "n1"},
		syncs:    make(map[chan *nodev1.SyncResponse]struct{}),
		keys:     make(map[string]string),
		listener: bufconn.Listen(1 << 20), net: &network{},
	}
	ca.server = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(ca.tls())),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	nodev1.RegisterNodeServiceServer(ca.server, ca)
	go func() { _ = ca.server.Serve(ca.listener) }()
	return ca
}

func (ca *fakeCA) close() { ca.server.Stop() }

// tls is the CA's half: it shows its root at the end of the chain, and verifies
// the agents that show a certificate.
func (ca *fakeCA) tls() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			ca.mu.Lock()
			defer ca.mu.Unlock()
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			der, err := ca.intermediate.sign(key.Public(), leaf{uris: []string{identity.CAID(testTD).String()}, ttl: time.Hour})
			if err != nil {
				return nil, err
			}
			pool := x509.NewCertPool()
			for _, r := range ca.roots {
				pool.AddCert(r.cert)
			}
			return &tls.Config{
				MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
				Certificates: []tls.Certificate{{
					Certificate: [][]byte{der, ca.intermediate.cert.Raw, ca.root.cert.Raw}, PrivateKey: key,
				}},
				ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool,
			}, nil
		},
	}
}

func (ca *fakeCA) dial(ctx context.Context, _ string) (net.Conn, error) {
	ca.net.mu.Lock()
	ca.net.dials++
	down, hole := ca.net.down, ca.net.hole
	ca.net.mu.Unlock()
	if down {
		return nil, errors.New("connection refused")
	}
	if hole {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c, err := ca.listener.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	l := &lossyConn{Conn: c, net: ca.net}
	ca.net.mu.Lock()
	ca.net.conns = append(ca.net.conns, l)
	ca.net.mu.Unlock()
	return l, nil
}

func (ca *fakeCA) bundle() *nodev1.Bundle {
	b := &nodev1.Bundle{TrustDomain: testTD.Name(), Sequence: ca.sequence}
	for _, r := range ca.roots {
		b.Roots = append(b.Roots, r.cert.Raw)
	}
	b.RevocationLists = ca.lists
	return b
}

func (ca *fakeCA) agentIdentity(csr []byte) (*nodev1.AgentIdentity, error) {
	parsed, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	ttl := ca.agentTTL
	if ttl == 0 {
		ttl = 2 * time.Hour
	}
	der, err := ca.intermediate.sign(parsed.PublicKey, leaf{
		uris: []string{testTD.IDString() + "/meshid/node/join_token/n1"}, ttl: ttl,
	})
	if err != nil {
		return nil, err
	}
	return &nodev1.AgentIdentity{
		Chain: [][]byte{der, ca.intermediate.cert.Raw}, Bundle: ca.bundle(),
		RenewAt: timestamppb.New(time.Now().Add(ttl / 2)),
	}, nil
}

// Attest implements nodev1.NodeServiceServer.
func (ca *fakeCA) Attest(stream grpc.BidiStreamingServer[nodev1.AttestRequest, nodev1.AttestResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Challenge{Challenge: []byte("who")}}); err != nil {
		return err
	}
	answer, err := stream.Recv()
	if err != nil {
		return err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.attestations++
	if ca.refuseAttest != nil {
		return ca.refuseAttest
	}
	if string(answer.GetResponse()) != "me: who" {
		return status.Error(codes.PermissionDenied, "wrong answer")
	}
	id, err := ca.agentIdentity(first.GetStart().GetCsr())
	if err != nil {
		return err
	}
	return stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Identity{Identity: id}})
}

// caller checks the agent's certificate as it was shown in the handshake.
func caller(ctx context.Context) error {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return status.Error(codes.Unauthenticated, "no certificate")
	}
	if cert := info.State.VerifiedChains[0][0]; !time.Now().Before(cert.NotAfter) {
		return status.Error(codes.Unauthenticated, "certificate has expired")
	}
	return nil
}

// Renew implements nodev1.NodeServiceServer.
func (ca *fakeCA) Renew(ctx context.Context, r *nodev1.RenewRequest) (*nodev1.RenewResponse, error) {
	if err := caller(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.refuseRenew != nil {
		return nil, ca.refuseRenew
	}
	ca.renewals++
	id, err := ca.agentIdentity(r.GetCsr())
	if err != nil {
		return nil, err
	}
	return &nodev1.RenewResponse{Identity: id}, nil
}

// Sync implements nodev1.NodeServiceServer.
func (ca *fakeCA) Sync(stream grpc.BidiStreamingServer[nodev1.SyncRequest, nodev1.SyncResponse]) error {
	if err := caller(stream.Context()); err != nil {
		return err
	}
	hello, err := stream.Recv()
	if err != nil {
		return err
	}
	down := make(chan *nodev1.SyncResponse, 64)
	ca.mu.Lock()
	if ca.refuseSync != nil {
		defer ca.mu.Unlock()
		return ca.refuseSync
	}
	ca.sessions++
	h := hello.GetHello()
	if h.GetEpoch() != ca.epoch || h.GetRevision() != ca.revision {
		down <- ca.snapshot()
	}
	if h.GetBundleSequence() != ca.sequence {
		down <- &nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: ca.bundle()}}
	}
	ca.syncs[down] = struct{}{}
	if ca.welcome {
		down <- &nodev1.SyncResponse{Message: &nodev1.SyncResponse_Welcome{Welcome: &nodev1.Welcome{ReportsWithdrawals: h.GetReportsWithdrawals()}}}
	}
	ca.mu.Unlock()
	defer func() {
		ca.mu.Lock()
		defer ca.mu.Unlock()
		delete(ca.syncs, down)
	}()
	left := make(chan struct{})
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				close(left)
				return
			}
			ca.mu.Lock()
			ca.heard = append(ca.heard, m)
			ca.mu.Unlock()
		}
	}()
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-left:
			return nil
		case m := <-down:
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

func (ca *fakeCA) snapshot() *nodev1.SyncResponse {
	s := &nodev1.Snapshot{Epoch: ca.epoch, Revision: ca.revision, Node: ca.node}
	for _, e := range ca.entries {
		s.Entries = append(s.Entries, e)
	}
	return &nodev1.SyncResponse{Message: &nodev1.SyncResponse_Snapshot{Snapshot: s}}
}

// push sends a message down every stream.
func (ca *fakeCA) push(m *nodev1.SyncResponse) {
	for down := range ca.syncs {
		down <- m
	}
}

// apply puts entries into force.
func (ca *fakeCA) apply(entries ...*entryv1.Entry) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	d := &nodev1.Delta{FromRevision: ca.revision, Revision: ca.revision + 1, Upserts: entries}
	ca.revision++
	for _, e := range entries {
		e.Revision = ca.revision
		ca.entries[e.GetName()] = e
	}
	ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Delta{Delta: d}})
}

// remove deletes an entry.
func (ca *fakeCA) remove(name string) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	d := &nodev1.Delta{FromRevision: ca.revision, Revision: ca.revision + 1, Removed: []string{name}}
	ca.revision++
	delete(ca.entries, name)
	ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Delta{Delta: d}})
}

// Issue implements nodev1.NodeServiceServer.
func (ca *fakeCA) Issue(ctx context.Context, r *nodev1.IssueRequest) (*nodev1.IssueResponse, error) {
	if err := caller(ctx); err != nil {
		return nil, err
	}
	ca.mu.Lock()
	gate := ca.issueGate
	ca.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.batches++
	out := &nodev1.IssueResponse{}
	for _, item := range r.GetItems() {
		ca.items = append(ca.items, item)
		out.Results = append(out.Results, ca.issueItem(item))
	}
	return out, nil
}

func refusal(reason nodev1.Reason, retry time.Duration) *nodev1.Refusal {
	r := &nodev1.Refusal{Reason: reason, Message: reason.String()}
	if retry >= 0 {
		r.RetryAfter = durationpb.New(retry)
	}
	return r
}

func (ca *fakeCA) issueItem(item *nodev1.IssueItem) *nodev1.IssueResult {
	refuse := func(r *nodev1.Refusal) *nodev1.IssueResult {
		return &nodev1.IssueResult{Result: &nodev1.IssueResult_Refusal{Refusal: r}}
	}
	if ca.refuseItem != nil {
		if r := ca.refuseItem(item); r != nil {
			return refuse(r)
		}
	}
	e := ca.entries[item.GetEntry()]
	if e == nil {
		return refuse(refusal(nodev1.Reason_REASON_ENTRY_UNKNOWN, -1))
	}
	compiled, err := identity.Compile(testTD, e)
	if err != nil {
		return refuse(refusal(nodev1.Reason_REASON_TEMPLATE, -1))
	}
	facts := identity.NewFacts(ca.node, item.GetWorkload())
	if !compiled.MatchWorkload(facts) {
		return refuse(refusal(nodev1.Reason_REASON_RULE_NOT_MATCHED, -1))
	}
	id, err := compiled.Render(facts)
	if err != nil {
		return refuse(refusal(nodev1.Reason_REASON_TEMPLATE, -1))
	}
	csr, err := x509.ParseCertificateRequest(item.GetCsr())
	if err != nil || csr.CheckSignature() != nil {
		return refuse(refusal(nodev1.Reason_REASON_CSR, -1))
	}
	sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	if other, used := ca.keys[string(sum[:])]; used {
		ca.t.Errorf("key was used twice: by %s and by %s", other, item.GetInstance())
	}
	ca.keys[string(sum[:])] = item.GetInstance()
	l := leaf{uris: []string{id.ID.String()}, dnsNames: id.DNSNames, ttl: id.TTL}
	if l.ttl == 0 {
		l.ttl = ca.ttl
	}
	if l.ttl == 0 {
		l.ttl = time.Hour
	}
	renewAt := time.Now().Add(l.ttl / 2)
	if ca.tamper != nil {
		ca.tamper(&l, item)
	}
	der, err := ca.intermediate.sign(csr.PublicKey, l)
	if err != nil {
		ca.t.Errorf("sign: %v", err)
		return refuse(refusal(nodev1.Reason_REASON_UNAVAILABLE, time.Second))
	}
	return &nodev1.IssueResult{Result: &nodev1.IssueResult_Svid{Svid: &nodev1.IssuedSVID{
		SpiffeId: id.ID.String(), Chain: [][]byte{der, ca.intermediate.cert.Raw}, RenewAt: timestamppb.New(renewAt),
	}}}
}

// counts returns a counter of the CA under its lock.
func (ca *fakeCA) count(f func() int) int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return f()
}

func (ca *fakeCA) issued() int { return ca.count(func() int { return len(ca.items) }) }
