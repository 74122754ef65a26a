package peer

// A socket's file can be taken away while it is listened on: somebody cleans /run,
// removes the folder, mounts a file system over it. Nobody can connect then, and
// the listener does not notice. The keeper does, and makes the socket again, with
// the same checks as at the start: what somebody else has put in its place is
// reported and left alone. Connections that are open are not touched.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// keepEvery is how often the file is looked at without an event: a mount over
	// the folder, or a folder above it that is renamed, causes none.
	keepEvery = time.Second
	// keepPause is between an event and the look: whoever removes the folder may
	// need a moment for it, and in one that all can write (/tmp) others can cause
	// any number of events.
	keepPause = 20 * time.Millisecond
)

// keep looks after the socket file until ctx ends.
func (l *listener) keep(ctx context.Context, w *folderWatch) {
	defer close(l.kept)
	defer w.close()
	stop := context.AfterFunc(ctx, w.interrupt)
	defer stop()
	for ctx.Err() == nil {
		w.wait(ctx, keepEvery)
		select {
		case <-ctx.Done():
			return
		case <-time.After(keepPause):
		}
		w.follow() // before the look, so that nothing happens between them unseen
		if !l.file.there() {
			l.restore(ctx)
			w.follow() // the folder may be a new one
		}
	}
}

// restore makes the socket again.
func (l *listener) restore(ctx context.Context) {
	path := l.addr.String()
	socket, file, err := bind(ctx, path, l.options.Mode)
	if err == nil {
		err = l.replace(socket, file)
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		err = fmt.Errorf("the socket %s is gone and cannot be made again: %w", path, err)
		if now := time.Now(); now.Sub(l.complained) >= time.Minute {
			l.complained = now
			l.options.Logger.ErrorContext(ctx, "socket is gone and cannot be made again", "err", err)
		}
	} else {
		l.complained = time.Time{}
		l.metrics.restored.Inc()
		l.options.Logger.WarnContext(ctx, "socket was gone and is made again", "path", path)
	}
	l.options.Report(err)
}

// replace puts a new socket into the place of the one that nobody can reach any
// more. Accept goes on with it.
func (l *listener) replace(socket *net.UnixListener, file *socketFile) error {
	var d *drained
	if !l.pidfds {
		var err error
		if d, err = watchDrained(socket); err != nil {
			return errors.Join(err, file.remove(), socket.Close())
		}
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return errors.Join(net.ErrClosed, file.remove(), socket.Close())
	}
	old := l.socket
	l.socket, l.file, l.drained = socket, file, d
	l.mu.Unlock()
	return old.Close()
}

// there says whether the file is still the one that was made.
func (s *socketFile) there() bool {
	var st unix.Stat_t
	return unix.Lstat(s.path, &st) == nil && st.Dev == s.dev && st.Ino == s.ino
}

// folderWatch waits for changes in a folder. Where the kernel gives it nothing to
// wait with (the user has too many already), it waits for the time only.
type folderWatch struct {
	path   string
	events *os.File // of inotify; nil if there is none
}

func newFolderWatch(path string) *folderWatch {
	w := &folderWatch{path: path}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return w
	}
	w.events = os.NewFile(uintptr(fd), "inotify")
	w.follow()
	return w
}

// follow watches the folder that has the path now, if it does not yet. One that was watched before and
// is gone is not watched any more, by the kernel's doing.
func (w *folderWatch) follow() {
	if w.events == nil {
		return
	}
	conn, err := w.events.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) { // whatever fails, there is the time
		_, _ = unix.InotifyAddWatch(int(fd), w.path, unix.IN_ONLYDIR|
			unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF)
	})
}

// wait returns when something has changed, after a time, or when ctx ends.
func (w *folderWatch) wait(ctx context.Context, most time.Duration) {
	if w.events == nil {
		timer := time.NewTimer(most)
		defer timer.Stop()
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		return
	}
	var buf [4096]byte
	if err := w.events.SetReadDeadline(time.Now().Add(most)); err != nil {
		return
	}
	if ctx.Err() != nil { // interrupt came before
		return
	}
	_, _ = w.events.Read(buf[:]) // what it was does not matter: the file is looked at
}

// interrupt ends a wait.
func (w *folderWatch) interrupt() {
	if w.events != nil {
		_ = w.events.SetReadDeadline(time.Unix(1, 0))
	}
}

func (w *folderWatch) close() {
	if w.events != nil {
		_ = w.events.Close()
	}
}
