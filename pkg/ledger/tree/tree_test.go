package tree

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/meshid/meshid/internal/durable"
	"github.com/meshid/meshid/pkg/ledger"
)

// TestEdge compares the root of each size with RFC 6962 as it is written.
func TestEdge(t *testing.T) {
	t.Parallel()
	var e edge
	var leaves []tlog.Hash
	tiles := map[string]int{}
	for i := range 1100 {
		if got := e.root(); got != naiveRoot(leaves) {
			t.Fatalf("size %d: root %v", i, got)
		}
		leaf := tlog.RecordHash([]byte{byte(i), byte(i >> 8)})
		leaves = append(leaves, leaf)
		e.add(leaf, func(level int, n uint64, hashes []tlog.Hash) { tiles[tilePath(level, n, len(hashes))]++ })
	}
	if len(tiles) != 4 || tiles["tile/0/003"] != 1 {
		t.Errorf("full tiles: %v", tiles)
	}
	// A whole tile of level 1.
	e, leaves = edge{}, nil
	for i := range 1<<16 + 300 {
		leaf := tlog.Hash{byte(i), byte(i >> 8), byte(i >> 16)}
		leaves = append(leaves, leaf)
		e.add(leaf, func(level int, n uint64, hashes []tlog.Hash) { tiles[tilePath(level, n, len(hashes))]++ })
	}
	if e.root() != naiveRoot(leaves) || tiles["tile/1/000"] != 1 || tiles["tile/2/000"] != 0 {
		t.Errorf("a tree of %d leaves has the root %v", len(leaves), e.root())
	}
}

func TestTilePath(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		level int
		n     uint64
		width int
		want  string
	}{
		{0, 0, 256, "tile/0/000"},
		{0, 1, 7, "tile/0/001.p/7"},
		{3, 1234067, 256, "tile/3/x001/x234/067"}, // the example of C2SP tlog-tiles
		{0, 1000, 1, "tile/0/x001/000.p/1"},
		{entriesLevel, 999, 255, "tile/entries/999.p/255"},
	} {
		if got := tilePath(tc.level, tc.n, tc.width); got != tc.want {
			t.Errorf("tile %d of level %d: %s, want %s", tc.n, tc.level, got, tc.want)
		}
	}
}

func TestOrigin(t *testing.T) {
	t.Parallel()
	for instance, want := range map[string]string{
		"ca-1.example": "example.org/ca-1.example",
		"a b+c\n":      "example.org/a-b-c-",
		"":             "example.org/",
	} {
		if got := Origin("example.org", instance); got != want {
			t.Errorf("%q: %q", instance, got)
		}
	}
}

// TestTree grows a tree over restarts through all the widths that matter, and
// checks each head against the journal, and against the one before.
func TestTree(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var before Checkpoint
	for _, n := range []int{0, 1, 1, 253, 1, 1, 255, 1, 2000, 0, 300} {
		e.start()
		e.append(n)
		c := e.covered()
		e.stop()
		if got := e.verify(); !bytes.Equal(got.Note, c.Note) {
			t.Errorf("the checkpoint was\n%s\nand is\n%s", c.Note, got.Note)
		}
		if c.Size != uint64(e.count) || tlog.Hash(c.Root) != naiveRoot(e.hashes()) {
			t.Fatalf("%d records: checkpoint %+v", e.count, c)
		}
		if before.Note != nil {
			if err := consistent(e.treeDir(), before, c); err != nil {
				t.Error(err)
			}
		}
		before = c
	}
	// Nothing is left of what was partial or unfinished.
	err := filepath.WalkDir(e.treeDir(), func(path string, d fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".new") || strings.HasSuffix(path, "/000.p") && !strings.Contains(path, "/1/") {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestBacklog begins a tree over a journal that is there already.
func TestBacklog(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.options.Interval = 100 * time.Millisecond
	var err error
	if e.journal, err = ledger.Open(e.journalDir(), ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	e.append(20_000)
	if err := e.journal.Close(); err != nil {
		t.Fatal(err)
	}
	e.start()
	c := e.covered()
	e.stop()
	e.verify()
	if tlog.Hash(c.Root) != naiveRoot(e.hashes()) {
		t.Error("another root")
	}
}

// TestLastCheckpoint checks that a tree that is stopped has signed everything.
func TestLastCheckpoint(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.options.Interval = time.Hour
	e.start()
	e.append(1000)
	e.stop()
	if c := e.verify(); c.Size != 1000 {
		t.Errorf("the last checkpoint covers %d records", c.Size)
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	var log bytes.Buffer
	e.options.Logger = slog.New(slog.NewTextHandler(&log, nil))
	e.start()
	e.covered()
	vkey := e.tree.Key()
	e.stop()
	st, err := os.Stat(e.options.Key)
	if err != nil || st.Mode() != 0o600 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	if !strings.HasPrefix(vkey, "example.org/ca-1+") || !strings.Contains(log.String(), vkey) {
		t.Errorf("key %s, log %s", vkey, log.String())
	}
	secret, err := os.ReadFile(e.options.Key)
	if err != nil || strings.Contains(log.String(), strings.TrimSpace(string(secret))[40:]) {
		t.Errorf("the key is in the log: %v", err)
	}
	// Another name of the instance does not change the log's.
	e.options.Origin = "example.org/renamed"
	e.start()
	e.append(1)
	if c := e.covered(); c.Origin != "example.org/ca-1" || e.tree.Key() != vkey {
		t.Errorf("origin %s", c.Origin)
	}
	e.stop()
	for name, spoil := range map[string]func(path string) error{
		"others can read it": func(path string) error { return os.Chmod(path, 0o640) },
		"a link":             func(path string) error { return errors.Join(os.Rename(path, path+"1"), os.Symlink(path+"1", path)) },
		"no key":             func(path string) error { return os.WriteFile(path, []byte("PRIVATE+KEY+x+00000000+AAAA\n"), 0o600) },
		"cut off":            func(path string) error { return os.WriteFile(path, secret[:len(secret)-9], 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := copyTree(t, e.dir)
			j, err := ledger.Open(filepath.Join(dir, "ledger"), ledger.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer j.Close()
			o := Options{Key: filepath.Join(dir, "keys", "log.key")}
			if err := spoil(o.Key); err != nil {
				t.Fatal(err)
			}
			_, err = Open(filepath.Join(dir, "tree"), j, o)
			if err == nil || errors.Is(err, ErrHalted) || strings.Contains(err.Error(), hex.EncodeToString(secret)) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestLocked(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	e.start()
	if _, err := Open(e.treeDir(), e.journal, e.options); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("error is %v", err)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	reg := prometheus.NewRegistry()
	e.options.Registerer = reg
	e.start()
	e.append(3)
	e.covered()
	if warning, failure := e.tree.Health(time.Now()); warning != nil || failure != nil {
		t.Errorf("health: %v, %v", warning, failure)
	}
	want := "# HELP meshid_ca_ledger_tree_size Records that the published checkpoint covers.\n# TYPE meshid_ca_ledger_tree_size gauge\nmeshid_ca_ledger_tree_size 3\n"
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "meshid_ca_ledger_tree_size"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"meshid_ca_ledger_tree_checkpoint_timestamp_seconds", "meshid_ca_ledger_tree_unwitnessed_seconds", "meshid_ca_ledger_tree_halted", "meshid_ca_ledger_witness_requests_total"} {
		if n, err := testutil.GatherAndCount(reg, name); err != nil || n == 0 {
			t.Errorf("%s: %d series, %v", name, n, err)
		}
	}
}
