package upstream_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// counted is a server that counts its connections, and keeps who showed what.
type counted struct {
	*httptest.Server
	made atomic.Int64

	mu     sync.Mutex // guards what follows
	shown  []string
	hijack bool // calls are cut off without an answer
}

func startCounted(t *testing.T, http2 bool) *counted {
	t.Helper()
	c := &counted{}
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.hijack {
			panic(http.ErrAbortHandler)
		}
		if p := r.TLS.PeerCertificates; len(p) > 0 {
			c.shown = append(c.shown, string(p[0].Raw))
		}
		_, _ = w.Write([]byte("{}"))
	}))
	c.EnableHTTP2 = http2
	c.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12}
	c.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			c.made.Add(1)
		}
	}
	c.StartTLS()
	t.Cleanup(c.Close)
	return c
}

func (c *counted) call(t *testing.T, client *http.Client) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return (&upstream.REST{Client: client, Name: "it"}).Call(ctx, http.MethodPost, c.URL, nil, map[string]string{}, nil)
}

// Connections are kept for as long as both sides know each other by the same.
func TestConnections(t *testing.T) {
	for _, http2 := range []bool{true, false} {
		c := startCounted(t, http2)
		var kept upstream.Connections
		file := filepath.Join(t.TempDir(), "ca.pem")
		trust := func(roots ...*x509.Certificate) {
			t.Helper()
			if err := os.WriteFile(file, upstreamtest.PEM(roots...), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		call := func(pair *tls.Certificate) error {
			t.Helper()
			client, err := kept.Client(file, pair)
			if err != nil {
				return err
			}
			return c.call(t, client)
		}
		trust(c.Certificate())
		for range 10 {
			if err := call(nil); err != nil {
				t.Fatal(err)
			}
		}
		if n := c.made.Load(); n != 1 {
			t.Errorf("HTTP/2 %t: %d connections for 10 calls", http2, n)
		}
		a, b := upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.NewAuthority(t, upstreamtest.Good)
		for _, own := range []*upstreamtest.Authority{a, a, b} {
			if err := call(&tls.Certificate{Certificate: [][]byte{own.Root.Raw}, PrivateKey: own.RootKey}); err != nil {
				t.Fatal(err)
			}
		}
		c.mu.Lock()
		if want := []string{string(a.Root.Raw), string(a.Root.Raw), string(b.Root.Raw)}; !slices.Equal(c.shown, want) {
			t.Errorf("HTTP/2 %t: %d client certificates, not those of each call", http2, len(c.shown))
		}
		c.hijack = true
		c.mu.Unlock()
		if n := c.made.Load(); n != 3 {
			t.Errorf("HTTP/2 %t: %d connections, want one more for each client certificate", http2, n)
		}
		// A call that gets no answer over a connection that was there may be made again.
		client := kept.For([]*x509.Certificate{c.Certificate()}, nil)
		if err := c.call(t, client); err == nil || upstream.Stale(err) {
			t.Errorf("HTTP/2 %t: over a new connection: %v", http2, err)
		}
		c.mu.Lock()
		c.hijack = false
		c.mu.Unlock()
		if err := c.call(t, client); err != nil {
			t.Error(err)
		}
		c.mu.Lock()
		c.hijack = true
		c.mu.Unlock()
		if err := c.call(t, client); !upstream.Stale(err) {
			t.Errorf("HTTP/2 %t: over the same connection: %v", http2, err)
		}
		// Whom the file names no more is not talked to, whatever is open.
		trust(a.Root)
		if err := call(nil); err == nil {
			t.Errorf("HTTP/2 %t: a server is trusted whose CA is not in the file any more", http2)
		}
	}
}

// Connections do not grow old: whoever they lead to has to prove it again.
func TestConnections_Age(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var kept upstream.Connections
		first := kept.For(nil, nil)
		time.Sleep(4 * time.Minute)
		if kept.For(nil, nil) != first {
			t.Error("replaced after four minutes")
		}
		time.Sleep(2 * time.Minute)
		if kept.For(nil, nil) == first {
			t.Error("kept for six minutes")
		}
	})
}
