package peer

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// watcher waits for the ends of all watched processes in one goroutine. Its
// epoll descriptor is itself watched by Go's poller, so that no thread blocks.
type watcher struct {
	file    *os.File
	conn    syscall.RawConn
	epoll   int
	stopped chan struct{}

	mu    sync.Mutex // guards what follows
	next  uint64
	peers map[uint64]*Peer
}

// shared is the watcher of this program. It exists while a listener or a Peer
// uses it.
var shared struct {
	mu   sync.Mutex // guards what follows
	w    *watcher
	uses int
}

// acquireWatcher returns the shared watcher, started if need be.
func acquireWatcher() (*watcher, error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.w == nil {
		w, err := startWatcher()
		if err != nil {
			return nil, err
		}
		shared.w = w
	}
	shared.uses++
	return shared.w, nil
}

// releaseWatcher ends one use of w; the last one stops it. It returns at once:
// who must know that the goroutine has ended waits for w.stopped if it is told
// that this was the last use.
func releaseWatcher(w *watcher) (last bool) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	shared.uses--
	if shared.uses > 0 {
		return false
	}
	shared.w = nil
	_ = w.file.Close() // wakes run
	return true
}

func startWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	// Non-blocking is what makes os.NewFile hand it to Go's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set epoll descriptor non-blocking: %w", err)
	}
	w := &watcher{
		file:    os.NewFile(uintptr(fd), "pidfd epoll"),
		epoll:   fd,
		stopped: make(chan struct{}),
		peers:   make(map[uint64]*Peer),
	}
	if w.conn, err = w.file.SyscallConn(); err != nil {
		_ = w.file.Close()
		return nil, fmt.Errorf("poll epoll descriptor: %w", err)
	}
	go w.run()
	return w, nil
}

// add begins to watch p, and sets p's watcher and key first.
func (w *watcher) add(p *Peer) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	key := w.next
	p.watcher, p.key = w, key
	w.peers[key] = p
	ev := event(key)
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, p.pidfd, &ev); err != nil {
		delete(w.peers, key)
		p.watcher = nil
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

// remove stops watching. pidfd is still open.
func (w *watcher) remove(key uint64, pidfd int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.peers[key]; !ok {
		return
	}
	delete(w.peers, key)
	// Closing the descriptor would do, were it not for a child of this program
	// that is between fork and exec and holds a copy.
	_ = unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, pidfd, nil)
}

// run tells the peers whose process has ended, until the watcher is released.
func (w *watcher) run() {
	defer close(w.stopped)
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := w.conn.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), events, 0)
			return n > 0 || (err != nil && !errors.Is(err, unix.EINTR))
		})
		if err != nil {
			return // released
		}
		for _, ev := range events[:max(n, 0)] {
			w.end(keyOf(ev))
		}
	}
}

// end is called when the process of a peer has ended.
func (w *watcher) end(key uint64) {
	w.mu.Lock()
	p := w.peers[key]
	w.mu.Unlock()
	if p == nil {
		return // closed meanwhile
	}
	p.finish()
	if p.onEnd != nil {
		p.onEnd()
	}
}

// event is one-shot: a process ends once.
func event(key uint64) unix.EpollEvent {
	return unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLONESHOT,
		Fd:     int32(uint32(key)),       //nolint:gosec // the lower half of 64 bits of user data
		Pad:    int32(uint32(key >> 32)), //nolint:gosec // the upper half
	}
}

func keyOf(ev unix.EpollEvent) uint64 {
	return uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32 //nolint:gosec // the inverse of event
}
