package peer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is what fits into sockaddr_un with its final NUL.
const maxPath = 107

// socketFile is a bound socket in the file system.
type socketFile struct {
	path     string
	dev, ino uint64
}

// CheckPath says whether a path can be that of a Unix socket.
func CheckPath(path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("path has %d bytes, a Unix socket's at most %d: choose a shorter one", len(path), maxPath)
	}
	return nil
}

// bind makes the listening socket. In the file system it is bound to a
// temporary name, given its mode, and moved over path, so that at each moment
// path is either the old socket or the new one, ready.
func bind(ctx context.Context, path string, mode os.FileMode) (*net.UnixListener, *socketFile, error) {
	if err := CheckPath(path); err != nil {
		return nil, nil, err
	}
	if strings.HasPrefix(path, "@") {
		l, err := listenUnix(ctx, path)
		return l, nil, err
	}
	if !filepath.IsAbs(path) {
		return nil, nil, errors.New("path must be absolute")
	}
	dir, base := filepath.Split(filepath.Clean(path))
	fd, err := openDir(dir)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	if err := checkStale(ctx, fd, base, path); err != nil {
		return nil, nil, err
	}

	temp := "." + strings.ToLower(rand.Text()[:12])
	// Through the descriptor, the name is short whatever the path.
	l, err := listenUnix(ctx, fmt.Sprintf("/proc/self/fd/%d/%s", fd, temp))
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false)
	var st unix.Stat_t
	steps := []func() error{
		func() error { return unix.Fchmodat(fd, temp, uint32(mode.Perm()), 0) },
		func() error { return unix.Fstatat(fd, temp, &st, unix.AT_SYMLINK_NOFOLLOW) },
		func() error { return unix.Renameat(fd, temp, fd, base) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("put socket in place: %w", err), unix.Unlinkat(fd, temp, 0), l.Close())
		}
	}
	return l, &socketFile{path: path, dev: st.Dev, ino: st.Ino}, nil
}

func listenUnix(ctx context.Context, name string) (*net.UnixListener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(errors.New("not a Unix listener"), l.Close())
	}
	return ul, nil
}

// openDir opens the socket's directory, made if it is missing, and refuses one
// in which others may put their own socket in our place.
func openDir(dir string) (int, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	fd, err := unix.Open(dir, flags, 0)
	if errors.Is(err, unix.ENOENT) {
		if err := makeDir(dir); err != nil {
			return -1, err
		}
		fd, err = unix.Open(dir, flags, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open directory %s: %w", dir, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, errors.Join(fmt.Errorf("stat %s: %w", dir, err), unix.Close(fd))
	}
	if st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
		return -1, errors.Join(fmt.Errorf("directory %s has mode %#o: others could replace the socket: chmod it to 0755", dir, st.Mode&0o7777), unix.Close(fd))
	}
	if uid := os.Geteuid(); st.Uid != 0 && int(st.Uid) != uid {
		return -1, errors.Join(fmt.Errorf("directory %s belongs to uid %d, who could replace the socket: chown it to root or uid %d", dir, st.Uid, uid), unix.Close(fd))
	}
	return fd, nil
}

// makeDir makes dir with mode 0755, whatever the umask.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // all users' workloads connect
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // all users' workloads connect
		return err
	}
	return nil
}

// checkStale returns nil if there is nothing at the name, or a socket that
// nobody listens on.
func checkStale(ctx context.Context, dir int, base, path string) error {
	var st unix.Stat_t
	err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return errors.New("is a symbolic link: remove it")
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return errors.New("exists and is not a socket: choose another path")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return fmt.Errorf("find out whether the socket is in use: %w", err)
	}
	defer c.Close() //nolint:errcheck // nothing was written
	who := "another process"
	if cred, err := listenerOf(c); err == nil && cred.Pid > 0 {
		who = fmt.Sprintf("process %d", cred.Pid)
	}
	return fmt.Errorf("%s listens there: stop it first, or choose another path", who)
}

// listenerOf returns who listens at the other end of c.
func listenerOf(c net.Conn) (*unix.Ucred, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a Unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(err, credErr)
}

// remove removes the socket unless another has taken its place.
func (s *socketFile) remove() error {
	var st unix.Stat_t
	if err := unix.Lstat(s.path, &st); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		return fmt.Errorf("remove socket %s: %w", s.path, err)
	}
	if st.Dev != s.dev || st.Ino != s.ino {
		return nil
	}
	if err := unix.Unlink(s.path); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove socket %s: %w", s.path, err)
	}
	return nil
}
