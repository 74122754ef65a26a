package server

// Revocation by lists, if the CA has them. What is withdrawn is refused by proxies, and
// not only by the CA, once they have a new list. For each withdrawal:
//
//  1. revoke has the CA put on its lists what lives and is concerned, and notes in the
//     withdrawal for which bundle the nodes are waited for;
//  2. listsInForce notes a node when all of its proxies have acknowledged that bundle;
//  3. a while later it is looked at again, for what was being signed in that moment,
//     and sooner if something went wrong.
//
// Intermediates of earlier processes of the CA sign no new list. If something of one is
// concerned, the nodes are told to have all renewed that it signed, and then its list is
// dropped: proxies refuse whatever an issuer without a list has signed.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger/search"
	"github.com/meshid/meshid/pkg/server/registry"
)

const (
	// secondLook is when requests are over that had begun before a withdrawal.
	secondLook = 2 * ledgerTimeout
	// abandonAfter is how long after the last renewal of what an earlier process's
	// intermediate signed its list is dropped: the new ones are on their way.
	abandonAfter = 30 * time.Second
	// maxRevocations bounds those that are to be looked at again.
	maxRevocations = 10_000
)

// revocationBackoff is between attempts to put something on the lists.
var revocationBackoff = backoff.Policy{Base: time.Second, Max: time.Minute}

// revocations are those that are looked at again.
type revocations struct {
	mu                       sync.Mutex // guards what follows
	secondLook, abandonAfter time.Duration
	waiting                  []*revocation
	abandons                 map[string]*abandon // by intermediate
	// renewals are ordered when an intermediate signs, which is the key.
	renewals map[string]renewal
}

// renewal is that of what an authority signed.
type renewal struct {
	authority string
	within    time.Duration
}

// renewWhen has the nodes renew what an authority signed once another one signs.
func (rs *revocations) renewWhen(signs, authority string, within time.Duration) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.renewals == nil {
		rs.renewals = make(map[string]renewal)
	}
	clear(rs.renewals) // of several commands, the last counts
	rs.renewals[signs] = renewal{authority, within}
}

// renewDue orders what was to wait for an intermediate that signs now.
func (s *Server) renewDue() {
	rs := &s.revocations
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for _, a := range s.cfg.CA.Authorities() {
		if r, ok := rs.renewals[a.ID]; ok && a.State == ca.StateActive {
			s.renewFrom(r.authority, r.within)
			delete(rs.renewals, a.ID)
		}
	}
}

// revocation is what is to be put on lists.
type revocation struct {
	withdrawal string // its id; "" for what was withdrawn before the CA started
	why, actor string
	match      func(*ca.Leaf) bool
	// at is when it was withdrawn: what was requested later may have it again.
	at       time.Time
	failures int
	looks    int // that found out all there is
	due      time.Time
}

// concerns says whether a certificate is to be revoked.
func (r *revocation) concerns(l *ca.Leaf) bool { return l.Requested <= r.at.UnixNano() && r.match(l) }

// abandon is an intermediate of an earlier process whose list is to be dropped.
type abandon struct {
	due         time.Time
	why, actor  string
	withdrawals []string
	failures    int
}

func ofEntries(names []string) func(*ca.Leaf) bool {
	return func(l *ca.Leaf) bool { return l.Entry != "" && slices.Contains(names, l.Entry) }
}

func ofNodes(ids []string) func(*ca.Leaf) bool {
	wanted := make(map[string]bool, len(ids))
	for _, id := range ids {
		wanted[id] = true
	}
	return func(l *ca.Leaf) bool { return wanted[l.Node] }
}

