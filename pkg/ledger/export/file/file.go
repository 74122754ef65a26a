// Package file writes records of the ledger to a file, one a line, for programs
// that ship files. It answers "which lines are on the disk". It does not know what
// is in a line.
//
// # Rotation
//
// When the file is too large or too old, it is renamed to PATH.TIME-INDEX, where
// TIME is now and INDEX that of the first record behind it, in 20 digits, and a new
// one is begun; the oldest are removed. Others may do the same: a file that was moved away or removed
// (logrotate) is begun anew at the next line, one that was cut (copytruncate) is
// gone on with.
//
// # Crashes
//
// Lines are durable before the cursor moves, so a crash loses none. What was
// written without the cursor is found again: the cursor says which bytes of the
// file belong to it, a line behind them that was not finished is cut off, and whole
// lines are compared with those that are written next, and not written again if
// they are the same.
package file

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/ledger/export"
)

const (
	defaultMaxBytes = 100 << 20
	defaultKeep     = 10
	recordBytes     = 16 << 20 // of one line; a record has 1 MiB at most
	pendingBytes    = 16 << 20 // of what is compared after a crash
	rotatedTime     = "20060102T150405Z"
	gzipSuffix      = ".gz"
	newSuffix       = ".new"
)

// rotatedName is what the name of a rotated file has behind the file's own.
var rotatedName = regexp.MustCompile(`^[0-9]{8}T[0-9]{6}Z-[0-9]{20}(\.gz)?$`)

// Config is the settings of one export to a file.
type Config struct {
	// Path of the file; it and those before it have mode 0600, and a folder that is
	// missing is made.
	Path string `yaml:"path"`
	// How a record is written: json (the ledger's own), ocsf or cef.
	Format string `yaml:"format" default:"json"`
	// Size at which the next file is begun.
	MaxBytes int64 `yaml:"max_bytes" default:"104857600"`
	// Age at which the next file is begun, when there is a record for it.
	MaxAge config.Duration `yaml:"max_age" default:"not by age"`
	// How many files are kept besides the one that is written.
	Keep int `yaml:"keep" default:"10"`
	// Whether files that were rotated are compressed.
	Gzip bool `yaml:"gzip" default:"false"`
}

// File is an export.Positioned that writes to a file.
type File struct {
	config Config
	format export.Format

	f       *os.File // nil until it is needed
	at      position
	pending []byte // lines behind at.Offset whose records the cursor does not cover
}

// position is a place in a file.
type position struct {
	Inode  uint64 `json:"inode"`
	Offset int64  `json:"offset"`
	// Since is when the file was begun.
	Since time.Time `json:"since"`
}

// New checks the settings. Its errors are *export.SettingErrors.
func New(c Config, formats export.Formats) (*File, error) {
	if c.Format == "" {
		c.Format = "json"
	}
	format, err := formats.Get(c.Format, "json", "ocsf", "cef")
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(c.Path) {
		return nil, export.Bad("path", "%q is not absolute: write a path that begins with /", c.Path)
	}
	c.Path = filepath.Clean(c.Path)
	if c.MaxBytes == 0 {
		c.MaxBytes = defaultMaxBytes
	}
	if c.MaxBytes < 1<<16 {
		return nil, export.Bad("max_bytes", "%d is too small: write 65536 or more", c.MaxBytes)
	}
	if c.MaxAge.Or(0) < 0 {
		return nil, export.Bad("max_age", "write a duration such as 24h")
	}
	if c.Keep == 0 {
		c.Keep = defaultKeep
	}
	if c.Keep < 0 || c.Keep > 10_000 {
		return nil, export.Bad("keep", "%d is out of range: write a number from 1 to 10000", c.Keep)
	}
	return &File{config: c, format: format}, nil
}

// Resume implements export.Positioned.
func (t *File) Resume(raw json.RawMessage) error {
	if raw == nil {
		return nil
	}
	if err := json.Unmarshal(raw, &t.at); err != nil {
		return fmt.Errorf("place in the file: %w", err)
	}
	return nil
}

