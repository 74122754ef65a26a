// Package ca issues X.509-SVIDs and keeps the life cycle of the authorities
// that sign them, and of their revocation lists: one root for each trust domain,
// of our own, whose key is used a few times a week, or an upstream CA's; and an
// intermediate of this process, whose key is only in memory, which signs all leaves
// (but where the upstream CA does) and replaces itself.
//
// It decides what a certificate looks like, never who may have it: it does not
// know registration entries, attestation, agents, gRPC or SQL.
package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/ledger"
)

// ErrNoAuthority is wrapped by the errors of Sign and ServerCertificate when
// there is no authority that could sign now: the intermediate has expired and
// its renewal has not succeeded yet, or the root is at its end. A retry may help.
var ErrNoAuthority = errors.New("no authority can sign now")

// States of a root or an intermediate, as in the ledger.
const (
	// StatePrepared: its root is in the bundle, it signs nothing yet.
	StatePrepared = "prepared"
	// StateDistributed: and every live proxy has acknowledged that.
	StateDistributed = "distributed"
	// StateActive: it signs.
	StateActive = "active"
	// StateRetiring: it signs no more, but certificates that it signed live.
	StateRetiring = "retiring"
	// StateGone: nothing that lives depends on it.
	StateGone = "gone"
)

// Roles of an Authority.
const (
	RoleRoot         = "root"
	RoleIntermediate = "intermediate"
)

// Root is a root as the store keeps it.
type Root struct {
	// Certificate is DER.
	Certificate []byte
	// Key is the reference of its private key in the key store; empty for the root
	// of an upstream CA.
	Key string
	// State is one of the State constants.
	State string
	// CreatedAt is when it was made, Since when it took its state.
	CreatedAt, Since time.Time
	// Sequence is that of the first bundle that held it.
	Sequence uint64
	// Automatic: it is to be activated as soon as it is distributed.
	Automatic bool
	// Tainted: what it signed is to be replaced.
	Tainted bool
}

// Defaults and bounds of Config.
const (
	DefaultRootLife         = 10 * 365 * 24 * time.Hour
	DefaultIntermediateLife = 7 * 24 * time.Hour
	DefaultTTL              = time.Hour
	DefaultMaxTTL           = 24 * time.Hour
	// DefaultBackdate lets a verifier whose clock is 4 minutes behind accept a
	// new X.509-SVID. It is bounded by a quarter of the TTL, since clients that
	// renew at the middle between NotBefore and NotAfter would loop if
	// backdating made up much of a certificate's life.
	DefaultBackdate = 5 * time.Minute
	// MinTTL is the shortest life that Sign accepts.
	MinTTL = 10 * time.Second

	maxBackdate = 30 * time.Minute
	// rootBackdate leaves room below which the backdated intermediates and
	// leaves of the first minutes stay.
	rootBackdate = 2 * time.Hour
)

