package main

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
	"github.com/meshid/meshid/pkg/ledger/tree"
	"github.com/meshid/meshid/pkg/placement"
	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/pkg/store"
)

// conditionSearch: questions about the ledger have no answer, or an old one.
const conditionSearch = "ledger_search"

// searchLinger is how long a record waits for others before it can be found: a
// transaction of the index costs more than a certificate.
const searchLinger = 200 * time.Millisecond

// searchIndex is the index of the ledger, and what keeps it up to date.
type searchIndex struct {
	records *store.Records // nil if it cannot be used
	feed    *ledger.Feed
	report  func(error)
	tell    func() // after it has taken records; set before run
	log     *slog.Logger
}

// openSearch opens the index. One that cannot be used is reported and does nothing:
// it must not stand in the way of issuing.
func openSearch(ctx context.Context, dataDir string, j *ledger.Journal, m *ledger.FeedMetrics, t *health.Tracker,
	registry prometheus.Registerer, logger *slog.Logger,
) *searchIndex {
	s := &searchIndex{log: logger, tell: func() {}, report: func(err error) {
		if err == nil {
			t.Clear(conditionSearch)
			return
		}
		t.Set(conditionSearch, health.Warning, "`ca who` and `ca ledger find` do not know the newest records: "+err.Error())
	}}
	var err error
	s.records, err = store.OpenRecords(ctx, filepath.Join(dataDir, "records.db"), j, store.RecordsOptions{Registerer: registry, Logger: logger})
	if err != nil {
		s.records = nil
		s.fail(ctx, err)
		return s
	}
	s.feed = ledger.NewFeed(j, "search", telling{s.records, s}, m, ledger.FeedOptions{
		Linger: searchLinger, Logger: logger, OnState: s.report,
	})
	return s
}

// telling is the index as a sink that says when it has taken something.
type telling struct {
	*store.Records
	index *searchIndex
}

// Put implements ledger.Sink.
func (t telling) Put(ctx context.Context, entries []ledger.Entry) error {
	err := t.Records.Put(ctx, entries)
	if err == nil {
		t.index.tell()
	}
	return err
}

func (s *searchIndex) fail(ctx context.Context, err error) {
	s.report(err)
	s.log.ErrorContext(ctx, "the ledger's search index is not kept", "err", err)
}

// run feeds the index until ctx ends.
func (s *searchIndex) run(ctx context.Context) {
	if s.feed == nil {
		return
	}
	if err := s.feed.Run(ctx); err != nil {
		s.fail(ctx, err)
	}
}

// verified are the workloads of clusters that hold an X.509-SVID from when their cluster
// said where they run, by the records of the journal; the oldest first.
func (s *searchIndex) verified(ctx context.Context, j *ledger.Journal) iter.Seq2[placement.Verified, error] {
	return func(yield func(placement.Verified, error) bool) {
		if s.records == nil {
			yield(placement.Verified{}, errors.New("the ledger's search index is not there"))
			return
		}
		from, err := s.records.Before(ctx, time.Now().Add(-search.MaxLife))
		if err != nil {
			yield(placement.Verified{}, err)
			return
		}
		for e, err := range ledger.Scan(j.Dir(), from) {
			if err = cmp.Or(err, ctx.Err()); err != nil {
				yield(placement.Verified{}, err)
				return
			}
			r := e.Record
			if r.GetEvent() != ledgerv1.Event_EVENT_ISSUE || r.GetOutcome() != ledgerv1.Outcome_OUTCOME_SUCCESS || r.GetVerifiedBy() != "ca" || r.GetWorkload().GetK8S() == nil {
				continue
			}
			v := placement.Verified{Node: r.GetNode().GetAttributes(), Workload: r.GetWorkload().GetK8S(), NotAfter: r.GetCertificate().GetNotAfter().AsTime()}
			if !yield(v, nil) {
				return
			}
		}
	}
}

// close closes the index.
func (s *searchIndex) close() error {
	if s.records == nil {
		return nil
	}
	return s.records.Close()
}

// server returns the index for the server, which knows what to say without one.
func (s *searchIndex) server() server.Records {
	if s.records == nil {
		return nil
	}
	return s.records
}

// taken is what archiving waits for: it implements server.Sinks.
type taken struct {
	feeds *ledger.FeedMetrics
	tree  *tree.Tree
	// missing is a sink that could not begin, if there is one.
	missing string
}

// Taken returns the number of records that every sink has taken, and the sink that
// is furthest behind.
func (t taken) Taken() (uint64, string) {
	if t.missing != "" {
		return 0, t.missing
	}
	records, sink := t.feeds.Taken()
	if signed := t.tree.Checkpoint().Size; signed < records {
		return signed, conditionTree
	}
	return records, sink
}

// archivable says what may be archived: what every sink has, and what is under a
// signed checkpoint of the tree. An export that could not begin has its
// cursor where nobody knows: nothing may, until it is repaired or removed from the
// configuration.
func archivable(m *ledger.FeedMetrics, proofs *tree.Tree, exports []configuredExport, feeds []exportFeed) taken {
	t := taken{feeds: m, tree: proofs}
	for _, c := range exports {
		if !slices.ContainsFunc(feeds, func(f exportFeed) bool { return f.Name() == c.label() }) {
			t.missing = c.label()
		}
	}
	return t
}
