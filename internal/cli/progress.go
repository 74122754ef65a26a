package cli

import (
	"fmt"
	"io"
	"time"
)

// progressInterval is how often a line of progress is drawn.
const progressInterval = 200 * time.Millisecond

// Progress returns a function that shows on w how much of a long work is done, and
// one that takes the line away. On what is no terminal, nothing is shown. It may be
// used by one goroutine.
func Progress(w io.Writer, what string) (show func(done, all uint64), end func()) {
	if !Terminal(w) {
		return func(uint64, uint64) {}, func() {}
	}
	began := time.Now()
	drawn := began
	show = func(done, all uint64) {
		now := time.Now()
		if now.Sub(drawn) < progressInterval || all == 0 {
			return
		}
		drawn = now
		left := ""
		if done > 0 && done < all {
			left = ", " + Short(time.Duration(float64(now.Sub(began))*float64(all-done)/float64(done))) + " left"
		}
		fmt.Fprintf(w, "\r\x1b[K%s: %d of %d%s", what, done, all, left)
	}
	return show, func() {
		if drawn != began {
			fmt.Fprint(w, "\r\x1b[K")
		}
	}
}
