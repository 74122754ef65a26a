package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/test/self"
)

// bareWork is what the standard library alone needs for one certificate: parse
// and check the CSR, sign. It is the unit of the ratios below.
func bareWork(b *testing.B, csr []byte, issuer *x509.Certificate, key *ecdsa.PrivateKey) {
	b.Helper()
	parsed, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		b.Fatal(err)
	}
	if err := parsed.CheckSignature(); err != nil {
		b.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/app/web"}},
	}, issuer, parsed.PublicKey, key); err != nil {
		b.Fatal(err)
	}
}

// bareCPU measures bareWork on all cores, as the server works.
func bareCPU(b *testing.B, csr []byte) time.Duration {
	b.Helper()
	key := newKey(b)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		b.Fatal(err)
	}
	issuer, err := x509.ParseCertificate(der)
	if err != nil {
		b.Fatal(err)
	}
	const n = 1000
	before := self.CPU(b)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range n / 2 {
				bareWork(b, csr, issuer, key)
			}
		})
	}
	wg.Wait()
	return (self.CPU(b) - before) / n
}

// benchHouse is a CA with some entries and a node, and requests of a size.
func benchHouse(b *testing.B, batch int) (*house, *testAgent, *nodev1.IssueRequest) {
	b.Helper()
	h := newHouse(b, func(c *Config) { c.Limits.IssueRate, c.Limits.IssueBurst = 1<<30, 1<<30 })
	for i := range 100 {
		h.apply(shopEntry(fmt.Sprintf("app%d", i)))
	}
	a := h.join("n1", nil)
	req := &nodev1.IssueRequest{}
	for i := range batch {
		item := a.item(fmt.Sprintf("app%d", i%100), workload(fmt.Sprintf("app%d", i%100)))
		item.Instance = fmt.Sprintf("docker:%d", i)
		req.Items = append(req.Items, item)
	}
	return h, a, req
}

func report(b *testing.B, used, bare time.Duration, svids int) {
	b.Helper()
	each := used / time.Duration(svids)
	b.ReportMetric(float64(each.Microseconds()), "cpu-µs/svid")
	b.ReportMetric(float64(bare.Microseconds()), "stdlib-µs/svid")
	b.ReportMetric(float64(each)/float64(bare), "ratio")
}

// BenchmarkIssueBatch is the server's share of Issue: request decoded from its
// bytes, decided, recorded durably, response encoded. The ratio is CPU time over
// that of the standard library's bare work in the same run.
func BenchmarkIssueBatch(b *testing.B) {
	for _, batch := range []int{1, 16, 128, 512} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) {
			h, a, req := benchHouse(b, batch)
			raw, err := proto.Marshal(req)
			if err != nil {
				b.Fatal(err)
			}
			node, _ := h.server.registry.Node(a.id)
			service := h.server.NodeService()
			bare := bareCPU(b, req.GetItems()[0].GetCsr())
			before := self.CPU(b)
			b.ResetTimer()
			svids := 0
			for b.Loop() {
				got := new(nodev1.IssueRequest)
				if err := proto.Unmarshal(raw, got); err != nil {
					b.Fatal(err)
				}
				ctx := context.WithValue(context.Background(), callerKey{}, &caller{requestID: "bench", node: node, began: time.Now(), address: "192.0.2.1:1"})
				resp, err := service.Issue(ctx, got)
				if err != nil {
					b.Fatal(err)
				}
				if resp.GetResults()[0].GetSvid() == nil {
					b.Fatal(resp.GetResults()[0])
				}
				if _, err := proto.Marshal(resp); err != nil {
					b.Fatal(err)
				}
				svids += len(resp.GetResults())
			}
			report(b, self.CPU(b)-before, bare, svids)
		})
	}
}

// BenchmarkIssueOverTLS is the same over gRPC with mutual TLS. The client's share
// of the transport is in it: both are in this process.
func BenchmarkIssueOverTLS(b *testing.B) {
	for _, batch := range []int{1, 16, 128, 512} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) {
			_, a, req := benchHouse(b, batch)
			bare := bareCPU(b, req.GetItems()[0].GetCsr())
			a.issue(req.GetItems()...)
			before := self.CPU(b)
			b.ResetTimer()
			svids := 0
			for b.Loop() {
				if res := a.issue(req.GetItems()...); res[0].GetSvid() == nil {
					b.Fatal(res[0])
				}
				svids += batch
			}
			report(b, self.CPU(b)-before, bare, svids)
		})
	}
}
