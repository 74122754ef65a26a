package docker

import (
	"context"
	"errors"
	"strings"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/attest/workload/container"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// maxLoads bounds the containers that are being asked for at a time.
const maxLoads = 8

// load asks the engine for a container and the kernel for its init process.
func (a *Attestor) load(ctx context.Context, id string) (*container.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	i, err := a.engine.inspectContainer(ctx, id)
	if err != nil {
		return nil, err
	}
	fromImage, err := a.engine.imageLabels(ctx, i.Image)
	if err != nil {
		return nil, err
	}
	init, err := a.processes.Open(i.State.Pid, i.State.StartedAt, id)
	switch {
	case errors.Is(err, peer.ErrGone):
		return nil, container.ErrEnded // the engine has not heard of it yet
	case err != nil:
		return nil, err
	}
	c, err := container.New(id, Name+":"+id, &attributesv1.Workload{Docker: &attributesv1.Docker{
		ContainerId: id,
		Name:        strings.TrimPrefix(i.Name, "/"),
		Image:       i.Config.Image,
		ImageDigest: i.Image,
		Labels:      ownLabels(i.Config.Labels, fromImage),
		ImageLabels: fromImage,
	}}, init)
	if err != nil {
		return nil, errors.Join(err, init.Process.Close())
	}
	return c, nil
}
