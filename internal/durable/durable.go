// Package durable writes small files so that a crash at any moment leaves the
// old content or the new one, never a mixture and never nothing, and reads
// secret files only if nobody else could have read or replaced them. It answers
// "is this file on the disk, and is it still ours". It does not know what is in
// the files.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrUnsafe is wrapped by errors about a file or directory that somebody else
// could have read, written or put in its place.
var ErrUnsafe = errors.New("unsafe file")

// step is told before each step of a replacement; tests stop the process, or
// return an error, there. A nil step does nothing.
type step func(name string) error

// at runs s, if there is one.
func (s step) at(name string) error {
	if s == nil {
		return nil
	}
	return s(name)
}

// WriteFile puts data at path with exactly the permissions perm (the umask is
// not applied). When it returns nil, data and name have reached the disk;
// whenever it is interrupted, a reader finds the previous content or the new
// one. A symbolic link at path is replaced, never followed. Concurrent calls
// for one path are put in an order, also between processes.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	return write(path, data, perm, 0, nil)
}

// CreateFile is WriteFile for a file that must not exist yet: if there is
// anything at path, it is left alone and the error wraps fs.ErrExist.
func CreateFile(path string, data []byte, perm fs.FileMode) error {
	return write(path, data, perm, unix.RENAME_NOREPLACE, nil)
}

// write is a replacement in numbered steps:
//
//  1. open the staging file next to path and lock it;
//  2. write it and make its content durable;
//  3. rename it to path;
//  4. make the rename durable.
//
// The staging file has a fixed name, so that an interrupted write leaves at most
// one, which the next write uses again.
func write(path string, data []byte, perm fs.FileMode, flags uint, s step) (err error) {
	if perm&^fs.ModePerm != 0 {
		return fmt.Errorf("write %s: mode %v has more than permission bits", path, perm)
	}
	dir, name := filepath.Split(path)
	if name == "" {
		return fmt.Errorf("write %s: no file name", path)
	}
	staging := filepath.Join(dir, "."+name+".new")
	f, err := openStaging(staging)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	renamed := false
	defer func() {
		if !renamed {
			// Still under the lock, so it is nobody else's.
			err = errors.Join(err, os.Remove(staging))
		}
		err = errors.Join(err, f.Close()) // and with it the lock
	}()
	if err := fill(f, data, perm, s); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := s.at("rename"); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, staging, unix.AT_FDCWD, path, flags); err != nil {
		return fmt.Errorf("write %s: %w", path, &os.LinkError{Op: "rename", Old: staging, New: path, Err: err})
	}
	renamed = true
	if err := s.at("sync directory"); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return s.at("done")
}

// fill gives f the content and permissions it is to have, durably.
func fill(f *os.File, data []byte, perm fs.FileMode, s step) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if err := s.at("write"); err != nil {
		return err
	}
	half := len(data) / 2
	if _, err := f.WriteAt(data[:half], 0); err != nil {
		return err
	}
	if err := s.at("write the rest"); err != nil {
		return err
	}
	if _, err := f.WriteAt(data[half:], int64(half)); err != nil {
		return err
	}
	if err := s.at("sync"); err != nil {
		return err
	}
	return f.Sync()
}

// openStaging opens and locks a staging file that only this user can touch.
// Whoever waited for the lock finds that the holder has renamed the file away,
// and starts again with a new one.
func openStaging(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EISDIR) {
			return nil, fmt.Errorf("%w: %s is not a regular file: remove it", ErrUnsafe, path)
		}
		if err != nil {
			return nil, err
		}
		current, err := lockStaging(f, path)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if current {
			return f, nil
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
}

