// Package mesh runs a whole mesh on one machine: the CA, a node agent, and a
// shop of Docker containers in which every service has a real Envoy beside it.
// It answers "start it, change it, what does it count". `make up`, `make demo`
// and the end-to-end tests are built on it; it knows the programs only from
// outside, as their operators do.
//
// Start goes through these steps, in this order:
//
//  1. images: the shop's static program and Envoy with its libraries (images.go)
//  2. ca run, with nothing configured but the trust domain and where to listen
//  3. ca token create, node-agent run: the machine joins
//  4. ca entry apply: who may be what
//  5. a network, and for each instance two containers: the application, and the
//     sidecar in the application's network (shop.go)
package mesh

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/shop/engine"
)

// Label is on every container and network that is made here; its value is the
// run that they belong to.
const Label = "meshid.shop"

// Config says how a mesh is started.
type Config struct {
	// Dir holds everything that the mesh writes; its path must be short, since
	// a Unix socket's path has at most 107 bytes.
	Dir string
	// Bin is the folder of the programs ca, node-agent and shop.
	Bin string
	// Envoy is the path of the Envoy program.
	Envoy  string
	Engine *engine.Engine
	// Entries is a file of registration entries. In it, SIDECAR_IMAGE_DIGEST
	// stands for the digest of the sidecar's image, which is known only once it
	// is built.
	Entries     string
	TrustDomain string
	// SDS is SDSDelta (default) or SDSStateOfTheWorld.
	SDS string
	// Rate is how many requests per second the customer sends.
	Rate int
	// RequestsPerConnection is after how many requests a connection between
	// sidecars is closed; 0 means that it is kept.
	RequestsPerConnection int
	// ExtraCA is appended to the CA's configuration file.
	ExtraCA string
	// RunCA and RunAgent are put before the command lines of the two programs,
	// for a test that runs them under something.
	RunCA, RunAgent []string
	// Progress is told what is being done; nil means nobody.
	Progress func(format string, args ...any)
}

// Mesh is a mesh that runs. Its methods are called from one goroutine, except
// for Figures and Instances' own methods.
type Mesh struct {
	Config
	Run   string
	CA    *Process
	Agent *Process
	Admin adminv1.AdminServiceClient
	// Console makes links to the console, if ExtraCA has one.
	Console adminv1.ConsoleServiceClient

	conn          *grpc.ClientConn
	caAddress     string
	appDigest     string
	sidecarDigest string
	shop          shop
	closed        bool
}

// Start starts the CA and the node agent, and applies the entries; Open opens
// the shop. The caller closes the mesh, also after an error if it is not nil.
func Start(ctx context.Context, c Config) (*Mesh, error) {
	if c.Progress == nil {
		c.Progress = func(string, ...any) {}
	}
	if c.SDS == "" {
		c.SDS = SDSDelta
	}
	if c.TrustDomain == "" {
		c.TrustDomain = "shop.example"
	}
	if c.Rate == 0 {
		c.Rate = 20
	}
	var random [3]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	m := &Mesh{Config: c, Run: "shop-" + hex.EncodeToString(random[:])}
	for _, step := range []func(context.Context) error{m.loadImages, m.startCA, m.startAgent, m.applyEntries} {
		if err := step(ctx); err != nil {
			return m, err
		}
	}
	return m, nil
}

// Close ends everything that the mesh has started, newest first.
func (m *Mesh) Close() error {
	if m.closed {
		return nil
	}
	m.closed = true
	// The end must also come when the caller's time is over.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	errs := []error{m.Engine.Sweep(ctx, Label+"="+m.Run), m.Agent.Stop()}
	if m.conn != nil {
		errs = append(errs, m.conn.Close())
	}
	return errors.Join(append(errs, m.CA.Stop())...)
}

func (m *Mesh) path(parts ...string) string {
	return filepath.Join(append([]string{m.Dir}, parts...)...)
}

// AdminSocket is the CA's admin socket, for `ca --admin-socket`.
func (m *Mesh) AdminSocket() string { return m.path("ca", "admin.sock") }

// AgentSocket is where the node agent serves SDS and the Workload API.
func (m *Mesh) AgentSocket() string { return m.path("agent", "run", "agent.sock") }

// AgentAdminSocket is where the node agent answers its own commands.
func (m *Mesh) AgentAdminSocket() string { return m.path("agent", "admin.sock") }

// DataDir is where the CA keeps its database, its keys and its ledger.
func (m *Mesh) DataDir() string { return m.path("ca", "data") }

// CACommand runs one of ca's commands against the running CA.
func (m *Mesh) CACommand(ctx context.Context, args ...string) ([]byte, error) {
	return run(ctx, append(append([]string{filepath.Join(m.Bin, "ca")}, args...), "--admin-socket", m.AdminSocket())...)
}

// LedgerCommand runs one of `ca ledger`'s commands over the CA's journal, whether
// the CA runs or not.
func (m *Mesh) LedgerCommand(ctx context.Context, args ...string) ([]byte, error) {
	return run(ctx, append(append([]string{filepath.Join(m.Bin, "ca"), "ledger"}, args...), "--config", m.path("ca", "ca.yaml"))...)
}

// ID returns the SPIFFE ID of a service of the shop.
func (m *Mesh) ID(service string) string { return "spiffe://" + m.TrustDomain + "/app/" + service }

// NodeID returns the SPIFFE ID of the machine.
func (m *Mesh) NodeID() string {
	return "spiffe://" + m.TrustDomain + "/meshid/node/join_token/" + nodeName
}

const nodeName = "this-machine"

