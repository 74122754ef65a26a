package webhook

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

var formats = export.Formats{"json": ledger.FormatJSON}

func secretFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

// A batch that is too large goes in parts; what was taken before an error does not
// go again; and headers come from a file.
func TestParts(t *testing.T) {
	var first []uint64
	refuse := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body struct {
			First uint64 `json:"first"`
		}
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil || r.Header.Get("Authorization") != "Bearer x" || r.ContentLength > 1<<14 {
			t.Errorf("%v, %d bytes, authorization %q", err, r.ContentLength, r.Header.Get("Authorization"))
		}
		if len(first) == 2 && refuse {
			refuse = false
			http.Error(w, "bad\x1b[2J", http.StatusBadGateway)
			return
		}
		first = append(first, body.First)
	}))
	defer server.Close()
	target, err := New(Config{URL: server.URL, SecretFile: secretFile(t, secret), HeadersFile: secretFile(t, "Authorization: Bearer x\n"), MaxBytes: 1 << 14}, formats)
	if err != nil {
		t.Fatal(err)
	}
	b := export.Batch{Journal: "00", First: 3, Next: 13}
	for i := uint64(4); i < 12; i++ {
		b.Entries = append(b.Entries, ledger.Entry{Index: i, Record: &ledgerv1.Record{Detail: strings.Repeat("x", 7000)}})
	}
	if err := target.Send(context.Background(), b); err == nil || !strings.Contains(err.Error(), `502 Bad Gateway: "bad\x1b[2J"`) {
		t.Errorf("error %v", err)
	}
	if err := target.Send(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]uint64{3, 6, 8, 10}, first); d != "" {
		t.Error(d)
	}
}

func TestSettings(t *testing.T) {
	good := secretFile(t, secret)
	open := secretFile(t, secret)
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	const url = "https://hooks.example.org/"
	for _, c := range []struct {
		c    Config
		want string
	}{
		{Config{SecretFile: good}, "url: "},
		{Config{URL: url}, "secret_file: missing; write the path"},
		{Config{URL: url, SecretFile: open}, "chmod it"},
		{Config{URL: url, SecretFile: secretFile(t, "hunter2")}, "does not hold whsec_"},
		{Config{URL: url, SecretFile: secretFile(t, "whsec_aGVsbG8=")}, "at least 24 bytes"},
		{Config{URL: "http://192.0.2.1/", SecretFile: good}, "write https://"},
		{Config{URL: url, SecretFile: good, MaxBytes: 10}, "max_bytes: "},
		{Config{URL: url, SecretFile: good, HeadersFile: secretFile(t, "x\n")}, "write name: value"},
	} {
		_, err := New(c.c, formats)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%+v: %v", c.c, err)
		}
	}
}
