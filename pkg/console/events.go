package console

import (
	"fmt"
	"net/http"
	"sync"
	"time"
)

const (
	// eventPause is the least time between two events of one stream.
	eventPause = time.Second
	// eventTick is how often a stream without news says so: the browser renews what
	// no record tells of, such as which agents are connected.
	eventTick = 10 * time.Second
	// eventWrite bounds the writing of one event.
	eventWrite = 5 * time.Second
)

// news wakes the streams of events.
type news struct {
	mu      sync.Mutex // guards what follows
	seen    chan struct{}
	streams int
}

func newNews() *news { return &news{seen: make(chan struct{})} }

// tell wakes all that wait.
func (n *news) tell() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.seen)
	n.seen = make(chan struct{})
}

// next is closed at the next news.
func (n *news) next() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.seen
}

// join takes a place for a stream.
func (n *news) join() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.streams >= maxStreams {
		return false
	}
	n.streams++
	return true
}

func (n *news) leave() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.streams--
}

// events is a stream of Server-Sent Events: "change" when there is something new,
// at most one a second, and "tick" now and then. They carry nothing: what is new is
// read from the page, by those who may. The stream ends with the session.
func (c *Console) events(w http.ResponseWriter, r *http.Request) {
	if !c.news.join() {
		w.Header().Set("Retry-After", "10")
		http.Error(w, "too many browsers wait for news", http.StatusServiceUnavailable)
		return
	}
	defer c.news.leave()
	c.metrics.streams.Inc()
	defer c.metrics.streams.Dec()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	control := http.NewResponseController(w)
	send := func(event string) bool {
		if err := control.SetWriteDeadline(time.Now().Add(eventWrite)); err != nil {
			return false
		}
		if _, err := fmt.Fprintf(w, "event: %s\ndata: -\n\n", event); err != nil {
			return false
		}
		return control.Flush() == nil
	}
	next := c.news.next()
	if !send("ready") {
		return
	}
	tick := time.NewTicker(eventTick)
	defer tick.Stop()
	for {
		event := "change"
		select {
		case <-r.Context().Done():
			return
		case <-next:
		case <-tick.C:
			event = "tick"
		}
		if _, ok := c.user(r); !ok {
			return
		}
		next = c.news.next()
		if !send(event) {
			return
		}
		pause := time.NewTimer(eventPause)
		select {
		case <-r.Context().Done():
			pause.Stop()
			return
		case <-pause.C:
		}
	}
}
