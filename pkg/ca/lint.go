package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// The linter reads a signed leaf back and compares each of its fields with what
// was meant, byte by byte, under the rules below. It is a second opinion: it
// shares neither code nor constants with the encoder, and it looks at nothing
// but the bytes that are going to be released. A leaf that breaks a rule is not.
//
//	 1  the certificate is one SEQUENCE and nothing follows it
//	 2  it has three elements
//	 3  its algorithm is the one for the issuer's key, ecdsa-with-SHA256 without
//	    parameters for P-256
//	 4  its signature is a BIT STRING without unused bits
//	 5  … that holds two positive INTEGERs of an elliptic curve, or has the length for
//	    another key
//	 6  its version is 3
//	 7  its serial is the one drawn, positive, of 64 random bits or more
//	 8  the signed algorithm is the outer one
//	 9  its issuer is the authority's subject
//	10  its times have the form that their year asks for
//	11  its NotBefore and NotAfter are those meant, in this order
//	12  it is valid only while its issuer is
//	13  it does not live longer than the policy allows
//	14  its subject is empty
//	15  its public key is the one asked for
//	16  it has no unique identifiers
//	17  its extensions are known ones
//	18  … each there once, none missing
//	19  key usage is critical and is digitalSignature alone (X509-SVID §4.3)
//	20  extended key usage is serverAuth and clientAuth (X509-SVID §4.4)
//	21  basic constraints are critical and do not say CA (X509-SVID §4.1)
//	22  the authority key identifier is the issuer's key
//	23  the subject key identifier is the key's hash
//	24  the alternative names are critical, as the subject is empty (RFC 5280 §4.1.2.6)
//	25  there is one URI among them (X509-SVID §2)
//	26  … which is the SPIFFE ID meant
//	27  the DNS names are those meant
//	28  there are no names of other types
//	29  the SPIFFE ID is of the authority's trust domain, in at most 2048 bytes (SPIFFE-ID §2.3)
//	30  … and has a path of legal segments (SPIFFE-ID §2.2, X509-SVID §3.1)
//	31  no DNS name has other than letters, digits, '-', '_', '.' and one leading "*."
//	32  no flag is written that is FALSE, and TRUE is 0xff (DER)
type intent struct {
	issuer, issuerKeyID         []byte
	issuerKey                   crypto.PublicKey
	issuerNotBefore, issuerEnd  time.Time
	trustDomain                 string
	serial, spki                []byte
	id                          string
	dnsNames                    []string
	notBefore, notAfter, signed time.Time
	maxLife                     time.Duration
}

// lintError names the broken rule.
type lintError struct {
	rule int
	text string
}

func (e *lintError) Error() string { return fmt.Sprintf("rule %d: %s", e.rule, e.text) }

func broken(rule int, text string) error { return &lintError{rule: rule, text: text} }

// parsed is what the linter hands on for the verification of the signature.
type parsed struct {
	tbs       []byte // with its head: what is signed
	signature []byte
}

// lint returns a *lintError for the first rule that certificate breaks.
func (want *intent) lint(certificate []byte) (parsed, error) {
	input := cryptobyte.String(certificate)
	var body, tbs, algorithm, bits cryptobyte.String
	if !input.ReadASN1(&body, asn1.SEQUENCE) || !input.Empty() {
		return parsed{}, broken(1, "not one sequence")
	}
	if !body.ReadASN1Element(&tbs, asn1.SEQUENCE) || !body.ReadASN1Element(&algorithm, asn1.SEQUENCE) ||
		!body.ReadASN1(&bits, asn1.BIT_STRING) || !body.Empty() {
		return parsed{}, broken(2, "not three elements")
	}
	if meant := lintAlgorithm(want.issuerKey); meant == "" || string(algorithm) != meant {
		return parsed{}, broken(3, "signature algorithm")
	}
	var unused uint8
	if !bits.ReadUint8(&unused) || unused != 0 {
		return parsed{}, broken(4, "signature bits")
	}
	if !lintSignature(want.issuerKey, bits) {
		return parsed{}, broken(5, "signature value")
	}
	if err := want.lintTBS(tbs, algorithm); err != nil {
		return parsed{}, err
	}
	return parsed{tbs: tbs, signature: bits}, nil
}