// Position implements export.Positioned.
func (t *File) Position() (json.RawMessage, error) { return json.Marshal(t.at) }

// Send implements export.Target:
//
//  1. open the file, if it is not open or not the one at the path any more
//  2. begin the next one, if it is full or old
//  3. if it did: compress and remove old ones; an error here does not come again
//     with the next call, so old ones may have to wait for the next rotation
//  4. write the lines that are not in it, and make them durable
func (t *File) Send(_ context.Context, b export.Batch) error {
	if err := t.open(); err != nil {
		return err
	}
	lines := make([][]byte, 0, len(b.Entries))
	size := 0
	for _, e := range b.Entries {
		line, _ := export.Encode(t.format, e, recordBytes)
		lines = append(lines, append(line, '\n'))
		size += len(line) + 1
	}
	if t.full(int64(size)) {
		if err := t.rotate(b.First, time.Now()); err != nil {
			return err
		}
		if err := t.tidy(); err != nil {
			return err
		}
	}
	if err := t.write(lines); err != nil {
		return errors.Join(err, t.discard())
	}
	return nil
}

// open is step 1.
func (t *File) open() error {
	if t.f != nil {
		same, err := t.current()
		if err != nil {
			return err
		}
		if same {
			return nil
		}
		if err := t.f.Close(); err != nil {
			return err
		}
		t.f = nil
	}
	if err := t.folder(); err != nil {
		return err
	}
	f, err := os.OpenFile(t.config.Path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	if err := t.adopt(f); err != nil {
		return errors.Join(err, f.Close())
	}
	t.f = f
	return nil
}

// folder makes sure that nobody else can change the names in the file's folder.
func (t *File) folder() error {
	dir := filepath.Dir(t.config.Path)
	if err := durable.CheckDir(dir, 0o755); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.MkdirAll(dir, 0o700)
}

// current says whether the open file is the one at the path, and notes if it was cut.
func (t *File) current() (bool, error) {
	var open, named unix.Stat_t
	if err := unix.Fstat(int(t.f.Fd()), &open); err != nil {
		return false, &os.PathError{Op: "fstat", Path: t.config.Path, Err: err}
	}
	if err := unix.Lstat(t.config.Path, &named); errors.Is(err, unix.ENOENT) {
		return false, nil
	} else if err != nil {
		return false, &os.PathError{Op: "lstat", Path: t.config.Path, Err: err}
	}
	if open.Size < t.at.Offset {
		t.at.Offset, t.pending = open.Size, nil
	}
	return open.Ino == named.Ino && open.Dev == named.Dev, nil
}

// adopt finds out what is in a file that was just opened.
func (t *File) adopt(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: t.config.Path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Nlink != 1 {
		return fmt.Errorf("%w: %s is not a regular file of this user's with one name: move it away", durable.ErrUnsafe, t.config.Path)
	}
	at := t.at
	if at.Inode != st.Ino {
		// Begun anew, by whomever: all of it may be what the cursor does not cover.
		at = position{Inode: st.Ino, Since: time.Now()}
	}
	at.Offset = min(at.Offset, st.Size)
	pending, err := t.behind(f, &at, st.Size)
	if err != nil {
		return err
	}
	if st.Size == 0 {
		if err := durable.SyncDir(filepath.Dir(t.config.Path)); err != nil {
			return err
		}
	}
	t.at, t.pending = at, pending
	return nil
}

// behind returns the whole lines behind at.Offset, and cuts off what is behind
// those. If it is too much to be what a crash left, only its end is looked at.
func (t *File) behind(f *os.File, at *position, size int64) ([]byte, error) {
	foreign := size-at.Offset > pendingBytes
	if foreign {
		at.Offset = size - pendingBytes
	}
	text := make([]byte, size-at.Offset)
	if _, err := f.ReadAt(text, at.Offset); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	whole := bytes.LastIndexByte(text, '\n') + 1
	if foreign && whole == 0 {
		return nil, fmt.Errorf("the last %d bytes of %s are no lines: move it away", pendingBytes, t.config.Path)
	}
	if whole < len(text) {
		if err := f.Truncate(at.Offset + int64(whole)); err != nil {
			return nil, err
		}
	}
	if foreign {
		at.Offset += int64(whole)
		return nil, nil
	}
	return text[:whole], nil
}

// full says whether size more bytes belong in the next file.
func (t *File) full(size int64) bool {
	used := t.at.Offset + int64(len(t.pending))
	if used == 0 || len(t.pending) > 0 {
		return false // what is pending must be compared first
	}
	age := t.config.MaxAge.Or(0)
	return used+size > t.config.MaxBytes || age > 0 && time.Since(t.at.Since) >= age
}

// rotate is step 2. The file is renamed without replacing another one.
func (t *File) rotate(next uint64, now time.Time) error {
	to := fmt.Sprintf("%s.%s-%020d", t.config.Path, now.UTC().Format(rotatedTime), next)
	if err := unix.Renameat2(unix.AT_FDCWD, t.config.Path, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return &os.LinkError{Op: "rename", Old: t.config.Path, New: to, Err: err}
	}
	if err := durable.SyncDir(filepath.Dir(t.config.Path)); err != nil {
		return err
	}
	return t.open() // which finds that the file has moved
}

// tidy is step 3.
func (t *File) tidy() error {
	old, err := t.rotated()
	if err != nil {
		return err
	}
	for len(old) > t.config.Keep {
		if err := os.Remove(old[0]); err != nil {
			return err
		}
		old = old[1:]
	}
	for _, path := range old {
		if !t.config.Gzip || strings.HasSuffix(path, gzipSuffix) {
			continue
		}
		if err := compress(path); err != nil {
			return fmt.Errorf("compress: %w", err)
		}
	}
	return nil
}

// rotated lists the files that were rotated, oldest first.
func (t *File) rotated() ([]string, error) {
	dir, base := filepath.Split(t.config.Path)
	names, err := os.ReadDir(dir) // in the order of their names, which begin with a time
	if err != nil {
		return nil, err
	}
	var old []string
	for _, n := range names {
		if suffix, ok := strings.CutPrefix(n.Name(), base+"."); ok && rotatedName.MatchString(suffix) {
			old = append(old, filepath.Join(dir, n.Name()))
		}
	}
	return old, nil
}

// write is step 4.
func (t *File) write(lines [][]byte) error {
	var more []byte
	pending := t.pending
	for i, line := range lines {
		rest, found := bytes.CutPrefix(pending, line)
		if !found {
			more = bytes.Join(lines[i:], nil)
			pending = nil
			break
		}
		pending = rest
	}
	found := int64(len(t.pending) - len(pending))
	if pending == nil || len(more) > 0 {
		found = int64(len(t.pending)) // it stays, whatever it is: the new lines come behind it
	}
	if _, err := t.f.Write(more); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(t.f.Fd())); err != nil {
		return os.NewSyscallError("fdatasync", err)
	}
	t.at.Offset += found + int64(len(more))
	t.pending = pending
	return nil
}

// discard takes back what was written without success: it may be incomplete, and
// after a failed sync it is not known which of it is on the disk.
func (t *File) discard() error {
	f := t.f
	t.f = nil
	return errors.Join(f.Truncate(t.at.Offset+int64(len(t.pending))), f.Close())
}

// compress replaces a file by its compressed form.
func compress(path string) (err error) {
	in, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // only read from
	staging := path + gzipSuffix + newSuffix
	out, err := os.OpenFile(staging, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(staging))
		}
	}()
	w, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, in); err != nil {
		return err
	}
	if err := errors.Join(w.Close(), out.Sync()); err != nil {
		return err
	}
	if err := os.Rename(staging, path+gzipSuffix); err != nil {
		return err
	}
	return durable.Remove(path)
}
