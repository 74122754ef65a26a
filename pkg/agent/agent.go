// Package agent is the part of the node agent that talks to the CA: it attests
// the node, follows the CA's stream of entries, bundles and orders, and has
// X.509-SVIDs issued and renewed for the workload instances that are present.
// It answers "what may the process at the other end of this socket have now,
// and from now on". It does not know how its answers travel to workloads.
package agent

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

// Config is what an agent is made from.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// CAAddress is host:port of the CA; each address that the host's name
	// resolves to is tried.
	CAAddress string
	// TrustAnchors verify the CA until the agent has a bundle. Either they or
	// RootSHA256 must be given: there is no bootstrap without one.
	TrustAnchors []*x509.Certificate
	// RootSHA256 is the SHA-256 of a root's DER, which the CA sends at the end
	// of its chain.
	RootSHA256 []byte

	Node      attest.NodeAttester
	Workloads []attest.WorkloadAttestor

	// DataDir is the agent's own directory, made with mode 0700 if it is
	// missing. Two agents cannot share one.
	DataDir string
	// SealingKeyFile is a file with at least 16 secret bytes, such as a systemd
	// credential, from which the key of the sealed cache is derived. Empty means
	// that a key is kept in the kernel's keyring.
	SealingKeyFile string

	Version    string
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Health     *health.Tracker

	// MaxStreams bounds the open streams; 0 means 20,000.
	MaxStreams int
	// DialOptions are added to those for connections to the CA.
	DialOptions []grpc.DialOption
}

// Names of the health conditions.
const (
	condNode     = "node_attestation"
	condCA       = "ca_connection"
	condStale    = "serving_stale"
	condRenewal  = "svid_renewal"
	condEntries  = "entries"
	condBundle   = "trust_bundle"
	condSealed   = "sealed_cache"
	condClock    = "clock"
	condSkew     = "clock_skew"
	condCapacity = "capacity"
	condWorkload = "workload_attestation"
)

// Conditions are the names of the health conditions that an agent reports.
var Conditions = []string{
	condNode, condCA, condStale, condRenewal, condEntries,
	condBundle, condSealed, condClock, condSkew, condCapacity, condWorkload,
}

const (
	// idle is the longest that anything sleeps: deadlines are in wall-clock
	// time, and a machine that slept is to notice soon.
	idle = 20 * time.Second
	// defaultMaxStreams is Config.MaxStreams' default.
	defaultMaxStreams = 20_000
)

// ErrStopped ends the watches of an agent that has stopped.
var ErrStopped = errors.New("agent has stopped")

// Agent is a node agent. All methods may be called concurrently; Run once.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	keys    *keyPool
	parser  *certificates

	loaded  chan struct{} // closed when the sealed cache has been read
	stopped chan struct{} // closed when Run has ended
	wake    chan struct{} // capacity 1: the issuer has something to do
	up      chan struct{} // capacity 1: there is something to tell the CA
	save    chan struct{} // capacity 1: the sealed cache is to be written
	renew   chan struct{} // capacity 1: the agent's own X.509-SVID is to be replaced
	tasks   sync.WaitGroup
	vault   *vault // nil while there is no sealing key
	// namesInCSR: the CA that was spoken to last needs CSRs that ask for the names.
	namesInCSR atomic.Bool

	mu sync.Mutex // guards what follows; never held while waiting for anything

	cache      *cache.Cache
	streams    map[cache.WatchID]*stream
	nextStream cache.WatchID
	unattested int  // streams whose process could not be attested so far
	ended      bool // Run has ended
	attributes map[subject]*attributesv1.Workload
	// processes are those that have an open stream, the latest of each workload.
	processes map[subject]*attributesv1.Process

	node        *attributesv1.Node // as the CA established it
	raw         map[string]*entryv1.Entry
	entries     *identity.Set
	epoch       string
	revision    uint64
	quarantined uint64 // sequence of the quarantines that were carried out
	rotated     uint64 // sequence of the last order to rotate that was carried out
	bundle      *identity.Bundle
	bundled     time.Time    // when it came into force
	own         *ownIdentity // nil before the node is attested
	dropped     error        // why the sealed cache was of no use; nil once the node is attested
	reattest    bool         // the CA does not accept own any more

	session   *session // nil while there is none
	skew      skew
	since     time.Time
	lastError string
	flights   int       // batches on their way
	wakesAt   time.Time // when the issuer looks again by itself

	report upward
	// withdrawals are the latest, the oldest first; cause is the one that is being
	// carried out. The CA of this session wants to hear of them; it has ordered this
	// agent to leave.
	withdrawals        []*withdrawal
	cause              *withdrawal
	reporting, leaving bool
}

