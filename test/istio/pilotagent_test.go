// Package istio runs clients of an unmodified Istio against the real programs: the
// agent of its sidecars (pilot-agent) with the Envoy that it starts.
package istio

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) { os.Exit(kube.Main(m)) } //nolint:forbidigo // as every TestMain

// sidecar is a pilot-agent, with the folder that is its pod's root: it reads and writes
// below its working directory.
type sidecar struct {
	*local.Process
	dir string
	// listen is where its Envoy accepts mutual TLS, as Istio configures it.
	listen string
}

// sidecarOptions are what an injected container has.
type sidecarOptions struct {
	// files are put below its folder, by path.
	files map[string]string
	// links are symbolic links below its folder.
	links map[string]string
	env   []string
	// namespace and account are those of its pod; by default shop/web.
	namespace, account string
	// istiod is the control plane's address; by default one is started for it.
	istiod string
	// listen is where its Envoy is told to listen, if istiod is set.
	listen string
	// noEnvoy lets it serve secrets to nobody.
	noEnvoy bool
}

// bootstrapTemplate is the one that Istio's images have, from its module.
func bootstrapTemplate(t *testing.T) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/istio")
	cmd.Dir = filepath.Join(require.Repository(), "tools", "istio")
	out, err := cmd.Output()
	if err != nil {
		require.Missing(t, "the sources of Istio (run scripts/install-tools pilot-agent): %v", err)
	}
	text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "tools", "packaging", "common", "envoy_bootstrap.json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// startSidecar starts the agent of a pod.
func startSidecar(t *testing.T, o sidecarOptions) *sidecar {
	t.Helper()
	o.namespace, o.account = cmp.Or(o.namespace, "shop"), cmp.Or(o.account, "web")
	program, proxy := require.Tool(t, "pilot-agent"), require.Envoy(t)
	s := &sidecar{dir: t.TempDir(), listen: cmp.Or(o.listen, local.FreeAddress(t))}
	port := func(address string) string {
		_, port, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		return port
	}
	control := newIstiod(t, port(s.listen))
	address := o.istiod
	if address == "" {
		address, _ = control.serve("127.0.0.1:0")
	}
	files := map[string]string{
		"var/lib/istio/envoy/envoy_bootstrap_tmpl.json": bootstrapTemplate(t),
		"istiod.pem": encode("CERTIFICATE", control.root.Raw),
	}
	maps.Copy(files, o.files)
	at := func(path string) string {
		path = filepath.Join(s.dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for path, content := range files {
		if err := os.WriteFile(at(path), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for path, target := range o.links {
		if err := os.Symlink(target, at(path)); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`{"discoveryAddress":"%s","configPath":"%s/etc","binaryPath":"%s","proxyAdminPort":%s,"statusPort":%s,"terminationDrainDuration":"0.1s"}`,
		address, s.dir, proxy, port(local.FreeAddress(t)), port(local.FreeAddress(t)))
	env := append([]string{
		"PATH=" + os.Getenv("PATH"), "PROXY_CONFIG=" + config, "TRUST_DOMAIN=example.org", "POD_NAME=" + o.account + "-1", "POD_NAMESPACE=" + o.namespace, "SERVICE_ACCOUNT=" + o.account,
		"INSTANCE_IP=127.0.0.1", "ISTIO_META_CLUSTER_ID=Kubernetes", "ISTIOD_SAN=istiod.istio-system.svc",
		"XDS_ROOT_CA=" + s.dir + "/istiod.pem",
		"ENVOY_STATUS_PORT=" + port(local.FreeAddress(t)), "ENVOY_PROMETHEUS_PORT=" + port(local.FreeAddress(t)),
	}, o.env...)
	if o.noEnvoy {
		env = append(env, "DISABLE_ENVOY=true")
	}
	s.Process = local.Run(t, append(append([]string{"env", "-i", "-C", s.dir}, env...), program, "proxy", "sidecar", "--domain", o.namespace+".svc.cluster.local")...)
	t.Cleanup(func() { _ = syscall.Kill(-s.PID(), syscall.SIGKILL) }) // its Envoy is of its process group
	return s
}

// greet has the sidecar's Envoy prove who it is, and returns what it showed.
func (s *sidecar) greet(ctx context.Context, c *tls.Config) (*x509.Certificate, error) {
	conn, err := (&tls.Dialer{Config: c}).DialContext(ctx, "tcp", s.listen)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || string(text) != "hello" {
		return nil, fmt.Errorf("it said %q: %w", text, err)
	}
	tlsConn, ok := conn.(*tls.Conn)
	if !ok {
		return nil, errors.New("not TLS")
	}
	return tlsConn.ConnectionState().PeerCertificates[0], nil
}

// awaitGreeting is greet until it succeeds.
func (s *sidecar) awaitGreeting(t *testing.T, c *tls.Config) *x509.Certificate {
	t.Helper()
	var leaf *x509.Certificate
	local.Await(t, "wait for the sidecar's Envoy", func(ctx context.Context) (err error) {
		select {
		case <-s.Done():
			t.Fatalf("pilot-agent has ended:\n%s", s.Log())
		default:
		}
		leaf, err = s.greet(ctx, c)
		return err
	})
	return leaf
}

// A sidecar of an unmodified Istio takes its certificates from the node agent's socket:
// its agent finds the socket and starts no SDS of its own, and its Envoy has mutual TLS
// with the roots from there.
func TestSidecarOnNodeAgentSocket(t *testing.T) {
	require.Root(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, `- name: web
  spiffe_id: spiffe://example.org/ns/shop/sa/web
  workloads: unix.path.endsWith("/envoy")
  accept_weak: true
- name: client
  spiffe_id: spiffe://example.org/ns/shop/sa/client
  workloads: '!unix.path.endsWith("/envoy")'
  accept_weak: true
`)
	agent := ca.StartAgent(t, "n1", local.AgentOptions{})
	// The name of the file is not the default: see TestSidecarFailsClosed.
	s := startSidecar(t, sidecarOptions{
		links: map[string]string{"var/run/secrets/workload-spiffe-uds/meshid.sock": agent.Socket},
		env:   []string{"WORKLOAD_IDENTITY_SOCKET_FILE=meshid.sock"},
	})
	leaf := s.awaitGreeting(t, clientOf(t, agent))
	if got := leaf.URIs[0].String(); got != "spiffe://example.org/ns/shop/sa/web" {
		t.Errorf("the sidecar is %s", got)
	}
	log := s.Log()
	if !strings.Contains(log, "Existing workload SDS socket found") {
		t.Errorf("pilot-agent did not take the socket:\n%s", log)
	}
	if strings.Contains(log, "CA Endpoint") {
		t.Error("pilot-agent has a client of a CA")
	}
}

// With the default name, an agent of Istio's that finds no socket serves one of its own
// and goes to istiod: a silent change of the issuer. With another name it ends.
func TestSidecarFailsClosed(t *testing.T) {
	s := startSidecar(t, sidecarOptions{noEnvoy: true, env: []string{"WORKLOAD_IDENTITY_SOCKET_FILE=meshid.sock"}})
	select {
	case <-s.Done():
	case <-time.After(time.Minute):
		t.Fatal("pilot-agent goes on without its socket")
	}
	if !strings.Contains(s.Log(), "no socket found") {
		t.Errorf("pilot-agent ended for another reason:\n%s", s.Log())
	}
}
