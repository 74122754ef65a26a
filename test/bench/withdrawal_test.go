package bench

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/agent"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// proxies opens a stream for each SPIFFE ID, 100 on one connection, each of which
// acknowledges whatever comes until the benchmark ends. It returns when certificates
// come.
func proxies(b testing.TB, a *local.Agent, ids []string) <-chan time.Time {
	b.Helper()
	arrived := make(chan time.Time, 4*len(ids))
	for part := range slices.Chunk(ids, 100) {
		conn, err := grpc.NewClient("unix:"+a.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		must(b, err)
		b.Cleanup(func() { _ = conn.Close() })
		client := secretv3.NewSecretDiscoveryServiceClient(conn)
		for _, id := range part {
			stream, err := client.StreamSecrets(b.Context())
			must(b, err)
			ask := &discoveryv3.DiscoveryRequest{
				Node: &corev3.Node{Id: "proxy"}, ResourceNames: []string{id, "ROOTCA"},
				TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
			}
			must(b, stream.Send(ask))
			go func() {
				for {
					answer, err := stream.Recv()
					if err != nil {
						return // the benchmark has ended
					}
					if at := time.Now(); carries(answer, id) {
						select {
						case arrived <- at:
						default: // nobody counts
						}
					}
					next := &discoveryv3.DiscoveryRequest{
						ResourceNames: ask.GetResourceNames(), TypeUrl: ask.GetTypeUrl(),
						VersionInfo: answer.GetVersionInfo(), ResponseNonce: answer.GetNonce(),
					}
					if stream.Send(next) != nil {
						return
					}
				}
			}()
		}
	}
	return arrived
}

// carries says whether an answer has a secret of that name.
func carries(answer *discoveryv3.DiscoveryResponse, name string) bool {
	return slices.ContainsFunc(answer.GetResources(), func(r *anypb.Any) bool {
		secret := new(tlsv3.Secret)
		return r.UnmarshalTo(secret) == nil && secret.GetName() == name
	})
}

// BenchmarkWithdrawal reports how long it takes, from the call that deletes an entry,
// until its identity is out of use at 200 open streams: until each has the tombstone,
// and until the CA knows that each has acknowledged it.
func BenchmarkWithdrawal(b *testing.B) {
	const n = 200
	ca, a := pair(b)
	entry := &entryv1.Entry{Name: "me", SpiffeId: "spiffe://example.org/me", Workloads: "unix.uid == 0"}
	arrived := proxies(b, a, slices.Repeat([]string{entry.GetSpiffeId()}, n))
	awaitStatus(b, a, "the streams", func(s *agent.Status) bool { return s.Streams == n })
	var received, known []time.Duration
	for b.Loop() {
		for range 10 {
			apply(b, ca, entry)
			awaitStatus(b, a, "the identity at all streams", func(s *agent.Status) bool { return len(arrived) >= n && s.BundleStreams == n })
			for range len(arrived) {
				<-arrived
			}
			began := time.Now()
			deleted, err := ca.Admin.DeleteEntries(b.Context(), &adminv1.DeleteEntriesRequest{Names: []string{entry.GetName()}})
			must(b, err)
			for range n {
				select {
				case at := <-arrived:
					received = append(received, at.Sub(began))
				case <-time.After(time.Minute):
					b.Fatal("a stream got no tombstone")
				}
			}
			var w *adminv1.Withdrawal
			local.Await(b, "wait for the end of the withdrawal", func(ctx context.Context) error {
				answer, err := ca.Admin.ListWithdrawals(ctx, &adminv1.ListWithdrawalsRequest{Id: deleted.GetWithdrawal()})
				if err != nil {
					return err
				}
				if w = answer.GetWithdrawals()[0]; w.GetState() != "complete" {
					return fmt.Errorf("it is %v", w)
				}
				return nil
			})
			if w.GetStreamsAcknowledged() != n {
				b.Fatalf("%d streams have acknowledged: %v", w.GetStreamsAcknowledged(), w)
			}
			known = append(known, w.GetMax().AsDuration())
		}
	}
	slices.Sort(known)
	b.ReportMetric(known[len(known)/2].Seconds()*1000, "known-of-all-p50-ms")
	b.ReportMetric(known[len(known)-1].Seconds()*1000, "known-of-all-max-ms")
	quantiles(b, received)
}

// watchRotation is awaitRotation for measuring: it asks four times a second, which
// costs the CA nothing that counts.
func watchRotation(b *testing.B, ca *local.CA, ok func(*adminv1.Rotation) bool) {
	b.Helper()
	for {
		answer, err := ca.Admin.GetRotation(b.Context(), &adminv1.GetRotationRequest{})
		must(b, err)
		if ok(answer.GetRotation()) {
			return
		}
		pause(b, 250*time.Millisecond)
	}
}

// unused says whether nothing is in use any more that chains to a root.
func unused(r *adminv1.Rotation, root string) bool {
	return inState(r, "active") != root && !slices.ContainsFunc(r.GetRoots(), func(n *adminv1.Root) bool { return n.GetId() == root && n.GetSvids() > 0 })
}

// BenchmarkTaint reports the processor time that CA and agent take to issue the 1,000
// X.509-SVIDs of one node again, because the root that they chain to is tainted: from
// the command until nothing is in use that chains to it, with the successor's
// distribution to 1,000 streams; and what it is against the standard library's bare
// work.
func BenchmarkTaint(b *testing.B) {
	const n = 1000
	ca, a := pair(b)
	entries, ids := make([]*entryv1.Entry, n), make([]string, n)
	for i := range entries {
		ids[i] = fmt.Sprint("spiffe://example.org/id/", i)
		entries[i] = &entryv1.Entry{Name: fmt.Sprint("id-", i), SpiffeId: ids[i], Workloads: "unix.uid == 0"}
	}
	apply(b, ca, entries...)
	awaitStatus(b, a, "the entries", func(s *agent.Status) bool { return s.Entries == n+1 })
	proxies(b, a, ids)
	awaitStatus(b, a, "the streams", func(s *agent.Status) bool { return s.BundleStreams == n && s.Acknowledged == n })
	bare := newYardstick(b)
	var ofCA, ofAgent, whole time.Duration
	rounds := 0
	for b.Loop() {
		before := inState(awaitRotation(b, ca, "wait until all is issued", func(r *adminv1.Rotation) bool {
			return len(r.GetRoots()) == 1 && r.GetRoots()[0].GetSvids() >= n && r.GetProxiesAcknowledged() == n
		}), "active")
		began, agentBegan, caBegan := time.Now(), processorTime(b, a.PID()), processorTime(b, ca.PID())
		rotate(b, ca, "taint")
		watchRotation(b, ca, func(r *adminv1.Rotation) bool { return unused(r, before) })
		whole += time.Since(began)
		ofAgent += processorTime(b, a.PID()) - agentBegan
		ofCA += processorTime(b, ca.PID()) - caBegan
		rounds++
		bare.measure(b)
	}
	b.ReportMetric(ofCA.Seconds()/float64(rounds), "CA-cpu-s")
	b.ReportMetric(ofAgent.Seconds()/float64(rounds), "agent-cpu-s")
	b.ReportMetric((ofCA+ofAgent).Seconds()/float64(rounds), "cpu-s")
	b.ReportMetric(whole.Seconds()/float64(rounds), "wall-s")
	bare.report(b, (ofCA+ofAgent)/time.Duration(rounds*n))
	only(b)
}

// fleetNode is a simulated node: the CA's side of it is real, its hundred proxies are
// numbers that it reports.
type fleetNode struct {
	*node
	name   string
	stream grpc.BidiStreamingClient[nodev1.SyncRequest, nodev1.SyncResponse]
	items  []*nodev1.IssueItem
	// root is the key identifier of the root that its X.509-SVIDs chain to.
	root string
}

func (n *fleetNode) send(m *nodev1.SyncRequest) error { return n.stream.Send(m) }

// issue has everything on the node issued.
func (n *fleetNode) issue(ctx context.Context) error {
	answer, err := n.client.Issue(ctx, &nodev1.IssueRequest{Items: n.items})
	if err != nil {
		return err
	}
	for _, r := range answer.GetResults() {
		if r.GetSvid() == nil {
			return fmt.Errorf("refused: %v", r.GetRefusal())
		}
		chain := r.GetSvid().GetChain()
		last, err := x509.ParseCertificate(chain[len(chain)-1])
		if err != nil {
			return err
		}
		n.root = hex.EncodeToString(last.AuthorityKeyId)
	}
	return nil
}

// run does what an agent does until the stream ends: says what is in force, has its
// proxies acknowledge, and renews what it is told to.
func (n *fleetNode) run(ctx context.Context) error {
	var revision, sequence uint64
	for {
		m, err := n.stream.Recv()
		if err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *nodev1.SyncResponse_Snapshot:
			revision = m.Snapshot.GetRevision()
		case *nodev1.SyncResponse_Delta:
			revision = m.Delta.GetRevision()
		case *nodev1.SyncResponse_Bundle:
			sequence = m.Bundle.GetSequence()
		case *nodev1.SyncResponse_Rotate:
			if err := n.issue(ctx); err != nil {
				return err
			}
		default:
		}
		count := uint32(len(n.items)) // a hundred
		for _, m := range []*nodev1.SyncRequest{
			{Message: &nodev1.SyncRequest_Applied{Applied: &nodev1.Applied{Revision: revision, BundleSequence: sequence}}},
			{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: &nodev1.BundleAcks{
				Streams: count, Acknowledged: count, Sequence: sequence, Counted: true, Held: []*nodev1.Held{{Root: n.root, Svids: count}},
			}}},
		} {
			if err := n.send(m); err != nil {
				return err
			}
		}
	}
}

