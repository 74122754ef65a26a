package istio

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/direct_response/v3" // in the listener
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"           // in the listener
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/goccy/go-yaml"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
)

// istiod stands for Istio's control plane: it tells a sidecar of one listener, which has
// mutual TLS as Istio configures it, and of nothing else.
type istiod struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	address string
	// roots are those of its certificate, PEM.
	roots    string
	listener *anypb.Any
	nonces   atomic.Uint64
}

// inbound is what Istio sends: its names of the SDS cluster and of the secrets, the
// combined context, state of the world.
const inbound = `{name: inbound, address: {socket_address: {address: 127.0.0.1, port_value: %[1]s}},
  filter_chains: [{
    filters: [{name: envoy.filters.network.direct_response, typed_config: {
      "@type": type.googleapis.com/envoy.extensions.filters.network.direct_response.v3.Config, response: {inline_string: hello}}}],
    transport_socket: {name: envoy.transport_sockets.tls, typed_config: {
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, require_client_certificate: true,
      common_tls_context: {
        tls_certificate_sds_secret_configs: [{name: default, sds_config: %[2]s}],
        combined_validation_context: {
          default_validation_context: {match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://example.org/"}}]},
          validation_context_sds_secret_config: {name: ROOTCA, sds_config: %[2]s}}}}}}]}`

const sdsConfig = `{initial_fetch_timeout: 0s, resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3,
  set_node_on_first_message_only: true, grpc_services: [{envoy_grpc: {cluster_name: sds-grpc}}]}}`

// startIstiod starts one; port is where sidecars are to listen.
func startIstiod(t *testing.T, port string) *istiod {
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
	i := new(istiod)
	i.listener, err = anypb.New(listener)
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"istiod.istio-system.svc"}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(err)
	i.roots = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	g := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, i)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(err)
	i.address = l.Addr().String()
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = g.Serve(l) // it ends with Stop
	}()
	t.Cleanup(func() {
		g.Stop()
		<-served
	})
	return i
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
