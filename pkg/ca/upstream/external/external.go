// Package external is the upstream CA that is a process of the user: it is started
// here, and speaks proto/plugin/v1, where its side is described. What it answers is
// bounded here, and held against the request by whoever uses it. It does not know
// what CA the process stands for.
package external

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ca/upstream"
	pluginv1 "github.com/meshid/meshid/proto/plugin/v1"
)

const (
	// startTimeout bounds the start of the process up to its handshake.
	startTimeout = 10 * time.Second
	// stopTimeout is how long the process may take to end.
	stopTimeout = 5 * time.Second
	// maxMessage bounds a message of the process, and maxHeaders its metadata.
	maxMessage, maxHeaders = 1 << 20, 1 << 14
	// healthy is how long a process has to run for its end not to count as one of
	// several failures.
	healthy = time.Minute
	// maxTTL bounds what a process may call a limit.
	maxTTL = 100 * 365 * 24 * time.Hour
)

// Config says which process to start.
type Config struct {
	// Command is the absolute path of the program and its arguments. Nobody but root
	// and the user that ca runs as may be able to write to the program.
	Command []string `yaml:"command"`
	// Environment names the variables of the CA's environment that the process gets,
	// beside HOME, LANG, LOGNAME, PATH, SSL_CERT_DIR, SSL_CERT_FILE, TMPDIR, TZ and USER.
	Environment []string `yaml:"environment"`
}

// CA is a process, which runs from the first call until Close. All methods may be
// called concurrently.
type CA struct {
	config Config
	log    *slog.Logger

	// turn is taken to use what follows: it is a mutex that a context can end the
	// wait for.
	turn      chan struct{}
	process   *process // the last one, nil before the first
	pace      *backoff.Backoff
	last      error     // how the last one ended, or why it was not started
	notBefore time.Time // when the next process may be started
	closed    bool
	said      upstream.Capabilities // what Capabilities returned last
}

// New checks the command, and starts nothing. What the process writes to standard
// error goes to the logger.
func New(c Config, logger *slog.Logger) (*CA, error) {
	if err := checkCommand(c.Command); err != nil {
		return nil, err
	}
	for _, name := range c.Environment {
		if name == "" || strings.ContainsAny(name, "= \x00") {
			return nil, fmt.Errorf("environment: %.100q is not the name of a variable: list names, the values are taken from ca's environment", name)
		}
	}
	return &CA{
		config: c, log: logger, turn: make(chan struct{}, 1),
		pace: backoff.New(backoff.Policy{Base: time.Second, Max: time.Minute}),
	}, nil
}

// Close ends the process and waits for it. Calls after it fail.
func (c *CA) Close() error {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	c.closed = true
	if c.process == nil {
		return nil
	}
	p := c.process
	c.process = nil
	return p.stop()
}

// Capabilities starts the process if it does not run, and returns what it says of
// itself; none while it cannot be started.
func (c *CA) Capabilities() upstream.Capabilities {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout) // the interface has no context: nothing is asked of the CA behind the process
	defer cancel()
	p, err := c.running(ctx)
	if err != nil {
		return upstream.Capabilities{}
	}
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	c.said = p.capabilities
	return p.capabilities
}

// running returns the process, started if need be.
func (c *CA) running(ctx context.Context) (*process, error) {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return nil, unavailable(context.Cause(ctx))
	}
	if c.closed {
		return nil, unavailable(errors.New("the plug-in was stopped"))
	}
	if p := c.process; p != nil {
		if !p.ended() {
			return p, nil
		}
		if p.endedAt.Sub(p.startedAt) >= healthy {
			c.pace.Reset()
		}
		c.process, c.last, c.notBefore = nil, unavailable(errors.Join(p.err, p.conn.Close())), p.endedAt.Add(c.pace.Next())
	}
	if wait := time.Until(c.notBefore); wait > 0 {
		return nil, fmt.Errorf("%w (it is started again in %s)", c.last, (wait + time.Second - 1).Truncate(time.Second))
	}
	p, err := start(ctx, c.config, c.log)
	if err != nil {
		c.last, c.notBefore = err, time.Now().Add(c.pace.Next())
		return nil, err
	}
	c.process = p
	return p, nil
}

