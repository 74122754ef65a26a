package sds

import (
	"cmp"
	"crypto/sha256"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/identity"
)

// maxResponseBytes is where a delta response ends and the next one begins.
const maxResponseBytes = 1 << 20

// session is the protocol's state on one stream, for both of its variants. It is a
// pure state machine: no goroutine, no clock, no input or output, not for
// concurrent use.
//
//   - At most one response is unanswered. What changes meanwhile is not queued:
//     once the answer is there, the then latest state is sent.
//   - Names are taken from each request, acknowledgements only from those with the
//     nonce of the unanswered response.
//   - A secret is sent when its version is not the one that the client was sent
//     last, or says it has. A version that was refused is not sent again. When
//     a response with several changed secrets was refused, it is not known which of
//     them is bad: each is then sent once more, alone, until only one can be it.
type session struct {
	delta bool
	max   int // names

	subs []*subscription // by name

	nonce    uint64
	inflight *inflight
	heard    bool // the first request is there
	// claimed is the version that a client says it has of the names in its first
	// request, from an earlier stream, in the state of the world. It is empty
	// once something was sent or the names are others.
	claimed string
	// unknown are names of no kind, to be answered with removed_resources.
	unknown map[string]struct{}

	acknowledged *uint64 // sequence of the local bundle, see acknowledge
	rejecting    bool    // the last answer was a refusal

	// Counted since they were last asked for: names over the limit, names that
	// the caller has no right to, secrets that guard held back.
	surplus, strange int
	blocked          []error
	// refused are the leaves that were refused since they were last asked for.
	refused []*identity.Certificate
	// stuck: what next saw last cannot all come into force.
	stuck bool
}

// state is what is known of the version that was sent last under a name.
type state uint8

const (
	stateNone     state = iota // nothing was sent, or no answer is there yet
	stateAccepted              // it is in force
	stateRejected              // it was refused
	stateSuspect               // it was refused, together with others
)

// subscription is one name that a client wants.
type subscription struct {
	name  string
	kind  kind
	state state
	// removed: the client was told that there is nothing under this name.
	removed bool
	// delivered: something may be in force under this name. If not delivered and
	// tells, nothing is: in delta, a client says what it has.
	delivered, tells bool
	// sent is the version that was sent last, or that the client claimed.
	sent    string
	claimed string // delta only, until something is sent or known to be equal
	id      string // SPIFFE ID of the leaf that was sent last
	group   *group // of a suspect
	told    bool   // that what was sent is refused

	// Sequences of the local trust bundle: of what was sent, of what is in force,
	// if inForce. local says that this name carries that bundle.
	local, inForce      bool
	sequence, confirmed uint64
}

// group is a set of secrets that were refused together.
type group struct {
	left int
	// found: one of them was refused alone. lost: one of them has changed or gone,
	// so that the rest may all be good.
	found, lost bool
}

// inflight is a response without an answer.
type inflight struct {
	nonce   string
	changed []change
	at      time.Time
}

// change is one secret that a response brings. version tells it from later ones.
type change struct{ name, version string }

// action says what there is to be said about a name now.
type action uint8

const (
	actHold   action = iota // nothing, yet
	actServe                // here it is
	actAbsent               // there is no such thing for this caller
)

// resolution is what stands under a name at one moment.
type resolution struct {
	action action
	secret *secret
	// local and sequence: the secret carries the local trust bundle.
	local    bool
	sequence uint64
	// leaf is that of the X.509-SVID that the secret carries; nil for others.
	leaf *identity.Certificate
	// stuck: something was withdrawn, and there is no secret to say so.
	stuck bool
}

// request is a request of either variant.
type request struct {
	nonce  string
	refuse bool // it is a refusal

	// State of the world.
	names   []string
	version string

	// Delta.
	subscribe, unsubscribe []string
	initial                map[string]string
}

// outcome is what a request meant.
type outcome uint8

const (
	outcomeNone outcome = iota
	outcomeAccepted
	outcomeRejected
)

// response is a response of either variant, about to be sent.
type response struct {
	nonce   string
	version string
	items   []item
	removed []string
}

type item struct {
	name    string
	version string
	any     *anypb.Any
	// tombstone: it withdraws what was there.
	tombstone bool
}

