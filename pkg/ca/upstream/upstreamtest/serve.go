package upstreamtest

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Serve serves HTTPS on this machine for a fake, until the test ends or close is
// called. ca is the PEM certificate of the CA of the server's own certificate.
func Serve(t testing.TB, h http.HandlerFunc) (url string, ca []byte, close func()) {
	t.Helper()
	a := NewAuthority(t, Good)
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.Root, key.Public(), a.RootKey)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL, PEM(a.Root), s.Close
}

// Member is who may call a server of a mesh: the paths of its X.509-SVID, its key, and
// the roots by which it knows the server.
type Member struct{ Certificate, Key, Bundle string }

// ServeMesh serves gRPC on this machine for a fake that is part of a mesh and has a
// SPIFFE ID with this path, until the test ends or close is called. Callers have to be
// of the same trust domain; member is one. a has issued all certificates, with its root.
func ServeMesh(t testing.TB, a *Authority, path string, register func(*grpc.Server)) (address string, member Member, close func()) {
	t.Helper()
	certificate, key := a.SVID(path)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.Root)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, MinVersion: tls.VersionTLS13,
	})))
	register(s)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	var once sync.Once
	end := func() {
		once.Do(func() {
			s.Stop()
			if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may not have begun
				t.Errorf("serve: %v", err)
			}
		})
	}
	t.Cleanup(end)
	certificate, key = a.SVID("/ca-below")
	return l.Addr().String(), Member{File(t, "svid.pem", certificate), File(t, "key.pem", key), File(t, "bundle.pem", PEM(a.Root))}, end
}

// SVID returns an X.509-SVID that the root has issued, whatever is wrong with the
// issuing CA, and its key, PEM; it lives for an hour.
func (a *Authority) SVID(path string) (certificate, private []byte) {
	a.t.Helper()
	key := newKey(a.t)
	c := sign(a.t, &x509.Certificate{
		URIs: []*url.URL{TrustDomain.ID().URL().JoinPath(path)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, a.Root, key.Public(), a.RootKey)
	return PEM(c), KeyPEM(a.t, key)
}
