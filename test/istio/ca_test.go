package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
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

// meshCA is a CA for the clients of an Istio in a cluster.
type meshCA struct {
	*local.CA
	istio string // its address for them
	port  string
}

// startMeshCA starts one with the entries of docs/istio.md, and with no more rights in the
// cluster than it says there.
func startMeshCA(t *testing.T, s *kube.APIServer, more string) *meshCA {
	t.Helper()
	account := kube.Pod{Namespace: "mesh-ca", ServiceAccount: "ca"}
	s.Account(t, account.Namespace, account.ServiceAccount)
	s.Account(t, "istio-system", "istiod-service-account")
	s.Apply(t, require.Example(t, "istio.md", "yaml file=rbac.yaml"))
	address := local.FreeAddress(t)
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	// istio-agent asks for istiod's name if the CA's is localhost.
	c := &meshCA{istio: address, port: port, CA: local.StartCA(t, local.CAOptions{Config: fmt.Sprintf(`kubernetes:
  clusters:
    - {name: prod, kubeconfig: %s}
istio:
  listen: '%s'
  dns_names: [ca.mesh-ca.svc, istiod.istio-system.svc]
  node_proxies: [istio-system/ztunnel]
%s`, s.TokenKubeconfig(t, s.Token(t, account, time.Hour)), address, more)})}
	c.Apply(t, require.Example(t, "istio.md", "yaml file=entries.yaml"))
	return c
}

