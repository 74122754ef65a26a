package peer

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// limited starts a server whose one method waits for a message and then for the
// end of the call, and returns a function that connects to it.
func limited(t *testing.T, o CallLimits) (connect func() *grpc.ClientConn) {
	t.Helper()
	l, path := listen(t, Options{})
	options, err := LimitCalls(o)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(append(options, grpc.Creds(Credentials()), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		if err := s.RecvMsg(&emptypb.Empty{}); err != nil {
			return err
		}
		if err := s.SendMsg(&emptypb.Empty{}); err != nil {
			return err
		}
		<-s.Context().Done()
		return s.Context().Err()
	}))...)
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	t.Cleanup(wg.Wait)
	t.Cleanup(server.Stop)
	return func() *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", path)
			}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
}

// open makes a call; one that is not silent has been answered when it returns.
func open(ctx context.Context, conn *grpc.ClientConn, silent bool) (grpc.ClientStream, error) {
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/x/Wait")
	if err != nil || silent {
		return s, err
	}
	if err := s.SendMsg(&emptypb.Empty{}); err != nil {
		return nil, err
	}
	return s, s.RecvMsg(&emptypb.Empty{})
}

// Calls are bounded, also those that have said nothing yet and that no handler
// knows of; a connection that goes beyond is closed, others stay.
func TestV_I1_CallsAreBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	var mu sync.Mutex
	var log bytes.Buffer
	connect := limited(t, CallLimits{MaxCallsPerUID: 5, Registerer: reg, Logger: slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(p)
	}), nil))})
	good, bad := connect(), connect()
	stays, err := open(t.Context(), good, false)
	if err != nil {
		t.Fatal(err)
	}
	var silent []grpc.ClientStream
	for range 5 { // the fifth is the sixth of all
		s, err := open(t.Context(), bad, true)
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, s)
	}
	for _, s := range silent {
		if err := s.RecvMsg(&emptypb.Empty{}); status.Code(err) != codes.Unavailable {
			t.Errorf("a call of the connection that is closed: %v", err)
		}
	}
	// What they held is given back.
	for range 4 {
		for {
			if _, err = open(t.Context(), good, false); err == nil {
				break
			}
			if t.Context().Err() != nil || status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
		}
	}
	if err := stays.CloseSend(); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(reg, "meshid_agent_peer_refusals_total"); err != nil || n != len(reasons) {
		t.Errorf("%d series, %v", n, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if !strings.Contains(log.String(), "has 5 calls open: limit reached") {
		t.Errorf("log %q", log.String())
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A call that says nothing ends; one that has said something stays.
func TestV_I3_F53_CallWithoutARequest(t *testing.T) {
	const patience = 300 * time.Millisecond
	conn := limited(t, CallLimits{FirstRequest: patience})()
	stays, err := open(t.Context(), conn, false)
	if err != nil {
		t.Fatal(err)
	}
	silent, err := open(t.Context(), conn, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := silent.RecvMsg(&emptypb.Empty{}); status.Code(err) != codes.Canceled {
		t.Errorf("a silent call ends with %v", err)
	}
	// A unary method's handler would not even be called; so it is with one that
	// stops in the middle of a message.
	received := make(chan error, 1)
	go func() { received <- stays.RecvMsg(&emptypb.Empty{}) }()
	select {
	case err := <-received:
		t.Errorf("a call that has said something ends with %v", err)
	case <-time.After(2 * patience):
	}
}

// Where a process may have few descriptors, it takes few connections.
func TestFault_F9_FewDescriptors(t *testing.T) {
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	})
	for limit, want := range map[uint64]int{128: 8, 1024: 416, 16576: DefaultMaxConns} {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: before.Max}); err != nil {
			t.Skip(err)
		}
		if got := maxConns(); got != want {
			t.Errorf("%d connections of %d descriptors, want %d", got, limit, want)
		}
	}
}
