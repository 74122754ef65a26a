package container

import (
	"errors"
	"fmt"
	"strings"
)

const (
	// idLength of a container id, in hexadecimal digits.
	idLength = 64
	// maxCandidates bounds what a process can make us ask the runtime.
	maxCandidates = 16
	// maxHierarchies: the kernel has 14 controllers and a few named hierarchies.
	maxHierarchies = 64
)

// Memberships are a process's cgroup paths, by the controllers of the hierarchy;
// cgroup v2 has none, so its key is "". A path is as seen from this program's
// cgroup namespace: one that lies outside of it begins with "/..".
type Memberships map[string]string

// ParseMemberships reads /proc/<pid>/cgroup: lines "number:controllers:path". A
// path holds no line feed, which the kernel refuses, but may hold colons.
func ParseMemberships(text []byte) (Memberships, error) {
	memberships := make(Memberships)
	for line := range strings.Lines(string(text)) {
		line, ok := strings.CutSuffix(line, "\n")
		if !ok {
			return nil, errors.New("last line is cut off")
		}
		number, rest, ok := strings.Cut(line, ":")
		if !ok {
			return nil, errors.New("line without two colons")
		}
		controllers, path, ok := strings.Cut(rest, ":")
		if !ok {
			return nil, errors.New("line without two colons")
		}
		if !strings.HasPrefix(path, "/") {
			return nil, errors.New("path does not begin with a slash")
		}
		if (number == "0") != (controllers == "") {
			return nil, errors.New("hierarchy 0 has controllers, or another has none")
		}
		if _, dup := memberships[controllers]; dup {
			return nil, fmt.Errorf("hierarchy %q twice", controllers)
		}
		if len(memberships) == maxHierarchies {
			return nil, fmt.Errorf("more than %d hierarchies", maxHierarchies)
		}
		memberships[controllers] = path
	}
	return memberships, nil
}

// Candidates returns each container id that stands in a path, once. All parts of
// all paths count: the cgroupfs driver makes ".../<id>", the systemd driver
// ".../docker-<id>.scope", and a container can make more below its own.
func (m Memberships) Candidates() ([]string, error) {
	var ids []string
	seen := make(map[string]bool)
	for _, path := range m {
		for segment := range strings.SplitSeq(path, "/") {
			id, ok := IDIn(segment)
			if !ok || seen[id] {
				continue
			}
			if len(ids) == maxCandidates {
				return nil, fmt.Errorf("its cgroups name more than %d containers", maxCandidates)
			}
			seen[id] = true
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// IDIn returns the first run of exactly 64 hexadecimal digits in a path segment.
func IDIn(segment string) (string, bool) {
	run := 0
	for i := 0; i <= len(segment); i++ {
		if i < len(segment) && isHex(segment[i]) {
			run++
			continue
		}
		if run == idLength {
			return segment[i-run : i], true
		}
		run = 0
	}
	return "", false
}

func isHex(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' }

// IsID says whether s is a container id, such that it can stand in a URL.
func IsID(s string) bool {
	id, ok := IDIn(s)
	return ok && id == s
}

// rootOf returns the path down to the first segment that names the container:
// that is the cgroup that the runtime made. Its init process may be further
// down: systemd in a container makes cgroups for itself and its services.
func rootOf(id, path string) (string, bool) {
	end := 0
	for segment := range strings.SplitSeq(path, "/") {
		end += len(segment)
		if found, ok := IDIn(segment); ok && found == id {
			return path[:end], true
		}
		end++ // the slash
	}
	return "", false
}

// below says whether path is root or inside of it.
func below(path, root string) bool {
	rest, ok := strings.CutPrefix(path, root)
	return ok && (rest == "" || rest[0] == '/')
}
