package tree

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// testDraft is a draft whose record has this request id.
func testDraft(id string) *ledger.Draft {
	sum := sha256.Sum256([]byte(id))
	return ledger.NewDraft(&ledgerv1.Record{
		Version: 1, Time: timestamppb.New(time.Date(2026, 11, 23, 14, 31, 5, 0, time.UTC)),
		Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: "example.org", SpiffeId: "spiffe://example.org/ns/shop/app/orders",
		Certificate: &ledgerv1.Certificate{Serial: sum[:16], Sha256: sum[:]}, RequestId: id,
	}, nil)
}

// env is a CA's data folder with a journal, and a tree that can be stopped and
// started again.
type env struct {
	t       testing.TB
	dir     string
	options Options
	journal *ledger.Journal
	tree    *Tree
	done    chan error
	count   int
}

func newEnv(t testing.TB) *env {
	t.Helper()
	e := &env{t: t, dir: t.TempDir(), options: Options{
		Origin: "example.org/ca-1", Interval: time.Millisecond, retry: backoff.Policy{Base: time.Millisecond, Max: 10 * time.Millisecond},
	}}
	e.options.Key = filepath.Join(e.dir, "keys", "log.key")
	t.Cleanup(e.stop)
	return e
}

func (e *env) journalDir() string { return filepath.Join(e.dir, "ledger") }
func (e *env) treeDir() string    { return filepath.Join(e.dir, "tree") }

// open opens the journal and the tree, which does not run yet.
func (e *env) open() {
	e.t.Helper()
	var err error
	if e.journal, err = ledger.Open(e.journalDir(), ledger.Options{SegmentBytes: 64 << 10}); err != nil {
		e.t.Fatal(err)
	}
	if e.tree, err = Open(e.treeDir(), e.journal, e.options); err != nil {
		e.t.Fatal(err)
	}
}

// start opens both and runs the tree.
func (e *env) start() {
	e.t.Helper()
	e.open()
	e.done = make(chan error, 1)
	go func() { e.done <- e.tree.Run(context.Background()) }()
}

// stop closes both. It may be called again.
func (e *env) stop() {
	if e.journal == nil {
		return
	}
	if err := e.journal.Close(); err != nil {
		e.t.Error(err)
	}
	if e.done == nil {
		if err := e.tree.lock.Release(); err != nil {
			e.t.Error(err)
		}
	} else if err := <-e.done; err != nil {
		e.t.Error(err)
	}
	e.journal, e.done = nil, nil
}

// kill ends both as a crash would: what the disk does not take is lost.
func (e *env) kill() {
	if err := e.journal.Close(); err != nil {
		e.t.Error(err)
	}
	<-e.done // its error is that of the disk
	e.journal, e.done = nil, nil
}

// append adds n records to the journal.
func (e *env) append(n int) {
	e.t.Helper()
	for n > 0 {
		k := min(n, 500)
		drafts := make([]*ledger.Draft, k)
		for i := range drafts {
			drafts[i] = testDraft(fmt.Sprintf("r-%d", e.count))
			e.count++
		}
		if _, err := e.journal.Append(context.Background(), drafts...); err != nil {
			e.t.Fatal(err)
		}
		n -= k
	}
}

// await waits until something holds.
func (e *env) await(what string, ok func() bool) {
	e.t.Helper()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	deadline := time.After(time.Minute)
	for !ok() {
		select {
		case <-look.C:
		case <-deadline:
			e.t.Fatalf("waited in vain for %s; halted: %v, problem: %v", what, e.tree.Halted(), e.tree.problemNow())
		}
	}
}

// covered waits until a checkpoint covers the journal.
func (e *env) covered() Checkpoint {
	e.t.Helper()
	e.await("a checkpoint", func() bool { return e.tree.Checkpoint().Note != nil && e.tree.Checkpoint().Size == e.journal.Size() })
	return e.tree.Checkpoint()
}

// verifier verifies with the log's key.
func (e *env) verifier() Verifier {
	e.t.Helper()
	key, err := ReadKey(e.options.Key)
	if err != nil {
		e.t.Fatal(err)
	}
	return Verifier{Key: key.Verifier()}
}

// verify verifies everything, and returns the checkpoint.
func (e *env) verify() Checkpoint {
	e.t.Helper()
	r, err := e.verifier().Verify(context.Background(), e.treeDir(), e.journalDir())
	if err != nil {
		e.t.Fatalf("verify: %v", err)
	}
	return r.Checkpoint
}

// hashes returns the hashes of the journal's records.
func (e *env) hashes() []tlog.Hash {
	e.t.Helper()
	var hashes []tlog.Hash
	for r, err := range ledger.Scan(e.journalDir(), 0) {
		if err != nil {
			e.t.Fatal(err)
		}
		hashes = append(hashes, r.Hash)
	}
	return hashes
}

// naiveRoot is RFC 6962 §2.1 as it is written there.
func naiveRoot(leaves []tlog.Hash) tlog.Hash {
	switch len(leaves) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return leaves[0]
	}
	k := 1
	for 2*k < len(leaves) {
		k *= 2
	}
	return tlog.NodeHash(naiveRoot(leaves[:k]), naiveRoot(leaves[k:]))
}

// copyTree copies a folder with all that is below it.
func copyTree(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"keys": 0o700, "keys/log.key": 0o600} {
		if err := os.Chmod(filepath.Join(to, name), mode); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return to
}

// faultyDisk is the real disk, which fails before or after it has done its work as
// it is told to.
type faultyDisk struct {
	mu    sync.Mutex
	calls map[string]int
	fault func(op string, n int, after bool) error
}

func (d *faultyDisk) do(op string, work func() error) error {
	d.mu.Lock()
	if d.calls == nil {
		d.calls = map[string]int{}
	}
	n := d.calls[op]
	d.calls[op]++
	fault := d.fault
	d.mu.Unlock()
	if fault == nil {
		return work()
	}
	if err := fault(op, n, false); err != nil {
		return err
	}
	if err := work(); err != nil {
		return err
	}
	return fault(op, n, true)
}

func (d *faultyDisk) set(fault func(op string, n int, after bool) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = fault
	d.calls = nil
}

func (d *faultyDisk) mkdir(path string) error {
	return d.do("mkdir", func() error { return osDisk{}.mkdir(path) })
}

func (d *faultyDisk) write(path string, b []byte) error {
	return d.do("write", func() error { return osDisk{}.write(path, b) })
}

func (d *faultyDisk) rename(from, to string) error {
	return d.do("rename", func() error { return osDisk{}.rename(from, to) })
}

func (d *faultyDisk) syncDir(path string) error {
	return d.do("syncdir", func() error { return osDisk{}.syncDir(path) })
}

func (d *faultyDisk) replace(path string, b []byte) error {
	return d.do("replace "+filepath.Base(path), func() error { return osDisk{}.replace(path, b) })
}

func (d *faultyDisk) removeAll(path string) error {
	return d.do("removeall", func() error { return osDisk{}.removeAll(path) })
}
