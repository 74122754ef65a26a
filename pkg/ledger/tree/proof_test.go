package tree

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshid/meshid/pkg/ledger"
)

// TestProofs proves each record of a tree from its folder alone, and checks that
// nothing in a proof can be changed.
func TestProofs(t *testing.T) {
	t.Parallel()
	e, kept := pristine(t)
	if err := os.RemoveAll(e.journalDir()); err != nil {
		t.Fatal(err)
	}
	key := e.verifier().Key
	c, err := ReadCheckpoint(e.treeDir(), key)
	if err != nil {
		t.Fatal(err)
	}
	for index := uint64(0); index < c.Size; index += 13 {
		p, err := Prove(e.treeDir(), c, index)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := ParseProof(p.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parsed.Check(key); err != nil || got.Size != c.Size || parsed.Index != index {
			t.Fatalf("record %d: %+v, %v", index, got, err)
		}
	}
	if _, err := Prove(e.treeDir(), c, c.Size); !errors.Is(err, ErrNotCovered) {
		t.Errorf("a record that is not there: %v", err)
	}
	p, err := Prove(e.treeDir(), c, 300)
	if err != nil {
		t.Fatal(err)
	}
	encoded := p.Encode()
	// But for the last digit of the signature, of which base64 ignores some bits.
	for i := range len(encoded) - len("g=\n") {
		changed := bytes.Clone(encoded)
		changed[i] ^= 1
		q, err := ParseProof(changed)
		if err != nil {
			continue
		}
		if _, err := q.Check(key); err == nil {
			t.Errorf("byte %d may be changed: %q", i, changed[max(0, i-10):min(len(changed), i+10)])
		}
	}
	// With a checkpoint that does not cover it, or of another log.
	q := p
	q.Checkpoint = kept.Note
	if _, err := q.Check(key); err == nil {
		t.Error("a proof fits an earlier checkpoint")
	}
	other, _, err := newKey("example.org/other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Check(other.Verifier()); !errors.Is(err, ErrSignature) {
		t.Errorf("another key: %v", err)
	}
	// A bundle that was changed proves nothing, and is named.
	edit(t, filepath.Join(e.treeDir(), "tile/entries/001"), flip(-1))
	_, err = Prove(e.treeDir(), c, 511)
	if d, ok := errors.AsType[*DamageError](err); !ok || d.Path != "tile/entries/001" || d.Index != 511 {
		t.Errorf("from a bundle that was changed: %v", err)
	}
}

func TestFind(t *testing.T) {
	t.Parallel()
	e, _ := pristine(t)
	c, err := ReadCheckpoint(e.treeDir(), e.verifier().Key)
	if err != nil {
		t.Fatal(err)
	}
	for want, text := range map[uint64]string{0: "r-0", 256: "r-256", 699: "r-"} {
		got, err := Find(e.treeDir(), c, func(record []byte) bool {
			return bytes.HasSuffix(record, []byte(text)) || strings.HasSuffix(text, "-") && bytes.Contains(record, []byte(text))
		})
		if err != nil || got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	if _, err := Find(e.treeDir(), c, func([]byte) bool { return false }); !errors.Is(err, ErrNotCovered) {
		t.Errorf("nothing: %v", err)
	}
}

// TestAt compares the heads of all sizes with the root as it is defined.
func TestAt(t *testing.T) {
	t.Parallel()
	e, kept := pristine(t)
	c, err := ReadCheckpoint(e.treeDir(), e.verifier().Key)
	if err != nil {
		t.Fatal(err)
	}
	hashes := e.hashes()
	for size := uint64(0); size <= c.Size; size += 7 {
		got, err := At(e.treeDir(), c, size)
		if err != nil || got.Root != naiveRoot(hashes[:size]) {
			t.Fatalf("size %d: %x, %v", size, got.Root, err)
		}
		if err := Consistent(e.treeDir(), c, got, c); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
	}
	if err := Consistent(e.treeDir(), c, kept, c); err != nil {
		t.Error(err)
	}
	if err := Consistent(e.treeDir(), c, c, kept); !errors.Is(err, ErrInconsistent) {
		t.Errorf("the wrong way round: %v", err)
	}
	kept.Root[0] ^= 1
	if err := Consistent(e.treeDir(), c, kept, c); !errors.Is(err, ErrInconsistent) {
		t.Errorf("another tree: %v", err)
	}
}

// FuzzProof parses what somebody else calls a proof: what is accepted is encoded to
// the same, and never passes unless it is the one.
func FuzzProof(f *testing.F) {
	key, _, err := newKey("example.org/ca-1")
	if err != nil {
		f.Fatal(err)
	}
	var e edge
	record := []byte("a record")
	e.add(leafHashes([][]byte{record})[0], nil)
	c, err := sign(key, 1, e.root())
	if err != nil {
		f.Fatal(err)
	}
	good := Proof{Record: record, Checkpoint: c.Note}
	f.Add(good.Encode())
	f.Add([]byte(proofMagic + "extra AAAA\nindex 18446744073709551615\n\nx\n9223372036854775807\nAAAA\n\n— x AAAA\n"))
	f.Add([]byte(proofMagic + "extra AAAA\nindex 01\n" + strings.Repeat("A", 44) + "\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseProof(b)
		if err != nil {
			return
		}
		if len(p.Record) > ledger.MaxRecordBytes || len(p.Hashes) > maxHashes {
			t.Fatal("the bounds do not hold")
		}
		if !bytes.Equal(p.Encode(), b) {
			t.Fatalf("parsed from %q, encoded to %q", b, p.Encode())
		}
		if _, err := p.Check(key.Verifier()); err == nil && (p.Index != 0 || !bytes.Equal(p.Record, record)) {
			t.Fatalf("another record passes: %q", b)
		}
	})
}

// FuzzCheckpoint parses what somebody else calls a checkpoint, or the state.
func FuzzCheckpoint(f *testing.F) {
	key, _, err := newKey("example.org/ca-1")
	if err != nil {
		f.Fatal(err)
	}
	c, err := sign(key, 7, [32]byte{1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(c.Note)
	f.Add(state{signed: c, head: ledger.Head{Size: 7}}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := ParseCheckpoint(b, key.Verifier()); err == nil && (got.Size != 7 || got.Root != c.Root) {
			t.Fatalf("another checkpoint passes: %q", b)
		}
		if s, err := parseState(b, key.Verifier()); err == nil && (s.signed.Size != 7 || s.head.Size != 7) {
			t.Fatalf("another state passes: %q", b)
		}
		if got, err := parseText(string(b)); err == nil && (got.Size > maxSize || got.Origin == "") {
			t.Fatalf("%+v", got)
		}
	})
}

// FuzzBundle reads what is in the place of an entry bundle.
func FuzzBundle(f *testing.F) {
	f.Add(appendEntry(appendEntry(nil, []byte("a")), nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, tilePath(entriesLevel, 0, 2))
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600)); err != nil {
			t.Fatal(err)
		}
		records, err := readBundle(dir, 0, 2)
		if err != nil {
			return
		}
		if got := appendEntry(appendEntry(nil, records[0]), records[1]); !bytes.Equal(got, b) {
			t.Fatalf("read from %q, is %q", b, got)
		}
	})
}
