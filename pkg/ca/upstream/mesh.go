package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

const (
	// connectTimeout bounds how long an identity is waited for.
	connectTimeout = 30 * time.Second
	// A peer that has vanished is noticed after these two together.
	pingAfter, pingTimeout = time.Minute, 20 * time.Second
)

// Mesh calls CAs that know their callers by their X.509-SVIDs, over mutual TLS. The
// identity is that of the Workload API, or of files; both are asked at each
// connection. It may be used concurrently.
type Mesh struct {
	// Name says who is called, in errors.
	Name string
	// Address is the server's, host:port, and ServerPath the path of its SPIFFE ID; the
	// trust domain is the caller's.
	Address, ServerPath string
	// WorkloadAPI is the address of a Workload API, and SPIFFEID which of the
	// identities that it gives is used, the first one if "".
	WorkloadAPI, SPIFFEID string
	// Certificate, Key and Bundle are the paths of PEM files: the X.509-SVID with its
	// chain, its private key, and the roots by which the server is known.
	Certificate, Key, Bundle string
}

// Check says what of the settings can never work; it reads the files once.
func (m *Mesh) Check() error {
	host, port, err := net.SplitHostPort(m.Address)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
		return fmt.Errorf("address: %.100q is no address; write host:port", m.Address)
	}
	files := m.Certificate != "" || m.Key != "" || m.Bundle != ""
	switch {
	case files && m.WorkloadAPI != "":
		return errors.New("workload_api: certificate, key and bundle are set too: keep one of the two")
	case m.WorkloadAPI != "":
		if err := workloadapi.ValidateAddress(m.WorkloadAPI); err != nil {
			return fmt.Errorf("workload_api: %.200q: %w; write unix:///run/meshid/workload/agent.sock", m.WorkloadAPI, err)
		}
		if m.SPIFFEID != "" {
			if _, err := spiffeid.FromString(m.SPIFFEID); err != nil {
				return fmt.Errorf("spiffe_id: %.255q: %w", m.SPIFFEID, err)
			}
		}
		return nil
	case m.Certificate == "" || m.Key == "" || m.Bundle == "":
		return errors.New("set workload_api to the address of a Workload API, or certificate, key and bundle to the paths of PEM files")
	case m.SPIFFEID != "":
		return errors.New("spiffe_id: chooses among the identities of workload_api: remove it")
	}
	_, _, err = m.read()
	return err
}

// CheckUse says whether this is known to be a member of another trust domain.
func (m *Mesh) CheckUse(u Use) error {
	name, id := "spiffe_id", spiffeid.ID{}
	if m.WorkloadAPI == "" {
		svid, _, err := m.read()
		if err != nil {
			return err
		}
		name, id = "certificate", svid.ID
	} else if m.SPIFFEID != "" {
		var err error
		if id, err = spiffeid.FromString(m.SPIFFEID); err != nil {
			return fmt.Errorf("spiffe_id: %w", err)
		}
	}
	if !id.IsZero() && id.TrustDomain() != u.TrustDomain {
		return fmt.Errorf("%s: %s is of the trust domain %s, and trust_domain is %s: only a CA of the same one can be above this one", name, id, id.TrustDomain().Name(), u.TrustDomain.Name())
	}
	return nil
}

// read reads the identity from its files.
func (m *Mesh) read() (*x509svid.SVID, x509bundle.Source, error) {
	certificates, err := ReadFile(m.Certificate)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate: %w", err)
	}
	private, err := ReadSecret(m.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	defer clear(private)
	svid, err := x509svid.Parse(certificates, private)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate %s and key %s are no X.509-SVID: %w", m.Certificate, m.Key, err)
	}
	roots, err := ReadCertificates(m.Bundle)
	if err != nil {
		return nil, nil, fmt.Errorf("bundle: %w", err)
	}
	return svid, x509bundle.FromX509Authorities(svid.ID.TrustDomain(), roots), nil
}

// identity is who we are now, and by what others are known.
func (m *Mesh) identity(ctx context.Context) (*x509svid.SVID, x509bundle.Source, error) {
	if m.WorkloadAPI == "" {
		return m.read()
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	given, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(m.WorkloadAPI))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: ask the Workload API at %s for the identity of this CA (is there an entry for it?): %w", ErrUnavailable, m.WorkloadAPI, err)
	}
	var others []string
	for _, svid := range given.SVIDs {
		if m.SPIFFEID == "" || svid.ID.String() == m.SPIFFEID {
			return svid, given.Bundles, nil
		}
		others = append(others, svid.ID.String())
	}
	return nil, nil, fmt.Errorf("%w: the Workload API at %s does not give this process %s, but %.1000s", ErrUnavailable, m.WorkloadAPI, m.SPIFFEID, strings.Join(others, " "))
}

// Dial connects, as soon as something is called. until is when the identity ends that
// the connection is made with; the caller closes it before.
func (m *Mesh) Dial(ctx context.Context) (conn *grpc.ClientConn, until time.Time, err error) {
	svid, bundles, err := m.identity(ctx)
	if err != nil {
		return nil, until, err
	}
	server, err := spiffeid.FromPath(svid.ID.TrustDomain(), m.ServerPath)
	if err != nil {
		return nil, until, err
	}
	config := tlsconfig.MTLSClientConfig(svid, bundles, tlsconfig.AuthorizeID(server))
	config.MinVersion = tls.VersionTLS13
	conn, err = grpc.NewClient("dns:///"+m.Address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)), grpc.WithNoProxy())
	return conn, svid.Certificates[0].NotAfter, err
}

// Failed gives an error of a call its kind, as those of CA.Mint are.
func (m *Mesh) Failed(ctx context.Context, call string, err error) error {
	s := status.Convert(err)
	text := Cut(s.Message())
	said := fmt.Errorf("%s of %s: %s: %q", call, m.Name, s.Code(), text)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %s of %s: %w", ErrUnavailable, call, m.Name, context.Cause(ctx))
	case s.Code() == codes.ResourceExhausted && !strings.HasPrefix(text, "grpc: received message"): // gRPC's own, for a message that is too large
		return &RateLimitError{Err: said}
	}
	switch s.Code() { //nolint:exhaustive // the others are plain errors
	case codes.PermissionDenied, codes.Unauthenticated, codes.InvalidArgument, codes.FailedPrecondition, codes.Unimplemented, codes.NotFound:
		return fmt.Errorf("%w: %w", ErrDenied, said)
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted, codes.Internal:
		return fmt.Errorf("%w: %w", ErrUnavailable, said)
	}
	return said
}

// ParseDER parses certificates, most at the most, each of a size that is accepted.
func ParseDER(most int, all [][]byte) ([]*x509.Certificate, error) {
	if len(all) > most {
		return nil, fmt.Errorf("%d certificates: at most %d are accepted", len(all), most)
	}
	parsed := make([]*x509.Certificate, len(all))
	for i, der := range all {
		if len(der) > MaxCertificate {
			return nil, fmt.Errorf("certificate %d has %d bytes: at most %d are accepted", i+1, len(der), MaxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		parsed[i] = c
	}
	return parsed, nil
}
