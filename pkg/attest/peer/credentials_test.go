package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"
)

// call makes one call to a method that answers with the caller's process id.
func call(t *testing.T, target string, o ...grpc.DialOption) (string, error) {
	t.Helper()
	cc, err := grpc.NewClient(target, append(o, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err = cc.Invoke(ctx, "/test/Who", &emptypb.Empty{}, &emptypb.Empty{})
	return status.Convert(err).Message(), err
}

func who(_ any, s grpc.ServerStream) error {
	p, ok := FromContext(s.Context())
	if !ok {
		return status.Error(codes.Internal, "nobody")
	}
	return status.Error(codes.NotFound, strconv.Itoa(p.PID))
}

func TestCredentials(t *testing.T) {
	l, path := listen(t, Options{})
	server := grpc.NewServer(grpc.Creds(Credentials()), grpc.UnknownServiceHandler(who))
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	if got, _ := call(t, "unix:"+path); got != strconv.Itoa(os.Getpid()) {
		t.Errorf("the server says %q", got)
	}
	server.Stop()
	wg.Wait()

	// A connection that was not accepted by Listen is not served.
	b := bufconn.Listen(1 << 16)
	server = grpc.NewServer(grpc.Creds(Credentials()), grpc.UnknownServiceHandler(who))
	wg.Go(func() { _ = server.Serve(b) })
	_, err := call(t, "passthrough:x", grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return b.DialContext(ctx) }))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("without a peer: %v", err)
	}
	server.Stop()
	wg.Wait()

	if _, ok := FromContext(t.Context()); ok {
		t.Error("a peer in an empty context")
	}
	p := ForTest(1, 2, 3)
	if got, ok := FromContext(NewContext(t.Context(), p)); !ok || got != p {
		t.Error("not the peer that was put in")
	}
	if _, _, err := Credentials().ClientHandshake(t.Context(), "", nil); err == nil {
		t.Error("a client's handshake succeeds")
	}
}

// D18: a browser or a proxy at the socket gets nothing.
func TestV_D18_HTTP1(t *testing.T) {
	l, path := listen(t, Options{})
	server := grpc.NewServer(grpc.Creds(Credentials()), grpc.UnknownServiceHandler(who))
	var wg sync.WaitGroup
	wg.Go(func() { _ = server.Serve(l) })
	defer wg.Wait()
	defer server.Stop()
	c := dial(t, path)
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want that the connection is closed: %v", err)
	}
}
