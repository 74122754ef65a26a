package envoy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/sds"
	"github.com/meshid/meshid/test/identitytest"
)

// sizes notes how large each message is that a stream has received.
type sizes struct {
	mu     sync.Mutex // guards what follows
	stream map[int][]int
}

type streamKey struct{}

func (s *sizes) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.stream)
	s.stream[n] = nil
	return context.WithValue(ctx, streamKey{}, n)
}

func (s *sizes) HandleRPC(ctx context.Context, event stats.RPCStats) {
	if in, ok := event.(*stats.InPayload); ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		n := ctx.Value(streamKey{}).(int)
		s.stream[n] = append(s.stream[n], in.Length)
	}
}

func (*sizes) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*sizes) HandleConn(context.Context, stats.ConnStats)                       {}

func (s *sizes) all() [][]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all [][]int
	for _, messages := range s.stream {
		all = append(all, slices.Clone(messages))
	}
	return all
}

// TestSpec_S10_NodeOnlyFirst: Envoy describes itself, at length, in the first message of each stream
// only, and is served and its acknowledgements are understood; so are those of one
// that describes itself each time.
func TestSpec_S10_NodeOnlyFirst(t *testing.T) {
	const description = 1000 // bytes; no request is as long without one
	for name, c := range map[string]config{
		"sotw": {}, "delta": {Delta: true}, "aggregated sotw": {ADS: true}, "aggregated delta": {ADS: true, Delta: true},
		"sotw, always": {NodeAlways: true},
	} {
		t.Run(name, func(t *testing.T) {
			ca := identitytest.NewAuthority(t, "a.test")
			a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
			a.stop()
			seen := &sizes{stream: make(map[int][]int)}
			a.stats = seen
			a.start()
			c.Socket = a.socket
			p := startEnvoy(t, c)
			p.waitLive()
			port, next := p.port("inbound"), ca.SVID("/x")
			a.source.Publish(ca.Snapshot(1, next))
			eventually(t, "the rotation is acknowledged", func() bool {
				_, server, _ := call(port, nil)
				return server.Equal(identitytest.X509(next.Chain[0])) && a.metric("meshid_agent_sds_acks_total") == a.metric("meshid_agent_sds_responses_total")
			})
			messages := 0
			for _, stream := range seen.all() {
				for i, n := range stream {
					messages++
					if described := n > description; described != (i == 0 || c.NodeAlways) {
						t.Errorf("message %d has %d bytes", i, n)
					}
				}
			}
			if messages < 3 { // one to ask, and two acknowledgements at least
				t.Errorf("%d messages", messages)
			}
			t.Log(seen.all())
		})
	}
}

// TestSpec_S32_S33_NodeProxy: one proxy for all of a node has each identity for the clients
// that ask for it, also after a rotation of all; one that is withdrawn is not served
// any more, and the others go on. With 1,500 of them, on one aggregated stream, Envoy
// sends less than 2 MB.
func TestSpec_S32_S33_NodeProxy(t *testing.T) {
	for name, row := range map[string]struct {
		c          config
		identities int
	}{
		"sotw": {config{}, 20}, "delta": {config{Delta: true}, 20},
		"aggregated sotw": {config{ADS: true}, 20}, "aggregated delta": {config{ADS: true, Delta: true}, 1500},
	} {
		t.Run(name, func(t *testing.T) {
			ca := identitytest.NewAuthority(t, "a.test")
			c := row.c
			issue := func() (all []*identity.SVID) {
				for _, id := range c.Identities {
					all = append(all, ca.SVID("/"+id))
				}
				return all
			}
			for n := range row.identities {
				c.Identities = append(c.Identities, fmt.Sprintf("app-%d", n))
			}
			a := newAgent(t, nil)
			a.stop()
			seen := &sizes{stream: make(map[int][]int)}
			a.stats = seen
			a.start()
			svids := issue()
			a.source.Publish(ca.Snapshot(1, svids...))
			c.Socket = a.socket
			start := time.Now()
			p := startEnvoy(t, c)
			p.waitLive()
			live := time.Since(start)
			port := p.port("inbound")
			client := clientConfig(ca.SVID("/client"))
			leafOf := func(id string) (*x509.Certificate, error) {
				client := client.Clone()
				client.ServerName = id + ".test"
				s, err := open(t, port, client)
				if err != nil {
					return nil, err
				}
				defer s.conn.Close()
				return s.conn.ConnectionState().PeerCertificates[0], s.get()
			}
			// The first, the last and some between: each is asked for by its name.
			some := []int{0, 1, row.identities / 2, row.identities - 1}
			served := func() {
				t.Helper()
				for _, n := range some {
					eventually(t, c.Identities[n]+" has its certificate", func() bool {
						leaf, err := leafOf(c.Identities[n])
						return err == nil && leaf.Equal(identitytest.X509(svids[n].Chain[0]))
					})
				}
			}
			served()
			svids = issue()
			a.source.Publish(ca.Snapshot(2, svids...))
			served()
			gone := row.identities - 1
			withdrawn := ca.Snapshot(3, svids[:gone]...)
			withdrawn.Withdrawn = []spiffeid.ID{svids[gone].ID}
			a.source.Publish(withdrawn)
			eventually(t, "the last is withdrawn", func() bool {
				leaf, err := leafOf(c.Identities[gone])
				return err != nil || !leaf.NotAfter.After(time.Now())
			})
			some = some[:len(some)-1]
			served()
			streams, up := seen.all(), 0
			for _, messages := range streams {
				for _, n := range messages {
					up += n
				}
			}
			if c.ADS && len(streams) != 1 {
				t.Errorf("%d streams", len(streams))
			}
			if up > 2<<20 {
				t.Errorf("Envoy sent %d bytes", up)
			}
			t.Logf("%d identities on %d streams: LIVE after %s, %d bytes sent by Envoy", row.identities, len(streams), live.Round(time.Millisecond), up)
		})
	}
}

