package hostile

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// served says whether a TLS connection with this configuration is served by the
// CA, and whether it was resumed.
func served(t *testing.T, ca *local.CA, cfg *tls.Config) (ok, resumed bool) {
	t.Helper()
	raw, err := dialTCP(t, "127.0.0.1", ca.Listen)
	must(t, err)
	defer raw.Close()
	must(t, raw.SetDeadline(time.Now().Add(patience)))
	c := tls.Client(raw, cfg)
	if err := c.HandshakeContext(t.Context()); err != nil {
		return false, false
	}
	// The CA judges the client's certificate after the client's handshake is
	// over; its first frame is the sign that it has accepted it.
	if _, err := c.Write(hello()); err != nil {
		return false, false
	}
	_, err = c.Read(make([]byte, 1))
	return err == nil, c.ConnectionState().DidResume
}

// A client that would resume a session never can: after its node was banned, or
// its certificate has expired, it makes a full handshake and gets nothing.
func TestV_T1_ResumptionIsImpossible(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{Config: "svid: {node_ttl: 20s, backdate: 1s}\n"})
	ca.Apply(t, entries)
	banned, expired := join(t, ca, "banned"), join(t, ca, "expired")
	configs := map[*rogue]*tls.Config{}
	for _, r := range []*rogue{banned, expired} {
		cfg := tlsTo(r.roots, r)
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(8)
		configs[r] = cfg
		for range 3 {
			if ok, resumed := served(t, ca, cfg); !ok || resumed {
				t.Fatalf("a good node: served %v, resumed %v", ok, resumed)
			}
		}
		if _, ok := cfg.ClientSessionCache.Get("ca"); ok {
			t.Error("the CA gave a session ticket")
		}
	}
	open := expired.dial(t, ca, configs[expired])
	if r, err := issue(t, open, "alice", alice); err != nil || r.GetSvid() == nil {
		t.Fatalf("a good node is refused: %v %v", r, err)
	}
	bannedOpen := banned.dial(t, ca, configs[banned])
	if r, err := issue(t, bannedOpen, "alice", alice); err != nil || r.GetSvid() == nil {
		t.Fatalf("a good node is refused: %v %v", r, err)
	}
	_, err := ca.Admin.BanNode(t.Context(), &adminv1.BanNodeRequest{Id: banned.nodeID, Reason: "test"})
	must(t, err)
	if r, err := issue(t, bannedOpen, "alice", alice); err == nil {
		t.Errorf("a banned node got %v", r)
	}

	leaf, err := x509.ParseCertificate(expired.chain[0])
	must(t, err)
	<-time.After(time.Until(leaf.NotAfter.Add(time.Second)))
	if ok, resumed := served(t, ca, configs[expired]); ok || resumed {
		t.Errorf("with an expired certificate: served %v, resumed %v", ok, resumed)
	}
	if r, err := issue(t, open, "alice", alice); status.Code(err) != codes.Unauthenticated {
		t.Errorf("on a connection older than its certificate's end: %v %v", r, err)
	}
}

// Thousands of connections that say nothing: few are held, none for long, and
// the others are served meanwhile.
func TestV_T2_SilentConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	node := join(t, w.ca, "known")
	conn := node.dial(t, w.ca, tlsTo(node.roots, node))
	if r, err := issue(t, conn, "bob", bob); err != nil || r.GetSvid() == nil {
		t.Fatalf("a good node is refused: %v %v", r, err)
	}
	before := footprintOf(t, w.ca.PID(), w.ca.Metrics)
	const perAddress, held = 1500, 512
	var silent []net.Conn
	defer func() {
		for _, c := range silent {
			c.Close()
		}
	}()
	for _, from := range []string{"127.0.0.2", "127.0.0.3"} {
		for range perAddress {
			c, err := dialTCP(t, from, w.ca.Listen)
			must(t, err)
			silent = append(silent, c)
		}
	}
	if n := descriptors(t, w.ca.PID()) - before.descriptors; n > 2*held+50 {
		// Those above the bound are closed as soon as they are accepted.
		local.Await(t, "wait for the bound", func(context.Context) error {
			if n := descriptors(t, w.ca.PID()) - before.descriptors; n > 2*held+50 {
				return fmt.Errorf("%d silent connections are held", n)
			}
			return nil
		})
	}
	if r, err := issue(t, conn, "bob", bob); err != nil || r.GetSvid() == nil {
		t.Errorf("a known node is not served: %v %v", r, err)
	}
	if id, _ := fetchAs(t, alice, w.agent); id != "spiffe://example.org/alice" {
		t.Errorf("a workload gets %q", id)
	}
	join(t, w.ca, "newcomer")
	awaitFootprint(t, w.ca.PID(), w.ca.Metrics, before) // the silent ones are still open on this side
	for _, c := range silent {
		if !closedWithin(c, patience) {
			t.Fatal("a silent connection is still open")
		}
	}
	w.sound(t)
}

