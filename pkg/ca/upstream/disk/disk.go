// Package disk is the upstream CA whose certificate and key are files: an operator's
// own root, or a CA below it, as PEM. The files are read whenever they are needed,
// so that replacing them takes effect by itself. It does not know what for its
// signatures are used.
package disk

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/meshid/meshid/pkg/ca/upstream"
)

const (
	// lookEvery is how often the files are looked at for new roots.
	lookEvery = 10 * time.Second
	// backdate lets verifiers whose clocks are behind accept an intermediate.
	backdate = 10 * time.Minute
	// margin is how long before its issuer an intermediate ends.
	margin = time.Second
	// minLife is what is left of an issuer that is still used.
	minLife = time.Minute
)

// Config says where the files are. Each is replaced by renaming a new one to its
// name; of several that belong together, the certificate last.
type Config struct {
	// Certificate is the path of the PEM file of the CA's certificate, followed by
	// those between it and the root.
	Certificate string `yaml:"certificate"`
	// Key is the path of the PEM file of the CA's private key, which is not
	// encrypted; only its owner may read it.
	Key string `yaml:"key"`
	// Roots is the path of the PEM file of the self-signed roots above the CA. It
	// may be left out if the CA's certificate is itself a root.
	Roots string `yaml:"roots"`
}

// CA signs with the key in the files. It may be called concurrently.
type CA struct {
	config Config
}

// New reads the files once and says what is wrong with them.
func New(c Config) (*CA, error) {
	if c.Certificate == "" || c.Key == "" {
		return nil, errors.New("set certificate and key to the paths of the CA's certificate and private key")
	}
	d := &CA{config: c}
	if _, err := d.load(time.Now()); err != nil {
		return nil, err
	}
	return d, nil
}

// Capabilities returns none: what can be signed is in the certificate.
func (*CA) Capabilities() upstream.Capabilities { return upstream.Capabilities{} }

// CheckUse implements upstream.UseChecker.
func (d *CA) CheckUse(u upstream.Use) error {
	now, err := d.load(time.Now())
	if err != nil {
		return err
	}
	name := "certificate"
	if d.config.Roots != "" {
		name = "roots"
	}
	return u.CheckRoots(name, now.roots)
}

// issuer is what the files hold.
type issuer struct {
	chain []*x509.Certificate // begins with the issuer; no root, unless the issuer is one
	roots []*x509.Certificate
	key   crypto.Signer
}

func (i *issuer) cert() *x509.Certificate { return i.chain[0] }

// Mint signs with the CA that is in the files now.
func (d *CA) Mint(_ context.Context, r *upstream.Request) (*upstream.Minted, error) {
	now := time.Now()
	from, err := d.load(now)
	if err != nil {
		return nil, err
	}
	if err := r.Request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check the request's signature: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(r.Request.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encode the request's key: %w", err)
	}
	var serial [16]byte
	_, _ = rand.Read(serial[:])       // never fails
	serial[0] = serial[0]&0x3f | 0x40 // positive, 126 bits
	identifier := sha256.Sum256(spki) // RFC 7093 §2 method 4
	notBefore := now.Add(-backdate)   // not before its issuer
	notAfter := now.Add(r.TTL)        // nor after
	last := from.cert().NotAfter.Add(-margin)
	if notBefore.Before(from.cert().NotBefore) {
		notBefore = from.cert().NotBefore
	}
	if notAfter.After(last) {
		notAfter = last
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]),
		Subject:      r.Request.Subject, URIs: r.Request.URIs,
		NotBefore: notBefore, NotAfter: notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		SubjectKeyId: identifier[:20],
	}, from.cert(), r.Request.PublicKey, from.key)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", d.config.Key, err)
	}
	signed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back what was signed: %w", err)
	}
	m := &upstream.Minted{Chain: []*x509.Certificate{signed}, Roots: from.roots}
	for _, c := range from.chain {
		if !slices.ContainsFunc(from.roots, c.Equal) {
			m.Chain = append(m.Chain, c)
		}
	}
	return m, nil
}

// WatchRoots implements upstream.RootWatcher. Files that are not in order are left
// for Mint to report; their roots are those from before.
func (d *CA) WatchRoots(ctx context.Context, changed func([]*x509.Certificate) error) error {
	return upstream.LookForRoots(ctx, func(context.Context) ([]*x509.Certificate, time.Duration, error) {
		now, err := d.load(time.Now())
		if err != nil {
			return nil, lookEvery, nil //nolint:nilerr // Mint reports it
		}
		return now.roots, lookEvery, nil
	}, changed)
}

