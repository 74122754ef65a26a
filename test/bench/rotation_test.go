package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// get makes one request through a client's Envoy.
func get(ctx context.Context, c *http.Client, port string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+port, http.NoBody)
	if err != nil {
		return err
	}
	response, err := c.Do(request)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, response.Body)
	if response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return errors.Join(err, response.Body.Close())
}

// load makes requests until stop is called, which returns how many there were and
// how many failed.
func load(t testing.TB, callers int, ports ...string) (stop func() (requests, failures int64)) {
	t.Helper()
	var running sync.WaitGroup
	var requests, failures atomic.Int64
	stopped := make(chan struct{})
	for i := range callers {
		running.Go(func() {
			c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{}}
			defer c.CloseIdleConnections()
			for {
				select {
				case <-stopped:
					return
				default:
				}
				requests.Add(1)
				if err := get(t.Context(), c, ports[i%len(ports)]); err != nil {
					failures.Add(1)
					t.Log(err)
				}
			}
		})
	}
	return func() (int64, int64) {
		close(stopped)
		running.Wait()
		return requests.Load(), failures.Load()
	}
}

// awaitRotation waits until the roots are as ok wants.
func awaitRotation(t testing.TB, ca *local.CA, what string, ok func(*adminv1.Rotation) bool) (r *adminv1.Rotation) {
	t.Helper()
	local.Await(t, what, func(ctx context.Context) error {
		answer, err := ca.Admin.GetRotation(ctx, &adminv1.GetRotationRequest{})
		if err != nil {
			return err
		}
		if r = answer.GetRotation(); !ok(r) {
			return fmt.Errorf("the roots are %v", r)
		}
		return nil
	})
	return r
}

func rotate(t testing.TB, ca *local.CA, verb string) {
	t.Helper()
	_, err := ca.Admin.ChangeRotation(t.Context(), &adminv1.ChangeRotationRequest{Verb: verb})
	must(t, err)
}

func inState(r *adminv1.Rotation, state string) string {
	for _, root := range r.GetRoots() {
		if root.GetState() == state || state == "tainted" && root.GetTainted() {
			return root.GetId()
		}
	}
	return ""
}

// The root's key is changed under traffic between two real Envoys, twice: while a
// third one stands still, which is waited for and named, and because the key is
// lost. No request fails.
func TestFault_F57_RootRotationUnderTraffic(t *testing.T) {
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	apply(t, ca, everybody)
	a := ca.StartAgent(t, "rotation", local.AgentOptions{})
	ports := []string{"SOCKET", a.Socket, "SERVER", port(t), "ONCE", port(t), "KEPT", port(t)}
	startEnvoy(t, firstUser, serverBootstrap, ports...)
	startEnvoy(t, firstUser+1, clientBootstrap, ports...)
	own := port(t)
	still := startEnvoy(t, firstUser+2, serverBootstrap, "SOCKET", a.Socket, "SERVER", own)
	for _, p := range []string{ports[5], ports[7]} {
		local.Await(t, "wait for the Envoys", func(ctx context.Context) error { return get(ctx, http.DefaultClient, p) })
	}
	local.Await(t, "wait for the third Envoy", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", own))
		if err != nil {
			return err
		}
		return conn.Close()
	})
	first := inState(awaitRotation(t, ca, "wait until all have acknowledged the first bundle", func(r *adminv1.Rotation) bool {
		return r.GetProxies() >= 3 && r.GetProxiesAcknowledged() == r.GetProxies()
	}), "active")
	stop := load(t, 4, ports[5], ports[7])

	still.Signal(t, syscall.SIGSTOP)
	rotate(t, ca, "rotate")
	name := fmt.Sprintf("spiffe://example.org/user/%d", firstUser+2)
	late := awaitRotation(t, ca, "wait until all but the third have acknowledged the new root", func(r *adminv1.Rotation) bool {
		return inState(r, "prepared") != "" && len(r.GetLaggards()) > 0 &&
			r.GetProxiesAcknowledged()+uint32(len(r.GetLaggards())) == r.GetProxies() && strings.HasPrefix(r.GetLaggards()[0].GetName(), name)
	})
	for _, l := range late.GetLaggards() {
		if !strings.HasPrefix(l.GetName(), name) || l.GetNodeId() != a.NodeID {
			t.Errorf("a laggard is %v", l)
		}
	}
	if out := ca.MustCommand(t, "authority", "show"); !strings.Contains(out, name) {
		t.Errorf("ca authority show does not name who is late:\n%s", out)
	}
	if out, err := ca.Command(t, "authority", "activate"); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("ca authority activate: %s, %v", out, err)
	}
	still.Signal(t, syscall.SIGCONT)
	second := inState(awaitRotation(t, ca, "wait until the new root signs", func(r *adminv1.Rotation) bool {
		return inState(r, "retiring") == first
	}), "active")

	begun := time.Now()
	rotate(t, ca, "taint")
	awaitRotation(t, ca, "wait until the third root signs", func(r *adminv1.Rotation) bool {
		return inState(r, "tainted") == second && inState(r, "active") != second
	})
	converged := time.Since(begun)
	awaitRotation(t, ca, "wait until nothing uses the lost root", func(r *adminv1.Rotation) bool {
		for _, root := range r.GetRoots() {
			if root.GetId() == second && root.GetSvids() > 0 {
				return false
			}
		}
		return true
	})
	renewed := time.Since(begun)
	awaitRotation(t, ca, "wait until the lost root has left", func(r *adminv1.Rotation) bool { return inState(r, "tainted") == "" })
	left := time.Since(begun)
	requests, failures := stop()
	t.Logf("of %d requests %d failed; the root that replaces a lost one signed after %s, everything was renewed after %s, the lost one left the bundle after %s",
		requests, failures, converged.Round(time.Millisecond), renewed.Round(time.Millisecond), left.Round(time.Millisecond))
	if failures > 0 || requests == 0 {
		t.Errorf("%d of %d requests failed", failures, requests)
	}
}

