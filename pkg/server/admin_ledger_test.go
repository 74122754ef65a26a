package server

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// fakeRecords is an index of records that all are a second apart.
type fakeRecords struct {
	Records

	n       uint64
	changes []search.Found
	err     error
	forgot  uint64
	behind  uint64
	waited  int // how often a question waited for the newest records
}

func found(i uint64) search.Found {
	return search.Found{Entry: ledger.Entry{Index: i, Raw: make([]byte, 50<<10), Record: &ledgerv1.Record{Time: timestamppb.New(time.Unix(int64(i), 0))}}}
}

func (f *fakeRecords) CatchUp(context.Context) uint64 { f.waited++; return f.behind }

func (f *fakeRecords) Find(_ context.Context, q search.Query) ([]search.Found, search.Position, error) {
	if f.err != nil {
		return nil, search.Position{}, f.err
	}
	var list []search.Found
	from := uint64(0)
	if q.After.Valid {
		from = q.After.Record + 1
	}
	for i := from; i < f.n; i++ {
		if len(list) == q.Limit {
			last := list[len(list)-1]
			return list, search.Position{Key: time.Unix(int64(last.Index), 0).UnixNano(), Record: last.Index, Valid: true}, nil
		}
		list = append(list, found(i))
	}
	return list, search.Position{}, nil
}

func (f *fakeRecords) EntryChanges(context.Context, string) ([]search.Found, error) {
	return f.changes, f.err
}

func (f *fakeRecords) NodesNamed(_ context.Context, name string) ([]string, error) {
	return map[string][]string{"one": {"spiffe://x/a/one"}, "two": {"spiffe://x/a/two", "spiffe://x/b/two"}}[name], f.err
}

func (f *fakeRecords) Before(context.Context, time.Time) (uint64, error) { return f.n, f.err }

func (f *fakeRecords) Forget(_ context.Context, limit uint64) error { f.forgot = limit; return nil }

type fakeSinks struct {
	taken uint64
	sink  string
}

func (f fakeSinks) Taken() (uint64, string) { return f.taken, f.sink }

// sent is a stream that keeps what is sent.
type sent[T any] struct {
	grpc.ServerStream

	ctx     context.Context //nolint:containedctx // grpc.ServerStream has a Context method
	list    []*T
	trailer metadata.MD
}

func (s *sent[T]) Context() context.Context { return s.ctx }
func (s *sent[T]) SetTrailer(m metadata.MD) { s.trailer = m }
func (s *sent[T]) Send(m *T) error          { s.list = append(s.list, m); return nil }

func asAdmin(t *testing.T, actor string) context.Context {
	t.Helper()
	return context.WithValue(t.Context(), callerKey{}, &caller{actor: actor, requestID: "r"})
}

func ledgerServer(records Records, sinks Sinks, j *ledger.Journal) adminv1.LedgerServiceServer {
	return (&Server{cfg: Config{Records: records, Sinks: sinks, Ledger: j}, refusals: newRefusalLog(), log: slog.New(slog.DiscardHandler)}).LedgerService()
}

// A list of any length comes in parts of bounded size, and goes on where it ended.
func TestFindInParts(t *testing.T) {
	l := ledgerServer(&fakeRecords{n: 2500}, nil, nil)
	var got []uint64
	page := &adminv1.Page{Limit: 1100}
	for {
		s := &sent[adminv1.FindResponse]{ctx: asAdmin(t, "uid:0")}
		if err := l.Find(&adminv1.FindRequest{Page: page}, s); err != nil {
			t.Fatal(err)
		}
		rows := 0
		for i, m := range s.list {
			if len(m.GetRecords()) > maxPart/(50<<10)+1 {
				t.Errorf("%d records in one message", len(m.GetRecords()))
			}
			for _, r := range m.GetRecords() {
				got = append(got, r.GetIndex())
				rows++
			}
			if m.GetNextPageToken() != "" && i+1 < len(s.list) {
				t.Error("a token before the last part")
			}
		}
		if rows > int(page.GetLimit()) {
			t.Errorf("%d records, the limit is %d", rows, page.GetLimit())
		}
		if page.Token = s.list[len(s.list)-1].GetNextPageToken(); page.GetToken() == "" {
			break
		}
	}
	if len(got) != 2500 || !slices.IsSorted(got) || got[2499] != 2499 {
		t.Errorf("%d records", len(got))
	}
}

