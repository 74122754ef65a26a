// Package certmanager runs the upstream CA of the kind certmanager, and the CA below
// it, against a real API server that has cert-manager's own definition of a
// CertificateRequest. The issuer is played: it checks what cert-manager's webhook and
// controllers check.
package certmanager

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

	kubeclient "github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/certmanager"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(kube.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// issuer plays cert-manager in one namespace.
type issuer struct {
	t         *testing.T
	server    *kube.APIServer
	namespace string

	mu        sync.Mutex // guards what follows
	authority *upstreamtest.Authority
	behaviour upstreamtest.Behaviour
	noCA      bool // status.ca is left empty
	seen      []string
}

// certificateRequest is as much of one as is looked at.
type certificateRequest struct {
	kubeclient.Object
	Spec struct {
		Request   []byte            `json:"request"`
		IsCA      bool              `json:"isCA"`
		Usages    []string          `json:"usages"`
		Duration  string            `json:"duration"`
		IssuerRef map[string]string `json:"issuerRef"`
	} `json:"spec"`
	Status struct {
		Conditions []map[string]string `json:"conditions"`
	} `json:"status"`
}

// start starts an issuer in a namespace of its own, and returns it with the
// configuration of a client that may do what the document says, and nothing else.
func start(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*issuer, certmanager.Config) {
	t.Helper()
	s := kube.Shared(t)
	define(t, s)
	i := &issuer{t: t, server: s, namespace: s.Namespace(t), authority: a, behaviour: b}
	client, err := kubeclient.Open(kubeclient.Config{Name: "issuer", Kubeconfig: s.Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	feed := kubeclient.Follow(client, i.path(), kubeclient.FollowOptions{}, func(r *certificateRequest) *certificateRequest { return r }, i)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		feed.Run(ctx)
	}()
	t.Cleanup(func() { stop(); <-done })
	s.Apply(t, strings.ReplaceAll(require.Example(t, "upstream/certmanager.md", "yaml file=rbac.yaml")+"---\n"+account, "namespace: meshid", "namespace: "+i.namespace))
	c := certmanager.Config{
		Namespace:  i.namespace,
		Kubeconfig: s.TokenKubeconfig(t, s.Token(t, kube.Pod{Namespace: i.namespace, ServiceAccount: "meshid-ca"}, time.Hour)),
	}
	c.Issuer.Name = "mesh"
	return i, c
}

const account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {namespace: meshid, name: meshid-ca}\n"

// defined is whether the shared server knows what a CertificateRequest is; tests here
// do not run in parallel.
var defined bool

func define(t *testing.T, s *kube.APIServer) {
	t.Helper()
	definition, err := os.ReadFile(require.CertificateRequest(t))
	if err != nil {
		t.Fatal(err)
	}
	if defined {
		return
	}
	s.Apply(t, string(definition))
	s.MustKubectl(t, "wait", "--for=condition=Established", "--timeout=60s", "crd/certificaterequests.cert-manager.io")
	defined = true
}

func (i *issuer) path() kubeclient.Path {
	return kubeclient.Path{Resource: kubeclient.Resource{Group: "cert-manager.io", Version: "v1", Plural: "certificaterequests"}, Namespace: i.namespace}
}

// checkNothingLeft is called when nobody waits for a request.
func (i *issuer) checkNothingLeft() {
	i.t.Helper()
	var list struct {
		Items []certificateRequest `json:"items"`
	}
	// The test's own context ends before what it cleans up.
	err := i.server.Do(context.WithoutCancel(i.t.Context()), http.MethodGet, "/apis/cert-manager.io/v1/namespaces/"+i.namespace+"/certificaterequests", nil, &list)
	if err != nil {
		i.t.Error(err)
	}
	for _, r := range list.Items {
		i.t.Errorf("request %s is left", r.Metadata.Name)
	}
}

// Replace implements kube.Reader.
func (i *issuer) Replace(all []*certificateRequest) {
	for _, r := range all {
		i.Set(r)
	}
}

// Delete implements kube.Reader.
func (*issuer) Delete(*certificateRequest) {}

// Set implements kube.Reader: it deals with a new request.
func (i *issuer) Set(r *certificateRequest) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if slices.Contains(i.seen, r.Metadata.UID) {
		return
	}
	i.seen = append(i.seen, r.Metadata.UID)
	csr, err := i.check(r)
	if err != nil { // the webhook would not have let it in
		i.status(r, map[string]any{"conditions": []any{condition("InvalidRequest", "True", "Invalid", err.Error())}})
		return
	}
	if i.behaviour == upstreamtest.Slow {
		return
	}
	if i.behaviour == upstreamtest.Denied {
		i.status(r, map[string]any{"conditions": []any{
			condition("Denied", "True", "policy.cert-manager.io", "No policy approved this request"), condition("Ready", "False", "Denied", "The CertificateRequest was denied by an approval controller"),
		}})
		return
	}
	approved := condition("Approved", "True", "cert-manager.io", "Certificate request has been approved by cert-manager.io")
	i.status(r, map[string]any{"conditions": []any{approved, condition("Ready", "False", "Pending", "Waiting on certificate issuance")}})
	ttl, err := time.ParseDuration(r.Spec.Duration)
	if err != nil {
		i.t.Errorf("duration: %v", err)
	}
	chain, roots := i.authority.Answer(csr, ttl)
	chain = chain[:min(len(chain), 100)] // an object has at most 1.5 MiB
	certificate, ca := upstreamtest.PEM(chain...), upstreamtest.PEM(roots...)
	if i.behaviour == upstreamtest.Garbage {
		certificate = []byte("<html>")
	}
	if i.noCA {
		ca = nil
	}
	i.status(r, map[string]any{"certificate": certificate, "ca": ca, "conditions": []any{
		approved, condition("Ready", "True", "Issued", "Certificate fetched from issuer successfully"),
	}})
}

func condition(kind, status, reason, message string) map[string]string {
	return map[string]string{"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": time.Now().UTC().Format(time.RFC3339)}
}

func (i *issuer) status(r *certificateRequest, status any) {
	i.server.Answer(i.t, "/apis/cert-manager.io/v1/namespaces/"+i.namespace+"/certificaterequests/"+r.Metadata.Name+"/status", map[string]any{"status": status})
}

// check looks at each field as cert-manager does, and returns the CSR, or why it is
// none.
func (i *issuer) check(r *certificateRequest) ([]byte, error) {
	want := map[string]string{"name": "mesh", "kind": "Issuer", "group": "cert-manager.io"}
	for key, value := range want {
		if r.Spec.IssuerRef[key] != value {
			i.t.Errorf("issuerRef.%s is %q", key, r.Spec.IssuerRef[key])
		}
	}
	block, rest := pem.Decode(r.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		i.t.Errorf("request is no PEM of one CSR: %q", r.Spec.Request)
		return nil, errors.New("error decoding certificate request PEM block")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	// The webhook wants CA and usages to be those of the CSR, of which the usages are
	// here bits 5 and 6 (RFC 5280 §4.2.1.3).
	if !r.Spec.IsCA || !slices.Equal(r.Spec.Usages, []string{"cert sign", "crl sign"}) {
		i.t.Errorf("isCA %t, usages %q", r.Spec.IsCA, r.Spec.Usages)
	}
	for _, e := range csr.Extensions {
		if e.Id.String() == "2.5.29.15" && !slices.Equal(e.Value, []byte{3, 2, 1, 6}) {
			i.t.Errorf("encoded CSR error: the KeyUsages %x do not match the expected KeyUsages", e.Value)
		}
	}
	if r.Metadata.Labels["app.kubernetes.io/managed-by"] != "meshid" {
		i.t.Errorf("labels: %v", r.Metadata.Labels)
	}
	return block.Bytes, nil
}

func open(t *testing.T, c certmanager.Config) *certmanager.CA {
	t.Helper()
	ca, err := certmanager.New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
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
		},
	})
}

