package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/tree"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// maxInput bounds the files that proofs are checked with.
const maxInput = 1 << 20

// Folders of the ledger's tree and its key, below the data folder.
func treeDir(dataDir string) string { return filepath.Join(dataDir, "tree") }
func logKey(dataDir string) string  { return filepath.Join(dataDir, "keys", "log.key") }

// treeFlags say where the tree of a journal is, and which keys are believed.
type treeFlags struct {
	*ledgerFlags
	tree      string
	key       string
	witnesses []string
}

func (f *treeFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.tree, "tree", "", "folder of the tree; by default the folder \"tree\" beside the journal")
	cmd.Flags().StringVar(&f.key, "key", "", "the log's public key as \"ca ledger key\" prints it, or a file with it; by default that of the CA on this machine")
	cmd.Flags().StringArrayVar(&f.witnesses, "witness", nil, "public key of a witness whose cosignature must be there; may be repeated")
}

// dirs returns the folders of the journal and the tree.
func (f *treeFlags) dirs() (journal, dir string, err error) {
	if journal, err = f.path(); err != nil {
		return "", "", err
	}
	if f.tree != "" {
		return journal, f.tree, nil
	}
	return journal, treeDir(filepath.Dir(filepath.Clean(journal))), nil
}

// verifiers returns the keys. That of the log is read beside the journal if none
// was given.
func (f *treeFlags) verifiers() (key note.Verifier, witnesses []note.Verifier, err error) {
	for _, w := range f.witnesses {
		v, err := tree.ParseWitnessKey(w)
		if err != nil {
			return nil, nil, fmt.Errorf("--witness: %w", err)
		}
		witnesses = append(witnesses, v)
	}
	if f.key != "" {
		text := f.key
		if !strings.Contains(text, "+") {
			b, err := readInput(text)
			if err != nil {
				return nil, nil, fmt.Errorf("--key: %w", err)
			}
			text = string(b)
		}
		key, err := tree.ParseVerifierKey(text)
		if err != nil {
			return nil, nil, fmt.Errorf("--key: %w", err)
		}
		return key, witnesses, nil
	}
	own, err := f.own()
	if err != nil {
		return nil, nil, fmt.Errorf("no key to check the log's signatures with: %w\n  Give it with --key; `ca ledger key` prints it on the CA's machine", err)
	}
	return own.Verifier(), witnesses, nil
}

// opened are the keys that are believed, and the tree's folder.
type opened struct {
	dir       string
	key       note.Verifier
	witnesses []note.Verifier
}

// open reads the keys, and says where the tree is.
func (f *treeFlags) open() (o opened, err error) {
	if o.key, o.witnesses, err = f.verifiers(); err != nil {
		return o, err
	}
	_, o.dir, err = f.dirs()
	return o, err
}

// own returns the key of the log beside the journal.
func (f *treeFlags) own() (*tree.Key, error) {
	journal, err := f.path()
	if err != nil {
		return nil, err
	}
	return tree.ReadKey(logKey(filepath.Dir(filepath.Clean(journal))))
}

// readInput reads a file that somebody gave.
func readInput(path string) (_ []byte, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	b, err := io.ReadAll(io.LimitReader(file, maxInput+1))
	if err == nil && len(b) > maxInput {
		err = fmt.Errorf("%s has more than %d bytes", path, maxInput)
	}
	return b, err
}

// readCertificate returns the first certificate of a file, in PEM or DER.
func readCertificate(path string) (*x509.Certificate, error) {
	b, err := readInput(path)
	if err != nil {
		return nil, err
	}
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			b = block.Bytes
			break
		}
	}
	c, err := x509.ParseCertificate(b)
	if err != nil {
		return nil, fmt.Errorf("%s holds no certificate, in PEM or DER: %w", path, err)
	}
	return c, nil
}

