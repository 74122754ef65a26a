package identity

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// RevocationList says which certificates of an issuer are refused. It is immutable.
type RevocationList struct {
	// Issuer is the intermediate whose list it is, and List what it has revoked; both
	// were checked when they came in.
	Issuer *x509.Certificate
	// List is DER (RFC 5280 §5).
	List []byte
}

// NewRevocationList checks a list as if the CA were hostile: a verifier refuses
// everybody below an issuer whose list is not good, or has expired. So its issuer
// chains to one of the roots, its signature is good, and it does not expire before
// all that its issuer has signed, nor before now and outage.
func NewRevocationList(issuer, list []byte, roots []*x509.Certificate, now time.Time, outage time.Duration) (*RevocationList, error) {
	cert, err := x509.ParseCertificate(issuer)
	if err != nil {
		return nil, fmt.Errorf("its issuer: %w", err)
	}
	parsed, err := x509.ParseRevocationList(list)
	if err != nil {
		return nil, err
	}
	signer := errors.New("its issuer chains to no root of the bundle")
	for _, root := range roots {
		if bytes.Equal(root.RawSubject, cert.RawIssuer) && cert.CheckSignatureFrom(root) == nil {
			signer = nil
		}
	}
	switch {
	case signer != nil:
		return nil, signer
	case !bytes.Equal(parsed.RawIssuer, cert.RawSubject):
		return nil, errors.New("it names another issuer")
	case parsed.ThisUpdate.After(now):
		return nil, fmt.Errorf("it is good from %s on only", parsed.ThisUpdate.UTC().Format(time.RFC3339))
	case parsed.NextUpdate.Before(cert.NotAfter) || parsed.NextUpdate.Before(now.Add(outage)):
		return nil, fmt.Errorf("it ends at %s: an outage would have everybody refused", parsed.NextUpdate.UTC().Format(time.RFC3339))
	}
	if err := parsed.CheckSignatureFrom(cert); err != nil {
		return nil, fmt.Errorf("its signature: %w", err)
	}
	return &RevocationList{Issuer: cert, List: list}, nil
}

// Listed says whether the issuer of a leaf with this chain has a revocation list; it
// does too if the bundle has none at all.
func (b *Bundle) Listed(chain []*x509.Certificate) bool {
	if len(b.Lists) == 0 {
		return true
	}
	for _, l := range b.Lists {
		if len(chain) > 1 && l.Issuer.Equal(chain[1]) {
			return true
		}
	}
	return false
}
