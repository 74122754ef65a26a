package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// root is immutable.
type root struct {
	id       string
	cert     *x509.Certificate
	state    string
	spkiHash [32]byte
	since    time.Time // when it took its state
	sequence uint64    // of the first bundle that held it
	// automatic and tainted are as in Root; reference is that of its key.
	automatic, tainted bool
	reference          string
	// foreign roots are those of an upstream CA: their keys are not ours.
	foreign bool
	key     crypto.Signer // nil unless this is the state's signer, and ours
}

// authority is an intermediate with its key. It is immutable but for its atomics.
type authority struct {
	id       string
	cert     *x509.Certificate
	root     *root
	spkiHash [32]byte
	// chain is DER: this certificate, and those between it and the root.
	chain [][]byte
	// above is what ends first of all that it is below.
	above *x509.Certificate

	// notBefore is the certificate's; notAfter is the first end in the chain.
	notBefore, notAfter time.Time
	// leafEnd is the latest NotAfter of a leaf: a margin before the issuer's.
	leafEnd time.Time
	// made is when it was, and renewAt half of its life later.
	made, renewAt time.Time

	key      crypto.Signer // in memory; nil for the upstream CA, if that signs each leaf
	scheme   *scheme
	template template
	// record is shared by the ledger records of all that it signs: read only.
	record *ledgerv1.Authority
	// own is there instead of a key.
	own *ownLeaf
	// listing is what it has to know to revoke by a list; nil if it does not.
	listing *listing
	// lastLeaf is the greatest NotAfter that it has signed, in Unix seconds.
	lastLeaf atomic.Int64
	// suspect is set when a signature did not verify: its key is replaced.
	suspect atomic.Bool
}

func (a *authority) describe(state string) Authority {
	return Authority{ID: a.id, Role: RoleIntermediate, State: state, Certificate: a.cert}
}

// under is the chain of a leaf that the authority has signed.
func (a *authority) under(leaf []byte) [][]byte {
	chain := make([][]byte, 1, 1+len(a.chain))
	chain[0] = leaf
	return append(chain, a.chain...)
}

// usable reports whether the authority can sign a leaf of the least life at now.
func (a *authority) usable(now time.Time) bool {
	return !now.Before(a.notBefore) && a.leafEnd.Sub(now) >= minRemaining
}

// sawLeaf keeps the greatest NotAfter.
func (a *authority) sawLeaf(notAfter int64) {
	for {
		last := a.lastLeaf.Load()
		if notAfter <= last || a.lastLeaf.CompareAndSwap(last, notAfter) {
			return
		}
	}
}

// The margin by which what is signed ends before its issuer.
const (
	minMargin = time.Second
	maxMargin = time.Minute
)

func margin(life time.Duration) time.Duration {
	return min(max(life/100, minMargin), maxMargin)
}

// makeRoot makes a self-signed root for key.
func makeRoot(td spiffeid.TrustDomain, subject Subject, key crypto.Signer, now time.Time, life time.Duration) (*x509.Certificate, error) {
	t, err := authorityTemplate(td, subject.name(td, RoleRoot), key.Public())
	if err != nil {
		return nil, err
	}
	t.NotBefore = floor(now.Add(-rootBackdate))
	t.NotAfter = floor(now.Add(life))
	t.AuthorityKeyId = t.SubjectKeyId
	return sign(t, t, key.Public(), key)
}

// makeIntermediate makes an intermediate with a new key, signed by r and checked
// as the certificate of another would be.
func (c *CA) makeIntermediate(r *root, sequence uint64, now time.Time) (*authority, error) {
	key, err := c.cfg.IntermediateKey.Generate()
	if err != nil {
		return nil, err
	}
	cert, err := c.certify(r, key.Public(), now, c.intermediateEnd(r, now))
	if err != nil {
		return nil, err
	}
	return newAuthority([]*x509.Certificate{cert}, cert.NotAfter, r, key, sequence, now)
}

