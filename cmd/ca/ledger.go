package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// ledgerFlags say where the journal is.
type ledgerFlags struct {
	dir    string
	config string
}

func newLedgerCommand() *cobra.Command {
	f := &ledgerFlags{}
	cmd := &cobra.Command{
		Use:   "ledger",
		Short: "Read and verify the record of every decision",
		Long: `The ledger holds one record for each decision of the CA: what was issued or
refused, to whom, where, why and when. find, first-seen, overdue, newly-allowed and
archive ask the running CA, which has an index of millions of records. The others
read its folder: the CA need not run, and a copied folder is as good as the
original.`,
	}
	f.add(cmd)
	cmd.AddCommand(newLedgerTail(f), newLedgerGet(f), newLedgerVerify(f), newLedgerWhy(f), newLedgerProve(f), newLedgerConsistency(f), newLedgerKey(f))
	for _, asking := range []*cobra.Command{newLedgerFind(), newLedgerFirstSeen(), newLedgerOverdue(), newLedgerNewlyAllowed(), newLedgerArchive(f)} {
		asking.PreRunE = func(cmd *cobra.Command, _ []string) error {
			if f.dir != "" {
				return fmt.Errorf("%s asks the running CA, which has an index; of a copied folder, ask tail, get, why or verify", cmd.Name())
			}
			return nil
		}
		cmd.AddCommand(asking)
	}
	return cmd
}

func (f *ledgerFlags) add(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&f.dir, "dir", "", "folder of the journal, or the data folder that it is in; by default that of the configuration")
	cmd.PersistentFlags().StringVar(&f.config, "config", defaultConfigPath, "configuration file that names the data folder")
}

// path returns the journal's folder. Who names the data folder means the one in it.
func (f *ledgerFlags) path() (string, error) {
	dir := f.dir
	switch {
	case dir == "":
		v, err := loadSettings(f.config, f.config != defaultConfigPath, overrides{trustDomain: "unused"})
		if err != nil {
			return "", err
		}
		dir = ledgerDir(v.DataDir)
		if _, err := os.Stat(dir); err != nil {
			return "", fmt.Errorf("open ledger: %w\n  Say where it is with --dir, or with --config which configuration the CA has", err)
		}
	case !hasSegments(dir) && hasSegments(ledgerDir(dir)):
		dir = ledgerDir(dir)
	}
	return dir, nil
}

func hasSegments(dir string) bool {
	firsts, err := ledger.Segments(dir)
	return err == nil && len(firsts) > 0
}

func ledgerDir(dataDir string) string { return filepath.Join(dataDir, "ledger") }

func newLedgerTail(f *ledgerFlags) *cobra.Command {
	var follow bool
	var lines uint64
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "tail",
		Short: "Show the newest records",
		Long: `Tail reads the newest records from the ledger's folder, the oldest of them first,
and with --follow those that are made from then on. Each is a line: its number, when,
what was decided and how, and what it is about; as JSON, the whole record. To ask
for certain ones, see "ca ledger find".`,
		Example: `  ca ledger tail -n 50
  ca ledger tail -f -o json | jq 'select(.record.outcome == "OUTCOME_REFUSED")'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			dir, err := f.path()
			if err != nil {
				return err
			}
			size, err := ledger.Size(dir)
			if err != nil {
				return err
			}
			from := size - min(lines, size)
			show := func(e ledger.Entry) error { return writeRecord(cmd.OutOrStdout(), format, e) }
			if follow {
				if err := ledger.Follow(cmd.Context(), dir, from, show); err != nil && !errors.Is(err, cmd.Context().Err()) {
					return err
				}
				return nil
			}
			for e, err := range ledger.Scan(dir, from) {
				if err != nil {
					return err
				}
				if err := show(e); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new records as they are made")
	cmd.Flags().Uint64VarP(&lines, "lines", "n", 20, "how many records to start with")
	out.Add(cmd, "text", "json")
	return cmd
}

func newLedgerGet(f *ledgerFlags) *cobra.Command {
	var serial string
	cmd := &cobra.Command{
		Use:   "get (INDEX | --serial HEX)",
		Short: "Show one record whole, as JSON",
		Example: `  ca ledger get 1042
  ca ledger get --serial 7f3a12…`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (serial != "") {
				return fmt.Errorf("say which record: either its index or --serial")
			}
			dir, err := f.path()
			if err != nil {
				return err
			}
			var from uint64
			matches := func(ledger.Entry) bool { return true }
			if serial != "" {
				want, err := parseSerial(serial)
				if err != nil {
					return err
				}
				matches = func(e ledger.Entry) bool {
					return bytes.Equal(bytes.TrimLeft(e.Record.GetCertificate().GetSerial(), "\x00"), want)
				}
			} else if from, err = strconv.ParseUint(args[0], 10, 64); err != nil {
				return fmt.Errorf("%q is not an index; write a number from 0 on", args[0])
			}
			for e, err := range ledger.Scan(dir, from) {
				if err != nil {
					return err
				}
				if matches(e) {
					return writeIndented(cmd.OutOrStdout(), e)
				}
			}
			if serial != "" {
				return fmt.Errorf("no record of a certificate with this serial number in %s", dir)
			}
			size, err := ledger.Size(dir)
			if err != nil {
				return err
			}
			return fmt.Errorf("there is no record %d in %s: the next one will be %d", from, dir, size)
		},
	}
	cmd.Flags().StringVar(&serial, "serial", "", "serial number of a certificate, in hexadecimal")
	return cmd
}

// writeIndented writes a record for people and programs.
func writeIndented(w io.Writer, e ledger.Entry) error {
	line, err := ledger.FormatJSON(e)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, line, "", "  "); err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, b.String())
	return err
}

func writeRecord(w io.Writer, format string, e ledger.Entry) error {
	if format == "json" {
		line, err := ledger.FormatJSON(e)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", line)
		return err
	}
	r := e.Record
	event := ledger.EventName(r.GetEvent())
	outcome := ledger.OutcomeName(r.GetOutcome())
	switch r.GetOutcome() {
	case ledgerv1.Outcome_OUTCOME_SUCCESS:
		outcome = cli.Paint(w, cli.Green, outcome)
	default:
		outcome = cli.Paint(w, cli.Red, outcome)
	}
	line := []string{strconv.FormatUint(e.Index, 10), r.GetTime().AsTime().Local().Format("2006-01-02T15:04:05.000Z07:00"), event, outcome}
	for _, f := range []struct{ name, value string }{
		{"", r.GetSpiffeId()},
		{"serial", hex.EncodeToString(r.GetCertificate().GetSerial())},
		{"entry", r.GetEntry().GetName()},
		{"node", r.GetNode().GetId()},
		{"instance", r.GetInstance()},
		{"authority", r.GetAuthority().GetId()},
		{"actor", r.GetActor()},
		{"reason", r.GetReason()},
		{"detail", r.GetDetail()},
	} {
		switch {
		case f.value == "":
		case f.name == "":
			line = append(line, cli.Printable(f.value))
		case strings.ContainsAny(f.value, " \"") || f.value != cli.Printable(f.value):
			line = append(line, f.name+"="+strconv.Quote(f.value))
		default:
			line = append(line, f.name+"="+f.value)
		}
	}
	_, err := fmt.Fprintln(w, strings.Join(line, " "))
	return err
}
