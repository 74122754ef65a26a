package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/attest/node/k8spsat"
	"github.com/meshid/meshid/pkg/attest/node/x509pop"
	"github.com/meshid/meshid/pkg/attest/workload/docker"
	"github.com/meshid/meshid/pkg/attest/workload/k8s"
	"github.com/meshid/meshid/pkg/attest/workload/unix"
	"github.com/meshid/meshid/pkg/csi"
)

// nodeAttester is the table of node attestation methods: one case a method.
func nodeAttester(n nodeAttestation) (attest.NodeAttester, error) {
	switch {
	case n.JoinToken.Present():
		var c struct {
			TokenFile string `yaml:"token_file"`
		}
		if err := n.JoinToken.Decode(&c); err != nil {
			return nil, err
		}
		if c.TokenFile == "" {
			return nil, n.JoinToken.Errorf("token_file", "missing; write the path of the file that holds the token")
		}
		return tokenFile(c.TokenFile), nil
	case n.X509PoP.Present():
		var c x509pop.AgentConfig
		if err := n.X509PoP.Decode(&c); err != nil {
			return nil, err
		}
		a, err := x509pop.NewAttester(c)
		if err != nil {
			return nil, n.X509PoP.Errorf("", "%v", err)
		}
		return a, nil
	case n.K8sPSAT.Present():
		var c k8spsat.AgentConfig
		if err := n.K8sPSAT.Decode(&c); err != nil {
			return nil, err
		}
		a, err := k8spsat.NewAttester(c)
		if err != nil {
			return nil, n.K8sPSAT.Errorf("cluster", "%v", err)
		}
		return a, nil
	default:
		return nil, fmt.Errorf("node_attestation: no method")
	}
}

// tokenFile attests with the join token in a file. The file is read when the
// token is needed: an agent that has its identity already does not need it.
type tokenFile string

// Method implements attest.NodeAttester.
func (tokenFile) Method() string { return jointoken.Method }

// Evidence implements attest.NodeAttester.
func (f tokenFile) Evidence(ctx context.Context, binding []byte) ([]byte, error) {
	data, err := durable.ReadSecret(string(f), 4096)
	if err != nil {
		return nil, fmt.Errorf("read the join token: %w", err)
	}
	return jointoken.NewAttester(strings.TrimSpace(string(data))).Evidence(ctx, binding)
}

// Respond implements attest.NodeAttester.
func (tokenFile) Respond(ctx context.Context, binding, challenge []byte) ([]byte, error) {
	return jointoken.NewAttester("").Respond(ctx, binding, challenge)
}

// csiDriver returns the CSI driver, nil if there is to be none.
func csiDriver(v *validated, logger *slog.Logger, r prometheus.Registerer) (*csi.Driver, error) {
	if !v.CSI.Present() {
		return nil, nil //nolint:nilnil // none is wanted
	}
	var c csi.Config
	if err := v.CSI.Decode(&c); err != nil {
		return nil, err
	}
	if c.NodeName == "" {
		c.NodeName = os.Getenv("NODE_NAME")
	}
	d, err := csi.New(c, csi.Options{
		SocketDir: filepath.Dir(v.Socket), Version: cli.Version(), Logger: logger, Registerer: r,
		Ready: func() error {
			_, err := os.Lstat(v.Socket)
			return err
		},
	})
	if err != nil {
		return nil, v.CSI.Errorf("", "%v", err)
	}
	return d, nil
}

// workloadAttestors is the table of workload attestors: one block an attestor.
func workloadAttestors(w workloadAttestation, logger *slog.Logger, r prometheus.Registerer) ([]attest.WorkloadAttestor, error) {
	var u unix.Config
	if err := w.Unix.Decode(&u); err != nil {
		return nil, err
	}
	unixAttestor, err := unix.New(u)
	if err != nil {
		return nil, err
	}
	all := []attest.WorkloadAttestor{unixAttestor}
	// Before docker: if both know a container, it is the pod's.
	if w.K8s.Present() {
		var c k8s.Config
		if err := w.K8s.Decode(&c); err != nil {
			return nil, err
		}
		a, err := k8s.New(c, logger, r)
		if bad, ok := errors.AsType[*k8s.SettingError](err); ok {
			return nil, w.K8s.Errorf(bad.Setting, "%s", bad.Message)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	if w.Docker.Present() {
		var c docker.Config
		if err := w.Docker.Decode(&c); err != nil {
			return nil, err
		}
		a, err := docker.New(c, logger, r)
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	return all, nil
}
