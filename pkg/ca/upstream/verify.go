package upstream

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds on what is accepted of an upstream CA. Agents accept chains of six
// certificates, of which the leaf is one and the root may be another.
const (
	// MaxChain is the number of certificates of a chain, root not included.
	MaxChain = 4
	// MaxRoots is the number of roots of one answer.
	MaxRoots = 16
	// MaxCertificate is the size of one certificate in bytes.
	MaxCertificate = 1 << 14

	// minLife is the least life of an intermediate that is of use.
	minLife = 20 * time.Second
	// clockSkew is how far in the future an intermediate may begin to be valid.
	clockSkew = time.Minute
	// minRSA is the least size of an RSA key, in bits.
	minRSA = 2048
)

var (
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
)

// NewRequest makes the request for an intermediate of td, which lives for ttl as
// far as c allows. The key is used to sign the request, and by Verify. The error wraps
// ErrDenied if the CA certifies no such key.
func NewRequest(td spiffeid.TrustDomain, key crypto.Signer, subject pkix.Name, ttl time.Duration, c Capabilities) (*Request, error) {
	constraints, err := asn1.Marshal(struct {
		IsCA       bool
		MaxPathLen int
	}{true, 0})
	if err != nil {
		return nil, fmt.Errorf("encode basic constraints: %w", err)
	}
	// keyCertSign is bit 5 and cRLSign bit 6 (RFC 5280 §4.2.1.3).
	usage, err := asn1.Marshal(asn1.BitString{Bytes: []byte{0x06}, BitLength: 7})
	if err != nil {
		return nil, fmt.Errorf("encode key usage: %w", err)
	}
	t := &x509.CertificateRequest{
		Subject: subject,
		ExtraExtensions: []pkix.Extension{
			{Id: oidBasicConstraints, Critical: true, Value: constraints},
			{Id: oidKeyUsage, Critical: true, Value: usage},
		},
	}
	if !c.NoURI {
		t.URIs = []*url.URL{td.ID().URL()}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, t, key)
	if err != nil {
		return nil, fmt.Errorf("sign the request: %w", err)
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("read the request back: %w", err)
	}
	if c.KeyTypes != nil && !slices.Contains(c.KeyTypes, parsed.PublicKeyAlgorithm) {
		return nil, fmt.Errorf("%w: it certifies keys of the kinds %v, not %s: set authority.intermediate_key_type", ErrDenied, c.KeyTypes, parsed.PublicKeyAlgorithm)
	}
	return &Request{CSR: der, Request: parsed, TTL: c.life(ttl), td: td, key: key, noURI: c.NoURI}, nil
}

// life is the nearest to ttl that the CA signs for.
func (c Capabilities) life(ttl time.Duration) time.Duration {
	ttl = max(ttl, c.MinTTL)
	if c.MaxTTL > 0 {
		ttl = min(ttl, c.MaxTTL)
	}
	if unit := c.TTLGranularity; unit > 0 {
		if up := (ttl + unit - 1).Truncate(unit); c.MaxTTL == 0 || up <= c.MaxTTL {
			return up
		}
		ttl = max(ttl.Truncate(unit), unit)
	}
	return ttl
}

// Verified is an answer that holds what was asked for.
type Verified struct {
	// Chain begins with what was asked for. No root is in it.
	Chain []*x509.Certificate
	// Anchors are the roots that the chain can be verified with, at least one.
	Anchors []*x509.Certificate
	// Roots are all roots of the CA, each fit to be in a trust bundle.
	Roots []*x509.Certificate
	// NotAfter is the first end of validity in the chain; for an intermediate at most an
	// hour later than what Request.TTL asks for, for a leaf its own.
	NotAfter time.Time
}

