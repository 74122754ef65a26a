// Package nested runs a real CA below another one: whose root is in both bundles, who
// goes on without whom, and how the root changes under both.
package nested

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshid/meshid/test/local"
)

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

const id = "spiffe://" + local.TrustDomain + "/ca/below"

// entry names the CA below to the one above.
func entry(downstream bool) string {
	return fmt.Sprintf("- name: below\n  spiffe_id: %s\n  workloads: unix.uid == %d\n  ttl: 1h\n  downstream: %t\n", id, os.Getuid(), downstream)
}

// web is an entry of the CA below.
func web() string {
	return fmt.Sprintf("- name: web\n  spiffe_id: spiffe://%s/web\n  workloads: unix.uid == %d\n", local.TrustDomain, os.Getuid())
}

// meshes are a CA, an agent of it, and a CA below it which has an agent of its own.
type meshes struct {
	above, below  *local.CA
	abroad, agent *local.Agent
}

func start(t *testing.T) *meshes {
	t.Helper()
	local.Binaries(t)
	m := &meshes{above: local.StartCA(t, local.CAOptions{})}
	m.above.Apply(t, entry(true))
	m.abroad = m.above.StartAgent(t, "below", local.AgentOptions{})
	m.below = local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  meshid:\n    address: '%s'\n    workload_api: %s\n    spiffe_id: %s\n", m.above.Listen, m.abroad.Address(), id)})
	m.below.Apply(t, web())
	m.agent = m.below.StartAgent(t, "web", local.AgentOptions{})
	return m
}

// roots are those that a CA gives out.
func roots(t *testing.T, ca *local.CA) []*x509.Certificate {
	t.Helper()
	var all []*x509.Certificate
	for block, rest := pem.Decode([]byte(ca.MustCommand(t, "bundle", "show"))); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// issue has an agent of the CA below give a new process an identity, and verifies it
// by a root.
func (m *meshes) issue(t *testing.T, root *x509.Certificate) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(m.agent.Address()))
	if err != nil {
		t.Fatal(err)
	}
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(root)
	for _, c := range svid.Certificates[1:] {
		between.AddCert(c)
	}
	if _, err := svid.Certificates[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("%s: %v", svid.ID, err)
	}
}

func await(t *testing.T, what string, ca *local.CA, command, want string) {
	t.Helper()
	local.Await(t, what, func(context.Context) error {
		out, err := ca.Command(t, strings.Fields(command)...)
		if err == nil && !strings.Contains(out, want) {
			err = errors.New("it is not: " + out)
		}
		return err
	})
}

func TestNested(t *testing.T) {
	m := start(t)
	root := roots(t, m.above)[0]
	if got := roots(t, m.below); len(got) != 1 || !got[0].Equal(root) {
		t.Errorf("%d roots below, not that of the CA above", len(got))
	}
	m.issue(t, root)
	out := m.below.MustCommand(t, "upstream", "check", "--config", filepath.Join(m.below.Dir, "ca.yaml"))
	if strings.Contains(out, "FAILED") || !strings.Contains(out, "ok       announces its roots") {
		t.Error(out)
	}
	// Who has asked for which intermediate is in the ledger above.
	out = m.above.MustCommand(t, "ledger", "find", "--event", "authority", "-o", "json")
	if !strings.Contains(out, id) || !strings.Contains(out, "path length 0") {
		t.Error(out)
	}

	// Nobody needs the CA above for leaves.
	if err := m.above.Stop(t); err != nil {
		t.Error(err)
	}
	m.below.MustCommand(t, "svid", "renew")
	m.issue(t, root)
	if out, err := m.below.Command(t, "authority", "rotate"); err == nil {
		t.Errorf("an intermediate without the CA above:\n%s", out)
	}
	m.above.Start(t)
	m.above.AwaitReady(t)
	local.Await(t, "an intermediate", func(context.Context) error {
		_, err := m.below.Command(t, "authority", "rotate")
		return err
	})

	// The CA below starts again.
	if err := m.below.Stop(t); err != nil {
		t.Error(err)
	}
	m.below.Start(t)
	m.below.AwaitReady(t)
	m.agent.AwaitConnected(t)
	m.below.MustCommand(t, "svid", "renew")
	m.issue(t, root)
	for _, p := range []*local.Process{m.agent.Process, m.below.Process, m.abroad.Process, m.above.Process} {
		if err := p.Stop(t); err != nil {
			t.Error(err)
		}
	}
}

