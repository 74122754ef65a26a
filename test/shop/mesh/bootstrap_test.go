package mesh

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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
