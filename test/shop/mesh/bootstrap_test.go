package mesh

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/sds/envoycheck"
	"github.com/meshid/meshid/test/require"
)

// The bootstraps in deploy/envoy are the ones that the demo runs, and a real
// Envoy accepts them.
func TestSpec_S41_ShippedBootstraps(t *testing.T) {
	for file, sds := range map[string]string{"sidecar.yaml": SDSDelta, "sidecar-sotw.yaml": SDSStateOfTheWorld} {
		t.Run(file, func(t *testing.T) {
			var want bytes.Buffer
			if err := ExampleBootstrap(sds).Write(&want); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(filepath.Join("..", "..", "..", "deploy", "envoy", file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want.String(), string(got)); diff != "" {
				t.Errorf("deploy/envoy/%s is old: run `make generate` (-want +got):\n%s", file, diff)
			}
			envoy := require.Envoy(t)
			dir := t.TempDir()
			var endpoints bytes.Buffer
			if err := WriteEndpoints(&endpoints, "stock", 1, []Endpoint{{"192.0.2.1", inboundPort}, {"192.0.2.2", inboundPort}}); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "stock.yaml"), endpoints.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			// The folder of the endpoints must be there for Envoy to accept it.
			text := strings.ReplaceAll(want.String(), "/etc/envoy/endpoints", dir)
			path := filepath.Join(dir, "sidecar.yaml")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), envoy, "--mode", "validate", "--config-path", path).CombinedOutput()
			if err != nil {
				t.Fatalf("envoy: %v\n%s", err, out)
			}
		})
	}
}

func TestWriteEndpoints(t *testing.T) {
	var none bytes.Buffer
	if err := WriteEndpoints(&none, "orders", 7, nil); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(none.String(), "  - lb_endpoints: []\n") {
		t.Errorf("endpoints of a service without instances:\n%s", none.String())
	}
}

// bootstraps returns the bootstraps in deploy/envoy, and each kind that the shop
// generates.
func bootstraps(t *testing.T) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	files, err := filepath.Glob(filepath.Join(require.Repository(), "deploy", "envoy", "*.y*ml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if all[filepath.Base(f)], err = os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < 2 {
		t.Fatalf("%d bootstraps in deploy/envoy", len(all))
	}
	for _, sds := range []string{SDSDelta, SDSStateOfTheWorld} {
		both := ExampleBootstrap(sds)
		both.Example, both.RequestsPerConnection = false, 1
		both.AllowedClients = append(both.AllowedClients, "spiffe://example.org/app/admin")
		both.Upstreams = append(both.Upstreams, Upstream{Service: "mail", ServerID: "spiffe://example.org/app/mail", LocalPort: 9002})
		first, last := both, both
		first.AllowedClients, last.Upstreams = nil, nil
		for name, b := range map[string]Bootstrap{"first": first, "between": both, "last": last} {
			var text bytes.Buffer
			if err := b.Write(&text); err != nil {
				t.Fatal(err)
			}
			all["generated, "+name+", "+sds] = text.Bytes()
		}
	}
	return all
}

// TestV_H1_Bootstraps: no bootstrap that we ship lets a peer stay, or come back,
// whose certificate has expired.
func TestV_H1_Bootstraps(t *testing.T) {
	for name, text := range bootstraps(t) {
		report, err := envoycheck.Check(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range report.Findings {
			t.Errorf("%s: %s: %s", name, f.Path, f.Problem)
		}
		downstreams, upstreams := bytes.Count(text, []byte("DownstreamTlsContext")), bytes.Count(text, []byte("UpstreamTlsContext"))
		if report.Downstreams != downstreams || report.Upstreams != upstreams || downstreams+upstreams == 0 {
			t.Errorf("%s: %d of %d and %d of %d TLS contexts seen", name, report.Downstreams, downstreams, report.Upstreams, upstreams)
		}
	}
}
