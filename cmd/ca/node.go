package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

func newNodeCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "node", Short: "See, evict and ban nodes"}
	c.add(cmd)
	cmd.AddCommand(newNodeList(c), newNodeEvict(c), newNodeBan(c), newNodeUnban(c))
	return cmd
}

// nodeIDs returns the SPIFFE IDs of nodes that an operator named: by that ID, by its last
// part, or by more of its end, such as "join_token/web-1".
func nodeIDs(ctx context.Context, c *clientFlags, names []string) ([]string, error) {
	ids := slices.Clone(names)
	var ends map[string][]string // by each end of a SPIFFE ID, whose it is
	for i, name := range names {
		if strings.HasPrefix(name, "spiffe://") {
			continue
		}
		if ends == nil {
			answer, err := call(ctx, c, adminv1.AdminServiceClient.ListNodes, &adminv1.ListNodesRequest{})
			if err != nil {
				return nil, err
			}
			ends = make(map[string][]string)
			for _, n := range answer.GetNodes() {
				for at, r := range n.GetId() {
					if r == '/' {
						end := n.GetId()[at+1:]
						ends[end] = append(ends[end], n.GetId())
					}
				}
			}
		}
		switch found := ends[name]; len(found) {
		case 1:
			ids[i] = found[0]
		case 0:
			return nil, fmt.Errorf("no node is named %q; see: ca node list", name)
		default:
			return nil, fmt.Errorf("%q names several nodes; write one of: %s", name, strings.Join(found, ", "))
		}
	}
	return ids, nil
}

func newNodeList(c *clientFlags) *cobra.Command {
	return listing(c, &cobra.Command{Short: "Show the nodes that attested, and what is in force there"},
		adminv1.AdminServiceClient.ListNodes, &adminv1.ListNodesRequest{},
		[]string{"NODE", "STATE", "CONNECTED", "REVISION", "ACKED/STREAMS", "SVID EXPIRES", "CLOCK", "AGENT"},
		func(answer *adminv1.ListNodesResponse) (rows [][]string) {
			now := time.Now()
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
					cli.Until(now, n.GetSvidNotAfter().AsTime()), clockText(n.GetClockSkew()), n.GetAgentVersion(),
				})
			}
			return rows
		})
}

// clockText says how far a node's clock is ahead of the CA's.
func clockText(skew *durationpb.Duration) string {
	if skew == nil {
		return "-"
	}
	return fmt.Sprintf("%+.1fs", skew.AsDuration().Seconds())
}

func newNodeEvict(c *clientFlags) *cobra.Command {
	return newNodeWithdrawal(c, "evict", "End the identities of nodes and all they serve; they may attest again", "evicted",
		func(ctx context.Context, ids []string, reason string) (withdrawnNodes, error) {
			return call(ctx, c, adminv1.AdminServiceClient.EvictNode, &adminv1.EvictNodeRequest{Ids: ids, Reason: reason})
		})
}

func newNodeBan(c *clientFlags) *cobra.Command {
	return newNodeWithdrawal(c, "ban", "Evict nodes and refuse their attestation until they are unbanned", "banned",
		func(ctx context.Context, ids []string, reason string) (withdrawnNodes, error) {
			return call(ctx, c, adminv1.AdminServiceClient.BanNode, &adminv1.BanNodeRequest{Ids: ids, Reason: reason})
		})
}

// withdrawn is an answer that names a withdrawal, withdrawnNodes one of nodes.
type (
	withdrawn      interface{ GetWithdrawal() string }
	withdrawnNodes interface {
		withdrawn
		GetNodes() uint32
	}
)

// nodeNames are the nodes that a command is given.
func nodeNames(cmd *cobra.Command, c *clientFlags, list *nameList, args []string) ([]string, error) {
	names, err := list.all(cmd, args)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, list.none("the names of nodes (ca node list shows them)")
	}
	return nodeIDs(cmd.Context(), c, names)
}

// nodesText says of which nodes something was done.
func nodesText(ids []string, n int) string {
	if len(ids) == 1 {
		return "node " + ids[0]
	}
	return fmt.Sprintf("%d nodes", n)
}

// newNodeWithdrawal makes a command that takes the rights of nodes.
func newNodeWithdrawal(c *clientFlags, verb, short, result string, change func(ctx context.Context, ids []string, reason string) (withdrawnNodes, error)) *cobra.Command {
	var reason string
	var f waitFlags
	var list nameList
	cmd := &cobra.Command{
		Use:   verb + " (NODE... | --file LIST)",
		Short: short,
		Long: short + `.
All of the nodes or none: if one is not known, nothing is changed. At most 10,000 at once.`,
		Example: fmt.Sprintf(`  ca node %[1]s web-1 web-2 --reason "INC-411" --wait
  ca node list -o json | jq -r '.nodes[] | select(.attributes.labels.rack == "b7") | .id' | ca node %[1]s --file -`, verb),
		ValidArgsFunction: completeArgs(0, c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := nodeNames(cmd, c, &list, args)
			if err != nil {
				return err
			}
			ctx, cancel := bounded(cmd.Context(), len(ids))
			defer cancel()
			answer, err := change(ctx, ids, reason)
			if err != nil {
				return err
			}
			return f.after(cmd, c, answer, nodesText(ids, int(answer.GetNodes()))+" "+result+"\n")
		},
	}
	list.add(cmd, "names of nodes")
	reasonFlag(cmd, &reason)
	f.add(cmd)
	return cmd
}

