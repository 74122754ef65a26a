package mesh

import (
	"context"
	"errors"
	"io"
	"maps"
	"path/filepath"

	"github.com/meshid/meshid/test/shop/image"
)

// loadImages builds the two images and gives them to the engine, unless it has
// them already.
func (m *Mesh) loadImages(ctx context.Context) error {
	libraries, err := image.Libraries(ctx, m.Envoy)
	if err != nil {
		return err
	}
	files := maps.Clone(libraries)
	if files == nil {
		files = make(map[string]string)
	}
	files["/bin/envoy"] = m.Envoy
	m.appDigest, err = m.loadImage(ctx, image.Spec{
		Tag: "meshid-shop/app:demo", Entrypoint: []string{"/bin/shop"},
		Files: map[string]string{"/bin/shop": filepath.Join(m.Bin, "shop")},
	})
	if err != nil {
		return err
	}
	m.sidecarDigest, err = m.loadImage(ctx, image.Spec{
		Tag: "meshid-shop/sidecar:demo", Entrypoint: []string{"/bin/envoy"}, Files: files,
	})
	return err
}

func (m *Mesh) loadImage(ctx context.Context, spec image.Spec) (digest string, err error) {
	m.Progress("building the image %s from files of this machine", spec.Tag)
	im, err := image.Build(spec)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	has, err := m.Engine.HasImage(ctx, im.Digest)
	if err != nil {
		return "", err
	}
	if has {
		return im.Digest, nil
	}
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(im.WriteArchive(w)) }()
	err = m.Engine.Load(ctx, r)
	_ = r.Close() // ends the writer if the engine did not read to the end
	return im.Digest, err
}
