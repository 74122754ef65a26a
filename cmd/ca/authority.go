package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/internal/cli"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

// createTokenRequest leaves the lifetime out if it is not given.
func createTokenRequest(node string, ttl time.Duration, labels map[string]string) *adminv1.CreateTokenRequest {
	r := &adminv1.CreateTokenRequest{NodeName: node, Labels: labels}
	if ttl != 0 {
		r.Ttl = durationpb.New(ttl)
	}
	return r
}

func newAuthorityCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "authority", Short: "See and rotate the signing certificates"}
	c.add(cmd)
	cmd.AddCommand(newAuthorityList(c), newAuthorityRotate(c))
	return cmd
}

func newAuthorityList(c *clientFlags) *cobra.Command {
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show roots and intermediates, their state and remaining life",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.ListAuthorities, &adminv1.ListAuthoritiesRequest{})
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), answer)
			}
			now := time.Now()
			var rows [][]string
			for _, a := range answer.GetAuthorities() {
				sum := sha256.Sum256(a.GetCertificate())
				rows = append(rows, []string{a.GetRole(), a.GetId(), a.GetState(), cli.Until(now, a.GetNotAfter().AsTime()), hex.EncodeToString(sum[:])})
			}
			return cli.Table(cmd.OutOrStdout(), []string{"ROLE", "ID", "STATE", "EXPIRES", "SHA-256"}, rows)
		},
	}
	out.Add(cmd, "table", "json")
	return cmd
}

func newAuthorityRotate(c *clientFlags) *cobra.Command {
	var within time.Duration
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace this CA's intermediate now and renew what the old one signed",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.RotateIntermediate,
				&adminv1.RotateIntermediateRequest{Within: durationpb.New(within)})
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), answer)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "intermediate %s is active; the nodes renew what the old one signed within %v\n", answer.GetAuthority().GetId(), within)
			return nil
		},
	}
	cmd.Flags().DurationVar(&within, "within", 10*time.Second, "spread the renewals over this time")
	out.Add(cmd, "text", "json")
	return cmd
}

func newSVIDCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "svid", Short: "Renew X.509-SVIDs"}
	c.add(cmd)
	var within time.Duration
	renew := &cobra.Command{
		Use:   "renew",
		Short: "Have all connected nodes renew all of their X.509-SVIDs now",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.RenewSVIDs, &adminv1.RenewSVIDsRequest{Within: durationpb.New(within)})
			return done(cmd, err, "%d nodes renew within %v\n", answer.GetNodes(), within)
		},
	}
	renew.Flags().DurationVar(&within, "within", 10*time.Second, "spread the renewals over this time")
	cmd.AddCommand(renew)
	return cmd
}

func newBundleCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "bundle", Short: "See the trust bundle"}
	c.add(cmd)
	var out cli.OutputFlag
	show := &cobra.Command{
		Use:   "show",
		Short: "Print the roots, for a node agent's ca.bundle, or their fingerprints",
		Example: `  ca bundle show > bundle.pem
  ca bundle show -o sha256`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.GetBundle, &adminv1.GetBundleRequest{})
			if err != nil {
				return err
			}
			return writeBundle(cmd.OutOrStdout(), format, answer)
		},
	}
	out.Add(show, "pem", "sha256", "json")
	cmd.AddCommand(show)
	return cmd
}

func writeBundle(w io.Writer, format string, answer *adminv1.GetBundleResponse) error {
	switch format {
	case "json":
		return cli.JSON(w, answer)
	case "sha256":
		for _, der := range answer.GetRoots() {
			sum := sha256.Sum256(der)
			fmt.Fprintln(w, hex.EncodeToString(sum[:]))
		}
		return nil
	default:
		for _, der := range answer.GetRoots() {
			if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
				return err
			}
		}
		return nil
	}
}

func newStatusCommand() *cobra.Command {
	c := &clientFlags{}
	var out cli.OutputFlag
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say how the CA is, and how long an outage would be survived",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), max(wait, callTimeout))
			defer cancel()
			c.wait = wait > 0
			s, err := call(ctx, c, adminv1.AdminServiceClient.GetStatus, &adminv1.GetStatusRequest{})
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if format == "json" {
				return cli.JSON(w, s)
			}
			budget := "no SVIDs are live"
			if d := s.GetOutageBudget().AsDuration(); d > 0 {
				budget = cli.Short(d) + " until the first SVID would expire"
			}
			fmt.Fprintf(w, "trust domain    %s\ninstance        %s, version %s, up %s\n", s.GetTrustDomain(), s.GetInstance(), s.GetVersion(), cli.Short(time.Since(s.GetStartedAt().AsTime())))
			fmt.Fprintf(w, "entries         %d at revision %d\nnodes           %d, %d connected\n", s.GetEntries(), s.GetRevision(), s.GetNodes(), s.GetNodesConnected())
			fmt.Fprintf(w, "issued          %d, refused %d since the start\nledger          %d records\n", s.GetIssued(), s.GetRefused(), s.GetRecords())
			fmt.Fprintf(w, "bundle          sequence %d\noutage budget   %s\n", s.GetBundleSequence(), budget)
			for _, k := range s.GetConditions() {
				severity := k.GetSeverity()
				switch severity {
				case "ok":
					severity = cli.Paint(w, cli.Green, severity)
				case "warning":
					severity = cli.Paint(w, cli.Yellow, severity)
				default:
					severity = cli.Paint(w, cli.Red, severity)
				}
				fmt.Fprintf(w, "condition       %s: %s", k.GetName(), severity)
				if k.GetMessage() != "" {
					fmt.Fprintf(w, ": %s (since %s)", k.GetMessage(), cli.Short(time.Since(k.GetSince().AsTime())))
				}
				fmt.Fprintln(w)
			}
			return nil
		},
	}
	c.add(cmd)
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait this long for the CA to answer, such as after a start")
	out.Add(cmd, "text", "json")
	return cmd
}
