package ca

import (
	"errors"
	"time"
)

// The encoder writes one kind of certificate, from a template that has all that
// is the same for the leaves of one authority. lint.go reads it back and shares
// nothing with it.

// DER of what never changes in a leaf.
var (
	// ecdsa-with-SHA256, without parameters (RFC 5758 §3.2); scheme.go has the others.
	derSignatureAlgorithm = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}
	derVersion3           = []byte{0xa0, 0x03, 0x02, 0x01, 0x02}
	// X509-SVID does not need a subject; without one the SAN must be critical.
	derEmptySubject = []byte{0x30, 0x00}

	derFixedExtensions = []byte{
		// Key usage, critical: digitalSignature (X509-SVID §4.3).
		0x30, 0x0e, 0x06, 0x03, 0x55, 0x1d, 0x0f, 0x01, 0x01, 0xff, 0x04, 0x04, 0x03, 0x02, 0x07, 0x80,
		// Extended key usage: serverAuth and clientAuth (X509-SVID §4.4).
		0x30, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x25, 0x04, 0x16, 0x30, 0x14,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02,
		// Basic constraints, critical: cA is FALSE, which is the default and so
		// is not written (X509-SVID §4.1).
		0x30, 0x0c, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x01, 0x01, 0xff, 0x04, 0x02, 0x30, 0x00,
	}
	// Subject key identifier of 20 bytes; they follow.
	derSubjectKeyID = []byte{0x30, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x0e, 0x04, 0x16, 0x04, 0x14}
	// Subject alternative name, critical.
	derSANHead = []byte{0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff}
)

const (
	tagInteger         = 0x02
	tagBitString       = 0x03
	tagOctetString     = 0x04
	tagUTCTime         = 0x17
	tagGeneralizedTime = 0x18
	tagSequence        = 0x30
	tagDNS             = 0x82 // GeneralName [2]
	tagURI             = 0x86 // GeneralName [6]
	tagExtensions      = 0xa3
)

// template is what the leaves of one authority have in common. It is immutable.
type template struct {
	// algorithm is that of the authority's signatures.
	algorithm []byte
	// issuer is the signature algorithm, then the issuer's name.
	issuer []byte
	// extensions are those that do not depend on the leaf.
	extensions []byte
}

func newTemplate(algorithm, issuer, keyID []byte) template {
	t := template{algorithm: algorithm}
	t.issuer = append(append(t.issuer, algorithm...), issuer...)
	// Authority key identifier: [0] keyIdentifier.
	aki := appendValue(nil, 0x80, keyID)
	aki = appendValue(nil, tagSequence, aki)
	aki = appendValue([]byte{0x06, 0x03, 0x55, 0x1d, 0x23}, tagOctetString, aki)
	t.extensions = appendValue(append(t.extensions, derFixedExtensions...), tagSequence, aki)
	return t
}

// leaf is what is different from one leaf to the next.
type leaf struct {
	serial              [16]byte
	notBefore, notAfter time.Time
	id                  string
	dnsNames            []string
	key                 *PublicKey
}

const (
	// outerHead is the length of a SEQUENCE's tag and length from 256 to 65,535
	// bytes of content, as all our certificates have.
	outerHead = 4
	// signatureRoom is the most that a P-256 signature takes as an algorithm
	// and a BIT STRING: 12 + 3 + 72. Larger ones have the buffer copied.
	signatureRoom = 87
	maxTBS        = 60_000
)

