package cli

import (
	"net"
	"path/filepath"
	"testing"
)

func TestReady(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Ready(t.Context()); err != nil {
		t.Errorf("nobody wants to know: %v", err)
	}
	path := filepath.Join(t.TempDir(), "notify")
	t.Setenv("NOTIFY_SOCKET", path)
	if err := Ready(t.Context()); err == nil {
		t.Error("nobody listens, and there is no error")
	}
	l, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 100)
	if n, _, err := l.ReadFrom(said); err != nil || string(said[:n]) != "READY=1" {
		t.Errorf("systemd hears %q, %v", said[:n], err)
	}
}
