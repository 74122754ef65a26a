package external

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	pluginv1 "github.com/meshid/meshid/proto/plugin/v1"
)

// behaviourVariable makes the test's program a plug-in that behaves so.
const behaviourVariable = "MESHID_TEST_PLUGIN"

// How a plug-in goes wrong beside what all CAs can do.
const (
	dies        upstreamtest.Behaviour = "dies at each request"
	otherProto  upstreamtest.Behaviour = "speaks another version"
	mute        upstreamtest.Behaviour = "does not listen"
	stubborn    upstreamtest.Behaviour = "does not end"
	loud        upstreamtest.Behaviour = "writes without end"
	unimplement upstreamtest.Behaviour = "does not watch"
	limited     upstreamtest.Behaviour = "has limits"
	confused    upstreamtest.Behaviour = "has limits that contradict each other"
)

// TestPlugin is no test: it is the plug-in, in a process of its own.
func TestPlugin(t *testing.T) {
	b := upstreamtest.Behaviour(os.Getenv(behaviourVariable))
	if b == "" {
		t.Skip("it is started by the other tests")
	}
	if b == upstreamtest.Gone {
		os.Exit(3) //nolint:forbidigo // the process of a plug-in
	}
	if b == mute {
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	if b == loud {
		for i := range 10_000 {
			fmt.Fprintf(os.Stderr, "line %d %s\n", i, strings.Repeat("x", i))
		}
	}
	l, err := net.Listen("unix", os.Getenv(socketVariable))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pluginv1.RegisterUpstreamServer(s, &plugin{a: upstreamtest.NewAuthority(t, b), b: b})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		if b != stubborn {
			s.Stop()
		}
	}()
	if b == stubborn {
		signal.Ignore(syscall.SIGTERM)
	}
	fmt.Fprintf(os.Stderr, "listening, behaves: %s\n", b)
	if err := s.Serve(l); err != nil {
		t.Fatal(err)
	}
}

// plugin is the service of the process.
type plugin struct {
	pluginv1.UnimplementedUpstreamServer

	a *upstreamtest.Authority
	b upstreamtest.Behaviour
}

func (p *plugin) Handshake(context.Context, *pluginv1.HandshakeRequest) (*pluginv1.HandshakeResponse, error) {
	h := &pluginv1.HandshakeResponse{ProtocolVersion: 1, Name: "test", Version: "1"}
	switch p.b { //nolint:exhaustive // the others say nothing
	case otherProto:
		h.ProtocolVersion = 2
	case limited:
		day := durationpb.New(24 * time.Hour)
		h.Capabilities = &pluginv1.Capabilities{MinTtl: day, TtlGranularity: day, MaxTtl: durationpb.New(72 * time.Hour)}
	case confused:
		h.Capabilities = &pluginv1.Capabilities{MinTtl: durationpb.New(2 * time.Hour), MaxTtl: durationpb.New(time.Hour)}
	}
	return h, nil
}

func (p *plugin) Mint(ctx context.Context, r *pluginv1.MintRequest) (*pluginv1.MintResponse, error) {
	switch p.b { //nolint:exhaustive // the others answer
	case dies:
		os.Exit(4) //nolint:forbidigo // the process of a plug-in
	case upstreamtest.Slow:
		<-ctx.Done()
		return nil, ctx.Err()
	case upstreamtest.Denied:
		return nil, status.Error(codes.PermissionDenied, "this CA may not have intermediates: ask the security team")
	case upstreamtest.RateLimited:
		if err := grpc.SetTrailer(ctx, metadata.Pairs("retry-after", "7")); err != nil {
			return nil, err
		}
		return nil, status.Error(codes.ResourceExhausted, "one a day")
	case upstreamtest.Garbage:
		return &pluginv1.MintResponse{Chain: [][]byte{[]byte("not a certificate")}, Roots: [][]byte{{}}}, nil
	case upstreamtest.HugeAnswer:
		return &pluginv1.MintResponse{Chain: [][]byte{make([]byte, 2<<20)}}, nil
	}
	chain, roots := p.a.Answer(r.GetCsr(), r.GetTtl().AsDuration())
	return &pluginv1.MintResponse{Chain: raw(chain), Roots: raw(roots)}, nil
}

func (p *plugin) WatchRoots(_ *pluginv1.WatchRootsRequest, s grpc.ServerStreamingServer[pluginv1.WatchRootsResponse]) error {
	if p.b == unimplement {
		return p.UnimplementedUpstreamServer.WatchRoots(nil, s)
	}
	if err := s.Send(&pluginv1.WatchRootsResponse{Roots: [][]byte{p.a.Root.Raw}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}

func raw(all []*x509.Certificate) [][]byte {
	var ders [][]byte
	for _, c := range all {
		ders = append(ders, c.Raw)
	}
	return ders
}

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// open returns a client of a plug-in that behaves so, and what is logged.
func open(t *testing.T, b upstreamtest.Behaviour) (*CA, *lines) {
	t.Helper()
	t.Setenv(behaviourVariable, string(b))
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log := &lines{}
	ca, err := New(Config{
		Command: []string{program, "-test.run=^TestPlugin$"}, Environment: []string{behaviourVariable},
	}, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ca.pace = backoff.New(backoff.Policy{Base: time.Millisecond, Max: time.Millisecond})
	t.Cleanup(func() {
		if err := ca.Close(); err != nil {
			t.Error(err)
		}
	})
	return ca, log
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Real: true, // its authority is in the other process
		Start: func(t *testing.T, b upstreamtest.Behaviour, _ *upstreamtest.Authority) upstream.CA {
			ca, _ := open(t, b)
			return ca
		},
	})
}

// mint asks for an intermediate and checks it.
func mint(t *testing.T, ca *CA) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := upstreamtest.Mint(ctx, t, ca)
	return err
}

