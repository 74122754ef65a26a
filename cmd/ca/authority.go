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

func newAuthorityCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{
		Use: "authority", Short: "See and rotate the signing certificates",
		Long: `See and rotate the signing certificates.

A root takes these steps: prepared (it is in the trust bundle), distributed (every
live proxy has acknowledged that), active (it signs), retiring (it signs no more,
but something that chains to it lives), and then it leaves the bundle. All of it
happens by itself, well before a root ends; these commands are for the other days.`,
	}
	c.add(cmd)
	cmd.AddCommand(newAuthorityInit(), newAuthorityList(c), newAuthorityRotate(c))
	cmd.AddCommand(newApprovalCommands(c)...)
	cmd.AddCommand(newRotationCommands(c)...)
	return cmd
}

func newAuthorityList(c *clientFlags) *cobra.Command {
	return listing(c, &cobra.Command{Short: "Show roots and intermediates, their state and remaining life"},
		adminv1.AdminServiceClient.ListAuthorities, &adminv1.ListAuthoritiesRequest{},
		[]string{"ROLE", "ID", "STATE", "EXPIRES", "SHA-256"},
		func(answer *adminv1.ListAuthoritiesResponse) (rows [][]string) {
			now := time.Now()
			for _, a := range answer.GetAuthorities() {
				sum := sha256.Sum256(a.GetCertificate())
				rows = append(rows, []string{a.GetRole(), a.GetId(), stateText(a), cli.Until(now, a.GetNotAfter().AsTime()), hex.EncodeToString(sum[:])})
			}
			for _, a := range answer.GetBelow() {
				state := "below the old root " + a.GetRoot()
				if a.GetCurrent() {
					state = "below"
				}
				rows = append(rows, []string{"intermediate", a.GetId(), state, cli.Until(now, a.GetNotAfter().AsTime()), belowText(a)})
			}
			if why := answer.GetBelowUnknown(); why != "" {
				rows = append(rows, []string{"intermediate", "?", "below", "?", "not known: " + cli.Cell(why)})
			}
			return rows
		})
}

// stateText is a state, and that it is tainted.
func stateText(of interface {
	GetState() string
	GetTainted() bool
},
) string {
	if of.GetTainted() {
		return of.GetState() + ", tainted"
	}
	return of.GetState()
}

// belowText says whose intermediate it is.
func belowText(a *adminv1.AuthorityBelow) string {
	text := "of the CA below " + a.GetSpiffeId()
	switch {
	case !a.GetEntry():
		text += " (has no entry: gets no other one)"
	case !a.GetConnected():
		text += " (not connected)"
	}
	return text
}

func withinFlag(cmd *cobra.Command, within *time.Duration) {
	cmd.Flags().DurationVar(within, "within", 10*time.Second, "spread the renewals over this time")
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
	withinFlag(renew, &within)
	cmd.AddCommand(renew)
	return cmd
}

func newClockCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "clock", Short: "Confirm the CA's clock after it was set"}
	c.add(cmd)
	cmd.AddCommand(printing(&cobra.Command{
		Use:   "confirm",
		Short: "Say that the CA's clock, which was set, is right now",
		Long: `Say that the CA's clock is right. When it is set by more than five minutes, the CA
issues nothing and lets nothing end: whoever can set the clock could have it sign
for the future, or forget what has not expired. "ca status" says by how much it was
set. If it is wrong, set it back instead; the CA goes on by itself then.`,
		Args: cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (*adminv1.ConfirmClockResponse, error) {
		return call(cmd.Context(), c, adminv1.AdminServiceClient.ConfirmClock, &adminv1.ConfirmClockRequest{})
	}, func(cmd *cobra.Command, _ string, answer *adminv1.ConfirmClockResponse) error {
		fmt.Fprintf(cmd.OutOrStdout(), "the CA relies on its clock again: it shows %s, and was set by %s\n",
			answer.GetTime().AsTime().Format(time.RFC3339), answer.GetBy().AsDuration().Round(time.Second))
		return nil
	}, "text"))
	return cmd
}

func newBundleCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{Use: "bundle", Short: "See the trust bundle"}
	c.add(cmd)
	cmd.AddCommand(printing(&cobra.Command{
		Use:   "show",
		Short: "Print the roots, for a node agent's ca.bundle, or their fingerprints",
		Example: `  ca bundle show > bundle.pem
  ca bundle show -o sha256`,
		Args: cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (*adminv1.GetBundleResponse, error) {
		return call(cmd.Context(), c, adminv1.AdminServiceClient.GetBundle, &adminv1.GetBundleRequest{})
	}, func(cmd *cobra.Command, format string, answer *adminv1.GetBundleResponse) error {
		return writeBundle(cmd.OutOrStdout(), format, answer.GetRoots())
	}, "pem", "sha256"))
	return cmd
}

func writeBundle(w io.Writer, format string, roots [][]byte) error {
	for _, der := range roots {
		if format == "sha256" {
			sum := sha256.Sum256(der)
			fmt.Fprintln(w, hex.EncodeToString(sum[:]))
		} else if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return err
		}
	}
	return nil
}

func newStatusCommand() *cobra.Command {
	c := &clientFlags{}
	var wait time.Duration
	cmd := printing(&cobra.Command{
		Use:   "status",
		Short: "Say how the CA is, and how long an outage would be survived",
		Args:  cobra.NoArgs,
	}, func(cmd *cobra.Command, _ []string) (*adminv1.GetStatusResponse, error) {
		ctx, cancel := context.WithTimeout(cmd.Context(), max(wait, callTimeout))
		defer cancel()
		c.wait = wait > 0
		return call(ctx, c, adminv1.AdminServiceClient.GetStatus, &adminv1.GetStatusRequest{})
	}, func(cmd *cobra.Command, _ string, answer *adminv1.GetStatusResponse) error {
		writeStatus(cmd.OutOrStdout(), answer)
		return nil
	}, "text")
	c.add(cmd)
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait this long for the CA to answer, such as after a start")
	return cmd
}

func writeStatus(w io.Writer, s *adminv1.GetStatusResponse) {
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
			fmt.Fprintf(w, ": %s (since %s)", cli.Printable(k.GetMessage()), cli.Short(time.Since(k.GetSince().AsTime())))
		}
		fmt.Fprintln(w)
	}
}
