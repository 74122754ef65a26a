package ledger

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/internal/backoff"
)

const (
	feedTimeout  = 30 * time.Second // of one Put
	feedOverdue  = 5 * time.Minute  // a sink that is further behind is reported
	feedInterval = 5 * time.Second  // how often that is looked at
)

// Sink takes the records of a journal somewhere else: into a database, a file,
// another system. It is called by one goroutine.
type Sink interface {
	// Next returns the index of the first record that the sink has not taken: its
	// cursor, which it keeps with what it took. A new sink returns 0.
	Next(ctx context.Context) (uint64, error)
	// Put takes records, which follow one another and begin at the cursor. When it
	// returns nil, they and the cursor behind them are durable, as far as the sink
	// can know. After an error, the same records are given again, in the same or
	// another division: what was taken in spite of the error must not count twice,
	// or must carry the record's index, so that the receiver can tell. Entries must
	// not be modified.
	Put(ctx context.Context, entries []Entry) error
}

// FeedOptions are the options of a Feed; the zero value is good.
type FeedOptions struct {
	// Timeout bounds each call of the sink; 30 s if 0.
	Timeout time.Duration
	// Linger is how long a record waits for others, so that they share one call of
	// the sink; not at all if 0. A full batch does not wait.
	Linger time.Duration
	// Retry says how long to wait after a failure; from 0.5 s to 30 s if zero.
	Retry backoff.Policy
	// Logger gets what an operator should know, if it is not nil.
	Logger *slog.Logger
	// OnState, if it is not nil, is called with an error when the sink is overdue
	// or can never go on, and with nil when it has caught up again. It must return
	// quickly.
	OnState func(err error)
}

// Feed is the way of a journal's records to one sink, beside the issuing path: it
// takes what is durable from a Tail, holds one batch in memory, and waits for the
// sink as long as it takes. A record reaches the sink at least once, in
// order. All methods may be called concurrently.
type Feed struct {
	journal *Journal
	name    string
	sink    Sink
	options FeedOptions
	metrics *FeedMetrics
	log     *slog.Logger

	mu      sync.Mutex // guards what follows
	next    uint64     // the sink's cursor
	started bool       // next is known
	oldest  time.Time  // of the record at next; zero while it was not read
	err     error      // of the last call of the sink, or final
	final   bool       // err stays
	told    bool       // OnState was called with an error last
}

