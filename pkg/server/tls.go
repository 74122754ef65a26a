package server

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	downstreamv1 "github.com/meshid/meshid/proto/downstream/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// Limits of a connection.
const (
	handshakeTimeout = 5 * time.Second
	// anonymousLife is how long a connection without a client certificate lasts:
	// it is good for one attestation.
	anonymousLife  = attestTimeout + 20*time.Second
	maxStreams     = 100      // at the same time, a connection
	maxHeaderBytes = 64 << 10 // of a request
	// maxMessage bounds a request: 512 items, each with a CSR and attributes of
	// usual size.
	maxMessage = 4 << 20
	// Windows that are fixed: gRPC would find out how large they should be with a
	// ping for each call. A batch of 256 items fits in that of a stream.
	streamWindow = 256 << 10
	connWindow   = 1 << 20
	// maxAdminMessage bounds a request on the operators' socket: all entries.
	maxAdminMessage = 64 << 20
	// A peer that has vanished is noticed after these two together: at most 20 s.
	keepaliveTime    = 15 * time.Second
	keepaliveTimeout = 5 * time.Second
	// keepaliveMin is how often a client may ping.
	keepaliveMin = 5 * time.Second
	// maxConnsPerID bounds the connections with one SPIFFE ID. An agent has two at
	// most, and those that it lost are noticed after 20 s.
	maxConnsPerID = 64
	// maxClientChain is leaf and intermediates.
	maxClientChain = 5
)

// GRPC returns a server for the agents' listener, with both services: TLS 1.3
// only, client certificates verified against the bundle of the moment, and every
// call through the authorization table. The caller serves and stops it.
func (s *Server) GRPC(opts ...grpc.ServerOption) *grpc.Server {
	g := s.newGRPC(&tlsCredentials{
		s: s, base: s.tlsConfig(), conns: s.conns, counted: func(outcome string) { s.metrics.handshakes.WithLabelValues(outcome).Inc() },
	}, append([]grpc.ServerOption{
		// crypto/tls keeps the record that it reads: another 32 KiB for each connection
		// would only be a copy.
		grpc.ReadBufferSize(0),
	}, opts...))
	nodev1.RegisterNodeServiceServer(g, s.NodeService())
	downstreamv1.RegisterDownstreamServiceServer(g, &downstreamService{s: s})
	adminv1.RegisterAdminServiceServer(g, s.AdminService())
	adminv1.RegisterLedgerServiceServer(g, s.LedgerService())
	adminv1.RegisterConsoleServiceServer(g, &consoleService{s: s})
	return g
}

// AdminGRPC returns a server for the operators' Unix socket, which must come
// from peer.Listen: root and the CA's own user may use it. The caller serves and
// stops it.
func (s *Server) AdminGRPC(opts ...grpc.ServerOption) *grpc.Server {
	g := s.newGRPC(peer.Credentials(), append([]grpc.ServerOption{grpc.MaxRecvMsgSize(maxAdminMessage)}, opts...))
	adminv1.RegisterAdminServiceServer(g, s.AdminService())
	adminv1.RegisterLedgerServiceServer(g, s.LedgerService())
	adminv1.RegisterConsoleServiceServer(g, &consoleService{s: s})
	return g
}

func (s *Server) newGRPC(creds credentials.TransportCredentials, opts []grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.Creds(creds),
		grpc.UnaryInterceptor(s.interceptUnary),
		grpc.StreamInterceptor(s.interceptStream),
		grpc.UnknownServiceHandler(refuseUnknown),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveMin, PermitWithoutStream: true}),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.WaitForHandlers(true),
	}, opts...)...)
}

// tlsConfig returns the configuration of the agents' listener.
func (s *Server) tlsConfig() *tls.Config {
	base := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		MaxVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		NextProtos:       []string{"h2"},
		// A resumed session would skip the verification of the client, and
		// outlive its certificate, its node and the root.
		SessionTicketsDisabled: true,
		// Attest comes without a certificate; all else is refused without.
		ClientAuth: tls.VerifyClientCertIfGiven,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.cfg.CA.ServerCertificate()
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := s.clientIdentity(&state)
			return err
		},
	}
	// For each connection the roots are those of now.
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return s.bundles.config(s, base), nil
	}
	return base
}

// bundleCache holds the TLS configuration for the current bundle.
type bundleCache struct {
	mu       sync.Mutex // guards what follows
	sequence uint64
	current  *tls.Config
}

func (b *bundleCache) config(s *Server, base *tls.Config) *tls.Config {
	roots, sequence := s.cfg.CA.Bundle()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.current != nil && b.sequence == sequence {
		return b.current
	}
	// An empty pool verifies nobody; nil would mean the system's roots.
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	c := base.Clone()
	c.GetConfigForClient = nil
	c.ClientCAs = pool
	b.current, b.sequence = c, sequence
	return c
}

