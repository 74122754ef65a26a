package sds

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
	"weak"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshid/meshid/pkg/identity"
)

// A secret comes into being here and nowhere else:
//
//  1. newLeaf and newRoot check what it is made from and encode it, without a name.
//  2. named puts a name in front, which must be of the secret's kind.
//  3. guard reads the finished bytes again, with other code, just before they
//     are sent.
//
// The reason for the ceremony is that a proxy trusts whatever stands under the
// name of a trust bundle: if that is empty or of another type, it may end up with
// no validation at all.

// validatorName and validatorType are those of Envoy's SPIFFE validator. It keeps
// trust domains apart; a plain list of roots would let each of them vouch for
// each identity.
const (
	validatorName = "envoy.tls.cert_validator.spiffe"
	validatorType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig"
)

// With revocation lists, which the SPIFFE validator does not read, it is Envoy's default
// validator. It does not keep trust domains apart, and so it is used where there is one
// alone. There are no names in it: Envoy adds those of a proxy's own configuration to
// them, and whom either names is let in, so that the agent could only let in more.

// versionBytes is how much of a SHA-256 a version has: versions are compared
// within one stream's names only.
const versionBytes = 12

// maxNamedCopies bounds the names under which one secret is kept ready.
const maxNamedCopies = 4

// secret is a secret without a name. It is immutable but for its lock's contents,
// and shared by all streams. It is sent within a moment to all who are to have it,
// and then hardly ever: what is ready to be sent is kept only until the memory is
// wanted.
type secret struct {
	kind    kind
	version string
	// id is the leaf's SPIFFE ID.
	id        string
	tombstone bool

	mu sync.Mutex // guards what follows
	// encode returns the encoded Secret without its name, always the same.
	encode func() ([]byte, error)
	ready  []namedSecret
}

// constant is the encode of a secret that is kept encoded.
func constant(body []byte) func() ([]byte, error) {
	return func() ([]byte, error) { return body, nil }
}

// namedSecret is a secret as it is sent.
type namedSecret struct {
	name string
	any  weak.Pointer[anypb.Any]
}

// withheldError says why a secret cannot be sent.
type withheldError struct {
	reason withheld
	// until is when it can be, if that is known.
	until time.Time
	err   error
}

func (e *withheldError) Error() string { return e.err.Error() }
func (e *withheldError) Unwrap() error { return e.err }

func withhold(w withheld, format string, args ...any) *withheldError {
	return &withheldError{reason: w, err: fmt.Errorf(format, args...)}
}

// newLeaf makes the secret of a certificate chain with its key. The caller has
// checked it.
func newLeaf(id string, chain []*identity.Certificate, key crypto.Signer) (*secret, error) {
	body, err := encodeLeaf(id, chain, key)
	if err != nil {
		return nil, err
	}
	digest := sha256.New()
	for _, c := range chain {
		digest.Write(c.Raw)
	}
	// The version must not say anything about the key, which the leaf is bound
	// to anyway.
	return &secret{kind: kindLeaf, version: shorten(digest.Sum(nil)), id: id, encode: constant(body)}, nil
}

// newLeafOf makes the secret of an SVID, which the caller has checked. It holds the
// SVID and what it encodes weakly: it can be named for as long as somebody else
// holds the SVID, and its key in clear is there only around the time it is sent.
func newLeafOf(s *identity.SVID) (*secret, error) {
	type encoded struct{ body []byte }
	id := s.ID.String()
	leaf, err := newLeaf(id, s.Chain, s.Key)
	if err != nil {
		return nil, err
	}
	body, err := leaf.encode()
	if err != nil {
		return nil, err
	}
	source, latest := weak.Make(s), weak.Make(&encoded{body})
	leaf.encode = func() ([]byte, error) {
		if e := latest.Value(); e != nil {
			return e.body, nil
		}
		v := source.Value()
		if v == nil {
			return nil, fmt.Errorf("encode certificate of %s: it was dropped meanwhile", id)
		}
		body, err := encodeLeaf(id, v.Chain, v.Key)
		if err != nil {
			return nil, err
		}
		latest = weak.Make(&encoded{body})
		return body, nil
	}
	return leaf, nil
}

