package export

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// fakeTarget takes indexes in memory.
type fakeTarget struct {
	taken []uint64
	err   error
	at    []time.Time
}

func (f *fakeTarget) Send(_ context.Context, b Batch) error {
	if f.err != nil {
		return f.err
	}
	f.at = append(f.at, time.Now())
	for _, e := range b.Entries {
		f.taken = append(f.taken, e.Index)
	}
	return nil
}

func record(event ledgerv1.Event, outcome ledgerv1.Outcome) *ledgerv1.Record {
	return &ledgerv1.Record{Version: 1, Time: timestamppb.Now(), Event: event, Outcome: outcome, SpiffeId: "spiffe://example.org/a"}
}

// open opens a journal with n records of refused issuances and, between them, as
// many of successful ones.
func open(t *testing.T, dir string, n int) *ledger.Journal {
	t.Helper()
	j, err := ledger.Open(dir, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		_, err := j.Append(t.Context(),
			ledger.NewDraft(record(ledgerv1.Event_EVENT_ISSUE, ledgerv1.Outcome_OUTCOME_REFUSED), nil),
			ledger.NewDraft(record(ledgerv1.Event_EVENT_ISSUE, ledgerv1.Outcome_OUTCOME_SUCCESS), nil))
		if err != nil {
			t.Fatal(err)
		}
	}
	return j
}

func entries(t *testing.T, dir string, from, to uint64) []ledger.Entry {
	t.Helper()
	var all []ledger.Entry
	for e, err := range ledger.Scan(dir, from) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Index < to {
			all = append(all, e)
		}
	}
	return all
}

func TestExportCursor(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		journal := filepath.Join(dir, "journal")
		j := open(t, journal, 2)
		defer j.Close()
		o := Options{Dir: filepath.Join(dir, "exports"), Name: "later"}

		late := &fakeTarget{}
		x, err := New(j, late, o)
		if err != nil {
			t.Fatal(err)
		}
		if next, _ := x.Next(t.Context()); next != 4 {
			t.Errorf("a new export begins at %d, want 4: with what is appended next", next)
		}

		o.Name, o.FromBeginning = "all", true
		if o.Filter, err = NewFilter([]string{"issue"}, []string{"refused"}); err != nil {
			t.Fatal(err)
		}
		all := &fakeTarget{}
		if x, err = New(j, all, o); err != nil {
			t.Fatal(err)
		}
		if err := x.Put(t.Context(), entries(t, journal, 0, 3)); err != nil {
			t.Fatal(err)
		}
		// It was sent, and the cursor could not be kept: it is not sent again.
		if err := os.Rename(o.Dir, o.Dir+".away"); err != nil {
			t.Fatal(err)
		}
		rest := entries(t, journal, 3, 4)
		open(t, filepath.Join(dir, "other"), 0).Close()
		if err := x.Put(t.Context(), rest); err == nil {
			t.Error("a cursor that cannot be kept is no error")
		}
		if err := os.Rename(o.Dir+".away", o.Dir); err != nil {
			t.Fatal(err)
		}
		if err := x.Put(t.Context(), rest); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]uint64{0, 2}, all.taken); d != "" {
			t.Errorf("taken (-want +got):\n%s", d)
		}
		// One that failed is sent again, from the cursor that is on the disk.
		if x, err = New(j, all, o); err != nil {
			t.Fatal(err)
		}
		if next, _ := x.Next(t.Context()); next != 4 {
			t.Errorf("it goes on at %d, want 4", next)
		}
	})
}

