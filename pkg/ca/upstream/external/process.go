package external

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/ca/upstream"
	pluginv1 "github.com/meshid/meshid/proto/plugin/v1"
)

const (
	// socketVariable names the socket to the process.
	socketVariable = "MESHID_PLUGIN_SOCKET"
	// protocolVersion is the only one there is.
	protocolVersion = 1
	// maxLine bounds a line of the process in the log, and linesPerSecond their number.
	maxLine, linesPerSecond = 1 << 10, 20
	// maxSocketPath is what fits into a socket address of Linux.
	maxSocketPath = 107
)

// inherited are the variables that each process gets.
var inherited = []string{"HOME", "LANG", "LOGNAME", "PATH", "SSL_CERT_DIR", "SSL_CERT_FILE", "TMPDIR", "TZ", "USER"}

// process is one that was started and has shaken hands.
type process struct {
	cmd          *exec.Cmd
	stdin        io.Closer // its end tells the process to end
	dir          string    // holds the socket
	conn         *grpc.ClientConn
	client       pluginv1.UpstreamClient
	capabilities upstream.Capabilities
	startedAt    time.Time

	done    chan struct{} // closed when the process has ended; err and endedAt are set before
	err     error
	endedAt time.Time
}

// checkCommand refuses what can never be started, or could be replaced by others.
func checkCommand(command []string) error {
	if len(command) == 0 || !filepath.IsAbs(command[0]) {
		return errors.New("set command to a list: the absolute path of the plug-in's program, then its arguments")
	}
	path := command[0]
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("command: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return fmt.Errorf("command: %s is not an executable file: chmod +x it, or name its interpreter first", path)
	}
	if owner, ok := st.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 && int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("command: %s belongs to uid %d, who could replace it: chown it to root", path, owner.Uid)
	}
	if st.Mode()&0o022 != 0 {
		return fmt.Errorf("command: others can write to %s (mode %04o): run chmod go-w %s", path, st.Mode()&fs.ModePerm, path)
	}
	return nil
}

// start starts the process and shakes hands with it.
func start(ctx context.Context, c Config, logger *slog.Logger) (_ *process, err error) {
	if err := checkCommand(c.Command); err != nil {
		return nil, fmt.Errorf("%w: %w", upstream.ErrDenied, err)
	}
	dir, err := os.MkdirTemp("", "meshid-plugin-") // mode 0700
	if err != nil {
		return nil, unavailable(fmt.Errorf("make a folder for the plug-in's socket: %w", err))
	}
	p := &process{dir: dir, startedAt: time.Now(), done: make(chan struct{})}
	socket := filepath.Join(dir, "socket")
	if len(socket) > maxSocketPath {
		return nil, errors.Join(fmt.Errorf("%w: the path %s is too long for a socket: set TMPDIR to a shorter one", upstream.ErrDenied, socket), os.RemoveAll(dir))
	}
	if err := p.launch(c, socket, logger); err != nil {
		return nil, errors.Join(unavailable(err), os.RemoveAll(dir))
	}
	if err := p.shakeHands(ctx, socket); err != nil {
		err = errors.Join(err, p.stop())
		return nil, err
	}
	return p, nil
}

// launch starts the program in a process group of its own.
func (p *process) launch(c Config, socket string, logger *slog.Logger) error {
	p.cmd = exec.Command(c.Command[0], c.Command[1:]...) //nolint:gosec,noctx // the operator's program; it outlives the call that starts it, stop ends it
	p.cmd.Env = []string{socketVariable + "=" + socket}
	for _, name := range append(inherited, c.Environment...) {
		if v, ok := os.LookupEnv(name); ok {
			p.cmd.Env = append(p.cmd.Env, name+"="+v)
		}
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start the plug-in: %w", err)
	}
	p.stdin = stdin
	output, input, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the plug-in: %w", err)
	}
	p.cmd.Stdout, p.cmd.Stderr = input, input
	if err := p.cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("start the plug-in: %w", err), stdin.Close(), output.Close(), input.Close())
	}
	if err := input.Close(); err != nil { // the process has its own
		logger.Warn("pipe of the plug-in was not closed", "err", err)
	}
	logger = logger.With("pid", p.cmd.Process.Pid)
	go p.wait(output, logger)
	return nil
}

// wait passes on what the process writes, ends all that it leaves behind in its
// group, and notes how it ended.
func (p *process) wait(output *os.File, logger *slog.Logger) {
	passed := make(chan struct{})
	go func() {
		pass(output, logger)
		close(passed)
	}()
	err := p.cmd.Wait()
	p.endedAt = time.Now()
	// At once, while its number cannot be another's yet.
	if err := ignore(syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL), syscall.ESRCH); err != nil {
		logger.Warn("what the plug-in left behind was not ended", "err", err)
	}
	// One that has left the group may hold the pipe.
	if err := output.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		logger.Warn("pipe of the plug-in has no deadline", "err", err)
	}
	<-passed
	_ = output.Close() // it was only read
	p.err = errors.New("the plug-in ended by itself with exit code 0: it must run until its standard input ends")
	if err != nil {
		p.err = fmt.Errorf("the plug-in ended: %w; what it wrote is in the log", err)
	}
	if err := os.RemoveAll(p.dir); err != nil {
		logger.Warn("folder of the plug-in's socket was not removed", "path", p.dir, "err", err)
	}
	close(p.done)
}

