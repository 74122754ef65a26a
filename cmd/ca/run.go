package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/clock"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/internal/memory"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/rotation"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/tree"
	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/pkg/store"
)

// shutdownTimeout bounds how long open calls may take when the CA stops.
const shutdownTimeout = 5 * time.Second

func newRunCommand() *cobra.Command {
	var path string
	var o overrides
	var log cli.LogFlags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the CA",
		Long: `Run the CA until SIGINT or SIGTERM.

Everything has a default but the trust domain: the first start makes the data
folder, a root key (mode 0600) and a self-signed root.`,
		Example: `  ca run --trust-domain example.org --data-dir ./ca --admin-socket ./ca/admin.sock
  ca run --config /etc/meshid/ca.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := log.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			v, err := loadSettings(path, cmd.Flags().Changed("config"), o)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), v, cmd.OutOrStdout(), logger)
		},
	}
	configFlags(cmd, &path, &o)
	log.Add(cmd)
	return cmd
}

// memoryLimits are what the CA is kept to: it keeps ten megabytes, and makes as much
// garbage with some hundred calls.
var memoryLimits = memory.Limits{Calm: memory.Calm, Room: 40 << 20}

func configFlags(cmd *cobra.Command, path *string, o *overrides) {
	cmd.Flags().StringVar(path, "config", defaultConfigPath, "configuration file")
	cmd.Flags().StringVar(&o.trustDomain, "trust-domain", "", "overrides trust_domain of the file")
	cmd.Flags().StringVar(&o.dataDir, "data-dir", "", "overrides data_dir")
	cmd.Flags().StringVar(&o.listen, "listen", "", "overrides listen")
	cmd.Flags().StringVar(&o.adminSocket, "admin-socket", "", "overrides admin_socket")
	cmd.Flags().StringVar(&o.metrics, "metrics-listen", "", "overrides metrics_listen")
}

func newCheckCommand() *cobra.Command {
	var path string
	var o overrides
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration without starting",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := loadSettings(path, cmd.Flags().Changed("config"), o)
			if err != nil {
				return err
			}
			if err := checkUpstreamCA(v); err != nil {
				return err
			}
			if _, err := exportTargets(v, slog.New(slog.DiscardHandler)); err != nil {
				return err
			}
			kubernetes, err := openClusters(v, nil, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			if _, err := nodeVerifiers(v.NodeAttestation, nil, kubernetes, nil, slog.New(slog.DiscardHandler)); err != nil {
				return err
			}
			if _, err := planIstio(v, kubernetes.names()); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "the configuration is valid: trust domain %s, data in %s, listening at %s\n", v.trustDomain, v.DataDir, v.Listen)
			return nil
		},
	}
	configFlags(cmd, &path, &o)
	return cmd
}

// serve puts the parts together and runs them until ctx ends:
//
//  1. the store, the ledger's journal and its tree are opened, each under a lock
//  2. the authority is opened: root from its key file or from the upstream CA, a
//     new intermediate
//  3. the server takes both, and the listeners are opened
//  4. everything runs in one group; the first error ends all
func serve(ctx context.Context, v *validated, out io.Writer, logger *slog.Logger) (err error) {
	logger = logger.With("instance", v.Instance)
	if err := cli.Harden(); err != nil {
		logger.WarnContext(ctx, "process hardening is incomplete", "err", err)
	}
	registry := prometheus.NewRegistry()
	if err := cli.RegisterProcessMetrics(registry, "meshid_ca"); err != nil {
		return err
	}
	exports, err := exportTargets(v, logger)
	if err != nil {
		return err
	}
	kubernetes, err := openClusters(v, registry, logger)
	if err != nil {
		return err
	}
	mesh, err := planIstio(v, kubernetes.names())
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(v.DataDir, 0o700); err != nil {
		return fmt.Errorf("data_dir: %w", err)
	}
	tracker, err := health.New(registry, "meshid_ca", slices.Concat(server.Conditions, []string{conditionAuthority, conditionLedger, conditionTree, conditionWitness, conditionRootKey, conditionSearch}, exportConditions(exports), kubernetes.conditions(), mesh.conditions())...)
	if err != nil {
		return err
	}

	db, err := store.Open(ctx, filepath.Join(v.DataDir, "meshid.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	journal, err := ledger.Open(ledgerDir(v.DataDir), ledger.Options{Registerer: registry, Logger: logger, OnState: reportLedger(tracker)})
	if err != nil {
		return err
	}
	proofs, err := tree.Open(treeDir(v.DataDir), journal, tree.Options{
		Key: logKey(v.DataDir), Origin: tree.Origin(v.trustDomain.Name(), v.Instance),
		Witnesses: v.witnesses, Quorum: v.Ledger.WitnessQuorum, Registerer: registry, Logger: logger,
	})
	if err != nil {
		return errors.Join(err, journal.Close())
	}
	// It ends when the journal is closed, with a checkpoint of all that is in it.
	signed := make(chan error, 1)
	go func() { signed <- proofs.Run(context.WithoutCancel(ctx)) }()
	defer func() { err = errors.Join(err, journal.Close(), <-signed) }()
	feedMetrics, err := ledger.NewFeedMetrics(registry)
	if err != nil {
		return err
	}
	feeds, err := openExports(ctx, v.DataDir, exports, journal, feedMetrics, tracker, logger)
	if err != nil {
		return err
	}
	index := openSearch(ctx, v.DataDir, journal, feedMetrics, tracker, registry, logger)
	defer func() { err = errors.Join(err, index.close()) }()
	stopped, err := recordStart(ctx, journal, proofs.Key(), v)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopped(ctx)) }()
	anchor, err := server.OpenAnchor(ctx, anchorPath(v.DataDir), journal, db, cli.Version())
	if err != nil {
		return err
	}
	verifiers, err := nodeVerifiers(v.NodeAttestation, db, kubernetes, registry, logger)
	if err != nil {
		return err
	}

	above, err := openUpstreamCA(v, logger)
	if err != nil {
		return err
	}
	if above != nil {
		if closer, ok := above.CA.(io.Closer); ok {
			defer func() { err = errors.Join(err, closer.Close()) }()
		}
	}

	guard := clock.NewGuard(clock.Read)
	var srv *server.Server
	var forIstio *istioCA
	authority, err := ca.Open(ctx, ca.Config{
		TrustDomain: v.trustDomain, Instance: v.Instance, Version: cli.Version(), Keys: v.keys, Store: db, Ledger: journal,
		RootLife: v.Authority.RootLife.Or(0), IntermediateLife: v.Authority.IntermediateLife.Or(0),
		IntermediateKey: v.intermediateKey, Subject: v.subject, NameConstraints: v.Authority.NameConstraints,
		DefaultTTL: v.SVID.DefaultTTL.Or(0), MaxTTL: v.SVID.MaxTTL.Or(0), Backdate: v.SVID.Backdate.Or(0),
		DNSNames: mesh.dnsNames(), Revocation: v.Revocation == revocationLists,
		Upstream: above, Logger: logger, Registerer: registry,
		Clock: guard.Check,
		Fleet: func() []rotation.Node {
			if srv == nil {
				return nil // nothing is decided before Run
			}
			return srv.Fleet()
		},
		OnRetiring: func(root string, tainted bool) { srv.Retiring(root, tainted) },
		OnChange: func() {
			if srv != nil {
				srv.BundleChanged()
			}
			forIstio.changed()
			kubernetes.bundleChanged()
		},
	})
	if err != nil {
		return err
	}
	var web *webConsole
	srv, err = server.New(ctx, server.Config{
		TrustDomain: v.trustDomain, CA: authority, Ledger: journal, Store: db, Anchor: anchor, Records: index.server(), Sinks: archivable(feedMetrics, proofs, exports, feeds), Verifiers: verifiers,
		NewToken: jointoken.NewToken, Instance: v.Instance, Version: cli.Version(),
		AgentTTL: v.SVID.NodeTTL.Or(0), DefaultTTL: v.SVID.DefaultTTL.Or(0), Clock: guard,
		TwoPersons: v.Authority.TwoPersons, TwoPersonsEntries: v.Entries.TwoPersons,
		Logger: logger, Registerer: registry, Health: tracker, Placement: kubernetes.placed,
		ConsoleLink: func(by string) (string, time.Time, error) { return web.link(by) },
	})
	if err != nil {
		return err
	}

	admin, err := peer.Listen(ctx, v.AdminSocket, peer.Options{Mode: 0o600, Logger: logger})
	if err != nil {
		return fmt.Errorf("admin_socket: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", v.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), admin.Close())
	}
	if v.console != nil {
		if web, err = openConsole(ctx, v, srv, authority, journal, proofs, index, registry, logger); err != nil {
			return errors.Join(err, admin.Close(), listener.Close())
		}
	}
	if mesh != nil {
		if forIstio, err = mesh.open(ctx, v, kubernetes, srv, authority, registry, tracker, logger); err != nil {
			return errors.Join(err, admin.Close(), listener.Close())
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	if forIstio != nil {
		group.Go(func() error { return forIstio.run(ctx) })
	}
	group.Go(func() error { memory.Tend(ctx, memoryLimits, logger); return nil })
	group.Go(func() error { return authority.Run(ctx) })
	group.Go(func() error { return srv.Run(ctx) })
	group.Go(func() error { index.run(ctx); return nil })
	group.Go(func() error { return watchKeys(ctx, v.keyInterval(), authority, db, v.keys, tracker) })
	group.Go(func() error { return watchHealth(ctx, authority, journal, proofs, tracker) })
	kubernetes.run(ctx, group, srv, authority, tracker, logger)
	if kubernetes.placement != nil {
		group.Go(func() error { kubernetes.recall(ctx, index.verified(ctx, journal), logger); return nil })
	}
	for _, f := range feeds {
		group.Go(func() error { f.run(ctx, logger); return nil })
	}
	group.Go(func() error { return cli.ServeGRPC(ctx, srv.AdminGRPC(), admin, shutdownTimeout) })
	group.Go(func() error { return cli.ServeGRPC(ctx, srv.GRPC(), listener, shutdownTimeout) })
	if web != nil {
		group.Go(func() error { return web.run(ctx, v.Console.OneTimeLink, out, logger) })
	}
	if v.MetricsListen != "off" {
		group.Go(func() error { return cli.ServeMetrics(ctx, v.MetricsListen, registry, tracker, logger) })
	}
	logger.InfoContext(ctx, "ca is ready", "trust_domain", v.trustDomain.Name(), "listen", listener.Addr().String(),
		"admin_socket", v.AdminSocket, "version", cli.Version())
	if err := cli.Ready(ctx); err != nil {
		logger.WarnContext(ctx, "who waits for this program is not told", "err", err)
	}
	err = group.Wait()
	logger.InfoContext(ctx, "ca has stopped")
	return err
}
