package identity

import (
	"errors"
	"slices"
	"sync"
	"testing"
)

func TestWatchKeepsTheLatest(t *testing.T) {
	w := NewWatch(nil, nil)
	if w.Snapshot() != nil || w.Err() != nil {
		t.Error("a new watch has something")
	}
	one, two := &Snapshot{}, &Snapshot{Denied: true}
	w.Publish(one)
	w.Publish(two) // nobody has read: not blocked, not queued
	<-w.Changed()
	if w.Snapshot() != two {
		t.Error("not the latest snapshot")
	}
	w.Publish(two) // no change
	select {
	case <-w.Changed():
		t.Error("changed without a change")
	default:
	}
}

func TestWatchEnds(t *testing.T) {
	w := NewWatch(nil, nil)
	w.Publish(&Snapshot{})
	first := errors.New("first")
	w.End(first)
	w.End(errors.New("second"))
	<-w.Done()
	w.Publish(&Snapshot{})
	if !errors.Is(w.Err(), first) || w.Snapshot() != nil {
		t.Errorf("%v, %v", w.Err(), w.Snapshot())
	}
	w.Close()
}

func TestWatchCallbacks(t *testing.T) {
	var acks []uint64
	closes := 0
	w := NewWatch(func(n uint64) { acks = append(acks, n) }, func() { closes++ })
	w.Acknowledge(3)
	w.Acknowledge(4)
	w.Publish(&Snapshot{})
	w.Close()
	w.Close()
	w.Publish(&Snapshot{})
	if !slices.Equal(acks, []uint64{3, 4}) || closes != 1 || w.Snapshot() != nil {
		t.Errorf("acks %v, closes %d, snapshot %v", acks, closes, w.Snapshot())
	}
}

func TestWatchNotifies(t *testing.T) {
	w := NewWatch(nil, nil)
	one := &Snapshot{}
	w.Publish(one) // nobody is to be told
	told := 0
	w.Notify(func() {
		told++
		w.Snapshot() // no lock is held
	})
	w.Publish(one)
	w.Publish(&Snapshot{})
	w.Publish(&Snapshot{Denied: true})
	w.End(nil)
	w.End(nil)
	w.Publish(one)
	if told != 3 {
		t.Errorf("told %d times of 2 changes and the end", told)
	}
}

func TestWatchConcurrently(t *testing.T) {
	w := NewWatch(func(uint64) {}, func() {})
	last := &Snapshot{Denied: true}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				w.Publish(&Snapshot{})
				w.Acknowledge(1)
				w.Snapshot()
			}
		})
	}
	wg.Wait()
	w.Publish(last)
	<-w.Changed()
	if w.Snapshot() != last {
		t.Error("the last snapshot is lost")
	}
	wg.Go(w.Close)
	wg.Go(func() { w.End(nil) })
	wg.Wait()
	<-w.Done()
}

func TestSnapshotDefault(t *testing.T) {
	var none *Snapshot
	svid := &SVID{}
	if none.Default() != nil || (&Snapshot{}).Default() != nil || (&Snapshot{SVIDs: []*SVID{svid, {}}}).Default() != svid {
		t.Error("Default")
	}
}
