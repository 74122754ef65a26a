package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// logPatience is how long a line waits for a reader that is slow. Once one has
	// waited in vain, the next ones do not wait until there is room again.
	logPatience = 50 * time.Millisecond
	// logPiece is what a pipe that is ready takes without blocking: PIPE_BUF.
	logPiece = 4096
)

// unblocked writes lines to a pipe or socket whose reader may stop: nobody who logs
// waits for it. Lines for which there is no room are lost, and counted in the log
// once there is.
type unblocked struct {
	file io.Writer
	conn syscall.RawConn
	note string // format of the line that says how many were lost: time, count

	mu   sync.Mutex // guards what follows, and the order of lines
	lost int
}

// Lines that say how many were lost.
const (
	textNote = "time=%s level=WARN msg=\"log lines were lost, nobody read them\" count=%d\n"
	jsonNote = `{"time":"%s","level":"WARN","msg":"log lines were lost, nobody read them","count":%d}` + "\n"
)

// unblock returns a writer that does not block where w is a file.
func unblock(w io.Writer, note string) io.Writer {
	f, ok := w.(*os.File)
	if !ok {
		return w
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return w
	}
	return &unblocked{file: f, conn: conn, note: note}
}

// Write writes one line, or loses it.
func (u *unblocked) Write(line []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	patience := logPatience
	if u.lost > 0 {
		patience = 0
	}
	if !u.ready(patience) {
		u.lost++
		return len(line), nil
	}
	if u.lost > 0 {
		if _, err := fmt.Fprintf(u.file, u.note, time.Now().Format(time.RFC3339Nano), u.lost); err != nil {
			return 0, err
		}
		u.lost = 0
	}
	written := 0
	for written < len(line) {
		if written > 0 && !u.ready(logPatience) {
			u.lost++ // the rest of a long line
			return len(line), nil
		}
		n, err := u.file.Write(line[written:min(written+logPiece, len(line))])
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// ready says whether a piece can be written without blocking.
func (u *unblocked) ready(patience time.Duration) bool {
	ready := true // if that cannot be known
	_ = u.conn.Control(func(fd uintptr) {
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}} //nolint:gosec // descriptors are small
		deadline := time.Now().Add(patience)
		for {
			n, err := unix.Poll(fds[:], int(max(time.Until(deadline), 0).Milliseconds()))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			ready = err != nil || n > 0
			return
		}
	})
	return ready
}
