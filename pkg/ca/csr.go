package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// maxCSR is far above a bare request with the largest key (RSA 4096: 1.2 kB),
// and leaves room for what other clients put in, which is not used.
const maxCSR = 8 << 10

// PublicKey is a public key whose holder has proved to have the private key, and
// which the key policy allows. It is immutable.
type PublicKey struct {
	spki      []byte
	hash      [32]byte
	ski       [20]byte
	algorithm string
}

// SPKI returns the DER of the SubjectPublicKeyInfo. The caller must not modify it.
func (k *PublicKey) SPKI() []byte { return k.spki }

// Hash returns the SHA-256 of SPKI.
func (k *PublicKey) Hash() [32]byte { return k.hash }

// Algorithm returns the kind of key, such as "EC-P256" or "RSA-2048".
func (k *PublicKey) Algorithm() string { return k.algorithm }

// p256Prefix is what stands before the uncompressed point in the
// SubjectPublicKeyInfo of a P-256 key (RFC 5480 §2).
var p256Prefix = []byte{
	0x30, 0x59, 0x30, 0x13,
	0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
	0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07,
	0x03, 0x42, 0x00,
}

const p256PointLength = 65

// ecdsaOID is ecdsa-with-SHA2 (RFC 5758 §3.2) without its last byte: 2 is
// SHA-256, 3 SHA-384, 4 SHA-512.
var ecdsaOID = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03}

// ParseCSR takes the public key from a PKCS #10 request in DER, and nothing else
// in it: names, extensions and attributes never reach a certificate. It refuses
// with a *RequestError (ReasonCSR): what is too large, is not strict DER, lacks
// the proof of possession, asks for more than one URI name (whoever does that
// wants something that no X.509-SVID can be), or has a key that the policy does
// not allow: P-256, P-384, Ed25519 and RSA of 2048 to 4096 bits with the public
// exponent 65537 are allowed.
//
// It needs no CA and may be called concurrently. The result does not refer to der.
func ParseCSR(der []byte) (*PublicKey, error) {
	key, err := parseCSR(der)
	if err != nil {
		return nil, &RequestError{Reason: ReasonCSR, Err: err}
	}
	return key, nil
}

var errMalformedCSR = errors.New("malformed pkcs #10 request")

func parseCSR(der []byte) (*PublicKey, error) {
	if len(der) > maxCSR {
		return nil, fmt.Errorf("request of %d bytes: at most %d are allowed", len(der), maxCSR)
	}
	// RFC 2986 §4.2.
	input := cryptobyte.String(der)
	var outer, info, algorithm, signature, infoBody, version, spki, attributes cryptobyte.String
	var hasAttributes bool
	if !input.ReadASN1(&outer, cryptobyteasn1.SEQUENCE) || !input.Empty() ||
		!outer.ReadASN1Element(&info, cryptobyteasn1.SEQUENCE) ||
		!outer.ReadASN1(&algorithm, cryptobyteasn1.SEQUENCE) ||
		!outer.ReadASN1(&signature, cryptobyteasn1.BIT_STRING) || !outer.Empty() {
		return nil, errMalformedCSR
	}
	infoBody = info
	if !infoBody.ReadASN1(&infoBody, cryptobyteasn1.SEQUENCE) ||
		!infoBody.ReadASN1(&version, cryptobyteasn1.INTEGER) ||
		!infoBody.SkipASN1(cryptobyteasn1.SEQUENCE) ||
		!infoBody.ReadASN1Element(&spki, cryptobyteasn1.SEQUENCE) ||
		!infoBody.ReadOptionalASN1(&attributes, &hasAttributes, cryptobyteasn1.Tag(0).ContextSpecific().Constructed()) ||
		!infoBody.Empty() {
		return nil, errMalformedCSR
	}
	if !bytes.Equal(version, []byte{0}) {
		return nil, errors.New("pkcs #10 request of an unknown version")
	}
	if !attributes.Empty() {
		if err := checkAttributes(attributes); err != nil {
			return nil, err
		}
	}
	if point, ok := bytes.CutPrefix(spki, p256Prefix); ok && len(point) == p256PointLength {
		return provenP256(info, algorithm, signature, spki, point)
	}
	return provenOther(der)
}

// provenP256 is the path of nearly all requests.
func provenP256(info, algorithm, signature, spki, point []byte) (*PublicKey, error) {
	// Refuses what is not on the curve, and the point at infinity.
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, errors.New("its p-256 key is not a point of the curve")
	}
	which, ok := bytes.CutPrefix(algorithm, ecdsaOID)
	if !ok || len(which) != 1 {
		return nil, errors.New("its signature algorithm does not fit its p-256 key")
	}
	var digest []byte
	switch which[0] {
	case 2:
		sum := sha256.Sum256(info)
		digest = sum[:]
	case 3:
		sum := sha512.Sum384(info)
		digest = sum[:]
	case 4:
		sum := sha512.Sum512(info)
		digest = sum[:]
	default:
		return nil, errors.New("its signature algorithm is not allowed")
	}
	if len(signature) < 1 || signature[0] != 0 || !ecdsa.VerifyASN1(pub, digest, signature[1:]) {
		return nil, errNoPossession
	}
	return newPublicKey(bytes.Clone(spki), point, "EC-P256"), nil
}

var errNoPossession = errors.New("its signature does not verify: possession of the private key is not proved")