// Connections that finish the handshake without a certificate, which anybody can
// do, and then say nothing are bounded as well.
func TestV_T2_AnonymousConnections(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	roots := trustOf(t, ca)
	before := descriptors(t, ca.PID())
	const attempts, bound = 400, 256
	var open int
	for range attempts {
		raw, err := dialTCP(t, "127.0.0.2", ca.Listen)
		must(t, err)
		defer raw.Close()
		c := tls.Client(raw, tlsTo(roots, nil))
		if c.HandshakeContext(t.Context()) != nil {
			continue
		}
		if _, err := c.Write(hello()); err == nil {
			open++
			go answerPings(c)
		}
	}
	local.Await(t, "wait for the bound", func(context.Context) error {
		if n := descriptors(t, ca.PID()) - before; n > bound+10 {
			return fmt.Errorf("%d connections without a certificate are held", n)
		}
		return nil
	})
	if open < bound/2 {
		t.Errorf("only %d of %d were ever open", open, attempts)
	}
	join(t, ca, "newcomer") // from another address
}

// answerPings keeps an HTTP/2 connection open until it is closed.
func answerPings(c net.Conn) {
	r := bufio.NewReader(c)
	header := make([]byte, 9)
	for {
		if _, err := io.ReadFull(r, header); err != nil {
			return
		}
		payload := make([]byte, int(header[0])<<16|int(header[1])<<8|int(header[2]))
		if _, err := io.ReadFull(r, payload); err != nil {
			return
		}
		if header[3] == framePing && header[4] == 0 {
			if _, err := c.Write(frame(framePing, flagEndStream, 0, payload)); err != nil { // ACK is the same bit
				return
			}
		}
	}
}

// Key updates without end, renegotiation, and records that should not be there
// end the connection soon.
func TestV_T3_KeyUpdates(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	node := join(t, ca, "node")
	const limit = 4 << 20 // some 150,000 records
	for name, attack := range map[string]func(*records) func(int) []byte{
		"updates": func(r *records) func(int) []byte {
			return func(int) []byte { return r.keyUpdate(t, false) }
		},
		"updates that ask for an answer nobody reads": func(r *records) func(int) []byte {
			return func(int) []byte { return r.keyUpdate(t, true) }
		},
		"updates between pings": func(r *records) func(int) []byte {
			first := r.seal(recordApplication, hello())
			return func(n int) []byte {
				if n == 0 {
					return first
				}
				return append(r.keyUpdate(t, true), r.seal(recordApplication, frame(framePing, 0, 0, make([]byte, 8)))...)
			}
		},
		"renegotiation": func(r *records) func(int) []byte {
			return func(int) []byte { return r.seal(recordHandshake, []byte{1, 0, 0, 4, 3, 3, 0, 0}) }
		},
		"empty records": func(r *records) func(int) []byte {
			return func(int) []byte { return r.seal(recordApplication, nil) }
		},
		"a key update of 16 MB": func(r *records) func(int) []byte {
			return func(n int) []byte {
				if n == 0 {
					return r.seal(recordHandshake, []byte{24, 255, 255, 255})
				}
				return r.seal(recordHandshake, make([]byte, 16000))
			}
		},
	} {
		for who, cfg := range map[string]*tls.Config{"anybody": tlsTo(node.roots, nil), "node": tlsTo(node.roots, node)} {
			r := newRecords(t, ca.Listen, cfg)
			n, refused := pour(r.conn, attack(r), limit)
			if !refused && !closedWithin(r.conn, patience) {
				t.Errorf("%s, %s: %d bytes were taken and the connection is open", name, who, n)
			}
		}
	}
	if r, err := issue(t, node.dial(t, ca, tlsTo(node.roots, node)), "nobody", bob); err != nil {
		t.Errorf("the CA does not answer: %v %v", r, err)
	}
}

