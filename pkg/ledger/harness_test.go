package ledger

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

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashMain(dir, os.Stdout) // until it is killed
		return
	}
	if os.Getenv(panicking) != "" {
		panicMain(os.Stdout)
		return
	}
	m.Run()
}

// testRecord is a record of the usual size, and the chain that goes with it.
func testRecord(id string) (*ledgerv1.Record, [][]byte) {
	leaf := sha256.Sum256([]byte(id))
	chain := [][]byte{[]byte("leaf " + id), []byte("intermediate")}
	sum := sha256.Sum256(chain[0])
	now := time.Date(2026, 11, 23, 14, 31, 5, 123456000, time.UTC)
	return &ledgerv1.Record{
		Version: 1, Time: timestamppb.New(now),
		Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: "example.org", SpiffeId: "spiffe://example.org/ns/shop/app/orders",
		Certificate: &ledgerv1.Certificate{
			Serial: leaf[:16], Sha256: sum[:], SpkiSha256: leaf[:], KeyAlgorithm: "EC-P256",
			NotBefore: timestamppb.New(now), NotAfter: timestamppb.New(now.Add(time.Hour)),
			DnsNames: []string{"orders.shop.internal"},
		},
		Kind: ledgerv1.Kind_KIND_FIRST, Instance: "docker:4f1c",
		Workload: &attributesv1.Workload{
			Unix: &attributesv1.Unix{Uid: 1000, Gid: 1000, Path: "/usr/bin/orders"},
			Docker: &attributesv1.Docker{
				ContainerId: "4f1c5d2b8a", Image: "registry.internal/shop/orders:1.4",
				Labels: map[string]string{"app": "orders", "team": "shop", "ns": "shop"},
			},
		},
		VerifiedBy: "agent",
		Node:       &ledgerv1.NodeRef{Id: "spiffe://example.org/meshid/node/x509pop/vm-7", Address: "10.0.3.7:41234", AgentVersion: "0.1.0"},
		Entry:      &ledgerv1.EntryRef{Name: "shop", Revision: 17, Digest: leaf[:]},
		Authority:  &ledgerv1.Authority{Id: "0a1b2c3d", Role: "intermediate", State: "active"},
		CaInstance: "ca-2", RequestId: id, Took: durationpb.New(412 * time.Microsecond),
	}, chain
}

// testDraft is a draft whose record has this request id.
func testDraft(id string) *Draft { return NewDraft(testRecord(id)) }

// openTest opens a journal that is closed with the test.
func openTest(t testing.TB, dir string, o Options) *Journal {
	t.Helper()
	j, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// appendTest appends one record for each id.
func appendTest(t testing.TB, j *Journal, ids ...string) []*Durable {
	t.Helper()
	var all []*Durable
	for _, id := range ids {
		d, err := j.Append(context.Background(), testDraft(id))
		if err != nil {
			t.Errorf("append %s: %v", id, err) // also called outside the test's goroutine
			return all
		}
		all = append(all, d...)
	}
	return all
}

// ids returns n different request ids.
func ids(prefix string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("%s-%d", prefix, i)
	}
	return list
}

// scanIDs returns the request ids of the journal in dir, and the error with which
// the scan ended.
func scanIDs(dir string, from uint64) ([]string, error) {
	var list []string
	next := from
	for e, err := range Scan(dir, from) {
		if err != nil {
			return list, err
		}
		if e.Index != next {
			return list, fmt.Errorf("index %d, want %d", e.Index, next)
		}
		next++
		list = append(list, e.Record.GetRequestId())
	}
	return list, nil
}

