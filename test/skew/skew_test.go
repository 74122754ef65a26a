// Package skew steps the clocks of the real programs, and of a real Envoy, while
// they run, and looks at whether they come to terms with it by themselves. It does
// not know how a program reads its clock.
package skew

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/health"
	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
	"github.com/meshid/meshid/test/stepclock"
)

const day = 24 * time.Hour

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// freeze lets a program stand still, as on a machine that sleeps. It stands at its
// next look at the clock, since whoever answers that stands still.
func freeze(t *testing.T, p *local.Process) (thaw func()) {
	t.Helper()
	p.Signal(t, syscall.SIGSTOP)
	return func() {
		t.Helper()
		p.Signal(t, syscall.SIGCONT)
	}
}

// machine is a machine certificate of a company's CA, good for ten years: files
// for both halves of x509pop.
type machine struct{ ca, certificate, key string }

func newMachine(t *testing.T) machine {
	t.Helper()
	dir := t.TempDir()
	file := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	generate := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		return key
	}
	caKey, key := generate(), generate()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-day), NotAfter: time.Now().Add(3650 * day), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, caKey.Public(), caKey)
	must(t, err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "web-1"}, NotBefore: template.NotBefore, NotAfter: template.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, template, key.Public(), caKey)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return machine{
		ca: file("ca.pem", "CERTIFICATE", der), certificate: file("machine.pem", "CERTIFICATE", leafDER), key: file("machine.key", "PRIVATE KEY", keyDER),
	}
}

// site is a CA and an agent that attests with a machine certificate; both see the
// same clock.
func site(t *testing.T, c *stepclock.Clock, ttl string) (*local.CA, *local.Agent) {
	t.Helper()
	m := newMachine(t)
	ca := local.StartCA(t, local.CAOptions{Wrap: c.Wrap(), Config: fmt.Sprintf("node_attestation: {x509pop: {ca_bundle: %s}}\n", m.ca)})
	ca.Apply(t, "- {name: me, spiffe_id: 'spiffe://example.org/me', workloads: unix.uid == 0, ttl: "+ttl+"}\n")
	a := ca.StartAgent(t, "web-1", local.AgentOptions{
		Wrap: c.Wrap(), NodeAttestation: fmt.Sprintf("{x509pop: {certificate: %s, key: %s}}", m.certificate, m.key),
	})
	return ca, a
}

// fetch waits until the agent serves an X.509-SVID that ok accepts, and returns it.
func fetch(t *testing.T, a *local.Agent, what string, ok func(leaf *x509.Certificate) bool) *x509svid.SVID {
	t.Helper()
	var got *x509svid.SVID
	local.Await(t, "wait for "+what, func(ctx context.Context) error {
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(a.Address()))
		if err != nil {
			return err
		}
		if leaf := svid.Certificates[0]; !ok(leaf) {
			return fmt.Errorf("serial %x is valid from %s to %s", leaf.SerialNumber, leaf.NotBefore, leaf.NotAfter)
		}
		got = svid
		return nil
	})
	return got
}

// validAt says whether a certificate is valid at a time.
func validAt(now time.Time) func(*x509.Certificate) bool {
	return func(c *x509.Certificate) bool { return !now.Before(c.NotBefore) && now.Before(c.NotAfter) }
}

// stay is a workload that is there until the test ends.
func stay(t *testing.T, a *local.Agent) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = workloadapi.WatchX509Context(ctx, ignore{}, workloadapi.WithAddr(a.Address())) // ends with ctx
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

// ignore is a watcher that wants to be there only.
type ignore struct{}

func (ignore) OnX509ContextUpdate(*workloadapi.X509Context) {}

func (ignore) OnX509ContextWatchError(error) {}

// renewed says whether a certificate is another than an older one, and valid.
func renewed(c *stepclock.Clock, old *x509svid.SVID) func(*x509.Certificate) bool {
	return func(leaf *x509.Certificate) bool {
		return leaf.SerialNumber.Cmp(old.Certificates[0].SerialNumber) != 0 && validAt(c.Now())(leaf)
	}
}

