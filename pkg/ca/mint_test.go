package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

// under opens a CA below an upstream CA that is in order.
func under(t *testing.T, pins ...[32]byte) (*fixture, *upstreamtest.Memory, *upstreamtest.Authority) {
	t.Helper()
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	m := upstreamtest.NewMemory(a, upstreamtest.Good)
	return open(t, Config{Upstream: &Upstream{CA: m, Kind: "memory", Pins: pins}}), m, a
}

// run runs the CA until the test ends.
func (f *fixture) run(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// intermediate returns the one that signs.
func (f *fixture) intermediate(t *testing.T) *x509.Certificate {
	t.Helper()
	for _, a := range f.Authorities() {
		if a.Role == RoleIntermediate && a.State == StateActive {
			return a.Certificate
		}
	}
	t.Fatal("no intermediate signs")
	return nil
}

// verifySigned checks a whole chain against the bundle.
func (f *fixture) verifySigned(t *testing.T, now time.Time) {
	t.Helper()
	signed, err := f.Sign(now, &Request{ID: id("/app"), Key: parseKey(t, newKey(t))})
	if err != nil {
		t.Fatal(err)
	}
	durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for _, der := range durable[0].Chain() {
		chain = append(chain, parse(t, der))
	}
	if len(chain) != 3 {
		t.Errorf("chain of %d certificates: want leaf, intermediate, and the upstream CA's issuer", len(chain))
	}
	if err := f.verify(now, chain...); err != nil {
		t.Error(err)
	}
}

func TestUpstream(t *testing.T) {
	f, m, a := under(t)
	roots, sequence := f.Bundle()
	if len(roots) != 1 || !roots[0].Equal(a.Root) || sequence != 1 {
		t.Fatalf("%d roots at sequence %d", len(roots), sequence)
	}
	f.verifySigned(t, time.Now())
	own, err := f.ServerCertificate()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(own.Certificate); n != 4 {
		t.Errorf("own chain of %d certificates: want leaf, intermediate, issuer, root", n)
	}
	before := f.intermediate(t).SerialNumber.String()
	if _, err := f.RotateIntermediate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := f.intermediate(t).SerialNumber.String(); after == before || m.Calls() < 2 {
		t.Errorf("intermediate %s, then %s", before, after)
	}
	f.verifySigned(t, time.Now())
}

// The roots of an upstream CA are pinned, or those of its first answer are.
func TestUpstreamPins(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	m := upstreamtest.NewMemory(a, upstreamtest.Good)
	if _, err := tryOpen(t, Config{Upstream: &Upstream{CA: m, Kind: "memory", Pins: [][32]byte{{1}}}}); !errors.Is(err, upstream.ErrDenied) ||
		!strings.Contains(err.Error(), fmt.Sprintf("%x", sha256.Sum256(a.Root.Raw))) {
		t.Errorf("an unknown root: %v", err)
	}
	open(t, Config{Upstream: &Upstream{CA: m, Kind: "memory", Pins: [][32]byte{sha256.Sum256(a.Root.Raw)}}})
}

// A start without the upstream CA: the roots are known, so the CA is there, says
// what it waits for, and issues as soon as it can.
func TestUpstreamGoneAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := upstreamtest.NewAuthority(t, upstreamtest.Good)
		m := upstreamtest.NewMemory(a, upstreamtest.Good)
		store := &memoryStore{}
		u := &Upstream{CA: m, Kind: "memory"}
		open(t, Config{Store: store, Upstream: u})
		m.Become(a, upstreamtest.Gone)
		f := open(t, Config{Store: store, Upstream: u})
		f.run(t)
		if _, err := f.Sign(time.Now(), &Request{ID: id("/app"), Key: parseKey(t, newKey(t))}); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("Sign = %v", err)
		}
		if _, err := f.ServerCertificate(); !errors.Is(err, ErrNoAuthority) {
			t.Errorf("ServerCertificate = %v", err)
		}
		if warning, failure := f.Health(time.Now()); failure == nil || warning == nil || !strings.Contains(warning.Error(), "connection refused") {
			t.Errorf("health: %v, %v", warning, failure)
		}
		m.Become(a, upstreamtest.Good)
		time.Sleep(mintMax)
		synctest.Wait()
		f.verifySigned(t, time.Now())
		if warning, failure := f.Health(time.Now()); failure != nil || warning != nil {
			t.Errorf("health: %v, %v", warning, failure)
		}
	})
	if _, err := tryOpen(t, Config{Store: &memoryStore{roots: []Root{{Certificate: upstreamtest.NewAuthority(t, upstreamtest.Good).Root.Raw, State: StateActive}}, sequence: 1}}); err == nil ||
		!strings.Contains(err.Error(), "write the section upstream") {
		t.Errorf("an upstream root without an upstream CA: %v", err)
	}
}

