package rotation

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the transcripts' answers")

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// world is what a transcript plays in.
type world struct {
	trust    Trust
	in       Inputs
	sequence uint64
	made     int
}

func newWorld() *world {
	return &world{in: Inputs{
		Now: start, Horizons: map[string]time.Time{}, Drained: map[string]time.Time{},
		Policy: Policy{RootLife: 1000 * time.Hour, IntermediateLife: 100 * time.Hour, Drain: time.Minute, StalledAfter: 10 * time.Minute},
	}}
}

// carryOut does what a step says, as a store and a key store would.
func (w *world) carryOut(s *Step) {
	if active, ok := w.trust.Active(); ok {
		w.in.Horizons[active.ID] = w.in.Now.Add(24 * time.Hour)
	}
	before := len(w.trust.Bundle())
	w.trust = w.trust.Apply(s, w.in)
	if s.Prepare {
		w.made++
		w.trust.Roots = append(w.trust.Roots, Root{
			ID: fmt.Sprintf("r%d", w.made), State: Prepared, Since: w.in.Now, Sequence: w.sequence + 1,
			NotAfter: w.in.Now.Add(w.in.Policy.RootLife), Automatic: s.Automatic,
		})
	}
	if s.Prepare || len(w.trust.Bundle()) != before {
		w.sequence++
	}
}

func (s *Step) text() string {
	var parts []string
	for _, m := range s.Moves {
		text := m.ID + " → " + string(m.To)
		if m.Tainted {
			text += " tainted"
		}
		if m.Automatic {
			text += " automatic"
		}
		parts = append(parts, text)
	}
	for _, flag := range []struct {
		set  bool
		name string
	}{{s.Prepare && s.Automatic, "prepare automatic"}, {s.Prepare && !s.Automatic, "prepare"}, {s.Pause, "pause"}, {s.Resume, "resume"}, {s.Renew, "renew"}} {
		if flag.set {
			parts = append(parts, flag.name)
		}
	}
	return strings.Join(parts, ", ") + " (" + s.Why + ")"
}

// run answers one line of a transcript.
func (w *world) run(t *testing.T, line string) string {
	t.Helper()
	fields := strings.Fields(line)
	args := map[string]string{}
	for _, f := range fields[1:] {
		k, v, _ := strings.Cut(f, "=")
		args[k] = v
	}
	duration := func(text string) time.Duration {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		return d
	}
	var out strings.Builder
	step := func(s *Step, err error) {
		switch {
		case err != nil:
			fmt.Fprintf(&out, "  %v\n", err)
		case s == nil:
			out.WriteString("  nothing\n")
		default:
			w.carryOut(s)
			fmt.Fprintf(&out, "  %s\n", s.text())
		}
	}
	switch fields[0] {
	case "root": // the first one
		w.made, w.sequence = 1, 1
		w.trust.Roots = []Root{{ID: "r1", State: Active, Since: w.in.Now, Sequence: 1, NotAfter: w.in.Now.Add(w.in.Policy.RootLife)}}
	case "wait":
		w.in.Now = w.in.Now.Add(duration(fields[1]))
	case "node": // node NAME [gone] streams=2 acked=1@2 lease=4h holds=r1:3
		w.setNode(t, fields[1], args, duration)
	case "horizon":
		w.in.Horizons[fields[1]] = w.in.Now.Add(duration(fields[2]))
	case "drained":
		w.in.Drained[fields[1]] = w.in.Now
	case "next":
		for range 10 {
			s := Next(w.trust, w.in)
			step(s, nil)
			if s == nil {
				break
			}
		}
	case "announce":
		step(Announce(w.trust, w.in, fields[1], args["automatic"] != ""))
	case "switch":
		step(Switch(w.trust, fields[1]))
	case "stalled":
		fmt.Fprintf(&out, "  %q\n", Stalled(w.trust, w.in))
	case "show":
		for _, r := range w.trust.Roots {
			fmt.Fprintf(&out, "  %s %s", r.ID, r.State)
			for _, f := range []struct {
				set  bool
				name string
			}{{r.Tainted, "tainted"}, {r.Automatic, "automatic"}} {
				if f.set {
					out.WriteString(" " + f.name)
				}
			}
			out.WriteString("\n")
		}
		fmt.Fprintf(&out, "  bundle %d of %d roots\n", w.sequence, len(w.trust.Bundle()))
	default:
		_, override := args["override"]
		c := Command{Verb: Verb(fields[0]), Override: override}
		if len(fields) > 1 && fields[1] != "override" {
			c.Root = fields[1]
		}
		step(Do(w.trust, w.in, c))
	}
	w.check(t, line)
	return out.String()
}

