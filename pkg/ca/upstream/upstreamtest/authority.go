// Package upstreamtest answers "does this kind of upstream CA keep the contract of
// package upstream?" for the tests of kinds. It knows no kind: it says how the CA
// behind one has to behave, and looks at what comes out of its client.
package upstreamtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TrustDomain is that of all tests here.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// Behaviour is how the CA behind a client behaves.
type Behaviour string

// The answers of a CA. All but Good, LongLife and Repeated must come out as an
// error, of the client or of Request.Verify.
const (
	Good Behaviour = "good"
	// LongLife: it lives longer than was asked for, as with CAs whose profiles say
	// how long.
	LongLife Behaviour = "long life"
	// Repeated: the chain has the intermediate twice, and the root.
	Repeated Behaviour = "repeated certificates"

	WrongKey Behaviour = "wrong key"
	// NotCA: not a CA, or one where a leaf was asked for.
	NotCA         Behaviour = "not a CA"
	Expired       Behaviour = "expired"
	NotYetValid   Behaviour = "not yet valid"
	OtherName     Behaviour = "other name"
	MoreNames     Behaviour = "more names"
	PathLength    Behaviour = "path length"
	NoKeyUsage    Behaviour = "no key usage"
	Constrained   Behaviour = "constrained to another domain"
	OtherUsage    Behaviour = "other extended key usage"
	MissingChain  Behaviour = "missing chain"
	UnrelatedRoot Behaviour = "unrelated root"
	ForeignRoot   Behaviour = "root of another trust domain"
	NoRoot        Behaviour = "no root"
	LongChain     Behaviour = "chain of a thousand"
	HugeAnswer    Behaviour = "huge certificate"
)

// How a CA fails to answer.
const (
	// Slow: it accepts the request and does not answer. Mint has to return when its
	// context ends.
	Slow Behaviour = "slow"
	// RateLimited: it wants to be asked later; after RetryAfter where it can say so.
	RateLimited Behaviour = "rate limited"
	// Denied: it refuses for a reason that a retry does not change.
	Denied Behaviour = "denied"
	// Gone: nothing is there.
	Gone Behaviour = "gone"
	// Garbage: it answers with what is not an answer.
	Garbage Behaviour = "garbage"
)

// RetryAfter is what a CA that is RateLimited says.
const RetryAfter = 7 * time.Second

// Authority is the CA behind a client: a root, and an issuing CA below it. Fakes
// of CAs have it make their answers, right or wrong.
type Authority struct {
	Root, Issuer *x509.Certificate
	// Key is the issuer's.
	Key *ecdsa.PrivateKey
	// RootKey is the root's.
	RootKey *ecdsa.PrivateKey

	t         testing.TB
	behaviour Behaviour
}

// NewAuthority returns a CA that behaves so.
func NewAuthority(t testing.TB, b Behaviour) *Authority {
	t.Helper()
	a := &Authority{t: t, behaviour: b, RootKey: newKey(t), Key: newKey(t)}
	root := template("upstream root")
	issuer := template("upstream issuer")
	issuer.MaxPathLen = 1
	switch b { //nolint:exhaustive // the others are no matter of the CA's own certificates
	case ForeignRoot:
		root.URIs = []*url.URL{{Scheme: "spiffe", Host: "elsewhere.test"}}
	case PathLength:
		issuer.MaxPathLen, issuer.MaxPathLenZero = 0, true
	case Constrained:
		issuer.PermittedURIDomains, issuer.PermittedDNSDomainsCritical = []string{"elsewhere.test"}, true
	case OtherUsage:
		issuer.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	case Expired:
		issuer.NotBefore, issuer.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	}
	a.Root = sign(t, root, root, a.RootKey.Public(), a.RootKey)
	a.Issuer = sign(t, issuer, a.Root, a.Key.Public(), a.RootKey)
	return a
}

// Behaving returns the same CA, with another behaviour.
func (a *Authority) Behaving(b Behaviour) *Authority {
	other := *a
	other.behaviour = b
	return &other
}

func template(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
}

// Answer is what the CA answers to a request in DER: the chain, which begins with
// the intermediate, and the roots.
func (a *Authority) Answer(csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate) {
	a.t.Helper()
	request := a.parse(csr)
	if request == nil {
		return nil, nil
	}
	return a.Certify(request.PublicKey, request.Subject, request.URIs, ttl)
}

