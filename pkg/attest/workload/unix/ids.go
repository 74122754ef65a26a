package unix

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// noID is what no process has.
const noID = -1

// overflowIDs are the ids by which the kernel shows a program users and groups
// that its user namespace does not map; noID if it maps all. In the host's user
// namespace they are ordinary ids, those of nobody.
type overflowIDs struct{ uid, gid int64 }

func (o overflowIDs) hidesUID(uid uint32) bool { return int64(uid) == o.uid }

func (o overflowIDs) hidesGID(gid uint32) bool { return int64(gid) == o.gid }

// idMaps reads the maps of this program's user namespace once: they cannot
// change after they have been written.
type idMaps struct {
	mu   sync.Mutex // guards what follows
	read bool
	ids  overflowIDs
}

func (m *idMaps) overflow() (overflowIDs, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.read {
		return m.ids, nil
	}
	uid, err := overflowOf("/proc/self/uid_map", "/proc/sys/kernel/overflowuid")
	if err != nil {
		return overflowIDs{}, err
	}
	gid, err := overflowOf("/proc/self/gid_map", "/proc/sys/kernel/overflowgid")
	if err != nil {
		return overflowIDs{}, err
	}
	m.read, m.ids = true, overflowIDs{uid: uid, gid: gid}
	return m.ids, nil
}

// overflowOf returns noID if the map has all ids, else the overflow id.
func overflowOf(mapFile, overflowFile string) (int64, error) {
	text, err := os.ReadFile(mapFile)
	if err != nil {
		return noID, fmt.Errorf("find out what the agent's user namespace maps: %w", err)
	}
	if mapsAll(string(text)) {
		return noID, nil
	}
	text, err = os.ReadFile(overflowFile)
	if err != nil {
		return noID, fmt.Errorf("find out what the agent's user namespace maps: %w", err)
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
	if err != nil {
		return noID, fmt.Errorf("read %s: %w", overflowFile, err)
	}
	return int64(id), nil
}

// mapsAll recognizes the map of the host's user namespace: one line, all ids to
// themselves. Each other map hides somebody.
func mapsAll(text string) bool {
	f := strings.Fields(text)
	return len(f) == 3 && f[0] == "0" && f[1] == "0" && f[2] == "4294967295"
}