// Config is what Open needs. TrustDomain, Keys, Store and Ledger are required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Instance names this CA process in the ledger.
	Instance string
	// Version of this program, for the ledger.
	Version string
	Keys    keys.Store
	Store   Store
	Ledger  *ledger.Journal

	// Lives. Zero means the default; MaxTTL's is a third of the intermediate's
	// life where that is less than DefaultMaxTTL.
	RootLife, IntermediateLife, DefaultTTL, MaxTTL time.Duration
	// Backdate is how far NotBefore lies before the moment of signing; zero
	// means DefaultBackdate. An X.509-SVID is never backdated by more than a
	// quarter of its life.
	Backdate time.Duration
	// DNSNames are in the CA's own X.509-SVID, for clients that know the CA by a name.
	DNSNames []string
	// IntermediateKey is the kind of the intermediates' keys; P-256 if "". P-384 and
	// RSA cost several times as much for each X.509-SVID.
	IntermediateKey keys.Kind
	// Subject is in the names of our roots and intermediates.
	Subject Subject
	// NameConstraints has intermediates permit URIs of the trust domain only
	// (X509-SVID §4.2). Off by default: verifiers that do not implement URI
	// constraints, rustls among them, must refuse the whole chain.
	NameConstraints bool
	// Revocation has what is revoked refused by lists: see Revoke. It takes a root of
	// our own, and no CAs below.
	Revocation bool
	// Upstream, if set, signs the intermediates of a trust domain that begins with
	// it, in place of a root of our own.
	Upstream *Upstream

	// Clock says why the time is not to be relied on, such as that the clock was
	// set; nil if it is. While it is not, nothing is signed, renewed or ended. It
	// is asked at each signature; nil means that the time is always relied on.
	Clock func() error
	// Logger may be nil.
	Logger *slog.Logger
	// Registerer may be nil.
	Registerer prometheus.Registerer
	// Fleet, if set, says what the nodes have acknowledged; without it there are no
	// nodes. It must not block nor call this CA.
	Fleet func() []rotation.Node
	// OnRetiring, if set, is called when X.509-SVIDs that chain to a root have to be
	// replaced, and with the same root again after a restart. It must not block nor
	// call this CA.
	OnRetiring func(root string, tainted bool)
	// OnChange, if set, is called after the bundle or an intermediate has
	// changed, without locks held. It must not block.
	OnChange func()
}

func (cfg Config) withDefaults() Config {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&cfg.RootLife, DefaultRootLife)
	set(&cfg.IntermediateLife, DefaultIntermediateLife)
	set(&cfg.MaxTTL, min(DefaultMaxTTL, cfg.IntermediateLife/3))
	set(&cfg.DefaultTTL, min(DefaultTTL, cfg.MaxTTL))
	set(&cfg.Backdate, DefaultBackdate)
	if cfg.IntermediateKey == "" {
		cfg.IntermediateKey = keys.P256
	}
	if cfg.Instance == "" {
		cfg.Instance = "ca"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Registerer == nil {
		cfg.Registerer = prometheus.NewRegistry()
	}
	if cfg.Clock == nil {
		cfg.Clock = func() error { return nil }
	}
	if cfg.OnChange == nil {
		cfg.OnChange = func() {}
	}
	return cfg
}

// check is called after withDefaults. Its errors say what to write instead.
func (cfg Config) check() error {
	if err := checkTrustDomain(cfg.TrustDomain.Name()); err != nil {
		return err
	}
	if cfg.Keys == nil || cfg.Store == nil || cfg.Ledger == nil {
		return errors.New("a key store, a store and a ledger are required")
	}
	switch {
	case cfg.DefaultTTL < MinTTL:
		return fmt.Errorf("default ttl %s: write %s or more", cfg.DefaultTTL, MinTTL)
	case cfg.MaxTTL < cfg.DefaultTTL:
		return fmt.Errorf("maximal ttl %s is less than the default ttl %s: raise it or lower the default", cfg.MaxTTL, cfg.DefaultTTL)
	case cfg.MaxTTL > cfg.IntermediateLife/2:
		return fmt.Errorf("maximal ttl %s: the intermediate's life of %s must be at least twice as long, since it is replaced at half of it", cfg.MaxTTL, cfg.IntermediateLife)
	case cfg.IntermediateLife > cfg.RootLife/2:
		return fmt.Errorf("intermediate's life %s: the root's life of %s must be at least twice as long", cfg.IntermediateLife, cfg.RootLife)
	case cfg.Backdate < 0 || cfg.Backdate > maxBackdate:
		return fmt.Errorf("backdate %s: write 0s (the default) to %s", cfg.Backdate, maxBackdate)
	}
	if cfg.Revocation && cfg.Upstream != nil {
		return errors.New("revocation lists need a root of this CA's own: what an upstream CA's other intermediates sign has no list here, and would be refused")
	}
	if err := checkDNSNames(cfg.DNSNames); err != nil {
		return fmt.Errorf("dns names of the authority: %w", err)
	}
	if field, err := cfg.Subject.Check(); err != nil {
		return fmt.Errorf("%s of the authorities' subject: %w", field, err)
	}
	return nil
}

