package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(Main(m)) //nolint:forbidigo // as every TestMain
}

// A workload gets its identity, both programs are killed and come back, and
// both end cleanly.
func TestFromNothingToAnIdentity(t *testing.T) {
	require.Root(t)
	ca := StartCA(t, CAOptions{})
	ca.Apply(t, "- {name: me, spiffe_id: 'spiffe://example.org/me', workloads: unix.uid == 0}\n")
	a := ca.StartAgent(t, "web-1", AgentOptions{})
	fetch := func() {
		t.Helper()
		Await(t, "fetch", func(ctx context.Context) error {
			svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(a.Address()))
			if err == nil && svid.ID.String() != "spiffe://example.org/me" {
				t.Fatalf("got %s", svid.ID)
			}
			return err
		})
	}
	fetch()
	Await(t, "wait until the X.509-SVID is in the sealed cache", func(context.Context) error {
		// What was sealed before it is smaller: it holds a key and a chain.
		st, err := os.Stat(filepath.Join(a.Dir, "agent", "agent.sealed"))
		if err == nil && st.Size() < 3000 {
			err = fmt.Errorf("%d bytes only", st.Size())
		}
		return err
	})
	ca.Kill()
	fetch()
	a.Kill()
	a.Start(t)
	fetch() // from the sealed cache
	ca.Start(t)
	ca.AwaitReady(t)
	a.AwaitConnected(t)
	fetch()
	if out := ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(ca.DataDir, "ledger")); !strings.Contains(out, "intact") {
		t.Error(out)
	}
	if err := a.Stop(t); err != nil {
		t.Error(err)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(a.PID(), 0); err == nil {
		t.Error("the agent is still there")
	}
}

// Where two persons have to agree, one at the CA's machine asks for another root, and
// one with an admin's identity approves it.
func TestV_J7_TwoPersonsRotateTheRoot(t *testing.T) {
	require.Root(t)
	ca := StartCA(t, CAOptions{Config: "authority: {two_persons: true}\n"})
	ca.Apply(t, `
- {name: operator, spiffe_id: 'spiffe://example.org/operator', workloads: unix.uid == 0, admin: true}
`)
	a := ca.StartAgent(t, "web-1", AgentOptions{})
	remote := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(Binaries(t), "ca"), append(args, "--ca", ca.Listen)...)
		cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+a.Address())
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	_, err := ca.Command(t, "authority", "rotate", "root", "--wait")
	if err == nil || !strings.Contains(err.Error(), "exit status 3: not done yet") {
		t.Fatalf("one person: %v", err)
	}
	id := regexp.MustCompile("ca authority approve ([0-9a-f]{16})").FindStringSubmatch(err.Error())
	if id == nil {
		t.Fatal(err)
	}
	if _, err := ca.Command(t, "authority", "approve", id[1]); err == nil || !strings.Contains(err.Error(), "somebody else") {
		t.Errorf("the same person: %v", err)
	}
	if out, err := remote("authority", "pending"); err != nil || !strings.Contains(out, id[1]+"  uid:0 ") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := remote("authority", "approve", id[1]); err != nil || !strings.Contains(out, "approved and begun: rotate: ") {
		t.Fatalf("another person: %v\n%s", err, out)
	}
	Await(t, "wait for the next root", func(context.Context) error {
		out, err := ca.Command(t, "authority", "show")
		if err == nil && (!strings.Contains(out, " active ") || !strings.Contains(out, " retiring ")) {
			err = errors.New(out)
		}
		return err
	})
	if out := ca.MustCommand(t, "ledger", "find", "--event", "approval", "-o", "jsonl"); !strings.Contains(out, `"reason":"approved"`) || !strings.Contains(out, "asked for by uid:0") ||
		!strings.Contains(out, `"actor":"spiffe://example.org/operator"`) {
		t.Error(out)
	}
}

// Whoever holds the identity of an entry that says admin operates the CA over
// the network; another workload does not.
func TestAdminOverMutualTLS(t *testing.T) {
	require.Root(t)
	ca := StartCA(t, CAOptions{})
	ca.Apply(t, `
- {name: operator, spiffe_id: 'spiffe://example.org/operator', workloads: unix.uid == 0, admin: true}
- {name: other, spiffe_id: 'spiffe://example.org/other', workloads: unix.uid == 4711}
`)
	a := ca.StartAgent(t, "web-1", AgentOptions{})
	remote := func(uid uint32) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(Binaries(t), "ca"), "node", "list", "--ca", ca.Listen)
		cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+a.Address(), "MESHID_ADMIN_SOCKET=/nowhere")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := remote(0); err != nil || !strings.Contains(out, a.NodeID) {
		t.Errorf("the operator: %v\n%s", err, out)
	}
	if out, err := remote(4711); err == nil || strings.Contains(out, a.NodeID) || !strings.Contains(out, "admin: true") {
		t.Errorf("another workload: %v\n%s", err, out)
	}
}
