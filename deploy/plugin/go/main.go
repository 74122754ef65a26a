// Command go is an upstream CA as a plug-in, in Go: an example to begin from. The CA
// that it stands for is a key in a file; put the calls of yours where sign is.
package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/meshid/meshid/proto/plugin/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdin)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

// run serves until ctx or standard input ends.
func run(ctx context.Context, args []string, stdin io.Reader) error {
	flags := flag.NewFlagSet("plug-in", flag.ContinueOnError)
	certificate := flags.String("certificate", "", "PEM file of the root's certificate")
	key := flags.String("key", "", "PEM file of its private key")
	if err := flags.Parse(args); err != nil {
		return err
	}
	socket := os.Getenv("MESHID_PLUGIN_SOCKET")
	if socket == "" {
		return errors.New("this is a plug-in: name it in ca.yaml, as the command of upstream.external")
	}
	pair, err := tls.LoadX509KeyPair(*certificate, *key)
	if err != nil {
		return err
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return fmt.Errorf("%s: the key cannot sign", *key)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	pluginv1.RegisterUpstreamServer(server, &authority{root: pair.Leaf, key: signer})
	ended, end := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, stdin) // it ends with the CA
		end()
	}()
	go func() {
		<-ended.Done()
		server.Stop()
	}()
	fmt.Fprintf(os.Stderr, "signing with %s\n", pair.Leaf.Subject)
	return server.Serve(listener)
}

// authority implements the service.
type authority struct {
	pluginv1.UnimplementedUpstreamServer

	root *x509.Certificate
	key  crypto.Signer
}

// Handshake agrees on the version of the protocol.
func (*authority) Handshake(_ context.Context, r *pluginv1.HandshakeRequest) (*pluginv1.HandshakeResponse, error) {
	if !slices.Contains(r.GetProtocolVersions(), 1) {
		return nil, status.Error(codes.FailedPrecondition, "this plug-in speaks version 1 of the protocol")
	}
	return &pluginv1.HandshakeResponse{ProtocolVersion: 1, Name: "example-go", Version: "1.0"}, nil
}

// Mint signs an intermediate.
func (a *authority) Mint(_ context.Context, r *pluginv1.MintRequest) (*pluginv1.MintResponse, error) {
	request, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the CSR is malformed: %v", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the CSR does not prove its key: %v", err)
	}
	der, err := a.sign(request, r.GetTtl().AsDuration())
	if err != nil {
		return nil, err
	}
	return &pluginv1.MintResponse{Chain: [][]byte{der}, Roots: [][]byte{a.root.Raw}}, nil
}

// sign makes the certificate. What matters is the key, the subject and the URI of
// the request, that it is a CA, and its key usage.
func (a *authority) sign(request *x509.CertificateRequest, ttl time.Duration) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	key, err := x509.MarshalPKIXPublicKey(request.PublicKey)
	if err != nil {
		return nil, err
	}
	identifier := sha256.Sum256(key)
	now := time.Now()
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      request.Subject, URIs: request.URIs,
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		SubjectKeyId: identifier[:20],
	}, a.root, request.PublicKey, a.key)
}

// WatchRoots sends the one root there is.
func (a *authority) WatchRoots(_ *pluginv1.WatchRootsRequest, s grpc.ServerStreamingServer[pluginv1.WatchRootsResponse]) error {
	if err := s.Send(&pluginv1.WatchRootsResponse{Roots: [][]byte{a.root.Raw}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}