// lockStaging waits for the lock on f and says whether path still names f.
func lockStaging(f *os.File, path string) (bool, error) {
	if err := flock(f, unix.LOCK_EX); err != nil {
		return false, fmt.Errorf("lock %s: %w", path, err)
	}
	var open, named unix.Stat_t
	if err := fstat(f, &open); err != nil {
		return false, err
	}
	if err := unix.Lstat(path, &named); errors.Is(err, unix.ENOENT) {
		return false, nil
	} else if err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if open.Dev != named.Dev || open.Ino != named.Ino {
		return false, nil
	}
	if open.Mode&unix.S_IFMT != unix.S_IFREG || open.Nlink != 1 || open.Uid != euid() {
		return false, fmt.Errorf("%w: %s was put there by somebody else: remove it", ErrUnsafe, path)
	}
	return true, nil
}

// Remove deletes the file at path, durably. That it does not exist is an error
// that wraps fs.ErrNotExist.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in dir durable: what was created in it, renamed or
// removed.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// MkdirAll makes sure that path is a directory that only this user can change:
// what is missing is created with exactly the permissions perm, durably, parents
// included; what exists must pass CheckDir with perm.
func MkdirAll(path string, perm fs.FileMode) error {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err == nil {
		return CheckDir(path, perm)
	}
	if !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	parent := filepath.Dir(filepath.Clean(path))
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	} else if err == nil {
		if err := os.Chmod(path, perm); err != nil { // the umask is not ours
			return err
		}
		if err := SyncDir(parent); err != nil {
			return err
		}
	}
	return CheckDir(path, perm)
}

// CheckDir reports, with an error that wraps ErrUnsafe, that path is a symbolic
// link, not a directory, owned by neither this user nor root, or gives group or
// others a permission that perm does not have.
func CheckDir(path string, perm fs.FileMode) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("%w: %s is not a directory", ErrUnsafe, path)
	}
	return checkOwner(path, &st, perm)
}

// ReadSecret returns the content of the file at path, which must be a regular
// file (a symbolic link is refused), owned by this user or root, with no
// permission for group and others, in a directory that nobody else can write,
// and no larger than limit. An error about that wraps ErrUnsafe.
func ReadSecret(path string, limit int64) (data []byte, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%w: %s is a symbolic link: name the file itself", ErrUnsafe, path)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := checkSecret(f, path); err != nil {
		return nil, err
	}
	data, err = io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: larger than %d bytes", path, limit)
	}
	return data, nil
}

// checkSecret examines the open file, not the name: what was checked is what is
// read.
func checkSecret(f *os.File, path string) error {
	var st unix.Stat_t
	if err := fstat(f, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%w: %s is not a regular file", ErrUnsafe, path)
	}
	if err := checkOwner(path, &st, 0o600); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	var parent unix.Stat_t
	if err := unix.Stat(dir, &parent); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if parent.Mode&unix.S_ISVTX != 0 { // as in /tmp: others cannot replace our file
		return nil
	}
	return checkOwner(dir, &parent, 0o755)
}

// checkOwner compares owner and permissions with what is allowed.
func checkOwner(path string, st *unix.Stat_t, allowed fs.FileMode) error {
	if st.Uid != euid() && st.Uid != 0 {
		return fmt.Errorf("%w: %s is owned by uid %d, this process is uid %d: chown it", ErrUnsafe, path, st.Uid, euid())
	}
	mode := fs.FileMode(st.Mode) & 0o777
	if excess := mode &^ allowed & 0o077; excess != 0 {
		return fmt.Errorf("%w: %s has mode %04o, more than %04o: chmod it", ErrUnsafe, path, mode, allowed)
	}
	return nil
}

// euid is this process's user.
func euid() uint32 {
	return uint32(os.Geteuid()) //nolint:gosec // G115: Linux user ids are 32 bits
}

// fstat fills st for f.
func fstat(f *os.File, st *unix.Stat_t) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := conn.Control(func(fd uintptr) { serr = unix.Fstat(int(fd), st) }); err != nil {
		return err
	}
	if serr != nil {
		return &os.PathError{Op: "fstat", Path: f.Name(), Err: serr}
	}
	return nil
}
