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
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// settled is the age at which a process is certainly older than its next connection:
// drainedEvery, a tick, and what a busy machine adds.
const settled = 150 * time.Millisecond

// Settle waits until a listener can tell this process from one that is given its number:
// settled after its start before Linux 6.5, not at all since. Programs that do little
// else than connect call it first, for else they would be refused each time.
func Settle(ctx context.Context) error {
	if hasPeerPIDFD() {
		return nil
	}
	p, err := OpenProcess(os.Getpid())
	if err != nil {
		return err
	}
	defer p.Close() //nolint:errcheck // nothing was written
	stat, err := p.Stat()
	if err != nil {
		return err
	}
	age := boottime() - time.Duration(stat.StartTime)*tick //nolint:gosec // G115: it is in the past
	timer := time.NewTimer(settled - age)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// errUnproven says that the process may be younger than the connection.
var errUnproven = errors.New("process may be younger than its connection (kernel older than 6.5): it may try again")

// tick is the unit of a process's start time, USER_HZ, which is 100 on all
// architectures that Go supports.
const tick = 10 * time.Millisecond

// drainedEvery is how often the queue is looked at while nobody connects.
const drainedEvery = 20 * time.Millisecond

// drained knows when the queue of a listening socket was last seen empty.
// Accepts do not overlap.
type drained struct {
	socket *net.UnixListener
	raw    syscall.RawConn
	at     time.Duration // CLOCK_BOOTTIME
}

// watchDrained begins to watch the queue of a socket.
func watchDrained(socket *net.UnixListener) (*drained, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	d := &drained{socket: socket, raw: raw}
	d.look()
	return d, nil
}

// look notes the time if the queue is empty.
func (d *drained) look() {
	_ = d.raw.Control(func(fd uintptr) { // fails once the socket is closed
		now := boottime()
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // descriptors are small
		if n, err := unix.Poll(fds[:], 0); err == nil && n == 0 {
			d.at = now
		}
	})
}

// accept takes one connection off the queue. It was made after since: what is in
// the queue was not there when it was seen empty.
func (d *drained) accept() (c *net.UnixConn, since time.Duration, err error) {
	for {
		d.look()
		if err := d.socket.SetDeadline(time.Now().Add(drainedEvery)); err != nil {
			return nil, 0, err
		}
		c, err := d.socket.AcceptUnix()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		return c, d.at, err
	}
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
