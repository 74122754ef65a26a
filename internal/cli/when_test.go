package cli

import (
	"strings"
	"testing"
	"time"
)

func TestTime(t *testing.T) {
	now := time.Date(2026, 11, 23, 14, 31, 5, 0, time.UTC)
	for _, tc := range []struct{ zone, text, want string }{
		{"UTC", "now", "2026-11-23T14:31:05Z"},
		{"UTC", "24h", "2026-11-22T14:31:05Z"},
		{"Europe/Berlin", "7d", "2026-11-16T14:31:05Z"}, // a day is 24 hours
		{"UTC", "1d12h", "2026-11-22T02:31:05Z"},
		{"UTC", "2w", "2026-11-09T14:31:05Z"},
		{"UTC", "90m", "2026-11-23T13:01:05Z"},
		{"Europe/Berlin", "2026-11-23T02:00:00Z", "2026-11-23T02:00:00Z"}, // what has a zone keeps it
		{"Europe/Berlin", "2026-11-23T02:00:00+05:30", "2026-11-22T20:30:00Z"},
		{"Europe/Berlin", "2026-11-23T02:00:00.5Z", "2026-11-23T02:00:00.5Z"},
		{"Europe/Berlin", "2026-11-23", "2026-11-22T23:00:00Z"},
		{"Europe/Berlin", "2026-07-01", "2026-06-30T22:00:00Z"},
		{"Europe/Berlin", "2026-07-01T08:15", "2026-07-01T06:15:00Z"},
		{"Europe/Berlin", "2026-07-01 08:15:30", "2026-07-01T06:15:30Z"},
		{"America/New_York", "2026-11-01 01:30", "2026-11-01T05:30:00Z"}, // there are two: the first
		{"Europe/Berlin", "2026-03-29 02:30", "2026-03-29T01:30:00Z"},    // there is none: as if the clocks had not moved
		{"Asia/Kathmandu", "2026-11-23 00:00", "2026-11-22T18:15:00Z"},
		{"Pacific/Kiritimati", "2026-11-23", "2026-11-22T10:00:00Z"},
	} {
		zone, err := Zone(tc.zone)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Time(tc.text, now, zone)
		if err != nil || got.UTC().Format(time.RFC3339Nano) != tc.want {
			t.Errorf("%q in %s: %v, %v, want %s", tc.text, tc.zone, got.UTC().Format(time.RFC3339Nano), err, tc.want)
		}
	}
	for _, bad := range []string{"", "yesterday", "-5m", "5", "2026-13-01", "1d-5h", "99999999d", "5x", "0001-01-01T00:00:00Z", "9999-01-01", "d", "1w1w", "NaNh"} {
		if got, err := Time(bad, now, time.UTC); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
	if zone, err := Zone("local"); err != nil || zone != time.Local {
		t.Error(zone, err)
	}
	for _, bad := range []string{"Atlantis", "../../etc/passwd", "CEST+1"} {
		if _, err := Zone(bad); err == nil {
			t.Errorf("%q is a zone", bad)
		}
	}
}

func TestRows(t *testing.T) {
	hostile := "a\x1b[2J\u202e\tb\nc\x00\xff"
	for _, tc := range []struct{ format, want string }{
		{"table", "A                          B\n=1+1                       -\na\\x1b[2J\\u202e\\tb\\nc\\x00\ufffd  \"q\" \\\\\n"},
		{"csv", "A,B\n'=1+1,\na\\x1b[2J\\u202e\\tb\\nc\\x00\ufffd,\"\"\"q\"\" \\\\\"\n"},
		{"json", "[\n{\"n\":1},\n{\"n\":2}\n]\n"},
		{"jsonl", "{\"n\":1}\n{\"n\":2}\n"},
	} {
		var out strings.Builder
		r := NewRows(&out, tc.format, "A", "B")
		for i, row := range [][]string{{"=1+1", ""}, {hostile, "\"q\" \\\\"}} {
			if err := r.Add(func() []string { return row }, func() ([]byte, error) { return []byte(`{"n":` + string(rune('1'+i)) + "}"), nil }); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if out.String() != tc.want {
			t.Errorf("%s:\n%q, want\n%q", tc.format, out.String(), tc.want)
		}
	}
	for format, want := range map[string]string{"table": "", "csv": "A\n", "json": "[]\n", "jsonl": ""} {
		var out strings.Builder
		if err := NewRows(&out, format, "A").Close(); err != nil || out.String() != want {
			t.Errorf("nothing as %s: %q, %v", format, out.String(), err)
		}
	}
}

// No cell begins what a spreadsheet takes for a formula, and none has a byte that a
// terminal takes for a command.
func FuzzCell(f *testing.F) {
	for _, s := range []string{"=1", "+1", "-1", "@x", "\t=1", " =1", "\r=1", "＝1", "a", "", "\x1b]0;x\a", "|x", "%x", "\u200b=1", "\ufeff=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c := Cell(s)
		if trimmed := strings.TrimLeft(c, " "); trimmed != "" && strings.ContainsAny(trimmed[:1], "=+-@\t\r\n|%") {
			t.Errorf("%q is the cell %q", s, c)
		}
		for _, r := range c {
			if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\u202e' {
				t.Errorf("%q has %q", c, r)
			}
		}
	})
}
