package upstreamtest

import (
	"os"
	"path/filepath"
	"testing"
)

// Open returns what a kind's New makes of a configuration.
func Open[Config, CA any](t testing.TB, make func(Config) (CA, error), c Config) CA {
	t.Helper()
	ca, err := make(c)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// File writes a file of its own folder, and returns its path.
func File(t testing.TB, name string, data []byte) string {
	t.Helper()
	return Write(t, filepath.Join(t.TempDir(), name), data)
}

// Write writes a file that only its owner may read, or replaces it as operators should;
// and returns its path.
func Write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}
