// Package spire is a fake of a SPIRE server and of an agent beside it: as much of the
// server's API and of the Workload API as a downstream CA uses. It checks callers and
// parameters as the originals do, and can be slow, wrong, limited or gone. It does not
// know who its client is. It is no SPIRE: what it shows is that a client keeps to the
// API, not that SPIRE keeps to it.
package spire

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

const (
	// Downstream is the path of the SPIFFE ID whose entry is downstream.
	Downstream = "/ca-below"
	// other is that of another one, which the agent gives first.
	other = "/workload"
)

// Server is a running fake.
type Server struct {
	// Address is where the server listens, and WorkloadAPI the agent.
	Address, WorkloadAPI string

	t         testing.TB
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour

	mu      sync.Mutex // guards what follows
	roots   []*x509.Certificate
	changed chan struct{} // closed when roots are replaced
}

// server and agent are the two APIs.
type (
	server struct {
		svidv1.UnimplementedSVIDServer
		*Server
	}
	agent struct {
		workload.UnimplementedSpiffeWorkloadAPIServer
		*Server
	}
)

// New starts both, which sign as a does, and behave as b.
func New(t testing.TB, a *upstreamtest.Authority, b upstreamtest.Behaviour) *Server {
	t.Helper()
	s := &Server{t: t, authority: a, behaviour: b, roots: []*x509.Certificate{a.Root}, changed: make(chan struct{})}
	var end func()
	s.Address, _, end = upstreamtest.ServeMesh(t, a, "/spire/server", func(g *grpc.Server) { svidv1.RegisterSVIDServer(g, &server{Server: s}) })
	if b == upstreamtest.Gone {
		end()
	}
	dir, err := os.MkdirTemp("", "spire") //nolint:usetesting // a path of t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "agent.sock")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(g, &agent{Server: s})
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun
			t.Errorf("serve the Workload API: %v", err)
		}
	})
	s.WorkloadAPI = "unix://" + path
	return s
}

// Prepare adds a root to the bundle: the server does not sign with it yet.
func (s *Server) Prepare(root *x509.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roots = append(slices.Clone(s.roots), root)
	close(s.changed)
	s.changed = make(chan struct{})
}

// bundle returns the roots, and what is closed when there are others.
func (s *Server) bundle() ([]*x509.Certificate, chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roots, s.changed
}

// NewDownstreamX509CA implements svidv1.SVIDServer.
func (s *server) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates[0].URIs) != 1 {
		return nil, status.Error(codes.Unauthenticated, "caller has no X.509-SVID")
	}
	caller := info.State.PeerCertificates[0].URIs[0]
	switch s.behaviour { //nolint:exhaustive // the others answer
	case upstreamtest.Slow:
		<-ctx.Done()
		return nil, ctx.Err()
	case upstreamtest.RateLimited:
		return nil, status.Error(codes.ResourceExhausted, "rejecting request due to downstream CA signing rate limit: rate (1) exceeds burst size (0)")
	case upstreamtest.Garbage:
		return &svidv1.NewDownstreamX509CAResponse{CaCertChain: [][]byte{[]byte("garbage")}}, nil
	}
	if s.behaviour == upstreamtest.Denied || caller.Path != Downstream {
		return nil, status.Errorf(codes.PermissionDenied, "authorization denied for method /spire.api.server.svid.v1.SVID/NewDownstreamX509CA")
	}
	if _, err := x509.ParseCertificateRequest(req.GetCsr()); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "malformed CSR: %v", err)
	}
	if req.GetPreferredTtl() <= 0 {
		s.t.Errorf("preferred_ttl is %d: SPIRE would choose", req.GetPreferredTtl())
	}
	chain, roots := s.authority.Answer(req.GetCsr(), time.Duration(req.GetPreferredTtl())*time.Second)
	if len(chain) == 0 {
		return nil, status.Error(codes.InvalidArgument, "invalid CSR signature")
	}
	answer := &svidv1.NewDownstreamX509CAResponse{}
	for _, c := range chain {
		answer.CaCertChain = append(answer.CaCertChain, c.Raw)
	}
	if prepared, _ := s.bundle(); len(roots) > 0 {
		roots = append(roots, prepared[1:]...)
	}
	for _, c := range roots {
		answer.X509Authorities = append(answer.X509Authorities, c.Raw)
	}
	return answer, nil
}

// FetchX509SVID implements workload.SpiffeWorkloadAPIServer.
func (s *agent) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	for {
		roots, changed := s.bundle()
		var bundle []byte
		for _, r := range roots {
			bundle = append(bundle, r.Raw...)
		}
		answer := &workload.X509SVIDResponse{}
		for _, path := range []string{other, Downstream} {
			certificate, key := s.authority.SVID(path)
			answer.Svids = append(answer.Svids, &workload.X509SVID{
				SpiffeId: upstreamtest.TrustDomain.IDString() + path, X509Svid: der(certificate), X509SvidKey: der(key), Bundle: bundle,
			})
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// der returns what is in PEM blocks, one after the other.
func der(text []byte) []byte {
	var all []byte
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		all = append(all, block.Bytes...)
	}
	return all
}
