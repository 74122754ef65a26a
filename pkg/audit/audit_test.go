package audit

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
)

var testDomain = spiffeid.RequireTrustDomainFromString("example.org")

// book writes a journal as a CA would.
type book struct {
	t       *testing.T
	dir     string
	journal *ledger.Journal
	now     time.Time
	drafts  []*ledger.Draft
}

func newBook(t *testing.T, o ledger.Options) *book {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ledger")
	j, err := ledger.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return &book{t: t, dir: dir, journal: j, now: time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)}
}

// add puts a record a second after the one before; flush makes it durable.
func (b *book) add(r *ledgerv1.Record) {
	b.now = b.now.Add(time.Second)
	r.Version, r.Time, r.TrustDomain = 1, timestamppb.New(b.now), testDomain.Name()
	if r.Outcome == ledgerv1.Outcome_OUTCOME_UNSPECIFIED {
		r.Outcome = ledgerv1.Outcome_OUTCOME_SUCCESS
	}
	if b.drafts = append(b.drafts, ledger.NewDraft(r, nil)); len(b.drafts) == 500 {
		b.flush()
	}
}

func (b *book) flush() {
	b.t.Helper()
	if _, err := b.journal.Append(b.t.Context(), b.drafts...); err != nil {
		b.t.Fatal(err)
	}
	b.drafts = nil
}

func (b *book) apply(e *entryv1.Entry) {
	b.add(&ledgerv1.Record{Event: ledgerv1.Event_EVENT_ENTRY_APPLIED, Entry: b.ref(e), Definition: e, Actor: "uid:0"})
}

func (b *book) ref(e *entryv1.Entry) *ledgerv1.EntryRef {
	digest := b.compile(e).Digest()
	return &ledgerv1.EntryRef{Name: e.GetName(), Revision: e.GetRevision(), Digest: digest[:]}
}

func (b *book) compile(e *entryv1.Entry) *identity.Entry {
	b.t.Helper()
	compiled, err := identity.Compile(testDomain, e)
	if err != nil {
		b.t.Fatal(err)
	}
	return compiled
}

// issue records the n-th X.509-SVID, for an app, by an entry.
func (b *book) issue(ref *ledgerv1.EntryRef, app string, n int) {
	b.add(&ledgerv1.Record{
		Event: ledgerv1.Event_EVENT_ISSUE, Entry: ref, SpiffeId: "spiffe://example.org/" + app, Instance: fmt.Sprintf("docker:%d", n), VerifiedBy: "agent",
		Certificate: &ledgerv1.Certificate{
			Serial: []byte{0x7f, byte(n >> 16), byte(n >> 8), byte(n)}, NotBefore: timestamppb.New(b.now), NotAfter: timestamppb.New(b.now.Add(time.Hour)),
		},
		Workload: &attributesv1.Workload{Docker: &attributesv1.Docker{ContainerId: "c", Labels: map[string]string{"app": app}}},
		Node:     &ledgerv1.NodeRef{Id: "spiffe://example.org/meshid/node/join_token/web-1", Attributes: &attributesv1.Node{Method: "join_token", Id: "web-1"}},
	})
}

func shop(revision uint64, workloads string) *entryv1.Entry {
	return &entryv1.Entry{
		Name: "shop", SpiffeId: `spiffe://example.org/{docker.labels["app"]}`, Nodes: `node.method == "join_token"`,
		Workloads: workloads, Ttl: durationpb.New(time.Hour), Revision: revision, AcceptWeak: true,
	}
}

const anyApp = `docker.labels["app"] != ""`

// longBook has many segments: a start, an entry, many issuances, another start
// with the entry in force, and an issuance.
func longBook(t *testing.T) (b *book, last uint64) {
	t.Helper()
	b = newBook(t, ledger.Options{SegmentBytes: 16 << 10})
	entry := shop(1, anyApp)
	b.add(&ledgerv1.Record{Event: ledgerv1.Event_EVENT_STARTED})
	b.apply(entry)
	ref := b.ref(entry)
	for n := range 1000 {
		if b.issue(ref, "web", n); n%50 == 0 {
			b.flush()
		}
	}
	b.flush()
	firsts, err := ledger.Segments(b.dir)
	if err != nil || len(firsts) < 10 {
		t.Fatalf("%d segments, %v", len(firsts), err)
	}
	return b, b.journal.Size() - 1
}

// The entry that a decision rests on may be many segments before it.
func TestJudgeOverSegments(t *testing.T) {
	b, last := longBook(t)
	var told []int
	v, err := Judge(t.Context(), b.dir, last, func(done, all int) { told = append(told, done); _ = all })
	if err != nil || v.Result != Same || v.Entry.Index != 1 || v.Again.SPIFFEID != "spiffe://example.org/web" {
		t.Fatalf("%+v, %v", v, err)
	}
	if len(told) < 10 || told[0] != 1 {
		t.Errorf("progress was told %v", told)
	}
	// The oldest record that fits is far, and the newest is near.
	told = nil
	if at, err := FindSerial(t.Context(), b.dir, "7F:00:00:00", func(done, _ int) { told = append(told, done) }); err != nil || at != 2 || len(told) < 10 {
		t.Errorf("serial of record 2: %d, %v after %d segments", at, err, len(told))
	}
	told = nil
	if at, err := FindSerial(t.Context(), b.dir, "7f0003e7", func(done, _ int) { told = append(told, done) }); err != nil || at != last || len(told) != 1 {
		t.Errorf("serial of the last record: %d, %v after %d segments", at, err, len(told))
	}
}

