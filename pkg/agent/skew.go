package agent

import (
	"fmt"
	"time"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
)

const (
	// skewEvery is how often the CA is asked for its time.
	skewEvery = 5 * time.Minute
	// maxSkew is what clocks that are kept differ by at most; certificates are
	// valid from some minutes before they are issued on.
	maxSkew = 30 * time.Second
	// skewNews is the difference that is worth telling the CA again.
	skewNews = time.Second
)

// skew is how far this machine's clock is ahead of the CA's.
type skew struct {
	asked time.Time // of the question that has no answer yet
	next  time.Time // of the next question; in the clock that cannot be set
	known bool
	by    time.Duration
}

// ask returns the time to send, and whether it is time to ask.
func (s *skew) ask(now time.Time) (sent time.Time, due bool) {
	if !s.next.IsZero() && now.Before(s.next) {
		return time.Time{}, false
	}
	s.asked, s.next = now, now.Add(skewEvery)
	return now, true
}

// answered takes the CA's answer: it was sent half of the time ago that has passed
// since the question. within is how wrong by may be. It reports false for an answer
// to something else.
func (s *skew) answered(now time.Time, c *nodev1.Clock) (within time.Duration, news, ok bool) {
	if s.asked.IsZero() || !c.GetReceived().IsValid() || !c.GetSent().AsTime().Equal(s.asked) {
		return 0, false, false
	}
	within = now.Sub(s.asked) / 2 // in the clock that cannot be set
	by := s.asked.Round(0).Add(within).Sub(c.GetReceived().AsTime())
	news = !s.known || (by-s.by).Abs() > skewNews
	s.asked, s.known, s.by = time.Time{}, true, by
	return within, news, true
}

// noteClock takes the CA's time.
func (a *Agent) noteClock(c *nodev1.Clock) {
	a.mu.Lock()
	defer a.mu.Unlock()
	within, news, ok := a.skew.answered(time.Now(), c)
	if !ok {
		return
	}
	if news {
		a.report.applied = true
		signal(a.up)
	}
	by := a.skew.by
	if by.Abs()-within <= maxSkew {
		a.cfg.Health.Clear(condSkew)
		return
	}
	a.cfg.Health.Set(condSkew, health.Warning,
		fmt.Sprintf("this machine's clock is %s the CA's: set the one that is wrong", SkewText(by)))
}

// SkewText says for a person how far one clock is ahead of another.
func SkewText(by time.Duration) string {
	if by < 0 {
		return (-by).Round(time.Millisecond).String() + " behind"
	}
	return by.Round(time.Millisecond).String() + " ahead of"
}
