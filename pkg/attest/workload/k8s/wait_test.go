package k8s

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/internal/backoff"
)

// A pod that the kubelet does not list yet is waited for, with few questions however
// many wait, and the answer comes when the kubelet has it.
func TestWaitForPod(t *testing.T) {
	w := newWorld(t)
	init, _ := w.container("late", "late", id("late"), cgroupOf("late"), nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			f, err := w.attestor.Attest(t.Context(), init)
			if err != nil || f.Workload.GetK8S().GetPodName() != "late" {
				t.Errorf("facts %v, error %v", f, err)
			}
		})
	}
	until(t, "the kubelet is asked twice", func() bool { return w.kubelet.count() >= 2 })
	w.pod("late", nil, "late")
	wg.Wait()
	if n := w.kubelet.count(); n > 20 {
		t.Errorf("asked the kubelet %d times", n)
	}
}

// A container that is being started is waited for.
func TestWaitForStart(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("A")
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_CREATED })
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Error(err)
		}
	})
	until(t, "the runtime is asked twice", func() bool { return w.runtime.count(id("A")) >= 2 })
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	wg.Wait()
}

// A container that was seen to be made is asked about now and then until a process of it
// waits: that one is not kept waiting for the next time.
func TestWaitForStartIsShort(t *testing.T) {
	usual := startBackoff
	startBackoff = backoff.Policy{Base: 1000 * time.Hour, Max: 1000 * time.Hour}
	t.Cleanup(func() { startBackoff = usual })
	w := newWorld(t)
	w.attestor.wait = time.Hour
	init, _ := w.run("A")
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_CREATED })
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := w.attestor.index.Get(t.Context(), id("A")); err != nil { // as Watch does
			t.Error(err)
		}
	})
	until(t, "the runtime is asked", func() bool { return w.runtime.count(id("A")) >= 1 })
	wg.Go(func() {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Error(err)
		}
	})
	until(t, "the runtime is asked again", func() bool { return w.runtime.count(id("A")) >= 3 })
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	wg.Wait()
	until(t, "no container is waited for any more", func() bool {
		w.attestor.wanted.mu.Lock()
		defer w.attestor.wanted.mu.Unlock()
		return len(w.attestor.wanted.byID) == 0
	})
}

// A process is served although whoever asked first about its container has given up.
func TestWaitForStartOutlivesOthers(t *testing.T) {
	w := newWorld(t)
	w.attestor.wait = time.Hour
	init, _ := w.run("A")
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_CREATED })
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	var first, second sync.WaitGroup
	first.Go(func() {
		if _, err := w.attestor.index.Get(ctx, id("A")); !errors.Is(err, errCreated) {
			t.Errorf("a container that has not been started: %v", err)
		}
	})
	until(t, "the runtime is asked", func() bool { return w.runtime.count(id("A")) >= 1 })
	second.Go(func() {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Error(err)
		}
	})
	until(t, "the process waits", func() bool {
		w.attestor.wanted.mu.Lock()
		defer w.attestor.wanted.mu.Unlock()
		held := w.attestor.wanted.byID[id("A")]
		return held != nil && held.waited
	})
	until(t, "the runtime has said that it was not started", func() bool { return w.runtime.count(id("A")) >= 2 })
	giveUp()
	first.Wait()
	w.runtime.set(func() { w.runtime.containers[id("A")].status.State = cri.ContainerState_CONTAINER_RUNNING })
	second.Wait()
}

// One pod that does not come costs the others nothing.
func TestWaitsAreApart(t *testing.T) {
	w := newWorld(t)
	ghost, _ := w.container("ghost", "ghost", id("ghost"), cgroupOf("ghost"), nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if f, err := w.attestor.Attest(ctx, ghost); err == nil || !strings.Contains(err.Error(), "try again") {
			t.Errorf("facts %v, error %v", f, err)
		}
	})
	until(t, "the kubelet is asked", func() bool { return w.kubelet.count() >= 1 })
	init, _ := w.run("A")
	w.attested(init)
	cancel()
	wg.Wait()
}
