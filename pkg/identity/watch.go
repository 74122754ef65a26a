package identity

import "sync"

// Watch carries the snapshots of one workload instance from the agent to one
// stream. Only the latest snapshot is kept: a slow stream skips, it never
// queues. All methods may be called concurrently.
type Watch struct {
	changed chan struct{} // capacity 1; state is read afterwards under mu
	done    chan struct{}
	onAck   func(sequence uint64)
	onClose func()

	mu       sync.Mutex // guards what follows
	snapshot *Snapshot
	err      error
	ended    bool
	closed   bool
}

// NewWatch returns a watch with no snapshot yet. onAck is called by
// Acknowledge and onClose by the first Close; both may be nil.
func NewWatch(onAck func(sequence uint64), onClose func()) *Watch {
	return &Watch{
		changed: make(chan struct{}, 1),
		done:    make(chan struct{}),
		onAck:   onAck,
		onClose: onClose,
	}
}

// Changed receives after each change of the snapshot; changes that follow each
// other quickly are one.
func (w *Watch) Changed() <-chan struct{} { return w.changed }

// Done is closed when the producer ended the watch; Err then says why.
func (w *Watch) Done() <-chan struct{} { return w.done }

// Err returns why the watch ended: nil while it has not.
func (w *Watch) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Snapshot returns the latest snapshot, or nil while nothing is known yet: the
// stream is then held open without an answer.
func (w *Watch) Snapshot() *Snapshot {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.snapshot
}

// Acknowledge tells the producer that the proxy at the end of this stream has
// put the trust bundle with this sequence into force.
func (w *Watch) Acknowledge(sequence uint64) {
	if w.onAck != nil {
		w.onAck(sequence)
	}
}

// Close is called by the consumer when its stream ends. It is idempotent.
func (w *Watch) Close() {
	w.mu.Lock()
	first := !w.closed
	w.closed = true
	w.snapshot = nil
	w.mu.Unlock()
	if first && w.onClose != nil {
		w.onClose()
	}
}

// Publish replaces the snapshot. The producer calls it; it never blocks.
func (w *Watch) Publish(s *Snapshot) {
	w.mu.Lock()
	if w.closed || w.ended || w.snapshot == s {
		w.mu.Unlock()
		return
	}
	w.snapshot = s
	w.mu.Unlock()
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// End ends the watch with a reason: the producer will publish no more. It is
// idempotent; the first reason stays.
func (w *Watch) End(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	w.ended = true
	w.err = err
	w.snapshot = nil
	close(w.done)
}
