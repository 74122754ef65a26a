// Package plugin holds the examples of plug-ins to their contract, with the command
// that whoever writes one uses, and runs a CA below each.
package plugin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// root makes the root that the examples sign with.
func root(t *testing.T) (certificate, key string) {
	t.Helper()
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "example root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certificate, key = filepath.Join(dir, "root.pem"), filepath.Join(dir, "root-key.pem")
	for path, block := range map[string]*pem.Block{
		certificate: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: encoded},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certificate, key
}

// examples are the commands of both.
func examples(t *testing.T) map[string]func(*testing.T) []string {
	t.Helper()
	return map[string]func(*testing.T) []string{
		"go": func(t *testing.T) []string {
			program := filepath.Join(t.TempDir(), "plugin")
			build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./deploy/plugin/go")
			build.Dir = require.Repository()
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("build the example: %v\n%s", err, out)
			}
			return []string{program}
		},
		"python": func(t *testing.T) []string {
			dir := filepath.Join(require.Repository(), ".cache", "plugin")
			if _, err := os.Stat(filepath.Join(dir, "version")); err != nil {
				require.Missing(t, "no gRPC for Python (run scripts/install-plugin): %v", err)
			}
			t.Setenv("PYTHONPATH", filepath.Join(dir, "stubs"))
			return []string{filepath.Join(dir, "bin", "python"), filepath.Join(require.Repository(), "deploy/plugin/python/plugin.py")}
		},
	}
}

// TestExamples runs `ca upstream test` and a CA with each.
func TestExamples(t *testing.T) {
	for name, command := range examples(t) {
		t.Run(name, func(t *testing.T) {
			certificate, key := root(t)
			words := append(command(t), "--certificate", certificate, "--key", key)
			out, err := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), "ca"),
				append([]string{"upstream", "test", "--environment", "PYTHONPATH", "-o", "json", "--"}, words...)...).Output()
			if err != nil {
				if exit, ok := errors.AsType[*exec.ExitError](err); ok {
					t.Logf("%s", exit.Stderr)
				}
				t.Fatalf("ca upstream test: %v\n%s", err, out)
			}
			var report struct {
				Checks []struct {
					Check   string `json:"check"`
					Outcome string `json:"outcome"`
					Detail  string `json:"detail"`
				} `json:"checks"`
			}
			if err := json.Unmarshal(out, &report); err != nil {
				t.Fatal(err)
			}
			if len(report.Checks) != 11 {
				t.Errorf("%d checks were made", len(report.Checks))
			}
			for _, c := range report.Checks {
				if c.Outcome != "ok" && (c.Outcome != "skipped" || c.Check != "is pinned") {
					t.Errorf("%s: %s: %s", c.Check, c.Outcome, c.Detail)
				}
			}
			quoted, err := json.Marshal(words) // YAML reads it
			if err != nil {
				t.Fatal(err)
			}
			ca := local.StartCA(t, local.CAOptions{Config: fmt.Sprintf("upstream:\n  external:\n    command: %s\n    environment: [PYTHONPATH]\n", quoted)})
			want, err := os.ReadFile(certificate)
			if err != nil {
				t.Fatal(err)
			}
			if got := ca.MustCommand(t, "bundle", "show"); strings.TrimSpace(got) != strings.TrimSpace(string(want)) {
				t.Errorf("the bundle is not the plug-in's root:\n%s", got)
			}
			if err := ca.Stop(t); err != nil {
				t.Error(err)
			}
		})
	}
}

// Each mistake of a plug-in is named, with what repairs it.
func TestWrongPlugins(t *testing.T) {
	for _, c := range []struct{ name, script, says string }{
		{"not a plug-in", "exit 3", "exit status 3"},
		{"ends at once", "exit 0", "must run until its standard input ends"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), filepath.Join(local.Binaries(t), "ca"), "upstream", "test", "--", "sh", "-c", c.script).Output()
			if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
				t.Errorf("the exit is %v", err)
			}
			if !strings.Contains(string(out), "FAILED") || !strings.Contains(string(out), c.says) || !strings.Contains(string(out), "fix: ") {
				t.Errorf("it does not say %q:\n%s", c.says, out)
			}
		})
	}
}
