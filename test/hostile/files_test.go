package hostile

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// What the programs make has the same permissions whatever the umask: nothing is
// for others but the socket that is for all.
func TestV_K1_ModesUnderAnyUmask(t *testing.T) {
	t.Parallel()
	require.Root(t)
	for _, umask := range []string{"000", "077"} {
		ca := local.StartCA(t, local.CAOptions{Wrap: wrap("umask "+umask, "")})
		ca.Apply(t, entries)
		agent := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: wrap("umask "+umask, "")})
		fetch(t, agent)
		must(t, agent.Stop(t)) // so that the cache is sealed
		agent.Start(t)
		agent.AwaitConnected(t)
		seen := 0
		for _, path := range files(t, nil, ca.DataDir, filepath.Join(agent.Dir, "agent")) {
			st, err := os.Lstat(path)
			if errors.Is(err, os.ErrNotExist) {
				continue // SQLite's own, for a moment
			}
			must(t, err)
			seen++
			if st.Mode().Perm()&0o077 != 0 {
				t.Errorf("umask %s: %s has mode %v", umask, path, st.Mode())
			}
		}
		if seen < 8 {
			t.Errorf("only %d files were looked at", seen)
		}
		for path, want := range map[string]os.FileMode{
			ca.DataDir: os.ModeDir | 0o700, filepath.Join(agent.Dir, "agent"): os.ModeDir | 0o700,
			filepath.Join(ca.DataDir, "keys"): os.ModeDir | 0o700,
			ca.AdminSocket:                    os.ModeSocket | 0o600, agent.AdminSocket: os.ModeSocket | 0o600,
			agent.Socket: os.ModeSocket | 0o666,
		} {
			if st, err := os.Lstat(path); err != nil || st.Mode() != want {
				t.Errorf("umask %s: %s has mode %v, want %v (%v)", umask, path, st.Mode(), want, err)
			}
		}
	}
}

// Files that others could have read or replaced are not used.
func TestV_K1_RefusesToStart(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{})
	fetch(t, agent)
	must(t, agent.Stop(t))
	must(t, ca.Stop(t))
	keys := filepath.Join(ca.DataDir, "keys")
	var key string
	for _, path := range files(t, nil, keys) {
		if strings.HasPrefix(filepath.Base(path), "root-") {
			key = path
		}
	}
	if key == "" {
		t.Fatalf("no key in %s", keys)
	}
	mode := func(path string, wrong os.FileMode) func() func() {
		return func() func() {
			st, err := os.Stat(path)
			must(t, err)
			must(t, os.Chmod(path, wrong))
			return func() { must(t, os.Chmod(path, st.Mode().Perm())) }
		}
	}
	owner := func(path string) func() func() {
		return func() func() {
			must(t, os.Lchown(path, int(mallory), int(mallory)))
			return func() { must(t, os.Lchown(path, 0, 0)) }
		}
	}
	link := func(path string) func() func() {
		return func() func() {
			must(t, os.Rename(path, path+".real"))
			must(t, os.Symlink(path+".real", path))
			return func() {
				must(t, os.Remove(path))
				must(t, os.Rename(path+".real", path))
			}
		}
	}
	agentDir := filepath.Join(agent.Dir, "agent")
	for _, tt := range []struct {
		name   string
		p      *local.Process
		change func() func()
	}{
		{"a key that the group can read", ca.Process, mode(key, 0o640)},
		{"a key that all can read", ca.Process, mode(key, 0o604)},
		{"a key of somebody else", ca.Process, owner(key)},
		{"a key that is a link", ca.Process, link(key)},
		{"a folder of keys that all can write", ca.Process, mode(keys, 0o777)},
		{"a folder of keys of somebody else", ca.Process, owner(keys)},
		{"a data folder that all can write", ca.Process, mode(ca.DataDir, 0o777)},
		{"a data folder that is a link", ca.Process, link(ca.DataDir)},
		{"a data folder of somebody else", ca.Process, owner(ca.DataDir)},
		{"an agent's folder that all can read", agent.Process, mode(agentDir, 0o755)},
		{"an agent's folder that is a link", agent.Process, link(agentDir)},
		{"an agent's folder of somebody else", agent.Process, owner(agentDir)},
	} {
		undo := tt.change()
		before := len(tt.p.Log())
		tt.p.Start(t)
		select {
		case <-tt.p.Done():
			if log := tt.p.Log()[before:]; !strings.Contains(log, "error: ") {
				t.Errorf("%s: it says %q", tt.name, log)
			}
		case <-time.After(patience):
			t.Errorf("%s: it starts", tt.name)
			tt.p.Kill()
		}
		undo()
	}
	ca.Start(t)
	ca.AwaitReady(t)
	agent.Start(t)
	agent.AwaitConnected(t)
	fetch(t, agent)
}

