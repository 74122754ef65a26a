package conformance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// methods are the seven of the Workload API, and how each answers a caller that
// has an identity.
var methods = map[string]codes.Code{
	"/SpiffeWorkloadAPI/FetchX509SVID":    codes.OK,
	"/SpiffeWorkloadAPI/FetchX509Bundles": codes.OK,
	"/SpiffeWorkloadAPI/FetchJWTSVID":     codes.Unimplemented,
	"/SpiffeWorkloadAPI/FetchJWTBundles":  codes.Unimplemented,
	"/SpiffeWorkloadAPI/ValidateJWTSVID":  codes.Unimplemented,
	"/SpiffeWorkloadAPI/FetchWITSVID":     codes.Unimplemented,
	"/SpiffeWorkloadAPI/FetchWITBundles":  codes.Unimplemented,
}

const reflectionMethod = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"

// endpointUser is a user with an identity, for all tests of the endpoint.
var endpointUser = sync.OnceValue(newUser)

func endpoint(t *testing.T) *caller {
	t.Helper()
	w := shared(t)
	w.apply(t, entry("endpoint", endpointUser()))
	return w.as(t, endpointUser())
}

// headerRefused calls all methods with the header's values.
func headerRefused(t *testing.T, values ...string) {
	t.Helper()
	conn := endpoint(t).raw(t)
	for method := range methods {
		if err := call(header(t.Context(), values...), conn, method); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s with %q: %v", method, values, err)
		}
	}
	if err := call(header(t.Context(), values...), conn, reflectionMethod); status.Code(err) != codes.InvalidArgument {
		t.Errorf("reflection with %q: %v", values, err)
	}
}

func TestSpec_D01_HeaderMissing(t *testing.T)   { headerRefused(t) }
func TestSpec_D02_HeaderTrue(t *testing.T)      { headerRefused(t, "True") }
func TestSpec_D03_HeaderUpperCase(t *testing.T) { headerRefused(t, "TRUE") }
func TestSpec_D04_HeaderOne(t *testing.T)       { headerRefused(t, "1") }
func TestSpec_D05_HeaderEmpty(t *testing.T)     { headerRefused(t, "") }
func TestSpec_D06_HeaderTwice(t *testing.T)     { headerRefused(t, "true", "true") }

func TestSpec_D07_HeaderWithoutTLS(t *testing.T) {
	conn := endpoint(t).raw(t)
	for method, want := range methods {
		if err := call(header(t.Context(), "true"), conn, method); status.Code(err) != want {
			t.Errorf("%s: %v, want %v", method, err, want)
		}
	}
}

func TestSpec_D08_ReflectionTells(t *testing.T) {
	conn := endpoint(t).raw(t)
	ctx, cancel := context.WithTimeout(header(t.Context(), "true"), patience)
	defer cancel()
	s, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *grpc_reflection_v1.ServerReflectionRequest) *grpc_reflection_v1.ServerReflectionResponse {
		t.Helper()
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	services := ask(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	}).GetListServicesResponse().GetService()
	if len(services) != 1 || services[0].GetName() != "SpiffeWorkloadAPI" {
		t.Errorf("services are %v", services)
	}
	file := &descriptorpb.FileDescriptorProto{}
	if err := proto.Unmarshal(ask(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"},
	}).GetFileDescriptorResponse().GetFileDescriptorProto()[0], file); err != nil {
		t.Fatal(err)
	}
	told := make(map[string]bool)
	for _, m := range file.GetService()[0].GetMethod() {
		told["/SpiffeWorkloadAPI/"+m.GetName()] = true
	}
	for method := range methods {
		if !told[method] {
			t.Errorf("%s is not told", method)
		}
	}
	if len(told) != len(methods) || file.GetPackage() != "" {
		t.Errorf("methods are %v, package %q", told, file.GetPackage())
	}
}

func TestSpec_D09_UnknownMethods(t *testing.T) {
	conn := endpoint(t).raw(t)
	for _, method := range []string{
		"/SpiffeWorkloadAPI/FetchEverything", "/spiffe.SpiffeWorkloadAPI/FetchX509SVID", "/grpc.health.v1.Health/Check",
		"/meshid.admin.v1.AdminService/CreateToken", "/meshid.node.v1.NodeService/Issue",
	} {
		if err := call(header(t.Context(), "true"), conn, method); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", method, err)
		}
	}
}

// forward carries connections from one address to another, until the test ends.
func forward(t *testing.T, from, to string) {
	t.Helper()
	l, err := net.Listen("tcp", from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			for _, c := range [][2]net.Conn{{a, b}, {b, a}} {
				go func() {
					_, _ = io.Copy(c[0], c[1]) // ends when either does
					c[0].Close()
				}()
			}
		}
	}()
}