// lintAlgorithm is the AlgorithmIdentifier with which a key signs; "" for none.
func lintAlgorithm(key crypto.PublicKey) string {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		switch key.Params().BitSize {
		case 256:
			return "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02"
		case 384:
			return "\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03"
		}
	case *rsa.PublicKey:
		return "\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00"
	case ed25519.PublicKey:
		return "\x30\x05\x06\x03\x2b\x65\x70"
	}
	return ""
}

// lintSignature reports whether bits have the form of a key's signature.
func lintSignature(key crypto.PublicKey, bits cryptobyte.String) bool {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return isECDSASignature(bits, key.Params().BitSize/8+1)
	case *rsa.PublicKey:
		return len(bits) == (key.N.BitLen()+7)/8
	case ed25519.PublicKey:
		return len(bits) == 64
	}
	return false
}

// isECDSASignature reports whether bits are two INTEGERs of at most size bytes.
func isECDSASignature(bits cryptobyte.String, size int) bool {
	var pair, r, s cryptobyte.String
	if !bits.ReadASN1(&pair, asn1.SEQUENCE) || !bits.Empty() ||
		!pair.ReadASN1(&r, asn1.INTEGER) || !pair.ReadASN1(&s, asn1.INTEGER) || !pair.Empty() {
		return false
	}
	return isPositive(r) && len(r) <= size && isPositive(s) && len(s) <= size
}

// isPositive reports whether i is a DER INTEGER's content above zero.
func isPositive(i []byte) bool {
	switch {
	case len(i) == 0 || i[0] >= 0x80:
		return false
	case i[0] == 0:
		return len(i) > 1 && i[1] >= 0x80
	default:
		return true
	}
}

func (want *intent) lintTBS(element, algorithm cryptobyte.String) error {
	tbs := element
	var version, serial, signed, issuer, validity, subject, spki, wrapper, extensions cryptobyte.String
	if !tbs.ReadASN1(&tbs, asn1.SEQUENCE) || !tbs.ReadASN1(&version, asn1.Tag(0).Constructed().ContextSpecific()) ||
		string(version) != "\x02\x01\x02" {
		return broken(6, "version")
	}
	if !tbs.ReadASN1(&serial, asn1.INTEGER) || !isPositive(serial) || len(serial) < 9 || len(serial) > 20 ||
		string(serial) != string(want.serial) {
		return broken(7, "serial")
	}
	if !tbs.ReadASN1Element(&signed, asn1.SEQUENCE) || string(signed) != string(algorithm) {
		return broken(8, "signed algorithm")
	}
	if !tbs.ReadASN1Element(&issuer, asn1.SEQUENCE) || string(issuer) != string(want.issuer) {
		return broken(9, "issuer")
	}
	if !tbs.ReadASN1(&validity, asn1.SEQUENCE) {
		return broken(10, "validity")
	}
	if err := want.lintValidity(validity); err != nil {
		return err
	}
	if !tbs.ReadASN1(&subject, asn1.SEQUENCE) || !subject.Empty() {
		return broken(14, "subject is not empty")
	}
	if !tbs.ReadASN1Element(&spki, asn1.SEQUENCE) || string(spki) != string(want.spki) {
		return broken(15, "public key")
	}
	if !tbs.ReadASN1(&wrapper, asn1.Tag(3).Constructed().ContextSpecific()) || !tbs.Empty() {
		return broken(16, "elements between public key and extensions, or after them")
	}
	if !wrapper.ReadASN1(&extensions, asn1.SEQUENCE) || !wrapper.Empty() {
		return broken(17, "extensions")
	}
	return want.lintExtensions(extensions)
}

func (want *intent) lintValidity(validity cryptobyte.String) error {
	notBefore, okBefore := readTime(&validity)
	notAfter, okAfter := readTime(&validity)
	switch {
	case !okBefore || !okAfter || !validity.Empty():
		return broken(10, "form of the times")
	case !notBefore.Equal(want.notBefore) || !notAfter.Equal(want.notAfter) || notAfter.Before(notBefore):
		return broken(11, "not the times meant")
	case notBefore.Before(want.issuerNotBefore) || !notAfter.Before(want.issuerEnd):
		return broken(12, "outlives its issuer")
	case notAfter.Sub(want.signed) > want.maxLife:
		return broken(13, "lives longer than the policy allows")
	}
	return nil
}

