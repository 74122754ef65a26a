// Package server is the CA's gRPC front: it answers who calls, and what the
// caller may have. Every call passes one authorization table; entries and nodes
// are read from memory, so that issuing needs no database; and no certificate
// goes out that the ledger has not made durable. It does not know how a
// certificate is signed, how a machine is attested, or where anything is stored.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/internal/clock"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Conditions are the names of what this package reports to its health.Tracker.
var Conditions = []string{conditionEntries, conditionClone, conditionStore, conditionClock, conditionUnrecorded, conditionSkew, conditionQuarantine, conditionRevocation}

const (
	// conditionEntries: some stored entries do not compile and are not in force.
	conditionEntries = "entries"
	// conditionUnrecorded: what is in the store is not what was recorded.
	conditionUnrecorded = "store_unrecorded"
	// conditionSkew: clocks of nodes are not the CA's.
	conditionSkew = "agent_clocks"
	// conditionClone: an agent presented an X.509-SVID that it had replaced.
	conditionClone = "agent_clone"
	// conditionStore: what is noted about nodes cannot be written.
	conditionStore = "node_store"
	// conditionQuarantine: one is in force, and would be forgotten by a restart.
	conditionQuarantine = "quarantine"
	// conditionRevocation: something was withdrawn, and is not on the revocation
	// lists as it should be.
	conditionRevocation = "revocation"
)

// EntryStore keeps registration entries. Changes are durable on return, and
// all or nothing. It is called concurrently.
type EntryStore interface {
	Entries(ctx context.Context) (entries []*entryv1.Entry, revision uint64, err error)
	// ApplyEntries calls record with the new revision before it commits, and
	// changes nothing if record fails.
	ApplyEntries(ctx context.Context, upserts []*entryv1.Entry, removed []string,
		record func(revision uint64) error) (revision uint64, err error)
	// Revision is that of the last change of entries or roots.
	Revision(ctx context.Context) (uint64, error)
}

// NodeStore keeps nodes. Changes are durable on return. It is called
// concurrently, but not for the same node.
type NodeStore interface {
	Nodes(ctx context.Context) ([]*registry.Node, error)
	// PutNodes writes all of them, or none.
	PutNodes(ctx context.Context, nodes ...*registry.Node) error
	TouchNodes(ctx context.Context, touched []registry.Touch) error
}

// TokenStore keeps join tokens. record is called before a change is committed;
// nothing is changed if it fails.
type TokenStore interface {
	CreateToken(ctx context.Context, t *registry.Token, record func() error) error
	Tokens(ctx context.Context, now time.Time) ([]*registry.Token, error)
	DeleteToken(ctx context.Context, sum [32]byte, record func() error) error
}

// QuarantineStore keeps quarantines. Changes are durable on return. record is called
// before a change is committed; nothing is changed if it fails.
type QuarantineStore interface {
	Quarantines(ctx context.Context) ([]*registry.Quarantine, error)
	// PutQuarantines and DeleteQuarantines change all of them, or none.
	PutQuarantines(ctx context.Context, all ...*registry.Quarantine) error
	DeleteQuarantines(ctx context.Context, record func() error, all ...*registry.Quarantine) error
}

// Store is what the server needs to have remembered; *store.DB has it.
type Store interface {
	EntryStore
	NodeStore
	TokenStore
	QuarantineStore
	// Epoch names the history of revisions.
	Epoch() string
	// PruneNodes forgets nodes whose X.509-SVID had expired by then.
	PruneNodes(ctx context.Context, expiredBy time.Time) error
}

