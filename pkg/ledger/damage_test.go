package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// pristine is a closed journal of 20 records in several segments, and where its
// frames are.
type pristine struct {
	dir    string
	head   Head
	want   []string
	firsts []uint64
	places []place
}

type place struct {
	segment    string
	start, end int64
}

func newPristine(t *testing.T) *pristine {
	t.Helper()
	p := &pristine{dir: t.TempDir(), want: ids("r", 20)}
	j := openTest(t, p.dir, Options{SegmentBytes: 4 << 10})
	appendTest(t, j, p.want...)
	p.head = j.Head()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if p.firsts, err = listSegments(p.dir); err != nil || len(p.firsts) < 4 {
		t.Fatalf("segments %v, %v", p.firsts, err)
	}
	c := &cursor{dir: p.dir}
	defer c.close()
	for range p.want {
		f, err := c.next()
		if err != nil {
			t.Fatal(err)
		}
		p.places = append(p.places, place{c.seg.name, f.offset, c.seg.offset})
	}
	return p
}

// edit changes one file of the journal in dir.
func edit(t *testing.T, dir, name string, change func(b []byte) []byte) {
	t.Helper()
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// reseal gives the frame at the beginning of b a good checksum.
func reseal(b []byte, journal [16]byte) {
	h := parseHead(b)
	h.put(b[:frameHead+padded(int(h.length))], header{journal: journal}.seed())
}

// cut removes b[i:j].
func cut(b []byte, i, j int64) []byte { return slices.Delete(bytes.Clone(b), int(i), int(j)) }

// TestV_J6_Tampering changes a closed journal as somebody might who can write its
// files, and knows the format.
func TestV_J6_Tampering(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	h, err := openSegment(p.dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	h.close()
	at := func(i int) place { return p.places[i] }
	second, last := segmentName(p.firsts[1]), segmentName(p.firsts[len(p.firsts)-1])
	mid := int(p.firsts[1]) + 1 // neither first nor last of its segment
	rows := map[string]struct {
		tamper  func(t *testing.T, dir string)
		segment string
		index   uint64
		missing bool // found by the known head only
	}{
		"edit": {
			func(t *testing.T, dir string) {
				edit(t, dir, at(mid).segment, func(b []byte) []byte { b[at(mid).start+frameHead+20] ^= 1; return b })
			}, at(mid).segment, uint64(mid), false,
		},
		"edit, with a good checksum": {
			func(t *testing.T, dir string) {
				edit(t, dir, at(mid).segment, func(b []byte) []byte {
					b[at(mid).start+frameHead+20] ^= 1
					reseal(b[at(mid).start:], h.journal)
					return b
				})
			}, at(mid).segment, uint64(mid), false,
		},
		"edit, with a good checksum and link": {
			func(t *testing.T, dir string) {
				edit(t, dir, at(mid).segment, func(b []byte) []byte {
					f := b[at(mid).start:]
					hd := parseHead(f)
					previous := parseHead(b[at(mid-1).start:]).link
					record := f[frameHead : frameHead+int(hd.length)]
					record[bytes.Index(record, []byte("orders"))] = 'O'
					link := nextLink(previous, hd.index, sha(append([]byte{leafPrefix}, record...)))
					copy(f[24:], link[:])
					reseal(f, h.journal)
					return b
				})
			}, at(mid).segment, uint64(mid) + 1, false,
		},
		"delete a record": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte { return cut(b, at(mid).start, at(mid).end) })
			}, second, uint64(mid), false,
		},
		"delete the last record of a segment": {
			func(t *testing.T, dir string) {
				i := int(p.firsts[1]) - 1
				edit(t, dir, at(i).segment, func(b []byte) []byte { return b[:at(i).start] })
			}, segmentName(0), p.firsts[1] - 1, false,
		},
		"delete the first record": {
			func(t *testing.T, dir string) {
				edit(t, dir, at(0).segment, func(b []byte) []byte { return cut(b, at(0).start, at(0).end) })
			}, segmentName(0), 0, false,
		},
		"erase a record": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte { clear(b[at(mid).start:at(mid).end]); return b })
			}, second, uint64(mid), false,
		},
		"erase a record of the last segment": {
			func(t *testing.T, dir string) {
				i := len(p.places) - 2
				edit(t, dir, last, func(b []byte) []byte { clear(b[at(i).start:at(i).end]); return b })
			}, last, uint64(len(p.places) - 2), false,
		},
		"reorder": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte {
					x, y := bytes.Clone(b[at(mid).start:at(mid).end]), bytes.Clone(b[at(mid+1).start:at(mid+1).end])
					return slices.Concat(b[:at(mid).start], y, x, b[at(mid+1).end:])
				})
			}, second, uint64(mid), false,
		},
		"reorder, with good indexes": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte {
					x, y := bytes.Clone(b[at(mid).start:at(mid).end]), bytes.Clone(b[at(mid+1).start:at(mid+1).end])
					for i, f := range [][]byte{y, x} {
						binary.BigEndian.PutUint64(f[8:], uint64(mid+i))
						binary.BigEndian.PutUint64(f[16:], uint64(mid+i))
						reseal(f, h.journal)
					}
					return slices.Concat(b[:at(mid).start], y, x, b[at(mid+1).end:])
				})
			}, second, uint64(mid), false,
		},
		"swap two segments": {
			func(t *testing.T, dir string) {
				a, b, c := filepath.Join(dir, second), filepath.Join(dir, segmentName(p.firsts[2])), filepath.Join(dir, "c")
				if err := errors.Join(os.Rename(a, c), os.Rename(b, a), os.Rename(c, b)); err != nil {
					t.Fatal(err)
				}
			}, second, p.firsts[1], false,
		},
		"remove a segment": {
			func(t *testing.T, dir string) {
				if err := os.Remove(filepath.Join(dir, second)); err != nil {
					t.Fatal(err)
				}
			}, segmentName(0), p.firsts[1], false,
		},
		"remove the first segment": {
			func(t *testing.T, dir string) {
				if err := os.Remove(filepath.Join(dir, segmentName(0))); err != nil {
					t.Fatal(err)
				}
			}, second, 0, false,
		},
		"cut a segment": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte { return b[:at(mid).start+11] })
			}, second, uint64(mid), false,
		},
		"cut a segment's header": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte { return b[:40] })
			}, second, p.firsts[1], false,
		},
		"edit a segment's header": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte { b[50] ^= 1; return b })
			}, second, p.firsts[1], false,
		},
		"give a segment another past": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte {
					hd, err := parseHeader(b)
					if err != nil {
						t.Fatal(err)
					}
					hd.previous[0] ^= 1
					return append(hd.encode(), b[headerSize:]...)
				})
			}, second, p.firsts[1], false,
		},
		"a segment of another journal": {
			func(t *testing.T, dir string) {
				other := newPristine(t)
				b, err := os.ReadFile(filepath.Join(other.dir, second))
				if err != nil {
					t.Fatal(err)
				}
				edit(t, dir, second, func([]byte) []byte { return b })
			}, second, p.firsts[1], false,
		},
		"append to a closed segment": {
			func(t *testing.T, dir string) {
				edit(t, dir, second, func(b []byte) []byte { return append(b, "more"...) })
			}, second, p.firsts[2], false,
		},
		"add a segment": {
			func(t *testing.T, dir string) {
				b, err := os.ReadFile(filepath.Join(dir, second))
				if err == nil {
					err = os.WriteFile(filepath.Join(dir, segmentName(p.firsts[1]+1)), b, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}, second, p.firsts[2], false,
		},
		"a file that looks like a segment": {
			func(t *testing.T, dir string) {
				if err := os.WriteFile(filepath.Join(dir, "1"+segmentSuffix), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}, "1" + segmentSuffix, 0, false,
		},
		"a link in place of a segment": {
			func(t *testing.T, dir string) {
				path := filepath.Join(dir, second)
				if err := errors.Join(os.Rename(path, path+"x"), os.Symlink(path+"x", path)); err != nil {
					t.Fatal(err)
				}
			}, "", 0, false,
		},
		"a record that is none": {
			func(t *testing.T, dir string) { forge(t, dir, p, []byte{0xff, 0xff}) }, last, uint64(len(p.want)), false,
		},
		"truncate the last segment": {
			func(t *testing.T, dir string) {
				i := len(p.places) - 1
				edit(t, dir, last, func(b []byte) []byte { return b[:at(i).start] })
			}, "", 0, true,
		},
		"remove the last segment": {
			func(t *testing.T, dir string) {
				if err := os.Remove(filepath.Join(dir, last)); err != nil {
					t.Fatal(err)
				}
			}, "", 0, true,
		},
		"remove all segments": {
			func(t *testing.T, dir string) {
				for _, first := range p.firsts {
					if err := os.Remove(filepath.Join(dir, segmentName(first))); err != nil {
						t.Fatal(err)
					}
				}
			}, "", 0, true,
		},
		"write it anew": {
			func(t *testing.T, dir string) {
				other := newPristine(t)
				for _, first := range p.firsts {
					b, err := os.ReadFile(filepath.Join(other.dir, segmentName(first)))
					if err != nil {
						t.Fatal(err)
					}
					edit(t, dir, segmentName(first), func([]byte) []byte { return b })
				}
			}, "", 0, true,
		},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyDir(t, p.dir)
			row.tamper(t, dir)
			r, err := Verify(t.Context(), dir, p.head)
			if err == nil {
				t.Fatal("not found")
			}
			t.Log(err)
			if row.missing {
				if !errors.Is(err, ErrMissing) || r.Damage != nil {
					t.Errorf("error is %v", err)
				}
				return
			}
			if row.segment == "" {
				return
			}
			if r.Damage == nil || r.Damage.Segment != row.segment || r.Damage.Index != row.index {
				t.Fatalf("found %+v, want %s, record %d", r.Damage, row.segment, row.index)
			}
			if r.Head.Size > row.index {
				t.Errorf("%d records are called sound", r.Head.Size)
			}
			if _, err := scanIDs(dir, 0); err == nil {
				t.Error("a scan does not find it")
			}
		})
	}
	if r, err := Verify(t.Context(), p.dir, p.head); err != nil || r.TornBytes != 0 || r.Head != p.head || r.Segments != len(p.firsts) {
		t.Errorf("the untouched journal: %+v, %v", r, err)
	}
}

