package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

func newWithdrawalCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{
		Use:   "withdrawal",
		Short: "See how far what was withdrawn is out of use",
		Long: `Deleting an entry, evicting or banning a node, and a quarantine take identities back.
The CA refuses them from that moment on. It then follows how the node agents withdraw
what they serve, and how each proxy that carried it acknowledges that it is gone: that
is the time to effect. docs/withdrawal.md says what an acknowledgement proves.

If the CA revokes by lists (revocation: crl), the lives of certificates end too: what was
withdrawn is put on a revocation list, and a withdrawal is complete when every live proxy
goes by it, so that a stolen key is of no use with any of them.

The CA remembers the latest withdrawals since it started; the ledger has the end of each
(event withdrawn).`,
	}
	c.add(cmd)
	cmd.AddCommand(newWithdrawalList(c), newWithdrawalShow(c))
	return cmd
}

func newWithdrawalList(c *clientFlags) *cobra.Command {
	return listing(c, &cobra.Command{Short: "List the latest withdrawals"},
		adminv1.AdminServiceClient.ListWithdrawals, &adminv1.ListWithdrawalsRequest{},
		[]string{"ID", "CAUSE", "WHAT", "BEGAN", "STATE", "NODES", "STREAMS", "P99", "MAX"},
		func(answer *adminv1.ListWithdrawalsResponse) (rows [][]string) {
			for _, w := range answer.GetWithdrawals() {
				p99, longest := "-", "-"
				if w.GetMax() != nil {
					p99, longest = milliseconds(w.GetP99().AsDuration()), milliseconds(w.GetMax().AsDuration())
				}
				rows = append(rows, []string{
					w.GetId(), w.GetCause(), cli.Cell(w.GetWhat()), w.GetBegan().AsTime().Local().Format(time.RFC3339), w.GetState(),
					fmt.Sprintf("%d/%d", w.GetNodesApplied(), w.GetNodes()), fmt.Sprintf("%d/%d", w.GetStreamsAcknowledged(), w.GetStreams()), p99, longest,
				})
			}
			return rows
		})
}

func newWithdrawalShow(c *clientFlags) *cobra.Command {
	var f waitFlags
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show one withdrawal: who has acknowledged it, who has not, and the time to effect",
		Args:  cobra.ExactArgs(1),
		ValidArgsFunction: completeArgs(1, func(ctx context.Context) (ids []cobra.Completion, _ error) {
			answer, err := call(ctx, c, adminv1.AdminServiceClient.ListWithdrawals, &adminv1.ListWithdrawalsRequest{})
			for _, w := range answer.GetWithdrawals() {
				ids = append(ids, cobra.CompletionWithDesc(w.GetId(), w.GetCause()+" "+w.GetWhat()))
			}
			return ids, err
		}),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if f.wait {
			return f.follow(cmd, c, args[0])
		}
		format, err := f.out.Format()
		if err != nil {
			return err
		}
		w, err := getWithdrawal(cmd.Context(), c, args[0])
		if err != nil {
			return err
		}
		if format == "json" {
			return cli.JSON(cmd.OutOrStdout(), w)
		}
		out := cmd.OutOrStdout()
		fmt.Fprintf(out, "%s %s\nbegan      %s\nstate      %s\n", w.GetCause(), cli.Printable(w.GetWhat()), w.GetBegan().AsTime().Local().Format(time.RFC3339), w.GetState())
		fmt.Fprintf(out, "progress   %s\n", withdrawalText(w))
		if w.GetMax() != nil {
			fmt.Fprintf(out, "effect     %s\n", effectText(w))
		}
		if w.GetRevocationEffect() != nil {
			fmt.Fprintf(out, "refused    by proxies after %s at the latest\n", milliseconds(w.GetRevocationEffect().AsDuration()))
		}
		for _, l := range w.GetLaggards() {
			fmt.Fprintf(out, "waiting    %s\n", withdrawalLaggard(time.Now(), l))
		}
		for _, a := range w.GetBelow() {
			fmt.Fprintf(out, "lives on   %s\n", withdrawalBelow(a))
		}
		return nil
	}
	f.add(cmd)
	return cmd
}