// An issuer that does not know its root: the configured one counts, and without one
// the error says what to configure.
func TestRoots(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	i, c := start(t, upstreamtest.Good, a)
	i.noCA = true
	if _, err := upstreamtest.Mint(t.Context(), t, open(t, c)); err == nil || !strings.Contains(err.Error(), "set roots") {
		t.Errorf("%v", err)
	}
	c.Roots = upstreamtest.File(t, "roots.pem", upstreamtest.PEM(a.Root))
	if _, err := upstreamtest.Mint(t.Context(), t, open(t, c)); err != nil {
		t.Error(err)
	}
	// What the issuer says of its root is not believed then.
	upstreamtest.Write(t, c.Roots, upstreamtest.PEM(upstreamtest.NewAuthority(t, upstreamtest.Good).Root))
	i.mu.Lock()
	i.noCA = false
	i.mu.Unlock()
	if _, err := upstreamtest.Mint(t.Context(), t, open(t, c)); err == nil || !strings.Contains(err.Error(), "does not lead to one of its roots") {
		t.Errorf("%v", err)
	}
}

// Several CA processes share a namespace.
func TestConcurrent(t *testing.T) {
	i, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			ca := open(t, c)
			for range 3 {
				if _, err := upstreamtest.Mint(t.Context(), t, ca); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	i.checkNothingLeft()
}

// Each permission that the document names is needed, and the error says that one is
// missing.
func TestPermissions(t *testing.T) {
	for _, verb := range []string{"create", "watch"} {
		i, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
		verbs := slices.DeleteFunc([]string{"create", "list", "watch", "delete"}, func(v string) bool { return v == verb })
		i.server.Apply(t, fmt.Sprintf(`apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {namespace: %s, name: meshid-upstream}
rules: [{apiGroups: [cert-manager.io], resources: [certificaterequests], verbs: [%s]}]
`, i.namespace, strings.Join(verbs, ", ")))
		local.Await(t, "the Role to change", func(ctx context.Context) error {
			_, err := upstreamtest.Mint(ctx, t, open(t, c))
			if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "docs/upstream/certmanager.md") {
				return fmt.Errorf("without %s: %w", verb, err)
			}
			return nil
		})
	}
}

// The real CA below an issuer, from the first intermediate to one that is denied.
func TestCA(t *testing.T) {
	local.Binaries(t)
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	i, c := start(t, upstreamtest.Good, a)
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(
		"upstream:\n  certmanager:\n    kubeconfig: %s\n    namespace: %s\n    issuer: {name: mesh}\n", c.Kubeconfig, c.Namespace)})
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
	if out, err := ca.Command(t, "authority", "rotate"); err == nil || !strings.Contains(ca.Log(), "No policy approved this request") {
		t.Errorf("%v\n%s", err, out)
	}
	if err := ca.Stop(t); err != nil {
		t.Error(err)
	}
}
