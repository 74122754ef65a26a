package main

import (
	"encoding/hex"
	"errors"
	"fmt"
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
type quarantineFlags struct{ id, key, serial string }

func (q *quarantineFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&q.id, "spiffe-id", "", "SPIFFE ID")
	cmd.Flags().StringVar(&q.key, "key-sha256", "", "SHA-256 of the public key, hexadecimal, as spki_sha256 in the ledger")
	cmd.Flags().StringVar(&q.serial, "serial", "", "serial number of a certificate, hexadecimal")
	cmd.MarkFlagsOneRequired("spiffe-id", "key-sha256", "serial")
	cmd.MarkFlagsMutuallyExclusive("spiffe-id", "key-sha256", "serial")
	cmd.Args = cobra.NoArgs
}

func (q *quarantineFlags) proto() (*adminv1.Quarantine, error) {
	key, err := hex.DecodeString(strings.ReplaceAll(q.key, ":", ""))
	if err != nil {
		return nil, fmt.Errorf("--key-sha256 %.80q is not hexadecimal; write it as `ca who` shows it", q.key)
	}
	serial, err := hex.DecodeString(strings.ReplaceAll(q.serial, ":", ""))
	if err != nil {
		return nil, fmt.Errorf("--serial %.80q is not hexadecimal; write it as `ca who` or `openssl x509 -serial` shows it, all of its digits", q.serial)
	}
	return &adminv1.Quarantine{SpiffeId: q.id, KeySha256: key, Serial: serial}, nil
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
		Use:   "add (--spiffe-id ID | --key-sha256 SUM | --serial SERIAL) --reason WHY",
		Short: "Quarantine an identity, a key or a certificate",
		Example: `  ca quarantine add --spiffe-id spiffe://example.org/app/web --reason "INC-411: shell in the container" --wait
  ca quarantine add --key-sha256 9f86d0... --reason "key in a core dump"`,
	}
	what.add(cmd)
	reasonFlag(cmd, &reason)
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		q, err := what.proto()
		if err != nil {
			return err
		}
		if reason == "" {
			return errors.New("a reason is required: --reason \"INC-411: ...\"")
		}
		q.Reason = reason
		answer, err := call(cmd.Context(), c, adminv1.AdminServiceClient.AddQuarantine, &adminv1.AddQuarantineRequest{Quarantine: q})
		if err != nil {
			return err
		}
		return f.after(cmd, c, answer, fmt.Sprintf("%s is quarantined; %d agents are being told\n", quarantineOf(q), answer.GetNodes()))
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
		Use:   "lift (--spiffe-id ID | --key-sha256 SUM | --serial SERIAL)",
		Short: "Allow again what was quarantined",
	}
	what.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		q, err := what.proto()
		if err != nil {
			return err
		}
		_, err = call(cmd.Context(), c, adminv1.AdminServiceClient.LiftQuarantine, &adminv1.LiftQuarantineRequest{Quarantine: q})
		return done(cmd, err, "the quarantine of %s is lifted\n", quarantineOf(q))
	}
	return cmd
}
