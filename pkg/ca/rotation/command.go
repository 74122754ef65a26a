package rotation

import (
	"errors"
	"fmt"
)

// ErrRefused is wrapped when a command would break something; its error says
// what, and how to insist where that is possible.
var ErrRefused = errors.New("refused")

// Verb is what an operator wants.
type Verb string

// Verbs.
const (
	// VerbPrepare makes a root and publishes it; it waits for Activate.
	VerbPrepare Verb = "prepare"
	// VerbRotate is both, prepare and activate, as soon as that is safe.
	VerbRotate Verb = "rotate"
	// VerbActivate has the next root sign.
	VerbActivate Verb = "activate"
	// VerbTaint has all that a root signed replaced, by its successor.
	VerbTaint Verb = "taint"
	// VerbRetire takes a root out of the bundle.
	VerbRetire Verb = "retire"
	// VerbRollback undoes a rotation that is under way.
	VerbRollback Verb = "rollback"
	// VerbPause keeps anything from happening by itself, until VerbResume.
	VerbPause  Verb = "pause"
	VerbResume Verb = "resume"
)

// Command is what an operator asks for.
type Command struct {
	Verb Verb
	// Root is its id; empty for the only one that can be meant.
	Root string
	// Override accepts that somebody may be cut off. It is recorded.
	Override bool
}

// Do returns the step that carries out a command. The error wraps ErrRefused.
func Do(t Trust, in Inputs, c Command) (*Step, error) {
	switch c.Verb {
	case VerbPause:
		if t.Paused {
			return nil, refuse("it is paused already")
		}
		return &Step{Pause: true, Why: "paused"}, nil
	case VerbResume:
		if !t.Paused {
			return nil, refuse("it is not paused")
		}
		return &Step{Resume: true, Why: "resumed"}, nil
	case VerbPrepare, VerbRotate:
		return t.prepare(in, c.Verb == VerbRotate)
	case VerbActivate:
		return t.command(in, c)
	case VerbTaint:
		return t.taint(in, c.Root)
	case VerbRetire:
		return t.retire(in, c)
	case VerbRollback:
		return t.rollback()
	default:
		return nil, refuse(fmt.Sprintf("there is no command %q", c.Verb))
	}
}

func refuse(why string) error { return fmt.Errorf("%w: %s", ErrRefused, why) }

func (t Trust) prepare(in Inputs, automatic bool) (*Step, error) {
	if next, ok := t.Next(); ok {
		if automatic && !next.Automatic {
			m := next.to(next.State)
			m.Automatic = true
			return &Step{Moves: []Move{m}, Why: "to be activated when it is distributed"}, nil
		}
		return nil, refuse(fmt.Sprintf("root %s is %s already: activate it, or roll it back first", next.ID, next.State))
	}
	if err := t.room(in); err != nil {
		return nil, err
	}
	return &Step{Prepare: true, Automatic: automatic, Why: "by command"}, nil
}

// room says why there is none in the bundle.
func (t Trust) room(in Inputs) error {
	if len(t.Bundle()) < MaxRoots {
		return nil
	}
	for _, r := range t.Bundle() {
		if r.State == Retiring {
			return refuse(fmt.Sprintf("the bundle has %d roots, and %s: wait, or insist: ca authority retire %s --override", MaxRoots, r.dependents(in), r.ID))
		}
	}
	return refuse(fmt.Sprintf("the bundle has %d roots: retire one first", MaxRoots))
}

// dependents says who still chains to a root.
func (r Root) dependents(in Inputs) string {
	horizon, ok := in.Horizons[r.ID]
	if !ok || in.Now.After(horizon) {
		return "nothing that lives chains to root " + r.ID
	}
	var holders []Node
	count := uint64(0)
	for _, n := range in.Nodes {
		if n.Held[r.ID] > 0 && n.Live(in.Now) {
			holders = append(holders, Node{ID: n.ID, Connected: true})
			count += uint64(n.Held[r.ID])
		}
	}
	text := fmt.Sprintf("X.509-SVIDs that chain to root %s live until %s", r.ID, stamp(horizon))
	if len(holders) > 0 {
		text += fmt.Sprintf(", %d of them in use on %s", count, Names(holders))
	}
	return text
}

func (t Trust) command(in Inputs, c Command) (*Step, error) {
	r, ok := t.Next()
	if c.Root != "" {
		r, ok = t.get(c.Root)
	}
	switch {
	case !ok:
		return nil, refuse("there is no such root to activate: prepare one first")
	case r.State == Active:
		return nil, refuse("root " + r.ID + " is active already")
	case r.Tainted:
		return nil, refuse("root " + r.ID + " is tainted")
	case r.State == Retiring:
		return nil, refuse("root " + r.ID + " is retiring: roll back to make it active again")
	case !in.Now.Before(r.NotAfter):
		return nil, refuse("root " + r.ID + " has expired")
	case r.State == Distributed:
		return t.activate(r, "by command"), nil
	}
	waiting := Waiting(in, r.Sequence)
	if len(waiting) == 0 {
		return t.activate(r, "by command"), nil
	}
	text := fmt.Sprintf("%d nodes have not acknowledged root %s: %s", len(waiting), r.ID, Names(waiting))
	if !c.Override {
		return nil, refuse(text + ": wait, or cut them off with --override")
	}
	return t.activate(r, "override: "+text), nil
}

