package conformance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/test/local"
)

// checkAuthority holds a certificate against the profile of one that signs.
func checkAuthority(t *testing.T, c *x509.Certificate, pathLen int) {
	t.Helper()
	if !c.IsCA || !c.BasicConstraintsValid || c.MaxPathLen != pathLen || c.MaxPathLenZero != (pathLen == 0) {
		t.Errorf("ca %v, path length %d, zero %v; want %d", c.IsCA, c.MaxPathLen, c.MaxPathLenZero, pathLen)
	}
	if c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign && c.KeyUsage != x509.KeyUsageCertSign {
		t.Errorf("key usage %b", c.KeyUsage)
	}
	if len(c.UnknownExtKeyUsage) > 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) {
		t.Errorf("extended key usage %v %v", c.ExtKeyUsage, c.UnknownExtKeyUsage)
	}
	all := extensionsOf(t, c)
	for _, oid := range []string{oidKeyUsage, oidBasicConstraints} {
		if e, ok := all[oid]; !ok || !e.critical {
			t.Errorf("extension %s: there %v, critical %v", oid, ok, e.critical)
		}
	}
	if len(c.UnhandledCriticalExtensions) > 0 {
		t.Errorf("unknown critical extensions %v", c.UnhandledCriticalExtensions)
	}
	if key, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || key.Params().Name != "P-256" {
		t.Errorf("key is %T", c.PublicKey)
	}
}

func TestSpec_C01_Root(t *testing.T) {
	s := sampled(t)
	if len(s.roots) != 1 {
		t.Fatalf("%d roots", len(s.roots))
	}
	root := s.roots[0]
	checkAuthority(t, root, -1) // no limit: it is signed by nobody who could set one
	if err := root.CheckSignatureFrom(root); err != nil {
		t.Error(err)
	}
	if out, err := openssl(t, "verify", "-x509_strict", "-CAfile", write(t, pemOf(root)), write(t, pemOf(root))); err != nil {
		t.Error(out)
	}
}

func TestSpec_C02_Intermediate(t *testing.T) {
	s := sampled(t)
	checkAuthority(t, s.chain[1], 0)
	if err := s.chain[1].CheckSignatureFrom(s.roots[0]); err != nil {
		t.Error(err)
	}
	if s.chain[1].NotAfter.After(s.roots[0].NotAfter) {
		t.Error("it outlives the root")
	}
}

func TestSpec_C03_AuthorityIDWithoutPath(t *testing.T) {
	s := sampled(t)
	for _, c := range []*x509.Certificate{s.roots[0], s.chain[1]} {
		if diff := cmp.Diff(names{tagURI: {"spiffe://" + td}}, namesOf(t, c)); diff != "" {
			t.Error(diff)
		}
	}
}

// rootKey reads the root's key, as only root may on the CA's machine.
func rootKey(t *testing.T, ca *local.CA) crypto.Signer {
	t.Helper()
	for _, path := range filesBelow(t, filepath.Join(ca.DataDir, "keys")) {
		if filepath.Ext(path) != ".key" {
			continue
		}
		block, _ := pem.Decode(readFile(t, path))
		if block == nil {
			continue // that of the log is a note's
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			t.Fatalf("key is a %T", key)
		}
		return signer
	}
	t.Fatal("no key file")
	return nil
}

// TestSpec_C06_AuthorityAsClient: not even who has the root's key is let in with
// the root's certificate.
func TestSpec_C06_AuthorityAsClient(t *testing.T) {
	w := shared(t)
	s := sampled(t)
	p := envoy(t)
	key := rootKey(t, w.ca)
	if !key.Public().(*ecdsa.PublicKey).Equal(s.roots[0].PublicKey) {
		t.Fatal("it is another key")
	}
	if got, err := p.ask(t.Context(), shown(key, s.roots[0])); err == nil {
		t.Errorf("envoy let it in as %q", got)
	}
	if id, _, err := x509svid.Verify(s.roots, p.bundle); err == nil {
		t.Errorf("go-spiffe takes it for %s", id)
	}
	client := nodev1.NewNodeServiceClient(dialCA(t, w.ca, shown(key, s.roots[0])))
	if _, err := client.Issue(t.Context(), &nodev1.IssueRequest{}); !turnedAway(err) {
		t.Errorf("the CA: %v", err)
	}
}

