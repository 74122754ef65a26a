package conformance

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/test/local"
)

// TestSpec_E16_SlowReaders: ten that read nothing delay nobody.
func TestSpec_E16_SlowReaders(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	slow, uid := newUser(), newUser()
	w.apply(t, entry("e16-slow", slow), entry("e16", uid))
	c := w.as(t, slow)
	for range 10 {
		conn, err := c.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// One that reads nothing, not even from its socket, once it has asked.
		stuck := &readerThatStops{Conn: conn, after: make(chan struct{})}
		client, err := grpc.NewClient("passthrough:///agent", append(c.dialOptions(),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return stuck, nil }))...)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		defer close(stuck.after)
		c.streamOver(t, client).next(t)
		stuck.stopped.Store(true)
	}
	s := w.as(t, uid).stream(t)
	last := s.next(t)
	for i := range 50 {
		w.rotate(t)
		next := s.next(t)
		if bytes.Equal(last.GetSvids()[0].GetX509Svid(), next.GetSvids()[0].GetX509Svid()) {
			t.Fatalf("rotation %d: the same", i)
		}
		last = next
	}
	if n, err := metric(t.Context(), w.agent.Metrics, "meshid_agent_workloadapi_streams", `method="FetchX509SVID"`); err != nil || n != 11 {
		t.Errorf("%v streams: %v", n, err)
	}
}

type readerThatStops struct {
	net.Conn

	stopped atomic.Bool
	after   chan struct{}
}

func (r *readerThatStops) Read(p []byte) (int, error) {
	if r.stopped.Load() {
		<-r.after
		return 0, io.EOF
	}
	return r.Conn.Read(p)
}

// endsKindly says whether go-spiffe comes back after such an end: Canceled and
// InvalidArgument are final for it.
func endsKindly(t *testing.T, what string, err error) {
	t.Helper()
	if status.Code(err) != codes.Unavailable {
		t.Errorf("%s: %v", what, err)
	}
}

// TestSpec_E17_ShutdownIsUnavailable: whatever the agent is made to do.
func TestSpec_E17_ShutdownIsUnavailable(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	w.apply(t, entry("e17", uid))
	c := w.as(t, uid)
	for what, end := range map[string]func(){
		"asked to end": func() {
			if err := w.agent.Stop(t); err != nil {
				t.Error(err)
			}
		},
		"interrupted": func() {
			w.agent.Signal(t, syscall.SIGINT)
			<-w.agent.Done()
		},
		"killed": w.agent.Kill,
	} {
		streams := []svidStream{c.stream(t), c.stream(t)}
		for _, s := range streams {
			s.next(t)
		}
		bundles, err := workload.NewSpiffeWorkloadAPIClient(c.raw(t)).FetchX509Bundles(header(t.Context(), "true"), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bundles.Recv(); err != nil {
			t.Fatal(err)
		}
		end()
		for _, s := range streams {
			endsKindly(t, what, s.end())
		}
		_, err = bundles.Recv()
		endsKindly(t, what+", bundles", err)
		w.agent.Start(t)
		w.agent.AwaitConnected(t)
	}
}

// TestSpec_E17_CAFailsUnnoticed: streams go on while the CA is dead, new ones are
// served, and what was missed comes when it is back, on the same stream.
func TestSpec_E17_CAFailsUnnoticed(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	p := newPair(t, w, "e17-ca")
	uid := newUser()
	w.apply(t, entry("e17-down", uid))
	c := w.as(t, uid)
	s := c.stream(t)
	before := s.next(t)
	stop := p.handshakes(t)
	w.ca.Kill()
	if diff := cmp.Diff(idsOf(before), idsOf(c.stream(t).next(t))); diff != "" {
		t.Error(diff)
	}
	w.ca.Start(t)
	w.ca.AwaitReady(t)
	w.agent.AwaitConnected(t)
	w.rotate(t)
	if after := s.next(t); bytes.Equal(before.GetSvids()[0].GetX509Svid(), after.GetSvids()[0].GetX509Svid()) {
		t.Error("a message without a change")
	}
	if made := stop(); made == 0 {
		t.Error("no handshakes")
	}
}

// TestSpec_E18_RestartOfTheAgent: the source is back by itself, with the same
// identity, and no handshake fails meanwhile.
func TestSpec_E18_RestartOfTheAgent(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	p := newPair(t, w, "e18")
	stop := p.handshakes(t)
	for what, end := range map[string]func(){
		"killed": w.agent.Kill,
		"stopped": func() {
			if err := w.agent.Stop(t); err != nil {
				t.Error(err)
			}
		},
	} {
		before, err := p.client.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		end()
		if err := p.handshake(t.Context()); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		updated, begun := p.client.Updated(), time.Now()
		w.agent.Start(t)
		select {
		case <-updated:
		case <-time.After(patience):
			t.Fatalf("%s: the source is not back", what)
		}
		t.Logf("%s: the source is back %v after the start", what, time.Since(begun))
		after, err := p.client.GetX509SVID()
		if err != nil || after.ID != before.ID {
			t.Errorf("%s: %v instead of %v: %v", what, after, before.ID, err)
		}
		w.agent.AwaitConnected(t)
	}
	if made := stop(); made == 0 {
		t.Error("no handshakes")
	}
}

// TestSpec_E19_ProcessEnds: nothing of it stays in the agent.
func TestSpec_E19_ProcessEnds(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	w.apply(t, entry("e19", uid))
	read := func(ctx context.Context) (all []float64, err error) {
		for _, name := range []string{"meshid_agent_streams", "meshid_agent_workloadapi_streams", "meshid_agent_peer_connections", "go_goroutines"} {
			n, err := metric(ctx, w.agent.Metrics, name)
			if err != nil {
				return nil, err
			}
			all = append(all, n)
		}
		return all, nil
	}
	first := w.as(t, uid) // what is made once is made
	first.stream(t).next(t)
	first.exit()
	local.Await(t, "the first is gone", func(ctx context.Context) error {
		now, err := read(ctx)
		if err == nil && now[0]+now[1] > 0 {
			err = fmt.Errorf("%v", now)
		}
		return err
	})
	base, err := read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var callers []*caller
	for range 5 {
		c := w.as(t, uid)
		callers = append(callers, c)
		for range 20 {
			c.stream(t).next(t)
		}
	}
	if now, err := read(t.Context()); err != nil || now[0] != 100 || now[1] != 100 {
		t.Errorf("%v: %v", now, err)
	}
	begun := time.Now()
	for _, c := range callers {
		c.exit()
	}
	const slack = 4 // goroutines that come and go
	local.Await(t, "all are gone", func(ctx context.Context) error {
		now, err := read(ctx)
		switch {
		case err != nil:
			return err
		case slices.Equal(now[:2], base[:2]) && now[2] <= base[2] && now[3] <= base[3]+slack:
			return nil
		default:
			return fmt.Errorf("%v, before %v", now, base)
		}
	})
	t.Logf("free after %v", time.Since(begun))
}