// Records that come one by one go in batches, once in a second.
func TestExportPace(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := open(t, dir+"/journal", 5)
		defer j.Close()
		target := &fakeTarget{}
		x, err := New(j, target, Options{Dir: dir + "/exports", Name: "x", FromBeginning: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries(t, dir+"/journal", 0, 10) {
			if err := x.Put(t.Context(), []ledger.Entry{e}); err != nil {
				t.Fatal(err)
			}
		}
		for i := 1; i < len(target.at); i++ {
			if d := target.at[i].Sub(target.at[i-1]); d != paceInterval {
				t.Errorf("batch %d came after %v, want %v", i, d, paceInterval)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := x.Put(ctx, entries(t, dir+"/journal", 9, 10)); err != nil {
			t.Errorf("what was taken already: %v", err)
		}
	})
}

func TestExportRefusesForeignCursor(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir+"/journal", 1)
	defer j.Close()
	if err := os.Mkdir(dir+"/exports", 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"torn":  {`{"journal":"ab`, "is no cursor"},
		"other": {`{"journal":"00","next":9}`, "is of journal 00"},
	} {
		if err := os.WriteFile(dir+"/exports/"+name+".cursor", []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := New(j, &fakeTarget{}, Options{Dir: dir + "/exports", Name: name})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "to begin the export anew") {
			t.Errorf("%s: %v", name, err)
		}
	}
	got, err := Abandoned(dir+"/exports", []string{"torn"})
	if d := cmp.Diff([]string{dir + "/exports/other.cursor"}, got); d != "" || err != nil {
		t.Errorf("abandoned: %v\n%s", err, d)
	}
}

func TestFilterNames(t *testing.T) {
	for _, c := range []struct {
		events, outcomes []string
		want             string
	}{
		{[]string{"isue"}, nil, `events: "isue" is none of issue, attest, renew_agent`},
		{nil, []string{"denied"}, `outcomes: "denied" is none of success, refused, error`},
		{[]string{"unspecified"}, nil, "is none of"},
	} {
		if _, err := NewFilter(c.events, c.outcomes); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v %v: %v", c.events, c.outcomes, err)
		}
	}
}

// Whatever is in a record, it fits, in a format that would take it whole and in
// one that fails.
func TestEncode(t *testing.T) {
	r := record(ledgerv1.Event_EVENT_ISSUE, ledgerv1.Outcome_OUTCOME_REFUSED)
	long := strings.Repeat("\x01\"", 1<<14)
	r.SpiffeId, r.Detail, r.Actor, r.Diff, r.RequestId, r.CaInstance, r.Reason = long, long, long, long, long, long, long
	e := ledger.Entry{Index: 7, Record: r}
	line, abridged := Encode(ledger.FormatJSON, e, 2*MinRecordBytes)
	var got struct {
		Index  uint64 `json:"index"`
		Record struct {
			Outcome string `json:"outcome"`
			Detail  string `json:"detail"`
		} `json:"record"`
	}
	if err := json.Unmarshal(line, &got); err != nil || !abridged || len(line) > 2*MinRecordBytes {
		t.Fatalf("%v, abridged %v, %d bytes", err, abridged, len(line))
	}
	if got.Index != 7 || got.Record.Outcome != "OUTCOME_REFUSED" || !strings.HasPrefix(got.Record.Detail, "abridged from") {
		t.Errorf("%+v", got)
	}
	if line, abridged = Encode(ledger.FormatJSON, e, MinRecordBytes); len(line) > MinRecordBytes || !abridged {
		t.Errorf("%d bytes", len(line))
	}
	e.Record = record(ledgerv1.Event_EVENT_ISSUE, ledgerv1.Outcome_OUTCOME_REFUSED)
	e.Record.Time = &timestamppb.Timestamp{Nanos: -1}
	if line, abridged = Encode(ledger.FormatJSON, e, MinRecordBytes); !json.Valid(line) || abridged {
		t.Errorf("%s", line)
	}
	failing := func(ledger.Entry) ([]byte, error) { return nil, errors.New("no") }
	if line, _ := Encode(failing, e, MinRecordBytes); string(line) != `{"index":7}` {
		t.Errorf("%s", line)
	}
}

func TestClip(t *testing.T) {
	for _, c := range []struct{ in, want string }{{"abc", "abc"}, {"abcdefgh", "abcde…"}, {"ääääää", "ää…"}} {
		if got := Clip(c.in, 8); c.in == "ääääää" && got != "ää…" || len(got) > 8 {
			t.Errorf("Clip(%q) = %q", c.in, got)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"7": 7 * time.Second, "Thu, 01 Jan 2026 00:01:00 GMT": time.Minute, "Wed, 31 Dec 2025 00:01:00 GMT": 0,
		"": -1, "-1": -1, "soon": -1, "99999999999999999999": -1,
	} {
		got, ok := retryAfter(value, now)
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%q: %v, %v", value, got, ok)
		}
	}
}

// Every event has a title: those of newer versions are numbers.
func TestTitles(t *testing.T) {
	var missing []string
	for n, name := range ledgerv1.Event_name {
		if titles[ledgerv1.Event(n)] == "" && n != 0 {
			missing = append(missing, name)
		}
	}
	if slices.Sort(missing); len(missing) > 0 {
		t.Errorf("no titles for %v", missing)
	}
}
