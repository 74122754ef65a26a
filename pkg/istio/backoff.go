package istio

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
)

// Refusals are remembered, because clients that were refused come again at once, each
// with retries of its own inside of the call: for a time that doubles from firstPause to
// longestPause, the answer to the same question is the same, and nothing is read,
// verified or recorded for it. Who may ask again, may ask again within longestPause.
const (
	firstPause   = 250 * time.Millisecond
	longestPause = 10 * time.Second
	// forgetAfter is how long after a pause its length is remembered.
	forgetAfter = time.Minute
	maxPauses   = 1 << 16
	// One address may show strikeBurst bad tokens at once, and then strikeRate a second.
	// Good ones that are remembered are not counted.
	strikeRate  = 2
	strikeBurst = 64
	maxHosts    = 1 << 14
	// One workload may have issueBurst certificates at once, and then issueRate a second,
	// which is as often as it can need those that live for the shortest time. Each has a
	// record that stays: at the limit of a node, a single pod would fill the CA's disk in
	// hours.
	issueRate    = 0.5
	issueBurst   = 32
	maxWorkloads = 1 << 16
)

// refusals remembers who was refused. It is bounded; what was not used for longest is
// forgotten.
type refusals struct {
	mu     sync.Mutex // guards the pauses' contents
	pauses *recent[[32]byte, *pause]
	hosts  *recent[string, *rate.Limiter]
}

type pause struct {
	refusal refusal
	until   time.Time
	length  time.Duration
}

func newRefusals() *refusals {
	return &refusals{pauses: newRecent[[32]byte, *pause](maxPauses), hosts: newRecent[string, *rate.Limiter](maxHosts)}
}

// check returns the refusal of a moment ago, if one of the keys had one.
func (r *refusals) check(keys ...[32]byte) error {
	now := time.Now()
	for _, key := range keys {
		p, ok := r.pauses.get(key)
		if !ok {
			continue
		}
		r.mu.Lock()
		again, until := p.refusal, p.until
		r.mu.Unlock()
		if now.Before(until) {
			again.again = true
			return &again
		}
	}
	return nil
}

// note begins a pause after a refusal.
func (r *refusals) note(key [32]byte, refused *refusal) {
	now := time.Now()
	p, ok := r.pauses.get(key)
	if !ok {
		p = new(pause)
		r.pauses.put(key, p)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Before(p.until) {
		return // of a request that came at the same time
	}
	if now.Sub(p.until) > forgetAfter {
		p.length = 0
	}
	p.length = min(max(2*p.length, firstPause), longestPause)
	p.refusal, p.until = *refused, now.Add(p.length)
	p.refusal.record = ""
}

// forget ends the memory of refusals after a success.
func (r *refusals) forget(keys ...[32]byte) {
	for _, key := range keys {
		r.pauses.remove(key)
	}
}

// admit says whether a token from this address may be verified.
func (r *refusals) admit(host string) error {
	if l, ok := r.hosts.get(host); ok && l.Tokens() < 1 {
		return &refusal{code: codes.ResourceExhausted, text: "too many bad tokens from this address: try again later", again: true}
	}
	return nil
}

// strike counts a bad token.
func (r *refusals) strike(host string) {
	r.hosts.getOr(host, func() *rate.Limiter { return rate.NewLimiter(strikeRate, strikeBurst) }).Allow()
}

// pace refuses what a workload asks for too often.
func (r *request) pace() error {
	// Callers that have no pod are told apart by their address.
	caller := r.peer.Host
	if r.caller != nil && r.caller.PodUID != "" {
		caller = r.caller.PodUID
	}
	key := hashOf("pace", r.node.GetId(), caller, r.id)
	if r.s.paces.getOr(key, func() *rate.Limiter { return rate.NewLimiter(r.s.issueRate, issueBurst) }).Allow() {
		return nil
	}
	return &refusal{code: codes.FailedPrecondition, text: "this workload has asked for too many certificates: try again later"}
}

// recent is a map of a bounded size: what was not used for longest is forgotten, half of
// it at a time. It may be used concurrently.
type recent[K comparable, V any] struct {
	half int

	mu           sync.Mutex // guards what follows
	newer, older map[K]V
}

func newRecent[K comparable, V any](size int) *recent[K, V] {
	return &recent[K, V]{half: size / 2, newer: make(map[K]V)}
}

func (r *recent[K, V]) get(key K) (V, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if v, ok := r.newer[key]; ok {
		return v, true
	}
	v, ok := r.older[key]
	if ok {
		delete(r.older, key)
		r.store(key, v)
	}
	return v, ok
}

func (r *recent[K, V]) put(key K, v V) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.older, key)
	r.store(key, v)
}

// getOr is get; what is not there is made, once.
func (r *recent[K, V]) getOr(key K, fresh func() V) V {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.newer[key]
	if ok {
		return v
	}
	if v, ok = r.older[key]; !ok {
		v = fresh()
	}
	delete(r.older, key)
	r.store(key, v)
	return v
}

func (r *recent[K, V]) store(key K, v V) {
	if _, there := r.newer[key]; !there && len(r.newer) >= r.half {
		r.newer, r.older = make(map[K]V), r.newer
	}
	r.newer[key] = v
}

func (r *recent[K, V]) remove(key K) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.newer, key)
	delete(r.older, key)
}
