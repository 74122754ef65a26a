package ledger

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"
	"time"
)

// allocateBytes is the space that is reserved at a time. A file system makes data in
// blocks that were written before durable with nothing but the data; where blocks are
// new, or reserved and never written, or the size of the file grows, it has to make
// its own notes durable as well, which takes twice as long and more. So space is
// filled with zeros first, some hundred records at a time: the batch that needs it
// pays for all of them.
const allocateBytes = 256 << 10

// ErrFull is wrapped by the error of Append while there is no space for more
// records. Nothing was written; the journal goes on by itself when there is
// space.
var ErrFull = errors.New("no space for the ledger: free some on its file system")

// ErrFailed is wrapped by the error of Append after a write or an fsync failed.
// It stays: what has reached the disk is unknown, and an fsync that is tried
// again reports success for data that is lost. Opening the journal anew examines
// it.
var ErrFailed = errors.New("ledger failed: repair the disk and restart")

// failure is why a batch was not recorded.
type failure struct {
	reason string // label of the metric
	final  bool
	err    error
}

// full is the failure that can be overcome.
func full(op string, err error) *failure {
	return &failure{reason: reasonFull, err: fmt.Errorf("%s: %w: %w", op, ErrFull, err)}
}

// broken is the failure that cannot.
func broken(reason, op string, err error) *failure {
	return &failure{reason: reason, final: true, err: fmt.Errorf("%s: %w: %w", op, ErrFailed, err)}
}

// writer appends batches to the last segment. It is owned by one goroutine. All
// of its fields describe what is durable.
type writer struct {
	disk         disk
	dir          string
	segmentBytes int64
	metrics      *metrics

	journal [16]byte
	seed    uint32
	next    uint64   // index of the next record
	link    [32]byte // before it

	file      file         // the last segment; nil if that is closed and the next not begun
	first     uint64       // index of its first record
	offset    int64        // behind its last frame
	allocated int64        // bytes that the file has blocks for
	closed    atomic.Int64 // bytes in the segments before; Archive lowers it
	segments  atomic.Int64 // Archive lowers it

	buf []byte
}

// append makes one batch durable, with one write and one fdatasync, and returns its
// records.
func (w *writer) append(batch []*request) ([]Entry, *failure) {
	size, records := 0, 0
	for _, r := range batch {
		size += r.bytes
		records += len(r.drafts)
	}
	if f := w.room(int64(size)); f != nil {
		return nil, f
	}
	w.buf = w.buf[:0]
	entries := make([]Entry, 0, records)
	index, link := w.next, w.link
	for _, r := range batch {
		r.first = index
		for _, d := range r.drafts {
			link = nextLink(link, index, d.hash)
			place := Place{Segment: w.first, Offset: w.offset + int64(len(w.buf))}
			w.frame(d, head{length: uint32(len(d.frame) - frameHead), index: index, base: w.next, link: link}) //nolint:gosec // G115: at most MaxRecordBytes
			entries = append(entries, Entry{Index: index, Record: d.record, Hash: d.hash, Link: link, Raw: d.frame[frameHead:], Place: place})
			index++
		}
	}
	if f := w.write(w.buf); f != nil {
		return nil, f
	}
	w.metrics.records.Add(float64(index - w.next))
	w.metrics.batch.Observe(float64(index - w.next))
	w.offset += int64(len(w.buf))
	w.next, w.link = index, link
	w.observe()
	if cap(w.buf) > 2*maxBatchBytes { // a rare, large batch is not kept
		w.buf = nil
	}
	return entries, nil
}

// frame adds d's frame to the buffer.
func (w *writer) frame(d *Draft, h head) {
	start := len(w.buf)
	w.buf = append(w.buf, d.frame...)
	for len(w.buf)%alignment != 0 {
		w.buf = append(w.buf, 0)
	}
	h.put(w.buf[start:], w.seed)
}

// room makes sure that there is a segment for n bytes more.
func (w *writer) room(n int64) *failure {
	if w.file != nil && w.offset > headerSize && w.offset+n > w.segmentBytes {
		if f := w.seal(); f != nil {
			return f
		}
	}
	if w.file == nil {
		if f := w.begin(); f != nil {
			return f
		}
	}
	if w.offset+n > w.allocated {
		w.allocated = allocate(w.file, w.offset, n, w.segmentBytes)
	}
	return nil
}

