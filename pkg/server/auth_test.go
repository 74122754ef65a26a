package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/ca"
)

// servedMethods returns the methods of a gRPC server, by full name.
func servedMethods(t *testing.T, g *grpc.Server) map[string]protoreflect.MethodDescriptor {
	t.Helper()
	all := make(map[string]protoreflect.MethodDescriptor)
	for service := range g.GetServiceInfo() {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
		if err != nil {
			t.Fatal(err)
		}
		sd, ok := d.(protoreflect.ServiceDescriptor)
		if !ok {
			t.Fatalf("%s is not a service", service)
		}
		for i := range sd.Methods().Len() {
			m := sd.Methods().Get(i)
			all["/"+service+"/"+string(m.Name())] = m
		}
	}
	return all
}

// call makes a call of any kind with an empty request and returns how it ended.
func call(ctx context.Context, t *testing.T, conn *grpc.ClientConn, full string, m protoreflect.MethodDescriptor) error {
	t.Helper()
	req, resp := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return conn.Invoke(ctx, full, req, resp)
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, full)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return stream.RecvMsg(resp)
}

// Every method that is served is in the table of roles, and each role gets what
// the table says and nothing else. The list is taken from the descriptors.
// Whoever may administer the CA cannot say where its ledger is written, nor whether:
// no request names a file, a folder, an address or a sink, but for the folder that old
// records are archived to, which is for the admin socket only (TestArchiveRefuses) and
// takes nothing away that is not there as well.
func TestV_J5_TheAPIConfiguresNoLedger(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	place := regexp.MustCompile(`(?i)(path|file|folder|dir|url|uri|address|endpoint|sink|export|journal|log|audit|ledger|witness|mode|strict|async|disable|enable)`)
	found := make(map[string]bool)
	for _, m := range servedMethods(t, h.server.AdminGRPC()) {
		seen := make(map[protoreflect.FullName]bool)
		var look func(m protoreflect.MessageDescriptor)
		look = func(m protoreflect.MessageDescriptor) {
			if seen[m.FullName()] {
				return
			}
			seen[m.FullName()] = true
			for i := range m.Fields().Len() {
				f := m.Fields().Get(i)
				if place.MatchString(string(f.Name())) {
					found[string(f.FullName())] = true
				}
				if f.Message() != nil {
					look(f.Message())
				}
			}
		}
		look(m.Input())
	}
	// A filter of records, a rule's, facts of a process and of a machine that a rule is
	// explained with: none of them is a place.
	harmless := map[string]bool{
		"meshid.admin.v1.ArchiveRequest.folder": true,
	}
	for name := range found {
		if !harmless[name] && !strings.HasPrefix(name, "meshid.attributes.") {
			t.Errorf("%s: an administrator says where, or whether", name)
		}
	}
	if !found["meshid.admin.v1.ArchiveRequest.folder"] {
		t.Error("what is known to name a place was not found")
	}
}

