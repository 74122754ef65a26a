// Package container answers "which container is this process in?" for the
// attestors of container runtimes. It knows the kernel's side alone: what a
// runtime is asked, and what is said of a container, is its callers'.
//
// The path of one answer, in the order of this package's files:
//
//  1. cgroup.go: the process's cgroup paths are read. Container ids in them are
//     candidates and no more: any user to whom a cgroup is delegated, and each
//     container that may write its own, can make a cgroup with another
//     container's id as its name.
//  2. index.go: each candidate is looked up in an index of running containers. An
//     unknown one costs one question to the runtime.
//  3. container.go, confirm.go: a candidate is confirmed if the process is in or
//     below the cgroup that the runtime made for the container: that of the
//     container's init process, whose pid comes from the runtime, and which is
//     held as a pidfd. Of several that are confirmed, the outermost is meant: what
//     is inside of a container's cgroup is the container's own making.
//
// announce.go tells of containers that start and end, for attest.InstanceWatcher.
package container

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/attest/peer"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

var (
	// ErrNotFound says that the runtime has no such container, or that it does not
	// run.
	ErrNotFound = errors.New("the runtime runs no such container")
	// ErrEnded says that the init process of a container has ended. It is not
	// peer.ErrGone, which is about the process that asks.
	ErrEnded = errors.New("the container's init process has ended")
)

// Container is one run of a container, from its start to its end. It is
// immutable.
type Container struct {
	// ID is the runtime's.
	ID string
	// Instance names what keys belong to.
	Instance string
	// Workload are the facts about the container. They must not be modified.
	Workload *attributesv1.Workload
	// Init is the container's first process.
	Init *Init
	// roots are the cgroups that the runtime made for the container, by
	// hierarchy.
	roots Memberships
}

// New returns a container whose init process is in a cgroup of its name. The
// container owns init; after an error, the caller does.
func New(id, instance string, facts *attributesv1.Workload, init *Init) (*Container, error) {
	roots := make(Memberships)
	for hierarchy, path := range init.Memberships {
		if root, ok := rootOf(id, path); ok {
			roots[hierarchy] = root
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("its init process is in no cgroup of its name")
	}
	return &Container{ID: id, Instance: instance, Workload: facts, Init: init, roots: roots}, nil
}

// With returns the same run of the container with other facts.
func (c *Container) With(facts *attributesv1.Workload) *Container {
	return &Container{ID: c.ID, Instance: c.Instance, Workload: facts, Init: c.Init, roots: c.roots}
}

// Roots returns the cgroups that the runtime made for the container. They must not
// be modified.
func (c *Container) Roots() Memberships { return c.roots }

// Alive returns nil while the init process lives, else an error that wraps
// ErrEnded; when it ends, the kernel ends all others of the container.
func (c *Container) Alive() error {
	if err := c.Init.Process.Alive(); err != nil {
		return fmt.Errorf("container %s: %w", Short(c.ID), ErrEnded)
	}
	return nil
}

// holds says whether a process with these memberships is in the container: in
// each hierarchy in which the runtime made a cgroup for it, not in one of them.
func (c *Container) holds(memberships Memberships) bool {
	for hierarchy, root := range c.roots {
		path, ok := memberships[hierarchy]
		if !ok || !below(path, root) {
			return false
		}
	}
	return len(c.roots) > 0
}

// around says whether o is inside of c, in each hierarchy of c.
func (c *Container) around(o *Container) bool { return c.holds(o.roots) }

// Short is the form of an id that people know.
func Short(id string) string { return id[:min(12, len(id))] }

// Init is the first process of a container.
type Init struct {
	Process     *peer.Peer
	Memberships Memberships
}

// Processes is what is asked of the kernel; tests answer in its place.
type Processes interface {
	// Cgroup returns /proc/<pid>/cgroup of a peer.
	Cgroup(p *peer.Peer) ([]byte, error)
	// Open returns the init process of a container that the runtime says has this
	// pid and was started at this time. It fails if the pid belongs to another
	// process by now. names are ids by which the runtime's shim for the container
	// is known.
	Open(pid int, startedAt time.Time, names ...string) (*Init, error)
}

// Kernel is Processes in earnest.
type Kernel struct{}

// Cgroup implements Processes.
func (Kernel) Cgroup(p *peer.Peer) ([]byte, error) {
	proc, err := p.Process()
	if err != nil {
		return nil, err
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	return proc.ReadFile("cgroup")
}

// Open implements Processes.
func (Kernel) Open(pid int, startedAt time.Time, names ...string) (*Init, error) {
	p, err := peer.Open(pid)
	if err != nil {
		return nil, err
	}
	memberships, err := readInit(p, startedAt, names)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &Init{Process: p, Memberships: memberships}, nil
}

// readInit reads the memberships of an init process and makes sure that it is
// one: the runtime may say that a container runs for some time after its init
// process has ended and its pid has been given to another.
func readInit(p *peer.Peer, startedAt time.Time, names []string) (Memberships, error) {
	proc, err := p.Process()
	if err != nil {
		return nil, err
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	stat, err := proc.Stat()
	if err != nil {
		return nil, err
	}
	boot, err := bootTime()
	if err != nil {
		return nil, err
	}
	if !startedBy(stat.StartTime, boot, startedAt) && !hasShim(stat.Parent, names) {
		return nil, fmt.Errorf("process %d was started after the container was: it is not its init process any more", p.PID)
	}
	text, err := proc.ReadFile("cgroup")
	if err != nil {
		return nil, err
	}
	memberships, err := ParseMemberships(text)
	if err != nil {
		return nil, fmt.Errorf("read /proc/%d/cgroup: %w", p.PID, err)
	}
	return memberships, p.Alive()
}

// startedBy says whether a process that was started so many ticks after boot
// was there when the container was started: the runtime makes the init process
// first. boot has seconds.
func startedBy(ticks uint64, boot, startedAt time.Time) bool {
	const ticksPerSecond, slack = 100, 2 * time.Second
	start := boot.Add(time.Duration(min(ticks, 1<<39)) * (time.Second / ticksPerSecond))
	return !start.After(startedAt.Add(slack))
}

// hasShim says whether the process parent is the one that the runtime keeps for a
// container or pod of one of these names. It is asked if the machine's clock was
// set meanwhile, so that times cannot be compared.
func hasShim(parent int, names []string) bool {
	proc, err := peer.OpenProcess(parent)
	if err != nil {
		return false
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	status, err := proc.Status()
	if err != nil || status.EffectiveUID != 0 {
		return false
	}
	arguments, err := proc.ReadFile("cmdline")
	if err != nil {
		return false
	}
	return slices.ContainsFunc(strings.Split(string(arguments), "\x00"), func(argument string) bool {
		return argument != "" && slices.Contains(names, argument)
	})
}

// bootTime is when the machine was started, by its clock as it is set now.
func bootTime() (time.Time, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "btime "); ok {
			seconds, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return time.Time{}, fmt.Errorf("read /proc/stat: btime: %w", err)
			}
			return time.Unix(seconds, 0), nil
		}
	}
	return time.Time{}, errors.New("read /proc/stat: no btime")
}
