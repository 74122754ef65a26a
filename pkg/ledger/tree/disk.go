package tree

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/internal/durable"
)

// disk is what the writer needs of a file system. Tests put one in its place that
// fails before or after it has done its work.
type disk interface {
	// mkdir makes sure that a folder is there, and its parents, durably.
	mkdir(path string) error
	// write makes a file with this content, durably but for its name, in place of
	// any that is there.
	write(path string, b []byte) error
	rename(from, to string) error
	syncDir(path string) error
	// replace puts b at path: whenever it is interrupted, a reader finds the
	// previous content or the new one.
	replace(path string, b []byte) error
	removeAll(path string) error
}

// osDisk is the file system of the operating system.
type osDisk struct{}

func (osDisk) mkdir(path string) error             { return makeDir(path) }
func (osDisk) rename(from, to string) error        { return os.Rename(from, to) } //nolint:gosec // G703: the names are our own
func (osDisk) syncDir(path string) error           { return durable.SyncDir(path) }
func (osDisk) replace(path string, b []byte) error { return durable.WriteFile(path, b, 0o600) }
func (osDisk) removeAll(path string) error         { return os.RemoveAll(path) }

func (osDisk) write(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// makeDir makes sure that path is a directory that only this user can change. A
// new one is private; that others may read it is up to the operator, who may want
// a web server to.
func makeDir(path string) error {
	if err := durable.CheckDir(path, 0o755); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.MkdirAll(path, 0o700)
}
