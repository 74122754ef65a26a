package main

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

func newLedgerArchive(l *ledgerFlags) *cobra.Command {
	c := &clientFlags{}
	var before, to, tz string
	var dry bool
	cmd := &cobra.Command{
		Use:   "archive --before TIME --to FOLDER",
		Short: "Move old records out of the ledger into a folder",
		Long: `Archive has the running CA move the segments of its ledger whose records are all
older than a time into a folder on its machine: each is copied, made durable and
verified before it leaves the ledger. Everything stays provable: "ca ledger archive
verify FOLDER" verifies the archive and the ledger as one, and a folder is as
readable as the ledger itself ("ca ledger tail --dir FOLDER").

Nothing is archived that a sink has not taken.`,
		Example: `  ca ledger archive --before 90d --to /srv/archive/2026-q3
  ca ledger archive --before 2026-10-01 --tz UTC --to /srv/archive/2026-q3 --dry-run`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			zone, err := cli.Zone(tz)
			if err != nil {
				return fmt.Errorf("--tz: %w", err)
			}
			t, err := cli.Time(before, time.Now(), zone)
			if err != nil {
				return fmt.Errorf("--before %w", err)
			}
			folder, err := filepath.Abs(to)
			if err != nil {
				return err
			}
			return archive(cmd, c, &adminv1.ArchiveRequest{Before: timestamppb.New(t), Folder: folder, DryRun: dry})
		},
	}
	c.add(cmd)
	cmd.Flags().StringVar(&before, "before", "", "records of before then: a time, or how long ago, such as 90d")
	cmd.Flags().StringVar(&to, "to", "", "the folder; made if it is missing")
	cmd.Flags().StringVar(&tz, "tz", "local", "time zone of --before, if it has none")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "say what would be archived, and move nothing")
	_ = cmd.MarkFlagRequired("before")
	_ = cmd.MarkFlagRequired("to")
	cmd.AddCommand(newLedgerArchiveVerify(l))
	return cmd
}

// archive makes the call and shows its progress.
func archive(cmd *cobra.Command, c *clientFlags, req *adminv1.ArchiveRequest) (err error) {
	conn, closeConn, err := c.dial(cmd.Context())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn()) }()
	stream, err := adminv1.NewLedgerServiceClient(conn).Archive(cmd.Context(), req)
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		switch {
		case err != nil:
			return err
		case !m.GetDone():
			fmt.Fprintf(cmd.ErrOrStderr(), "%d of %d segments copied\n", m.GetCopied(), m.GetSegments())
		case req.GetDryRun():
			fmt.Fprintf(cmd.OutOrStdout(), "%d records are older; the segments that hold no other would be archived\n", m.GetRecords())
			return nil
		case m.GetSegments() == 0:
			fmt.Fprintln(cmd.OutOrStdout(), "nothing to archive: no closed segment holds only records of before then")
			return nil
		default:
			fmt.Fprintf(cmd.OutOrStdout(), "%d records in %d segments archived in %s\nhead %s\n", m.GetRecords(), m.GetSegments(), req.GetFolder(), m.GetHead())
			return nil
		}
	}
}

func newLedgerArchiveVerify(l *ledgerFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "verify FOLDER...",
		Short: "Verify folders of an archive and the ledger as one",
		Long: `Verify checks every record in the folders and in the ledger (--dir), and that they
follow one another without gap or change. The CA need not run.`,
		Example: `  ca ledger archive verify /srv/archive/2026-q2 /srv/archive/2026-q3
  ca ledger archive verify --dir /mnt/copy/ledger /mnt/copy/archive`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := l.path()
			if err != nil {
				return err
			}
			type part struct {
				dir    string
				report ledger.Report
			}
			parts := make([]part, 0, len(args)+1)
			for _, folder := range append(slices.Clone(args), dir) {
				report, err := ledger.Verify(cmd.Context(), folder)
				if err != nil {
					return fmt.Errorf("%s: %d records are intact, then: %w", folder, report.Head.Size, err)
				}
				parts = append(parts, part{folder, report})
			}
			slices.SortStableFunc(parts, func(a, b part) int { return cmp.Compare(a.report.First, b.report.First) })
			dirs, reports := make([]string, len(parts)), make([]ledger.Report, len(parts))
			for i, p := range parts {
				dirs[i], reports[i] = p.dir, p.report
				fmt.Fprintf(cmd.OutOrStdout(), "records %d to %d: %s\n", p.report.First, p.report.Head.Size, p.dir)
			}
			if err := ledger.Joined(dirs, reports); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%d records are intact, from %d on, and follow one another\nhead %s\n",
				reports[len(reports)-1].Head.Size-reports[0].First, reports[0].First, reports[len(reports)-1].Head)
			return nil
		},
	}
}
