package agent

// What a change takes from workloads, and how the CA learns that it is out of use:
//
//  1. withdrawing carries the change out; publish calls owe for each stream that is
//     given a snapshot without something that it had;
//  2. inForce hears from the stream that the snapshot is in force at its end, ended
//     that the stream is no more;
//  3. collectWithdrawals says so to the CA, the first time together with the change
//     itself, and again when the numbers change.

import (
	"cmp"
	"slices"
	"strings"
	"time"
	"weak"

	"google.golang.org/protobuf/types/known/timestamppb"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/agent/cache"
	"github.com/meshid/meshid/pkg/identity"
)

const (
	// maxWithdrawals bounds those that are remembered: at the next session the CA is
	// told of them once more. The oldest are forgotten.
	maxWithdrawals = 32
	// leaveWithin is how long an evicted agent stays to say what its proxies did.
	leaveWithin = 5 * time.Second
)

// withdrawal is one change that took identities from streams. Agent.mu guards it.
type withdrawal struct {
	cause        nodev1.Cause
	after, until uint64
	at           time.Time

	streams, acknowledged, ended uint32
	// owing are the streams that have done neither, with the snapshot by which they
	// lost something and the identity that they lost.
	owing map[*stream]debt
	// fresh: the CA has not been told of it on this session. changed: nor of the
	// latest numbers.
	fresh, changed bool
}

// debt holds the snapshot weakly: a proxy that never acknowledges keeps no key alive.
type debt struct {
	snapshot weak.Pointer[identity.Snapshot]
	lost     string
}

// withdrawing carries out a change that may take something from streams: change must
// settle it before it returns. a.mu is held.
func (a *Agent) withdrawing(w *withdrawal, change func()) {
	w.owing, w.fresh, w.changed = make(map[*stream]debt), true, true
	a.cause = w
	change()
	a.cause = nil
	if w.streams == 0 && w.cause != nodev1.Cause_CAUSE_EVICTION {
		return // that it is in force says it all
	}
	a.withdrawals = append(a.withdrawals, w)
	if over := len(a.withdrawals) - maxWithdrawals; over > 0 {
		a.withdrawals = slices.Delete(a.withdrawals, 0, over)
	}
	signal(a.up)
}

// owe notes that a stream is about to be given next instead of before, if that takes
// something from it. a.mu is held.
func (w *withdrawal) owe(s *stream, before, next *identity.Snapshot) {
	if before == nil {
		return
	}
	for _, had := range before.SVIDs {
		if slices.ContainsFunc(next.SVIDs, func(has *identity.SVID) bool { return has.Chain[0] == had.Chain[0] }) {
			continue
		}
		if _, twice := w.owing[s]; !twice {
			w.streams++
		}
		w.owing[s] = debt{snapshot: weak.Make(next), lost: had.ID.String()}
		return
	}
}

// inForce notes that a snapshot is in force at the end of a stream, and that those
// before are not. One that carries no X.509-SVIDs had nothing to lose.
func (a *Agent) inForce(id cache.WatchID, snapshot *identity.Snapshot, carries bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.streams[id]
	if s == nil {
		return
	}
	last := -1
	for i, w := range a.withdrawals {
		if d, owes := w.owing[s]; owes && (d.snapshot.Value() == snapshot || s.watch.Snapshot() == snapshot) {
			last = i
		}
	}
	for _, w := range a.withdrawals[:last+1] {
		if _, owes := w.owing[s]; !owes {
			continue
		}
		delete(w.owing, s)
		w.changed = true
		if carries {
			w.acknowledged++
		} else {
			w.streams--
		}
		signal(a.up)
	}
}

// lostStream notes that a stream has ended. a.mu is held.
func (a *Agent) lostStream(s *stream) {
	for _, w := range a.withdrawals {
		if _, owes := w.owing[s]; owes {
			delete(w.owing, s)
			w.ended++
			w.changed = true
			signal(a.up)
		}
	}
}

// welcome notes what the CA of this session needs, and tells it, if it wants to be told,
// of all that is remembered: what was sent on an earlier one may have been lost with it.
func (a *Agent) welcome(m *nodev1.Welcome) {
	a.namesInCSR.Store(m.GetNamesInCsr())
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.reporting = m.GetReportsWithdrawals(); !a.reporting {
		return
	}
	for _, w := range a.withdrawals {
		w.fresh, w.changed = true, true
	}
	signal(a.up)
}

// leave carries out an eviction. It says whether the session is to go on for a
// moment, to say when the proxies have acknowledged.
func (a *Agent) leave(m *nodev1.Evicted) (stay bool) {
	a.mu.Lock()
	a.leaving = a.reporting
	a.mu.Unlock()
	a.evict(m.GetReason(), m.GetBanned())
	return a.isLeaving()
}

func (a *Agent) isLeaving() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.leaving
}

// collectWithdrawals takes what is to be said of withdrawals: the first and the last
// numbers of each at once, those in between not more often than other
// acknowledgements. a.mu is held.
func (a *Agent) collectWithdrawals(since time.Duration) (messages []*nodev1.SyncRequest, later time.Duration) {
	if !a.reporting {
		return nil, 0
	}
	for _, w := range a.withdrawals {
		switch {
		case !w.changed:
			continue
		case !w.fresh && len(w.owing) > 0 && since < acksEvery:
			later = acksEvery
			continue
		}
		w.fresh, w.changed = false, false
		messages = append(messages, &nodev1.SyncRequest{Message: &nodev1.SyncRequest_Withdrawing{Withdrawing: w.proto()}})
	}
	return messages, later
}

func (w *withdrawal) proto() *nodev1.Withdrawing {
	m := &nodev1.Withdrawing{
		Cause: w.cause, After: w.after, Until: w.until,
		Streams: w.streams, Acknowledged: w.acknowledged, Ended: w.ended,
	}
	for s, d := range w.owing {
		if len(m.Laggards) == maxLaggards {
			break
		}
		m.Laggards = append(m.Laggards, &nodev1.Laggard{Name: d.lost + " (" + s.processName() + ")", Since: timestamppb.New(w.at)})
	}
	slices.SortFunc(m.Laggards, func(a, b *nodev1.Laggard) int {
		return cmp.Or(a.GetSince().AsTime().Compare(b.GetSince().AsTime()), strings.Compare(a.GetName(), b.GetName()))
	})
	return m
}

// final says whether a message is the last one of an agent that leaves.
func final(m *nodev1.SyncRequest) bool {
	w := m.GetWithdrawing()
	return w.GetCause() == nodev1.Cause_CAUSE_EVICTION && w.GetAcknowledged()+w.GetEnded() == w.GetStreams()
}
