package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// tasks owns goroutines that outlive the call that started them for a moment,
// such as one that is blocked in Recv until its handler has returned.
type tasks struct {
	mu     sync.Mutex // guards what follows
	n      int
	closed bool
	idle   chan struct{} // closed when closed and n is 0
}

func newTasks() *tasks { return &tasks{idle: make(chan struct{})} }

// start runs fn in a goroutine; it reports false, and does not, after wait.
func (t *tasks) start(fn func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.n++
	go func() {
		defer t.end()
		fn()
	}()
	return true
}

func (t *tasks) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.n--
	if t.closed && t.n == 0 {
		close(t.idle)
	}
}

// wait lets no goroutine start any more and returns when the last has ended.
func (t *tasks) wait() {
	t.mu.Lock()
	if !t.closed {
		t.closed = true
		if t.n == 0 {
			close(t.idle)
		}
	}
	t.mu.Unlock()
	<-t.idle
}

// Places bounds how many callers that nobody knows yet are served at the same
// time; one address gets a quarter of them at most.
type Places struct {
	max int

	mu     sync.Mutex // guards what follows
	taken  int
	byHost map[string]int
}

// NewPlaces returns n places.
func NewPlaces(n int) *Places { return &Places{max: n, byHost: make(map[string]int)} }

// Take takes a place, if there is one; release gives it back.
func (p *Places) Take(from string) (release func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.max || p.byHost[from] >= max(1, p.max/4) {
		return nil, false
	}
	p.taken++
	p.byHost[from]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.taken--
		if p.byHost[from]--; p.byHost[from] == 0 {
			delete(p.byHost, from)
		}
	}, true
}

// bucket is a token bucket: rate tokens a second, at most burst.
type bucket struct {
	rate, burst float64

	mu     sync.Mutex // guards what follows
	tokens float64
	last   time.Time
}

func newBucket(rate, burst float64) *bucket {
	return &bucket{rate: rate, burst: burst, tokens: burst}
}

// take takes up to n tokens and returns how many it got and, if those are fewer,
// after which time there is another.
func (b *bucket) take(now time.Time, n int) (got int, retryAfter time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if passed := now.Sub(b.last).Seconds(); !b.last.IsZero() && passed > 0 {
		b.tokens = min(b.burst, b.tokens+passed*b.rate)
	}
	b.last = now
	got = min(n, int(b.tokens))
	b.tokens -= float64(got)
	if got < n {
		missing := float64(n-got) - b.tokens
		retryAfter = max(time.Second, time.Duration(missing/b.rate*float64(time.Second)))
	}
	return got, min(retryAfter, time.Minute)
}

// nodeUse is what one node uses of the CA.
type nodeUse struct {
	inFlight atomic.Int32
	issues   *bucket
	ended    *bucket // records of ended instances
}

// useOf returns the counters of a node. There is one for each node that ever
// authenticated, so they are bounded by the number of nodes.
func (s *Server) useOf(nodeID string) *nodeUse {
	if u, ok := s.perNode.Load(nodeID); ok {
		if use, ok := u.(*nodeUse); ok {
			return use
		}
	}
	fresh := &nodeUse{
		issues: newBucket(float64(s.cfg.Limits.IssueRate), float64(s.cfg.Limits.IssueBurst)),
		ended:  newBucket(endedRate, endedBurst),
	}
	u, _ := s.perNode.LoadOrStore(nodeID, fresh)
	if use, ok := u.(*nodeUse); ok {
		return use
	}
	return fresh
}

// Refusals are recorded in the ledger, but a hostile agent must not be able to
// fill the disk with them. For each node (or address, before attestation):
//
//   - a refusal like one that was recorded in the last refusalWindow is counted;
//   - of unlike ones, refusalBurst are recorded at once and then one each
//     refusalInterval; the others are counted;
//   - what was counted is recorded as one summary at the end of the window.
//
// So nothing is refused without a trace, and the trace is bounded. The metric
// counts each.
const (
	refusalWindow   = 10 * time.Minute
	refusalBurst    = 32
	refusalInterval = 10 * time.Second
	refusalKinds    = 64   // remembered for one source
	refusalSources  = 4096 // of addresses; nodes are bounded by themselves
)

// overflowSource stands for all addresses beyond refusalSources.
const overflowSource = "other addresses"

type refusalLog struct {
	mu      sync.Mutex // guards what follows
	sources map[string]*refusalSource
	foreign int // sources that are addresses
}

type refusalSource struct {
	foreign bool
	bucket  *bucket
	kinds   map[string]*refusalKind
	// dropped counts what was not recorded and has no kind of its own; sample
	// is the last of it.
	dropped uint64
	sample  *ledgerv1.Record
	since   time.Time
}

type refusalKind struct {
	sample  *ledgerv1.Record // without the workload
	since   time.Time
	repeats uint64
}

