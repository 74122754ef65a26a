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
		Use:   "ca",
		Short: "Certificate authority for workload identities (SPIFFE)",
		Long: `ca issues short-lived X.509-SVIDs to workloads that node agents attest.

Start one with nothing but a trust domain:

  ca run --trust-domain example.org --data-dir ./ca

then let a machine join, and say who gets which identity:

  ca token create --node web-1 --write token
  ca entry apply -f entries.yaml
  ca entry explain --node web-1 --pid 4711`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       cli.Version(),
	}
	root.AddGroup(
		&cobra.Group{ID: "server", Title: "The server:"},
		&cobra.Group{ID: "operate", Title: "Operating a running CA:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("server", newRunCommand(), newCheckCommand(), newUpstreamCommand(), newKubernetesCommand(), newLedgerCommand(), newStoreCommand())
	add("operate", newEntryCommand(), newNodeCommand(), newQuarantineCommand(), newWithdrawalCommand(), newTokenCommand(), newWhoCommand(),
		newAuthorityCommand(), newBundleCommand(), newSVIDCommand(), newClockCommand(), newConsoleCommand(), newStatusCommand())
	return root
}
