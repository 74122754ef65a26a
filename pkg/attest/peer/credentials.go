package peer

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
)

// AuthInfo carries the Peer in gRPC's context.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Peer *Peer
}

// AuthType names the credentials.
func (AuthInfo) AuthType() string { return "peer-process" }

// FromContext returns the process that made the call whose context this is. It
// is false for a call that came in by another way than Credentials.
func FromContext(ctx context.Context) (*Peer, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(AuthInfo)
	return info.Peer, ok && info.Peer != nil
}

// NewContext returns a context from which FromContext takes p, for tests of
// handlers.
func NewContext(ctx context.Context, p *Peer) context.Context {
	return grpcpeer.NewContext(ctx, &grpcpeer.Peer{Addr: &net.UnixAddr{Net: "unix"}, AuthInfo: AuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Peer:           p,
	}})
}

// Credentials returns the transport credentials of a gRPC server that serves
// connections of Listen. A connection from elsewhere is refused.
func Credentials() credentials.TransportCredentials { return transport{} }

type transport struct{}

func (transport) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, ok := FromConn(c)
	if !ok {
		return nil, nil, errors.New("connection was not accepted by a listener that knows its peer")
	}
	return c, AuthInfo{
		// A Unix socket: nothing but the two processes and the kernel sees it.
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Peer:           p,
	}, nil
}

func (transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

func (transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peer-process"}
}

func (t transport) Clone() credentials.TransportCredentials { return t }

func (transport) OverrideServerName(string) error { return nil }
