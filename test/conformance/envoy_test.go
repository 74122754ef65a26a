package conformance

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

// proxy is a real Envoy whose listener has its secrets from an agent, demands
// an X.509-SVID of the trust domain, and answers with who it took the caller for.
type proxy struct {
	address string
	id      spiffeid.ID
	bundle  *x509bundle.Bundle
	process *local.Process
}

const envoyConfig = `
static_resources:
  clusters:
  - name: agent
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: agent
      endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[1]s}}}}]}]
  listeners:
  - name: inbound
    address: {socket_address: {address: 127.0.0.1, port_value: %[2]s}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          disable_stateless_session_resumption: true
          disable_stateful_session_resumption: true
          common_tls_context:
            tls_params: {signature_algorithms: [ecdsa_secp256r1_sha256, ecdsa_secp384r1_sha384, rsa_pss_rsae_sha256, ed25519]} # the last is off by default
            tls_certificate_sds_secret_configs: [{name: default, sds_config: &agent {resource_api_version: V3, initial_fetch_timeout: 0s, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: agent}}]}}}]
            combined_validation_context:
              default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://example.org/"}}]}
              validation_context_sds_secret_config: {name: ROOTCA, sds_config: *agent}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: inbound
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 200, body: {inline_string: served}}, response_headers_to_add: [{header: {key: x-peer, value: "%%DOWNSTREAM_PEER_URI_SAN%%"}}]}]}]
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
`

// theProxy is the Envoy that tests share.
var theProxy struct {
	once  sync.Once
	proxy proxy
}

// envoy returns an Envoy at the shared world's agent, which serves.
func envoy(t *testing.T) *proxy {
	t.Helper()
	w := shared(t)
	p := &theProxy.proxy
	// Envoy runs as root does, so it is told apart by its file.
	binary, err := filepath.EvalSymlinks(require.Envoy(t))
	if err != nil {
		t.Fatal(err)
	}
	theProxy.once.Do(func() {
		e := entry("envoy", 0)
		e.Workloads = fmt.Sprintf("unix.uid == 0 && unix.path == %q", binary)
		p.address, p.id, p.bundle = local.FreeAddress(t), spiffeid.RequireFromString(e.GetSpiffeId()), bundleOf(t, w.ca)
		if _, err := w.ca.Admin.ApplyEntries(t.Context(), &adminv1.ApplyEntriesRequest{Entries: []*entryv1.Entry{e}}); err != nil {
			t.Fatal(err)
		}
		_, port, _ := strings.Cut(p.address, ":")
		config := filepath.Join(w.agent.Dir, "envoy.yaml")
		if err := os.WriteFile(config, fmt.Appendf(nil, envoyConfig, w.agent.Socket, port), 0o600); err != nil {
			t.Fatal(err)
		}
		common.keeper.try(func() {
			p.process = local.Run(common.keeper, binary, "--config-path", config, "--service-node", "n", "--service-cluster", "c",
				"--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
		})
	})
	if p.process == nil {
		t.Fatal("envoy was not started")
	}
	uid := newUser()
	w.apply(t, entry(fmt.Sprintf("envoy-client-%d", uid), uid))
	good := w.as(t, uid).context(t).DefaultSVID()
	local.Await(t, "envoy serves", func(ctx context.Context) error {
		select {
		case <-p.process.Done():
			t.Fatalf("envoy has ended:\n%s", tail(p.process.Log()))
		default:
		}
		_, err := p.ask(ctx, good)
		return err
	})
	return p
}

// ask makes a request with the certificate, and returns whom Envoy saw.
func (p *proxy) ask(ctx context.Context, svid *x509svid.SVID) (string, error) {
	config := tlsconfig.MTLSClientConfig(svid, p.bundle, tlsconfig.AuthorizeID(p.id))
	config.MinVersion = tls.VersionTLS13
	transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.address+"/", http.NoBody)
	if err != nil {
		return "", err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	return res.Header.Get("X-Peer"), res.Body.Close()
}

// shown is an identity as somebody shows it who may have made it himself.
func shown(key crypto.Signer, chain ...*x509.Certificate) *x509svid.SVID {
	return &x509svid.SVID{ID: spiffeid.RequireFromString("spiffe://" + td + "/shown"), Certificates: chain, PrivateKey: key}
}
