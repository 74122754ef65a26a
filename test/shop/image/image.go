// Package image makes FROM-scratch container images out of files of this
// machine, as a docker-archive that any engine loads. It answers "which bytes
// are this image, and which digest names them". It needs no engine, no registry
// and no network, and the same files always give the same digest.
package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
)

// Spec says what an image is made of.
type Spec struct {
	// Tag is the name under which the engine keeps it, such as "shop/app:demo".
	Tag string
	// Entrypoint is the program, as a path inside of the image, and its first
	// arguments.
	Entrypoint []string
	// Files are paths inside of the image and the files of this machine that
	// stand there, with mode 0755.
	Files map[string]string
	// Labels are the image's labels.
	Labels map[string]string
}

// Image is an image that was built; it is a temporary file until Close.
type Image struct {
	Tag string
	// Digest names the image's content: "sha256:" and 64 hexadecimal digits. It
	// is what the engine reports as the image of a container.
	Digest string

	config []byte
	layer  *os.File
	size   int64
}

// Build makes an image. The caller closes it.
func Build(s Spec) (*Image, error) {
	layer, err := os.CreateTemp("", "layer-*.tar")
	if err != nil {
		return nil, err
	}
	_ = os.Remove(layer.Name()) // the descriptor is enough, and nothing is left behind
	im := &Image{Tag: s.Tag, layer: layer}
	sum := sha256.New()
	w := bufio.NewWriterSize(io.MultiWriter(layer, sum), 1<<20)
	if err := writeLayer(w, s.Files); err != nil {
		return nil, closing(layer, fmt.Errorf("build image %s: %w", s.Tag, err))
	}
	if err := w.Flush(); err != nil {
		return nil, closing(layer, fmt.Errorf("build image %s: %w", s.Tag, err))
	}
	if im.size, err = layer.Seek(0, io.SeekCurrent); err != nil {
		return nil, closing(layer, err)
	}
	im.config, err = json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config":  map[string]any{"Entrypoint": s.Entrypoint, "Labels": s.Labels},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum.Sum(nil))}},
		"history": []map[string]string{{"created_by": "files"}},
	})
	if err != nil {
		return nil, closing(layer, err)
	}
	digest := sha256.Sum256(im.config)
	im.Digest = "sha256:" + hex.EncodeToString(digest[:])
	return im, nil
}

func closing(f *os.File, err error) error {
	_ = f.Close()
	return err
}

// Close gives the temporary file back.
func (im *Image) Close() error { return im.layer.Close() }

// WriteArchive writes the image as a docker-archive.
func (im *Image) WriteArchive(w io.Writer) error {
	config := strings.TrimPrefix(im.Digest, "sha256:") + ".json"
	manifest, err := json.Marshal([]map[string]any{
		{"Config": config, "RepoTags": []string{im.Tag}, "Layers": []string{"layer.tar"}},
	})
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	for _, part := range []struct {
		name string
		size int64
		body io.Reader
	}{
		{"layer.tar", im.size, io.NewSectionReader(im.layer, 0, im.size)},
		{config, int64(len(im.config)), bytes.NewReader(im.config)},
		{"manifest.json", int64(len(manifest)), bytes.NewReader(manifest)},
	} {
		if err := t.WriteHeader(&tar.Header{Name: part.name, Mode: 0o644, Size: part.size}); err != nil {
			return err
		}
		if _, err := io.Copy(t, part.body); err != nil {
			return err
		}
	}
	return t.Close()
}

func writeLayer(w io.Writer, files map[string]string) error {
	paths := make([]string, 0, len(files))
	directories := map[string]bool{"tmp/": true, "run/": true, "etc/": true, "proc/": true, "sys/": true, "dev/": true}
	for path := range files {
		paths = append(paths, path)
		for i, c := range strings.TrimPrefix(path, "/") {
			if c == '/' {
				directories[strings.TrimPrefix(path, "/")[:i+1]] = true
			}
		}
	}
	slices.Sort(paths)
	t := tar.NewWriter(w)
	for _, d := range sortedKeys(directories) {
		mode := int64(0o755)
		if d == "tmp/" {
			mode = 0o1777
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: mode}); err != nil {
			return err
		}
	}
	for _, path := range paths {
		if err := writeFile(t, strings.TrimPrefix(path, "/"), files[path]); err != nil {
			return err
		}
	}
	return t.Close()
}

func writeFile(t *tar.Writer, name, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: info.Size()}); err != nil {
		return err
	}
	_, err = io.Copy(t, f)
	return err
}

func sortedKeys(m map[string]bool) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Libraries returns the shared libraries that a program needs, its loader
// included, as files for a Spec: each stands where it stands on this machine.
// A static program needs none.
func Libraries(ctx context.Context, program string) (map[string]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).CombinedOutput() //nolint:gosec // the program is the one that goes into the image
	if err != nil {
		if bytes.Contains(out, []byte("not a dynamic executable")) {
			return nil, nil
		}
		return nil, fmt.Errorf("ldd %s: %w: %s", program, err, bytes.TrimSpace(out))
	}
	return parseLibraries(string(out))
}

// parseLibraries reads ldd's lines: "name => path (address)", "path (address)"
// for the loader, and the kernel's own page, which is no file.
func parseLibraries(out string) (map[string]string, error) {
	files := make(map[string]string)
	for line := range strings.Lines(out) {
		name, path, found := strings.Cut(strings.TrimSpace(line), " => ")
		if !found {
			path = name
		}
		if strings.HasPrefix(path, "not found") {
			return nil, fmt.Errorf("shared library %s is not on this machine", name)
		}
		path, _, _ = strings.Cut(path, " ")
		if strings.HasPrefix(path, "/") {
			files[path] = path
		}
	}
	return files, nil
}
