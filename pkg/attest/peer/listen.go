package peer

// The path of a connection, from accept to close; the functions stand in this
// order.
//
//  1. Accept takes it off the queue at once, so that the queue, which all users
//     of the machine share, does not fill.
//  2. take asks the kernel who connected and refuses whom it cannot tell.
//  3. admit counts it against the limits.
//  4. The watcher closes it when the process ends; else its reader does.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/mem"
)

// Default limits of a listener. A connection costs two descriptors; the usual
// hard limit of a service is some ten thousand times that. Where a process may
// have fewer, the limits are lower, so that a connection above them is refused,
// with the reason in the log, and not left waiting for a descriptor.
const (
	DefaultMaxConns             = 8192
	DefaultMaxConnsPerUID       = 4096
	DefaultMaxConnsPerContainer = 1024
)

// ErrPIDNamespace says that the kernel has no process id for the peer in this
// program's process id namespace.
var ErrPIDNamespace = errors.New("the process has no id in the agent's process id namespace: " +
	"run the agent in the host's process id namespace (docker run --pid=host; in a pod, hostPID: true)")

// Options of Listen. The zero value is good.
type Options struct {
	// Mode is the socket's permissions; 0 means 0666: who may have what is
	// decided by attestation, not by the file's mode. The directory, if it is
	// missing, is made with 0755.
	Mode os.FileMode
	// MaxConns bounds the open connections, MaxConnsPerUID those of one user,
	// MaxConnsPerContainer those of one container, whichever users it has; 0 means
	// the defaults. A connection above a bound is closed at once.
	MaxConns, MaxConnsPerUID, MaxConnsPerContainer int
	// Report is told when the socket's file is gone and cannot be made again, and
	// with nil when it is there again. It may be nil and must not block.
	Report func(error)
	// Logger and Registerer may be nil.
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	noPeerPIDFD bool // for tests: behave as on Linux before 6.5
}

// listener implements net.Listener.
type listener struct {
	addr    net.Addr
	options Options
	metrics *metrics
	watcher *watcher
	own     string // ownContainer
	pidfds  bool   // the kernel hands them out

	stopKeeping context.CancelFunc // nil for an abstract socket
	kept        chan struct{}      // closed when the keeper has ended
	complained  time.Time          // owned by the keeper

	mu      sync.Mutex // guards what follows
	socket  *net.UnixListener
	file    *socketFile // nil for an abstract socket; the keeper replaces it and may read it
	drained *drained    // nil where the kernel hands out pidfds
	closed  bool
	open    quota
	warned  map[reason]time.Time
	dropped map[reason]int // refusals since warned
}

// Listen listens on the Unix socket path; one that begins with "@" is in the
// abstract name space. A socket that nobody listens on any more is replaced
// atomically; anything else at path is an error. If the socket's file is taken
// away, it is made again within two seconds. Accept returns only
// connections whose process is known; Credentials and FromConn say which.
// ctx bounds the set-up only.
func Listen(ctx context.Context, path string, o Options) (net.Listener, error) {
	if o.Mode == 0 {
		o.Mode = 0o666
	}
	if o.MaxConns <= 0 {
		o.MaxConns = maxConns()
	}
	if o.MaxConnsPerUID <= 0 {
		o.MaxConnsPerUID = min(DefaultMaxConnsPerUID, max(1, o.MaxConns/2))
	}
	if o.MaxConnsPerContainer <= 0 {
		o.MaxConnsPerContainer = min(DefaultMaxConnsPerContainer, max(1, o.MaxConnsPerUID/4))
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Report == nil {
		o.Report = func(error) {}
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if _, err := procRoot(); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	w, err := acquireWatcher()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	socket, file, err := bind(ctx, path, o.Mode)
	if err != nil {
		releaseWatcher(w)
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l := &listener{
		socket: socket, file: file, addr: &net.UnixAddr{Net: "unix", Name: path},
		options: o, metrics: m, watcher: w,
		open:   newQuota("connections", o.MaxConns, o.MaxConnsPerUID, o.MaxConnsPerContainer),
		own:    ownContainer(),
		pidfds: !o.noPeerPIDFD && hasPeerPIDFD(),
		kept:   make(chan struct{}),
		warned: make(map[reason]time.Time), dropped: make(map[reason]int),
	}
	if !l.pidfds {
		if l.drained, err = watchDrained(socket); err != nil {
			return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
		}
		o.Logger.WarnContext(ctx, "kernel does not tell the pidfd of a peer, processes younger than their connection are refused once",
			"since", "linux 6.5")
	}
	if file != nil {
		var keeping context.Context
		keeping, l.stopKeeping = context.WithCancel(context.WithoutCancel(ctx))
		go l.keep(keeping, newFolderWatch(filepath.Dir(path)))
	}
	return l, nil
}

// spareDescriptors are not for connections: files, connections to others, and
// what attestation opens for a moment.
const spareDescriptors = 192

// maxConns returns how many connections the descriptors of this process allow.
func maxConns() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur > 2*DefaultMaxConns+spareDescriptors {
		return DefaultMaxConns
	}
	all := int(l.Cur)
	return max(8, min((all-spareDescriptors)/2, DefaultMaxConns))
}

// Addr returns the path.
func (l *listener) Addr() net.Addr { return l.addr }

// Close ends listening and removes the socket file if it is still the one that
// Listen made. Open connections stay.
func (l *listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return net.ErrClosed
	}
	l.closed = true
	l.mu.Unlock()

	if l.stopKeeping != nil {
		l.stopKeeping()
		<-l.kept
	}
	var err error
	if l.file != nil {
		err = l.file.remove()
	}
	err = errors.Join(err, l.socket.Close())
	if releaseWatcher(l.watcher) {
		<-l.watcher.stopped
	}
	return err
}

// Accept returns the next connection whose process is known.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, since, err := l.accept()
		if err != nil {
			return nil, err
		}
		pc, r, err := l.take(c, since)
		if err != nil {
			l.refuse(r, err)
			_ = c.Close()
			continue
		}
		return pc, nil
	}
}