// A machine sleeps for longer than every certificate and token on it lives. After
// it woke up, all is as before, and nobody was needed.
func TestV_C10_AsleepForDays(t *testing.T) {
	c := stepclock.New(t)
	ca, a := site(t, c, "1h")
	old := fetch(t, a, "the first X.509-SVID", validAt(c.Now()))
	thaw := freeze(t, a.Process)
	c.Step(t, 3*day)
	confirm(t, ca) // awake, it saw the clock being set: the shim moves no other
	thaw()
	fetch(t, a, "an X.509-SVID after the sleep", renewed(c, old))
	a.AwaitConnected(t)
	if n := strings.Count(a.Log(), "node agent is ready"); n != 1 {
		t.Errorf("the agent started %d times", n)
	}
}

// A whole site is without power for longer than all its certificates live, those
// of the CA but for the root included.
func TestFault_F43_SiteWithoutPowerForDays(t *testing.T) {
	c := stepclock.New(t)
	ca, a := site(t, c, "1h")
	old := fetch(t, a, "the first X.509-SVID", validAt(c.Now()))
	a.Kill()
	ca.Kill()
	c.Step(t, 20*day)
	a.Start(t) // and the CA is late
	ca.Start(t)
	ca.AwaitReady(t)
	a.AwaitConnected(t)
	fetch(t, a, "an X.509-SVID after the outage", renewed(c, old))
}

// handshakeCertificate is the CA's own certificate, as whoever connects sees it.
func handshakeCertificate(ctx context.Context, ca *local.CA) (*x509.Certificate, error) {
	// it is looked at, not trusted
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}}
	conn, err := d.DialContext(ctx, "tcp", ca.Listen)
	if err != nil {
		return nil, err
	}
	defer conn.Close() // nothing was sent
	c, ok := conn.(*tls.Conn)
	if !ok {
		return nil, fmt.Errorf("%T is not TLS", conn)
	}
	return c.ConnectionState().PeerCertificates[0], nil
}

// confirm waits until the CA says that its clock was set, and says that it is right.
func confirm(t *testing.T, ca *local.CA) {
	t.Helper()
	local.Await(t, "wait for the CA to notice that its clock was set", func(ctx context.Context) error {
		s, err := ca.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		for _, k := range s.GetConditions() {
			if k.GetName() == "clock" && strings.Contains(k.GetMessage(), "ca clock confirm") {
				return nil
			}
		}
		return fmt.Errorf("conditions are %v", s.GetConditions())
	})
	if out := ca.MustCommand(t, "clock", "confirm"); !strings.Contains(out, "relies on its clock again") {
		t.Error(out)
	}
}

// The CA's clock jumps by more than its intermediate and its own certificate live:
// it does nothing, and the nodes keep what they have, until an operator has
// confirmed it. Then it replaces both and issues to nodes whose clocks jumped as
// well. When it jumps back it is the same again; what the nodes hold is from the
// future then, and is replaced at half of its life, or when the operator says so.
func TestFault_F45_CAsClockJumpsByDays(t *testing.T) {
	c := stepclock.New(t)
	ca, a := site(t, c, "1h")
	svid := fetch(t, a, "the first X.509-SVID", validAt(c.Now()))
	jump := func(by time.Duration) {
		t.Helper()
		before, err := ca.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
		must(t, err)
		c.Step(t, by)
		if _, err := ca.Admin.RotateIntermediate(t.Context(), &adminv1.RotateIntermediateRequest{}); err == nil {
			t.Error("the intermediate was rotated by a clock that nobody has confirmed")
		}
		after, err := ca.Admin.ListAuthorities(t.Context(), &adminv1.ListAuthoritiesRequest{})
		must(t, err)
		if len(after.GetAuthorities()) != len(before.GetAuthorities()) {
			t.Error("authorities have changed")
		}
		confirm(t, ca)
		local.Await(t, "wait for the CA's own certificate", func(ctx context.Context) error {
			leaf, err := handshakeCertificate(ctx, ca)
			if err == nil && !validAt(c.Now())(leaf) {
				err = fmt.Errorf("it is valid from %s to %s, and it is %s", leaf.NotBefore, leaf.NotAfter, c.Now())
			}
			return err
		})
	}
	jump(10 * day)
	svid = fetch(t, a, "an X.509-SVID after the jump", renewed(c, svid))
	jump(0)
	_, err := ca.Admin.RenewSVIDs(t.Context(), &adminv1.RenewSVIDsRequest{Within: durationpb.New(time.Millisecond)})
	must(t, err)
	fetch(t, a, "an X.509-SVID after the jump back", renewed(c, svid))
	select {
	case <-ca.Done():
		t.Fatal("the CA has ended")
	case <-a.Done():
		t.Fatal("the agent has ended")
	default:
	}
}

