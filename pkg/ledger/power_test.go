package ledger

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
)

// powerVariable says at how many points the power fails; `make crash` sets it.
const powerVariable = "MESHID_CRASH_POINTS"

// defaultPoints take a few seconds.
const defaultPoints = 600

// step is one thing that was done to the disk, or, with ack, said to a caller.
type step struct {
	op       string // create, write, truncate, allocate, sync, rename, remove, syncdir, ack
	inode    int
	name, to string
	offset   int64
	data     []byte
	size     int64

	ack  uint64 // index
	hash [32]byte
}

// recordingDisk is the real disk, and remembers what was done, in its order. A
// step is noted when it is done; a sync, for what was there when it began.
type recordingDisk struct {
	dir    string
	mu     sync.Mutex // guards what follows
	names  map[string]int
	inodes int
	steps  []step
}

func (d *recordingDisk) note(s step) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.steps = append(d.steps, s)
}

func (d *recordingDisk) create(path string) (file, error) {
	f, err := hastyDisk{}.create(path)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.inodes++
	d.names[filepath.Base(path)] = d.inodes
	d.steps = append(d.steps, step{op: "create", inode: d.inodes, name: filepath.Base(path)})
	return &recordingFile{f, d, d.inodes}, err
}

func (d *recordingDisk) open(path string) (file, error) {
	f, err := hastyDisk{}.open(path)
	d.mu.Lock()
	defer d.mu.Unlock()
	return &recordingFile{f, d, d.names[filepath.Base(path)]}, err
}

func (d *recordingDisk) rename(from, to string) error {
	err := os.Rename(from, to)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names[filepath.Base(to)] = d.names[filepath.Base(from)]
	delete(d.names, filepath.Base(from))
	d.steps = append(d.steps, step{op: "rename", name: filepath.Base(from), to: filepath.Base(to)})
	return err
}

func (d *recordingDisk) remove(path string) error {
	err := os.Remove(path)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.names, filepath.Base(path))
	d.steps = append(d.steps, step{op: "remove", name: filepath.Base(path)})
	return err
}

func (d *recordingDisk) syncDir(string) error {
	d.note(step{op: "syncdir"})
	return nil
}

// recordingFile is a file of a recordingDisk.
type recordingFile struct {
	file
	d     *recordingDisk
	inode int
}

func (f *recordingFile) WriteAt(p []byte, offset int64) (int, error) {
	n, err := f.file.WriteAt(p, offset)
	f.d.note(step{op: "write", inode: f.inode, offset: offset, data: slices.Clone(p)})
	return n, err
}

func (f *recordingFile) Truncate(size int64) error {
	err := f.file.Truncate(size)
	f.d.note(step{op: "truncate", inode: f.inode, size: size})
	return err
}

func (f *recordingFile) allocate(offset, n int64) error {
	err := f.file.allocate(offset, n)
	f.d.note(step{op: "allocate", inode: f.inode, size: offset + n})
	return err
}

func (f *recordingFile) dataSync() error { return f.Sync() }

func (f *recordingFile) Sync() error {
	f.d.note(step{op: "sync", inode: f.inode})
	return nil
}

// content is what is in a file.
type content []byte

// do makes one change.
func (c content) do(s step) content {
	resize := func(n int64) content {
		if n <= int64(len(c)) {
			return c[:n:n]
		}
		return append(slices.Clone(c), make([]byte, n-int64(len(c)))...)
	}
	switch s.op {
	case "truncate":
		return resize(s.size)
	case "allocate":
		return resize(max(s.size, int64(len(c))))
	case "write":
		c = slices.Clone(resize(max(s.offset+int64(len(s.data)), int64(len(c)))))
		copy(c[s.offset:], s.data)
	}
	return c
}

// blockDevice is what a file system promises: what was synced is there. Of the
// rest, any part may be: of changes of the folder the first ones, of a file's
// content any sectors, with any of its sizes.
type blockDevice struct {
	durable map[int]content
	pending map[int][]step
	folder  map[string]int
	changes []step
}

// take applies one step.
func (b *blockDevice) take(s step) {
	switch s.op {
	case "create":
		b.changes = append(b.changes, s)
	case "rename", "remove":
		b.changes = append(b.changes, s)
	case "syncdir":
		b.folder = b.folderAfter(len(b.changes))
		b.changes = nil
	case "sync":
		b.durable[s.inode] = b.contentNow(s.inode)
		delete(b.pending, s.inode)
	case "write", "truncate", "allocate":
		b.pending[s.inode] = append(b.pending[s.inode], s)
	}
}

func (b *blockDevice) contentNow(inode int) content {
	c := b.durable[inode]
	for _, s := range b.pending[inode] {
		c = c.do(s)
	}
	return c
}

// folderAfter is the folder with the first n of the changes that are not durable.
func (b *blockDevice) folderAfter(n int) map[string]int {
	f := maps.Clone(b.folder)
	for _, s := range b.changes[:n] {
		switch s.op {
		case "create":
			f[s.name] = s.inode
		case "rename":
			f[s.to] = f[s.name]
			delete(f, s.name)
		case "remove":
			delete(f, s.name)
		}
	}
	return f
}

// How much of what was not synced is there.
const (
	loseAll = iota
	loseNothing
	loseSome
)