func (t Trust) taint(in Inputs, id string) (*Step, error) {
	r, ok := t.Active()
	if id != "" {
		r, ok = t.get(id)
	}
	_, succeeded := t.Next()
	switch {
	case !ok:
		return nil, refuse("there is no such root")
	case r.Tainted && r.State == Active && !succeeded:
		// It was rolled back: a successor is made again.
	case r.Tainted:
		return nil, refuse("root " + r.ID + " is tainted already")
	}
	tainted := r.to(r.State)
	tainted.Tainted, tainted.Automatic = true, false
	switch r.State {
	case Prepared, Distributed:
		tainted.To = Gone // nothing chains to it
		return &Step{Moves: []Move{tainted}, Why: "tainted before it was used"}, nil
	case Retiring:
		return &Step{Moves: []Move{tainted}, Renew: true, Why: "tainted"}, nil
	case Active, Gone:
	}
	next, ok := t.Next()
	switch {
	case !ok:
		if err := t.room(in); err != nil {
			return nil, err
		}
		return &Step{Moves: []Move{tainted}, Prepare: true, Automatic: true, Why: "tainted"}, nil
	case next.State == Distributed:
		s := t.activate(next, "root "+r.ID+" is tainted")
		s.Moves[1].Tainted = true
		return s, nil
	default:
		m := next.to(next.State)
		m.Automatic = true
		return &Step{Moves: []Move{tainted, m}, Why: "tainted"}, nil
	}
}

func (t Trust) retire(in Inputs, c Command) (*Step, error) {
	r, ok := t.find(func(r Root) bool { return r.State == Retiring })
	if c.Root != "" {
		r, ok = t.get(c.Root)
	}
	switch {
	case !ok:
		return nil, refuse("there is no such root to retire")
	case r.State == Active:
		return nil, refuse("root " + r.ID + " signs: activate another one first")
	case r.State == Prepared || r.State == Distributed:
		return &Step{Moves: []Move{r.to(Gone)}, Why: "by command, unused"}, nil
	}
	if why := r.over(in); why != "" {
		return &Step{Moves: []Move{r.to(Gone)}, Why: "by command: " + why}, nil
	}
	text := r.dependents(in)
	if !c.Override {
		return nil, refuse(text + ": wait, or cut them off with --override")
	}
	return &Step{Moves: []Move{r.to(Gone)}, Why: "override: " + text}, nil
}

func (t Trust) rollback() (*Step, error) {
	if next, ok := t.Next(); ok {
		return &Step{Moves: []Move{next.to(Gone)}, Why: "rolled back before it was used"}, nil
	}
	var last Root
	for _, r := range t.Roots {
		if r.State == Retiring && !r.Tainted && r.Since.After(last.Since) {
			last = r
		}
	}
	a, ok := t.Active()
	if last.ID == "" || !ok {
		return nil, refuse("there is no rotation to roll back")
	}
	return &Step{Moves: []Move{last.to(Active), a.to(Retiring)}, Renew: true, Why: "rolled back"}, nil
}

// Announce returns the step for a root that an upstream CA signs with, or will; nil
// if it is in the bundle already.
func Announce(t Trust, in Inputs, id string, automatic bool) (*Step, error) {
	if _, ok := t.get(id); ok {
		return nil, nil //nolint:nilnil // said in the comment
	}
	if err := t.room(in); err != nil {
		return nil, err
	}
	return &Step{Prepare: true, Automatic: automatic, Why: "announced by the upstream CA"}, nil
}

// Switch returns the step for a root of an upstream CA with which it signs now; the
// error wraps ErrRefused if it may not be used yet.
func Switch(t Trust, id string) (*Step, error) {
	r, ok := t.get(id)
	switch {
	case !ok:
		return nil, refuse("root " + id + " is not in the bundle")
	case r.Tainted:
		return nil, refuse("root " + id + " is tainted")
	case r.State == Prepared:
		return nil, refuse("root " + id + " is not in force everywhere yet")
	case r.State == Active:
		return nil, nil //nolint:nilnil // nothing is to be done
	}
	return t.activate(r, "the upstream CA signs with it"), nil
}

// Apply returns t after a step. The root that Prepare makes is added by the
// caller.
func (t Trust) Apply(s *Step, in Inputs) Trust {
	next := Trust{Paused: (t.Paused || s.Pause) && !s.Resume}
	for _, r := range t.Roots {
		for _, m := range s.Moves {
			if m.ID == r.ID && r.State != Gone {
				if r.State != m.To {
					r.State, r.Since = m.To, in.Now
				}
				r.Tainted, r.Automatic = m.Tainted, m.Automatic
			}
		}
		next.Roots = append(next.Roots, r)
	}
	return next
}