// A question waits for what was decided before it, once, and an answer that lacks
// some of it says so.
func TestFindKnowsTheNewest(t *testing.T) {
	records := &fakeRecords{n: 20}
	l := ledgerServer(records, nil, nil)
	ask := func(p *adminv1.Page) *sent[adminv1.FindResponse] {
		s := &sent[adminv1.FindResponse]{ctx: asAdmin(t, "uid:0")}
		if err := l.Find(&adminv1.FindRequest{Page: p}, s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := ask(&adminv1.Page{Limit: 5})
	next := first.list[len(first.list)-1].GetNextPageToken()
	if records.waited != 1 || first.trailer.Len() != 0 || next == "" {
		t.Errorf("waited %d times, trailer %v, token %q", records.waited, first.trailer, next)
	}
	if s := ask(&adminv1.Page{Limit: 5, Token: next}); records.waited != 1 || s.trailer.Len() != 0 {
		t.Errorf("the second page waited, or says %v", s.trailer)
	}
	records.behind = 7
	if s := ask(nil); !slices.Equal(s.trailer.Get(search.BehindTrailer), []string{"7"}) {
		t.Errorf("trailer %v", s.trailer)
	}
}

func TestFindRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		records Records
		req     *adminv1.FindRequest
		code    codes.Code
		text    string
	}{
		"no index":           {nil, &adminv1.FindRequest{}, codes.FailedPrecondition, "no search index"},
		"a limit":            {&fakeRecords{}, &adminv1.FindRequest{Page: &adminv1.Page{Limit: maxPage + 1}}, codes.InvalidArgument, "page.limit"},
		"a token":            {&fakeRecords{}, &adminv1.FindRequest{Page: &adminv1.Page{Token: "1.2; DROP TABLE records"}}, codes.InvalidArgument, "page.token"},
		"a negative token":   {&fakeRecords{}, &adminv1.FindRequest{Page: &adminv1.Page{Token: "1.-2"}}, codes.InvalidArgument, "page.token"},
		"a filter":           {&fakeRecords{}, &adminv1.FindRequest{SpiffeId: strings.Repeat("x", maxFilter+1)}, codes.InvalidArgument, "at most"},
		"a rule":             {&fakeRecords{}, &adminv1.FindRequest{Anomaly: "full_moon"}, codes.InvalidArgument, "key_reuse"},
		"an unknown node":    {&fakeRecords{}, &adminv1.FindRequest{Node: "none"}, codes.NotFound, "no record names"},
		"two nodes":          {&fakeRecords{}, &adminv1.FindRequest{Node: "two"}, codes.InvalidArgument, "several nodes"},
		"what takes forever": {&fakeRecords{err: context.DeadlineExceeded}, &adminv1.FindRequest{}, codes.Unavailable, "narrow the search"},
		"a broken index":     {&fakeRecords{err: errors.New("disk I/O error on /secret")}, &adminv1.FindRequest{}, codes.Unavailable, "log says why"},
	} {
		err := ledgerServer(tc.records, nil, nil).Find(tc.req, &sent[adminv1.FindResponse]{ctx: asAdmin(t, "uid:0")})
		if st := statusOf(err, "r"); err == nil || st.Code() != tc.code || !strings.Contains(st.Message(), tc.text) || strings.Contains(st.Message(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Nothing is archived for somebody far away, that is young, or that a sink has not
// taken; and the error says which.
func TestArchiveRefuses(t *testing.T) {
	dir := t.TempDir()
	j, err := ledger.Open(dir, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	old := timestamppb.New(time.Now().Add(-100 * 24 * time.Hour))
	for name, tc := range map[string]struct {
		actor string
		sinks Sinks
		req   *adminv1.ArchiveRequest
		code  codes.Code
		text  string
	}{
		"over mTLS":         {"spiffe://example.org/admin", nil, &adminv1.ArchiveRequest{Before: old, Folder: "/x"}, codes.PermissionDenied, "admin socket"},
		"no time":           {"uid:0", nil, &adminv1.ArchiveRequest{Folder: "/x"}, codes.InvalidArgument, "before"},
		"young records":     {"uid:0", nil, &adminv1.ArchiveRequest{Before: timestamppb.Now(), Folder: "/x"}, codes.InvalidArgument, "48h"},
		"a relative folder": {"uid:0", nil, &adminv1.ArchiveRequest{Before: old, Folder: "x"}, codes.InvalidArgument, "whole path"},
		"a sink is behind":  {"uid:0", fakeSinks{9, "export_siem"}, &adminv1.ArchiveRequest{Before: old, Folder: "/x"}, codes.FailedPrecondition, `"export_siem" has taken 9 records and 10`},
	} {
		size := j.Size()
		err := ledgerServer(&fakeRecords{n: 10}, tc.sinks, j).Archive(tc.req, &sent[adminv1.ArchiveResponse]{ctx: asAdmin(t, tc.actor)})
		if st := statusOf(err, "r"); err == nil || st.Code() != tc.code || !strings.Contains(st.Message(), tc.text) {
			t.Errorf("%s: %v", name, err)
		}
		for e, err := range ledger.Scan(dir, size) {
			if r := e.Record; err != nil || r.GetEvent() != ledgerv1.Event_EVENT_CALL_REFUSED || r.GetCall() != "Archive" || r.GetActor() != tc.actor {
				t.Errorf("%s: recorded %v, %v", name, r, err)
			}
		}
		if j.Size() != size+1 {
			t.Errorf("%s: %d records", name, j.Size()-size)
		}
	}
}

func TestArchive(t *testing.T) {
	dir := t.TempDir()
	j, err := ledger.Open(filepath.Join(dir, "ledger"), ledger.Options{SegmentBytes: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for range 100 {
		if _, err := j.Append(t.Context(), ledger.NewDraft(&ledgerv1.Record{Detail: strings.Repeat("x", 200)}, nil)); err != nil {
			t.Fatal(err)
		}
	}
	records := &fakeRecords{n: 90}
	s := &sent[adminv1.ArchiveResponse]{ctx: asAdmin(t, "uid:0")}
	req := &adminv1.ArchiveRequest{Before: timestamppb.New(time.Now().Add(-100 * 24 * time.Hour)), Folder: filepath.Join(dir, "archive")}
	if err := ledgerServer(records, fakeSinks{90, "search"}, j).Archive(req, s); err != nil {
		t.Fatal(err)
	}
	last := s.list[len(s.list)-1]
	if !last.GetDone() || last.GetRecords() == 0 || last.GetRecords() > 90 || records.forgot != last.GetRecords() || len(s.list) != int(last.GetSegments())+1 {
		t.Errorf("%v, forgot %d", last, records.forgot)
	}
	// It is the newest record that says so.
	for e, err := range ledger.Scan(filepath.Join(dir, "ledger"), 100) {
		if err != nil {
			t.Fatal(err)
		}
		want := &ledgerv1.Archive{End: last.GetRecords(), Link: e.Record.GetArchive().GetLink(), Folder: req.GetFolder(), Before: req.GetBefore()}
		if r := e.Record; e.Index != 100 || r.GetEvent() != ledgerv1.Event_EVENT_ARCHIVED || r.GetActor() != "uid:0" || !proto.Equal(r.GetArchive(), want) ||
			!strings.HasSuffix(last.GetHead(), hex.EncodeToString(want.GetLink())) {
			t.Errorf("record %d: %v", e.Index, r)
		}
	}
	if j.Size() != 101 {
		t.Errorf("%d records", j.Size())
	}
}
