package export

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"

	"github.com/meshid/meshid/internal/durable"
)

// secretBytes is the size of the largest file of secrets that is read.
const secretBytes = 64 << 10

// TLS is how a receiver is told from others, and how it can tell who sends. There
// is no way not to verify the receiver. The files are read again for each
// connection, so what is renewed in them needs no restart.
type TLS struct {
	// PEM file of the CAs that may issue the receiver's certificate; without it,
	// those of the system.
	CA string `yaml:"ca" default:"the system's"`
	// PEM file of a client certificate, with intermediates, and of its key, which
	// nobody else may read.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	// Name that the receiver's certificate must have.
	ServerName string `yaml:"server_name" default:"the host of the address"`
}

// Config reads the files and returns the configuration for connections to host.
// Its errors are *SettingErrors.
func (t TLS) Config(host string) (*tls.Config, error) {
	c := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if t.ServerName != "" {
		c.ServerName = t.ServerName
	}
	if t.CA != "" {
		pem, err := os.ReadFile(t.CA)
		if err != nil {
			return nil, Bad("tls.ca", "%v", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, Bad("tls.ca", "%s holds no certificate in PEM", t.CA)
		}
	}
	switch {
	case t.Certificate == "" && t.Key == "":
		return c, nil
	case t.Key == "":
		return nil, Bad("tls.certificate", "tls.key is missing")
	case t.Certificate == "":
		return nil, Bad("tls.key", "tls.certificate is missing")
	}
	certificate, err := os.ReadFile(t.Certificate)
	if err != nil {
		return nil, Bad("tls.certificate", "%v", err)
	}
	key, err := durable.ReadSecret(t.Key, secretBytes)
	if err != nil {
		return nil, Bad("tls.key", "%v", err)
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, Bad("tls.certificate", "%v", err)
	}
	c.Certificates = []tls.Certificate{pair}
	return c, nil
}

// Address checks an address of the form host:port and returns its host; an error is
// a *SettingError about setting.
func Address(setting, address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		return "", Bad(setting, "%q is no address: write host:port", address)
	}
	return host, nil
}

// readSecret reads a secret file; an error is a *SettingError about setting.
func readSecret(setting, path string) ([]byte, error) {
	text, err := durable.ReadSecret(path, secretBytes)
	if err != nil {
		return nil, &SettingError{Setting: setting, Message: fmt.Sprint(err)}
	}
	return text, nil
}
