package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// exitHeld is the exit code of a command whose change waits for a second person: nobody
// takes it for done.
const exitHeld = 3

// notDoneYet says how to go on with a change that is held.
func notDoneYet(h *adminv1.RootChange) error {
	return &cli.ExitError{Code: exitHeld, Err: fmt.Errorf(`not done yet: a second person has to approve change %s
  %s
  Somebody else runs: ca authority approve %s
  It is forgotten %s, or when the CA is started again; afterwards see: ca %s`,
		h.GetId(), cli.Printable(h.GetWhat()), h.GetId(), cli.Until(time.Now(), h.GetExpiresAt().AsTime()), seeHeld(h))}
}

// seeHeld is the command that shows what became of a change.
func seeHeld(h *adminv1.RootChange) string {
	if h.GetEntries() != nil {
		return "entry get"
	}
	return "authority show"
}

// newApprovalCommands are those for the second person.
func newApprovalCommands(c *clientFlags) []*cobra.Command {
	pending := listing(c, &cobra.Command{
		Short: "List the changes of roots and entries that wait for a second person",
		Long: `List the changes that wait for a second person: of roots, if authority.two_persons of the
CA's configuration is true, and of entries marked admin or downstream, if
entries.two_persons is. One is forgotten after an hour, and all when the CA is started
again. With -o json, entries are shown as they would be.`,
	}, adminv1.AdminServiceClient.ListRootChanges, &adminv1.ListRootChangesRequest{},
		[]string{"ID", "ASKED FOR BY", "EXPIRES", "WHAT"},
		func(answer *adminv1.ListRootChangesResponse) (rows [][]string) {
			now := time.Now()
			for _, h := range answer.GetChanges() {
				rows = append(rows, []string{h.GetId(), h.GetActor(), cli.Until(now, h.GetExpiresAt().AsTime()), cli.Cell(h.GetWhat())})
			}
			return rows
		})
	pending.Use = "pending"
	ids := completeArgs(1, func(ctx context.Context) (ids []cobra.Completion, _ error) {
		answer, err := call(ctx, c, adminv1.AdminServiceClient.ListRootChanges, &adminv1.ListRootChangesRequest{})
		for _, h := range answer.GetChanges() {
			ids = append(ids, cobra.CompletionWithDesc(h.GetId(), h.GetWhat()))
		}
		return ids, err
	})
	approve := printing(&cobra.Command{
		Use:   "approve ID",
		Short: "Have a change done that somebody else has asked for",
		Long: `Have a change of roots or entries done that somebody else has asked for; "ca authority pending"
lists them. Exactly what was asked for is done, once, and the ledger names both.

Your own is refused. Everybody who comes over the admin socket is one person, since
root there can be any of them: of the two, one at least uses --ca.`,
		Example: `  ca authority pending --ca ca.example.org:8443
  ca authority approve --ca ca.example.org:8443 8c1f0d3be9a74c52`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: ids,
	}, func(cmd *cobra.Command, args []string) (*adminv1.ApproveRootChangeResponse, error) {
		ctx, cancel := context.WithTimeout(cmd.Context(), changeTimeout)
		defer cancel()
		return call(ctx, c, adminv1.AdminServiceClient.ApproveRootChange, &adminv1.ApproveRootChangeRequest{Id: args[0]})
	}, func(cmd *cobra.Command, _ string, answer *adminv1.ApproveRootChangeResponse) error {
		h := answer.GetChange()
		verb := "begun"
		if h.GetEntries() != nil {
			verb = "done"
		}
		return done(cmd, nil, "approved and %s: %s, asked for by %s; follow it with: ca %s\n",
			verb, cli.Printable(h.GetWhat()), cli.Printable(h.GetActor()), seeHeld(h))
	}, "text")
	reject := printing(&cobra.Command{
		Use:   "reject ID",
		Short: "Forget a change that waits for a second person",
		Long:  "Forget a change that waits for a second person, your own or somebody else's.",
		Args:  cobra.ExactArgs(1), ValidArgsFunction: ids,
	}, func(cmd *cobra.Command, args []string) (*adminv1.RejectRootChangeResponse, error) {
		return call(cmd.Context(), c, adminv1.AdminServiceClient.RejectRootChange, &adminv1.RejectRootChangeRequest{Id: args[0]})
	}, func(cmd *cobra.Command, _ string, answer *adminv1.RejectRootChangeResponse) error {
		return done(cmd, nil, "rejected, nothing was changed: %s\n", cli.Printable(answer.GetChange().GetWhat()))
	}, "text")
	return []*cobra.Command{pending, approve, reject}
}
