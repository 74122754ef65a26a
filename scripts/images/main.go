// Command images makes the container images of ca and node-agent out of the programs
// in a folder, as docker-archives that every engine and registry tool loads: each has
// the program, its loader, the roots that this machine trusts, and nothing else. It answers "which
// image does the chart name"; it does not build the programs.
//
//	make images
//	docker load -i bin/images/ca.tar
package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshid/meshid/test/shop/image"
)

const (
	usage = "usage: images PROGRAMS ARCHIVES [REGISTRY]"
	// chart says which tag its images have.
	chart = "deploy/helm/meshid/Chart.yaml"
	// roots are those by which clouds, collectors and upstream CAs are verified, where Go
	// looks for them.
	roots = "/etc/ssl/certs/ca-certificates.crt"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(args []string, out io.Writer) error {
	if len(args) < 2 || len(args) > 3 {
		return errors.New(usage)
	}
	tag, err := version()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(args[1], 0o755); err != nil { //nolint:gosec // whoever builds reads it
		return err
	}
	prefix := ""
	if len(args) == 3 {
		prefix = strings.TrimSuffix(args[2], "/") + "/"
	}
	for _, program := range []string{"ca", "node-agent"} {
		archive := filepath.Join(args[1], program+".tar")
		name := prefix + "meshid/" + program + ":" + tag
		digest, err := build(filepath.Join(args[0], program), name, archive)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s\t%s\t%s\n", archive, name, digest)
	}
	return nil
}

// version is the tag that the chart uses.
func version() (string, error) {
	text, err := os.ReadFile(chart)
	if err != nil {
		return "", fmt.Errorf("%w (run it at the top of the work tree)", err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "appVersion:"); ok {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("%s has no appVersion", chart)
}

func build(program, name, archive string) (digest string, err error) {
	path := "/usr/bin/" + filepath.Base(program) // in PATH, for kubectl exec
	spec := image.Spec{Tag: name, Entrypoint: []string{path}, Files: map[string]string{path: program}}
	if _, err := os.Stat(roots); err == nil {
		spec.Files[roots] = roots
	}
	loader, err := loader(program)
	if err != nil {
		return "", err
	}
	if loader != "" {
		spec.Files[loader] = loader
	}
	im, err := image.Build(spec)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	f, err := os.Create(archive) //nolint:gosec // whoever builds says where
	if err != nil {
		return "", err
	}
	return im.Digest, errors.Join(im.WriteArchive(f), f.Close())
}

// loader returns the path of the program that the kernel starts in place of this one, to
// place it in memory: programs that are position independent have one. What needs other
// libraries is refused, which the image has not.
func loader(program string) (path string, err error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return "", fmt.Errorf("%s: %w", program, err)
	}
	if len(libraries) > 0 {
		return "", fmt.Errorf("%s needs %s, which the image has not: build it with CGO_ENABLED=0 (make release)", program, strings.Join(libraries, ", "))
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name, err := io.ReadAll(p.Open())
			return strings.TrimRight(string(name), "\x00"), err
		}
	}
	return "", nil
}
