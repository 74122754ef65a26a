package hostile

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// Connections that die at each step, and processes that die with hundreds of
// them: the agent gives back every descriptor and every goroutine.
func TestV_D17_ConnectionsDieAtEachStep(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetch(t, w.agent)
	subscribe, err := proto.Marshal(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	must(t, err)
	open := frame(frameHeaders, flagEndHeaders, 1, request(methodSecrets))
	steps := map[string][]byte{
		"connected":            nil,
		"half a preface":       []byte(preface[:10]),
		"preface":              []byte(preface),
		"settings":             hello(),
		"half a header":        append(hello(), frame(frameHeaders, 0, 1, request(methodSecrets))...),
		"header":               append(hello(), open...),
		"half a message":       slices.Concat(hello(), open, frame(frameData, 0, 1, message(subscribe)[:7])),
		"subscribed":           slices.Concat(hello(), open, frame(frameData, 0, 1, message(subscribe))),
		"Workload API, header": append(hello(), frame(frameHeaders, flagEndHeaders, 1, request(methodWorkload))...),
		"Workload API":         slices.Concat(hello(), frame(frameHeaders, flagEndHeaders, 1, request(methodWorkload)), frame(frameData, flagEndStream, 1, message(nil))),
	}
	before := footprintOf(t, w.agent.PID(), w.agent.Metrics)
	for name, bytes := range steps {
		for n := range 150 {
			c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", w.agent.Socket)
			must(t, err)
			if _, err := c.Write(bytes); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if n%3 == 0 && strings.HasSuffix(name, "subscribed") {
				must(t, c.SetReadDeadline(time.Now().Add(patience)))
				_, err := c.Read(make([]byte, 1))
				must(t, err)
			}
			must(t, c.Close())
		}
	}
	awaitFootprint(t, w.agent.PID(), w.agent.Metrics, before)
	w.sound(t)
}

// A process that holds hundreds of streams is killed: all of them end, and
// nothing stays of it.
func TestV_D2_KilledWhileStreaming(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, bob, w.agent)
	before := footprintOf(t, w.agent.PID(), w.agent.Metrics)
	for range 3 {
		h := hoard(t, alice, w.agent.Socket, 100, 3, "subscribe")
		local.Await(t, "wait for the streams", func(ctx context.Context) error {
			s, err := w.agent.Status(ctx, t)
			if err == nil && s.Streams < 300 {
				err = fmt.Errorf("%d streams", s.Streams)
			}
			return err
		})
		h.kill()
		awaitFootprint(t, w.agent.PID(), w.agent.Metrics, before)
		s, err := w.agent.Status(t.Context(), t)
		must(t, err)
		if s.Streams != 0 {
			t.Errorf("%d streams are open", s.Streams)
		}
	}
	w.sound(t)
}

// The same at the CA: handshakes, calls and streams that end in the middle leave
// nothing behind, neither at the CA nor at the agent, and sessions neither.
func TestV_I6_NothingStays(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetch(t, w.agent)
	targets := surfaces(t, w)
	before := map[int]footprint{}
	for _, s := range targets {
		before[s.pid] = footprintOf(t, s.pid, s.metrics)
	}
	for _, s := range targets {
		open := frame(frameHeaders, flagEndHeaders, 1, request(s.method))
		for name, bytes := range map[string][]byte{
			"nothing":    nil,
			"settings":   hello(),
			"header":     append(hello(), open...),
			"half":       slices.Concat(hello(), open, frame(frameData, 0, 1, []byte{0, 0, 0, 1, 0, 1, 2, 3})),
			"nonsense":   slices.Concat(hello(), open, frame(frameData, flagEndStream, 1, message([]byte{0xff, 0xff, 0xff}))),
			"no such":    append(hello(), frame(frameHeaders, flagEndHeaders|flagEndStream, 1, request("/no.such/Method"))...),
			"compressed": slices.Concat(hello(), open, frame(frameData, flagEndStream, 1, []byte{1, 0, 0, 0, 1, 0})),
		} {
			for range 40 {
				c := s.dial()
				if _, err := c.Write(bytes); err != nil {
					t.Fatalf("%s, %s: %v", s.name, name, err)
				}
				c.Close()
			}
		}
	}
	for _, s := range targets {
		awaitFootprint(t, s.pid, s.metrics, before[s.pid])
	}
	w.sound(t)
}