// Config is what a Server is made of. What has no default is required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	CA          *ca.CA
	Ledger      *ledger.Journal
	Store       Store
	// Verifiers are the node attestation methods in use.
	Verifiers []attest.NodeVerifier
	// NewToken makes a join token and its SHA-256; nil if there are none here.
	NewToken func() (secret string, sum [32]byte, err error)
	// Records is the ledger's search index; nil if there is none.
	Records Records
	// Sinks are those that the ledger is not archived without; nil if there are
	// none.
	Sinks Sinks
	// Placement knows where workloads run, from the platform itself; nil if there is
	// none: what agents say of their workloads is then believed as far as the entries
	// of their nodes go.
	Placement Placement
	// Anchor has compared the store with the ledger; nil if nobody has.
	Anchor *Anchor
	// Instance names this CA process in records.
	Instance string
	Version  string
	// AgentTTL is the life of the agents' own X.509-SVIDs; default 4 h.
	AgentTTL time.Duration
	// DefaultTTL is what an entry without a ttl gets; it is used to work out
	// the outage budget only. Default 1 h.
	DefaultTTL time.Duration
	// TwoPersons has what changes roots done only when a second person has approved it.
	TwoPersons bool
	// TwoPersonsEntries has the same done with entries that give power: those marked
	// admin or downstream that are new or changed.
	TwoPersonsEntries bool
	// Clock watches the clock; nil means that nobody does. It is the same that the
	// CA asks.
	Clock      *clock.Guard
	Limits     Limits
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Health     *health.Tracker
	// ConsoleLink makes a link by which one browser can sign in to the console, once;
	// its error says why not. It is nil if there is no console here.
	ConsoleLink func(by string) (url string, ends time.Time, err error)
}

// Limits bound what callers may use up. Zero means the default.
type Limits struct {
	// Attestations is the number of attestations at the same time, from
	// callers that nobody knows yet; default 64.
	Attestations int
	// IssueRequests is the number of Issue calls of one node at the same time;
	// default 16.
	IssueRequests int
	// IssueRate and IssueBurst bound the X.509-SVIDs that one node asks for: so
	// many a second after so many at once; defaults 200 and 5,000.
	IssueRate, IssueBurst int
	// Handshakes is the number of TLS handshakes at the same time; a quarter
	// of it from one address. Default 2,048.
	Handshakes int
}

func (l Limits) withDefaults() Limits {
	set := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	set(&l.Attestations, 64)
	set(&l.IssueRequests, 16)
	set(&l.IssueRate, 200)
	set(&l.IssueBurst, 5000)
	set(&l.Handshakes, 2048)
	return l
}

// Limits that nobody has to change.
const (
	// maxSyncs is the number of Sync streams, one a node.
	maxSyncs = 20_000
	// maxDirect is the number of requests at the same time of one node's workloads
	// that speak to the CA themselves.
	maxDirect = 64
	// maxAnonymous is the number of connections without a client certificate, which
	// last as long as an attestation; a quarter of it from one address.
	maxAnonymous = 1024
)

// Times of the server itself.
const (
	flushInterval  = 15 * time.Second    // how often sightings of nodes are written
	forgetNodes    = 30 * 24 * time.Hour // after its SVID expired
	flushGrace     = 50 * time.Millisecond
	evictionGrace  = 500 * time.Millisecond // for an agent to read that it was evicted
	storeTimeout   = 10 * time.Second
	ledgerTimeout  = 10 * time.Second
	maxAgentTTL    = 24 * time.Hour
	defaultTTL     = time.Hour
	defaultAgent   = 4 * time.Hour
	retryOverload  = time.Second
	retryPlacement = time.Second
	retryNoSigning = 5 * time.Second
)

// Server is the CA's front. All methods may be called concurrently.
type Server struct {
	cfg       Config
	log       *slog.Logger
	metrics   *metrics
	registry  *registry.Registry
	hub       *hub
	below     *below
	orders    orders
	conns     *connections
	verifiers map[string]attest.NodeVerifier
	refusals  *refusalLog
	attests   *Places // attestations that go on
	tasks     *tasks
	bundles   bundleCache
	started   time.Time
	issued    atomic.Uint64
	refused   atomic.Uint64

	workers  chan struct{} // one token a core or call of an upstream CA, held while an item is worked on
	perNode  sync.Map      // node's SPIFFE ID → *nodeUse
	bundleCh chan struct{} // capacity 1: the bundle may have changed

	withdrawals withdrawals
	revocations revocations
	held        held

	quarantineMu sync.Mutex // held while quarantines are changed
	tokenMu      sync.Mutex // held while join tokens are made and withdrawn

	entryMu sync.Mutex     // held from reading entries to having applied the change
	nodeMu  [64]sync.Mutex // by hash of the SPIFFE ID: held while a node is changed

	clockMu  sync.Mutex // held while the state of the clock is recorded; guards what follows
	clockSet bool       // it was set, and that was recorded

	cloneMu sync.Mutex // guards what follows
	clones  map[string]bool
}