func getWithdrawal(ctx context.Context, c *clientFlags, id string) (*adminv1.Withdrawal, error) {
	answer, err := call(ctx, c, adminv1.AdminServiceClient.ListWithdrawals, &adminv1.ListWithdrawalsRequest{Id: id})
	if err != nil {
		return nil, err
	}
	if len(answer.GetWithdrawals()) != 1 {
		return nil, fmt.Errorf("the CA knows %d withdrawals %q", len(answer.GetWithdrawals()), id)
	}
	return answer.GetWithdrawals()[0], nil
}

// waitFlags are those of commands that withdraw something.
type waitFlags struct {
	wait    bool
	timeout time.Duration
	out     cli.OutputFlag
}

func (f *waitFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.wait, "wait", false, "wait until every proxy of the connected nodes that carried it has acknowledged that it is gone, and say how long that took; as JSON lines with -o json")
	cmd.Flags().DurationVar(&f.timeout, "timeout", 30*time.Second, "how long to wait")
	f.out.Add(cmd, "text", "json")
}

// after reports what was done, and waits for its effect if that is wanted. answer is
// printed with -o json.
func (f *waitFlags) after(cmd *cobra.Command, c *clientFlags, answer withdrawn, text string) error {
	format, err := f.out.Format()
	if err != nil {
		return err
	}
	switch {
	case format != "json":
		fmt.Fprint(cmd.OutOrStdout(), text)
	case !f.wait:
		return cli.JSON(cmd.OutOrStdout(), answer)
	}
	switch {
	case !f.wait:
		return nil
	case answer.GetWithdrawal() == "":
		return errors.New("it is in force; this CA is too old to say when it has taken effect")
	}
	return f.follow(cmd, c, answer.GetWithdrawal())
}

// followEvery is how often the progress of a withdrawal is asked for.
const followEvery = 50 * time.Millisecond