// TestSpec_D10_NotReadyThenReady: an agent that knows nothing says so, and serves
// the same client once it has reached its CA.
func TestSpec_D10_NotReadyThenReady(t *testing.T) {
	w := shared(t)
	t.Parallel()
	uid := newUser()
	w.apply(t, entry("d10", uid))
	address := local.FreeAddress(t)
	a := w.ca.LaunchAgent(t, "d10", local.AgentOptions{Address: address})
	c := callerOf(t, a.Socket, uid)
	conn := c.raw(t)
	ask := func(context.Context) error {
		return call(header(t.Context(), "true"), conn, "/SpiffeWorkloadAPI/FetchX509SVID")
	}
	local.Await(t, "the agent answers", func(ctx context.Context) error { // its socket is not there at once
		if err := ask(ctx); status.Code(err) != codes.Unavailable || strings.Contains(err.Error(), "connect") {
			return fmt.Errorf("want Unavailable: %w", err)
		}
		return nil
	})
	forward(t, address, w.ca.Listen)
	local.Await(t, "the agent serves", ask)
}

// TestSpec_D11_SocketFile: who may reach it, and what is in its place before.
func TestSpec_D11_SocketFile(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	w.apply(t, entry("d11", uid))
	for path, want := range map[string]os.FileMode{
		w.agent.Socket: os.ModeSocket | 0o666, w.agent.AdminSocket: os.ModeSocket | 0o600, w.ca.AdminSocket: os.ModeSocket | 0o600,
	} {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if owner := st.Sys().(*syscall.Stat_t).Uid; st.Mode() != want || owner != 0 {
			t.Errorf("%s has mode %v, owner %d; want %v, 0", path, st.Mode(), owner, want)
		}
	}
	w.agent.Kill()
	if _, err := os.Lstat(w.agent.Socket); err != nil {
		t.Fatalf("a killed agent leaves its socket: %v", err)
	}
	w.agent.Start(t)
	w.agent.AwaitConnected(t)
	w.as(t, uid).context(t)

	if err := w.agent.Stop(t); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(w.agent.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a stopped agent leaves no socket: %v", err)
	}
	victim := filepath.Join(w.agent.Dir, "victim")
	for what, put := range map[string]func() error{
		"symbolic link": func() error { return os.Symlink(victim, w.agent.Socket) },
		"not a socket":  func() error { return os.WriteFile(w.agent.Socket, []byte("precious"), 0o600) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		before := len(w.agent.Log())
		w.agent.Start(t)
		select {
		case <-w.agent.Done():
		case <-time.After(patience):
			t.Fatalf("%s: it runs", what)
		}
		if log := w.agent.Log()[before:]; !strings.Contains(log, what) || !strings.Contains(log, w.agent.Socket) {
			t.Errorf("%s: it says %s", what, log)
		}
		if _, err := os.Lstat(victim); !errors.Is(err, os.ErrNotExist) {
			t.Error("something was made where the link points to")
		}
		if err := os.Remove(w.agent.Socket); err != nil {
			t.Errorf("%s is gone: %v", what, err)
		}
	}
}

// TestSpec_D12_EndpointSocketForms: of SPIFFE_ENDPOINT_SOCKET, as our own client
// takes it.
func TestSpec_D12_EndpointSocketForms(t *testing.T) {
	w := shared(t)
	program, err := filepath.EvalSymlinks(filepath.Join(local.Binaries(t), "node-agent"))
	if err != nil {
		t.Fatal(err)
	}
	e := entry("d12", 0)
	e.Workloads = fmt.Sprintf("unix.uid == 0 && unix.path == %q", program)
	w.apply(t, e)
	w.settled(t)
	fetch := func(address string) (string, error) {
		cmd := exec.Command(program, "fetch", "--timeout", "20s")
		cmd.Env = []string{"SPIFFE_ENDPOINT_SOCKET=" + address}
		cmd.Dir = w.agent.Dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	s := w.agent.Socket
	if out, err := fetch("unix://" + s); err != nil || !strings.Contains(out, e.GetSpiffeId()) {
		t.Errorf("%v: %s", err, out)
	}
	for _, bad := range []string{
		s, "agent.sock", "unix://agent.sock", "unix:agent.sock", "unix://user@" + s, "unix://host" + s, "unix://" + s + "?x=1", "unix://" + s + "#x",
		"unix://", "unix:", "http://" + s, "tcp://localhost:80", "tcp://127.0.0.1", "tcp://127.0.0.1:1/x", "tcp://:80", "127.0.0.1:80", "%zz",
	} {
		out, err := fetch(bad)
		if err == nil || strings.Contains(out, e.GetSpiffeId()) {
			t.Errorf("%q is taken: %s", bad, out)
		}
		if strings.Contains(out, "deadline") || strings.Contains(out, "connection") {
			t.Errorf("%q is tried: %s", bad, out)
		}
	}
	// Well-formed, but nobody is there.
	if out, err := fetch("tcp://" + local.FreeAddress(t)); err == nil || !strings.Contains(out, "refused") && !strings.Contains(out, "deadline") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestSpec_D13_OneUserTakesAll: connections of one user are bounded, and the
// others are served meanwhile.
func TestSpec_D13_OneUserTakesAll(t *testing.T) {
	w := alone(t, local.CAOptions{})
	const most = 4096 // of one user
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Max < 3*most {
		require.Missing(t, "%d descriptors are needed, %d are allowed", 3*most, limit.Max)
	}
	greedy, other := newUser(), newUser()
	w.apply(t, entry("d13", other))
	w.as(t, other).context(t)
	c := w.as(t, greedy)
	for i := range most + 200 {
		conn, err := c.dial(t.Context())
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		defer conn.Close()
	}
	local.Await(t, "refusals", func(ctx context.Context) error {
		n, err := metric(ctx, w.agent.Metrics, "meshid_agent_peer_refusals_total", `reason="uid_limit"`)
		if err == nil && n == 0 {
			err = errors.New("none")
		}
		return err
	})
	w.as(t, other).context(t)
	if n, err := metric(t.Context(), w.agent.Metrics, "meshid_agent_peer_connections"); err != nil || n > most+10 {
		t.Errorf("%v connections: %v", n, err)
	}
}

// TestSpec_D14_Garbage: what is no gRPC harms nobody.
func TestSpec_D14_Garbage(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("d14", uid))
	c := w.as(t, uid)
	before := c.context(t).DefaultSVID()
	preface := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	settings := "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	frame := func(length int, kind, flags byte, stream byte) string {
		return string([]byte{byte(length >> 16), byte(length >> 8), byte(length), kind, flags, 0, 0, 0, stream})
	}
	pid := w.agent.PID()
	for what, bytes := range map[string]string{
		"nothing":                  "",
		"zeros":                    strings.Repeat("\x00", 1<<16),
		"high bytes":               strings.Repeat("\xff", 1<<20),
		"TLS":                      "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"half a preface":           preface[:10],
		"preface, then rubbish":    preface + strings.Repeat("\xaa", 1<<16),
		"frame of 16 MB":           preface + settings + frame(1<<24-1, 0, 0, 1) + strings.Repeat("x", 1<<16),
		"headers that do not end":  preface + settings + frame(16, 1, 0, 1) + strings.Repeat("\x40", 16) + strings.Repeat(frame(16000, 9, 0, 1)+strings.Repeat("\x00", 16000), 64),
		"broken compression":       preface + settings + frame(8, 1, 4, 1) + "\xff\xff\xff\xff\xff\xff\xff\xff",
		"data for no stream":       preface + settings + frame(5, 0, 0, 99) + "xxxxx",
		"flood of settings":        preface + strings.Repeat(settings, 20_000),
		"flood of pings":           preface + settings + strings.Repeat(frame(8, 6, 0, 0)+"12345678", 20_000),
		"flood of resets":          preface + settings + strings.Repeat(frame(4, 3, 0, 1)+"\x00\x00\x00\x08", 20_000),
		"window of more than 2^31": preface + settings + frame(4, 8, 0, 0) + "\x7f\xff\xff\xff",
	} {
		conn, err := c.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, bytes) // the agent may have closed it in the middle
		conn.Close()
		if after := c.context(t).DefaultSVID(); !after.Certificates[0].Equal(before.Certificates[0]) {
			t.Errorf("%s: another X.509-SVID", what)
		}
	}
	// A gRPC message that is too large, and headers that are.
	conn := c.raw(t)
	s, err := conn.NewStream(header(t.Context(), "true"), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/SpiffeWorkloadAPI/FetchX509SVID")
	if err != nil {
		t.Fatal(err)
	}
	_ = s.SendMsg(&descriptorpb.FileDescriptorProto{Name: new(strings.Repeat("x", 4<<20))}) // Recv says why it failed
	if err := s.RecvMsg(&descriptorpb.FileDescriptorProto{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("large message: %v", err)
	}
	if err := call(header(t.Context(), strings.Repeat("true", 1<<16)), conn, "/SpiffeWorkloadAPI/FetchX509SVID"); err == nil {
		t.Error("large header is taken")
	}
	c.context(t)
	select {
	case <-w.agent.Done():
		t.Error("the agent has ended")
	default:
	}
	if w.agent.PID() != pid {
		t.Error("the agent was restarted")
	}
}

// TestSpec_D15_ProcessOfOthers: a connection is worth nothing when the process
// that made it has ended, whoever holds it, and when it cannot be told.
func TestSpec_D15_ProcessOfOthers(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("d15", uid))
	c := w.as(t, uid)
	early, err := c.dial(t.Context()) // held by us beyond the end of its process
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	stream := c.stream(t)
	stream.next(t)
	c.exit()
	if err := stream.end(); status.Code(err) != codes.Unavailable {
		t.Errorf("open stream: %v", err)
	}
	conn, err := grpc.NewClient("passthrough:///agent", append(c.dialOptions(),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return early, nil }))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := call(header(t.Context(), "true"), conn, "/SpiffeWorkloadAPI/FetchX509SVID"); status.Code(err) != codes.Unavailable {
		t.Errorf("connection made before: %v", err)
	}

	// An agent in a process id namespace of its own cannot tell who asks.
	t.Run("no process id", func(t *testing.T) {
		unshare := require.Program(t, "unshare")
		a := w.ca.LaunchAgent(t, "d15", local.AgentOptions{Wrap: []string{unshare, "--pid", "--fork", "--mount-proc", "--kill-child"}})
		conn := callerOf(t, a.Socket, uid).raw(t)
		local.Await(t, "the agent says what to do", func(context.Context) error {
			err := call(header(t.Context(), "true"), conn, "/SpiffeWorkloadAPI/FetchX509SVID")
			if status.Code(err) != codes.Unavailable {
				t.Fatalf("want Unavailable: %v", err)
			}
			if !strings.Contains(a.Log(), "hostPID: true") {
				return errors.New("it does not")
			}
			return nil
		})
	})
}

