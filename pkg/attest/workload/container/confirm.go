package container

import (
	"context"
	"errors"
	"fmt"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
)

// Read returns the cgroup paths of a peer.
func Read(processes Processes, p *peer.Peer) (Memberships, error) {
	text, err := processes.Cgroup(p)
	if err != nil {
		return nil, err
	}
	memberships, err := ParseMemberships(text)
	if err != nil {
		return nil, fmt.Errorf("read /proc/%d/cgroup: %w", p.PID, err)
	}
	return memberships, nil
}

// Find returns the container that a peer with these memberships is in, or
// attest.ErrNotMine if it is in none that the runtime knows. Both the peer and the
// container live when it returns.
func (x *Index) Find(ctx context.Context, p *peer.Peer, memberships Memberships) (*Container, error) {
	ids, err := memberships.Candidates()
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", p.PID, err)
	}
	c, err := x.confirm(ctx, ids, memberships)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", p.PID, err)
	}
	// What was read is the process's, and the container's, only if both live.
	if err := errors.Join(p.Alive(), c.Alive()); err != nil {
		return nil, err
	}
	return c, nil
}

// confirm returns the outermost of the candidates that is confirmed.
func (x *Index) confirm(ctx context.Context, ids []string, memberships Memberships) (*Container, error) {
	var outermost *Container
	var refused string
	for _, id := range ids {
		c, err := x.Get(ctx, id)
		switch {
		case errors.Is(err, ErrNotFound):
			continue // of another runtime, or invented
		case err != nil:
			return nil, fmt.Errorf("container %s: %w", Short(id), err)
		case !c.holds(memberships):
			refused = id
			continue
		case outermost == nil || c.around(outermost):
			outermost = c
		case !outermost.around(c):
			return nil, fmt.Errorf("is in the cgroups of two containers, %s and %s", Short(outermost.ID), Short(c.ID))
		}
	}
	switch {
	case outermost != nil:
		return outermost, nil
	case refused != "":
		return nil, fmt.Errorf("its cgroup is named after container %s, but it is not in that container's cgroup", Short(refused))
	default:
		return nil, attest.ErrNotMine
	}
}
