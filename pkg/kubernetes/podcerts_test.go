package kubernetes_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/meshid/meshid/internal/kube"
	testkube "github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

const signer = "meshid.io/svid"

// podEntries give each pod one identity, and those that are labelled another one.
const podEntries = `
- name: pods
  spiffe_id: spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}
  nodes: node.k8s.cluster == "prod"
  workloads: k8s.namespace == "shop" && k8s.service_account == "cart" && !("tier" in k8s.labels)
  ttl: 2h
- name: tier
  spiffe_id: spiffe://example.org/tier/{k8s.labels["tier"]}
  workloads: k8s.namespace == "shop" && "tier" in k8s.labels
- name: zone
  spiffe_id: spiffe://example.org/zone/a
  workloads: k8s.namespace == "shop" && "tier" in k8s.labels
- name: short
  spiffe_id: spiffe://example.org/short
  workloads: k8s.namespace == "shop" && k8s.service_account == "short"
  ttl: 30m
`

// answered is what is looked at of a PodCertificateRequest.
type answered struct {
	kube.Object
	Status struct {
		Conditions []struct {
			Type, Status, Reason, Message string
		} `json:"conditions"`
		CertificateChain string    `json:"certificateChain"`
		NotBefore        time.Time `json:"notBefore"`
		BeginRefreshAt   time.Time `json:"beginRefreshAt"`
		NotAfter         time.Time `json:"notAfter"`
	} `json:"status"`
}

type object = map[string]any

