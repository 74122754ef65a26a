package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// A running mesh changes its CA, and no sidecar of it is started again: one that runs
// since before gets its next certificate from the new CA at the address of the old one,
// and at every moment both sides accept each other.
func TestMoveRunningMesh(t *testing.T) {
	s := kube.Shared(t)
	free := func() (address, port string) {
		address = local.FreeAddress(t)
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		return address, port
	}
	listen, port := free()
	old := newIstiod(t, port)
	old.life = 100 * time.Second
	previous := filepath.Join(t.TempDir(), "previous.pem")
	if err := os.WriteFile(previous, []byte(old.roots), 0o600); err != nil {
		t.Fatal(err)
	}
	namespace := s.Namespace(t)
	pod := s.CreatePod(t, kube.Pod{Namespace: namespace, Name: "web-1", ServiceAccount: "web", Node: "n1"})
	ca := startMeshCA(t, s, fmt.Sprintf(`  previous_roots: %s
  clusters:
    - name: prod
      istiod: {keep: true}
`, previous))

	// Both roots are in the bundle first.
	newRoots := ca.MustCommand(t, "bundle", "show")
	old.roots += newRoots
	at, stopOld := old.serve("127.0.0.1:0")
	_, oldPort, err := net.SplitHostPort(at)
	if err != nil {
		t.Fatal(err)
	}
	web := startSidecar(t, sidecarOptions{
		files: map[string]string{
			"var/run/secrets/tokens/istio-token":  s.Token(t, pod, time.Hour, "istio-ca"),
			"var/run/secrets/istio/root-cert.pem": old.roots,
			"istiod.pem":                          old.roots,
		},
		namespace: namespace, account: "web", listen: listen, istiod: "localhost:" + oldPort,
		env: []string{"SECRET_GRACE_PERIOD_RATIO=0.9"}, // so that it renews after 10 s
	})
	identity := "spiffe://example.org/ns/" + namespace + "/sa/"
	client := func(from, roots string) *tls.Config {
		certificate := old.certificate(identity + "client")
		if from == "new" {
			certificate = ca.certificateOf(t, s, kube.Pod{Namespace: namespace, Name: "client-" + from, ServiceAccount: "client", Node: "n2"})
		}
		return meshClient(certificate, roots)
	}
	oldClient, newClient := client("old", old.roots), client("new", old.roots)
	onlyNew := meshClient(newClient.Certificates[0], newRoots)
	for _, c := range []*tls.Config{oldClient, newClient} {
		if leaf := web.awaitGreeting(t, c); leaf.URIs[0].String() != identity+"web" {
			t.Errorf("the sidecar is %v", leaf.URIs)
		}
	}
	if _, err := web.greet(t.Context(), onlyNew); err == nil {
		t.Error("the sidecar has a certificate of the new CA already")
	}

	// What is at istiod's address is now Envoy: deploy/istio/front.yaml.
	beside, _ := old.serve("127.0.0.1:0")
	stopOld()
	startFront(t, s, "/api/v1/namespaces/istio-system/secrets/istiod-tls", old.roots, oldPort, ca.port, beside)
	local.Await(t, "wait until the sidecar has a certificate of the new CA", func(ctx context.Context) error {
		if _, err := web.greet(ctx, oldClient); err != nil {
			t.Errorf("the old side is refused meanwhile: %v", err)
		}
		_, err := web.greet(ctx, onlyNew)
		return err
	})
	select {
	case <-web.Done():
		t.Error("pilot-agent was started again")
	default:
	}
	if _, err := web.greet(t.Context(), newClient); err != nil {
		t.Error(err)
	}
}

