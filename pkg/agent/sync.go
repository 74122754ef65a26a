package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

const (
	// maxEntries bounds the entries of this node.
	maxEntries = 100_000
	// acksEvery is the shortest time between two reports of acknowledgements.
	acksEvery = 50 * time.Millisecond
	// maxInspections bounds those that run at the same time.
	maxInspections = 4
	// heldEvery is the shortest time between two reports of what is held.
	heldEvery = time.Second
	// maxLaggards and maxHeld bound what one report names.
	maxLaggards, maxHeld = 16, 16
	// endedBatch bounds the instances of one message.
	endedBatch = 500
)

type syncStream = grpc.BidiStreamingClient[nodev1.SyncRequest, nodev1.SyncResponse]

// ignoreEOF drops the error that says only that a stream has ended.
func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// receive carries out what the CA sends until the stream ends. It always
// returns an error. end ends the session from elsewhere.
func (a *Agent) receive(ctx context.Context, stream syncStream, end context.CancelCauseFunc) error {
	inspections := make(chan struct{}, maxInspections)
	evicted := false
	for {
		m, err := stream.Recv()
		if evicted {
			return errEvicted // whatever the CA says to it: it has said what counts
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the CA closed the stream")
			}
			return fmt.Errorf("follow the CA: %w", err)
		}
		a.cfg.Health.Clear(condCA)
		switch m := m.GetMessage().(type) {
		case *nodev1.SyncResponse_Snapshot:
			err = a.applySnapshot(ctx, m.Snapshot)
		case *nodev1.SyncResponse_Delta:
			err = a.applyDelta(ctx, m.Delta)
		case *nodev1.SyncResponse_Bundle:
			a.applyBundle(ctx, m.Bundle)
		case *nodev1.SyncResponse_Evicted:
			if evicted = a.leave(m.Evicted); evicted {
				leave := time.AfterFunc(leaveWithin, func() { end(errEvicted) })
				defer leave.Stop()
			} else {
				err = errEvicted
			}
		case *nodev1.SyncResponse_Rotate:
			a.rotate(ctx, m.Rotate)
		case *nodev1.SyncResponse_Quarantines:
			a.quarantine(ctx, m.Quarantines)
		case *nodev1.SyncResponse_Inspect:
			a.inspect(ctx, m.Inspect, inspections)
		case *nodev1.SyncResponse_Welcome:
			a.welcome(m.Welcome)
		case *nodev1.SyncResponse_Clock:
			a.noteClock(m.Clock)
		default:
			// A newer CA may say more than this agent understands.
			a.log.WarnContext(ctx, "message of the ca is not understood")
		}
		if err != nil {
			return err
		}
	}
}

// applySnapshot replaces all entries.
func (a *Agent) applySnapshot(ctx context.Context, s *nodev1.Snapshot) error {
	if len(s.GetEntries()) > maxEntries {
		return fmt.Errorf("the CA sent %d entries: at most %d are accepted", len(s.GetEntries()), maxEntries)
	}
	a.mu.Lock()
	epoch, revision, known := a.epoch, a.revision, a.entries
	a.mu.Unlock()
	if s.GetEpoch() == epoch && s.GetRevision() < revision {
		// A replica that lags behind another: what is in force is newer.
		return fmt.Errorf("the CA is behind: it is at revision %d, this agent at %d", s.GetRevision(), revision)
	}
	raw := make(map[string]*entryv1.Entry, len(s.GetEntries()))
	for _, e := range s.GetEntries() {
		raw[e.GetName()] = e
	}
	compiled := a.compile(ctx, slices.Collect(maps.Values(raw)), known)
	set := identity.NewSet(compiled...)
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	a.raw, a.entries, a.epoch, a.revision = raw, set, s.GetEpoch(), s.GetRevision()
	changedNode := !proto.Equal(a.node, s.GetNode())
	a.node = s.GetNode()
	if s.GetEpoch() != epoch {
		revision = 0
	}
	a.withdrawing(&withdrawal{cause: nodev1.Cause_CAUSE_ENTRIES, after: revision, until: s.GetRevision(), at: now}, func() {
		if changedNode {
			a.cache.Replace(now, set, a.factsOf)
		} else {
			a.cache.SetEntries(now, set, nil)
		}
		a.applied(now)
	})
	a.showSkipped()
	return nil
}

// factsOf returns the facts about a workload, with those about the node. a.mu is
// held.
func (a *Agent) factsOf(instance, digest string) *identity.Facts {
	w := a.attributes[subject{instance, digest}]
	if w == nil {
		w = &attributesv1.Workload{}
	}
	return identity.NewFacts(a.node, w)
}

