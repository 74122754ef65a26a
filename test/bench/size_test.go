package bench

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/meshid/meshid/test/require"
)

// BenchmarkSize reports how large the programs are as they are shipped.
func BenchmarkSize(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		// As in the Makefile's target release.
		for name, tags := range map[string]string{"ca": "grpcnotrace", "node-agent": "grpcnotrace,nethttpomithttp2"} {
			cmd := exec.CommandContext(b.Context(), "go", "build", "-tags="+tags, "-trimpath", "-buildmode=pie", "-ldflags=-s -w", "-o", dir+"/", "./cmd/"+name)
			cmd.Dir = require.Repository()
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				b.Fatalf("build the programs: %v\n%s", err, out)
			}
		}
	}
	for _, name := range []string{"ca", "node-agent"} {
		st, err := os.Stat(filepath.Join(dir, name))
		must(b, err)
		b.ReportMetric(float64(st.Size())/1e6, name+"-MB")
	}
	only(b)
}
