// Package kube starts real Kubernetes for tests: an API server with its etcd
// (StartAPIServer, Shared; three seconds), or a whole cluster of control plane and
// nodes with pods that really run (StartCluster). It answers "what does Kubernetes
// say and do"; it knows nothing of ours. What it starts ends with the test, also
// when the test is killed. The programs are those that scripts/install-kubernetes
// builds, the versions those of test/cluster/go.mod.
package kube

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// APIServer is an etcd and a kube-apiserver, with RBAC and the Node authorizer, and
// without any controller: nobody starts a pod or fills the aggregated roles (view,
// edit, admin), and a namespace that is deleted stays Terminating. Its methods may
// be called concurrently.
type APIServer struct {
	// URL is the server's address, also after it was started again.
	URL string
	// CAFile is the root of its certificate and of its clients', PEM.
	CAFile string
	// Kubeconfig is that of an administrator.
	Kubeconfig string
	// Issuer is who issues tokens of service accounts, and their audience if none is
	// asked for. Its discovery document and keys are where OpenID Connect has them.
	Issuer string
	// Etcd and Server are the programs, for tests that kill, pause or start them
	// again; AwaitReady follows a start.
	Etcd, Server *local.Process

	dir, programs string
	authority     *authority
	client        *http.Client // the administrator's
	names         atomic.Int64 // how many names were made up
	release       func()       // gives the port back
}

const (
	// patience bounds every wait: a loaded machine is slow, and only a failure waits
	// this long.
	patience = 2 * time.Minute
	// serviceRange is that of Services; the API server's own has its first address.
	serviceRange, serviceIP = "10.96.0.0/16", "10.96.0.1"
)

// place is where an API server runs and listens.
type place struct {
	wrap       []string // stands before each program
	host, port string
	args       []string // of the API server
}

// StartAPIServer starts an API server for one test. args are more of its flags.
func StartAPIServer(t testing.TB, args ...string) *APIServer {
	t.Helper()
	s := newAPIServer(t, "")
	t.Cleanup(func() {
		s.stop()
		if s.Server != nil && (t.Failed() || os.Getenv("MESHID_LOGS") != "") {
			t.Logf("log of kube-apiserver:\n%s", s.Server.Log())
		}
	})
	s.startLoopback(t, args...)
	return s
}

var shared struct {
	mu     sync.Mutex // guards what follows
	server *APIServer
	failed bool
}

// Shared returns an API server that all tests of a package use together; each makes
// a Namespace of its own, and none stops it. It needs a TestMain that calls Main.
func Shared(t testing.TB) *APIServer {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.failed {
		t.Fatal("the API server that tests share did not start: see the first test that failed")
	}
	if shared.server == nil {
		s := newAPIServer(t, "")
		shared.failed = true // until it runs
		defer func() {
			if shared.failed {
				s.stop()
			}
		}()
		s.startLoopback(t)
		shared.server, shared.failed = s, false
	}
	return shared.server
}

// Main runs the tests of a package, and stops what they share.
func Main(m *testing.M) int {
	code := local.Main(m)
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server != nil {
		shared.server.stop()
	}
	return code
}

// newAPIServer writes the certificates into a folder that stop removes; a new one if
// it has no name.
func newAPIServer(t testing.TB, dir string) *APIServer {
	t.Helper()
	s := &APIServer{programs: require.Kubernetes(t), dir: dir}
	if dir == "" {
		var err error
		if s.dir, err = os.MkdirTemp("", "meshid-kube-"); err != nil { //nolint:usetesting // a server that is shared outlives the test
			t.Fatal(err)
		}
	}
	s.authority = newAuthority(t)
	s.CAFile = writeFile(t, filepath.Join(s.dir, "ca.crt"), certificatePEM(s.authority.certificate))
	return s
}

func (s *APIServer) startLoopback(t testing.TB, args ...string) {
	t.Helper()
	port, release := reservePort(t)
	s.release = release
	// Without an address of its own there is nothing to write into the Service.
	s.start(t, place{host: "127.0.0.1", port: port, args: append([]string{"--permit-port-sharing", "--endpoint-reconciler-type=none"}, args...)})
}