// From the root of an enterprise's own CA, in files, to one of the CA's own, and
// back, under traffic between two real Envoys. No request fails.
func TestAdoptUnderTraffic(t *testing.T) {
	require.Root(t)
	dir := t.TempDir()
	above := upstreamtest.NewAuthority(t, upstreamtest.Good)
	for name, content := range map[string][]byte{
		"ca.pem": upstreamtest.PEM(above.Issuer), "roots.pem": upstreamtest.PEM(above.Root), "ca-key.pem": upstreamtest.KeyPEM(t, above.Key),
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
	}
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf("upstream: {disk: {certificate: %[1]s/ca.pem, key: %[1]s/ca-key.pem, roots: %[1]s/roots.pem}}\n", dir)})
	apply(t, ca, everybody)
	a := ca.StartAgent(t, "adopt", local.AgentOptions{})
	ports := []string{"SOCKET", a.Socket, "SERVER", port(t), "ONCE", port(t), "KEPT", port(t)}
	startEnvoy(t, firstUser, serverBootstrap, ports...)
	startEnvoy(t, firstUser+1, clientBootstrap, ports...)
	for _, p := range []string{ports[5], ports[7]} {
		local.Await(t, "wait for the Envoys", func(ctx context.Context) error { return get(ctx, http.DefaultClient, p) })
	}
	stop := load(t, 4, ports[5], ports[7])
	for _, to := range []struct {
		verb     string
		upstream bool
	}{{"adopt-self", false}, {"adopt", true}} {
		rotate(t, ca, to.verb)
		awaitRotation(t, ca, to.verb, func(r *adminv1.Rotation) bool {
			for _, root := range r.GetRoots() {
				if root.GetState() == "active" {
					return root.GetUpstream() == to.upstream
				}
			}
			return false
		})
		renewed, err := ca.Admin.RenewSVIDs(t.Context(), &adminv1.RenewSVIDsRequest{})
		must(t, err)
		if renewed.GetNodes() != 1 {
			t.Errorf("%d nodes renew", renewed.GetNodes())
		}
		awaitRotation(t, ca, "wait until all is renewed after "+to.verb, func(r *adminv1.Rotation) bool {
			for _, root := range r.GetRoots() {
				if root.GetState() != "active" && root.GetSvids() > 0 {
					return false
				}
			}
			return true
		})
	}
	if requests, failures := stop(); failures > 0 || requests == 0 {
		t.Errorf("%d of %d requests failed", failures, requests)
	}
}