// write puts b behind the last frame, durably. If there is no space, the file is
// as before.
func (w *writer) write(b []byte) *failure {
	n, err := w.file.WriteAt(b, w.offset)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if noSpace(err) {
		// What was written is not on the disk in any way that counts, and goes.
		if terr := w.file.Truncate(w.offset); terr != nil {
			return broken(reasonWrite, "undo write to ledger", errors.Join(terr, err))
		}
		w.allocated = w.offset
		return full("write to ledger", err)
	}
	if err != nil {
		return broken(reasonWrite, "write to ledger", err)
	}
	start := time.Now()
	if err := w.file.dataSync(); err != nil {
		return broken(reasonSync, "write to ledger", err)
	}
	w.metrics.sync.Observe(time.Since(start).Seconds())
	return nil
}

// allocate reserves space for at least n bytes from offset on and returns how far
// it reaches. That it cannot is no failure: the write will say so, if it matters.
func allocate(f file, offset, n, segmentBytes int64) int64 {
	n = max(n, min(allocateBytes, segmentBytes-offset))
	if err := f.allocate(offset, n); err != nil {
		return offset
	}
	return offset + n
}

// seal ends the last segment: space that was reserved goes, so that it ends with
// its last frame.
func (w *writer) seal() *failure {
	if err := w.file.Truncate(w.offset); err != nil {
		return broken(reasonWrite, "close ledger segment", err)
	}
	if err := w.file.Sync(); err != nil {
		return broken(reasonSync, "close ledger segment", err)
	}
	if err := w.file.Close(); err != nil {
		return broken(reasonWrite, "close ledger segment", err)
	}
	w.closed.Add(w.offset)
	w.file, w.offset, w.allocated = nil, 0, 0
	return nil
}

// begin makes the next segment. It gets its name when its header is durable, so
// that a segment without a sound header is always damage.
func (w *writer) begin() *failure {
	h := header{journal: w.journal, first: w.next, previous: w.link}
	path := filepath.Join(w.dir, segmentName(w.next))
	f, fail := w.prepare(path+newSuffix, h)
	if fail != nil {
		return fail
	}
	allocated := allocate(f, headerSize, 0, w.segmentBytes)
	if fail := w.publish(f, path); fail != nil {
		fail.err = errors.Join(fail.err, f.Close())
		return fail
	}
	w.file, w.first, w.offset, w.allocated = f, w.next, headerSize, allocated
	w.segments.Add(1)
	w.observe()
	return nil
}

// prepare writes a segment's header under a name that does not count.
func (w *writer) prepare(path string, h header) (file, *failure) {
	f, err := w.disk.create(path)
	if noSpace(err) {
		return nil, full("begin ledger segment", err)
	}
	if err != nil {
		return nil, broken(reasonWrite, "begin ledger segment", err)
	}
	if _, err = f.WriteAt(h.encode(), 0); err == nil {
		return f, nil
	}
	err = errors.Join(err, f.Close())
	if noSpace(err) {
		// What is left is replaced by the next attempt.
		return nil, full("begin ledger segment", err)
	}
	return nil, broken(reasonWrite, "begin ledger segment", err)
}

// publish makes f durable under its name.
func (w *writer) publish(f file, path string) *failure {
	if err := f.Sync(); err != nil {
		return broken(reasonSync, "begin ledger segment", err)
	}
	if err := w.disk.rename(path+newSuffix, path); noSpace(err) {
		return full("begin ledger segment", err)
	} else if err != nil {
		return broken(reasonWrite, "begin ledger segment", err)
	}
	if err := w.disk.syncDir(w.dir); err != nil {
		return broken(reasonSync, "begin ledger segment", err)
	}
	return nil
}

// close ends the writing. Of a file that failed, nothing more is asked.
func (w *writer) close(failed bool) error {
	switch {
	case w.file == nil:
		return nil
	case failed:
		return w.file.Close()
	default:
		// All records are durable; this gives back the space that was reserved.
		return errors.Join(w.file.Truncate(w.offset), w.file.Sync(), w.file.Close())
	}
}

// observe sets the gauges.
func (w *writer) observe() {
	w.metrics.bytes.Set(float64(w.closed.Load() + w.offset))
	w.metrics.segments.Set(float64(w.segments.Load()))
	w.metrics.size.Set(float64(w.next))
}
