package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestBuildIsReproducibleAndWhole(t *testing.T) {
	program := filepath.Join(t.TempDir(), "app")
	if err := os.WriteFile(program, []byte("program"), 0o600); err != nil {
		t.Fatal(err)
	}
	spec := Spec{Tag: "shop/app:test", Entrypoint: []string{"/bin/app"}, Files: map[string]string{"/bin/app": program}}
	one, err := Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	two, err := Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()
	if one.Digest != two.Digest {
		t.Errorf("digests of the same files differ: %s, %s", one.Digest, two.Digest)
	}

	var archive bytes.Buffer
	if err := one.WriteArchive(&archive); err != nil {
		t.Fatal(err)
	}
	parts := map[string][]byte{}
	for r := tar.NewReader(&archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if parts[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var manifest []struct {
		Config string `json:"Config"`
	}
	if err := json.Unmarshal(parts["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}
	if got, want := manifest[0].Config, one.Digest[len("sha256:"):]+".json"; got != want {
		t.Errorf("config %s, want %s", got, want)
	}
	if len(parts["layer.tar"]) == 0 || len(parts[manifest[0].Config]) == 0 {
		t.Error("archive lacks its layer or its config")
	}
}

func TestParseLibraries(t *testing.T) {
	got, err := parseLibraries("\tlinux-vdso.so.1 (0x00007ffc)\n" +
		"\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)\n" +
		"\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"/lib/x86_64-linux-gnu/libm.so.6": "/lib/x86_64-linux-gnu/libm.so.6",
		"/lib64/ld-linux-x86-64.so.2":     "/lib64/ld-linux-x86-64.so.2",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("libraries (-want +got):\n%s", diff)
	}
	if _, err := parseLibraries("\tlibx.so => not found\n"); err == nil {
		t.Error("a missing library is no error")
	}
}
