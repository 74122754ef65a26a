package csi

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// errTarget is wrapped by errors about paths that are not for us.
var errTarget = errors.New("not a path that a kubelet has for a CSI volume of a pod")

// targetPath is what the kubelet has for a CSI volume, below its folder pods.
var targetPath = regexp.MustCompile(`^[-0-9A-Za-z]{1,64}/volumes/kubernetes\.io~csi/[^/]+/mount$`)

// volumes mounts the source folder below the kubelet's folder of pods. All paths are
// walked from a descriptor of that folder, through no link, so that whoever could
// change what is in a pod's folder cannot have anything mounted elsewhere.
type volumes struct {
	pods   string
	source string

	mu sync.Mutex // held while mounts are changed
}

// target is where a volume is mounted: the entry name of the folder parent.
type target struct {
	parent int
	name   string
}

func (t target) close() { _ = unix.Close(t.parent) }

// path names the entry, for calls that take no descriptor. The last element is not
// followed by who uses it.
func (t target) path() string { return "/proc/self/fd/" + strconv.Itoa(t.parent) + "/" + t.name }

// open opens the folder that is to hold the mount. Its error is ENOENT if the folder
// is not there.
func (v *volumes) open(path string) (target, error) {
	rest, ok := strings.CutPrefix(path, v.pods+"/")
	if !ok || !targetPath.MatchString(rest) || filepath.Clean(path) != path {
		return target{}, fmt.Errorf("%q: %w below %s", path, errTarget, v.pods)
	}
	pods, err := unix.Open(v.pods, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return target{}, fmt.Errorf("open %s: %w", v.pods, err)
	}
	defer unix.Close(pods) //nolint:errcheck // nothing was written
	parent, err := unix.Openat2(pods, filepath.Dir(rest), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return target{}, fmt.Errorf("open %s: %w", filepath.Dir(path), err)
	}
	return target{parent: parent, name: filepath.Base(rest)}, nil
}

// state of a volume.
type state int

const (
	absent state = iota // nothing is mounted
	stale               // something else is mounted
	mounted
)

func (v *volumes) state(path string) (state, error) {
	t, err := v.open(path)
	if errors.Is(err, unix.ENOENT) {
		return absent, nil
	}
	if err != nil {
		return absent, err
	}
	defer t.close()
	return v.stateOf(t)
}

func (v *volumes) stateOf(t target) (state, error) {
	var at, source unix.Statx_t
	err := unix.Statx(t.parent, t.name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE|unix.STATX_INO, &at)
	if errors.Is(err, unix.ENOENT) {
		return absent, nil
	}
	if err != nil {
		return absent, fmt.Errorf("stat the mount: %w", err)
	}
	if at.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return absent, nil
	}
	if err := unix.Statx(unix.AT_FDCWD, v.source, 0, unix.STATX_INO, &source); err != nil {
		return absent, fmt.Errorf("stat %s: %w", v.source, err)
	}
	if at.Ino != source.Ino || at.Dev_major != source.Dev_major || at.Dev_minor != source.Dev_minor {
		return stale, nil
	}
	return mounted, nil
}

func (v *volumes) publish(path string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	t, err := v.open(path)
	if err != nil {
		return err
	}
	defer t.close()
	if err := unix.Mkdirat(t.parent, t.name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make the folder of the mount: %w", err)
	}
	switch s, err := v.stateOf(t); {
	case err != nil:
		return err
	case s == mounted:
		return nil
	case s == stale: // of an agent before, whose folder is gone
		if err := unmount(t); err != nil {
			return err
		}
	default:
	}
	return v.mount(t)
}

// mount clones the source, makes the clone read-only, and only then puts it where
// the pod sees it.
func (v *volumes) mount(t target) error {
	clone, err := unix.OpenTree(unix.AT_FDCWD, v.source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone the mount of %s: %w", v.source, err)
	}
	defer unix.Close(clone) //nolint:errcheck // nothing was written
	attributes := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	}
	if err := unix.MountSetattr(clone, "", unix.AT_EMPTY_PATH, &attributes); err != nil {
		return fmt.Errorf("make the mount read-only (Linux 5.12 is needed): %w", err)
	}
	at, err := unix.Openat(t.parent, t.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the folder of the mount: %w", err)
	}
	defer unix.Close(at) //nolint:errcheck // nothing was written
	if err := unix.MoveMount(clone, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	return nil
}

func (v *volumes) unpublish(path string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	t, err := v.open(path)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer t.close()
	if err := unmount(t); err != nil {
		return err
	}
	if err := unix.Unlinkat(t.parent, t.name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove the folder of the mount: %w", err)
	}
	return nil
}

// unmount takes away all that is mounted there. A process that still uses it does not
// keep the pod from ending.
func unmount(t target) error {
	for {
		switch err := unix.Unmount(t.path(), unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // not a mount, not there
			return nil
		default:
			return fmt.Errorf("unmount: %w", err)
		}
	}
}