// CA signs. All methods may be called concurrently.
type CA struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	nap     time.Duration // longestNap, but in tests of years
	live    *liveKeys
	leaves  *leafSigner // nil unless the upstream CA signs each leaf

	// state is what Sign reads: one load, no lock.
	state atomic.Pointer[state]
	// own is this CA's own X.509-SVID.
	own atomic.Pointer[ownSVID]
	// kick wakes Run; the state is looked at afterwards.
	kick chan struct{}

	// kickMint wakes runMint; the state is looked at afterwards.
	kickMint chan struct{}
	// mintMu is held while the upstream CA is asked, and taken before mu.
	mintMu sync.Mutex
	// mintFailed is the last failure of the upstream CA, nil after a success.
	mintFailed atomic.Pointer[mintFailure]
	// unlisted says why revocation lists are not as they should be, "" or nil for
	// nothing.
	unlisted atomic.Pointer[string]
	// stalled says what a rotation waits for, "" or nil for nothing.
	stalled atomic.Pointer[string]

	// failed is the error of the last renewal, nil after one that succeeded.
	failed atomic.Pointer[error]

	mu sync.Mutex // held while state or own is being replaced; guards what follows
	// retryAt and failures pace the renewals after a failed one.
	retryAt  time.Time
	failures int
	// nextStep is when the roots have to be looked at again, if nothing is heard.
	nextStep time.Time
	// renewals are the retiring roots of which the nodes are still to be told.
	renewals []string
	// drained says, by retiring root, since when no node uses it.
	drained map[string]time.Time
}

// state is immutable.
type state struct {
	// signer is the root that signs intermediates.
	signer *root
	// active is nil only before the first intermediate is made.
	active *authority
	// next signs once its revocation list is in force everywhere; nil if there is
	// none.
	next *pending
	// retiring are those that were active before, the newest first.
	retiring []retiring
	// roots and bundle are parallel: what the store has, without those gone.
	roots  []*root
	bundle []*x509.Certificate
	trust  Trust
	// moving is set while what the nodes say decides about a root.
	moving bool
	// keys are the SubjectPublicKeyInfo hashes of all of the above: nobody may
	// have a certificate for one of them.
	keys map[[32]byte]struct{}
}

type retiring struct {
	*authority
	since time.Time
}

func (s *state) withKeys() *state {
	s.keys = make(map[[32]byte]struct{}, len(s.roots)+1+len(s.retiring))
	for _, r := range s.roots {
		s.keys[r.spkiHash] = struct{}{}
	}
	if s.active != nil {
		s.keys[s.active.spkiHash] = struct{}{}
	}
	if s.next != nil {
		s.keys[s.next.spkiHash] = struct{}{}
	}
	for _, r := range s.retiring {
		s.keys[r.spkiHash] = struct{}{}
	}
	return s
}

