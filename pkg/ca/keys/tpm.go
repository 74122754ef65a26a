package keys

import (
	"context"
	"path/filepath"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/tpmkms"

	"github.com/meshid/meshid/internal/durable"
)

// openTPM opens a TPM 2.0. What it has made is in the folder tpm beside the key
// files, encrypted by the TPM: it is of no use without it.
func openTPM(t target) (session, error) {
	dir := filepath.Join(t.dir, "tpm")
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	u := "tpmkms:storage-directory=" + dir
	if device := t.uri.Get("device"); device != "" {
		u += ";device=" + device
	}
	m, err := tpmkms.New(context.Background(), apiv1.Options{Type: apiv1.TPMKMS, URI: u})
	if err != nil {
		return nil, err
	}
	return manager{KeyManager: m, nameOf: func(name string) string { return "tpmkms:name=" + name }}, nil
}
