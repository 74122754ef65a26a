package docker

import (
	"testing"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
	"github.com/meshid/meshid/test/fakes/containers"
	"github.com/meshid/meshid/test/self"
)

// realCgroup also reads the peer's real cgroup file, for the cost of it.
type realCgroup struct{ *containers.Processes }

func (r realCgroup) Cgroup(p *peer.Peer) ([]byte, error) {
	if _, err := (container.Kernel{}).Cgroup(p); err != nil {
		return nil, err
	}
	return r.Processes.Cgroup(p)
}

func BenchmarkAttestWarm(b *testing.B) {
	w := newWorld(b)
	w.attestor.processes = realCgroup{w.processes}
	init, _ := w.container("A", v1("/docker/"+id("A")), nil)
	if _, err := w.attestor.Attest(b.Context(), init); err != nil {
		b.Fatal(err)
	}
	before := self.CPU(b)
	for b.Loop() {
		if _, err := w.attestor.Attest(b.Context(), init); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(self.CPU(b)-before)/float64(b.N), "cpu-ns/op")
}
