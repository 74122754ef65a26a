package ledger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// pollInterval is how often Follow looks where the kernel cannot tell it of
// changes.
const pollInterval = time.Second

// Follow calls fn for each record of the journal in dir from index from on, in
// order, and then for each that is added, until ctx ends, fn returns an error or
// the journal is damaged; it returns that error. It serves other processes than
// the one that writes (which has Journal.Tail): the kernel wakes it when the
// directory changes, and like Scan it may see records that are not durable yet.
// The directory must exist; the journal may be begun later.
func Follow(ctx context.Context, dir string, from uint64, fn func(Entry) error) (err error) {
	w, err := watch(dir)
	if err != nil {
		return fmt.Errorf("follow ledger: %w", err)
	}
	defer func() { err = errors.Join(err, w.close()) }()
	// A reader that has no more to read waits in the kernel: the end of the
	// context must reach it there.
	stop := context.AfterFunc(ctx, w.interrupt)
	defer stop()

	c := &cursor{dir: dir, from: from}
	defer c.close()
	for {
		if err := c.drain(ctx, fn); err != nil {
			return err
		}
		if err := w.wait(ctx); err != nil {
			return err
		}
	}
}

// drain calls fn for all records that are there.
func (c *cursor) drain(ctx context.Context, fn func(Entry) error) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		f, err := c.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		e, err := c.entry(f)
		if err != nil {
			return err
		}
		if err := fn(e); err != nil {
			return err
		}
	}
}

// watcher waits for changes of a directory and the files in it.
type watcher struct {
	events *os.File // inotify; nil if there are no more of those
	buf    []byte
}

// watch begins to watch dir: changes from here on end the next wait.
func watch(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOSYS) {
		return &watcher{}, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	w := &watcher{events: os.NewFile(uintptr(fd), "inotify"), buf: make([]byte, 4096)}
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ONLYDIR)
	if err == nil {
		return w, nil
	}
	err = errors.Join(&os.PathError{Op: "watch", Path: dir, Err: err}, w.close())
	if errors.Is(err, unix.ENOSPC) { // the user's number of watches
		return &watcher{}, nil
	}
	return nil, err
}

// wait returns when something has changed since the last call.
func (w *watcher) wait(ctx context.Context) error {
	if w.events == nil {
		t := time.NewTimer(pollInterval)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	// What the events say does not matter: the reader looks at the files. Those
	// that do not fit in the buffer end the next wait at once.
	_, err := w.events.Read(w.buf)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("follow ledger: %w", err)
	}
	return nil
}

// interrupt ends waiting for good.
func (w *watcher) interrupt() {
	if w.events != nil {
		_ = w.events.SetReadDeadline(time.Unix(0, 1)) // then wait looks at its context
	}
}

// close ends the watch.
func (w *watcher) close() error {
	if w.events == nil {
		return nil
	}
	return w.events.Close()
}
