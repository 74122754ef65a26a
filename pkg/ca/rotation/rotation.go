// Package rotation answers when a root may take its next step: prepared →
// distributed → active → retiring → gone. It is a pure state machine: it is told
// the time, what nodes have acknowledged, and until when something lives that
// chains to a root, and says what has to be done. It does not know keys,
// certificates, stores or clocks.
package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// State is that of a root.
type State string

// States, in the order in which a root takes them.
const (
	// Prepared: it is in the bundle, and not every proxy has acknowledged that.
	Prepared State = "prepared"
	// Distributed: every live proxy has acknowledged a bundle that holds it.
	Distributed State = "distributed"
	// Active: it signs. Exactly one root is.
	Active State = "active"
	// Retiring: it signs no more, but something that chains to it may live.
	Retiring State = "retiring"
	// Gone: it is in no bundle.
	Gone State = "gone"
)

// MaxRoots is how many roots a bundle has at most.
const MaxRoots = 3

// Root is one root of the trust domain.
type Root struct {
	ID    string
	State State
	// Since is when it took the state.
	Since time.Time
	// Sequence is that of the first bundle that held it.
	Sequence uint64
	NotAfter time.Time
	// Foreign roots are those of an upstream CA: it decides when they change.
	Foreign bool
	// Automatic: it is to be activated as soon as it is distributed.
	Automatic bool
	// Tainted: what it signed is to be replaced, and it leaves when that is done.
	Tainted bool
}

// Trust is all that is decided: what a store keeps.
type Trust struct {
	// Paused: nothing happens by itself.
	Paused bool
	Roots  []Root
}

// Policy are the lives that the steps are timed by.
type Policy struct {
	RootLife, IntermediateLife time.Duration
	// Drain is how long a tainted root stays after the last X.509-SVID that chains
	// to it has been replaced: what is on its way to a proxy arrives.
	Drain time.Duration
	// StalledAfter is when a root that is not distributed is worth a warning.
	StalledAfter time.Duration
}

// Laggard is a stream of a proxy that has not acknowledged the bundle in force.
type Laggard struct {
	// Name says whose stream it is: a SPIFFE ID, or an instance.
	Name string
	// Acknowledged is the sequence of the last bundle that it has acknowledged.
	Acknowledged uint64
	Since        time.Time
}

// Node is what is known of one node.
type Node struct {
	ID        string
	Connected bool
	// Lease is the end of its X.509-SVID: who has not been heard of until then is
	// not waited for.
	Lease time.Time
	// Sequence is that of the bundle in force in the agent. Of its Streams,
	// Acknowledged have acknowledged AckSequence or a later one.
	Sequence              uint64
	Streams, Acknowledged uint32
	AckSequence           uint64
	Laggards              []Laggard
	// Counted is set when Held is known: X.509-SVIDs in use there, by the id of
	// the root that they chain to.
	Counted bool
	Held    map[string]uint32
	// Since is when it was last heard of, if it is not connected.
	Since time.Time
	// Below: it is a CA below this one. It has no streams here: Sequence is that of
	// the bundle in force in all of its mesh, Held has 1 for each root that something
	// there chains to, and WaitsFor says for people what it waits for until it has the
	// next one.
	Below    bool
	WaitsFor string
}

// Inputs are what a step depends on, beside what is decided.
type Inputs struct {
	Now   time.Time
	Nodes []Node
	// Horizons say, by root, until when something lives that chains to it.
	Horizons map[string]time.Time
	// Drained says, by root, since when no node has an X.509-SVID that chains to
	// it.
	Drained map[string]time.Time
	Policy  Policy
}

// Move is a root's next state. Tainted and Automatic are those afterwards.
type Move struct {
	ID                 string
	To                 State
	Tainted, Automatic bool
}

// Step is what is to be done next, all of it in one transaction.
type Step struct {
	Moves []Move
	// Prepare makes a root, in the state Prepared, and if Automatic is set it is
	// activated as soon as it is distributed.
	Prepare, Automatic bool
	// Pause and Resume set Trust.Paused.
	Pause, Resume bool
	// Renew has every X.509-SVID replaced, once the root that is active signs.
	Renew bool
	// Why is for the record.
	Why string
}