func TestV_J7_J11_EveryMethodEveryRole(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"), &entryv1.Entry{
		Name: "ops", SpiffeId: "spiffe://example.org/ops", Workloads: `unix.uid == 1000 && unix.path == "/app"`, Admin: true,
	}, &entryv1.Entry{
		Name: "below", SpiffeId: "spiffe://example.org/below", Workloads: `unix.uid == 1000 && unix.path == "/app"`, Downstream: true,
	})
	served := servedMethods(t, h.server.GRPC())
	maps.Copy(served, servedMethods(t, h.server.AdminGRPC()))
	for full := range served {
		if methods[full] == 0 {
			t.Errorf("%s is not in the table", full)
		}
	}
	for full, need := range methods {
		if served[full] == nil {
			t.Errorf("%s is in the table and is not served", full)
		}
		if (need == roleAnyone) != (full == nodev1.NodeService_Attest_FullMethodName) {
			t.Errorf("%s is for anyone", full)
		}
		if strings.HasPrefix(full, "/meshid.admin.") != (need == roleAdmin || need == roleTwoAdmins) || strings.HasPrefix(full, "/meshid.downstream.") != (need == roleDownstream) {
			t.Errorf("%s has role %d", full, need)
		}
	}

	a := h.join("n1", nil)
	workloadKey, opsKey, belowKey := newKey(t), newKey(t), newKey(t)
	web, ops, below := a.item("web", workload("web")), a.item("ops", workload("web")), a.item("below", workload("web"))
	web.Csr, ops.Csr, below.Csr = newCSR(t, workloadKey), newCSR(t, opsKey), newCSR(t, belowKey)
	ops.Instance, below.Instance = "unix:ops", "unix:below"
	res := a.issue(web, ops, below)
	callers := map[string]struct {
		conn *grpc.ClientConn
		role role
	}{
		"nobody":   {h.dial(nil, nil), roleAnyone},
		"workload": {h.dial(workloadKey, parseChain(t, res[0].GetSvid().GetChain())), roleAnyone},
		"node":     {a.conn, roleNode},
		"admin":    {h.dial(opsKey, parseChain(t, res[1].GetSvid().GetChain())), roleAdmin},
		"CA below": {h.dial(belowKey, parseChain(t, res[2].GetSvid().GetChain())), roleDownstream},
	}
	for who, c := range callers {
		for _, full := range slices.Sorted(maps.Keys(served)) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			err := call(ctx, t, c.conn, full, served[full])
			cancel()
			refused := status.Code(err) == codes.PermissionDenied || status.Code(err) == codes.Unauthenticated
			if may := methods[full] == roleAnyone || methods[full] == c.role || methods[full] == roleTwoAdmins && c.role == roleAdmin; may == refused {
				t.Errorf("%s calls %s: %v", who, full, err)
			}
		}
		for _, full := range []string{
			"/meshid.admin.v1.AdminService/Applyentries", "/meshid.admin.v1.AdminService//GetStatus", "/meshid.node.v1.NodeService/attest",
			"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check",
		} {
			err := c.conn.Invoke(t.Context(), full, &adminv1.GetStatusRequest{}, &adminv1.GetStatusResponse{})
			if err == nil || status.Code(err) == codes.OK {
				t.Errorf("%s calls %s: %v", who, full, err)
			}
		}
	}
}

// A header, whatever it says, is no identity.
func TestV_E2_J1_NothingButTheConnectionCounts(t *testing.T) {
	h := newHouse(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-forwarded-client-cert", "URI=spiffe://example.org/ops", "authorization", "Bearer root", "x-forwarded-for", "127.0.0.1")
	_, err := adminv1.NewAdminServiceClient(h.dial(nil, nil)).GetStatus(ctx, &adminv1.GetStatusRequest{})
	h.wantCode(err, codes.Unauthenticated)
	// A connection that came by another way than the two listeners.
	c, err := h.server.authorize(grpcpeer.NewContext(t.Context(), &grpcpeer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}), adminv1.AdminService_GetStatus_FullMethodName)
	if err == nil {
		t.Errorf("a plain connection is %+v", c)
	}
	if _, err := h.server.authorize(t.Context(), adminv1.AdminService_GetStatus_FullMethodName); err == nil {
		t.Error("a call without a connection is authorized")
	}
	// A handler that is reached without the gate.
	if _, err := h.server.AdminService().CreateToken(t.Context(), &adminv1.CreateTokenRequest{}); err == nil {
		t.Error("a handler works without authorization")
	}
}

// An admin's X.509-SVID is worth what its entry is worth at this moment.
func TestAdminEntryDeleted(t *testing.T) {
	h := newHouse(t)
	h.apply(&entryv1.Entry{
		Name: "ops", SpiffeId: "spiffe://example.org/ops", Workloads: `unix.uid == 1000 && unix.path == "/app"`, Admin: true,
	})
	a := h.join("n1", nil)
	key := newKey(t)
	item := a.item("ops", workload("web"))
	item.Csr = newCSR(t, key)
	conn := h.dial(key, parseChain(t, a.issue(item)[0].GetSvid().GetChain()))
	remote := adminv1.NewAdminServiceClient(conn)
	if _, err := remote.ApplyEntries(t.Context(), &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{shopEntry("web")}}); err != nil {
		t.Fatal(err)
	}
	applied := h.records(ledgerv1.Event_EVENT_ENTRY_APPLIED)
	if got := applied[len(applied)-1].GetActor(); got != "spiffe://example.org/ops" {
		t.Errorf("actor is %q", got)
	}
	if _, err := remote.DeleteEntries(t.Context(), &adminv1.DeleteEntriesRequest{Names: []string{"ops"}}); err != nil {
		t.Fatal(err)
	}
	_, err := remote.GetStatus(t.Context(), &adminv1.GetStatusRequest{})
	h.wantCode(err, codes.PermissionDenied)
}

func TestAdminEntryMustBeFixed(t *testing.T) {
	h := newHouse(t)
	admin, ctx := h.admin()
	_, err := admin.ApplyEntries(ctx, &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{{
		Name: "ops", SpiffeId: `spiffe://example.org/{docker.labels["app"]}`, Workloads: `docker.labels["app"] != "" && unix.uid == 5`, Admin: true,
	}}})
	if err == nil || !strings.Contains(err.Error(), "ops.spiffe_id") {
		t.Errorf("error is %v", err)
	}
}

