package peer

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"
)

// Default limits of LimitCalls. A call that has said nothing yet costs 7 kB.
const (
	DefaultMaxCalls             = 20_480
	DefaultMaxCallsPerUID       = 8_192
	DefaultMaxCallsPerContainer = 2_048
	DefaultFirstRequest         = 15 * time.Second
)

// CallLimits bound the gRPC calls on the connections of a listener, before any
// handler knows of them: a handler of gRPC is called only once the first
// message has come, and until then nobody else counts the call or ends it. Zero
// means the default.
type CallLimits struct {
	// MaxCalls bounds the open calls, MaxCallsPerUID those of one user,
	// MaxCallsPerContainer those of one container. A connection that goes beyond
	// is closed, with all its calls.
	MaxCalls, MaxCallsPerUID, MaxCallsPerContainer int
	// FirstRequest is how long a call may be open without a message; then it
	// ends with Canceled.
	FirstRequest time.Duration
	// Logger and Registerer may be nil.
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// LimitCalls returns the options of a gRPC server that serves connections of
// Listen with Credentials.
func LimitCalls(o CallLimits) ([]grpc.ServerOption, error) {
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, fmt.Errorf("limit calls: %w", err)
	}
	if o.MaxCalls <= 0 {
		o.MaxCalls = DefaultMaxCalls
	}
	if o.MaxCallsPerUID <= 0 {
		o.MaxCallsPerUID = DefaultMaxCallsPerUID
	}
	if o.MaxCallsPerContainer <= 0 {
		o.MaxCallsPerContainer = DefaultMaxCallsPerContainer
	}
	if o.FirstRequest <= 0 {
		o.FirstRequest = DefaultFirstRequest
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	c := &calls{limits: o, metrics: m, open: newQuota("calls", o.MaxCalls, o.MaxCallsPerUID, o.MaxCallsPerContainer)}
	return []grpc.ServerOption{
		grpc.InTapHandle(c.begin),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			callOf(ctx).heard()
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, &listening{stream, callOf(stream.Context())})
		}),
	}, nil
}

// calls counts the open calls.
type calls struct {
	limits  CallLimits
	metrics *metrics

	mu     sync.Mutex // guards what follows
	open   quota
	warned time.Time
}

// openCall is one of them, until its first message has come.
type openCall struct{ timer *time.Timer }

type callKey struct{}

func callOf(ctx context.Context) *openCall {
	c, ok := ctx.Value(callKey{}).(*openCall)
	if !ok {
		return nil
	}
	return c
}

// heard notes that the first message has come.
func (c *openCall) heard() {
	if c != nil {
		c.timer.Stop()
	}
}

// begin is called with the headers of a call. It never refuses one: gRPC keeps
// something of each call that is refused here until its connection ends. It
// ends the connection.
func (c *calls) begin(ctx context.Context, _ *tap.Info) (context.Context, error) {
	p, ok := FromContext(ctx)
	if !ok {
		return ctx, nil // whoever serves it refuses it, for there is no peer
	}
	if err := c.enter(p); err != nil {
		c.metrics.refusals[reasonCalls].Inc()
		c.warn(err)
		go p.onEnd() // not from within the connection's reader
		return ctx, nil
	}
	within, cancel := context.WithCancel(ctx)
	call := &openCall{time.AfterFunc(c.limits.FirstRequest, cancel)}
	context.AfterFunc(ctx, func() {
		call.timer.Stop()
		cancel()
		c.leave(p)
	})
	return context.WithValue(within, callKey{}, call), nil
}

func (c *calls) enter(p *Peer) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.open.enter(p.UID, p.container)
	return err
}

func (c *calls) leave(p *Peer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open.leave(p.UID, p.container)
}

// warn logs at most one refusal a minute.
func (c *calls) warn(err error) {
	now := time.Now()
	c.mu.Lock()
	due := now.Sub(c.warned) >= time.Minute
	if due {
		c.warned = now
	}
	c.mu.Unlock()
	if due {
		c.limits.Logger.Warn("closed a connection with too many calls", "err", err)
	}
}

// listening is a stream whose first message is waited for.
type listening struct {
	grpc.ServerStream
	call *openCall
}

// RecvMsg implements grpc.ServerStream.
func (l *listening) RecvMsg(m any) error {
	err := l.ServerStream.RecvMsg(m)
	if err == nil {
		l.call.heard()
	}
	return err
}
