package istio

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"                     // in the listener
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3" // in the listener
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"                   // in the listener
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/goccy/go-yaml"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	istiov1 "github.com/meshid/meshid/proto/istio/v1"
)

// istiod stands for Istio's control plane: it tells a sidecar of one listener, which has
// mutual TLS as Istio configures it, and of nothing else; and it is a CA as istiod is one,
// which signs whatever name it is asked for.
type istiod struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	istiov1.UnimplementedIstioCertificateServiceServer
	t *testing.T
	// root is that of its certificate and of those that it signs, roots what it gives out
	// with them, PEM.
	root     *x509.Certificate
	key      *ecdsa.PrivateKey
	roots    string
	listener *anypb.Any
	nonces   atomic.Uint64
	// life is that of its certificates.
	life time.Duration
}

// inbound is what Istio sends: its names of the SDS cluster and of the secrets, the
// combined context, state of the world.
const inbound = `{name: inbound, address: {socket_address: {address: 127.0.0.1, port_value: %[1]s}},
  filter_chains: [{
    filters: [{name: envoy.filters.network.http_connection_manager, typed_config: {
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: inbound,
      route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 200, body: {inline_string: hello}}}]}]},
      http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}}],
    transport_socket: {name: envoy.transport_sockets.tls, typed_config: {
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, require_client_certificate: true,
      common_tls_context: {
        tls_certificate_sds_secret_configs: [{name: default, sds_config: %[2]s}],
        combined_validation_context: {
          default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://example.org/"}}]},
          validation_context_sds_secret_config: {name: ROOTCA, sds_config: %[2]s}}}}}}]}`

const sdsConfig = `{initial_fetch_timeout: 0s, resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3,
  set_node_on_first_message_only: true, grpc_services: [{envoy_grpc: {cluster_name: sds-grpc}}]}}`

// newIstiod makes one; port is where sidecars are to listen.
func newIstiod(t *testing.T, port string) *istiod {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := yaml.YAMLToJSON(fmt.Appendf(nil, inbound, port, sdsConfig))
	must(err)
	listener := new(listenerv3.Listener)
	must(protojson.Unmarshal(text, listener))
	i := &istiod{t: t, life: time.Hour}
	i.listener, err = anypb.New(listener)
	must(err)
	i.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		Subject: pkix.Name{Organization: []string{"cluster.local"}}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, i.key.Public(), i.key)
	must(err)
	i.root, err = x509.ParseCertificate(der)
	must(err)
	i.roots = encode("CERTIFICATE", der)
	return i
}

// issue signs a certificate for a public key and a name: a SPIFFE ID, or a DNS name.
func (i *istiod) issue(public crypto.PublicKey, name string) []byte {
	i.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(i.nonces.Add(1)) + 1), NotBefore: time.Now().Add(-2 * time.Second), NotAfter: time.Now().Add(i.life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	if u, err := url.Parse(name); err == nil && u.Scheme != "" {
		template.URIs = []*url.URL{u}
	} else {
		template.DNSNames = []string{name}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.root, public, i.key)
	if err != nil {
		i.t.Error(err)
	}
	return der
}

// certificate is one with a key of its own.
func (i *istiod) certificate(name string) tls.Certificate {
	i.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{i.issue(key.Public(), name)}, PrivateKey: key}
}

// serve serves at an address until stop is called, or the test ends.
func (i *istiod) serve(address string) (at string, stop func()) {
	t := i.t
	t.Helper()
	own := i.certificate("istiod.istio-system.svc")
	g := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&own)))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, i)
	istiov1.RegisterIstioCertificateServiceServer(g, i)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = g.Serve(l) // it ends with Stop
	}()
	stop = func() {
		g.Stop()
		<-served
	}
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

// CreateCertificate implements istiov1.IstioCertificateServiceServer.
func (i *istiod) CreateCertificate(_ context.Context, req *istiov1.IstioCertificateRequest) (*istiov1.IstioCertificateResponse, error) {
	block, _ := pem.Decode([]byte(req.GetCsr()))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	return &istiov1.IstioCertificateResponse{CertChain: []string{encode("CERTIFICATE", i.issue(csr.PublicKey, csr.URIs[0].String())), i.roots}}, nil
}

func encode(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// DeltaAggregatedResources implements discoveryv3.AggregatedDiscoveryServiceServer: each
// type is answered once.
func (i *istiod) DeltaAggregatedResources(stream grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]) error {
	answered := make(map[string]bool)
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		if answered[req.GetTypeUrl()] {
			continue
		}
		answered[req.GetTypeUrl()] = true
		resp := &discoveryv3.DeltaDiscoveryResponse{
			TypeUrl: req.GetTypeUrl(), SystemVersionInfo: "1", Nonce: strconv.FormatUint(i.nonces.Add(1), 10),
		}
		if req.GetTypeUrl() == i.listener.GetTypeUrl() || req.GetTypeUrl() == "type.googleapis.com/envoy.config.listener.v3.Listener" {
			resp.Resources = []*discoveryv3.Resource{{Name: "inbound", Version: "1", Resource: i.listener}}
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}
