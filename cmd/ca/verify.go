package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/tree"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// exitDamaged is the exit code for a ledger that was tampered with.
const exitDamaged = 2

// found gives damage its exit code.
func found(err error) error {
	if err == nil || !damaged(err) {
		return err
	}
	return &cli.ExitError{Code: exitDamaged, Err: fmt.Errorf("error: %w", err)}
}

// verifyFlags are those of `ca ledger verify`.
type verifyFlags struct {
	treeFlags
	head       string
	checkpoint string
	proof      string
	cert       string
	out        cli.OutputFlag
}

func newLedgerVerify(l *ledgerFlags) *cobra.Command {
	f := &verifyFlags{treeFlags: treeFlags{ledgerFlags: l}}
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check that no record was changed, removed or moved",
		Long: `Check the whole ledger: every record of the journal and its hash chain; every
tile and entry bundle of the tree; that both have the same records; and the
signatures of the checkpoints. The CA need not run, and copied folders are as good
as the originals (copy "tree" before "ledger" while the CA runs).

With --proof, check one proof, for which nothing else is needed.

A ledger proves by itself that nothing was changed by somebody without the log's
key. Against the loss of its end, and against whoever has the key, keep heads or
checkpoints elsewhere, and give them with --head and --checkpoint.

Exit codes: 0 all is as it was written; 1 it could not be checked; 2 it is not: the
message names the first record, segment or tile.`,
		Example: `  ca ledger verify
  ca ledger verify --dir /mnt/copy/ledger --key "$VKEY" --checkpoint monday.checkpoint -o json
  ca ledger verify --proof svid.tlog-proof --cert svid.pem --key "$VKEY"`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := f.out.Format()
			if err != nil {
				return err
			}
			if f.proof != "" {
				return f.verifyProof(cmd, format)
			}
			return f.verifyLedger(cmd, format)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.head, "head", "", "a head that an earlier verify printed: proves that nothing before it was changed or cut off since")
	cmd.Flags().StringVar(&f.checkpoint, "checkpoint", "", "file with a checkpoint that was kept elsewhere: proves the same of the tree")
	cmd.Flags().StringVar(&f.proof, "proof", "", "file with a proof that \"ca ledger prove\" has written")
	cmd.Flags().StringVar(&f.cert, "cert", "", "with --proof: the certificate, in PEM or DER, that the record must be of")
	f.out.Add(cmd, "text", "json")
	cmd.MarkFlagsMutuallyExclusive("proof", "head")
	cmd.MarkFlagsMutuallyExclusive("proof", "checkpoint")
	return cmd
}

// verifyProof checks one proof.
func (f *verifyFlags) verifyProof(cmd *cobra.Command, format string) error {
	key, witnesses, err := f.verifiers()
	if err != nil {
		return err
	}
	b, err := readInput(f.proof)
	if err != nil {
		return fmt.Errorf("--proof: %w", err)
	}
	p, err := tree.ParseProof(b)
	if err != nil {
		return fmt.Errorf("--proof %s: %w", f.proof, err)
	}
	c, err := p.Check(key, witnesses...)
	if err == nil {
		err = cosigned(c, witnesses)
	}
	if err != nil {
		return refuse("--proof %s: %w", f.proof, err)
	}
	e := ledger.Entry{Index: p.Index, Record: new(ledgerv1.Record), Raw: p.Record, Hash: sha256.Sum256(append([]byte{0}, p.Record...))}
	if err := proto.Unmarshal(p.Record, e.Record); err != nil {
		return refuse("--proof %s: the record is in the log, and does not decode: %w", f.proof, err)
	}
	if f.cert != "" {
		leaf, err := readCertificate(f.cert)
		if err != nil {
			return fmt.Errorf("--cert: %w", err)
		}
		if sum := sha256.Sum256(leaf.Raw); string(sum[:]) != string(e.Record.GetCertificate().GetSha256()) {
			return refuse("--cert %s: the record is that of another certificate, with the serial %x", f.cert, e.Record.GetCertificate().GetSerial())
		}
	}
	w := cmd.OutOrStdout()
	if format == "json" {
		return writeRecord(w, format, e)
	}
	fmt.Fprintf(w, "record %d is in the log %s, under a checkpoint of %d records%s\n", p.Index, c.Origin, c.Size, by(c))
	return writeRecord(w, format, e)
}

// refuse is an error with the exit code for what was tampered with.
func refuse(format string, args ...any) error {
	return &cli.ExitError{Code: exitDamaged, Err: fmt.Errorf("error: "+format, args...)}
}

// by names who has cosigned.
func by(c tree.Checkpoint) string {
	if len(c.Cosigned) == 0 {
		return ""
	}
	return ", cosigned by " + strings.Join(c.Cosigned, " and ")
}

// cosigned checks that each of the witnesses has cosigned.
func cosigned(c tree.Checkpoint, witnesses []note.Verifier) error {
	for _, w := range witnesses {
		if !slices.Contains(c.Cosigned, w.Name()) {
			return fmt.Errorf("%w: the checkpoint of %d records has no cosignature by %s", tree.ErrSignature, c.Size, w.Name())
		}
	}
	return nil
}

// verification is what verify prints as JSON.
type verification struct {
	OK      bool          `json:"ok"`
	Error   string        `json:"error,omitempty"`
	Damage  *damageFound  `json:"damage,omitempty"`
	Journal journalFound  `json:"journal"`
	Tree    *treeVerified `json:"tree,omitempty"`
}

