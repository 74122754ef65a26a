package upstream

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/meshid/meshid/internal/pkcs10"
)

// X.509-SVIDs that the upstream CA signs itself. What a node sends is passed on to a
// CA that may put into a certificate whatever a request asks for: the request has to be,
// to the byte, the one that asks for the names of the registration entry.

// ErrNames is wrapped by errors of NewLeaf: the request asks for something else.
var ErrNames = errors.New("the request is not the one that asks for exactly these names")

// ErrLife is wrapped by errors of NewLeaf: the CA does not sign for so short a time.
var ErrLife = errors.New("too short for the upstream CA")

// leafSlack is by how much a leaf may outlive what was asked for, by our clock.
const leafSlack = time.Minute

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	emptyName         = []byte{0x30, 0x00}
)

// NewLeaf makes the request for an X.509-SVID of td out of one that the holder of its
// key has made, and whose proof of possession was verified. spki is the key for which,
// and names are those with which it is to be signed. The life is ttl as far as c allows;
// less than c allows is not made more.
func NewLeaf(td spiffeid.TrustDomain, csr, spki []byte, names pkcs10.Names, ttl time.Duration, c Capabilities) (*Request, error) {
	parsed, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("%w: it cannot be read", ErrNames)
	}
	want, err := pkcs10.Info(spki, names)
	if err != nil {
		return nil, fmt.Errorf("describe the request for %s: %w", names.URI, err)
	}
	if !bytes.Equal(parsed.RawTBSCertificateRequest, want) {
		return nil, fmt.Errorf("%w: %s and the DNS names %q", ErrNames, names.URI, names.DNS)
	}
	life := c.life(ttl)
	if life > ttl+time.Second {
		return nil, fmt.Errorf("%w: %s, and it signs for %s at least", ErrLife, ttl, life)
	}
	return &Request{CSR: csr, Request: parsed, TTL: life, td: td, leaf: &names}, nil
}

// checkLeaf holds a leaf to the profile of X.509-SVIDs, and to what was asked for.
func (r *Request) checkLeaf(now time.Time, c *x509.Certificate) error {
	switch {
	case !bytes.Equal(c.RawSubjectPublicKeyInfo, r.Request.RawSubjectPublicKeyInfo):
		return errors.New("is for another key than was asked for")
	case c.IsCA:
		return errors.New("is a CA certificate (x509-svid §4.1): the profile or template used there must be one for leaves")
	case c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return errors.New("may sign certificates or CRLs (x509-svid §4.3)")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("lacks the key usage digitalSignature (x509-svid §4.3)")
	case len(c.ExtKeyUsage) != 2 || len(c.UnknownExtKeyUsage) > 0 ||
		!slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return errors.New("is not for the authentication of servers and clients, and nothing else (x509-svid §4.4): set the extended key usage in the profile or template used there")
	case len(c.UnhandledCriticalExtensions) > 0:
		return fmt.Errorf("has the unknown critical extension %s", c.UnhandledCriticalExtensions[0])
	case c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > 159:
		return errors.New("has a serial number that is not positive, or has more than 20 bytes")
	case c.NotBefore.After(now):
		return fmt.Errorf("is valid from %s on, which is in the future: compare the clocks", c.NotBefore.UTC().Format(time.RFC3339))
	case c.NotAfter.Sub(now) > r.TTL+leafSlack:
		return fmt.Errorf("lives until %s, and %s was asked for: have the CA keep to that, or limit the life in the profile or template used there",
			c.NotAfter.UTC().Format(time.RFC3339), r.TTL)
	case c.NotAfter.Sub(now) < minLife:
		return fmt.Errorf("ends at %s, too soon to be of use", c.NotAfter.UTC().Format(time.RFC3339))
	}
	if !critical(c, oidKeyUsage) {
		return errors.New("has a key usage that is not critical (x509-svid §4.3)")
	}
	if bytes.Equal(c.RawSubject, emptyName) && !critical(c, oidSubjectAltName) {
		return errors.New("has neither a subject nor critical names (RFC 5280 §4.2.1.6)")
	}
	return r.checkNames(c)
}

func critical(c *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) && e.Critical })
}

// checkNames compares the bytes of the names: crypto/x509 would show `SPIFFE://` as
// `spiffe://`. Their order is the CA's.
func (r *Request) checkNames(c *x509.Certificate) error {
	uris, dns := []string{}, []string{}
	for _, e := range c.Extensions {
		if !e.Id.Equal(oidSubjectAltName) {
			continue
		}
		names, value := cryptobyte.String(nil), cryptobyte.String(e.Value)
		if !value.ReadASN1(&names, cryptobyteasn1.SEQUENCE) || !value.Empty() {
			return errors.New("has malformed names")
		}
		for !names.Empty() {
			var name cryptobyte.String
			var tag cryptobyteasn1.Tag
			if !names.ReadAnyASN1(&name, &tag) {
				return errors.New("has malformed names")
			}
			switch tag {
			case cryptobyteasn1.Tag(6).ContextSpecific():
				uris = append(uris, string(name))
			case cryptobyteasn1.Tag(2).ContextSpecific():
				dns = append(dns, string(name))
			default:
				return errors.New("has names of a type that was not asked for")
			}
		}
	}
	if len(uris) != 1 || uris[0] != r.leaf.URI {
		return fmt.Errorf("is named %.512q, not %q: the CA must take the URI name of a request as it is", uris, r.leaf.URI)
	}
	if want := slices.Sorted(slices.Values(r.leaf.DNS)); !slices.Equal(slices.Sorted(slices.Values(dns)), want) {
		return fmt.Errorf("has the DNS names %.512q, not %.512q", dns, want)
	}
	return nil
}
