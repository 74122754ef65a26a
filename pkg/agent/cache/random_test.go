package cache

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/pkg/identity"
)

// mob drives a cache with random calls and checks after each of them what must
// never happen.
type mob struct {
	*world
	random  *rand.Rand
	log     []string             // what the cache wanted, to compare runs
	streams map[WatchID]Workload // open, with what they are attested as
	shown   map[WatchID]*identity.Snapshot
	runtime map[string]bool           // instances that are announced
	left    map[string]time.Time      // when the last stream of an instance closed
	keys    map[*identity.SVID]string // who was given what
	next    WatchID
	when    time.Time
}

const (
	mobInstances  = 12
	mobIdentities = 40
)

func newMob(t testing.TB, seed uint64) *mob {
	random := rand.New(rand.NewPCG(seed, 1))
	m := &mob{
		world: newWorld(t, Config{
			MaxInstances: mobInstances, MaxIdentities: mobIdentities, MaxWorkloads: 3, Random: random.Float64,
		}),
		random: random, streams: make(map[WatchID]Workload), shown: make(map[WatchID]*identity.Snapshot),
		runtime: make(map[string]bool), left: make(map[string]time.Time), keys: make(map[*identity.SVID]string),
	}
	m.run([]string{"bundle", "1", "root1"})
	return m
}

func (m *mob) pick(n int) int { return m.random.IntN(n) }

// someone is a random workload; instances are few so that they collide.
func (m *mob) someone() Workload {
	instance := fmt.Sprint("i", m.pick(mobInstances+3))
	options := map[string]string{"uid": fmt.Sprint(m.pick(4))}
	if m.pick(2) == 0 {
		options["app"] = string(rune('a' + m.pick(3)))
	}
	return m.workload(instance, options)
}

// step makes one random call.
func (m *mob) step() {
	switch m.pick(16) {
	case 0, 1, 2:
		m.next++
		l := m.someone()
		if m.cache.Attach(m.now, m.next, l) == nil {
			m.streams[m.next] = l
		}
	case 3, 4:
		for _, id := range m.open3() {
			delete(m.shown, id)
			l := m.streams[id]
			delete(m.streams, id)
			m.left[l.Instance] = m.now
			m.cache.Detach(m.now, id)
			break
		}
	case 5:
		l := m.someone()
		stale, err := m.cache.Announce(m.now, l)
		if err != nil {
			return
		}
		m.runtime[l.Instance] = true
		for _, id := range stale {
			if m.pick(2) == 0 { // attested again, as something else
				o := m.someone()
				o.Instance = l.Instance
				if m.cache.Attach(m.now, id, o) == nil {
					m.streams[id] = o
				}
			}
		}
	case 6:
		l := m.someone()
		m.cache.End(m.now, l.Instance)
		delete(m.runtime, l.Instance)
		delete(m.left, l.Instance)
	case 7, 8:
		m.changeEntries()
	case 9, 10, 11:
		m.answer()
	case 12:
		m.cache.Rotate(m.now, "", time.Duration(m.pick(600))*time.Second)
	case 13:
		m.now = m.now.Add(time.Duration(m.pick(3000)) * time.Millisecond)
	case 14:
		// Long waits go from deadline to deadline, as the agent does.
		m.wait(time.Duration(m.pick(3600)) * time.Second)
	case 15:
		switch m.pick(8) {
		case 0:
			m.cache.Evict(m.now)
			m.entries = identity.NewSet()
		case 1:
			m.cache.SetBundle(m.now, &identity.Bundle{TrustDomain: testTD, Sequence: uint64(m.pick(100)), Roots: m.cache.bundle.Roots})
		default:
			m.cache.Resume(m.now)
		}
	}
}

// open3 are the open streams in a fixed order, turned at random.
func (m *mob) open3() []WatchID {
	all := make([]WatchID, 0, len(m.streams))
	for id := range m.streams {
		all = append(all, id)
	}
	slices.Sort(all)
	if len(all) > 0 {
		n := m.pick(len(all))
		all = append(all[n:], all[:n]...)
	}
	return all
}