// What is not in this part of the ledger is said, and is judged where it is.
func TestArchivedPart(t *testing.T) {
	b, last := longBook(t)
	archive := filepath.Join(t.TempDir(), "archive")
	firsts, err := ledger.Segments(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.journal.Archive(t.Context(), archive, firsts[5], nil, nil); err != nil {
		t.Fatal(err)
	}
	v, err := Judge(t.Context(), b.dir, last, nil)
	if err != nil || v.Result != NotJudged || !strings.Contains(v.Reason, "not in this part of the ledger") || len(v.Problems) > 0 {
		t.Errorf("without the entry's record: %+v, %v", v, err)
	}
	if v, err = Judge(t.Context(), archive, firsts[5]-1, nil); err != nil || v.Result != Same {
		t.Errorf("in the archive: %+v, %v", v, err)
	}
	if _, err := FindSerial(t.Context(), b.dir, "7f000000", nil); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("below %d were archived", firsts[5])) {
		t.Errorf("a serial that was archived: %v", err)
	}
	if _, err := InForce(t.Context(), b.dir, nil); !errors.Is(err, ErrNoEntries) || !strings.Contains(err.Error(), "archived") {
		t.Errorf("entries in force: %v", err)
	}
	// A start records what is in force, so that the archive is needed no more.
	entry := shop(1, anyApp)
	b.add(&ledgerv1.Record{Event: ledgerv1.Event_EVENT_STARTED})
	b.add(&ledgerv1.Record{Event: ledgerv1.Event_EVENT_ENTRY_LOADED, Entry: b.ref(entry), Definition: entry})
	b.issue(b.ref(entry), "db", 2000)
	b.flush()
	if v, err = Judge(t.Context(), b.dir, b.journal.Size()-1, nil); err != nil || v.Result != Same || v.Entry.Event != "entry_loaded" {
		t.Errorf("after a start: %+v, %v", v, err)
	}
	if entries, err := InForce(t.Context(), b.dir, nil); err != nil || entries["shop"].GetWorkloads() != anyApp {
		t.Errorf("entries in force: %v, %v", entries, err)
	}
}

// Whoever interrupts it gets the prompt back before the ledger has been read.
func TestInterrupted(t *testing.T) {
	b, last := longBook(t)
	for name, run := range map[string]func(ctx context.Context, progress func(done, all int)) error{
		"why": func(ctx context.Context, progress func(int, int)) error {
			_, err := Judge(ctx, b.dir, last, progress)
			return err
		},
		"serial": func(ctx context.Context, progress func(int, int)) error {
			_, err := FindSerial(ctx, b.dir, "7f000000", progress)
			return err
		},
		"in force": func(ctx context.Context, progress func(int, int)) error {
			_, err := InForce(ctx, b.dir, progress)
			return err
		},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		segments := 0
		err := run(ctx, func(int, int) { segments++; cancel() })
		if cancel(); !errors.Is(err, context.Canceled) || segments != 1 {
			t.Errorf("%s: %v after %d segments", name, err, segments)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Replay(ctx, b.dir, identity.NewSet(), time.Time{}, b.now, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("replay: %v", err)
	}
}

// A replay judges what is between two times, wherever it is in the journal.
func TestReplayWindow(t *testing.T) {
	b, _ := longBook(t)
	begin := time.Date(2026, 11, 23, 9, 0, 3, 0, time.UTC) // record 2
	set := identity.NewSet(b.compile(shop(2, `docker.labels["app"] == "db"`)))
	for name, tc := range map[string]struct {
		since, until time.Time
		issued       uint64
	}{
		"all":             {time.Time{}, b.now.Add(time.Hour), 1000},
		"the first ten":   {begin, begin.Add(10 * time.Second), 10},
		"some between":    {begin.Add(400 * time.Second), begin.Add(700 * time.Second), 300},
		"the last second": {b.now, b.now.Add(time.Second), 1},
		"afterwards":      {b.now.Add(time.Second), b.now.Add(time.Hour), 0},
	} {
		r, err := Replay(t.Context(), b.dir, set, tc.since, tc.until, nil)
		if err != nil || r.Issued != tc.issued || r.Kept != 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
			continue
		}
		if tc.issued == 0 {
			continue
		}
		g := r.Groups[0]
		if len(r.Groups) != 1 || g.Effect != Refused || g.Records != tc.issued || g.Instances != tc.issued || len(g.Samples) > maxSamples || g.Miss.Field != "workloads" {
			t.Errorf("%s: %+v", name, g)
		}
	}
}

// However many different things a replay finds, it holds so many and counts the
// rest.
func TestReplayBounds(t *testing.T) {
	b := newBook(t, ledger.Options{})
	entry := shop(1, anyApp)
	b.add(&ledgerv1.Record{Event: ledgerv1.Event_EVENT_STARTED})
	b.apply(entry)
	ref := b.ref(entry)
	const more = 100
	for n := range maxGroups + more {
		b.issue(ref, fmt.Sprintf("app-%d", n), n)
	}
	b.flush()
	r, err := Replay(t.Context(), b.dir, identity.NewSet(), time.Time{}, b.now.Add(time.Second), nil)
	if err != nil || r.Issued != maxGroups+more || len(r.Groups) != maxGroups || r.Uncounted != more {
		t.Errorf("%d issued, %d groups, %d uncounted, %v", r.Issued, len(r.Groups), r.Uncounted, err)
	}
}
