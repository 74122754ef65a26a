package conformance

import (
	"bytes"
	"crypto/x509"
	encodingasn1 "encoding/asn1"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/meshid/meshid/test/require"
)

// Object identifiers of extensions.
const (
	oidSubjectKeyID     = "2.5.29.14"
	oidKeyUsage         = "2.5.29.15"
	oidSAN              = "2.5.29.17"
	oidBasicConstraints = "2.5.29.19"
	oidNameConstraints  = "2.5.29.30"
	oidAuthorityKeyID   = "2.5.29.35"
	oidExtKeyUsage      = "2.5.29.37"
)

// extension is one of a certificate, as it is in the DER.
type extension struct {
	critical bool
	value    []byte
}

// extensionsOf reads a certificate without crypto/x509 (RFC 5280 §4.1).
func extensionsOf(t testing.TB, c *x509.Certificate) map[string]extension {
	t.Helper()
	tagExtensions := asn1.Tag(3).ContextSpecific().Constructed()
	input := cryptobyte.String(c.RawTBSCertificate)
	var tbs, wrapped, list cryptobyte.String
	if !input.ReadASN1(&tbs, asn1.SEQUENCE) ||
		!tbs.SkipOptionalASN1(asn1.Tag(0).ContextSpecific().Constructed()) || // version
		!tbs.SkipASN1(asn1.INTEGER) || // serial number
		!tbs.SkipASN1(asn1.SEQUENCE) || // signature
		!tbs.SkipASN1(asn1.SEQUENCE) || // issuer
		!tbs.SkipASN1(asn1.SEQUENCE) || // validity
		!tbs.SkipASN1(asn1.SEQUENCE) || // subject
		!tbs.SkipASN1(asn1.SEQUENCE) || // subject public key info
		!tbs.ReadASN1(&wrapped, tagExtensions) || !tbs.Empty() ||
		!wrapped.ReadASN1(&list, asn1.SEQUENCE) || !wrapped.Empty() {
		t.Fatal("certificate is not as RFC 5280 §4.1 says")
	}
	all := make(map[string]extension)
	for !list.Empty() {
		var e, oid, value cryptobyte.String
		var critical bool
		if !list.ReadASN1(&e, asn1.SEQUENCE) || !e.ReadASN1Element(&oid, asn1.OBJECT_IDENTIFIER) ||
			(e.PeekASN1Tag(asn1.BOOLEAN) && !e.ReadASN1Boolean(&critical)) ||
			!e.ReadASN1(&value, asn1.OCTET_STRING) || !e.Empty() {
			t.Fatal("extension is not as RFC 5280 §4.1 says")
		}
		var id encodingasn1.ObjectIdentifier
		if !oid.ReadASN1ObjectIdentifier(&id) {
			t.Fatal("object identifier")
		}
		name := id.String()
		if _, twice := all[name]; twice {
			t.Errorf("extension %s is there twice", name)
		}
		all[name] = extension{critical, value}
	}
	return all
}

// names are the subject alternative names by tag, in their order.
type names map[int][]string

func namesOf(t testing.TB, c *x509.Certificate) names {
	t.Helper()
	value := cryptobyte.String(extensionsOf(t, c)[oidSAN].value)
	var list cryptobyte.String
	if !value.ReadASN1(&list, asn1.SEQUENCE) || !value.Empty() {
		t.Fatal("no subject alternative names")
	}
	all := make(names)
	for !list.Empty() {
		var name cryptobyte.String
		var tag asn1.Tag
		if !list.ReadAnyASN1(&name, &tag) {
			t.Fatal("name")
		}
		all[int(tag&0x1f)] = append(all[int(tag&0x1f)], string(name))
	}
	return all
}

// Tags of GeneralName.
const (
	tagDNS = 2
	tagURI = 6
)

// checkLeaf holds a certificate against the whole profile of a leaf.
func checkLeaf(t testing.TB, chain []*x509.Certificate, id string, dns ...string) {
	t.Helper()
	leaf, issuer := chain[0], chain[1]
	want := names{tagURI: {id}}
	if len(dns) > 0 {
		want[tagDNS] = dns
	}
	if got := namesOf(t, leaf); !equalNames(got, want) {
		t.Errorf("names are %v, want %v", got, want)
	}
	if leaf.IsCA || !leaf.BasicConstraintsValid || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.UnhandledCriticalExtensions) > 0 {
		t.Errorf("ca %v, basic constraints %v, key usage %b, unknown critical %v", leaf.IsCA, leaf.BasicConstraintsValid, leaf.KeyUsage, leaf.UnhandledCriticalExtensions)
	}
	if len(leaf.Subject.Names) > 0 {
		t.Errorf("subject is %s", leaf.Subject)
	}
	allowed := map[string]bool{ // and whether it is critical
		oidSubjectKeyID: false, oidKeyUsage: true, oidSAN: true, oidBasicConstraints: true, oidAuthorityKeyID: false, oidExtKeyUsage: false,
	}
	for oid, e := range extensionsOf(t, leaf) {
		if critical, ok := allowed[oid]; !ok || critical != e.critical {
			t.Errorf("extension %s, critical: %v", oid, e.critical)
		}
	}
	if err := leaf.CheckSignatureFrom(issuer); err != nil {
		t.Error(err)
	}
}

func equalNames(a, b names) bool {
	if len(a) != len(b) {
		return false
	}
	for tag := range a {
		if strings.Join(a[tag], "\x00") != strings.Join(b[tag], "\x00") {
			return false
		}
	}
	return true
}

// pemOf returns certificates as files are.
func pemOf(certificates ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certificates {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // to memory
	}
	return b.Bytes()
}

func write(t testing.TB, content []byte) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// openssl runs a command of it and returns all that it prints.
func openssl(t testing.TB, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command(require.Program(t, "openssl"), args...).CombinedOutput()
	return string(out), err
}

// opensslVerify verifies a chain as openssl does.
func opensslVerify(t testing.TB, purpose string, roots, chain []*x509.Certificate) (string, error) {
	t.Helper()
	args := []string{"verify", "-purpose", purpose, "-x509_strict", "-CAfile", write(t, pemOf(roots...))}
	if len(chain) > 1 {
		args = append(args, "-untrusted", write(t, pemOf(chain[1:]...)))
	}
	return openssl(t, append(args, write(t, pemOf(chain[0])))...)
}

// files below a folder.
func filesBelow(t testing.TB, dir string) []string {
	t.Helper()
	var all []string
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all = append(all, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
