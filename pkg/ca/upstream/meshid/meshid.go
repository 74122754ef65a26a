// Package meshid is the upstream CA that is another meshid of the same trust domain:
// its root is ours too. It speaks proto/downstream/v1, as who a node agent or files
// say that this CA is, and tells above which roots are in force here, so that the root
// changes above only when it can. It does not know what for an intermediate is used.
package meshid

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/ca/upstream"
	downstreamv1 "github.com/meshid/meshid/proto/downstream/v1"
)

// serverPath is that of a CA's own SPIFFE ID.
const serverPath = "/meshid/ca"

// What a mesh waits for is told in so many bytes, and that alone is news once in
// waitsEvery.
const (
	maxWaitsFor = 512
	waitsEvery  = time.Second
)

// Config says where the CA above listens, and who this one is there: workload_api, or
// certificate, key and bundle.
type Config struct {
	// Address is where the CA above listens for agents, host:port.
	Address string `yaml:"address"`
	// WorkloadAPI is the address of the Workload API of a node agent of the CA above,
	// such as unix:///run/meshid/workload/agent.sock, which gives this process an
	// identity of an entry marked downstream.
	WorkloadAPI string `yaml:"workload_api"`
	// SPIFFEID says which of the identities that the Workload API gives is used; the
	// first one if "".
	SPIFFEID string `yaml:"spiffe_id"`
	// Certificate is the path of the X.509-SVID of this CA, PEM, with those between it
	// and its root, if there is no Workload API. All three files are read for each
	// connection: whoever renews the identity replaces them.
	Certificate string `yaml:"certificate"`
	// Key is the path of its private key, PEM, mode 0600.
	Key string `yaml:"key"`
	// Bundle is the path of the PEM certificates of the roots by which the CA above is
	// known.
	Bundle string `yaml:"bundle"`
}

// CA is a meshid. It may be called concurrently.
type CA struct {
	mesh *upstream.Mesh
	wake chan struct{} // capacity 1; what there is to say is read afterwards

	mu           sync.Mutex // guards what follows
	acknowledged map[[sha256.Size]byte]bool
	waits        map[[sha256.Size]byte]string
	held         []string
}

// New checks the settings, and reads the files once.
func New(c Config) (*CA, error) {
	m := &upstream.Mesh{
		Name: "the CA above", Address: c.Address, ServerPath: serverPath, WorkloadAPI: c.WorkloadAPI, SPIFFEID: c.SPIFFEID,
		Certificate: c.Certificate, Key: c.Key, Bundle: c.Bundle,
	}
	if err := m.Check(); err != nil {
		return nil, err
	}
	return &CA{mesh: m, wake: make(chan struct{}, 1)}, nil
}

// Capabilities say that the intermediates are the last CAs of their chain.
func (*CA) Capabilities() upstream.Capabilities {
	return upstream.Capabilities{PathLen0: true}
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
	answer, err := downstreamv1.NewDownstreamServiceClient(conn).Mint(ctx, &downstreamv1.MintRequest{Csr: r.CSR, Life: durationpb.New(r.TTL)})
	if err != nil {
		return nil, s.mesh.Failed(ctx, "Mint", err)
	}
	m := &upstream.Minted{}
	if m.Chain, err = upstream.ParseDER(2*upstream.MaxChain, answer.GetChain()); err != nil {
		return nil, fmt.Errorf("the chain from the CA above: %w", err)
	}
	if m.Roots, err = upstream.ParseDER(upstream.MaxRoots, answer.GetRoots().GetRoots()); err != nil {
		return nil, fmt.Errorf("the roots from the CA above: %w", err)
	}
	return m, nil
}

// InForce implements upstream.RootFollower.
func (s *CA) InForce(roots []upstream.InForce) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acknowledged, s.waits, s.held = make(map[[sha256.Size]byte]bool), make(map[[sha256.Size]byte]string), nil
	for _, r := range roots {
		sum := sha256.Sum256(r.Root.Raw)
		s.acknowledged[sum], s.waits[sum] = r.Acknowledged, r.WaitsFor
		if id := hex.EncodeToString(r.Root.SubjectKeyId); r.Held && id != "" {
			s.held = append(s.held, id)
		}
	}
	slices.Sort(s.held)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// says is what the CA above is told, if these roots are the last that it has sent; nil
// as long as nothing is known of this mesh.
func (s *CA) says(last *downstreamv1.Roots, roots []*x509.Certificate, now time.Time) *downstreamv1.FollowRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.acknowledged == nil {
		return nil
	}
	m := &downstreamv1.FollowRequest{Acknowledged: last.GetSequence(), Held: s.held}
	for _, r := range roots {
		// What has expired is not taken into a bundle.
		sum := sha256.Sum256(r.Raw)
		if s.acknowledged[sum] || !now.Before(r.NotAfter) {
			continue
		}
		m.Acknowledged = 0
		if waits, known := s.waits[sum]; known {
			m.WaitsFor = strings.ToValidUTF8(waits[:min(len(waits), maxWaitsFor)], "")
		} else {
			m.WaitsFor = "its own trust bundle, which has not got root " + hex.EncodeToString(r.SubjectKeyId)
		}
	}
	return m
}

// WatchRoots implements upstream.RootWatcher. When half of the life of its identity is
// over, it goes on with the next one.
func (s *CA) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	for {
		err := s.follow(ctx, changed)
		if !errors.Is(err, errRenew) {
			return err
		}
	}
}

var errRenew = errors.New("the identity is to be renewed")

func (s *CA) follow(ctx context.Context, changed func([]*x509.Certificate) error) error {
	conn, until, err := s.mesh.Dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // whoever is at the other end is told by the end of the stream
	renew := time.NewTimer(max(time.Until(until)/2, time.Second))
	defer renew.Stop()
	calling, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := downstreamv1.NewDownstreamServiceClient(conn).Follow(calling)
	if err != nil {
		return s.mesh.Failed(ctx, "Follow", err)
	}
	type received struct {
		roots *downstreamv1.Roots
		err   error
	}
	from := make(chan received)
	go func() {
		for {
			roots, err := stream.Recv()
			select {
			case from <- received{roots, err}:
			case <-calling.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	var last *downstreamv1.Roots
	var roots []*x509.Certificate
	var said *downstreamv1.FollowRequest
	var saidAt time.Time
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-renew.C:
			return errRenew
		case <-s.wake:
		case <-again:
			again = nil
		case r := <-from:
			if r.err != nil {
				return s.mesh.Failed(ctx, "Follow", r.err)
			}
			last = r.roots
			if roots, err = upstream.ParseDER(upstream.MaxRoots, last.GetRoots()); err != nil {
				return fmt.Errorf("the roots from the CA above: %w", err)
			}
			if len(roots) == 0 {
				return errors.New("the CA above says that it has no root")
			}
			if err := changed(slices.Clone(roots)); err != nil {
				return err
			}
		}
		if last == nil {
			continue
		}
		m := s.says(last, roots, time.Now())
		switch {
		case m == nil || proto.Equal(m, said):
		case m.GetAcknowledged() == said.GetAcknowledged() && slices.Equal(m.GetHeld(), said.GetHeld()) && time.Since(saidAt) < waitsEvery:
			if again == nil {
				again = time.After(waitsEvery)
			}
		default:
			// Why a stream has ended is said by what is received.
			if err := stream.Send(m); err == nil {
				said, saidAt = m, time.Now()
			}
		}
	}
}