func ofQuarantines(all []*registry.Quarantine) func(*ca.Leaf) bool {
	ids, keys, serials := make(map[string]bool), make(map[string]bool), make(map[string]bool)
	for _, q := range all {
		switch {
		case q.SPIFFEID != "":
			ids[q.SPIFFEID] = true
		case len(q.KeySHA256) > 0:
			keys[string(q.KeySHA256)] = true
		default:
			serials[string(bytes.TrimLeft(q.Serial, "\x00"))] = true
		}
	}
	return func(l *ca.Leaf) bool {
		return ids[l.SPIFFEID] || keys[string(l.KeySHA256[:])] || serials[string(bytes.TrimLeft(l.Serial[:], "\x00"))]
	}
}

// refusedNow says whether a certificate is of what was withdrawn at some time, as far as
// that is known after a restart.
func (s *Server) refusedNow(l *ca.Leaf) bool {
	if _, ok := s.registry.Quarantines().Of(l.SPIFFEID, l.KeySHA256[:], l.Serial[:]); ok {
		return true
	}
	if n, ok := s.registry.Node(l.Node); ok && n.State == registry.Banned {
		return true
	}
	if l.Entry == "" {
		return false
	}
	entries := s.registry.Entries()
	_, known := entries.Set.Get(l.Entry)
	_, broken := entries.Broken[l.Entry]
	return !known && !broken
}

// revoke puts on the lists what a withdrawal is of; without lists it does nothing.
func (s *Server) revoke(ctx context.Context, r *revocation) {
	if !s.cfg.CA.RevokesByLists() {
		return
	}
	r.at = time.Now()
	s.carryOut(context.WithoutCancel(ctx), false, r)
}

// carryOut puts on the lists what several withdrawals are of. What earlier processes
// signed is looked at only with scan, since that takes its time: else it is left to
// runRevocations.
func (s *Server) carryOut(ctx context.Context, scan bool, all ...*revocation) {
	if len(all) == 0 {
		return
	}
	bequeathed, berr := s.cfg.CA.Bequeathed(ctx)
	var lefts map[*revocation]string
	if scan && berr == nil && len(bequeathed) > 0 {
		lefts, berr = s.inherited(ctx, bequeathed, all)
	}
	for _, r := range all {
		done, err := s.cfg.CA.Revoke(ctx, r.why, r.actor, r.concerns)
		left := strings.Join(slices.DeleteFunc([]string{done.Left, lefts[r]}, func(text string) bool { return text == "" }), "; ")
		pending := true
		switch err = errors.Join(err, berr); {
		case err != nil:
			s.log.ErrorContext(ctx, "certificates are not on the revocation lists, will retry", "reason", r.why, "err", err)
			s.cfg.Health.Set(conditionRevocation, health.Error, "certificates of what was withdrawn are not on the revocation lists, which is tried again: "+err.Error())
			left = "it is tried again: the CA's log says why it failed"
			r.failures++
			r.due = time.Now().Add(revocationBackoff.Bound(r.failures))
		case !scan && len(bequeathed) > 0:
			r.due = time.Now()
		default:
			s.cfg.Health.Clear(conditionRevocation)
			pending = false
			r.looks++
			r.failures, r.due = 0, time.Now().Add(s.revocations.pause())
		}
		s.noteRevoked(r.withdrawal, clamp(done.Count), done.Sequence, left, pending)
		if r.looks < 2 {
			s.revokeLater(r)
		}
	}
}

// pause is the time until the second look.
func (rs *revocations) pause() time.Duration {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.secondLook
}

func (s *Server) revokeLater(r *revocation) {
	rs := &s.revocations
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if len(rs.waiting) >= maxRevocations {
		// Those that have been carried out once go first.
		i := max(slices.IndexFunc(rs.waiting, func(r *revocation) bool { return r.failures == 0 }), 0)
		rs.waiting = slices.Delete(rs.waiting, i, i+1)
	}
	rs.waiting = append(rs.waiting, r)
}