// BenchmarkFleetRotation reports what a rotation of the root costs the CA when 100
// nodes with 100 streams each follow it, 10,000 X.509-SVIDs: processor time and the
// most memory. The nodes are simulated: they speak to the CA as agents do, each on
// its own connection.
func BenchmarkFleetRotation(b *testing.B) {
	const nodes, streams = 100, 100
	ca := local.StartCA(b, local.CAOptions{})
	apply(b, ca, everybody)
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, nodes)
	for i := range nodes {
		n := &fleetNode{node: attestNode(b, ca, fmt.Sprint("node-", i)), name: fmt.Sprint("node-", i), items: items(b, streams)}
		must(b, n.issue(ctx))
		stream, err := n.client.Sync(ctx)
		must(b, err)
		n.stream = stream
		must(b, n.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{AgentVersion: "simulated", ReportsWithdrawals: true}}}))
		go func() { ended <- n.run(ctx) }()
	}
	defer func() {
		cancel()
		for range nodes {
			if err := <-ended; err == nil || !errors.Is(ctx.Err(), context.Canceled) {
				b.Errorf("a node ended: %v", err)
			}
		}
	}()
	var cpu, whole time.Duration
	rounds := 0
	peak := 0.0
	_, before := resident(b, ca.PID())
	for b.Loop() {
		old := inState(awaitRotation(b, ca, "wait for the fleet", func(r *adminv1.Rotation) bool {
			return r.GetNodes() == nodes && r.GetProxiesAcknowledged() == nodes*streams && len(r.GetRoots()) > 0
		}), "active")
		began, caBegan := time.Now(), processorTime(b, ca.PID())
		rotate(b, ca, "taint")
		watchRotation(b, ca, func(r *adminv1.Rotation) bool {
			all, _ := resident(b, ca.PID())
			peak = max(peak, all)
			return unused(r, old)
		})
		whole += time.Since(began)
		cpu += processorTime(b, ca.PID()) - caBegan
		rounds++
	}
	b.ReportMetric(cpu.Seconds()/float64(rounds), "CA-cpu-s")
	b.ReportMetric(whole.Seconds()/float64(rounds), "wall-s")
	b.ReportMetric(peak/(1<<20), "CA-peak-MiB")
	b.ReportMetric(before/(1<<20), "CA-own-before-MiB")
	only(b)
}

