package istio

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	istiov1 "github.com/meshid/meshid/proto/istio/v1"
	"github.com/meshid/meshid/test/kube"
	"github.com/meshid/meshid/test/local"
)

// ztunnel asks as the proxy of a node does, which cannot be had here: a connection for each
// call, its own token, one name in the request.
func (c *meshCA) ztunnel(t *testing.T, token, id string) (*x509.Certificate, error) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(c.MustCommand(t, "bundle", "show")))
	conn, err := grpc.NewClient(c.istio, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: roots, ServerName: "ca.mesh-ca.svc", MinVersion: tls.VersionTLS13,
	})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	name, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token, "clusterid", "Kubernetes")
	resp, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istiov1.IstioCertificateRequest{
		Csr: encode("CERTIFICATE REQUEST", csr), ValidityDuration: 86400,
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(id)}},
	}, grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(resp.GetCertChain()[0]))
	if block == nil {
		return nil, fmt.Errorf("no certificate: %q", resp.GetCertChain())
	}
	return x509.ParseCertificate(block.Bytes)
}

// A node's proxy gets the identities of the pods that the cluster has bound to its node,
// for as long as they are there, also of one that was bound a moment ago.
func TestZtunnelOnCA(t *testing.T) {
	s := kube.Shared(t)
	ca := startMeshCA(t, s, "")
	namespace := s.Namespace(t)
	token := func(node string) string {
		pod := s.CreatePod(t, kube.Pod{Namespace: "istio-system", Name: "ztunnel-" + node + "-" + namespace, ServiceAccount: "ztunnel", Node: node})
		return s.Token(t, pod, time.Hour, "istio-ca")
	}
	first, second := token("z1"), token("z2")
	id := func(account string) string { return "spiffe://example.org/ns/" + namespace + "/sa/" + account }
	run := func(account, node string) kube.Pod {
		return s.CreatePod(t, kube.Pod{Namespace: namespace, Name: account + "-" + node, ServiceAccount: account, Node: node})
	}
	run("both", "z1")
	run("both", "z2")
	one := run("one", "z1")
	for _, c := range []struct {
		token, account string
		want           codes.Code
	}{
		{first, "both", codes.OK}, {second, "both", codes.OK}, {first, "one", codes.OK}, {second, "one", codes.Unauthenticated}, {first, "none", codes.Unauthenticated},
	} {
		leaf, err := ca.ztunnel(t, c.token, id(c.account))
		if status.Code(err) != c.want {
			t.Errorf("%s: %v, want %v", c.account, err, c.want)
		}
		if err == nil && (len(leaf.URIs) != 1 || leaf.URIs[0].String() != id(c.account)) {
			t.Errorf("%s: it is %v", c.account, leaf.URIs)
		}
	}
	s.DeletePod(t, one)
	local.Await(t, "wait until the CA has heard of the pod's end", func(context.Context) error {
		if _, err := ca.ztunnel(t, first, id("one")); status.Code(err) != codes.Unauthenticated {
			return fmt.Errorf("the answer is %v", status.Code(err))
		}
		return nil
	})
	// A token for the API server is none for the CA, and an application's is no proxy's.
	app := run("app", "z1")
	for name, bad := range map[string]string{"another audience": s.Token(t, app, time.Hour), "an application": s.Token(t, app, time.Hour, "istio-ca")} {
		if _, err := ca.ztunnel(t, bad, id("both")); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Bound while it is asked for.
	answered := make(chan error, 1)
	go func() {
		_, err := ca.ztunnel(t, first, id("new"))
		answered <- err
	}()
	run("new", "z1")
	if err := <-answered; err != nil && status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
	// If the machine was slower than the CA is patient, ztunnel tries again.
	local.Await(t, "wait for the new pod's certificate", func(context.Context) error {
		_, err := ca.ztunnel(t, first, id("new"))
		return err
	})
}