func (m *mob) changeEntries() {
	var upserts []*identity.Entry
	var changed, removed []string
	for range 1 + m.pick(3) {
		name := string(rune('a' + m.pick(8)))
		changed = append(changed, name)
		if m.pick(3) == 0 {
			removed = append(removed, name)
			continue
		}
		e := &entryv1.Entry{Name: name, SpiffeId: "spiffe://example.org/" + string(rune('a'+m.pick(5))), AcceptWeak: true}
		switch m.pick(4) {
		case 0:
			e.Workloads = fmt.Sprintf("unix.uid == %d", m.pick(4))
		case 1:
			e.Workloads = fmt.Sprintf(`docker.labels["app"] == %q`, string(rune('a'+m.pick(3))))
		case 2:
			e.Workloads = "unix.uid >= 0"
			e.SpiffeId += "/{string(unix.uid)}"
		default:
			e.Workloads = "unix.uid >= 0"
		}
		if m.pick(3) == 0 {
			e.Hint = "h"
		}
		c, err := identity.Compile(testTD, e)
		if err != nil {
			m.t.Fatal(err)
		}
		upserts = slices.DeleteFunc(upserts, func(o *identity.Entry) bool { return o.Name() == name })
		removed = slices.DeleteFunc(removed, func(o string) bool { return o == name })
		upserts = append(upserts, c)
	}
	m.entries = m.entries.With(upserts, removed)
	if m.pick(4) == 0 {
		changed = nil
	}
	m.cache.SetEntries(m.now, m.entries, changed)
}

// answer answers a random request in one of the ways there are.
func (m *mob) answer() {
	numbers := make([]uint64, 0, len(m.open))
	for id := range m.open {
		numbers = append(numbers, id)
	}
	if len(numbers) == 0 {
		return
	}
	slices.Sort(numbers)
	q := m.open[numbers[m.pick(len(numbers))]]
	delete(m.open, q.ID)
	switch m.pick(8) {
	case 0:
		m.cache.Failed(m.now, q.ID, "failed")
	case 1:
		m.cache.Refused(m.now, q.ID, "refused", time.Duration(m.pick(20)-5)*time.Second)
	default:
		m.grant(q)
	}
	if m.pick(10) == 0 { // answered twice
		m.cache.Failed(m.now, q.ID, "again")
	}
}

func (m *mob) grant(q Request) {
	svid := m.svid(q, time.Duration(60+m.pick(3600))*time.Second, "", "")
	if m.cache.Issued(m.now, q.ID, svid) {
		m.keys[svid] = q.Instance
	}
}

// wait lets time pass, stopping at each deadline of the cache.
func (m *mob) wait(d time.Duration) {
	until := m.now.Add(d)
	for !m.when.IsZero() && m.when.Before(until) {
		if m.when.After(m.now) {
			m.now = m.when
		}
		m.check()
	}
	m.now = until
}

// check takes what the cache wants and fails if it may not be.
func (m *mob) check() {
	m.t.Helper()
	r := m.cache.Ready(m.now, m.pick(5))
	m.when = r.Next
	for _, id := range r.Closed {
		delete(m.streams, id)
		delete(m.shown, id)
	}
	for _, q := range r.Issue {
		m.log = append(m.log, fmt.Sprint(q.ID, q.Instance, q.Digest, q.Identity.ID, q.Kind))
		for _, o := range m.open {
			if o.Instance == q.Instance && o.Identity.Entry.Name() == q.Identity.Entry.Name() && o.Identity.ID == q.Identity.ID &&
				o.Identity.Entry.Digest() == q.Identity.Entry.Digest() && m.cache.flights[o.ID].slot == m.cache.flights[q.ID].slot {
				m.t.Fatalf("two requests on their way for one identity: %+v and %+v", o, q)
			}
		}
		m.open[q.ID] = q
		if !m.present(q.Instance) {
			m.t.Fatalf("request for an instance that is not there: %+v", q)
		}
	}
	for _, p := range r.Publish {
		for _, id := range p.Watches {
			m.log = append(m.log, fmt.Sprint(id, describe(p.Snapshot)))
			m.shown[id] = p.Snapshot
		}
	}
	if n := len(m.cache.instances); n > mobInstances {
		m.t.Fatalf("%d instances", n)
	}
	if m.cache.slots > mobIdentities {
		m.t.Fatalf("%d identities", m.cache.slots)
	}
	for id, s := range m.shown {
		m.checkSnapshot(id, s)
	}
	m.checkBooks()
	if !r.Next.IsZero() && !r.Next.After(m.now) {
		m.t.Fatalf("the next deadline %v has passed at %v", r.Next, m.now)
	}
}

func (m *mob) present(instance string) bool {
	if m.runtime[instance] {
		return true
	}
	for _, l := range m.streams {
		if l.Instance == instance {
			return true
		}
	}
	left, ok := m.left[instance]
	return ok && m.now.Before(left.Add(5*time.Second+time.Millisecond))
}

