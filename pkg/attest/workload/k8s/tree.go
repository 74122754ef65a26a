package k8s

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// tree follows the part of the cgroup file system in which the kubelet makes the
// cgroups of pods: what it tells is a hint that it is time to ask, and proves nothing.
// inotify(7) tells of folders that are made in cgroup v1 and v2 alike. Nothing but the
// making of folders is asked for, since the runtimes write to the files in them all
// the time.
type tree struct {
	file    *os.File
	metrics *metrics
	folders map[int]string // by watch descriptor
	watched map[string]int // the inverse
}

// maxFolders bounds what is watched: a folder for each pod, and some above them.
const maxFolders = 2 * maxPods

// hierarchies of cgroup v1 in which runtimes make cgroups, in the order in which they
// are looked at. cgroup v2 has none.
var hierarchies = []string{"", "pids", "memory", "systemd", "cpu", "cpu,cpuacct"}

// kubepods finds the kubelet's cgroups below a mount of the cgroup file system, in the
// first hierarchy that has any. More than one kubelet can share a machine.
func kubepods(root string) []string {
	for _, hierarchy := range hierarchies {
		var found []string
		for _, name := range []string{"kubepods", "*kubepods.slice", "*/kubepods", "*/*kubepods.slice"} {
			paths, err := filepath.Glob(filepath.Join(root, hierarchy, name))
			if err == nil { // the patterns are good
				found = append(found, paths...)
			}
		}
		if len(found) > 0 {
			return found
		}
	}
	return nil
}

// openTree watches the kubelet's cgroups below root, and returns the containers that
// are there already. The caller closes it.
func openTree(root string, m *metrics) (t *tree, ids []string, err error) {
	roots := kubepods(root)
	if len(roots) == 0 {
		return nil, nil, fmt.Errorf("no cgroup of a kubelet is below %s; mount the host's /sys/fs/cgroup, and set cgroup_root if it is elsewhere", root)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, nil, fmt.Errorf("watch cgroups: %w", err)
	}
	t = &tree{file: os.NewFile(uintptr(fd), "inotify"), metrics: m, folders: make(map[int]string), watched: make(map[string]int)}
	for _, r := range roots {
		found, err := t.add(fd, r)
		if err != nil {
			return nil, nil, errors.Join(err, t.close())
		}
		ids = append(ids, found...)
	}
	return t, ids, nil
}

func (t *tree) close() error {
	t.metrics.watched.Set(0)
	return t.file.Close()
}

// add watches a folder, and the pods and classes of pods below it. It returns the
// containers that are there already.
func (t *tree) add(fd int, folder string) (ids []string, err error) {
	if _, ok := t.watched[folder]; ok {
		return nil, nil
	}
	if len(t.folders) >= maxFolders {
		return nil, fmt.Errorf("watch cgroups: more than %d pods", maxPods)
	}
	wd, err := unix.InotifyAddWatch(fd, folder, unix.IN_CREATE|unix.IN_ONLYDIR|unix.IN_DONT_FOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, nil // gone again
	case errors.Is(err, unix.ENOSPC):
		return nil, fmt.Errorf("watch cgroups: %w: raise fs.inotify.max_user_watches", err)
	case err != nil:
		return nil, fmt.Errorf("watch %s: %w", folder, err)
	}
	t.folders[wd], t.watched[folder] = folder, wd
	t.metrics.watched.Set(float64(len(t.folders)))
	// What was made before the watch was there.
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return nil, err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		more, err := t.made(fd, folder, e.Name())
		ids = append(ids, more...)
		if err != nil {
			return ids, err
		}
	}
	return ids, nil
}

// made looks at a folder that was made in one that is watched. It returns the
// containers that are to be asked for.
func (t *tree) made(fd int, parent, name string) (ids []string, err error) {
	if _, pod := podIn(filepath.Base(parent)); pod {
		if id, ok := container.IDIn(name); ok {
			return []string{id}, nil
		}
		return nil, nil
	}
	if _, pod := podIn(name); !pod && !isClass(name) {
		return nil, nil
	}
	return t.add(fd, filepath.Join(parent, name))
}

// isClass says whether a cgroup is that of a QoS class of pods.
func isClass(name string) bool {
	name = strings.TrimSuffix(name, ".slice")
	name = name[strings.LastIndexByte(name, '-')+1:]
	return slices.Contains([]string{"burstable", "besteffort", "guaranteed"}, name)
}

// errOverflow says that events were lost.
var errOverflow = errors.New("too many cgroups were made at once, so that some were missed")

// run calls found with the id of each container whose cgroup is made, until ctx ends
// or events were lost.
func (t *tree) run(ctx context.Context, found func(id string)) error {
	stop := context.AfterFunc(ctx, func() { _ = t.file.Close() }) // wakes Read
	defer stop()
	conn, err := t.file.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := t.file.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch cgroups: %w", err)
		}
		var ids []string
		var failed error
		err = conn.Control(func(fd uintptr) { ids, failed = t.events(int(fd), buf[:n]) })
		for _, id := range ids {
			found(id)
		}
		if err := errors.Join(err, failed); err != nil {
			return err
		}
	}
}

// events reads what inotify(7) writes: fixed fields, and the folder's name with zeros
// after it.
func (t *tree) events(fd int, b []byte) (ids []string, err error) {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int(int32(binary.NativeEndian.Uint32(b))) //nolint:gosec // as the kernel writes it
		mask := binary.NativeEndian.Uint32(b[4:])       //
		size := int(binary.NativeEndian.Uint32(b[12:])) //
		name := b[unix.SizeofInotifyEvent:][:min(size, len(b)-unix.SizeofInotifyEvent)]
		b = b[unix.SizeofInotifyEvent+len(name):]
		folder, ok := t.folders[wd]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			return ids, errOverflow
		case mask&unix.IN_IGNORED != 0: // removed
			delete(t.folders, wd)
			delete(t.watched, folder)
			t.metrics.watched.Set(float64(len(t.folders)))
		case ok && mask&unix.IN_CREATE != 0 && mask&unix.IN_ISDIR != 0:
			more, err := t.made(fd, folder, strings.TrimRight(string(name), "\x00"))
			ids = append(ids, more...)
			if err != nil {
				return ids, err
			}
		}
	}
	return ids, nil
}
