package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"
)

// callerEnv makes this binary the process that connects in place of the tests:
// a socket's identity is that of the process which connected it, so the
// descriptors that it hands over speak for its user.
const callerEnv = "CONFORMANCE_CALLER"

// patience bounds every wait: a loaded machine is slow, and only a failure waits
// this long.
const patience = 60 * time.Second

// callerMain connects to the paths that it is sent and answers with descriptors.
func callerMain() int {
	control, err := net.FileConn(os.NewFile(3, "control"))
	if err != nil {
		return 1
	}
	c, ok := control.(*net.UnixConn)
	if !ok {
		return 1
	}
	buf := make([]byte, 512)
	for {
		n, err := c.Read(buf)
		if err != nil || n == 0 {
			return 0
		}
		if err := hand(c, string(buf[:n])); err != nil {
			if _, err := c.Write([]byte("E" + err.Error())); err != nil {
				return 1
			}
		}
	}
}

func hand(c *net.UnixConn, path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for {
		if err = unix.Connect(fd, &unix.SockaddrUnix{Name: path}); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return err
	}
	_, _, err = c.WriteMsgUnix([]byte("D"), unix.UnixRights(fd), nil)
	return err
}

// caller is a process of a user.
type caller struct {
	socket string
	cmd    *exec.Cmd

	mu      sync.Mutex // guards control: one question at a time
	control *net.UnixConn
}

// as starts a process of the user uid, whose connections go to the agent.
func (w *world) as(t testing.TB, uid uint32) *caller {
	t.Helper()
	return callerOf(t, w.agent.Socket, uid)
}

func callerOf(t testing.TB, socket string, uid uint32) *caller {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	control, ok := conn.(*net.UnixConn)
	if !ok {
		t.Fatalf("control is a %T", conn)
	}
	cmd := exec.Command("/proc/self/exe") // by name, the folder may be closed to others
	cmd.Dir = "/"
	cmd.Env = []string{callerEnv + "=1", "GODEBUG=" + os.Getenv("GODEBUG")}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &caller{socket: socket, cmd: cmd, control: control}
	t.Cleanup(func() {
		c.exit()
		control.Close()
	})
	return c
}

// exit ends the process. Its connections stay open: we hold them.
func (c *caller) exit() {
	_ = c.cmd.Process.Kill() // it may have ended
	_ = c.cmd.Wait()
}

// dial has the process connect.
func (c *caller) dial(ctx context.Context) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.control.SetDeadline(deadline)
		defer c.control.SetDeadline(time.Time{})
	}
	if _, err := c.control.Write([]byte(c.socket)); err != nil {
		return nil, err
	}
	buf, oob := make([]byte, 512), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.control.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 || buf[0] != 'D' {
		return nil, fmt.Errorf("the caller's connect: %s", buf[:n])
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("%d control messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fds[0])
	f := os.NewFile(uintptr(fds[0]), c.socket)
	defer f.Close()
	return net.FileConn(f)
}

func (c *caller) dialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return c.dial(ctx) }),
	}
}

// raw returns a connection that knows nothing of SPIFFE.
func (c *caller) raw(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///agent", c.dialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// spiffe returns options for go-spiffe's client.
func (c *caller) spiffe() []workloadapi.ClientOption {
	return []workloadapi.ClientOption{
		workloadapi.WithAddr("unix://" + c.socket),
		workloadapi.WithDialOptions(c.dialOptions()...),
	}
}

// context fetches once what the process has.
func (c *caller) context(t testing.TB) *workloadapi.X509Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	x, err := workloadapi.FetchX509Context(ctx, c.spiffe()...)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// source returns go-spiffe's source, once it has an identity.
func (c *caller) source(t testing.TB) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(c.spiffe()...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// have waits until the process has the identities, in this order.
func (c *caller) have(t testing.TB, ids ...string) []*x509svid.SVID {
	t.Helper()
	s := c.stream(t)
	for {
		m := s.next(t)
		if fmt.Sprint(idsOf(m)) == fmt.Sprint(ids) {
			return c.context(t).SVIDs
		}
	}
}

// header is what every call must carry.
func header(ctx context.Context, values ...string) context.Context {
	pairs := make([]string, 0, 2*len(values))
	for _, v := range values {
		pairs = append(pairs, "workload.spiffe.io", v)
	}
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

// call calls a method of the Workload API and returns how it ends, or nil when
// it has answered. All of them take an empty message.
func call(ctx context.Context, conn *grpc.ClientConn, method string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	if err := s.SendMsg(&emptypb.Empty{}); err != nil {
		return s.RecvMsg(&emptypb.Empty{}) // says why
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(&emptypb.Empty{})
}

// svidStream is an open FetchX509SVID, read without go-spiffe.
type svidStream struct {
	grpc.ServerStreamingClient[workload.X509SVIDResponse]
}

// stream opens FetchX509SVID over a connection of its own.
func (c *caller) stream(t testing.TB) svidStream {
	t.Helper()
	return c.streamOver(t, c.raw(t))
}

func (c *caller) streamOver(t testing.TB, conn *grpc.ClientConn) svidStream {
	t.Helper()
	s, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(header(t.Context(), "true"), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return svidStream{s}
}

// ids asks once, and does not wait for an agent that is not there.
func (c *caller) ids(ctx context.Context) ([]string, error) {
	conn, err := grpc.NewClient("passthrough:///agent", c.dialOptions()...)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(header(ctx, "true"))
	defer cancel()
	s, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	m, err := s.Recv()
	return idsOf(m), err
}

// next returns the next message.
func (s svidStream) next(t testing.TB) *workload.X509SVIDResponse {
	t.Helper()
	m, err := s.recv()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// recv is Recv that does not wait for ever.
func (s svidStream) recv() (*workload.X509SVIDResponse, error) {
	type received struct {
		m   *workload.X509SVIDResponse
		err error
	}
	ch := make(chan received, 1)
	go func() {
		m, err := s.Recv()
		ch <- received{m, err}
	}()
	select {
	case r := <-ch:
		return r.m, r.err
	case <-time.After(patience):
		return nil, errors.New("no message")
	}
}

// end reads to the end and returns why it came.
func (s svidStream) end() error {
	for {
		if _, err := s.recv(); err != nil {
			return err
		}
	}
}

func idsOf(m *workload.X509SVIDResponse) []string {
	ids := make([]string, 0, len(m.GetSvids()))
	for _, s := range m.GetSvids() {
		ids = append(ids, s.GetSpiffeId())
	}
	return ids
}