// The root changes above once it is in force below, and not before.
func TestRootChanges(t *testing.T) {
	m := start(t)
	old := roots(t, m.above)[0]
	await(t, "the CA below to be in touch", m.above, "authority show", "")
	m.below.Signal(t, syscall.SIGSTOP)
	t.Cleanup(func() { _ = syscall.Kill(m.below.PID(), syscall.SIGCONT) })
	m.above.MustCommand(t, "authority", "rotate", "root")
	await(t, "the CA above to wait for the one below", m.above, "authority show", "/ca/below")
	if len(roots(t, m.above)) != 2 {
		t.Error("the new root is not in the bundle above")
	}
	out := m.above.MustCommand(t, "authority", "show")
	if !strings.Contains(out, "prepared") {
		t.Errorf("the new root is no longer prepared:\n%s", out)
	}
	if !strings.Contains(out, id+" (a CA below)") {
		t.Errorf("the CA below is not named as one:\n%s", out)
	}
	// It goes on, and has a node that does not: who waits above is told that.
	m.agent.Signal(t, syscall.SIGSTOP)
	t.Cleanup(func() { _ = syscall.Kill(m.agent.PID(), syscall.SIGCONT) })
	m.below.Signal(t, syscall.SIGCONT)
	await(t, "what the CA below waits for", m.above, "authority show", id+" (a CA below): it waits for 1 nodes: spiffe://")
	m.agent.Signal(t, syscall.SIGCONT)
	await(t, "the new root to sign", m.above, "authority show", "retiring")
	next := roots(t, m.above)
	if below := roots(t, m.below); len(below) != 2 {
		t.Errorf("%d roots below", len(below))
	}
	m.issue(t, old) // as long as nobody orders otherwise
	await(t, "who keeps the old root", m.above, "authority show", "holds    "+id+" (a CA below): its intermediate chains to root ")
	await(t, "its intermediate", m.above, "authority list", "below the old root ")
	await(t, "whose it is", m.above, "authority list", "of the CA below "+id)

	// The next intermediate is below the new root, and so is what it signs.
	m.below.MustCommand(t, "authority", "rotate")
	local.Await(t, "an X.509-SVID below the new root", func(ctx context.Context) error {
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(m.agent.Address()))
		if err != nil {
			return err
		}
		for _, r := range next {
			if !r.Equal(old) && svid.Certificates[len(svid.Certificates)-1].CheckSignatureFrom(r) == nil {
				return nil
			}
		}
		return errors.New("it is below the old one")
	})
	// What it holds is taken back with its entry, and that is no end of it.
	out = m.above.MustCommand(t, "entry", "delete", "below", "--wait")
	if want := "lives on: " + id + " (a CA below): its intermediate "; !strings.Contains(out, want) {
		t.Errorf("it does not say %q:\n%s", want, out)
	}
	// The old root stays above for as long as what is below may need it.
	if len(roots(t, m.above)) != 2 {
		t.Error("the old root has left while the CA below may still need it")
	}
}

// Without the mark nothing is signed, and without the entry nothing is told any more.
func TestUnmarked(t *testing.T) {
	m := start(t)
	m.above.Apply(t, entry(false))
	if out, err := m.below.Command(t, "authority", "rotate"); err == nil {
		t.Errorf("signed without the mark:\n%s", out)
	}
	local.Await(t, "the reason in the log", func(context.Context) error {
		if log := m.below.Log(); !strings.Contains(log, "no entry marked downstream has this SPIFFE ID") {
			return errors.New(log)
		}
		return nil
	})
	await(t, "the refusal in the ledger", m.above, "ledger find --event call_refused -o json", "Mint")
	m.issue(t, roots(t, m.above)[0]) // what was signed before is not taken back
}
