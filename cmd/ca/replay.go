package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/audit"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

func newEntryReplay() *cobra.Command {
	f := &ledgerFlags{}
	var file, since, until string
	var prune bool
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "replay -f FILE [--since TIME] [--until TIME]",
		Short: "Say what other entries would have made of recorded decisions",
		Long: `Replay judges the decisions in the ledger by the entries of a file: which
certificates would not have been issued, and why; which would have carried another
identity; which refusals would have been issuances. As with apply, entries that
are not in the file stay as they are in the ledger; with --prune, they are gone.

It reads the journal's folder: no CA need run, and a copied folder is as good.
Times are how long ago (24h, 7d), local time (2026-11-25 14:00) or RFC 3339.
Exit code 1 if anything would have been different.`,
		Example: `  ca entry replay -f entries.yaml
  ca entry replay -f entries.d/ --prune --since 7d --until 24h
  ca entry replay -f new.yaml --since "2026-11-24 09:00" --dir /mnt/copy/ledger -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			now := time.Now()
			from, err := cli.Time(since, now, time.Local)
			if err != nil {
				return fmt.Errorf("--since: %w", err)
			}
			to, err := cli.Time(until, now, time.Local)
			if err != nil {
				return fmt.Errorf("--until: %w", err)
			}
			if !from.Before(to) {
				return fmt.Errorf("--since %s is not before --until %s", from.Format(time.RFC3339), to.Format(time.RFC3339))
			}
			dir, err := f.path()
			if err != nil {
				return err
			}
			set, err := replaySet(cmd, dir, file, prune)
			if err != nil {
				return err
			}
			show, end := cli.Progress(cmd.ErrOrStderr(), "records judged")
			defer end()
			report, err := audit.Replay(cmd.Context(), dir, set, from, to, show)
			if err != nil {
				return err
			}
			end()
			if format == "text" {
				writeReplay(cmd.OutOrStdout(), report)
			} else if err := cli.JSON(cmd.OutOrStdout(), report); err != nil {
				return err
			}
			if len(report.Groups) > 0 || report.Uncounted > 0 {
				return &cli.ExitError{Code: 1}
			}
			return nil
		},
	}
	fileFlag(cmd, &file)
	f.add(cmd)
	cmd.Flags().BoolVar(&prune, "prune", false, "the file is the whole set: entries that are not in it are gone")
	cmd.Flags().StringVar(&since, "since", "24h", "judge decisions from this time on")
	cmd.Flags().StringVar(&until, "until", "now", "judge decisions before this time")
	out.Add(cmd, "text", "json")
	return cmd
}

// replaySet compiles the entries of a file for the ledger's trust domain, over
// those that the ledger says were in force.
func replaySet(cmd *cobra.Command, dir, file string, prune bool) (*identity.Set, error) {
	td, err := ledgerTrustDomain(dir)
	if err != nil {
		return nil, err
	}
	entries, err := readEntries(file, cmd.InOrStdin(), td)
	if err != nil {
		return nil, err
	}
	all := map[string]*entryv1.Entry{}
	if !prune {
		if all, err = inForce(cmd.Context(), dir, cmd.ErrOrStderr()); err != nil {
			return nil, err
		}
	}
	for _, e := range entries {
		all[e.GetName()] = e
	}
	compiled := make([]*identity.Entry, 0, len(all))
	for name, e := range all {
		c, err := identity.Compile(td, e)
		if err != nil {
			return nil, fmt.Errorf("entry %s, as the ledger has it: %w", name, err)
		}
		compiled = append(compiled, c)
	}
	return identity.NewSet(compiled...), nil
}

func inForce(ctx context.Context, dir string, stderr io.Writer) (map[string]*entryv1.Entry, error) {
	show, end := cli.Progress(stderr, "segments searched for entries")
	defer end()
	all, err := audit.InForce(ctx, dir, func(done, all int) { show(uint64(max(done, 0)), uint64(max(all, 0))) })
	if errors.Is(err, audit.ErrNoEntries) {
		return nil, fmt.Errorf("%w\n  Give a file with all entries, and --prune", err)
	}
	return all, err
}

// ledgerTrustDomain is that of the newest record.
func ledgerTrustDomain(dir string) (spiffeid.TrustDomain, error) {
	size, err := ledger.Size(dir)
	if err != nil {
		return spiffeid.TrustDomain{}, err
	}
	if size == 0 {
		return spiffeid.TrustDomain{}, fmt.Errorf("there is no record in %s", dir)
	}
	for e, err := range ledger.Scan(dir, size-1) {
		if err != nil {
			return spiffeid.TrustDomain{}, err
		}
		return identity.ParseTrustDomain(e.Record.GetTrustDomain())
	}
	return spiffeid.TrustDomain{}, fmt.Errorf("there is no record in %s", dir)
}

func writeReplay(w io.Writer, r *audit.Report) {
	fmt.Fprintf(w, "%d issuances and %d refusals from %s to %s: %d would be the same\n", r.Issued, r.Refusals,
		r.Since.Local().Format(time.RFC3339), r.Until.Local().Format(time.RFC3339), r.Kept)
	if r.Other > 0 {
		fmt.Fprintf(w, "not decided by entries: %d\n", r.Other)
	}
	for _, g := range r.Groups {
		count := fmt.Sprintf("  %d records of %d instances, the last is record %d", g.Records, g.Instances, g.LastIndex)
		switch g.Effect {
		case audit.Refused:
			fmt.Fprintf(w, "%s %s by entry/%s\n  %s\n", cli.Paint(w, cli.Red, "refused"), cli.Printable(g.SPIFFEID), g.Entry, missLine(g.Miss))
		case audit.Changed:
			fmt.Fprintf(w, "%s %s by entry/%s\n  would be %s\n", cli.Paint(w, cli.Yellow, "changed"),
				named(g.SPIFFEID, g.DNSNames), g.Entry, named(g.Would, g.WouldDNSNames))
		case audit.Allowed:
			fmt.Fprintf(w, "%s %s by entry/%s\n  was refused: %s\n", cli.Paint(w, cli.Yellow, "allowed"),
				named(g.Would, g.WouldDNSNames), cli.Printable(g.Entry), g.Reason)
		}
		fmt.Fprintln(w, count)
		for _, s := range g.Samples {
			fmt.Fprintf(w, "    %s on %s\n", cli.Printable(s.Instance), cli.Printable(s.Node))
		}
	}
	if r.Uncounted > 0 {
		fmt.Fprintf(w, "and %d more records with an effect of other kinds\n", r.Uncounted)
	}
}

// named is an identity with its DNS names.
func named(id string, dns []string) string {
	if len(dns) > 0 {
		id += " (" + strings.Join(dns, ", ") + ")"
	}
	return cli.Printable(id)
}
