// Package envoy asks a real Envoy what it makes of the secrets that package sds
// serves. The agent's place is taken by a source in the test; all that is between
// it and Envoy is real: the socket, the listener that names the peer, gRPC, and
// the bootstrap. The test knows nothing about the CA.
package envoy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/template"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/sds"
	"github.com/meshid/meshid/test/identitytest"
	"github.com/meshid/meshid/test/require"
)

// patience is how long something may take that takes milliseconds on an idle
// machine.
const patience = 60 * time.Second

// eventually waits until something holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("not within %s: %s", patience, what)
		case <-tick.C:
		}
	}
}

// agent serves secrets on a socket, in a node agent's place.
type agent struct {
	t      testing.TB
	socket string
	source *identitytest.Source
	reg    *prometheus.Registry
	server *sds.Server
	grpc   *grpc.Server
	served chan error
	stats  stats.Handler // used from the next start on
}

// newAgent starts an agent with a socket of its own.
func newAgent(t testing.TB, snapshot *identity.Snapshot) *agent {
	t.Helper()
	return newAgentAt(t, "", snapshot)
}

// newAgentAt starts an agent with a socket of its own, an abstract one if at is
// "@".
func newAgentAt(t testing.TB, at string, snapshot *identity.Snapshot) *agent {
	t.Helper()
	a := &agent{t: t, socket: at + filepath.Join(t.TempDir(), "agent.sock"), source: identitytest.NewSource(snapshot)}
	a.start()
	t.Cleanup(a.stop)
	return a
}

// start starts it, again after stop.
func (a *agent) start() {
	a.t.Helper()
	a.reg = prometheus.NewRegistry()
	var err error
	if a.server, err = sds.New(a.source, sds.Options{Registerer: a.reg}); err != nil {
		a.t.Fatal(err)
	}
	listener, err := peer.Listen(context.Background(), a.socket, peer.Options{})
	if err != nil {
		a.t.Fatal(err)
	}
	options := append(sds.ServerOptions(), grpc.Creds(peer.Credentials()))
	if a.stats != nil {
		options = append(options, grpc.StatsHandler(a.stats))
	}
	a.grpc = grpc.NewServer(options...)
	a.server.Register(a.grpc)
	g, served := a.grpc, make(chan error, 1)
	go func() { served <- g.Serve(listener) }()
	a.served = served
}

// stop stops it. More calls do nothing.
func (a *agent) stop() {
	if a.served == nil {
		return
	}
	a.server.Close()
	a.grpc.Stop()
	if err := <-a.served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		a.t.Error(err)
	}
	a.served = nil
}

// metric returns the sum of a metric's series.
func (a *agent) metric(name string, labels ...string) float64 {
	a.t.Helper()
	return identitytest.Metric(a.t, a.reg, name, labels...)
}

// config is what the bootstrap is made from.
type config struct {
	Name, Socket       string
	Delta, ADS, Google bool
	FetchTimeout, Ping string
	Leaf, Root         string
	OnDemand           string // a name; then Leaf is not used
	Plain              bool   // no guard besides the secret
	Resumption         bool
	Application        int
	Peer               int
	PeerID             string
	Callers            string // how the SPIFFE IDs of those who may call begin
	OneRequest, HTTP2  bool
	Workers            int    // 1 if 0
	Minimum            string // TLS version of the inbound side; Envoy's own if empty
	NodeAlways         bool   // Envoy describes itself in each message
	// How long inbound connections, and those to the peer, live, and requests on
	// them; unbounded if empty. Requests only where connections are, too.
	ConnectionLife, StreamLife         string
	PeerConnectionLife, PeerStreamLife string
	// Identities make it the proxy of a whole node: paths, without the first slash,
	// of the SPIFFE IDs that it serves. Of the above it has what concerns the agent.
	Identities []string
	// Bootstrap, if not empty, is the whole bootstrap; then nothing else counts.
	Bootstrap string
}

// proxy is a running Envoy.
type proxy struct {
	t       testing.TB
	command *exec.Cmd
	log     *identitytest.Log
	admin   string
	done    chan struct{}
}

// render writes the bootstrap into a file and returns its path.
func (c config) render(t testing.TB, dir string) string {
	t.Helper()
	set := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	set(&c.Name, "x")
	set(&c.FetchTimeout, "0s")
	set(&c.Ping, "30s")
	set(&c.Leaf, "default")
	set(&c.Root, "ROOTCA")
	set(&c.Callers, "spiffe://")
	if c.Application == 0 {
		c.Application = 1
	}
	bootstrap := "sidecar.yaml"
	if len(c.Identities) > 0 {
		bootstrap = "node.yaml"
	}
	parsed, err := template.ParseFiles(filepath.Join("testdata", "sidecar.yaml"), filepath.Join("testdata", "node.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := parsed.ExecuteTemplate(&b, bootstrap, c); err != nil {
		t.Fatal(err)
	}
	if c.Bootstrap != "" {
		b.Reset()
		b.WriteString(c.Bootstrap)
	}
	path := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// startEnvoy starts an Envoy and waits until its admin port answers.
func startEnvoy(t testing.TB, c config) *proxy {
	t.Helper()
	binary := require.Envoy(t)
	dir := t.TempDir()
	address := filepath.Join(dir, "admin")
	p := &proxy{t: t, log: &identitytest.Log{}, done: make(chan struct{})}
	p.command = exec.Command(binary, "-c", c.render(t, dir), "--admin-address-path", address,
		"--concurrency", strconv.Itoa(max(c.Workers, 1)), "--disable-hot-restart", "--log-level", "warning")
	p.command.Stdout, p.command.Stderr = p.log, p.log
	p.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.command.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("Envoy %s said:\n%s", c.Name, p.log)
		}
	})
	eventually(t, "Envoy's admin port", func() bool {
		select {
		case <-p.done:
			t.Fatalf("Envoy has ended:\n%s", p.log)
		default:
		}
		b, err := os.ReadFile(address)
		p.admin = strings.TrimSpace(string(b))
		return err == nil && p.admin != ""
	})
	return p
}

