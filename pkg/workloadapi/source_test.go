package workloadapi

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// TestSpec_E09_E10_SourceThroughRotations: go-spiffe's source on both sides, a hundred rotations, with
// roots added and removed in order, a handshake after each: none fails.
func TestSpec_E09_E10_SourceThroughRotations(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	r := newSocketRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), filepath.Join(t.TempDir(), "s"))
	server, client := newX509Source(t, r.addr), newX509Source(t, r.addr)
	authorize := tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://a.test/x"))
	sequence := uint64(1)
	publish := func(s *identity.Snapshot) {
		t.Helper()
		r.source.Publish(s)
		// Both have it when they show it.
		for deadline := time.Now().Add(10 * time.Second); ; {
			if has(t, server, s) && has(t, client, s) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("the sources do not follow")
			}
			runtime.Gosched()
		}
	}
	for i := range 100 {
		sequence++
		if i%10 != 9 {
			publish(a.Snapshot(sequence, a.SVID("/x")))
		} else {
			next := identitytest.NewAuthority(t, "a.test")
			publish(&identity.Snapshot{SVIDs: []*identity.SVID{a.SVID("/x")}, Bundle: a.Bundle(sequence, next)})
			sequence++
			publish(&identity.Snapshot{SVIDs: []*identity.SVID{next.SVID("/x")}, Bundle: a.Bundle(sequence, next)}) // E10
			sequence++
			a = next
			publish(a.Snapshot(sequence, a.SVID("/x")))
		}
		if err := handshake(tlsconfig.MTLSServerConfig(server, server, authorize), tlsconfig.MTLSClientConfig(client, client, authorize)); err != nil {
			t.Fatalf("rotation %d: %v", i, err)
		}
	}
}

// TestSpec_E18_AgentRestart: the source is back by itself, and has its SVID all the time.
func TestSpec_E18_AgentRestart(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	socket := filepath.Join(t.TempDir(), "s")
	source := identitytest.NewSource(a.Snapshot(1, a.SVID("/x")))
	r := newSocketRig(t, source, socket)
	s := newX509Source(t, r.addr)
	r.stop()
	if _, err := os.Stat(socket); err == nil {
		t.Log("the socket file has stayed")
	}
	if svid, err := s.GetX509SVID(); err != nil || svid.ID.String() != "spiffe://a.test/x" {
		t.Errorf("%v %v", svid, err)
	}
	newSocketRig(t, source, socket)
	again := a.Snapshot(1, a.SVID("/x"))
	source.Publish(again)
	for deadline := time.Now().Add(10 * time.Second); !has(t, s, again); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the source has not come back")
		}
	}
}