// hoarder is a process that opens connections and streams and never reads.
type hoarder struct {
	cmd  *exec.Cmd
	stop io.Closer
}

// hoard starts one and returns once it has opened what it could.
func hoard(t *testing.T, uid uint32, socket string, conns, streams int, what string) *hoarder {
	t.Helper()
	cmd := as(t, uid, "hoard", socket, strconv.Itoa(conns), strconv.Itoa(streams), what)
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	h := &hoarder{cmd: cmd, stop: stdin}
	t.Cleanup(h.kill)
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatalf("hoard: %q: %v", line, err)
	}
	return h
}

func (h *hoarder) kill() {
	if h.cmd.ProcessState != nil {
		return
	}
	_ = h.cmd.Process.Kill() // it may have ended
	_ = h.cmd.Wait()         // it was killed
	_ = h.stop.Close()       // it was closed by Wait, perhaps
}

func hoardChild(args []string) error {
	socket, what := args[0], args[3]
	conns, err1 := strconv.Atoi(args[1])
	streams, err2 := strconv.Atoi(args[2])
	subscribe, err3 := proto.Marshal(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ALL"}})
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	all := hello()
	for n := range streams {
		id := uint32(2*n + 1)
		switch what {
		case "subscribe":
			all = append(all, frame(frameHeaders, flagEndHeaders, id, request(methodSecrets))...)
			all = append(all, frame(frameData, 0, id, message(subscribe))...)
		case "silent":
			all = append(all, frame(frameHeaders, flagEndHeaders, id, request(methodWorkload))...)
		case "reflection":
			all = append(all, frame(frameHeaders, flagEndHeaders, id, request("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"))...)
		}
	}
	var open []net.Conn
	for range conns {
		c, err := net.DialTimeout("unix", socket, patience)
		if err != nil {
			continue
		}
		if _, err := c.Write(all); err == nil {
			open = append(open, c)
		}
	}
	fmt.Fprintln(os.Stdout, len(open))
	_, err := io.Copy(io.Discard, os.Stdin)
	for _, c := range open {
		c.Close()
	}
	return err
}

// One user holds thousands of streams and reads none of them: others get their
// secrets as before, and it costs a bounded amount of memory.
func TestV_I1_F52_StreamsThatNeverRead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, alice, w.agent)
	for _, tt := range []struct {
		what           string
		conns, streams int
	}{
		{"subscribe", 1500, 2},
		{"subscribe", 4500, 0}, // connections only
		{"silent", 300, 100},
		{"reflection", 300, 100},
	} {
		t.Run(fmt.Sprintf("%s %d x %d", tt.what, tt.conns, tt.streams), func(t *testing.T) {
			_, quiet := fetchAs(t, alice, w.agent)
			bound := max(time.Second, 20*quiet)
			before := footprintOf(t, w.agent.PID(), w.agent.Metrics)
			h := hoard(t, mallory, w.agent.Socket, tt.conns, tt.streams, tt.what)
			best := time.Hour // a single one says how loaded this machine is
			for range 10 {
				id, took := fetchAs(t, alice, w.agent)
				if id != "spiffe://example.org/alice" {
					t.Fatalf("alice gets %q", id)
				}
				if best = min(best, took); best <= bound {
					break
				}
			}
			if best > bound {
				t.Errorf("alice waits %v, and %v while nobody hoards", best, quiet)
			}
			during := footprintOf(t, w.agent.PID(), w.agent.Metrics)
			t.Logf("%d MB, %d goroutines, %d descriptors", statusOf(t, w.agent.PID(), "VmRSS")>>20, during.goroutines, during.descriptors)
			if during.goroutines > 25_000 { // what 300 connections with 100 calls each would cost is more
				t.Errorf("%d goroutines", during.goroutines)
			}
			if rss := statusOf(t, w.agent.PID(), "VmRSS"); rss > 400<<20 {
				t.Errorf("the agent takes %d MB", rss>>20)
			}
			h.kill()
			awaitFootprint(t, w.agent.PID(), w.agent.Metrics, before)
		})
	}
	w.sound(t)
}

