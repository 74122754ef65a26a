package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/meshid/meshid/internal/cli"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func newWhoCommand() *cobra.Command {
	f := &listFlags{}
	req := &adminv1.WhoRequest{}
	var when string
	cmd := &cobra.Command{
		Use:   "who (SPIFFE-ID | --node NODE | --root ID | --authority ID | --entry NAME)",
		Short: "Show who holds valid certificates",
		Long: `Who shows the X.509-SVIDs that are valid now, or were at another time: for an
identity, on a node, by an entry, under an authority, or under a root, which is
under all intermediates that chain to it, of all CAs; with several, those for which
all hold.

STATE says whether it is in use, as far as the CA knows: current, replaced by a
newer one, dropped (the workload ended), or withdrawn (the node was evicted or
banned). Each is valid until it expires all the same.`,
		Example: `  ca who spiffe://example.org/shop/orders
  ca who --node web-1 --at 2026-11-23T02:00:00Z -o csv
  ca who --root 0a1b2c3d --current --all`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			format, zone, err := f.begin()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				req.SpiffeId = args[0]
			}
			if req.GetSpiffeId()+req.GetNode()+req.GetAuthority()+req.GetRoot()+req.GetEntry() == "" {
				return fmt.Errorf("say who: a SPIFFE ID, --node, --root, --authority or --entry")
			}
			if req.At, err = f.when("at", when); err != nil {
				return err
			}
			rows := cli.NewRows(cmd.OutOrStdout(), format, "SPIFFE ID", "NODE", "WORKLOAD", "STATE", "SERIAL", "KEY SHA-256", "NOT AFTER", "ENTRY", "AUTHORITY")
			ask := func(ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page) (grpc.ServerStreamingClient[adminv1.WhoResponse], error) {
				req.Page = p
				return client.Who(ctx, req)
			}
			return list(cmd, f, rows, ask, func(m *adminv1.WhoResponse) error {
				return addHolders(rows, m.GetHolders(), func(h *adminv1.Holder) []string {
					r := h.GetIssued().GetRecord()
					return []string{
						r.GetSpiffeId(), nodeName(format, r), workload(r), h.GetState(), hex.EncodeToString(r.GetCertificate().GetSerial()),
						hex.EncodeToString(r.GetCertificate().GetSpkiSha256()), at(r.GetCertificate().GetNotAfter(), zone),
						entryAt(r.GetEntry()), r.GetAuthority().GetId(),
					}
				})
			})
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return f.c.names(cmd.Context(), "identity", prefix), cobra.ShellCompDirectiveNoFileComp
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&req.Node, "node", "", "node: its SPIFFE ID, or the last part of it")
	cmd.Flags().StringVar(&req.Authority, "authority", "", "authority that signed: its subject key identifier, as \"ca authority list\" shows it, or the beginning of it")
	cmd.Flags().StringVar(&req.Root, "root", "", "root that it chains to: its subject key identifier or the SHA-256 of its certificate, or the beginning of one")
	cmd.Flags().StringVar(&req.Entry, "entry", "", "name of the entry that allowed it")
	cmd.Flags().StringVar(&when, "at", "", "valid then, not now")
	cmd.Flags().BoolVar(&req.Current, "current", false, "only those in use")
	f.c.complete(cmd, "node", "node")
	f.c.complete(cmd, "entry", "entry")
	f.c.complete(cmd, "authority", "authority")
	f.c.complete(cmd, "root", "authority")
	return cmd
}

// nodeName is a node's name: short in a table.
func nodeName(format string, r *ledgerv1.Record) string {
	if format == "table" {
		return nodeShort(r.GetNode().GetId())
	}
	return r.GetNode().GetId()
}

// workload is what a person knows a workload by: the container's name, or the
// executable.
func workload(r *ledgerv1.Record) string {
	switch w := r.GetWorkload(); {
	case w.GetDocker().GetName() != "":
		return w.GetDocker().GetName()
	case w.GetUnix().GetPath() != "":
		return fmt.Sprintf("%s (uid %d)", w.GetUnix().GetPath(), w.GetUnix().GetUid())
	default:
		return r.GetInstance()
	}
}

