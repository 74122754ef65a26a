package export

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/ledger/export/file"
	"github.com/meshid/meshid/test/require"
)

// TestFault_F12_ExportDiskFull: the disk of an export is full. Records are made all
// the while, nothing is lost, no line is cut in two, and when there is space again,
// the export goes on by itself.
func TestFault_F12_ExportDiskFull(t *testing.T) {
	require.Root(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		require.Missing(t, "mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 200<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(disk, "ledger.jsonl")
	target, err := file.New(file.Config{Path: path}, formats)
	if err != nil {
		t.Fatal(err)
	}
	j := openJournal(t)
	add(t, j, few(10)...)
	f, _ := feed(t, j, t.TempDir(), target)
	await(t, "the first records", f, taken(j, f))
	add(t, j, few(100)...)
	await(t, "the disk to be full", f, failing(f, "no space left"))
	add(t, j, few(20)...) // is not in the way
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	await(t, "all records", f, taken(j, f))
	var indexes []uint64
	for _, line := range lines(t, path) {
		var r struct {
			Index uint64 `json:"index"`
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		indexes = append(indexes, r.Index)
	}
	complete(t, indexes, j.Size(), true)
}
