package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/store"
)

// rootMade is what the ceremony has made.
type rootMade struct {
	TrustDomain string    `json:"trust_domain"`
	ID          string    `json:"id"`
	Certificate string    `json:"certificate"`
	SHA256      string    `json:"sha256"`
	SPKISHA256  string    `json:"spki_sha256"`
	Key         string    `json:"key"`
	KeyType     string    `json:"key_type"`
	NotAfter    time.Time `json:"not_after"`
	Plan        string    `json:"plan"`
	Actor       string    `json:"actor"`
	ApprovedBy  string    `json:"approved_by,omitempty"`
}

func newAuthorityInit() *cobra.Command {
	var path, approval string
	var o overrides
	var dryRun, yes bool
	var out cli.OutputFlag
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make the first root, before the first ca run",
		Long: `Make the root of the trust domain and its key, where the configuration says, before
the first "ca run"; without this command that makes them. No network is needed, only
the device that the key is made in. Run it as the user that the CA runs as.

It says what will be made, and asks for the trust domain's name before it is. What is
printed then goes into the minutes: the SHA-256 of the certificate and of the public key.

A second person may have to agree: they run it with --dry-run, compare what will be
made, and write the plan's code that it prints into a file of their own. It is given
with --approval-file, and has to belong to another user than the one who runs this.
Both are recorded in the ledger.`,
		Example: `  ca authority init --config /etc/meshid/ca.yaml --dry-run
  ca authority init --config /etc/meshid/ca.yaml --approval-file /home/bob/approval`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := out.Format()
			if err != nil {
				return err
			}
			v, err := loadSettings(path, cmd.Flags().Changed("config"), o)
			if err != nil {
				return err
			}
			c := ceremony{v: v, in: cmd.InOrStdin(), said: cmd.ErrOrStderr()}
			if dryRun {
				return c.rehearse(cmd.Context(), cmd.OutOrStdout(), format)
			}
			made, err := c.hold(cmd.Context(), approval, yes)
			if err != nil {
				return err
			}
			if format == "json" {
				return cli.JSON(cmd.OutOrStdout(), made)
			}
			made.write(cmd.OutOrStdout())
			return nil
		},
	}
	configFlags(cmd, &path, &o)
	out.Add(cmd, "text", "json")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be made, and whether the key's device answers; make nothing")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().StringVar(&approval, "approval-file", "", "file of a second person that holds the plan's code")
	return cmd
}

// ceremony makes the first root:
//
//  1. the plan is shown, and a second person's approval of it checked
//  2. the operator confirms it
//  3. the key is made, the root signed, checked, recorded and stored
type ceremony struct {
	v    *validated
	in   io.Reader
	said io.Writer // what is for the people present
}

// rootPlan is what the ceremony will make.
type rootPlan struct {
	TrustDomain   string `json:"trust_domain"`
	Subject       string `json:"subject"`
	KeyType       string `json:"key_type"`
	Key           string `json:"key"`
	KeySecretFile string `json:"key_secret_file,omitempty"`
	RootLife      string `json:"root_life"`
	DataDir       string `json:"data_dir"`
	Plan          string `json:"plan"`
}

// plan returns what is agreed on, and its code.
func (c *ceremony) plan() (text, code string) {
	a := &c.v.Authority
	secret := "none"
	if a.KeySecretFile != "" {
		secret = "in " + a.KeySecretFile
	}
	text = fmt.Sprintf("trust domain  %s\nsubject       %s\nkey           %s, made in %s\nsecret        %s\nroot          self-signed, valid for %v\ndata folder   %s\n",
		c.v.trustDomain.Name(), c.v.subject.Root(c.v.trustDomain), a.RootKeyType, a.Key, secret, a.RootLife.Or(0), c.v.DataDir)
	sum := sha256.Sum256([]byte(text))
	return text, hex.EncodeToString(sum[:16])
}

func (c *ceremony) show(w io.Writer) (code string) {
	text, code := c.plan()
	fmt.Fprintf(w, "%splan          %s\n", text, code)
	return code
}

// rehearse is the dry run.
func (c *ceremony) rehearse(ctx context.Context, w io.Writer, format string) error {
	if err := c.possible(); err != nil {
		return err
	}
	if format != "json" {
		c.show(w)
	}
	if err := keys.Reachable(ctx, c.v.keys); err != nil {
		return fmt.Errorf("nothing was made, and the root's key could not be: %w", err)
	}
	if a := &c.v.Authority; format == "json" {
		_, code := c.plan()
		return cli.JSON(w, &rootPlan{
			TrustDomain: c.v.trustDomain.Name(), Subject: c.v.subject.Root(c.v.trustDomain).String(), KeyType: a.RootKeyType,
			Key: a.Key, KeySecretFile: a.KeySecretFile, RootLife: a.RootLife.Or(0).String(), DataDir: c.v.DataDir, Plan: code,
		})
	}
	fmt.Fprintln(w, "nothing was made: this was a dry run")
	return nil
}

func (c *ceremony) possible() error {
	for _, kind := range upstreamKinds(c.v.Upstream, slog.New(slog.DiscardHandler)) {
		if kind.section.Present() {
			return kind.section.Errorf("", "the root is that of this upstream CA: remove the section to have a root of your own")
		}
	}
	return nil
}