// forge appends a frame that is right in all but its record.
func forge(t *testing.T, dir string, p *pristine, record []byte) {
	t.Helper()
	edit(t, dir, segmentName(p.firsts[len(p.firsts)-1]), func(b []byte) []byte {
		hd, err := parseHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		n := len(b)
		b = append(b, make([]byte, frameHead)...)
		b = append(b, record...)
		b = append(b, make([]byte, padded(len(b))-len(b))...)
		head{
			length: uint32(len(record)), index: p.head.Size, base: p.head.Size,
			link: nextLink(p.head.Link, p.head.Size, sha(append([]byte{leafPrefix}, record...))),
		}.put(b[n:], hd.seed())
		return b
	})
}

// TestFault_F18_TornTail damages the end of the last segment: the journal opens, and
// what is before the damage is there.
func TestFault_F18_TornTail(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	n := len(p.places)
	lastFrame := p.places[n-1]
	rows := map[string]struct {
		change func(b []byte) []byte
		keep   int
	}{
		"cut in the record": {func(b []byte) []byte { return b[:lastFrame.end-100] }, n - 1},
		"cut in the head":   {func(b []byte) []byte { return b[:lastFrame.start+13] }, n - 1},
		// The first two bytes of a length are zero: nothing is to be seen of it.
		"cut in the length":     {func(b []byte) []byte { return b[:lastFrame.start+2] }, n - 1},
		"one byte missing":      {func(b []byte) []byte { return b[:lastFrame.end-1] }, n - 1},
		"flipped in the record": {func(b []byte) []byte { b[lastFrame.end-100] ^= 1; return b }, n - 1},
		"flipped in the link":   {func(b []byte) []byte { b[lastFrame.start+30] ^= 1; return b }, n - 1},
		"flipped in the length": {func(b []byte) []byte { b[lastFrame.start+2] ^= 1; return b }, n - 1},
		"huge length":           {func(b []byte) []byte { b[lastFrame.start] = 0xff; return b }, n - 1},
		"length zero":           {func(b []byte) []byte { clear(b[lastFrame.start : lastFrame.start+4]); return b }, n - 1},
		"head zero":             {func(b []byte) []byte { clear(b[lastFrame.start : lastFrame.start+frameHead]); return b }, n - 1},
		"zeros behind":          {func(b []byte) []byte { return append(b, make([]byte, 100_000)...) }, n},
		"garbage behind":        {func(b []byte) []byte { return append(b, bytes.Repeat([]byte("garbage"), 100_000)...) }, n},
		"garbage behind zeros":  {func(b []byte) []byte { return append(append(b, make([]byte, 70_000)...), "garbage"...) }, n},
		"the last one twice": {func(b []byte) []byte {
			return append(append(b, make([]byte, 8)...), b[lastFrame.start:lastFrame.end]...)
		}, n},
		"half a megabyte of a record": {func(b []byte) []byte {
			h := head{length: MaxRecordBytes, index: uint64(n), base: uint64(n)}
			f := make([]byte, 512<<10)
			h.put(f, 0)
			return append(b, f...)
		}, n},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyDir(t, p.dir)
			edit(t, dir, lastFrame.segment, row.change)
			if r, err := Verify(t.Context(), dir); err != nil || r.Head.Size != uint64(row.keep) {
				t.Errorf("verify before: %+v, %v", r, err)
			}
			var log bytes.Buffer
			j := openTest(t, dir, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
			wantIDs(t, dir, p.want[:row.keep])
			if cut := strings.Contains(log.String(), "interrupted write"); cut != (name != "zeros behind" && name != "cut in the length") {
				t.Errorf("log: %s", log.String())
			}
			appendTest(t, j, "after")
			if err := j.Close(); err != nil {
				t.Error(err)
			}
			wantIDs(t, dir, append(slices.Clone(p.want[:row.keep]), "after"))
		})
	}
}

