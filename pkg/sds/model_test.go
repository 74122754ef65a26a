package sds

import (
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// The model of a proxy: it keeps what it is sent, refuses what is bad, and answers
// when it likes. All rules of the protocol are checked after each step, and at the
// end that it has what it should have.
type model struct {
	t      testing.TB
	server *Server
	world  *modelWorld
	delta  bool
	// Versions that the proxy refuses, and those that it has ever taken: what it
	// took once it does not refuse later.
	bad, accepted map[string]bool

	snapshot *identity.Snapshot
	session  *session

	// The proxy.
	names   map[string]bool
	has     map[string]string // name → version in force
	version string            // of the last accepted state of the world
	forgot  bool              // it has thrown a part of that away
	pending *response
	nonce   string // last one seen

	sent      map[change]int // since the last change of anything
	responses int
	lastAck   uint64
}

// modelWorld is what can be published, made once.
type modelWorld struct {
	snapshots []*identity.Snapshot
	names     []string
}

func newModelWorld(t testing.TB) *modelWorld {
	a, b := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test")
	next := identitytest.NewAuthority(t, "a.test")
	x1, x2, y := a.SVID("/x"), a.SVID("/x"), a.SVID("/y")
	expired := a.SVID("/x")
	expired.Chain[0].NotAfter = time.Now().Add(-time.Minute)
	b1, b2, b3 := a.Bundle(1), a.Bundle(2, next), a.Bundle(3, next)
	foreign := map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1)}
	return &modelWorld{
		names: []string{
			nameDefault, nameRoot, nameAll, "spiffe://a.test/x", "spiffe://a.test/y", "spiffe://a.test/other",
			"spiffe://a.test", "spiffe://b.test", "spiffe://c.test", "unknown", "control\x01", "*",
		},
		snapshots: []*identity.Snapshot{
			nil,
			{Bundle: b1},
			{Bundle: b1, SVIDs: []*identity.SVID{x1}},
			{Bundle: b1, SVIDs: []*identity.SVID{x2}},
			{Bundle: b2, SVIDs: []*identity.SVID{x2}},
			{Bundle: b3, SVIDs: []*identity.SVID{x2, y}, Federated: foreign},
			{Bundle: b2, SVIDs: []*identity.SVID{y, x1}, Federated: foreign},
			{Bundle: b2, SVIDs: []*identity.SVID{y}, Withdrawn: []spiffeid.ID{x1.ID}},
			{Bundle: b2, Withdrawn: []spiffeid.ID{x1.ID, y.ID}, Denied: true},
			{Bundle: b2, Denied: true},
			{Bundle: b3, SVIDs: []*identity.SVID{expired}},
			{Bundle: &identity.Bundle{TrustDomain: a.TrustDomain, Sequence: 4}, SVIDs: []*identity.SVID{x1}},
		},
	}
}

func newModel(t testing.TB, server *Server, world *modelWorld, delta bool) *model {
	return &model{
		t: t, server: server, world: world, delta: delta,
		bad: make(map[string]bool), accepted: make(map[string]bool), names: make(map[string]bool), has: make(map[string]string),
		session: newSession(delta, 100), sent: make(map[change]int),
	}
}

// step does what two bytes say.
func (m *model) step(op, arg byte) {
	name := m.world.names[int(arg)%len(m.world.names)]
	switch op % 10 {
	case 0, 1:
		m.snapshot = m.world.snapshots[int(arg)%len(m.world.snapshots)]
		clear(m.sent)
	case 2:
		m.subscribe(name)
	case 3:
		m.unsubscribe(name)
	case 4, 5:
		m.answer()
	case 6:
		m.stale(arg)
	case 7:
		m.reconnect()
	case 8:
		// From now on some version of what the proxy has or gets is bad to it.
		if m.pending != nil && len(m.pending.items) > 0 {
			i := m.pending.items[int(arg)%len(m.pending.items)]
			if !m.accepted[i.version] {
				m.bad[i.version] = true
			}
		}
	case 9:
		m.request(&request{nonce: m.nonce}) // says nothing new
	}
	m.pump()
}

func (m *model) list() []string {
	var names []string
	for _, n := range m.world.names {
		if m.names[n] {
			names = append(names, n)
		}
	}
	return names
}

