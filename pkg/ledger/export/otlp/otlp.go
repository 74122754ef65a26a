// Package otlp sends records of the ledger as log records of the OpenTelemetry
// protocol, over gRPC or HTTP. It answers "has the collector taken this batch". It
// does not know what the collector does with it, and needs neither the OpenTelemetry
// SDK nor its generated services: a request has the same encoding as LogsData.
package otlp

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"

	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	logsv1 "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcev1 "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

const (
	method = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
	path   = "/v1/logs" // OTLP 1.x, "OTLP/HTTP Request"

	maxRequest = 2 << 20 // collectors take 4 MiB over gRPC
	maxRecord  = 1 << 20
)

// severities are those of the log data model for outcomes.
var severities = map[ledgerv1.Outcome]logsv1.SeverityNumber{
	ledgerv1.Outcome_OUTCOME_SUCCESS: logsv1.SeverityNumber_SEVERITY_NUMBER_INFO,
	ledgerv1.Outcome_OUTCOME_REFUSED: logsv1.SeverityNumber_SEVERITY_NUMBER_WARN,
	ledgerv1.Outcome_OUTCOME_ERROR:   logsv1.SeverityNumber_SEVERITY_NUMBER_ERROR,
}

// Config is the settings of one export to a collector.
type Config struct {
	// URL of the collector, such as https://collector.internal:4317; https:// unless
	// it is on this machine. Without a path, HTTP uses /v1/logs.
	Endpoint string `yaml:"endpoint"`
	// grpc or http/protobuf.
	Protocol string `yaml:"protocol" default:"grpc"`
	// File with further headers, such as "authorization: Bearer …", one a line;
	// nobody else may read it.
	HeadersFile string `yaml:"headers_file"`
	// How the collector is verified, and how it can verify this CA.
	TLS export.TLS `yaml:"tls"`
	// How the record is written in the body: json (the ledger's own) or ocsf.
	Format string `yaml:"format" default:"json"`
}

// OTLP is an export.Target.
type OTLP struct {
	config Config
	format export.Format
	poster *export.Poster
	log    *slog.Logger

	done uint64 // all below were taken, though their batch was not as a whole
}

// New checks the settings. Its errors are *export.SettingErrors. The logger is told
// of records that a collector refuses for good.
func New(c Config, formats export.Formats, logger *slog.Logger) (*OTLP, error) {
	if c.Format == "" {
		c.Format = "json"
	}
	format, err := formats.Get(c.Format, "json", "ocsf")
	if err != nil {
		return nil, err
	}
	p, err := export.NewPoster("endpoint", c.Endpoint, c.TLS, c.HeadersFile)
	if err != nil {
		return nil, err
	}
	switch c.Protocol {
	case "", "grpc":
		c.Protocol = "grpc"
		if u := p.URL(); u.Path != "" && u.Path != "/" {
			return nil, export.Bad("endpoint", "gRPC has no path: leave %s out", u.Path)
		}
	case "http/protobuf":
		if u := p.URL(); u.Path == "" || u.Path == "/" {
			u.Path = path
		}
	default:
		return nil, export.Bad("protocol", "%q is none of grpc, http/protobuf", c.Protocol)
	}
	return &OTLP{config: c, format: format, poster: p, log: logger}, nil
}

// Send implements export.Target.
func (t *OTLP) Send(ctx context.Context, b export.Batch) error {
	var records []*logsv1.LogRecord
	size := 0
	for i, e := range b.Entries {
		if e.Index < t.done {
			continue
		}
		r := t.record(b.Journal, e)
		n := proto.Size(r)
		if len(records) > 0 && size+n > maxRequest {
			if err := t.export(ctx, b.Entries[i-1], records); err != nil {
				return err
			}
			t.done, records, size = e.Index, nil, 0
		}
		records = append(records, r)
		size += n
	}
	if len(records) > 0 {
		if err := t.export(ctx, b.Entries[len(b.Entries)-1], records); err != nil {
			return err
		}
	}
	t.done = b.Next
	return nil
}

// record is e as a log record.
func (t *OTLP) record(journal string, e ledger.Entry) *logsv1.LogRecord {
	r := e.Record
	body, abridged := export.Encode(t.format, e, maxRecord)
	l := &logsv1.LogRecord{
		SeverityNumber: severities[r.GetOutcome()],
		EventName:      "meshid.ledger." + ledger.EventName(r.GetEvent()),
		Body:           text(string(body)),
	}
	if ts := r.GetTime(); ts != nil && ts.CheckValid() == nil && ts.GetSeconds() >= 0 {
		l.TimeUnixNano = uint64(ts.AsTime().UnixNano())
		l.ObservedTimeUnixNano = l.TimeUnixNano
	}
	add := func(key, value string) {
		if value != "" {
			l.Attributes = append(l.Attributes, &commonv1.KeyValue{Key: key, Value: text(value)})
		}
	}
	add("meshid.journal", journal)
	l.Attributes = append(l.Attributes, &commonv1.KeyValue{
		Key: "meshid.index", Value: &commonv1.AnyValue{Value: &commonv1.AnyValue_IntValue{IntValue: int64(e.Index)}}, //nolint:gosec // no ledger has 2^63 records
	})
	add("meshid.hash", hex.EncodeToString(e.Hash[:]))
	add("meshid.event", ledger.EventName(r.GetEvent()))
	add("meshid.outcome", ledger.OutcomeName(r.GetOutcome()))
	for _, a := range []struct{ key, value string }{
		{"meshid.reason", r.GetReason()},
		{"meshid.spiffe_id", r.GetSpiffeId()},
		{"meshid.serial", hex.EncodeToString(r.GetCertificate().GetSerial())},
		{"meshid.node", r.GetNode().GetId()},
		{"meshid.entry", r.GetEntry().GetName()},
		{"meshid.actor", r.GetActor()},
		{"meshid.request_id", r.GetRequestId()},
	} {
		add(a.key, export.Clip(a.value, 1024))
	}
	if abridged {
		add("meshid.abridged", "true")
	}
	return l
}