// Mint asks the process for an intermediate.
func (c *CA) Mint(ctx context.Context, r *upstream.Request) (*upstream.Minted, error) {
	p, err := c.running(ctx)
	if err != nil {
		return nil, err
	}
	c.turn <- struct{}{}
	same := equal(c.said, p.capabilities)
	<-c.turn
	if !same {
		return nil, unavailable(errors.New("the plug-in was started anew with other capabilities: the next request will fit them"))
	}
	var trailer metadata.MD
	answer, err := p.client.Mint(ctx, &pluginv1.MintRequest{Csr: r.CSR, Ttl: durationpb.New(r.TTL)}, grpc.Trailer(&trailer))
	if err != nil {
		return nil, explain(ctx, "Mint", err, trailer)
	}
	m := &upstream.Minted{}
	if m.Chain, err = upstream.ParseDER(2*upstream.MaxChain, answer.GetChain()); err != nil {
		return nil, fmt.Errorf("chain from the plug-in: %w", err)
	}
	if m.Roots, err = upstream.ParseDER(upstream.MaxRoots, answer.GetRoots()); err != nil {
		return nil, fmt.Errorf("roots from the plug-in: %w", err)
	}
	return m, nil
}

// equal is true if the two are the same as far as a process can say them.
func equal(a, b upstream.Capabilities) bool {
	return a.MinTTL == b.MinTTL && a.MaxTTL == b.MaxTTL && a.TTLGranularity == b.TTLGranularity && a.NoURI == b.NoURI
}

// WatchRoots implements upstream.RootWatcher. It passes on a change a second at the
// most. A process that does not watch is waited for.
func (c *CA) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	p, err := c.running(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.client.WatchRoots(ctx, &pluginv1.WatchRootsRequest{})
	if err != nil {
		return explain(ctx, "WatchRoots", err, nil)
	}
	var known [][]byte
	for {
		answer, err := stream.Recv()
		if status.Code(err) == codes.Unimplemented {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-p.done:
				return unavailable(p.err)
			}
		}
		if err != nil {
			return explain(ctx, "WatchRoots", err, stream.Trailer())
		}
		if slices.EqualFunc(answer.GetRoots(), known, bytes.Equal) {
			continue
		}
		known = answer.GetRoots()
		roots, err := upstream.ParseDER(upstream.MaxRoots, known)
		if err != nil {
			return fmt.Errorf("roots from the plug-in: %w", err)
		}
		if len(roots) == 0 {
			return errors.New("roots from the plug-in: there are none; it must send at least one")
		}
		if err := changed(roots); err != nil {
			return err
		}
		if err := backoff.Wait(ctx, time.Second); err != nil {
			return err
		}
	}
}

func unavailable(err error) error { return fmt.Errorf("%w: %w", upstream.ErrUnavailable, err) }

// explain gives an error of a call its kind, as upstream.proto says.
func explain(ctx context.Context, call string, err error, trailer metadata.MD) error {
	if ctx.Err() != nil {
		return unavailable(fmt.Errorf("%s of the plug-in: %w", call, context.Cause(ctx)))
	}
	s := status.Convert(err)
	text := s.Message()
	said := fmt.Errorf("%s of the plug-in: %s: %q", call, s.Code(), upstream.Cut(text))
	switch s.Code() { //nolint:exhaustive // the others are plain errors
	case codes.PermissionDenied, codes.Unauthenticated, codes.InvalidArgument, codes.FailedPrecondition, codes.Unimplemented:
		return fmt.Errorf("%w: %w", upstream.ErrDenied, said)
	case codes.Unavailable, codes.DeadlineExceeded:
		return unavailable(said)
	case codes.ResourceExhausted:
		// gRPC itself uses this code for a message that is too large.
		if strings.HasPrefix(text, "grpc: received message") {
			return said
		}
		limit := &upstream.RateLimitError{Err: said}
		if v := trailer.Get("retry-after"); len(v) > 0 {
			if seconds, err := strconv.ParseUint(v[0], 10, 31); err == nil {
				limit.RetryAfter = time.Duration(seconds) * time.Second
			}
		}
		return limit
	}
	if errors.Is(err, context.Canceled) {
		return unavailable(said)
	}
	return said
}