// follow shows the progress of a withdrawal until it is over.
func (f *waitFlags) follow(cmd *cobra.Command, c *clientFlags, id string) error {
	format, err := f.out.Format()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
	defer cancel()
	p := &withdrawalProgress{newChanges(cmd.OutOrStdout(), format)}
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	var last *adminv1.Withdrawal
	for {
		w, err := getWithdrawal(ctx, c, id)
		switch {
		case err == nil:
			last = w
			over, err := p.show(w)
			if err != nil || over {
				return err
			}
		case ctx.Err() == nil:
			p.end()
			return fmt.Errorf("%w\n  It is in force at the CA all the same", err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			p.end()
			if cmd.Context().Err() != nil {
				return fmt.Errorf("interrupted: it is in force at the CA; follow it with: ca withdrawal show %s", id)
			}
			return fmt.Errorf("it is in force at the CA, but not out of use everywhere after %s: %s%s\n  Follow it with: ca withdrawal show %s --wait",
				f.timeout, withdrawalText(last), laggardLines(last), id)
		}
	}
}

func laggardLines(w *adminv1.Withdrawal) string {
	var b strings.Builder
	for _, l := range w.GetLaggards() {
		fmt.Fprintf(&b, "\n  waiting for %s", withdrawalLaggard(time.Now(), l))
	}
	return b.String()
}

// withdrawalProgress shows how a withdrawal goes.
type withdrawalProgress struct{ changes }

// awayAfter is for how long a node that is not connected is waited for.
const awayAfter = 2 * time.Second

// onlyAway says whether nobody is waited for but nodes that are not connected: what
// they hold expires by itself, and they are told if they come back.
func onlyAway(w *adminv1.Withdrawal) bool {
	connected := func(l *adminv1.Laggard) bool { return l.GetConnected() }
	return w.GetCause() != "node" && len(w.GetLaggards()) > 0 && !slices.ContainsFunc(w.GetLaggards(), connected) &&
		time.Since(w.GetBegan().AsTime()) >= awayAfter
}

// show writes what has changed and reports whether the withdrawal is over, but for
// nodes that are away.
func (p *withdrawalProgress) show(w *adminv1.Withdrawal) (over bool, err error) {
	away := w.GetState() == "pending" && onlyAway(w)
	over = w.GetState() != "pending" || away
	text := withdrawalText(w)
	err = p.changes.show(w.GetState()+text, text, func() ([]byte, error) { return cli.MarshalJSON(w) })
	if !over || err != nil {
		return over, err
	}
	p.end()
	if !away && w.GetState() != "complete" {
		return true, fmt.Errorf("it is in force at the CA, but not known to be out of use everywhere: %s", text)
	}
	if !p.json {
		if w.GetMax() == nil {
			fmt.Fprintln(p.w, "out of use: no open stream carried it")
		} else {
			fmt.Fprintf(p.w, "out of use: time to effect %s\n", effectText(w))
		}
		if w.GetRevocationEffect() != nil {
			fmt.Fprintf(p.w, "refused by all proxies: after %s\n", milliseconds(w.GetRevocationEffect().AsDuration()))
		}
		for _, l := range w.GetLaggards() {
			fmt.Fprintf(p.w, "%s %s\n", cli.Paint(p.w, cli.Yellow, "not told:"), withdrawalLaggard(time.Now(), l))
		}
		for _, a := range w.GetBelow() {
			fmt.Fprintf(p.w, "%s %s\n", cli.Paint(p.w, cli.Yellow, "lives on:"), withdrawalBelow(a))
		}
	}
	return true, nil
}

func withdrawalText(w *adminv1.Withdrawal) string {
	parts := []string{
		fmt.Sprintf("carried out on %d of %d nodes", w.GetNodesApplied(), w.GetNodes()),
		fmt.Sprintf("%d of %d streams have acknowledged", w.GetStreamsAcknowledged(), w.GetStreams()),
	}
	for _, more := range []struct {
		n    uint32
		text string
	}{
		{w.GetStreamsEnded(), "%d ended before"},
		{w.GetNodesSilent(), "%d agents are too old to say"},
		{w.GetNodesGone(), "%d nodes are not waited for any more"},
	} {
		if more.n > 0 {
			parts = append(parts, fmt.Sprintf(more.text, more.n))
		}
	}
	if w.GetRevoked() > 0 {
		parts = append(parts, fmt.Sprintf("%d certificates revoked on %d of %d nodes", w.GetRevoked(), w.GetRevocationNodesInForce(), w.GetRevocationNodes()))
	}
	if w.GetNotRevoked() != "" {
		parts = append(parts, "not all of them: "+w.GetNotRevoked())
	}
	return strings.Join(parts, ", ")
}

func effectText(w *adminv1.Withdrawal) string {
	return fmt.Sprintf("p50 %s, p99 %s, max %s", milliseconds(w.GetP50().AsDuration()), milliseconds(w.GetP99().AsDuration()), milliseconds(w.GetMax().AsDuration()))
}

func milliseconds(d time.Duration) string { return d.Round(time.Millisecond).String() }

// withdrawalBelow says what of a CA below a withdrawal does not end.
func withdrawalBelow(a *adminv1.AuthorityBelow) string {
	const cure = "only its root's leaving ends that sooner: ca authority rotate root --compromised"
	if a.GetNotAfter() == nil {
		return fmt.Sprintf("%s (a CA below): it gets no other intermediate, and what it has is not known now: the store cannot be read; %s", a.GetSpiffeId(), cure)
	}
	return fmt.Sprintf("%s (a CA below): its intermediate %s signs what this mesh believes until %s; %s",
		a.GetSpiffeId(), a.GetId(), a.GetNotAfter().AsTime().UTC().Format(time.RFC3339), cure)
}

func withdrawalLaggard(now time.Time, l *adminv1.Laggard) string {
	since := cli.Short(max(now.Sub(l.GetSince().AsTime()), 0))
	switch {
	case !l.GetConnected() && l.GetWaitedUntil() == nil:
		return fmt.Sprintf("%s: not connected", l.GetNodeId())
	case !l.GetConnected():
		return fmt.Sprintf("%s: not connected, last heard of %s ago; what it holds expires by itself, its own certificate at %s",
			l.GetNodeId(), since, l.GetWaitedUntil().AsTime().UTC().Format(time.RFC3339))
	case l.GetName() == "":
		return fmt.Sprintf("%s: its agent has not carried it out, since %s", l.GetNodeId(), since)
	default:
		return fmt.Sprintf("%s: %s has not acknowledged, since %s", l.GetNodeId(), cli.Printable(l.GetName()), since)
	}
}