func (w *world) setNode(t *testing.T, name string, args map[string]string, duration func(string) time.Duration) {
	t.Helper()
	n := Node{ID: name, Connected: true, Sequence: w.sequence, AckSequence: w.sequence, Lease: w.in.Now.Add(4 * time.Hour), Counted: true}
	if _, gone := args["gone"]; gone {
		n.Connected = false
	}
	if lease, ok := args["lease"]; ok {
		n.Lease = w.in.Now.Add(duration(lease))
	}
	if acked, ok := args["acked"]; ok {
		if _, err := fmt.Sscanf(acked, "%d/%d@%d", &n.Acknowledged, &n.Streams, &n.AckSequence); err != nil {
			t.Fatal(err)
		}
		n.Sequence = n.AckSequence
		if n.Acknowledged < n.Streams {
			n.Laggards = []Laggard{{Name: "spiffe://example.org/late", Acknowledged: n.AckSequence - 1, Since: w.in.Now}}
		}
	}
	if holds, ok := args["holds"]; ok {
		id, count, _ := strings.Cut(holds, ":")
		var held uint32
		if _, err := fmt.Sscan(count, &held); err != nil {
			t.Fatal(err)
		}
		n.Held = map[string]uint32{id: held}
	}
	for i, known := range w.in.Nodes {
		if known.ID == name {
			w.in.Nodes[i] = n
			return
		}
	}
	w.in.Nodes = append(w.in.Nodes, n)
}

// check holds what must always hold.
func (w *world) check(t *testing.T, after string) {
	t.Helper()
	active, next := 0, 0
	for _, r := range w.trust.Roots {
		switch r.State {
		case Active:
			active++
		case Prepared, Distributed:
			next++
		case Retiring, Gone:
		}
	}
	if active != 1 || len(w.trust.Bundle()) > MaxRoots || next > 1 {
		t.Fatalf("after %q: %d active roots, %d to come, %d in the bundle", after, active, next, len(w.trust.Bundle()))
	}
}

// TestTranscripts plays testdata/*.txt: lines that begin with a word are what
// happens, indented ones what the machine answers.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts: ", err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld()
			var got strings.Builder
			for s := bufio.NewScanner(strings.NewReader(string(raw))); s.Scan(); {
				line := s.Text()
				switch {
				case strings.HasPrefix(line, "  "):
				case line == "" || strings.HasPrefix(line, "#"):
					got.WriteString(line + "\n")
				default:
					got.WriteString(line + "\n" + w.run(t, line))
				}
			}
			if *update {
				if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(raw), got.String()); diff != "" {
				t.Errorf("%s; run go test ./pkg/ca/rotation -update, and read what has changed\n%s", path, diff)
			}
		})
	}
}

// Whatever is asked for, in whatever order: one root signs, the bundle has at
// most three, no root leaves while something lives that chains to it unless an
// operator insists, and none signs that a live proxy does not know.
func TestRandomCommands(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		w := newWorld()
		w.run(t, "root")
		w.run(t, "node a")
		var log []string
		for range 80 {
			lines := []string{
				"wait 5m", "wait 30h", "next", "next", "next", "prepare", "rotate", "activate", "taint", "rollback", "retire", "pause", "resume",
				fmt.Sprintf("node a acked=3/3@%d", w.sequence), fmt.Sprintf("node b acked=1/2@%d lease=1h", w.sequence), "node b gone lease=1h",
			}
			line := lines[r.IntN(len(lines))]
			log = append(log, line)
			before, in := w.trust, w.in
			w.run(t, line)
			for i, root := range before.Roots {
				after := w.trust.Roots[i]
				if root.State == Retiring && after.State == Gone && !in.Now.After(in.Horizons[root.ID]) && in.Now.Before(root.NotAfter) {
					t.Fatalf("seed %d: root %s left too early: %v", seed, root.ID, log)
				}
				if root.State == Prepared && after.State == Active && len(Waiting(in, root.Sequence)) > 0 {
					t.Fatalf("seed %d: root %s signs before it is known: %v", seed, root.ID, log)
				}
			}
		}
	}
}

func TestPrepareAt(t *testing.T) {
	for _, p := range []Policy{
		{RootLife: 10 * 365 * 24 * time.Hour, IntermediateLife: 7 * 24 * time.Hour},
		{RootLife: 2 * time.Hour, IntermediateLife: time.Hour},
		{RootLife: 30 * 24 * time.Hour, IntermediateLife: 24 * time.Hour},
	} {
		end := start.Add(p.RootLife)
		at := p.PrepareAt(end)
		if left := end.Sub(at); left <= p.IntermediateLife || !at.After(start) {
			t.Errorf("%+v: %s before its end, %s after it was made", p, left, at.Sub(start))
		}
	}
}

// An old root, that of an upstream CA too, can always be removed, and the refusal
// before that says who still chains to it.
func TestV_L7_OldRootCanBeRemoved(t *testing.T) {
	w := newWorld()
	w.run(t, "root")
	w.trust.Roots[0].Foreign = true
	for _, line := range []string{"node a acked=1/1@1", "rotate", "node a acked=1/1@2 holds=r1:3", "next"} {
		w.run(t, line)
	}
	_, err := Do(w.trust, w.in, Command{Verb: VerbRetire, Root: "r1"})
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "3 of them in use on a") || !strings.Contains(err.Error(), "--override") {
		t.Errorf("the refusal: %v", err)
	}
	step, err := Do(w.trust, w.in, Command{Verb: VerbRetire, Root: "r1", Override: true})
	if err != nil || len(step.Moves) != 1 || step.Moves[0].To != Gone {
		t.Errorf("with override: %+v, %v", step, err)
	}
}
