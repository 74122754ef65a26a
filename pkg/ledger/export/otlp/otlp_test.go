package otlp

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	collectorv1 "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	"google.golang.org/protobuf/proto"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

var formats = export.Formats{"json": ledger.FormatJSON}

// What is sent is an ExportLogsServiceRequest, as the official types decode it, and
// their answers are understood.
func TestWireFormat(t *testing.T) {
	var got []int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		var request collectorv1.ExportLogsServiceRequest
		if err := proto.Unmarshal(body, &request); err != nil || r.URL.Path != "/v1/logs" {
			t.Errorf("%v at %s", err, r.URL.Path)
		}
		for _, l := range request.GetResourceLogs()[0].GetScopeLogs()[0].GetLogRecords() {
			got = append(got, l.GetAttributes()[1].GetValue().GetIntValue())
		}
		answer, err := proto.Marshal(&collectorv1.ExportLogsServiceResponse{
			PartialSuccess: &collectorv1.ExportLogsPartialSuccess{RejectedLogRecords: 1, ErrorMessage: "too old"},
		})
		if err != nil {
			t.Error(err)
		}
		w.Write(answer)
	}))
	defer server.Close()
	var log bytes.Buffer
	target, err := New(Config{Endpoint: server.URL, Protocol: "http/protobuf"}, formats, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	b := export.Batch{Journal: "00", First: 0, Next: 70}
	for i := range uint64(70) { // in more than one request
		b.Entries = append(b.Entries, ledger.Entry{Index: i, Record: &ledgerv1.Record{Detail: strings.Repeat("x", 60_000)}})
	}
	if err := target.Send(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	var want []int64
	for i := range int64(70) {
		want = append(want, i)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if !strings.Contains(log.String(), "refused records for good") || !strings.Contains(log.String(), "too old") {
		t.Errorf("log: %s", log.String())
	}
}

func FuzzPartialSuccess(f *testing.F) {
	f.Add([]byte{10, 2, 8, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var want collectorv1.ExportLogsServiceResponse
		rejected, _, err := partialSuccess(b)
		if proto.Unmarshal(b, &want) == nil && (err != nil || want.GetPartialSuccess().GetRejectedLogRecords() != int64(rejected)) && !repeated(&want, b) {
			t.Errorf("%x: %d, %v; want %d", b, rejected, err, want.GetPartialSuccess().GetRejectedLogRecords())
		}
	})
}

// repeated says that a field is there twice, which protobuf merges and we do not.
func repeated(m proto.Message, b []byte) bool {
	return proto.Size(m) != len(b)
}

func TestSettings(t *testing.T) {
	for _, c := range []struct {
		c    Config
		want string
	}{
		{Config{}, "endpoint: "},
		{Config{Endpoint: "collector:4317"}, "write https://"},
		{Config{Endpoint: "http://collector:4317"}, "is not on this machine"},
		{Config{Endpoint: "https://a:b@collector:4317"}, "put it in a file"},
		{Config{Endpoint: "https://collector:4317/v1/logs"}, "gRPC has no path"},
		{Config{Endpoint: "https://collector", Protocol: "http/json"}, "none of grpc, http/protobuf"},
		{Config{Endpoint: "https://collector", Format: "cef"}, "none of json, ocsf"},
		{Config{Endpoint: "https://collector", HeadersFile: "/nowhere"}, "headers_file: "},
	} {
		if _, err := New(c.c, formats, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.c, err)
		}
	}
}