// clientIdentity returns the SPIFFE ID of the client's X.509-SVID, or the zero
// ID if it came without one. It looks at nothing but the leaf of the chain that
// was verified: other certificates in the handshake mean nothing.
//
// X509-SVID §5.2: no CA, no signing key usages, exactly one URI SAN with a
// path. The ID is compared as it is in the certificate, byte for byte.
func (s *Server) clientIdentity(state *tls.ConnectionState) (spiffeid.ID, error) {
	if len(state.PeerCertificates) == 0 {
		return spiffeid.ID{}, nil
	}
	if len(state.PeerCertificates) > maxClientChain {
		return spiffeid.ID{}, fmt.Errorf("client sent %d certificates, at most %d are taken", len(state.PeerCertificates), maxClientChain)
	}
	if len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) < 2 {
		return spiffeid.ID{}, errors.New("client certificate was not verified")
	}
	leaf := state.VerifiedChains[0][0]
	switch {
	case leaf.IsCA || !leaf.BasicConstraintsValid:
		return spiffeid.ID{}, errors.New("client certificate is not a leaf")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, errors.New("client certificate may sign certificates")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, errors.New("client certificate may not sign")
	}
	raw, err := soleURI(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := identity.ParseID(raw)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("client certificate: %w", err)
	}
	if id.TrustDomain() != s.cfg.TrustDomain || id.Path() == "" {
		return spiffeid.ID{}, fmt.Errorf("client certificate is for %s", id)
	}
	return id, nil
}

// checkIssuer refuses what a CA below this one has signed: it signs for its own mesh,
// and would make itself an administrator of ours.
func (s *Server) checkIssuer(ctx context.Context, issuer *x509.Certificate) error {
	switch below, err := s.cfg.CA.SignedBelow(ctx, issuer); {
	case err != nil:
		return fail(kindUnavailable, "who has signed the X.509-SVID cannot be found out now: use the Unix socket", err)
	case below:
		return fail(kindDenied, "permission denied: the X.509-SVID is from a CA below this one", nil)
	}
	return nil
}

// Admin returns the SPIFFE ID of a client whose connection was made elsewhere, with
// any certificate, if it proves to be that of an entry marked admin: its chain is
// verified here, against the bundle of the moment.
func (s *Server) Admin(ctx context.Context, state *tls.ConnectionState) (string, error) {
	if len(state.PeerCertificates) == 0 || len(state.PeerCertificates) > maxClientChain {
		return "", errors.New("client sent no certificate, or too many")
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	bundle, _ := s.cfg.CA.Bundle()
	for _, c := range bundle {
		roots.AddCert(c)
	}
	for _, c := range state.PeerCertificates[1:] {
		between.AddCert(c)
	}
	chains, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return "", err
	}
	id, err := s.clientIdentity(&tls.ConnectionState{PeerCertificates: state.PeerCertificates, VerifiedChains: chains})
	if err != nil {
		return "", err
	}
	if _, ok := s.registry.Entries().Admin(id.String()); !ok {
		return "", fmt.Errorf("%s is not the identity of an entry marked admin", id)
	}
	if err := s.checkIssuer(ctx, chains[0][1]); err != nil {
		return "", err
	}
	leaf := state.PeerCertificates[0]
	key := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	if q, ok := s.registry.Quarantines().Of(id.String(), key[:], leaf.SerialNumber.Bytes()); ok {
		return "", fmt.Errorf("%s is quarantined", q.Name())
	}
	return id.String(), nil
}

// tlsInfo is what a TLS connection proved.
type tlsInfo struct {
	credentials.CommonAuthInfo
	id       spiffeid.ID // zero without a client certificate
	serial   []byte
	key      []byte // SHA-256 of the public key
	notAfter time.Time
	issuer   *x509.Certificate
}

// AuthType implements credentials.AuthInfo.
func (*tlsInfo) AuthType() string { return "tls" }

// tlsCredentials makes the TLS handshakes of a listener, bounded in time and
// number.
type tlsCredentials struct {
	s     *Server
	base  *tls.Config
	conns *connections
	// counted counts how handshakes end.
	counted func(outcome string)
}

