package k8s

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/config"
)

// newEventWorld is newWorld with a runtime that tells of tasks as containerd does. Nothing
// but events makes anything go.
func newEventWorld(t *testing.T) *world {
	t.Helper()
	usual := [...]backoff.Policy{startBackoff, wantedBackoff, sightBackoff}
	never := backoff.Policy{Base: 1000 * time.Hour, Max: 1000 * time.Hour}
	startBackoff, wantedBackoff, sightBackoff = never, never, never
	t.Cleanup(func() { startBackoff, wantedBackoff, sightBackoff = usual[0], usual[1], usual[2] })
	w := newWorld(t)
	w.attestor.wait = time.Hour
	w.attestor.config.Reconcile = config.Duration(time.Hour)
	w.runtime.set(func() { w.runtime.events = map[chan []byte]bool{} })
	return w
}

// created makes a container as it is when containerd tells of its task: it has not been
// started.
func (w *world) created(name string) (pid int) {
	w.t.Helper()
	init, _ := w.container(name, name, id(name), cgroupOf(name), func(c *fakeContainer) {
		c.pid, c.status.StartedAt, c.status.State = 0, 0, cri.ContainerState_CONTAINER_CREATED
	})
	return init.PID
}

// A container is announced before its program runs, with one question.
func TestWatchEvents(t *testing.T) {
	w := newEventWorld(t)
	events := w.watch()
	until(t, "the runtime and the kubelet have been listed", func() bool { return w.runtime.count("list") >= 2 })

	// The sandbox, by which the kubelet's list is at hand when it is needed.
	w.pod("A", nil, "A")
	sandbox, _ := w.process("0::/kubepods/besteffort/pod" + uid("A") + "/" + id("A-sandbox") + "\n")
	w.tell(taskEvent(id("A-sandbox"), sandbox.PID))
	until(t, "the pod is known", func() bool { return w.attestor.pods.get(uid("A")) != nil })
	polls := w.kubelet.count()
	w.tell(taskEvent(id("A"), w.created("A")))
	if e := next(t, events); e.Instance != "k8s:"+id("A") || e.Ended || e.Workload.GetK8S().GetPodName() != "A" {
		t.Errorf("event %v", e)
	}
	if n := w.runtime.count(id("A")); n != 1 {
		t.Errorf("the runtime was asked %d times", n)
	}
	if n := w.runtime.count(id("A-sandbox")); n != 1 {
		t.Errorf("the runtime was asked %d times about the sandbox", n)
	}
	if n := w.kubelet.count() - polls; n != 0 {
		t.Errorf("the kubelet was asked %d times when the container was made", n)
	}
	p, end := w.process(cgroupOf("A"))
	w.attested(p)
	end()
	if v := testutil.ToFloat64(w.attestor.metrics.watched); v != 0 {
		t.Errorf("%v cgroups are watched beside the events", v)
	}
	until(t, "containers that nobody asks for are forgotten", func() bool {
		w.attestor.wanted.mu.Lock()
		defer w.attestor.wanted.mu.Unlock()
		return len(w.attestor.wanted.byID) == 0
	})
}

// A process that waits for a container that has not been started is served when the event
// comes.
func TestWaitForEvent(t *testing.T) {
	w := newEventWorld(t)
	events := w.watch()
	until(t, "the runtime has been listed", func() bool { return w.runtime.count("list") >= 2 })
	w.pod("A", nil, "A")
	pid := w.created("A")
	p, _ := w.process(cgroupOf("A"))
	attested := make(chan error, 1)
	go func() {
		_, err := w.attestor.Attest(t.Context(), p)
		attested <- err
	}()
	until(t, "the runtime is asked", func() bool { return w.runtime.count(id("A")) >= 1 })
	w.tell(taskEvent(id("A"), pid))
	if err := <-attested; err != nil {
		t.Error(err)
	}
	if e := next(t, events); e.Instance != "k8s:"+id("A") {
		t.Errorf("event %v", e)
	}
}

// What an event says of a process is compared with the kernel, as what the runtime answers.
func TestV_D4_KubernetesEvents(t *testing.T) {
	for name, cgroup := range map[string]string{
		"of no container":      "0::/user.slice\n",
		"of another container": cgroupOf("B"),
		"of another pod":       "0::/kubepods/besteffort/pod" + uid("B") + "/" + id("A") + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newEventWorld(t)
			events := w.watch()
			until(t, "the runtime has been listed", func() bool { return w.runtime.count("list") >= 2 })
			w.pod("A", nil, "A")
			w.pod("B", nil, "B")
			w.created("A")
			other, _ := w.process(cgroup)
			w.tell(taskEvent(id("A"), other.PID))
			until(t, "the runtime is asked", func() bool { return w.runtime.count(id("A")) >= 1 })
			w.tell(taskEvent(id("B"), w.created("B"))) // the next in turn
			if e := next(t, events); e.Instance != "k8s:"+id("B") {
				t.Errorf("event %v", e)
			}
			none(t, events)
			if n := len(w.attestor.index.All()); n != 1 {
				t.Errorf("%d containers are known", n)
			}
		})
	}
}

// F49: the events end with the runtime, and begin again with it. What was made meanwhile
// is found.
func TestFault_F49_Events(t *testing.T) {
	w := newEventWorld(t)
	events := w.watch()
	until(t, "the runtime has been listed", func() bool { return w.runtime.count("list") >= 2 })
	for _, name := range []string{"A", "B", "C"} {
		w.runtime.stop()
		until(t, "no events are followed", func() bool { return testutil.ToFloat64(w.attestor.metrics.events) == 0 })
		w.run(name)
		w.runtime.listen(t)
		if e := next(t, events); e.Instance != "k8s:"+id(name) || e.Ended {
			t.Errorf("event %v", e)
		}
	}
	w.pod("D", nil, "D")
	w.tell(taskEvent(id("D"), w.created("D")))
	if e := next(t, events); e.Instance != "k8s:"+id("D") || e.Ended {
		t.Errorf("event %v", e)
	}
}

// Nonsense is passed over. A container that goes on from a checkpoint has no process yet.
func TestEventsAreChecked(t *testing.T) {
	for name, e := range map[string][]byte{
		"nothing": {}, "cut off": taskEvent(id("A"), 7)[:40], "no message": []byte("\xff\xff"),
		"no id": taskEvent("../etc", 7), "a pid that cannot be": taskEvent(id("A"), maxPID+1), "a negative pid": taskEvent(id("A"), -1),
	} {
		if task, ok := decodeTask(e); ok {
			t.Errorf("%s: %v", name, task)
		}
	}
	task, ok := decodeTask(taskEvent(id("A"), 7))
	if !ok || task.id != id("A") || task.pid != 7 || time.Since(task.made).Abs() > time.Hour {
		t.Errorf("task %v (%v)", task, ok)
	}
	if task, ok := decodeTask(taskEvent(id("A"), 0)); !ok || task.pid != 0 {
		t.Errorf("task %v (%v)", task, ok)
	}
}

func FuzzTask(f *testing.F) {
	f.Add(taskEvent(id("A"), 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		if task, ok := decodeTask(b); ok && (len(task.id) != 64 || task.pid < 0 || task.pid > maxPID) {
			t.Errorf("task %v", task)
		}
	})
}
