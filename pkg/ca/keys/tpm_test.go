package keys

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshid/meshid/test/require"
)

// startTPM starts a software TPM in dir and returns its socket and what ends it.
func startTPM(t *testing.T, dir string) (socket string, stop func()) {
	t.Helper()
	socket = filepath.Join(dir, "tpm.sock")
	cmd := exec.Command(require.Program(t, "swtpm"), "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	stop = func() {
		if !ended {
			ended = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			_ = os.Remove(socket)
		}
	}
	t.Cleanup(stop)
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-retry.C {
		if conn, err := net.Dial("unix", socket); err == nil {
			_ = conn.Close()
			return socket, stop
		}
		if time.Now().After(deadline) {
			t.Fatal("swtpm does not listen")
		}
	}
}

// A root's key in a TPM, and fault F28: the TPM goes away and comes back.
func TestFault_F28_TPM(t *testing.T) {
	state, dir := t.TempDir(), filepath.Join(t.TempDir(), "keys")
	socket, stop := startTPM(t, state)
	store, err := New("tpmkms:device="+socket, Options{Dir: dir, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	key, ref, err := store.Create(t.Context(), "root-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := signs(key); err != nil {
		t.Fatal(err)
	}
	if _, _, err := store.Create(t.Context(), "root-1"); !errors.Is(err, ErrExists) {
		t.Errorf("created over: %v", err)
	}
	if _, err := store.Open(t.Context(), "tpmkms:name=nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	stop()
	if err := signs(key); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	startTPM(t, state)
	if err := signs(key); err != nil {
		t.Error(err)
	}
	again, err := New("tpmkms:device="+socket, Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if opened, err := again.Open(t.Context(), ref); err != nil || !equal(key, opened) || signs(opened) != nil {
		t.Errorf("after a restart: %v", err)
	}
}