// TestFault_F18_NotATornTail damages what was durable once: Open refuses, names the
// place, and leaves it as it is.
func TestFault_F18_NotATornTail(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	n := len(p.places)
	lastSegment := p.places[n-1].segment
	target := p.places[n-2] // there is one durable record behind it
	rows := map[string]func(b []byte) []byte{
		"flipped in the record": func(b []byte) []byte { b[target.start+frameHead+9] ^= 1; return b },
		"flipped in the length": func(b []byte) []byte { b[target.start+3] ^= 1; return b },
		"huge length":           func(b []byte) []byte { b[target.start] = 0x7f; return b },
		"erased":                func(b []byte) []byte { clear(b[target.start:target.end]); return b },
		"removed":               func(b []byte) []byte { return cut(b, target.start, target.end) },
		"removed by 64 KiB of nothing": func(b []byte) []byte {
			return slices.Concat(b[:target.start], make([]byte, 1<<16), b[target.end:])
		},
		"removed by 256 KiB of nothing, less a little": func(b []byte) []byte {
			return slices.Concat(b[:target.start], make([]byte, readBytes-int(target.start)%8-24), b[target.end:])
		},
	}
	for name, change := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := copyDir(t, p.dir)
			edit(t, dir, lastSegment, change)
			damaged, err := os.ReadFile(filepath.Join(dir, lastSegment))
			if err != nil {
				t.Fatal(err)
			}
			j, err := Open(dir, Options{})
			if err == nil {
				j.Close()
				t.Fatal("opened")
			}
			damage, ok := errors.AsType[*DamageError](err)
			if !ok || damage.Segment != lastSegment || damage.Offset != target.start || damage.Index != uint64(n-2) {
				t.Errorf("error is %v", err)
			}
			if now, err := os.ReadFile(filepath.Join(dir, lastSegment)); err != nil || !bytes.Equal(now, damaged) {
				t.Error("the segment was changed")
			}
		})
	}
	t.Run("header", func(t *testing.T) {
		t.Parallel()
		dir := copyDir(t, p.dir)
		edit(t, dir, lastSegment, func(b []byte) []byte { b[3] ^= 1; return b })
		if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), lastSegment) {
			t.Errorf("error is %v", err)
		}
	})
}