// Open loads the root of the trust domain, or makes one if the store has none;
// then it makes an intermediate and the CA's own X.509-SVID. All of it is
// recorded in the ledger before it is used. The root's key and certificate are
// checked against each other and against the configuration first: a pair that
// does not fit is refused with an error that says what to do.
//
// The caller keeps what it put in cfg open until the CA is no longer used.
func Open(ctx context.Context, cfg Config) (*CA, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("configure the authority: %w", err)
	}
	leaves, err := newLeafSigner(cfg.Upstream)
	if err != nil {
		return nil, fmt.Errorf("configure the authority: %w", err)
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fmt.Errorf("register the authority's metrics: %w", err)
	}
	c := &CA{
		cfg: cfg, log: cfg.Logger, metrics: m,
		live:    newLiveKeys(cfg.MaxTTL, maxLiveKeys),
		leaves:  leaves,
		drained: make(map[string]time.Time),
		nap:     longestNap,
		kick:    make(chan struct{}, 1), kickMint: make(chan struct{}, 1),
	}
	now := time.Now()
	s, err := c.loadRoots(ctx, now)
	if err != nil {
		return nil, fmt.Errorf("open the root of %s: %w", cfg.TrustDomain.Name(), err)
	}
	c.setState(s)
	if !cfg.Revocation {
		if err := c.dropLists(ctx, now); err != nil {
			return nil, err
		}
	} else if s.signer.foreign {
		return nil, errors.New("configure the authority: revocation lists need a root of this CA's own, and that of an upstream CA signs: adopt one first, with ca authority adopt --self")
	} else if err := c.resumeLists(ctx, now); err != nil {
		return nil, err
	}
	if s.signer.foreign {
		// Who has been issued to before lives on without the upstream CA, and Run
		// tries again: to start is better than not to.
		if _, err := c.mintAndInstall(ctx); err != nil {
			c.log.ErrorContext(ctx, "nothing is issued until the upstream ca gives an intermediate, will retry", "kind", cfg.Upstream.Kind, "err", err)
		}
		return c, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err = c.replaceIntermediate(ctx, now)
	if errors.Is(err, keys.ErrUnavailable) {
		// As with an upstream CA: Run tries again.
		c.log.ErrorContext(ctx, "nothing is issued until the root's key can be used, will retry", "err", err)
		c.failed.Store(&err)
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("make the first intermediate of %s: %w", cfg.TrustDomain.Name(), err)
	}
	if err := c.replaceOwn(ctx, now); err != nil {
		return nil, fmt.Errorf("issue the authority's own x.509-svid: %w", err)
	}
	return c, nil
}

// Bundle returns the roots of the trust domain and the sequence of this bundle.
// The caller must not modify the slice or what it points to.
func (c *CA) Bundle() (roots []*x509.Certificate, sequence uint64) {
	s := c.state.Load()
	return s.bundle, s.trust.Sequence
}

// BundleWithLists returns the revocation lists that belong to the bundle too; none
// means that nothing is revoked by lists.
func (c *CA) BundleWithLists() (roots []*x509.Certificate, lists []RevocationList, sequence uint64) {
	s := c.state.Load()
	return s.bundle, s.trust.ListsInForce(), s.trust.Sequence
}

// Authority is a signing certificate and what it is used for now.
type Authority struct {
	// ID is the subject key identifier in lower-case hexadecimal.
	ID string
	// Role is one of the Role constants, State one of the State constants.
	Role, State string
	// Tainted: what it signed is to be replaced.
	Tainted bool
	// Certificate must not be modified.
	Certificate *x509.Certificate
}

// Authorities returns the roots, and of the intermediates that this process has made
// the one that is prepared, if there is one, the active one and the retiring ones, in
// this order.
func (c *CA) Authorities() []Authority {
	s := c.state.Load()
	all := make([]Authority, 0, len(s.roots)+1+len(s.retiring))
	for _, r := range s.roots {
		all = append(all, Authority{ID: r.id, Role: RoleRoot, State: r.state, Tainted: r.tainted, Certificate: r.cert})
	}
	if s.next != nil {
		all = append(all, s.next.describe(StatePrepared))
	}
	if s.active != nil && s.active.key != nil {
		all = append(all, s.active.describe(StateActive))
	}
	for _, r := range s.retiring {
		if r.key != nil {
			all = append(all, r.describe(StateRetiring))
		}
	}
	return all
}

