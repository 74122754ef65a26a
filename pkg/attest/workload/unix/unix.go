// Package unix answers "which user and which executable is this process?" from
// what the kernel says.
//
// uid and gid are the effective ids that the process had when it connected, as
// the kernel noted them on the socket. A process whose effective ids are others
// by now is refused: its supplementary groups and its executable, which are read
// at each call, would belong to somebody else than its uid. User and group names
// are never used.
//
// path and sha256 describe the file that the process executes now, taken through
// the kernel's own link to it and not by looking up a path. They say little by
// themselves: whoever may run a program may also make a process that looks like
// it and does his bidding, and path is as seen by the process, in whose mount
// namespace anything can stand at any path; sha256 is what its file system says
// the file holds, and the user may have brought the file system with him. So an
// entry needs more than these two.
//
// The instance is uid, gid and the file (device, inode and time of creation): two
// executables never share it, and it outlives neither.
package unix

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// Name is the attestor's name.
const Name = "unix"

// DefaultMaxExecutableBytes is the size up to which an executable is hashed.
const DefaultMaxExecutableBytes = 256 << 20

// attestTimeout bounds one call: the executable may be on a file system that
// hangs.
const attestTimeout = 5 * time.Second

// Config of the attestor. The zero value is good.
type Config struct {
	// MaxExecutableBytes is the size up to which an executable's SHA-256 is
	// attested; 0 means DefaultMaxExecutableBytes. Hashing costs the agent about
	// a millisecond a megabyte, once for each file.
	MaxExecutableBytes int64 `yaml:"max_executable_bytes"`
}

// Attestor attests the user and the executable. It is safe for concurrent use.
type Attestor struct {
	hashes *hashes
	ids    *idMaps
}

// New returns the attestor.
func New(c Config) (*Attestor, error) {
	limit := c.MaxExecutableBytes
	switch {
	case limit < 0:
		return nil, errors.New("unix: max_executable_bytes is negative: write a size in bytes, or leave it out")
	case limit == 0:
		limit = DefaultMaxExecutableBytes
	}
	return &Attestor{hashes: newHashes(limit), ids: &idMaps{}}, nil
}

// Name returns "unix".
func (*Attestor) Name() string { return Name }

// Attest returns the facts about p as they are now.
func (a *Attestor) Attest(ctx context.Context, p *peer.Peer) (*attest.Facts, error) {
	overflow, err := a.ids.overflow()
	if err != nil {
		return nil, fmt.Errorf("unix: %w", err)
	}
	if overflow.hidesUID(p.UID) {
		return nil, fmt.Errorf("unix: process %d: uid %d stands for all users that are not mapped into the agent's user namespace: run the agent in the host's user namespace", p.PID, p.UID)
	}
	if overflow.hidesGID(p.GID) {
		return nil, fmt.Errorf("unix: process %d: gid %d stands for all groups that are not mapped into the agent's user namespace: run the agent in the host's user namespace", p.PID, p.GID)
	}
	proc, err := p.Process()
	if err != nil {
		return nil, fmt.Errorf("unix: %w", err)
	}
	// The rest is done by a goroutine that may hang in the file system of the
	// executable; it owns proc.
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	facts, err := a.hashes.bounded(ctx, p.UID, func(ctx context.Context) (*attest.Facts, error) {
		defer proc.Close() //nolint:errcheck // nothing was written
		return a.read(ctx, p, proc, overflow)
	}, func() { _ = proc.Close() })
	if err != nil {
		return nil, fmt.Errorf("unix: process %d: %w", p.PID, err)
	}
	// What was read is the process's only if it still lives.
	if err := p.Alive(); err != nil {
		return nil, fmt.Errorf("unix: %w", err)
	}
	return facts, nil
}

// read reads all facts such that they hold at one moment: if the process
// executes another file meanwhile, it is asked again, once.
func (a *Attestor) read(ctx context.Context, p *peer.Peer, proc *peer.Process, overflow overflowIDs) (*attest.Facts, error) {
	for range 2 {
		exe, err := a.executable(ctx, proc)
		if err != nil {
			return nil, err
		}
		status, err := proc.Status()
		if err != nil {
			return nil, err
		}
		if status.EffectiveUID != p.UID || status.EffectiveGID != p.GID {
			return nil, fmt.Errorf("has uid %d and gid %d now, but connected with %d and %d: it must connect after it has changed them",
				status.EffectiveUID, status.EffectiveGID, p.UID, p.GID)
		}
		same, err := exe.unchanged(proc)
		if err != nil {
			return nil, err
		}
		if !same {
			continue
		}
		groups := make([]int64, 0, len(status.Groups))
		for _, g := range status.Groups {
			if !overflow.hidesGID(g) {
				groups = append(groups, int64(g))
			}
		}
		return &attest.Facts{
			Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{
				Uid: int64(p.UID), Gid: int64(p.GID), Groups: groups, Path: exe.path, Sha256: exe.sha256,
			}},
			Instance: fmt.Sprintf("unix:%d:%d:%s", p.UID, p.GID, exe.id.incarnation()),
			Rank:     attest.RankProcess,
		}, nil
	}
	return nil, errors.New("executes one file after another: try again")
}

// executable is the file that a process executes.
type executable struct {
	path   string
	sha256 string
	id     fileID
}

// executable describes the file, and hashes it if that is not known yet.
func (a *Attestor) executable(ctx context.Context, proc *peer.Process) (*executable, error) {
	var st unix.Statx_t
	if err := proc.StatExecutable(statMask, &st); err != nil {
		return nil, err
	}
	path, err := proc.ExecutablePath()
	if err != nil {
		return nil, err
	}
	e := &executable{path: path, id: identify(&st)}
	if e.sha256, err = a.hashes.of(ctx, proc, e.id); err != nil {
		return nil, err
	}
	return e, nil
}

// unchanged says whether the process still executes the file e.
func (e *executable) unchanged(proc *peer.Process) (bool, error) {
	var st unix.Statx_t
	if err := proc.StatExecutable(statMask, &st); err != nil {
		return false, err
	}
	path, err := proc.ExecutablePath()
	if err != nil {
		return false, err
	}
	// Not the times: the file may be touched, and is the same file.
	now := identify(&st)
	return now.incarnation() == e.id.incarnation() && path == e.path, nil
}