// certify has r sign an intermediate for a key, and checks what was signed.
func (c *CA) certify(r *root, pub crypto.PublicKey, now, notAfter time.Time) (*x509.Certificate, error) {
	t, err := authorityTemplate(c.cfg.TrustDomain, c.cfg.Subject.name(c.cfg.TrustDomain, RoleIntermediate), pub)
	if err != nil {
		return nil, err
	}
	t.MaxPathLenZero = true
	t.NotBefore = later(floor(now.Add(-2*c.cfg.Backdate)), r.cert.NotBefore)
	t.NotAfter = notAfter
	if c.cfg.NameConstraints {
		constrain(t, c.cfg.TrustDomain)
	}
	if now.Before(r.cert.NotBefore) {
		return nil, fmt.Errorf("the root is valid from %s on and the clock says %s: correct the clock: %w",
			r.cert.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), ErrNoAuthority)
	}
	if t.NotAfter.Sub(now) < 2*MinTTL {
		return nil, fmt.Errorf("the root expires at %s, too soon for an intermediate: a new root is needed: %w",
			r.cert.NotAfter.UTC().Format(time.RFC3339), ErrNoAuthority)
	}
	cert, err := sign(t, r.cert, pub, r.key)
	if err != nil {
		return nil, fmt.Errorf("sign it with root %s: %w", r.id, err)
	}
	if err := checkIntermediate(cert, r.cert, c.cfg.TrustDomain); err != nil {
		return nil, fmt.Errorf("check what root %s signed: %w", r.id, err)
	}
	return cert, nil
}

// intermediateEnd is when an intermediate made at now would expire.
func (c *CA) intermediateEnd(r *root, now time.Time) time.Time {
	end := floor(now.Add(c.cfg.IntermediateLife))
	if last := r.cert.NotAfter.Add(-maxMargin); end.After(last) {
		end = last
	}
	return end
}

// newAuthority makes an authority of a chain that begins with its certificate and
// is good until notAfter.
func newAuthority(chain []*x509.Certificate, notAfter time.Time, r *root, key crypto.Signer, sequence uint64, now time.Time) (*authority, error) {
	cert := chain[0]
	if err := selfCheck(key, cert.PublicKey); err != nil {
		return nil, fmt.Errorf("check its key: %w", err)
	}
	scheme, err := schemeOf(key)
	if err != nil {
		return nil, fmt.Errorf("prepare its key: %w", err)
	}
	life := notAfter.Sub(now)
	fingerprint := sha256.Sum256(cert.Raw)
	a := &authority{
		id:        hex.EncodeToString(cert.SubjectKeyId),
		cert:      cert,
		root:      r,
		spkiHash:  sha256.Sum256(cert.RawSubjectPublicKeyInfo),
		notBefore: cert.NotBefore,
		notAfter:  notAfter,
		leafEnd:   floor(notAfter.Add(-margin(life))),
		made:      now.Round(0),
		renewAt:   now.Round(0).Add(life / 2),
		key:       key,
		scheme:    scheme,
		template:  newTemplate(scheme.algorithm, cert.RawSubject, cert.SubjectKeyId),
	}
	a.above = r.cert
	for i, c := range chain {
		a.chain = append(a.chain, c.Raw)
		if i > 0 && c.NotAfter.Before(a.above.NotAfter) {
			a.above = c
		}
	}
	a.record = &ledgerv1.Authority{
		Id: a.id, Role: RoleIntermediate, State: StateActive, Sha256: fingerprint[:],
		NotAfter: timestamppb.New(a.notAfter), BundleSequence: sequence,
	}
	return a, nil
}

// authorityTemplate is what roots and intermediates have in common
// (X509-SVID §3.2, §4.1, §4.3). They have no extended key usage: what they sign
// for is not narrowed by it.
func authorityTemplate(td spiffeid.TrustDomain, subject pkix.Name, pub crypto.PublicKey) (*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encode its public key: %w", err)
	}
	ski, err := keyIdentifier(spki)
	if err != nil {
		return nil, err
	}
	// Two authorities never have the same subject, so path building by name alone
	// finds the right one.
	subject.SerialNumber = hex.EncodeToString(ski[:8])
	var serial [16]byte
	newSerial(&serial)
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(serial[:]),
		Subject:               subject,
		SubjectKeyId:          ski[:],
		URIs:                  []*url.URL{td.ID().URL()},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}, nil
}

// constrain permits the trust domain's URIs only. A trust domain that looks like
// an IPv4 address stays unconstrained: RFC 5280 §4.2.1.10 allows no such
// constraint, and verifiers refuse to compare with one.
func constrain(t *x509.Certificate, td spiffeid.TrustDomain) {
	if _, err := netip.ParseAddr(td.Name()); err == nil {
		return
	}
	t.PermittedDNSDomainsCritical = true
	t.PermittedURIDomains = []string{td.Name()}
}

