package hostile

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/identity"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
	"github.com/meshid/meshid/test/local"
)

// HTTP/2 by hand (RFC 9113), so that it can be wrong.
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	framePriority     = 0x2
	frameReset        = 0x3
	frameSettings     = 0x4
	framePush         = 0x5
	framePing         = 0x6
	frameWindow       = 0x8
	frameContinuation = 0x9

	flagEndStream  = 0x1
	flagEndHeaders = 0x4

	preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

// Methods that are attacked.
const (
	methodSecrets  = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
	methodDelta    = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets"
	methodWorkload = "/SpiffeWorkloadAPI/FetchX509SVID"
	methodAttest   = "/meshid.node.v1.NodeService/Attest"
	methodStatus   = "/meshid.admin.v1.AdminService/GetStatus"
)

// frame returns one HTTP/2 frame.
func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	b := []byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

// length encodes an HPACK integer with a prefix of 7 bits.
func length(n int) []byte {
	if n < 127 {
		return []byte{byte(n)}
	}
	b := []byte{127}
	for n -= 127; n >= 128; n >>= 7 {
		b = append(b, byte(n)|128)
	}
	return append(b, byte(n))
}

// field is a header field that is not indexed, in HPACK.
func field(name, value string) []byte {
	b := append([]byte{0}, length(len(name))...)
	b = append(append(b, name...), length(len(value))...)
	return append(b, value...)
}

// request is the header block of a gRPC call.
func request(method string) []byte {
	b := []byte{0x83, 0x86} // :method POST, :scheme http
	for _, f := range [][2]string{
		{":path", method},
		{":authority", "localhost"},
		{"content-type", "application/grpc"},
		{"te", "trailers"},
		{"workload.spiffe.io", "true"},
	} {
		b = append(b, field(f[0], f[1])...)
	}
	return b
}

// message is a gRPC message, with its prefix.
func message(payload []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(payload))), payload...)
}

// hello is what opens an HTTP/2 connection.
func hello() []byte { return append([]byte(preface), frame(frameSettings, 0, 0, nil)...) }

// dialUnix connects to a socket.
func dialUnix(t testing.TB, path string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// dialTCP connects from one of this machine's loopback addresses.
func dialTCP(t testing.TB, from, to string) (net.Conn, error) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	return d.DialContext(t.Context(), "tcp", to)
}

// closedWithin reports whether the other side closes the connection; what it
// sends before is thrown away.
func closedWithin(c net.Conn, d time.Duration) bool {
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return true
	}
	buf := make([]byte, 16<<10)
	for {
		if _, err := c.Read(buf); err != nil {
			var timeout net.Error
			return !errors.As(err, &timeout) || !timeout.Timeout()
		}
	}
}

// pour writes the same again and again, up to limit bytes, until the other side
// has had enough, and returns how many bytes it took.
func pour(c net.Conn, what func(n int) []byte, limit int) (poured int, refused bool) {
	for n := 0; poured < limit; n++ {
		if err := c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			return poured, true
		}
		k, err := c.Write(what(n))
		poured += k
		if err != nil {
			return poured, true
		}
	}
	return poured, false
}

// rogue is a node agent under an attacker's control: it has the key of a node.
type rogue struct {
	nodeID string
	key    *ecdsa.PrivateKey
	chain  [][]byte
	roots  *x509bundle.Bundle
}

// trustOf returns what verifies the CA.
func trustOf(t testing.TB, ca *local.CA) *x509bundle.Bundle {
	t.Helper()
	b, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(local.TrustDomain), []byte(ca.MustCommand(t, "bundle", "show")))
	must(t, err)
	return b
}

// tlsTo returns the configuration of a client of the CA; without a rogue it has
// no certificate.
func tlsTo(roots *x509bundle.Bundle, r *rogue) *tls.Config {
	td := spiffeid.RequireTrustDomainFromString(local.TrustDomain)
	cfg := tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(identity.CAID(td)))
	cfg.NextProtos, cfg.ServerName = []string{"h2"}, "ca"
	if r != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: r.chain, PrivateKey: r.key}}
	}
	return cfg
}

// csr returns a key and its CSR.
func csr(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	return key, der
}

