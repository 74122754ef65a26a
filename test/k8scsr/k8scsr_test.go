// Package k8scsr runs the upstream CA of the kind k8scsr, and the CA below it, against a
// real API server. The signer and the approver are played: they check what real ones
// check, and the API server what they write.
package k8scsr

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	kubeclient "github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/k8scsr"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(kube.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

const path = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

// signer plays a signer of one name, and who approves for it.
type signer struct {
	t         *testing.T
	server    *kube.APIServer
	namespace string // of the CA's service account
	name      string

	mu        sync.Mutex // guards what follows
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour
	approves  bool
	denied    []string // requests
	signed    []string // UIDs
}

// signingRequest is as much of one as is looked at.
type signingRequest struct {
	kubeclient.Object
	Spec struct {
		Request           []byte   `json:"request"`
		SignerName        string   `json:"signerName"`
		ExpirationSeconds int      `json:"expirationSeconds"`
		Usages            []string `json:"usages"`
		Username          string   `json:"username"`
	} `json:"spec"`
	Status struct {
		Conditions  []map[string]string `json:"conditions"`
		Certificate []byte              `json:"certificate"`
	} `json:"status"`
}

// start starts a signer of a name of its own, and returns it with the configuration of
// a client that may do what the document says, and nothing else.
func start(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*signer, k8scsr.Config) {
	t.Helper()
	s := kube.Shared(t)
	i := &signer{t: t, server: s, namespace: s.Namespace(t), authority: a, behaviour: b, approves: true}
	i.name = "signers.example.org/" + i.namespace
	client, err := kubeclient.Open(kubeclient.Config{Name: "signer", Kubeconfig: s.Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	at := kubeclient.Path{Resource: kubeclient.Resource{Group: "certificates.k8s.io", Version: "v1", Plural: "certificatesigningrequests"}}
	feed := kubeclient.Follow(client, at, kubeclient.FollowOptions{Fields: "spec.signerName=" + i.name}, func(r *signingRequest) *signingRequest { return r }, i)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		feed.Run(ctx)
	}()
	t.Cleanup(func() { stop(); <-done })
	s.Apply(t, i.adapt("rbac.yaml")+"---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {namespace: "+i.namespace+", name: meshid-ca}\n")
	roots := []*x509.Certificate{a.Root}
	if b == upstreamtest.UnrelatedRoot {
		roots[0] = upstreamtest.NewAuthority(t, upstreamtest.Good).Root
	}
	c := k8scsr.Config{
		Signer:     i.name,
		Kubeconfig: s.TokenKubeconfig(t, s.Token(t, kube.Pod{Namespace: i.namespace, ServiceAccount: "meshid-ca"}, time.Hour)),
		Roots:      k8scsr.Roots{File: upstreamtest.File(t, "roots.pem", upstreamtest.PEM(roots...))},
	}
	return i, c
}

// adapt returns a block of the document for this test's namespace and signer. Names of
// what has no namespace are those of the namespace.
func (i *signer) adapt(name string) string {
	i.t.Helper()
	return strings.NewReplacer("namespace: meshid", "namespace: "+i.namespace, "meshid-upstream", i.namespace+"-upstream",
		"clusterissuers.cert-manager.io/mesh", i.name, "mesh-roots", i.namespace+"-roots").Replace(require.Example(i.t, "upstream/k8scsr.md", "yaml file="+name))
}

// checkNothingLeft is called when nobody waits for a request.
func (i *signer) checkNothingLeft() {
	i.t.Helper()
	var list struct {
		Items []signingRequest `json:"items"`
	}
	// The test's own context ends before what it cleans up.
	if err := i.server.Do(context.WithoutCancel(i.t.Context()), http.MethodGet, path+"?fieldSelector=spec.signerName%3D"+i.name, nil, &list); err != nil {
		i.t.Error(err)
	}
	for _, r := range list.Items {
		i.t.Errorf("request %s is left", r.Metadata.Name)
	}
}

// Replace implements kube.Reader.
func (i *signer) Replace(all []*signingRequest) {
	for _, r := range all {
		i.Set(r)
	}
}

// Delete implements kube.Reader.
func (*signer) Delete(*signingRequest) {}

// Set implements kube.Reader: it approves a new request, and signs one that is approved.
func (i *signer) Set(r *signingRequest) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range r.Status.Conditions {
		if c["type"] == "Approved" {
			if !slices.Contains(i.signed, r.Metadata.UID) {
				i.signed = append(i.signed, r.Metadata.UID)
				i.sign(r)
			}
			return
		}
	}
	switch {
	case i.behaviour == upstreamtest.Denied:
		if !slices.Contains(i.denied, r.Metadata.Name) {
			i.denied = append(i.denied, r.Metadata.Name)
			i.status(r, "approval", map[string]any{"conditions": []any{condition("Denied", "policy.example.org", "no policy allows this request")}})
		}
	case i.approves && len(r.Status.Conditions) == 0:
		i.status(r, "approval", map[string]any{"conditions": []any{condition("Approved", "policy.example.org", "the name is that of the CA")}})
	}
}

// sign signs, as it behaves. The caller holds the lock.
func (i *signer) sign(r *signingRequest) {
	csr := i.check(r)
	if i.behaviour == upstreamtest.Slow || csr == nil {
		return
	}
	if i.behaviour == failing {
		i.status(r, "status", map[string]any{"conditions": append(conditions(r), condition("Failed", "SigningError", "its CA is away"))})
		return
	}
	answer := i.authority.Answer
	if !slices.Contains(r.Spec.Usages, "cert sign") {
		answer = i.authority.Leaf
	}
	chain, _ := answer(csr, time.Duration(r.Spec.ExpirationSeconds)*time.Second)
	chain = chain[:min(len(chain), 100)] // an object has at most 1.5 MiB
	i.status(r, "status", map[string]any{"certificate": upstreamtest.PEM(chain...)})
}

// failing: the signer sets the condition Failed.
const failing upstreamtest.Behaviour = "failing"

func conditions(r *signingRequest) []any {
	all := []any{}
	for _, c := range r.Status.Conditions {
		all = append(all, c)
	}
	return all
}

func condition(kind, reason, message string) map[string]string {
	return map[string]string{"type": kind, "status": "True", "reason": reason, "message": message}
}

func (i *signer) status(r *signingRequest, subresource string, status any) {
	i.server.Answer(i.t, path+"/"+r.Metadata.Name+"/"+subresource, map[string]any{"status": status})
}

// check looks at each field as signers do, and returns the CSR, nil if it is none.
func (i *signer) check(r *signingRequest) []byte {
	block, rest := pem.Decode(r.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		i.t.Errorf("request is no PEM of one CSR: %q", r.Spec.Request)
		return nil
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || csr.CheckSignature() != nil {
		i.t.Errorf("the CSR: %v", err)
		return nil
	}
	life := 24 * time.Hour
	if slices.Equal(r.Spec.Usages, []string{"digital signature", "server auth", "client auth"}) {
		life = time.Hour
	} else if !slices.Equal(r.Spec.Usages, []string{"cert sign", "crl sign"}) {
		i.t.Errorf("usages %q", r.Spec.Usages)
	}
	if got := time.Duration(r.Spec.ExpirationSeconds) * time.Second; got != life && i.behaviour != whole && i.behaviour != failing {
		i.t.Errorf("expirationSeconds is %s", got)
	}
	if r.Metadata.Labels["app.kubernetes.io/managed-by"] != "meshid" || r.Spec.SignerName != i.name {
		i.t.Errorf("labels %v, signer %q", r.Metadata.Labels, r.Spec.SignerName)
	}
	if want := "system:serviceaccount:" + i.namespace + ":meshid-ca"; r.Spec.Username != want {
		i.t.Errorf("asked by %q", r.Spec.Username)
	}
	return block.Bytes
}

// whole: good, for a whole CA, whose lives are its own.
const whole upstreamtest.Behaviour = "good, for a whole CA"

func open(t *testing.T, c k8scsr.Config) *k8scsr.CA {
	t.Helper()
	ca, err := k8scsr.New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func kind() upstreamtest.Kind {
	return upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			i, c := start(t, b, a)
			if b == upstreamtest.Gone {
				c.Kubeconfig = kube.Elsewhere(t, c.Kubeconfig)
				return open(t, c)
			}
			t.Cleanup(i.checkNothingLeft)
			return open(t, c)
		},
		Skip: map[upstreamtest.Behaviour]string{
			upstreamtest.RateLimited: "a server that limits is played in the tests of the package",
			upstreamtest.Garbage:     "the API server lets a signer write nothing but certificates",
			upstreamtest.NoRoot:      "the roots are configured, and a file without any is refused",
		},
	}
}

func TestConformance(t *testing.T) { upstreamtest.Run(t, kind()) }

func TestLeaves(t *testing.T) { upstreamtest.RunLeaves(t, kind()) }

// The roots are those of a ConfigMap or of a ClusterTrustBundle, with the permissions
// that the document names, and as they are now.
func TestRoots(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	i, c := start(t, upstreamtest.Good, a)
	i.server.Apply(t, i.adapt("roots.yaml"))
	indent := func(certificates ...*x509.Certificate) string {
		return strings.ReplaceAll(strings.TrimSpace(string(upstreamtest.PEM(certificates...))), "\n", "\n    ")
	}
	name := i.namespace + "-roots"
	for where, r := range map[string]struct {
		roots  k8scsr.Roots
		object string
	}{
		"ConfigMap":          {k8scsr.Roots{ConfigMap: k8scsr.ConfigMap{Namespace: i.namespace, Name: name}}, "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: " + i.namespace + ", name: " + name + "}\ndata:\n  ca.crt: |\n    "},
		"ClusterTrustBundle": {k8scsr.Roots{TrustBundle: name}, "apiVersion: certificates.k8s.io/v1\nkind: ClusterTrustBundle\nmetadata: {name: " + name + "}\nspec:\n  trustBundle: |\n    "},
	} {
		t.Run(where, func(t *testing.T) {
			c := c
			c.Roots = r.roots
			ca := open(t, c)
			if _, err := upstreamtest.Mint(t.Context(), t, ca); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "read the roots") {
				t.Errorf("without any: %v", err)
			}
			i.server.Apply(t, r.object+indent(upstreamtest.NewAuthority(t, upstreamtest.Good).Root)+"\n")
			if _, err := upstreamtest.Mint(t.Context(), t, ca); err == nil || !strings.Contains(err.Error(), "does not lead to one of its roots") {
				t.Errorf("with another: %v", err)
			}
			i.server.Apply(t, r.object+indent(a.Root)+"\n")
			if v, err := upstreamtest.Mint(t.Context(), t, ca); err != nil || !v.Anchors[0].Equal(a.Root) {
				t.Errorf("%+v, %v", v, err)
			}
		})
	}
}

