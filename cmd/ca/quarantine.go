package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
)

func newQuarantineCommand() *cobra.Command {
	c := &clientFlags{}
	cmd := &cobra.Command{
		Use:   "quarantine",
		Short: "Refuse an identity, a key or a certificate, at once and everywhere",
		Long: `What is quarantined is refused by the CA from then on, and withdrawn wherever a node
agent serves it, until the quarantine is lifted; restarts change nothing.

  --spiffe-id   the identity, whoever asks and with whichever key; of a node: the node
  --key-sha256  the key (SHA-256 of its SubjectPublicKeyInfo); its holder gets another
  --serial      one certificate; its holder gets another, with another key

Who opens a connection with a key that was stolen is refused when the certificate
expires: docs/threat-model.md says what bounds that.`,
	}
	c.add(cmd)
	cmd.AddCommand(newQuarantineAdd(c), newQuarantineList(c), newQuarantineLift(c))
	return cmd
}

// quarantineFlags say what is quarantined.
type quarantineFlags struct {
	ids, keys, serials []string
	list               nameList
}

func (q *quarantineFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&q.ids, "spiffe-id", nil, "SPIFFE ID; may be given several times, as may the others")
	cmd.Flags().StringArrayVar(&q.keys, "key-sha256", nil, "SHA-256 of the public key, hexadecimal, as spki_sha256 in the ledger")
	cmd.Flags().StringArrayVar(&q.serials, "serial", nil, "serial number of a certificate, hexadecimal")
	q.list.add(cmd, "\"spiffe://...\", \"key SHA-256\" or \"serial SERIAL\"")
	cmd.MarkFlagsOneRequired("spiffe-id", "key-sha256", "serial", "file")
	cmd.Args = cobra.NoArgs
}

// protos are all of them, each with the reason.
func (q *quarantineFlags) protos(cmd *cobra.Command, reason string) ([]*adminv1.Quarantine, error) {
	keys, serials, ids := slices.Clone(q.keys), slices.Clone(q.serials), slices.Clone(q.ids)
	lines, err := q.list.all(cmd, nil)
	if err != nil {
		return nil, err
	}
	for _, line := range lines {
		kind, value, _ := strings.Cut(line, " ")
		switch kind {
		case "key", "key-sha256":
			keys = append(keys, strings.TrimSpace(value))
		case "serial":
			serials = append(serials, strings.TrimSpace(value))
		default:
			if !strings.HasPrefix(line, "spiffe://") {
				return nil, fmt.Errorf("--file %s: %.80q is none of \"spiffe://...\", \"key SHA-256\" and \"serial SERIAL\"", q.list.file, line)
			}
			ids = append(ids, line)
		}
	}
	var all []*adminv1.Quarantine
	for _, id := range ids {
		all = append(all, &adminv1.Quarantine{SpiffeId: id, Reason: reason})
	}
	for _, text := range keys {
		key, err := hex.DecodeString(strings.ReplaceAll(text, ":", ""))
		if err != nil {
			return nil, fmt.Errorf("--key-sha256 %.80q is not hexadecimal; write it as `ca who` shows it", text)
		}
		all = append(all, &adminv1.Quarantine{KeySha256: key, Reason: reason})
	}
	for _, text := range serials {
		serial, err := hex.DecodeString(strings.ReplaceAll(text, ":", ""))
		if err != nil {
			return nil, fmt.Errorf("--serial %.80q is not hexadecimal; write it as `ca who` or `openssl x509 -serial` shows it, all of its digits", text)
		}
		all = append(all, &adminv1.Quarantine{Serial: serial, Reason: reason})
	}
	return all, nil
}

// quarantinesOf names what is quarantined, or says how much it is.
func quarantinesOf(all []*adminv1.Quarantine) string {
	if len(all) == 1 {
		return quarantineOf(all[0])
	}
	return fmt.Sprintf("%d identities, keys and certificates", len(all))
}

// quarantineOf names what is quarantined.
func quarantineOf(q *adminv1.Quarantine) string {
	switch {
	case q.GetSpiffeId() != "":
		return q.GetSpiffeId()
	case len(q.GetKeySha256()) > 0:
		return "key " + hex.EncodeToString(q.GetKeySha256())
	default:
		return "serial " + hex.EncodeToString(q.GetSerial())
	}
}

func newQuarantineAdd(c *clientFlags) *cobra.Command {
	var what quarantineFlags
	var reason string
	var f waitFlags
	cmd := &cobra.Command{
		Use:   "add (--spiffe-id ID | --key-sha256 SUM | --serial SERIAL | --file LIST)... --reason WHY",
		Short: "Quarantine identities, keys or certificates, all or none",
		Example: `  ca quarantine add --spiffe-id spiffe://example.org/app/web --reason "INC-411: shell in the container" --wait
  ca quarantine add --key-sha256 9f86d0... --reason "key in a core dump"
  ca quarantine add --file stolen.txt --reason "INC-411: backup lost"`,
	}
	what.add(cmd)
	reasonFlag(cmd, &reason)
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		all, err := what.protos(cmd, reason)
		if err != nil {
			return err
		}
		if reason == "" {
			return errors.New("a reason is required: --reason \"INC-411: ...\"")
		}
		ctx, cancel := bounded(cmd.Context(), len(all))
		defer cancel()
		answer, err := call(ctx, c, adminv1.AdminServiceClient.AddQuarantine, &adminv1.AddQuarantineRequest{Quarantines: all})
		if err != nil {
			return err
		}
		verb := "is"
		if len(all) > 1 {
			verb = "are"
		}
		return f.after(cmd, c, answer, fmt.Sprintf("%s %s quarantined; %d agents are being told\n", quarantinesOf(all), verb, answer.GetNodes()))
	}
	return cmd
}

func newQuarantineList(c *clientFlags) *cobra.Command {
	return listing(c, &cobra.Command{Short: "Show what is quarantined"},
		adminv1.AdminServiceClient.ListQuarantines, &adminv1.ListQuarantinesRequest{},
		[]string{"WHAT", "SINCE", "BY", "REASON"},
		func(answer *adminv1.ListQuarantinesResponse) (rows [][]string) {
			for _, q := range answer.GetQuarantines() {
				rows = append(rows, []string{quarantineOf(q), q.GetCreatedAt().AsTime().Local().Format(time.RFC3339), q.GetCreatedBy(), cli.Cell(q.GetReason())})
			}
			return rows
		})
}

func newQuarantineLift(c *clientFlags) *cobra.Command {
	var what quarantineFlags
	cmd := &cobra.Command{
		Use:   "lift (--spiffe-id ID | --key-sha256 SUM | --serial SERIAL | --file LIST)...",
		Short: "Allow again what was quarantined, all or none",
	}
	what.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		all, err := what.protos(cmd, "")
		if err != nil {
			return err
		}
		ctx, cancel := bounded(cmd.Context(), len(all))
		defer cancel()
		_, err = call(ctx, c, adminv1.AdminServiceClient.LiftQuarantine, &adminv1.LiftQuarantineRequest{Quarantines: all})
		return done(cmd, err, "the quarantine of %s is lifted\n", quarantinesOf(all))
	}
	return cmd
}
