package upstreamtest

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/internal/pkcs10"
	"github.com/meshid/meshid/pkg/ca/upstream"
)

// Kind describes a kind of upstream CA to Run.
type Kind struct {
	// Start starts a CA of this kind, or a fake of one, which answers as a says and
	// behaves as b does, and returns a client of it that New made. What it starts,
	// it stops with t.Cleanup.
	Start func(t *testing.T, b Behaviour, a *Authority) upstream.CA
	// Skip are behaviours that CAs of this kind cannot have, each with the reason.
	Skip map[Behaviour]string
	// Roots is set for kinds of which the CA is real, not behind an Authority: its
	// roots are its own.
	Real bool
}

// patience bounds what is waited for: only a test that fails waits so long.
const patience = time.Minute

// Run runs all checks. Kinds are not run in parallel, since they may share what
// they start.
func Run(t *testing.T, k Kind) {
	t.Helper()
	start := k.start
	for _, b := range []Behaviour{Good, LongLife, Repeated} {
		t.Run(string(b), func(t *testing.T) {
			ca, a := start(t, b)
			checkGood(t, ca, a, k.Real)
		})
	}
	t.Run("roots are watched", func(t *testing.T) {
		ca, _ := start(t, Good)
		watcher, ok := ca.(upstream.RootWatcher)
		if !ok {
			t.Skip("this kind does not watch roots")
		}
		checkWatch(t, watcher)
	})
	for _, b := range []Behaviour{
		WrongKey, NotCA, Expired, NotYetValid, OtherName, MoreNames, PathLength, NoKeyUsage, Constrained, OtherUsage,
		MissingChain, UnrelatedRoot, ForeignRoot, NoRoot, LongChain, HugeAnswer, Garbage,
	} {
		t.Run(string(b), func(t *testing.T) {
			ca, _ := start(t, b)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := Mint(ctx, t, ca)
			checkError(t, err)
		})
	}
	checkFailures(t, start, func(ctx context.Context, t testing.TB, ca upstream.CA) error {
		_, err := Mint(ctx, t, ca)
		return err
	})
}

func (k *Kind) start(t *testing.T, b Behaviour) (upstream.CA, *Authority) {
	t.Helper()
	if reason, ok := k.Skip[b]; ok {
		t.Skipf("%s: %s", b, reason)
	}
	a := NewAuthority(t, b)
	return k.Start(t, b, a), a
}

// RunLeaves is Run for the signing of leaves: what Start returns has to be an
// upstream.LeafSigner.
func RunLeaves(t *testing.T, k Kind) {
	t.Helper()
	for _, b := range []Behaviour{Good, Repeated} {
		t.Run(string(b), func(t *testing.T) {
			ca, a := k.start(t, b)
			checkLeaves(t, ca, a, k.Real)
		})
	}
	for _, b := range []Behaviour{
		LongLife, WrongKey, NotCA, Expired, NotYetValid, OtherName, MoreNames, NoKeyUsage, Constrained, OtherUsage,
		MissingChain, UnrelatedRoot, ForeignRoot, NoRoot, LongChain, HugeAnswer, Garbage,
	} {
		t.Run(string(b), func(t *testing.T) {
			ca, _ := k.start(t, b)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := SignLeaf(ctx, t, ca)
			checkError(t, err)
		})
	}
	checkFailures(t, k.start, func(ctx context.Context, t testing.TB, ca upstream.CA) error {
		_, err := SignLeaf(ctx, t, ca)
		return err
	})
}

// checkLeaves has some leaves signed, one after the other and at once.
func checkLeaves(t *testing.T, ca upstream.CA, a *Authority, isReal bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	first, err := SignLeaf(ctx, t, ca)
	if err != nil {
		t.Fatal(err)
	}
	if !isReal && !first.Anchors[0].Equal(a.Root) {
		t.Errorf("the anchor is %q, not the root %q", first.Anchors[0].Subject, a.Root.Subject)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			v, err := SignLeaf(ctx, t, ca)
			switch {
			case err != nil:
				t.Error(err)
			case !v.Anchors[0].Equal(first.Anchors[0]) || v.Chain[0].SerialNumber.Cmp(first.Chain[0].SerialNumber) == 0:
				t.Errorf("two leaves have the anchors %q and %q and the serial numbers %x and %x",
					first.Anchors[0].Subject, v.Anchors[0].Subject, first.Chain[0].SerialNumber, v.Chain[0].SerialNumber)
			}
		})
	}
	all.Wait()
}

// SignLeaf asks for an X.509-SVID and checks the answer as its user does.
func SignLeaf(ctx context.Context, t testing.TB, ca upstream.CA) (*upstream.Verified, error) {
	t.Helper()
	key := newKey(t)
	names := pkcs10.Names{URI: TrustDomain.IDString() + "/shop/web", DNS: []string{"web.shop.internal", "shop.internal"}}
	csr, err := pkcs10.Sign(key, names)
	if err != nil {
		t.Error(err)
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Error(err)
		return nil, err
	}
	r, err := upstream.NewLeaf(TrustDomain, csr, spki, names, time.Hour, ca.Capabilities())
	if err != nil {
		t.Error(err)
		return nil, err
	}
	signer, ok := ca.(upstream.LeafSigner)
	if !ok {
		t.Fatalf("%T signs no leaves", ca)
	}
	m, err := signer.SignLeaf(ctx, r)
	if err != nil {
		return nil, err
	}
	return r.Verify(time.Now(), m)
}