// surface is something that speaks HTTP/2 and is attacked.
type surface struct {
	name, method string
	pid          int
	metrics      string
	dial         func() net.Conn
}

func surfaces(t *testing.T, w *world) []surface {
	t.Helper()
	node := join(t, w.ca, "rogue")
	overTLS := func(cfg *tls.Config) func() net.Conn {
		return func() net.Conn {
			raw, err := dialTCP(t, "127.0.0.1", w.ca.Listen)
			must(t, err)
			t.Cleanup(func() { raw.Close() })
			c := tls.Client(raw, cfg)
			must(t, c.HandshakeContext(t.Context()))
			return c
		}
	}
	local := func(path string) func() net.Conn { return func() net.Conn { return dialUnix(t, path) } }
	return []surface{
		{"CA, anybody", methodAttest, w.ca.PID(), w.ca.Metrics, overTLS(tlsTo(node.roots, nil))},
		{"CA, a node", "/meshid.node.v1.NodeService/Sync", w.ca.PID(), w.ca.Metrics, overTLS(tlsTo(node.roots, node))},
		{"CA, admin", methodStatus, w.ca.PID(), w.ca.Metrics, local(w.ca.AdminSocket)},
		{"agent, SDS", methodSecrets, w.agent.PID(), w.agent.Metrics, local(w.agent.Socket)},
		{"agent, Workload API", methodWorkload, w.agent.PID(), w.agent.Metrics, local(w.agent.Socket)},
		{"agent, admin", "/status", w.agent.PID(), w.agent.Metrics, local(w.agent.AdminSocket)},
	}
}

