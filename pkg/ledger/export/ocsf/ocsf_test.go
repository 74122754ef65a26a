package ocsf

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// FuzzFormat: a line is one object, whose texts are what the record has. That
// objects keep to the schema is shown in test/export, with the schema.
func FuzzFormat(f *testing.F) {
	f.Add("a\n\"}{\\\u202e\U000e0001", int32(1))
	f.Add(strings.Repeat("x", 100_000), int32(14))
	f.Fuzz(func(t *testing.T, s string, event int32) {
		s = strings.ToValidUTF8(s, "?")
		line, err := Format(ledger.Entry{Index: 7, Record: &ledgerv1.Record{
			Time: &timestamppb.Timestamp{Seconds: 1}, Event: ledgerv1.Event(event), Detail: s, Actor: s, SpiffeId: s, Reason: s,
		}})
		if err != nil {
			t.Fatal(err)
		}
		if strings.IndexFunc(string(line), func(r rune) bool { return !strconv.IsPrint(r) }) >= 0 {
			t.Fatalf("%q does not print", line)
		}
		var got struct {
			StatusDetail string `json:"status_detail"`
			Metadata     struct {
				Sequence int `json:"sequence"`
			} `json:"metadata"`
			Unmapped struct {
				Record struct {
					Detail string `json:"detail"`
				} `json:"record"`
			} `json:"unmapped"`
		}
		if err := json.Unmarshal(line, &got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]string{s, s}, []string{got.StatusDetail, got.Unmapped.Record.Detail}); d != "" || got.Metadata.Sequence != 7 {
			t.Fatal(d)
		}
	})
}

// Every event has a class: a base event is for those of newer versions.
func TestKinds(t *testing.T) {
	for n, name := range ledgerv1.Event_name {
		if _, ok := kinds[ledgerv1.Event(n)]; !ok && n != 0 {
			t.Errorf("no class for %s", name)
		}
	}
}