// runRevocations looks again at what is due, until ctx ends.
func (s *Server) runRevocations(ctx context.Context) {
	if !s.cfg.CA.RevokesByLists() {
		return
	}
	// What was withdrawn before, and an earlier process did not get done.
	s.revokeLater(&revocation{why: "withdrawn before the CA started", match: s.refusedNow, at: time.Now(), due: time.Now()})
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := time.Now()
		s.carryOut(ctx, true, s.revocations.take(now)...)
		s.renewDue()
		s.abandonDue(ctx, now)
	}
}

// take returns what is due.
func (rs *revocations) take(now time.Time) (due []*revocation) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.waiting = slices.DeleteFunc(rs.waiting, func(r *revocation) bool {
		if r.due.After(now) {
			return false
		}
		due = append(due, r)
		return true
	})
	return due
}

// inherited looks for what is concerned among the certificates that earlier processes
// signed. If there is something, what its intermediates signed is replaced, and they are
// abandoned; the answer says so for people.
func (s *Server) inherited(ctx context.Context, bequeathed []ca.Bequeathed, all []*revocation) (lefts map[*revocation]string, err error) {
	lefts = make(map[*revocation]string)
	byID := make(map[string]ca.Bequeathed, len(bequeathed))
	last := bequeathed[0].LiveUntil
	for _, b := range bequeathed {
		byID[b.ID] = b
		last = later(last, b.LiveUntil)
	}
	if s.cfg.Records == nil {
		for _, r := range all {
			lefts[r] = "what the CA signed before it was started is not known, for there is no index of the ledger: it ends at " + last.UTC().Format(time.RFC3339)
		}
		return lefts, nil
	}
	concerned := make(map[*revocation]map[string]bool)
	q := search.Holders{Authorities: slices.Collect(maps.Keys(byID)), At: time.Now(), Limit: search.MaxFound}
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	for more := true; more; more = q.After.Valid {
		var found []search.Found
		if found, q.After, err = s.cfg.Records.Who(ctx, q); err != nil {
			return nil, fmt.Errorf("look for certificates of earlier processes: %w", err)
		}
		for _, f := range found {
			leaf := leafOf(f)
			id := f.Record.GetAuthority().GetId()
			if b, ok := byID[id]; !ok || b.Revoked[leaf.Serial] {
				continue
			}
			for _, r := range all {
				if r.concerns(leaf) {
					if concerned[r] == nil {
						concerned[r] = make(map[string]bool)
					}
					concerned[r][id] = true
				}
			}
		}
	}
	for r, ids := range concerned {
		due := s.replaceInherited(slices.Sorted(maps.Keys(ids)), r)
		lefts[r] = "an intermediate of before the CA was started signed some: what it signed is renewed, and refused from " + due.UTC().Format(time.RFC3339) + " on"
	}
	return lefts, nil
}

