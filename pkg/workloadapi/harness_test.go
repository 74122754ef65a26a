package workloadapi

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	spiffeclient "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// rig is a server on an in-memory connection.
type rig struct {
	t      testing.TB
	source *identitytest.Source
	server *Server
	peer   *peer.Peer
	conn   *grpc.ClientConn
	client workload.SpiffeWorkloadAPIClient
	reg    *prometheus.Registry
}

func newRig(t testing.TB, source *identitytest.Source, o Options) *rig {
	t.Helper()
	r := &rig{t: t, source: source, peer: peer.ForTest(4242, 1000, 1000), reg: prometheus.NewRegistry()}
	o.Registerer, o.Logger = r.reg, slog.New(slog.DiscardHandler)
	var err error
	if r.server, err = New(source, o); err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(append(ServerOptions(), grpc.Creds(identitytest.PeerCredentials(r.peer)))...)
	r.server.Register(g)
	RegisterReflection(g)
	listener := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- g.Serve(listener) }()
	r.conn, err = grpc.NewClient("passthrough:bufconn",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	r.client = workload.NewSpiffeWorkloadAPIClient(r.conn)
	t.Cleanup(func() {
		_ = r.conn.Close()
		r.server.Close()
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) value(name string, labels ...string) float64 {
	r.t.Helper()
	return identitytest.Metric(r.t, r.reg, name, labels...)
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, securityHeader, "true")
}

func (r *rig) svids(ctx context.Context) grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	r.t.Helper()
	c, err := r.client.FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func next[M any](t testing.TB, c grpc.ServerStreamingClient[M]) *M {
	t.Helper()
	m, err := c.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func ids(m *workload.X509SVIDResponse) []string {
	var all []string
	for _, s := range m.GetSvids() {
		all = append(all, s.GetSpiffeId())
	}
	return all
}

type noPeer[M any] struct {
	grpc.ServerStreamingServer[M]
	ctx context.Context //nolint:containedctx // it is what a stream is
}

func (n *noPeer[M]) Context() context.Context { return n.ctx }

// socketRig is a server on a real socket, for go-spiffe's own client.
type socketRig struct {
	source *identitytest.Source
	addr   string
	stop   func()
}

func newSocketRig(t testing.TB, source *identitytest.Source, socket string) *socketRig {
	t.Helper()
	listener, err := peer.Listen(t.Context(), socket, peer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	server, err := New(source, Options{})
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(append(ServerOptions(), grpc.Creds(peer.Credentials()))...)
	server.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(listener) }()
	r := &socketRig{source: source, addr: "unix://" + socket}
	r.stop = sync.OnceFunc(func() {
		server.Close()
		g.Stop()
		<-served
	})
	t.Cleanup(r.stop)
	return r
}

// soon is a client's back-off of tests.
type soon struct{}

func (soon) NewBackoff() spiffeclient.Backoff { return soon{} }
func (soon) Next() time.Duration              { return time.Millisecond }
func (soon) Reset()                           {}

func newX509Source(t *testing.T, addr string) *spiffeclient.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := spiffeclient.NewX509Source(ctx, spiffeclient.WithClientOptions(
		spiffeclient.WithAddr(addr), spiffeclient.WithBackoffStrategy(soon{})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func has(t *testing.T, s *spiffeclient.X509Source, want *identity.Snapshot) bool {
	t.Helper()
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := s.GetX509BundleForTrustDomain(want.Bundle.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	return svid.Certificates[0].Equal(identitytest.X509(want.Default().Chain[0])) && len(bundle.X509Authorities()) == len(want.Bundle.Roots)
}

func handshake(server, client *tls.Config) error {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() { done <- tls.Server(a, server).Handshake() }()
	c := tls.Client(b, client)
	if err := c.Handshake(); err != nil {
		return errors.Join(err, a.Close(), <-done)
	}
	return <-done
}
