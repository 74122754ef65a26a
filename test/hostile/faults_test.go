package hostile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// fullPipe returns a pipe that nobody reads and that has no room.
func fullPipe(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	must(t, unix.Mkfifo(path, 0o600))
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	conn, err := f.SyscallConn()
	must(t, err)
	must(t, conn.Write(func(fd uintptr) bool {
		for err == nil {
			_, err = unix.Write(int(fd), []byte("x"))
		}
		return true
	}))
	if !errors.Is(err, unix.EAGAIN) {
		t.Fatal(err)
	}
	return path
}

// Whoever reads the log has stopped: both programs start, issue and end as ever.
func TestFault_F64_NobodyReadsTheLog(t *testing.T) {
	t.Parallel()
	require.Root(t)
	log := fullPipe(t)
	ca := local.StartCA(t, local.CAOptions{Wrap: wrap("exec 2<>"+log, "--log-level debug")})
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: wrap("exec 2<>"+log, "--log-level debug")})
	if id := fetch(t, agent); id != "spiffe://example.org/root" {
		t.Errorf("got %s", id)
	}
	node := join(t, ca, "node")
	conn := node.dial(t, ca, tlsTo(node.roots, node))
	for range 200 {
		if r, err := issue(t, conn, "bob", bob); err != nil || r.GetSvid() == nil {
			t.Fatalf("nothing is issued: %v %v", r, err)
		}
		if r, err := issue(t, conn, "nobody", bob); err != nil || r.GetRefusal() == nil { // what is logged
			t.Fatalf("%v %v", r, err)
		}
	}
	must(t, agent.Stop(t))
	must(t, ca.Stop(t))
}

// The root's key is taken away while the CA runs: it goes on, since it has the key.
// It does not start again without it, and says why, and nothing is lost when the key
// is back.
func TestFault_F29_KeyFileDeleted(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	node := join(t, ca, "node")
	conn := node.dial(t, ca, tlsTo(node.roots, node))
	keys := filepath.Join(ca.DataDir, "keys")
	away := filepath.Join(ca.Dir, "keys.away")
	bundle := ca.MustCommand(t, "bundle", "show")
	must(t, os.Rename(keys, away))
	must(t, os.Mkdir(keys, 0o700))
	if r, err := issue(t, conn, "bob", bob); err != nil || r.GetSvid() == nil {
		t.Errorf("nothing is issued: %v %v", r, err)
	}
	_, err := ca.Admin.RotateIntermediate(t.Context(), &adminv1.RotateIntermediateRequest{Within: durationpb.New(time.Second)})
	must(t, err)
	must(t, ca.Stop(t))
	before := len(ca.Log())
	ca.Start(t)
	<-ca.Done()
	if log := ca.Log()[before:]; !strings.Contains(log, "error: ") || !strings.Contains(log, "key") {
		t.Errorf("it says %q", log)
	}
	must(t, os.RemoveAll(keys))
	must(t, os.Rename(away, keys))
	ca.Start(t)
	ca.AwaitReady(t)
	if after := ca.MustCommand(t, "bundle", "show"); after != bundle {
		t.Error("the CA has another root")
	}
}

// The agent's folder is on a disk that is full: it serves from memory, says so, and
// writes as before when there is room.
func TestFault_F42_AgentsDiskFull(t *testing.T) {
	t.Parallel()
	require.Root(t)
	disk := t.TempDir()
	must(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k,mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	seal := filepath.Join(t.TempDir(), "seal")
	must(t, os.WriteFile(seal, []byte("sixteen secret bytes"), 0o600))
	must(t, os.WriteFile(filepath.Join(disk, "agent.lock"), nil, 0o600))
	filler := filepath.Join(disk, "filler")
	f, err := os.OpenFile(filler, os.O_CREATE|os.O_WRONLY, 0o600)
	must(t, err)
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, f.Close())

	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{
		Wrap: []string{"/bin/sh", "-c", `sed -i "s|^data_dir:.*|data_dir: ` + disk + `|" "$4"; exec "$@"`, "sh"}, Config: "sealing_key_file: " + seal + "\n",
	})
	condition := func(want health.Severity) {
		t.Helper()
		local.Await(t, "wait for the condition to be "+want.String(), func(ctx context.Context) error {
			s, err := agent.Status(ctx, t)
			if err != nil {
				return err
			}
			for _, c := range s.Conditions {
				if c.Name == "sealed_cache" && c.Severity == want {
					return nil
				}
			}
			return fmt.Errorf("conditions are %v", s.Conditions)
		})
	}
	if id := fetch(t, agent); id != "spiffe://example.org/root" {
		t.Errorf("got %s", id)
	}
	condition(health.Warning)
	must(t, os.Remove(filler))
	ca.Apply(t, strings.ReplaceAll(entries, "spiffe://example.org/root", "spiffe://example.org/other")) // something to write
	condition(health.OK)
}