func newSession(delta bool, maxNames int) *session {
	return &session{delta: delta, max: maxNames}
}

// request takes one request in. sent is when the response was sent that it
// answers, if the outcome is not outcomeNone.
func (s *session) request(r *request) (o outcome, sent time.Time) {
	first := !s.heard
	s.heard = true
	if f := s.inflight; f != nil && r.nonce == f.nonce {
		s.inflight = nil
		sent = f.at
		if r.refuse {
			o = outcomeRejected
			s.reject(f.changed)
		} else {
			o = outcomeAccepted
			s.accept(f.changed)
		}
		s.rejecting = r.refuse
	}
	if s.delta {
		for _, name := range r.unsubscribe {
			s.drop(name)
		}
		for _, name := range r.subscribe {
			s.add(name, true)
		}
		if first {
			for name, version := range r.initial {
				if sub := s.find(name); sub != nil && version != "" {
					sub.claimed, sub.delivered = version, true
				}
			}
		}
		return o, sent
	}
	if first {
		s.claimed = r.version
	}
	strange := s.strange
	if changed := s.replace(r.names); changed && !first {
		s.claimed = "" // the claim was about other names
	}
	if o != outcomeNone {
		s.strange = strange // an answer repeats the names
	}
	return o, sent
}

// replace makes names the set of names, and says whether it was another one.
func (s *session) replace(names []string) (changed bool) {
	wanted := make(map[string]struct{}, len(names))
	for _, name := range names {
		wanted[name] = struct{}{}
	}
	for _, sub := range slices.Clone(s.subs) {
		if _, ok := wanted[sub.name]; !ok {
			s.drop(sub.name)
			changed = true
		}
	}
	before := len(s.subs)
	for _, name := range names {
		s.add(name, false)
	}
	return changed || len(s.subs) > before
}

// add subscribes to a name. With again, a name that is there already is answered
// once more: the client may have forgotten what it was sent.
func (s *session) add(name string, again bool) {
	at, known := s.search(name)
	if known {
		if again {
			sub := s.subs[at]
			sub.leave()
			sub.sent, sub.claimed, sub.state = "", "", stateNone
			sub.removed, sub.inForce = false, false
		}
		return
	}
	k := kindOf(name)
	if k == kindUnknown {
		s.strange++
		if s.delta && len(s.unknown) < s.max {
			if s.unknown == nil {
				s.unknown = make(map[string]struct{})
			}
			s.unknown[name] = struct{}{}
		}
		return
	}
	if len(s.subs) >= s.max {
		s.surplus++
		return
	}
	s.subs = slices.Insert(s.subs, at, &subscription{name: name, kind: k, delivered: s.claimed != "", tells: s.delta})
}

// drop unsubscribes from a name.
func (s *session) drop(name string) {
	delete(s.unknown, name)
	at, known := s.search(name)
	if !known {
		return
	}
	s.subs[at].leave()
	s.subs = slices.Delete(s.subs, at, at+1)
}

// search returns where the subscription to a name is, or would be.
func (s *session) search(name string) (at int, known bool) {
	return slices.BinarySearchFunc(s.subs, name, func(sub *subscription, name string) int { return strings.Compare(sub.name, name) })
}

// find returns the subscription to a name, or nil.
func (s *session) find(name string) *subscription {
	if at, known := s.search(name); known {
		return s.subs[at]
	}
	return nil
}

// leave takes a subscription out of its group, because what was suspect is not
// there any more.
func (sub *subscription) leave() {
	if sub.group == nil {
		return
	}
	sub.group.left--
	sub.group.lost = true
	sub.group = nil
}

// accept notes that what a response brought is in force.
func (s *session) accept(changed []change) {
	for _, c := range changed {
		sub := s.find(c.name)
		if sub == nil || sub.sent != c.version {
			continue
		}
		sub.state = stateAccepted
		sub.confirmed, sub.inForce = sub.sequence, true
		if sub.group != nil {
			sub.group.left--
			sub.group = nil
		}
	}
}