// readTime accepts the one form that RFC 5280 §4.1.2.5 allows for a year.
func readTime(in *cryptobyte.String) (time.Time, bool) {
	var text cryptobyte.String
	var tag asn1.Tag
	if !in.ReadAnyASN1(&text, &tag) {
		return time.Time{}, false
	}
	for i, c := range text {
		if last := i == len(text)-1; last != (c == 'Z') || !last && (c < '0' || c > '9') {
			return time.Time{}, false
		}
	}
	number := func(at int) int { return int(text[at]-'0')*10 + int(text[at+1]-'0') }
	var year int
	switch {
	case tag == asn1.UTCTime && len(text) == 13:
		if year = 2000 + number(0); year >= 2050 {
			year -= 100
		}
		text = text[2:]
	case tag == asn1.GeneralizedTime && len(text) == 15:
		if year = number(0)*100 + number(2); year < 2050 {
			return time.Time{}, false
		}
		text = text[4:]
	default:
		return time.Time{}, false
	}
	month, day, hour, minute, second := number(0), number(2), number(4), number(6), number(8)
	t := time.Date(year, time.Month(month), day, hour, minute, second, 0, time.UTC)
	// time.Date normalizes: 31 June would come back as 1 July.
	same := t.Month() == time.Month(month) && t.Day() == day && t.Hour() == hour && t.Minute() == minute && t.Second() == second
	return t, same
}

// Bits of what has been seen, by extension.
const (
	seenKeyUsage = 1 << iota
	seenExtKeyUsage
	seenBasicConstraints
	seenAuthorityKeyID
	seenSubjectKeyID
	seenNames
	seenAll = 1<<iota - 1
)

func (want *intent) lintExtensions(extensions cryptobyte.String) error {
	seen := 0
	for !extensions.Empty() {
		var extension, oid, value cryptobyte.String
		var flag cryptobyte.String
		var critical bool
		if !extensions.ReadASN1(&extension, asn1.SEQUENCE) || !extension.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) {
			return broken(17, "an extension's form")
		}
		if extension.PeekASN1Tag(asn1.BOOLEAN) {
			if !extension.ReadASN1(&flag, asn1.BOOLEAN) || string(flag) != "\xff" {
				return broken(32, "a critical flag's form")
			}
			critical = true
		}
		if !extension.ReadASN1(&value, asn1.OCTET_STRING) || !extension.Empty() {
			return broken(17, "an extension's form")
		}
		which, err := want.lintExtension(oid, critical, value)
		if err != nil {
			return err
		}
		if seen&which != 0 {
			return broken(18, "an extension is there twice")
		}
		seen |= which
	}
	if seen != seenAll {
		return broken(18, "an extension is missing")
	}
	return nil
}

func (want *intent) lintExtension(oid []byte, critical bool, value cryptobyte.String) (which int, err error) {
	if len(oid) != 3 || oid[0] != 0x55 || oid[1] != 0x1d { // id-ce is 2.5.29
		return 0, broken(17, "unknown extension")
	}
	switch oid[2] {
	case 15:
		if !critical || string(value) != "\x03\x02\x07\x80" {
			err = broken(19, "key usage")
		}
		return seenKeyUsage, err
	case 37:
		if critical || !isServerAndClient(value) {
			err = broken(20, "extended key usage")
		}
		return seenExtKeyUsage, err
	case 19:
		if !critical || string(value) != "\x30\x00" {
			err = broken(21, "basic constraints")
		}
		return seenBasicConstraints, err
	case 35:
		var body, keyID cryptobyte.String
		if critical || !value.ReadASN1(&body, asn1.SEQUENCE) || !value.Empty() ||
			!body.ReadASN1(&keyID, asn1.Tag(0).ContextSpecific()) || !body.Empty() ||
			len(keyID) == 0 || string(keyID) != string(want.issuerKeyID) {
			err = broken(22, "authority key identifier")
		}
		return seenAuthorityKeyID, err
	case 14:
		var keyID cryptobyte.String
		if critical || !value.ReadASN1(&keyID, asn1.OCTET_STRING) || !value.Empty() ||
			!isKeyID(keyID, want.spki) {
			err = broken(23, "subject key identifier")
		}
		return seenSubjectKeyID, err
	case 17:
		if !critical {
			return 0, broken(24, "alternative names are not critical")
		}
		return seenNames, want.lintNames(value)
	default:
		return 0, broken(17, "unknown extension")
	}
}