type damageFound struct {
	File   string `json:"file"`
	Offset *int64 `json:"offset,omitempty"`
	Record uint64 `json:"record"`
	Reason string `json:"reason"`
}

type journalFound struct {
	Name     string `json:"name"`
	First    uint64 `json:"first"`
	Records  uint64 `json:"records"`
	Segments int    `json:"segments"`
	Bytes    int64  `json:"size_bytes"`
	Torn     int64  `json:"torn_bytes"`
	Head     string `json:"head"`
}

type treeVerified struct {
	Origin        string   `json:"origin"`
	Records       uint64   `json:"records"`
	Root          string   `json:"root"`
	Published     uint64   `json:"published"`
	Cosigned      []string `json:"cosigned"`
	BundlesAbsent int      `json:"bundles_absent"`
}

// verifyLedger checks journal and tree.
func (f *verifyFlags) verifyLedger(cmd *cobra.Command, format string) error {
	if f.cert != "" {
		return errors.New("--cert goes with --proof; `ca ledger prove --cert` makes one")
	}
	journal, dir, err := f.dirs()
	if err != nil {
		return err
	}
	v := tree.Verifier{}
	if f.head != "" {
		head, err := ledger.ParseHead(f.head)
		if err != nil {
			return fmt.Errorf("--head: %w", err)
		}
		v.KnownHeads = []ledger.Head{head}
	}
	report, withTree, err := f.check(cmd, v, journal, dir)
	if err != nil && !damaged(err) {
		return err
	}
	if format == "json" {
		if werr := cli.JSON(cmd.OutOrStdout(), describe(report, withTree, err)); werr != nil {
			return werr
		}
		return found(err)
	}
	if err != nil {
		return found(err)
	}
	return writeReport(cmd.OutOrStdout(), report, withTree, dir)
}

// check verifies the journal, and the tree if there is one or it was asked for.
func (f *verifyFlags) check(cmd *cobra.Command, v tree.Verifier, journal, dir string) (tree.Report, bool, error) {
	progress := newProgress(cmd.Context(), cmd.ErrOrStderr())
	defer progress.stop()
	v.Progress = progress.add
	_, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) && f.tree == "" && f.key == "" && f.checkpoint == "" {
		r, err := ledger.Verifier{Known: v.KnownHeads, Progress: v.Progress}.Verify(cmd.Context(), journal)
		return tree.Report{Journal: r}, false, err
	}
	if v.Key, v.Witnesses, err = f.verifiers(); err != nil {
		return tree.Report{}, true, err
	}
	if f.checkpoint != "" {
		b, err := readInput(f.checkpoint)
		if err != nil {
			return tree.Report{}, true, fmt.Errorf("--checkpoint: %w", err)
		}
		c, err := tree.ParseCheckpoint(b, v.Key)
		if err != nil {
			return tree.Report{}, true, fmt.Errorf("--checkpoint %s: %w", f.checkpoint, err)
		}
		v.Known = []tree.Checkpoint{c}
	}
	r, err := v.Verify(cmd.Context(), dir, journal)
	if err == nil {
		err = cosigned(r.Published, v.Witnesses)
	}
	return r, true, err
}

// describe makes the JSON form.
func describe(r tree.Report, withTree bool, err error) verification {
	j := r.Journal
	v := verification{OK: err == nil, Journal: journalFound{
		Name: j.Journal, First: j.First, Records: j.Head.Size, Segments: j.Segments, Bytes: j.SizeBytes, Torn: j.TornBytes, Head: j.Head.String(),
	}}
	if withTree {
		v.Tree = &treeVerified{
			Origin: r.Checkpoint.Origin, Records: r.Checkpoint.Size, Root: hex.EncodeToString(r.Checkpoint.Root[:]),
			Published: r.Published.Size, Cosigned: append([]string{}, r.Published.Cosigned...), BundlesAbsent: r.BundlesAbsent,
		}
	}
	if err == nil {
		return v
	}
	v.Error = err.Error()
	if d, ok := errors.AsType[*tree.DamageError](err); ok {
		v.Damage = &damageFound{File: "tree/" + d.Path, Record: d.Index, Reason: d.Reason}
	} else if d, ok := errors.AsType[*ledger.DamageError](err); ok {
		v.Damage = &damageFound{File: "ledger/" + d.Segment, Offset: &d.Offset, Record: d.Index, Reason: d.Reason}
	}
	return v
}

// count says how many there are, with the noun's plural.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func writeReport(w io.Writer, r tree.Report, withTree bool, dir string) error {
	j := r.Journal
	fmt.Fprintf(w, "%d records in %s are intact\nhead %s\n", j.Head.Size-j.First, count(j.Segments, "segment"), j.Head)
	if j.First > 0 {
		fmt.Fprintf(w, "those before record %d were archived\n", j.First)
	}
	if j.TornBytes > 0 {
		fmt.Fprintf(w, "%d bytes behind them are of a write that is going on or was interrupted\n", j.TornBytes)
	}
	if !withTree {
		fmt.Fprintf(w, "there is no tree at %s: signatures were not checked\n", dir)
		return nil
	}
	fmt.Fprintf(w, "the tree of the log %s has the same %d records, root %x, signed%s\n", r.Checkpoint.Origin, r.Checkpoint.Size, r.Checkpoint.Root, by(r.Published))
	if r.BundlesAbsent > 0 {
		fmt.Fprintf(w, "%d entry bundles of archived records are not there\n", r.BundlesAbsent)
	}
	return nil
}
