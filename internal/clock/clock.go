// Package clock notices that the wall clock was set: it compares it with the
// clock that counts since the machine's start, its sleep included, which nobody
// can set. A machine that slept, or whose clock is slewed, has not jumped. It
// does not know what depends on the time, or which of two times is the right one.
package clock

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Tolerance is the largest jump that is none: what a verifier accepts that is
// behind.
const Tolerance = 5 * time.Minute

// slew is how fast the wall clock may run apart from the other one without being
// set: daemons that correct it do so at a twelfth at most.
const slew = 12

// Reading is what both clocks show at one moment.
type Reading struct {
	Wall time.Time
	// Boot is the time since the machine's start, its sleep included.
	Boot time.Duration
}

// Read reads the clocks.
func Read() Reading {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("clock_gettime(CLOCK_BOOTTIME): %v", err)) // every kernel that this runs on has it
	}
	return Reading{Wall: time.Now().Round(0), Boot: time.Duration(ts.Nano())}
}

// JumpError says that the wall clock was set, and that nobody has said that it is
// right now.
type JumpError struct {
	// By is how far it is from where it would be; positive is ahead.
	By time.Duration
}

func (e *JumpError) Error() string {
	direction := "ahead"
	by := e.By
	if by < 0 {
		direction, by = "back", -by
	}
	return fmt.Sprintf("the clock was set %s by %s", direction, by.Round(time.Second))
}

// Guard watches the wall clock. Its methods may be called concurrently.
type Guard struct {
	read func() Reading

	mu   sync.Mutex // guards what follows
	last Reading    // when the clock was trusted last
}

// NewGuard returns a guard that trusts the clock as it is now. read is Read.
func NewGuard(read func() Reading) *Guard {
	return &Guard{read: read, last: read()}
}

// Check returns a *JumpError if the wall clock was set by more than Tolerance, for
// as long as that is neither undone nor confirmed.
func (g *Guard) Check() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.read()
	passed := now.Boot - g.last.Boot
	by := now.Wall.Sub(g.last.Wall.Add(passed))
	if by > Tolerance || by < -Tolerance {
		return &JumpError{By: by}
	}
	// The clock is followed, slowly: small steps must not add up to a jump, and
	// slewing must not be taken for one.
	most := passed / slew
	g.last = Reading{Wall: g.last.Wall.Add(passed + min(max(by, -most), most)), Boot: now.Boot}
	return nil
}

// Confirm trusts the clock as it is now, and returns by how far it had been set.
func (g *Guard) Confirm() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.read()
	by := now.Wall.Sub(g.last.Wall.Add(now.Boot - g.last.Boot))
	g.last = now
	return by
}