// The operators' socket: root and the CA's own user.
func TestAdminSocket(t *testing.T) {
	h := newHouse(t)
	path := filepath.Join(t.TempDir(), "admin.sock")
	lis, err := peer.Listen(t.Context(), path, peer.Options{Mode: 0o600})
	if err != nil {
		t.Fatal(err)
	}
	g := h.server.AdminGRPC()
	served := make(chan error, 1)
	go func() { served <- g.Serve(lis) }()
	defer func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	st, err := adminv1.NewAdminServiceClient(conn).GetStatus(t.Context(), &adminv1.GetStatusRequest{})
	if err != nil || st.GetTrustDomain() != "example.org" {
		t.Errorf("status %v, %v", st, err)
	}
	_, err = nodev1.NewNodeServiceClient(conn).Issue(t.Context(), &nodev1.IssueRequest{})
	if status.Code(err) != codes.PermissionDenied && status.Code(err) != codes.Unimplemented {
		t.Errorf("Issue on the admin socket: %v", err)
	}
	for uid, want := range map[uint32]codes.Code{0: codes.OK, 12345: codes.PermissionDenied, 1<<32 - 1: codes.PermissionDenied} {
		_, err := h.server.authorize(peer.NewContext(t.Context(), peer.ForTest(1, uid, uid)), adminv1.AdminService_GetStatus_FullMethodName)
		if err != nil {
			err = statusOf(err, "x").Err()
		}
		if got := status.Code(err); got != want {
			t.Errorf("uid %d: %v", uid, err)
		}
	}
}

// minted makes a certificate with the CA's own root, or with a foreign one: what
// a bug, a stolen key or another trust domain's CA could present.
func minted(t *testing.T, parent *x509.Certificate, signer, key *ecdsa.PrivateKey, change func(*x509.Certificate)) []*x509.Certificate {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(42), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/meshid/node/join_token/n1"}}, BasicConstraintsValid: true,
	}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return []*x509.Certificate{leaf}
}

// Whoever presents a certificate that is no X.509-SVID of this trust domain does
// not get past the handshake.
func TestV_T8_ClientCertificates(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	rootKey, key := newKey(t), newKey(t)
	self := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, self, self, &rootKey.PublicKey, rootKey)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	status := func(key *ecdsa.PrivateKey, chain []*x509.Certificate) error {
		conn := h.dial(nil, nil, func(cfg *tls.Config) {
			raw := make([][]byte, len(chain))
			for i, c := range chain {
				raw[i] = c.Raw
			}
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: raw, PrivateKey: key}, nil
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := nodev1.NewNodeServiceClient(conn).Issue(ctx, &nodev1.IssueRequest{})
		return err
	}
	for name, change := range map[string]func(*x509.Certificate){
		"good but foreign root": func(*x509.Certificate) {},
		"claims the CA's name":  func(c *x509.Certificate) { c.URIs[0].Path = "/meshid/ca" },
	} {
		if err := status(key, minted(t, foreign, rootKey, key, change)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// The leaf of a stranger with the certificates of a node behind it: only the
	// verified leaf says who this is.
	if err := status(key, append(minted(t, foreign, rootKey, key, func(*x509.Certificate) {}), a.chain...)); err == nil {
		t.Error("a stranger with a node's chain behind was accepted")
	}
	if err := status(a.key, append(slices.Clone(a.chain), a.chain[0], a.chain[0], a.chain[0], a.chain[0])); err == nil {
		t.Error("a chain of 6 was accepted")
	}
	if err := status(a.key, a.chain); err != nil {
		t.Errorf("the node itself: %v", err)
	}
	// Certificates that our own root would have signed: looked at directly, since
	// this CA does not sign them.
	for name, change := range map[string]func(*x509.Certificate){
		"two URIs":        func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"no URI":          func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"example.org"} },
		"is a CA":         func(c *x509.Certificate) { c.IsCA = true },
		"may sign":        func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign; c.IsCA = true },
		"may sign CRLs":   func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign },
		"no signature":    func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment },
		"other domain":    func(c *x509.Certificate) { c.URIs[0].Host = "evil.example.org" },
		"no path":         func(c *x509.Certificate) { c.URIs[0].Path = "" },
		"scheme in caps":  func(c *x509.Certificate) { c.URIs[0].Scheme = "SPIFFE" },
		"host in caps":    func(c *x509.Certificate) { c.URIs[0].Host = "EXAMPLE.org" },
		"escaped path":    func(c *x509.Certificate) { c.URIs[0].Path = "/meshid/node/join_token/n 1" },
		"query":           func(c *x509.Certificate) { c.URIs[0].RawQuery = "a" },
		"no constraints":  func(c *x509.Certificate) { c.BasicConstraintsValid = false },
		"root path slash": func(c *x509.Certificate) { c.URIs[0].Path = "/" },
	} {
		chain := minted(t, foreign, rootKey, key, change)
		state := &tls.ConnectionState{PeerCertificates: chain, VerifiedChains: [][]*x509.Certificate{{chain[0], foreign}}}
		if id, err := h.server.clientIdentity(state); err == nil {
			t.Errorf("%s: is %s", name, id)
		}
	}
	chain := minted(t, foreign, rootKey, key, func(*x509.Certificate) {})
	if _, err := h.server.clientIdentity(&tls.ConnectionState{PeerCertificates: chain}); err == nil {
		t.Error("a certificate that was not verified names somebody")
	}
}