// provenOther is the path of all other keys, through crypto/x509.
func provenOther(der []byte) (*PublicKey, error) {
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, errMalformedCSR
	}
	// Before the proof: verification with a huge key costs much.
	algorithm, err := allowed(request.PublicKey)
	if err != nil {
		return nil, err
	}
	switch request.SignatureAlgorithm {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.PureEd25519:
	default:
		return nil, errors.New("its signature algorithm is not allowed")
	}
	if err := request.CheckSignature(); err != nil {
		return nil, errNoPossession
	}
	return publicKey(request.PublicKey, request.RawSubjectPublicKeyInfo, algorithm)
}

// ProvenKey is ParseCSR for a key whose holder has proved to have the private key in
// another way, which the caller has verified. spki is a SubjectPublicKeyInfo in DER.
func ProvenKey(spki []byte) (*PublicKey, error) {
	key, err := provenKey(spki)
	if err != nil {
		return nil, &RequestError{Reason: ReasonCSR, Err: err}
	}
	return key, nil
}

func provenKey(spki []byte) (*PublicKey, error) {
	if len(spki) > maxCSR {
		return nil, fmt.Errorf("key of %d bytes: at most %d are allowed", len(spki), maxCSR)
	}
	parsed, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, errors.New("malformed public key")
	}
	algorithm, err := allowed(parsed)
	if err != nil {
		return nil, err
	}
	return publicKey(parsed, spki, algorithm)
}

// allowed returns the name of a key's algorithm, if the key policy allows it.
func allowed(key any) (algorithm string, err error) {
	switch pub := key.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return "EC-P256", nil
		case elliptic.P384():
			return "EC-P384", nil
		default:
			return "", fmt.Errorf("elliptic curve %s is not allowed: use P-256", pub.Params().Name)
		}
	case *rsa.PublicKey:
		return "RSA-" + strconv.Itoa(pub.N.BitLen()), checkRSASize(pub)
	case ed25519.PublicKey:
		return "Ed25519", nil
	default:
		return "", errors.New("keys of its type are not allowed: use P-256")
	}
}

// publicKey is the last step for a key that was parsed and proved.
func publicKey(parsed any, spki []byte, algorithm string) (*PublicKey, error) {
	if pub, ok := parsed.(*rsa.PublicKey); ok {
		if err := checkRSAModulus(pub.N); err != nil {
			return nil, err
		}
	}
	// One key has one encoding: what two parsers may read differently is not
	// copied into a certificate.
	canonical, err := x509.MarshalPKIXPublicKey(parsed)
	if err != nil || !bytes.Equal(canonical, spki) {
		return nil, errors.New("its key is not encoded as the standards say")
	}
	return publicKeyOf(canonical, algorithm)
}

// publicKeyOf takes ownership of spki.
func publicKeyOf(spki []byte, algorithm string) (*PublicKey, error) {
	ski, err := keyIdentifier(spki)
	if err != nil {
		return nil, err
	}
	return &PublicKey{spki: spki, hash: sha256.Sum256(spki), ski: ski, algorithm: algorithm}, nil
}

// newPublicKey is publicKeyOf for a key whose bits are at hand.
func newPublicKey(spki, bits []byte, algorithm string) *PublicKey {
	k := &PublicKey{spki: spki, hash: sha256.Sum256(spki), algorithm: algorithm}
	sum := sha256.Sum256(bits)
	copy(k.ski[:], sum[:])
	return k
}

// Object identifiers in DER, with tag and length.
var (
	extensionRequestOID = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e}
	subjectAltNameOID   = []byte{0x06, 0x03, 0x55, 0x1d, 0x11}
)

// checkAttributes refuses requests for several URI names. The rest of the
// attributes is only required to be well-formed on the way there.
func checkAttributes(attributes cryptobyte.String) error {
	uris := 0
	for !attributes.Empty() {
		var attribute, oid, values cryptobyte.String
		if !attributes.ReadASN1(&attribute, cryptobyteasn1.SEQUENCE) ||
			!attribute.ReadASN1Element(&oid, cryptobyteasn1.OBJECT_IDENTIFIER) ||
			!attribute.ReadASN1(&values, cryptobyteasn1.SET) || !attribute.Empty() {
			return errMalformedCSR
		}
		if !bytes.Equal(oid, extensionRequestOID) {
			continue
		}
		for !values.Empty() {
			var extensions cryptobyte.String
			if !values.ReadASN1(&extensions, cryptobyteasn1.SEQUENCE) {
				return errMalformedCSR
			}
			n, err := countURIs(extensions)
			if err != nil {
				return err
			}
			uris += n
		}
	}
	if uris > 1 {
		return fmt.Errorf("it asks for %d uri names: an x509-svid has exactly one, and the registration entry names it", uris)
	}
	return nil
}

func countURIs(extensions cryptobyte.String) (uris int, err error) {
	for !extensions.Empty() {
		var extension, oid, value, names cryptobyte.String
		if !extensions.ReadASN1(&extension, cryptobyteasn1.SEQUENCE) ||
			!extension.ReadASN1Element(&oid, cryptobyteasn1.OBJECT_IDENTIFIER) ||
			!extension.SkipOptionalASN1(cryptobyteasn1.BOOLEAN) ||
			!extension.ReadASN1(&value, cryptobyteasn1.OCTET_STRING) || !extension.Empty() {
			return 0, errMalformedCSR
		}
		if !bytes.Equal(oid, subjectAltNameOID) {
			continue
		}
		if !value.ReadASN1(&names, cryptobyteasn1.SEQUENCE) || !value.Empty() {
			return 0, errMalformedCSR
		}
		for !names.Empty() {
			var name cryptobyte.String
			var tag cryptobyteasn1.Tag
			if !names.ReadAnyASN1(&name, &tag) {
				return 0, errMalformedCSR
			}
			if tag == cryptobyteasn1.Tag(6).ContextSpecific() {
				uris++
			}
		}
	}
	return uris, nil
}