func client(t *testing.T, kubeconfig string) *kube.Client {
	t.Helper()
	c, err := kube.Open(kube.Config{Name: "test", Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// requests makes PodCertificateRequest objects, as kubelets do.
type requests struct {
	*testkube.APIServer
	version string
	admin   *kube.Client
}

func newRequests(t *testing.T, s *testkube.APIServer) *requests {
	t.Helper()
	return &requests{s, "v1", client(t, s.Kubeconfig)}
}

// kubelet returns the client that a node's kubelet has.
func (r *requests) kubelet(t *testing.T, node string) *kube.Client {
	t.Helper()
	return client(t, r.UserKubeconfig(t, "system:node:"+node, "system:nodes"))
}

func (r *requests) path(namespace, name string) kube.Path {
	return kube.Path{Resource: kube.Resource{Group: "certificates.k8s.io", Version: r.version, Plural: "podcertificaterequests"}, Namespace: namespace, Name: name}
}

func (r *requests) uid(t *testing.T, path string) string {
	t.Helper()
	var o kube.Object
	if err := r.Do(t.Context(), http.MethodGet, path, nil, &o); err != nil {
		t.Fatal(err)
	}
	return o.Metadata.UID
}

// spec is what the kubelet of the pod's node asks for.
func (r *requests) spec(t *testing.T, pod testkube.Pod, key crypto.Signer) object {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return object{
		"signerName": signer, "podName": pod.Name, "podUID": pod.UID, "stubPKCS10Request": csr, "maxExpirationSeconds": 86400,
		"serviceAccountName": pod.ServiceAccount, "serviceAccountUID": r.uid(t, "/api/v1/namespaces/"+pod.Namespace+"/serviceaccounts/"+pod.ServiceAccount),
		"nodeName": pod.Node, "nodeUID": r.uid(t, "/api/v1/nodes/"+pod.Node),
	}
}

// create makes a request and returns its name. What the API server does not know yet of
// the pod, it is asked for again.
func (r *requests) create(t *testing.T, as *kube.Client, namespace string, spec object) string {
	t.Helper()
	var made kube.Object
	local.Await(t, "make a PodCertificateRequest", func(ctx context.Context) error {
		return as.Create(ctx, r.path(namespace, ""), object{
			"apiVersion": "certificates.k8s.io/" + r.version, "kind": "PodCertificateRequest", "metadata": object{"generateName": "req-"}, "spec": spec,
		}, &made)
	})
	return made.Metadata.Name
}

func (r *requests) await(t *testing.T, namespace, name string) *answered {
	t.Helper()
	a := &answered{}
	local.Await(t, "the answer to "+name, func(ctx context.Context) error {
		*a = answered{}
		err := r.admin.Get(ctx, r.path(namespace, name), a)
		if err == nil && len(a.Status.Conditions) == 0 {
			err = errors.New("there is none yet")
		}
		return err
	})
	return a
}

// pod makes a pod with a podCertificate volume.
func (r *requests) pod(t *testing.T, p testkube.Pod) testkube.Pod {
	t.Helper()
	p.Signer = signer
	if p.ServiceAccount == "" {
		p.ServiceAccount = "cart"
	}
	if p.Node == "" {
		p.Node = "node-1"
	}
	return r.CreatePod(t, p)
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// checkIssued checks an answer with a certificate and returns its SPIFFE ID.
func checkIssued(t *testing.T, bundle string, a *answered, key crypto.Signer) string {
	t.Helper()
	s := &a.Status
	if c := s.Conditions[0]; c.Type != "Issued" || c.Status != "True" {
		t.Fatalf("it was not issued: %+v", s.Conditions)
	}
	var chain []*x509.Certificate
	for rest := []byte(s.CertificateChain); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, certificate)
	}
	if len(chain) < 2 {
		t.Fatalf("the chain has %d certificates", len(chain))
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(bundle))
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	type comparable interface{ Equal(x crypto.PublicKey) bool }
	if public, ok := key.Public().(comparable); !ok || !public.Equal(chain[0].PublicKey) {
		t.Error("it is for another key")
	}
	if !s.NotBefore.Equal(chain[0].NotBefore) || !s.NotAfter.Equal(chain[0].NotAfter) {
		t.Errorf("the status says %s to %s, the certificate %s to %s", s.NotBefore, s.NotAfter, chain[0].NotBefore, chain[0].NotAfter)
	}
	if s.BeginRefreshAt.Before(s.NotBefore.Add(10*time.Minute)) || s.BeginRefreshAt.After(s.NotAfter.Add(-10*time.Minute)) {
		t.Errorf("to be renewed at %s, it is valid from %s to %s", s.BeginRefreshAt, s.NotBefore, s.NotAfter)
	}
	if len(chain[0].URIs) != 1 {
		t.Fatalf("it has the URIs %v", chain[0].URIs)
	}
	return chain[0].URIs[0].String()
}

func checkDenied(t *testing.T, a *answered, reason, message string) {
	t.Helper()
	c := a.Status.Conditions[0]
	if c.Type != "Denied" || c.Reason != reason || !strings.Contains(c.Message, message) {
		t.Errorf("the answer is %+v; it should be Denied, %s, %s", a.Status.Conditions, reason, message)
	}
}

const cartID = "spiffe://example.org/ns/shop/sa/cart"

// A request of a kubelet gets the certificate that the entries give to its pod, and each
// other one a reason.
func TestPodCertificates(t *testing.T) {
	s := testkube.StartAPIServer(t)
	r := newRequests(t, s)
	ca := startCA(t, s, ", pod_certificates: {signer: meshid.io/svid}")
	ca.Apply(t, podEntries)
	bundle := ca.MustCommand(t, "bundle", "show")
	pod := r.pod(t, testkube.Pod{Namespace: "shop", Name: "cart"})
	other := r.pod(t, testkube.Pod{Namespace: "shop", Name: "other", Node: "node-2"})
	tier := r.pod(t, testkube.Pod{Namespace: "shop", Name: "tier", Labels: map[string]string{"tier": "gold"}})
	short := r.pod(t, testkube.Pod{Namespace: "shop", Name: "short", ServiceAccount: "short"})
	node1 := r.kubelet(t, "node-1")

	t.Run("issued and recorded", func(t *testing.T) {
		key := newKey(t)
		name := r.create(t, node1, "shop", r.spec(t, pod, key))
		a := r.await(t, "shop", name)
		if id := checkIssued(t, bundle, a, key); id != cartID {
			t.Error(id)
		}
		if life := a.Status.NotAfter.Sub(a.Status.NotBefore); life < 2*time.Hour || life > 2*time.Hour+time.Minute {
			t.Errorf("it lives for %s", life)
		}
		block, _ := pem.Decode([]byte(a.Status.CertificateChain))
		local.Await(t, "the record", func(context.Context) error {
			out := ca.MustCommand(t, "ledger", "find", "--serial", serial(t, block.Bytes), "-o", "json")
			for _, want := range []string{cartID, "PodCertificateRequest shop/" + name, "k8s:" + pod.UID} {
				if !strings.Contains(out, want) {
					return fmt.Errorf("the ledger says nothing of %s:\n%s", want, out)
				}
			}
			return nil
		})
	})
	t.Run("the shortest life", func(t *testing.T) {
		key := newKey(t)
		spec := r.spec(t, pod, key)
		spec["maxExpirationSeconds"] = 3600
		a := r.await(t, "shop", r.create(t, node1, "shop", spec))
		if id := checkIssued(t, bundle, a, key); id != cartID {
			t.Error(id)
		}
		if life := a.Status.NotAfter.Sub(a.Status.NotBefore); life != time.Hour {
			t.Errorf("it lives for %s", life)
		}
	})
	t.Run("an entry with a shorter one", func(t *testing.T) {
		a := r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, short, newKey(t))))
		checkDenied(t, a, "Refused", "at least 1h")
	})
	t.Run("keys", func(t *testing.T) {
		p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		_, ed, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		rsa3072, err := rsa.GenerateKey(rand.Reader, 3072)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []crypto.Signer{p384, ed, rsa3072} {
			if id := checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, key))), key); id != cartID {
				t.Error(id)
			}
		}
		checkDenied(t, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, p521))), "UnsupportedKeyType", "ECDSAP256")
	})
	t.Run("one identity of several", func(t *testing.T) {
		for _, c := range []struct{ annotation, want string }{
			{"", "spiffe://example.org/tier/gold"}, // by labels, which the request does not say; the first by its entry's name
			{"spiffe://example.org/zone/a", "spiffe://example.org/zone/a"},
		} {
			key := newKey(t)
			spec := r.spec(t, tier, key)
			if c.annotation != "" {
				spec["unverifiedUserAnnotations"] = object{"meshid.io/spiffe-id": c.annotation}
			}
			if id := checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", spec)), key); id != c.want {
				t.Errorf("%q: %s", c.annotation, id)
			}
		}
		for _, c := range []struct{ key, value, reason, message string }{
			{"meshid.io/spiffe-id", cartID, "Refused", ""},
			{"meshid.io/spiffe-id", "spiffe://", "InvalidUnverifiedUserAnnotations", "meshid.io/spiffe-id"},
			{"meshid.io/ttl", "24h", "InvalidUnverifiedUserAnnotations", "meshid.io/ttl"},
		} {
			spec := r.spec(t, tier, newKey(t))
			spec["unverifiedUserAnnotations"] = object{c.key: c.value}
			checkDenied(t, r.await(t, "shop", r.create(t, node1, "shop", spec)), c.reason, c.message)
		}
	})
	t.Run("a key of another pod", func(t *testing.T) {
		key := newKey(t)
		checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, key))), key)
		checkDenied(t, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, tier, key))), "InvalidRequest", "make a new key")
	})
	t.Run("others' requests", func(t *testing.T) {
		// A kubelet asks for its own pods alone, which the API server sees to.
		err := node1.Create(t.Context(), r.path("shop", ""), object{
			"apiVersion": "certificates.k8s.io/v1", "kind": "PodCertificateRequest", "metadata": object{"generateName": "req-"}, "spec": r.spec(t, other, newKey(t)),
		}, nil)
		if !errors.Is(err, kube.ErrDenied) {
			t.Errorf("node-1 for a pod of node-2: %v", err)
		}
		// For others that may make requests it does not.
		var all sync.WaitGroup
		defer all.Wait()
		for what, c := range map[string]struct {
			namespace string
			change    object
			message   string
		}{
			"another's UID":           {"shop", object{"podUID": other.UID}, "is not shop/cart"},
			"no pod's UID":            {"shop", object{"podUID": "00000000-0000-0000-0000-000000000000"}, "there is no pod"},
			"another's node":          {"shop", object{"nodeName": "node-2", "nodeUID": r.uid(t, "/api/v1/nodes/node-2")}, "is not on node node-2"},
			"another node's UID":      {"shop", object{"nodeUID": r.uid(t, "/api/v1/nodes/node-2")}, "does not have the UID"},
			"another service account": {"shop", object{"serviceAccountName": "short"}, "does not have the service account short"},
			"another name":            {"shop", object{"podName": "other"}, "is not shop/other"},
			"another namespace":       {s.Namespace(t), object{}, "is not test-"},
		} {
			spec := r.spec(t, pod, newKey(t))
			maps.Copy(spec, c.change)
			name := r.create(t, r.admin, c.namespace, spec)
			all.Go(func() {
				a := r.await(t, c.namespace, name)
				if got := a.Status.Conditions[0]; got.Type != "Denied" || got.Reason != "PodMismatch" || !strings.Contains(got.Message, c.message) {
					t.Errorf("%s: %+v", what, a.Status.Conditions)
				}
			})
		}
	})
	t.Run("a deleted pod", func(t *testing.T) {
		gone := r.pod(t, testkube.Pod{Namespace: "shop", Name: "gone"})
		spec := r.spec(t, gone, newKey(t))
		r.await(t, "shop", r.create(t, node1, "shop", spec)) // the CA knows it
		s.DeletePod(t, gone)
		checkDenied(t, r.await(t, "shop", r.create(t, r.admin, "shop", spec)), "PodMismatch", "deleted")
	})
	t.Run("another signer", func(t *testing.T) {
		spec := r.spec(t, pod, newKey(t))
		spec["signerName"] = "example.org/other"
		name := r.create(t, r.admin, "shop", spec)
		key := newKey(t)
		checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, key))), key)
		a := &answered{}
		if err := r.admin.Get(t.Context(), r.path("shop", name), a); err != nil || len(a.Status.Conditions) > 0 {
			t.Errorf("%v, %+v", err, a.Status)
		}
	})
	t.Run("quarantine", func(t *testing.T) {
		ca.MustCommand(t, "quarantine", "add", "--spiffe-id", cartID, "--reason", "test")
		checkDenied(t, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, newKey(t)))), "Quarantined", "quarantined")
	})
}

