// Package docker answers "which container is this process in, and what does the
// Docker engine say of it?"
//
// The path of one answer, in the order of this package's files:
//
//  1. cgroup.go: the process's cgroup paths are read. Container ids in them are
//     candidates and no more: any user to whom a cgroup is delegated, and each
//     container that may write its own, can make a cgroup with another
//     container's id as its name.
//  2. index.go: each candidate is looked up in an index of the engine's running
//     containers, which follow.go keeps from the engine's event stream, so that
//     usually nobody is asked. An unknown one costs one call to the engine.
//  3. container.go: a candidate is confirmed if the process is in or below the
//     cgroup that the runtime made for the container: that of the container's
//     init process, whose pid comes from the engine, and which is held as a
//     pidfd. Of several that are confirmed, the outermost is meant: what is
//     inside of a container's cgroup is the container's own making.
//
// The engine's facts about a container do not change while it runs (but its
// name, which the event stream tells), so an index that cannot reach the engine
// stays right: containers that it knows are attested, the others get an error
// that says "try again". Labels that come with the image are kept apart from
// those that were given at `docker run`. Environment variables are never read.
//
// engine.go speaks to the engine over its Unix socket in five calls. The
// engine's own client library would bring some hundred modules for them.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
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
	index     *index
	processes processes
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
		processes: kernel{},
		logger:    logger,
		metrics:   m,
	}
	a.index = newIndex(a.load, m)
	return a, nil
}

// Name returns "docker".
func (*Attestor) Name() string { return Name }

// Close forgets all containers and closes idle connections to the engine. Watch
// has returned before.
func (a *Attestor) Close() error {
	a.engine.close()
	return a.index.close()
}

// Attest returns the facts about p's container, or attest.ErrNotMine if p is in
// none of this engine's. The facts must not be modified.
func (a *Attestor) Attest(ctx context.Context, p *peer.Peer) (*attest.Facts, error) {
	text, err := a.processes.cgroup(p)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	memberships, err := parseCgroups(text)
	if err != nil {
		return nil, fmt.Errorf("docker: read /proc/%d/cgroup: %w", p.PID, err)
	}
	ids, err := candidates(memberships)
	if err != nil {
		return nil, fmt.Errorf("docker: process %d: %w", p.PID, err)
	}
	c, err := a.confirm(ctx, ids, memberships)
	if err != nil {
		return nil, fmt.Errorf("docker: process %d: %w", p.PID, err)
	}
	// What was read is the process's, and the container's, only if both live.
	if err := errors.Join(p.Alive(), c.alive()); err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	return &attest.Facts{
		Workload: &attributesv1.Workload{Docker: c.facts},
		Instance: c.instance(),
		Rank:     attest.RankContainer,
	}, nil
}

// confirm returns the outermost of the candidates that is confirmed.
func (a *Attestor) confirm(ctx context.Context, ids []string, memberships map[string]string) (*container, error) {
	var outermost *container
	var refused string
	for _, id := range ids {
		c, err := a.index.get(ctx, id)
		switch {
		case errors.Is(err, errNoContainer):
			continue // of another runtime, or invented
		case err != nil:
			return nil, fmt.Errorf("container %s: %w", short(id), err)
		case !c.holds(memberships):
			refused = id
			continue
		case outermost == nil || c.around(outermost):
			outermost = c
		case !outermost.around(c):
			return nil, fmt.Errorf("is in the cgroups of two containers, %s and %s", short(outermost.id), short(c.id))
		}
	}
	switch {
	case outermost != nil:
		return outermost, nil
	case refused != "":
		return nil, fmt.Errorf("its cgroup is named after container %s, but it is not in that container's cgroup", short(refused))
	default:
		return nil, attest.ErrNotMine
	}
}

// short is the form of an id that people know.
func short(id string) string { return id[:min(12, len(id))] }