func (s *APIServer) start(t testing.TB, p place) {
	t.Helper()
	s.URL = "https://" + p.host + ":" + p.port
	s.Issuer = s.URL
	p.args = slices.DeleteFunc(slices.Clone(p.args), func(arg string) (found bool) {
		issuer, found := strings.CutPrefix(arg, "--service-account-issuer=")
		if found {
			s.Issuer = issuer // the first one in the arguments is who issues
		}
		return found
	})
	admin := s.authority.issue(t, s.dir, "admin", pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}})
	kubelet := s.authority.issue(t, s.dir, "kubelet-client", pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}})
	serving := s.authority.issue(t, s.dir, "server", pkix.Name{CommonName: "kube-apiserver"}, p.host, serviceIP, "kubernetes.default.svc", "localhost")
	s.Kubeconfig = kubeconfig(t, filepath.Join(s.dir, "admin.kubeconfig"), s.URL, s.CAFile, admin.user())
	pair, err := tls.LoadX509KeyPair(admin.cert, admin.key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.authority.certificate)
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: roots, MinVersion: tls.VersionTLS13,
	}}}

	tokenKey, err := rsa.GenerateKey(rand.Reader, 2048) // what nearly all clusters have
	if err != nil {
		t.Fatal(err)
	}
	private := writeFile(t, filepath.Join(s.dir, "service-account.key"), keyPEM(t, tokenKey))
	public := writeFile(t, filepath.Join(s.dir, "service-account.pub"), publicPEM(t, tokenKey))

	// etcd's sockets are files, which no other user of this machine can open; both
	// programs name them relative to their folder. What GODEBUG asks of our own programs,
	// such as FIPS 140, is not asked of these.
	run := func(program string, args ...string) *local.Process {
		return local.New(slices.Concat(p.wrap, []string{"env", "-u", "GODEBUG", "-C", s.dir, s.program(program)}, args)...)
	}
	s.Etcd = run("etcd", "--name=test", "--data-dir=etcd", "--unsafe-no-fsync",
		"--listen-client-urls=unix://etcd.sock", "--advertise-client-urls=unix://etcd.sock",
		"--listen-peer-urls=unix://peer.sock", "--initial-advertise-peer-urls=unix://peer.sock", "--initial-cluster=test=unix://peer.sock")
	s.Server = run("kube-apiserver", append([]string{
		"--etcd-servers=unix://etcd.sock", "--cert-dir=generated",
		"--bind-address=" + p.host, "--advertise-address=" + p.host, "--secure-port=" + p.port, "--service-cluster-ip-range=" + serviceRange,
		"--tls-cert-file=" + serving.cert, "--tls-private-key-file=" + serving.key, "--client-ca-file=" + s.CAFile,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
		"--service-account-issuer=" + s.Issuer, "--service-account-jwks-uri=" + s.URL + "/openid/v1/jwks", "--api-audiences=" + s.Issuer,
		"--service-account-signing-key-file=" + private, "--service-account-key-file=" + public,
		"--kubelet-client-certificate=" + kubelet.cert, "--kubelet-client-key=" + kubelet.key, "--kubelet-certificate-authority=" + s.CAFile,
		"--kubelet-preferred-address-types=InternalIP",
	}, p.args...)...)
	s.Etcd.Start(t)
	s.Server.Start(t)
	s.AwaitReady(t)
}

// AwaitReady waits until the API server says that it is ready.
func (s *APIServer) AwaitReady(t testing.TB) {
	t.Helper()
	ended := s.Server.Done()
	local.Await(t, "wait for the API server", func(ctx context.Context) error {
		select {
		case <-ended:
			t.Fatalf("kube-apiserver has ended:\n%s\nlog of etcd:\n%s", s.Server.Log(), s.Etcd.Log())
		default:
		}
		return s.Do(ctx, http.MethodGet, "/readyz", nil, nil)
	})
}

