package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/csi"
	"github.com/meshid/meshid/pkg/identity"
)

const (
	defaultConfigPath  = "/etc/meshid/agent.yaml"
	defaultDataDir     = "/var/lib/meshid/agent"
	defaultSocket      = "/run/meshid/agent.sock"
	defaultAdminSocket = "/run/meshid/agent-admin.sock"
	defaultMetrics     = "127.0.0.1:9641"
	defaultDenyAfter   = 30 * time.Second
)

// settings is agent.yaml. docs/configuration.md is generated from the comments
// here.
type settings struct {
	// The trust domain of the CA, such as "example.org".
	TrustDomain string `yaml:"trust_domain"`
	// How to reach the CA, and how to know it before the first contact.
	CA struct {
		// host:port of the CA.
		Address string `yaml:"address"`
		// PEM file with the trust bundle, from `ca bundle show`.
		Bundle string `yaml:"bundle"`
		// Instead of bundle: SHA-256 of the root, from `ca bundle show -o sha256`.
		RootSHA256 string `yaml:"root_sha256"`
	} `yaml:"ca"`
	// Folder of the sealed cache; created with mode 0700.
	DataDir string `yaml:"data_dir" default:"/var/lib/meshid/agent"`
	// File with at least 16 secret bytes that seals the cache. Without it, the
	// systemd credential "sealing_key", which the unit that comes with meshid
	// makes, else a key in the kernel's keyring. That one is gone after a
	// reboot, and the node's identity with it: a machine that attested with a
	// join token needs a new token then.
	SealingKeyFile string `yaml:"sealing_key_file"`
	// Unix socket of SDS and of the Workload API, for all processes.
	Socket string `yaml:"socket" default:"/run/meshid/agent.sock"`
	// The SPIFFE Workload API.
	WorkloadAPI struct {
		// How long a program that no entry matches is held before it is
		// refused. An entry that comes meanwhile serves it in milliseconds,
		// where a client that was refused comes back after up to 30 s.
		DenyAfter config.Duration `yaml:"deny_after" default:"30s"`
	} `yaml:"workload_api"`
	// Unix socket of `node-agent status`, for root and for the agent's user.
	AdminSocket string `yaml:"admin_socket" default:"/run/meshid/agent-admin.sock"`
	// Address of /metrics, /livez and /readyz; "off" for none.
	MetricsListen string `yaml:"metrics_listen" default:"127.0.0.1:9641"`
	// How this machine proves which one it is: exactly one method.
	NodeAttestation nodeAttestation `yaml:"node_attestation"`
	// How processes are told apart. Without this section, unix.
	WorkloadAttestation workloadAttestation `yaml:"workload_attestation"`
	// A CSI driver that puts the folder of socket into pods (docs/kubernetes.md).
	// Off without this section. Settings: driver (default csi.meshid.io),
	// kubelet_dir (/var/lib/kubelet), node_name (the environment variable
	// NODE_NAME).
	CSI config.Section `yaml:"csi"`
}

// nodeAttestation has one section for each method in plugins.go.
type nodeAttestation struct {
	// A single-use token from `ca token create`. Settings: token_file.
	JoinToken config.Section `yaml:"join_token"`
	// An existing machine certificate. Settings: certificate (PEM file, leaf
	// first, with intermediates) and key (PEM file).
	X509PoP config.Section `yaml:"x509pop"`
	// The service account token of the agent's pod in Kubernetes. Settings: cluster, its
	// name in the CA's configuration, and token_file, where the projected token is
	// (/var/run/secrets/meshid/token by default).
	K8sPSAT config.Section `yaml:"k8s_psat"`
}

// methods are the sections that are there, by name.
func (n nodeAttestation) methods() (names []string) {
	for _, m := range []struct {
		name    string
		section config.Section
	}{{"join_token", n.JoinToken}, {"x509pop", n.X509PoP}, {"k8s_psat", n.K8sPSAT}} {
		if m.section.Present() {
			names = append(names, m.name)
		}
	}
	return names
}

// workloadAttestation has one section for each attestor in plugins.go.
type workloadAttestation struct {
	// User, groups and executable of the process; always on. Settings:
	// max_executable_bytes, the largest executable that is hashed.
	Unix config.Section `yaml:"unix"`
	// Container of the process. Settings: socket, of the Docker engine.
	Docker config.Section `yaml:"docker"`
	// Pod and container of the process; see docs/kubernetes.md.
	K8s config.Section `yaml:"k8s" settings:"pkg/attest/workload/k8s"`
}

// validated is what `node-agent run` works with.
type validated struct {
	settings
	trustDomain spiffeid.TrustDomain
	anchors     []*x509.Certificate
	rootSHA256  []byte
}

func loadSettings(path string) (*validated, error) {
	file, err := config.Read(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w\n  Write one (see docs/configuration.md), or name it with --config", err)
		}
		return nil, err
	}
	v := &validated{}
	if err := file.Decode(&v.settings); err != nil {
		return nil, err
	}
	for _, d := range []struct {
		field     *string
		otherwise string
	}{
		{&v.DataDir, defaultDataDir}, {&v.Socket, defaultSocket}, {&v.AdminSocket, defaultAdminSocket}, {&v.MetricsListen, defaultMetrics},
	} {
		if *d.field == "" {
			*d.field = d.otherwise
		}
	}
	if v.SealingKeyFile == "" {
		v.SealingKeyFile = sealingCredential()
	}
	return v, v.check(file)
}