func (c *ceremony) hold(ctx context.Context, approval string, yes bool) (*rootMade, error) {
	if err := c.possible(); err != nil {
		return nil, err
	}
	code := c.show(c.said)
	made := &rootMade{TrustDomain: c.v.trustDomain.Name(), Plan: code, KeyType: c.v.Authority.RootKeyType, Actor: account(os.Getuid())}
	why := "first root of the trust domain, by ca authority init, plan " + code
	if approval != "" {
		uid, err := checkApproval(approval, code)
		if err != nil {
			return nil, err
		}
		made.ApprovedBy = account(uid)
		why += ", approved by " + made.ApprovedBy
	}
	if err := c.confirm(yes); err != nil {
		return nil, err
	}
	root, err := c.make(ctx, made, why)
	if err != nil {
		return nil, err
	}
	sum, spki := sha256.Sum256(root.Certificate.Raw), sha256.Sum256(root.Certificate.RawSubjectPublicKeyInfo)
	made.ID, made.SHA256, made.SPKISHA256, made.NotAfter = root.ID, hex.EncodeToString(sum[:]), hex.EncodeToString(spki[:]), root.Certificate.NotAfter
	made.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate.Raw}))
	return made, nil
}

// confirm has the operator type what cannot be typed by habit.
func (c *ceremony) confirm(yes bool) error {
	if yes {
		return nil
	}
	fmt.Fprint(c.said, "Type the trust domain's name to make this root: ")
	line, err := bufio.NewReader(io.LimitReader(c.in, 1024)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the confirmation: %w", err)
	}
	if strings.TrimSpace(line) != c.v.trustDomain.Name() {
		return errors.New("not confirmed: nothing was made\n  Type the name, or give --yes in a script")
	}
	return nil
}

func (c *ceremony) make(ctx context.Context, made *rootMade, why string) (root ca.Authority, err error) {
	v, logger := c.v, slog.New(slog.DiscardHandler)
	if err := durable.MkdirAll(v.DataDir, 0o700); err != nil {
		return root, fmt.Errorf("data_dir: %w", err)
	}
	db, err := store.Open(ctx, filepath.Join(v.DataDir, "meshid.db"))
	if err != nil {
		return root, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	journal, err := ledger.Open(ledgerDir(v.DataDir), ledger.Options{Registerer: prometheus.NewRegistry(), Logger: logger})
	if err != nil {
		return root, err
	}
	defer func() { err = errors.Join(err, journal.Close()) }()
	root, made.Key, err = ca.Init(ctx, ca.Config{
		TrustDomain: v.trustDomain, Instance: v.Instance, Version: cli.Version(), Keys: v.keys, Store: db, Ledger: journal,
		RootLife: v.Authority.RootLife.Or(0), IntermediateLife: v.Authority.IntermediateLife.Or(0),
		IntermediateKey: v.intermediateKey, Subject: v.subject, NameConstraints: v.Authority.NameConstraints,
		DefaultTTL: v.SVID.DefaultTTL.Or(0), MaxTTL: v.SVID.MaxTTL.Or(0), Backdate: v.SVID.Backdate.Or(0), Logger: logger,
	}, why, made.Actor)
	if err != nil {
		return root, fmt.Errorf("make the root: %w", err)
	}
	return root, nil
}

func (m *rootMade) write(w io.Writer) {
	fmt.Fprintf(w, "root          %s, until %s\nkey           %s, %s: it signed, and its certificate verifies that\ncertificate   SHA-256 %s\npublic key    SHA-256 %s\n",
		m.ID, m.NotAfter.UTC().Format(time.RFC3339), m.Key, m.KeyType, m.SHA256, m.SPKISHA256)
	if m.ApprovedBy != "" {
		fmt.Fprintf(w, "made by       %s, approved by %s\n", m.Actor, m.ApprovedBy)
	}
	fmt.Fprintf(w, "%sStart the CA with: ca run\n", m.Certificate)
}

// checkApproval returns the user who has approved of a plan in a file. It has to be
// another one than this process's, and only they may have been able to write it.
func checkApproval(path, code string) (uid int, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("approval: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("approval: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok || !info.Mode().IsRegular():
		return 0, fmt.Errorf("approval: %s is not a regular file", path)
	case int64(stat.Uid) == int64(os.Getuid()):
		return 0, fmt.Errorf("approval: %s belongs to the user who runs this: it has to be written by a second person", path)
	case info.Mode().Perm()&0o022 != 0:
		return 0, fmt.Errorf("approval: %s can be written by others: its owner runs chmod go-w on it", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, 1024))
	if err != nil {
		return 0, fmt.Errorf("approval: %w", err)
	}
	if strings.TrimSpace(string(text)) != code {
		return 0, fmt.Errorf("approval: %s does not hold the code of this plan, %s: what was approved is something else; the second person runs --dry-run with this configuration", path, code)
	}
	return int(stat.Uid), nil
}

// account names a user for the record.
func account(uid int) string {
	id := strconv.Itoa(uid)
	if u, err := user.LookupId(id); err == nil {
		return u.Username + " (uid " + id + ")"
	}
	return "uid " + id
}