// Where the API server has older versions alone, the public key and a signature over the
// pod's UID are in place of the PKCS #10 request.
func TestPodCertificatesOfOlderVersions(t *testing.T) {
	s := testkube.StartAPIServer(t, "--runtime-config=certificates.k8s.io/v1beta1=true")
	r := newRequests(t, s)
	r.version = "v1beta1"
	ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf("kubernetes:\n  clusters:\n    - {name: prod, kubeconfig: %s, pod_certificates: {signer: %s}}\n", older(t, s), signer)})
	ca.Apply(t, podEntries)
	bundle := ca.MustCommand(t, "bundle", "show")
	pod := r.pod(t, testkube.Pod{Namespace: "shop", Name: "cart"})
	node1 := r.kubelet(t, "node-1")
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa3072, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(pod.UID))
	for _, key := range []crypto.Signer{newKey(t), ed, rsa3072} {
		var proof []byte
		switch key := key.(type) {
		case ed25519.PrivateKey:
			proof = ed25519.Sign(key, []byte(pod.UID))
		case *rsa.PrivateKey:
			proof, err = rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
		case *ecdsa.PrivateKey:
			proof, err = ecdsa.SignASN1(rand.Reader, key, digest[:])
		}
		if err != nil {
			t.Fatal(err)
		}
		spec := r.spec(t, pod, key)
		delete(spec, "stubPKCS10Request")
		if spec["pkixPublicKey"], err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
			t.Fatal(err)
		}
		spec["proofOfPossession"] = proof
		if id := checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", spec)), key); id != cartID {
			t.Error(id)
		}
	}
	// The newer form is there as well.
	key := newKey(t)
	checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, key))), key)
}