// startFront starts the Envoy of deploy/istio/front.yaml, with addresses of this machine.
func startFront(t *testing.T, s *kube.APIServer, secret, roots, port, caPort, istiod string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	local.Await(t, "wait for the control plane's certificate", func(ctx context.Context) error {
		var object struct {
			Data map[string][]byte `json:"data"`
		}
		if err := s.Do(ctx, http.MethodGet, secret, nil, &object); err != nil {
			return err
		}
		// It may still be that of another CA, of a test before.
		pair, err := tls.X509KeyPair(object.Data["tls.crt"], object.Data["tls.key"])
		if err != nil {
			return err
		}
		if err := verify(pair.Certificate, roots); err != nil {
			return err
		}
		for name, content := range object.Data {
			write(name, content)
		}
		return nil
	})
	write("root-cert.pem", []byte(roots))
	text, err := os.ReadFile(filepath.Join(require.Repository(), "deploy", "istio", "front.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, istiodPort, err := net.SplitHostPort(istiod)
	if err != nil {
		t.Fatal(err)
	}
	_, webhooks, err := net.SplitHostPort(local.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	config := strings.NewReplacer(
		"/etc/istiod-tls", dir, "/etc/roots", dir, "address: 0.0.0.0, port_value: 15012", "address: 127.0.0.1, port_value: "+port,
		"address: 0.0.0.0, port_value: 15017", "address: 127.0.0.1, port_value: "+webhooks,
		"address: ca.mesh-ca.svc, port_value: 15012", "address: 127.0.0.1, port_value: "+caPort,
		"address: istiod-direct.istio-system.svc, port_value: 15012", "address: 127.0.0.1, port_value: "+istiodPort,
		"address: istiod-direct.istio-system.svc, port_value: 15017", "address: 127.0.0.1, port_value: "+istiodPort,
	).Replace(string(text))
	write("front.yaml", []byte(config))
	local.Run(t, require.Envoy(t), "-c", filepath.Join(dir, "front.yaml"), "--use-dynamic-base-id", "-l", "warning")
}

// The commands of docs/istio.md that put the Envoy in front of istiod, and take it away.
func TestFrontCommands(t *testing.T) {
	s := kube.Shared(t)
	s.Account(t, "istio-system", "istiod-service-account") // and the namespace
	s.Apply(t, `
apiVersion: v1
kind: Service
metadata: {name: istiod, namespace: istio-system}
spec: {selector: {app: istiod, istio: pilot}, ports: [{name: https-dns, port: 15012}, {name: https-webhook, port: 443, targetPort: 15017}]}
`)
	t.Cleanup(func() {
		_ = s.Do(context.Background(), http.MethodDelete, "/api/v1/namespaces/istio-system/services/istiod", nil, nil)
	})
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(require.Repository(), "deploy"), filepath.Join(dir, "deploy")); err != nil {
		t.Fatal(err)
	}
	run := func(line string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", "-euc", line)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig, "PATH="+require.Kubernetes(t)+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	leadsTo := func(want string) {
		t.Helper()
		if got := s.MustKubectl(t, "get", "service", "-n", "istio-system", "istiod", "-o", "jsonpath={.spec.selector}"); got != want {
			t.Errorf("the Service leads to %s, want %s", got, want)
		}
	}
	const deployment = "/apis/apps/v1/namespaces/istio-system/deployments/meshid-front"
	for line := range strings.Lines(require.Example(t, "istio.md", "sh front")) {
		if strings.Contains(line, "rollout status") { // no controller is here
			leadsTo(`{"app":"istiod","istio":"pilot"}`)
			status := object{"status": object{"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "availableReplicas": 2}}
			if err := s.Do(t.Context(), http.MethodPatch, deployment+"/status", status, nil); err != nil {
				t.Fatal(err)
			}
		}
		run(line)
	}
	leadsTo(`{"app":"meshid-front"}`)
	config := s.MustKubectl(t, "get", "configmap", "-n", "istio-system", "meshid-front", "-o", `jsonpath={.data.front\.yaml}`)
	if strings.Contains(config, "mesh-ca") || strings.Count(config, "meshid-ca.meshid.svc") != 3 {
		t.Errorf("the Envoy is told\n%s", config)
	}
	// The pods have what front.yaml reads, and may run where only restricted ones may.
	var front struct {
		Spec struct {
			Template object `json:"template"`
		} `json:"spec"`
	}
	if err := s.Do(t.Context(), http.MethodGet, deployment, nil, &front); err != nil {
		t.Fatal(err)
	}
	pods := fmt.Sprint(front.Spec.Template)
	for _, path := range []string{"/etc/istiod-tls", "/etc/roots"} {
		if !strings.Contains(config, path) || !strings.Contains(pods, "mountPath:"+path) {
			t.Errorf("%s is not mounted, or not read: %s", path, pods)
		}
	}
	strict := s.Namespace(t)
	s.MustKubectl(t, "label", "namespace", strict, "pod-security.kubernetes.io/enforce=restricted")
	s.Account(t, strict, "default")
	pod := front.Spec.Template
	pod["metadata"] = object{"name": "front"}
	if err := s.Do(t.Context(), http.MethodPost, "/api/v1/namespaces/"+strict+"/pods?dryRun=All", pod, nil); err != nil {
		t.Error(err)
	}

	for line := range strings.Lines(require.Example(t, "istio.md", "sh back")) {
		run(line)
	}
	leadsTo(`{"app":"istiod","istio":"pilot"}`)
	for _, left := range []string{deployment, "/api/v1/namespaces/istio-system/services/istiod-direct", "/api/v1/namespaces/istio-system/configmaps/meshid-front"} {
		local.Await(t, "it is gone: "+left, func(ctx context.Context) error {
			if err := s.Do(ctx, http.MethodGet, left, nil, nil); err == nil {
				return fmt.Errorf("%s is there", left)
			}
			return nil
		})
	}
}

// meshClient is a client of the mesh: it looks at the chain, since there are no DNS names.
func meshClient(certificate tls.Certificate, roots string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{certificate}, InsecureSkipVerify: true,
		VerifyPeerCertificate: func(chain [][]byte, _ [][]*x509.Certificate) error { return verify(chain, roots) },
	}
}

// verify verifies a chain against roots in PEM.
func verify(chain [][]byte, roots string) error {
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(roots))
	var leaf *x509.Certificate
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		if i == 0 {
			leaf = c
		}
		between.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between})
	return err
}

// certificateOf has a pod get its certificate from the CA, by pilot-agent.
func (c *meshCA) certificateOf(t *testing.T, s *kube.APIServer, pod kube.Pod) tls.Certificate {
	t.Helper()
	pod = s.CreatePod(t, pod)
	return startSidecar(t, sidecarOptions{
		files: map[string]string{
			"var/run/secrets/tokens/istio-token":  s.Token(t, pod, time.Hour, "istio-ca"),
			"var/run/secrets/istio/root-cert.pem": c.MustCommand(t, "bundle", "show"),
			"out/empty":                           "",
		},
		env: []string{"CA_ADDR=localhost:" + c.port, "OUTPUT_CERTS=out"}, noEnvoy: true,
		namespace: pod.Namespace, account: pod.ServiceAccount,
	}).awaitCertificate(t)
}
