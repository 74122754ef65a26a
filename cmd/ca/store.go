package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/pkg/store"
)

// anchorPath is where the CA notes what is in its store, beside the ledger.
func anchorPath(dataDir string) string { return filepath.Join(dataDir, "store.anchor") }

func newStoreCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "What to do when the CA's database was restored from a copy, or its ledger was lost",
	}
	cmd.AddCommand(newStoreAccept())
	return cmd
}

func newStoreAccept() *cobra.Command {
	var path, restored string
	var o overrides
	cmd := &cobra.Command{
		Use:   "accept",
		Short: "Go on with a database that is older than the ledger, or belongs to another one",
		Long: `A CA does not start when its database (meshid.db in its data folder) is older than
what its ledger says and agents were told: entries that were deleted since would be
back, and those that were applied would be gone. It names what was lost.

Put the newest copy of the database back. If this one is all there is, accept it:
what is in it counts from then on, in a new epoch that all agents take for new. That
it was accepted, by whom, and what was lost with it is recorded. Bans, evictions and
quarantines since the copy stay in force, and join tokens that were used or withdrawn
since stay worthless. Then apply the entries again.

A CA does not start either when its database belongs to another ledger: another CA's,
or one that was lost. A database has one CA, so give a second one a data folder of its
own. If the folder ledger was lost, put the newest copy of it back, with tree and
keys/log.key; if there is none, accept the database. The new ledger then begins with
the record that there was another one.

If all of the data folder was restored from a copy, nothing in it can tell, but agents can:
they were told more than this CA knows, and do not follow one that takes that back. Name the
copy with --restored, such as the day it was made: agents then take what is in it for new.
For each name this is done once, so that it can stand before each start of the CA.

The CA must not run meanwhile.`,
		Example: `  ca store accept --config ca.yaml
  ca store accept --config ca.yaml --restored 2026-11-26`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			v, err := loadSettings(path, cmd.Flags().Changed("config"), o)
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			db, err := store.Open(ctx, filepath.Join(v.DataDir, "meshid.db"))
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, db.Close()) }()
			journal, err := ledger.Open(ledgerDir(v.DataDir), ledger.Options{})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, journal.Close()) }()
			who := server.Acceptance{
				By: fmt.Sprintf("uid:%d", os.Getuid()), Now: time.Now(), TrustDomain: v.trustDomain.Name(), Instance: v.Instance, Version: cli.Version(),
				Restored: restored,
			}
			err = server.AcceptStore(ctx, anchorPath(v.DataDir), journal, db, who,
				func(revision, sequence uint64) (string, error) {
					err := db.Restored(ctx, server.LedgerName(journal), revision, sequence)
					return db.Epoch(), err
				})
			if errors.Is(err, server.ErrAccepted) {
				fmt.Fprintf(cmd.OutOrStdout(), "nothing to do: %v\n", err)
				return nil
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "accepted: start the CA, look at `ca entry get`, and apply what is missing")
			return nil
		},
	}
	cmd.Flags().StringVar(&restored, "restored", "", "name of the copy from which all of the data folder was restored")
	configFlags(cmd, &path, &o)
	return cmd
}