// The upstream CA is away, or wrong, or slow, from the time of renewal on: nobody
// who asks for a leaf notices until the intermediate ends, and health says so.
func TestFault_F24_UpstreamDownAtRenewal(t *testing.T) {
	for _, b := range []upstreamtest.Behaviour{
		upstreamtest.Gone, upstreamtest.Denied, upstreamtest.RateLimited, upstreamtest.Slow, upstreamtest.WrongKey, upstreamtest.UnrelatedRoot,
	} {
		t.Run(string(b), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, m, a := under(t)
				f.run(t)
				start, first := time.Now(), f.intermediate(t)
				m.Become(a, b)
				if b == upstreamtest.WrongKey || b == upstreamtest.UnrelatedRoot {
					m.Become(upstreamtest.NewAuthority(t, b), upstreamtest.Good)
				}
				half := DefaultIntermediateLife / 2
				// A third of its life after the renewal was due.
				for time.Since(start) < half+DefaultIntermediateLife/3 {
					time.Sleep(time.Hour)
					f.verifySigned(t, time.Now())
					warning, failure := f.Health(time.Now())
					if failure != nil {
						t.Fatalf("after %s: %v", time.Since(start), failure)
					}
					if late := time.Since(start) > half+2*time.Hour; late && warning == nil {
						t.Fatalf("after %s: health says nothing", time.Since(start))
					}
				}
				if warning, _ := f.Health(time.Now()); !strings.Contains(warning.Error(), "act now") {
					t.Errorf("health is not urgent: %v", warning)
				}
				if calls := m.Calls(); calls < 50 {
					t.Errorf("only %d attempts", calls)
				}
				if now := f.intermediate(t); !now.Equal(first) {
					t.Error("another intermediate")
				}
				failed, succeeded := testutil.ToFloat64(f.metrics.upstreamFailed), testutil.ToFloat64(f.metrics.upstreamOK)
				if at := testutil.ToFloat64(f.metrics.upstreamSuccess); failed < 50 || at != float64(start.Unix()) {
					t.Errorf("metrics: %v failures, the last success at %v", failed, at)
				}
				m.Become(a, upstreamtest.Good)
				time.Sleep(maxRetryAfter)
				synctest.Wait()
				f.verifySigned(t, time.Now())
				if warning, failure := f.Health(time.Now()); warning != nil || failure != nil {
					t.Errorf("health: %v, %v", warning, failure)
				}
				if now := f.intermediate(t); now.Equal(first) {
					t.Error("the intermediate was not replaced")
				}
				if n := testutil.ToFloat64(f.metrics.upstreamOK); n != succeeded+1 {
					t.Errorf("metrics: %v successes, then %v", succeeded, n)
				}
			})
		})
	}
}

func TestRetryMint(t *testing.T) {
	const plenty = 100 * 24 * time.Hour
	limit := &upstream.RateLimitError{RetryAfter: 30 * time.Minute}
	for _, c := range []struct {
		err         error
		failures    int
		left        time.Duration
		least, most time.Duration
	}{
		{errors.New("x"), 1, plenty, mintBase / 2, mintBase},
		{errors.New("x"), 100, plenty, mintMax / 2, mintMax},
		{upstream.ErrDenied, 1, plenty, deniedBase / 2, deniedBase},
		{upstream.ErrDenied, 100, plenty, deniedMax / 2, deniedMax},
		{limit, 1, plenty, 30 * time.Minute, 30 * time.Minute},
		{&upstream.RateLimitError{RetryAfter: plenty}, 1, plenty, maxRetryAfter, maxRetryAfter},
		// There is always room for some attempts.
		{limit, 9, 20 * time.Minute, time.Minute, time.Minute},
		{upstream.ErrDenied, 100, 0, mintBase, mintBase},
	} {
		for _, random := range []float64{0, 0.5, 0.999} {
			if got := retryMint(c.err, c.failures, c.left, random); got < c.least || got > c.most {
				t.Errorf("after %d of %v with %s left: %s, want %s to %s", c.failures, c.err, c.left, got, c.least, c.most)
			}
		}
	}
}

// recorder remembers what an upstream CA has answered.
type recorder struct {
	upstream.CA
	last *upstream.Minted
}

func (r *recorder) Mint(ctx context.Context, q *upstream.Request) (m *upstream.Minted, err error) {
	m, err = r.CA.Mint(ctx, q)
	r.last = m
	return m, err
}

// What was verified is what is served, byte for byte: no part of an upstream CA's
// answer is encoded anew.
func TestV_B9_VerifiedIsServed(t *testing.T) {
	r := &recorder{CA: upstreamtest.NewMemory(upstreamtest.NewAuthority(t, upstreamtest.Good), upstreamtest.Good)}
	f := open(t, Config{Upstream: &Upstream{CA: r, Kind: "memory"}})
	signed, err := f.Sign(time.Now(), &Request{ID: id("/app"), Key: parseKey(t, newKey(t))})
	if err != nil {
		t.Fatal(err)
	}
	durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
	if err != nil {
		t.Fatal(err)
	}
	served := durable[0].Chain()[1:]
	if len(served) != len(r.last.Chain) {
		t.Fatalf("%d certificates are served of %d", len(served), len(r.last.Chain))
	}
	for i, c := range r.last.Chain {
		if !bytes.Equal(served[i], c.Raw) {
			t.Errorf("certificate %d of the chain is not what was verified", i+1)
		}
	}
	if roots, _ := f.Bundle(); len(roots) != 1 || !bytes.Equal(roots[0].Raw, r.last.Roots[0].Raw) {
		t.Error("the bundle is not what was verified")
	}
}

// Row B7, with a CA above: that its certificate ends is said long before, though it
// goes on signing what lives shorter and shorter.
func TestV_B7_EndOfTheUpstreamCA(t *testing.T) {
	f, _, a := under(t)
	end := a.Root.NotAfter
	if issuer := parse(t, f.state.Load().active.chain[1]); issuer.NotAfter.Before(end) {
		end = issuer.NotAfter
	}
	if warning, failure := f.Health(time.Now()); warning != nil || failure != nil {
		t.Errorf("all is well: %v, %v", warning, failure)
	}
	if warning, _ := f.Health(end.Add(-maxAboveWarning - DefaultIntermediateLife - time.Minute)); warning != nil {
		t.Errorf("too early: %v", warning)
	}
	warning, _ := f.Health(end.Add(-DefaultIntermediateLife + time.Minute))
	if warning == nil || !strings.Contains(warning.Error(), "ends at "+end.UTC().Format(time.RFC3339)) {
		t.Errorf("a week before the end: %v", warning)
	}
}
