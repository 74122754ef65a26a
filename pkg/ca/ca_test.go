package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ca/rotation"
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

func TestOpenRefusesBadConfiguration(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"default ttl too short":         {func(c *Config) { c.DefaultTTL = time.Second }, "write 10s or more"},
		"max below default":             {func(c *Config) { c.DefaultTTL, c.MaxTTL = time.Hour, time.Minute }, "raise it"},
		"ttl longer than intermediate":  {func(c *Config) { c.IntermediateLife, c.MaxTTL = time.Hour, 40*time.Minute }, "at least twice as long"},
		"intermediate longer than root": {func(c *Config) { c.RootLife = time.Hour }, "at least twice as long"},
		"backdate":                      {func(c *Config) { c.Backdate = time.Hour }, "backdate"},
		"no ledger":                     {func(c *Config) { c.Ledger = nil }, "required"},
		"trust domain with empty label": {func(c *Config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("td.") }, "labels"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{TrustDomain: testDomain, Keys: keys.Memory(), Store: &memoryStore{}, Ledger: new(ledger.Journal)}
			tc.change(&cfg)
			if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

func TestV_A3_TrustDomainForm(t *testing.T) {
	for _, bad := range []string{"", "td.", ".td", "a..b", "-td", "td-", "a.-b", "TD", "a b", "a%41", strings.Repeat("a", 256)} {
		if checkTrustDomain(bad) == nil {
			t.Errorf("%q accepted", bad)
		}
	}
	for _, good := range []string{"td", "example.org", "1.2.3.4", "a_b.c-d", strings.Repeat("a", 255)} {
		if err := checkTrustDomain(good); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRecordsEveryAuthorityEvent(t *testing.T) {
	f := open(t, Config{Instance: "ca-1"})
	var got []string
	for _, r := range f.records(t) {
		got = append(got, strings.Join([]string{r.Event.String(), r.Authority.GetRole(), r.Authority.GetState()}, " "))
		if about := r.Event == ledgerv1.Event_EVENT_AUTHORITY && r.Authority.GetRole() == RoleIntermediate; about != (r.Authority.GetRoot() == f.state.Load().signer.id) {
			t.Errorf("root %q in %v", r.Authority.GetRoot(), r)
		}
		if r.CaInstance != "ca-1" || r.Version != 1 || r.Outcome != ledgerv1.Outcome_OUTCOME_SUCCESS || r.Certificate.GetSha256() == nil {
			t.Errorf("incomplete record %v", r)
		}
	}
	want := []string{
		"EVENT_AUTHORITY root active",
		"EVENT_BUNDLE root active",
		"EVENT_AUTHORITY intermediate active",
		"EVENT_ISSUE intermediate active",
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func TestRestartKeepsTheRoot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	store := &memoryStore{}
	first := open(t, Config{Keys: keys.File(dir), Store: store})
	second := open(t, Config{Keys: keys.File(dir), Store: store})
	before, beforeSequence := first.Bundle()
	after, afterSequence := second.Bundle()
	if len(after) != 1 || !before[0].Equal(after[0]) || beforeSequence != afterSequence || afterSequence == 0 {
		t.Fatal("the bundle changed over a restart")
	}
	if first.Authorities()[1].ID == second.Authorities()[1].ID {
		t.Fatal("two processes have one intermediate")
	}
	now := time.Now()
	leaf, intermediate, _ := second.issue(t, now, &Request{})
	if err := first.verify(now, leaf, intermediate); err != nil {
		t.Fatal(err)
	}
}

func TestOpenAfterAnInterruptedFirstStart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	broken := errors.New("disk full")
	for name, store := range map[string]*memoryStore{
		"before the root is kept": {failBefore: broken},
		"after":                   {failAfter: broken},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Keys: keys.File(dir), Store: store}
			if _, err := tryOpen(t, cfg); !errors.Is(err, broken) {
				t.Fatalf("got %v", err)
			}
			store.failBefore, store.failAfter = nil, nil
			f := open(t, cfg)
			if roots, sequence := f.Bundle(); len(roots) != 1 || sequence != 1 {
				t.Fatalf("%d roots, sequence %d", len(roots), sequence)
			}
		})
	}
}

// beaten is a store in which another CA makes its root in the moment before this
// one does.
type beaten struct {
	*memoryStore
	other func()
}

func (s beaten) ChangeTrust(ctx context.Context, t Trust, record func(Trust) error) (Trust, error) {
	s.other()
	return s.memoryStore.ChangeTrust(ctx, t, record)
}

// Two CAs start for the first time on one store: there is one root, and the one
// that comes late says what to do.
func TestFault_F21_FirstStartOfTwo(t *testing.T) {
	store := &memoryStore{}
	var first *fixture
	_, err := tryOpen(t, Config{Store: beaten{store, func() { first = open(t, Config{Store: store}) }}})
	if !errors.Is(err, ErrTrustChanged) || !strings.Contains(err.Error(), "start it again") {
		t.Fatalf("the second CA: %v", err)
	}
	if roots, sequence := first.Bundle(); len(roots) != 1 || sequence != 1 || len(store.roots) != 1 {
		t.Errorf("%d roots at sequence %d, %d in the store", len(roots), sequence, len(store.roots))
	}
}

func TestOpenFailsWithItsStore(t *testing.T) {
	broken := errors.New("no route")
	if _, err := tryOpen(t, Config{Store: &memoryStore{failRoots: broken}}); !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
}

// Row K6: the key that the store gives out is not the certificate's.
func TestV_K6_RootAndKeyDoNotBelongTogether(t *testing.T) {
	now := time.Now()
	other, _, err := keys.Memory().Create(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	liar := lyingSigner{Signer: other}
	td := testDomain
	foreign := spiffeid.RequireTrustDomainFromString("example.com")
	for name, tc := range map[string]struct {
		store func(key crypto.Signer) Root
		keys  func(keys.Store) keys.Store
		want  string
	}{
		"other key": {
			keys: func(keys.Store) keys.Store { return fixedKey{other} }, want: "another one than its certificate's",
		},
		"key that claims another's public half": {
			keys: func(s keys.Store) keys.Store { return fixedKey{liar.as(t, s)} }, want: "do not belong together",
		},
		"key gone": {keys: func(keys.Store) keys.Store { return keys.Memory() }, want: "no such key"},
		"certificate torn": {
			store: func(crypto.Signer) Root { return Root{Certificate: []byte{0x30}, State: StateActive} }, want: "backup",
		},
		"other trust domain": {
			store: func(key crypto.Signer) Root { return rootOf(t, foreign, key, now, time.Hour*1000) }, want: "spiffe://example.com",
		},
		"expired": {
			store: func(key crypto.Signer) Root { return rootOf(t, td, key, now.Add(-time.Hour), time.Minute) }, want: "has expired",
		},
		"from the future": {
			store: func(key crypto.Signer) Root { return rootOf(t, td, key, now.Add(1000*time.Hour), time.Hour) }, want: "correct the clock",
		},
		"a leaf": {
			store: func(key crypto.Signer) Root {
				t, err := authorityTemplate(td, pkix.Name{CommonName: "x"}, key.Public())
				if err != nil {
					panic(err)
				}
				t.IsCA, t.KeyUsage, t.NotAfter = false, x509.KeyUsageDigitalSignature, now.Add(time.Hour)
				cert, err := sign(t, t, key.Public(), key)
				if err != nil {
					panic(err)
				}
				return Root{Certificate: cert.Raw, State: StateActive}
			}, want: "not a CA",
		},
		"unknown state": {
			store: func(key crypto.Signer) Root {
				r := rootOf(t, td, key, now, 1000*time.Hour)
				r.State = "resting"
				return r
			}, want: "unknown state",
		},
		"none active": {
			store: func(key crypto.Signer) Root {
				r := rootOf(t, td, key, now, 1000*time.Hour)
				r.State = StateRetiring
				return r
			}, want: "active",
		},
	} {
		t.Run(name, func(t *testing.T) {
			kept, store := keys.Memory(), &memoryStore{}
			open(t, Config{Keys: kept, Store: store})
			if tc.store != nil {
				key, err := kept.Open(t.Context(), store.roots[0].Key)
				if err != nil {
					t.Fatal(err)
				}
				replaced := tc.store(key)
				replaced.Key = store.roots[0].Key
				store.roots[0] = replaced
			}
			if tc.keys != nil {
				kept = tc.keys(kept)
			}
			_, err := tryOpen(t, Config{Keys: kept, Store: store})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

func rootOf(t *testing.T, td spiffeid.TrustDomain, key crypto.Signer, now time.Time, life time.Duration) Root {
	t.Helper()
	cert, err := makeRoot(td, Subject{}, key, now, life)
	if err != nil {
		t.Fatal(err)
	}
	return Root{Certificate: cert.Raw, State: StateActive}
}

type fixedKey struct{ crypto.Signer }

func (k fixedKey) Open(context.Context, string) (crypto.Signer, error) { return k.Signer, nil }

func (k fixedKey) Create(context.Context, string) (crypto.Signer, string, error) {
	return k.Signer, "memory:x", nil
}

// lyingSigner signs with one key and shows the public half of another.
type lyingSigner struct {
	crypto.Signer
	pub crypto.PublicKey
}

func (l lyingSigner) Public() crypto.PublicKey { return l.pub }

func (l lyingSigner) as(t *testing.T, s keys.Store) lyingSigner {
	t.Helper()
	key, err := s.Open(t.Context(), "memory:root-1")
	if err != nil {
		t.Fatal(err)
	}
	l.pub = key.Public()
	return l
}

func TestSpec_C01_RootFields(t *testing.T) {
	f := open(t, Config{})
	roots, _ := f.Bundle()
	root := roots[0]
	if !root.IsCA || root.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(root.ExtKeyUsage) != 0 {
		t.Errorf("ca %v, key usage %v, extended %v", root.IsCA, root.KeyUsage, root.ExtKeyUsage)
	}
	if !critical(root, 15) || !critical(root, 19) {
		t.Error("key usage and basic constraints must be critical")
	}
	if err := root.CheckSignatureFrom(root); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(root.SubjectKeyId, root.AuthorityKeyId) || len(root.SubjectKeyId) != 20 {
		t.Error("key identifiers")
	}
	if root.SerialNumber.BitLen() < 64 || root.SerialNumber.Sign() <= 0 {
		t.Error("serial")
	}
	if pub, ok := root.PublicKey.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		t.Error("not a p-256 key")
	}
}

func critical(cert *x509.Certificate, arc int) bool {
	for _, e := range cert.Extensions {
		if e.Id.Equal([]int{2, 5, 29, arc}) {
			return e.Critical
		}
	}
	return false
}

func TestSpec_C02_IntermediateFields(t *testing.T) {
	f := open(t, Config{})
	root, intermediate := f.Authorities()[0].Certificate, f.Authorities()[1].Certificate
	if !intermediate.IsCA || !intermediate.MaxPathLenZero || intermediate.MaxPathLen != 0 {
		t.Error("path length 0 wanted")
	}
	if err := checkIntermediate(intermediate, root, testDomain); err != nil {
		t.Error(err)
	}
	if len(intermediate.ExtKeyUsage)+len(intermediate.PermittedURIDomains) != 0 {
		t.Error("unasked restrictions")
	}
	if bytes.Equal(intermediate.RawSubject, root.RawSubject) {
		t.Error("one subject for two authorities")
	}
}

func TestSpec_C03_AuthorityIDWithoutPath(t *testing.T) {
	for _, a := range open(t, Config{}).Authorities() {
		if len(a.Certificate.URIs) != 1 || a.Certificate.URIs[0].String() != "spiffe://example.org" {
			t.Errorf("%s: %v", a.Role, a.Certificate.URIs)
		}
	}
}

// C06: an authority's certificate is no identity.
func TestSpec_C06_AuthorityCannotAuthenticate(t *testing.T) {
	f := open(t, Config{})
	for _, a := range f.Authorities() {
		if err := f.verify(time.Now(), a.Certificate); err == nil {
			t.Errorf("go-spiffe takes the %s for an identity", a.Role)
		}
	}
}

// B11 of failures.md: a leaf cannot sign.
func TestV_B11_LeafUsedAsAuthority(t *testing.T) {
	f := open(t, Config{})
	now := time.Now()
	key := newKey(t)
	leaf, intermediate, _ := f.issue(t, now, &Request{Key: parseKey(t, key)})
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || len(leaf.UnknownExtKeyUsage) != 0 {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	forged, err := authorityTemplate(testDomain, pkix.Name{CommonName: "x"}, newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	forged.IsCA, forged.KeyUsage = false, x509.KeyUsageDigitalSignature
	forged.URIs[0] = id("/victim").URL()
	forged.NotBefore, forged.NotAfter = now.Add(-time.Minute), now.Add(time.Minute)
	victim, err := sign(forged, leaf, newKey(t).Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.verify(now, victim, leaf, intermediate); err == nil {
		t.Fatal("a leaf signed an identity")
	}
}

func TestV_B14_NameConstraints(t *testing.T) {
	f := open(t, Config{NameConstraints: true})
	now := time.Now()
	leaf, intermediate, _ := f.issue(t, now, &Request{})
	if !slices.Equal(intermediate.PermittedURIDomains, []string{"example.org"}) || !critical(intermediate, 30) {
		t.Errorf("constraints %v", intermediate.PermittedURIDomains)
	}
	if err := f.verify(now, leaf, intermediate); err != nil {
		t.Fatal(err)
	}
	// The name is checked in code too: the constraint alone permits subdomains.
	for _, other := range []string{"evil.example.org", "example.org.evil", "example.com"} {
		td := spiffeid.RequireTrustDomainFromString(other)
		_, err := f.Sign(now, &Request{ID: spiffeid.RequireFromPath(td, "/a"), Key: parseKey(t, newKey(t))})
		wantReason(t, err, ReasonID)
	}
	numeric := open(t, Config{NameConstraints: true, TrustDomain: spiffeid.RequireTrustDomainFromString("1.2.3.4")})
	if got := numeric.Authorities()[1].Certificate.PermittedURIDomains; len(got) != 0 {
		t.Errorf("a constraint no verifier can use: %v", got)
	}
}

func wantReason(t testing.TB, err error, reason string) {
	t.Helper()
	var request *RequestError
	if !errors.As(err, &request) || request.Reason != reason {
		t.Errorf("got %v, want a refusal with reason %q", err, reason)
	}
}

func TestServerCertificate(t *testing.T) {
	f := open(t, Config{})
	own, err := f.ServerCertificate()
	if err != nil {
		t.Fatal(err)
	}
	roots, _ := f.Bundle()
	if len(own.Certificate) != 3 || !bytes.Equal(own.Certificate[2], roots[0].Raw) {
		t.Fatal("want leaf, intermediate and root")
	}
	if got := own.Leaf.URIs[0].String(); got != "spiffe://example.org/meshid/ca" {
		t.Error(got)
	}
	if err := f.verify(time.Now(), own.Leaf, parse(t, own.Certificate[1])); err != nil {
		t.Error(err)
	}
	if !own.Leaf.PublicKey.(*ecdsa.PublicKey).Equal(own.PrivateKey.(crypto.Signer).Public()) {
		t.Error("key")
	}
}

// Weeks of life: always able to sign, no leaf outlives its issuer, every leaf
// verifies for all of its life against a bundle that never changes.
func TestWeeksOfRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := open(t, Config{IntermediateLife: 3 * 24 * time.Hour, MaxTTL: 24 * time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := f.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		roots, sequence := f.Bundle()
		key := parseKey(t, newKey(t))
		issuers := map[string]bool{}
		for i := range 21 * 24 / 3 {
			now := time.Now()
			ttl := []time.Duration{0, 10 * time.Second, 24 * time.Hour, 7 * time.Hour, time.Minute}[i%5]
			leaf, intermediate, signed := f.issue(t, now, &Request{Key: key, TTL: ttl})
			issuers[string(intermediate.Raw)] = true
			if !leaf.NotAfter.Before(intermediate.NotAfter) || leaf.NotBefore.Before(intermediate.NotBefore) {
				t.Fatalf("leaf %s to %s, issuer %s to %s", leaf.NotBefore, leaf.NotAfter, intermediate.NotBefore, intermediate.NotAfter)
			}
			instants := []time.Time{now}
			if i%8 == 0 {
				instants = []time.Time{leaf.NotBefore, leaf.NotAfter}
			}
			for _, at := range instants {
				if err := f.verify(at, leaf, intermediate); err != nil {
					t.Fatalf("%s: %v", at, err)
				}
			}
			life := signed.NotAfter.Sub(now)
			if early, late := now.Add(life*35/100), now.Add(life*65/100); signed.RenewAt.Before(early) || signed.RenewAt.After(late) {
				t.Fatalf("renew at %s, not between %s and %s", signed.RenewAt, early, late)
			}
			if _, err := f.ServerCertificate(); err != nil {
				t.Fatal(err)
			}
			if warning, failure := f.Health(now); warning != nil || failure != nil {
				t.Fatal(warning, failure)
			}
			if n := len(f.Authorities()); n > 3 {
				t.Fatalf("%d authorities", n)
			}
			time.Sleep(3 * time.Hour)
		}
		if n := len(issuers); n < 13 || n > 15 {
			t.Errorf("%d intermediates in three weeks, want one each 36 hours", n)
		}
		if after, s := f.Bundle(); s != sequence || !after[0].Equal(roots[0]) || len(after) != 1 {
			t.Error("the bundle changed")
		}
		if n := counter(t, f, "meshid_ca_svid_ttl_shrunk_total", "authority_expiry"); n != 0 {
			t.Errorf("%v lives shrunk", n)
		}
		states := map[string]int{}
		for _, r := range f.records(t) {
			if r.Event == ledgerv1.Event_EVENT_AUTHORITY {
				states[r.Authority.Role+" "+r.Authority.State]++
			}
		}
		n := states["intermediate active"]
		if n < len(issuers) || states["intermediate retiring"] != n-1 || states["intermediate gone"] < n-2 {
			t.Errorf("recorded %v", states)
		}
		cancel()
		running.Wait()
	})
}

// Row B7: towards the end of the root lives shrink visibly, then Sign refuses.
func TestV_B7_EndOfTheRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := open(t, Config{RootLife: 48 * time.Hour, IntermediateLife: 12 * time.Hour, MaxTTL: 4 * time.Hour, DefaultTTL: 4 * time.Hour})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = f.Run(ctx) })
		if err := f.Command(t.Context(), rotation.Command{Verb: rotation.VerbPause}, "uid:0"); err != nil {
			t.Fatal(err)
		}
		roots, _ := f.Bundle()
		end := roots[0].NotAfter
		key := parseKey(t, newKey(t))
		refused, signatures := 0, 0
		for time.Now().Before(end) {
			now := time.Now()
			signed, err := f.Sign(now, &Request{ID: id("/a"), Key: key})
			switch {
			case errors.Is(err, ErrNoAuthority):
				refused++
				if end.Sub(now) > 3*time.Minute {
					t.Fatalf("refused %s before the end: %v", end.Sub(now), err)
				}
				if !strings.Contains(err.Error(), "new root") {
					t.Errorf("no advice in %q", err)
				}
			case err != nil:
				t.Fatal(err)
			case refused > 0:
				t.Fatal("signed after a refusal")
			default:
				signatures++
				if !signed.NotAfter.Before(end) || signed.NotAfter.Sub(now) < minRemaining {
					t.Fatalf("at %s: until %s, root until %s", now, signed.NotAfter, end)
				}
				want := now.Add(4 * time.Hour).Truncate(time.Second)
				if last := end.Add(-5 * time.Minute); want.After(last) {
					want = last
				}
				if signed.NotAfter.Before(want) {
					t.Fatalf("shrunk to %s without need, %s before the end", signed.NotAfter.Sub(now), end.Sub(now))
				}
			}
			step := 30 * time.Minute
			if end.Sub(now) < 45*time.Minute {
				step = 20 * time.Second
			}
			time.Sleep(step)
		}
		if refused == 0 || signatures == 0 {
			t.Errorf("%d refused, %d signed", refused, signatures)
		}
		if counter(t, f, "meshid_ca_svid_ttl_shrunk_total", "authority_expiry") == 0 {
			t.Error("shrunk without a trace")
		}
		if counter(t, f, "meshid_ca_sign_refused_total", "authority") != float64(refused) {
			t.Error("refusals not counted")
		}
		if warning, failure := f.Health(time.Now()); warning == nil || failure == nil {
			t.Error("healthy with an expired root")
		}
		cancel()
		running.Wait()
	})
}

// Deadlines are wall-clock times: maintain is told a time, as after a sleep.
func TestClockJumps(t *testing.T) {
	f := open(t, Config{})
	ctx := t.Context()
	start := time.Now()
	key := parseKey(t, newKey(t))
	sign := func(now time.Time) error {
		_, err := f.Sign(now, &Request{ID: id("/a"), Key: key})
		return err
	}
	for _, step := range []struct {
		name    string
		at      time.Duration
		rotates bool
	}{
		{"nothing to do", time.Minute, false},
		{"asleep beyond half life", 4 * 24 * time.Hour, true},
		{"asleep beyond the end", 60 * 24 * time.Hour, true},
		{"a year ahead", 365 * 24 * time.Hour, true},
		{"and back", 24 * time.Hour, true},
		{"an hour back", 23 * time.Hour, true},
		{"some minutes back", 23*time.Hour - 5*time.Minute, false},
	} {
		now := start.Add(step.at)
		before := f.Authorities()[1].ID
		nap := f.maintain(ctx, now)
		if rotated := f.Authorities()[1].ID != before; rotated != step.rotates {
			t.Errorf("%s: rotated %v", step.name, rotated)
		}
		if nap <= 0 || nap > longestNap {
			t.Errorf("%s: nap %s", step.name, nap)
		}
		if err := sign(now); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
	}
	// Before the root there is nothing to sign with, and it says so.
	now := start.Add(-24 * time.Hour)
	f.maintain(ctx, now)
	if err := sign(now); !errors.Is(err, ErrNoAuthority) || !strings.Contains(err.Error(), "clock") {
		t.Errorf("before the root: %v", err)
	}
	// Back in the present it recovers by itself.
	f.maintain(ctx, start)
	if err := sign(start); err != nil {
		t.Error(err)
	}
}

func TestRotationWithoutLedger(t *testing.T) {
	changes := 0
	f := open(t, Config{OnChange: func() { changes++ }})
	if err := f.cfg.Ledger.Close(); err != nil {
		t.Fatal(err)
	}
	before := f.Authorities()
	if _, err := f.RotateIntermediate(t.Context()); err == nil {
		t.Fatal("rotated without a record")
	}
	due := time.Now().Add(4 * 24 * time.Hour)
	for range 5 {
		if nap := f.maintain(t.Context(), due); nap <= 0 || nap > longestRetry {
			t.Fatalf("retry after %s", nap)
		}
	}
	if warning, _ := f.Health(due); warning == nil {
		t.Error("the failed renewal does not show")
	}
	if counter(t, f, "meshid_ca_intermediate_rotations_total", "failure") != 1 {
		t.Error("one failure, then the retry has to wait")
	}
	after := f.Authorities()
	if len(after) != len(before) || after[1].ID != before[1].ID || changes != 0 {
		t.Error("an authority that is not recorded is in place")
	}
}

func TestRotateIntermediate(t *testing.T) {
	changes := make(chan struct{}, 10)
	f := open(t, Config{OnChange: func() { changes <- struct{}{} }})
	old := f.Authorities()[1]
	serverBefore, err := f.ServerCertificate()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	leaf, intermediate, _ := f.issue(t, now, &Request{})
	fresh, err := f.RotateIntermediate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	<-changes
	all := f.Authorities()
	if len(all) != 3 || all[1].ID != fresh.ID || fresh.ID == old.ID || all[2].ID != old.ID || all[2].State != StateRetiring {
		t.Fatalf("authorities %v", all)
	}
	if err := f.verify(now, leaf, intermediate); err != nil {
		t.Errorf("the old leaf: %v", err)
	}
	if serverAfter, err := f.ServerCertificate(); err != nil || serverAfter == serverBefore {
		t.Errorf("the server's certificate is still the old one (%v)", err)
	}
	// The key of the retiring one is refused too.
	if _, taken := f.state.Load().keys[f.state.Load().retiring[0].spkiHash]; !taken {
		t.Error("the retiring authority's key is free to take")
	}
	for range maxRetiring + 5 {
		if _, err := f.RotateIntermediate(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-changes
	}
	if n := len(f.Authorities()); n != maxRetiring+2 {
		t.Errorf("%d authorities kept", n)
	}
}

// Rows F44 and F68 of the fault suite: what has expired or is damaged is
// replaced without anybody's help.
func TestFault_F44_OwnCertificateExpired(t *testing.T) {
	f := open(t, Config{})
	now := time.Now().Add(36 * time.Hour)
	if before := f.own.Load(); before.usable(now) {
		t.Fatal("still valid")
	}
	f.maintain(t.Context(), now)
	if after := f.own.Load(); !after.usable(now) {
		t.Fatal("not replaced")
	}
}

func TestFault_F68_DamagedKeyIsReplaced(t *testing.T) {
	f := open(t, Config{})
	s := *f.state.Load()
	damaged := *s.active.key.(*ecdsa.PrivateKey)
	other := newKey(t)
	damaged.D, damaged.PublicKey = other.D, other.PublicKey //nolint:staticcheck // what a damaged key is
	a := &authority{
		id: s.active.id, cert: s.active.cert, root: s.active.root, spkiHash: s.active.spkiHash,
		notBefore: s.active.notBefore, notAfter: s.active.notAfter, leafEnd: s.active.leafEnd, renewAt: s.active.renewAt,
		key: &damaged, scheme: s.active.scheme, template: s.active.template, record: s.active.record,
	}
	s.active = a
	f.setState(&s)
	now := time.Now()
	request := &Request{ID: id("/a"), Key: parseKey(t, newKey(t))}
	if _, err := f.Sign(now, request); !errors.Is(err, errBadSignature) || !errors.Is(err, errNotMeant) {
		t.Fatalf("released a signature of another key: %v", err)
	}
	if counter(t, f, "meshid_ca_sign_refused_total", "self_check") != 1 {
		t.Error("not counted")
	}
	select {
	case <-f.kick:
	default:
		t.Error("Run is not woken")
	}
	f.maintain(t.Context(), now)
	if _, err := f.Sign(now, request); err != nil {
		t.Errorf("after the replacement: %v", err)
	}
}

func TestMetricsExistFromTheStart(t *testing.T) {
	f := open(t, Config{})
	if problems, err := testutil.GatherAndLint(f.reg); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	for _, reason := range refusedNames {
		if counter(t, f, "meshid_ca_sign_refused_total", reason) != 0 {
			t.Error(reason)
		}
	}
	if counter(t, f, "meshid_ca_svid_signed_total", "other") != 1 {
		t.Error("the ca's own is not counted as such")
	}
	roots, sequence := f.Bundle()
	if counter(t, f, "meshid_ca_authority_not_after_timestamp_seconds", RoleRoot) != float64(roots[0].NotAfter.Unix()) ||
		counter(t, f, "meshid_ca_bundle_sequence", "") != float64(sequence) {
		t.Error("gauges")
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
