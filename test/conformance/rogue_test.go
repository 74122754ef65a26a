package conformance

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/test/local"
)

// rogue is an agent that says what it likes.
type rogue struct {
	svid   *x509svid.SVID
	client nodev1.NodeServiceClient
}

// bundleOf returns the trust bundle of a CA.
func bundleOf(t testing.TB, ca *local.CA) *x509bundle.Bundle {
	t.Helper()
	b, err := ca.Admin.GetBundle(t.Context(), &adminv1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundle := x509bundle.New(spiffeid.RequireTrustDomainFromString(b.GetTrustDomain()))
	for _, root := range b.GetRoots() {
		bundle.AddX509Authority(parse(t, root))
	}
	return bundle
}

// dialCA connects to the CA's listener, with an identity or without.
func dialCA(t testing.TB, ca *local.CA, svid x509svid.Source) *grpc.ClientConn {
	t.Helper()
	bundle := bundleOf(t, ca)
	expected := tlsconfig.AuthorizeID(spiffeid.RequireFromPath(bundle.TrustDomain(), "/meshid/ca"))
	config := tlsconfig.TLSClientConfig(bundle, expected)
	if svid != nil {
		config = tlsconfig.MTLSClientConfig(svid, bundle, expected)
	}
	config.MinVersion = tls.VersionTLS13
	conn, err := grpc.NewClient("passthrough:///"+ca.Listen, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// attestNode proves to be the node that a token was made for.
func attestNode(ctx context.Context, conn *grpc.ClientConn, token string, csr []byte) (*nodev1.AgentIdentity, error) {
	evidence, err := jointoken.NewAttester(token).Evidence(ctx, nil)
	if err != nil {
		return nil, err
	}
	return attestWith(ctx, conn, &nodev1.AttestStart{Method: jointoken.Method, Evidence: evidence, Csr: csr, AgentVersion: "rogue"})
}

func attestWith(ctx context.Context, conn *grpc.ClientConn, start *nodev1.AttestStart) (*nodev1.AgentIdentity, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := nodev1.NewNodeServiceClient(conn).Attest(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{Start: start}}); err != nil && err != io.EOF { //nolint:errorlint // grpc's own
		return nil, err
	}
	m, err := s.Recv()
	return m.GetIdentity(), err
}

func newToken(t testing.TB, ca *local.CA, node string, labels map[string]string) string {
	t.Helper()
	token, err := ca.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: node, Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	return token.GetToken()
}

// join attests a rogue.
func join(t testing.TB, ca *local.CA, node string, labels map[string]string) *rogue {
	t.Helper()
	key := newKey(t)
	identity, err := attestNode(t.Context(), dialCA(t, ca, nil), newToken(t, ca, node, labels), csrOf(t, key, nil))
	if err != nil {
		t.Fatal(err)
	}
	svid := svidOf(t, identity.GetChain(), key)
	return &rogue{svid: svid, client: nodev1.NewNodeServiceClient(dialCA(t, ca, svid))}
}

// svidOf checks a chain and its key as go-spiffe does.
func svidOf(t testing.TB, chain [][]byte, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	svid, err := x509svid.ParseRaw(bytes.Join(chain, nil), pkcs8)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// item asks for an entry as if for a process of the user.
func item(name string, uid uint32, csr []byte) *nodev1.IssueItem {
	return &nodev1.IssueItem{
		Entry: name, Csr: csr, Instance: fmt.Sprintf("unix:%d", uid), Kind: nodev1.IssueKind_ISSUE_KIND_FIRST,
		Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: int64(uid), Gid: int64(uid), Path: "/bin/rogue"}},
	}
}

func (r *rogue) issue(t testing.TB, items ...*nodev1.IssueItem) []*nodev1.IssueResult {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	answer, err := r.client.Issue(ctx, &nodev1.IssueRequest{Items: items})
	if err != nil {
		t.Fatal(err)
	}
	if len(answer.GetResults()) != len(items) {
		t.Fatalf("%d answers to %d items", len(answer.GetResults()), len(items))
	}
	return answer.GetResults()
}

// issued asks for one X.509-SVID that must be granted; again, as agents do, if the
// answer is not known yet.
func (r *rogue) issued(t testing.TB, i *nodev1.IssueItem) (*nodev1.IssuedSVID, []*x509.Certificate) {
	t.Helper()
	var result *nodev1.IssueResult
	local.Await(t, "an X.509-SVID that must be granted", func(context.Context) error {
		if result = r.issue(t, i)[0]; result.GetRefusal().GetReason() == nodev1.Reason_REASON_UNAVAILABLE {
			return errors.New(result.GetRefusal().GetMessage())
		}
		return nil
	})
	if result.GetSvid() == nil {
		t.Fatalf("refused: %v", result.GetRefusal())
	}
	return result.GetSvid(), parseAll(t, result.GetSvid().GetChain())
}

// refused asks for one X.509-SVID that must not be granted.
func (r *rogue) refused(t testing.TB, i *nodev1.IssueItem, want nodev1.Reason) string {
	t.Helper()
	result := r.issue(t, i)[0]
	if svid := result.GetSvid(); svid != nil {
		t.Errorf("%s was issued, want %v", svid.GetSpiffeId(), want)
		return ""
	}
	if got := result.GetRefusal().GetReason(); got != want {
		t.Errorf("refused with %v (%s), want %v", got, result.GetRefusal().GetMessage(), want)
	}
	return result.GetRefusal().GetMessage()
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// keysOf returns a key of each kind that the CA allows.
func keysOf(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.Signer{"P-256": newKey(t), "P-384": p384, "RSA-2048": rsa2048, "Ed25519": ed}
}

func csrOf(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func parseAll(t testing.TB, chain [][]byte) []*x509.Certificate {
	t.Helper()
	all := make([]*x509.Certificate, 0, len(chain))
	for _, der := range chain {
		all = append(all, parse(t, der))
	}
	return all
}

// get returns the body of a successful answer.
func get(c *http.Client, req *http.Request) (string, error) {
	res, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	return string(body), err
}
