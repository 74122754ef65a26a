package main

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/audit"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
)

// Exit codes of why.
const (
	exitDifferent = 2
	exitNotJudged = 3
)

func newLedgerWhy(f *ledgerFlags) *cobra.Command {
	var index uint64
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "why (SERIAL | --index N)",
		Short: "Judge a recorded decision again, on the evidence that was recorded",
		Long: `Why finds a decision in the ledger and makes it again: the entry as it was
recorded, its two rules and its templates, evaluated on the attributes that were
attested. It needs nothing but the folder of the journal.

Exit code 0: the same decision follows. 2: the recorded decision does not follow
from the recorded evidence. 3: it cannot be judged, such as a refusal for a bad
request, or when the entry's record is in an archived part of the ledger.`,
		Example: `  ca ledger why 7f3a12…
  ca ledger why --index 1042 --dir /mnt/copy/ledger -o json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			if (len(args) == 1) == cmd.Flags().Changed("index") {
				return fmt.Errorf("say which decision: the serial number of a certificate, or --index with a record's number")
			}
			dir, err := f.path()
			if err != nil {
				return err
			}
			show, end := cli.Progress(cmd.ErrOrStderr(), "segments searched")
			defer end()
			progress := func(done, all int) { show(uint64(max(done, 0)), uint64(max(all, 0))) }
			if len(args) == 1 {
				if index, err = audit.FindSerial(cmd.Context(), dir, args[0], progress); err != nil {
					return err
				}
			}
			v, err := audit.Judge(cmd.Context(), dir, index, progress)
			if err != nil {
				return err
			}
			end()
			if err := writeVerdict(cmd.OutOrStdout(), format, v); err != nil {
				return err
			}
			switch v.Result {
			case audit.Different:
				return &cli.ExitError{Code: exitDifferent, Err: fmt.Errorf("record %d: the recorded decision does not follow from the recorded evidence", v.Index)}
			case audit.NotJudged:
				return &cli.ExitError{Code: exitNotJudged}
			case audit.Same:
				return nil
			default:
				return nil
			}
		},
	}
	cmd.Flags().Uint64Var(&index, "index", 0, "number of the record")
	out.Add(cmd, "text", "json")
	return cmd
}

func writeVerdict(w io.Writer, format string, v *audit.Verdict) error {
	if format == "json" {
		record, err := ledger.FormatJSON(ledger.Entry{Index: v.Index, Record: v.Record})
		if err != nil {
			return err
		}
		var parts struct {
			Record json.RawMessage `json:"record"`
		}
		if err := json.Unmarshal(record, &parts); err != nil {
			return err
		}
		return cli.JSON(w, struct {
			*audit.Verdict
			Record json.RawMessage `json:"record"`
		}{v, parts.Record})
	}
	r := v.Record
	outcome := lower(r.GetOutcome().String(), "OUTCOME_")
	fmt.Fprintf(w, "record %d, %s: %s, %s\n", v.Index, r.GetTime().AsTime().Local().Format(time.RFC3339), lower(r.GetEvent().String(), "EVENT_"), outcome)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "  %-10s %s\n", name, cli.Printable(value))
		}
	}
	line("identity", r.GetSpiffeId())
	line("serial", hex.EncodeToString(r.GetCertificate().GetSerial()))
	line("instance", r.GetInstance())
	line("node", r.GetNode().GetId())
	line("reason", r.GetReason())
	line("detail", r.GetDetail())
	if v.Entry != nil {
		line("entry", fmt.Sprintf("%s, revision %d, as recorded in %d (%s)", v.Entry.Name, v.Entry.Revision, v.Entry.Index, v.Entry.Event))
	}
	for _, field := range v.Terms {
		fmt.Fprintf(w, "%s\n", field.Field)
		writeTerm(w, field.Term, "  ")
	}
	if a := v.Again; a != nil && !a.Allowed {
		fmt.Fprintf(w, "nearest miss: %s\n", missLine(a.Miss))
	}
	switch v.Result {
	case audit.Same:
		fmt.Fprintln(w, cli.Paint(w, cli.Green, "same verdict")+": the recorded decision follows from the recorded evidence")
	case audit.Different:
		fmt.Fprintln(w, cli.Paint(w, cli.Red, "DIFFERENT VERDICT")+": the recorded decision does not follow from the recorded evidence")
		for _, p := range v.Problems {
			fmt.Fprintf(w, "  %s\n", cli.Printable(p))
		}
	case audit.NotJudged:
		fmt.Fprintf(w, "%s: %s\n", cli.Paint(w, cli.Yellow, "not judged"), cli.Printable(v.Reason))
	}
	return nil
}

// writeTerm writes a term and, below it, its parts.
func writeTerm(w io.Writer, t identity.Term, indent string) {
	mark := cli.Paint(w, cli.Green, "true ")
	if !t.Holds {
		mark = cli.Paint(w, cli.Red, "false")
	}
	switch t.Operator {
	case "":
		text := t.Source
		if text != "" && t.Why != "" {
			text += "  "
		}
		if t.Why != "" {
			text += "(" + t.Why + ")"
		}
		fmt.Fprintf(w, "%s%s %s\n", indent, mark, cli.Printable(text))
		return
	case "||":
		fmt.Fprintf(w, "%s%s any of\n", indent, mark)
	default:
		fmt.Fprintf(w, "%s%s all of\n", indent, mark)
	}
	for _, o := range t.Operands {
		writeTerm(w, o, indent+"  ")
	}
}

func missLine(m *identity.Miss) string {
	var parts []string
	for _, part := range []string{m.Field, m.Term, m.Why} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return cli.Printable(strings.Join(parts, ": "))
}

// lower is an enum value as people read it.
func lower(value, prefix string) string { return strings.ToLower(strings.TrimPrefix(value, prefix)) }
