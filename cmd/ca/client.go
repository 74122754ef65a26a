package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// callTimeout bounds one call of the admin API.
const callTimeout = 30 * time.Second

// clientFlags say how to reach a running CA: over its admin socket, or over
// mTLS with the X.509-SVID of an identity that an entry makes an admin.
type clientFlags struct {
	socket  string
	address string
	// wait for the CA to come up instead of failing at once.
	wait bool
}

func (c *clientFlags) add(cmd *cobra.Command) {
	socket := os.Getenv("MESHID_ADMIN_SOCKET")
	if socket == "" {
		socket = defaultAdminSocket
	}
	cmd.PersistentFlags().StringVar(&c.socket, "admin-socket", socket, "admin socket of the CA on this machine (env MESHID_ADMIN_SOCKET)")
	cmd.PersistentFlags().StringVar(&c.address, "ca", os.Getenv("MESHID_CA"),
		"host:port of a remote CA; uses the identity from the Workload API at SPIFFE_ENDPOINT_SOCKET (env MESHID_CA)")
}

// method is one of the admin API's.
type method[Q, A any] = func(adminv1.AdminServiceClient, context.Context, Q, ...grpc.CallOption) (A, error)

// call connects, makes one call with a deadline, and disconnects.
func call[Q, A any](ctx context.Context, c *clientFlags, method method[Q, A], request Q) (answer A, err error) {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	conn, closeConn, err := c.dial(ctx)
	if err != nil {
		return answer, err
	}
	defer func() { err = errors.Join(err, closeConn()) }()
	return method(adminv1.NewAdminServiceClient(conn), ctx, request)
}

// printing makes a command of one question to the CA: what ask returns is printed as
// JSON, or by show in one of the other formats, the first of which is the default.
func printing[A proto.Message](cmd *cobra.Command, ask func(cmd *cobra.Command, args []string) (A, error),
	show func(cmd *cobra.Command, format string, answer A) error, formats ...string,
) *cobra.Command {
	var out cli.OutputFlag
	out.Add(cmd, append(formats, "json")...)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		format, err := out.Format()
		if err != nil {
			return err
		}
		answer, err := ask(cmd, args)
		if err != nil {
			return err
		}
		if format == "json" {
			return cli.JSON(cmd.OutOrStdout(), answer)
		}
		return show(cmd, format, answer)
	}
	return cmd
}

// listing is printing for a list without arguments: a line of a table for each item
// of the answer.
func listing[Q, A proto.Message](c *clientFlags, cmd *cobra.Command, method method[Q, A], question Q, header []string, rows func(answer A) [][]string) *cobra.Command {
	cmd.Use, cmd.Args = "list", cobra.NoArgs
	return printing(cmd, func(cmd *cobra.Command, _ []string) (A, error) {
		return call(cmd.Context(), c, method, question)
	}, func(cmd *cobra.Command, _ string, answer A) error {
		return cli.Table(cmd.OutOrStdout(), header, rows(answer))
	}, "table")
}

// done reports what was done, or why not.
func done(cmd *cobra.Command, err error, format string, args ...any) error {
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), format, args...)
	return nil
}

// completeArgs completes at most that many arguments, any number if it is 0, with
// what list returns: nothing if the CA does not answer soon, and never files.
func completeArgs(most int, list func(ctx context.Context) ([]cobra.Completion, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completionDelay)
		defer cancel()
		all, err := list(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(all, func(one cobra.Completion) bool {
			name, description, _ := strings.Cut(one, "\t")
			return slices.Contains(args, name) || cli.Printable(name+description) != name+description
		}), cobra.ShellCompDirectiveNoFileComp
	}
}

// entryNames and nodeNames are for completeArgs.
func (c *clientFlags) entryNames(ctx context.Context) (names []cobra.Completion, _ error) {
	answer, err := call(ctx, c, adminv1.AdminServiceClient.ListEntries, &adminv1.ListEntriesRequest{})
	for _, e := range answer.GetEntries() {
		names = append(names, cobra.CompletionWithDesc(e.GetName(), e.GetSpiffeId()))
	}
	return names, err
}

func (c *clientFlags) nodeNames(ctx context.Context) (names []cobra.Completion, _ error) {
	answer, err := call(ctx, c, adminv1.AdminServiceClient.ListNodes, &adminv1.ListNodesRequest{})
	for _, n := range answer.GetNodes() {
		names = append(names, cobra.CompletionWithDesc(n.GetId(), n.GetState()))
	}
	return names, err
}

func (c *clientFlags) dial(ctx context.Context) (*grpc.ClientConn, func() error, error) {
	limit := grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(256<<20), grpc.WaitForReady(c.wait))
	if c.address == "" {
		if err := peer.Settle(ctx); err != nil {
			return nil, nil, err
		}
		conn, err := grpc.NewClient("unix:"+c.socket, limit, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, fmt.Errorf("reach the CA at %s: %w", c.socket, err)
		}
		return conn, conn.Close, nil
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("get an identity from the Workload API: %w\n  Set SPIFFE_ENDPOINT_SOCKET to the node agent's socket, such as unix:///run/meshid/agent.sock", err)
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, nil, errors.Join(err, source.Close())
	}
	authorize := tlsconfig.AuthorizeID(identity.CAID(svid.ID.TrustDomain()))
	conn, err := grpc.NewClient(c.address, limit,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, authorize))))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("reach the CA at %s: %w", c.address, err), source.Close())
	}
	return conn, func() error { return errors.Join(conn.Close(), source.Close()) }, nil
}
