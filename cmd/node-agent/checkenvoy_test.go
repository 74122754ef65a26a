package main

import (
	"bytes"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshid/meshid/internal/cli"
)

// The admin endpoint is asked over TCP and over a Unix socket, in each way to write
// its address.
func TestCheckEnvoyAdmin(t *testing.T) {
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/config_dump" {
			_, _ = w.Write([]byte(`{"configs": []}`))
			return
		}
		http.NotFound(w, r)
	})
	overTCP := httptest.NewServer(answer)
	t.Cleanup(overTCP.Close)
	socket := filepath.Join(t.TempDir(), "s")
	overSocket := httptest.NewUnstartedServer(answer)
	_ = overSocket.Listener.Close()
	var err error
	if overSocket.Listener, err = net.Listen("unix", socket); err != nil {
		t.Fatal(err)
	}
	overSocket.Start()
	t.Cleanup(overSocket.Close)
	for _, address := range []string{overTCP.URL, overTCP.URL + "/", strings.TrimPrefix(overTCP.URL, "http://"), socket, "unix://" + socket} {
		var out bytes.Buffer
		err := run(t.Context(), []string{"check-envoy", "--admin", address}, nil, &out, &out)
		var exit *cli.ExitError
		if !errors.As(err, &exit) || exit.Code != 1 || !strings.Contains(out.String(), "tls_context: no TLS context is in it") {
			t.Errorf("%s: %v\n%s", address, err, &out)
		}
	}
	for _, path := range []string{overTCP.URL + "/other", "http://127.0.0.1:0"} {
		err := run(t.Context(), []string{"check-envoy", "--admin", path}, nil, &bytes.Buffer{}, &bytes.Buffer{})
		var exit *cli.ExitError
		if !errors.As(err, &exit) || exit.Code != 2 {
			t.Errorf("%s: %v", path, err)
		}
	}
}