// New loads entries and nodes, records which entries are in force, and returns a
// server that Run has to be called on.
func New(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.TrustDomain.IsZero() || cfg.CA == nil || cfg.Ledger == nil || cfg.Store == nil ||
		cfg.Logger == nil || cfg.Registerer == nil || cfg.Health == nil {
		return nil, errors.New("make server: trust domain, CA, ledger, store, logger, registerer and health are required")
	}
	if cfg.AgentTTL == 0 {
		cfg.AgentTTL = defaultAgent
	}
	if cfg.AgentTTL < identity.MinTTL || cfg.AgentTTL > maxAgentTTL {
		return nil, fmt.Errorf("make server: life of agents' X.509-SVIDs is %s: write a value between %s and %s",
			cfg.AgentTTL, identity.MinTTL, maxAgentTTL)
	}
	if cfg.DefaultTTL == 0 {
		cfg.DefaultTTL = defaultTTL
	}
	cfg.Limits = cfg.Limits.withDefaults()
	s := &Server{
		cfg:       cfg,
		log:       cfg.Logger,
		conns:     newConnections(cfg.Limits.Handshakes, maxAnonymous, anonymousLife),
		verifiers: make(map[string]attest.NodeVerifier, len(cfg.Verifiers)),
		refusals:  newRefusalLog(),
		below:     newBelow(),
		started:   time.Now(),
		workers:   make(chan struct{}, cfg.CA.Concurrency()),
		attests:   NewPlaces(cfg.Limits.Attestations),
		tasks:     newTasks(),
		bundleCh:  make(chan struct{}, 1),
		clones:    make(map[string]bool),
	}
	s.revocations.secondLook, s.revocations.abandonAfter = secondLook, abandonAfter
	methods := make([]string, 0, len(cfg.Verifiers))
	for _, v := range cfg.Verifiers {
		if _, twice := s.verifiers[v.Method()]; twice {
			return nil, fmt.Errorf("make server: node attestation method %s is there twice", v.Method())
		}
		s.verifiers[v.Method()] = v
		methods = append(methods, v.Method())
	}
	if err := s.load(ctx); err != nil {
		return nil, fmt.Errorf("make server: %w", err)
	}
	s.hub = newHub(maxSyncs)
	var err error
	if s.metrics, err = newMetrics(cfg.Registerer, s, methods); err != nil {
		return nil, fmt.Errorf("make server: %w", err)
	}
	return s, nil
}

// load fills the registry from the store. An entry that does not compile is kept
// aside and reported: one bad row must not stop the CA, and must not issue.
func (s *Server) load(ctx context.Context) error {
	if err := s.cfg.Store.PruneNodes(ctx, time.Now().Add(-forgetNodes)); err != nil {
		return err
	}
	stored, revision, err := s.cfg.Store.Entries(ctx)
	if err != nil {
		return err
	}
	nodes, err := s.cfg.Store.Nodes(ctx)
	if err != nil {
		return err
	}
	quarantines, err := s.cfg.Store.Quarantines(ctx)
	if err != nil {
		return err
	}
	if nodes, quarantines, err = s.believe(ctx, nodes, quarantines); err != nil {
		return err
	}
	if err := s.believeTokens(ctx); err != nil {
		return err
	}
	compiled := make([]*identity.Entry, 0, len(stored))
	broken := make(map[string]*entryv1.Entry)
	results, errs := s.compileAll(stored)
	for i, e := range results {
		if why, not := s.cfg.Anchor.unrecordedEntry(stored[i].GetName()); not {
			broken[stored[i].GetName()] = stored[i]
			s.log.ErrorContext(ctx, "stored entry is not in force: somebody has written to the database", "entry", stored[i].GetName(), "reason", why)
			continue
		}
		if errs[i] != nil {
			broken[stored[i].GetName()] = stored[i]
			s.log.ErrorContext(ctx, "stored entry is not in force", "entry", stored[i].GetName(), "err", errs[i])
			continue
		}
		compiled = append(compiled, e)
	}
	s.registry = registry.New(s.cfg.Store.Epoch(), revision, identity.NewSet(compiled...), broken, nodes)
	if len(quarantines) > 0 {
		s.registry.ChangeQuarantines(time.Now(), quarantines)
	}
	s.reportBroken()
	if err := s.recordEntriesInForce(ctx, s.registry.Entries()); err != nil {
		return err
	}
	s.keepAnchor(ctx)
	s.noteNodes(ctx)
	return nil
}