// NewFeed returns a feed that Run has to be called on. name is what the sink is
// called in metrics and logs; metrics are shared by all feeds of a process.
func NewFeed(j *Journal, name string, sink Sink, metrics *FeedMetrics, o FeedOptions) *Feed {
	if o.Timeout == 0 {
		o.Timeout = feedTimeout
	}
	if o.Retry == (backoff.Policy{}) {
		o.Retry = backoff.Policy{Base: time.Second / 2, Max: 30 * time.Second}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Feed{journal: j, name: name, sink: sink, options: o, metrics: metrics, log: o.Logger.With("sink", name)}
	metrics.add(f)
	return f
}

// Name returns what the sink is called.
func (f *Feed) Name() string { return f.name }

// Lag is how far a sink is behind its journal.
type Lag struct {
	// Records is the number of durable records that the sink has not taken.
	Records uint64
	// Age is that of the oldest of them, 0 if there is none.
	Age time.Duration
	// Err is why the last attempt failed, nil if it did not.
	Err error
}

// Lag returns how far the sink is behind at now.
func (f *Feed) Lag(now time.Time) Lag {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := Lag{Err: f.err}
	if size := f.journal.Size(); f.started && f.next < size {
		l.Records = size - f.next
		if !f.oldest.IsZero() {
			l.Age = max(now.Sub(f.oldest), 0)
		}
	}
	return l
}

// Run feeds the sink until ctx ends or the journal is closed, and returns nil; or
// until the journal cannot be read, and returns that error. A sink that fails is
// tried again for ever.
func (f *Feed) Run(ctx context.Context) error {
	watched := make(chan struct{})
	watching, stop := context.WithCancel(ctx)
	go func() {
		defer close(watched)
		f.watch(watching)
	}()
	defer func() { stop(); <-watched }()

	err := f.run(ctx)
	if ctx.Err() != nil || errors.Is(err, ErrClosed) {
		return nil
	}
	return err
}

func (f *Feed) run(ctx context.Context) error {
	next, err := f.begin(ctx)
	if err != nil {
		return err
	}
	tail := f.journal.Tail(next)
	defer tail.Close()
	for {
		batch, err := tail.Next(ctx, f.options.Linger)
		if err != nil {
			return fmt.Errorf("feed %s: %w", f.name, err)
		}
		if err := f.put(ctx, batch); err != nil {
			return err
		}
	}
}

// begin finds out where to go on.
func (f *Feed) begin(ctx context.Context) (uint64, error) {
	var next uint64
	err := f.retry(ctx, func(ctx context.Context) (err error) {
		next, err = f.sink.Next(ctx)
		return err
	})
	if err != nil {
		return 0, err
	}
	firsts, err := listSegments(f.journal.dir)
	if err != nil {
		return 0, fmt.Errorf("feed %s from ledger: %w", f.name, err)
	}
	if len(firsts) > 0 && next < firsts[0] {
		f.log.WarnContext(ctx, "records were archived before the sink took them", "from", next, "to", firsts[0])
		next = firsts[0]
	}
	if size := f.journal.Size(); next > size {
		// What the sink took is gone here, and other records will get its indexes.
		err := fmt.Errorf("sink %s has taken %d records and the ledger holds %d: it was restored from an older copy; "+
			"restore the newest one, or begin the sink anew", f.name, next, size)
		f.log.ErrorContext(ctx, "sink is ahead of the ledger", "err", err)
		f.fail(err, true)
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	f.mu.Lock()
	f.next, f.started = next, true
	f.mu.Unlock()
	return next, nil
}

// put gives the sink a batch until it takes it.
func (f *Feed) put(ctx context.Context, batch []Entry) error {
	f.mu.Lock()
	f.oldest = batch[0].Record.GetTime().AsTime()
	f.mu.Unlock()
	err := f.retry(ctx, func(ctx context.Context) error { return f.sink.Put(ctx, batch) })
	if err != nil {
		return err
	}
	f.metrics.records.WithLabelValues(f.name).Add(float64(len(batch)))
	f.mu.Lock()
	f.next, f.oldest = batch[len(batch)-1].Index+1, time.Time{}
	f.mu.Unlock()
	return nil
}

// retry calls the sink until it succeeds, or ctx ends.
func (f *Feed) retry(ctx context.Context, call func(ctx context.Context) error) error {
	wait := backoff.New(f.options.Retry)
	for {
		bounded, cancel := context.WithTimeout(ctx, f.options.Timeout)
		err := call(bounded)
		cancel()
		if err == nil {
			if wait.Failures() > 0 {
				f.log.InfoContext(ctx, "sink takes records again")
				f.fail(nil, false)
			}
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		f.metrics.failures.WithLabelValues(f.name).Inc()
		if wait.Failures() == 0 {
			f.log.WarnContext(ctx, "sink does not take records", "err", err)
		}
		f.fail(err, false)
		if err := backoff.Wait(ctx, wait.Next()); err != nil {
			return err
		}
	}
}

// fail notes how the last call of the sink ended.
func (f *Feed) fail(err error, final bool) {
	f.mu.Lock()
	f.err, f.final = err, final
	f.mu.Unlock()
	f.report(time.Now())
}

// watch reports a sink that is behind, also while it answers nothing.
func (f *Feed) watch(ctx context.Context) {
	t := time.NewTicker(feedInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			f.report(time.Now())
		case <-ctx.Done():
			return
		}
	}
}

// report calls OnState if the state has changed.
func (f *Feed) report(now time.Time) {
	lag := f.Lag(now)
	f.mu.Lock()
	defer f.mu.Unlock()
	bad := f.final || lag.Age > feedOverdue
	if f.options.OnState == nil || !bad && !f.told {
		return
	}
	f.told = bad
	switch {
	case !bad:
		f.options.OnState(nil)
	case f.final:
		f.options.OnState(f.err)
	case f.err != nil:
		f.options.OnState(fmt.Errorf("%d records wait, the oldest for %s: %w", lag.Records, lag.Age.Round(time.Second), f.err))
	default:
		f.options.OnState(fmt.Errorf("%d records wait, the oldest for %s: the sink is too slow", lag.Records, lag.Age.Round(time.Second)))
	}
}

// FeedMetrics are the metrics of all feeds of a process.
type FeedMetrics struct {
	records, failures *prometheus.CounterVec
	lagRecords        *prometheus.Desc
	lagSeconds        *prometheus.Desc

	mu    sync.Mutex // guards what follows
	feeds []*Feed
}

// NewFeedMetrics registers the metrics of the feeds that are made with them.
func NewFeedMetrics(reg prometheus.Registerer) (*FeedMetrics, error) {
	m := &FeedMetrics{
		records: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_sink_records_total",
			Help: "Records that a sink of the ledger has taken since the start.",
		}, []string{"sink"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshid_ca_ledger_sink_failures_total",
			Help: "Attempts to give records to a sink that failed; each is repeated.",
		}, []string{"sink"}),
		lagRecords: prometheus.NewDesc("meshid_ca_ledger_sink_lag_records",
			"Durable records that a sink has not taken yet.", []string{"sink"}, nil),
		lagSeconds: prometheus.NewDesc("meshid_ca_ledger_sink_lag_seconds",
			"Age of the oldest durable record that a sink has not taken yet; 0 if there is none.", []string{"sink"}, nil),
	}
	return m, errors.Join(reg.Register(m.records), reg.Register(m.failures), reg.Register(m))
}

// add makes the series of a feed.
func (m *FeedMetrics) add(f *Feed) {
	m.records.WithLabelValues(f.name)
	m.failures.WithLabelValues(f.name)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.feeds = append(m.feeds, f)
}

// Taken returns the number of records that every sink has taken, and the name of
// the sink that is furthest behind: "" if there are no sinks, which have then
// taken everything.
func (m *FeedMetrics) Taken() (records uint64, sink string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	records = math.MaxUint64
	for _, f := range m.feeds {
		f.mu.Lock()
		if f.next < records { // 0 while it is not known
			records, sink = f.next, f.name
		}
		f.mu.Unlock()
	}
	return records, sink
}

// Describe implements prometheus.Collector.
func (m *FeedMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.lagRecords
	ch <- m.lagSeconds
}

// Collect implements prometheus.Collector.
func (m *FeedMetrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, f := range m.feeds {
		lag := f.Lag(now)
		ch <- prometheus.MustNewConstMetric(m.lagRecords, prometheus.GaugeValue, float64(lag.Records), f.name)
		ch <- prometheus.MustNewConstMetric(m.lagSeconds, prometheus.GaugeValue, lag.Age.Seconds(), f.name)
	}
}