// Killed at any moment of their start, first or later, both come back and serve.
func TestV_K3_KilledWhileStarting(t *testing.T) {
	t.Parallel()
	require.Root(t)
	// The first starts of a CA, each a little longer.
	ca := local.StartCA(t, local.CAOptions{})
	for n := range 12 {
		ca.Kill()
		if n%4 == 0 {
			must(t, os.RemoveAll(ca.DataDir))
		}
		ca.Start(t)
		select {
		case <-ca.Done():
			t.Fatalf("the CA does not start: %s", ca.Log())
		case <-time.After(time.Duration(n*n) * time.Millisecond * 2):
		}
	}
	ca.Kill()
	ca.Start(t)
	ca.AwaitReady(t)
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{})
	fetch(t, agent)
	for n := range 12 {
		agent.Kill()
		if n%3 == 0 {
			ca.Kill()
			ca.Start(t)
		}
		agent.Start(t)
		select {
		case <-agent.Done():
			t.Fatalf("the agent does not start: %s", agent.Log())
		case <-time.After(time.Duration(n*n) * time.Millisecond * 2):
		}
	}
	agent.Kill()
	ca.Kill()
	ca.Start(t)
	ca.AwaitReady(t)
	agent.Start(t)
	agent.AwaitConnected(t)
	if id := fetch(t, agent); id != "spiffe://example.org/root" {
		t.Errorf("got %s", id)
	}
	if out := ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(ca.DataDir, "ledger")); !strings.Contains(out, "intact") {
		t.Error(out)
	}
	for _, path := range files(t, nil, ca.DataDir, filepath.Join(agent.Dir, "agent")) {
		if strings.Contains(filepath.Base(path), ".tmp") {
			t.Errorf("%s was left behind", path)
		}
	}
}

// The memory of both programs, which holds keys, is for nobody: no core dump, no
// debugger of the same user.
func TestV_K5_MemoryIsPrivate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, pid := range map[string]int{"the CA": w.ca.PID(), "the agent": w.agent.PID()} {
		var limit unix.Rlimit
		must(t, unix.Prlimit(pid, unix.RLIMIT_CORE, nil, &limit))
		if limit.Cur != 0 || limit.Max != 0 {
			t.Errorf("%s: the limit of core dumps is %d, %d", name, limit.Cur, limit.Max)
		}
		if n := statusOf(t, pid, "CoreDumping"); n != 0 {
			t.Errorf("%s: it dumps its core", name)
		}
	}
	// What is in /proc of a process that may be dumped belongs to its user, who may
	// read its memory; else to root. So it is looked at as another user.
	dir, err := os.MkdirTemp("", "meshid") //nolint:usetesting // the path of a Unix socket is short
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chown(dir, int(alice), int(alice)))
	cmd := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), "ca"), "run", "--trust-domain", "example.org",
		"--data-dir", filepath.Join(dir, "ca"), "--admin-socket", filepath.Join(dir, "a.sock"), "--listen", "127.0.0.1:0", "--metrics-listen", "off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: alice, Gid: alice, NoSetGroups: true}}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // it was killed
	})
	local.Await(t, "wait for the CA of another user", func(context.Context) error {
		_, err := os.Stat(filepath.Join(dir, "a.sock"))
		return err
	})
	st, err := os.Stat(fmt.Sprintf("/proc/%d/mem", cmd.Process.Pid))
	must(t, err)
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || sys.Uid != 0 {
		t.Errorf("the memory of user %d's CA belongs to user %d", alice, sys.Uid)
	}
}