// stop ends both programs at once: what they hold is worth nothing any more.
func (s *APIServer) stop() {
	for _, p := range []*local.Process{s.Server, s.Etcd} {
		if p != nil {
			p.Kill()
		}
	}
	if s.release != nil {
		s.release()
	}
	_ = os.RemoveAll(s.dir) // a leftover in the temporary folder harms nobody
}

func (s *APIServer) program(name string) string { return filepath.Join(s.programs, name) }

// Kubectl runs kubectl as the administrator and returns what it prints.
func (s *APIServer) Kubectl(t testing.TB, args ...string) (string, error) {
	t.Helper()
	return s.kubectl(t, "", args...)
}

// MustKubectl is Kubectl for what cannot fail.
func (s *APIServer) MustKubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.kubectl(t, "", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply applies manifests, given as YAML.
func (s *APIServer) Apply(t testing.TB, manifests string) {
	t.Helper()
	if _, err := s.TryApply(t, manifests); err != nil {
		t.Fatal(err)
	}
}

// TryApply applies manifests, given as YAML, with more flags of kubectl apply, and
// returns what it prints.
func (s *APIServer) TryApply(t testing.TB, manifests string, flags ...string) (string, error) {
	t.Helper()
	return s.kubectl(t, manifests, append([]string{"apply", "--server-side", "-f", "-"}, flags...)...)
}

func (s *APIServer) kubectl(t testing.TB, stdin string, args ...string) (string, error) {
	t.Helper()
	env := []string{"env", "-u", "GODEBUG", "KUBECONFIG=" + s.Kubeconfig, "KUBECACHEDIR=" + filepath.Join(s.dir, "kubectl"), s.program("kubectl")}
	return execute(t.Context(), stdin, append(env, args...)...)
}

// execute runs a program and returns what it prints.
func execute(ctx context.Context, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // the arguments are the test's
	cmd.Stdin = strings.NewReader(stdin)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), err
}

// UserKubeconfig returns the kubeconfig of a user, by client certificate: what he
// may do is what RBAC gives him and his groups.
func (s *APIServer) UserKubeconfig(t testing.TB, user string, groups ...string) string {
	t.Helper()
	name := s.name("user")
	c := s.authority.issue(t, s.dir, name, pkix.Name{CommonName: user, Organization: groups})
	return kubeconfig(t, filepath.Join(s.dir, name+".kubeconfig"), s.URL, s.CAFile, c.user())
}

// TokenKubeconfig returns the kubeconfig of whoever has the token.
func (s *APIServer) TokenKubeconfig(t testing.TB, token string) string {
	t.Helper()
	return kubeconfig(t, filepath.Join(s.dir, s.name("token")+".kubeconfig"), s.URL, s.CAFile, fmt.Sprintf("{token: %q}", token))
}

// Elsewhere returns a copy of a kubeconfig of a server on this machine that names a
// server that is not there.
func Elsewhere(t testing.TB, kubeconfig string) (path string) {
	t.Helper()
	text, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	text = regexp.MustCompile(`https://127\.0\.0\.1:\d+`).ReplaceAll(text, []byte("https://"+local.FreeAddress(t)))
	path = filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, text, 0o600); err != nil { //nolint:gosec // a folder of the test's own
		t.Fatal(err)
	}
	return path
}

// name makes up a name that nothing of this server has.
func (s *APIServer) name(prefix string) string {
	return prefix + "-" + strconv.FormatInt(s.names.Add(1), 10)
}

// reservePort returns a port of the loopback address that nobody else gets until it
// is released, also while the server that shares it is down.
func reservePort(t testing.TB) (port string, release func()) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
			unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	}
	if err != nil {
		t.Fatal(err)
	}
	address, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	in4, ok := address.(*unix.SockaddrInet4)
	if !ok {
		t.Fatalf("an address of type %T", address)
	}
	return strconv.Itoa(in4.Port), func() { _ = unix.Close(fd) }
}