// An agent's clock is an hour wrong: what is good by either clock is renewed as
// ordered, and what is not good by the agent's is reported, not used.
func TestFault_F46_AgentAnHourWrong(t *testing.T) {
	for _, r := range []struct {
		name string
		by   time.Duration
		ttl  string
		good bool
	}{
		{"ahead, and lives are long", time.Hour, "3h", true},
		{"ahead, and lives are short", time.Hour, "30m", false},
		{"behind, where all is from the future", -time.Hour, "3h", false},
	} {
		t.Run(r.name, func(t *testing.T) {
			c := stepclock.New(t)
			ca := local.StartCA(t, local.CAOptions{})
			ca.Apply(t, "- {name: me, spiffe_id: 'spiffe://example.org/me', workloads: unix.uid == 0, ttl: "+r.ttl+"}\n")
			a := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: c.Wrap()})
			stay(t, a)
			old := fetch(t, a, "the first X.509-SVID", validAt(time.Now()))
			c.Step(t, r.by)
			_, err := ca.Admin.RenewSVIDs(t.Context(), &adminv1.RenewSVIDsRequest{Within: durationpb.New(time.Millisecond)})
			must(t, err)
			if r.good {
				fetch(t, a, "the renewal", renewed(&stepclock.Clock{}, old))
				return
			}
			local.Await(t, "wait for the report", func(ctx context.Context) error {
				s, err := a.Status(ctx, t)
				if err != nil {
					return err
				}
				for _, c := range s.Conditions {
					if c.Name == "clock" && c.Message != "" {
						return nil
					}
				}
				return fmt.Errorf("no word about the clock: %+v", s.Conditions)
			})
			c.Step(t, 0)
			fetch(t, a, "the renewal, once the clock is right", renewed(c, old))
		})
	}
}

// An agent's clock is too far from the CA's: the agent says by how much, and so does
// the CA; when it is set right, so it is again.
func TestFault_F46_SkewIsReported(t *testing.T) {
	for _, by := range []time.Duration{45 * time.Second, -2 * time.Minute} {
		t.Run(by.String(), func(t *testing.T) {
			c := stepclock.New(t)
			c.Step(t, by)
			ca := local.StartCA(t, local.CAOptions{})
			a := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: c.Wrap()})
			reported := func(by time.Duration, warned bool) {
				t.Helper()
				local.Await(t, "wait for the report", func(ctx context.Context) error {
					s, err := a.Status(ctx, t)
					if err != nil {
						return err
					}
					if s.ClockSkewSeconds == nil || math.Abs(*s.ClockSkewSeconds-by.Seconds()) > 10 {
						return fmt.Errorf("the agent does not know that it is %s ahead", by)
					}
					if i := slices.IndexFunc(s.Conditions, func(c health.Condition) bool { return c.Name == "clock_skew" }); (s.Conditions[i].Message != "") != warned {
						return fmt.Errorf("the condition is %v", s.Conditions[i])
					}
					nodes, err := ca.Admin.ListNodes(ctx, &adminv1.ListNodesRequest{})
					if err != nil {
						return err
					}
					if skew := nodes.GetNodes()[0].GetClockSkew(); skew == nil || (skew.AsDuration()-by).Abs() > 10*time.Second {
						return fmt.Errorf("the CA knows of %v", skew)
					}
					status, err := ca.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
					if err != nil {
						return err
					}
					for _, c := range status.GetConditions() {
						if c.GetName() == "agent_clocks" && (c.GetMessage() != "") != warned {
							return fmt.Errorf("the CA's condition is %v", c)
						}
					}
					return nil
				})
			}
			reported(by, true)
			c.Step(t, 0)
			ca.Kill() // a new session asks at once
			ca.Start(t)
			reported(0, false)
		})
	}
}

