package cli

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/meshid/meshid/pkg/health"
)

// ServeGRPC serves until ctx ends, then lets open calls finish for at most
// grace before it ends them. It closes the listener. A connection that never
// begins to speak is waited for too, as long as the server's ConnectionTimeout.
func ServeGRPC(ctx context.Context, s *grpc.Server, l net.Listener, grace time.Duration) error {
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		timer := time.AfterFunc(grace, s.Stop)
		defer timer.Stop()
		s.GracefulStop()
	}()
	err := s.Serve(l)
	if ctx.Err() != nil {
		<-stopped
		if err == nil || errors.Is(err, grpc.ErrServerStopped) {
			return nil
		}
	}
	return fmt.Errorf("serve %s: %w", l.Addr(), err)
}

// ServeMetrics serves /metrics, /livez and /readyz, and nothing else, at address
// until ctx ends.
func ServeMetrics(ctx context.Context, address string, g prometheus.Gatherer, t *health.Tracker, logger *slog.Logger) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("metrics_listen: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: 10 * time.Second,
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
	}))
	t.Register(mux)
	s := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return <-closed
}

// RegisterProcessMetrics registers the metrics of the process and the Go
// runtime, and <prefix>_build_info.
func RegisterProcessMetrics(r prometheus.Registerer, prefix string) error {
	fips := "off"
	if fips140.Enabled() {
		fips = "on"
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        prefix + "_build_info",
		Help:        "Always 1; the labels say what was built with what, and whether the FIPS 140-3 module is in use.",
		ConstLabels: prometheus.Labels{"version": Version(), "go_version": runtime.Version(), "fips": fips},
	})
	info.Set(1)
	return errors.Join(
		r.Register(info),
		r.Register(collectors.NewGoCollector()),
		r.Register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})),
	)
}

// Harden keeps the process's memory, which holds private keys, out of core
// dumps and away from debuggers of the same user.
func Harden() error {
	return errors.Join(
		wrapErr("set PR_SET_DUMPABLE", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)),
		wrapErr("set RLIMIT_CORE", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})),
	)
}

func wrapErr(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
