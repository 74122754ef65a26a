package peer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// maxProcFile bounds what is read of a file of procfs: /proc/<pid>/status with
// 65,536 supplementary groups, the kernel's limit, has 0.7 MB.
const maxProcFile = 1 << 20

// Process is the open /proc/<pid> directory of one process. It stays that
// process's directory for ever: once the process has ended, reads fail with
// ErrGone, even if its id has been given to another. It is not for concurrent
// use.
type Process struct {
	pid int
	dir int
}

// Process opens the peer's directory in procfs. The caller closes it. An error
// wraps ErrGone if the process has ended.
func (p *Peer) Process() (*Process, error) {
	if err := p.Alive(); err != nil {
		return nil, err
	}
	proc, err := OpenProcess(p.PID)
	if err != nil {
		return nil, err
	}
	// The process lives now, so it lived, and had its id, when the directory
	// was opened.
	if err := p.Alive(); err != nil {
		return nil, errors.Join(err, proc.Close())
	}
	return proc, nil
}

// OpenProcess opens the directory of the process that has the id pid now.
// Prefer Peer.Process, which knows which process is meant.
func OpenProcess(pid int) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("open /proc/%d: not a process id", pid)
	}
	root, err := procRoot()
	if err != nil {
		return nil, err
	}
	dir, err := openBelow(root, strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("open /proc/%d: %w", pid, gone(err))
	}
	return &Process{pid: pid, dir: dir}, nil
}

// Close releases the directory.
func (p *Process) Close() error { return unix.Close(p.dir) }

// ReadFile returns the contents of one file of the directory, such as "cgroup".
// Symbolic links and mounts on top of procfs are refused.
func (p *Process) ReadFile(name string) ([]byte, error) {
	b, err := readProc(p.dir, name)
	if err != nil {
		return nil, fmt.Errorf("read /proc/%d/%s: %w", p.pid, name, err)
	}
	return b, nil
}

// pages are what files of procfs are read into: nearly all are smaller.
var pages = sync.Pool{New: func() any { return new([4096]byte) }}

// readProc reads a file below a directory of procfs.
func readProc(dir int, name string) ([]byte, error) {
	fd, err := openBelow(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, gone(err)
	}
	defer unix.Close(fd)              //nolint:errcheck // nothing was written
	page := pages.Get().(*[4096]byte) //nolint:forcetypeassert // nothing else is in it
	defer pages.Put(page)
	buf, n := page[:], 0
	for {
		m, err := unix.Read(fd, buf[n:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, gone(err)
		case m == 0:
			return bytes.Clone(buf[:n]), nil
		}
		n += m
		if n == len(buf) {
			if n >= maxProcFile {
				return nil, fmt.Errorf("more than %d bytes", maxProcFile)
			}
			buf = append(buf[:n:n], make([]byte, n)...)
		}
	}
}

// Executable opens the file that the process executes, as its own descriptor of
// the inode: no path is resolved. The caller closes it.
func (p *Process) Executable() (*os.File, error) {
	// The last part is a magic link, so it cannot be opened by openBelow; the
	// directory it is in was.
	fd, err := unix.Openat(p.dir, "exe", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, p.exeError("open", err)
	}
	return os.NewFile(uintptr(fd), "exe"), nil
}

// ExecutablePath returns the path of the executable as the kernel reports it:
// in the mount namespace of the process, with " (deleted)" appended if the file
// was removed.
func (p *Process) ExecutablePath() (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(p.dir, "exe", buf[:])
	if err != nil {
		return "", p.exeError("read link", err)
	}
	if n == len(buf) {
		return "", fmt.Errorf("read link /proc/%d/exe: longer than %d bytes", p.pid, unix.PathMax)
	}
	return string(buf[:n]), nil
}

// StatExecutable describes the file that the process executes, without opening
// it.
func (p *Process) StatExecutable(mask int, st *unix.Statx_t) error {
	if err := unix.Statx(p.dir, "exe", unix.AT_STATX_DONT_SYNC, mask, st); err != nil {
		return p.exeError("stat", err)
	}
	return nil
}

func (p *Process) exeError(what string, err error) error {
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s /proc/%d/exe: %w (the agent needs root, or CAP_SYS_PTRACE)", what, p.pid, err)
	}
	return fmt.Errorf("%s /proc/%d/exe: %w", what, p.pid, gone(err))
}

// Stat is what is used of /proc/<pid>/stat.
type Stat struct {
	// Parent is the id of the parent process.
	Parent int
	// StartTime is when the process was started, in clock ticks (10 ms) since
	// the machine's start. With the id, it names the process.
	StartTime uint64
}