// envoy is a real Envoy with its own clock that answers whoever proves to be of
// the trust domain.
type envoy struct {
	*local.Process
	address string
}

func startEnvoy(t *testing.T, a *local.Agent, wrap []string) *envoy {
	t.Helper()
	e := &envoy{address: local.FreeAddress(t)}
	host, port, err := net.SplitHostPort(e.address)
	must(t, err)
	bootstrap, err := os.ReadFile(filepath.Join("testdata", "envoy.yaml"))
	must(t, err)
	config := strings.NewReplacer("{{.Socket}}", a.Socket, "{{.Host}}", host, "{{.Port}}", port).Replace(string(bootstrap))
	e.Process = local.Run(t, append(append([]string{}, wrap...),
		require.Envoy(t), "--config-yaml", config, "--use-dynamic-base-id", "--log-level", "warning", "--concurrency", "1")...)
	return e
}

// call calls the Envoy as a workload with an X.509-SVID would at a time, and
// returns the certificate that it answered with.
func (e *envoy) call(ctx context.Context, svid *x509svid.SVID, roots *x509.CertPool, now time.Time) (*x509.Certificate, error) {
	chain := make([][]byte, len(svid.Certificates))
	for i, c := range svid.Certificates {
		chain[i] = c.Raw
	}
	var leaf *x509.Certificate
	// verified below, by another clock
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
		Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: svid.PrivateKey}},
		VerifyConnection: func(s tls.ConnectionState) error {
			leaf = s.PeerCertificates[0]
			intermediates := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				intermediates.AddCert(c)
			}
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now})
			return err
		},
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+e.address, http.NoBody)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return leaf, err
	}
	if response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return leaf, errors.Join(err, response.Body.Close())
}

// roots are the CA's.
func roots(t *testing.T, ca *local.CA) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(ca.MustCommand(t, "bundle", "show"))) {
		t.Fatal("the CA shows no roots")
	}
	return pool
}

// A verifier whose clock is minutes behind accepts what has just been issued, by
// an authority that has just been made.
func TestV_B8_VerifierMinutesBehind(t *testing.T) {
	c := stepclock.New(t)
	ca := local.StartCA(t, local.CAOptions{})
	ca.Apply(t, "- {name: me, spiffe_id: 'spiffe://example.org/me', workloads: unix.uid == 0}\n")
	a := ca.StartAgent(t, "web-1", local.AgentOptions{})
	c.Step(t, -4*time.Minute)
	e := startEnvoy(t, a, c.Wrap())
	svid := fetch(t, a, "an X.509-SVID", validAt(c.Now()))
	local.Await(t, "wait for an answer", func(ctx context.Context) error {
		_, err := e.call(ctx, svid, roots(t, ca), c.Now())
		return err
	})
}

