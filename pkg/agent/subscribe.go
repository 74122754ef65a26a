package agent

// How a process gets its identities:
//
//  1. Subscribe makes a watch and returns it at once;
//  2. admit attests the process, again and again while that fails for now;
//  3. attest asks all workload attestors at the same time and merges what they
//     say; the process must still be there afterwards;
//  4. enroll tells the cache, which publishes what is at hand and has the rest
//     issued.

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
)

var (
	// ErrInstanceEnded ends the watches of a workload instance that has ended.
	ErrInstanceEnded = errors.New("workload instance has ended")
	// ErrTooManyStreams refuses a stream above Config.MaxStreams.
	ErrTooManyStreams = errors.New("too many open streams")
)

// attestTimeout bounds what one workload attestor may take.
const attestTimeout = 2 * time.Second

// attestBackoff is between attempts to attest one process.
var attestBackoff = backoff.Policy{Base: 50 * time.Millisecond, Max: 5 * time.Second}

// stream is one open watch. Agent.mu guards what may change.
type stream struct {
	watch  *identity.Watch
	peer   *peer.Peer
	opened time.Time

	is      subject               // what it was attested as; zero before
	process *attributesv1.Process // of the peer, for the CA's ledger

	served bool   // an X.509-SVID has been published to it
	acked  uint64 // sequence of the bundle it has acknowledged
	dead   error  // why it is to be ended
	again  bool   // it is being attested again
}

// name says whose stream it is.
func (s *stream) name() string {
	if n := s.watch.Snapshot(); n != nil && len(n.SVIDs) > 0 {
		return n.SVIDs[0].ID.String() + " (" + s.processName() + ")"
	}
	return s.processName()
}

func (s *stream) processName() string { return "process " + strconv.Itoa(s.peer.PID) }

// Subscribe returns a watch of what the process p may have. Its snapshot is nil
// until that is known; a process that has no identity keeps its watch and is
// told when it gets one. ctx bounds the watch's life; the caller closes the
// watch. Errors wrap ErrStopped, ErrTooManyStreams or peer.ErrGone.
func (a *Agent) Subscribe(ctx context.Context, p *peer.Peer) (*identity.Watch, error) {
	if err := p.Alive(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.ended:
		return nil, ErrStopped
	case len(a.streams) >= a.cfg.MaxStreams:
		return nil, fmt.Errorf("%w: %d", ErrTooManyStreams, len(a.streams))
	}
	a.nextStream++
	id := a.nextStream
	s := &stream{peer: p, opened: time.Now()}
	s.watch = identity.NewWatch(
		func(sequence uint64) { a.acknowledge(id, sequence) },
		func() { a.unsubscribe(id) },
	)
	s.watch.OnForce(func(snapshot *identity.Snapshot, carries bool) { a.inForce(id, snapshot, carries) })
	s.watch.OnReject(func(leaf *identity.Certificate) { a.reject(ctx, id, leaf) })
	a.streams[id] = s
	a.tasks.Go(func() { a.admit(ctx, id, s) })
	return s.watch, nil
}

// unsubscribe is called when the consumer closes a watch.
func (a *Agent) unsubscribe(id cache.WatchID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.streams[id]; s != nil {
		a.forget(id, s)
		now := time.Now()
		a.cache.Detach(now, id)
		a.settle(now)
	}
}

// forget removes a stream from the agent's books. a.mu is held.
func (a *Agent) forget(id cache.WatchID, s *stream) {
	delete(a.streams, id)
	a.unname(s)
	a.lostStream(s)
	if s.acked > 0 {
		a.report.acks = true
		signal(a.up)
	}
}

// unname forgets that a stream's process asks for its workload. a.mu is held.
func (a *Agent) unname(s *stream) {
	if a.processes[s.is] == s.process {
		delete(a.processes, s.is)
	}
}

// acknowledge notes which bundle the proxy at the end of a stream has put into
// force.
func (a *Agent) acknowledge(id cache.WatchID, sequence uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.streams[id]
	if s == nil || sequence <= s.acked || a.bundle == nil || sequence > a.bundle.Sequence {
		return
	}
	s.acked = sequence
	a.report.acks = true
	signal(a.up)
}

