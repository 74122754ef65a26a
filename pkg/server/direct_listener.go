package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/identity"
)

// Limits of connections of workloads without an agent. They ask once in a
// certificate's life, and some make a connection for each request.
const (
	directIdle         = time.Minute
	directAge          = 15 * time.Minute
	directAgeGrace     = 10 * time.Second
	directMessage      = 64 << 10
	directHeaderBytes  = 24 << 10 // a token, and a cookie-sized rest
	directStreams      = 32
	directHandshakes   = 1024 // at the same time; a quarter of it from one address
	directConnections  = 16384
	directKeepaliveMin = 10 * time.Second // Istio's clients ping every 30 s
)

// DirectListener is how DirectGRPC's server meets its callers. Zero means the
// default.
type DirectListener struct {
	// Connections is the number of connections without a client certificate, a quarter
	// of it from one address; default 16,384.
	Connections int
	// Counted is called with how a handshake ended: ok, failed or overload.
	Counted func(outcome string)
}

// DirectGRPC returns a server for workloads that speak to the CA themselves: TLS 1.2
// or 1.3, client certificates verified against the bundle of the moment where there is
// one, connections, messages and calls bounded. It has no service, and who calls is
// for the service to find out. The caller serves and stops it.
func (s *Server) DirectGRPC(l DirectListener, opts ...grpc.ServerOption) *grpc.Server {
	if l.Connections <= 0 {
		l.Connections = directConnections
	}
	if l.Counted == nil {
		l.Counted = func(string) {}
	}
	base := s.tlsConfig()
	base.MinVersion = tls.VersionTLS12
	base.CipherSuites = []uint16{ // of TLS 1.2
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
	}
	base.CurvePreferences = append(base.CurvePreferences, tls.CurveP384)
	bundles := new(bundleCache)
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return bundles.config(s, base), nil }
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.Creds(&tlsCredentials{s: s, base: base, conns: newConnections(directHandshakes, l.Connections, 0), counted: l.Counted}),
		grpc.UnaryInterceptor(s.interceptDirect),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(directStreams),
		grpc.MaxHeaderListSize(directHeaderBytes),
		grpc.MaxRecvMsgSize(directMessage),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: directIdle, MaxConnectionAge: directAge, MaxConnectionAgeGrace: directAgeGrace,
			Time: keepaliveTime, Timeout: keepaliveTimeout,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: directKeepaliveMin, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	}, opts...)...)
}

// interceptDirect answers a panic as an internal error.
func (s *Server) interceptDirect(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.metrics.panics.Inc()
			s.log.ErrorContext(ctx, "handler panicked", "method", info.FullMethod, "err", fmt.Sprint(p), "stack", string(debug.Stack()))
			resp, err = nil, status.Error(codes.Internal, "internal error")
		}
	}()
	return handler(ctx, req)
}

// DirectPeer is who is at the other end of a connection to DirectGRPC's server.
type DirectPeer struct {
	// Address with its port, and Host without.
	Address, Host string
	// ID is that of the client's X.509-SVID; zero if it showed none. It was issued by
	// this trust domain's CA to nobody of the system's own, has not expired, and is not
	// quarantined.
	ID spiffeid.ID
}

// DirectPeerOf returns who makes a call on DirectGRPC's server. Its error says why the
// client's X.509-SVID is not accepted (any more); Address and Host are set all the same.
func (s *Server) DirectPeerOf(ctx context.Context) (DirectPeer, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return DirectPeer{}, errors.New("the connection is unknown")
	}
	peer := DirectPeer{Address: p.Addr.String(), Host: host(p.Addr.String())}
	info, ok := p.AuthInfo.(*tlsInfo)
	if !ok {
		return peer, fmt.Errorf("the connection is authenticated by %T", p.AuthInfo)
	}
	if info.id.IsZero() {
		return peer, nil
	}
	if !time.Now().Before(info.notAfter) {
		return peer, errors.New("the X.509-SVID has expired")
	}
	if identity.Reserved(info.id.Path()) {
		return peer, errors.New("the X.509-SVID is one of the system's own")
	}
	if _, ok := s.registry.Quarantines().Of(info.id.String(), info.key, info.serial); ok {
		return peer, errors.New("the X.509-SVID is quarantined")
	}
	peer.ID = info.id
	return peer, nil
}
