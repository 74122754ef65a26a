package meshid

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	downstreamv1 "github.com/meshid/meshid/proto/downstream/v1"
)

// How it gets along with a real CA above is in test/nested.

// fake is a CA above that signs as its authority does.
type fake struct {
	downstreamv1.UnimplementedDownstreamServiceServer

	t         *testing.T
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour
	send      chan *downstreamv1.Roots
	said      chan *downstreamv1.FollowRequest
}

func (f *fake) Mint(ctx context.Context, req *downstreamv1.MintRequest) (*downstreamv1.MintResponse, error) {
	switch f.behaviour { //nolint:exhaustive // the others answer
	case upstreamtest.Slow:
		<-ctx.Done()
		return nil, ctx.Err()
	case upstreamtest.Denied:
		return nil, status.Error(codes.PermissionDenied, "permission denied: no entry marked downstream has this SPIFFE ID")
	case upstreamtest.RateLimited:
		return nil, status.Error(codes.ResourceExhausted, "too many intermediates were asked for")
	case upstreamtest.Garbage:
		return &downstreamv1.MintResponse{Chain: [][]byte{[]byte("<html>")}}, nil
	}
	chain, roots := f.authority.Answer(req.GetCsr(), req.GetLife().AsDuration())
	return &downstreamv1.MintResponse{Chain: raw(chain), Roots: &downstreamv1.Roots{Sequence: 1, Roots: raw(roots)}}, nil
}

func raw(all []*x509.Certificate) [][]byte {
	var out [][]byte
	for _, c := range all {
		out = append(out, c.Raw)
	}
	return out
}

func (f *fake) Follow(stream grpc.BidiStreamingServer[downstreamv1.FollowRequest, downstreamv1.Roots]) error {
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case f.said <- m:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	if f.send == nil {
		if err := stream.Send(&downstreamv1.Roots{Sequence: 1, Roots: raw([]*x509.Certificate{f.authority.Root})}); err != nil {
			return err
		}
	}
	for {
		select {
		case roots, ok := <-f.send:
			if !ok {
				return io.ErrUnexpectedEOF
			}
			if err := stream.Send(roots); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func start(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*fake, Config) {
	t.Helper()
	f := &fake{t: t, authority: a, behaviour: b, said: make(chan *downstreamv1.FollowRequest)}
	address, member, end := upstreamtest.ServeMesh(t, upstreamtest.NewAuthority(t, upstreamtest.Good), serverPath, func(s *grpc.Server) { downstreamv1.RegisterDownstreamServiceServer(s, f) })
	if b == upstreamtest.Gone {
		end()
	}
	return f, Config{Address: address, Certificate: member.Certificate, Key: member.Key, Bundle: member.Bundle}
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			_, c := start(t, b, a)
			return upstreamtest.Open(t, New, c)
		},
	})
}

// The CA above hears that its roots are in force only when all of them are.
func TestAcknowledges(t *testing.T) {
	old, next := upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.NewAuthority(t, upstreamtest.Good)
	f, c := start(t, upstreamtest.Good, old)
	f.send = make(chan *downstreamv1.Roots)
	ca := upstreamtest.Open(t, New, c)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	seen := make(chan int, 10)
	ended := make(chan error, 1)
	go func() {
		ended <- ca.WatchRoots(ctx, func(roots []*x509.Certificate) error {
			seen <- len(roots)
			return nil
		})
	}()
	said := func(acknowledged uint64, held int) (waits string) {
		t.Helper()
		select {
		case m := <-f.said:
			if m.GetAcknowledged() != acknowledged || len(m.GetHeld()) != held {
				t.Errorf("said %v, want %d acknowledged and %d held", m, acknowledged, held)
			}
			return m.GetWaitsFor()
		case <-ctx.Done():
			t.Fatal("nothing was said")
		}
		return ""
	}
	ca.InForce([]upstream.InForce{{Root: old.Root, Acknowledged: true, Held: true}})
	f.send <- &downstreamv1.Roots{Sequence: 3, Roots: raw([]*x509.Certificate{old.Root})}
	said(3, 1)
	f.send <- &downstreamv1.Roots{Sequence: 4, Roots: raw([]*x509.Certificate{old.Root, next.Root})}
	if got := said(0, 1); !strings.Contains(got, "has not got root") {
		t.Errorf("it waits for %q", got)
	}
	ca.InForce([]upstream.InForce{{Root: old.Root, Acknowledged: true, Held: true}, {Root: next.Root, WaitsFor: strings.Repeat("ü", maxWaitsFor)}})
	if got := said(0, 1); len(got) == 0 || len(got) > maxWaitsFor || strings.Trim(got, "ü") != "" {
		t.Errorf("it waits for %q", got)
	}
	ca.InForce([]upstream.InForce{{Root: old.Root, Acknowledged: true, Held: true}, {Root: next.Root, Acknowledged: true, Held: true}})
	said(4, 2)
	if first, second := <-seen, <-seen; first != 1 || second != 2 {
		t.Errorf("%d and %d roots were seen", first, second)
	}
	// An end above is not a change of roots.
	close(f.send)
	if err := <-ended; err == nil || errors.Is(err, errRenew) {
		t.Errorf("%v", err)
	}
}

// A server of the mesh that is no CA is told nothing.
func TestServerIsNoCA(t *testing.T) {
	f := &fake{t: t, authority: upstreamtest.NewAuthority(t, upstreamtest.Good)}
	address, member, _ := upstreamtest.ServeMesh(t, f.authority, "/workload", func(s *grpc.Server) { downstreamv1.RegisterDownstreamServiceServer(s, f) })
	ca := upstreamtest.Open(t, New, Config{Address: address, Certificate: member.Certificate, Key: member.Key, Bundle: member.Bundle})
	_, err := upstreamtest.Mint(t.Context(), t, ca)
	if !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "unexpected ID") {
		t.Errorf("%v", err)
	}
}

func TestNew(t *testing.T) {
	_, good := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	open := filepath.Join(t.TempDir(), "open.pem")
	key, err := os.ReadFile(good.Key)
	if err == nil {
		err = os.WriteFile(open, key, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no address", func(c *Config) { c.Address = "" }, "host:port"},
		{"a URL for an address", func(c *Config) { c.Address = "https://ca.internal:8443" }, "host:port"},
		{"no port", func(c *Config) { c.Address = "ca.internal" }, "host:port"},
		{"no identity", func(c *Config) { c.Certificate, c.Key, c.Bundle = "", "", "" }, "set workload_api"},
		{"no key", func(c *Config) { c.Key = "" }, "set workload_api"},
		{"both", func(c *Config) { c.WorkloadAPI = "unix:///run/agent.sock" }, "keep one"},
		{"a path for an address", func(c *Config) {
			*c = Config{Address: c.Address, WorkloadAPI: "/run/agent.sock"}
		}, "unix:///"},
		{"no SPIFFE ID", func(c *Config) {
			*c = Config{Address: c.Address, WorkloadAPI: "unix:///run/agent.sock", SPIFFEID: "ca"}
		}, "spiffe_id"},
		{"a SPIFFE ID for files", func(c *Config) { c.SPIFFEID = "spiffe://example.org/ca" }, "remove it"},
		{"no certificate", func(c *Config) { c.Certificate = "/none" }, "certificate: "},
		{"no SVID", func(c *Config) { c.Certificate = c.Bundle }, "no X.509-SVID"},
		{"readable by all", func(c *Config) { c.Key = open }, "key: "},
		{"no bundle", func(c *Config) { c.Bundle = c.Key }, "bundle: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := good
			c.change(&config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}
