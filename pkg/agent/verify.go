package agent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// Bounds on what the CA may send. All of it is treated as if the CA were
// hostile.
const (
	maxChain       = 6       // certificates of a chain
	maxCertificate = 1 << 14 // bytes of one
	maxRoots       = 64      // of a bundle
	maxLists       = 1000    // revocation lists of a bundle
	maxListBytes   = 8 << 20 // of all of them
	// lifeSlack is added to identity.MaxTTL for back-dating.
	lifeSlack = time.Hour
)

// errClock is wrapped when a certificate is not valid at this machine's time.
var errClock = errors.New("not valid at this machine's time: check the clocks of this machine and of the CA")

// oidSAN is that of the subject alternative name extension.
var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

// certificates parses DER, and gives the same value for the same intermediate,
// of which all X.509-SVIDs have a copy. It remembers which of them lead to a root.
type certificates struct {
	chains identity.Chains

	mu    sync.Mutex // guards known
	known map[[32]byte]issuer
}

// issuer is an intermediate: all that it says, and what is kept of it by SVIDs.
type issuer struct {
	whole *x509.Certificate
	kept  *identity.Certificate
}

// maxKnown bounds the certificates that are remembered.
const maxKnown = 64

// chain parses a chain: the leaf first.
func (c *certificates) chain(der [][]byte) ([]*x509.Certificate, error) {
	if len(der) == 0 || len(der) > maxChain {
		return nil, fmt.Errorf("chain of %d certificates: 1 to %d are allowed", len(der), maxChain)
	}
	parsed := make([]*x509.Certificate, len(der))
	for n, d := range der {
		cert, err := c.parse(d, n > 0)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", n, err)
		}
		parsed[n] = cert
	}
	return parsed, nil
}

// parse parses one certificate; those that recur are remembered.
func (c *certificates) parse(der []byte, recurs bool) (*x509.Certificate, error) {
	if len(der) > maxCertificate {
		return nil, fmt.Errorf("%d bytes: at most %d are allowed", len(der), maxCertificate)
	}
	if !recurs {
		return x509.ParseCertificate(der)
	}
	sum := sha256.Sum256(der)
	c.mu.Lock()
	found, ok := c.known[sum]
	c.mu.Unlock()
	if ok {
		return found.whole, nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= maxKnown {
		c.known = make(map[[32]byte]issuer)
	}
	c.known[sum] = issuer{cert, identity.NewCertificate(cert)}
	return cert, nil
}

// keep returns what an SVID keeps of its chain, which was parsed by chain.
func (c *certificates) keep(chain []*x509.Certificate) []*identity.Certificate {
	kept := identity.NewCertificates(chain...)
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := range kept[1:] {
		if found, ok := c.known[sha256.Sum256(kept[n+1].Raw)]; ok {
			kept[n+1] = found.kept
		}
	}
	return kept
}

// parseBundle checks a bundle of td as it came from the CA. An empty one is
// never accepted: with it, nobody could be verified, or everybody.
func parseBundle(td spiffeid.TrustDomain, b *nodev1.Bundle) (*identity.Bundle, error) {
	if b.GetTrustDomain() != td.Name() {
		return nil, fmt.Errorf("bundle is of trust domain %.255q, not of %s", b.GetTrustDomain(), td.Name())
	}
	if n := len(b.GetRoots()); n == 0 || n > maxRoots {
		return nil, fmt.Errorf("bundle has %d roots: 1 to %d are allowed", n, maxRoots)
	}
	parsed := &identity.Bundle{TrustDomain: td, Sequence: b.GetSequence()}
	for n, der := range b.GetRoots() {
		if len(der) > maxCertificate {
			return nil, fmt.Errorf("root %d of the bundle has %d bytes: at most %d are allowed", n, len(der), maxCertificate)
		}
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("root %d of the bundle: %w", n, err)
		}
		if err := checkRoot(td, root); err != nil {
			return nil, fmt.Errorf("root %d of the bundle: %w", n, err)
		}
		if slices.ContainsFunc(parsed.Roots, root.Equal) {
			return nil, fmt.Errorf("root %d of the bundle is there twice", n)
		}
		parsed.Roots = append(parsed.Roots, root)
	}
	if err := parseLists(parsed, b.GetRevocationLists(), time.Now(), identity.MaxTTL); err != nil {
		return nil, err
	}
	return parsed, nil
}

