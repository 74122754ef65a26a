package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/agent"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// The bootstraps, as small as they can be while all that matters is as in
// deploy/envoy. A server answers every caller of the trust domain by itself; a
// client has one listener whose connections to the server last for one request,
// and one whose connections are kept.
const (
	sdsConfig = `{resource_api_version: V3, initial_fetch_timeout: 0s, api_config_source: {api_type: GRPC, transport_api_version: V3, set_node_on_first_message_only: true, grpc_services: [{envoy_grpc: {cluster_name: node_agent}}]}}`

	tlsContext = `common_tls_context: {tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}, tls_certificate_sds_secret_configs: [{name: default, sds_config: ` + sdsConfig + `}], combined_validation_context: {default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://example.org/"}}]}, validation_context_sds_secret_config: {name: ROOTCA, sds_config: ` + sdsConfig + `}}}`

	agentCluster = `
  - name: node_agent
    type: STATIC
    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}
    load_assignment: {cluster_name: node_agent, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: SOCKET}}}}]}]}`

	connectionManager = `{name: envoy.filters.network.http_connection_manager, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: http, http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}], route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: "/"}, ACTION}]}]}}}`

	serverBootstrap = `node: {id: server, cluster: bench}
static_resources:
  clusters:` + agentCluster + `
  listeners:
  - name: server
    address: {socket_address: {address: 127.0.0.1, port_value: SERVER}}
    filter_chains:
    - transport_socket: {name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, require_client_certificate: true, disable_stateless_session_resumption: true, disable_stateful_session_resumption: true, ` + tlsContext + `}}
      filters: [CM_SERVER]
`

	clientBootstrap = `node: {id: client, cluster: bench}
static_resources:
  clusters:` + agentCluster + `
  - name: once
    type: STATIC
    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: {max_requests_per_connection: 1}, explicit_http_config: {http_protocol_options: {}}}}
    load_assignment: {cluster_name: once, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: SERVER}}}}]}]}
    transport_socket: {name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, max_session_keys: 0, ` + tlsContext + `}}
  - name: kept
    type: STATIC
    load_assignment: {cluster_name: kept, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: SERVER}}}}]}]}
    transport_socket: {name: tls, typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, max_session_keys: 0, ` + tlsContext + `}}
  listeners:
  - {name: once, address: {socket_address: {address: 127.0.0.1, port_value: ONCE}}, filter_chains: [{filters: [CM_ONCE]}]}
  - {name: kept, address: {socket_address: {address: 127.0.0.1, port_value: KEPT}}, filter_chains: [{filters: [CM_KEPT]}]}
`
)

// startEnvoy starts an Envoy with a bootstrap in which words are replaced.
func startEnvoy(b testing.TB, uid uint32, bootstrap string, words ...string) *local.Process {
	b.Helper()
	words = append(words,
		"CM_SERVER", strings.Replace(connectionManager, "ACTION", "direct_response: {status: 200, body: {inline_string: ok}}", 1),
		"CM_ONCE", strings.Replace(connectionManager, "ACTION", "route: {cluster: once}", 1),
		"CM_KEPT", strings.Replace(connectionManager, "ACTION", "route: {cluster: kept}", 1))
	path := filepath.Join(b.TempDir(), "envoy.yaml")
	must(b, os.WriteFile(path, []byte(strings.NewReplacer(words...).Replace(bootstrap)), 0o600))
	// setpriv changes the user before Envoy runs, so that each is an instance.
	return local.Run(b, require.Program(b, "setpriv"), fmt.Sprint("--reuid=", uid), fmt.Sprint("--regid=", uid), "--clear-groups", "--inh-caps=-all",
		require.Envoy(b), "--config-yaml", read(b, path), "--use-dynamic-base-id", "--log-level", "error", "--concurrency", "2")
}

func read(b testing.TB, path string) string {
	b.Helper()
	text, err := os.ReadFile(path)
	must(b, err)
	return string(text)
}

// tap stands between an Envoy and the agent and notes when Envoy sends: its DATA
// frames after the first are acknowledgements. The agent sees this process.
type tap struct {
	socket string
	sent   chan time.Time
}

func newTap(b testing.TB, agentSocket string) *tap {
	b.Helper()
	dir, err := os.MkdirTemp("", "tap") //nolint:usetesting // short, for a socket
	must(b, err)
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(b, os.Chmod(dir, 0o755)) // Envoy is another user
	t := &tap{socket: filepath.Join(dir, "s"), sent: make(chan time.Time, 1024)}
	l, err := (&net.ListenConfig{}).Listen(b.Context(), "unix", t.socket)
	must(b, err)
	must(b, os.Chmod(t.socket, 0o666)) // as above
	b.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			envoy, err := l.Accept()
			if err != nil {
				return
			}
			agent, err := (&net.Dialer{}).DialContext(b.Context(), "unix", agentSocket)
			if err != nil {
				_ = envoy.Close()
				return
			}
			var both sync.WaitGroup
			both.Go(func() { _, _ = io.Copy(envoy, agent); _ = envoy.Close() })
			both.Go(func() { t.forward(agent, envoy); _ = agent.Close() })
		}
	}()
	return t
}