func isServerAndClient(value cryptobyte.String) bool {
	var list, first, second cryptobyte.String
	return value.ReadASN1(&list, asn1.SEQUENCE) && value.Empty() &&
		list.ReadASN1(&first, asn1.OBJECT_IDENTIFIER) && string(first) == "\x2b\x06\x01\x05\x05\x07\x03\x01" &&
		list.ReadASN1(&second, asn1.OBJECT_IDENTIFIER) && string(second) == "\x2b\x06\x01\x05\x05\x07\x03\x02" &&
		list.Empty()
}

func isKeyID(keyID []byte, spki cryptobyte.String) bool {
	var body, bits cryptobyte.String
	if !spki.ReadASN1(&body, asn1.SEQUENCE) || !body.SkipASN1(asn1.SEQUENCE) ||
		!body.ReadASN1(&bits, asn1.BIT_STRING) || len(bits) < 2 {
		return false
	}
	sum := sha256.Sum256(bits[1:])
	return string(keyID) == string(sum[:20])
}

func (want *intent) lintNames(value cryptobyte.String) error {
	var names cryptobyte.String
	if !value.ReadASN1(&names, asn1.SEQUENCE) || !value.Empty() {
		return broken(25, "form of the alternative names")
	}
	uris, dns := 0, 0
	for !names.Empty() {
		var name cryptobyte.String
		var tag asn1.Tag
		if !names.ReadAnyASN1(&name, &tag) {
			return broken(25, "form of an alternative name")
		}
		switch tag {
		case asn1.Tag(6).ContextSpecific():
			if uris++; uris > 1 {
				return broken(25, "more than one uri")
			}
			// Raw bytes: crypto/x509 would show `SPIFFE://` as `spiffe://`.
			if string(name) != want.id {
				return broken(26, "not the spiffe id meant")
			}
			if err := lintID(name, want.trustDomain); err != nil {
				return err
			}
		case asn1.Tag(2).ContextSpecific():
			if dns >= len(want.dnsNames) || string(name) != want.dnsNames[dns] {
				return broken(27, "not the dns names meant")
			}
			if !isDNSName(name) {
				return broken(31, "characters of a dns name")
			}
			dns++
		default:
			return broken(28, "a name of another type")
		}
	}
	if uris != 1 {
		return broken(25, "no uri")
	}
	if dns != len(want.dnsNames) {
		return broken(27, "a dns name is missing")
	}
	return nil
}

// lintID walks over the raw bytes.
func lintID(id []byte, trustDomain string) error {
	const scheme = "spiffe://"
	if len(id) > 2048 || trustDomain == "" || len(id) <= len(scheme)+len(trustDomain)+1 ||
		string(id[:len(scheme)]) != scheme || string(id[len(scheme):len(scheme)+len(trustDomain)]) != trustDomain {
		return broken(29, "not an id of this trust domain")
	}
	path := id[len(scheme)+len(trustDomain):]
	if path[0] != '/' {
		return broken(29, "the trust domain goes on")
	}
	others := 0 // characters of the segment that are not dots
	for i, c := range path[1:] {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
			others++
		case c == '.':
		case c == '/' && others > 0 && i < len(path)-2:
			others = 0
		default:
			return broken(30, "path")
		}
	}
	if others == 0 {
		return broken(30, "path ends in a segment of dots")
	}
	return nil
}

func isDNSName(name []byte) bool {
	if len(name) > 2 && name[0] == '*' && name[1] == '.' {
		name = name[2:]
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return len(name) > 0
}

// errNotMeant marks errors of the self-check: an error in this program, or of
// the machine's memory.
var errNotMeant = errors.New("what was signed is not what was meant: nothing is released")
