package k8s

import (
	"strings"

	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// podIn returns the UID of the pod that a part of a cgroup path is named after. The
// cgroupfs driver writes "pod<uid>", the systemd driver
// "kubepods-burstable-pod<uid>.slice" with "_" for "-". A UID is a UUID, or 32
// hexadecimal digits for a pod from the kubelet's own files.
func podIn(segment string) (uid string, ok bool) {
	name, slice := strings.CutSuffix(segment, ".slice")
	if slice {
		name = name[strings.LastIndexByte(name, '-')+1:]
	}
	uid, ok = strings.CutPrefix(name, "pod")
	if !ok {
		return "", false
	}
	if slice {
		uid = strings.ReplaceAll(uid, "_", "-")
	}
	return uid, isUID(uid)
}

// isUID says whether s is a UUID or 32 hexadecimal digits, in lower case.
func isUID(s string) bool {
	dashes := len(s) == 36
	if !dashes && len(s) != 32 {
		return false
	}
	for i := range len(s) {
		if dashes && (i == 8 || i == 13 || i == 18 || i == 23) {
			if s[i] != '-' {
				return false
			}
			continue
		}
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// podOf returns the UID of a pod in whose cgroup a process seems to be: a hint, which
// proves nothing.
func podOf(memberships container.Memberships) (uid string, ok bool) {
	for _, path := range memberships {
		for segment := range strings.SplitSeq(path, "/") {
			if uid, ok := podIn(segment); ok {
				return uid, true
			}
		}
	}
	return "", false
}

// podAround returns the UID of the pod whose cgroup a container's cgroup is in, from
// the container's roots. It is not ok if no path tells, as from within a cgroup
// namespace, or if the paths do not agree.
func podAround(roots container.Memberships) (uid string, ok bool) {
	for _, path := range roots {
		parent := path[:strings.LastIndexByte(path, '/')]
		found, named := podIn(parent[strings.LastIndexByte(parent, '/')+1:])
		if !named {
			continue
		}
		if ok && found != uid {
			return "", false
		}
		uid, ok = found, true
	}
	return uid, ok
}
