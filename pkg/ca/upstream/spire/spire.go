// Package spire is the upstream CA that is a SPIRE deployment of the same trust domain,
// which this CA joins as SPIRE's nested servers do: as a downstream workload. The SPIRE
// agent's Workload API says who this CA is, and which roots there are; the server signs
// intermediates. It does not know what for an intermediate is used.
//
// A request for an intermediate:
//
//  1. the Workload API gives the downstream X.509-SVID, and the trust bundle
//  2. NewDownstreamX509CA of the server is called, over mutual TLS
package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

// serverPath is that of a SPIRE server's own SPIFFE ID.
const serverPath = "/spire/server"

// Config says which SPIRE server, and where its agent is.
type Config struct {
	// Address is where the SPIRE server listens, host:port.
	Address string `yaml:"address"`
	// WorkloadAPI is the address of the Workload API of a SPIRE agent on this machine,
	// such as unix:///run/spire/sockets/agent.sock, which gives this process an identity
	// of an entry that is downstream.
	WorkloadAPI string `yaml:"workload_api"`
	// SPIFFEID says which of the identities that the Workload API gives is used; the
	// first one if "".
	SPIFFEID string `yaml:"spiffe_id"`
}

// CA is a SPIRE server. It may be called concurrently.
type CA struct{ mesh *upstream.Mesh }

// New checks the settings.
func New(c Config) (*CA, error) {
	if c.WorkloadAPI == "" {
		return nil, errors.New("workload_api: missing; write the address of a SPIRE agent's socket, such as unix:///run/spire/sockets/agent.sock")
	}
	m := &upstream.Mesh{Name: "the SPIRE server", Address: c.Address, ServerPath: serverPath, WorkloadAPI: c.WorkloadAPI, SPIFFEID: c.SPIFFEID}
	if err := m.Check(); err != nil {
		return nil, err
	}
	return &CA{mesh: m}, nil
}

// Capabilities say that lives are in seconds. SPIRE says no limit of its own.
func (*CA) Capabilities() upstream.Capabilities {
	return upstream.Capabilities{TTLGranularity: time.Second}
}

// CheckUse implements upstream.UseChecker.
func (s *CA) CheckUse(u upstream.Use) error { return s.mesh.CheckUse(u) }

// Mint has an intermediate signed.
func (s *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	conn, _, err := s.mesh.Dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // the answer is there, or its error
	answer, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{
		Csr: r.CSR, PreferredTtl: int32(min(r.TTL/time.Second, maxSeconds)), //nolint:gosec // it is bounded
	})
	if err != nil {
		return nil, s.mesh.Failed(ctx, "NewDownstreamX509CA", err)
	}
	m := &upstream.Minted{}
	if m.Chain, err = upstream.ParseDER(2*upstream.MaxChain, answer.GetCaCertChain()); err != nil {
		return nil, fmt.Errorf("the chain from the SPIRE server: %w", err)
	}
	if m.Roots, err = upstream.ParseDER(upstream.MaxRoots, answer.GetX509Authorities()); err != nil {
		return nil, fmt.Errorf("the roots from the SPIRE server: %w", err)
	}
	return m, nil
}

const maxSeconds = 1<<31 - 1

// WatchRoots implements upstream.RootWatcher, by the Workload API's stream: an agent
// is told of a new root before the server signs with it.
func (s *CA) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.mesh.WorkloadAPI))
	if err != nil {
		return fmt.Errorf("%w: %w", upstream.ErrUnavailable, err)
	}
	defer client.Close() //nolint:errcheck // nothing is open any more
	watching, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err = client.WatchX509Context(watching, &watcher{spiffeID: s.mesh.SPIFFEID, changed: changed, stop: cancel})
	if cause := context.Cause(watching); cause != nil {
		return cause
	}
	return fmt.Errorf("%w: the Workload API: %w", upstream.ErrUnavailable, err)
}

// watcher takes what the Workload API says. It is called by one goroutine.
type watcher struct {
	spiffeID string
	changed  func([]*x509.Certificate) error
	stop     context.CancelCauseFunc
	known    []*x509.Certificate
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w *watcher) OnX509ContextUpdate(given *workloadapi.X509Context) {
	for _, svid := range given.SVIDs {
		if w.spiffeID != "" && svid.ID.String() != w.spiffeID {
			continue
		}
		bundle, err := given.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
		if err != nil {
			w.stop(fmt.Errorf("the Workload API gives no trust bundle: %w", err))
			return
		}
		roots := bundle.X509Authorities()
		if len(roots) == 0 || slices.EqualFunc(roots, w.known, (*x509.Certificate).Equal) {
			return
		}
		w.known = roots
		if err := w.changed(slices.Clone(roots)); err != nil {
			w.stop(err)
		}
		return
	}
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher: whoever watches
// tries again, at a pace of its own.
func (w *watcher) OnX509ContextWatchError(err error) {
	w.stop(fmt.Errorf("%w: the Workload API: %w", upstream.ErrUnavailable, err))
}
