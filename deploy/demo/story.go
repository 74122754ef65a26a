package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/shop/mesh"
)

// rotationTime bounds how long the sidecars may take until all of them serve a
// new certificate; the agents spread their renewals over spread.
const (
	rotationTime = time.Minute
	spread       = 2 * time.Second
)

// story plays what happens to a mesh in a week within a minute, under traffic,
// and fails if one request did.
func story(ctx context.Context, m *mesh.Mesh, out io.Writer) error {
	if err := m.Open(ctx); err != nil {
		return err
	}
	if err := m.Intrude(ctx); err != nil {
		return err
	}
	began := time.Now()
	scenes := []struct {
		title string
		play  func(context.Context, *mesh.Mesh) error
	}{
		{"orders is scaled up to 4", func(ctx context.Context, m *mesh.Mesh) error { return m.Scale(ctx, "orders", 4) }},
		{"all leaves are renewed: ca svid renew", func(ctx context.Context, m *mesh.Mesh) error {
			return m.RotateAll(ctx, rotationTime, m.Renew(spread))
		}},
		{"the intermediate is replaced: ca authority rotate", func(ctx context.Context, m *mesh.Mesh) error {
			return m.RotateAll(ctx, rotationTime, m.RotateIntermediate(spread))
		}},
		{"the node agent is killed (SIGKILL), and started again", restartAgent},
		{"the CA is killed (SIGKILL), and started again", restartCA},
		{"orders is scaled down to 1; the keys of the others are dropped", func(ctx context.Context, m *mesh.Mesh) error { return m.Scale(ctx, "orders", 1) }},
	}
	for _, s := range scenes {
		fmt.Fprintf(out, "• %s", s.title)
		at := time.Now()
		err := s.play(ctx, m)
		fmt.Fprintf(out, " (%.1f s)\n", time.Since(at).Seconds())
		if err != nil {
			return fmt.Errorf("%s: %w", s.title, err)
		}
		if err := m.Sell(ctx, 100); err != nil {
			return err
		}
	}
	view, err := render(ctx, m)
	if err != nil {
		return err
	}
	fmt.Fprint(out, view)
	return figures(ctx, m, out, time.Since(began))
}

func restartAgent(ctx context.Context, m *mesh.Mesh) error {
	m.Agent.Kill()
	if err := m.Sell(ctx, 100); err != nil { // the sidecars go on without it
		return err
	}
	if err := m.Agent.Start(); err != nil {
		return err
	}
	return m.AwaitAgent(ctx)
}

func restartCA(ctx context.Context, m *mesh.Mesh) error {
	m.CA.Kill()
	if err := m.Sell(ctx, 100); err != nil {
		return err
	}
	if err := m.CA.Start(); err != nil {
		return err
	}
	if err := m.AwaitCA(ctx); err != nil {
		return err
	}
	return m.AwaitAgent(ctx)
}

// figures prints what it came to; it is an error if a request failed, a secret
// was refused by Envoy, or an intruder got in.
func figures(ctx context.Context, m *mesh.Mesh, out io.Writer, took time.Duration) error {
	f, err := m.Figures(ctx)
	if err != nil {
		return err
	}
	status, err := m.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	var gotIn, tries uint64
	for _, name := range mesh.Intruders {
		for _, i := range m.Instances(name) {
			attempts, err := i.Attempts(ctx)
			if err != nil {
				return err
			}
			for _, a := range attempts {
				gotIn += a.GotIn
				tries += a.Tries
			}
		}
	}
	fmt.Fprintf(out, "\nfigures of %.0f seconds, counted by the customer, by the sidecars and by the CA\n\n", took.Seconds())
	for _, row := range []struct {
		name string
		n    uint64
	}{
		{"requests, each through three mutual TLS hops", f.Requests},
		{"TLS handshakes", f.Handshakes},
		{"rotations of a sidecar's certificate", f.Rotations},
		{"records in the ledger", status.GetRecords()},
		{"intruders' attempts, all refused", tries - gotIn},
		{"secrets that Envoy rejected", f.Rejected},
		{"failures", f.Failures},
	} {
		fmt.Fprintf(out, "%9d  %s\n", row.n, row.name)
	}
	fmt.Fprintf(out, "\nfailures: %d\n", f.Failures)
	switch {
	case f.Failures > 0:
		return fmt.Errorf("%d of %d requests failed; the last one: %s", f.Failures, f.Requests, f.LastError)
	case f.Rejected > 0:
		return fmt.Errorf("envoy rejected %d secrets", f.Rejected)
	case gotIn > 0:
		return fmt.Errorf("intruders got in %d times", gotIn)
	case tries == 0:
		return errors.New("no intruder has tried")
	}
	return nil
}