// applyDelta changes some entries.
func (a *Agent) applyDelta(ctx context.Context, d *nodev1.Delta) error {
	a.mu.Lock()
	revision, known := a.revision, a.entries
	a.mu.Unlock()
	switch {
	case known == nil || d.GetFromRevision() > revision:
		// Something is missing in between: begin anew.
		a.mu.Lock()
		a.epoch, a.revision = "", 0
		a.mu.Unlock()
		return fmt.Errorf("%w: the CA sent a change from %d, this agent is at %d", errResync, d.GetFromRevision(), revision)
	case d.GetRevision() <= revision:
		return nil // it is in force already
	}
	compiled := a.compile(ctx, d.GetUpserts(), known)
	good := make(map[string]struct{}, len(compiled))
	for _, e := range compiled {
		good[e.Name()] = struct{}{}
	}
	removed := slices.Clone(d.GetRemoved())
	changed := slices.Clone(removed)
	for _, e := range d.GetUpserts() {
		changed = append(changed, e.GetName())
		if _, ok := good[e.GetName()]; !ok {
			removed = append(removed, e.GetName()) // its older form is not in force at the CA
		}
	}
	set := known.With(compiled, removed)
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for _, name := range d.GetRemoved() {
		delete(a.raw, name)
	}
	for _, e := range d.GetUpserts() {
		a.raw[e.GetName()] = e
	}
	a.entries, a.revision = set, d.GetRevision()
	if changed == nil {
		changed = []string{}
	}
	a.withdrawing(&withdrawal{cause: nodev1.Cause_CAUSE_ENTRIES, after: revision, until: d.GetRevision(), at: now}, func() {
		a.cache.SetEntries(now, set, changed)
		a.applied(now)
	})
	a.showSkipped()
	return nil
}

// applied notes that a revision is in force. a.mu is held.
func (a *Agent) applied(now time.Time) {
	a.report.applied = true
	a.settle(now)
	signal(a.up)
	signal(a.save)
}

// compile compiles entries on all cores. One that does not compile is reported
// and skipped; one that has not changed is not compiled again.
func (a *Agent) compile(ctx context.Context, entries []*entryv1.Entry, known *identity.Set) []*identity.Entry {
	compiled := make([]*identity.Entry, len(entries))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	one := func(n int, e *entryv1.Entry) {
		if known != nil {
			if old, ok := known.Get(e.GetName()); ok && proto.Equal(old.Proto(), e) {
				compiled[n] = old
				return
			}
		}
		c, err := identity.Compile(a.cfg.TrustDomain, e)
		if err != nil {
			a.log.ErrorContext(ctx, "entry is skipped: this agent cannot compile it", "entry", e.GetName(), "err", err)
			return
		}
		compiled[n] = c
	}
	for n, e := range entries {
		if len(entries) < 8 {
			one(n, e)
			continue
		}
		g.Go(func() error {
			one(n, e)
			return nil
		})
	}
	_ = g.Wait() // none returns an error
	return slices.DeleteFunc(compiled, func(e *identity.Entry) bool { return e == nil })
}

// showSkipped reports the entries that could not be compiled. a.mu is held.
func (a *Agent) showSkipped() {
	skipped := len(a.raw) - a.entries.Len()
	a.metrics.skipped.Set(float64(skipped))
	if skipped > 0 {
		a.cfg.Health.Set(condEntries, health.Warning,
			fmt.Sprintf("%d entries are not in force here since this agent cannot compile them: is it older than the CA?", skipped))
	} else {
		a.cfg.Health.Clear(condEntries)
	}
}