// With few descriptors what is open is served, and what is too much is refused
// with a reason; nothing ends.
func TestFault_F9_FewDescriptors(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{Wrap: wrap("ulimit -n 96", "")})
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: wrap("ulimit -n 256", "")})
	fetch(t, agent)
	node := join(t, ca, "node")
	conn := node.dial(t, ca, tlsTo(node.roots, node))
	if r, err := issue(t, conn, "bob", bob); err != nil || r.GetSvid() == nil {
		t.Fatalf("a good node is refused: %v %v", r, err)
	}

	var open []net.Conn
	for range 400 {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", agent.Socket)
		must(t, err)
		defer c.Close()
		open = append(open, c)
	}
	local.Await(t, "wait for most of the connections to be refused", func(context.Context) error {
		refused := 0
		for _, c := range open {
			if closedWithin(c, time.Millisecond) {
				refused++
			}
		}
		if refused < 300 {
			return fmt.Errorf("of 400 connections %d are", refused)
		}
		return nil
	})
	if !strings.Contains(agent.Log(), "limit reached") {
		t.Errorf("the agent gives no reason: %s", agent.Log())
	}
	if id, _ := fetchAs(t, alice, agent); id != "spiffe://example.org/alice" { // another user has its share
		t.Errorf("alice gets %q", id)
	}

	var silent []net.Conn
	for range 200 {
		c, err := dialTCP(t, "127.0.0.2", ca.Listen)
		must(t, err)
		defer c.Close()
		silent = append(silent, c)
	}
	if r, err := issue(t, conn, "bob", bob); err != nil || r.GetSvid() == nil {
		t.Errorf("a known node is not served: %v %v", r, err)
	}
	for _, c := range append(silent, open...) {
		c.Close()
	}
	join(t, ca, "newcomer")
	if id := fetch(t, agent); id != "spiffe://example.org/root" {
		t.Errorf("got %s", id)
	}
	for _, p := range []*local.Process{ca.Process, agent.Process} {
		select {
		case <-p.Done():
			t.Errorf("a program has ended: %s", p.Log())
		default:
		}
	}
}

// The CA's disk is full: nothing is issued, and it says so; when there is space
// again, it issues as before and the ledger is intact.
func TestFault_F12_DiskFull(t *testing.T) {
	t.Parallel()
	require.Root(t)
	disk := t.TempDir()
	must(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=2m,mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	ca := local.StartCA(t, local.CAOptions{Wrap: wrap("true", "--data-dir "+disk)})
	ca.Apply(t, entries)
	node := join(t, ca, "node")
	conn := node.dial(t, ca, tlsTo(node.roots, node))
	issued := func() (bool, error) {
		r, err := issue(t, conn, "bob", bob)
		return err == nil && r.GetSvid() != nil, err
	}
	if ok, err := issued(); !ok {
		t.Fatalf("nothing is issued: %v", err)
	}

	filler := filepath.Join(disk, "filler")
	f, err := os.OpenFile(filler, os.O_CREATE|os.O_WRONLY, 0o600)
	must(t, err)
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	// What was allocated before may still take some records.
	local.Await(t, "wait until nothing is issued", func(context.Context) error {
		if ok, _ := issued(); ok {
			return errors.New("it is")
		}
		return nil
	})
	bad := func() error {
		s, err := ca.Admin.GetStatus(t.Context(), &adminv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		for _, c := range s.GetConditions() {
			if c.GetSeverity() != health.OK.String() && strings.Contains(c.GetName(), "ledger") {
				return nil
			}
		}
		return fmt.Errorf("conditions are %v", s.GetConditions())
	}
	local.Await(t, "wait for the condition", func(context.Context) error { return bad() })
	if ok, _ := issued(); ok {
		t.Error("a certificate was issued that cannot be recorded")
	}

	must(t, f.Close())
	must(t, os.Remove(filler))
	local.Await(t, "wait until it issues again", func(context.Context) error {
		if ok, err := issued(); !ok {
			return fmt.Errorf("not yet: %w", err)
		}
		return nil
	})
	local.Await(t, "wait for the end of the condition", func(context.Context) error {
		if bad() == nil {
			return errors.New("it is still there")
		}
		return nil
	})
	must(t, ca.Stop(t))
	if out := ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(disk, "ledger")); !strings.Contains(out, "intact") {
		t.Error(out)
	}
}
