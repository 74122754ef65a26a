package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/ca/keys"
	"github.com/meshid/meshid/pkg/ledger"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

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