// Frames that are legal, and too many; or not legal at all. Each connection costs
// little, nothing panics, and the others are served.
func TestV_T4_Frames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const mb = 1 << 20
	targets := surfaces(t, w)
	many := func(n, of int, what func(id uint32) []byte) []byte {
		var all []byte
		for k := range of {
			all = append(all, what(uint32(2*(n*of+k)+1))...)
		}
		return all
	}
	for _, attack := range []struct {
		name  string
		limit int
		// refused says that the connection must be closed before that many bytes.
		refused bool
		what    func(s surface, n int) []byte
	}{
		{"rapid reset", 2 * mb, false, func(s surface, n int) []byte {
			return many(n, 50, func(id uint32) []byte {
				return append(frame(frameHeaders, flagEndHeaders, id, request(s.method)), frame(frameReset, 0, id, []byte{0, 0, 0, 8})...)
			})
		}},
		{"streams that never end", mb, false, func(s surface, n int) []byte {
			return many(n, 50, func(id uint32) []byte { return frame(frameHeaders, flagEndHeaders, id, request(s.method)) })
		}},
		{"continuation flood", 32 * mb, true, func(s surface, n int) []byte {
			if n == 0 {
				return frame(frameHeaders, 0, 1, request(s.method))
			}
			return frame(frameContinuation, 0, 1, field("x", strings.Repeat("y", 16000)))
		}},
		{"empty continuations", 8 * mb, false, func(s surface, n int) []byte {
			if n == 0 {
				return frame(frameHeaders, 0, 1, request(s.method))
			}
			return bytes.Repeat(frame(frameContinuation, 0, 1, nil), 1000)
		}},
		{"settings that nobody reads the answers of", 16 * mb, true, func(surface, int) []byte {
			return bytes.Repeat(frame(frameSettings, 0, 0, nil), 1000)
		}},
		{"pings", 16 * mb, true, func(surface, int) []byte {
			return bytes.Repeat(frame(framePing, 0, 0, make([]byte, 8)), 1000)
		}},
		{"priorities", 8 * mb, false, func(_ surface, n int) []byte {
			return many(n, 1000, func(id uint32) []byte { return frame(framePriority, 0, id, make([]byte, 5)) })
		}},
		{"empty data", 4 * mb, false, func(s surface, n int) []byte {
			if n == 0 {
				return frame(frameHeaders, flagEndHeaders, 1, request(s.method))
			}
			return bytes.Repeat(frame(frameData, 0, 1, nil), 1000)
		}},
		{"more data than the window", 32 * mb, false, func(s surface, n int) []byte {
			if n == 0 {
				return append(frame(frameHeaders, flagEndHeaders, 1, request(s.method)), frame(frameData, 0, 1, []byte{0, 1, 0, 0, 0})...)
			}
			return frame(frameData, 0, 1, make([]byte, 16000))
		}},
		{"window updates", 8 * mb, false, func(surface, int) []byte {
			return bytes.Repeat(frame(frameWindow, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff}), 100)
		}},
		{"a frame of 16 MB", 32 * mb, true, func(_ surface, n int) []byte {
			if n == 0 {
				return append([]byte{0xff, 0xff, 0xff, frameData, 0, 0, 0, 0, 1}, make([]byte, 16000)...)
			}
			return make([]byte, 16000)
		}},
		{"pushes", mb, false, func(s surface, n int) []byte {
			return many(n, 50, func(id uint32) []byte { return frame(framePush, flagEndHeaders, id, request(s.method)) })
		}},
		{"headers without a stream", mb, true, func(s surface, _ int) []byte { return frame(frameHeaders, flagEndHeaders, 0, request(s.method)) }},
		{"no HPACK", mb, true, func(_ surface, n int) []byte {
			return frame(frameHeaders, flagEndHeaders, uint32(2*n+1), bytes.Repeat([]byte{0xff}, 1000))
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			for _, s := range targets {
				before := footprintOf(t, s.pid, s.metrics)
				memory := statusOf(t, s.pid, "VmRSS")
				c := s.dial()
				if _, err := c.Write(hello()); err != nil {
					t.Fatal(err)
				}
				n, refused := pour(c, func(n int) []byte { return attack.what(s, n) }, attack.limit)
				if attack.refused && !refused && !closedWithin(c, patience) {
					t.Errorf("%s: %d bytes were taken and the connection is open", s.name, n)
				}
				during := footprintOf(t, s.pid, s.metrics)
				if g := during.goroutines - before.goroutines; g > 1500 { // some for each of 100 streams; without a bound, for each of tens of thousands
					t.Errorf("%s: one connection costs %d goroutines", s.name, g)
				}
				if m := statusOf(t, s.pid, "VmRSS") - memory; m > 64*mb {
					t.Errorf("%s: one connection costs %d MB", s.name, m/mb)
				}
				c.Close()
				awaitFootprint(t, s.pid, s.metrics, before)
			}
			if id, _ := fetchAs(t, alice, w.agent); id != "spiffe://example.org/alice" {
				t.Errorf("a workload gets %q", id)
			}
			w.ca.MustCommand(t, "status")
			w.sound(t)
		})
	}
}

// listening returns the TCP addresses that a process listens on.
func listening(t *testing.T, pid int) []string {
	t.Helper()
	inodes := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	must(t, err)
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "socket:[") {
			inodes[strings.Trim(target, "socket:[]")] = true
		}
	}
	var all []string
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		must(t, err)
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			if f[0] == "sl" || !inodes[f[9]] || strings.HasPrefix(table, "tcp") && f[3] != "0A" {
				continue
			}
			_, port, _ := strings.Cut(f[1], ":")
			n, err := strconv.ParseUint(port, 16, 16)
			must(t, err)
			all = append(all, table+":"+strconv.FormatUint(n, 10))
		}
	}
	slices.Sort(all)
	return all
}

