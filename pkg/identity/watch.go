package identity

import (
	"sync"
)

// Watch carries the snapshots of one workload instance from the agent to one
// stream. Only the latest snapshot is kept: a slow stream skips, it never
// queues. All methods may be called concurrently.
type Watch struct {
	done    chan struct{}
	onAck   func(sequence uint64)
	onClose func()
	// onReject and onForce are set before the watch is shared.
	onReject func(leaf *Certificate)
	onForce  func(s *Snapshot, carries bool)

	mu       sync.Mutex    // guards what follows
	changed  chan struct{} // capacity 1, nil until it is asked for; state is read afterwards under mu
	notify   func()
	snapshot *Snapshot
	err      error
	ended    bool
	closed   bool
}

// NewWatch returns a watch with no snapshot yet. onAck is called by
// Acknowledge and onClose by the first Close; both may be nil.
func NewWatch(onAck func(sequence uint64), onClose func()) *Watch {
	return &Watch{
		done:    make(chan struct{}),
		onAck:   onAck,
		onClose: onClose,
	}
}

// OnReject has f called by Reject. The producer calls it before it hands the watch
// out.
func (w *Watch) OnReject(f func(leaf *Certificate)) { w.onReject = f }

// OnForce has f called by InForce. The producer calls it before it hands the watch
// out.
func (w *Watch) OnForce(f func(s *Snapshot, carries bool)) { w.onForce = f }

// Changed receives after each change of the snapshot; changes that follow each
// other quickly are one. It may receive once too often.
func (w *Watch) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed == nil {
		w.changed = make(chan struct{}, 1)
		if w.snapshot != nil {
			w.changed <- struct{}{}
		}
	}
	return w.changed
}

// Notify has f called after each change of the snapshot from now on, and at the
// end, by whoever makes it: f must not block, and not call the producer. It is for
// consumers that have no goroutine to wait on Changed and Done with.
func (w *Watch) Notify(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.notify = f
}

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

// InForce tells the producer that the end of this stream has all that it wants of a
// snapshot in force, and nothing of earlier ones any more; carries says whether it
// wants X.509-SVIDs at all, rather than trust bundles alone. It is called once for
// each snapshot, and not for one that is overtaken by the next.
func (w *Watch) InForce(s *Snapshot, carries bool) {
	if w.onForce != nil {
		w.onForce(s, carries)
	}
}

// Reject tells the producer that the proxy at the end of this stream has refused
// the X.509-SVID with this leaf, and keeps the one before. It is called once for
// each.
func (w *Watch) Reject(leaf *Certificate) {
	if w.onReject != nil {
		w.onReject(leaf)
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
	notify := w.notify
	if w.changed != nil {
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
	w.mu.Unlock()
	if notify != nil {
		notify()
	}
}

// End ends the watch with a reason: the producer will publish no more. It is
// idempotent; the first reason stays.
func (w *Watch) End(err error) {
	w.mu.Lock()
	if w.ended {
		w.mu.Unlock()
		return
	}
	w.ended = true
	w.err = err
	w.snapshot = nil
	close(w.done)
	notify := w.notify
	w.mu.Unlock()
	if notify != nil {
		notify()
	}
}