// reject has an X.509-SVID that a proxy refuses issued once more, with a new key.
// If that one is refused as well, it is the proxy that is at fault.
func (a *Agent) reject(ctx context.Context, id cache.WatchID, leaf *identity.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.streams[id] == nil {
		return
	}
	now := time.Now()
	outcome := rejectionKept
	if a.cache.Reject(now, id, leaf.SerialNumber.Bytes()) {
		outcome = rejectionReissued
		a.settle(now)
	}
	a.metrics.rejections.WithLabelValues(outcome).Inc()
	a.log.WarnContext(ctx, "svid is refused by a proxy", "pid", a.streams[id].peer.PID, "serial", fmt.Sprintf("%x", leaf.SerialNumber), "outcome", outcome)
}

// admit attests the process of a stream until that succeeds, or is out of
// question.
func (a *Agent) admit(ctx context.Context, id cache.WatchID, s *stream) {
	select {
	case <-a.loaded:
	case <-a.stopped:
		return
	case <-ctx.Done():
		return
	}
	tries := backoff.New(attestBackoff)
	defer func() {
		if tries.Failures() > 0 {
			a.failing(-1)
		}
	}()
	for {
		found, err := a.attest(ctx, s.peer)
		if err == nil {
			err = a.enroll(id, s, found)
		}
		switch {
		case err == nil:
			return
		case errors.Is(err, peer.ErrGone), errors.Is(err, errNobodyKnows):
			a.end(id, s, err)
			return
		case ctx.Err() != nil:
			return
		}
		if tries.Failures() == 0 {
			a.failing(1)
			a.log.WarnContext(ctx, "workload cannot be attested now", "pid", s.peer.PID, "err", err)
		}
		timer := time.NewTimer(tries.Next())
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-a.stopped:
		case <-s.peer.Done():
		}
		timer.Stop()
		if a.gone(ctx, id) {
			return
		}
	}
}

// failing counts the streams whose process cannot be attested now.
func (a *Agent) failing(step int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.unattested += step; a.unattested > 0 {
		a.cfg.Health.Set(condWorkload, health.Warning,
			fmt.Sprintf("%d streams wait for an attestor that cannot answer now: see the log", a.unattested))
	} else {
		a.cfg.Health.Clear(condWorkload)
	}
}

// gone says whether nobody waits for the stream any more.
func (a *Agent) gone(ctx context.Context, id cache.WatchID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return ctx.Err() != nil || a.streams[id] == nil
}

// end ends a stream with a reason.
func (a *Agent) end(id cache.WatchID, s *stream, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.streams[id] == s {
		a.forget(id, s)
		now := time.Now()
		a.cache.Detach(now, id)
		a.settle(now)
	}
	s.watch.End(err)
}

// errNobodyKnows: no attestor has anything to say about the process.
var errNobodyKnows = errors.New("no workload attestor knows this process")

// workload is what was established about a process.
type workload struct {
	subject
	attributes *attributesv1.Workload
	process    *attributesv1.Process
}

// processOf names the process of a peer for the CA's ledger: without its start if
// that cannot be read, since nothing is decided by it.
func processOf(p *peer.Peer, now time.Time) *attributesv1.Process {
	named := &attributesv1.Process{Pid: int64(p.PID)}
	proc, err := p.Process()
	if err != nil {
		return named
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	stat, err := proc.Stat()
	var up unix.Timespec
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) != nil {
		return named
	}
	age := time.Duration(up.Nano()) - time.Duration(stat.StartTime)*clockTick //nolint:gosec // of 292 years at most
	named.StartTime = timestamppb.New(now.Add(-age).Truncate(clockTick))
	return named
}

// clockTick is the unit of start times in procfs on all of Linux's ABIs.
const clockTick = 10 * time.Millisecond