// reportBroken keeps the condition about entries that are not in force.
func (s *Server) reportBroken() {
	broken := s.registry.Entries().Broken
	foreign := s.cfg.Anchor.differences(s.registry.Entries())
	if problem := s.cfg.Anchor.problem(foreign); problem != "" {
		s.cfg.Health.Set(conditionUnrecorded, health.Warning, problem)
	} else {
		s.cfg.Health.Clear(conditionUnrecorded)
	}
	if n := len(broken) - s.cfg.Anchor.unrecordedOf(broken); n > 0 {
		s.cfg.Health.Set(conditionEntries, health.Warning,
			fmt.Sprintf("%d stored entries do not compile and are not in force: apply them again, or delete them", n))
		return
	}
	s.cfg.Health.Clear(conditionEntries)
}

// Run does what has to be done beside answering calls, until ctx ends. Then it
// ends all Sync streams, writes what is still to be written, and returns when
// its goroutines have ended.
func (s *Server) Run(ctx context.Context) error {
	ticker := time.NewTicker(flushInterval)
	defer ticker.Stop()
	clockTicker := time.NewTicker(clockInterval)
	defer clockTicker.Stop()
	var revoking sync.WaitGroup
	revoking.Go(func() { s.runRevocations(ctx) })
	for {
		select {
		case <-ctx.Done():
			revoking.Wait()
			s.hub.shutdown()
			s.below.shutdown()
			s.tasks.wait()
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
			defer cancel()
			s.flush(last)
			return nil
		case <-ticker.C:
			s.flush(ctx)
		case <-clockTicker.C:
			s.watchClock(ctx)
		case <-s.bundleCh:
			s.noteBundle(ctx)
		}
	}
}

// BundleChanged says that the CA's bundle or intermediate may have changed. It
// never blocks; it is what ca.Config.OnChange has to call.
func (s *Server) BundleChanged() {
	select {
	case s.bundleCh <- struct{}{}:
	default:
	}
	s.hub.wakeAll()
	s.below.wakeAll()
}

// noteBundle follows the revision, which the CA's store has advanced.
func (s *Server) noteBundle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	revision, err := s.cfg.Store.Revision(ctx)
	if err != nil {
		s.log.WarnContext(ctx, "revision cannot be read", "err", err)
		return
	}
	if s.registry.Advance(revision) {
		s.hub.wakeAll()
	}
	s.keepAnchor(ctx)
}

// flush writes down what was noted about nodes and refusals.
func (s *Server) flush(ctx context.Context) {
	s.flushRefusals(ctx)
	s.reportSkew()
	s.noteNodes(ctx)
	s.reviewWithdrawals(time.Now())
	touched := s.registry.TakeTouched()
	if len(touched) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := s.cfg.Store.TouchNodes(ctx, touched); err != nil {
		s.log.WarnContext(ctx, "sightings of nodes cannot be written", "err", err)
		s.cfg.Health.Set(conditionStore, health.Warning, "sightings of nodes cannot be written: look at the store's disk")
		return
	}
	s.cfg.Health.Clear(conditionStore)
}

// lockNode keeps others from changing the same node until unlock is called.
func (s *Server) lockNode(id string) (unlock func()) { return s.lockNodes([]string{id}) }

// lockNodes is lockNode for several.
func (s *Server) lockNodes(ids []string) (unlock func()) {
	var locks []int // in the order in which everybody takes them
	for _, id := range ids {
		h := uint32(2166136261) // FNV-1a
		for i := range len(id) {
			h = (h ^ uint32(id[i])) * 16777619
		}
		i := int(h % uint32(len(s.nodeMu)))
		if at, locked := slices.BinarySearch(locks, i); !locked {
			locks = slices.Insert(locks, at, i)
		}
	}
	for _, i := range locks {
		s.nodeMu[i].Lock()
	}
	return func() {
		for _, i := range locks {
			s.nodeMu[i].Unlock()
		}
	}
}

// NodeService returns the service for agents. It relies on the interceptors of
// GRPC having named the caller.
func (s *Server) NodeService() nodev1.NodeServiceServer { return &nodeService{s: s} }

// AdminService returns the service for operators. It relies on the interceptors
// of GRPC or AdminGRPC having named the caller.
func (s *Server) AdminService() adminv1.AdminServiceServer { return &adminService{s: s} }

type nodeService struct {
	nodev1.UnimplementedNodeServiceServer
	s *Server
}

type adminService struct {
	adminv1.UnimplementedAdminServiceServer
	s *Server
}