// pass writes the lines of the process to the log until all who have the pipe have
// ended. Lines that are too many are counted and dropped.
func pass(output io.Reader, logger *slog.Logger) {
	r := bufio.NewReaderSize(output, maxLine)
	second, lines, dropped, within := time.Now(), 0, 0, false
	for {
		line, more, err := r.ReadLine()
		if err != nil {
			break
		}
		if within { // the rest of a line that is too long
			within = more
			continue
		}
		within = more
		if now := time.Now(); now.Sub(second) >= time.Second {
			if dropped > 0 {
				logger.Warn("plug-in wrote too much, lines were dropped", "lines", dropped)
			}
			second, lines, dropped = now, 0, 0
		}
		if lines++; lines > linesPerSecond {
			dropped++
			continue
		}
		logger.Info("plug-in says", "line", strings.ToValidUTF8(string(line), "\ufffd"))
	}
	if dropped > 0 {
		logger.Warn("plug-in wrote too much, lines were dropped", "lines", dropped)
	}
}

// ended says whether the process has.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// shakeHands connects, once the process listens.
func (p *process) shakeHands(ctx context.Context, socket string) error {
	var err error
	p.conn, err = grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the folder is ours alone
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithIdleTimeout(0),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: startTimeout,
		}))
	if err != nil {
		return unavailable(fmt.Errorf("connect to the plug-in: %w", err))
	}
	p.client = pluginv1.NewUpstreamClient(p.conn)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(startTimeout, func() {
		cancel(fmt.Errorf("no answer within %s of the start: does the plug-in listen on the socket that %s names?", startTimeout, socketVariable))
	})
	defer timer.Stop()
	go func() {
		select {
		case <-p.done:
			cancel(p.err)
		case <-ctx.Done():
		}
	}()
	hello, err := p.client.Handshake(ctx, &pluginv1.HandshakeRequest{ProtocolVersions: []uint32{protocolVersion}}, grpc.WaitForReady(true))
	if err != nil {
		return explain(ctx, "Handshake", err, nil)
	}
	if v := hello.GetProtocolVersion(); v != protocolVersion {
		return fmt.Errorf("%w: the plug-in speaks version %d of the protocol, and this CA version %d: install the one that fits", upstream.ErrDenied, v, protocolVersion)
	}
	if len(hello.GetName()) > 100 || len(hello.GetVersion()) > 100 {
		return fmt.Errorf("%w: the plug-in's name or version has more than 100 bytes", upstream.ErrDenied)
	}
	said := hello.GetCapabilities()
	p.capabilities.NoURI = said.GetNoUri()
	for _, limit := range []struct {
		name string
		from *durationpb.Duration
		to   *time.Duration
	}{
		{"min_ttl", said.GetMinTtl(), &p.capabilities.MinTTL},
		{"max_ttl", said.GetMaxTtl(), &p.capabilities.MaxTTL},
		{"ttl_granularity", said.GetTtlGranularity(), &p.capabilities.TTLGranularity},
	} {
		if limit.from == nil {
			continue
		}
		if *limit.to = limit.from.AsDuration(); limit.from.CheckValid() != nil || *limit.to < 0 || *limit.to > maxTTL {
			return fmt.Errorf("%w: the plug-in's capability %s is out of range: leave it out, or have it be from 0 to 100 years", upstream.ErrDenied, limit.name)
		}
	}
	if c := p.capabilities; c.MaxTTL > 0 && (c.MaxTTL < c.MinTTL || c.MaxTTL < c.TTLGranularity) {
		return fmt.Errorf("%w: the plug-in's capability max_ttl is below min_ttl or ttl_granularity", upstream.ErrDenied)
	}
	return nil
}

// stop ends the process: its standard input ends and it gets SIGTERM; after a while
// it is killed.
func (p *process) stop() error {
	var errs []error
	if p.conn != nil {
		errs = append(errs, p.conn.Close())
	}
	group := -p.cmd.Process.Pid
	errs = append(errs, ignore(p.stdin.Close(), os.ErrClosed))
	if !p.ended() {
		errs = append(errs, ignore(syscall.Kill(group, syscall.SIGTERM), syscall.ESRCH))
	}
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		errs = append(errs, ignore(syscall.Kill(group, syscall.SIGKILL), syscall.ESRCH),
			fmt.Errorf("the plug-in did not end within %s of the end of its standard input and SIGTERM, and was killed", stopTimeout))
		<-p.done
	}
	return errors.Join(errs...)
}

// ignore is err, unless it is what was to be expected.
func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}
