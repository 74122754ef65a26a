package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/local"
)

// node is an attested node that asks the CA for X.509-SVIDs with requests made
// beforehand, so that nearly all that happens happens in the CA.
type node struct {
	client nodev1.NodeServiceClient
	used   int
}

// perNode is below what the CA gives one node at once.
const perNode = 4500

// request makes a key and a CSR.
func request(b testing.TB) (*ecdsa.PrivateKey, []byte) {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(b, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(b, err)
	return key, csr
}

// attestNode joins a node to the CA.
func attestNode(b testing.TB, ca *local.CA, name string) *node {
	b.Helper()
	token, err := ca.Admin.CreateToken(b.Context(), &adminv1.CreateTokenRequest{NodeName: name})
	must(b, err)
	evidence, err := jointoken.NewAttester(token.GetToken()).Evidence(b.Context(), nil)
	must(b, err)
	key, csr := request(b)
	// the CA is ours, and who it is does not matter to its speed
	first, err := grpc.NewClient(ca.Listen, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})))
	must(b, err)
	defer first.Close() // nothing is lost
	stream, err := nodev1.NewNodeServiceClient(first).Attest(b.Context())
	must(b, err)
	must(b, stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{
		Start: &nodev1.AttestStart{Method: jointoken.Method, Evidence: evidence, Csr: csr},
	}}))
	answer, err := stream.Recv()
	must(b, err)
	// as above; windows as agents have them
	conn, err := grpc.NewClient(ca.Listen, grpc.WithStaticStreamWindowSize(1<<20), grpc.WithStaticConnWindowSize(2<<20), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: answer.GetIdentity().GetChain(), PrivateKey: key}},
	})))
	must(b, err)
	b.Cleanup(func() { _ = conn.Close() })
	return &node{client: nodev1.NewNodeServiceClient(conn)}
}

// items makes n items, each for an instance and a key of its own.
func items(b testing.TB, n int) []*nodev1.IssueItem {
	b.Helper()
	all := make([]*nodev1.IssueItem, n)
	for i := range all {
		_, csr := request(b)
		uid := int64(firstUser + i)
		all[i] = &nodev1.IssueItem{
			Entry: everybody.GetName(), Csr: csr, Instance: fmt.Sprintf("unix:%d:%d:8:1:1", uid, uid), Kind: nodev1.IssueKind_ISSUE_KIND_FIRST,
			Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: uid, Gid: uid, Path: "/usr/bin/app"}},
		}
	}
	return all
}

// standard is the standard library's bare work: no rule, no linter, no record.
type standard struct {
	issuer *x509.Certificate
	key    *ecdsa.PrivateKey
}

func newStandard(b testing.TB) *standard {
	b.Helper()
	key, _ := request(b)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(b, err)
	issuer, err := x509.ParseCertificate(der)
	must(b, err)
	return &standard{issuer: issuer, key: key}
}

func (s *standard) issue(b testing.TB, item *nodev1.IssueItem) {
	csr, err := x509.ParseCertificateRequest(item.GetCsr())
	must(b, err)
	must(b, csr.CheckSignature())
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	must(b, err)
	now := time.Now()
	_, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		URIs:     []*url.URL{{Scheme: "spiffe", Host: local.TrustDomain, Path: "/user/300000"}},
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, s.issuer, csr.PublicKey, s.key)
	must(b, err)
}

// yardstick measures the standard library's bare work for one certificate while
// something else is measured: how fast the machine is just then.
type yardstick struct {
	standard *standard
	item     *nodev1.IssueItem
	taken    time.Duration
	issued   int
}

func newYardstick(b testing.TB) *yardstick {
	b.Helper()
	return &yardstick{standard: newStandard(b), item: items(b, 1)[0]}
}

// measure issues some certificates.
func (y *yardstick) measure(b testing.TB) {
	b.Helper()
	const n = 10
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := threadTime(b)
	for range n {
		y.standard.issue(b, y.item)
	}
	y.taken += threadTime(b) - began
	y.issued += n
}

// report reports it, and how many times that a processor time is.
func (y *yardstick) report(b *testing.B, of time.Duration) {
	b.Helper()
	bare := y.taken / time.Duration(y.issued)
	b.ReportMetric(float64(bare.Nanoseconds())/1000, "stdlib-µs")
	b.ReportMetric(float64(of)/float64(bare), "x-stdlib")
}

// BenchmarkIssue reports the processor time that the CA's process takes for one
// X.509-SVID, all included (TLS, gRPC, rule, linter, durable record), and how many
// times that of the standard library's bare work it is. The two take turns.
func BenchmarkIssue(b *testing.B) {
	for _, size := range []int{256, 1} {
		b.Run(fmt.Sprintf("batch-%d", size), func(b *testing.B) {
			ca := local.StartCA(b, local.CAOptions{})
			apply(b, ca, everybody)
			s := newStandard(b)
			var pool []*nodev1.IssueItem // of this node: a key belongs to one instance on one node
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			var n *node
			nodes, next := 0, 0
			ask := func() {
				if n == nil || n.used+size > perNode {
					n, pool = attestNode(b, ca, fmt.Sprint("node-", nodes)), items(b, 1024)
					nodes++
				}
				n.used += size
				answer, err := n.client.Issue(context.Background(), &nodev1.IssueRequest{Items: pool[next : next+size]})
				must(b, err)
				for _, r := range answer.GetResults() {
					if r.GetSvid() == nil {
						b.Fatalf("refused: %v", r.GetRefusal())
					}
				}
			}
			for range 4 { // what is made once is made
				ask()
			}
			var ours, theirs time.Duration
			issued := 0
			for b.Loop() {
				for done := 0; done < 256; done += size {
					if n.used+size > perNode {
						ask()
					}
					began := processorTime(b, ca.PID())
					ask()
					ours += processorTime(b, ca.PID()) - began
					began = threadTime(b)
					for _, item := range pool[next : next+size] {
						s.issue(b, item)
					}
					theirs += threadTime(b) - began
					issued += size
					next = (next + size) % len(pool)
				}
			}
			b.ReportMetric(float64(ours)/float64(theirs), "x-stdlib")
			b.ReportMetric(float64(ours.Nanoseconds())/1000/float64(issued), "CA-µs/SVID")
			b.ReportMetric(float64(theirs.Nanoseconds())/1000/float64(issued), "stdlib-µs/SVID")
			only(b)
		})
	}
}