// A sidecar of an unmodified Istio takes its certificates from the CA, with the token of
// its pod, and its Envoy has mutual TLS with them. The pod's end is the end of its token.
func TestSidecarOnCA(t *testing.T) {
	s := kube.Shared(t)
	ca := startMeshCA(t, s, "")
	namespace := s.Namespace(t)
	pod := s.CreatePod(t, kube.Pod{Namespace: namespace, Name: "web-1", ServiceAccount: "web", Node: "n1"})
	other := kube.Pod{Namespace: namespace, Name: "client-1", ServiceAccount: "client", Node: "n2"}
	roots := ca.MustCommand(t, "bundle", "show")
	identity := ca.certificateOf(t, s, other)
	web := startSidecar(t, sidecarOptions{
		files: map[string]string{
			"var/run/secrets/tokens/istio-token":  s.Token(t, pod, time.Hour, "istio-ca"),
			"var/run/secrets/istio/root-cert.pem": roots,
		},
		env: []string{"CA_ADDR=localhost:" + ca.port}, namespace: namespace, account: "web",
	})
	leaf := web.awaitGreeting(t, meshClient(identity, roots))
	if got, want := leaf.URIs[0].String(), "spiffe://example.org/ns/"+namespace+"/sa/web"; got != want {
		t.Errorf("the sidecar is %s, want %s", got, want)
	}
	records := ca.MustCommand(t, "ledger", "tail", "-o", "json", "--dir", filepath.Join(ca.DataDir, "ledger"))
	if !strings.Contains(records, pod.UID) || !strings.Contains(records, `"ca"`) {
		t.Errorf("the ledger has no record of it:\n%s", records)
	}

	token := s.Token(t, pod, time.Hour, "istio-ca")
	s.DeletePod(t, pod)
	again := startSidecar(t, sidecarOptions{
		files:   map[string]string{"var/run/secrets/tokens/istio-token": token, "var/run/secrets/istio/root-cert.pem": roots, "out/empty": ""},
		env:     []string{"CA_ADDR=localhost:" + ca.port, "OUTPUT_CERTS=out"},
		noEnvoy: true, namespace: namespace, account: "web",
	})
	local.Await(t, "wait for the refusal", func(context.Context) error {
		if !strings.Contains(again.Log(), "code = Unauthenticated") {
			return fmt.Errorf("no refusal yet:\n%s", again.Log())
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join(again.dir, "out", "key.pem")); err == nil {
		t.Error("a deleted pod has got a certificate")
	}
}

// awaitCertificate waits until the agent has written its certificate.
func (s *sidecar) awaitCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	var certificate tls.Certificate
	local.Await(t, "wait for the sidecar's certificate", func(context.Context) (err error) {
		select {
		case <-s.Done():
			t.Fatalf("pilot-agent has ended:\n%s", s.Log())
		default:
		}
		certificate, err = tls.LoadX509KeyPair(filepath.Join(s.dir, "out", "cert-chain.pem"), filepath.Join(s.dir, "out", "key.pem"))
		return err
	})
	return certificate
}

// The CA keeps what istiod keeps only while it is the CA itself: the roots in the
// namespaces, and the control plane's own certificate.
func TestControlPlane(t *testing.T) {
	s := kube.Shared(t)
	previous := newIstiod(t, "1").roots
	path := filepath.Join(t.TempDir(), "previous.pem")
	if err := os.WriteFile(path, []byte(previous), 0o600); err != nil {
		t.Fatal(err)
	}
	namespace := s.Namespace(t)
	ca := startMeshCA(t, s, fmt.Sprintf(`  previous_roots: %s
  clusters:
    - name: prod
      roots: {keep: true}
      istiod: {keep: true}
`, path))
	local.Await(t, "wait for the roots", func(ctx context.Context) error {
		c := new(configMap)
		err := s.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/configmaps/istio-ca-root-cert", nil, c)
		if text := c.Data["root-cert.pem"]; err == nil && (!strings.Contains(text, strings.TrimSpace(previous)) || strings.Count(text, "BEGIN CERTIFICATE") != 2) {
			err = fmt.Errorf("it has not both roots: %s", text)
		}
		return err
	})
	at := "/api/v1/namespaces/istio-system/secrets/istiod-tls"
	await := func(serial string) string {
		local.Await(t, "wait for the control plane's certificate", func(ctx context.Context) error {
			var secret struct {
				Data map[string][]byte `json:"data"`
			}
			if err := s.Do(ctx, http.MethodGet, at, nil, &secret); err != nil {
				return err
			}
			pair, err := tls.X509KeyPair(secret.Data["tls.crt"], secret.Data["tls.key"])
			if err != nil {
				return err
			}
			leaf, err := x509.ParseCertificate(pair.Certificate[0])
			if err != nil {
				return err
			}
			if leaf.SerialNumber.String() == serial {
				return fmt.Errorf("it is still the one before")
			}
			if err := leaf.VerifyHostname("istiod-canary.istio-system.svc"); err != nil {
				return err
			}
			serial = leaf.SerialNumber.String()
			return nil
		})
		return serial
	}
	first := await("")
	if err := s.Do(t.Context(), http.MethodPatch, at, object{"data": object{"tls.crt": "ZXZpbA=="}}, nil); err != nil {
		t.Fatal(err)
	}
	second := await(first)
	if err := s.Do(t.Context(), http.MethodDelete, at, nil, nil); err != nil {
		t.Fatal(err)
	}
	third := await(second)

	// Without its entry there is none, and the status says so.
	ca.MustCommand(t, "entry", "delete", "istiod")
	if err := s.Do(t.Context(), http.MethodDelete, at, nil, nil); err != nil {
		t.Fatal(err)
	}
	local.Await(t, "wait for the condition", func(context.Context) error {
		out, err := ca.Command(t, "status")
		if !strings.Contains(out, "is there an entry for spiffe://example.org/ns/istio-system/sa/istiod-service-account") {
			return errors.Join(fmt.Errorf("the status is\n%s", out), err)
		}
		return nil
	})
	ca.Apply(t, require.Example(t, "istio.md", "yaml file=entries.yaml"))
	await(third)
}

// The commands of docs/istio.md that put both roots into what Istio's CA gives out.
func TestMoveCommands(t *testing.T) {
	s := kube.Shared(t)
	ca := startMeshCA(t, s, "")
	old := newIstiod(t, "1")
	key, err := x509.MarshalECPrivateKey(old.key)
	if err != nil {
		t.Fatal(err)
	}
	const secrets = "/api/v1/namespaces/istio-system/secrets"
	t.Cleanup(func() {
		for _, name := range []string{"istio-ca-secret", "cacerts"} {
			_ = s.Do(context.Background(), http.MethodDelete, secrets+"/"+name, nil, nil) // it may not be there
		}
	})
	if err := s.Do(t.Context(), http.MethodPost, secrets, object{
		"metadata": object{"name": "istio-ca-secret"},
		"data":     object{"ca-cert.pem": []byte(old.roots), "ca-key.pem": []byte(encode("EC PRIVATE KEY", key))},
	}, nil); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-euc", require.Example(t, "istio.md", "sh move"))
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig, "MESHID_ADMIN_SOCKET="+ca.AdminSocket,
		"PATH="+local.Binaries(t)+":"+require.Kubernetes(t)+":"+os.Getenv("PATH"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var cacerts struct {
		Data map[string][]byte `json:"data"`
	}
	if err := s.Do(t.Context(), http.MethodGet, secrets+"/cacerts", nil, &cacerts); err != nil {
		t.Fatal(err)
	}
	if got, want := string(cacerts.Data["root-cert.pem"]), old.roots+ca.MustCommand(t, "bundle", "show"); got != want {
		t.Errorf("the roots are\n%s\nwant\n%s", got, want)
	}
	if _, err := tls.X509KeyPair(cacerts.Data["ca-cert.pem"], cacerts.Data["ca-key.pem"]); err != nil {
		t.Error(err)
	}
}
