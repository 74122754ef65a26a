package export

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/meshid/meshid/pkg/ledger/export"
	"github.com/meshid/meshid/pkg/ledger/export/otlp"
	"github.com/meshid/meshid/pkg/ledger/export/webhook"
	"github.com/meshid/meshid/test/require"
)

// TestFault_F64_Webhook: the receiver is overloaded, sends elsewhere and hangs up,
// and then takes what it can verify with an HMAC that is not ours: each record once,
// in order, and the batch that comes again under the same id.
func TestFault_F64_Webhook(t *testing.T) {
	python := require.Program(t, "python3")
	keys := pki(t)
	secret := filepath.Join(keys, "secret")
	if err := os.WriteFile(secret, []byte("whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(python, "testdata/receive.py", keys+"/receiver.pem", keys+"/receiver.key", keys+"/ca.pem", secret)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	start(t, cmd)
	s := scanner(out)
	if !s.Scan() {
		t.Fatal("the receiver does not start")
	}
	url := fmt.Sprintf("https://127.0.0.1:%s/records", s.Text())
	var mu sync.Mutex // guards taken requests
	var requests []string
	go func() {
		for s.Scan() {
			mu.Lock()
			requests = append(requests, s.Text())
			mu.Unlock()
		}
	}()
	target, err := webhook.New(webhook.Config{URL: url, SecretFile: secret, TLS: senderTLS(keys), MaxBytes: 1 << 16}, formats)
	if err != nil {
		t.Fatal(err)
	}
	j := openJournal(t)
	add(t, j, records(2000)...)
	f, _ := feed(t, j, t.TempDir(), target)
	await(t, "the redirection to be refused", f, func() bool { return failing(f, "307")() || taken(j, f)() })
	await(t, "all records to be taken", f, taken(j, f))
	var indexes []uint64
	name := j.Name()
	await(t, "the receiver to say so", nil, func() bool {
		mu.Lock()
		defer mu.Unlock()
		indexes = nil
		for _, text := range requests {
			var r struct {
				ID     string `json:"id"`
				Good   bool   `json:"good"`
				Path   string `json:"path"`
				Client string `json:"client"`
				Body   struct {
					Journal string `json:"journal"`
					First   uint64 `json:"first"`
					Next    uint64 `json:"next"`
					Records []struct {
						Index uint64 `json:"index"`
					} `json:"records"`
				} `json:"body"`
			}
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%x-%d-%d", name, r.Body.First, r.Body.Next); !r.Good || r.Path != "/records" || r.Client != "sender" || r.ID != want {
				t.Fatalf("id %s, want %s; %.300s", r.ID, want, text)
			}
			for _, x := range r.Body.Records {
				indexes = append(indexes, x.Index)
			}
		}
		return len(indexes) >= int(j.Size())
	})
	complete(t, indexes, j.Size(), true)
	for i, x := range indexes {
		if x != uint64(i) {
			t.Fatalf("record %d came at place %d", x, i)
		}
	}
}

func startCollector(t *testing.T, dir, keys, grpcPort, httpPort string) (stop func(syscall.Signal)) {
	t.Helper()
	binary := cached(t, "otelcol/otelcol", "install-otelcol")
	conf := fmt.Sprintf(`
receivers:
  otlp:
    protocols:
      grpc: {endpoint: "127.0.0.1:%[3]s", tls: &tls {cert_file: %[2]s/receiver.pem, key_file: %[2]s/receiver.key, client_ca_file: %[2]s/ca.pem}}
      http: {endpoint: "127.0.0.1:%[4]s", tls: *tls}
exporters:
  file: {path: %[1]s/received, append: true, flush_interval: 100ms}
service:
  telemetry: {metrics: {level: none}}
  pipelines: {logs: {receivers: [otlp], exporters: [file]}}
`, dir, keys, grpcPort, httpPort)
	if err := os.WriteFile(dir+"/conf.yaml", []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	stop = start(t, exec.Command(binary, "--config", dir+"/conf.yaml"))
	await(t, "the collector to listen", nil, func() bool {
		for _, port := range []string{grpcPort, httpPort} {
			conn, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err != nil {
				return false
			}
			conn.Close()
		}
		return true
	})
	return stop
}

// collected reads what the collector wrote: OTLP in JSON, a request a line.
func collected(t *testing.T, dir string) (indexes []uint64) {
	t.Helper()
	type attribute struct {
		Key   string `json:"key"`
		Value struct {
			IntValue string `json:"intValue"`
		} `json:"value"`
	}
	for _, line := range lines(t, dir+"/received") {
		var request struct {
			ResourceLogs []struct {
				ScopeLogs []struct {
					LogRecords []struct {
						Body struct {
							StringValue string `json:"stringValue"`
						} `json:"body"`
						Attributes []attribute `json:"attributes"`
					} `json:"logRecords"`
				} `json:"scopeLogs"`
			} `json:"resourceLogs"`
		}
		if err := json.Unmarshal([]byte(line), &request); err != nil {
			t.Fatalf("%v in %.300s", err, line)
		}
		for _, resource := range request.ResourceLogs {
			for _, scope := range resource.ScopeLogs {
				for _, l := range scope.LogRecords {
					var body struct {
						Index uint64 `json:"index"`
					}
					if err := json.Unmarshal([]byte(l.Body.StringValue), &body); err != nil {
						t.Fatal(err)
					}
					for _, a := range l.Attributes {
						if a.Key == "meshid.index" && a.Value.IntValue != strconv.FormatUint(body.Index, 10) {
							t.Fatalf("attribute %s of record %d", a.Value.IntValue, body.Index)
						}
					}
					indexes = append(indexes, body.Index)
				}
			}
		}
	}
	return indexes
}

// TestFault_F64_Collector: an OpenTelemetry Collector takes each record over gRPC
// and over HTTP, also after it was killed and started again.
func TestFault_F64_Collector(t *testing.T) {
	keys := pki(t)
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(strings.ReplaceAll(protocol, "/", " "), func(t *testing.T) {
			dir, cursors := t.TempDir(), t.TempDir()
			ports := []string{freePort(t), freePort(t)}
			stop := startCollector(t, dir, keys, ports[0], ports[1])
			port := ports[0]
			if protocol != "grpc" {
				port = ports[1]
			}
			var target export.Target
			target, err := otlp.New(otlp.Config{Endpoint: "https://127.0.0.1:" + port, Protocol: protocol, TLS: senderTLS(keys)}, formats, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			j := openJournal(t)
			add(t, j, records(2000)...)
			f, _ := feed(t, j, cursors, target)
			await(t, "all records to be taken", f, taken(j, f))
			stop(syscall.SIGTERM) // it writes what it has
			add(t, j, few(50)...)
			await(t, "the export to fail", f, failing(f, ""))
			stop = startCollector(t, dir, keys, ports[0], ports[1])
			await(t, "all records to be taken", f, taken(j, f))
			stop(syscall.SIGTERM)
			complete(t, collected(t, dir), j.Size(), true)
		})
	}
}
