// Package upstream runs the real CA below fakes of upstream CAs that cannot run here:
// from the first intermediate through an outage to another root.
package upstream

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/fakes/ejbca"
	"github.com/meshid/meshid/test/fakes/vault"
	"github.com/meshid/meshid/test/local"
)

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// bundle returns the roots that the CA gives out.
func bundle(ctx context.Context, t *testing.T, ca *local.CA) []*x509.Certificate {
	t.Helper()
	out, err := ca.Command(t, "bundle", "show")
	if err != nil || ctx.Err() != nil {
		t.Fatal(err, out)
	}
	var roots []*x509.Certificate
	for block, rest := pem.Decode([]byte(out)); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, c)
	}
	return roots
}

// awaitRoot waits until root is in the bundle.
func awaitRoot(t *testing.T, ca *local.CA, root *x509.Certificate) {
	t.Helper()
	local.Await(t, "a new root in the bundle", func(ctx context.Context) error {
		for _, r := range bundle(ctx, t, ca) {
			if r.Equal(root) {
				return nil
			}
		}
		return fmt.Errorf("it is not there\n%s", ca.Log())
	})
}

// belowVault starts a server with a mount, and a CA below it whose tokens live for two
// seconds: it looks at the roots when half of that is over.
func belowVault(t *testing.T) (*vault.Server, *upstreamtest.Authority, *local.CA) {
	t.Helper()
	local.Binaries(t)
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	v := vault.New(t, a, upstreamtest.Good)
	dir := t.TempDir()
	serverCA := upstreamtest.Write(t, dir+"/server-ca.pem", v.CA)
	upstreamtest.Write(t, dir+"/meshid.hcl", []byte(`path "pki/root/sign-intermediate" { capabilities = ["update"] }`))
	operator := &vault.Operator{Dir: dir, Getenv: func(name string) string {
		return map[string]string{"VAULT_ADDR": v.URL, "VAULT_CACERT": serverCA, "VAULT_TOKEN": v.Root}[name]
	}}
	for _, command := range []string{
		"secrets enable pki", "policy write meshid meshid.hcl", "auth enable kubernetes", "write auth/kubernetes/config kubernetes_host=https://kubernetes.test",
		"write auth/kubernetes/role/meshid bound_service_account_names=ca bound_service_account_namespaces=meshid token_policies=meshid token_period=2s",
	} {
		if err := operator.Run(t.Context(), strings.Fields(command), io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	return v, a, local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  vault:\n    url: %s\n    server_ca: %s\n    kubernetes:\n      role: meshid\n      token_file: %s\n",
		v.URL, serverCA, upstreamtest.Write(t, dir+"/jwt", []byte(v.ServiceAccountToken("meshid", "ca", "vault"))))})
}