// TestUnfinishedSegment finds what a crash left while a segment was made.
func TestUnfinishedSegment(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	unfinished := filepath.Join(p.dir, segmentName(p.head.Size)+newSuffix)
	if err := os.WriteFile(unfinished, []byte("meshid"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantIDs(t, p.dir, p.want)
	openTest(t, p.dir, Options{})
	if _, err := os.Stat(unfinished); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

// TestScanFrom begins at each record, and behind the last.
func TestScanFrom(t *testing.T) {
	t.Parallel()
	p := newPristine(t)
	for from := range uint64(23) {
		got, err := scanIDs(p.dir, from)
		if want := p.want[min(int(from), 20):]; err != nil || !slices.Equal(got, want) {
			t.Fatalf("from %d: %v, %v", from, got, err)
		}
	}
	for range Scan(p.dir, 0) {
		break
	}
	if got, err := scanIDs(t.TempDir(), 0); got != nil || err != nil {
		t.Errorf("empty directory: %v, %v", got, err)
	}
	if _, err := scanIDs(filepath.Join(p.dir, "none"), 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestHead(t *testing.T) {
	t.Parallel()
	h := Head{Size: 918273, Link: sha([]byte("x"))}
	if got, err := ParseHead(h.String()); err != nil || got != h {
		t.Errorf("%v, %v", got, err)
	}
	for _, s := range []string{"", "1", "1:", ":" + h.String()[7:], "-1" + h.String()[6:], h.String() + "0", h.String()[:40], "x"} {
		if _, err := ParseHead(s); err == nil {
			t.Errorf("%q accepted", s)
		}
	}
}

// FuzzScan reads a segment of any bytes, with good checksums where the input asks
// for them, so that the fuzzer gets past them.
func FuzzScan(f *testing.F) {
	journal := [16]byte{1}
	h := header{journal: journal, previous: genesis(journal)}
	segment := func(records ...*ledgerv1.Record) []byte {
		b, link := h.encode(), h.previous
		for i, r := range records {
			d := NewDraft(r, nil)
			link = nextLink(link, uint64(i), d.hash)
			n := len(b)
			b = append(b, d.frame...)
			b = append(b, make([]byte, padded(len(b))-len(b))...)
			head{length: uint32(len(d.frame) - frameHead), index: uint64(i), base: uint64(i), link: link}.put(b[n:], h.seed())
		}
		return b
	}
	one, _ := testRecord("a")
	two, _ := testRecord("b")
	f.Add(segment(), false)
	f.Add(segment(one), false)
	f.Add(segment(one, two), true)
	f.Add(segment(one, two)[:900], true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= headerSize {
			copy(b, h.encode())
			for at := headerSize; at+frameHead <= len(b); {
				hd := parseHead(b[at:])
				end := at + frameHead + padded(int(hd.length))
				if hd.length == 0 || hd.length > MaxRecordBytes || end > len(b) {
					break
				}
				hd.put(b[at:end], h.seed())
				at = end
			}
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, segmentName(0)), b, 0o600); err != nil {
			t.Fatal(err)
		}
		next := uint64(0)
		var scanErr error
		for e, err := range Scan(dir, 0) {
			if scanErr = err; err != nil {
				break
			}
			if e.Index != next || e.Hash != sha(append([]byte{leafPrefix}, e.Raw...)) {
				t.Fatalf("entry %d, want %d", e.Index, next)
			}
			next++
			if _, err := FormatJSON(e); err != nil && !strings.Contains(err.Error(), "proto:") {
				t.Fatal(err)
			}
			if r := new(ledgerv1.Record); proto.Unmarshal(e.Raw, r) != nil || !proto.Equal(r, e.Record) {
				t.Fatal("the record is not its bytes")
			}
		}
		r, err := Verify(t.Context(), dir)
		if (err == nil) != (scanErr == nil) || r.Head.Size != next {
			t.Fatalf("scan %v (%d), verify %v (%d)", scanErr, next, err, r.Head.Size)
		}
		j, err := Open(dir, Options{SegmentBytes: minSegmentBytes, disk: hastyDisk{}})
		if err != nil {
			return
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if scanErr == nil && j.Size() != next {
			t.Fatalf("open finds %d records, scan %d", j.Size(), next)
		}
	})
}
