package x509pop

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/meshid/meshid/pkg/attest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// maxBundle bounds the file of trusted CAs.
const maxBundle = 1 << 20

// Config of the CA's half.
type Config struct {
	// CABundle is the path of a PEM file with the certificates of the CAs whose
	// machines may attest. It is read again when it has changed. A certificate
	// in it that is not a CA's admits itself and nothing else.
	CABundle string `yaml:"ca_bundle"`
}

// Verifier is the CA's half. It is safe for concurrent use.
type Verifier struct {
	path string

	mu     sync.Mutex // guards what follows
	loaded stamp
	roots  *x509.CertPool
}

// stamp tells one version of a file from another.
type stamp struct {
	mtime, ctime int64 // nanoseconds
	size         int64
	dev, ino     uint64
}

// NewVerifier reads the bundle and returns the CA's half.
func NewVerifier(c Config) (*Verifier, error) {
	if c.CABundle == "" {
		return nil, errors.New("x509pop: set ca_bundle to the path of a PEM file with the CAs of your machines")
	}
	v := &Verifier{path: c.CABundle}
	if _, err := v.trusted(); err != nil {
		return nil, err
	}
	return v, nil
}

// Method returns "x509pop".
func (*Verifier) Method() string { return Method }

// Verify checks the chain, then asks for a proof that its key is there.
func (v *Verifier) Verify(ctx context.Context, claim attest.Claim, challenge attest.Challenge) (*attributesv1.Node, error) {
	roots, err := v.trusted()
	if err != nil {
		return nil, err
	}
	leaf, err := verifyChain(claim.Evidence, roots, time.Now())
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w: %w", attest.ErrRefused, err)
	}
	nonce := make([]byte, nonceSize)
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("x509pop: %w", err)
	}
	m, err := statement(nonce, claim.Binding, leaf.Raw)
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w: %w", attest.ErrRefused, err)
	}
	response, err := challenge(ctx, encodeBytes(nonce))
	if err != nil {
		return nil, fmt.Errorf("x509pop: challenge: %w", err)
	}
	signature, err := decodeResponse(response)
	if err != nil {
		return nil, fmt.Errorf("x509pop: %w: %w", attest.ErrRefused, err)
	}
	if !verify(leaf.PublicKey, m, signature) {
		return nil, fmt.Errorf("x509pop: %w: the response is not signed by the certificate's key, or for another request", attest.ErrRefused)
	}
	return node(leaf), nil
}

// verifyChain returns the leaf of a chain that leads to one of roots at now.
func verifyChain(evidence []byte, roots *x509.CertPool, now time.Time) (*x509.Certificate, error) {
	ders, err := decodeChain(evidence)
	if err != nil {
		return nil, err
	}
	var leaf *x509.Certificate
	intermediates := x509.NewCertPool()
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		// Before any signature is checked: the key of a stranger's intermediate
		// decides what a check costs.
		if err := checkKey(c.PublicKey); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if i == 0 {
			leaf = c
		} else {
			intermediates.AddCert(c)
		}
	}
	if err := checkLeaf(leaf); err != nil {
		return nil, fmt.Errorf("certificate 0: %w", err)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, err
	}
	return chains[0][0], nil
}

// node is what a verified leaf says.
func node(leaf *x509.Certificate) *attributesv1.Node {
	sum := sha256.Sum256(leaf.Raw)
	id := hex.EncodeToString(sum[:])
	return &attributesv1.Node{
		Method: Method,
		Id:     id,
		X509Pop: &attributesv1.X509PoP{
			SubjectCn: leaf.Subject.CommonName,
			IssuerCn:  leaf.Issuer.CommonName,
			Serial:    leaf.SerialNumber.Text(16),
			Sha256:    id,
			DnsNames:  leaf.DNSNames,
		},
	}
}

// trusted returns the bundle as the file is now. A file that cannot be used is
// an error, and not an occasion to go on with an older one: whoever took a CA
// out of it must not be misled.
func (v *Verifier) trusted() (*x509.CertPool, error) {
	f, err := os.Open(v.path)
	if err != nil {
		return nil, fmt.Errorf("x509pop: ca_bundle: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("x509pop: ca_bundle: %w", err)
	}
	now := stampOf(st)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.roots != nil && v.loaded == now {
		return v.roots, nil
	}
	roots, err := readBundle(f)
	if err != nil {
		return nil, fmt.Errorf("x509pop: ca_bundle %s: %w", v.path, err)
	}
	v.roots, v.loaded = roots, now
	return roots, nil
}

func stampOf(st os.FileInfo) stamp {
	s := stamp{mtime: st.ModTime().UnixNano(), size: st.Size()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		s.dev, s.ino, s.ctime = sys.Dev, sys.Ino, sys.Ctim.Nano()
	}
	return s
}

// readBundle takes certificates and nothing else: a key in the file is a mistake
// that must not pass.
func readBundle(r io.Reader) (*x509.CertPool, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxBundle+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxBundle {
		return nil, fmt.Errorf("more than %d bytes", maxBundle)
	}
	pool := x509.NewCertPool()
	n := 0
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %q, want certificates only", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", n+1, err)
		}
		if err := checkKey(c.PublicKey); err != nil {
			return nil, fmt.Errorf("certificate %d (%s): %w", n+1, c.Subject, err)
		}
		pool.AddCert(c)
		n++
	}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, errors.New("the last certificate is cut off")
	}
	if n == 0 {
		return nil, errors.New("holds no certificate")
	}
	return pool, nil
}