// parseLists checks the revocation lists of a bundle: they are good for outage at least.
// One that is not makes the whole bundle refused, since proxies would refuse everybody
// below its issuer.
func parseLists(b *identity.Bundle, lists []*nodev1.RevocationList, now time.Time, outage time.Duration) error {
	if len(lists) > maxLists {
		return fmt.Errorf("bundle has %d revocation lists: at most %d are allowed", len(lists), maxLists)
	}
	size := 0
	issuers := make(map[string]bool, len(lists))
	for n, l := range lists {
		size += len(l.GetList()) + len(l.GetIssuer())
		if size > maxListBytes {
			return fmt.Errorf("revocation lists of the bundle: more than %d bytes", maxListBytes)
		}
		if issuers[string(l.GetIssuer())] {
			return fmt.Errorf("revocation list %d of the bundle: another one has its issuer", n)
		}
		issuers[string(l.GetIssuer())] = true
		list, err := identity.NewRevocationList(l.GetIssuer(), l.GetList(), b.Roots, now, outage)
		if err != nil {
			return fmt.Errorf("revocation list %d of the bundle: %w", n, err)
		}
		b.Lists = append(b.Lists, list)
	}
	return nil
}

// checkRoot says whether root may anchor td.
func checkRoot(td spiffeid.TrustDomain, root *x509.Certificate) error {
	if !root.IsCA || !root.BasicConstraintsValid {
		return errors.New("not a CA certificate")
	}
	// Envoy's SPIFFE validator accepts no anchor that is not self-signed.
	if err := root.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("not self-signed: %w", err)
	}
	for _, uri := range root.URIs { // X509-SVID §3.2: not of another trust domain
		if uri.Scheme == "spiffe" && uri.Host != td.Name() {
			return fmt.Errorf("belongs to trust domain %.255q", uri.Host)
		}
	}
	return nil
}

// sameContent says whether two bundles have the same content.
func sameContent(a, b *identity.Bundle) bool {
	same := func(a, b *identity.RevocationList) bool { return bytes.Equal(a.List, b.List) }
	if len(a.Roots) != len(b.Roots) || !slices.EqualFunc(a.Lists, b.Lists, same) {
		return false
	}
	for _, r := range a.Roots {
		if !slices.ContainsFunc(b.Roots, r.Equal) {
			return false
		}
	}
	return true
}

// expectation is what an X.509-SVID must say.
type expectation struct {
	key      *ecdsa.PrivateKey // nil: any
	id       func(uri string) error
	dnsNames []string // nil and anyNames: not checked
	anyNames bool
	usage    x509.ExtKeyUsage
	maxLife  time.Duration // 0: not checked
}

// exactly accepts one SPIFFE ID, byte by byte.
func exactly(id spiffeid.ID) func(string) error {
	return func(uri string) error {
		if uri != id.String() {
			return fmt.Errorf("is for %.2048q, not for %s", uri, id)
		}
		return nil
	}
}

// verify checks an X.509-SVID as X509-SVID §5 has it and beyond: the names are
// compared as bytes, since URI parsers normalize. See identity.Chains for the
// proof.
func (c *certificates) verify(now time.Time, chain, roots []*x509.Certificate, want expectation) (*identity.Proof, error) {
	leaf := chain[0]
	uri, err := uriSAN(leaf)
	if err != nil {
		return nil, err
	}
	if err := want.id(uri); err != nil {
		return nil, err
	}
	if err := checkProfile(now, leaf, want); err != nil {
		return nil, err
	}
	return c.chains.Verify(now, chain, roots, want.usage)
}

