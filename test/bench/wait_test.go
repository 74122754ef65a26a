package bench

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshid/meshid/internal/memory"
	"github.com/meshid/meshid/pkg/agent"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	"github.com/meshid/meshid/test/local"
)

// arrivals is a watcher that says when it has got something.
type arrivals chan time.Time

func (a arrivals) OnX509ContextUpdate(*workloadapi.X509Context) { a <- time.Now() }

func (a arrivals) OnX509ContextWatchError(error) {}

// BenchmarkApplyToWorkload reports how long it takes from the call that applies an
// entry until a go-spiffe workload that waits for it has its X.509-SVID: the
// transaction, the push to the agent, the issuance and the record are in it.
func BenchmarkApplyToWorkload(b *testing.B) {
	ca, a := pair(b)
	entry := &entryv1.Entry{Name: "me", SpiffeId: "spiffe://example.org/me", Workloads: "unix.uid == 0"}
	one := func() time.Duration {
		ctx, cancel := context.WithCancel(b.Context())
		got, ended := make(arrivals, 1), make(chan error, 1)
		go func() { ended <- workloadapi.WatchX509Context(ctx, got, workloadapi.WithAddr(a.Address())) }()
		defer func() {
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) && ctx.Err() == nil {
				b.Error(err)
			}
			remove(b, ca, entry.GetName())
			awaitStatus(b, a, "the end of the entry", func(s *agent.Status) bool { return s.Entries == 1 && s.Streams == 0 })
		}()
		awaitStatus(b, a, "the workload to wait", func(s *agent.Status) bool { return s.Streams == 1 })
		began := time.Now()
		apply(b, ca, entry)
		select {
		case at := <-got:
			return at.Sub(began)
		case <-time.After(time.Minute):
			b.Fatal("nothing came")
			return 0
		}
	}
	one()
	var waits []time.Duration
	for b.Loop() {
		for range 50 {
			waits = append(waits, one())
		}
	}
	quantiles(b, waits)
}

// BenchmarkNewProcess reports how long a new process waits for its first secret:
// one that is the first of its workload instance, for which a key is made and an
// X.509-SVID is issued and recorded, and one whose instance has it at hand; with the
// 60 kB with which a real Envoy introduces itself, and without. And what processor
// time the agent takes for it, also as a multiple of the standard library's bare
// work for one certificate in the same run.
func BenchmarkNewProcess(b *testing.B) {
	for _, kind := range []struct {
		name       string
		step, node int
	}{
		{"nothing-issued", 1, 0},
		{"at-hand", 0, 0},
		{"at-hand-envoy", 0, envoyNode},
	} {
		b.Run(kind.name, func(b *testing.B) {
			_, a := pair(b)
			first := gather(b, a.Socket, 1, firstUser, 0, 0) // of the executable, and it keeps the instance
			first.release(b)
			defer first.leave()
			var waits []time.Duration
			var cpu time.Duration
			bare := newYardstick(b)
			user := firstUser
			for b.Loop() {
				for range 50 {
					user += kind.step
					c := gather(b, a.Socket, 1, user, 0, kind.node)
					began := processorTime(b, a.PID())
					w, _ := c.release(b)
					cpu += processorTime(b, a.PID()) - began
					waits = append(waits, w...)
					c.leave()
					bare.measure(b)
				}
			}
			b.ReportMetric(cpu.Seconds()*1000/float64(len(waits)), "agent-cpu-ms")
			bare.report(b, cpu/time.Duration(len(waits)))
			quantiles(b, waits)
		})
	}
}

// BenchmarkStorm reports how long it takes from the first of 200 new processes,
// which all begin at the same instant, to the last that has its secret; and the
// processor time of agent, CA and processes for it, which is what it takes on idle
// cores.
func BenchmarkStorm(b *testing.B) {
	for _, kind := range []struct {
		name string
		step int
	}{{"nothing-issued", 1}, {"at-hand", 0}} {
		b.Run(kind.name, func(b *testing.B) {
			ca, a := pair(b)
			first := gather(b, a.Socket, 1, firstUser, 0, 0)
			first.release(b)
			defer first.leave()
			const n = 200
			var waits []time.Duration
			var ofAgent, ofCA, ofClients time.Duration
			bare := newYardstick(b)
			user := firstUser
			for b.Loop() {
				for range 5 {
					user += n * kind.step
					c := gather(b, a.Socket, n, user, kind.step, 0)
					agentBegan, caBegan, clientsBegan := processorTime(b, a.PID()), processorTime(b, ca.PID()), c.processorTime(b)
					_, all := c.release(b)
					ofClients += c.processorTime(b) - clientsBegan
					ofAgent += processorTime(b, a.PID()) - agentBegan
					ofCA += processorTime(b, ca.PID()) - caBegan
					waits = append(waits, all)
					c.leave()
					bare.measure(b)
					awaitStatus(b, a, "the processes to be gone", func(s *agent.Status) bool { return s.Streams == 1 })
				}
			}
			b.ReportMetric(ofAgent.Seconds()*1000/float64(len(waits)), "agent-cpu-ms")
			b.ReportMetric(ofCA.Seconds()*1000/float64(len(waits)), "CA-cpu-ms")
			b.ReportMetric(ofClients.Seconds()*1000/float64(len(waits)), "clients-cpu-ms")
			bare.report(b, ofAgent/time.Duration(len(waits)*n))
			quantiles(b, waits)
		})
	}
}