// applyBundle replaces the trust bundle, if the new one is newer and sound.
func (a *Agent) applyBundle(ctx context.Context, b *nodev1.Bundle) {
	parsed, err := parseBundle(a.cfg.TrustDomain, b)
	if err != nil {
		// What is in force stays: a bad bundle would cut everybody off.
		a.cfg.Health.Set(condBundle, health.Error, "the CA sent a trust bundle that is refused: "+err.Error())
		a.log.ErrorContext(ctx, "trust bundle is refused", "err", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.bundle != nil && parsed.Sequence < a.bundle.Sequence:
		a.log.WarnContext(ctx, "older trust bundle is ignored", "sequence", parsed.Sequence, "in_force", a.bundle.Sequence)
	case a.bundle != nil && parsed.Sequence == a.bundle.Sequence && !sameContent(parsed, a.bundle):
		a.cfg.Health.Set(condBundle, health.Error,
			fmt.Sprintf("the CA sent two different trust bundles with sequence %d: was its store restored from a backup?", parsed.Sequence))
		a.log.ErrorContext(ctx, "trust bundle is refused: another one has its sequence", "sequence", parsed.Sequence)
	case a.bundle != nil && parsed.Sequence == a.bundle.Sequence:
		a.report.applied = true
		signal(a.up)
	default:
		a.cfg.Health.Clear(condBundle)
		a.setBundle(parsed)
		a.log.InfoContext(ctx, "trust bundle in force", "sequence", parsed.Sequence, "roots", len(parsed.Roots), "revocation_lists", len(parsed.Lists))
	}
}

// rotate carries out an order to replace X.509-SVIDs.
func (a *Agent) rotate(ctx context.Context, r *nodev1.Rotate) {
	within := min(max(r.GetWithin().AsDuration(), 0), identity.MaxTTL)
	a.mu.Lock()
	now := time.Now()
	n := a.cache.Rotate(now, r.GetAuthority(), within)
	a.rotated = max(a.rotated, r.GetSequence())
	if a.own != nil && cache.SignedBy(identity.NewCertificates(a.own.chain...), r.GetAuthority()) {
		sooner := *a.own
		sooner.renewAt = now.Add(time.Duration(rand.Float64() * float64(within))) //nolint:gosec // jitter is no secret
		if sooner.renewAt.Before(a.own.renewAt) {
			a.own = &sooner
			signal(a.renew)
		}
	}
	a.settle(now)
	a.mu.Unlock()
	a.log.InfoContext(ctx, "svids are rotated", "authority", r.GetAuthority(), "count", n, "within", within)
}

// maxQuarantines bounds what is believed of one message, of each kind.
const maxQuarantines = 100_000

// quarantine withdraws what the CA refuses, and notes it for what is still to come.
// A message without sense is carried out as far as it has some: nothing of it can do
// more than withhold.
func (a *Agent) quarantine(ctx context.Context, m *nodev1.Quarantines) {
	hashes := func(list [][]byte) map[[32]byte]struct{} {
		set := make(map[[32]byte]struct{}, min(len(list), maxQuarantines))
		for _, b := range list[:min(len(list), maxQuarantines)] {
			if len(b) == 32 {
				set[[32]byte(b)] = struct{}{}
			}
		}
		return set
	}
	q := &cache.Quarantine{IDs: hashes(m.GetSpiffeIdSha256()), Keys: hashes(m.GetKeySha256()), Serials: make(map[string]struct{})}
	serials := m.GetSerials()
	for _, serial := range serials[:min(len(serials), maxQuarantines)] {
		q.Serials[string(bytes.TrimLeft(serial, "\x00"))] = struct{}{}
	}
	a.mu.Lock()
	now := time.Now()
	var n int
	a.withdrawing(&withdrawal{cause: nodev1.Cause_CAUSE_QUARANTINE, after: a.quarantined, until: m.GetSequence(), at: now}, func() {
		n = a.cache.SetQuarantine(now, q)
		a.quarantined = m.GetSequence()
		a.settle(now)
	})
	a.report.applied = true
	a.mu.Unlock()
	signal(a.save)
	signal(a.up)
	a.log.InfoContext(ctx, "quarantines in force", "ids", len(q.IDs), "keys", len(q.Keys), "serials", len(q.Serials), "withdrawn", n)
}

// inspect answers what would be attested of a process.
func (a *Agent) inspect(ctx context.Context, i *nodev1.Inspect, places chan struct{}) {
	answer := &nodev1.Inspected{Request: i.GetRequest()}
	select {
	case places <- struct{}{}:
	default:
		answer.Error = "the agent is busy with other inspections: try again"
		a.answer(answer)
		return
	}
	a.tasks.Go(func() {
		defer func() { <-places }()
		w, err := a.inspectProcess(ctx, i.GetPid())
		if err != nil {
			answer.Error = err.Error()
		} else {
			answer.Workload, answer.Instance = w.attributes, w.instance
		}
		a.answer(answer)
	})
}

func (a *Agent) inspectProcess(ctx context.Context, pid int64) (*workload, error) {
	if pid <= 0 || pid > 1<<22 {
		return nil, fmt.Errorf("%d is not a process id", pid)
	}
	p, err := peer.Open(int(pid))
	if err != nil {
		return nil, err
	}
	w, err := a.attest(ctx, p)
	return w, errors.Join(err, p.Close())
}

// answer puts an answer on its way.
func (a *Agent) answer(i *nodev1.Inspected) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.report.inspected) < 4*maxInspections {
		a.report.inspected = append(a.report.inspected, i)
	}
	signal(a.up)
}