// older returns the kubeconfig of an administrator to whom the API server looks as if it
// were an older one, which has not got v1.
func older(t *testing.T, s *testkube.APIServer) string {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := rest.TransportFor(config)
	if err != nil {
		t.Fatal(err)
	}
	target, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Transport: transport, FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/apis/certificates.k8s.io/v1" || strings.HasPrefix(r.URL.Path, "/apis/certificates.k8s.io/v1/") {
			http.NotFound(w, r)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		server.CloseClientConnections() // watches
		server.Close()
	})
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: old, cluster: {server: '" + server.URL + "'}}]\ncontexts: [{name: old, context: {cluster: old}}]\ncurrent-context: old\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Many requests at once are answered by several CAs, each of them once; with the rights
// of the documents; and an API server that is away for a time costs no answer.
func TestPodCertificatesOfSeveralCAs(t *testing.T) {
	s := testkube.StartAPIServer(t)
	r := newRequests(t, s)
	config := fmt.Sprintf("kubernetes:\n  clusters:\n    - {name: prod, kubeconfig: %s, pod_certificates: {signer: %s}}\n", s.UserKubeconfig(t, "meshid-ca"), signer)
	cas := []*local.CA{
		local.StartCA(t, local.CAOptions{Config: config + "instance: one\n"}),
		local.StartCA(t, local.CAOptions{Config: config + "instance: two\n"}),
	}
	for _, ca := range cas {
		ca.Apply(t, podEntries)
	}
	condition := func(ca *local.CA, want bool) {
		t.Helper()
		local.Await(t, fmt.Sprint("the condition: ", want), func(context.Context) error {
			out := ca.MustCommand(t, "status")
			if strings.Contains(out, "kubernetes_pod_certificates_prod: ok") == want {
				return errors.New(out)
			}
			return nil
		})
	}
	// Without rights nothing is answered, and operators are told.
	pod := r.pod(t, testkube.Pod{Namespace: "shop", Name: "cart"})
	node1 := r.kubelet(t, "node-1")
	first := newKey(t)
	waiting := r.create(t, node1, "shop", r.spec(t, pod, first))
	for _, ca := range cas {
		condition(ca, true)
	}
	s.Apply(t, documented(t, "pod-certificates.md", "meshid-ca-pod-certificates")+"\n---\n"+documented(t, "kubernetes.md", "meshid-ca-placement"))
	for _, role := range []string{"meshid-ca-placement", "meshid-ca-pod-certificates"} {
		s.MustKubectl(t, "create", "clusterrolebinding", role+"-test", "--clusterrole="+role, "--user=meshid-ca")
	}
	// Each of these CAs has a root of its own.
	bundle := cas[0].MustCommand(t, "bundle", "show") + cas[1].MustCommand(t, "bundle", "show")
	checkIssued(t, bundle, r.await(t, "shop", waiting), first)
	for _, ca := range cas {
		condition(ca, false)
	}

	const storm = 100
	keys, names := make([]*ecdsa.PrivateKey, storm), make([]string, storm)
	var all sync.WaitGroup
	for i := range storm {
		keys[i] = newKey(t)
		all.Go(func() { names[i] = r.create(t, node1, "shop", r.spec(t, pod, keys[i])) })
	}
	all.Wait()
	for i := range storm {
		checkIssued(t, bundle, r.await(t, "shop", names[i]), keys[i])
	}
	local.Await(t, "the count of what was issued", func(ctx context.Context) error {
		var issued, lost, bad float64
		for _, ca := range cas {
			issued += outcomes(ctx, t, ca, "issued")
			lost += outcomes(ctx, t, ca, "lost")
			bad += outcomes(ctx, t, ca, "denied") + outcomes(ctx, t, ca, "failed")
		}
		if issued != storm+1 || bad != 0 {
			return fmt.Errorf("%v issued, %v denied or failed", issued, bad)
		}
		t.Logf("of %d certificates of two CAs, %v were not used", storm+1, lost)
		return nil
	})

	s.Server.Kill()
	for _, ca := range cas {
		condition(ca, true)
	}
	s.Server.Start(t)
	s.AwaitReady(t)
	key := newKey(t)
	checkIssued(t, bundle, r.await(t, "shop", r.create(t, node1, "shop", r.spec(t, pod, key))), key)
	for _, ca := range cas {
		condition(ca, false)
	}
}

// serial is a certificate's serial number as the ledger writes it.
func serial(t *testing.T, der []byte) string {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", c.SerialNumber.Bytes())
}

// documented returns the manifest with this name in a page of the documents.
func documented(t *testing.T, page, name string) string {
	t.Helper()
	text, err := os.ReadFile(require.Repository() + "/docs/" + page)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(text), "```yaml\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		if strings.Contains(block, "kind: ClusterRole\nmetadata: {name: "+name+"}") {
			return block
		}
	}
	t.Fatalf("docs/%s has no ClusterRole %s", page, name)
	return ""
}

func outcomes(ctx context.Context, t *testing.T, ca *local.CA, outcome string) float64 {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ca.Metrics+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families["meshid_ca_pod_certificate_requests_total"].GetMetric() {
		for _, l := range m.GetLabel() {
			if l.GetName() == "outcome" && l.GetValue() == outcome {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no outcome %s", outcome)
	return 0
}