// join makes a rogue agent of a node.
func join(t testing.TB, ca *local.CA, node string) *rogue {
	t.Helper()
	token, err := ca.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: node})
	must(t, err)
	r := &rogue{nodeID: token.GetNodeId(), roots: trustOf(t, ca)}
	conn := r.dial(t, ca, tlsTo(r.roots, nil))
	evidence, err := jointoken.NewAttester(token.GetToken()).Evidence(t.Context(), nil)
	must(t, err)
	key, request := csr(t)
	stream, err := nodev1.NewNodeServiceClient(conn).Attest(t.Context())
	must(t, err)
	must(t, stream.Send(&nodev1.AttestRequest{Step: &nodev1.AttestRequest_Start{Start: &nodev1.AttestStart{
		Method: jointoken.Method, Evidence: evidence, Csr: request,
	}}}))
	answer, err := stream.Recv()
	must(t, err)
	r.key, r.chain = key, answer.GetIdentity().GetChain()
	must(t, conn.Close())
	return r
}

// dial makes a gRPC connection to the CA.
func (r *rogue) dial(t testing.TB, ca *local.CA, cfg *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(ca.Listen, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// issue asks for an X.509-SVID of an entry for a user's process.
func issue(t testing.TB, conn *grpc.ClientConn, entry string, uid uint32) (*nodev1.IssueResult, error) {
	t.Helper()
	_, request := csr(t)
	res, err := nodev1.NewNodeServiceClient(conn).Issue(t.Context(), &nodev1.IssueRequest{Items: []*nodev1.IssueItem{{
		Entry: entry, Csr: request, Instance: fmt.Sprintf("unix:%d", uid), Kind: nodev1.IssueKind_ISSUE_KIND_FIRST,
		Workload: &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: int64(uid), Gid: int64(uid), Path: "/bin/x"}},
	}}})
	if err != nil {
		return nil, err
	}
	return res.GetResults()[0], nil
}

// records is the sending half of a TLS 1.3 connection (RFC 8446) after the
// handshake, by hand, for messages that crypto/tls does not send.
type records struct {
	conn   net.Conn
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	n      uint64
}

// newRecords makes a handshake and takes the client's half of the connection
// over. Nothing may be sent through crypto/tls any more.
func newRecords(t testing.TB, address string, cfg *tls.Config) *records {
	t.Helper()
	raw, err := dialTCP(t, "127.0.0.1", address)
	must(t, err)
	t.Cleanup(func() { raw.Close() })
	var log bytes.Buffer
	cfg = cfg.Clone()
	cfg.KeyLogWriter = &log
	c := tls.Client(raw, cfg)
	must(t, c.HandshakeContext(t.Context()))
	if suite := c.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("this machine has no AES instructions: TLS chose %s", tls.CipherSuiteName(suite))
	}
	r := &records{conn: raw}
	for line := range strings.Lines(log.String()) {
		if words := strings.Fields(line); words[0] == "CLIENT_TRAFFIC_SECRET_0" {
			r.secret, err = hex.DecodeString(words[2])
			must(t, err)
		}
	}
	must(t, r.rekey())
	return r
}

// expand is HKDF-Expand-Label without context.
func expand(secret []byte, label string, n int) ([]byte, error) {
	label = "tls13 " + label
	info := append(binary.BigEndian.AppendUint16(nil, uint16(n)), byte(len(label)))
	return hkdf.Expand(sha256.New, secret, string(append(append(info, label...), 0)), n)
}

func (r *records) rekey() error {
	key, err1 := expand(r.secret, "key", 16)
	iv, err2 := expand(r.secret, "iv", 12)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	r.iv, r.n = iv, 0
	r.aead, err = cipher.NewGCM(block)
	return err
}

// Types of records.
const (
	recordHandshake   = 22
	recordApplication = 23
)

// seal returns one record.
func (r *records) seal(kind byte, payload []byte) []byte {
	nonce := bytes.Clone(r.iv)
	binary.BigEndian.PutUint64(nonce[4:], binary.BigEndian.Uint64(nonce[4:])^r.n)
	r.n++
	plain := append(bytes.Clone(payload), kind)
	header := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(plain)+r.aead.Overhead()))
	return r.aead.Seal(header, nonce, plain, header)
}

// keyUpdate returns a record that says that the next are under the next key.
func (r *records) keyUpdate(t testing.TB, answer bool) []byte {
	t.Helper()
	b := []byte{24, 0, 0, 1, 0}
	if answer {
		b[4] = 1
	}
	record := r.seal(recordHandshake, b)
	next, err := expand(r.secret, "traffic upd", sha256.Size)
	must(t, err)
	r.secret = next
	must(t, r.rekey())
	return record
}

// pemOf returns certificates as PEM.
func pemOf(certs ...*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}