// RotateIntermediate replaces the intermediate now. The new one signs from then
// on: its root is in every bundle already. The old one is kept as retiring until
// the last certificate that it signed has expired. If the CA revokes by lists, the
// new one is prepared, and signs when its list is in force everywhere.
func (c *CA) RotateIntermediate(ctx context.Context) (Authority, error) {
	if c.state.Load().signer.foreign {
		a, err := c.mintAndInstall(ctx)
		if err != nil {
			return Authority{}, fmt.Errorf("rotate the intermediate: %w", err)
		}
		c.cfg.OnChange()
		c.wake()
		return a.describe(StateActive), nil
	}
	if err := c.cfg.Clock(); err != nil {
		return Authority{}, fmt.Errorf("rotate the intermediate: %w", err)
	}
	c.mu.Lock()
	now := time.Now()
	err := c.replaceIntermediate(ctx, now)
	if err == nil {
		c.failures, c.retryAt = 0, time.Time{}
		c.failed.Store(nil)
		// The CA shows itself with the new chain too. If it cannot, the old one
		// is as good as before, and Run tries again.
		if own := c.replaceOwn(ctx, now); own != nil {
			c.log.WarnContext(ctx, "own x.509-svid not renewed, will retry", "err", own)
		}
	}
	s := c.state.Load()
	active := s.active
	c.mu.Unlock()
	if err != nil {
		return Authority{}, fmt.Errorf("rotate the intermediate: %w", err)
	}
	c.cfg.OnChange()
	c.wake()
	if s.next != nil {
		return s.next.describe(StatePrepared), nil
	}
	return active.describe(StateActive), nil
}

// Health says how this CA is at now. Both are nil if all is well: failure says
// why it cannot sign, warning what will keep it from signing full lives soon or
// what failed last and is being tried again.
func (c *CA) Health(now time.Time) (warning, failure error) {
	s := c.state.Load()
	if (s.active == nil || !s.active.usable(now)) && (s.next == nil || now.After(c.latest(s, now).Add(longestNap))) {
		// One that waits for its list is no failure: agents have to be able to
		// reach this CA, to fetch the list.
		failure = c.noAuthority(s, now)
	}
	unlisted := c.unlisted.Load()
	failed := c.failed.Load()
	upstreamFailed := c.mintHealth(s, now)
	leafFailed := c.leafHealth()
	stalled := c.stalled.Load()
	switch end := s.signer.cert.NotAfter; {
	case stalled != nil && *stalled != "":
		warning = errors.New(*stalled)
	case upstreamFailed != nil:
		warning = upstreamFailed
	case leafFailed != nil:
		warning = leafFailed
	case failed != nil:
		warning = fmt.Errorf("renewal is being tried again: %w", *failed)
	case unlisted != nil && *unlisted != "":
		warning = errors.New(*unlisted)
	case !s.signer.foreign && end.Sub(now) < c.cfg.IntermediateLife:
		warning = fmt.Errorf("the root expires at %s: prepare its successor", end.UTC().Format(time.RFC3339))
	case s.signer.foreign && s.active != nil:
		warning = c.aboveHealth(s.active.above, now)
	}
	return warning, failure
}

// ServerCertificate returns the CA's own X.509-SVID, spiffe://<trust domain>/meshid/ca,
// for tls.Config.GetCertificate: leaf, intermediate, and the root as the last
// one, so that a peer that has only the root's hash can check it. It renews
// itself while Run runs. The caller must not modify it.
func (c *CA) ServerCertificate() (*tls.Certificate, error) {
	own := c.own.Load()
	now := time.Now()
	if own == nil {
		c.wake()
		return nil, fmt.Errorf("there is no own x.509-svid yet: %w", ErrNoAuthority)
	}
	if !own.usable(now) {
		c.wake()
		return nil, fmt.Errorf("own x.509-svid, valid until %s, is being renewed: %w", own.notAfter.Format(time.RFC3339), ErrNoAuthority)
	}
	return own.certificate, nil
}

func (c *CA) setState(s *state) {
	c.state.Store(s.withKeys())
	c.metrics.observe(s)
}

// wake has Run look at the state now.
func (c *CA) wake() {
	for _, kick := range []chan struct{}{c.kick, c.kickMint} {
		select {
		case kick <- struct{}{}:
		default:
		}
	}
}