// subject names a workload: an instance, and the digest of its attributes.
type subject struct{ instance, digest string }

// upward is what the CA is to be told.
type upward struct {
	applied   bool
	acks      bool
	held      bool // X.509-SVIDs have come or gone
	ended     []cache.Ended
	inspected []*nodev1.Inspected
}

// New checks c and returns an agent that does nothing until Run. Streams may be
// opened before.
func New(c Config) (*Agent, error) {
	switch {
	case c.TrustDomain.IsZero():
		return nil, errors.New("agent needs a trust domain")
	case c.CAAddress == "":
		return nil, errors.New("agent needs the address of the CA: host:port")
	case len(c.TrustAnchors) == 0 && len(c.RootSHA256) == 0:
		return nil, errors.New("agent needs trust anchors or the SHA-256 of the CA's root: without them it cannot know the CA")
	case len(c.RootSHA256) != 0 && len(c.RootSHA256) != sha256.Size:
		return nil, fmt.Errorf("root's SHA-256 has %d bytes, not %d", len(c.RootSHA256), sha256.Size)
	case c.Node == nil:
		return nil, errors.New("agent needs a node attester")
	case len(c.Workloads) == 0:
		return nil, errors.New("agent needs a workload attestor")
	case c.DataDir == "":
		return nil, errors.New("agent needs a data directory")
	case c.Logger == nil || c.Registerer == nil || c.Health == nil:
		return nil, errors.New("agent needs a logger, a registerer and a health tracker")
	}
	for _, anchor := range c.TrustAnchors {
		if err := checkRoot(c.TrustDomain, anchor); err != nil {
			return nil, fmt.Errorf("trust anchor %q: %w", anchor.Subject, err)
		}
	}
	if c.MaxStreams <= 0 {
		c.MaxStreams = defaultMaxStreams
	}
	m, err := newMetrics(c.Registerer, c.Workloads)
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	a := &Agent{
		cfg: c, log: c.Logger, metrics: m,
		keys:       newKeyPool(m.keys),
		parser:     &certificates{},
		loaded:     make(chan struct{}),
		stopped:    make(chan struct{}),
		wake:       make(chan struct{}, 1),
		up:         make(chan struct{}, 1),
		save:       make(chan struct{}, 1),
		renew:      make(chan struct{}, 1),
		cache:      cache.New(cache.Config{Random: rand.Float64}),
		streams:    make(map[cache.WatchID]*stream),
		attributes: make(map[subject]*attributesv1.Workload),
		processes:  make(map[subject]*attributesv1.Process),
		since:      time.Now(),
	}
	if err := c.Registerer.Register(collector{a}); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	return a, nil
}

// Run works until ctx ends, or until something is wrong that only a person can
// put right. All watches have ended when it returns.
func (a *Agent) Run(ctx context.Context) error {
	defer a.stop()
	if err := durable.MkdirAll(a.cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("prepare the data directory: %w", err)
	}
	lock, err := durable.Acquire(filepath.Join(a.cfg.DataDir, "agent.lock"))
	if err != nil {
		return fmt.Errorf("another agent uses this data directory: %w", err)
	}
	defer func() {
		if err := lock.Release(); err != nil {
			a.log.ErrorContext(context.WithoutCancel(ctx), "lock cannot be released", "err", err)
		}
	}()
	a.load(ctx)
	close(a.loaded)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.keys.Run(ctx) })
	g.Go(func() error { return a.persist(ctx) })
	g.Go(func() error { return a.issue(ctx) })
	g.Go(func() error { return a.follow(ctx) })
	for _, w := range a.cfg.Workloads {
		if watcher, ok := w.(attest.InstanceWatcher); ok {
			g.Go(func() error { return a.watchInstances(ctx, w.Name(), watcher) })
		}
	}
	return g.Wait()
}

