package docker

import (
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// The engine finds containers by name and by the beginning of their id too.
func TestEngineAnswersWithAnother(t *testing.T) {
	w := newWorld(t)
	w.container("A", v2("/docker/"+id("A")), nil)
	w.engine.set(func() { w.engine.containers[id("alias")] = w.engine.containers[id("A")] })
	if _, err := w.attestor.engine.inspectContainer(t.Context(), id("alias")); !errors.Is(err, container.ErrNotFound) {
		t.Errorf("error %v", err)
	}
	for _, name := range []string{"", "web", id("A")[:12], "../images/x", id("A") + "/json?x=", strings.ToUpper(id("Z"))} {
		if _, err := w.attestor.engine.inspectContainer(t.Context(), name); err == nil || errors.Is(err, container.ErrNotFound) {
			t.Errorf("%q: error %v", name, err)
		}
	}
}

// D13: an engine that hangs costs two seconds and an error that says so; what is
// known goes on.
func TestV_D13_EngineHangs(t *testing.T) {
	w := newWorld(t)
	w.attestor.engine.timeout = 50 * time.Millisecond
	known, _ := w.container("known", v2("/docker/"+id("known")), nil)
	before, err := w.attestor.Attest(t.Context(), known)
	if err != nil {
		t.Fatal(err)
	}
	hang := make(chan struct{})
	w.engine.set(func() { w.engine.hang = hang })
	fresh, _ := w.container("fresh", v2("/docker/"+id("fresh")), nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			f, err := w.attestor.Attest(t.Context(), fresh)
			if !errors.Is(err, errUnreachable) || errors.Is(err, attest.ErrNotMine) || !strings.Contains(err.Error(), "try again") {
				t.Errorf("facts %v, error %v", f, err)
			}
		})
	}
	wg.Wait()
	after, err := w.attestor.Attest(t.Context(), known)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after, protocmp.Transform()); diff != "" {
		t.Errorf("facts of a known container changed:\n%s", diff)
	}
	close(hang)
	w.engine.set(func() { w.engine.hang = nil })
	if _, err := w.attestor.Attest(t.Context(), fresh); err != nil {
		t.Errorf("when the engine goes on: %v", err)
	}
}

// D13: an engine that is gone, answers nonsense or half of it.
func TestV_D13_EngineAnswersNonsense(t *testing.T) {
	w := newWorld(t)
	init, _ := w.container("A", v2("/docker/"+id("A")), nil)
	good, err := json.Marshal(map[string]any{"Id": id("A"), "Image": "sha256:x", "State": map[string]any{"Running": true, "Pid": init.PID}})
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{
		"garbage":       "<html>",
		"half":          string(good[:len(good)/2]),
		"list":          "[]",
		"other":         `{"Id":"` + id("B") + `","State":{"Running":true,"Pid":1}}`,
		"empty object":  `{}`,
		"no image":      strings.Replace(string(good), "sha256:x", "", 1),
		"negative pid":  `{"Id":"` + id("A") + `","State":{"Running":true,"Pid":-1}}`,
		"pid is a text": `{"Id":"` + id("A") + `","State":{"Running":true,"Pid":"1"}}`,
		"deep":          strings.Repeat(`{"Config":`, 100000),
	} {
		t.Run(name, func(t *testing.T) {
			w.engine.set(func() { w.engine.raw["/containers/"+id("A")+"/json"] = raw })
			w.attestor.index.Forget(id("A"))
			if f, err := w.attestor.Attest(t.Context(), init); err == nil {
				t.Errorf("facts %v", f)
			}
		})
	}
	w.engine.stop()
	w.attestor.index.Forget(id("A"))
	if f, err := w.attestor.Attest(t.Context(), init); !errors.Is(err, errUnreachable) {
		t.Errorf("engine gone: facts %v, error %v", f, err)
	}
}

func FuzzInspect(f *testing.F) {
	f.Add([]byte(`{"Id":"x","State":{"Running":true,"Pid":1,"StartedAt":"2026-01-02T03:04:05.6Z"},"Config":{"Labels":{"a":"b"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var i inspected
		if json.Unmarshal(b, &i) != nil {
			return
		}
		if checkLabels(i.Config.Labels) != nil {
			return
		}
		for k, v := range ownLabels(i.Config.Labels, nil) {
			if i.Config.Labels[k] != v {
				t.Errorf("label %q", k)
			}
		}
	})
}