// Verify holds an answer against the request, at now, as if the CA were hostile:
// bounds, the key, a CA certificate for this trust domain and nothing else or the leaf
// as asked for, its validity, and a chain through which a leaf can be verified up to a
// root. What is wrong is in the error, which says "the upstream CA" for who has done it.
func (r *Request) Verify(now time.Time, m *Minted) (*Verified, error) {
	if m == nil {
		return nil, errors.New("the upstream CA answered nothing")
	}
	if err := checkBounds(m); err != nil {
		return nil, fmt.Errorf("the upstream CA %w", err)
	}
	v := &Verified{}
	for i, root := range m.Roots {
		if err := CheckRoot(r.td, root); err != nil {
			return nil, fmt.Errorf("root %d of the upstream CA (%.100q): %w", i+1, root.Subject, err)
		}
		if !slices.ContainsFunc(v.Roots, root.Equal) {
			v.Roots = append(v.Roots, root)
		}
	}
	for _, c := range m.Chain {
		// Some CAs name a certificate twice, or their root.
		if !slices.ContainsFunc(v.Chain, c.Equal) && !slices.ContainsFunc(v.Roots, c.Equal) {
			v.Chain = append(v.Chain, c)
		}
	}
	if len(v.Chain) == 0 {
		return nil, errors.New("the upstream CA returned its root in place of what was asked for")
	}
	if r.leaf != nil {
		if err := r.checkLeaf(now, v.Chain[0]); err != nil {
			return nil, fmt.Errorf("the X.509-SVID from the upstream CA %w", err)
		}
	} else if err := r.checkIntermediate(now, v.Chain[0]); err != nil {
		return nil, fmt.Errorf("the intermediate from the upstream CA %w", err)
	}
	if err := r.checkChain(now, v); err != nil {
		return nil, fmt.Errorf("the chain from the upstream CA %w", err)
	}
	return v, nil
}

func checkBounds(m *Minted) error {
	switch {
	case len(m.Chain) == 0:
		return errors.New("returned no certificate")
	case len(m.Chain) > 2*MaxChain:
		return fmt.Errorf("returned a chain of %d certificates: at most %d are accepted", len(m.Chain), MaxChain)
	case len(m.Roots) == 0:
		return errors.New("returned no root: configure its roots where it does not say them")
	case len(m.Roots) > MaxRoots:
		return fmt.Errorf("returned %d roots: at most %d are accepted", len(m.Roots), MaxRoots)
	}
	for _, c := range slices.Concat(m.Chain, m.Roots) {
		if c == nil {
			return errors.New("returned an empty certificate")
		}
		if len(c.Raw) > MaxCertificate {
			return fmt.Errorf("returned a certificate of %d bytes: at most %d are accepted", len(c.Raw), MaxCertificate)
		}
	}
	return nil
}

// checkIntermediate compares the certificate with the request.
func (r *Request) checkIntermediate(now time.Time, c *x509.Certificate) error {
	pub, ok := r.key.Public().(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !ok || !pub.Equal(c.PublicKey):
		return errors.New("is for another key than was asked for")
	case !c.BasicConstraintsValid || !c.IsCA:
		return errors.New("is not a CA certificate (x509-svid §4.1): the profile or template used there must be one for subordinate CAs")
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("lacks the key usage keyCertSign (x509-svid §4.3)")
	case len(c.SubjectKeyId) == 0 || len(c.RawSubject) <= 2:
		return errors.New("lacks a subject or a subject key identifier")
	case len(c.SubjectKeyId) > 32:
		return fmt.Errorf("has a subject key identifier of %d bytes", len(c.SubjectKeyId))
	case len(c.UnhandledCriticalExtensions) > 0:
		return fmt.Errorf("has the unknown critical extension %s", c.UnhandledCriticalExtensions[0])
	case len(c.DNSNames) > 0 || len(c.EmailAddresses) > 0 || len(c.IPAddresses) > 0:
		return errors.New("has names that were not asked for")
	case len(c.URIs) == 0 && !r.noURI:
		return fmt.Errorf("lacks the name %s, which was asked for: allow URI names in the profile or template used there", r.td.IDString())
	case len(c.URIs) > 1 || len(c.URIs) == 1 && c.URIs[0].String() != r.td.IDString():
		return fmt.Errorf("is named %.255q, not %q", c.URIs, r.td.IDString())
	case c.NotBefore.After(now.Add(clockSkew)):
		return fmt.Errorf("is valid from %s on, which is in the future: compare the clocks", c.NotBefore.UTC().Format(time.RFC3339))
	case c.NotAfter.Sub(now) < minLife:
		return fmt.Errorf("ends at %s, too soon to be of use", c.NotAfter.UTC().Format(time.RFC3339))
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(oidKeyUsage) && !e.Critical {
			return errors.New("has a key usage that is not critical (x509-svid §4.3)")
		}
	}
	return nil
}