// load reads the files and holds them against each other.
func (d *CA) load(now time.Time) (*issuer, error) {
	var i issuer
	var err error
	if i.chain, err = upstream.ReadCertificates(d.config.Certificate); err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if i.key, err = readKey(d.config.Key); err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	cert := i.cert()
	if pub, ok := i.key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("the key in %s is not that of the first certificate in %s: replace both together, and put the CA's own certificate first",
			d.config.Key, d.config.Certificate)
	}
	if err := checkIssuer(cert, now); err != nil {
		return nil, fmt.Errorf("the first certificate in %s %w", d.config.Certificate, err)
	}
	if d.config.Roots != "" {
		if i.roots, err = upstream.ReadCertificates(d.config.Roots); err != nil {
			return nil, fmt.Errorf("roots: %w", err)
		}
	}
	return &i, d.findRoots(&i)
}

// findRoots holds the chain together and has it end in a root.
func (d *CA) findRoots(i *issuer) error {
	for n := range len(i.chain) - 1 {
		if err := i.chain[n].CheckSignatureFrom(i.chain[n+1]); err != nil {
			return fmt.Errorf("certificate %d in %s is not issued by certificate %d: put each before its issuer: %w",
				n+1, d.config.Certificate, n+2, err)
		}
	}
	last := i.chain[len(i.chain)-1]
	if len(i.roots) == 0 {
		if last.CheckSignatureFrom(last) != nil {
			return fmt.Errorf("the last certificate in %s is not a root, and no roots are configured: set roots to the PEM file of the root above it",
				d.config.Certificate)
		}
		i.roots = []*x509.Certificate{last}
		return nil
	}
	for n, r := range i.roots {
		if err := r.CheckSignatureFrom(r); err != nil {
			return fmt.Errorf("certificate %d in %s is not self-signed: only roots belong there: %w", n+1, d.config.Roots, err)
		}
	}
	if !slices.ContainsFunc(i.roots, func(r *x509.Certificate) bool { return last.Equal(r) || last.CheckSignatureFrom(r) == nil }) {
		return fmt.Errorf("the last certificate in %s is issued by none of the roots in %s: add those in between, or that root",
			d.config.Certificate, d.config.Roots)
	}
	return nil
}

func checkIssuer(c *x509.Certificate, now time.Time) error {
	switch {
	case !c.IsCA || !c.BasicConstraintsValid:
		return errors.New("is not that of a CA")
	case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("may not sign certificates: its key usage lacks keyCertSign")
	case c.MaxPathLenZero && c.MaxPathLen == 0:
		return errors.New("has path length 0, so no intermediate can be below it: use a CA with path length 1 or more, or none")
	case now.Before(c.NotBefore):
		return fmt.Errorf("is valid from %s on only", c.NotBefore.UTC().Format(time.RFC3339))
	case c.NotAfter.Sub(now) < minLife:
		return fmt.Errorf("ends at %s: put its successor there", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// readKey reads the one private key in a PEM file that only its owner can read.
func readKey(path string) (crypto.Signer, error) {
	data, err := upstream.ReadSecret(path)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	block, rest := pem.Decode(data)
	for block != nil && block.Type == "EC PARAMETERS" { // as openssl writes them before a key
		block, rest = pem.Decode(rest)
	}
	switch {
	case block == nil:
		return nil, fmt.Errorf("%s: no PEM key is in it", path)
	case bytes.Contains(rest, []byte("-----BEGIN")):
		return nil, fmt.Errorf("%s: more than a key is in it", path)
	}
	defer clear(block.Bytes)
	var key any
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		if block.Headers["DEK-Info"] != "" {
			return nil, fmt.Errorf("%s: the key is encrypted: store it decrypted with mode 0600, or keep it in a KMS", path)
		}
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, fmt.Errorf("%s: the key is encrypted: store it decrypted with mode 0600, or keep it in a KMS", path)
	default:
		return nil, fmt.Errorf("%s: there is a %.40q in it, not a private key", path, block.Type)
	}
	if err != nil {
		// The library's error may quote what it could not read.
		return nil, fmt.Errorf("%s: the private key is malformed", path)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a key of type %T cannot sign", path, key)
	}
	return signer, nil
}