func (t Trust) find(match func(Root) bool) (Root, bool) {
	if i := slices.IndexFunc(t.Roots, match); i >= 0 {
		return t.Roots[i], true
	}
	return Root{}, false
}

// Active returns the root that signs.
func (t Trust) Active() (Root, bool) {
	return t.find(func(r Root) bool { return r.State == Active })
}

// Next returns the root that is to become active, if there is one.
func (t Trust) Next() (Root, bool) {
	return t.find(func(r Root) bool { return r.State == Prepared || r.State == Distributed })
}

func (t Trust) get(id string) (Root, bool) {
	return t.find(func(r Root) bool { return r.ID == id && r.State != Gone })
}

// Bundle returns the roots that are in the bundle.
func (t Trust) Bundle() []Root {
	return slices.DeleteFunc(slices.Clone(t.Roots), func(r Root) bool { return r.State == Gone })
}

// Live says whether the node is waited for.
func (n Node) Live(now time.Time) bool { return n.Connected || now.Before(n.Lease) }

// Has says whether the node, and all proxies on it, have the bundle.
func (n Node) Has(sequence uint64) bool {
	return n.Connected && n.Sequence >= sequence && n.Acknowledged >= n.Streams && (n.Streams == 0 || n.AckSequence >= sequence)
}

// Waiting returns the nodes that keep a root of a bundle from being distributed.
func Waiting(in Inputs, sequence uint64) []Node {
	var waiting []Node
	for _, n := range in.Nodes {
		if n.Live(in.Now) && !n.Has(sequence) {
			waiting = append(waiting, n)
		}
	}
	return waiting
}

// Holders returns the nodes that have something which chains to a root, or may have:
// CAs below first, and then who is not connected.
func Holders(in Inputs, root string) []Node {
	var holders []Node
	for _, n := range in.Nodes {
		if n.Live(in.Now) && (!n.Counted || n.Held[root] > 0) {
			holders = append(holders, n)
		}
	}
	order := func(n Node) int {
		switch {
		case n.Below:
			return 0
		case !n.Connected:
			return 1
		default:
			return 2
		}
	}
	slices.SortStableFunc(holders, func(a, b Node) int { return cmp.Compare(order(a), order(b)) })
	return holders
}

// Next returns what is to be done by itself now, or nil.
func Next(t Trust, in Inputs) *Step {
	if t.Paused {
		return nil
	}
	for _, r := range t.Roots {
		if r.State == Prepared && len(Waiting(in, r.Sequence)) == 0 {
			return &Step{Moves: []Move{r.to(Distributed)}, Why: "every live proxy has acknowledged it"}
		}
	}
	if r, ok := t.find(func(r Root) bool { return r.State == Distributed && r.Automatic }); ok {
		return t.activate(r, "it is in force everywhere")
	}
	for _, r := range t.Roots {
		if r.State != Retiring {
			continue
		}
		if why := r.over(in); why != "" {
			return &Step{Moves: []Move{r.to(Gone)}, Why: why}
		}
	}
	if a, ok := t.Active(); ok && !a.Foreign && !in.Now.Before(in.Policy.PrepareAt(a.NotAfter)) && len(t.Bundle()) < MaxRoots {
		if _, ok := t.Next(); !ok {
			return &Step{Prepare: true, Automatic: true, Why: "root " + a.ID + " ends at " + stamp(a.NotAfter)}
		}
	}
	return nil
}

// over says why a retiring root may leave; "" if it may not.
func (r Root) over(in Inputs) string {
	if !in.Now.Before(r.NotAfter) {
		return "it has expired"
	}
	if horizon, ok := in.Horizons[r.ID]; !ok || in.Now.After(horizon) {
		return "nothing that lives chains to it"
	}
	if since, ok := in.Drained[r.ID]; r.Tainted && ok && in.Now.Sub(since) >= in.Policy.Drain {
		return "no node has an X.509-SVID that chains to it"
	}
	return ""
}