// holderFields are what JSON says of a holder beside the record.
type holderFields struct {
	State      string  `json:"state"`
	Since      string  `json:"since"`
	ReplacedBy *uint64 `json:"replaced_by,omitempty"`
}

// addHolders adds holders to a list.
func addHolders(rows *cli.Rows, holders []*adminv1.Holder, cells func(*adminv1.Holder) []string) error {
	for _, h := range holders {
		err := rows.Add(func() []string { return cells(h) }, func() ([]byte, error) {
			return withRecord(h.GetIssued(), holderFields{
				State: h.GetState(), Since: h.GetSince().AsTime().Format(time.RFC3339Nano), ReplacedBy: h.ReplacedBy,
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func newLedgerFirstSeen() *cobra.Command {
	f := &listFlags{}
	var since, node string
	cmd := &cobra.Command{
		Use:   "first-seen",
		Short: "Show identities that were new on a node",
		Long: `First-seen shows the first issuance of each identity through each node, the newest
first. NEW IDENTITY says that no node had it before; else it was new only there.`,
		Example: `  ca ledger first-seen --since 7d
  ca ledger first-seen --node web-1 --since 30d`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, zone, err := f.begin()
			if err != nil {
				return err
			}
			from, err := f.when("since", since)
			if err != nil {
				return err
			}
			rows := cli.NewRows(cmd.OutOrStdout(), format, "TIME", "RECORD", "SPIFFE ID", "NODE", "NEW IDENTITY", "WORKLOAD", "ENTRY", "SERIAL")
			ask := func(ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page) (grpc.ServerStreamingClient[adminv1.FirstSeenResponse], error) {
				return client.FirstSeen(ctx, &adminv1.FirstSeenRequest{Since: from, Node: node, Page: p})
			}
			return list(cmd, f, rows, ask, func(m *adminv1.FirstSeenResponse) error {
				for _, s := range m.GetSightings() {
					err := rows.Add(func() []string {
						r := s.GetIssued().GetRecord()
						fresh := "no"
						if s.GetNewIdentity() {
							fresh = "yes"
						}
						return []string{
							at(r.GetTime(), zone), fmt.Sprint(s.GetIssued().GetIndex()), r.GetSpiffeId(), nodeName(format, r), fresh, workload(r),
							entryAt(r.GetEntry()), hex.EncodeToString(r.GetCertificate().GetSerial()),
						}
					}, func() ([]byte, error) {
						return withRecord(s.GetIssued(), struct {
							NewIdentity bool `json:"new_identity"`
						}{s.GetNewIdentity()})
					})
					if err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&since, "since", "7d", "from then on: a time, or how long ago")
	cmd.Flags().StringVar(&node, "node", "", "only on this node: its SPIFFE ID, or the last part of it")
	f.c.complete(cmd, "node", "node")
	return cmd
}

func newLedgerOverdue() *cobra.Command {
	f := &listFlags{}
	var expired string
	cmd := &cobra.Command{
		Use:   "overdue",
		Short: "Show certificates that should have been renewed by now",
		Long: `Overdue shows the X.509-SVIDs that are in use and were not replaced by the time at
which three quarters of their life were over, those that have waited longest
first. The CA has agents renew at half of the life, give or take 30 %, so one in
this list has a node that is away, or was refused: see "ca node list" and "ca
ledger find --spiffe-id ID --node NODE --outcome refused".`,
		Example: `  ca ledger overdue
  ca ledger overdue --expired-since 24h`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, zone, err := f.begin()
			if err != nil {
				return err
			}
			since, err := f.when("expired-since", expired)
			if err != nil {
				return err
			}
			rows := cli.NewRows(cmd.OutOrStdout(), format, "OVERDUE SINCE", "EXPIRES", "SPIFFE ID", "NODE", "WORKLOAD", "SERIAL", "ENTRY")
			ask := func(ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page) (grpc.ServerStreamingClient[adminv1.OverdueResponse], error) {
				return client.Overdue(ctx, &adminv1.OverdueRequest{ExpiredSince: since, Page: p})
			}
			now := time.Now()
			return list(cmd, f, rows, ask, func(m *adminv1.OverdueResponse) error {
				return addHolders(rows, m.GetHolders(), func(h *adminv1.Holder) []string {
					r := h.GetIssued().GetRecord()
					expires := at(r.GetCertificate().GetNotAfter(), zone)
					if format == "table" {
						expires = cli.Until(now, r.GetCertificate().GetNotAfter().AsTime())
					}
					return []string{
						at(h.GetSince(), zone), expires, r.GetSpiffeId(), nodeName(format, r), workload(r),
						hex.EncodeToString(r.GetCertificate().GetSerial()), entryAt(r.GetEntry()),
					}
				})
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&expired, "expired-since", "", "also those that expired without a successor since then, such as 24h")
	return cmd
}

func newLedgerNewlyAllowed() *cobra.Command {
	f := &listFlags{}
	req := &adminv1.NewlyAllowedRequest{}
	cmd := &cobra.Command{
		Use:   "newly-allowed --entry NAME",
		Short: "Show what a change of an entry newly allowed",
		Long: `Newly-allowed shows the issuances under a revision of an entry that the revision
before would have refused, or would have given another name: each is judged again
with the facts in its record. WHY NOT BEFORE names the term that was false.

It is about this one entry: another entry may have allowed the same before.`,
		Example: `  ca ledger find --entry shop --event entry_applied
  ca ledger newly-allowed --entry shop --revision 17`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, zone, err := f.begin()
			if err != nil {
				return err
			}
			rows := cli.NewRows(cmd.OutOrStdout(), format, "TIME", "RECORD", "SPIFFE ID", "NODE", "WORKLOAD", "SERIAL", "WHY NOT BEFORE")
			var judged, revision, previous uint64
			ask := func(ctx context.Context, client adminv1.LedgerServiceClient, p *adminv1.Page) (grpc.ServerStreamingClient[adminv1.NewlyAllowedResponse], error) {
				req.Page = p
				return client.NewlyAllowed(ctx, req)
			}
			err = list(cmd, f, rows, ask, func(m *adminv1.NewlyAllowedResponse) error {
				judged += m.GetJudged()
				revision, previous = m.GetRevision(), m.GetPreviousRevision()
				return addIssuances(rows, m.GetIssuances(), format, zone)
			})
			if err == nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "%d of %d issuances under revision %d were not allowed by %s\n", rows.Len(), judged, revision, before(previous))
			}
			return err
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&req.Entry, "entry", "", "name of the entry")
	cmd.Flags().Uint64Var(&req.Revision, "revision", 0, "the revision, as entry_applied records have it; the newest by default")
	_ = cmd.MarkFlagRequired("entry")
	f.c.complete(cmd, "entry", "entry")
	return cmd
}

// before names the revision before.
func before(revision uint64) string {
	if revision == 0 {
		return "anything before: the entry was new"
	}
	return fmt.Sprintf("revision %d", revision)
}

// missFields are what JSON says of an issuance beside the record.
type missFields struct {
	Field string `json:"field"`
	Term  string `json:"term"`
	Why   string `json:"why"`
}

// addIssuances adds what was newly allowed to a list.
func addIssuances(rows *cli.Rows, list []*adminv1.NewlyAllowedResponse_Issuance, format string, zone *time.Location) error {
	for _, i := range list {
		err := rows.Add(func() []string {
			r := i.GetIssued().GetRecord()
			why := i.GetField() + ": "
			if i.GetTerm() != "" {
				why += i.GetTerm() + ": "
			}
			return []string{
				at(r.GetTime(), zone), fmt.Sprint(i.GetIssued().GetIndex()), r.GetSpiffeId(), nodeName(format, r), workload(r),
				hex.EncodeToString(r.GetCertificate().GetSerial()), why + i.GetWhy(),
			}
		}, func() ([]byte, error) {
			return withRecord(i.GetIssued(), missFields{i.GetField(), i.GetTerm(), i.GetWhy()})
		})
		if err != nil {
			return err
		}
	}
	return nil
}