// streamEnds reads frames until the stream or the connection ends, and says how.
func streamEnds(c net.Conn, stream uint32, within time.Duration) string {
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return "closed"
	}
	r := bufio.NewReader(c)
	header := make([]byte, 9)
	for {
		if _, err := io.ReadFull(r, header); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				return ""
			}
			return "closed"
		}
		n := int64(header[0])<<16 | int64(header[1])<<8 | int64(header[2])
		if _, err := io.CopyN(io.Discard, r, n); err != nil {
			return "closed"
		}
		if binary.BigEndian.Uint32(header[5:]) != stream {
			continue
		}
		if kind := header[3]; kind == frameReset || kind == frameHeaders && header[4]&flagEndStream != 0 {
			return "ended"
		}
	}
}

// Requests that are too large, and requests that never come: both end.
func TestV_I3_RequestSizes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var attacks sync.WaitGroup
	for _, s := range surfaces(t, w) {
		if s.name == "agent, admin" { // HTTP/1, see D18
			continue
		}
		open := frame(frameHeaders, flagEndHeaders, 1, request(s.method))
		declared := func(n uint32) []byte {
			return append(open, frame(frameData, 0, 1, append(binary.BigEndian.AppendUint32([]byte{0}, n), 1, 2, 3))...)
		}
		big := append(request(s.method), field("x-big", strings.Repeat("y", 1<<20))...)
		headers := frame(frameHeaders, 0, 1, big[:16000])
		for rest := big[16000:]; len(rest) > 0; rest = rest[min(16000, len(rest)):] {
			var flags byte
			if len(rest) <= 16000 {
				flags = flagEndHeaders
			}
			headers = append(headers, frame(frameContinuation, flags, 1, rest[:min(16000, len(rest))])...)
		}
		for name, bytes := range map[string][]byte{
			"a message of 64 MB and a byte": declared(64<<20 + 1),
			"a message of 4 GB":             declared(0xffffffff),
			"a header of 1 MB":              headers,
			"a stream without a message":    open,
			"half a message":                declared(100),
			"half a header":                 frame(frameHeaders, 0, 1, request(s.method)),
		} {
			// A CA's node and admin are known, and may take their time.
			known := s.name == "CA, admin" || s.name == "CA, a node"
			if known && (strings.HasPrefix(name, "half") || strings.Contains(name, "without")) || name == "half a header" {
				continue
			}
			c := s.dial()
			attacks.Go(func() {
				_, _ = c.Write(append(hello(), bytes...)) // it may be closed early
				if streamEnds(c, 1, patience) == "" {
					t.Errorf("%s: %s: the stream is still open", s.name, name)
				}
			})
		}
	}
	attacks.Wait()
	if rss := statusOf(t, w.agent.PID(), "VmHWM"); rss > 300<<20 {
		t.Errorf("the agent took %d MB", rss>>20)
	}
	if rss := statusOf(t, w.ca.PID(), "VmHWM"); rss > 300<<20 {
		t.Errorf("the CA took %d MB", rss>>20)
	}
	fetchAs(t, alice, w.agent)
	w.sound(t)
}

// HTTP/1 on the sockets is closed, and half a request does not stay.
func TestV_D18_HTTP1(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var all sync.WaitGroup
	for _, path := range []string{w.agent.Socket, w.ca.AdminSocket} {
		for _, request := range []string{
			"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
			"POST " + methodSecrets + " HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Type: application/grpc\r\n\r\n\x00\x00\x00\x00\x00",
			"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
			"CONNECT x:443 HTTP/1.1\r\n\r\n",
			"GET /",
		} {
			c := dialUnix(t, path)
			_, err := c.Write([]byte(request))
			must(t, err)
			must(t, c.SetReadDeadline(time.Now().Add(patience)))
			all.Go(func() {
				answer, err := io.ReadAll(c)
				var timeout net.Error
				if errors.As(err, &timeout) && timeout.Timeout() {
					t.Errorf("%s: %q leaves the connection open", path, request)
				}
				if strings.Contains(string(answer), " 200 ") {
					t.Errorf("%s: %q is answered with %q", path, request, answer)
				}
			})
		}
	}
	// The agent's admin socket is HTTP/1: half a request and a large one end.
	for _, request := range []string{"GET /status HTTP/1.1\r\nHost: x", "GET /status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("y", 1<<20) + "\r\n\r\n"} {
		c := dialUnix(t, w.agent.AdminSocket)
		_, _ = c.Write([]byte(request)) // it may be closed early
		all.Go(func() {
			if !closedWithin(c, patience) {
				t.Errorf("%.40q leaves the connection open", request)
			}
		})
	}
	all.Wait()
	w.sound(t)
}

