package agent

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
)

// TestFault_F32_HalfOpen: a CA that vanished without a word is noticed.
func TestFault_F32_HalfOpen(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		pass(time.Minute)
		h.ca.net.mu.Lock()
		h.ca.net.hole = true
		h.ca.net.mu.Unlock()
		pass(20 * time.Second)
		settleDown()
		if h.Status().Connected {
			t.Fatal("still connected after 20 s without an answer")
		}
		h.ca.net.mu.Lock()
		h.ca.net.hole = false
		h.ca.net.mu.Unlock()
		pass(time.Minute)
		settleDown()
		if !h.Status().Connected {
			t.Error("not connected again")
		}
	})
}

// TestFault_F34_ResetStorm: sessions that break all the time cost no attestation,
// and are not made faster than they break.
func TestFault_F34_ResetStorm(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		for range 300 {
			pass(2 * time.Second)
			h.ca.net.set(true)
			h.ca.net.set(false)
		}
		settleDown()
		h.ca.mu.Lock()
		attestations, sessions := h.ca.attestations, h.ca.sessions
		h.ca.mu.Unlock()
		if attestations != 1 {
			t.Errorf("%d attestations, want 1", attestations)
		}
		if sessions > 150 {
			t.Errorf("%d sessions in ten minutes of resets", sessions)
		}
		pass(time.Minute)
		settleDown()
		if !h.Status().Connected {
			t.Error("not connected afterwards")
		}
	})
}

// TestV_C10_RefusedOwnRenewal: an agent whose own X.509-SVID is not accepted any
// more attests the node again.
func TestV_C10_RefusedOwnRenewal(t *testing.T) {
	bubble(t, func(t *testing.T, h *harness) {
		h.ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		h.ca.mu.Lock()
		h.ca.refuseRenew = status.Error(codes.Unauthenticated, "there is a newer one")
		h.ca.mu.Unlock()
		pass(70 * time.Minute)
		settleDown()
		mustHave(t, w, "/web")
		if n := h.ca.count(func() int { return h.ca.attestations }); n != 2 {
			t.Errorf("%d attestations, want 2", n)
		}
		if !h.Status().Connected {
			t.Error("not connected")
		}
	})
}

// TestFault_F36_DeadAddressFirst: a dead replica at the first of several addresses
// does not keep the agent from the next.
func TestFault_F36_DeadAddressFirst(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		names := manual.NewBuilderWithScheme("names")
		names.InitialState(resolver.State{Endpoints: []resolver.Endpoint{
			{Addresses: []resolver.Address{{Addr: "hangs"}}},
			{Addresses: []resolver.Address{{Addr: "refuses"}}},
			{Addresses: []resolver.Address{{Addr: "good"}}},
		}})
		h := newHarness(t, ca, dir, func(c *Config) {
			c.CAAddress = "names:///ca"
			c.DialOptions = []grpc.DialOption{
				grpc.WithResolvers(names),
				grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
					switch address {
					case "hangs":
						<-ctx.Done()
						return nil, ctx.Err()
					case "good":
						return ca.dial(ctx, address)
					default:
						return nil, errors.New("connection refused")
					}
				}),
			}
		})
		h.start()
		defer h.stop()
		pass(5 * time.Second)
		settleDown()
		if !h.Status().Connected {
			t.Errorf("not connected after 5 s: %+v", h.Status())
		}
	})
}