// accept takes one connection off the queue. since is a time (CLOCK_BOOTTIME)
// at which it had not been made yet; it is only known in the fallback.
func (l *listener) accept() (c *net.UnixConn, since time.Duration, err error) {
	for {
		l.mu.Lock()
		socket, drained, closed := l.socket, l.drained, l.closed
		l.mu.Unlock()
		if drained != nil {
			c, since, err = drained.accept()
		} else {
			c, err = socket.AcceptUnix()
		}
		if !errors.Is(err, net.ErrClosed) || closed || !l.replaced(socket) {
			return c, since, err
		}
	}
}

// replaced says whether another socket has taken the place of one.
func (l *listener) replaced(socket *net.UnixListener) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.socket != socket
}

// take makes a connection with a Peer out of c, or says why it is refused.
func (l *listener) take(c *net.UnixConn, since time.Duration) (net.Conn, reason, error) {
	cred, pidfd, err := l.ask(c, since)
	if err != nil {
		return nil, reasonOf(err), err
	}
	p := &Peer{
		PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid,
		proven: l.pidfds, done: make(chan struct{}), pidfd: pidfd,
	}
	// What cannot be read (the administrator hides processes) is in no container,
	// and bounded by its user.
	p.own = l.own
	p.container, err = container(p.PID, l.own)
	if err != nil {
		l.options.Logger.Debug("container of a process is not known", "pid", p.PID, "err", err)
	}
	if err := p.Alive(); err != nil {
		return nil, reasonOf(err), errors.Join(err, p.Close())
	}
	if r, err := l.admit(p); err != nil {
		return nil, r, errors.Join(err, p.Close())
	}
	raw, err := c.SyscallConn()
	if err != nil {
		l.leave(p)
		return nil, reasonError, errors.Join(err, p.Close())
	}
	pc := &conn{Conn: c, peer: p, listener: l, raw: raw}
	pc.read = pc.readOnce
	p.onEnd = func() { _ = pc.Close() }
	if err := p.watch(); err != nil {
		l.leave(p)
		return nil, reasonError, errors.Join(err, p.Close())
	}
	return pc, "", nil
}

