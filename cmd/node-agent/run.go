package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/internal/memory"
	"github.com/meshid/meshid/pkg/agent"
	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/sds"
	"github.com/meshid/meshid/pkg/workloadapi"
)

// conditionSocket: workloads cannot connect, because something else is in the
// place of the socket.
const conditionSocket = "workload_socket"

// shutdownTimeout bounds how long streams may stay open when the agent stops.
const shutdownTimeout = time.Second

func newRunCommand() *cobra.Command {
	var path string
	var log cli.LogFlags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the node agent",
		Long: `Run the node agent until SIGINT or SIGTERM. It needs the host's PID namespace, and
root, or the capabilities SYS_PTRACE and DAC_READ_SEARCH, to look at the processes
of other users.`,
		Example: "  node-agent run --config /etc/meshid/agent.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := log.Logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			v, err := loadSettings(path)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), v, logger)
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file")
	log.Add(cmd)
	return cmd
}

func newCheckCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration, and that the CA, the kubelet and the container runtime answer",
		Long: `Check the configuration, and what it names: that the CA answers, that the join
token, machine certificate or service account token by which this machine attests
can be read and has its form, and that the kubelet and the container runtime answer.
Nothing is sent to the CA, and a join token is not used up.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := loadSettings(path)
			if err != nil {
				return err
			}
			node, err := nodeAttester(v.NodeAttestation)
			if err != nil {
				return err
			}
			workloads, err := workloadAttestors(v.WorkloadAttestation, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
			if err != nil {
				return err
			}
			if _, err := csiDriver(v, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "the configuration is valid")
			ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
			defer cancel()
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", v.CA.Address)
			if err != nil {
				err = fmt.Errorf("reach the CA: %w\n  Check ca.address, and that the CA runs and no firewall is between", err)
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "the CA answers at %s\n", conn.RemoteAddr())
				err = conn.Close()
			}
			if failed := checkEvidence(cmd.Context(), cmd.OutOrStdout(), node, v.DataDir); failed != nil {
				err = errors.Join(err, fmt.Errorf("node_attestation.%s: %w", node.Method(), failed))
			}
			for _, w := range workloads {
				c, ok := w.(interface {
					Check(ctx context.Context) (found string, err error)
				})
				if !ok {
					continue
				}
				found, failed := c.Check(cmd.Context())
				if failed == nil {
					fmt.Fprintln(cmd.OutOrStdout(), found)
				}
				err = errors.Join(err, failed)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file")
	return cmd
}

// checkEvidence says whether the machine could attest now. A join token that is gone
// is no mistake where the node has joined.
func checkEvidence(ctx context.Context, out io.Writer, node attest.NodeAttester, dataDir string) error {
	_, err := node.Evidence(ctx, make([]byte, sha256.Size))
	switch {
	case err == nil:
		fmt.Fprintf(out, "the machine has what it attests with (%s)\n", node.Method())
	case errors.Is(err, os.ErrNotExist) && node.Method() == jointoken.Method && agent.HasCache(dataDir):
		fmt.Fprintln(out, "the join token is gone, which is right once the node has joined")
	default:
		return err
	}
	return nil
}

// memoryLimits are what the agent is kept to: it is on every machine and has little to
// do, so its memory is dearer than its collector's time.
var memoryLimits = memory.Limits{Calm: memory.Calm, Garbage: 6 << 20, File: 8 << 20}

// serve puts the parts together and runs them until ctx ends. The sockets open
// before any network is touched: what was issued before a restart is served
// from the sealed cache meanwhile.
func serve(ctx context.Context, v *validated, logger *slog.Logger) error {
	if err := cli.Harden(); err != nil {
		logger.WarnContext(ctx, "process hardening is incomplete", "err", err)
	}
	registry := prometheus.NewRegistry()
	if err := cli.RegisterProcessMetrics(registry, "meshid_agent"); err != nil {
		return err
	}
	if err := durable.MkdirAll(v.DataDir, 0o700); err != nil {
		return fmt.Errorf("data_dir: %w", err)
	}
	tracker, err := health.New(registry, "meshid_agent", append(slices.Concat(agent.Conditions, sds.Conditions), conditionSocket)...)
	if err != nil {
		return err
	}
	node, err := nodeAttester(v.NodeAttestation)
	if err != nil {
		return err
	}
	workloads, err := workloadAttestors(v.WorkloadAttestation, logger, registry)
	if err != nil {
		return err
	}
	driver, err := csiDriver(v, logger, registry)
	if err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		TrustDomain: v.trustDomain, CAAddress: v.CA.Address, TrustAnchors: v.anchors, RootSHA256: v.rootSHA256,
		Node: node, Workloads: workloads, DataDir: v.DataDir, SealingKeyFile: v.SealingKeyFile,
		Version: cli.Version(), Logger: logger, Registerer: registry, Health: tracker,
	})
	if err != nil {
		return err
	}
	server, endStreams, err := workloadServer(a, v.WorkloadAPI.DenyAfter.Or(defaultDenyAfter), logger, registry, tracker)
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Dir(v.AdminSocket), 0o755); err != nil {
		return fmt.Errorf("admin_socket: %w", err)
	}
	socket, err := peer.Listen(ctx, v.Socket, peer.Options{Logger: logger, Registerer: registry, Report: func(problem error) {
		if problem == nil {
			tracker.Clear(conditionSocket)
		} else {
			tracker.Set(conditionSocket, health.Error, problem.Error())
		}
	}})
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	admin, err := peer.Listen(ctx, v.AdminSocket, peer.Options{Mode: 0o600, Logger: logger})
	if err != nil {
		return errors.Join(fmt.Errorf("admin_socket: %w", err), socket.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { memory.Tend(ctx, memoryLimits, logger); return nil })
	group.Go(func() error { return a.Run(ctx) })
	group.Go(func() error { return cli.ServeGRPC(ctx, server, socket, shutdownTimeout) })
	group.Go(func() error { return serveStatus(ctx, admin, a, logger) })
	if driver != nil {
		group.Go(func() error { return driver.Run(ctx) })
	}
	group.Go(func() error {
		<-ctx.Done()
		endStreams()
		return nil
	})
	if v.MetricsListen != "off" {
		group.Go(func() error { return cli.ServeMetrics(ctx, v.MetricsListen, registry, tracker, logger) })
	}
	logger.InfoContext(ctx, "node agent is ready", "trust_domain", v.trustDomain.Name(), "ca", v.CA.Address, "socket", v.Socket, "version", cli.Version())
	if err := cli.Ready(ctx); err != nil {
		logger.WarnContext(ctx, "who waits for this program is not told", "err", err)
	}
	err = group.Wait()
	logger.InfoContext(ctx, "node agent has stopped")
	return err
}

// workloadServer returns the gRPC server of SDS and the Workload API, and what
// ends its streams so that it can stop.
func workloadServer(a *agent.Agent, denyAfter time.Duration, logger *slog.Logger, r prometheus.Registerer, t *health.Tracker) (_ *grpc.Server, endStreams func(), _ error) {
	secrets, err := sds.New(a, sds.Options{Logger: logger, Registerer: r, Report: func(condition, problem string) {
		if problem == "" {
			t.Clear(condition)
		} else {
			t.Set(condition, health.Warning, problem)
		}
	}})
	if err != nil {
		return nil, nil, err
	}
	workload, err := workloadapi.New(a, workloadapi.Options{Logger: logger, Registerer: r, DenyAfter: denyAfter})
	if err != nil {
		return nil, nil, err
	}
	limits, err := peer.LimitCalls(peer.CallLimits{Logger: logger, Registerer: r})
	if err != nil {
		return nil, nil, err
	}
	options := slices.Concat(sds.ServerOptions(), limits, workloadapi.ServerOptions())
	server := grpc.NewServer(append(options, grpc.Creds(peer.Credentials()))...)
	secrets.Register(server)
	workload.Register(server)
	workloadapi.RegisterReflection(server)
	return server, func() {
		secrets.Close()
		workload.Close()
	}, nil
}

// withPeer is for http.Server's ConnContext: peer.FromContext finds who connected.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	p, ok := peer.FromConn(c)
	if !ok {
		return ctx
	}
	return peer.NewContext(ctx, p)
}

// outside says why a caller is not on the machine itself.
func outside(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return errors.New("caller is not known")
	}
	return p.Elsewhere()
}

// serveStatus answers `node-agent status` on the admin socket until ctx ends.
func serveStatus(ctx context.Context, l net.Listener, a *agent.Agent, logger *slog.Logger) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		if err := outside(r.Context()); err != nil {
			logger.WarnContext(r.Context(), "status is refused", "err", err)
			http.Error(w, "root in a container is not root of the machine: call from the machine itself, "+
				"or where the agent is in a container, from within it (docker exec, kubectl exec)", http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		if err := json.NewEncoder(w).Encode(a.Status()); err != nil {
			logger.DebugContext(r.Context(), "status was not read to its end", "err", err)
		}
	})
	s := &http.Server{ConnContext: withPeer, Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve status: %w", err)
	}
	return <-closed
}
