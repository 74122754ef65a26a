package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	fake "github.com/meshid/meshid/test/fakes/spire"
)

func start(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*fake.Server, Config) {
	t.Helper()
	s := fake.New(t, a, b)
	return s, Config{Address: s.Address, WorkloadAPI: s.WorkloadAPI, SPIFFEID: upstreamtest.TrustDomain.IDString() + fake.Downstream}
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			_, c := start(t, b, a)
			return upstreamtest.Open(t, New, c)
		},
	})
}

// A root that SPIRE has prepared is told of before it signs.
func TestPrepared(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	s, c := start(t, upstreamtest.Good, a)
	next := upstreamtest.NewAuthority(t, upstreamtest.Good).Root
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	enough := errors.New("enough")
	err := upstreamtest.Open(t, New, c).WatchRoots(ctx, func(roots []*x509.Certificate) error {
		switch {
		case len(roots) == 1 && roots[0].Equal(a.Root):
			s.Prepare(next)
			return nil
		case len(roots) == 2 && roots[1].Equal(next):
			return enough
		}
		t.Errorf("%d roots", len(roots))
		return enough
	})
	if !errors.Is(err, enough) {
		t.Error(err)
	}
	v, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
	if err != nil || len(v.Roots) != 2 || len(v.Anchors) != 1 {
		t.Errorf("%v %v", v, err)
	}
}

// Which identity is used, and what is said if it is the wrong one.
func TestIdentity(t *testing.T) {
	_, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	c.SPIFFEID = ""
	_, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "authorization denied") {
		t.Errorf("%v", err)
	}
	c.SPIFFEID = "spiffe://example.org/none"
	_, err = upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
	if !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "spiffe://example.org/ca-below") {
		t.Errorf("%v", err)
	}
	// No agent is there.
	c.WorkloadAPI = "unix:///nowhere/agent.sock"
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := upstreamtest.Open(t, New, c).WatchRoots(ctx, func([]*x509.Certificate) error { return nil }); !errors.Is(err, upstream.ErrUnavailable) {
		t.Errorf("%v", err)
	}
}

func TestNew(t *testing.T) {
	for _, c := range []struct {
		name   string
		config Config
		says   string
	}{
		{"no socket", Config{Address: "spire.internal:8081"}, "workload_api: missing"},
		{"a path for a socket", Config{Address: "spire.internal:8081", WorkloadAPI: "/run/spire/sockets/agent.sock"}, "unix:///"},
		{"no address", Config{WorkloadAPI: "unix:///run/spire/sockets/agent.sock"}, "host:port"},
		{"a URL for an address", Config{Address: "https://spire.internal", WorkloadAPI: "unix:///run/spire/sockets/agent.sock"}, "host:port"},
		{"no SPIFFE ID", Config{Address: "spire.internal:8081", WorkloadAPI: "unix:///run/spire/sockets/agent.sock", SPIFFEID: "ca"}, "spiffe_id"},
	} {
		if _, err := New(c.config); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want it to say %q", c.name, err, c.says)
		}
	}
}