// appendTBS returns a buffer of outerHead unused bytes and then the
// TBSCertificate of l, with room for the signature.
func (t *template) appendTBS(l *leaf) ([]byte, error) {
	names := sizeOf(len(l.id))
	for _, name := range l.dnsNames {
		names += sizeOf(len(name))
	}
	sanBody := len(derSANHead) + sizeOf(sizeOf(names))
	extensions := len(t.extensions) + len(derSubjectKeyID) + len(l.key.ski) + sizeOf(sanBody)
	validity := timeSize(l.notBefore) + timeSize(l.notAfter)
	body := len(derVersion3) + 2 + len(l.serial) + len(t.issuer) + sizeOf(validity) +
		len(derEmptySubject) + len(l.key.spki) + sizeOf(sizeOf(extensions))
	if body > maxTBS {
		return nil, errors.New("the certificate would be too large: give it fewer or shorter names")
	}

	b := make([]byte, outerHead, outerHead+sizeOf(body)+signatureRoom)
	b = appendHead(b, tagSequence, body)
	b = append(b, derVersion3...)
	b = appendValue(b, tagInteger, l.serial[:])
	b = append(b, t.issuer...)
	b = appendHead(b, tagSequence, validity)
	b = appendTime(b, l.notBefore)
	b = appendTime(b, l.notAfter)
	b = append(b, derEmptySubject...)
	b = append(b, l.key.spki...)
	b = appendHead(b, tagExtensions, sizeOf(extensions))
	b = appendHead(b, tagSequence, extensions)
	b = append(b, t.extensions...)
	b = append(b, derSubjectKeyID...)
	b = append(b, l.key.ski[:]...)
	b = appendHead(b, tagSequence, sanBody)
	b = append(b, derSANHead...)
	b = appendHead(b, tagOctetString, sizeOf(names))
	b = appendHead(b, tagSequence, names)
	b = appendHead(b, tagURI, len(l.id))
	b = append(b, l.id...)
	for _, name := range l.dnsNames {
		b = appendHead(b, tagDNS, len(name))
		b = append(b, name...)
	}
	return b, nil
}

// appendSignature makes a certificate of what appendTBS returned.
func (t *template) appendSignature(b, signature []byte) []byte {
	b = append(b, t.algorithm...)
	b = appendHead(b, tagBitString, len(signature)+1)
	b = append(b, 0)
	b = append(b, signature...)
	n := len(b) - outerHead
	b[0], b[1], b[2], b[3] = tagSequence, 0x82, byte(n>>8), byte(n) //nolint:gosec // n is less than 65,536, see maxTBS
	return b
}

// sizeOf is the size of a value of n bytes with its tag and length.
func sizeOf(n int) int {
	switch {
	case n < 0x80:
		return n + 2
	case n <= 0xff:
		return n + 3
	default:
		return n + 4
	}
}

// appendHead appends a tag and the shortest form of a length below 65,536.
func appendHead(b []byte, tag byte, n int) []byte {
	switch {
	case n < 0x80:
		return append(b, tag, byte(n)) //nolint:gosec // checked
	case n <= 0xff:
		return append(b, tag, 0x81, byte(n))
	default:
		return append(b, tag, 0x82, byte(n>>8), byte(n)) //nolint:gosec // bounded by maxTBS
	}
}

func appendValue(b []byte, tag byte, value []byte) []byte {
	return append(appendHead(b, tag, len(value)), value...)
}

// RFC 5280 §4.1.2.5: UTCTime through 2049, GeneralizedTime from 2050 on.
const lastUTCYear = 2049

func timeSize(t time.Time) int {
	if t.Year() <= lastUTCYear {
		return 15
	}
	return 17
}

func appendTime(b []byte, t time.Time) []byte {
	year, month, day := t.Date()
	hour, minute, second := t.Clock()
	if year <= lastUTCYear {
		b = append(b, tagUTCTime, 13)
	} else {
		b = append(b, tagGeneralizedTime, 15)
		b = appendTwo(b, year/100)
	}
	for _, n := range [...]int{year % 100, int(month), day, hour, minute, second} {
		b = appendTwo(b, n)
	}
	return append(b, 'Z')
}

func appendTwo(b []byte, n int) []byte {
	return append(b, '0'+byte(n/10%10), '0'+byte(n%10)) //nolint:gosec // single digits
}