// encodeLeaf encodes a certificate chain with its key.
func encodeLeaf(id string, chain []*identity.Certificate, key crypto.Signer) ([]byte, error) {
	if len(chain) == 0 {
		return nil, withhold(withheldChain, "encode certificate of %s: no certificate", id)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, withhold(withheldKey, "encode key of %s: key type %T cannot be delivered", id, key)
	}
	var chainPEM []byte
	for _, c := range chain {
		chainPEM = encodePEM(chainPEM, "CERTIFICATE", c.Raw)
	}
	body, err := encode(&tlsv3.Secret{Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(chainPEM),
		PrivateKey:       inline(encodePEM(nil, "PRIVATE KEY", der)),
	}}})
	if err != nil {
		return nil, withhold(withheldProfile, "encode certificate of %s: %w", id, err)
	}
	return body, nil
}

// newRoot encodes trust bundles. A bundle without a CA certificate makes it fail: what
// it returns always has an anchor for each of the domains.
func newRoot(domains ...*trustDomain) (*secret, error) {
	if len(domains) == 0 {
		return nil, withhold(withheldBundle, "encode trust bundle: no trust domain")
	}
	context, err := contextOf(domains)
	if err != nil {
		return nil, err
	}
	body, err := encode(&tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: context}})
	if err != nil {
		return nil, withhold(withheldBundle, "encode trust bundle: %w", err)
	}
	digest := sha256.Sum256(body)
	return &secret{kind: kindRoot, version: shorten(digest[:]), encode: constant(body)}, nil
}

// contextOf returns the validation context of trust domains: for the validator that
// keeps them apart, or, if there are revocation lists, for the one that reads them.
func contextOf(domains []*trustDomain) (*tlsv3.CertificateValidationContext, error) {
	for _, d := range domains {
		switch {
		case d == nil || d.name == "" || len(d.roots) == 0:
			return nil, withhold(withheldBundle, "encode trust bundle: a trust domain has no root")
		case len(d.lists) > 0 && len(domains) > 1:
			return nil, withhold(withheldBundle, "encode trust bundle: %s has revocation lists, and no validator reads them that keeps it apart from other trust domains", d.name)
		}
	}
	if len(domains[0].lists) > 0 {
		return &tlsv3.CertificateValidationContext{
			SuppressClientCaList: true,
			TrustedCa:            inline(domains[0].roots),
			Crl:                  inline(domains[0].lists),
			// Roots have no lists: they would have to sign one within each outage.
			OnlyVerifyLeafCertCrl: true,
		}, nil
	}
	config := &tlsv3.SPIFFECertValidatorConfig{}
	for _, d := range domains {
		config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name:        d.name,
			TrustBundle: inline(d.roots),
		})
	}
	value, err := encode(config)
	if err != nil {
		return nil, withhold(withheldBundle, "encode trust bundle: %w", err)
	}
	return &tlsv3.CertificateValidationContext{
		// With 500 trust domains the list would not fit into a handshake.
		SuppressClientCaList: true,
		CustomValidatorConfig: &corev3.TypedExtensionConfig{
			Name:        validatorName,
			TypedConfig: &anypb.Any{TypeUrl: validatorType, Value: value},
		},
	}, nil
}

// trustDomain is one bundle, encoded.
type trustDomain struct {
	name   string // without the scheme: with it, Envoy matches nobody
	roots  []byte // PEM
	lists  []byte // PEM, revocation lists; empty if nothing is revoked by them
	digest [sha256.Size]byte
}

// anchors returns the CA certificates of a bundle, each once. What else is in it is
// left out: as an anchor, a leaf would vouch for itself.
func anchors(b *identity.Bundle) []*x509.Certificate {
	roots := make([]*x509.Certificate, 0, len(b.Roots))
	seen := make(map[string]bool, len(b.Roots))
	for _, root := range b.Roots {
		if root == nil || len(root.Raw) == 0 || !root.BasicConstraintsValid || !root.IsCA || seen[string(root.Raw)] {
			continue
		}
		seen[string(root.Raw)] = true
		roots = append(roots, root)
	}
	return roots
}

