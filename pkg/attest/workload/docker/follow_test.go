package docker

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/meshid/meshid/pkg/attest/workload/container"
	"github.com/meshid/meshid/test/fakes/containers"
)

func TestWatch(t *testing.T) {
	w := newWorld(t)
	_, endA := w.container("A", v2("/docker/"+id("A")), nil)
	events := w.watch()
	e := next(t, events)
	if e.Instance != "docker:"+id("A") || e.Ended || e.Workload.GetDocker().GetName() != "A" {
		t.Errorf("first event %v", e)
	}
	initB, endB := w.container("B", v2("/docker/"+id("B")), nil)
	if e := next(t, events); e.Instance != "docker:"+id("B") || e.Ended {
		t.Errorf("event %v, want B's start", e)
	}
	// It is known before it asks.
	before := w.engine.count("inspect")
	if _, err := w.attestor.Attest(t.Context(), initB); err != nil {
		t.Error(err)
	}
	if n := w.engine.count("inspect"); n != before {
		t.Errorf("%d more calls", n-before)
	}
	if n := testutil.ToFloat64(w.attestor.metrics.connected); n != 1 {
		t.Errorf("connected is %v", n)
	}

	endA() // before the engine says so
	if e := next(t, events); e.Instance != "docker:"+id("A") || !e.Ended || e.Workload != nil {
		t.Errorf("event %v, want A's end", e)
	}
	w.engine.die(id("A"))

	// Renamed: the same run, with another name.
	w.engine.set(func() {
		w.engine.containers[id("B")].Name = "B2"
		w.engine.emit("rename", id("B"))
	})
	if e := next(t, events); e.Ended || e.Workload.GetDocker().GetName() != "B2" {
		t.Errorf("event %v, want B's new name", e)
	}
	if f, err := w.attestor.Attest(t.Context(), initB); err != nil || f.Workload.GetDocker().GetName() != "B2" {
		t.Errorf("facts %v, error %v", f, err)
	}

	// Restarted: ended, then there again.
	endB()
	w.engine.die(id("B"))
	w.container("B", v2("/docker/"+id("B")), nil)
	if e := next(t, events); e.Instance != "docker:"+id("B") || !e.Ended {
		t.Errorf("event %v, want B's end", e)
	}
	if e := next(t, events); e.Instance != "docker:"+id("B") || e.Ended {
		t.Errorf("event %v, want B's start", e)
	}
}

// F49: the engine is restarted; what happened meanwhile is told, and nothing
// else.
func TestV_D13_EngineRestarts(t *testing.T) {
	w := newWorld(t)
	initA, _ := w.container("A", v2("/docker/"+id("A")), nil)
	_, endB := w.container("B", v2("/docker/"+id("B")), nil)
	w.container("C", v2("/docker/"+id("C")), nil)
	events := w.watch()
	for range 3 {
		if e := next(t, events); e.Ended {
			t.Errorf("event %v", e)
		}
	}
	w.engine.stop()
	if _, err := w.attestor.Attest(t.Context(), initA); err != nil {
		t.Errorf("a known container while the engine is away: %v", err)
	}
	endB() // seen at once, without the engine
	if e := next(t, events); !e.Ended || e.Instance != "docker:"+id("B") {
		t.Errorf("event %v, want B's end", e)
	}
	w.engine.set(func() { // C is lost, D is new, and no event is remembered
		w.engine.containers[id("B")].Running = false
		w.engine.containers[id("C")].Running = false
	})
	w.container("D", v2("/docker/"+id("D")), nil)
	w.engine.set(func() { w.engine.log = nil })
	w.engine.listen(t)
	got := map[string]bool{}
	for range 2 {
		e := next(t, events)
		got[e.Instance] = e.Ended
	}
	if diff := cmp.Diff(map[string]bool{"docker:" + id("C"): true, "docker:" + id("D"): false}, got); diff != "" {
		t.Errorf("after the restart (-want +got):\n%s", diff)
	}
	// The stream breaks, and events repeat: nothing is told twice.
	w.engine.drop()
	w.container("E", v2("/docker/"+id("E")), nil)
	if e := next(t, events); e.Instance != "docker:"+id("E") {
		t.Errorf("event %v, want E's start", e)
	}
	select {
	case e := <-events:
		t.Errorf("one event more: %v", e)
	default:
	}
}