// TestV_E3_WithdrawnFromEnvoys: an identity is taken from two real Envoys, of which one
// stands still. The command says who has not acknowledged and gives up waiting; when
// that one goes on, the withdrawal is complete, and the slow one is in the time to
// effect.
func TestV_E3_WithdrawnFromEnvoys(t *testing.T) {
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	apply(t, ca, everybody)
	a := ca.StartAgent(t, "withdrawal", local.AgentOptions{})
	serves := func(p string) {
		t.Helper()
		local.Await(t, "wait for an Envoy", func(ctx context.Context) error {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", p))
			if err != nil {
				return err
			}
			return conn.Close()
		})
	}
	ports := []string{port(t), port(t)}
	startEnvoy(t, firstUser, serverBootstrap, "SOCKET", a.Socket, "SERVER", ports[0])
	still := startEnvoy(t, firstUser+1, serverBootstrap, "SOCKET", a.Socket, "SERVER", ports[1])
	serves(ports[0])
	serves(ports[1])
	awaitRotation(t, ca, "wait until both have acknowledged what they have", func(r *adminv1.Rotation) bool {
		return r.GetProxies() >= 2 && r.GetProxiesAcknowledged() == r.GetProxies()
	})
	still.Signal(t, syscall.SIGSTOP)
	out, err := ca.Command(t, "entry", "delete", everybody.GetName(), "--wait", "--timeout", "2s")
	name := fmt.Sprintf("spiffe://example.org/user/%d (process ", firstUser+1)
	if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), fmt.Sprint("user/", firstUser, " ")) || !strings.Contains(out, "carried out on 1 of 1 nodes") {
		t.Errorf("while one stands still: %v\n%s", err, out)
	}
	answer, err := ca.Admin.ListWithdrawals(t.Context(), &adminv1.ListWithdrawalsRequest{})
	must(t, err)
	w := answer.GetWithdrawals()[0]
	if w.GetState() != "pending" || w.GetStreamsAcknowledged() == 0 || w.GetStreamsAcknowledged() >= w.GetStreams() {
		t.Errorf("while one stands still: %v", w)
	}
	still.Signal(t, syscall.SIGCONT)
	out = ca.MustCommand(t, "withdrawal", "show", w.GetId(), "--wait", "--timeout", "1m", "-o", "json")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	last := new(adminv1.Withdrawal)
	must(t, protojson.Unmarshal([]byte(lines[len(lines)-1]), last))
	if last.GetState() != "complete" || last.GetStreamsAcknowledged() != last.GetStreams() || last.GetMax().AsDuration() < 2*time.Second || last.GetMax().AsDuration() <= w.GetMax().AsDuration() {
		t.Errorf("at the end: %v; before: %v", last, w)
	}
}
