package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
)

// run is the program; main only turns its error into an exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	return cli.Execute(ctx, newRoot(), args, stdin, stdout, stderr)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "node-agent",
		Short: "Workload identities on this machine, for Envoy and for programs",
		Long: `node-agent attests this machine to the CA and serves, on one Unix socket, Envoy's
Secret Discovery Service and the SPIFFE Workload API. Who may have what is decided
by the process at the other end of the socket; nothing is configured per workload.

On the CA's machine, make a token and save the trust bundle:

  ca token create --node web-1 --write token
  ca bundle show > bundle.pem

on this machine, with both files:

  node-agent run --config agent.yaml
  node-agent status`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       cli.Version(),
	}
	root.AddCommand(newRunCommand(), newCheckCommand(), newStatusCommand(), newFetchCommand(), newCheckEnvoyCommand())
	return root
}
