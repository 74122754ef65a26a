package main

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/meshid/meshid/internal/cli"
)

// changes shows how something goes that the CA does: one line that is drawn again on a
// terminal, a line for each change elsewhere, or a JSON object for each.
type changes struct {
	w              io.Writer
	json, terminal bool
	last           string
}

func newChanges(w io.Writer, format string) changes {
	return changes{w: w, json: format == "json", terminal: format != "json" && cli.Terminal(w)}
}

// show writes how it goes, as text or as object says, if key is another than before.
func (c *changes) show(key, text string, object func() ([]byte, error)) (err error) {
	switch {
	case c.terminal:
		_, err = fmt.Fprintf(c.w, "\r\x1b[K%s", text)
	case key == c.last:
	case c.json:
		var line []byte
		if line, err = object(); err == nil {
			_, err = fmt.Fprintf(c.w, "%s\n", line)
		}
	default:
		_, err = fmt.Fprintln(c.w, text)
	}
	c.last = key
	return err
}

// end leaves the line that is drawn again.
func (c *changes) end() {
	if c.terminal && c.last != "" {
		fmt.Fprintln(c.w)
	}
}

// progress tells a person at a terminal how far long work has come.
type progress struct {
	records atomic.Int64
	done    chan struct{}
	stopped chan struct{}
}

// newProgress begins to tell, if w is a terminal.
func newProgress(ctx context.Context, w io.Writer) *progress {
	p := &progress{done: make(chan struct{}), stopped: make(chan struct{})}
	if !cli.Terminal(w) {
		close(p.stopped)
		return p
	}
	go func() {
		defer close(p.stopped)
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for start := time.Now(); ; {
			select {
			case <-ctx.Done():
				return
			case <-p.done:
				fmt.Fprint(w, "\r\x1b[K")
				return
			case <-ticker.C:
				n := p.records.Load()
				fmt.Fprintf(w, "\r\x1b[K%d records, %.0f a second", n, float64(n)/time.Since(start).Seconds())
			}
		}
	}()
	return p
}

func (p *progress) add(n int) { p.records.Add(int64(n)) }

func (p *progress) stop() {
	close(p.done)
	<-p.stopped
}