// A scan: what listens is what should, and it speaks nothing but TLS 1.3 with
// HTTP/2 in it.
func TestV_T5_Scan(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port := func(address string) string { return "tcp:" + address[strings.LastIndex(address, ":")+1:] }
	want := []string{port(w.ca.Listen), port(w.ca.Metrics)}
	slices.Sort(want)
	if got := listening(t, w.ca.PID()); !slices.Equal(got, want) {
		t.Errorf("the CA listens on %v, want %v", got, want)
	}
	if got := listening(t, w.agent.PID()); !slices.Equal(got, []string{port(w.agent.Metrics)}) {
		t.Errorf("the agent listens on %v, want its metrics only", got)
	}
	node := join(t, w.ca, "node")
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":    func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"TLS 1.1":    func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11 },
		"TLS 1.0":    func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS10 },
		"no ALPN":    func(c *tls.Config) { c.NextProtos = nil },
		"other ALPN": func(c *tls.Config) { c.NextProtos = []string{"http/1.1", "spdy/3"} },
		"P-384":      func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} },
	} {
		for who, cfg := range map[string]*tls.Config{"anybody": tlsTo(node.roots, nil), "a node": tlsTo(node.roots, node)} {
			change(cfg)
			if ok, _ := served(t, w.ca, cfg); ok {
				t.Errorf("%s with %s is served", who, name)
			}
		}
	}
	for name, what := range map[string][]byte{
		"HTTP/1":    []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"HTTP/2":    append(hello(), frame(frameHeaders, flagEndHeaders|flagEndStream, 1, request(methodAttest))...),
		"SSLv2":     {0x80, 0x2e, 0x01, 0x00, 0x02, 0x00, 0x15, 0x00, 0x00, 0x00, 0x10},
		"nonsense":  bytes.Repeat([]byte{0xff}, 4096),
		"a heart":   {0x18, 0x03, 0x03, 0x00, 0x03, 0x01, 0x40, 0x00},
		"half TLS ": {0x16, 0x03, 0x01, 0x40, 0x00, 0x01},
	} {
		c, err := dialTCP(t, "127.0.0.1", w.ca.Listen)
		must(t, err)
		_, err = c.Write(what)
		must(t, err)
		if !closedWithin(c, patience) {
			t.Errorf("%s in plain text: the connection stays open", name)
		}
		c.Close()
	}
	w.sound(t)
}

