package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

func TestExplain(t *testing.T) {
	s, err := status.New(codes.InvalidArgument, "2 fields are wrong").WithDetails(&errdetails.BadRequest{
		FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "shop.workloads:1:3", Description: "undeclared"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{errors.New("plain"), "plain"},
		{s.Err(), "2 fields are wrong\n  shop.workloads:1:3: undeclared"},
		{status.Error(codes.Unavailable, "no such socket"), "no such socket\n  Is it running, and is this the right address? See --help for the flag that names it."},
		{
			status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial unix /run/\"a\".sock: connect: no such file or directory"`),
			"dial unix /run/\"a\".sock: connect: no such file or directory\n  Is it running, and is this the right address? See --help for the flag that names it.",
		},
		{
			status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial unix /run/a.sock: connect: permission denied"`),
			"dial unix /run/a.sock: connect: permission denied\n  Run as root (or as the user that the program runs as), or with an identity of an entry that says admin: true.",
		},
		// What an agent has the CA say cannot move the cursor.
		{status.Error(codes.FailedPrecondition, "the agent cannot attest:\n\x1b[2Jfine\r\u202e"), "the agent cannot attest:\n\\x1b[2Jfine\\r\\u202e"},
		{errors.New("open \x1b[31m"), `open \x1b[31m`},
		{errors.Join(fmt.Errorf("ask: %w", status.Error(codes.NotFound, "there is no entry \"x\"")), nil), "ask: there is no entry \"x\""},
	} {
		if diff := cmp.Diff(tc.want, Explain(tc.err)); diff != "" {
			t.Error(diff)
		}
	}
}

func TestPlain(t *testing.T) {
	for text, want := range map[string]string{
		"token is used": "token is used",
		`latest balancer error: connection error: desc = "transport: Error while dialing: dial unix /a.sock: connect: no such file or directory"`:                                          "dial unix /a.sock: connect: no such file or directory",
		`open a session with the CA: rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:8443: connect: connection refused"`: "open a session with the CA: dial tcp 127.0.0.1:8443: connect: connection refused",
		`rpc error: code = Unavailable desc = connection error: desc = "transport: authentication handshake failed: x509: \"a\""`:                                                          `authentication handshake failed: x509: "a"`,
		`connection error: desc = "cut off`: `connection error: desc = "cut off`,
	} {
		if got := Plain(text); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// A node chooses what its agent is called: a table stays a table.
func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := Table(&out, []string{"NODE", "AGENT"}, [][]string{{"a", "v1\x1b[2J\nb  v2"}, {"b", "v2"}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("NODE  AGENT\na     v1\\x1b[2J\\nb  v2\nb     v2\n", out.String()); diff != "" {
		t.Error(diff)
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		5 * time.Millisecond:            "5ms",
		59 * time.Second:                "59s",
		90 * time.Second:                "1m30s",
		45 * time.Minute:                "45m",
		90 * time.Minute:                "1h30m",
		47 * time.Hour:                  "47h",
		7 * 24 * time.Hour:              "7d",
		7*24*time.Hour + 3*time.Hour:    "7d3h",
		10 * 365 * 24 * time.Hour:       "10y",
		60*24*time.Hour + 3*time.Second: "60d",
	} {
		if got := Short(d); got != want {
			t.Errorf("Short(%v) = %s, want %s", d, got, want)
		}
	}
	now := time.Unix(1_000_000, 0)
	if got := Until(now, now.Add(-time.Minute)); got != "1m ago" {
		t.Error(got)
	}
	if got := Until(now, time.Time{}); got != "-" {
		t.Error(got)
	}
}

// Bytes are hexadecimal at every depth, also in lists, and empty ones are "".
func TestJSON(t *testing.T) {
	var out bytes.Buffer
	m := &adminv1.ListNodesResponse{Nodes: []*adminv1.Node{{
		Id: "spiffe://example.org/n", SvidSerial: []byte{0x0a, 0xff}, AttestedAt: timestamppb.New(time.Unix(0, 0)),
	}}}
	if err := JSON(&out, m); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"svid_serial": "0aff"`, `"id": "spiffe://example.org/n"`, `"attested_at": "1970-01-01T00:00:00Z"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is not in %s", want, out.String())
		}
	}
	line, err := MarshalJSON(&adminv1.GetBundleResponse{Roots: [][]byte{{1}, {2, 3}}})
	if err != nil || !bytes.Contains(line, []byte(`["01","0203"]`)) {
		t.Errorf("%s, %v", line, err)
	}
	line, err = MarshalSet(&attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 1000, Groups: []int64{4, 27}}})
	if want := `{"unix":{"groups":[4,27],"uid":1000}}`; err != nil || string(line) != want {
		t.Errorf("%s, %v", line, err)
	}
	line, err = MarshalJSON(&ledgerv1.Record{Certificate: &ledgerv1.Certificate{Serial: []byte{7}}})
	if err != nil || !bytes.Contains(line, []byte(`"serial":"07"`)) {
		t.Errorf("%s, %v", line, err)
	}
}

func TestOutputFlag(t *testing.T) {
	o := OutputFlag{value: "xml", formats: []string{"table", "json"}}
	if _, err := o.Format(); err == nil || err.Error() != `--output "xml": write table or json` {
		t.Error(err)
	}
}

// The servers end with their context, and only /metrics, /livez and
// /readyz are there.
func TestV_H11_J2_MetricsListenerServesNothingElse(t *testing.T) {
	registry := prometheus.NewRegistry()
	tracker, err := health.New(registry, "meshid_test", "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := RegisterProcessMetrics(registry, "meshid_test"); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	logger, err := (&LogFlags{level: "error", format: "json"}).Logger(&bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- ServeMetrics(ctx, address, registry, tracker, logger) }()
	codes := make(map[string]int)
	for _, path := range []string{"/metrics", "/livez", "/readyz", "/", "/debug/pprof/", "/debug/vars", "/quit", "/metrics/../config"} {
		for {
			answer, err := http.Get("http://" + address + path)
			if err != nil {
				select {
				case err := <-ended:
					t.Fatal(err)
				default:
				}
				continue // not listening yet
			}
			answer.Body.Close()
			codes[path] = answer.StatusCode
			break
		}
	}
	want := map[string]int{
		"/metrics": 200, "/livez": 200, "/readyz": 200, "/": 404, "/debug/pprof/": 404,
		"/debug/vars": 404, "/quit": 404, "/metrics/../config": 404,
	}
	if diff := cmp.Diff(want, codes); diff != "" {
		t.Error(diff)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := ServeMetrics(t.Context(), "256.0.0.1:1", registry, tracker, logger); err == nil || !strings.Contains(err.Error(), "metrics_listen") {
		t.Errorf("a wrong address: %v", err)
	}
}

func TestServeGRPCEndsWithItsContext(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- ServeGRPC(ctx, grpc.NewServer(grpc.ConnectionTimeout(100*time.Millisecond)), l, time.Second)
	}()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestLogFlags(t *testing.T) {
	if _, err := (&LogFlags{level: "loud", format: "text"}).Logger(nil); err == nil {
		t.Error("accepted a level that does not exist")
	}
	if _, err := (&LogFlags{level: "info", format: "xml"}).Logger(nil); err == nil {
		t.Error("accepted a format that does not exist")
	}
}