// claimChild asks for everything, in the name of everybody, and prints the names
// of the secrets that come: first by delta, then by state of the world.
func claimChild(args []string) error {
	conn, err := grpc.NewClient("unix:"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	metadata, err := structpb.NewStruct(map[string]any{"spiffe_id": "spiffe://example.org/bob", "uid": 0, "NAMESPACE": "root"})
	if err != nil {
		return err
	}
	node := &corev3.Node{Id: "spiffe://example.org/bob", Cluster: "root", Metadata: metadata, UserAgentName: "envoy"}
	names := []string{
		"spiffe://example.org/bob", "spiffe://example.org/root", "spiffe://example.org/alice/", "spiffe://EXAMPLE.org/bob",
		"spiffe://example.org/meshid/ca", "spiffe://example.org/meshid/node/join_token/web-1", "spiffe://other.org", "spiffe://example.org/*",
		"*", "../bob", "bob", "a\x00b", "\n", strings.Repeat("x", 5000), "",
	}
	for n := range 1500 {
		names = append(names, "guess-"+strconv.Itoa(n))
	}
	names = append(names, "default", "ROOTCA")
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	delta, err := client.DeltaSecrets(ctx)
	if err != nil {
		return err
	}
	if err := delta.Send(&discoveryv3.DeltaDiscoveryRequest{Node: node, ResourceNamesSubscribe: names}); err != nil {
		return err
	}
	got := map[string]bool{}
	for !got["default"] || !got["ROOTCA"] {
		r, err := delta.Recv()
		if err != nil {
			return err
		}
		for _, resource := range r.GetResources() {
			got[resource.GetName()] = true
		}
		if err := delta.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()}); err != nil {
			return err
		}
	}
	sotw, err := client.StreamSecrets(ctx)
	if err != nil {
		return err
	}
	if err := sotw.Send(&discoveryv3.DiscoveryRequest{Node: node, ResourceNames: names}); err != nil {
		return err
	}
	for seen := map[string]bool{}; !seen["default"] || !seen["ROOTCA"]; {
		r, err := sotw.Recv()
		if err != nil {
			return err
		}
		for _, resource := range r.GetResources() {
			secret := &tlsv3.Secret{}
			if err := resource.UnmarshalTo(secret); err != nil {
				return err
			}
			seen[secret.GetName()], got[secret.GetName()] = true, true
		}
	}
	var list []string
	for name := range got {
		list = append(list, name)
	}
	slices.Sort(list)
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+args[0]))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(os.Stdout, strings.Join(list, ","), svid.ID)
	return err
}

// Names that are not one's own bring nothing, and do not keep one from what is.
func TestV_H5_NamesOfOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, bob, w.agent) // so that there is something to be taken
	fetch(t, w.agent)
	if got := output(t, as(t, alice, "claim", w.agent.Socket)); got != "ROOTCA,default spiffe://example.org/alice" {
		t.Errorf("alice gets %s", got)
	}
	w.sound(t)
}

// What a proxy says of itself decides nothing: with one and the same claim, each
// user gets its own identity.
func TestV_H9_ClaimsDecideNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for uid, want := range map[uint32]string{
		alice: "ROOTCA,default spiffe://example.org/alice", bob: "ROOTCA,default,spiffe://example.org/bob spiffe://example.org/bob",
	} {
		if got := output(t, as(t, uid, "claim", w.agent.Socket)); got != want {
			t.Errorf("user %d gets %s", uid, got)
		}
	}
	if out, err := as(t, mallory, "fetch", w.agent.Socket).CombinedOutput(); err == nil || !strings.Contains(string(out), "PermissionDenied") {
		t.Errorf("who has no identity gets %s", out)
	}
}

