package attesttest

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
)

// WorkloadConfig describes a workload attestor to Workload.
type WorkloadConfig struct {
	// Attestor returns the attestor to be tested.
	Attestor func(t *testing.T) attest.WorkloadAttestor
	// Mine starts a process that the attestor knows and returns it, and what
	// ends it. Both are called from the test's goroutine.
	Mine func(t *testing.T) (p *peer.Peer, end func())
	// Foreign starts a process that is not of the attestor's kind; nil if there
	// is none.
	Foreign func(t *testing.T) *peer.Peer
}

// Workload checks a workload attestor.
func Workload(t *testing.T, c WorkloadConfig) {
	t.Run("Attests", func(t *testing.T) {
		a := c.Attestor(t)
		p, _ := c.Mine(t)
		want := attested(t, a, p)
		if a.Name() == "" || !strings.HasPrefix(want.Instance, a.Name()+":") || want.Rank <= 0 {
			t.Errorf("attestor %q names the instance %q with rank %d", a.Name(), want.Instance, want.Rank)
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				got, err := a.Attest(t.Context(), p)
				if err != nil {
					t.Error(err)
					return
				}
				if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
					t.Errorf("facts of one process differ (-first +later):\n%s", diff)
				}
			})
		}
		wg.Wait()
	})
	t.Run("OwnFieldOnly", func(t *testing.T) {
		a := c.Attestor(t)
		p, _ := c.Mine(t)
		f := attested(t, a, p)
		n := 0
		m := f.Workload.ProtoReflect()
		for i := range m.Descriptor().Fields().Len() {
			if m.Has(m.Descriptor().Fields().Get(i)) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("sets %d fields of the workload, want its own", n)
		}
	})
	t.Run("Ended", func(t *testing.T) {
		a := c.Attestor(t)
		p, end := c.Mine(t)
		attested(t, a, p)
		end()
		<-p.Done()
		fails(t, a, p, peer.ErrGone)
	})
	t.Run("Closed", func(t *testing.T) {
		a := c.Attestor(t)
		p, _ := c.Mine(t)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		fails(t, a, p, peer.ErrGone)
	})
	t.Run("Foreign", func(t *testing.T) {
		if c.Foreign == nil {
			t.Skip("each process is of its kind")
		}
		fails(t, c.Attestor(t), c.Foreign(t), attest.ErrNotMine)
	})
	t.Run("Cancelled", func(t *testing.T) {
		a := c.Attestor(t)
		p, _ := c.Mine(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if f, err := a.Attest(ctx, p); err != nil && f != nil {
			t.Errorf("facts %v with the error %v", f, err)
		}
		attested(t, a, p) // and nobody else suffers
	})
}

// attested returns the facts of a process that the attestor knows.
func attested(t *testing.T, a attest.WorkloadAttestor, p *peer.Peer) *attest.Facts {
	t.Helper()
	f, err := a.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// fails wants an error and no facts.
func fails(t *testing.T, a attest.WorkloadAttestor, p *peer.Peer, want error) {
	t.Helper()
	f, err := a.Attest(t.Context(), p)
	if !errors.Is(err, want) {
		t.Errorf("error %v, want one that wraps %q", err, want)
	}
	if f != nil {
		t.Errorf("facts %v with the error %v", f, err)
	}
}

// Sleeper starts a program that is sleep, and opens its process, which ends with end or
// with the test.
func Sleeper(t testing.TB, program string) (p *peer.Peer, end func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := peer.Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	t.Cleanup(func() { end(); _ = p.Close() })
	return p, end
}
