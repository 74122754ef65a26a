// Package pkcs10 writes certification requests (RFC 2986) for X.509-SVIDs. It answers
// "what does a request look like that asks for this and nothing else", for who makes
// one and for who has to know that another has. It knows nothing of certificates.
package pkcs10

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Object identifiers.
var (
	// ecdsa-with-SHA256, RFC 5758 §3.2.
	oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	// extensionRequest, RFC 2985 §5.4.2.
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// Names are what a request asks for. The zero value asks for a certificate of a key,
// and leaves the rest to who signs it.
type Names struct {
	// URI is a SPIFFE ID.
	URI string
	// DNS are in the order in which they are to be in the certificate.
	DNS []string
}

// Info returns the CertificationRequestInfo (RFC 2986 §4.1) for a SubjectPublicKeyInfo
// in DER. It has no subject, and one extension at most: the names, critical, since there
// is no subject (RFC 5280 §4.2.1.6). There is one encoding, so that whoever expects this
// request can compare bytes.
func Info(spki []byte, n Names) ([]byte, error) {
	nothing := func(*cryptobyte.Builder) {}
	var info cryptobyte.Builder
	info.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(0)                           // version 1
		b.AddASN1(cryptobyteasn1.SEQUENCE, nothing) // subject
		b.AddBytes(spki)
		b.AddASN1(cryptobyteasn1.Tag(0).ContextSpecific().Constructed(), n.attribute)
	})
	return info.Bytes()
}

// attribute is the only one, none if there are no names.
func (n Names) attribute(b *cryptobyte.Builder) {
	if n.URI == "" && len(n.DNS) == 0 {
		return
	}
	sequence := func(b *cryptobyte.Builder, content func(*cryptobyte.Builder)) {
		b.AddASN1(cryptobyteasn1.SEQUENCE, content)
	}
	sequence(b, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidExtensionRequest)
		b.AddASN1(cryptobyteasn1.SET, func(b *cryptobyte.Builder) {
			sequence(b, func(b *cryptobyte.Builder) { // Extensions
				sequence(b, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oidSubjectAltName)
					b.AddASN1Boolean(true)
					b.AddASN1(cryptobyteasn1.OCTET_STRING, func(b *cryptobyte.Builder) { sequence(b, n.general) })
				})
			})
		})
	})
}

// general writes GeneralNames (RFC 5280 §4.2.1.6): [6] is a URI, [2] a DNS name.
func (n Names) general(b *cryptobyte.Builder) {
	name := func(tag uint8, text string) {
		b.AddASN1(cryptobyteasn1.Tag(tag).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(text)) })
	}
	if n.URI != "" {
		name(6, n.URI)
	}
	for _, dns := range n.DNS {
		name(2, dns)
	}
}

// Sign returns the request for a P-256 key in DER. That of crypto/x509 verifies each
// signature that it makes, which costs twice as much as all the rest; who signs a
// certificate does so anyway.
func Sign(key *ecdsa.PrivateKey, n Names) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	info, err := Info(spki, n)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(info)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	var request cryptobyte.Builder
	request.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(info)
		b.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(oidECDSAWithSHA256) })
		b.AddASN1BitString(signature)
	})
	return request.Bytes()
}
