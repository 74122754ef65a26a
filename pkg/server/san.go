package server

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
)

// oidSubjectAltName is RFC 5280 §4.2.1.6.
var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// tagURI is uniformResourceIdentifier in GeneralName.
const tagURI = 6

// soleURI returns the certificate's only URI SAN as its bytes are. crypto/x509
// would normalize it: two parsers could then disagree on who this is.
func soleURI(cert *x509.Certificate) (string, error) {
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) > 0 {
			return "", errors.New("client certificate's names cannot be read")
		}
		for _, name := range names {
			if name.Class == asn1.ClassContextSpecific && name.Tag == tagURI {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	if len(uris) != 1 {
		return "", errors.New("client certificate has not exactly one URI")
	}
	return uris[0], nil
}