// The CA is away for longer than an X.509-SVID lives: until the very end all goes
// on, then nobody is let in any more, and when the CA is back all is as before,
// with the Envoy that was there all the time.
func TestSpec_S26_CADownForLongerThanTheTTL(t *testing.T) {
	c := stepclock.New(t)
	ca := local.StartCA(t, local.CAOptions{Wrap: c.Wrap()})
	ca.Apply(t, "- {name: me, spiffe_id: 'spiffe://example.org/me', workloads: unix.uid == 0, ttl: 1h}\n")
	a := ca.StartAgent(t, "web-1", local.AgentOptions{Wrap: c.Wrap()})
	e := startEnvoy(t, a, c.Wrap())
	svid := fetch(t, a, "an X.509-SVID", validAt(c.Now()))
	trusted := roots(t, ca)
	var served *x509.Certificate
	local.Await(t, "wait for an answer", func(ctx context.Context) (err error) {
		served, err = e.call(ctx, svid, trusted, c.Now())
		return err
	})
	ca.Kill()

	end := served.NotAfter
	if other := svid.Certificates[0].NotAfter; other.Before(end) {
		end = other
	}
	c.Step(t, time.Until(end)/2)
	if _, err := e.call(t.Context(), svid, trusted, c.Now()); err != nil {
		t.Fatalf("in the middle of its life: %v", err)
	}
	c.Step(t, time.Until(end)-30*time.Second)
	if _, err := e.call(t.Context(), svid, trusted, c.Now()); err != nil {
		t.Fatalf("%s before its end: %v", end.Sub(c.Now()), err)
	}
	c.Step(t, time.Until(end)+2*time.Second)
	if _, err := e.call(t.Context(), svid, trusted, end.Add(-time.Minute)); err == nil {
		t.Errorf("an Envoy whose clock shows %s lets in who has a certificate until %s", c.Now(), end)
	}
	c.Step(t, time.Until(end)+10*time.Minute)
	if _, err := e.call(t.Context(), svid, trusted, c.Now()); err == nil {
		t.Error("after the end there is an answer")
	}

	ca.Start(t)
	ca.AwaitReady(t)
	a.AwaitConnected(t)
	next := fetch(t, a, "the next X.509-SVID", renewed(c, svid))
	local.Await(t, "wait for an answer by the same Envoy", func(ctx context.Context) error {
		_, err := e.call(ctx, next, trusted, c.Now())
		return err
	})
	select {
	case <-e.Done():
		t.Error("the Envoy has ended")
	default:
	}
}

// The CA's clock is set, and set back: it goes on by itself, and the agent, whose
// clock is right, has kept what it had.
func TestFault_F45_CAsClockComesBack(t *testing.T) {
	c := stepclock.New(t)
	ca := local.StartCA(t, local.CAOptions{Wrap: c.Wrap()})
	ca.Apply(t, "- {name: me, spiffe_id: 'spiffe://example.org/me', workloads: unix.uid == 0, ttl: 1h}\n")
	a := ca.StartAgent(t, "web-1", local.AgentOptions{})
	stay(t, a)
	old := fetch(t, a, "the first X.509-SVID", validAt(time.Now()))
	for _, by := range []time.Duration{-time.Hour, 365 * day} {
		c.Step(t, by)
		if _, err := ca.Admin.RenewSVIDs(t.Context(), &adminv1.RenewSVIDsRequest{}); err == nil {
			t.Error("renewals were ordered by a clock that nobody has confirmed")
		}
		svid, err := workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr(a.Address()))
		must(t, err)
		if svid.Certificates[0].SerialNumber.Cmp(old.Certificates[0].SerialNumber) != 0 {
			t.Error("something was issued")
		}
		c.Step(t, 0)
		a.AwaitConnected(t)
		_, err = ca.Admin.RenewSVIDs(t.Context(), &adminv1.RenewSVIDsRequest{Within: durationpb.New(time.Millisecond)})
		must(t, err)
		old = fetch(t, a, "an X.509-SVID once the clock is back", renewed(&stepclock.Clock{}, old))
	}
	if out := ca.MustCommand(t, "ledger", "verify", "--dir", filepath.Join(ca.DataDir, "ledger")); !strings.Contains(out, "intact") {
		t.Error(out)
	}
}