// tlsDial makes a raw TLS connection to the listener.
func (h *house) tlsDial(cfg *tls.Config) (*tls.Conn, error) {
	h.t.Helper()
	raw, err := h.lis.DialContext(h.t.Context())
	if err != nil {
		return nil, err
	}
	cfg.InsecureSkipVerify = true
	c := tls.Client(raw, cfg)
	if err := c.HandshakeContext(h.t.Context()); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

func TestV_T1_T5_TLS(t *testing.T) {
	h := newHouse(t)
	good := func() *tls.Config { return &tls.Config{NextProtos: []string{"h2"}} }
	c, err := h.tlsDial(good())
	if err != nil {
		t.Fatal(err)
	}
	state := c.ConnectionState()
	if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 || state.NegotiatedProtocol != "h2" {
		t.Errorf("TLS is %x with %v and %q", state.Version, state.CurveID, state.NegotiatedProtocol)
	}
	c.Close()
	// No session can be resumed: a ticket never comes.
	cache := tls.NewLRUClientSessionCache(8)
	for range 2 {
		cfg := good()
		cfg.ClientSessionCache, cfg.ServerName = cache, "ca"
		c, err := h.tlsDial(cfg)
		if err != nil {
			t.Fatal(err)
		}
		// The server's first HTTP/2 frame comes after tickets would have.
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if c.ConnectionState().DidResume {
			t.Error("a session was resumed")
		}
		if _, ok := cache.Get("ca"); ok {
			t.Error("the server gave a session ticket")
		}
		c.Close()
	}
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2": func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"TLS 1.0": func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS10 },
		"P-521":   func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP521} },
	} {
		cfg := good()
		change(cfg)
		if c, err := h.tlsDial(cfg); err == nil {
			t.Errorf("%s is accepted", name)
			c.Close()
		}
	}
	// Without the right ALPN the handshake passes and the connection is closed.
	for _, protocols := range [][]string{nil, {"http/1.1"}} {
		if c, err := h.tlsDial(&tls.Config{NextProtos: protocols}); err == nil {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Errorf("a connection with ALPN %v is served", protocols)
			}
			c.Close()
		}
	}
	conn, err := grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return h.lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := nodev1.NewNodeServiceClient(conn).Issue(ctx, &nodev1.IssueRequest{}); err == nil {
		t.Error("plaintext is served")
	}
}

// Connections that never finish their handshake take a bounded number of places,
// those of one address a quarter; whoever is known is served meanwhile.
func TestV_T2_UnfinishedHandshakes(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Limits.Handshakes = 32 })
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	a.issue(a.item("web", workload("web")))
	var silent []net.Conn
	defer func() {
		for _, c := range silent {
			c.Close()
		}
	}()
	for range 200 {
		c, err := h.lis.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	// Those beyond the bound are closed at once: 8 of 200 stay, whichever.
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(time.Millisecond))
		c.Read(make([]byte, 1))
	}
	h.server.conns.handshakes.mu.Lock()
	taken := h.server.conns.handshakes.taken
	h.server.conns.handshakes.mu.Unlock()
	if taken > 8 {
		t.Errorf("%d handshakes are under way", taken)
	}
	if res := a.issue(a.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Errorf("a known node is not served: %v", res[0])
	}
}