func leafOf(f search.Found) *ca.Leaf {
	l := &ca.Leaf{SPIFFEID: f.Record.GetSpiffeId(), Node: f.Record.GetNode().GetId(), Entry: f.Record.GetEntry().GetName(), Requested: f.Record.GetTime().AsTime().UnixNano()}
	serial := f.Record.GetCertificate().GetSerial()
	serial = serial[max(len(serial)-len(l.Serial), 0):]
	copy(l.Serial[len(l.Serial)-len(serial):], serial)
	copy(l.KeySHA256[:], f.Record.GetCertificate().GetSpkiSha256())
	return l
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// replaceInherited has all renewed that intermediates of earlier processes signed, at
// the rate of what a tainted root signed, and says when they are abandoned.
func (s *Server) replaceInherited(ids []string, r *revocation) (last time.Time) {
	rs := &s.revocations
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for _, id := range ids {
		a := rs.abandons[id]
		if a == nil {
			_, within := s.renewal("", true)
			s.renewFrom(id, within)
			a = &abandon{due: time.Now().Add(within + rs.abandonAfter), why: r.why, actor: r.actor}
			if rs.abandons == nil {
				rs.abandons = make(map[string]*abandon)
			}
			rs.abandons[id] = a
		}
		if r.withdrawal != "" && !slices.Contains(a.withdrawals, r.withdrawal) {
			a.withdrawals = append(a.withdrawals, r.withdrawal)
		}
		last = later(last, a.due)
	}
	return last
}

// abandonDue drops the lists of those intermediates whose time is over.
func (s *Server) abandonDue(ctx context.Context, now time.Time) {
	rs := &s.revocations
	rs.mu.Lock()
	due := make(map[string]*abandon)
	for id, a := range rs.abandons {
		if !a.due.After(now) {
			due[id] = a
		}
	}
	rs.mu.Unlock()
	for id, a := range due {
		if !s.cfg.CA.Signs(now) {
			// Nobody can have renewed anything.
			rs.mu.Lock()
			a.due = now.Add(rs.abandonAfter)
			rs.mu.Unlock()
			continue
		}
		sequence, err := s.cfg.CA.Abandon(ctx, id, "replaced, for "+a.why, a.actor)
		rs.mu.Lock()
		if err != nil {
			a.failures++
			a.due = now.Add(revocationBackoff.Bound(a.failures))
			rs.mu.Unlock()
			s.log.ErrorContext(ctx, "revocation list of an earlier process is not dropped, will retry", "authority", id, "err", err)
			s.cfg.Health.Set(conditionRevocation, health.Error, "what intermediate "+id+" signed is not refused yet, which is tried again: "+err.Error())
			continue
		}
		withdrawals := a.withdrawals
		delete(rs.abandons, id)
		rs.mu.Unlock()
		s.cfg.Health.Clear(conditionRevocation)
		s.log.InfoContext(ctx, "all that an intermediate of an earlier process signed is refused", "authority", id, "sequence", sequence)
		for _, w := range withdrawals {
			s.noteRevoked(w, 0, sequence, "", false)
		}
	}
}

// abandoning says whether a withdrawal waits for the list of an earlier process's
// intermediate to be dropped.
func (rs *revocations) abandoning(withdrawal string) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for _, a := range rs.abandons {
		if slices.Contains(a.withdrawals, withdrawal) {
			return true
		}
	}
	return false
}

// noteRevoked notes in a withdrawal what was put on lists, and for which nodes it is to
// take effect. sequence is that of the bundle with it, 0 if nothing new is in any.
func (s *Server) noteRevoked(id string, count uint32, sequence uint64, left string, again bool) {
	in := rotation.Inputs{Now: time.Now(), Nodes: s.Fleet()}
	again = again || s.revocations.abandoning(id)
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	i := slices.IndexFunc(ws.all, func(w *withdrawal) bool { return w.id == id })
	if i < 0 {
		return
	}
	w := ws.all[i]
	w.revoked += count
	w.notRevoked = left
	if !w.ended.IsZero() {
		return
	}
	w.revoking = again
	if sequence > w.sequence {
		w.sequence = sequence
		w.lists, w.listNodes = make(map[string]bool), 0
		for _, n := range in.Nodes {
			if !n.Live(in.Now) {
				continue
			}
			w.listNodes++
			if !n.Has(sequence) {
				w.lists[n.ID] = true
			}
		}
	}
	s.settleWithdrawal(w)
}

// listsInForce notes which withdrawals a node's proxies refuse now.
func (s *Server) listsInForce(session *session) {
	force := session.inForce()
	n := rotation.Node{Connected: true, Streams: force.streams, Acknowledged: force.acknowledged, AckSequence: force.ackSequence}
	if force.reported {
		n.Sequence = force.bundleSequence
	}
	ws := &s.withdrawals
	ws.mu.Lock()
	defer ws.mu.Unlock()
	now := time.Now()
	for _, w := range ws.all {
		if w.lists[session.nodeID] && n.Has(w.sequence) {
			delete(w.lists, session.nodeID)
			s.metrics.revocationEffect.observe(now.Sub(w.began), n.Streams)
			w.refused.add(now.Sub(w.began), n.Streams)
			s.settleWithdrawal(w)
		}
	}
}
