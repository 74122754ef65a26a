package sds

import (
	"context"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/test/identitytest"
)

// TestV_H10_KeysOnlyToKnownPeers: over a connection whose process the kernel has not named,
// there is nothing to be had.
func TestV_H10_KeysOnlyToKnownPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		for _, err := range []error{
			r.server.serve(&noStream{ctx: t.Context()}, protocolSotW),
			second(r.server.fetch(t.Context(), &discoveryv3.DiscoveryRequest{})),
		} {
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("got %v", err)
			}
		}
		if r.source.Opened() != 0 {
			t.Error("the source was asked")
		}
	})
}

// noStream is a stream of a connection without peer.
type noStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // it is what a stream is
}

func (n *noStream) Context() context.Context { return n.ctx }

// Streams are bounded, in all and for each user; a stream that ends makes room.
func TestV_I1_StreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{MaxStreams: 5, MaxStreamsPerUID: 3})
		var open []*sotw
		for range 3 {
			c := r.sotw(t.Context())
			c.ask(nameDefault)
			c.next()
			open = append(open, c)
		}
		refused := r.sotw(t.Context())
		if _, err := refused.Recv(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
		// Another user still has room, until the whole is full.
		var release []func()
		for uid := range uint32(2) {
			f, err := r.server.admit(uid)
			if err != nil {
				t.Fatal(err)
			}
			release = append(release, f)
		}
		if _, err := r.server.admit(7); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
		for _, f := range release {
			f()
		}
		if err := open[0].CloseSend(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c := r.sotw(t.Context())
		c.ask(nameDefault)
		c.next()
		if len(r.server.perUID) != 1 {
			t.Errorf("%d users remembered", len(r.server.perUID))
		}
		r.server.Close()
		if _, err := r.server.admit(7); status.Code(err) != codes.Unavailable {
			t.Errorf("after Close: %v", err)
		}
	})
}

// TestV_I3_OversizedHeaders: a client that sends a megabyte of metadata is refused, others
// are served.
func TestV_I3_OversizedHeaders(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("y", 1<<20))
	client := secretv3.NewSecretDiscoveryServiceClient(r.conn)
	if c, err := client.StreamSecrets(ctx); err == nil {
		if _, err = c.Recv(); err == nil {
			t.Error("accepted")
		}
	}
	c := r.sotw(t.Context())
	c.ask(nameDefault)
	c.next()
}

// TestV_I6_NoGoroutineIsLeft: however streams end, nothing of them stays.
func TestV_I6_NoGoroutineIsLeft(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	source := identitytest.NewSource(a.Snapshot(1, a.SVID("/x")))
	r := newRig(t, source, Options{})
	c := r.sotw(t.Context())
	c.ask(nameDefault)
	c.next()
	base := runtime.NumGoroutine()
	ends := []func(*sotw, context.CancelFunc){
		func(_ *sotw, cancel context.CancelFunc) { cancel() },
		func(c *sotw, cancel context.CancelFunc) {
			c.ask(nameDefault)
			c.next()
			cancel()
		},
		func(c *sotw, cancel context.CancelFunc) {
			c.ask(nameDefault)
			c.next()
			if err := c.CloseSend(); err != nil {
				t.Error(err)
			}
			_, _ = c.Recv()
			cancel()
		},
		func(c *sotw, cancel context.CancelFunc) {
			c.request(&discoveryv3.DiscoveryRequest{TypeUrl: "x"})
			_, _ = c.Recv()
			cancel()
		},
	}
	for i := range 1000 {
		ctx, cancel := context.WithCancel(t.Context())
		ends[i%len(ends)](r.sotw(ctx), cancel)
	}
	left := func() bool {
		return runtime.NumGoroutine() > base+2 || r.value("meshid_agent_sds_streams", "sotw") != 1
	}
	for deadline := time.Now().Add(time.Minute); left(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before; %v streams are counted", runtime.NumGoroutine(), base, r.value("meshid_agent_sds_streams", "sotw"))
		}
	}
}