func text(s string) *commonv1.AnyValue {
	return &commonv1.AnyValue{Value: &commonv1.AnyValue_StringValue{StringValue: s}}
}

// export sends one request; last is the last record in it.
func (t *OTLP) export(ctx context.Context, last ledger.Entry, records []*logsv1.LogRecord) error {
	resource := &resourcev1.Resource{Attributes: []*commonv1.KeyValue{{Key: "service.name", Value: text("meshid-ca")}}}
	for _, a := range []struct{ key, value string }{
		{"service.instance.id", last.Record.GetCaInstance()},
		{"service.version", last.Record.GetCaVersion()},
	} {
		if a.value != "" {
			resource.Attributes = append(resource.Attributes, &commonv1.KeyValue{Key: a.key, Value: text(export.Clip(a.value, 256))})
		}
	}
	request := &logsv1.LogsData{ResourceLogs: []*logsv1.ResourceLogs{{
		Resource:  resource,
		ScopeLogs: []*logsv1.ScopeLogs{{Scope: &commonv1.InstrumentationScope{Name: "github.com/meshid/meshid/pkg/ledger"}, LogRecords: records}},
	}}}
	var answer []byte
	var err error
	if t.config.Protocol == "grpc" {
		answer, err = t.call(ctx, request)
	} else {
		answer, err = t.post(ctx, request)
	}
	if err != nil {
		return err
	}
	rejected, why, err := partialSuccess(answer)
	if err != nil {
		return fmt.Errorf("the collector's answer: %w", err)
	}
	if rejected > 0 {
		// OTLP 1.x, "Partial Success": the client MUST NOT send them again.
		t.log.ErrorContext(ctx, "the collector has refused records for good", "count", rejected, "last", last.Index, "reason", export.Clip(why, 256))
	}
	return nil
}

// post sends a request over HTTP.
func (t *OTLP) post(ctx context.Context, request proto.Message) ([]byte, error) {
	body, err := proto.Marshal(request)
	if err != nil {
		return nil, err
	}
	return t.poster.Post(ctx, http.Header{"Content-Type": {"application/x-protobuf"}, "User-Agent": {"meshid-ca"}}, body)
}

// call sends a request over gRPC.
func (t *OTLP) call(ctx context.Context, request proto.Message) (answer []byte, err error) {
	if err := t.poster.Wait(ctx); err != nil {
		return nil, err
	}
	u := t.poster.URL()
	secure := insecure.NewCredentials()
	if u.Scheme == "https" {
		c, err := t.poster.TLS().Config(u.Hostname())
		if err != nil {
			return nil, err
		}
		secure = credentials.NewTLS(c)
	}
	headers, err := t.poster.Headers()
	if err != nil {
		return nil, err
	}
	md := make(metadata.MD, len(headers))
	for name, values := range headers {
		md.Append(name, values...)
	}
	conn, err := grpc.NewClient("dns:///"+authority(u), grpc.WithTransportCredentials(secure), grpc.WithUserAgent("meshid-ca"))
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // the answer counts
	var reply emptypb.Empty
	if err := conn.Invoke(metadata.NewOutgoingContext(ctx, md), method, request, &reply); err != nil {
		for _, d := range status.Convert(err).Details() {
			if r, ok := d.(*errdetails.RetryInfo); ok {
				t.poster.Delay(r.GetRetryDelay().AsDuration())
			}
		}
		return nil, err
	}
	return reply.ProtoReflect().GetUnknown(), nil
}

// authority is where a URL points: host:port.
func authority(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = strconv.Itoa(4317)
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// partialSuccess reads an ExportLogsServiceResponse: partial_success (1) has
// rejected_log_records (1) and error_message (2).
func partialSuccess(b []byte) (rejected uint64, why string, err error) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return 0, "", protowire.ParseError(n)
		}
		b = b[n:]
		switch {
		case number == 1 && kind == protowire.BytesType:
			inner, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return 0, "", protowire.ParseError(n)
			}
			if rejected, why, err = partial(inner); err != nil {
				return 0, "", err
			}
			b = b[n:]
		default:
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return 0, "", protowire.ParseError(n)
			}
			b = b[n:]
		}
	}
	return rejected, why, nil
}

func partial(b []byte) (rejected uint64, why string, err error) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return 0, "", protowire.ParseError(n)
		}
		b = b[n:]
		m := protowire.ConsumeFieldValue(number, kind, b)
		if m < 0 {
			return 0, "", protowire.ParseError(m)
		}
		switch {
		case number == 1 && kind == protowire.VarintType:
			rejected, _ = protowire.ConsumeVarint(b)
		case number == 2 && kind == protowire.BytesType:
			s, _ := protowire.ConsumeBytes(b)
			why = string(s)
		}
		b = b[m:]
	}
	return rejected, why, nil
}