// BenchmarkIdle reports what the programs use when nothing happens: processor time
// with 10,000 entries in force, in thousandths of one core, and memory with one.
func BenchmarkIdle(b *testing.B) {
	b.Run("one-entry", func(b *testing.B) {
		ca, a := pair(b)
		for b.Loop() {
			pause(b, 10*time.Second)
			for name, pid := range map[string]int{"CA": ca.PID(), "agent": a.PID()} {
				all, own := resident(b, pid)
				b.ReportMetric(all/(1<<20), name+"-MiB")
				b.ReportMetric(own/(1<<20), name+"-own-MiB")
			}
		}
		only(b)
	})
	b.Run("10000-entries", func(b *testing.B) {
		ca, a := pair(b)
		const n = 10_000
		entries := make([]*entryv1.Entry, n)
		for i := range entries {
			entries[i] = &entryv1.Entry{
				Name: fmt.Sprintf("app-%d", i), SpiffeId: fmt.Sprintf("spiffe://example.org/app/%d", i),
				Workloads: fmt.Sprintf("unix.uid == %d", 10_000+i),
			}
		}
		for part := range 10 {
			apply(b, ca, entries[part*n/10:(part+1)*n/10]...)
		}
		awaitStatus(b, a, "the entries", func(s *agent.Status) bool { return s.Entries == n+1 })
		pause(b, 2*memory.Calm) // what this took of memory is given back once, by both
		for b.Loop() {
			const long = 5 * time.Second
			agentBegan, caBegan := processorTime(b, a.PID()), processorTime(b, ca.PID())
			pause(b, long)
			b.ReportMetric(float64(processorTime(b, a.PID())-agentBegan)/float64(long)*1000, "agent-mcores")
			b.ReportMetric(float64(processorTime(b, ca.PID())-caBegan)/float64(long)*1000, "CA-mcores")
			for name, pid := range map[string]int{"CA": ca.PID(), "agent": a.PID()} {
				all, _ := resident(b, pid)
				b.ReportMetric(all/(1<<20), name+"-MiB")
			}
		}
		only(b)
	})
}

// memoryOf reports what n streams, which open opens, cost the agent: its own pages
// when they are open, and once it had time to give back what it does not need.
func memoryOf(b *testing.B, a *local.Agent, n float64, open func()) {
	b.Helper()
	_, before := resident(b, a.PID())
	busy := goroutines(b, a.Metrics)
	open()
	all, own := resident(b, a.PID())
	b.ReportMetric(all/(1<<20), "agent-MiB")
	b.ReportMetric((own-before)/n/1024, "KiB/stream")
	b.ReportMetric((goroutines(b, a.Metrics)-busy)/n, "goroutines/stream")
	pause(b, 10*time.Second)
	all, own = resident(b, a.PID())
	b.ReportMetric(all/(1<<20), "settled-MiB")
	b.ReportMetric((own-before)/n/1024, "settled-KiB/stream")
	only(b)
}

// BenchmarkThousandStreams reports the memory and the goroutines of an agent with
// 1,000 silent streams: of 1,000 processes with a connection each, opened as Envoy
// does, which are one workload instance or each one of its own; and of one proxy
// for 1,000 identities, with 100 streams a connection.
func BenchmarkThousandStreams(b *testing.B) {
	const n = 1000
	for _, kind := range []struct {
		name string
		step int
	}{{"one-identity", 0}, {"1000-identities", 1}} {
		b.Run("of-as-many-processes/"+kind.name, func(b *testing.B) {
			for b.Loop() {
				_, a := pair(b)
				first := gather(b, a.Socket, 1, firstUser, 0, envoyNode)
				first.release(b)
				c := gather(b, a.Socket, n, firstUser+kind.step, kind.step, envoyNode)
				memoryOf(b, a, n, func() {
					c.release(b)
					awaitStatus(b, a, "the streams", func(s *agent.Status) bool { return s.Streams == n+1 })
				})
				c.leave()
				first.leave()
			}
		})
	}
	b.Run("of-one-process/1000-identities", func(b *testing.B) {
		for b.Loop() {
			ca, a := pair(b)
			entries := make([]*entryv1.Entry, n)
			for i := range entries {
				entries[i] = &entryv1.Entry{Name: fmt.Sprint("id-", i), SpiffeId: fmt.Sprint("spiffe://example.org/id/", i), Workloads: "unix.uid == 0"}
			}
			apply(b, ca, entries...)
			awaitStatus(b, a, "the entries", func(s *agent.Status) bool { return s.Entries == n+1 })
			memoryOf(b, a, n, func() {
				for first := 0; first < n; first += 100 {
					openStreams(b, a, entries[first:first+100])
				}
			})
		}
	})
}

// openStreams opens a stream for each entry's secret, all on one connection.
func openStreams(b *testing.B, a *local.Agent, entries []*entryv1.Entry) {
	b.Helper()
	conn, err := grpc.NewClient("unix:"+a.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(b, err)
	b.Cleanup(func() { _ = conn.Close() })
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	for _, e := range entries {
		stream, err := client.StreamSecrets(b.Context())
		must(b, err)
		ask := &discoveryv3.DiscoveryRequest{
			Node: &corev3.Node{Id: "proxy"}, ResourceNames: []string{e.GetSpiffeId()},
			TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
		}
		must(b, stream.Send(ask))
		answer, err := stream.Recv()
		must(b, err)
		ask.VersionInfo, ask.ResponseNonce = answer.GetVersionInfo(), answer.GetNonce()
		must(b, stream.Send(ask))
	}
}