// request sends a request of the proxy; in the state of the world each names all
// names.
func (m *model) request(r *request) {
	if !m.delta {
		r.names, r.version = m.list(), m.version
	}
	outcome, _ := m.session.request(r)
	if outcome != outcomeNone && m.pending != nil {
		m.t.Fatal("an answer was taken that the proxy has not given")
	}
}

func (m *model) subscribe(name string) {
	if m.delta && m.names[name] {
		delete(m.has, name) // it has forgotten it
	}
	m.names[name] = true
	clear(m.sent)
	m.request(&request{nonce: m.staleNonce(), subscribe: []string{name}})
}

func (m *model) unsubscribe(name string) {
	delete(m.names, name)
	m.forgot = m.forgot || m.has[name] != ""
	delete(m.has, name)
	clear(m.sent)
	m.request(&request{nonce: m.staleNonce(), unsubscribe: []string{name}})
}

// staleNonce is what a proxy that has not looked at its mail yet would say.
func (m *model) staleNonce() string {
	if m.delta || m.pending != nil && m.pending.nonce == m.nonce {
		return ""
	}
	return m.nonce
}

func (m *model) stale(arg byte) {
	m.request(&request{nonce: fmt.Sprintf("%d", 1000+int(arg)), refuse: arg%2 == 0})
}

// answer accepts the pending response, or refuses it if there is something bad in
// it.
func (m *model) answer() {
	p := m.pending
	if p == nil {
		return
	}
	m.pending = nil
	m.nonce = p.nonce
	for _, i := range p.items {
		if m.bad[i.version] {
			m.request(&request{nonce: p.nonce, refuse: true})
			return
		}
	}
	for _, i := range p.items {
		m.accepted[i.version] = true
		if m.names[i.name] {
			m.has[i.name] = i.version
		}
	}
	m.version, m.forgot = p.version, false
	m.request(&request{nonce: p.nonce})
}

// reconnect loses the stream and comes back with what it has.
func (m *model) reconnect() {
	m.session = newSession(m.delta, 100)
	m.pending, m.nonce = nil, ""
	clear(m.sent)
	m.lastAck = 0
	r := &request{subscribe: m.list(), initial: make(map[string]string)}
	maps.Copy(r.initial, m.has)
	if m.forgot {
		// It does not claim a state of which it has thrown a part away.
		m.version, m.forgot = "", false
	}
	m.request(r)
}

// pump lets the server send what is due and checks it.
func (m *model) pump() {
	for {
		r := m.session.next(time.Now(), m.resolve)
		if sequence, ok := m.session.acknowledge(); ok {
			m.checkAcknowledged(sequence)
		}
		if r == nil {
			return
		}
		m.check(r)
		m.pending = r
	}
}

func (m *model) resolve(sub *subscription) resolution {
	r, _ := m.server.resolve(m.snapshot, sub, time.Now())
	return r
}

// check holds a response against the rules.
func (m *model) check(r *response) {
	t := m.t
	if m.pending != nil {
		t.Fatal("a second response without an answer to the first")
	}
	if len(m.session.blocked) > 0 {
		t.Fatal(m.session.blocked)
	}
	if m.responses++; r.nonce == m.nonce {
		t.Fatal("a nonce was used twice")
	}
	news := 0
	for _, i := range r.items {
		if !m.names[i.name] {
			t.Fatalf("%q was sent unasked", i.name)
		}
		if err := guardAny(i.any); err != nil {
			t.Fatal(err)
		}
		want := m.resolve(&subscription{name: i.name, kind: kindOf(i.name), delivered: true, tells: m.delta, id: m.session.find(i.name).id})
		if want.action != actServe || want.secret.version != i.version {
			t.Fatalf("%q: %s was sent, which is not what stands under it", i.name, i.version)
		}
		if m.has[i.name] == i.version {
			if m.delta && m.sent[change{i.name, i.version}] > 0 {
				t.Fatalf("%q: %s was sent again", i.name, i.version)
			}
			continue
		}
		news++
		c := change{i.name, i.version}
		if m.sent[c]++; m.sent[c] > 2 {
			t.Fatalf("%q: %s was sent %d times", i.name, i.version, m.sent[c])
		}
	}
	if !m.delta && len(r.removed) > 0 {
		t.Fatal("removed resources in the state of the world")
	}
	for _, name := range r.removed {
		if !m.names[name] {
			t.Fatalf("%q was removed unasked", name)
		}
		if kindOf(name) != kindUnknown && m.snapshot == nil {
			t.Fatalf("%q was removed though nothing is known yet", name)
		}
		if name == nameDefault && m.snapshot.Default() != nil {
			t.Fatal("the default identity was removed though it is there")
		}
	}
}