// fail writes what is on the disk after the power has failed.
func (b *blockDevice) fail(t *testing.T, dir string, how int, random *rand.Rand) {
	t.Helper()
	n := 0
	switch how {
	case loseNothing:
		n = len(b.changes)
	case loseSome:
		n = random.IntN(len(b.changes) + 1)
	}
	for name, inode := range b.folderAfter(n) {
		c := b.durable[inode]
		switch how {
		case loseNothing:
			c = b.contentNow(inode)
		case loseSome:
			c = torn(c, b.pending[inode], random)
		}
		if err := os.WriteFile(filepath.Join(dir, name), c, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// torn is a file some of whose changes have reached the disk, sector by sector.
func torn(before content, pending []step, random *rand.Rand) content {
	const sector = 512
	after, c := before, before
	size := int64(len(before))
	for _, s := range pending {
		after = after.do(s)
		if random.IntN(2) == 0 {
			size = int64(len(after)) // the sizes come to the disk in their order
		}
	}
	c = c.do(step{op: "truncate", size: max(int64(len(before)), int64(len(after)))})
	c = slices.Clone(c)
	for at := 0; at < len(after); at += sector {
		if random.IntN(2) == 0 {
			copy(c[at:min(at+sector, len(after))], after[at:])
		}
	}
	return c[:min(size, int64(len(c)))]
}

// TestFault_F4_PowerFailsAtEachStep writes a journal while the power fails after
// each step that is done to the disk, with all, nothing or some of what was not
// synced on it. Whatever was acknowledged before is there, and the journal goes on;
// the next round begins with what one of the failures has left.
func TestFault_F4_PowerFailsAtEachStep(t *testing.T) {
	t.Parallel()
	want := defaultPoints
	if text := os.Getenv(powerVariable); text != "" {
		var err error
		if want, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	acknowledged := map[uint64][32]byte{}
	points, unacknowledged := 0, 0
	for round := 0; points < want; round++ {
		if round%10 == 0 { // a new journal, so that each round is short
			dir = t.TempDir()
			clear(acknowledged)
		}
		steps, start := recordRound(t, dir, round)
		next := rand.New(rand.NewPCG(seed, uint64(round))).IntN(len(steps))
		b := &blockDevice{durable: map[int]content{}, pending: map[int][]step{}, folder: map[string]int{}}
		maps.Copy(b.durable, start.durable)
		maps.Copy(b.folder, start.folder)
		continued := ""
		for i, s := range steps {
			if s.op == "ack" {
				acknowledged[s.ack] = s.hash
				continue
			}
			b.take(s)
			for _, how := range []int{loseAll, loseNothing, loseSome, loseSome, loseSome} {
				crashed := t.TempDir()
				b.fail(t, crashed, how, random)
				found := checkCrashed(t, crashed, acknowledged)
				if t.Failed() {
					t.Fatalf("round %d, after step %d (%s), lost %d", round, i, s.op, how)
				}
				unacknowledged += found - len(acknowledged)
				points++
				if i >= next && continued == "" && how == loseSome {
					// The next round begins here, in a copy that was never opened.
					continued = t.TempDir()
					b.fail(t, continued, how, random)
				} else if err := os.RemoveAll(crashed); err != nil {
					t.Fatal(err)
				}
			}
			if continued != "" {
				break
			}
		}
		if continued == "" {
			continued = t.TempDir()
			b.fail(t, continued, loseAll, random)
		}
		dir = continued
	}
	t.Logf("the power failed %d times; 0 acknowledged records lost; %d that nobody was told of were kept", points, unacknowledged)
}

// recordRound opens the journal in dir, which the power has just been given back
// to, and has several callers append to it.
func recordRound(t *testing.T, dir string, round int) (steps []step, start *blockDevice) {
	t.Helper()
	d := &recordingDisk{dir: dir, names: map[string]int{}}
	start = &blockDevice{durable: map[int]content{}, folder: map[string]int{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		d.inodes++
		d.names[e.Name()], start.folder[e.Name()] = d.inodes, d.inodes
		start.durable[d.inodes] = b
	}
	j, err := Open(dir, Options{disk: d, SegmentBytes: minSegmentBytes})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			for i := range 4 {
				drafts := []*Draft{testDraft(fmt.Sprintf("%d-%d-%d", round, g, i))}
				if (g+i)%3 == 0 {
					drafts = append(drafts, testDraft("second"), testDraft("third"))
				}
				durables, err := j.Append(context.Background(), drafts...)
				if err != nil {
					t.Error(err)
					return
				}
				for _, r := range durables {
					d.note(step{op: "ack", ack: r.Index(), hash: r.Hash()})
				}
			}
		})
	}
	wg.Wait()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	return d.steps, start
}

// checkCrashed opens what a power failure has left, as the CA does, and returns how
// many records there are.
func checkCrashed(t *testing.T, dir string, acknowledged map[uint64][32]byte) int {
	t.Helper()
	j, err := Open(dir, Options{disk: hastyDisk{}, SegmentBytes: minSegmentBytes})
	if err != nil {
		t.Error(err)
		return 0
	}
	size := j.Size()
	d, err := j.Append(context.Background(), testDraft("after"))
	if err != nil || d[0].Index() != size {
		t.Errorf("it does not go on: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	found := 0
	for e, err := range Scan(dir, 0) {
		if err != nil {
			t.Error(err)
			return found
		}
		if hash, ok := acknowledged[e.Index]; ok && hash != e.Hash {
			t.Errorf("record %d is not the one that was acknowledged", e.Index)
		}
		found++
	}
	for index := range acknowledged {
		if index >= size {
			t.Errorf("record %d was acknowledged and is gone", index)
		}
	}
	if uint64(found) != size+1 {
		t.Errorf("%d records can be read, of %d", found, size+1)
	}
	return int(size)
}
