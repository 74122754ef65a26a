package identitytest

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
)

// Source gives all streams the same snapshots, in the agent's place. It may be
// used concurrently.
type Source struct {
	mu             sync.Mutex // guards what follows
	snapshot       *identity.Snapshot
	err            error
	watches        map[*identity.Watch]struct{}
	opened, closed int
	pids           map[int]bool
	acks           []uint64
	inForce        []InForce
}

// InForce is a call of that method of a watch.
type InForce struct {
	Snapshot *identity.Snapshot
	Carries  bool
}

// NewSource returns a source that begins with a snapshot, or with none if it is nil.
func NewSource(snapshot *identity.Snapshot) *Source {
	return &Source{snapshot: snapshot, watches: make(map[*identity.Watch]struct{}), pids: make(map[int]bool)}
}

// Refusing returns a source that refuses all streams.
func Refusing(err error) *Source {
	s := NewSource(nil)
	s.err = err
	return s
}

// Subscribe begins a stream.
func (s *Source) Subscribe(_ context.Context, p *peer.Peer) (*identity.Watch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	var w *identity.Watch
	w = identity.NewWatch(func(sequence uint64) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.acks = append(s.acks, sequence)
	}, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.closed++
		delete(s.watches, w)
	})
	w.OnForce(func(snapshot *identity.Snapshot, carries bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.inForce = append(s.inForce, InForce{snapshot, carries})
	})
	s.opened++
	s.watches[w] = struct{}{}
	s.pids[p.PID] = true
	if s.snapshot != nil {
		w.Publish(s.snapshot)
	}
	return w, nil
}

// Publish gives all streams a snapshot, those that come later as well.
func (s *Source) Publish(snapshot *identity.Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot = snapshot
	for w := range s.watches {
		w.Publish(snapshot)
	}
}

// End ends all streams.
func (s *Source) End(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		w.End(err)
	}
}

// Latest returns what was published last.
func (s *Source) Latest() *identity.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshot
}

// Opened returns how many streams have begun.
func (s *Source) Opened() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened
}

// Open returns how many streams there are now.
func (s *Source) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened - s.closed
}

// HasSubscribed says whether a process has begun a stream.
func (s *Source) HasSubscribed(pid int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pids[pid]
}

// TakeInForce returns what was said to be in force since it was called last, in that
// order.
func (s *Source) TakeInForce() []InForce {
	s.mu.Lock()
	defer s.mu.Unlock()
	said := s.inForce
	s.inForce = nil
	return said
}

// Acknowledged returns the sequence numbers of bundles that were acknowledged, in
// their order.
func (s *Source) Acknowledged() []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.acks)
}

// LastAcknowledged returns the last of Acknowledged, or 0.
func (s *Source) LastAcknowledged() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.acks) == 0 {
		return 0
	}
	return s.acks[len(s.acks)-1]
}

// PeerCredentials makes each connection one of a process.
func PeerCredentials(p *peer.Peer) credentials.TransportCredentials { return fixedPeer{p} }

type fixedPeer struct{ p *peer.Peer }

func (f fixedPeer) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, peer.AuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		Peer:           f.p,
	}, nil
}

func (fixedPeer) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}
func (fixedPeer) Info() credentials.ProtocolInfo            { return credentials.ProtocolInfo{} }
func (f fixedPeer) Clone() credentials.TransportCredentials { return f }
func (fixedPeer) OverrideServerName(string) error           { return nil }

// Metric returns the sum of the counters and gauges of a family whose first labels
// have these values; of a histogram, how many values it has. A family without one fails the test.
func Metric(t testing.TB, from prometheus.Gatherer, name string, labels ...string) float64 {
	t.Helper()
	families, err := from.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum, found := 0.0, false
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.GetMetric() {
			for i, l := range labels {
				if m.GetLabel()[i].GetValue() != l {
					continue series
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			found = true
		}
	}
	if !found {
		t.Fatalf("no metric %s %v", name, labels)
	}
	return sum
}