// attest asks all attestors. If one of them cannot answer now the process gets
// nothing: fewer facts could match a rule that more facts would not.
func (a *Agent) attest(ctx context.Context, p *peer.Peer) (*workload, error) {
	attestors := a.cfg.Workloads
	facts, errs := make([]*attest.Facts, len(attestors)), make([]error, len(attestors))
	ask := func(n int) {
		ctx, cancel := context.WithTimeout(ctx, attestTimeout)
		defer cancel()
		began := time.Now()
		facts[n], errs[n] = attestors[n].Attest(ctx, p)
		a.metrics.attesting.WithLabelValues(attestors[n].Name()).Observe(time.Since(began).Seconds())
		outcome := string(succeeded)
		switch {
		case errors.Is(errs[n], attest.ErrNotMine):
			outcome = "not_mine"
		case errs[n] != nil:
			outcome = string(failed)
		}
		a.metrics.attestations.WithLabelValues(attestors[n].Name(), outcome).Inc()
	}
	var others sync.WaitGroup
	for n := range attestors[1:] {
		others.Go(func() { ask(n + 1) })
	}
	ask(0)
	others.Wait()
	if err := p.Alive(); err != nil { // what was read may be another process's
		return nil, err
	}
	found, rank := &workload{attributes: &attributesv1.Workload{}, process: processOf(p, time.Now())}, 0
	for n, f := range facts {
		switch err := errs[n]; {
		case errors.Is(err, attest.ErrNotMine):
			continue
		case err != nil:
			return nil, fmt.Errorf("ask attestor %s: %w", attestors[n].Name(), err)
		case f == nil || f.Workload == nil:
			return nil, fmt.Errorf("ask attestor %s: it gave no facts", attestors[n].Name())
		}
		proto.Merge(found.attributes, f.Workload)
		if f.Instance != "" && f.Rank > rank {
			found.instance, rank = f.Instance, f.Rank
		}
	}
	if found.instance == "" {
		return nil, errNobodyKnows
	}
	var err error
	if found.digest, err = digest(found.attributes); err != nil {
		return nil, err
	}
	return found, nil
}

// digest stands for a set of attributes.
func digest(w *attributesv1.Workload) (string, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(w)
	if err != nil {
		return "", fmt.Errorf("encode attributes: %w", err)
	}
	sum := sha256.Sum256(b)
	return string(sum[:]), nil
}

// enroll tells the cache of an attested process.
func (a *Agent) enroll(id cache.WatchID, s *stream, w *workload) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.streams[id] != s {
		return nil // closed meanwhile
	}
	now := time.Now()
	a.attributes[w.subject] = w.attributes
	err := a.cache.Attach(now, id, cache.Workload{
		Instance: w.instance, Digest: w.digest, Facts: identity.NewFacts(a.node, w.attributes),
	})
	if err != nil {
		delete(a.attributes, w.subject)
		a.cfg.Health.Set(condCapacity, health.Error, "more workload instances than the agent holds")
		return fmt.Errorf("enroll instance %s: %w", w.instance, err)
	}
	s.again = false
	a.unname(s)
	s.is, s.process = w.subject, w.process
	a.processes[s.is] = s.process
	a.settle(now)
	return nil
}

// watchInstances follows what a runtime says of its instances.
func (a *Agent) watchInstances(ctx context.Context, name string, w attest.InstanceWatcher) error {
	tries := backoff.New(backoff.Policy{Base: time.Second, Max: 30 * time.Second})
	for ctx.Err() == nil {
		err := w.Watch(ctx, func(e attest.InstanceEvent) { a.instanceEvent(ctx, e) })
		if ctx.Err() == nil {
			a.log.WarnContext(ctx, "instances cannot be followed", "method", name, "err", err)
			_ = backoff.Wait(ctx, tries.Next()) // looked at next
		}
	}
	return nil
}

// instanceEvent tells the cache that an instance is there or has ended.
func (a *Agent) instanceEvent(ctx context.Context, e attest.InstanceEvent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended {
		return
	}
	now := time.Now()
	if e.Ended {
		a.cache.End(now, e.Instance)
		a.settle(now)
		return
	}
	sum, err := digest(e.Workload)
	if err != nil {
		a.log.WarnContext(ctx, "announced instance is ignored", "instance", e.Instance, "err", err)
		return
	}
	w := subject{e.Instance, sum}
	a.attributes[w] = e.Workload
	stale, err := a.cache.Announce(now, cache.Workload{
		Instance: e.Instance, Digest: sum, Facts: identity.NewFacts(a.node, e.Workload),
	})
	if err != nil {
		delete(a.attributes, w)
		a.log.WarnContext(ctx, "announced instance is ignored", "instance", e.Instance, "err", err)
		a.cfg.Health.Set(condCapacity, health.Error, "more workload instances than the agent holds")
		return
	}
	a.settle(now)
	for _, id := range stale {
		// Its attributes have changed: what its processes may have is not known
		// until they have been attested again.
		if s := a.streams[id]; s != nil && !s.again {
			s.again = true
			a.tasks.Go(func() { a.admit(ctx, id, s) })
		}
	}
}