// parse reads a request in DER; nil if it is none.
func (a *Authority) parse(csr []byte) *x509.CertificateRequest {
	a.t.Helper()
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		a.t.Errorf("the request is malformed: %v", err)
		return nil
	}
	if err := request.CheckSignature(); err != nil {
		a.t.Errorf("the request does not prove its key: %v", err)
	}
	return request
}

// Certify is Answer for CAs that are told what a certificate is to have.
func (a *Authority) Certify(pub crypto.PublicKey, subject pkix.Name, uris []*url.URL, ttl time.Duration) (chain, roots []*x509.Certificate) {
	a.t.Helper()
	c := template("")
	c.Subject, c.URIs = subject, uris
	c.NotAfter = time.Now().Add(ttl)
	c.MaxPathLenZero = true
	switch a.behaviour { //nolint:exhaustive // the others are those of leaves too
	case NotCA:
		c.IsCA, c.KeyUsage, c.MaxPathLenZero = false, x509.KeyUsageDigitalSignature, false
	case NoKeyUsage:
		c.KeyUsage = x509.KeyUsageCRLSign
	}
	return a.issue(c, pub, ttl)
}

// Leaf is Answer to a request for an X.509-SVID. A CA that has a usage of its own, or
// is constrained, gives what no leaf can be verified with.
func (a *Authority) Leaf(csr []byte, ttl time.Duration) (chain, roots []*x509.Certificate) {
	a.t.Helper()
	request := a.parse(csr)
	if request == nil {
		return nil, nil
	}
	c := &x509.Certificate{
		Subject: request.Subject, URIs: request.URIs, DNSNames: request.DNSNames,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	switch a.behaviour { //nolint:exhaustive // the others are those of intermediates too
	case NotCA:
		c.IsCA = true
	case NoKeyUsage:
		c.KeyUsage = x509.KeyUsageKeyEncipherment
	case OtherUsage:
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	}
	return a.issue(c, request.PublicKey, ttl)
}

// issue signs what c says, or something that is wrong with it.
func (a *Authority) issue(c *x509.Certificate, pub crypto.PublicKey, ttl time.Duration) (chain, roots []*x509.Certificate) {
	a.t.Helper()
	switch a.behaviour { //nolint:exhaustive // the others change what follows
	case LongLife:
		c.NotAfter = time.Now().Add(100 * ttl)
	case WrongKey:
		pub = newKey(a.t).Public()
	case Expired:
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	case NotYetValid:
		c.NotBefore = time.Now().Add(time.Hour)
		c.NotAfter = c.NotBefore.Add(ttl)
	case OtherName:
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "elsewhere.test"}}
	case MoreNames:
		c.DNSNames = []string{"everything.example.org"}
	case HugeAnswer:
		c.Policies = manyPolicies()
	}
	intermediate := sign(a.t, c, a.Issuer, pub, a.Key)
	chain, roots = []*x509.Certificate{intermediate, a.Issuer}, []*x509.Certificate{a.Root}
	switch a.behaviour { //nolint:exhaustive // the others are as they are
	case MissingChain:
		chain = chain[:1]
	case Repeated:
		chain = []*x509.Certificate{intermediate, a.Issuer, intermediate, a.Root}
	case UnrelatedRoot:
		key, t := newKey(a.t), template("unrelated root")
		roots = []*x509.Certificate{sign(a.t, t, t, key.Public(), key)}
	case NoRoot:
		roots = nil
	case LongChain:
		for range 1000 {
			chain = append(chain, a.Issuer)
		}
	}
	return chain, roots
}

// manyPolicies make a certificate larger than anybody accepts.
func manyPolicies() []x509.OID {
	policies := make([]x509.OID, 2000)
	for i := range policies {
		oid, err := x509.OIDFromInts([]uint64{2, 999, 1 << 62, uint64(i)})
		if err != nil {
			panic(err) // the numbers above are legal
		}
		policies[i] = oid
	}
	return policies
}

// PEM encodes certificates.
func PEM(certificates ...*x509.Certificate) []byte {
	var all []byte
	for _, c := range certificates {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return all
}

// KeyPEM encodes a private key.
func KeyPEM(t testing.TB, key crypto.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, c, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	id := sha256.Sum256(spki)
	c.SerialNumber, c.SubjectKeyId = serial, id[:20]
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}
