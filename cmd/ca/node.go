package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

func newNodeCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "node", Short: "See, evict and ban nodes"}
	c.add(cmd)
	cmd.AddCommand(newNodeList(c), newNodeEvict(c), newNodeBan(c), newNodeUnban(c))
	return cmd
}

// nodeID returns the SPIFFE ID of a node that an operator named: by that ID, by
// its last part, or by more of its end, such as "join_token/web-1".
func nodeID(ctx context.Context, c *clientFlags, name string) (string, error) {
	if strings.HasPrefix(name, "spiffe://") {
		return name, nil
	}
	answer, err := call(ctx, c, adminv1.AdminServiceClient.ListNodes, &adminv1.ListNodesRequest{})
	if err != nil {
		return "", err
	}
	var found []string
	for _, n := range answer.GetNodes() {
		if strings.HasSuffix(n.GetId(), "/"+name) {
			found = append(found, n.GetId())
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", fmt.Errorf("no node is named %q; see: ca node list", name)
	default:
		return "", fmt.Errorf("%q names several nodes; write one of: %s", name, strings.Join(found, ", "))
	}
}

func newNodeList(c *clientFlags) *cobra.Command {
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the nodes that attested, and what is in force there",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.ListNodes, &adminv1.ListNodesRequest{})
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), answer)
			}
			now := time.Now()
			var rows [][]string
			for _, n := range answer.GetNodes() {
				connected := "no"
				if n.GetConnected() {
					connected = n.GetAddress()
				}
				state := n.GetState()
				if n.GetStateReason() != "" {
					state += " (" + n.GetStateReason() + ")"
				}
				rows = append(rows, []string{
					n.GetId(), state, connected, fmt.Sprint(n.GetRevision()),
					fmt.Sprintf("%d/%d", n.GetStreamsAcknowledged(), n.GetStreams()),
					cli.Until(now, n.GetSvidNotAfter().AsTime()), n.GetAgentVersion(),
				})
			}
			return cli.Table(cmd.OutOrStdout(), []string{"NODE", "STATE", "CONNECTED", "REVISION", "ACKED/STREAMS", "SVID EXPIRES", "AGENT"}, rows)
		},
	}
	out.Add(cmd, "table", "json")
	return cmd
}

func newNodeEvict(c *clientFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "evict NODE",
		Short: "End a node's identity and all it serves; it may attest again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			_, err = call(cmd.Context(), c, adminv1.AdminServiceClient.EvictNode, &adminv1.EvictNodeRequest{Id: id, Reason: reason})
			return done(cmd, err, "node %s evicted\n", id)
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the ledger")
	return cmd
}

func newNodeBan(c *clientFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "ban NODE",
		Short: "Evict a node and refuse its attestation until it is unbanned",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			_, err = call(cmd.Context(), c, adminv1.AdminServiceClient.BanNode, &adminv1.BanNodeRequest{Id: id, Reason: reason})
			return done(cmd, err, "node %s banned\n", id)
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the ledger")
	return cmd
}

func newNodeUnban(c *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "unban NODE",
		Short: "Let a banned node attest again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			_, err = call(cmd.Context(), c, adminv1.AdminServiceClient.UnbanNode, &adminv1.UnbanNodeRequest{Id: id})
			return done(cmd, err, "node %s may attest again\n", id)
		},
	}
}

// done reports what was done, or why not.
func done(cmd *cobra.Command, err error, format string, args ...any) error {
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), format, args...)
	return nil
}

func newTokenCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make single-use tokens with which machines join",
		Long: `A join token lets one machine attest itself once. Give it to the machine's node
agent in a file (node_attestation: {join_token: {token_file: PATH}}).`,
	}
	c.add(cmd)
	cmd.AddCommand(newTokenCreate(c), newTokenList(c), newTokenDelete(c))
	return cmd
}

func newTokenCreate(c *clientFlags) *cobra.Command {
	var node string
	var ttl time.Duration
	var labels map[string]string
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make a token; it is shown once and kept only as a hash",
		Example: `  ca token create --node web-1
  ca token create --node web-1 --ttl 10m --label rack=b7 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.CreateToken, createTokenRequest(node, ttl, labels))
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), answer)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "joins as %s, once, until %s\n", answer.GetNodeId(), answer.GetExpiresAt().AsTime().Local().Format(time.RFC3339))
			fmt.Fprintln(cmd.OutOrStdout(), answer.GetToken())
			return nil
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "name of the machine in its SPIFFE ID; random by default")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token may be used")
	cmd.Flags().StringToStringVar(&labels, "label", nil, "label of the node, for rules: node.labels[\"key\"]")
	out.Add(cmd, "text", "json")
	return cmd
}

func newTokenList(c *clientFlags) *cobra.Command {
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the tokens that were not used yet",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.ListTokens, &adminv1.ListTokensRequest{})
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), answer)
			}
			now := time.Now()
			var rows [][]string
			for _, t := range answer.GetTokens() {
				var labels []string
				for k, v := range t.GetLabels() {
					labels = append(labels, k+"="+v)
				}
				rows = append(rows, []string{t.GetId(), t.GetNodeId(), cli.Until(now, t.GetExpiresAt().AsTime()), t.GetCreatedBy(), strings.Join(labels, ",")})
			}
			return cli.Table(cmd.OutOrStdout(), []string{"ID", "NODE", "EXPIRES", "CREATED BY", "LABELS"}, rows)
		},
	}
	out.Add(cmd, "table", "json")
	return cmd
}

func newTokenDelete(c *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "delete ID",
		Short: "Withdraw a token that was not used yet",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := call(cmd.Context(), c, adminv1.AdminServiceClient.DeleteToken, &adminv1.DeleteTokenRequest{Id: args[0]})
			return done(cmd, err, "token %s deleted\n", args[0])
		},
	}
}