// newTrustDomain encodes one bundle.
func newTrustDomain(b *identity.Bundle) (*trustDomain, error) {
	if b == nil || b.TrustDomain.IsZero() {
		return nil, withhold(withheldBundle, "encode trust bundle: it has no trust domain")
	}
	d := &trustDomain{name: b.TrustDomain.Name()}
	for _, root := range anchors(b) {
		d.roots = encodePEM(d.roots, "CERTIFICATE", root.Raw)
	}
	if len(d.roots) == 0 {
		return nil, withhold(withheldBundle, "encode trust bundle of %s: it has no CA certificate", d.name)
	}
	for _, l := range b.Lists {
		d.lists = encodePEM(d.lists, "X509 CRL", l.List)
	}
	d.digest = sha256.Sum256(slices.Concat([]byte(d.name+"\x00"), d.roots, d.lists))
	return d, nil
}

// named returns the secret under a name, which must be of its kind. The result is
// shared: it must not be modified.
func (s *secret) named(name string) (*anypb.Any, error) {
	if k := kindOf(name); k != s.kind || k == kindUnknown {
		return nil, fmt.Errorf("name a secret: %q is not a name of its kind", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = slices.DeleteFunc(s.ready, func(r namedSecret) bool { return r.any.Value() == nil })
	for _, r := range s.ready {
		if a := r.any.Value(); a != nil && r.name == name {
			return a, nil
		}
	}
	body, err := s.encode()
	if err != nil {
		return nil, err
	}
	value := make([]byte, 0, protowire.SizeTag(secretName)+protowire.SizeBytes(len(name))+len(body))
	value = protowire.AppendTag(value, secretName, protowire.BytesType)
	value = protowire.AppendString(value, name)
	value = append(value, body...)
	a := &anypb.Any{TypeUrl: TypeURL, Value: value}
	if len(s.ready) < maxNamedCopies {
		s.ready = append(s.ready, namedSecret{name, weak.Make(a)})
	}
	return a, nil
}

// checkLeaf checks what a proxy will not: that the chain is in order, that the
// key is the leaf's, and that the leaf is a good X.509-SVID for exactly its SPIFFE
// ID. It does not depend on the time. Signatures of which the SVID brings a proof
// are not verified again.
func checkLeaf(s *identity.SVID) *withheldError {
	id := s.ID.String()
	if s.ID.IsZero() || s.ID.Path() == "" {
		// X509-SVID §3.1: a leaf's ID has a path.
		return withhold(withheldProfile, "check certificate: %q is not the SPIFFE ID of a workload", id)
	}
	if len(s.Chain) == 0 || s.Key == nil {
		return withhold(withheldChain, "check certificate of %s: certificate or key is missing", id)
	}
	for n, c := range s.Chain {
		if c == nil {
			return withhold(withheldChain, "check certificate of %s: certificate %d of its chain is missing", id, n)
		}
	}
	leaf, err := s.Chain[0].X509()
	if err != nil {
		return withhold(withheldProfile, "check certificate of %s: %w", id, err)
	}
	public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(s.Key.Public()) {
		return withhold(withheldKey, "check certificate of %s: the key is not the certificate's", id)
	}
	// X509-SVID §2: exactly one URI SAN. Compared as it stands in the
	// certificate, since crypto/x509 normalizes what it parses.
	uris, err := rawURIs(leaf)
	switch {
	case err != nil:
		return withhold(withheldProfile, "check certificate of %s: %w", id, err)
	case len(uris) != 1 || uris[0] != id:
		return withhold(withheldProfile, "check certificate of %s: its URI names are %q", id, uris)
	case leaf.IsCA: // X509-SVID §4.1
		return withhold(withheldProfile, "check certificate of %s: it is a CA's", id)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0,
		leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0: // X509-SVID §4.3
		return withhold(withheldProfile, "check certificate of %s: key usage %b", id, leaf.KeyUsage)
	}
	if s.Proof.OfChain(s.Chain) {
		return nil
	}
	chain, err := parse(s.Chain)
	if err != nil {
		return withhold(withheldChain, "check certificate of %s: %w", id, err)
	}
	for i, issuer := range chain[1:] {
		if err := chain[i].CheckSignatureFrom(issuer); err != nil {
			return withhold(withheldChain, "check certificate of %s: certificate %d of its chain did not sign the one before: %w", id, i+1, err)
		}
	}
	return nil
}

// checkChain checks that the chain leads to an anchor of b, at a time at which all of
// the chain is valid.
func checkChain(s *identity.SVID, b *identity.Bundle, now time.Time) *withheldError {
	good := anchors(b)
	if s.Proof.OfChain(s.Chain) && s.Proof.Anchored(good, now) {
		return nil
	}
	chain, err := parse(s.Chain)
	if err != nil {
		return withhold(withheldChain, "check certificate of %s: %w", s.ID, err)
	}
	roots := x509.NewCertPool()
	for _, root := range good {
		roots.AddCert(root)
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return withhold(withheldChain, "check certificate of %s against the trust bundle of %s: %w", s.ID, b.TrustDomain.Name(), err)
	}
	return nil
}

// parse returns all that the certificates of a chain say.
func parse(chain []*identity.Certificate) ([]*x509.Certificate, error) {
	parsed := make([]*x509.Certificate, len(chain))
	for n, c := range chain {
		var err error
		if parsed[n], err = c.X509(); err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", n, err)
		}
	}
	return parsed, nil
}

// subjectAltName is the OID 2.5.29.17.
var subjectAltName = []int{2, 5, 29, 17}

// rawURIs returns the URI names of a certificate, byte for byte.
func rawURIs(c *x509.Certificate) ([]string, error) {
	const uri = 6 // RFC 5280 §4.2.1.6: uniformResourceIdentifier [6]
	var uris []string
	for _, e := range c.Extensions {
		if !e.Id.Equal(subjectAltName) {
			continue
		}
		in := cryptobyte.String(e.Value)
		var names cryptobyte.String
		if !in.ReadASN1(&names, cryptobyteasn1.SEQUENCE) || !in.Empty() {
			return nil, errors.New("its names cannot be read")
		}
		for !names.Empty() {
			var name cryptobyte.String
			var tag cryptobyteasn1.Tag
			if !names.ReadAnyASN1(&name, &tag) {
				return nil, errors.New("its names cannot be read")
			}
			if tag == cryptobyteasn1.Tag(uri).ContextSpecific() {
				uris = append(uris, string(name))
			}
		}
	}
	return uris, nil
}

func encode(m proto.Message) ([]byte, error) {
	// Deterministic, since versions are made from it.
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

// encodePEM appends what pem.Encode writes (RFC 7468 §2), which would need a buffer
// that grows and an encoder for each line.
func encodePEM(b []byte, kind string, der []byte) []byte {
	const line = 48 // bytes that are 64 letters
	b = slices.Grow(b, base64.StdEncoding.EncodedLen(len(der))+len(der)/line+2*len(kind)+32)
	b = append(append(append(b, "-----BEGIN "...), kind...), "-----\n"...)
	for part := range slices.Chunk(der, line) {
		b = append(base64.StdEncoding.AppendEncode(b, part), '\n')
	}
	return append(append(append(b, "-----END "...), kind...), "-----\n"...)
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func shorten(digest []byte) string { return hex.EncodeToString(digest[:versionBytes]) }

// Fields of Secret and of what it contains, in Envoy's API.
const (
	secretName              protowire.Number = 1
	secretTLSCertificate    protowire.Number = 2
	secretSessionTicketKeys protowire.Number = 3
	secretValidation        protowire.Number = 4
	secretGeneric           protowire.Number = 5

	certificateChain protowire.Number = 1
	certificateKey   protowire.Number = 2

	validationAnchors  protowire.Number = 1
	validationLists    protowire.Number = 7
	validationCustom   protowire.Number = 12
	validationLeafOnly protowire.Number = 14
	validationNoNames  protowire.Number = 18

	extensionName   protowire.Number = 1
	extensionConfig protowire.Number = 2

	anyType  protowire.Number = 1
	anyValue protowire.Number = 2

	validatorDomains protowire.Number = 1
	domainName       protowire.Number = 1
	domainBundle     protowire.Number = 2

	dataInline protowire.Number = 2
)

var (
	pemCertificate = []byte("-----BEGIN CERTIFICATE-----\n")
	pemKey         = []byte("-----BEGIN PRIVATE KEY-----\n")
	pemList        = []byte("-----BEGIN X509 CRL-----\n")
)

// guard reads an encoded Secret that is about to be sent under name. It fails
// unless the bytes are exactly of the kind that the name demands: under the name
// of a trust bundle only a validation context with the SPIFFE validator and at
// least one anchor in each of its trust domains, or one with anchors and revocation
// lists; under any other a certificate with its key.
func guard(name string, value []byte) error {
	top, err := fields(value)
	if err != nil {
		return err
	}
	if got := top.only(secretName); string(got) != name {
		return fmt.Errorf("secret is named %q instead of %q", got, name)
	}
	switch kindOf(name) {
	case kindRoot:
		if !top.is(secretName, secretValidation) {
			return errors.New("secret under a trust bundle's name is not a validation context alone")
		}
		return guardRoot(top.only(secretValidation))
	case kindLeaf:
		if !top.is(secretName, secretTLSCertificate) {
			return errors.New("secret under a certificate's name is not a certificate alone")
		}
		return guardLeaf(top.only(secretTLSCertificate))
	default:
		return errors.New("secret has a name of no kind")
	}
}

func guardRoot(value []byte) error {
	context, err := fields(value)
	if err != nil {
		return err
	}
	if context.is(validationAnchors, validationLists, validationLeafOnly, validationNoNames) {
		return guardLists(context)
	}
	if !context.is(validationCustom, validationNoNames) {
		return errors.New("validation context has not the SPIFFE validator alone")
	}
	extension, err := fields(context.only(validationCustom))
	if err != nil {
		return err
	}
	if string(extension.only(extensionName)) != validatorName {
		return errors.New("validation context has another validator")
	}
	config, err := fields(extension.only(extensionConfig))
	if err != nil {
		return err
	}
	if string(config.only(anyType)) != validatorType {
		return errors.New("validator has a configuration of another type")
	}
	domains, err := fields(config.only(anyValue))
	if err != nil {
		return err
	}
	if len(domains) == 0 {
		return errors.New("validator has no trust domain")
	}
	for _, d := range domains {
		if d.number != validatorDomains {
			return errors.New("validator has more than trust domains")
		}
		domain, err := fields(d.value)
		if err != nil {
			return err
		}
		if len(domain.only(domainName)) == 0 {
			return errors.New("trust domain has no name")
		}
		bundle, err := fields(domain.only(domainBundle))
		if err != nil {
			return err
		}
		if !bytes.HasPrefix(bundle.only(dataInline), pemCertificate) {
			return errors.New("trust domain has no anchor")
		}
	}
	return nil
}

// guardLists reads a validation context for the default validator, which lets everybody
// in who has any certificate if it has no anchor.
func guardLists(context fieldList) error {
	roots, err := fields(context.only(validationAnchors))
	if err != nil {
		return err
	}
	lists, err := fields(context.only(validationLists))
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(roots.only(dataInline), pemCertificate) {
		return errors.New("validation context has no anchor")
	}
	if !bytes.HasPrefix(lists.only(dataInline), pemList) {
		return errors.New("validation context has no revocation list")
	}
	return nil
}

func guardLeaf(value []byte) error {
	certificate, err := fields(value)
	if err != nil {
		return err
	}
	chain, err := fields(certificate.only(certificateChain))
	if err != nil {
		return err
	}
	key, err := fields(certificate.only(certificateKey))
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(chain.only(dataInline), pemCertificate) || !bytes.HasPrefix(key.only(dataInline), pemKey) {
		return errors.New("certificate or key is missing")
	}
	return nil
}

// field is one field of an encoded message; value is that of a field with a
// length.
type field struct {
	number protowire.Number
	value  []byte
}

type fieldList []field

// fields splits an encoded message.
func fields(b []byte) (fieldList, error) {
	var list fieldList
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		b = b[n:]
		f := field{number: number}
		if kind == protowire.BytesType {
			f.value, n = protowire.ConsumeBytes(b)
		} else {
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		list = append(list, f)
		b = b[n:]
	}
	return list, nil
}

// only returns the value of a field that is there exactly once, else nil.
func (l fieldList) only(n protowire.Number) []byte {
	var value []byte
	found := false
	for _, f := range l {
		if f.number == n {
			if found {
				return nil
			}
			value, found = f.value, true
		}
	}
	return value
}

// is says whether the list has exactly these fields, each once.
func (l fieldList) is(numbers ...protowire.Number) bool {
	if len(l) != len(numbers) {
		return false
	}
	for _, n := range numbers {
		if !slices.ContainsFunc(l, func(f field) bool { return f.number == n }) {
			return false
		}
	}
	return true
}
