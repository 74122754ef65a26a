package sds

import (
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// table is a fixed set of secrets for tests of the protocol alone.
type table struct {
	t       testing.TB
	s       *session
	now     time.Time
	secrets map[string]resolution
}

func newTable(t testing.TB, delta bool) *table {
	return &table{t: t, s: newSession(delta, 100), now: time.Now(), secrets: make(map[string]resolution)}
}

// set puts a version under a name; "" is hold, "-" is absent.
func (b *table) set(name, version string) {
	switch version {
	case "":
		delete(b.secrets, name)
	case "-":
		b.secrets[name] = resolution{action: actAbsent}
	default:
		r := resolution{action: actServe, secret: fakeSecret(b.t, kindOf(name), version)}
		r.local = name == nameRoot || name == nameAll
		b.secrets[name] = r
	}
}

// next returns what is sent, in the form "name=version ... -removed", or "".
func (b *table) next() string {
	b.t.Helper()
	r := b.s.next(b.now, func(sub *subscription) resolution { return b.secrets[sub.name] })
	if len(b.s.blocked) > 0 {
		b.t.Fatal(b.s.blocked)
	}
	if r == nil {
		return ""
	}
	var out []string
	for _, i := range r.items {
		out = append(out, i.name+"="+i.version)
	}
	for _, name := range r.removed {
		out = append(out, "-"+name)
	}
	return strings.Join(out, " ")
}

func (b *table) want(want string) {
	b.t.Helper()
	if got := b.next(); got != want {
		b.t.Fatalf("sent %q, want %q", got, want)
	}
}

func (b *table) ask(names ...string) {
	b.s.request(&request{names: names, subscribe: names})
}

func (b *table) ack(names ...string) { b.answer(false, names...) }

func (b *table) nack(names ...string) { b.answer(true, names...) }

func (b *table) answer(refuse bool, names ...string) {
	b.t.Helper()
	if b.s.inflight == nil {
		b.t.Fatal("nothing to answer")
	}
	b.s.request(&request{names: names, nonce: b.s.inflight.nonce, refuse: refuse})
}

// fakeSecret makes a secret that passes guard, with a version of choice.
func fakeSecret(t testing.TB, k kind, version string) *secret {
	t.Helper()
	switch k {
	case kindRoot:
		s, err := newRoot(&trustDomain{name: "a.test", roots: encodePEM(nil, "CERTIFICATE", []byte(version))})
		if err != nil {
			t.Fatal(err)
		}
		s.version = version
		return s
	case kindLeaf:
		s := testLeaf(t)
		return &secret{kind: kindLeaf, version: version, id: "spiffe://a.test/x", encode: s.encode}
	default:
		t.Fatal("no such kind")
		return nil
	}
}

func testLeaf(t testing.TB) *secret {
	t.Helper()
	v := identitytest.NewAuthority(t, "a.test").SVID("/x")
	s, err := newLeaf(v.ID.String(), v.Chain, v.Key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const idX = "spiffe://a.test/x"

func TestSession_SotW(t *testing.T) {
	b := newTable(t, false)
	b.set(nameDefault, "1")
	b.want("") // nobody has asked
	b.ask(nameDefault)
	b.want("default=1")
	b.set(nameDefault, "2")
	b.want("") // one at a time
	b.set(nameDefault, "3")
	b.ack(nameDefault)
	b.want("default=3") // the latest wins, what was between is skipped
	b.ack(nameDefault)
	b.want("")
	b.ack2Stale(nameDefault)
	b.want("")
}

// ack2Stale repeats the last answer.
func (b *table) ack2Stale(names ...string) {
	b.s.request(&request{names: names, nonce: "1"})
	b.s.request(&request{names: names, nonce: "77"})
}

// The root is sent before the leaf, and all names of the stream are in each state of
// the world.
func TestSession_RootBeforeLeaf(t *testing.T) {
	b := newTable(t, false)
	b.set(nameDefault, "1")
	b.set(nameRoot, "r1")
	b.set(idX, "1")
	b.ask(idX, nameDefault, nameRoot)
	b.want("ROOTCA=r1 default=1 spiffe://a.test/x=1")
	b.ack(idX, nameDefault, nameRoot)
	b.set(nameRoot, "r2")
	b.want("ROOTCA=r2 default=1 spiffe://a.test/x=1")
}

// A proxy on an aggregated stream adds names before it has answered, with a nonce
// that is empty or old: the names count, the acknowledgement does not.
func TestSession_NamesOfStaleRequests(t *testing.T) {
	b := newTable(t, false)
	b.set(nameDefault, "1")
	b.set(nameRoot, "r1")
	b.ask(nameDefault)
	b.want("default=1")
	b.ask(nameRoot, nameDefault) // nonce "", as Envoy does
	b.want("")
	b.s.request(&request{names: []string{nameRoot, nameDefault}, nonce: "9"})
	b.want("")
	b.ack(nameRoot, nameDefault)
	b.want("ROOTCA=r1 default=1")
	// A stale refusal is none.
	b.s.request(&request{names: []string{nameDefault}, nonce: "1", refuse: true})
	if b.s.rejecting {
		t.Error("a stale refusal counted")
	}
	b.ack(nameDefault) // and has dropped a name
	b.set(nameRoot, "r2")
	b.want("")
	b.ask(nameRoot, nameDefault) // and takes it again
	b.want("ROOTCA=r2 default=1")
}

func TestSession_EmptyNames(t *testing.T) {
	b := newTable(t, false)
	b.set(nameDefault, "1")
	b.ask()
	b.want("")
	b.ask(nameDefault)
	b.want("default=1")
	b.ack()
	b.set(nameDefault, "2")
	b.want("")
}

func TestSession_Delta(t *testing.T) {
	b := newTable(t, true)
	b.set(nameDefault, "1")
	b.set(nameRoot, "r1")
	b.ask(nameDefault)
	b.want("default=1")
	b.ask(nameRoot) // spontaneous, while a response is unanswered
	b.want("")
	b.ack()
	b.want("ROOTCA=r1") // only what has changed
	b.ack()
	b.want("")
	b.s.request(&request{unsubscribe: []string{nameRoot}})
	b.set(nameRoot, "r2")
	b.want("")
	b.ask(nameRoot)
	b.want("ROOTCA=r2")
	b.ack()
	// A name that is subscribed already: the client may have forgotten it.
	b.ask(nameRoot)
	b.want("ROOTCA=r2")
	b.ack()
	// Both in one request.
	b.s.request(&request{unsubscribe: []string{nameRoot}, subscribe: []string{nameRoot}})
	b.want("ROOTCA=r2")
}

// A name that the caller has no right to, or that is none at all, is answered once in
// delta; in the state of the world there is no answer.
func TestSession_Absent(t *testing.T) {
	other := "spiffe://a.test/other"
	b := newTable(t, true)
	b.set(other, "-")
	b.ask(other, "no such name")
	b.want("-no such name -" + other)
	b.ack()
	b.want("")
	b.ask("no such name")
	b.want("-no such name")
	b.ack()
	b.set(other, "1") // now he has
	b.want(other + "=1")
	b.ack()
	b.set(other, "-")
	b.want("-" + other)
	b.ack()
	b.want("")

	b = newTable(t, false)
	b.set(other, "-")
	b.set(nameDefault, "1")
	b.ask(other, "no such name", nameDefault)
	b.want("default=1")
	b.ack(other, "no such name", nameDefault)
	b.want("")
	if b.s.strange != 2 {
		t.Errorf("%d strange names counted", b.s.strange)
	}
}

// Versions that a client brings along from an earlier stream are not sent again.
func TestSession_Resume(t *testing.T) {
	t.Run("delta", func(t *testing.T) {
		b := newTable(t, true)
		b.set(nameDefault, "2")
		b.set(nameRoot, "r1")
		b.s.request(&request{
			subscribe: []string{nameDefault, nameRoot},
			initial:   map[string]string{nameDefault: "1", nameRoot: "r1", "stranger": "1"},
		})
		b.want("default=2")
		b.ack()
		b.want("")
		b.set(nameRoot, "r2")
		b.want("ROOTCA=r2")
		// Only the first request of a stream may say so.
		b.s.request(&request{subscribe: []string{idX}, initial: map[string]string{idX: "1"}})
		b.set(idX, "1")
		b.ack()
		b.want(idX + "=1")
	})
	t.Run("sotw one name", func(t *testing.T) {
		b := newTable(t, false)
		b.set(nameDefault, "1")
		b.ask(nameDefault)
		r := b.s.next(b.now, func(sub *subscription) resolution { return b.secrets[sub.name] })
		again := newTable(t, false)
		again.secrets = b.secrets
		again.s.request(&request{names: []string{nameDefault}, version: r.version})
		again.want("")
		again.set(nameDefault, "2")
		again.want("default=2")
		// The version was that of another name.
		other := newTable(t, false)
		other.set(idX, "1")
		other.s.request(&request{names: []string{idX}, version: r.version})
		other.want(idX + "=1")
	})
	t.Run("sotw several names", func(t *testing.T) {
		b := newTable(t, false)
		b.set(nameDefault, "1")
		b.set(nameRoot, "r1")
		b.ask(nameDefault, nameRoot)
		r := b.s.next(b.now, func(sub *subscription) resolution { return b.secrets[sub.name] })
		for _, tc := range []struct {
			version, want string
		}{{r.version, ""}, {"1", "ROOTCA=r1 default=1"}, {"", "ROOTCA=r1 default=1"}} {
			again := newTable(t, false)
			again.secrets = b.secrets
			again.s.request(&request{names: []string{nameRoot, nameDefault}, version: tc.version})
			again.want(tc.want)
		}
	})
	t.Run("a held name does not let the rest pass for it", func(t *testing.T) {
		b := newTable(t, false)
		b.set(nameRoot, "r1")
		b.s.request(&request{names: []string{nameRoot, nameDefault}, version: "of-both"})
		b.want("ROOTCA=r1")
	})
}

// TestV_H7_F55_RejectedOnce: a refused version is not sent again, and a refused group
// is taken apart until the bad one is known; the good ones are not held up by it.
func TestV_H7_F55_RejectedOnce(t *testing.T) {
	for _, delta := range []bool{false, true} {
		b := newTable(t, delta)
		b.set(nameDefault, "bad")
		b.ask(nameDefault)
		b.want("default=bad")
		b.nack(nameDefault)
		if !b.s.rejecting {
			t.Error("not known that the proxy refuses")
		}
		b.want("")
		b.want("")
		b.set(nameDefault, "good")
		b.want("default=good")
		b.ack(nameDefault)
		if b.s.rejecting {
			t.Error("still thought to refuse")
		}
		b.set(nameDefault, "bad") // a change again
		b.want("default=bad")
	}

	t.Run("two, the last one is found by elimination", func(t *testing.T) {
		b := newTable(t, true)
		b.set(nameDefault, "bad")
		b.set(nameRoot, "r1")
		b.ask(nameDefault, nameRoot)
		b.want("ROOTCA=r1 default=bad")
		b.nack()
		b.want("ROOTCA=r1")
		b.ack()
		b.want("")
		b.set(nameDefault, "good")
		b.want("default=good")
	})
	t.Run("sotw, the bad one is left out of later states", func(t *testing.T) {
		b := newTable(t, false)
		names := []string{nameDefault, nameRoot, idX}
		b.set(nameDefault, "bad")
		b.set(nameRoot, "r1")
		b.set(idX, "1")
		b.ask(names...)
		b.want("ROOTCA=r1 default=bad spiffe://a.test/x=1")
		b.nack(names...)
		b.want("ROOTCA=r1")
		b.ack(names...)
		b.want("ROOTCA=r1 default=bad")
		b.nack(names...)
		b.want("ROOTCA=r1 spiffe://a.test/x=1") // two bad ones would be possible
		b.ack(names...)
		b.want("")
		b.set(idX, "2")
		b.want("ROOTCA=r1 spiffe://a.test/x=2")
	})
	t.Run("a change meanwhile", func(t *testing.T) {
		b := newTable(t, true)
		b.set(nameDefault, "bad")
		b.set(nameRoot, "r1")
		b.ask(nameDefault, nameRoot)
		b.want("ROOTCA=r1 default=bad")
		b.nack()
		b.set(nameDefault, "good")
		b.want("default=good")
		b.ack()
		b.want("ROOTCA=r1") // it may be good: the other one has gone
		b.ack()
		b.want("")
	})
	t.Run("unsubscribed meanwhile", func(t *testing.T) {
		b := newTable(t, true)
		b.set(nameDefault, "bad")
		b.set(nameRoot, "r1")
		b.ask(nameDefault, nameRoot)
		b.want("ROOTCA=r1 default=bad")
		b.s.request(&request{unsubscribe: []string{nameDefault}})
		b.nack()
		b.want("ROOTCA=r1")
	})
}

// The sequence of the local bundle is acknowledged when it is in force under all
// names that carry it, and not for what is still on its way.
// A leaf that is refused is reported once, whichever way it was found out; a
// validation context is not, and neither is what is accepted.
func TestV_H7_RefusedLeafIsReported(t *testing.T) {
	for _, delta := range []bool{false, true} {
		b := newTable(t, delta)
		leaf := func(version string) *identity.Certificate {
			b.set("default", version)
			r := b.secrets["default"]
			r.leaf = &identity.Certificate{Raw: []byte(version)}
			b.secrets["default"] = r
			return r.leaf
		}
		reported := func(want ...*identity.Certificate) {
			t.Helper()
			b.next()
			if !slices.Equal(b.s.refused, want) {
				t.Fatalf("delta %v: %d reported, want %d", delta, len(b.s.refused), len(want))
			}
			b.s.refused = nil
		}
		names := []string{"ROOTCA", "default"}
		b.set("ROOTCA", "r1")
		bad := leaf("l1")
		b.ask(names...)
		b.next()
		b.nack(names...) // one of the two, and it is not known which
		b.next()         // the root, alone
		b.ack(names...)
		b.next()
		if b.s.inflight != nil { // the leaf, alone
			b.nack(names...)
		}
		reported(bad)
		reported()
		next := leaf("l2")
		b.next()
		b.nack(names...)
		reported(next)
		leaf("l3")
		b.next()
		b.ack(names...)
		b.set("ROOTCA", "r2")
		b.next()
		b.nack(names...)
		reported()
	}
}

func TestSession_Acknowledge(t *testing.T) {
	b := newTable(t, false)
	root := func(name, version string, sequence uint64) {
		b.set(name, version)
		r := b.secrets[name]
		r.sequence = sequence
		b.secrets[name] = r
	}
	want := func(sequence uint64, ok bool) {
		t.Helper()
		if got, is := b.s.acknowledge(); got != sequence || is != ok {
			t.Fatalf("acknowledged %d %t, want %d %t", got, is, sequence, ok)
		}
	}
	names := []string{nameRoot, nameAll, nameDefault}
	b.set(nameDefault, "1")
	root(nameRoot, "r1", 0)
	root(nameAll, "a1", 0)
	b.ask(names...)
	b.next()
	want(0, false)
	b.ack(names...)
	want(0, true) // the first sequence may be 0
	want(0, false)
	root(nameRoot, "r2", 1)
	root(nameAll, "a2", 1)
	b.next()
	want(0, false)
	root(nameRoot, "r3", 2) // changes while 1 is on its way
	root(nameAll, "a3", 2)
	b.ack(names...)
	want(1, true)
	b.next()
	b.nack(names...)
	want(0, false)
	b.want("ALL=a3 default=1") // taken apart: the one alone does not count
	b.ack(names...)
	want(0, false)
	b.want("")
	root(nameRoot, "r4", 3)
	root(nameAll, "a4", 3)
	b.want("ALL=a4 ROOTCA=r4 default=1")
	b.ack(names...)
	want(3, true)
	// The same contents under a new sequence need no push.
	root(nameRoot, "r4", 4)
	root(nameAll, "a4", 4)
	b.want("")
	want(4, true)
	// No name with the bundle, no acknowledgement.
	b.ask(nameDefault)
	root(nameRoot, "r5", 5)
	b.next()
	want(0, false)
}

// TestV_I3_NamesAreBounded: names over the limit are as if they did not exist.
func TestV_I3_NamesAreBounded(t *testing.T) {
	for _, delta := range []bool{false, true} {
		s := newSession(delta, 10)
		var names []string
		for _, prefix := range []string{"spiffe://a.test/", "unknown/"} {
			for i := range 10_000 {
				names = append(names, prefix+strings.Repeat("x", i%50)+string(rune('a'+i%26)))
			}
		}
		s.request(&request{names: names, subscribe: names})
		if len(s.subs) > 10 || len(s.unknown) > 10 {
			t.Errorf("delta %t: %d names, %d unknown ones kept", delta, len(s.subs), len(s.unknown))
		}
		if s.surplus == 0 {
			t.Error("surplus names not counted")
		}
	}
}

// A large delta is sent in parts, each after the answer to the one before.
func TestSession_LargeDeltaIsSentInParts(t *testing.T) {
	b := newTable(t, true)
	b.s.max = 2000
	leaf := testLeaf(t)
	const n = 1500
	for i := range n {
		name := "spiffe://a.test/w/" + strings.Repeat("a", i%7) + string(rune('a'+i%26)) + "/" + strconv.Itoa(i)
		b.secrets[name] = resolution{action: actServe, secret: &secret{kind: kindLeaf, version: strconv.Itoa(i), encode: leaf.encode}}
		b.s.request(&request{subscribe: []string{name}})
	}
	parts, items := 0, 0
	for {
		r := b.s.next(b.now, func(sub *subscription) resolution { return b.secrets[sub.name] })
		if r == nil {
			break
		}
		parts++
		items += len(r.items)
		size := 0
		for _, i := range r.items {
			size += len(i.any.GetValue())
		}
		if size > maxResponseBytes {
			t.Errorf("a part has %d bytes", size)
		}
		b.ack()
	}
	if items != n || parts < 2 {
		t.Errorf("%d secrets in %d parts", items, parts)
	}
}

func TestVersionOf(t *testing.T) {
	c := func(name, version string) *candidate {
		return &candidate{sub: &subscription{name: name}, resolution: resolution{secret: &secret{version: version}}}
	}
	one, two := c("a", "1"), c("b", "2")
	if versionOf([]*candidate{one, two}) != versionOf([]*candidate{two, one}) {
		t.Error("the order matters")
	}
	seen := map[string]bool{}
	for _, set := range [][]*candidate{{one, two}, {c("a", "2"), c("b", "1")}, {c("a", "1"), c("b", "1")}, {c("ab", "1"), c("b", "2")}, {one}, {c("b", "1")}, {}} {
		seen[versionOf(set)] = true
	}
	if len(seen) != 7 {
		t.Error("different sets have the same version")
	}
}

func TestEarlier(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct{ a, b, want time.Time }{
		{time.Time{}, time.Time{}, time.Time{}},
		{now, time.Time{}, now},
		{time.Time{}, now, now},
		{now, now.Add(1), now},
		{now.Add(1), now, now},
	} {
		if diff := cmp.Diff(tc.want, earlier(tc.a, tc.b)); diff != "" {
			t.Error(diff)
		}
	}
}
