package unix

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
)

const (
	// maxHashes bounds the cache; at the bound, an arbitrary hash is forgotten.
	maxHashes = 4096
	// maxPerUID bounds the attestations of one user that are under way; the
	// others wait. If his file system hangs, he waits, and nobody else.
	maxPerUID = 32
	// settled is how long a file must be unchanged before its hash is kept: a
	// change within the granularity of its times would not be seen.
	settled = 2 * time.Second
)

// statMask is what identify needs.
const statMask = unix.STATX_TYPE | unix.STATX_INO | unix.STATX_SIZE | unix.STATX_MTIME | unix.STATX_CTIME | unix.STATX_BTIME

// fileID tells one version of one file from all others.
type fileID struct {
	dev                 uint64
	ino                 uint64
	size                int64
	mtime, ctime, btime int64 // nanoseconds
}

func identify(st *unix.Statx_t) fileID {
	return fileID{
		dev:   uint64(st.Dev_major)<<32 | uint64(st.Dev_minor),
		ino:   st.Ino,
		size:  int64(min(st.Size, 1<<62)),
		mtime: nanoseconds(st.Mtime),
		ctime: nanoseconds(st.Ctime),
		btime: nanoseconds(st.Btime),
	}
}

func nanoseconds(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }

// incarnation names the file for as long as it exists, whatever is done to its
// contents: an inode's number is given out again, but not with the same time of
// creation.
func (f fileID) incarnation() string {
	return fmt.Sprintf("%x.%x:%d:%x", f.dev>>32, f.dev&0xffffffff, f.ino, f.btime)
}

// key is under what the hash of the file is kept. Containers of one image each
// have an overlay, and in it a file of the same layer is the same inode with the
// same times on another device: the device is left out, so that an executable of
// 100 MB is not hashed for each container. That trusts that an inode's number
// with its time of change, which nobody can set, is unique among overlays.
func (f fileID) key(fs int64) fileID {
	if fs == unix.OVERLAYFS_SUPER_MAGIC {
		f.dev = 0
	}
	return f
}

// hashes knows the SHA-256 of executables. It is safe for concurrent use.
type hashes struct {
	limit int64

	mu      sync.Mutex // guards what follows
	known   map[fileID]string
	flights map[fileID]*flight
	perUID  map[uint32]*slots
}

// flight is one file being hashed, for all who ask meanwhile.
type flight struct {
	done chan struct{} // closed when what follows is set
	sum  string
	err  error
}

// slots bounds what one user has under way.
type slots struct {
	taken chan struct{}
	refs  int // who hold or wait for one; guarded by hashes.mu
}

func newHashes(limit int64) *hashes {
	return &hashes{
		limit:   limit,
		known:   make(map[fileID]string),
		flights: make(map[fileID]*flight),
		perUID:  make(map[uint32]*slots),
	}
}

// hashTimeout bounds the hashing of one file. Who asks waits no longer than his own
// deadline; the next who asks, himself again perhaps, finds it under way or done. A large
// file on a slow machine would otherwise be begun again and again, and never be known.
const hashTimeout = time.Minute

// bounded runs f, which may hang, in a goroutine, and returns when it has
// returned or ctx has ended. If it does not run f at all, it runs instead.
func (h *hashes) bounded(ctx context.Context, uid uint32, f func(context.Context) (*attest.Facts, error), instead func()) (*attest.Facts, error) {
	release, err := h.slot(ctx, uid)
	if err != nil {
		instead()
		return nil, err
	}
	type result struct {
		facts *attest.Facts
		err   error
	}
	done := make(chan result, 1)
	go func() {
		defer release()
		working, cancel := context.WithTimeout(context.WithoutCancel(ctx), hashTimeout)
		defer cancel()
		facts, err := f(working)
		done <- result{facts, err}
	}()
	select {
	case r := <-done:
		return r.facts, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("read its executable: %w", ctx.Err())
	}
}

// slot waits for one of the user's slots.
func (h *hashes) slot(ctx context.Context, uid uint32) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h.mu.Lock()
	s := h.perUID[uid]
	if s == nil {
		s = &slots{taken: make(chan struct{}, maxPerUID)}
		h.perUID[uid] = s
	}
	s.refs++
	h.mu.Unlock()
	leave := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if s.refs--; s.refs == 0 {
			delete(h.perUID, uid)
		}
	}
	select {
	case s.taken <- struct{}{}:
		return func() { <-s.taken; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("wait for %d other attestations of uid %d: %w", maxPerUID, uid, ctx.Err())
	}
}

// of returns the SHA-256 of the file that proc executes, which is described by
// id; "" if it is larger than the limit. A file is hashed once for all who ask
// at the same time.
func (h *hashes) of(ctx context.Context, proc *peer.Process, id fileID) (string, error) {
	if id.size > h.limit {
		return "", nil
	}
	for {
		h.mu.Lock()
		if sum, ok := h.known[id]; ok {
			h.mu.Unlock()
			return sum, nil
		}
		fl := h.flights[id]
		if fl == nil {
			fl = &flight{done: make(chan struct{})}
			h.flights[id] = fl
			h.mu.Unlock()
			fl.sum, fl.err = h.open(ctx, proc, id)
			h.mu.Lock()
			delete(h.flights, id)
			h.mu.Unlock()
			close(fl.done)
			return fl.sum, fl.err
		}
		h.mu.Unlock()
		select {
		case <-fl.done:
			if fl.err == nil {
				return fl.sum, nil
			}
			// It may have been the other's process or deadline: ask ourselves.
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// open opens and hashes the executable of proc.
func (h *hashes) open(ctx context.Context, proc *peer.Process, id fileID) (string, error) {
	f, err := proc.Executable()
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	return h.hash(ctx, f, id)
}

// hash hashes f, which must be the file id.
func (h *hashes) hash(ctx context.Context, f *os.File, id fileID) (string, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return "", fmt.Errorf("statfs executable: %w", err)
	}
	key := id.key(fs.Type)
	h.mu.Lock()
	sum, ok := h.known[key]
	if ok {
		h.keep(id, sum)
	}
	h.mu.Unlock()
	if ok {
		return sum, nil
	}

	digest := sha256.New()
	n, err := io.CopyBuffer(digest, io.LimitReader(reader{ctx, f}, h.limit+1), make([]byte, 256<<10))
	if err != nil {
		return "", fmt.Errorf("read executable: %w", err)
	}
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, statMask, &st); err != nil {
		return "", fmt.Errorf("stat executable: %w", err)
	}
	if identify(&st) != id || n != id.size {
		return "", errors.New("its executable changes: try again")
	}
	sum = hex.EncodeToString(digest.Sum(nil))
	if time.Since(time.Unix(0, id.ctime)) > settled {
		h.mu.Lock()
		h.keep(key, sum)
		h.keep(id, sum)
		h.mu.Unlock()
	}
	return sum, nil
}

// keep remembers a hash. h.mu is held.
func (h *hashes) keep(id fileID, sum string) {
	if len(h.known) >= maxHashes {
		for old := range h.known { // an arbitrary one
			delete(h.known, old)
			break
		}
	}
	h.known[id] = sum
}

// reader stops when ctx ends.
type reader struct {
	ctx context.Context //nolint:containedctx // lives for one copy
	f   *os.File
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.f.Read(p)
}