// forward copies what Envoy sends and notes its DATA frames.
func (t *tap) forward(to io.Writer, from io.Reader) {
	preface := make([]byte, 24)
	if _, err := io.ReadFull(from, preface); err != nil {
		return
	}
	if _, err := to.Write(preface); err != nil {
		return
	}
	for {
		header := make([]byte, 9)
		if _, err := io.ReadFull(from, header); err != nil {
			return
		}
		frame := append(header, make([]byte, int(header[0])<<16|int(header[1])<<8|int(header[2]))...)
		if _, err := io.ReadFull(from, frame[9:]); err != nil {
			return
		}
		if _, err := to.Write(frame); err != nil {
			return
		}
		if frame[3] == 0 && len(frame) < 4<<10 { // DATA, and without Envoy's node
			t.sent <- time.Now()
		}
	}
}

// BenchmarkApplyToEnvoy reports how long it takes from the call that applies an
// entry until a real Envoy that waits for its certificate has acknowledged it.
func BenchmarkApplyToEnvoy(b *testing.B) {
	ca, a := pair(b)
	t := newTap(b, a.Socket)
	bootstrap := strings.Replace(serverBootstrap, `combined_validation_context: {default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://example.org/"}}]}, validation_context_sds_secret_config: {name: ROOTCA, sds_config: `+sdsConfig+`}}`, "alpn_protocols: [h2]", 1)
	startEnvoy(b, firstUser, bootstrap, "SOCKET", t.socket, "SERVER", port(b))
	awaitStatus(b, a, "Envoy", func(s *agent.Status) bool { return s.Streams == 1 })
	entry := &entryv1.Entry{Name: "me", SpiffeId: "spiffe://example.org/me", Workloads: "unix.uid == 0"}
	acked := func() time.Time {
		select {
		case at := <-t.sent:
			return at
		case <-time.After(time.Minute):
			b.Fatal("Envoy acknowledges nothing")
			return time.Time{}
		}
	}
	one := func() time.Duration {
		for len(t.sent) > 0 {
			<-t.sent
		}
		began := time.Now()
		apply(b, ca, entry)
		took := acked().Sub(began)
		remove(b, ca, entry.GetName())
		acked() // of what withdraws it
		awaitStatus(b, a, "the end of the entry", func(s *agent.Status) bool { return s.Entries == 1 })
		return took
	}
	one()
	var waits []time.Duration
	for b.Loop() {
		for range 50 {
			waits = append(waits, one())
		}
	}
	quantiles(b, waits)
}

// port returns a free port.
func port(b testing.TB) string {
	b.Helper()
	_, p, err := net.SplitHostPort(local.FreeAddress(b))
	must(b, err)
	return p
}

// BenchmarkRotationsUnderLoad reports how many requests between two real Envoys
// fail while the certificates of both are replaced ten times a second, with a
// connection for each request and with connections that are kept.
func BenchmarkRotationsUnderLoad(b *testing.B) {
	ca, a := pair(b)
	ports := []string{"SOCKET", a.Socket, "SERVER", port(b), "ONCE", port(b), "KEPT", port(b)}
	server := startEnvoy(b, firstUser, serverBootstrap, ports...)
	client := startEnvoy(b, firstUser+1, clientBootstrap, ports...)
	for _, p := range []string{ports[5], ports[7]} {
		local.Await(b, "wait for the Envoys", func(ctx context.Context) error { return get(ctx, http.DefaultClient, p) })
	}
	rotations := 0
	var requests, failures int64
	for b.Loop() {
		stop := load(b, 8, ports[5], ports[7])
		tick := time.NewTicker(100 * time.Millisecond)
		for range 50 {
			<-tick.C
			_, err := ca.Admin.RenewSVIDs(b.Context(), &adminv1.RenewSVIDsRequest{Within: durationpb.New(time.Millisecond)})
			must(b, err)
			rotations++
		}
		tick.Stop()
		made, failed := stop()
		requests, failures = requests+made, failures+failed
	}
	b.ReportMetric(float64(requests), "requests")
	b.ReportMetric(float64(failures), "failed")
	b.ReportMetric(float64(rotations), "rotations")
	only(b)
	for _, e := range []*local.Process{client, server} {
		if err := syscall.Kill(e.PID(), 0); err != nil {
			b.Errorf("an Envoy has ended: %s", e.Log())
		}
	}
}