// ask returns the credentials that the kernel noted at connect, and the pidfd.
func (l *listener) ask(c *net.UnixConn, since time.Duration) (*unix.Ucred, int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, -1, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr, fdErr error
	pidfd := -1
	err = raw.Control(func(fd uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr != nil {
			return
		}
		if cred.Pid > 0 && l.pidfds {
			pidfd, fdErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	})
	if err := errors.Join(err, credErr); err != nil {
		return nil, -1, fmt.Errorf("peer credentials: %w", err)
	}
	if err := checkPID(cred.Pid); err != nil {
		return nil, -1, err
	}
	if !l.pidfds {
		pidfd, err = openProven(cred, since)
		return cred, pidfd, err
	}
	if fdErr != nil {
		if errors.Is(fdErr, unix.EINVAL) { // what Linux before 6.16 says of a process that was waited for
			fdErr = ErrGone
		}
		return nil, -1, fmt.Errorf("pidfd of process %d: %w", cred.Pid, gone(fdErr))
	}
	return cred, pidfd, nil
}

// checkPID refuses the ids by which the kernel says that it cannot name the
// process here.
func checkPID(pid int32) error {
	if pid <= 0 {
		return fmt.Errorf("peer has process id %d: %w", pid, ErrPIDNamespace)
	}
	return nil
}

// admit counts one connection of a process.
func (l *listener) admit(p *Peer) (reason, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r, err := l.open.enter(p.UID, p.container); err != nil {
		return r, err
	}
	l.metrics.connections.Inc()
	return "", nil
}

// leave is the inverse of admit.
func (l *listener) leave(p *Peer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open.leave(p.UID, p.container)
	l.metrics.connections.Dec()
}

// refuse counts a refusal, and logs at most one a minute of each kind.
func (l *listener) refuse(r reason, err error) {
	l.metrics.refusals[r].Inc()
	now := time.Now()
	l.mu.Lock()
	l.dropped[r]++
	n := l.dropped[r]
	due := now.Sub(l.warned[r]) >= time.Minute
	if due {
		l.warned[r] = now
		l.dropped[r] = 0
	}
	l.mu.Unlock()
	switch {
	case r == reasonGone:
		l.options.Logger.Debug("refused a connection whose process has ended", "err", err)
	case due:
		l.options.Logger.Warn("refused connections to the socket", "reason", string(r), "refused", n, "err", err)
	}
}

// reasonOf maps an error of ask to its reason.
func reasonOf(err error) reason {
	switch {
	case errors.Is(err, ErrPIDNamespace):
		return reasonNamespace
	case errors.Is(err, ErrGone):
		return reasonGone
	case errors.Is(err, errUnproven):
		return reasonUnproven
	default:
		return reasonError
	}
}

// conn is a connection with a known process.
type conn struct {
	net.Conn
	peer     *Peer
	listener *listener
	once     sync.Once

	raw  syscall.RawConn
	read func(fd uintptr) bool // readOnce, made once
	// Owned by ReadOnReady, of which one runs at a time.
	pool   mem.BufferPool
	size   int
	filled *[]byte
	n      int
	err    error
}

// FromConn returns the process at the other end of a connection of Listen.
func FromConn(c net.Conn) (*Peer, bool) {
	pc, ok := c.(*conn)
	if !ok {
		return nil, false
	}
	return pc.peer, true
}

// Close closes the connection and its Peer.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		err = errors.Join(c.Conn.Close(), c.peer.Close())
		c.listener.leave(c.peer)
	})
	return err
}

// ReadOnReady waits until there is something to read, and only then takes a buffer of
// size bytes from pool and reads into it: connections are silent for nearly all of
// their life, and have no buffer then. gRPC looks for this method; the caller puts the
// buffer back. There may be one call at a time, and none of Read beside it.
func (c *conn) ReadOnReady(size int, pool mem.BufferPool) (*[]byte, int, error) {
	c.size, c.pool = size, pool
	err := c.raw.Read(c.read)
	filled, n, failed := c.filled, c.n, c.err
	c.pool, c.filled, c.n, c.err = nil, nil, 0, nil
	if err = cmp.Or(err, failed); err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil && filled != nil {
		pool.Put(filled)
		return nil, 0, err
	}
	return filled, n, err
}

// readOnce reads what is there, and returns false if that is nothing yet.
func (c *conn) readOnce(fd uintptr) bool {
	b := c.pool.Get(c.size)
	n, err := unix.Read(int(fd), *b)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(int(fd), *b)
	}
	if errors.Is(err, unix.EAGAIN) {
		c.pool.Put(b)
		return false
	}
	c.filled, c.n, c.err = b, n, os.NewSyscallError("read", err)
	return true
}

// hasPeerPIDFD says whether the kernel has SO_PEERPIDFD (Linux 6.5).
func hasPeerPIDFD() bool {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fds[0]) //nolint:errcheck // nothing was written
	defer unix.Close(fds[1]) //nolint:errcheck // nothing was written
	fd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
}