// PrepareAt is when the successor of a root that ends at notAfter has to be made:
// so early that, after everybody has had time to acknowledge it, an intermediate
// of the old one would still live fully.
func (p Policy) PrepareAt(notAfter time.Time) time.Time {
	lead := min(max(p.IntermediateLife, p.RootLife/10), (p.RootLife-p.IntermediateLife)/2)
	return notAfter.Add(-p.IntermediateLife - lead)
}

// UntilDue is when Next has to be asked again though nothing has been heard.
func UntilDue(t Trust, in Inputs) time.Time {
	due := in.Now.Add(time.Hour)
	sooner := func(at time.Time) {
		if at.After(in.Now) && at.Before(due) {
			due = at
		}
	}
	for _, r := range t.Roots {
		switch r.State {
		case Prepared:
			for _, n := range Waiting(in, r.Sequence) {
				sooner(n.Lease)
			}
		case Active:
			sooner(in.Policy.PrepareAt(r.NotAfter))
		case Retiring:
			sooner(r.NotAfter)
			sooner(in.Horizons[r.ID].Add(time.Second))
			if since, ok := in.Drained[r.ID]; ok && r.Tainted {
				sooner(since.Add(in.Policy.Drain))
			}
		case Distributed, Gone:
		}
	}
	return due
}

func (r Root) to(s State) Move {
	return Move{ID: r.ID, To: s, Tainted: r.Tainted, Automatic: r.Automatic}
}

// activate has r sign, and the one that does retire.
func (t Trust) activate(r Root, why string) *Step {
	s := &Step{Moves: []Move{r.to(Active)}, Renew: true, Why: why}
	s.Moves[0].Automatic = false
	if a, ok := t.Active(); ok {
		s.Moves = append(s.Moves, a.to(Retiring))
	}
	return s
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Names lists at most three nodes for people, with what each is waited for.
func Names(nodes []Node) string {
	var b strings.Builder
	for i, n := range nodes {
		if i == 3 {
			fmt.Fprintf(&b, " and %d more", len(nodes)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(n.ID)
		switch {
		case !n.Connected:
			fmt.Fprintf(&b, " (not connected, waited for until %s)", stamp(n.Lease))
		case n.Below && n.WaitsFor != "":
			fmt.Fprintf(&b, " (a CA below, which waits for %s)", n.WaitsFor)
		case n.Below:
			b.WriteString(" (a CA below)")
		case len(n.Laggards) > 0:
			l := n.Laggards[0]
			fmt.Fprintf(&b, " (%s has bundle %d, since %s)", l.Name, l.Acknowledged, stamp(l.Since))
			if len(n.Laggards) > 1 {
				fmt.Fprintf(&b, " and %d more streams", len(n.Laggards)-1)
			}
		}
	}
	return b.String()
}

// Stalled says what a root waits for, if it has for longer than the policy has
// patience, or what nobody but an operator will change; "" if all is well.
func Stalled(t Trust, in Inputs) string {
	for _, r := range t.Roots {
		if r.State != Prepared || in.Now.Sub(r.Since) < in.Policy.StalledAfter {
			continue
		}
		if waiting := Waiting(in, r.Sequence); len(waiting) > 0 {
			return fmt.Sprintf("root %s has waited since %s for %d nodes: %s", r.ID, stamp(r.Since), len(waiting), Names(waiting))
		}
	}
	if a, ok := t.Active(); ok && a.Tainted {
		switch _, replaced := t.Next(); {
		case !replaced:
			return fmt.Sprintf("root %s signs though it is tainted, and has no successor: ca authority rotate root", a.ID)
		case t.Paused:
			return fmt.Sprintf("root %s signs though it is tainted, and its rotation is paused: ca authority resume", a.ID)
		}
	}
	if a, ok := t.Active(); ok && t.Paused && !in.Now.Before(in.Policy.PrepareAt(a.NotAfter)) {
		return fmt.Sprintf("root %s ends at %s, and its rotation is paused: ca authority resume", a.ID, stamp(a.NotAfter))
	}
	return ""
}