// Requests are approved by the CA itself, if that is configured and allowed, and not
// otherwise.
func TestApprove(t *testing.T) {
	i, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	i.approves = false
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := upstreamtest.Mint(ctx, t, open(t, c))
	if !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "approved by nobody") {
		t.Errorf("%v", err)
	}
	c.Approve = true
	if _, err := upstreamtest.Mint(t.Context(), t, open(t, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "approve a request") {
		t.Errorf("without the permission: %v", err)
	}
	i.server.Apply(t, i.adapt("approve.yaml"))
	local.Await(t, "the role to be in force", func(ctx context.Context) error {
		_, err := upstreamtest.Mint(ctx, t, open(t, c))
		return err
	})
	i.checkNothingLeft()
}

// A signer that has failed may succeed later; one that is denied will not.
func TestFailed(t *testing.T) {
	_, c := start(t, failing, upstreamtest.NewAuthority(t, upstreamtest.Good))
	_, err := upstreamtest.Mint(t.Context(), t, open(t, c))
	if !errors.Is(err, upstream.ErrUnavailable) || !strings.Contains(err.Error(), "its CA is away") {
		t.Errorf("%v", err)
	}
}

// Somebody deletes the request that is waited for.
func TestDeleted(t *testing.T) {
	i, c := start(t, upstreamtest.Slow, upstreamtest.NewAuthority(t, upstreamtest.Good))
	ended := make(chan error, 1)
	go func() {
		_, err := upstreamtest.Mint(t.Context(), t, open(t, c))
		ended <- err
	}()
	local.Await(t, "the request to be there", func(ctx context.Context) error {
		var list struct {
			Items []signingRequest `json:"items"`
		}
		if err := i.server.Do(ctx, http.MethodGet, path+"?fieldSelector=spec.signerName%3D"+i.name, nil, &list); err != nil {
			return err
		}
		// Its client has to have seen it: the approver has.
		if len(list.Items) == 0 || len(list.Items[0].Status.Conditions) == 0 {
			return errors.New("it is not")
		}
		return i.server.Do(ctx, http.MethodDelete, path+"/"+list.Items[0].Metadata.Name, nil, nil)
	})
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "somebody has deleted") {
			t.Errorf("%v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it is waited for still")
	}
}

