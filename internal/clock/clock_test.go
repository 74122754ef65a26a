package clock

import (
	"errors"
	"testing"
	"time"
)

// machine is one whose clocks a test moves.
type machine struct{ now Reading }

func (m *machine) read() Reading { return m.now }

// pass lets time pass, asleep or awake.
func (m *machine) pass(d time.Duration) {
	m.now.Wall, m.now.Boot = m.now.Wall.Add(d), m.now.Boot+d
}

// set sets the wall clock.
func (m *machine) set(by time.Duration) { m.now.Wall = m.now.Wall.Add(by) }

func TestFault_F45_Guard(t *testing.T) {
	start := Reading{Wall: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), Boot: time.Hour}
	const year = 365 * 24 * time.Hour
	for name, tc := range map[string]struct {
		happens func(m *machine, g *Guard)
		want    time.Duration // 0: trusted
	}{
		"nothing":               {func(*machine, *Guard) {}, 0},
		"a week of sleep":       {func(m *machine, _ *Guard) { m.pass(7 * 24 * time.Hour) }, 0},
		"four minutes ahead":    {func(m *machine, _ *Guard) { m.set(4 * time.Minute) }, 0},
		"four minutes back":     {func(m *machine, _ *Guard) { m.set(-4 * time.Minute) }, 0},
		"an hour ahead":         {func(m *machine, _ *Guard) { m.set(time.Hour) }, time.Hour},
		"an hour back":          {func(m *machine, _ *Guard) { m.set(-time.Hour) }, -time.Hour},
		"a year ahead":          {func(m *machine, _ *Guard) { m.set(year) }, year},
		"a year back":           {func(m *machine, _ *Guard) { m.set(-year) }, -year},
		"an hour, during sleep": {func(m *machine, _ *Guard) { m.pass(time.Hour); m.set(time.Hour) }, time.Hour},
		"time does not heal it": {func(m *machine, g *Guard) {
			m.set(time.Hour)
			for range 1000 {
				m.pass(time.Hour)
				_ = g.Check()
			}
		}, time.Hour},
		"it comes back": {func(m *machine, g *Guard) {
			m.set(time.Hour)
			_ = g.Check()
			m.pass(time.Minute)
			m.set(-time.Hour)
		}, 0},
		"it is confirmed": {func(m *machine, g *Guard) {
			m.set(time.Hour)
			_ = g.Check()
			_ = g.Confirm()
			m.pass(time.Minute)
		}, 0},
		"it goes back after it was confirmed": {func(m *machine, g *Guard) {
			m.set(time.Hour)
			_ = g.Confirm()
			m.set(-time.Hour)
		}, -time.Hour},
		"many small steps": {func(m *machine, g *Guard) {
			for range 10 {
				m.pass(10 * time.Second)
				m.set(time.Minute)
				if g.Check() != nil {
					return
				}
			}
		}, 5*time.Minute + 9*time.Second},
		"slewed for a month": {func(m *machine, g *Guard) {
			for range 30 * 24 * 60 {
				m.pass(time.Minute)
				m.set(4 * time.Second)
				_ = g.Check()
			}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			m := &machine{start}
			g := NewGuard(m.read)
			tc.happens(m, g)
			err := g.Check()
			var jump *JumpError
			switch {
			case tc.want == 0 && err != nil:
				t.Error(err)
			case tc.want != 0 && (!errors.As(err, &jump) || (jump.By-tc.want).Abs() > time.Minute):
				t.Errorf("%v, want %s", err, tc.want)
			}
			if by := g.Confirm(); tc.want != 0 && (by-tc.want).Abs() > time.Minute {
				t.Errorf("confirmed %s, want %s", by, tc.want)
			}
			if err := g.Check(); err != nil {
				t.Errorf("after it was confirmed: %v", err)
			}
		})
	}
}

func TestRead(t *testing.T) {
	g := NewGuard(Read)
	if err := g.Check(); err != nil {
		t.Error(err)
	}
	if a, b := Read(), Read(); b.Boot < a.Boot {
		t.Errorf("%v after %v", b.Boot, a.Boot)
	}
	if s := (&JumpError{By: -time.Hour}).Error(); s != "the clock was set back by 1h0m0s" {
		t.Error(s)
	}
}

func BenchmarkCheck(b *testing.B) {
	g := NewGuard(Read)
	for b.Loop() {
		if err := g.Check(); err != nil {
			b.Fatal(err)
		}
	}
}