// reject notes that a response was refused.
func (s *session) reject(changed []change) {
	var hit []*subscription
	for _, c := range changed {
		if sub := s.find(c.name); sub != nil && sub.sent == c.version {
			hit = append(hit, sub)
		}
	}
	if len(changed) == 1 {
		for _, sub := range hit {
			sub.state = stateRejected
			if sub.group != nil {
				sub.group.left--
				sub.group.found = true
				sub.group = nil
			}
		}
		return
	}
	g := &group{left: len(hit), lost: len(hit) < len(changed)}
	for _, sub := range hit {
		sub.state, sub.group = stateSuspect, g
	}
}

// next returns the response that is to be sent now, or nil. After it, the response
// counts as sent. resolve is asked about each name at most once.
func (s *session) next(now time.Time, resolve func(*subscription) resolution) *response {
	if s.inflight != nil || !s.heard {
		return nil
	}
	var current, changed, suspects []*candidate
	var removed []string
	s.stuck = false
	for _, sub := range s.subs {
		c := &candidate{sub: sub, resolution: resolve(sub)}
		s.stuck = s.stuck || c.stuck
		switch c.action {
		case actHold:
			continue
		case actAbsent:
			if !sub.removed {
				sub.removed = true
				s.strange++
				if s.delta { // in the state of the world there are no words for it
					removed = append(removed, sub.name)
				}
			}
			continue
		case actServe:
		}
		s.settle(c)
		switch {
		case sub.sent != c.secret.version:
			if sub.group != nil {
				sub.leave()
			}
			changed = append(changed, c)
		case sub.state == stateSuspect:
			suspects = append(suspects, c)
		default:
			s.complain(c)
			if sub.state == stateAccepted {
				current = append(current, c)
			}
			if s.delta && c.secret.tombstone && !sub.removed {
				// The tombstone was answered: now a client that can forget may.
				sub.removed = true
				removed = append(removed, sub.name)
			}
		}
	}
	if s.resume(current, changed) {
		changed = nil
	}
	if len(changed) == 0 {
		changed = alone(suspects)
		for _, c := range suspects {
			s.complain(c)
		}
	}
	if len(s.unknown) > 0 {
		for name := range s.unknown {
			removed = append(removed, name)
		}
		s.unknown = nil
	}
	if len(changed) == 0 && len(removed) == 0 {
		return nil
	}
	return s.send(now, current, changed, removed)
}

// complain notes that the leaf which stands under a name is refused, once.
func (s *session) complain(c *candidate) {
	if c.sub.state == stateRejected && c.leaf != nil && !c.sub.told {
		c.sub.told = true
		s.refused = append(s.refused, c.leaf)
	}
}

// candidate is a subscription with what stands under its name.
type candidate struct {
	sub *subscription
	resolution
	changed bool // it is what the response is sent for
}

// settle compares what a client claims to have from an earlier stream with what
// is there, and notes which sequence an unchanged bundle has by now.
func (s *session) settle(c *candidate) {
	sub := c.sub
	sub.local = c.local
	if sub.claimed != "" && sub.claimed == c.secret.version {
		sub.sent, sub.state = sub.claimed, stateAccepted
		sub.id = c.secret.id
	}
	sub.claimed = ""
	if sub.sent == c.secret.version && sub.state == stateAccepted {
		sub.sequence, sub.confirmed, sub.inForce = c.sequence, c.sequence, true
	}
}

// resume says whether the client has all of this from an earlier stream, and
// notes it.
func (s *session) resume(current, changed []*candidate) bool {
	if s.delta || s.claimed == "" || s.nonce > 0 || len(changed) == 0 {
		return false
	}
	all := slices.Concat(current, changed)
	if versionOf(all) != s.claimed {
		return false
	}
	for _, c := range all {
		sub := c.sub
		sub.sent, sub.state, sub.id = c.secret.version, stateAccepted, c.secret.id
		sub.sequence, sub.confirmed, sub.inForce = c.sequence, c.sequence, true
	}
	s.claimed = ""
	return true
}

// alone returns the first suspect that is still to be tried alone. Where only one
// can be the bad one, it is rejected without being sent again.
func alone(suspects []*candidate) []*candidate {
	for _, c := range suspects {
		g := c.sub.group
		if g.left == 1 && !g.found && !g.lost {
			c.sub.state, c.sub.group = stateRejected, nil
			continue
		}
		return []*candidate{c}
	}
	return nil
}