// checkFailures looks at how the client says why there is no answer to a request.
func checkFailures(t *testing.T, start func(*testing.T, Behaviour) (upstream.CA, *Authority), request func(context.Context, testing.TB, upstream.CA) error) {
	t.Helper()
	for _, c := range []struct {
		behaviour Behaviour
		want      error
	}{{Denied, upstream.ErrDenied}, {Gone, upstream.ErrUnavailable}} {
		t.Run(string(c.behaviour), func(t *testing.T) {
			ca, _ := start(t, c.behaviour)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := request(ctx, t, ca)
			checkError(t, err)
			if !errors.Is(err, c.want) {
				t.Errorf("the error does not wrap %q: %v", c.want, err)
			}
		})
	}
	t.Run(string(RateLimited), func(t *testing.T) {
		ca, _ := start(t, RateLimited)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		err := request(ctx, t, ca)
		checkError(t, err)
		limit, ok := errors.AsType[*upstream.RateLimitError](err)
		if !ok {
			t.Fatalf("the error is no *upstream.RateLimitError: %v", err)
		}
		if limit.RetryAfter != 0 && limit.RetryAfter != RetryAfter {
			t.Errorf("retry after %s, want %s, or 0 if the CA cannot say", limit.RetryAfter, RetryAfter)
		}
	})
	t.Run(string(Slow), func(t *testing.T) {
		ca, _ := start(t, Slow)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		done := make(chan error, 1)
		go func() {
			done <- request(ctx, t, ca)
		}()
		select {
		case err := <-done:
			checkError(t, err)
		case <-time.After(patience):
			t.Fatal("Mint goes on though its context has ended")
		}
	})
}

// Mint asks for an intermediate and checks the answer as its user does.
func Mint(ctx context.Context, t testing.TB, ca upstream.CA) (*upstream.Verified, error) {
	t.Helper()
	r, err := upstream.NewRequest(TrustDomain, newKey(t), pkix.Name{
		CommonName: "meshid intermediate", SerialNumber: strings.ToLower(rand.Text()),
	}, 24*time.Hour, ca.Capabilities())
	if err != nil {
		t.Error(err)
		return nil, err
	}
	m, err := ca.Mint(ctx, r)
	if err != nil {
		return nil, err
	}
	return r.Verify(time.Now(), m)
}

func checkGood(t *testing.T, ca upstream.CA, a *Authority, isReal bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	first, err := Mint(ctx, t, ca)
	if err != nil {
		t.Fatal(err)
	}
	if !isReal && !first.Anchors[0].Equal(a.Root) {
		t.Errorf("the anchor is %q, not the root %q", first.Anchors[0].Subject, a.Root.Subject)
	}
	second, err := Mint(ctx, t, ca)
	if err != nil {
		t.Fatalf("the second time: %v", err)
	}
	if first.Chain[0].SerialNumber.Cmp(second.Chain[0].SerialNumber) == 0 {
		t.Error("two intermediates have one serial number")
	}
	if !second.Anchors[0].Equal(first.Anchors[0]) {
		t.Error("the second intermediate has another anchor")
	}
	c := ca.Capabilities()
	if c.TTLGranularity < 0 || c.MinTTL < 0 || c.MaxTTL < 0 || c.MaxTTL > 0 && c.MaxTTL < c.MinTTL {
		t.Errorf("capabilities contradict each other: %+v", c)
	}
}

func checkWatch(t *testing.T, w upstream.RootWatcher) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	enough := errors.New("enough")
	err := w.WatchRoots(ctx, func(roots []*x509.Certificate) error {
		if len(roots) == 0 {
			t.Error("changed was called without roots")
		}
		for _, r := range roots {
			if err := upstream.CheckRoot(TrustDomain, r); err != nil {
				t.Error(err)
			}
		}
		return enough
	})
	if !errors.Is(err, enough) {
		t.Errorf("WatchRoots returned %v, not the error of changed", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- w.WatchRoots(ctx, func([]*x509.Certificate) error {
			cancel()
			return nil
		})
	}()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("WatchRoots returned no error when its context ended")
		}
	case <-time.After(patience):
		t.Error("WatchRoots goes on though its context has ended")
	}
	cancel()
}

// checkError wants an error that a person can use and that gives nothing away.
func checkError(t testing.TB, err error) {
	t.Helper()
	if err == nil {
		t.Fatal("it was accepted")
	}
	switch text := err.Error(); {
	case len(text) < 10:
		t.Errorf("the error says nothing: %q", text)
	case len(text) > 4096:
		t.Errorf("the error has %d bytes", len(text))
	case strings.Contains(text, "PRIVATE KEY"), strings.Contains(text, "BEGIN CERTIFICATE"):
		t.Errorf("the error holds what it should not: %.200q", text)
	}
	t.Log(err)
}
