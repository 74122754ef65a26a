// Package docker answers "which container is this process in, and what does the
// Docker engine say of it?"
//
// Package container finds the container of a process, and confirms it: what this
// package adds is what the engine says.
//
//  1. load.go: the engine is asked for a container that is not known yet: its init
//     process and its facts.
//  2. follow.go: the index is kept from the engine's event stream, so that usually
//     nobody is asked.
//
// The engine's facts about a container do not change while it runs (but its
// name, which the event stream tells), so an index that cannot reach the engine
// stays right: containers that it knows are attested, the others get an error
// that says "try again". Labels that come with the image are kept apart from
// those that were given at `docker run`. Environment variables are never read.
//
// engine.go speaks to the engine over its Unix socket in four calls. The
// engine's own client library would bring some hundred modules for them.
package docker

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// Name is the attestor's name.
const Name = "docker"

// DefaultSocket is where the engine listens.
const DefaultSocket = "/var/run/docker.sock"

// Config of the attestor. The zero value is good.
type Config struct {
	// Socket is the path of the engine's Unix socket; "" means DefaultSocket.
	Socket string `yaml:"socket"`
}

// Attestor attests containers. It is safe for concurrent use.
type Attestor struct {
	engine    *engine
	index     *container.Index
	processes container.Processes
	slots     chan struct{} // one for each container that is being asked for
	logger    *slog.Logger
	metrics   *metrics
}

// New returns the attestor. It does not need the engine to be there yet, and
// Attest works without Watch, only slower.
func New(c Config, logger *slog.Logger, reg prometheus.Registerer) (*Attestor, error) {
	if c.Socket == "" {
		c.Socket = DefaultSocket
	}
	m, err := newMetrics(reg)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	a := &Attestor{
		engine:    newEngine(c.Socket, m),
		processes: container.Kernel{},
		slots:     make(chan struct{}, maxLoads),
		logger:    logger,
		metrics:   m,
	}
	a.index = container.NewIndex(a.load, m.containers)
	return a, nil
}

// Name returns "docker".
func (*Attestor) Name() string { return Name }

// Close forgets all containers and closes idle connections to the engine. Watch
// has returned before.
func (a *Attestor) Close() error {
	a.engine.close()
	return a.index.Close()
}

// Attest returns the facts about p's container, or attest.ErrNotMine if p is in
// none of this engine's. The facts must not be modified.
func (a *Attestor) Attest(ctx context.Context, p *peer.Peer) (*attest.Facts, error) {
	memberships, err := container.Read(a.processes, p)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	c, err := a.index.Find(ctx, p, memberships)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	return &attest.Facts{Workload: c.Workload, Instance: c.Instance, Rank: attest.RankContainer}, nil
}