// checkSnapshot: what a stream was shown last is alive, belongs to its instance,
// and is what the entries in force give it.
func (m *mob) checkSnapshot(id WatchID, s *identity.Snapshot) {
	l := m.streams[id]
	var entitled []string
	for _, e := range m.entries.MatchWorkload(l.Facts) {
		if rendered, err := e.Render(l.Facts); err == nil {
			entitled = append(entitled, rendered.ID.String())
		}
	}
	hints := make(map[string]bool)
	for n, v := range s.SVIDs {
		if !v.NotAfter().After(m.now) {
			m.t.Fatalf("stream %d is shown an expired SVID: %v at %v", id, v.NotAfter(), m.now)
		}
		if !slices.Contains(entitled, v.ID.String()) {
			m.t.Fatalf("stream %d of %s is shown %s; it may have %q", id, l.Digest, v.ID, entitled)
		}
		for key, instance := range m.keys {
			if key.Chain[0] == v.Chain[0] && instance != l.Instance {
				m.t.Fatalf("stream %d of %s is shown a key of %s", id, l.Instance, instance)
			}
		}
		if v.Hint != "" && hints[v.Hint] {
			m.t.Fatalf("stream %d is shown the hint %q twice", id, v.Hint)
		}
		hints[v.Hint] = true
		if slices.Contains(s.Withdrawn, v.ID) {
			m.t.Fatalf("stream %d is shown %s as served and as withdrawn", id, v.ID)
		}
		for _, o := range s.SVIDs[:n] {
			if o == v {
				m.t.Fatalf("stream %d is shown one SVID twice", id)
			}
		}
	}
	if s.Denied && len(s.SVIDs) > 0 {
		m.t.Fatalf("stream %d is denied and served", id)
	}
}

// checkBooks: what the cache holds fits together.
func (m *mob) checkBooks() {
	slots := 0
	for name, i := range m.cache.instances {
		if len(i.workloads) == 0 {
			m.t.Fatalf("instance %s without workloads", name)
		}
		slots += len(i.slots)
		for key, s := range i.slots {
			if s.gone || len(s.users) == 0 || s.key != key {
				m.t.Fatalf("slot %+v of %s is not in order", s, name)
			}
			if s.due.IsZero() && s.flight == 0 && !s.pending {
				m.t.Fatalf("slot %v of %s waits for nothing", key, name)
			}
			if (s.svid != nil || !s.due.IsZero()) && !s.armed() {
				m.t.Fatalf("slot %v of %s has no timer", key, name)
			}
		}
	}
	if slots != m.cache.slots {
		m.t.Fatalf("%d slots, counted as %d", slots, m.cache.slots)
	}
	for n, o := range m.cache.timers {
		if o.place().index != n+1 {
			m.t.Fatalf("timer %d thinks that it is %d", n, o.place().index)
		}
	}
}

// settle answers everything well until nothing is asked any more.
func (m *mob) settle() {
	for range 2000 {
		r := m.cache.Ready(m.now, 100)
		m.when = r.Next
		for _, q := range r.Issue {
			m.open[q.ID] = q
		}
		for _, p := range r.Publish {
			for _, id := range p.Watches {
				m.shown[id] = p.Snapshot
			}
		}
		answered := sortedOpen(m.open)
		for _, id := range answered {
			q := m.open[id]
			delete(m.open, id)
			m.grant(q)
		}
		if len(answered) == 0 && r.Waiting == 0 {
			waiting := false
			for _, i := range m.cache.instances {
				for _, s := range i.slots {
					waiting = waiting || s.svid == nil
				}
			}
			if !waiting {
				return
			}
			m.now = m.when
		}
	}
	m.t.Fatal("it never comes to rest")
}

func sortedOpen(open map[uint64]Request) []uint64 {
	var all []uint64
	for id := range open {
		all = append(all, id)
	}
	slices.Sort(all)
	return all
}

// TestInvariants: whatever happens in whatever order, no key is shared by two
// instances, nothing expired and nothing that no entry gives is served, nothing
// is issued for who is not there, all bounds hold; and once nothing fails any
// more, everybody has what the entries give.
func TestInvariants(t *testing.T) {
	steps := 400
	if testing.Short() {
		steps = 100
	}
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newMob(t, seed)
			m.changeEntries()
			for range steps {
				m.step()
				m.check()
			}
			m.settle()
			if len(m.cache.limited) > 0 || m.cache.slots == mobIdentities {
				return // not everybody can have everything
			}
			for id, l := range m.streams {
				s := m.shown[id]
				if s == nil {
					t.Fatalf("stream %d was never shown anything", id)
				}
				if want := len(m.entries.MatchWorkload(l.Facts)); len(s.SVIDs) != want {
					t.Errorf("stream %d has %d SVIDs in the end, want %d", id, len(s.SVIDs), want)
				}
			}
		})
	}
}

// TestDeterministic: the same calls give the same results.
func TestDeterministic(t *testing.T) {
	run := func() []string {
		m := newMob(t, 42)
		m.changeEntries()
		for range 800 {
			m.step()
			m.check()
		}
		return m.log
	}
	if a, b := run(), run(); !slices.Equal(a, b) {
		t.Error("two runs differ")
	}
}
