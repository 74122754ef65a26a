package sds

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/test/identitytest"
)

// rig is a server on an in-memory connection.
type rig struct {
	t      testing.TB
	source *identitytest.Source
	server *Server
	peer   *peer.Peer
	grpc   *grpc.Server
	conn   *grpc.ClientConn
	reg    *prometheus.Registry

	mu       sync.Mutex // guards problems
	problems []string
}

func newRig(t testing.TB, source *identitytest.Source, o Options) *rig {
	t.Helper()
	r := &rig{t: t, source: source, peer: peer.ForTest(4242, 1000, 1000), reg: prometheus.NewRegistry()}
	o.Registerer, o.Logger = r.reg, slog.New(slog.DiscardHandler)
	o.Report = func(condition, problem string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.problems = append(r.problems, condition+": "+problem)
	}
	var err error
	if r.server, err = New(source, o); err != nil {
		t.Fatal(err)
	}
	r.grpc = grpc.NewServer(append(ServerOptions(), grpc.Creds(identitytest.PeerCredentials(r.peer)))...)
	r.server.Register(r.grpc)
	listener := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- r.grpc.Serve(listener) }()
	r.conn, err = grpc.NewClient("passthrough:bufconn",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.conn.Close()
		r.server.Close()
		r.grpc.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

// value returns the value of a counter or gauge by name and label values.
func (r *rig) value(name string, labels ...string) float64 {
	r.t.Helper()
	return identitytest.Metric(r.t, r.reg, name, labels...)
}

// sotw is a raw client of a state-of-the-world stream.
type sotw struct {
	t testing.TB
	grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
}

func (r *rig) sotw(ctx context.Context) *sotw {
	r.t.Helper()
	c, err := secretv3.NewSecretDiscoveryServiceClient(r.conn).StreamSecrets(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return &sotw{r.t, c}
}

func (r *rig) adsSotw(ctx context.Context) *sotw {
	r.t.Helper()
	c, err := discoveryv3.NewAggregatedDiscoveryServiceClient(r.conn).StreamAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return &sotw{r.t, c}
}

func (c *sotw) ask(names ...string) {
	c.t.Helper()
	c.request(&discoveryv3.DiscoveryRequest{TypeUrl: TypeURL, ResourceNames: names})
}

func (c *sotw) request(m *discoveryv3.DiscoveryRequest) {
	c.t.Helper()
	if err := c.Send(m); err != nil {
		c.t.Fatal(err)
	}
}

func (c *sotw) next() *discoveryv3.DiscoveryResponse {
	c.t.Helper()
	m, err := c.Recv()
	if err != nil {
		c.t.Fatal(err)
	}
	if m.GetTypeUrl() != TypeURL {
		c.t.Fatalf("type %q", m.GetTypeUrl())
	}
	return m
}

func (c *sotw) ack(m *discoveryv3.DiscoveryResponse, names ...string) {
	c.t.Helper()
	c.request(&discoveryv3.DiscoveryRequest{
		TypeUrl: TypeURL, ResourceNames: names, VersionInfo: m.GetVersionInfo(), ResponseNonce: m.GetNonce(),
	})
}

func (c *sotw) nack(m *discoveryv3.DiscoveryResponse, version, problem string, names ...string) {
	c.t.Helper()
	c.request(&discoveryv3.DiscoveryRequest{
		TypeUrl: TypeURL, ResourceNames: names, VersionInfo: version, ResponseNonce: m.GetNonce(),
		ErrorDetail: &statuspb.Status{Code: 13, Message: problem},
	})
}

// delta is a raw client of a delta stream.
type delta struct {
	t testing.TB
	grpc.BidiStreamingClient[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
}

func (r *rig) delta(ctx context.Context) *delta {
	r.t.Helper()
	c, err := secretv3.NewSecretDiscoveryServiceClient(r.conn).DeltaSecrets(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return &delta{r.t, c}
}

func (c *delta) request(m *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	m.TypeUrl = TypeURL
	if err := c.Send(m); err != nil {
		c.t.Fatal(err)
	}
}

func (c *delta) ask(names ...string) {
	c.t.Helper()
	c.request(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names})
}

func (c *delta) next() *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	m, err := c.Recv()
	if err != nil {
		c.t.Fatal(err)
	}
	return m
}

func (c *delta) ack(m *discoveryv3.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.request(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: m.GetNonce()})
}

func (c *delta) nack(m *discoveryv3.DeltaDiscoveryResponse, problem string) {
	c.t.Helper()
	c.request(&discoveryv3.DeltaDiscoveryRequest{
		ResponseNonce: m.GetNonce(), ErrorDetail: &statuspb.Status{Code: 13, Message: problem},
	})
}

// secretsOf decodes resources, by name.
func secretsOf(t testing.TB, resources []*anypb.Any) map[string]*tlsv3.Secret {
	t.Helper()
	all := make(map[string]*tlsv3.Secret)
	for _, a := range resources {
		if err := guardAny(a); err != nil {
			t.Fatal(err)
		}
		s := &tlsv3.Secret{}
		if err := a.UnmarshalTo(s); err != nil {
			t.Fatal(err)
		}
		all[s.GetName()] = s
	}
	return all
}

// guardAny checks a resource with the generated code, as guard does with its own.
func guardAny(a *anypb.Any) error {
	s := &tlsv3.Secret{}
	if err := a.UnmarshalTo(s); err != nil {
		return err
	}
	return inspect(s)
}

func inspect(s *tlsv3.Secret) error {
	switch kindOf(s.GetName()) {
	case kindRoot:
		v := s.GetValidationContext()
		if v == nil || v.GetTrustedCa() != nil || !v.GetSuppressClientCaList() {
			return errors.New("root: not a validation context with the SPIFFE validator alone")
		}
		config := &tlsv3.SPIFFECertValidatorConfig{}
		if v.GetCustomValidatorConfig().GetName() != "envoy.tls.cert_validator.spiffe" {
			return errors.New("root: another validator")
		}
		if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
			return err
		}
		if len(config.GetTrustDomains()) == 0 {
			return errors.New("root: no trust domain")
		}
		for _, d := range config.GetTrustDomains() {
			if d.GetName() == "" || countCertificates(d.GetTrustBundle().GetInlineBytes()) == 0 {
				return errors.New("root: a trust domain without anchor")
			}
		}
		return nil
	case kindLeaf:
		c := s.GetTlsCertificate()
		if countCertificates(c.GetCertificateChain().GetInlineBytes()) == 0 || len(c.GetPrivateKey().GetInlineBytes()) == 0 {
			return errors.New("leaf: certificate or key missing")
		}
		return nil
	default:
		return errors.New("name of no kind: " + s.GetName())
	}
}

