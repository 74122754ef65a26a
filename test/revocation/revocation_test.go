// Package revocation runs the real CA with revocation lists, agents, and real Envoys
// under load: whoever is revoked is refused everywhere, and nobody else ever is.
package revocation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entries are of all who run as root; the first is what the Envoys show.
const entries = `
- {name: a-server, spiffe_id: 'spiffe://example.org/a-server', workloads: unix.uid == 0}
- {name: other, spiffe_id: 'spiffe://example.org/other', workloads: unix.uid == 0}
- {name: stolen, spiffe_id: 'spiffe://example.org/stolen', workloads: unix.uid == 0}
`

// mesh is two nodes, each with an Envoy that lets in whoever is of the trust domain.
type mesh struct {
	t      *testing.T
	ca     *local.CA
	agents []*local.Agent
	envoys []string // addresses
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	binary := require.Envoy(t)
	m := &mesh{t: t, ca: local.StartCA(t, local.CAOptions{Config: "revocation: crl\n"})}
	m.ca.Apply(t, entries)
	bootstrap, err := os.ReadFile(filepath.Join("testdata", "envoy.yaml"))
	must(t, err)
	for i := range 2 {
		a := m.ca.StartAgent(t, fmt.Sprintf("n%d", i), local.AgentOptions{})
		address := local.FreeAddress(t)
		host, port, err := net.SplitHostPort(address)
		must(t, err)
		config := strings.NewReplacer("{{.Socket}}", a.Socket, "{{.Host}}", host, "{{.Port}}", port).Replace(string(bootstrap))
		local.Run(t, binary, "--config-yaml", config, "--use-dynamic-base-id", "--log-level", "warning", "--concurrency", "1")
		m.agents, m.envoys = append(m.agents, a), append(m.envoys, address)
	}
	other := m.fetch("other", func(*x509.Certificate) bool { return true })
	for _, e := range m.envoys {
		local.Await(t, "the Envoy answers", func(ctx context.Context) error { return call(ctx, e, other) })
	}
	return m
}

// fetch waits until an agent serves an X.509-SVID of that name that ok accepts.
func (m *mesh) fetch(name string, ok func(*x509.Certificate) bool) (got *x509svid.SVID) {
	m.t.Helper()
	local.Await(m.t, "an X.509-SVID of "+name, func(ctx context.Context) error {
		svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr(m.agents[0].Address()))
		if err != nil {
			return err
		}
		i := slices.IndexFunc(svids, func(s *x509svid.SVID) bool { return s.ID.Path() == "/"+name && ok(s.Certificates[0]) })
		if i < 0 {
			return errors.New("there is none")
		}
		got = svids[i]
		return nil
	})
	return got
}

// call makes a new handshake, and a request over it.
func call(ctx context.Context, address string, svid *x509svid.SVID) error {
	chain := make([][]byte, len(svid.Certificates))
	for i, c := range svid.Certificates {
		chain[i] = c.Raw
	}
	// Whom the Envoy lets in is the question, not who it is.
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
		Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: svid.PrivateKey}},
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address, http.NoBody)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return errors.Join(err, response.Body.Close())
}

// load calls both Envoys again and again, with the newest X.509-SVID of a name, until stop
// is called, which returns how many calls there were. None may fail.
func (m *mesh) load(name string) (stop func() int64) {
	ctx, cancel := context.WithCancel(m.t.Context())
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(m.agents[1].Address())),
		workloadapi.WithDefaultX509SVIDPicker(func(svids []*x509svid.SVID) *x509svid.SVID {
			for _, s := range svids {
				if s.ID.Path() == "/"+name {
					return s
				}
			}
			return nil
		}))
	must(m.t, err)
	local.Await(m.t, "an X.509-SVID of "+name+" for the load", func(context.Context) error {
		_, err := source.GetX509SVID()
		return err
	})
	var calls atomic.Int64
	var callers sync.WaitGroup
	for _, e := range m.envoys {
		callers.Go(func() {
			pace := time.NewTicker(5 * time.Millisecond)
			defer pace.Stop()
			for ctx.Err() == nil {
				<-pace.C
				svid, err := source.GetX509SVID()
				if err == nil {
					err = call(ctx, e, svid)
				}
				if err != nil && ctx.Err() == nil {
					m.t.Errorf("%s is refused: %v", name, err)
					return
				}
				calls.Add(1)
			}
		})
	}
	return func() int64 {
		cancel()
		callers.Wait()
		_ = source.Close()
		return calls.Load()
	}
}