func TestVault(t *testing.T) {
	_, a, ca := belowVault(t)
	if roots := bundle(t.Context(), t, ca); len(roots) != 1 || !roots[0].Equal(a.Root) {
		t.Errorf("%d roots in the bundle", len(roots))
	}
	ca.MustCommand(t, "authority", "rotate")
	out := ca.MustCommand(t, "upstream", "check", "--config", filepath.Join(ca.Dir, "ca.yaml"))
	for _, check := range []string{"signs an intermediate", "announces its roots", "refuses a request that does not prove its key", "refuses a request that is no CSR"} {
		if !strings.Contains(out, "ok       "+check) {
			t.Errorf("not ok: %s\n%s", check, out)
		}
	}
	if strings.Contains(out, "FAILED") {
		t.Error(out)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}

// A sealed Vault is told of, and touches nothing that needs no new intermediate.
func TestFault_F24_VaultSealed(t *testing.T) {
	v, _, ca := belowVault(t)
	v.Seal(true)
	if out, err := ca.Command(t, "authority", "rotate"); err == nil {
		t.Errorf("rotated while it is sealed:\n%s", out)
	}
	local.Await(t, "the status to say why", func(context.Context) error {
		if out := ca.MustCommand(t, "status"); !strings.Contains(out, "Vault is sealed") {
			return errors.New(out)
		}
		return nil
	})
	v.Seal(false)
	local.Await(t, "an intermediate after the outage", func(context.Context) error {
		out, err := ca.Command(t, "authority", "rotate")
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}

// A root that changes in Vault is in the bundle before anything is signed below it,
// and the old one stays until nothing needs it.
func TestFault_F26_VaultChangesItsRoot(t *testing.T) {
	v, old, ca := belowVault(t)
	before := len(v.Requests("/sign-intermediate"))
	changed := upstreamtest.NewAuthority(t, upstreamtest.Good)
	v.Become(changed, upstreamtest.Good)
	awaitRoot(t, ca, changed.Root)
	if n := len(v.Requests("/sign-intermediate")); n != before {
		t.Errorf("%d intermediates were asked for before the root was in the bundle", n-before)
	}
	local.Await(t, "an intermediate below the new root", func(context.Context) error {
		if out, err := ca.Command(t, "authority", "rotate"); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
	roots := bundle(t.Context(), t, ca)
	if len(roots) != 2 || !roots[0].Equal(old.Root) && !roots[1].Equal(old.Root) {
		t.Errorf("%d roots in the bundle, want the old one and the new one", len(roots))
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}

// Withdrawal needs no upstream CA, however many are withdrawn at once.
func TestFault_F61_WithdrawalNeedsNoUpstream(t *testing.T) {
	v, _, ca := belowVault(t)
	v.Seal(true)
	before := len(v.Requests("/sign-intermediate"))
	const many = 500
	for i := range many {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		_, err := ca.Admin.AddQuarantine(ctx, &adminv1.AddQuarantineRequest{Quarantine: &adminv1.Quarantine{
			SpiffeId: fmt.Sprintf("spiffe://%s/app/%d", local.TrustDomain, i), Reason: "stolen",
		}})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
	list, err := ca.Admin.ListQuarantines(t.Context(), &adminv1.ListQuarantinesRequest{})
	if err != nil || len(list.GetQuarantines()) != many {
		t.Errorf("%d quarantines (%v)", len(list.GetQuarantines()), err)
	}
	if n := len(v.Requests("/sign-intermediate")); n != before {
		t.Errorf("the upstream CA was asked %d times", n-before)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}

func TestEJBCA(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	e := ejbca.New(t, a, upstreamtest.Good, ejbca.Setup{
		CAName: "MeshRoot", CertificateProfile: "MeshIntermediate", EndEntityProfile: "Mesh", Validity: 30 * 24 * time.Hour,
		SubjectFields: []string{"CN", "SN", "O"}, AltFields: []string{"URI"},
	})
	for _, command := range []string{
		"roles addrole meshid", "roles changerule meshid / ACCEPT",
		"roles addrolemember --role meshid --caname ManagementCA --with CertificateAuthenticationToken:WITH_COMMONNAME --value ca-1",
	} {
		if err := e.Operator(strings.Fields(command)); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	certificate, key := e.ClientCertificate("ca-1", time.Hour)
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  ejbca:\n    url: %s\n    server_ca: %s\n    certificate: %s\n    key: %s\n"+
			"    ca_name: MeshRoot\n    certificate_profile: MeshIntermediate\n    end_entity_profile: Mesh\n    end_entity: ca-1\n",
		e.URL, upstreamtest.Write(t, dir+"/server-ca.pem", e.CA), upstreamtest.Write(t, dir+"/client.pem", certificate), upstreamtest.Write(t, dir+"/client-key.pem", key))})
	if roots := bundle(t.Context(), t, ca); len(roots) != 1 || !roots[0].Equal(a.Root) {
		t.Errorf("%d roots in the bundle", len(roots))
	}
	ca.MustCommand(t, "authority", "rotate")
	config := filepath.Join(ca.Dir, "ca.yaml")
	if out := ca.MustCommand(t, "upstream", "check", "--config", config); strings.Contains(out, "FAILED") || !strings.Contains(out, "ok       signs an intermediate") {
		t.Error(out)
	}
	e.Change(func(s *ejbca.Setup) { s.Approval = true })
	if out, err := ca.Command(t, "upstream", "check", "--config", config); err == nil || !strings.Contains(out, "take approvals out of the profile") || !strings.Contains(out, "docs/upstream/ejbca.md") {
		t.Errorf("with approvals: %v\n%s", err, out)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}