func newLedgerKey(l *ledgerFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "key",
		Short: "Print the public key that checks the log's signatures",
		Long: `Print the log's verifier key, in the format of C2SP signed-note: its name (the
origin in every checkpoint), a hash, and an Ed25519 key. It is no secret. Auditors
need it, from somewhere they trust; so do witnesses.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			key, err := (&treeFlags{ledgerFlags: l}).own()
			if errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%w\n  The key is made when the CA starts for the first time; say where its data are with --config or --dir", err)
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), key)
			return nil
		},
	}
}

func newLedgerProve(l *ledgerFlags) *cobra.Command {
	f := &treeFlags{ledgerFlags: l}
	c := &clientFlags{}
	var serial, cert, out string
	var index int64
	cmd := &cobra.Command{
		Use:   "prove (--serial HEX | --cert FILE | --index N)",
		Short: "Write a proof that a record is in the ledger",
		Long: `Write a proof that one record is in the ledger: the record, its place, hashes,
and the signed checkpoint (C2SP tlog-proof). Whoever has the log's public key can
check it, with nothing else:

  ca ledger verify --proof FILE --key VKEY

For a certificate, the record of its issuance is meant. Where the CA runs, its index
says at once which that is; of a copied folder (--dir), or of a CA that does not
run, the folder "tree" is read from its newest record on until it is found.`,
		Example: `  ca ledger prove --cert svid.pem -o svid.tlog-proof
  ca ledger prove --serial 7f3a12… | ca ledger verify --proof /dev/stdin`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.open()
			if err != nil {
				return err
			}
			head, err := tree.ReadCheckpoint(o.dir, o.key, o.witnesses...)
			if err != nil {
				return found(err)
			}
			if f.dir != "" {
				c = nil // the CA here may be another
			}
			var at uint64
			switch {
			case cert != "":
				leaf, err := readCertificate(cert)
				if err != nil {
					return fmt.Errorf("--cert: %w", err)
				}
				sum := sha256.Sum256(leaf.Raw)
				at, err = findIssued(cmd, c, o.dir, head, &adminv1.FindRequest{CertificateSha256: sum[:]}, sum[:], (*ledgerv1.Certificate).GetSha256)
				if err != nil {
					return fmt.Errorf("the certificate in %s: %w", cert, err)
				}
			case serial != "":
				want, err := parseSerial(serial)
				if err != nil {
					return err
				}
				at, err = findIssued(cmd, c, o.dir, head, &adminv1.FindRequest{Serial: want}, want, func(c *ledgerv1.Certificate) []byte { return bytes.TrimLeft(c.GetSerial(), "\x00") })
				if err != nil {
					return fmt.Errorf("the serial %s: %w", serial, err)
				}
			default:
				if index < 0 {
					return fmt.Errorf("--index %d: write a number from 0 on", index)
				}
				at = uint64(index)
			}
			proof, err := tree.Prove(o.dir, head, at)
			if err != nil {
				return found(err)
			}
			if out == "" || out == "-" {
				_, err := cmd.OutOrStdout().Write(proof.Encode())
				return err
			}
			if err := durable.WriteFile(out, proof.Encode(), 0o600); err != nil {
				return fmt.Errorf("-o: %w", err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "record %d is in the log %s, under a checkpoint of %d records\n", at, head.Origin, head.Size)
			return nil
		},
	}
	f.add(cmd)
	c.add(cmd)
	cmd.Flags().StringVar(&serial, "serial", "", "serial number of a certificate, in hexadecimal")
	cmd.Flags().StringVar(&cert, "cert", "", "file with a certificate, in PEM or DER")
	cmd.Flags().Int64Var(&index, "index", 0, "index of a record")
	cmd.Flags().StringVarP(&out, "out", "o", "", "file for the proof; by default standard output")
	cmd.MarkFlagsOneRequired("serial", "cert", "index")
	cmd.MarkFlagsMutuallyExclusive("serial", "cert", "index")
	return cmd
}

// parseSerial reads a serial number as people write it, without leading zeros.
func parseSerial(s string) ([]byte, error) {
	b, err := hexFlag("serial", s)
	if b = bytes.TrimLeft(b, "\x00"); err != nil || len(b) == 0 {
		return nil, fmt.Errorf("--serial %q is not a serial number: write it in hexadecimal, as openssl x509 -serial prints it", s)
	}
	return b, nil
}

// findIssued returns the index of the record by which a certificate was issued: the
// newest one with this value in field. The index of the CA is asked first, unless c is
// nil; what it says is a hint, and the tree decides.
func findIssued(cmd *cobra.Command, c *clientFlags, dir string, head tree.Checkpoint, req *adminv1.FindRequest, want []byte,
	field func(*ledgerv1.Certificate) []byte,
) (uint64, error) {
	issues := func(record []byte) bool {
		if !bytes.Contains(record, want) { // as it is encoded
			return false
		}
		var r ledgerv1.Record
		return proto.Unmarshal(record, &r) == nil && r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS && bytes.Equal(field(r.GetCertificate()), want)
	}
	if at, ok := c.hint(cmd.Context(), req); ok && at < head.Size {
		if record, err := tree.Record(dir, head, at); err == nil && issues(record) {
			return at, nil
		}
	}
	show, end := cli.Progress(cmd.ErrOrStderr(), "records looked at")
	looked := uint64(0)
	at, err := tree.Find(dir, head, func(record []byte) bool {
		looked++
		show(looked, head.Size)
		return issues(record)
	})
	end()
	if errors.Is(err, tree.ErrNotCovered) {
		return 0, fmt.Errorf("no record of the first %d in %s issues it: it is newer (try again in a second), in the ledger of another CA, or not of this mesh", head.Size, dir)
	}
	return at, found(err)
}

// hint asks the CA for the newest record that something is found by; false if it does
// not answer soon, or does not know.
func (c *clientFlags) hint(ctx context.Context, req *adminv1.FindRequest) (uint64, bool) {
	if c == nil {
		return 0, false
	}
	ctx, cancel := context.WithTimeout(ctx, completionDelay)
	defer cancel()
	conn, closeConn, err := c.dial(ctx)
	if err != nil {
		return 0, false
	}
	defer closeConn() //nolint:errcheck // there is another way
	req.Outcome, req.Page = ledgerv1.Outcome_OUTCOME_SUCCESS, &adminv1.Page{Limit: 1}
	stream, err := adminv1.NewLedgerServiceClient(conn).Find(ctx, req)
	if err != nil {
		return 0, false
	}
	answer, err := stream.Recv()
	if err != nil || len(answer.GetRecords()) == 0 {
		return 0, false
	}
	return answer.GetRecords()[0].GetIndex(), true
}

func newLedgerConsistency(l *ledgerFlags) *cobra.Command {
	f := &treeFlags{ledgerFlags: l}
	cmd := &cobra.Command{
		Use:   "consistency OLD NEW",
		Short: "Prove that one head of the log continues another",
		Long: `Prove, from the tiles, that the log of NEW continues that of OLD: that no record
of OLD was changed, removed or moved. Each is a file with a checkpoint (keep copies
of <data_dir>/tree/checkpoint elsewhere for this), or a number of records.

Exit code 2: it does not. If both are signed checkpoints, they are the evidence.`,
		Example: `  ca ledger consistency checkpoint-of-monday /var/lib/meshid/ca/tree/checkpoint
  ca ledger consistency 1000 2000`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := f.open()
			if err != nil {
				return err
			}
			now, err := tree.ReadCheckpoint(o.dir, o.key)
			if err != nil {
				return found(err)
			}
			var heads [2]tree.Checkpoint
			for i, arg := range args {
				if heads[i], err = o.readHead(now, arg); err != nil {
					return found(err)
				}
			}
			if err := tree.Consistent(o.dir, now, heads[0], heads[1]); err != nil {
				return found(err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "the log %s of %d records continues that of %d records\n", now.Origin, heads[1].Size, heads[0].Size)
			return nil
		},
	}
	f.add(cmd)
	return cmd
}

// readHead reads a checkpoint, or finds the head of a size.
func (o opened) readHead(now tree.Checkpoint, arg string) (tree.Checkpoint, error) {
	if size, err := strconv.ParseUint(arg, 10, 64); err == nil {
		return tree.At(o.dir, now, size)
	}
	b, err := readInput(arg)
	if err != nil {
		return tree.Checkpoint{}, err
	}
	c, err := tree.ParseCheckpoint(b, o.key, o.witnesses...)
	if err != nil {
		return tree.Checkpoint{}, fmt.Errorf("%s: %w", arg, err)
	}
	return c, nil
}

// damaged says whether err is about a ledger that is not what was written or
// signed, and not about whether that could be found out.
func damaged(err error) bool {
	_, journal := errors.AsType[*ledger.DamageError](err)
	_, tiles := errors.AsType[*tree.DamageError](err)
	return journal || tiles || errors.Is(err, ledger.ErrMissing) || errors.Is(err, tree.ErrInconsistent) || errors.Is(err, tree.ErrSignature)
}
