package ledger

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/internal/durable"
)

// disk is what the writer needs of a file system. Tests put one in its place
// that fails before or after it has done its work.
type disk interface {
	// create makes an empty file, in place of any that is there.
	create(path string) (file, error)
	// open opens an existing file for writing.
	open(path string) (file, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(dir string) error
}

// file is an open file of a disk.
type file interface {
	WriteAt(p []byte, offset int64) (int, error)
	Truncate(size int64) error
	// allocate reserves blocks for n bytes from offset on, behind the end of the
	// file, and writes zeros to them.
	allocate(offset, n int64) error
	// dataSync makes the content durable, and the size, if that is needed to read
	// the content.
	dataSync() error
	// Sync makes content and all attributes durable.
	Sync() error
	Close() error
}

// osDisk is the file system of the operating system.
type osDisk struct{}

func (osDisk) create(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) open(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) rename(from, to string) error { return os.Rename(from, to) } //nolint:gosec // G703: within the folder that the operator has named
func (osDisk) remove(path string) error     { return os.Remove(path) }
func (osDisk) syncDir(dir string) error     { return durable.SyncDir(dir) }

// osFile is a file of an osDisk.
type osFile struct{ *os.File }

func (f osFile) allocate(offset, n int64) error {
	if err := f.control("allocate", func(fd int) error { return unix.Fallocate(fd, 0, offset, n) }); err != nil {
		return err
	}
	_, err := f.WriteAt(make([]byte, n), offset)
	return err
}

func (f osFile) dataSync() error { return f.control("fdatasync", unix.Fdatasync) }

// control calls do with the descriptor, again if a signal interrupts it.
func (f osFile) control(op string, do func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var derr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if derr = do(int(fd)); !errors.Is(derr, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	if derr != nil {
		return &os.PathError{Op: op, Path: f.Name(), Err: derr}
	}
	return nil
}

// noSpace reports whether err says that there is no room for more.
func noSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