// send makes a response and notes it as sent. In the state of the world it has all
// secrets that are not refused, in delta those that have changed. It is nil if
// guard let nothing pass.
func (s *session) send(now time.Time, current, changed []*candidate, removed []string) *response {
	for _, c := range changed {
		c.changed = true
	}
	all := changed
	if !s.delta {
		all = slices.Concat(current, changed)
	}
	slices.SortFunc(all, func(a, b *candidate) int { // a proxy should have the root before the leaf
		return cmp.Or(cmp.Compare(a.sub.kind, b.sub.kind), strings.Compare(a.sub.name, b.sub.name))
	})
	r := &response{removed: removed}
	var passed []*candidate
	var sent []change
	size := 0
	for _, c := range all {
		a, err := c.secret.named(c.sub.name)
		if err == nil {
			err = guard(c.sub.name, a.GetValue())
		}
		if err != nil {
			// It cannot happen, and if it does it must not reach a proxy.
			s.blocked = append(s.blocked, err)
			c.sub.sent, c.sub.state = c.secret.version, stateRejected
			continue
		}
		if size += len(a.GetValue()); s.delta && len(passed) > 0 && size > maxResponseBytes {
			break // the rest follows after the answer
		}
		passed = append(passed, c)
		r.items = append(r.items, item{name: c.sub.name, version: c.secret.version, any: a, tombstone: c.secret.tombstone && c.changed})
		if c.changed {
			sent = append(sent, change{c.sub.name, c.secret.version})
			c.sub.note(c)
		}
	}
	if len(sent) == 0 && len(removed) == 0 {
		return nil
	}
	slices.Sort(removed)
	s.nonce++
	r.nonce = strconv.FormatUint(s.nonce, 10)
	r.version = versionOf(passed)
	s.inflight = &inflight{nonce: r.nonce, changed: sent, at: now}
	s.claimed = ""
	return r
}

// note notes that a secret was sent.
func (sub *subscription) note(c *candidate) {
	sub.sent, sub.id, sub.sequence = c.secret.version, c.secret.id, c.sequence
	sub.delivered, sub.removed, sub.told = true, false, false
	if sub.state != stateSuspect {
		sub.state = stateNone
	}
}

// versionOf returns the version of a set of secrets: a hash of names and versions,
// whatever their order. The names belong to it, since a client that comes back with
// it and other names does not have what stands under those.
func versionOf(set []*candidate) string {
	sorted := slices.SortedFunc(slices.Values(set), func(a, b *candidate) int {
		return strings.Compare(a.sub.name, b.sub.name)
	})
	digest := sha256.New()
	for _, c := range sorted {
		digest.Write([]byte(c.sub.name + "\x00" + c.secret.version + "\x00"))
	}
	return shorten(digest.Sum(nil))
}

// acknowledge returns the sequence of the local trust bundle that is in force under
// all names of this stream that carry it, if it is another one than before.
func (s *session) acknowledge() (sequence uint64, ok bool) {
	for _, sub := range s.subs {
		switch {
		case !sub.local:
			continue
		case !sub.inForce:
			return 0, false
		case !ok || sub.confirmed < sequence:
			sequence, ok = sub.confirmed, true
		}
	}
	if !ok || s.acknowledged != nil && *s.acknowledged == sequence {
		return 0, false
	}
	s.acknowledged = &sequence
	return sequence, true
}

// inForce says whether the client has in force what stood under its certificates'
// names when next was called last, which found nothing to send. carries says whether
// it has any such name.
func (s *session) inForce() (carries, ok bool) {
	if s.inflight != nil || !s.heard || s.stuck {
		return false, false
	}
	for _, sub := range s.subs {
		switch {
		case sub.kind != kindLeaf:
		case sub.state == stateRejected || sub.state == stateSuspect:
			return false, false // it keeps the one before
		default:
			carries = carries || sub.delivered
		}
	}
	return carries, true
}

// waiting says how many names have never been answered.
func (s *session) waiting() int {
	n := 0
	for _, sub := range s.subs {
		if !sub.delivered && !sub.removed {
			n++
		}
	}
	return n
}