// stop ends every stream and waits for what was started for them.
func (a *Agent) stop() {
	a.mu.Lock()
	a.ended = true
	streams := a.streams
	a.streams = make(map[cache.WatchID]*stream)
	a.mu.Unlock()
	close(a.stopped)
	for _, s := range streams {
		s.watch.End(ErrStopped)
	}
	a.tasks.Wait()
}

// signal wakes whoever waits on a channel of capacity 1.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// settle carries out what the cache decided, but for requests, which only the
// issuer takes. a.mu is held.
func (a *Agent) settle(now time.Time) {
	r := a.take(now, 0)
	if r.Waiting > 0 || (!r.Next.IsZero() && r.Next.Round(0).Before(a.wakesAt)) {
		signal(a.wake)
	}
}

// take asks the cache what is to be done and does all but the requests. a.mu is
// held.
func (a *Agent) take(now time.Time, room int) cache.Ready {
	var issue []cache.Request
	for {
		r := a.cache.Ready(now, room-len(issue))
		issue = append(issue, r.Issue...)
		a.publish(now, r.Publish)
		for _, id := range r.Closed {
			if s := a.streams[id]; s != nil {
				a.forget(id, s)
				s.watch.End(ErrInstanceEnded)
			}
		}
		a.sayEnded(r.Ended)
		a.sayEvents(r.Events)
		if r.Changed {
			signal(a.save)
		}
		if dead := a.reap(r.Publish); dead == 0 {
			r.Issue = issue
			return r
		}
	}
}

// publish gives snapshots to streams whose process is still there.
func (a *Agent) publish(now time.Time, all []cache.Publication) {
	for _, p := range all {
		for _, id := range p.Watches {
			s := a.streams[id]
			if s == nil {
				continue
			}
			// Checked each time: nothing new goes to a stream whose process
			// has ended, whoever holds its socket now.
			if err := s.peer.Alive(); err != nil {
				s.dead = err
				continue
			}
			if a.cause != nil {
				a.cause.owe(s, s.watch.Snapshot(), p.Snapshot)
			}
			s.watch.Publish(p.Snapshot)
			if !s.served && len(p.Snapshot.SVIDs) > 0 {
				s.served = true
				a.metrics.first.Observe(now.Sub(s.opened).Seconds())
			}
		}
	}
}

// reap ends the streams that publish found dead, and counts them.
func (a *Agent) reap(all []cache.Publication) int {
	n := 0
	for _, p := range all {
		for _, id := range p.Watches {
			if s := a.streams[id]; s != nil && s.dead != nil {
				n++
				a.forget(id, s)
				a.cache.Detach(time.Now(), id)
				s.watch.End(s.dead)
			}
		}
	}
	return n
}

// maxEnded bounds the ended instances that wait to be reported; the oldest are
// forgotten.
const maxEnded = 10_000

func (a *Agent) sayEnded(ended []cache.Ended) {
	if len(ended) == 0 {
		return
	}
	a.report.ended = append(a.report.ended, ended...)
	if over := len(a.report.ended) - maxEnded; over > 0 {
		a.report.ended = slices.Delete(a.report.ended, 0, over)
	}
	a.prune()
	signal(a.up)
}

// prune forgets the attributes of workloads that are not present any more.
func (a *Agent) prune() {
	for s := range a.attributes {
		if !a.cache.Has(s.instance, s.digest) {
			delete(a.attributes, s)
		}
	}
}

func (a *Agent) sayEvents(events []cache.Event) {
	for _, e := range events {
		attrs := []any{"reason", string(e.Kind), "instance", e.Instance, "entry", e.Entry, "err", e.Detail}
		switch e.Kind {
		case cache.DuplicateHint:
			a.log.Warn("hint is dropped: another identity of the workload has it", attrs...)
		case cache.Template:
			a.log.Warn("entry matches but gives no legal name", attrs...)
		case cache.Capacity:
			a.log.Error("identity is not issued: the agent is at its limit", attrs...)
			a.cfg.Health.Set(condCapacity, health.Error, "more identities match on this node than the agent holds")
		default:
			a.log.Warn("cache reports", attrs...)
		}
	}
}
