package syslog

import (
	"bytes"
	"context"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/leodido/go-syslog/v4"
	"github.com/leodido/go-syslog/v4/octetcounting"
	"github.com/leodido/go-syslog/v4/rfc5424"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	"github.com/meshid/meshid/pkg/ledger/export/cef"
	"github.com/meshid/meshid/pkg/ledger/export/ocsf"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

var formats = export.Formats{"json": ledger.FormatJSON, "cef": cef.Format, "ocsf": ocsf.Format}

func entry(s string) ledger.Entry {
	return ledger.Entry{Index: 7, Record: &ledgerv1.Record{
		Time: timestamppb.New(time.Date(2026, 11, 23, 14, 31, 5, 123456789, time.UTC)), Event: ledgerv1.Event_EVENT_ISSUE,
		Outcome: ledgerv1.Outcome_OUTCOME_REFUSED, SpiffeId: s, Detail: s, CaInstance: s, Reason: s, Actor: s, RequestId: s,
		Node: &ledgerv1.NodeRef{Id: s}, Entry: &ledgerv1.EntryRef{Name: s},
	}}
}

// FuzzMessage: what another parser finds is one message with what the record has.
func FuzzMessage(f *testing.F) {
	for _, s := range []string{"", `a"] [x@1 y="z`, "a\n<0>1 - - - - - - forged", `\`, "\x00\u202e\u2028", "1 <0>1 - - - - - -", strings.Repeat("]", 10_000), strings.Repeat("\n", 10_000), strings.Repeat("\U000e0041", 3000)} {
		for format := range 3 {
			f.Add(s, format)
		}
	}
	f.Fuzz(func(t *testing.T, s string, inFormat int) {
		s = strings.ToValidUTF8(s, "?")
		format := []string{"json", "cef", "ocsf"}[uint(inFormat)%3]
		c := Config{Format: format, Address: "localhost:514", Transport: "tcp"}
		target, err := New(c, formats)
		if err != nil {
			t.Fatal(err)
		}
		m := target.message("00ff", entry(s))
		if len(m) > target.config.MaxBytes || bytes.ContainsAny(m, "\n\x00") {
			t.Fatalf("%d bytes: %.300q", len(m), m)
		}
		var found []syslog.Message
		p := octetcounting.NewParser(syslog.WithListener(func(r *syslog.Result) {
			if r.Error != nil {
				t.Fatalf("%v in %.300q", r.Error, m)
			}
			found = append(found, r.Message)
		}))
		p.Parse(strings.NewReader(strconv.Itoa(len(m)) + " " + string(m)))
		if len(found) != 1 {
			t.Fatalf("%d messages", len(found))
		}
		got := found[0].(*rfc5424.SyslogMessage)
		data := (*got.StructuredData)["meshid@32473"]
		if *got.Priority != 13*8+4 || *got.MsgID != "issue" || data["index"] != "7" || data["journal"] != "00ff" || data["outcome"] != "refused" ||
			len(*got.StructuredData) != 1 {
			t.Fatalf("%+v in %.300q", data, m)
		}
	})
}

func TestMessage(t *testing.T) {
	target, err := New(Config{Address: "localhost:514", Transport: "tcp", Facility: "local0"}, formats)
	if err != nil {
		t.Fatal(err)
	}
	e := entry("a ]")
	e.Record.Node, e.Record.Entry, e.Record.Detail, e.Record.Actor, e.Record.Reason, e.Record.RequestId = nil, nil, "", "", "", ""
	zero := strings.Repeat("0", 64)
	want := `<132>1 2026-11-23T14:31:05.123456Z a_] meshid-ca - issue [meshid@32473 journal="00" index="7" hash="` + zero +
		`" event="issue" outcome="refused" spiffe_id="a \]"] {"index":7,"hash":"` + zero +
		`","record":{"time":"2026-11-23T14:31:05.123456789Z","event":"EVENT_ISSUE","outcome":"OUTCOME_REFUSED","spiffe_id":"a ]","ca_instance":"a ]"}}`
	if got := string(target.message("00", e)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// Datagrams over UDP and Unix sockets.
func TestDatagrams(t *testing.T) {
	for _, network := range []string{"udp", "unixgram"} {
		address := "127.0.0.1:0"
		if network == "unixgram" {
			address = t.TempDir() + "/log"
		}
		conn, err := (&net.ListenConfig{}).ListenPacket(t.Context(), network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		target, err := New(Config{Address: conn.LocalAddr().String(), Transport: strings.TrimSuffix(network, "gram")}, formats)
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Send(context.Background(), export.Batch{Journal: "00", Entries: []ledger.Entry{entry("a"), entry("b")}}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			buf := make([]byte, 1<<16)
			if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				t.Fatal(err)
			}
			if m, err := rfc5424.NewParser().Parse(buf[:n]); err != nil || *m.(*rfc5424.SyslogMessage).Appname != "meshid-ca" {
				t.Errorf("%v in %q", err, buf[:n])
			}
		}
	}
}

// A receiver that resets the connection may not have read all: it gets all again.
func TestReset(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if c, err := l.Accept(); err == nil { // and reads nothing
			c.(*net.TCPConn).SetLinger(0)
			buf := make([]byte, 1)
			c.Read(buf)
			c.Close()
		}
	}()
	target, err := New(Config{Address: l.Addr().String(), Transport: "tcp"}, formats)
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Send(context.Background(), export.Batch{Entries: []ledger.Entry{entry("a")}}); err == nil {
		t.Error("a connection that was reset counts as one that was read to its end")
	}
	l.Close()
	<-ended
}

// A receiver that closes the connection at once, as one does that refuses the
// sender, has read nothing, whichever comes first: its end or our messages.
func TestClosedUnread(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	target, err := New(Config{Address: l.Addr().String(), Transport: "tcp"}, formats)
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		if err := target.Send(context.Background(), export.Batch{Entries: []ledger.Entry{entry("a")}}); err == nil {
			t.Fatal("what was not read counts as sent")
		}
	}
	l.Close()
	<-ended
}

func TestSettings(t *testing.T) {
	for _, c := range []struct {
		c    Config
		want string
	}{
		{Config{}, "address: "},
		{Config{Address: "localhost"}, "write host:port"},
		{Config{Address: "log", Transport: "unix"}, "such as /dev/log"},
		{Config{Address: "localhost:1", Transport: "udp", TLS: export.TLS{CA: "x"}}, "write transport: tls"},
		{Config{Address: "localhost:1", Transport: "udp", MaxBytes: 1 << 17}, "does not fit in a datagram"},
		{Config{Address: "localhost:1", MaxBytes: 100}, "from 8192 to"},
		{Config{Address: "localhost:1", Facility: "kern"}, `"kern" is none of`},
		{Config{Address: "localhost:1", TLS: export.TLS{CA: "/nowhere"}}, "tls.ca: open /nowhere"},
		{Config{Address: "localhost:1", TLS: export.TLS{Key: "/nowhere"}}, "tls.key: tls.certificate is missing"},
		{Config{Address: "localhost:1", Format: "xml"}, "format: "},
	} {
		if _, err := New(c.c, formats); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.c, err)
		}
	}
}