// An agent that does not know which CA is the right one does not start, and one
// that knows another does not say its secret.
func TestV_T6_NoTrustAnchor(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca, other := local.StartCA(t, local.CAOptions{}), local.StartCA(t, local.CAOptions{})
	dir := t.TempDir()
	bundle := filepath.Join(dir, "bundle.pem")
	config := filepath.Join(dir, "agent.yaml")
	token := filepath.Join(dir, "token")
	made, err := ca.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: "n"})
	must(t, err)
	must(t, os.WriteFile(token, []byte(made.GetToken()), 0o600))
	write := func(caSection string) {
		t.Helper()
		must(t, os.WriteFile(config, fmt.Appendf(nil, `
trust_domain: example.org
ca: {address: '%s'%s}
data_dir: %[3]s/agent
socket: %[3]s/a.sock
admin_socket: %[3]s/admin.sock
metrics_listen: off
node_attestation: {join_token: {token_file: %[4]s}}
`, ca.Listen, caSection, dir, token), 0o600))
	}
	leaf := join(t, ca, "leaf")
	leafCert, err := x509.ParseCertificate(leaf.chain[0])
	must(t, err)
	for name, tt := range map[string]struct{ section, bundle string }{
		"nothing":                  {"", ""},
		"an empty path":            {", bundle: ''", ""},
		"no file":                  {", bundle: /nowhere/bundle.pem", ""},
		"an empty file":            {", bundle: " + bundle, "\n"},
		"no PEM":                   {", bundle: " + bundle, "none"},
		"a leaf":                   {", bundle: " + bundle, string(pemOf(leafCert))},
		"an empty pin":             {", root_sha256: ''", ""},
		"a short pin":              {", root_sha256: abcd", ""},
		"a switch that is not one": {", insecure: true", ""},
	} {
		must(t, os.WriteFile(bundle, []byte(tt.bundle), 0o600))
		write(tt.section)
		p := local.Run(t, filepath.Join(local.Binaries(t), "node-agent"), "run", "--config", config)
		select {
		case <-p.Done():
		case <-time.After(patience):
			t.Errorf("%s: the agent starts", name)
			p.Kill()
		}
		if !strings.Contains(p.Log(), "agent.yaml:3:") {
			t.Errorf("%s: the agent says %q", name, p.Log())
		}
	}

	// It knows another CA of the same name, by bundle and by pin: it never gets
	// as far as to send the token.
	refused := regexp.MustCompile(`level=WARN.*(certificate|root)`)
	pin := sha256.Sum256(trustOf(t, other).X509Authorities()[0].Raw)
	for _, section := range []string{
		", bundle: " + bundle,
		", root_sha256: " + hex.EncodeToString(pin[:]),
		", root_sha256: '" + hex.EncodeToString(make([]byte, 32)) + "'",
	} {
		must(t, os.WriteFile(bundle, []byte(other.MustCommand(t, "bundle", "show")), 0o600))
		write(section)
		p := local.Run(t, filepath.Join(local.Binaries(t), "node-agent"), "run", "--config", config)
		local.Await(t, "wait until the agent has tried", func(context.Context) error {
			if !refused.MatchString(p.Log()) {
				return fmt.Errorf("log is %q", p.Log())
			}
			return nil
		})
		p.Kill()
		if strings.Contains(p.Log(), made.GetToken()) {
			t.Error("the token is in the log")
		}
	}
	list, err := ca.Admin.ListTokens(t.Context(), &adminv1.ListTokensRequest{})
	must(t, err)
	if n := len(list.GetTokens()); n != 1 || list.GetTokens()[0].GetNodeId() != made.GetNodeId() {
		t.Errorf("the token was used: %v", list.GetTokens())
	}
}

// A node that has two certificates is the one whose key it has, whatever else it
// sends along.
func TestV_T8_ForeignCertificates(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, `
- {name: first, spiffe_id: 'spiffe://example.org/first', nodes: 'node.id == "first"', workloads: unix.uid == 23001}
- {name: second, spiffe_id: 'spiffe://example.org/second', nodes: 'node.id == "second"', workloads: unix.uid == 23001}
`)
	first, second := join(t, ca, "first"), join(t, ca, "second")
	for name, chain := range map[string][][]byte{
		"the other's leaf last":   append(slices.Clone(first.chain), second.chain[0]),
		"the other's leaf second": append([][]byte{first.chain[0], second.chain[0]}, first.chain[1:]...),
		"the other's chain":       append(slices.Clone(first.chain), second.chain...),
	} {
		mixed := &rogue{nodeID: first.nodeID, key: first.key, chain: chain, roots: first.roots}
		conn := mixed.dial(t, ca, tlsTo(mixed.roots, mixed))
		if r, err := issue(t, conn, "second", alice); err == nil && r.GetSvid() != nil {
			t.Errorf("%s: got %s", name, r.GetSvid().GetSpiffeId())
		}
	}
	stolen := &rogue{key: first.key, chain: second.chain, roots: first.roots}
	if ok, _ := served(t, ca, tlsTo(first.roots, stolen)); ok {
		t.Error("a certificate without its key is good")
	}
	conn := first.dial(t, ca, tlsTo(first.roots, first))
	if r, err := issue(t, conn, "first", alice); err != nil || r.GetSvid().GetSpiffeId() != "spiffe://example.org/first" {
		t.Errorf("a good node: %v %v", r, err)
	}
}