// A process that dies is started again; each of its ends is an error that a retry
// may help.
func TestRestart(t *testing.T) {
	ca, log := open(t, upstreamtest.Good)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	first := ca.process
	watch := make(chan error, 1)
	go func() {
		watch <- ca.WatchRoots(t.Context(), func([]*x509.Certificate) error { return first.cmd.Process.Kill() })
	}()
	if err := <-watch; !errors.Is(err, upstream.ErrUnavailable) {
		t.Errorf("the watch of a process that was killed returns %v", err)
	}
	<-first.done
	if _, err := os.Stat(first.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's folder is still there: %v", err)
	}
	for { // until the delay is over
		err := mint(t, ca)
		if err == nil {
			break
		}
		if !errors.Is(err, upstream.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if ca.process == first {
		t.Error("it is the same process")
	}
	if !strings.Contains(log.String(), "behaves: good") {
		t.Errorf("what the plug-in wrote is not in the log:\n%s", log)
	}
}

// The delay before the next start grows, and calls do not wait for it.
func TestBackOff(t *testing.T) {
	ca, _ := open(t, dies)
	ca.pace = backoff.New(backoff.Policy{Base: 24 * time.Hour, Max: 24 * time.Hour})
	if err := mint(t, ca); !errors.Is(err, upstream.ErrUnavailable) {
		t.Fatalf("the first time: %v", err)
	}
	<-ca.process.done
	if err := mint(t, ca); !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "started again in") || !strings.Contains(err.Error(), "exit status 4") {
		t.Errorf("it is started at once, or does not say when: %v", err)
	}
}

func TestBadPlugins(t *testing.T) {
	for _, c := range []struct {
		behaviour upstreamtest.Behaviour
		kind      error
		says      string
	}{
		{otherProto, upstream.ErrDenied, "speaks version 2"},
		{confused, upstream.ErrDenied, "max_ttl is below min_ttl"},
		{upstreamtest.Gone, upstream.ErrUnavailable, "exit status 3"},
		{mute, upstream.ErrUnavailable, socketVariable},
	} {
		t.Run(string(c.behaviour), func(t *testing.T) {
			ca, _ := open(t, c.behaviour)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := ca.running(ctx)
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}

// A process that does not end when it is told to is killed.
func TestStubborn(t *testing.T) {
	ca, _ := open(t, stubborn)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	p := ca.process
	if err := ca.Close(); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("Close returns %v", err)
	}
	if !p.ended() {
		t.Error("it runs")
	}
	if err := mint(t, ca); !errors.Is(err, upstream.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}

// The log is bounded, and a process that writes too much goes on.
func TestLoud(t *testing.T) {
	ca, log := open(t, loud)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	if err := ca.Close(); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(log.String()) {
		if len(line) > maxLine+200 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
	if n := strings.Count(log.String(), "\n"); n > 5000 || !strings.Contains(log.String(), "lines were dropped") {
		t.Errorf("%d of 10000 lines are in the log, and that some are missing is not", n)
	}
}

// One that does not watch is no error, until it ends.
func TestUnwatched(t *testing.T) {
	ca, _ := open(t, unimplement)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	watch := make(chan error, 1)
	go func() {
		watch <- ca.WatchRoots(t.Context(), func([]*x509.Certificate) error { return errors.New("no roots were sent") })
	}()
	if err := ca.process.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-watch; !errors.Is(err, upstream.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

func TestCapabilities(t *testing.T) {
	ca, _ := open(t, limited)
	if got, want := ca.Capabilities(), (upstream.Capabilities{MinTTL: 24 * time.Hour, TTLGranularity: 24 * time.Hour, MaxTTL: 72 * time.Hour}); !equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	ca.said = upstream.Capabilities{} // as if it had said so before it was started anew
	r, err := upstream.NewRequest(upstreamtest.TrustDomain, upstreamtest.NewAuthority(t, upstreamtest.Good).Key, upstreamtest.NewAuthority(t, upstreamtest.Good).Root.Subject, time.Hour, ca.said)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Mint(t.Context(), r); !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "other capabilities") {
		t.Errorf("a request that does not fit: %v", err)
	}
}

// Variables that nobody named stay here.
func TestEnvironment(t *testing.T) {
	t.Setenv("MESHID_TEST_SECRET", "hunter2")
	out := filepath.Join(t.TempDir(), "environment")
	log := &lines{}
	ca, err := New(Config{Command: []string{"/bin/sh", "-c", "env >" + out}}, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := mint(t, ca); !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "exit code 0") {
		t.Errorf("a program that is no plug-in: %v", err)
	}
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(got), "hunter2") || !strings.Contains(string(got), "PATH=") || !strings.Contains(string(got), socketVariable) {
		t.Errorf("the process has the environment\n%s", got)
	}
}

func TestNew(t *testing.T) {
	program := upstreamtest.File(t, "plug-in", []byte("#!/bin/sh\n"))
	for _, c := range []struct {
		name   string
		config Config
		mode   os.FileMode
		says   string
	}{
		{"no command", Config{}, 0o755, "set command"},
		{"relative", Config{Command: []string{"plug-in"}}, 0o755, "absolute path"},
		{"missing", Config{Command: []string{program + "x"}}, 0o755, "no such file"},
		{"not executable", Config{Command: []string{program}}, 0o644, "chmod +x"},
		{"writable by others", Config{Command: []string{program}}, 0o775, "chmod go-w"},
		{"a value in the environment", Config{Command: []string{program}, Environment: []string{"A=b"}}, 0o755, "list names"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.Chmod(program, c.mode); err != nil {
				t.Fatal(err)
			}
			if _, err := New(c.config, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}
