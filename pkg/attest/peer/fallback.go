package peer

// Before Linux 6.5 the kernel tells the number of the process that connected,
// not its pidfd, and by the time that the number is looked up it may belong to
// another process. What can be known instead: whoever has the number now and
// has had it since before the connection was made is the one that made it. So
// the listener keeps a time at which its queue was seen empty. A connection
// that is taken off the queue later was made after that time; a process that
// was started before it, still lives and has the number, made it.
//
// A process that connects within some 30 ms of its start cannot be told from
// one that was given the number of another. It is refused; its next attempt
// succeeds, since by then it is old enough.

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errUnproven says that the process may be younger than the connection.
var errUnproven = errors.New("process may be younger than its connection (kernel older than 6.5): it may try again")

// tick is the unit of a process's start time, USER_HZ, which is 100 on all
// architectures that Go supports.
const tick = 10 * time.Millisecond

// drainedEvery is how often the queue is looked at.
const drainedEvery = 20 * time.Millisecond

// drained knows when the queue of a listening socket was last seen empty.
type drained struct {
	socket *net.UnixListener
	raw    syscall.RawConn
	at     atomic.Int64 // CLOCK_BOOTTIME, nanoseconds
	quit   chan struct{}
	done   chan struct{}
}

// watchDrained begins to watch the queue of a socket that nobody has connected
// to before this program listened on it.
func watchDrained(socket *net.UnixListener) (*drained, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	d := &drained{socket: socket, raw: raw, quit: make(chan struct{}), done: make(chan struct{})}
	d.look()
	go d.run()
	return d, nil
}

func (d *drained) stop() {
	close(d.quit)
	<-d.done
}

func (d *drained) run() {
	defer close(d.done)
	t := time.NewTicker(drainedEvery)
	defer t.Stop()
	for {
		select {
		case <-d.quit:
			return
		case <-t.C:
			d.look()
		}
	}
}

// look notes the time if the queue is empty.
func (d *drained) look() {
	_ = d.raw.Control(func(fd uintptr) { // fails once the socket is closed
		now := boottime()
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // descriptors are small
		if n, err := unix.Poll(fds[:], 0); err == nil && n == 0 {
			d.at.Store(int64(now))
		}
	})
}

// accept takes one connection off the queue. It was made after since.
func (d *drained) accept() (c *net.UnixConn, since time.Duration, err error) {
	fd := -1
	var acceptErr error
	err = d.raw.Read(func(l uintptr) bool {
		// In this order: what is still in the queue now was not there then.
		since = time.Duration(d.at.Load())
		for {
			fd, _, acceptErr = unix.Accept4(int(l), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			if !errors.Is(acceptErr, unix.EINTR) && !errors.Is(acceptErr, unix.ECONNABORTED) {
				return !errors.Is(acceptErr, unix.EAGAIN)
			}
		}
	})
	if err == nil && acceptErr != nil {
		err = os.NewSyscallError("accept4", acceptErr)
	}
	if err != nil {
		// As net does it, so that a server can tell what is worth another try.
		if _, ok := errors.AsType[*net.OpError](err); !ok {
			err = &net.OpError{Op: "accept", Net: "unix", Addr: d.socket.Addr(), Err: err}
		}
		return nil, 0, err
	}
	f := os.NewFile(uintptr(fd), "connection")
	nc, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, 0, fmt.Errorf("accept: %w", err)
	}
	c, ok := nc.(*net.UnixConn)
	if !ok {
		return nil, 0, errors.Join(errors.New("accept: not a Unix socket"), nc.Close())
	}
	return c, since, nil
}

// openProven opens the process of cred by its number, if it has had it since
// before the time since.
func openProven(cred *unix.Ucred, since time.Duration) (pidfd int, err error) {
	pid := int(cred.Pid)
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, gone(err))
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	proc, err := OpenProcess(pid)
	if err != nil {
		return -1, err
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	stat, err := proc.Stat()
	if err != nil {
		return -1, err
	}
	// It lives, so it is one process that had the number all the while.
	if err := alive(fd, pid); err != nil {
		return -1, err
	}
	if err := checkStart(stat.StartTime, since); err != nil {
		return -1, fmt.Errorf("process %d: %w", pid, err)
	}
	return fd, nil
}

// checkStart refuses a process that was not certainly started before since.
// start is in ticks and rounded down.
func checkStart(start uint64, since time.Duration) error {
	if start >= uint64(since/tick) { //nolint:gosec // since is not negative
		return errUnproven
	}
	return nil
}

// boottime is the clock of a process's start time.
func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