// sign makes a certificate with crypto/x509, which verifies the signature, and
// parses it back.
func sign(t, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// checkSigning holds roots and intermediates, ours and others', to the profile.
func checkSigning(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("it is not a CA certificate (x509-svid §4.1)")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its key usage lacks keyCertSign (x509-svid §4.3)")
	case len(cert.URIs) != 1:
		return fmt.Errorf("it has %d uri names: exactly %q is needed", len(cert.URIs), td.IDString())
	case cert.URIs[0].String() != td.IDString():
		return fmt.Errorf("it is an authority of %q and this is %q: use the data directory of that trust domain", cert.URIs[0], td.IDString())
	case len(cert.SubjectKeyId) == 0 || len(cert.RawSubject) <= 2:
		return errors.New("it lacks a subject or a subject key identifier")
	case len(cert.UnhandledCriticalExtensions) > 0:
		return fmt.Errorf("it has the unknown critical extension %s", cert.UnhandledCriticalExtensions[0])
	}
	for _, e := range cert.Extensions {
		if e.Id.Equal([]int{2, 5, 29, 15}) && !e.Critical {
			return errors.New("its key usage is not critical (x509-svid §4.3)")
		}
	}
	return nil
}

// checkRoot holds a root to the profile at now. Envoy's SPIFFE validator accepts
// self-signed anchors only.
func checkRoot(cert *x509.Certificate, td spiffeid.TrustDomain) error {
	if err := checkSigning(cert, td); err != nil {
		return err
	}
	if !bytes.Equal(cert.RawIssuer, cert.RawSubject) {
		return errors.New("it is not self-signed")
	}
	if err := cert.CheckSignatureFrom(cert); err != nil {
		return fmt.Errorf("it is not self-signed: %w", err)
	}
	if cert.MaxPathLenZero {
		return errors.New("its path length is 0: it cannot sign an intermediate")
	}
	return nil
}

func checkIntermediate(cert, parent *x509.Certificate, td spiffeid.TrustDomain) error {
	if err := checkSigning(cert, td); err != nil {
		return err
	}
	if err := cert.CheckSignatureFrom(parent); err != nil {
		return err
	}
	switch {
	case !cert.MaxPathLenZero:
		return errors.New("its path length is not 0")
	case cert.NotBefore.Before(parent.NotBefore) || !cert.NotAfter.Before(parent.NotAfter):
		return errors.New("it is valid when its issuer is not")
	case !bytes.Equal(cert.AuthorityKeyId, parent.SubjectKeyId):
		return errors.New("its authority key identifier is not its issuer's")
	}
	return nil
}

// selfCheck proves that key signs and that pub, taken from the certificate,
// verifies it. A key store that gives out another key is found here.
func selfCheck(key crypto.Signer, pub crypto.PublicKey) error {
	message := make([]byte, 32)
	_, _ = rand.Read(message) // never fails
	digest := sha256.Sum256(message)
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			return fmt.Errorf("sign a probe: %w", err)
		}
		if !ecdsa.VerifyASN1(pub, digest[:], signature) {
			return errWrongKey
		}
	case *rsa.PublicKey:
		signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil {
			return fmt.Errorf("sign a probe: %w", err)
		}
		if rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], signature) != nil {
			return errWrongKey
		}
	case ed25519.PublicKey:
		signature, err := key.Sign(rand.Reader, message, crypto.Hash(0))
		if err != nil {
			return fmt.Errorf("sign a probe: %w", err)
		}
		if !ed25519.Verify(pub, message, signature) {
			return errWrongKey
		}
	default:
		return fmt.Errorf("keys of type %T are not supported", pub)
	}
	return nil
}

var errWrongKey = errors.New("the certificate's public key does not verify what the private key signs: the two do not belong together, restore both from one backup")

// keyIdentifier is RFC 7093 §2 method 1: the first 160 bits of the SHA-256 of
// the key's bits.
func keyIdentifier(spki []byte) (id [20]byte, err error) {
	input, bits := cryptobyte.String(spki), cryptobyte.String(nil)
	var unused uint8
	if !input.ReadASN1(&input, cryptobyteasn1.SEQUENCE) ||
		!input.SkipASN1(cryptobyteasn1.SEQUENCE) ||
		!input.ReadASN1(&bits, cryptobyteasn1.BIT_STRING) ||
		!input.Empty() || !bits.ReadUint8(&unused) || unused != 0 {
		return id, errors.New("malformed public key")
	}
	sum := sha256.Sum256(bits)
	copy(id[:], sum[:])
	return id, nil
}

// newSerial fills s with 126 random bits, as a positive integer whose DER is
// always 16 bytes long. X.509 wants 64 bits or more.
func newSerial(s *[16]byte) {
	_, _ = rand.Read(s[:]) // never fails
	s[0] = s[0]&0x3f | 0x40
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// floor and ceil are to the second, certificates know no less. They drop the
// monotonic clock: what they return is compared as wall time.
func floor(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

func ceil(t time.Time) time.Time {
	f := floor(t)
	if f.Before(t.Round(0)) {
		f = f.Add(time.Second)
	}
	return f
}