// wantIDs checks what is in the journal.
func wantIDs(t testing.TB, dir string, want []string) {
	t.Helper()
	got, err := scanIDs(dir, 0)
	if err != nil {
		t.Fatalf("scan: %v", err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("records (-want +got):\n%s", d)
	}
	if r, err := Verify(context.Background(), dir); err != nil || r.Head.Size != uint64(len(want)) {
		t.Fatalf("verify: size %d, want %d: %v", r.Head.Size, len(want), err)
	}
}

// copyDir copies the files of a journal to a new directory.
func copyDir(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, e.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// faultyDisk is the real disk, which fails as it is told to.
type faultyDisk struct {
	mu    sync.Mutex
	calls map[string]int
	// fault is called before and after each operation; an error from it is the
	// operation's. Before a write, partial is how much of it is done.
	before func(op string, n int) (partial int, err error)
	after  func(op string, n int) error
}

func (d *faultyDisk) do(op string, work func() error) error {
	return d.write(op, func(int) error { return work() })
}

// write runs one operation with its faults.
func (d *faultyDisk) write(op string, work func(limit int) error) error {
	d.mu.Lock()
	if d.calls == nil {
		d.calls = map[string]int{}
	}
	n := d.calls[op]
	d.calls[op]++
	before, after := d.before, d.after
	d.mu.Unlock()
	if before != nil {
		if partial, err := before(op, n); err != nil {
			if partial > 0 {
				err = errors.Join(err, work(partial))
			}
			return err
		}
	}
	if err := work(-1); err != nil {
		return err
	}
	if after != nil {
		return after(op, n)
	}
	return nil
}

// count is the number of calls of op so far.
func (d *faultyDisk) count(op string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[op]
}

// set replaces the faults.
func (d *faultyDisk) set(before func(op string, n int) (int, error), after func(op string, n int) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before, d.after = before, after
}

func (d *faultyDisk) create(path string) (f file, err error) {
	err = d.do("create", func() error { f, err = osDisk{}.create(path); return err })
	return &faultyFile{f, d}, err
}

func (d *faultyDisk) open(path string) (f file, err error) {
	err = d.do("open", func() error { f, err = osDisk{}.open(path); return err })
	return &faultyFile{f, d}, err
}

func (d *faultyDisk) rename(from, to string) error {
	return d.do("rename", func() error { return osDisk{}.rename(from, to) })
}

func (d *faultyDisk) remove(path string) error {
	return d.do("remove", func() error { return osDisk{}.remove(path) })
}

func (d *faultyDisk) syncDir(dir string) error {
	return d.do("syncdir", func() error { return osDisk{}.syncDir(dir) })
}

// faultyFile is a file of a faultyDisk.
type faultyFile struct {
	file
	d *faultyDisk
}

func (f *faultyFile) WriteAt(p []byte, offset int64) (n int, err error) {
	err = f.d.write("write", func(limit int) error {
		if limit >= 0 {
			p = p[:min(limit, len(p))]
		}
		n, err = f.file.WriteAt(p, offset)
		return err
	})
	return n, err
}

func (f *faultyFile) Truncate(size int64) error {
	return f.d.do("truncate", func() error { return f.file.Truncate(size) })
}

func (f *faultyFile) allocate(offset, n int64) error {
	return f.d.do("allocate", func() error { return f.file.allocate(offset, n) })
}

func (f *faultyFile) dataSync() error { return f.d.do("datasync", f.file.dataSync) }
func (f *faultyFile) Sync() error     { return f.d.do("sync", f.file.Sync) }

// sha is SHA-256, for expectations.
func sha(b []byte) [32]byte { return sha256.Sum256(b) }

// hastyDisk is the real disk without the waiting, for tests of much else.
type hastyDisk struct{ osDisk }

func (hastyDisk) syncDir(string) error { return nil }

func (hastyDisk) create(path string) (file, error) {
	f, err := osDisk{}.create(path)
	return hastyFile{f}, err
}

func (hastyDisk) open(path string) (file, error) {
	f, err := osDisk{}.open(path)
	return hastyFile{f}, err
}

type hastyFile struct{ file }

func (hastyFile) Sync() error     { return nil }
func (hastyFile) dataSync() error { return nil }

// follow calls fn for each durable record from index from on, until there is an
// error.
func follow(ctx context.Context, j *Journal, from uint64, fn func(Entry) error) error {
	tail := j.Tail(from)
	defer tail.Close()
	for {
		batch, err := tail.Next(ctx, 0)
		if err != nil {
			return err
		}
		for _, e := range batch {
			if err := fn(e); err != nil {
				return err
			}
		}
	}
}
