package mesh

import (
	_ "embed" // the template of the bootstrap
	"fmt"
	"io"
	"text/template"
	"time"
)

//go:embed sidecar.yaml.tmpl
var sidecarTemplate string

// The two ways in which Envoy may ask an SDS server on a stream for each secret.
const (
	SDSStateOfTheWorld = "GRPC"
	SDSDelta           = "DELTA_GRPC"
)

// Bootstrap is what the bootstrap of a sidecar is made from.
type Bootstrap struct {
	Service  string
	Instance string
	// AgentSocket and AdminSocket are paths inside of the sidecar's container.
	AgentSocket string
	AdminSocket string
	// EndpointsDir holds one file for each upstream: where its instances are.
	EndpointsDir string
	// SDS is SDSStateOfTheWorld or SDSDelta.
	SDS string
	// AllowedClients are the SPIFFE IDs that may call; empty means that there
	// is no inbound side at all.
	AllowedClients []string
	InboundAddress string
	InboundPort    int
	AppPort        int
	Upstreams      []Upstream
	// ConnectionLife bounds the life of each connection, and that of each request,
	// for which the end of a connection waits.
	ConnectionLife time.Duration
	// RequestsPerConnection is after how many requests a connection to an
	// upstream is closed; 0 means never.
	RequestsPerConnection int
	// Example says that the file is shown to people.
	Example bool
}

// Upstream is a service that the application calls, and the identity that its
// instances must prove.
type Upstream struct {
	Service   string
	ServerID  string
	LocalPort int
}

// Write writes the bootstrap as YAML.
func (b Bootstrap) Write(w io.Writer) error {
	t, err := template.New("sidecar").Option("missingkey=error").Parse(sidecarTemplate)
	if err != nil {
		return err
	}
	if err := t.Execute(w, b); err != nil {
		return fmt.Errorf("write the bootstrap of %s: %w", b.Instance, err)
	}
	return nil
}

// ExampleBootstrap is the bootstrap that deploy/envoy shows.
func ExampleBootstrap(sds string) Bootstrap {
	return Bootstrap{
		Service: "orders", Instance: "orders-1", SDS: sds, Example: true,
		AgentSocket: "/run/meshid/agent.sock", AdminSocket: "/run/envoy/admin.sock", EndpointsDir: "/etc/envoy/endpoints",
		AllowedClients: []string{"spiffe://example.org/app/web"},
		InboundAddress: "0.0.0.0", InboundPort: inboundPort, AppPort: appPort,
		Upstreams:      []Upstream{{Service: "stock", ServerID: "spiffe://example.org/app/stock", LocalPort: firstLocalPort}},
		ConnectionLife: time.Hour,
	}
}

// Endpoint is where an instance of a service is.
type Endpoint struct {
	Address string
	Port    int
}

var endpointsTemplate = template.Must(template.New("endpoints").Parse(`# Where the instances of {{.Service}} are.
version_info: "{{.Version}}"
resources:
- "@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment
  cluster_name: {{.Service}}
  endpoints:
  - lb_endpoints:
{{- range .Endpoints}}
    - { endpoint: { address: { socket_address: { address: {{.Address}}, port_value: {{.Port}} } } } }
{{- else}} []
{{- end}}
`))

// WriteEndpoints writes the endpoints of one service for Envoy.
func WriteEndpoints(w io.Writer, service string, version int, endpoints []Endpoint) error {
	return endpointsTemplate.Execute(w, struct {
		Service   string
		Version   int
		Endpoints []Endpoint
	}{service, version, endpoints})
}