func (t *tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	release, ok := t.conns.handshakes.Take(host(raw.RemoteAddr().String()))
	if !ok {
		t.counted("overload")
		return nil, nil, errors.Join(errors.New("too many handshakes at the same time"), raw.Close())
	}
	defer release()
	conn := tls.Server(raw, t.base)
	// gRPC gives no context; it has set a deadline for the handshake (ConnectionTimeout).
	if err := conn.Handshake(); err != nil { //nolint:noctx // see above
		t.counted("failed")
		return nil, nil, errors.Join(err, raw.Close())
	}
	state := conn.ConnectionState()
	id, err := t.s.clientIdentity(&state)
	if err == nil && state.NegotiatedProtocol != "h2" {
		err = errors.New("client did not negotiate HTTP/2")
	}
	if err != nil {
		t.counted("failed")
		return nil, nil, errors.Join(err, conn.Close())
	}
	info := &tlsInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, id: id}
	if id.IsZero() {
		anonymous, ok := t.conns.admitAnonymous(conn)
		if !ok {
			t.counted("overload")
			return nil, nil, errors.Join(errors.New("too many connections without a client certificate"), raw.Close())
		}
		t.counted("ok")
		return anonymous, info, nil
	}
	tracked, ok := t.conns.track(id.String(), conn)
	if !ok {
		t.counted("overload")
		return nil, nil, errors.Join(fmt.Errorf("%s has too many connections", id), raw.Close())
	}
	t.counted("ok")
	leaf := state.VerifiedChains[0][0]
	key := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	info.serial, info.key, info.notAfter = leaf.SerialNumber.Bytes(), key[:], leaf.NotAfter
	info.issuer = state.VerifiedChains[0][1]
	return tracked, info, nil
}

func (*tlsCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for a server")
}

func (*tlsCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (t *tlsCredentials) Clone() credentials.TransportCredentials {
	clone := *t
	return &clone
}

func (*tlsCredentials) OverrideServerName(string) error { return nil }

// connections knows the unfinished handshakes and the connections without a
// client certificate, which it bounds, and the authenticated connections by
// SPIFFE ID, so that those of an evicted node can be closed.
type connections struct {
	handshakes *Places
	anonymous  *Places
	// anonymousLife is how long a connection without a client certificate lasts; zero
	// means as long as it is used.
	anonymousLife time.Duration

	mu   sync.Mutex // guards what follows
	byID map[string]map[*trackedConn]struct{}
}

func newConnections(handshakes, anonymous int, anonymousLife time.Duration) *connections {
	return &connections{
		handshakes:    NewPlaces(handshakes),
		anonymous:     NewPlaces(anonymous),
		anonymousLife: anonymousLife,
		byID:          make(map[string]map[*trackedConn]struct{}),
	}
}

// admitAnonymous takes a place for a connection without a client certificate,
// which anybody can make, and closes it when its life ends.
func (c *connections) admitAnonymous(conn *tls.Conn) (net.Conn, bool) {
	release, ok := c.anonymous.Take(host(conn.RemoteAddr().String()))
	if !ok {
		return nil, false
	}
	a := &anonymousConn{Conn: conn, release: sync.OnceFunc(release)}
	if c.anonymousLife > 0 {
		a.end = time.AfterFunc(c.anonymousLife, func() {
			a.release()
			_ = conn.NetConn().Close() // as abort does: it is being thrown away
		})
	}
	return a, true
}

// anonymousConn is a connection without a client certificate.
type anonymousConn struct {
	net.Conn
	release func()
	end     *time.Timer // nil if it has no end
}

// Close closes the connection.
func (a *anonymousConn) Close() error {
	if a.end != nil {
		a.end.Stop()
	}
	a.release()
	return a.Conn.Close()
}

// track notes an authenticated connection until it is closed, if it is not one
// too many.
func (c *connections) track(id string, conn net.Conn) (net.Conn, bool) {
	t := &trackedConn{Conn: conn, id: id, all: c}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.byID[id]) >= maxConnsPerID {
		return nil, false
	}
	if c.byID[id] == nil {
		c.byID[id] = make(map[*trackedConn]struct{})
	}
	c.byID[id][t] = struct{}{}
	return t, true
}

// closeAll closes the connections that were authenticated with this SPIFFE ID.
func (c *connections) closeAll(id string) {
	c.mu.Lock()
	conns := make([]*trackedConn, 0, len(c.byID[id]))
	for t := range c.byID[id] {
		conns = append(conns, t)
	}
	c.mu.Unlock()
	for _, t := range conns {
		t.abort()
	}
}

// trackedConn is a connection that connections knows.
type trackedConn struct {
	net.Conn
	id  string
	all *connections
}

func (t *trackedConn) forget() {
	t.all.mu.Lock()
	defer t.all.mu.Unlock()
	delete(t.all.byID[t.id], t)
	if len(t.all.byID[t.id]) == 0 {
		delete(t.all.byID, t.id)
	}
}

// Close closes the connection.
func (t *trackedConn) Close() error {
	t.forget()
	return t.Conn.Close()
}

// abort closes the connection without waiting for what is still to be written:
// a peer that does not read could hold tls.Conn's Close for seconds.
func (t *trackedConn) abort() {
	t.forget()
	if c, ok := t.Conn.(*tls.Conn); ok {
		_ = c.NetConn().Close() // it is being thrown away
		return
	}
	_ = t.Conn.Close()
}
