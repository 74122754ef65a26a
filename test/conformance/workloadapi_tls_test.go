package conformance

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/test/local"
)

// pair is a server and a client with go-spiffe's sources.
type pair struct {
	server, client *workloadapi.X509Source
	serverID       spiffeid.ID
	address        string
}

// newPair starts a server that echoes one line to whom the client is.
func newPair(t *testing.T, w *world, name string) *pair {
	t.Helper()
	x, y := newUser(), newUser()
	a, b := entry(name+"-server", x), entry(name+"-client", y)
	w.apply(t, a, b)
	p := &pair{
		server: w.as(t, x).source(t), client: w.as(t, y).source(t),
		serverID: spiffeid.RequireFromString(a.GetSpiffeId()),
	}
	l, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0", spiffetls.MTLSServerWithRawConfig(
		tlsconfig.AuthorizeID(spiffeid.RequireFromString(b.GetSpiffeId())), p.server, p.server))
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(patience)) // a TCP connection has one
				_, _ = io.Copy(c, io.LimitReader(c, 5))     // the client says what failed
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Wait()
	})
	p.address = l.Addr().String()
	return p
}

// handshake makes a connection, and says something both ways.
func (p *pair) handshake(ctx context.Context) error {
	c, err := spiffetls.DialWithMode(ctx, "tcp", p.address, spiffetls.MTLSClientWithRawConfig(tlsconfig.AuthorizeID(p.serverID), p.client, p.client))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	answer := make([]byte, 5)
	_, err = io.ReadFull(c, answer)
	return err
}

// handshakes makes one after the other until it is stopped, and reports.
func (p *pair) handshakes(t *testing.T) (stop func() (made int64)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var made atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := p.handshake(t.Context()); err != nil {
				t.Errorf("handshake %d: %v", made.Load(), err)
				return
			}
			made.Add(1)
		}
	}()
	return func() int64 {
		cancel()
		<-done
		return made.Load()
	}
}

// TestSpec_E09_RotationsUnderTLS: a hundred on both sides, not one failed handshake.
func TestSpec_E09_RotationsUnderTLS(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	p := newPair(t, w, "e09")
	stop := p.handshakes(t)
	serials := map[string]bool{}
	for range 100 {
		a, b := p.server.Updated(), p.client.Updated()
		w.rotate(t)
		for _, updated := range []<-chan struct{}{a, b} {
			select {
			case <-updated:
			case <-time.After(patience):
				t.Fatal("no rotation")
			}
		}
		svid, err := p.client.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		serials[svid.Certificates[0].SerialNumber.String()] = true
	}
	made := stop()
	if len(serials) != 100 || made < 10 {
		t.Errorf("%d rotations, %d handshakes", len(serials), made)
	}
	t.Logf("%d handshakes", made)
}

// TestSpec_E12_EntryRemoved: a message without it, and PermissionDenied after the last.
func TestSpec_E12_EntryRemoved(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("e12-a", uid), entry("e12-b", uid))
	c := w.as(t, uid)
	s := c.stream(t)
	for len(s.next(t).GetSvids()) < 2 {
	}
	bundles, err := workload.NewSpiffeWorkloadAPIClient(c.raw(t)).FetchX509Bundles(header(t.Context(), "true"), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundles.Recv(); err != nil {
		t.Fatal(err)
	}
	w.remove(t, "e12-a")
	if diff := cmp.Diff([]string{"spiffe://" + td + "/e12-b"}, idsOf(s.next(t))); diff != "" {
		t.Error(diff)
	}
	w.remove(t, "e12-b")
	if m, err := s.recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v, %v", m, err)
	}
	for {
		if _, err := bundles.Recv(); err != nil {
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("bundles: %v", err)
			}
			break
		}
	}
}
