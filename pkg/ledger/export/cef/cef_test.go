package cef

import (
	"strings"
	"testing"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestFormat(t *testing.T) {
	at := timestamppb.New(time.Date(2026, 11, 23, 14, 31, 5, 123456000, time.UTC))
	line, err := Format(ledger.Entry{Index: 7, Hash: [32]byte{0xab}, Record: &ledgerv1.Record{
		Version: 1, Time: at, Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_REFUSED,
		Reason: "rule_not_matched", Detail: `docker.labels["app"] == "a|b\c"` + "\n\u202e", SpiffeId: "spiffe://example.org/shop",
		Node:  &ledgerv1.NodeRef{Id: "spiffe://example.org/n/1", Address: "10.0.3.7:41234"},
		Entry: &ledgerv1.EntryRef{Name: "shop", Revision: 17}, CaVersion: "1.2|3", CaInstance: "ca-2", RequestId: "r",
		Took: durationpb.New(412 * time.Microsecond),
	}})
	if err != nil {
		t.Fatal(err)
	}
	const want = `CEF:0|meshid|ca|1.2_3|issue|Issue X.509-SVID: refused|6|rt=1795444265123 externalId=7 act=issue outcome=refused ` +
		`reason=rule_not_matched msg=docker.labels["app"] \=\= "a|b\\c"\\u000a\\u202e shost=spiffe://example.org/n/1 src=10.0.3.7 spt=41234 ` +
		`dvchost=ca-2 duser=spiffe://example.org/shop cs3Label=entry cs3=shop ` +
		`cs5Label=recordHash cs5=ab00000000000000000000000000000000000000000000000000000000000000 cs6Label=requestId cs6=r ` +
		`cn1Label=entryRevision cn1=17 cn2Label=tookMicroseconds cn2=412`
	if string(line) != want {
		t.Errorf("got  %s\nwant %s", line, want)
	}
}

// FuzzFormat: no text ends its field, its event or its line.
func FuzzFormat(f *testing.F) {
	for _, s := range []string{"a|b", "a=b c=d", "a\nCEF:0|x|y|z|1|n|9|msg=forged", `\`, `\=`, `\|`, "\x00\u202e\u2028", strings.Repeat("=", 5000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		s = strings.ToValidUTF8(s, "?")
		line, err := Format(ledger.Entry{Record: &ledgerv1.Record{Event: ledgerv1.Event_EVENT_ISSUE, CaVersion: s, Detail: s, SpiffeId: s, RequestId: s, Reason: s}})
		if err != nil {
			t.Fatal(err)
		}
		if strings.IndexFunc(string(line), func(r rune) bool { return unicode.IsControl(r) || !unicode.IsPrint(r) }) >= 0 {
			t.Fatalf("%q does not print", line)
		}
		pipes, equals := 0, 0
		for i := 0; i < len(line); i++ {
			switch {
			case line[i] == '\\':
				i++
			case line[i] == '|' && pipes < 7:
				pipes++
			case line[i] == '=' && pipes == 7:
				equals++
			}
		}
		want := 10 // externalId act outcome reason msg duser cs5Label cs5 cs6Label cs6
		if s == "" {
			want = 5
		}
		if pipes != 7 || equals != want {
			t.Fatalf("%d ends of header fields and %d keys in %q", pipes, equals, line)
		}
	})
}