// TestSpec_S45_RotateAll: many proxies, each with a connection and two streams, as Envoy has them; all
// are rotated at once, time after time, and all acknowledge.
func TestSpec_S45_RotateAll(t *testing.T) {
	const proxies, rotations = 250, 10
	names := []string{"default", "ROOTCA"}
	ca := identitytest.NewAuthority(t, "a.test")
	a := newAgent(t, ca.Snapshot(1, ca.SVID("/x")))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	acked := make(chan time.Time, proxies*len(names))
	problems := make(chan error, proxies*len(names))
	for range proxies {
		conn, err := grpc.NewClient("unix:"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		for _, name := range names {
			running.Go(func() { problems <- acknowledge(ctx, conn, name, acked) })
		}
	}
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	await := func() (last []time.Time) {
		t.Helper()
		timeout := time.After(patience)
		for range proxies * len(names) {
			select {
			case at := <-acked:
				last = append(last, at)
			case err := <-problems:
				t.Fatal(err)
			case <-timeout:
				t.Fatalf("%d of %d have acknowledged", len(last), proxies*len(names))
			}
		}
		return last
	}
	await()
	var took []time.Duration
	for i := range rotations {
		next := identitytest.NewAuthority(t, "a.test")
		b := ca.Snapshot(uint64(i+2), ca.SVID("/x"))
		b.Bundle = ca.Bundle(uint64(i+2), next)
		start := time.Now()
		a.source.Publish(b)
		for _, at := range await() {
			took = append(took, at.Sub(start))
		}
	}
	want := float64(proxies * len(names) * (rotations + 1))
	eventually(t, "all acknowledgements have arrived", func() bool { return a.metric("meshid_agent_sds_acks_total") == want })
	if n := a.metric("meshid_agent_sds_responses_total"); n != want {
		t.Errorf("%v responses, want %v", n, want)
	}
	if n := a.metric("meshid_agent_sds_nacks_total"); n != 0 {
		t.Errorf("%v refused", n)
	}
	slices.Sort(took)
	t.Logf("%d streams, %d rotations, push to acknowledgement: p50 %s, p99 %s, max %s", proxies*len(names), rotations,
		took[len(took)/2].Round(time.Microsecond), took[len(took)*99/100].Round(time.Microsecond), took[len(took)-1].Round(time.Microsecond))
}

// acknowledge asks for one secret, as Envoy does, and acknowledges each version, and
// says when, until ctx ends.
func acknowledge(ctx context.Context, conn *grpc.ClientConn, name string, acked chan<- time.Time) error {
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("open a stream: %w", err)
	}
	r := &discoveryv3.DiscoveryRequest{
		Node:    &corev3.Node{Id: "sidecar", Cluster: "test", UserAgentName: "envoy"},
		TypeUrl: sds.TypeURL, ResourceNames: []string{name},
	}
	for {
		if err := stream.Send(r); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		if r.ResponseNonce != "" {
			acked <- time.Now()
		}
		answer, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if len(answer.GetResources()) != 1 {
			return errors.New("not one secret")
		}
		r = &discoveryv3.DiscoveryRequest{
			TypeUrl: sds.TypeURL, ResourceNames: []string{name}, VersionInfo: answer.GetVersionInfo(), ResponseNonce: answer.GetNonce(),
		}
	}
}
