package backoff

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestBound(t *testing.T) {
	p := Policy{Base: 100 * time.Millisecond, Max: time.Second}
	for _, tc := range []struct {
		failures int
		want     time.Duration
	}{
		{-1, 100 * time.Millisecond},
		{0, 100 * time.Millisecond},
		{1, 100 * time.Millisecond},
		{2, 200 * time.Millisecond},
		{4, 800 * time.Millisecond},
		{5, time.Second},
		{1 << 30, time.Second},
	} {
		if got := p.Bound(tc.failures); got != tc.want {
			t.Errorf("Bound(%d) = %v, want %v", tc.failures, got, tc.want)
		}
	}
	if got := (Policy{Base: time.Minute, Max: time.Second}).Bound(3); got != time.Second {
		t.Errorf("Bound with a base above the maximum = %v, want 1s", got)
	}
}

func TestDelayIsFullJitter(t *testing.T) {
	p := Policy{Base: time.Second, Max: 8 * time.Second}
	if got := p.Delay(3, 0); got != 0 {
		t.Errorf("smallest delay = %v, want 0", got)
	}
	if got := p.Delay(3, 0.5); got != 2*time.Second {
		t.Errorf("middle delay = %v, want 2s", got)
	}
}

func TestBackoffResets(t *testing.T) {
	b := New(Policy{Base: time.Second, Max: time.Minute})
	for range 10 {
		if d := b.Next(); d < 0 || d > time.Minute {
			t.Fatalf("Next() = %v, out of bounds", d)
		}
	}
	if b.Failures() != 10 {
		t.Errorf("Failures() = %d, want 10", b.Failures())
	}
	b.Reset()
	if d := b.Next(); d > time.Second {
		t.Errorf("Next() after Reset = %v, want at most 1s", d)
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := Wait(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != time.Hour {
			t.Errorf("waited %v, want 1h", took)
		}
		reason := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(reason)
		if err := Wait(ctx, time.Hour); !errors.Is(err, reason) {
			t.Errorf("Wait after cancel = %v, want %v", err, reason)
		}
		if err := Wait(ctx, 0); !errors.Is(err, reason) {
			t.Errorf("Wait(0) after cancel = %v, want %v", err, reason)
		}
	})
}