// Each permission that the document names is needed, and the error says that one is
// missing.
func TestPermissions(t *testing.T) {
	for _, verb := range []string{"create", "watch"} {
		// A signer that is quick would be seen in a list.
		i, c := start(t, upstreamtest.Slow, upstreamtest.NewAuthority(t, upstreamtest.Good))
		verbs := slices.DeleteFunc([]string{"create", "list", "watch", "delete"}, func(v string) bool { return v == verb })
		i.server.Apply(t, fmt.Sprintf(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: %s-upstream}
rules: [{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests], verbs: [%s]}]
`, i.namespace, strings.Join(verbs, ", ")))
		local.Await(t, "the role to change", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			_, err := upstreamtest.Mint(ctx, t, open(t, c))
			if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "docs/upstream/k8scsr.md") {
				return fmt.Errorf("without %s: %w", verb, err)
			}
			return nil
		})
	}
}

// The real CA below a signer, from the first intermediate to one that is denied.
func TestCA(t *testing.T) {
	local.Binaries(t)
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	i, c := start(t, whole, a)
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  k8scsr:\n    kubeconfig: %s\n    signer: %s\n    roots: {file: %s}\n", c.Kubeconfig, c.Signer, c.Roots.File)})
	if got := ca.MustCommand(t, "bundle", "show"); !strings.Contains(got, strings.TrimSpace(string(upstreamtest.PEM(a.Root)))) {
		t.Errorf("the root is not in the bundle:\n%s", got)
	}
	out := ca.MustCommand(t, "upstream", "check", "--config", filepath.Join(ca.Dir, "ca.yaml"))
	if !strings.Contains(out, "ok       signs an intermediate") || strings.Contains(out, "FAILED") {
		t.Error(out)
	}
	i.mu.Lock()
	i.behaviour = upstreamtest.Denied
	i.mu.Unlock()
	if out, err := ca.Command(t, "authority", "rotate"); err == nil || !strings.Contains(ca.Log(), "no policy allows this request") {
		t.Errorf("%v\n%s", err, out)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}

// A mesh in which the signer signs each X.509-SVID: those of the CA, of an agent and of a
// workload, the first and the next; and a signer that is away takes none of them.
func TestMesh(t *testing.T) {
	require.Root(t)
	local.Binaries(t)
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	i, c := start(t, whole, a)
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  leaves: true\n  k8scsr:\n    kubeconfig: %s\n    signer: %s\n    roots: {file: %s}\n", c.Kubeconfig, c.Signer, c.Roots.File)})
	ca.Apply(t, "- {name: web, spiffe_id: 'spiffe://example.org/web', workloads: unix.uid == 0, dns_names: [web.shop.internal]}\n")
	agent := ca.StartAgent(t, "web-1", local.AgentOptions{})
	var svid *x509svid.SVID
	fetch := func(ctx context.Context) (err error) {
		svid, err = workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(agent.Address()))
		return err
	}
	local.Await(t, "an identity", fetch)
	first := svid.Certificates[0]
	if svid.ID.String() != "spiffe://example.org/web" || !slices.Equal(first.DNSNames, []string{"web.shop.internal"}) || first.CheckSignatureFrom(a.Issuer) != nil {
		t.Errorf("%s, %q, issued by %s", svid.ID, first.DNSNames, first.Issuer)
	}
	out := ca.MustCommand(t, "upstream", "check", "--config", filepath.Join(ca.Dir, "ca.yaml"))
	if !strings.Contains(out, "ok       signs an X.509-SVID") || strings.Contains(out, "FAILED") {
		t.Error(out)
	}
	if out := ca.MustCommand(t, "authority", "list"); strings.Contains(out, "intermediate") {
		t.Errorf("there is an intermediate:\n%s", out)
	}

	i.mu.Lock()
	i.behaviour = failing
	i.mu.Unlock()
	ca.MustCommand(t, "svid", "renew")
	local.Await(t, "the CA to say what is wrong", func(context.Context) error {
		if out, _ := ca.Command(t, "status"); !strings.Contains(out, "its CA is away") {
			return errors.New(out)
		}
		return nil
	})
	local.Await(t, "the identity, which is served for as long as it lives", fetch)
	if !svid.Certificates[0].Equal(first) {
		t.Error("another one is served, which nobody has signed")
	}
	i.mu.Lock()
	i.behaviour = whole
	i.mu.Unlock()
	ca.MustCommand(t, "svid", "renew")
	local.Await(t, "the next one", func(ctx context.Context) error {
		if err := fetch(ctx); err != nil || svid.Certificates[0].Equal(first) {
			return fmt.Errorf("it is the same: %w", err)
		}
		return nil
	})
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
	if out := ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(ca.DataDir, "ledger")); !strings.Contains(out, "intact") {
		t.Error(out)
	}
	ca.Start(t)
	ca.AwaitReady(t)
	agent.AwaitConnected(t)
	i.checkServed(t)
}

// checkServed says whether all that was asked for was asked by the CA, and is deleted.
func (i *signer) checkServed(t *testing.T) {
	t.Helper()
	local.Await(t, "the requests to be deleted", func(ctx context.Context) error {
		var list struct {
			Items []signingRequest `json:"items"`
		}
		err := i.server.Do(ctx, http.MethodGet, path+"?fieldSelector=spec.signerName%3D"+i.name, nil, &list)
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d requests are there", len(list.Items))
		}
		return err
	})
}