// checkProfile checks what a leaf says besides its SPIFFE ID.
func checkProfile(now time.Time, leaf *x509.Certificate, want expectation) error {
	switch {
	case leaf.IsCA:
		return errors.New("is a CA certificate") // X509-SVID §5.2
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("may sign certificates or CRLs")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("may not be used for signatures")
	case len(leaf.EmailAddresses) > 0 || len(leaf.IPAddresses) > 0:
		return errors.New("has names other than URI and DNS")
	case !want.anyNames && !sameNames(leaf.DNSNames, want.dnsNames):
		return fmt.Errorf("has DNS names %.1024q, not %q", leaf.DNSNames, want.dnsNames)
	case !leaf.NotAfter.After(leaf.NotBefore):
		return errors.New("expires before it is valid")
	case want.maxLife > 0 && leaf.NotAfter.Sub(now) > want.maxLife:
		return fmt.Errorf("is valid until %v, longer than %v from now", leaf.NotAfter.UTC(), want.maxLife)
	}
	if want.key != nil {
		pub, ok := leaf.PublicKey.(*ecdsa.PublicKey)
		if !ok || !want.key.PublicKey.Equal(pub) {
			return errors.New("is for another key")
		}
	}
	if leaf.NotBefore.After(now) || !leaf.NotAfter.After(now) {
		return fmt.Errorf("valid from %v to %v: %w", leaf.NotBefore.UTC(), leaf.NotAfter.UTC(), errClock)
	}
	return nil
}

// uriSAN returns the bytes of the certificate's only URI name.
func uriSAN(cert *x509.Certificate) (string, error) {
	n := slices.IndexFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidSAN) })
	if n < 0 {
		return "", errors.New("has no names")
	}
	var names asn1.RawValue
	if rest, err := asn1.Unmarshal(cert.Extensions[n].Value, &names); err != nil || len(rest) > 0 || names.Tag != asn1.TagSequence {
		return "", errors.New("has malformed names")
	}
	const tagURI = 6
	found := ""
	for rest := names.Bytes; len(rest) > 0; {
		var name asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &name); err != nil {
			return "", errors.New("has malformed names")
		}
		if name.Class != asn1.ClassContextSpecific || name.Tag != tagURI {
			continue
		}
		if found != "" || len(name.Bytes) == 0 { // X509-SVID §2: exactly one
			return "", errors.New("has more than one URI, or an empty one")
		}
		found = string(name.Bytes)
	}
	if found == "" {
		return "", errors.New("has no URI")
	}
	return found, nil
}

// sameNames compares DNS names without regard to their order.
func sameNames(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// trust is what the CA is verified with: roots, or if there are none the SHA-256
// of the root that the CA sends with its chain.
type trust struct {
	roots  []*x509.Certificate
	pin    []byte
	failed atomic.Bool // a peer was not the CA
}

// tlsToCA is the configuration of connections to the CA. certificate is the
// agent's own, nil before it has one.
//
// The CA is known by its SPIFFE ID, which Go's own verification cannot look for:
// it wants a DNS name. That part has to be switched off, and verifyCA does all
// of it, on every connection.
func tlsToCA(td spiffeid.TrustDomain, anchors *trust, certificate func() *tls.Certificate) *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection verifies the chain, the validity and the exact SPIFFE ID
		VerifyConnection: func(state tls.ConnectionState) error {
			err := verifyCA(time.Now(), td, state.PeerCertificates, anchors.roots, anchors.pin)
			if err != nil {
				anchors.failed.Store(true)
			}
			return err
		},
	}
	if certificate != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if own := certificate(); own != nil {
				return own, nil
			}
			return nil, errors.New("no X.509-SVID to authenticate with")
		}
	}
	return c
}

// verifyCA checks the chain that a peer showed in place of the CA.
func verifyCA(now time.Time, td spiffeid.TrustDomain, chain, roots []*x509.Certificate, pin []byte) error {
	if len(chain) == 0 || len(chain) > maxChain+1 {
		return fmt.Errorf("verify the CA: %d certificates", len(chain))
	}
	if len(roots) == 0 && len(pin) == sha256.Size {
		for _, c := range chain[1:] {
			sum := sha256.Sum256(c.Raw)
			if bytes.Equal(sum[:], pin) && checkRoot(td, c) == nil {
				roots = []*x509.Certificate{c}
			}
		}
	}
	if len(roots) == 0 { // never the system's roots
		return errors.New("verify the CA: it shows no root that is trusted: check trust_anchors or root_sha256")
	}
	if _, err := (&certificates{}).verify(now, chain, roots, expectation{
		id: exactly(identity.CAID(td)), anyNames: true, usage: x509.ExtKeyUsageServerAuth,
	}); err != nil {
		return fmt.Errorf("verify the CA: its certificate %w", err)
	}
	return nil
}
