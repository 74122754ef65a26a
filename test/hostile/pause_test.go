package hostile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// awaitAs waits until a user's process gets a SPIFFE ID; before, it may be refused.
func awaitAs(t *testing.T, uid uint32, a *local.Agent, want string) {
	t.Helper()
	local.Await(t, "wait for "+want, func(context.Context) error {
		out, err := as(t, uid, "fetch", a.Socket).CombinedOutput()
		if err == nil && !strings.HasPrefix(string(out), want+" ") {
			t.Errorf("%d got %q", uid, out)
		}
		return err
	})
}

// The CA stands still, as a machine does that swaps or is moved: the agent notices,
// who asks meanwhile is told to come again, not that there is nothing for him, and all
// goes on by itself.
func TestFault_F6_CAStandsStill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, alice, w.agent)
	w.ca.Signal(t, syscall.SIGSTOP)
	got := make(chan string, 1)
	asking := as(t, bob, "fetch", w.agent.Socket)
	go func() {
		out, err := asking.CombinedOutput()
		if err != nil {
			out = append(out, err.Error()...)
		}
		got <- string(out)
	}()
	local.Await(t, "wait until the agent has noticed", func(ctx context.Context) error {
		s, err := w.agent.Status(ctx, t)
		if err == nil && s.Connected {
			err = errors.New("it believes that it is connected")
		}
		return err
	})
	w.ca.Signal(t, syscall.SIGCONT)
	if out := <-got; !strings.HasPrefix(out, "spiffe://example.org/bob ") && !strings.Contains(out, "Unavailable") {
		t.Errorf("bob got %q", out)
	}
	w.agent.AwaitConnected(t)
	awaitAs(t, alice, w.agent, "spiffe://example.org/alice")
	awaitAs(t, bob, w.agent, "spiffe://example.org/bob")
	if out := w.ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(w.ca.DataDir, "ledger")); !strings.Contains(out, "intact") {
		t.Error(out)
	}
	w.sound(t)
}

// The agent stands still while its entries change: when it goes on, it has them, and
// who has no identity any more gets none.
func TestFault_F38_AgentStandsStill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fetchAs(t, bob, w.agent)
	w.agent.Signal(t, syscall.SIGSTOP)
	w.ca.MustCommand(t, "entry", "delete", "bob")
	w.ca.Apply(t, "- {name: mallory, spiffe_id: 'spiffe://example.org/mallory', workloads: unix.uid == 23003}\n")
	// The CA gives up on the stream of an agent that answers no ping.
	local.Await(t, "wait until the CA has noticed", func(context.Context) error {
		if !strings.Contains(w.ca.MustCommand(t, "status"), "1, 0 connected") {
			return errors.New("it believes that the agent is connected")
		}
		return nil
	})
	w.agent.Signal(t, syscall.SIGCONT)
	w.agent.AwaitConnected(t)
	awaitAs(t, mallory, w.agent, "spiffe://example.org/mallory")
	if out, err := as(t, bob, "fetch", w.agent.Socket).CombinedOutput(); err == nil || !strings.Contains(string(out), "PermissionDenied") {
		t.Errorf("bob got %q: %v", out, err)
	}
	w.sound(t)
}

// The root's key is deleted: what runs goes on, and what is started says what is
// missing and makes no other root in its place; with the key it is the same CA.
func TestFault_F29_KeyDeleted(t *testing.T) {
	t.Parallel()
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, entries)
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{})
	bundle := ca.MustCommand(t, "bundle", "show")
	keys := filepath.Join(ca.DataDir, "keys")
	aside := filepath.Join(t.TempDir(), "keys")
	must(t, os.CopyFS(aside, os.DirFS(keys)))
	found, err := filepath.Glob(filepath.Join(keys, "*"))
	must(t, err)
	if len(found) == 0 {
		t.Fatalf("no keys in %s", keys)
	}
	for _, path := range found {
		must(t, os.Remove(path))
	}
	if id := fetch(t, agent); id != "spiffe://example.org/root" {
		t.Errorf("while the CA runs: %q", id)
	}
	local.Await(t, "wait for the alarm", func(ctx context.Context) error {
		s, err := ca.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		for _, c := range s.GetConditions() {
			if c.GetName() == "root_key" && strings.Contains(c.GetMessage(), "put the root's key back") {
				return nil
			}
		}
		return fmt.Errorf("conditions are %v", s.GetConditions())
	})
	must(t, ca.Stop(t))
	before := len(ca.Log())
	ca.Start(t)
	select {
	case <-ca.Done():
	case <-time.After(patience):
		t.Fatal("it starts without its key")
	}
	if log := ca.Log()[before:]; !slices.ContainsFunc(found, func(path string) bool { return strings.Contains(log, path) }) {
		t.Errorf("it does not say what is missing (%v): %s", found, log)
	}
	if left, err := filepath.Glob(filepath.Join(keys, "*")); err != nil || len(left) != 0 {
		t.Errorf("it has made %v: %v", left, err)
	}
	for _, path := range found {
		data, err := os.ReadFile(filepath.Join(aside, filepath.Base(path)))
		must(t, err)
		must(t, os.WriteFile(path, data, 0o600))
	}
	ca.Start(t)
	ca.AwaitReady(t)
	if now := ca.MustCommand(t, "bundle", "show"); now != bundle {
		t.Errorf("it is another CA:\n%s", now)
	}
	agent.AwaitConnected(t)
	fetch(t, agent)
}
