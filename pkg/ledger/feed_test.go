package ledger

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// testSink takes records in memory, and fails before or after it has taken them.
type testSink struct {
	mu            sync.Mutex // guards what follows
	next          uint64
	taken         []string
	before, after int // calls that will fail so
	hang          bool
	puts          int
}

// states are what a feed has reported.
type states struct {
	mu   sync.Mutex // guards what follows
	said []string
}

func (s *states) add(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.said = append(s.said, "caught up")
		return
	}
	s.said = append(s.said, err.Error())
}

func (s *states) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

var errSink = errors.New("collector is away")

func (s *testSink) Next(context.Context) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next, nil
}

func (s *testSink) Put(ctx context.Context, entries []Entry) error {
	s.mu.Lock()
	hang := s.hang
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.puts++
	if s.before > 0 {
		s.before--
		return errSink
	}
	for _, e := range entries {
		if e.Index < s.next {
			continue // taken although the call failed
		}
		s.taken = append(s.taken, e.Record.GetRequestId())
		s.next = e.Index + 1
	}
	if s.after > 0 {
		s.after--
		return errSink
	}
	return nil
}

func (s *testSink) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.taken)
}

// feedBubble runs a feed in a bubble until fn returns.
func feedBubble(t *testing.T, s *testSink, o FeedOptions, fn func(j *Journal, f *Feed, reg *prometheus.Registry)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := openTest(t, dir, Options{SegmentBytes: minSegmentBytes})
		reg := prometheus.NewRegistry()
		m, err := NewFeedMetrics(reg)
		if err != nil {
			t.Fatal(err)
		}
		f := NewFeed(j, "test", s, m, o)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.Run(ctx) }()
		defer func() { // also when fn gives up
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		}()
		fn(j, f, reg)
	})
}

// A sink gets every record once and in order, whatever fails, across segments.
func TestFeedThroughFailures(t *testing.T) {
	s := &testSink{before: 2, after: 2}
	feedBubble(t, s, FeedOptions{}, func(j *Journal, f *Feed, reg *prometheus.Registry) {
		want := ids("r", 40)
		appendTest(t, j, want...)
		synctest.Wait()
		time.Sleep(time.Hour)
		synctest.Wait()
		if d := cmp.Diff(want, s.ids()); d != "" {
			t.Errorf("records (-want +got):\n%s", d)
		}
		more := ids("s", 3)
		appendTest(t, j, more...)
		synctest.Wait()
		if d := cmp.Diff(append(want, more...), s.ids()); d != "" {
			t.Errorf("records (-want +got):\n%s", d)
		}
		if l := f.Lag(time.Now()); l != (Lag{}) {
			t.Errorf("lag %+v, want none", l)
		}
		err := testutil.GatherAndCompare(reg, strings.NewReader(`
# HELP meshid_ca_ledger_sink_failures_total Attempts to give records to a sink that failed; each is repeated.
# TYPE meshid_ca_ledger_sink_failures_total counter
meshid_ca_ledger_sink_failures_total{sink="test"} 4
# HELP meshid_ca_ledger_sink_records_total Records that a sink of the ledger has taken since the start.
# TYPE meshid_ca_ledger_sink_records_total counter
meshid_ca_ledger_sink_records_total{sink="test"} 43
`), "meshid_ca_ledger_sink_failures_total", "meshid_ca_ledger_sink_records_total")
		if err != nil {
			t.Error(err)
		}
	})
}

// A feed goes on where its sink was.
func TestFeedResumes(t *testing.T) {
	all := ids("r", 9)
	dir := t.TempDir()
	j := openTest(t, dir, Options{})
	appendTest(t, j, all...)
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	for next := range uint64(10) {
		j := openTest(t, dir, Options{})
		m, err := NewFeedMetrics(prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		s := &testSink{next: next}
		done := make(chan error, 1)
		go func() { done <- NewFeed(j, "test", s, m, FeedOptions{}).Run(context.Background()) }()
		if err := errors.Join(j.Close(), <-done); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(all[next:], s.ids(), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("records from %d on (-want +got):\n%s", next, d)
		}
	}
}

// Records that come close together share one call, and none waits for longer.
func TestFeedLingers(t *testing.T) {
	s := &testSink{}
	feedBubble(t, s, FeedOptions{Linger: time.Second}, func(j *Journal, _ *Feed, _ *prometheus.Registry) {
		all := ids("r", 3)
		for _, id := range all {
			appendTest(t, j, id)
			time.Sleep(300 * time.Millisecond)
		}
		synctest.Wait()
		if got := s.ids(); len(got) > 0 {
			t.Errorf("it got %q before its time", got)
		}
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		if d := cmp.Diff(all, s.ids()); d != "" || s.puts != 1 {
			t.Errorf("%d calls; records (-want +got):\n%s", s.puts, d)
		}
	})
}

// A sink that hangs is given up, tried again, and reported when it is overdue; it
// never delays a record.
func TestFeedOverdue(t *testing.T) {
	var reports states
	s := &testSink{hang: true}
	o := FeedOptions{OnState: reports.add}
	feedBubble(t, s, o, func(j *Journal, f *Feed, _ *prometheus.Registry) {
		r, chain := testRecord("a")
		r.Time.Seconds, r.Time.Nanos = time.Now().Unix(), 0
		if _, err := j.Append(context.Background(), NewDraft(r, chain)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		if got := reports.list(); len(got) != 0 {
			t.Errorf("reported %q after four minutes", got)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := reports.list(); len(got) == 0 || !strings.Contains(got[0], "1 records wait, the oldest for 5m") {
			t.Errorf("reported %q", got)
		}
		if l := f.Lag(time.Now()); l.Records != 1 || l.Age != 6*time.Minute || l.Err == nil {
			t.Errorf("lag %+v", l)
		}
		s.mu.Lock()
		s.hang = false
		s.mu.Unlock()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := reports.list(); len(got) == 0 || got[len(got)-1] != "caught up" {
			t.Errorf("reported %q", got)
		}
	})
}

// A sink that has taken more than there is belongs to another journal, or to a
// newer copy of this one: it gets nothing.
func TestFeedAhead(t *testing.T) {
	var reports states
	s := &testSink{next: 7}
	feedBubble(t, s, FeedOptions{OnState: reports.add}, func(j *Journal, _ *Feed, _ *prometheus.Registry) {
		synctest.Wait()
		if got := reports.list(); len(got) != 1 || !strings.Contains(got[0], "has taken 7 records and the ledger holds 0") {
			t.Errorf("reported %q", got)
		}
		appendTest(t, j, ids("r", 9)...)
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := s.ids(); len(got) > 0 {
			t.Errorf("it got %q", got)
		}
	})
}

// Closing the journal ends its feeds, after the last record.
func TestFeedEndsWithJournal(t *testing.T) {
	j := openTest(t, t.TempDir(), Options{})
	m, err := NewFeedMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	s := &testSink{}
	f := NewFeed(j, "test", s, m, FeedOptions{})
	done := make(chan error, 1)
	go func() { done <- f.Run(context.Background()) }()
	want := ids("r", 100)
	appendTest(t, j, want...)
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, s.ids()); d != "" {
		t.Errorf("records (-want +got):\n%s", d)
	}
}