// checkAcknowledged: who has acknowledged a bundle has it in force.
func (m *model) checkAcknowledged(sequence uint64) {
	m.lastAck = sequence
	for _, name := range []string{nameRoot, "spiffe://a.test"} {
		if !m.names[name] || m.session.find(name) == nil || !m.session.find(name).local {
			continue
		}
		ok := false
		for _, s := range m.world.snapshots {
			if s == nil || s.Bundle.Sequence < sequence {
				continue // another name may be ahead, none behind
			}
			r, refusal := m.server.cache.root(s.Bundle)
			ok = ok || refusal == nil && m.has[name] == r.version
		}
		if !ok {
			m.t.Fatalf("sequence %d was acknowledged, but %q has %q", sequence, name, m.has[name])
		}
	}
}

// settle answers everything and checks that the proxy has all that it should.
func (m *model) settle() {
	m.reconnectIfSilent()
	m.pump()
	for rounds := 0; m.pending != nil; rounds++ {
		if rounds > 3*len(m.world.names)+5 {
			m.t.Fatal("it does not come to rest")
		}
		m.answer()
		m.pump()
	}
	for name := range m.names {
		sub := m.session.find(name)
		if sub == nil {
			continue // of no kind
		}
		want := m.resolve(sub)
		if want.action != actServe || m.bad[want.secret.version] {
			continue
		}
		if m.has[name] != want.secret.version {
			m.t.Fatalf("%q has %q in the end, want %q", name, m.has[name], want.secret.version)
		}
	}
	if m.snapshot == nil || !m.snapshot.Denied || len(m.snapshot.Withdrawn) == 0 {
		return
	}
	for name, version := range m.has {
		if kindOf(name) != kindLeaf || m.bad[version] || len(m.bad) > 0 {
			continue
		}
		for _, s := range m.world.snapshots {
			if s == nil {
				continue
			}
			for _, v := range s.SVIDs {
				if e := m.server.cache.svids.Get(v); e.secret != nil && e.secret.version == version {
					m.t.Fatalf("%q still has an identity that was withdrawn", name)
				}
			}
		}
	}
}

// reconnectIfSilent lets a proxy speak that has not said a word.
func (m *model) reconnectIfSilent() {
	if !m.session.heard {
		m.reconnect()
	}
}

func runModel(t testing.TB, server *Server, world *modelWorld, ops []byte) {
	if len(ops) == 0 {
		return
	}
	m := newModel(t, server, world, ops[0]%2 == 0)
	for ops = ops[1:]; len(ops) >= 2; ops = ops[2:] {
		m.step(ops[0], ops[1])
	}
	m.settle()
}

// TestV_H8_ModelOfTheProtocol runs random sequences of what a proxy and the agent may do,
// in any order.
func TestV_H8_ModelOfTheProtocol(t *testing.T) {
	runs := 3_000
	if testing.Short() {
		runs = 1_000
	}
	world := newModelWorld(t)
	server, err := New(identitytest.NewSource(nil), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for seed := range runs {
		rng := mathrand.New(mathrand.NewPCG(uint64(seed), 8))
		ops := make([]byte, 1+2*rng.IntN(60))
		for i := range ops {
			ops[i] = byte(rng.UintN(256))
		}
		func() {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d: %v", seed, ops)
				}
			}()
			runModel(t, server, world, ops)
		}()
	}
}

// FuzzSDSRequests looks for a sequence of requests, answers and changes that breaks
// a rule.
func FuzzSDSRequests(f *testing.F) {
	world := newModelWorld(f)
	server, err := New(identitytest.NewSource(nil), Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{0, 0, 2, 2, 0, 2, 1, 4, 0, 0, 3, 4, 0})
	f.Add([]byte{1, 0, 5, 2, 0, 2, 1, 2, 3, 8, 0, 4, 0, 4, 0, 7, 0})
	f.Add([]byte{0, 0, 2, 2, 3, 4, 0, 0, 8, 4, 0, 4, 0, 7, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) > 400 {
			ops = ops[:400]
		}
		runModel(t, server, world, ops)
	})
}