func (m *Mesh) startCA(ctx context.Context) error {
	for _, d := range []string{"ca", "agent", "logs", "services"} {
		if err := os.MkdirAll(m.path(d), 0o700); err != nil {
			return err
		}
	}
	address, err := freeAddress(ctx)
	if err != nil {
		return err
	}
	metrics, err := freeAddress(ctx)
	if err != nil {
		return err
	}
	m.caAddress = address
	config := fmt.Sprintf(`# The CA of the shop: everything else is the default.
trust_domain: %s
data_dir: %s
listen: %s
admin_socket: %s
metrics_listen: %s
%s`, m.TrustDomain, m.DataDir(), address, m.AdminSocket(), metrics, m.ExtraCA)
	if err := os.WriteFile(m.path("ca", "ca.yaml"), []byte(config), 0o600); err != nil {
		return err
	}
	m.CA = newProcess("ca", m.path("logs"), slices.Concat(m.RunCA, []string{filepath.Join(m.Bin, "ca"), "run", "--config", m.path("ca", "ca.yaml")})...)
	m.Progress("starting the CA of trust domain %s", m.TrustDomain)
	if err := m.CA.Start(); err != nil {
		return err
	}
	m.conn, err = grpc.NewClient("unix:"+m.AdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	m.Admin, m.Console = adminv1.NewAdminServiceClient(m.conn), adminv1.NewConsoleServiceClient(m.conn)
	return m.AwaitCA(ctx)
}

// AwaitCA waits until the CA answers.
func (m *Mesh) AwaitCA(ctx context.Context) error {
	return m.await(ctx, "the CA", m.CA, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		_, err := m.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{}, grpc.WaitForReady(true))
		return err
	})
}

// await waits for something of one of our processes, and gives up as soon as
// that has ended.
func (m *Mesh) await(ctx context.Context, what string, p *Process, done func(context.Context) error) error {
	return Await(ctx, what, time.Minute, func(ctx context.Context) error {
		select {
		case <-p.Ended():
			return &finalError{fmt.Errorf("%s ended: %s", p.name, p.Tail())}
		default:
			return done(ctx)
		}
	})
}

func (m *Mesh) startAgent(ctx context.Context) error {
	token, err := m.CACommand(ctx, "token", "create", "--node", nodeName, "--ttl", "10m")
	if err != nil {
		return err
	}
	bundle, err := m.CACommand(ctx, "bundle", "show")
	if err != nil {
		return err
	}
	metrics, err := freeAddress(ctx)
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`# The node agent of this machine.
trust_domain: %s
ca:
  address: %s
  bundle: %s
data_dir: %s
socket: %s
admin_socket: %s
metrics_listen: %s
node_attestation:
  join_token: { token_file: %s }
workload_attestation:
  unix: {}
  docker: { socket: %s }
`, m.TrustDomain, m.caAddress, m.path("agent", "bundle.pem"), m.path("agent", "data"), m.AgentSocket(),
		m.AgentAdminSocket(), metrics, m.path("agent", "token"), m.Engine.Socket)
	for name, text := range map[string][]byte{
		"token": bytes.TrimSpace(token), "bundle.pem": bundle, "agent.yaml": []byte(config),
	} {
		if err := os.WriteFile(m.path("agent", name), text, 0o600); err != nil {
			return err
		}
	}
	// The folder is mounted into sidecars, which run as another user.
	if err := os.MkdirAll(m.path("agent", "run"), 0o755); err != nil { //nolint:gosec // see above
		return err
	}
	m.Agent = newProcess("node-agent", m.path("logs"), slices.Concat(m.RunAgent, []string{filepath.Join(m.Bin, "node-agent"), "run", "--config", m.path("agent", "agent.yaml")})...)
	m.Progress("joining this machine with a one-time token")
	if err := m.Agent.Start(); err != nil {
		return err
	}
	return m.AwaitAgent(ctx)
}

// AwaitAgent waits until the CA has a stream to the node agent of this machine.
func (m *Mesh) AwaitAgent(ctx context.Context) error {
	return m.await(ctx, "the node agent", m.Agent, m.connected)
}

func (m *Mesh) connected(ctx context.Context) error {
	nodes, err := m.Admin.ListNodes(ctx, &adminv1.ListNodesRequest{})
	if err != nil {
		return err
	}
	for _, n := range nodes.GetNodes() {
		if n.GetId() == m.NodeID() && n.GetConnected() {
			return nil
		}
	}
	return fmt.Errorf("node %s is not connected", m.NodeID())
}

// AwaitNode waits for a time until the CA has a stream to the node agent.
func (m *Mesh) AwaitNode(ctx context.Context, within time.Duration) error {
	return Await(ctx, "the node agent", within, m.connected)
}

func (m *Mesh) applyEntries(ctx context.Context) error {
	text, err := os.ReadFile(m.Entries)
	if err != nil {
		return err
	}
	text = bytes.ReplaceAll(text, []byte("SIDECAR_IMAGE_DIGEST"), []byte(strings.TrimPrefix(m.sidecarDigest, "sha256:")))
	text = bytes.ReplaceAll(text, []byte("spiffe://shop.example/"), []byte("spiffe://"+m.TrustDomain+"/"))
	if err := os.WriteFile(m.path("entries.yaml"), text, 0o600); err != nil { //nolint:gosec // our own folder
		return err
	}
	m.Progress("applying the registration entries of %s", m.Entries)
	return m.ApplyEntries(ctx)
}

// ApplyEntries applies the mesh's entries, again if need be.
func (m *Mesh) ApplyEntries(ctx context.Context) error {
	_, err := m.CACommand(ctx, "entry", "apply", "-f", m.path("entries.yaml"))
	return err
}

func freeAddress(ctx context.Context) (string, error) {
	var c net.ListenConfig
	l, err := c.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