// sealingCredential returns the file of the credential that seals the cache, if
// systemd has given one to this service.
func sealingCredential() string {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return ""
	}
	file := filepath.Join(dir, "sealing_key")
	if _, err := os.Lstat(file); errors.Is(err, os.ErrNotExist) { //nolint:gosec // systemd names the folder
		return ""
	}
	return file // whatever else is wrong with it is said when it is read
}

func (v *validated) check(file *config.File) error {
	var problems []error
	bad := func(path, format string, args ...any) {
		problems = append(problems, file.Errorf(path, format, args...))
	}
	td, err := identity.ParseTrustDomain(v.TrustDomain)
	switch {
	case v.TrustDomain == "":
		bad("trust_domain", "missing; write the CA's trust domain, such as trust_domain: example.org")
	case err != nil:
		bad("trust_domain", "%v", err)
	}
	v.trustDomain = td
	if v.CA.Address == "" {
		bad("ca.address", "missing; write host:port of the CA")
	} else if _, _, err := net.SplitHostPort(v.CA.Address); err != nil {
		bad("ca.address", "%q is not an address; write host:port", v.CA.Address)
	}
	switch {
	case v.CA.Bundle != "" && v.CA.RootSHA256 != "":
		bad("ca.root_sha256", "stands beside ca.bundle; write only one of them")
	case v.CA.Bundle != "":
		if v.anchors, err = readBundle(v.CA.Bundle); err != nil {
			bad("ca.bundle", "%v", err)
		}
	case v.CA.RootSHA256 != "":
		if v.rootSHA256, err = hex.DecodeString(v.CA.RootSHA256); err != nil || len(v.rootSHA256) != sha256.Size {
			bad("ca.root_sha256", "write 64 hexadecimal digits, from: ca bundle show -o sha256")
		}
	default:
		bad("ca", "nothing says which CA is the right one; write ca.bundle: PATH (from `ca bundle show`), or ca.root_sha256: HEX (from `ca bundle show -o sha256`)")
	}
	switch methods := v.NodeAttestation.methods(); {
	case len(methods) > 1:
		bad("node_attestation."+methods[1], "a machine attests in one way; write only one method")
	case len(methods) == 0:
		bad("node_attestation", "missing; write node_attestation: {join_token: {token_file: PATH}}, or x509pop, or k8s_psat")
	}
	for path, field := range map[string]*string{"data_dir": &v.DataDir, "socket": &v.Socket, "admin_socket": &v.AdminSocket} {
		if !filepath.IsAbs(*field) {
			bad(path, "%q is relative; write an absolute path", *field)
		}
	}
	for path, socket := range map[string]string{"socket": v.Socket, "admin_socket": v.AdminSocket} {
		if err := peer.CheckPath(socket); err != nil {
			bad(path, "%v", err)
		}
	}
	listeners := []cli.Listener{{Setting: "metrics_listen", Address: v.MetricsListen}, {Setting: "socket", Address: v.Socket}, {Setting: "admin_socket", Address: v.AdminSocket}}
	if c := (csi.Config{}); v.CSI.Present() && v.CSI.Decode(&c) == nil { // what is wrong in it is said by its driver
		endpoint, registration := c.Sockets()
		listeners = append([]cli.Listener{{Setting: "csi for its calls", Address: endpoint}, {Setting: "csi for its registration", Address: registration}}, listeners...)
	}
	cli.CheckListeners(listeners, bad)
	if v.CSI.Present() {
		for path, private := range map[string]string{"admin_socket": v.AdminSocket, "data_dir": v.DataDir} {
			if shared := filepath.Dir(v.Socket); private == shared || strings.HasPrefix(private, shared+"/") {
				bad(path, "is in %s, the folder of socket, which pods see whole with csi; choose another folder for one of them", shared)
			}
		}
	}
	if d := v.WorkloadAPI.DenyAfter.Or(defaultDenyAfter); d < time.Millisecond || d > 10*time.Minute {
		bad("workload_api.deny_after", "%v is out of range; write a duration from 1ms to 10m", d)
	}
	if v.MetricsListen != "off" {
		if _, _, err := net.SplitHostPort(v.MetricsListen); err != nil {
			bad("metrics_listen", "%q is not an address; write host:port, or off", v.MetricsListen)
		}
	}
	return errors.Join(problems...)
}

// maxBundleBytes is the size of the largest trust bundle that is read.
const maxBundleBytes = 1 << 20

// readBundle reads the trust bundle from a PEM file of CA certificates.
func readBundle(path string) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(io.LimitReader(f, maxBundleBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxBundleBytes {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxBundleBytes)
	}
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: holds a %s; write certificates only", path, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if !cert.IsCA {
			return nil, fmt.Errorf("%s: %s is not a CA certificate", path, cert.Subject)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%s: no certificate in it; save the output of `ca bundle show`", path)
	}
	return roots, nil
}
