package istio

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/metadata"

	"github.com/meshid/meshid/internal/kube"
	istiov1 "github.com/meshid/meshid/proto/istio/v1"

	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/test/self"
)

// BenchmarkCreateCertificate is a request of one of Istio's clients, over gRPC and TLS on
// a connection that is there, with a token whose signature was verified before, a durable
// record, and pods on 100 nodes. The client's share of the transport is in it: both are in
// this process. So many clients ask at the same time.
func BenchmarkCreateCertificate(b *testing.B) {
	for _, clients := range []int{1, 16, 64, 256} {
		b.Run(fmt.Sprint(clients), func(b *testing.B) {
			m := newMesh(b, func(_ *Config, c *server.Config) { c.Limits.IssueRate, c.Limits.IssueBurst = 1<<30, 1<<30 })
			m.service.issueRate = rate.Inf
			type sidecar struct {
				ctx context.Context //nolint:containedctx // it holds the metadata of all calls
				req *istiov1.IstioCertificateRequest
			}
			all := make([]sidecar, clients)
			for i := range all {
				token := m.run(fmt.Sprintf("shop/app%d", i), fmt.Sprintf("app%d-1", i), fmt.Sprintf("n%d", i%100))
				all[i] = sidecar{
					metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+token, "clusterid", "Kubernetes"),
					&istiov1.IstioCertificateRequest{Csr: newCSR(b, newKey(b), spiffeIDOf(td, "shop", fmt.Sprintf("app%d", i))), ValidityDuration: 86400},
				}
			}
			conns := make([]istiov1.IstioCertificateServiceClient, max(1, clients/16))
			for i := range conns {
				conn := m.dial(nil)
				defer conn.Close()
				conns[i] = istiov1.NewIstioCertificateServiceClient(conn)
			}
			ask := func(i int) {
				resp, err := conns[i%len(conns)].CreateCertificate(all[i].ctx, all[i].req)
				if err != nil || len(resp.GetCertChain()) != 3 {
					b.Error(err)
				}
			}
			for i := range all {
				ask(i)
			}
			var left atomic.Int64
			left.Store(int64(b.N))
			before := self.CPU(b)
			b.ResetTimer()
			var group sync.WaitGroup
			for i := range all {
				group.Go(func() {
					for left.Add(-1) >= 0 {
						ask(i)
					}
				})
			}
			group.Wait()
			b.StopTimer()
			used := self.CPU(b) - before
			b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-µs/cert")
			b.ReportMetric(float64(b.N)/used.Seconds(), "certs/cpu-s")
		})
	}
}

// BenchmarkCreateCertificateNewToken is the same with a token that was never seen before
// in each request, verified offline by the cluster's RSA key.
func BenchmarkCreateCertificateNewToken(b *testing.B) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		b.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "RS256", Use: "sig"}}})
	if err != nil {
		b.Fatal(err)
	}
	file := filepath.Join(b.TempDir(), "jwks")
	if err := os.WriteFile(file, set, 0o600); err != nil {
		b.Fatal(err)
	}
	keys, err := kube.NewKeys(kube.KeysConfig{Issuer: "https://kubernetes", File: file})
	if err != nil {
		b.Fatal(err)
	}
	m := newMesh(b, func(c *Config, s *server.Config) {
		s.Limits.IssueRate, s.Limits.IssueBurst = 1<<30, 1<<30
		c.Clusters[0].Tokens = TokensOf(keys)
	})
	m.service.issueRate = rate.Inf
	m.run("shop/web", "web-1", "n1")
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		b.Fatal(err)
	}
	tokens := make([]string, b.N)
	for i := range tokens {
		claims := fmt.Sprintf(`{"iss":"https://kubernetes","sub":"system:serviceaccount:shop:web","aud":["istio-ca"],"exp":%d,"iat":%d,"jti":"%d",
			"kubernetes.io":{"namespace":"shop","serviceaccount":{"name":"web","uid":"sa"},"pod":{"name":"web-1","uid":"uid-web-1"},"node":{"name":"n1","uid":"uid-n1"}}}`,
			time.Now().Add(time.Hour).Unix(), time.Now().Unix(), i)
		signed, err := signer.Sign([]byte(claims))
		if err != nil {
			b.Fatal(err)
		}
		if tokens[i], err = signed.CompactSerialize(); err != nil {
			b.Fatal(err)
		}
	}
	req := &istiov1.IstioCertificateRequest{Csr: newCSR(b, newKey(b), spiffeIDOf(td, "shop", "web"))}
	conn := istiov1.NewIstioCertificateServiceClient(m.conn)
	var next atomic.Int64
	before := self.CPU(b)
	b.ResetTimer()
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			for {
				i := int(next.Add(1) - 1)
				if i >= len(tokens) {
					return
				}
				ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+tokens[i])
				if _, err := conn.CreateCertificate(ctx, req); err != nil {
					b.Error(err)
				}
			}
		})
	}
	group.Wait()
	b.StopTimer()
	used := self.CPU(b) - before
	b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-µs/cert")
	b.ReportMetric(float64(b.N)/used.Seconds(), "certs/cpu-s")
}