// kill ends it the hard way and waits for its end.
func (p *proxy) kill() {
	_ = p.command.Process.Kill()
	<-p.done
}

// get asks the admin port.
func (p *proxy) get(path string) (string, int) {
	p.t.Helper()
	r, err := http.Get("http://" + p.admin + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b), r.StatusCode
}

// live says whether it calls itself ready.
func (p *proxy) live() bool {
	_, code := p.get("/ready")
	return code == http.StatusOK
}

func (p *proxy) waitLive() {
	p.t.Helper()
	eventually(p.t, "Envoy is LIVE", p.live)
}

// stat returns the sum of the counters and gauges whose names contain each part.
func (p *proxy) stat(parts ...string) int {
	p.t.Helper()
	all, _ := p.get("/stats")
	sum := 0
lines:
	for line := range strings.Lines(all) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if !ok {
			continue
		}
		for _, part := range parts {
			if !strings.Contains(name, part) {
				continue lines
			}
		}
		if n, err := strconv.Atoi(value); err == nil {
			sum += n
		}
	}
	return sum
}

// port returns the port that a listener has got.
func (p *proxy) port(listener string) int {
	p.t.Helper()
	var port int
	eventually(p.t, "listener "+listener, func() bool {
		all, _ := p.get("/listeners?format=json")
		var l struct {
			Statuses []struct {
				Name    string `json:"name"`
				Address struct {
					Socket struct {
						Port int `json:"port_value"`
					} `json:"socket_address"`
				} `json:"local_address"`
			} `json:"listener_statuses"`
		}
		if err := json.Unmarshal([]byte(all), &l); err != nil {
			p.t.Fatal(err)
		}
		for _, s := range l.Statuses {
			if s.Name == listener {
				port = s.Address.Socket.Port
			}
		}
		return port != 0
	})
	return port
}

// newApplication is what stands behind a sidecar: it says who called.
func newApplication(t testing.TB) int {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for part := range strings.SplitSeq(r.Header.Get("X-Forwarded-Client-Cert"), ";") {
			if strings.HasPrefix(part, "URI=") {
				fmt.Fprint(w, part)
			}
		}
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().(*net.TCPAddr).Port
}

// clientConfig is that of a client that shows v, or nothing if v is nil. It believes
// any server.
func clientConfig(v *identity.SVID) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if v == nil {
		return c
	}
	certificate := tls.Certificate{PrivateKey: v.Key}
	for _, x := range v.Chain {
		certificate.Certificate = append(certificate.Certificate, x.Raw)
	}
	// Whatever the server would like to see.
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil }
	return c
}

// session is a connection on which requests are made one after the other.
type session struct {
	conn *tls.Conn
	r    *bufio.Reader
}

// open opens a connection; it is closed with the test. In TLS 1.3 a client learns
// only with its first request that it was refused.
func open(t testing.TB, port int, c *tls.Config) (*session, error) {
	t.Helper()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), c)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &session{conn, bufio.NewReader(conn)}, nil
}

// get makes one request; the connection stays open.
func (s *session) get() error {
	if err := s.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(s.conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	r, err := http.ReadResponse(s.r, nil)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return err
	}
	if r.StatusCode != http.StatusOK {
		return errors.New("answer: " + r.Status)
	}
	return nil
}

// try makes one connection and one request over it, and says whether the session
// was a resumed one.
func try(t testing.TB, port int, c *tls.Config) (resumed bool, err error) {
	t.Helper()
	s, err := open(t, port, c)
	if err != nil {
		return false, err
	}
	defer s.conn.Close()
	return s.conn.ConnectionState().DidResume, s.get()
}

// call makes one TLS connection to a sidecar and one request over it. v is the
// client's SVID, or nil for none; roots are what it believes.
func call(port int, v *identity.SVID, roots ...*x509.Certificate) (who string, server *x509.Certificate, err error) {
	c := clientConfig(v)
	c.VerifyConnection = func(s tls.ConnectionState) error {
		server = s.PeerCertificates[0]
		if len(roots) == 0 {
			return nil
		}
		o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool()}
		for _, r := range roots {
			o.Roots.AddCert(r)
		}
		for _, i := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(i)
		}
		_, err := server.Verify(o)
		return err
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), c)
	if err != nil {
		return "", server, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", server, err
	}
	// In TLS 1.3 a client learns only now that it was refused.
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return "", server, err
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		return "", server, err
	}
	head, body, ok := strings.Cut(string(answer), "\r\n\r\n")
	if !ok || !strings.Contains(head, " 200 ") {
		return "", server, errors.New("answer: " + head)
	}
	return body, server, nil
}

// mustCall is call that must succeed.
func mustCall(t testing.TB, port int, v *identity.SVID, roots ...*x509.Certificate) (who string, server *x509.Certificate) {
	t.Helper()
	who, server, err := call(port, v, roots...)
	if err != nil {
		t.Fatal(err)
	}
	return who, server
}
