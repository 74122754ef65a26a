// Package peer answers "which process is at the other end of this Unix socket?"
//
// The kernel's answer is taken when a connection is accepted, before a byte of
// it is read, and it is held as a pidfd: a process id can be given to another
// process, a pidfd cannot. What is read about the process later goes through a
// directory of procfs that was opened while the pidfd said that the process
// lives, so that it stays that process's directory.
//
// The answer is about the process that called connect. Whoever is given the
// descriptor of that connection, or has his bytes relayed through it, speaks as
// that process: a relay is trusted by who set it up, and cannot choose whom it
// speaks for. When the process ends, its connections are closed, whoever else
// holds them.
//
// The package knows no attribute, no rule and no protocol but the thin layer
// that hands a Peer to gRPC's handlers.
package peer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrGone says that the process has ended, or that the Peer was closed.
var ErrGone = errors.New("process has ended")

// Peer is one process. Its methods may be called concurrently.
type Peer struct {
	// PID is the process id in the namespace of this program.
	PID int
	// UID and GID are the effective ids that the process had when it connected,
	// as seen from this program's user namespace.
	UID, GID uint32

	container string // see containerOf
	own       string // the container that this program is in, likewise
	// proven: the kernel handed out the pidfd, and it was not opened by number, as it
	// has to be before 6.5; see fallback.go.
	proven bool
	done   chan struct{} // closed once
	onEnd  func()        // called by the watcher when the process has ended

	watcher *watcher // nil if nothing is watched
	key     uint64   // in watcher

	mu     sync.RWMutex // guards what follows
	pidfd  int          // -1: there is no process behind this Peer
	closed bool
	ended  sync.Once // closes done
}

// Open returns the process that has the id pid now. UID and GID are its
// effective ids. The caller closes the Peer. An error wraps ErrGone if there is
// no such process.
func Open(pid int) (*Peer, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("open process %d: not a process id", pid)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, gone(err))
	}
	p := &Peer{PID: pid, proven: true, done: make(chan struct{}), pidfd: fd}
	if err := p.readIDs(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	if err := p.watch(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return p, nil
}

// ForTest returns a Peer without a process behind it: it is alive until it is
// closed, needs no goroutine (so it can be used in a testing/synctest bubble),
// and Process fails. Programs never call it.
func ForTest(pid int, uid, gid uint32) *Peer {
	return &Peer{PID: pid, UID: uid, GID: gid, proven: true, done: make(chan struct{}), pidfd: -1}
}

// Alive returns nil while the process lives, else an error that wraps ErrGone.
// A process that has ended and has not been waited for is not alive.
func (p *Peer) Alive() error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	switch {
	case p.closed:
		return fmt.Errorf("process %d: connection closed: %w", p.PID, ErrGone)
	case p.pidfd < 0:
		return nil
	default:
		return alive(p.pidfd, p.PID)
	}
}

// Done is closed when the process has ended, or when the Peer is closed.
func (p *Peer) Done() <-chan struct{} { return p.done }

// Elsewhere says in which container the process is, if this program is not in the same
// one, and returns nil otherwise. Root in a container has the user id of root here, and
// whatever is mounted there: its word does not count for more than its container's. It is
// known by process id namespaces, which the kernel tells of whoever hides processes, and
// by control groups, where those can be read.
func (p *Peer) Elsewhere() error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed || p.pidfd < 0 {
		return nil
	}
	if p.container != "" && p.container != p.own {
		return fmt.Errorf("process %d is in the container %.200s", p.PID, p.container[strings.LastIndexByte(p.container, '/')+1:])
	}
	nested, err := nestedPID(p.pidfd)
	if err != nil {
		return fmt.Errorf("process %d: its process id namespace is not known: %w", p.PID, err)
	}
	if nested {
		return fmt.Errorf("process %d is in a process id namespace of its own, which is a container's", p.PID)
	}
	return nil
}

// nestedPID says whether the process of a pidfd is in a process id namespace below this
// program's. It cannot be in one above: the kernel has no id for such a process.
func nestedPID(pidfd int) (bool, error) {
	root, err := procRoot()
	if err != nil {
		return false, err
	}
	info, err := readProc(root, fmt.Sprintf("%d/fdinfo/%d", os.Getpid(), pidfd))
	if err != nil {
		return false, err
	}
	for line := range bytes.Lines(info) {
		if ids, ok := bytes.CutPrefix(line, []byte("NSpid:")); ok {
			return len(bytes.Fields(ids)) > 1, nil // its id here, and in each namespace below
		}
	}
	return false, errors.New("the kernel does not say")
}

// Close releases the descriptors. The listener calls it when the connection is
// closed; the caller of Open calls it himself. More calls do nothing.
func (p *Peer) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	fd := p.pidfd
	p.pidfd = -1
	p.mu.Unlock()

	p.finish()
	var err error
	if p.watcher != nil {
		p.watcher.remove(p.key, fd)
		releaseWatcher(p.watcher)
	}
	if fd >= 0 {
		err = unix.Close(fd)
	}
	return err
}

// finish closes Done.
func (p *Peer) finish() {
	p.ended.Do(func() { close(p.done) })
}

// watch begins to watch the pidfd. It is called once, before p is shared.
func (p *Peer) watch() error {
	w, err := acquireWatcher()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	if err := w.add(p); err != nil {
		releaseWatcher(w)
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	return nil
}

// readIDs fills UID and GID from procfs.
func (p *Peer) readIDs() error {
	proc, err := p.Process()
	if err != nil {
		return err
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	s, err := proc.Status()
	if err != nil {
		return err
	}
	p.UID, p.GID = s.EffectiveUID, s.EffectiveGID
	return nil
}

// alive asks a pidfd whether its process lives. poll is asked and not
// pidfd_send_signal, since that needs a permission and takes a zombie for alive.
func alive(pidfd, pid int) error {
	fds := [1]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}} //nolint:gosec // descriptors are small
	for {
		n, err := unix.Poll(fds[:], 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("poll pidfd of process %d: %w", pid, err)
		case n != 0:
			return fmt.Errorf("process %d: %w", pid, ErrGone)
		default:
			return nil
		}
	}
}

// gone turns the errors by which the kernel says that a process is not there
// any more into ErrGone.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return ErrGone
	}
	return err
}
