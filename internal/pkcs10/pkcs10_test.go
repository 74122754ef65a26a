package pkcs10

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"slices"
	"testing"
)

// What is written is what crypto/x509 reads: the key and its proof, the names, and
// nothing else.
func TestSign(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]Names{
		"nothing": {},
		"an id":   {URI: "spiffe://example.org/web"},
		"names":   {URI: "spiffe://example.org/web", DNS: []string{"web.example.org", "*.shop.example.org"}},
	} {
		der, err := Sign(key, n)
		if err != nil {
			t.Fatal(err)
		}
		r, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := r.CheckSignature(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		uris := []string{}
		for _, u := range r.URIs {
			uris = append(uris, u.String())
		}
		if n.URI != "" && !slices.Equal(uris, []string{n.URI}) || !slices.Equal(r.DNSNames, n.DNS) || !key.PublicKey.Equal(r.PublicKey) {
			t.Errorf("%s: it asks for %q, %q", name, uris, r.DNSNames)
		}
		extensions := min(len(n.URI), 1)
		if r.Version != 0 || r.SignatureAlgorithm != x509.ECDSAWithSHA256 || len(r.Subject.Names) > 0 || len(r.Extensions) != extensions || extensions > 0 && !r.Extensions[0].Critical {
			t.Errorf("%s: %+v", name, r)
		}
		info, err := Info(r.RawSubjectPublicKeyInfo, n)
		if err != nil || !bytes.Equal(info, r.RawTBSCertificateRequest) {
			t.Errorf("%s: Info returns something else, %v", name, err)
		}
	}
}