// One container that cannot be attested does not stop the others.
func TestWatchGoesOn(t *testing.T) {
	w := newWorld(t)
	w.container("bad", v2("/"), nil)
	w.container("big", v2("/docker/"+id("big")), func(c *fakeContainer) { c.Labels = map[string]string{"x": strings.Repeat("x", maxLabels+1)} })
	w.container("good", v2("/docker/"+id("good")), nil)
	events := w.watch()
	if e := next(t, events); e.Instance != "docker:"+id("good") {
		t.Errorf("event %v", e)
	}
	w.container("worse", v2("/"), nil)
	w.container("better", v2("/docker/"+id("better")), nil)
	if e := next(t, events); e.Instance != "docker:"+id("better") {
		t.Errorf("event %v", e)
	}
}

// The engine is not there yet when the agent starts.
func TestWatchWaitsForTheEngine(t *testing.T) {
	w := newWorld(t)
	w.engine.stop()
	w.container("A", v2("/docker/"+id("A")), nil)
	events := w.watch()
	for testutil.ToFloat64(w.attestor.metrics.calls.WithLabelValues(string(callEvents), outcomeError)) < 2 {
		runtime.Gosched()
	}
	w.engine.listen(t)
	if e := next(t, events); e.Instance != "docker:"+id("A") || e.Ended {
		t.Errorf("event %v", e)
	}
}

// I8: many containers come and go; each is told once, and nothing is left over.
func TestV_I8_Churn(t *testing.T) {
	w := newWorld(t)
	events := w.watch()
	const n = 60
	ends := make([]func(), n)
	for i := range n {
		name := fmt.Sprint("c", i)
		_, ends[i] = w.container(name, v2("/docker/"+id(name)), nil)
	}
	started := containers.Started(t, events, n)
	for _, end := range ends {
		end()
	}
	containers.Ended(t, events, started)
	if c := len(w.attestor.index.All()); c != 0 {
		t.Errorf("%d containers in the index", c)
	}
	if c := testutil.ToFloat64(w.attestor.metrics.containers); c != 0 {
		t.Errorf("%v containers counted", c)
	}
}

func TestParseEvent(t *testing.T) {
	for line, want := range map[string]change{
		`{"Type":"container","Action":"start","Actor":{"ID":"` + id("A") + `"}}`:          {actionStart, id("A")},
		`{"Type":"container","Action":"die","Actor":{"ID":"` + id("A") + `"},"x":[1]}`:    {actionDie, id("A")},
		`{"Type":"image","Action":"start","Actor":{"ID":"` + id("A") + `"}}`:              {},
		`{"Type":"container","Action":"exec_start: sh","Actor":{"ID":"` + id("A") + `"}}`: {},
		`{"Type":"container","Action":"start","Actor":{"ID":"web"}}`:                      {},
		`{"Type":"container","Action":"start"}`:                                           {},
		`{}`:                                                                              {},
	} {
		got, ok, err := parseEvent([]byte(line))
		if err != nil || got != want || ok != (want != change{}) {
			t.Errorf("%s: %v, %v, %v", line, got, ok, err)
		}
	}
	if _, _, err := parseEvent([]byte("{")); err == nil {
		t.Error("half an event is accepted")
	}
}

// An event that is too long is an error, and no reason to use more memory.
func TestEventTooLong(t *testing.T) {
	w := newWorld(t)
	w.engine.set(func() { w.engine.raw["/events"] = strings.Repeat("x", 2*maxEvent) + "\n" })
	s, err := w.attestor.engine.events(t.Context(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if c, err := s.next(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("event %v, error %v", c, err)
	}
}

func FuzzEvent(f *testing.F) {
	f.Add([]byte(`{"Type":"container","Action":"start","Actor":{"ID":"` + id("A") + `"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, ok, err := parseEvent(b); ok && (err != nil || !container.IsID(c.id)) {
			t.Errorf("%v, %v", c, err)
		}
	})
}