func deltaResources(m *discoveryv3.DeltaDiscoveryResponse) []*anypb.Any {
	var all []*anypb.Any
	for _, r := range m.GetResources() {
		all = append(all, r.GetResource())
	}
	return all
}

// describe says what stands under each name: a SPIFFE ID, or trust domains.
func describe(t testing.TB, secrets map[string]*tlsv3.Secret) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for name, s := range secrets {
		if c := s.GetTlsCertificate(); c != nil {
			all[name] = leafOf(t, c.GetCertificateChain().GetInlineBytes()).URIs[0].String()
			continue
		}
		config := &tlsv3.SPIFFECertValidatorConfig{}
		if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, d := range config.GetTrustDomains() {
			names = append(names, d.GetName())
		}
		all[name] = strings.Join(names, " ")
	}
	return all
}

func statusOf(err error) codes.Code {
	if errors.Is(err, io.EOF) {
		return codes.OK
	}
	return status.Code(err)
}

func second(_ any, err error) error { return err }

func (r *rig) adsDelta(ctx context.Context) *delta {
	r.t.Helper()
	c, err := discoveryv3.NewAggregatedDiscoveryServiceClient(r.conn).DeltaAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return &delta{r.t, c}
}

// contents says what stands under each name: a SPIFFE ID, or trust domains.
func contents(t testing.TB, m *discoveryv3.DiscoveryResponse) map[string]string {
	t.Helper()
	return describe(t, secretsOf(t, m.GetResources()))
}

func deltaContents(t testing.TB, m *discoveryv3.DeltaDiscoveryResponse) map[string]string {
	t.Helper()
	all := secretsOf(t, deltaResources(m))
	for _, r := range m.GetResources() {
		if all[r.GetName()] == nil {
			t.Errorf("resource %q has another name inside", r.GetName())
		}
	}
	return describe(t, all)
}

func leafOf(t testing.TB, chain []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(chain)
	if block == nil {
		t.Fatal("no certificate")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