// signs waits until no intermediate waits for its list to be in force.
func (m *mesh) signs() {
	m.t.Helper()
	local.Await(m.t, "the newest intermediate signs", func(context.Context) error {
		if out := m.ca.MustCommand(m.t, "authority", "list"); !strings.Contains(out, "active") || strings.Contains(out, "prepared") {
			return errors.New(out)
		}
		return nil
	})
}

// refused says that all Envoys refuse an X.509-SVID.
func (m *mesh) refused(what string, svid *x509svid.SVID) {
	m.t.Helper()
	for _, e := range m.envoys {
		if call(m.t.Context(), e, svid) == nil {
			m.t.Errorf("%s: a revoked X.509-SVID is let in", what)
		}
	}
}

func serial(s *x509svid.SVID) string {
	return hex.EncodeToString(s.Certificates[0].SerialNumber.Bytes())
}

// byAnother accepts what another authority has signed than a certificate's.
func byAnother(s *x509svid.SVID) func(*x509.Certificate) bool {
	old := s.Certificates[0].AuthorityKeyId
	return func(c *x509.Certificate) bool { return string(c.AuthorityKeyId) != string(old) }
}

// A stolen certificate with its key is refused by all Envoys from the acknowledgements
// on, while all others go on; it stays refused, and they go on, through a rotation of the
// intermediate and restarts of the CA.
func TestV_L2_StolenKeyIsRefused(t *testing.T) {
	m := newMesh(t)
	stolen, before := m.fetch("stolen", func(*x509.Certificate) bool { return true }), m.fetch("other", func(*x509.Certificate) bool { return true })
	for _, e := range m.envoys {
		must(t, call(t.Context(), e, stolen))
	}
	stop := m.load("other")
	out := m.ca.MustCommand(t, "quarantine", "add", "--spiffe-id", stolen.ID.String(), "--reason", "stolen", "--wait", "--timeout", "1m")
	m.refused("quarantined", stolen)
	if !strings.Contains(out, "certificates revoked on 2 of 2 nodes") {
		t.Errorf("it says:\n%s", out)
	}
	t.Log(strings.TrimSpace(out))

	m.ca.MustCommand(t, "authority", "rotate", "--within", "1s")
	rotated := m.fetch("other", byAnother(before))
	m.refused("after a rotation", stolen)

	for range 2 {
		m.ca.Kill()
		m.ca.Start(t)
		m.ca.AwaitReady(t)
		m.refused("the CA is started again", stolen)
		m.signs()
		for _, a := range m.agents {
			a.AwaitConnected(t)
		}
		m.ca.MustCommand(t, "svid", "renew", "--within", "1s")
		next := m.fetch("other", byAnother(rotated))
		m.refused("with another intermediate", stolen)
		rotated = next
	}
	if n := stop(); n < 50 {
		t.Errorf("%d calls", n)
	} else {
		t.Logf("%d handshakes of others, none failed", n)
	}
}

// What the CA signed before it was started cannot be put on a list. When it is withdrawn,
// all that was signed then is renewed first, and refused afterwards.
func TestV_L2_StolenBeforeARestart(t *testing.T) {
	m := newMesh(t)
	stolen, before := m.fetch("stolen", func(*x509.Certificate) bool { return true }), m.fetch("other", func(*x509.Certificate) bool { return true })
	m.ca.Kill()
	m.ca.Start(t)
	m.ca.AwaitReady(t)
	for _, a := range m.agents {
		a.AwaitConnected(t)
	}
	stop := m.load("other")
	m.ca.MustCommand(t, "quarantine", "add", "--serial", serial(stolen), "--reason", "stolen", "--wait", "--timeout", "3m")
	m.refused("quarantined", stolen)
	m.refused("of the same intermediate", before)
	if n := stop(); n < 50 {
		t.Errorf("%d calls", n)
	} else {
		t.Logf("%d handshakes of others, none failed", n)
	}
}