// tell sends up what there is to say. It returns an error when ctx or the
// stream has ended.
func (a *Agent) tell(ctx context.Context, stream syncStream) error {
	var lastAcks time.Time
	ask := time.NewTicker(skewEvery)
	defer ask.Stop()
	for {
		now := time.Now()
		messages, ended, later := a.collect(now.Sub(lastAcks))
		for _, m := range messages {
			if err := stream.Send(m); err != nil {
				if errors.Is(err, io.EOF) {
					<-ctx.Done() // receive knows why
					return context.Cause(ctx)
				}
				return fmt.Errorf("tell the CA: %w", err)
			}
			if m.GetBundleAcks() != nil || m.GetWithdrawing() != nil {
				lastAcks = now
			}
			if final(m) && a.isLeaving() {
				if err := stream.CloseSend(); err != nil {
					return fmt.Errorf("tell the CA: %w", err)
				}
				<-ctx.Done() // the CA ends the stream
				return context.Cause(ctx)
			}
		}
		a.told(ended)
		var timer <-chan time.Time
		if later > 0 {
			timer = time.After(later)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-a.up:
		case <-timer:
		case <-ask.C:
			a.mu.Lock()
			a.report.applied = true
			a.mu.Unlock()
		}
	}
}

// collect takes what is to be said. Ended instances stay until told is called
// with their number.
// since is how long ago acknowledgements were reported; later is when there will
// be something to say that it is too early for now.
func (a *Agent) collect(since time.Duration) (messages []*nodev1.SyncRequest, ended int, later time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	messages, later = a.collectWithdrawals(since)
	if a.report.applied {
		a.report.applied = false
		m := &nodev1.Applied{Revision: a.revision, QuarantineSequence: a.quarantined}
		if a.bundle != nil {
			m.BundleSequence = a.bundle.Sequence
		}
		if sent, due := a.skew.ask(time.Now()); due {
			m.Sent = timestamppb.New(sent)
		}
		if a.skew.known {
			m.ClockSkew = durationpb.New(a.skew.by)
		}
		messages = append(messages, &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Applied{Applied: m}})
	}
	switch {
	case a.report.acks && since < acksEvery:
		later = acksEvery
	case !a.report.acks && a.report.held && since < heldEvery:
		later = heldEvery
	case a.report.acks || a.report.held:
		a.report.acks, a.report.held = false, false
		m := a.countAcks()
		messages = append(messages, &nodev1.SyncRequest{Message: &nodev1.SyncRequest_BundleAcks{BundleAcks: m}})
	}
	if n := min(len(a.report.ended), endedBatch); n > 0 {
		ended = n
		m := &nodev1.InstancesEnded{}
		for _, e := range a.report.ended[:n] {
			m.Instances = append(m.Instances, &nodev1.InstancesEnded_Instance{Instance: e.Instance, Serials: e.Serials})
		}
		messages = append(messages, &nodev1.SyncRequest{Message: &nodev1.SyncRequest_InstancesEnded{InstancesEnded: m}})
		if len(a.report.ended) > n {
			signal(a.up)
		}
	}
	for _, i := range a.report.inspected {
		messages = append(messages, &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Inspected{Inspected: i}})
	}
	a.report.inspected = nil
	return messages, ended, later
}

// told forgets ended instances that the CA was told of.
func (a *Agent) told(ended int) {
	if ended == 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.report.ended = slices.Delete(a.report.ended, 0, min(ended, len(a.report.ended)))
}

// countAcks counts the streams that have acknowledged the bundle in force. A
// stream counts once it has acknowledged any: one that carries no bundle never
// will. a.mu is held.
func (a *Agent) countAcks() *nodev1.BundleAcks {
	m := &nodev1.BundleAcks{Counted: true}
	if a.bundle != nil {
		m.Sequence = a.bundle.Sequence
	}
	for _, s := range a.streams {
		switch {
		case s.acked == 0:
			continue
		case s.acked >= m.Sequence:
			m.Acknowledged++
		case len(m.Laggards) < maxLaggards:
			m.Laggards = append(m.Laggards, &nodev1.Laggard{
				Name: s.name(), Acknowledged: s.acked, Since: timestamppb.New(latest(s.opened, a.bundled)),
			})
		}
		m.Streams++
	}
	slices.SortFunc(m.Laggards, func(a, b *nodev1.Laggard) int {
		return cmp.Or(cmp.Compare(a.GetAcknowledged(), b.GetAcknowledged()), strings.Compare(a.GetName(), b.GetName()))
	})
	m.Held = a.countHeld()
	return m
}

// countHeld counts the X.509-SVIDs by the roots that they chain to. a.mu is held.
func (a *Agent) countHeld() []*nodev1.Held {
	count := a.cache.Roots()
	if a.own != nil {
		count[hex.EncodeToString(a.own.chain[len(a.own.chain)-1].AuthorityKeyId)]++
	}
	held := make([]*nodev1.Held, 0, len(count))
	for root, n := range count {
		held = append(held, &nodev1.Held{Root: root, Svids: uint32(n)}) //nolint:gosec // the cache is bounded
	}
	slices.SortFunc(held, func(a, b *nodev1.Held) int { return strings.Compare(a.GetRoot(), b.GetRoot()) })
	return held[:min(len(held), maxHeld)]
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
