package upstream

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// Bounds of connections that are kept.
const (
	// maxOpen are open at once to a server that speaks HTTP/1.1, and of these maxIdle
	// stay; HTTP/2 needs one.
	maxOpen, maxIdle = 64, 16
	idleTimeout      = time.Minute
	// maxAge is when all are replaced: the server is looked up, and proves who it is,
	// anew.
	maxAge = 5 * time.Minute
	// A server that has vanished is noticed after these two together.
	probeAfter, probeTimeout = 15 * time.Second, 10 * time.Second
)

// Connections keeps the connections to one server for the calls to come. They are
// replaced when they are old, and as soon as something else is given by which server and
// client know each other. The zero value has none. It may be used concurrently.
type Connections struct {
	mu     sync.Mutex // guards what follows
	key    [sha256.Size]byte
	since  time.Time
	client *http.Client
}

// errStale is wrapped by the error of a call that got no answer over a connection that
// was there before it.
var errStale = errors.New("the connection had been open")

// Stale reports whether a call got no answer over a connection that had been open: the
// server may have closed it at that moment, so that the call is worth another try, if it
// may be made twice.
func Stale(err error) bool { return errors.Is(err, errStale) }

// Client is the function Client, with connections that are kept. The file is read each
// time.
func (c *Connections) Client(serverCA string, pair *tls.Certificate) (*http.Client, error) {
	trusted, err := readServerCA(serverCA)
	if err != nil {
		return nil, err
	}
	return c.For(trusted, pair), nil
}

// For returns a client for a server whose certificate is issued by one of trusted, or by
// a CA of the system's if there are none, and which is shown pair if that is not nil.
func (c *Connections) For(trusted []*x509.Certificate, pair *tls.Certificate) *http.Client {
	key := keyOf(trusted, pair)
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil && c.key == key && now.Sub(c.since) < maxAge {
		return c.client
	}
	if c.client != nil {
		c.client.CloseIdleConnections() // those in use are closed when they are not any more
	}
	t := newTransport(trusted, pair)
	t.MaxConnsPerHost, t.MaxIdleConnsPerHost, t.IdleConnTimeout = maxOpen, maxIdle, idleTimeout
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: probeAfter, PingTimeout: probeTimeout}
	c.client, c.key, c.since = &http.Client{Transport: t}, key, now
	return c.client
}

// keyOf is a hash of certificates: a private key of a pair belongs to its certificate.
func keyOf(trusted []*x509.Certificate, pair *tls.Certificate) (key [sha256.Size]byte) {
	h := sha256.New()
	add := func(der []byte) {
		sum := sha256.Sum256(der)
		h.Write(sum[:]) // never fails
	}
	for _, t := range trusted {
		add(t.Raw)
	}
	if pair != nil {
		add(nil) // what follows is another list
		for _, der := range pair.Certificate {
			add(der)
		}
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func newTransport(trusted []*x509.Certificate, pair *tls.Certificate) *http.Transport {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(trusted) > 0 {
		t.RootCAs = x509.NewCertPool()
		for _, c := range trusted {
			t.RootCAs.AddCert(c)
		}
	}
	if pair != nil {
		t.Certificates = []tls.Certificate{*pair}
	}
	return &http.Transport{TLSClientConfig: t, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 1 << 16}
}

// readServerCA reads the PEM file of those who may issue a server's certificate; none
// for "".
func readServerCA(path string) ([]*x509.Certificate, error) {
	if path == "" {
		return nil, nil
	}
	trusted, err := ReadCertificates(path)
	if err != nil {
		return nil, fmt.Errorf("server_ca: %w", err)
	}
	return trusted, nil
}