func newRefusalLog() *refusalLog { return &refusalLog{sources: make(map[string]*refusalSource)} }

// admit says whether this refusal is recorded by itself; otherwise it has been
// counted. source is a node's SPIFFE ID or, with foreign, an address.
func (l *refusalLog) admit(now time.Time, source string, foreign bool, r *ledgerv1.Record) bool {
	key := r.GetEvent().String() + "\x00" + r.GetReason() + "\x00" + r.GetEntry().GetName() + "\x00" + r.GetInstance() + "\x00" + r.GetCall() + "\x00" + r.GetActor()
	l.mu.Lock()
	defer l.mu.Unlock()
	src, ok := l.sources[source]
	if !ok && foreign && l.foreign >= refusalSources {
		source = overflowSource
		src, ok = l.sources[source]
	}
	if !ok {
		src = &refusalSource{
			foreign: foreign,
			bucket:  newBucket(1/refusalInterval.Seconds(), refusalBurst),
			kinds:   make(map[string]*refusalKind),
		}
		l.sources[source] = src
		if foreign {
			l.foreign++
		}
	}
	if k, ok := src.kinds[key]; ok {
		k.repeats++
		return false
	}
	got, _ := src.bucket.take(now, 1)
	if got == 0 || len(src.kinds) >= refusalKinds {
		if src.dropped == 0 {
			src.since = now
		}
		src.dropped++
		src.sample = sampleOf(r)
		return false
	}
	src.kinds[key] = &refusalKind{sample: sampleOf(r), since: now}
	return true
}

// sampleOf returns what a summary keeps of a refusal.
func sampleOf(r *ledgerv1.Record) *ledgerv1.Record {
	return &ledgerv1.Record{
		Version: r.GetVersion(), Event: r.GetEvent(), Outcome: r.GetOutcome(), Reason: r.GetReason(),
		TrustDomain: r.GetTrustDomain(), Instance: r.GetInstance(), Node: r.GetNode(), Entry: r.GetEntry(),
		Actor: r.GetActor(), Call: r.GetCall(), SignIn: r.GetSignIn(), CaInstance: r.GetCaInstance(), CaVersion: r.GetCaVersion(),
	}
}

// summaries returns the summaries of all windows that have ended by now, and
// forgets what is over.
func (l *refusalLog) summaries(now time.Time) []*ledgerv1.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	var due []*ledgerv1.Record
	note := func(sample *ledgerv1.Record, n uint64, since time.Time, text string) {
		if n == 0 {
			return
		}
		r := proto.CloneOf(sample)
		r.Time = timestamppb.New(now)
		r.Detail = fmt.Sprintf("%d %s were refused since %s", n, text, since.UTC().Format(time.RFC3339))
		r.Summary = &ledgerv1.Summary{Count: n, Since: timestamppb.New(since)}
		due = append(due, r)
	}
	for _, source := range slices.Sorted(maps.Keys(l.sources)) {
		src := l.sources[source]
		for _, key := range slices.Sorted(maps.Keys(src.kinds)) {
			k := src.kinds[key]
			if now.Sub(k.since) < refusalWindow {
				continue
			}
			note(k.sample, k.repeats, k.since, "more like this")
			delete(src.kinds, key)
		}
		if src.dropped > 0 && now.Sub(src.since) >= refusalWindow {
			note(src.sample, src.dropped, src.since, "more of several kinds, the last like this,")
			src.dropped, src.sample = 0, nil
		}
		if len(src.kinds) == 0 && src.dropped == 0 {
			delete(l.sources, source)
			if src.foreign {
				l.foreign--
			}
		}
	}
	return due
}

// flushRefusals records the summaries that are due.
func (s *Server) flushRefusals(ctx context.Context) {
	due := s.refusals.summaries(time.Now())
	if len(due) == 0 {
		return
	}
	if err := s.append(ctx, due...); err != nil {
		s.log.ErrorContext(ctx, "summaries of refusals cannot be recorded", "err", err)
	}
}

// refuse records a refusal of an X.509-SVID that is no part of a batch.
func (s *Server) refuse(ctx context.Context, source string, foreign bool, records ...*ledgerv1.Record) {
	s.refused.Add(1)
	s.recordRefusal(ctx, source, foreign, records...)
}

// recordRefusal records a refusal, if it is to be recorded by itself; further
// records are of the same request. A ledger that fails does not make the refusal
// less of one.
func (s *Server) recordRefusal(ctx context.Context, source string, foreign bool, records ...*ledgerv1.Record) {
	r := records[0]
	if !s.refusals.admit(r.GetTime().AsTime(), source, foreign, r) {
		s.metrics.suppressed.Inc()
		return
	}
	if err := s.append(ctx, records...); err != nil {
		s.log.ErrorContext(ctx, "refusal cannot be recorded", "err", err, "request_id", r.GetRequestId())
	}
}
