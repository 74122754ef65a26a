package upstream

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/meshid/meshid/internal/durable"
)

// maxFile bounds each file of a kind's configuration.
const maxFile = 1 << 20

// ReadSecret reads a file that nobody but its owner, this user or root, can read or
// replace. An error wraps ErrDenied if somebody else could, and else ErrUnavailable.
// The caller clears what it gets.
func ReadSecret(path string) ([]byte, error) {
	data, err := durable.ReadSecret(path, maxFile)
	switch {
	case errors.Is(err, durable.ErrUnsafe):
		return nil, fmt.Errorf("%w: %w", ErrDenied, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return data, nil
}

// ReadFile reads a file that is no secret, or one that the platform puts there
// behind symbolic links. An error of reading wraps ErrUnavailable.
func ReadFile(path string) (data []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if data, err = io.ReadAll(io.LimitReader(f, maxFile+1)); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxFile)
	}
	return data, nil
}

// ReadCertificates reads a PEM file of one to MaxRoots certificates, in which
// nothing else may be but what stands between them.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	data, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	var all []*x509.Certificate
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: there is a %.40q in it: only certificates belong there", path, block.Type)
		}
		if len(all) == MaxRoots {
			return nil, fmt.Errorf("%s: more than %d certificates", path, MaxRoots)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", path, len(all)+1, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s: no PEM certificate is in it", path)
	}
	return all, nil
}

// ReadPair reads a client's certificate, with those above it, and its private key,
// which is read as ReadSecret does.
func ReadPair(certificate, key string) (tls.Certificate, error) {
	certificates, err := ReadFile(certificate)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate: %w", err)
	}
	private, err := ReadSecret(key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("key: %w", err)
	}
	defer clear(private)
	pair, err := tls.X509KeyPair(certificates, private)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate %s and key %s: %w", certificate, key, err)
	}
	return pair, nil
}
