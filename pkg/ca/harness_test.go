package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

var testDomain = spiffeid.RequireTrustDomainFromString("example.org")

// memoryStore is a Store that can fail before or after it has kept something.
type memoryStore struct {
	mu                    sync.Mutex
	roots                 []Root
	failBefore, failAfter error
	sequence, epoch       uint64
	paused                bool
	failRoots             error
	intermediates         map[string]Intermediate
	lists                 []RevocationList
	listed                bool
}

func (s *memoryStore) Trust(context.Context) (Trust, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trust(), s.failRoots
}

func (s *memoryStore) trust() Trust {
	return Trust{Roots: slices.Clone(s.roots), Sequence: s.sequence, Epoch: s.epoch, Paused: s.paused, Lists: slices.Clone(s.lists), Listed: s.listed}
}

func (s *memoryStore) ChangeTrust(_ context.Context, t Trust, record func(Trust) error) (Trust, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.failBefore != nil:
		return Trust{}, s.failBefore
	case s.epoch != t.Epoch:
		return Trust{}, ErrTrustChanged
	}
	t.Epoch++
	t.Roots = slices.Clone(t.Roots)
	if !slices.EqualFunc(t.Bundle(), s.trust().Bundle(), slices.Equal) || !t.SameLists(s.trust()) {
		t.Sequence = s.sequence + 1
	}
	for i := range t.Roots {
		if t.Roots[i].Sequence == 0 {
			t.Roots[i].Sequence = t.Sequence
		}
	}
	if err := record(t); err != nil {
		return Trust{}, err
	}
	s.roots, s.sequence, s.epoch, s.paused = t.Roots, t.Sequence, t.Epoch, t.Paused
	s.lists, s.listed = slices.Clone(t.Lists), t.Listed
	t.Roots = slices.Clone(t.Roots)
	return t, s.failAfter
}

func (s *memoryStore) Intermediates(context.Context) ([]Intermediate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.intermediates)), s.failRoots
}

func (s *memoryStore) PutIntermediates(_ context.Context, now time.Time, changed ...Intermediate) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failBefore != nil {
		return s.failBefore
	}
	if s.intermediates == nil {
		s.intermediates = make(map[string]Intermediate)
	}
	for _, i := range changed {
		s.intermediates[i.ID] = i
	}
	maps.DeleteFunc(s.intermediates, func(_ string, i Intermediate) bool { return i.LiveUntil.Before(now) })
	return s.failAfter
}

type fixture struct {
	*CA
	cfg Config
	dir string // of the ledger
	reg *prometheus.Registry
}

// Sign is that of the CA, for tests in which nothing is waited for.
func (f *fixture) Sign(now time.Time, r *Request) (*Signed, error) {
	return f.CA.Sign(context.Background(), now, r)
}

// open opens a CA over what earlier calls with the same cfg have left.
func open(t testing.TB, cfg Config) *fixture {
	t.Helper()
	f, err := tryOpen(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func tryOpen(t testing.TB, cfg Config) (*fixture, error) {
	t.Helper()
	f := &fixture{reg: prometheus.NewRegistry(), dir: t.TempDir()}
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = testDomain
	}
	if cfg.Keys == nil {
		cfg.Keys = keys.Memory()
	}
	if cfg.Store == nil {
		cfg.Store = &memoryStore{}
	}
	if cfg.Ledger == nil {
		journal, err := ledger.Open(f.dir, ledger.Options{Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = journal.Close() })
		cfg.Ledger = journal
	}
	cfg.Registerer = f.reg
	c, err := Open(t.Context(), cfg)
	f.CA, f.cfg = c, cfg
	return f, err
}

// records returns what is in the ledger.
func (f *fixture) records(t testing.TB) []*ledgerv1.Record {
	t.Helper()
	var all []*ledgerv1.Record
	for entry, err := range ledger.Scan(f.dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, entry.Record)
	}
	return all
}

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(testDomain, path) }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	return csrOf(t, key, &x509.CertificateRequest{})
}

func csrOf(t testing.TB, key crypto.Signer, request *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, request, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func parseKey(t testing.TB, key crypto.Signer) *PublicKey {
	t.Helper()
	pub, err := ParseCSR(csr(t, key))
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// issue signs, records and parses.
func (f *fixture) issue(t testing.TB, now time.Time, r *Request) (leaf, intermediate *x509.Certificate, signed *Signed) {
	t.Helper()
	if r.ID.IsZero() {
		r.ID = id("/ns/shop/app/web")
	}
	if r.Key == nil {
		r.Key = parseKey(t, newKey(t))
	}
	signed, err := f.Sign(now, r)
	if err != nil {
		t.Fatal(err)
	}
	durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
	if err != nil {
		t.Fatal(err)
	}
	chain := durable[0].Chain()
	if len(chain) != 2 {
		t.Fatalf("chain of %d certificates, want leaf and intermediate", len(chain))
	}
	return parse(t, chain[0]), parse(t, chain[1]), signed
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// verify is what go-spiffe and crypto/x509 say at now.
func (f *fixture) verify(now time.Time, chain ...*x509.Certificate) error {
	roots, _ := f.Bundle()
	got, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(testDomain, roots), x509svid.WithTime(now))
	if err != nil {
		return err
	}
	if got.URL().String() != chain[0].URIs[0].String() {
		return errors.New("another id")
	}
	pool, middle := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	for _, c := range chain[1:] {
		middle.AddCert(c)
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := chain[0].Verify(x509.VerifyOptions{
			Roots: pool, Intermediates: middle, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use},
		}); err != nil {
			return err
		}
	}
	return nil
}

func counter(t testing.TB, f *fixture, name, label string) float64 {
	t.Helper()
	families, err := f.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			if len(m.GetLabel()) == 0 || m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no series %s of %q", name, label)
	return 0
}

func wantReason(t testing.TB, err error, reason string) {
	t.Helper()
	var request *RequestError
	if !errors.As(err, &request) || request.Reason != reason {
		t.Errorf("got %v, want a refusal with reason %q", err, reason)
	}
}

func parseAll(t testing.TB, chain [][]byte) []*x509.Certificate {
	t.Helper()
	all := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		all[i] = parse(t, der)
	}
	return all
}

// rsaKey is made once: it is slow.
var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func allowedKeys(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.Signer{"EC-P256": newKey(t), "EC-P384": p384, "RSA-2048": rsaKey(), "Ed25519": ed}
}