// turnedAway says whether a caller was refused for who it is.
func turnedAway(err error) bool {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied:
		return true
	case codes.Unavailable: // the handshake fails: TLS 1.3 tells the client afterwards
		return strings.Contains(err.Error(), "tls") || strings.Contains(err.Error(), "certificate") ||
			strings.Contains(err.Error(), "reset") || strings.Contains(err.Error(), "EOF") || strings.Contains(err.Error(), "broken pipe")
	default:
		return false
	}
}

// TestSpec_C07_NeverOutlivesTheIssuer: with the shortest intermediate that the
// CA takes, and the longest leaves, over rotations.
func TestSpec_C07_NeverOutlivesTheIssuer(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{Config: "svid: {max_ttl: 24h}\nauthority: {root_life: 96h, intermediate_life: 48h}\n"})
	uid := newUser()
	e := entry("c07", uid)
	e.Ttl = durationpb.New(24 * time.Hour)
	w.apply(t, e)
	root := bundleOf(t, w.ca).X509Authorities()[0]
	c := w.as(t, uid)
	seen := make(map[string]bool)
	s := c.stream(t)
	for i := range 4 {
		chain, err := x509.ParseCertificates(s.next(t).GetSvids()[0].GetX509Svid())
		if err != nil {
			t.Fatal(err)
		}
		checkLeaf(t, chain, e.GetSpiffeId())
		seen[string(chain[1].SubjectKeyId)] = true
		for j, issuer := range []*x509.Certificate{chain[1], root} {
			if issuer.NotAfter.Before(chain[j].NotAfter) || issuer.NotBefore.After(chain[j].NotBefore) {
				t.Errorf("%v to %v, its issuer %v to %v", chain[j].NotBefore, chain[j].NotAfter, issuer.NotBefore, issuer.NotAfter)
			}
		}
		if len(seen) != i+1 {
			t.Fatalf("%d intermediates after %d rotations", len(seen), i)
		}
		if _, err := w.ca.Admin.RotateIntermediate(t.Context(), &adminv1.RotateIntermediateRequest{}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestV_B8_FourMinutesBehind: who is that far behind accepts what was issued
// this moment, by a CA that has existed for seconds.
func TestV_B8_FourMinutesBehind(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("v-b8", uid))
	now := time.Now()
	x := w.as(t, uid).context(t)
	chain, bundle := x.DefaultSVID().Certificates, bundleOf(t, w.ca)
	for _, behind := range []time.Duration{0, 4 * time.Minute} {
		if _, _, err := x509svid.Verify(chain, bundle, x509svid.WithTime(now.Add(-behind))); err != nil {
			t.Errorf("%v behind: %v", behind, err)
		}
	}
	if chain[0].NotBefore.Before(chain[1].NotBefore) || chain[1].NotBefore.Before(bundle.X509Authorities()[0].NotBefore) {
		t.Error("begins before its issuer")
	}
	if early := now.Add(-5*time.Minute - 2*time.Second); chain[0].NotBefore.Before(early) {
		t.Errorf("begins at %v, asked at %v", chain[0].NotBefore, now)
	}
}

// TestV_B11_LeafAsAuthority: who has an X.509-SVID cannot make others with it.
func TestV_B11_LeafAsAuthority(t *testing.T) {
	w := shared(t)
	p := envoy(t)
	uid := newUser()
	w.apply(t, entry("v-b11", uid))
	svid := w.as(t, uid).context(t).DefaultSVID()
	admin, err := url.Parse("spiffe://" + td + "/admin")
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{admin}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		NotBefore:   time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute),
		Subject: pkix.Name{CommonName: "x"},
	}, svid.Certificates[0], key.Public(), svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	chain := append([]*x509.Certificate{parse(t, der)}, svid.Certificates...)
	if id, _, err := x509svid.Verify(chain, p.bundle); err == nil {
		t.Errorf("go-spiffe takes it for %s", id)
	}
	if out, err := opensslVerify(t, "sslclient", p.bundle.X509Authorities(), chain); err == nil {
		t.Errorf("openssl: %s", out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if got, err := p.ask(ctx, shown(key, chain...)); err == nil {
		t.Errorf("envoy let it in as %q", got)
	}
	client := nodev1.NewNodeServiceClient(dialCA(t, w.ca, shown(key, chain...)))
	if _, err := client.Issue(ctx, &nodev1.IssueRequest{}); !turnedAway(err) {
		t.Errorf("the CA: %v", err)
	}
	// EKUs: exactly both in the leaf, and none that are less above it.
	for _, c := range svid.Certificates[1:] {
		if n := len(c.ExtKeyUsage); n != 0 && n != 2 {
			t.Errorf("authority has %v", c.ExtKeyUsage)
		}
	}
}