// Stat reads the process's parent and start time.
func (p *Process) Stat() (Stat, error) {
	b, err := p.ReadFile("stat")
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(b)
	if err != nil {
		return Stat{}, fmt.Errorf("read /proc/%d/stat: %w", p.pid, err)
	}
	return s, nil
}

// Status is what is used of /proc/<pid>/status. Ids are as seen from this
// program's user namespace.
type Status struct {
	EffectiveUID, EffectiveGID uint32
	// Groups are the supplementary groups.
	Groups []uint32
}

// Status reads the ids of the process as they are now.
func (p *Process) Status() (*Status, error) {
	b, err := p.ReadFile("status")
	if err != nil {
		return nil, err
	}
	s, err := parseStatus(b)
	if err != nil {
		return nil, fmt.Errorf("read /proc/%d/status: %w", p.pid, err)
	}
	return s, nil
}

// parseStatus reads the file's Uid, Gid and Groups lines. The Name line comes
// from the process itself; the kernel escapes line feeds in it.
func parseStatus(b []byte) (*Status, error) {
	s := &Status{}
	var uid, gid, groups bool
	for line := range bytes.Lines(b) {
		key, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		var err error
		switch string(key) {
		case "Uid":
			s.EffectiveUID, err = effective(value)
			uid = true
		case "Gid":
			s.EffectiveGID, err = effective(value)
			gid = true
		case "Groups":
			for f := range bytes.FieldsSeq(value) {
				g, gerr := parseID(f)
				if gerr != nil {
					err = gerr
					break
				}
				s.Groups = append(s.Groups, g)
			}
			groups = true
		}
		if err != nil {
			return nil, fmt.Errorf("%s line: %w", key, err)
		}
		if uid && gid && groups {
			return s, nil
		}
	}
	return nil, errors.New("no Uid, Gid and Groups lines")
}

// effective takes the second of "real effective saved filesystem".
func effective(value []byte) (uint32, error) {
	f := bytes.Fields(value)
	if len(f) != 4 {
		return 0, fmt.Errorf("%d ids, want 4", len(f))
	}
	return parseID(f[1])
}

func parseID(b []byte) (uint32, error) {
	n, err := strconv.ParseUint(string(b), 10, 32)
	return uint32(n), err
}

// parseStat takes fields 4 and 22. Field 2 is the name in parentheses and may
// hold anything, parentheses and line feeds too.
func parseStat(b []byte) (Stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return Stat{}, errors.New("no name in parentheses")
	}
	f := strings.Fields(string(b[i+1:])) // begins with field 3
	if len(f) < 20 {
		return Stat{}, io.ErrUnexpectedEOF
	}
	parent, err := strconv.Atoi(f[1])
	if err != nil {
		return Stat{}, fmt.Errorf("parent: %w", err)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return Stat{}, fmt.Errorf("start time: %w", err)
	}
	return Stat{Parent: parent, StartTime: start}, nil
}

// root is procfs, opened once and kept.
var root struct {
	mu   sync.Mutex // guards what follows
	open bool
	fd   int
}

// procRoot returns a descriptor of /proc that is checked to be procfs, and
// procfs of this program's process id namespace.
func procRoot() (int, error) {
	root.mu.Lock()
	defer root.mu.Unlock()
	if root.open {
		return root.fd, nil
	}
	fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, fmt.Errorf("open /proc: %w", err)
	}
	if err := checkProc(fd); err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	root.open, root.fd = true, fd
	return fd, nil
}

// checkProc refuses a directory that is not procfs: what is mounted over it can
// say anything.
func checkProc(fd int) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("statfs /proc: %w", err)
	}
	if fs.Type != unix.PROC_SUPER_MAGIC {
		return fmt.Errorf("/proc is not procfs (type %#x): mount proc on /proc", fs.Type)
	}
	var buf [32]byte
	n, err := unix.Readlinkat(fd, "self", buf[:])
	if err != nil {
		return fmt.Errorf("read link /proc/self: %w", err)
	}
	if self := string(buf[:n]); self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("/proc/self is %q and this is process %d: /proc is of another process id namespace: mount proc in this one", self, os.Getpid())
	}
	return nil
}

// openBelow opens name below dir without following links and without leaving
// the file system.
func openBelow(dir int, name string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC), //nolint:gosec // constants
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue // EAGAIN: a rename raced with the resolution; procfs has none
		}
		if errors.Is(err, unix.ENOSYS) {
			err = fmt.Errorf("openat2: %w: Linux 5.6 has it, and a systemd unit with RestrictSUIDSGID=yes takes it away", err)
		}
		return fd, err
	}
}