// TestV_D18_OnlyGRPCOnlyThere: HTTP/1 is closed, the header is demanded, and no
// TCP port of the agent has secrets.
func TestV_D18_OnlyGRPCOnlyThere(t *testing.T) {
	w := shared(t)
	c := endpoint(t)
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /SpiffeWorkloadAPI/FetchX509SVID HTTP/1.1\r\nHost: x\r\nworkload.spiffe.io: true\r\nContent-Type: application/grpc\r\nContent-Length: 5\r\n\r\n\x00\x00\x00\x00\x00",
		"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n",
		"GET /latest/meta-data HTTP/1.0\r\n\r\n",
	} {
		conn, err := c.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(conn)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("%q: it is not closed", request)
		}
		if bytes.Contains(answer, []byte("spiffe://")) || bytes.HasPrefix(answer, []byte("HTTP/1.1 200")) {
			t.Errorf("%q: %q", request, answer)
		}
		conn.Close()
	}
	if err := call(t.Context(), c.raw(t), "/SpiffeWorkloadAPI/FetchX509SVID"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without the header: %v", err)
	}

	listeners := listening(t, w.agent.PID())
	if len(listeners) != 1 || listeners[0] != w.agent.Metrics {
		t.Fatalf("the agent listens on %v, want only %s", listeners, w.agent.Metrics)
	}
	conn, err := grpc.NewClient("passthrough:///"+w.agent.Metrics, c.dialOptions()[:1]...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, method := range []string{
		"/SpiffeWorkloadAPI/FetchX509SVID", "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
		"/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
	} {
		if err := call(header(t.Context(), "true"), conn, method); err == nil {
			t.Errorf("%s is answered over TCP", method)
		}
	}
	for _, path := range []string{"/", "/status", "/debug/pprof/", "/SpiffeWorkloadAPI/FetchX509SVID", "/v3/discovery:secrets"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+w.agent.Metrics+path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := get(http.DefaultClient, req); err == nil {
			t.Errorf("%s: %s", path, body)
		}
	}
}

// listening returns the TCP addresses that a process listens on.
func listening(t testing.TB, pid int) []string {
	t.Helper()
	sockets := make(map[string]bool)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); err == nil { // it may be closed
			sockets[target] = true
		}
	}
	var all []string
	for _, file := range []string{"tcp", "tcp6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if err != nil {
			continue // no IPv6
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			const listen = "0A"
			fields := strings.Fields(s.Text())
			if len(fields) < 10 || fields[3] != listen || !sockets["socket:["+fields[9]+"]"] {
				continue
			}
			var a, b, c, d byte
			var port int
			if _, err := fmt.Sscanf(fields[1], "%02X%02X%02X%02X:%04X", &d, &c, &b, &a, &port); err != nil || file == "tcp6" {
				all = append(all, fields[1])
				continue
			}
			all = append(all, fmt.Sprintf("%d.%d.%d.%d:%d", a, b, c, d, port))
		}
	}
	slices.Sort(all)
	return all
}