// checkChain finds the anchors and the common end of validity.
func (r *Request) checkChain(now time.Time, v *Verified) error {
	authorities := v.Chain
	if r.leaf != nil {
		authorities = v.Chain[1:]
	}
	if len(authorities) > MaxChain {
		return fmt.Errorf("has %d certificates of CAs: at most %d are accepted", len(authorities), MaxChain)
	}
	v.NotAfter = now.Add(r.TTL + time.Hour)
	for i, c := range v.Chain {
		if err := checkKey(c); err != nil {
			return fmt.Errorf("has certificate %d, which %w", i+1, err)
		}
		if i+1 < len(v.Chain) {
			if err := c.CheckSignatureFrom(v.Chain[i+1]); err != nil {
				return fmt.Errorf("is broken: certificate %d is not issued by the next one: %w", i+1, err)
			}
		}
		if c.NotAfter.Before(v.NotAfter) {
			v.NotAfter = c.NotAfter
		}
	}
	probe := v.Chain[0]
	if r.leaf == nil {
		var err error
		if probe, err = r.probe(now, v.Chain[0]); err != nil {
			return fmt.Errorf("cannot be tried: %w", err)
		}
	}
	var refused error
	for _, root := range v.Roots {
		if err := verifyProbe(now, probe, authorities, root); err != nil {
			refused = errors.Join(refused, err)
			continue
		}
		v.Anchors = append(v.Anchors, root)
	}
	if len(v.Anchors) == 0 {
		return fmt.Errorf("does not lead to one of its roots: %w", refused)
	}
	end := v.Anchors[0].NotAfter
	for _, a := range v.Anchors[1:] {
		if a.NotAfter.After(end) {
			end = a.NotAfter
		}
	}
	if end.Before(v.NotAfter) {
		v.NotAfter = end
	}
	if v.NotAfter.Sub(now) < minLife {
		return fmt.Errorf("ends at %s, too soon to be of use", v.NotAfter.UTC().Format(time.RFC3339))
	}
	if r.leaf != nil && v.NotAfter.Before(v.Chain[0].NotAfter) {
		return fmt.Errorf("ends at %s, before the X.509-SVID does", v.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// probe is a leaf as the intermediate will sign them. It is never given to
// anybody: its key is forgotten.
func (r *Request) probe(now time.Time, issuer *x509.Certificate) (*x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1),
		URIs:         []*url.URL{r.td.ID().URL().JoinPath("meshid", "probe")},
		NotBefore:    now.Add(-time.Second), NotAfter: now.Add(time.Second),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, issuer, key.Public(), r.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// verifyProbe is what verifiers will do: with it come path lengths, name
// constraints, extended key usages and the algorithms of signatures.
func verifyProbe(now time.Time, probe *x509.Certificate, chain []*x509.Certificate, root *x509.Certificate) error {
	anchors, intermediates := x509.NewCertPool(), x509.NewCertPool()
	anchors.AddCert(root)
	for _, c := range chain {
		intermediates.AddCert(c)
	}
	// An intermediate that begins within the accepted skew counts as valid.
	if len(chain) > 0 && chain[0].NotBefore.After(now) {
		now = chain[0].NotBefore
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := probe.Verify(x509.VerifyOptions{
			Roots: anchors, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
		}); err != nil {
			return err
		}
	}
	return nil
}

// CheckRoot says whether root may be in the trust bundle of td. Envoy's SPIFFE
// validator accepts self-signed anchors only; that the root carries the trust
// domain's name is not required (X509-SVID §3.2), another one's is refused.
func CheckRoot(td spiffeid.TrustDomain, root *x509.Certificate) error {
	switch {
	case !root.BasicConstraintsValid || !root.IsCA:
		return errors.New("it is not a CA certificate")
	case root.KeyUsage != 0 && root.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its key usage lacks keyCertSign")
	case len(root.RawSubject) <= 2:
		return errors.New("it lacks a subject")
	case root.MaxPathLen == 0 && root.MaxPathLenZero:
		return errors.New("its path length is 0: it cannot sign an intermediate")
	}
	if err := root.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("it is not self-signed: %w", err)
	}
	if err := checkKey(root); err != nil {
		return fmt.Errorf("it %w", err)
	}
	for _, uri := range root.URIs {
		if uri.Scheme == "spiffe" && uri.String() != td.IDString() {
			return fmt.Errorf("it belongs to %.255q, not to %q", uri, td.IDString())
		}
	}
	return nil
}

// checkKey refuses keys that verifiers refuse or should.
func checkKey(c *x509.Certificate) error {
	switch pub := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if pub.N.BitLen() < minRSA {
			return fmt.Errorf("has an RSA key of %d bits: at least %d are needed", pub.N.BitLen(), minRSA)
		}
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P224() {
			return errors.New("has a P-224 key: P-256 or more is needed")
		}
	}
	return nil
}