// What goes out of an error is its kind and a request id, whatever is inside.
func TestV_J10_ErrorsOutward(t *testing.T) {
	inner := errors.New("open /var/lib/ca.db: SQL logic error near canary")
	for name, tt := range map[string]struct {
		err  error
		want codes.Code
	}{
		"plain":        {inner, codes.Internal},
		"denied":       {fail(kindDenied, "permission denied", inner), codes.PermissionDenied},
		"unavailable":  {fail(kindUnavailable, "try again", inner), codes.Unavailable},
		"wrapped":      {errors.Join(errors.New("canary"), fail(kindNotFound, "no such entry", inner)), codes.NotFound},
		"CA":           {ca.ErrNoAuthority, codes.Internal},
		"deadline":     {context.DeadlineExceeded, codes.Unavailable},
		"canceled":     {context.Canceled, codes.Canceled},
		"unknown kind": {fail(kind(99), "x", inner), codes.Internal},
	} {
		st := statusOf(tt.err, "id-1")
		if st.Code() != tt.want || strings.Contains(st.String(), "canary") || strings.Contains(st.String(), "SQL") {
			t.Errorf("%s: %v", name, st)
		}
		if st.Code() != codes.Canceled && !strings.Contains(st.Message(), "id-1") {
			t.Errorf("%s: %q has no request id", name, st.Message())
		}
	}
}

// A panic in a handler is one failed call, and a number to look at.
func TestFault_F7_PanicInHandler(t *testing.T) {
	h := newHouse(t)
	err := h.server.finish(t.Context(), &caller{requestID: "id-1"}, "/x", "boom canary", nil)
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "canary") {
		t.Errorf("error is %v", err)
	}
	if !strings.Contains(h.log.String(), "boom canary") {
		t.Error("the panic is not in the log")
	}
}

var (
	_ proto.Message        = (*dynamicpb.Message)(nil)
	_ credentials.AuthInfo = (*tlsInfo)(nil)
)

// Requests beyond the limits of size are answered, and nothing else suffers.
func TestV_I3_SizeLimits(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	big := metadata.AppendToOutgoingContext(t.Context(), "x-big", strings.Repeat("x", 2*maxHeaderBytes))
	if _, err := a.client.Issue(big, &nodev1.IssueRequest{}); err == nil {
		t.Error("a header of 128 KiB is taken")
	}
	if _, err := a.client.Issue(t.Context(), &nodev1.IssueRequest{Items: []*nodev1.IssueItem{{Csr: make([]byte, maxMessage)}}}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message of 4 MiB: %v", err)
	}
	if res := a.issue(a.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Error(res[0])
	}
}

// Streams that are reset as fast as they are opened.
func TestV_T4_RapidReset(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	for range 2000 {
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := a.client.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	if res := a.issue(a.item("web", workload("web"))); res[0].GetSvid() == nil {
		t.Error(res[0])
	}
	if !h.eventually(func() bool { return h.server.hub.count() == 0 }) {
		t.Errorf("%d sessions are left", h.server.hub.count())
	}
}

// Whatever step a caller leaves at, what was started for it ends.
func TestV_I6_NoGoroutineIsLeft(t *testing.T) {
	h := newHouse(t, func(c *Config) { c.Limits.Attestations = 1000 })
	a := h.join("n1", nil)
	a.issue()
	silent := h.join("n2", nil) // whose streams would end those of n1, if they were of one node
	silent.issue()
	before := runtime.NumGoroutine()
	for i := range 100 {
		switch i % 5 {
		case 0: // no handshake
			c, err := h.lis.DialContext(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		case 1: // no HTTP/2
			c, err := h.tlsDial(&tls.Config{NextProtos: []string{"h2"}})
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		case 2: // no start
			conn := h.dial(nil, nil)
			if _, err := nodev1.NewNodeServiceClient(conn).Attest(t.Context()); err != nil {
				t.Fatal(err)
			}
			conn.Close()
		case 3: // no hello
			conn := h.dial(silent.key, silent.chain)
			if _, err := nodev1.NewNodeServiceClient(conn).Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			conn.Close()
		case 4: // in the middle of a stream
			conn := h.dial(a.key, a.chain)
			b := *a
			b.client = nodev1.NewNodeServiceClient(conn)
			b.sync(&nodev1.Hello{}).next()
			conn.Close()
		}
	}
	if !h.eventually(func() bool { return runtime.NumGoroutine() <= before+4 }) {
		buf := make([]byte, 1<<16)
		t.Errorf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
	}
	h.server.conns.mu.Lock()
	defer h.server.conns.mu.Unlock()
	if n := len(h.server.conns.byID[a.id]); n > 1 {
		t.Errorf("%d connections are tracked", n)
	}
}
