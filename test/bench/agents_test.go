package bench

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/local"
)

// BenchmarkThousandAgents reports the memory that the CA has for each agent that is
// connected and has nothing to do: a connection, the stream on it, and what is known of
// the node. The agents are simulated, each on its own connection.
func BenchmarkThousandAgents(b *testing.B) {
	const nodes = 1000
	ca := local.StartCA(b, local.CAOptions{})
	apply(b, ca, everybody)
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, nodes)
	join := func(i int) {
		n := &fleetNode{node: attestNode(b, ca, fmt.Sprint("node-", i)), items: items(b, 1)}
		must(b, n.issue(ctx))
		stream, err := n.client.Sync(ctx)
		must(b, err)
		n.stream = stream
		must(b, n.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Hello{Hello: &nodev1.Hello{AgentVersion: "simulated", ReportsWithdrawals: true}}}))
		go func() { ended <- n.run(ctx) }()
	}
	join(0)
	before := settled(b, ca)
	for i := range nodes - 1 {
		join(i + 1)
	}
	after := 0.0
	for b.Loop() {
		after = settled(b, ca)
	}
	b.ReportMetric((after-before)/(nodes-1)/1024, "KiB/agent")
	b.ReportMetric(before/(1<<20), "CA-own-before-MiB")
	only(b)
	cancel()
	for range nodes {
		if err := <-ended; err == nil || !errors.Is(ctx.Err(), context.Canceled) {
			b.Errorf("an agent ended: %v", err)
		}
	}
}

// settled returns a CA's own memory once it has given back what only its last work
// needed: when that has not become less for a while.
func settled(b *testing.B, ca *local.CA) float64 {
	b.Helper()
	_, least := resident(b, ca.PID())
	for since := time.Now(); time.Since(since) < 12*time.Second; pause(b, 250*time.Millisecond) {
		if _, own := resident(b, ca.PID()); own < least {
			least, since = own, time.Now()
		}
	}
	_, own := resident(b, ca.PID())
	return own
}
