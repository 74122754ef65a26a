package peer

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// quota bounds how many of a kind of thing are open: all of them, those of one
// user, and those of one container, since many containers run as one user. It is
// guarded by its owner's mutex.
type quota struct {
	what                       string // for errors
	max, perUser, perContainer int

	open       int
	users      map[uint32]int
	containers map[string]int
}

func newQuota(what string, most, perUser, perContainer int) quota {
	return quota{
		what: what, max: most, perUser: perUser, perContainer: perContainer,
		users: make(map[uint32]int), containers: make(map[string]int),
	}
}

// enter counts one more, or says which bound there is no room under. container is
// "" for a process that is in none.
func (q *quota) enter(uid uint32, container string) (reason, error) {
	switch {
	case q.open >= q.max:
		return reasonLimit, fmt.Errorf("%d %s are open: limit reached", q.open, q.what)
	case q.users[uid] >= q.perUser:
		return reasonUIDLimit, fmt.Errorf("uid %d has %d %s open: limit reached", uid, q.users[uid], q.what)
	case container != "" && q.containers[container] >= q.perContainer:
		return reasonContainerLimit, fmt.Errorf("container %s has %d %s open: limit reached", container, q.containers[container], q.what)
	}
	q.open++
	q.users[uid]++
	if container != "" {
		q.containers[container]++
	}
	return "", nil
}

// leave is the inverse of enter.
func (q *quota) leave(uid uint32, container string) {
	q.open--
	if q.users[uid]--; q.users[uid] == 0 {
		delete(q.users, uid)
	}
	if container == "" {
		return
	}
	if q.containers[container]--; q.containers[container] == 0 {
		delete(q.containers, container)
	}
}

// containerOf returns the cgroup of the container that a process is in, as far as
// its name tells, and "" if it is in none: 64 hexadecimal digits in it are what
// all runtimes call their containers. It decides how connections are counted, and
// who is no administrator (Peer.Elsewhere). Of nested ones it is the outermost,
// since a process may make more of them below its own; and it is the path from the root, so that a cgroup of
// another's name that somebody made elsewhere counts for nobody else. Below own,
// the container that this program is in, the next one counts.
func containerOf(cgroups []byte, own string) string {
	for line := range bytes.Lines(cgroups) {
		_, rest, _ := bytes.Cut(line, []byte(":")) // hierarchy:controllers:path
		_, path, ok := bytes.Cut(rest, []byte(":"))
		if !ok {
			continue
		}
		text := strings.TrimSuffix(string(path), "\n")
		from := 0
		if own != "" && strings.HasPrefix(text, own+"/") {
			from = len(own) + 1
		}
		for from < len(text) {
			end := strings.IndexByte(text[from:], '/')
			if end < 0 {
				end = len(text) - from
			}
			if namesContainer(text[from : from+end]) {
				return text[:from+end]
			}
			from += end + 1
		}
	}
	return ""
}

// namesContainer says whether a part of a path has a run of 64 hexadecimal digits.
func namesContainer(segment string) bool {
	run := 0
	for i := range len(segment) {
		if c := segment[i]; c < '0' || c > '9' && c < 'a' || c > 'f' {
			run = 0
			continue
		}
		if run++; run == 64 {
			return true
		}
	}
	return false
}

// ownContainer is containerOf of this program. It does not change while it runs.
func ownContainer() string {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "" // nothing is below it then
	}
	return containerOf(text, "")
}

// container asks procfs for containerOf of a process. The caller asks afterwards
// whether the process lives.
func container(pid int, own string) (string, error) {
	root, err := procRoot()
	if err != nil {
		return "", err
	}
	text, err := readProc(root, strconv.Itoa(pid)+"/cgroup")
	if err != nil {
		return "", fmt.Errorf("read the cgroups of process %d: %w", pid, err)
	}
	return containerOf(text, own), nil
}