// There is no way to write that SDS is to be served over TCP.
func TestV_H10_NoSDSOverTCP(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config := filepath.Join(dir, "agent.yaml")
	for _, line := range []string{
		"socket: tcp://127.0.0.1:9000", "socket: '127.0.0.1:9000'", "socket: ':9000'", "socket: 'unix:///run/x'", "socket: 9000",
		"listen: '127.0.0.1:9000'", "sds: {listen: ':9000'}", "socket: [a, b]", "socket: {address: x}",
	} {
		must(t, os.WriteFile(config, fmt.Appendf(nil, `trust_domain: example.org
ca: {address: 'x:1', root_sha256: %064d}
data_dir: %s/agent
admin_socket: %s/admin.sock
node_attestation: {join_token: {token_file: /x}}
%s
`, 1, dir, dir, line), 0o600))
		cmd := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), "node-agent"), "run", "--config", config)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "agent.yaml:6") {
			t.Errorf("%s: %v: %s", line, err, out)
		}
	}
}

// relayChild asks over a connection that it was given.
func relayChild([]string) error {
	c, err := net.FileConn(os.NewFile(3, "socket"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("tcp://127.0.0.1:1"), workloadapi.WithDialOptions(
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return c, nil })))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(os.Stdout, svid.ID)
	return err
}

// Who is given a connection has the identity of the process that made it: a relay
// gives away its own, and cannot choose.
func TestV_D9_GivenConnection(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c, ok := dialUnix(t, w.agent.Socket).(*net.UnixConn)
	if !ok {
		t.Fatal("not a Unix socket")
	}
	f, err := c.File()
	must(t, err)
	defer f.Close()
	cmd := as(t, alice, "relay")
	cmd.ExtraFiles = []*os.File{f}
	if got := output(t, cmd); got != "spiffe://example.org/root" {
		t.Errorf("over a connection that root made, alice gets %s", got)
	}
	// A relay: alice speaks to root's socket, which root's process forwards.
	path := filepath.Join(w.agent.Dir, "relay.sock")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	must(t, err)
	defer l.Close()
	must(t, os.Chmod(path, 0o666))
	go func() {
		in, err := l.Accept()
		if err != nil {
			return
		}
		out, err := (&net.Dialer{}).DialContext(t.Context(), "unix", w.agent.Socket)
		if err != nil {
			return
		}
		go io.Copy(out, in)
		io.Copy(in, out)
		in.Close()
		out.Close()
	}()
	if got := output(t, as(t, alice, "fetch", path)); !strings.HasPrefix(got, "spiffe://example.org/root ") {
		t.Errorf("over root's relay, alice gets %s", got)
	}
	if id, _ := fetchAs(t, alice, w.agent); id != "spiffe://example.org/alice" {
		t.Errorf("alice gets %s", id)
	}
}

// Hundreds of processes come and go, each a workload of its own: all get their
// identity, and nothing of them stays.
func TestV_I8_Churn(t *testing.T) {
	t.Parallel()
	require.Root(t)
	w := newWorld(t)
	w.ca.Apply(t, entries+"- {name: many, spiffe_id: 'spiffe://example.org/u/{string(unix.uid)}', workloads: unix.uid >= 24000 && unix.uid < 25000, accept_weak: true}\n")
	fetchAs(t, 24999, w.agent)
	before := footprintOf(t, w.agent.PID(), w.agent.Metrics)
	program := forAll(t, "node-agent", filepath.Join(local.Binaries(t), "node-agent"))
	users := make(chan uint32)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for uid := range users {
				out, err := user(t, uid, program, "fetch", "--socket", w.agent.Socket, "--timeout", "30s").CombinedOutput()
				if want := fmt.Sprintf("spiffe://example.org/u/%d\n", uid); err != nil || !strings.HasPrefix(string(out), want) {
					t.Errorf("user %d: %v: %s", uid, err, out)
				}
			}
		})
	}
	for n := range 240 {
		users <- 24000 + uint32(n%120) // each twice
	}
	close(users)
	all.Wait()
	awaitFootprint(t, w.agent.PID(), w.agent.Metrics, before)
	s, err := w.agent.Status(t.Context(), t)
	must(t, err)
	if s.Streams != 0 {
		t.Errorf("%d streams are open", s.Streams)
	}
	for _, i := range s.Instances {
		for _, id := range i.Identities {
			if id.State != "ok" {
				t.Errorf("%s is %s: %s", id.SPIFFEID, id.State, id.Reason)
			}
		}
	}
	w.sound(t)
}