func newNodeUnban(c *clientFlags) *cobra.Command {
	var list nameList
	cmd := &cobra.Command{
		Use:               "unban (NODE... | --file LIST)",
		Short:             "Let banned nodes attest again",
		ValidArgsFunction: completeArgs(0, c.nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := nodeNames(cmd, c, &list, args)
			if err != nil {
				return err
			}
			ctx, cancel := bounded(cmd.Context(), len(ids))
			defer cancel()
			_, err = call(ctx, c, adminv1.AdminServiceClient.UnbanNode, &adminv1.UnbanNodeRequest{Ids: ids})
			return done(cmd, err, "%s may attest again\n", nodesText(ids, len(ids)))
		},
	}
	list.add(cmd, "names of nodes")
	return cmd
}

func reasonFlag(cmd *cobra.Command, reason *string) {
	cmd.Flags().StringVar(reason, "reason", "", "why, for the ledger")
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
	var node, file string
	var ttl time.Duration
	var labels map[string]string
	cmd := printing(&cobra.Command{
		Use:   "create",
		Short: "Make a token; it is shown once and kept only as a hash",
		Long: `Make a token. It is shown once, or written into a file, and the CA keeps only a
hash of it. An agent takes it from a file that nobody but its own user can read:
--write makes one, mode 0600.`,
		Example: `  ca token create --node web-1 --write token
  ca token create --node web-1 --ttl 10m --label rack=b7 -o json`,
		Args: cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (*adminv1.CreateTokenResponse, error) {
		if ttl <= 0 {
			return nil, fmt.Errorf("--ttl %v: write more than 0, such as 1h", ttl)
		}
		answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.CreateToken, &adminv1.CreateTokenRequest{
			NodeName: node, Labels: labels, Ttl: durationpb.New(ttl),
		})
		if err != nil || file == "" {
			return answer, err
		}
		if err := durable.WriteFile(file, []byte(answer.GetToken()+"\n"), 0o600); err != nil {
			return nil, fmt.Errorf("write the token: %w\n  It is lost: find and delete it with ca token list|delete, and make another", err)
		}
		answer.Token = "" // it is in the file, and nowhere else
		return answer, nil
	}, func(cmd *cobra.Command, _ string, answer *adminv1.CreateTokenResponse) error {
		fmt.Fprintf(cmd.ErrOrStderr(), "joins as %s, once, until %s\n", answer.GetNodeId(), answer.GetExpiresAt().AsTime().Local().Format(time.RFC3339))
		if answer.GetToken() != "" {
			fmt.Fprintln(cmd.OutOrStdout(), answer.GetToken())
		}
		return nil
	}, "text")
	cmd.Flags().StringVar(&file, "write", "", "write the token into this file, mode 0600, and do not show it")
	cmd.Flags().StringVar(&node, "node", "", "name of the machine in its SPIFFE ID; random by default")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token may be used")
	cmd.Flags().StringToStringVar(&labels, "label", nil, "label of the node, for rules: node.labels[\"key\"]")
	return cmd
}

func newTokenList(c *clientFlags) *cobra.Command {
	return listing(c, &cobra.Command{Short: "Show the tokens that were not used yet"},
		adminv1.AdminServiceClient.ListTokens, &adminv1.ListTokensRequest{},
		[]string{"ID", "NODE", "EXPIRES", "CREATED BY", "LABELS"},
		func(answer *adminv1.ListTokensResponse) (rows [][]string) {
			now := time.Now()
			for _, t := range answer.GetTokens() {
				var labels []string
				for _, k := range slices.Sorted(maps.Keys(t.GetLabels())) {
					labels = append(labels, k+"="+t.GetLabels()[k])
				}
				rows = append(rows, []string{t.GetId(), t.GetNodeId(), cli.Until(now, t.GetExpiresAt().AsTime()), t.GetCreatedBy(), strings.Join(labels, ",")})
			}
			return rows
		})
}

func newTokenDelete(c *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "delete ID",
		Short: "Withdraw a token that was not used yet",
		Args:  cobra.ExactArgs(1),
		ValidArgsFunction: completeArgs(1, func(ctx context.Context) (ids []cobra.Completion, _ error) {
			answer, err := call(ctx, c, adminv1.AdminServiceClient.ListTokens, &adminv1.ListTokensRequest{})
			for _, t := range answer.GetTokens() {
				ids = append(ids, cobra.CompletionWithDesc(t.GetId(), t.GetNodeId()))
			}
			return ids, err
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := call(cmd.Context(), c, adminv1.AdminServiceClient.DeleteToken, &adminv1.DeleteTokenRequest{Id: args[0]})
			return done(cmd, err, "token %s deleted\n", args[0])
		},
	}
}
