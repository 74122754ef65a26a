package main

import (
	"os"
	"path/filepath"
	"testing"
)

// The credential that the unit loads seals the cache, unless the operator says
// otherwise.
func TestFault_F31_SealingCredential(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if got := sealingCredential(); got != "" {
		t.Errorf("without a credential: %q", got)
	}
	file := filepath.Join(dir, "sealing_key")
	if err := os.WriteFile(file, []byte("0123456789abcdef"), 0o400); err != nil {
		t.Fatal(err)
	}
	if got := sealingCredential(); got != file {
		t.Errorf("%q, want %q", got, file)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if got := sealingCredential(); got != "" {
		t.Errorf("outside of systemd: %q", got)
	}
}
