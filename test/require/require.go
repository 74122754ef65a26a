// Package require answers for a test "is what I need on this machine": if not,
// the test is skipped with a reason, or fails where REQUIRE_ALL=1 says that
// everything was installed. It does not install anything. It also finds the project's
// own files and the examples in its documents.
package require

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// Missing skips the test for a reason, or fails it if nothing may be missing.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("REQUIRE_ALL") == "1" {
		t.Fatalf("REQUIRE_ALL=1: "+format, args...)
	}
	t.Skipf(format, args...)
}

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root is needed")
	}
}

// Program needs a program in PATH and returns its path.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, "%v", err)
	}
	return path
}

// Envoy needs a real Envoy and returns its path: that of ENVOY_BIN, or the one
// that `make` installs.
func Envoy(t testing.TB) string {
	t.Helper()
	path := os.Getenv("ENVOY_BIN")
	if path == "" {
		path = filepath.Join(Repository(), ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(path); err != nil { //nolint:gosec // whoever runs the tests says where Envoy is
		Missing(t, "no Envoy (run scripts/install-envoy): %v", err)
	}
	return path
}

// Kubernetes needs the programs of a Kubernetes cluster and returns the folder that
// holds them: that of KUBERNETES_BIN, or the one that `make` installs.
func Kubernetes(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("KUBERNETES_BIN")
	if dir == "" {
		dir = filepath.Join(Repository(), ".cache", "kubernetes")
	}
	if _, err := os.Stat(filepath.Join(dir, "kube-apiserver")); err != nil { //nolint:gosec // whoever runs the tests says where Kubernetes is
		Missing(t, "no Kubernetes (run scripts/install-kubernetes): %v", err)
	}
	return dir
}

// Machine needs a virtual machine and what runs it, and returns the folder with its disk.
func Machine(t testing.TB) string {
	t.Helper()
	for _, program := range []string{"qemu-system-x86_64", "swtpm", "mke2fs"} {
		Program(t, program)
	}
	dir := filepath.Join(Repository(), ".cache", "machine")
	if _, err := os.Stat(filepath.Join(dir, "version")); err != nil {
		Missing(t, "no machine (run scripts/install-machine): %v", err)
	}
	return dir
}

// CertificateRequest needs the definition of cert-manager's CertificateRequest and returns
// its path.
func CertificateRequest(t testing.TB) string {
	t.Helper()
	path := filepath.Join(Repository(), ".cache", "certmanager", "certificaterequests.yaml")
	if _, err := os.Stat(path); err != nil {
		Missing(t, "no cert-manager (run scripts/install-certmanager): %v", err)
	}
	return path
}

// Tool needs a development tool that scripts/install-tools builds, and returns its
// path.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(Repository(), "bin", name)
	if _, err := os.Stat(path); err != nil {
		Missing(t, "no %s (run scripts/install-tools %s): %v", name, name, err)
	}
	return path
}

// Repository returns the root of the work tree.
func Repository() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..")
}

// Example returns a block of a page below docs/: the first that begins with info behind
// its fence, such as "yaml file=ca.yaml".
func Example(t testing.TB, page, info string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(Repository(), "docs", page))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "```"+info+"\n")
	example, _, closed := strings.Cut(rest, "```")
	if !ok || !closed {
		t.Fatalf("docs/%s has no example %q", page, info)
	}
	return example
}
