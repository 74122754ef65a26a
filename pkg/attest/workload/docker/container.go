package docker

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

// container is one run of a container, from its start to its end. It is
// immutable.
type container struct {
	id    string
	facts *attributesv1.Docker
	init  *initProcess
	// roots are the cgroups that the runtime made for the container, by
	// hierarchy.
	roots map[string]string
}

// instance names what keys belong to.
func (c *container) instance() string { return Name + ":" + c.id }

// errEnded says that the init process of a container has ended. It is not
// peer.ErrGone, which is about the process that asks.
var errEnded = errors.New("the container's init process has ended")

// alive returns nil while the init process lives; when it ends, the kernel ends
// all others of the container.
func (c *container) alive() error {
	if err := c.init.process.Alive(); err != nil {
		return fmt.Errorf("container %s: %w", short(c.id), errEnded)
	}
	return nil
}

// holds says whether a process with these memberships is in the container: in
// each hierarchy in which the runtime made a cgroup for it, not in one of them.
func (c *container) holds(memberships map[string]string) bool {
	for hierarchy, root := range c.roots {
		path, ok := memberships[hierarchy]
		if !ok || !below(path, root) {
			return false
		}
	}
	return len(c.roots) > 0
}

// around says whether o is inside of c, in each hierarchy of c.
func (c *container) around(o *container) bool {
	for hierarchy, root := range c.roots {
		inner, ok := o.roots[hierarchy]
		if !ok || !below(inner, root) {
			return false
		}
	}
	return true
}

// roots finds a container's cgroups from those of its init process.
func roots(id string, memberships map[string]string) (map[string]string, error) {
	found := make(map[string]string)
	for hierarchy, path := range memberships {
		if root, ok := rootOf(id, path); ok {
			found[hierarchy] = root
		}
	}
	if len(found) == 0 {
		return nil, errors.New("its init process is in no cgroup of its name")
	}
	return found, nil
}

// initProcess is the first process of a container.
type initProcess struct {
	process     *peer.Peer
	memberships map[string]string
}

// processes is what is asked of the kernel; tests answer in its place.
type processes interface {
	// cgroup returns /proc/<pid>/cgroup of a peer.
	cgroup(p *peer.Peer) ([]byte, error)
	// open returns the init process of a container that the engine says has
	// this pid and was started at this time. It fails if the pid belongs to
	// another process by now.
	open(id string, pid int, startedAt time.Time) (*initProcess, error)
}

// kernel is processes in earnest.
type kernel struct{}

func (kernel) cgroup(p *peer.Peer) ([]byte, error) {
	proc, err := p.Process()
	if err != nil {
		return nil, err
	}
	defer proc.Close() //nolint:errcheck // nothing was written
	return proc.ReadFile("cgroup")
}

func (kernel) open(id string, pid int, startedAt time.Time) (*initProcess, error) {
	p, err := peer.Open(pid)
	if err != nil {
		return nil, err
	}
	memberships, err := readInit(p, id, startedAt)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &initProcess{process: p, memberships: memberships}, nil
}

// readInit reads the memberships of an init process and makes sure that it is
// one: the engine may say that a container runs for some time after its init
// process has ended and its pid has been given to another.
func readInit(p *peer.Peer, id string, startedAt time.Time) (map[string]string, error) {
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
	if !startedBy(stat.StartTime, boot, startedAt) && !hasShim(stat.Parent, id) {
		return nil, fmt.Errorf("process %d was started after the container was: it is not its init process any more", p.PID)
	}
	text, err := proc.ReadFile("cgroup")
	if err != nil {
		return nil, err
	}
	memberships, err := parseCgroups(text)
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

// hasShim says whether the process parent is the one that containerd runs for
// this container. It is asked if the machine's clock was set meanwhile, so that
// times cannot be compared.
func hasShim(parent int, id string) bool {
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
	return slices.Contains(strings.Split(string(arguments), "\x00"), id)
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
