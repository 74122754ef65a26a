package conformance

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/test/local"
)

func TestSpec_E01_FirstMessageAtOnce(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("e01", uid))
	c := w.as(t, uid)
	held := c.stream(t) // its instance stays warm
	held.next(t)
	begun := time.Now()
	s := c.stream(t)
	got := s.next(t)
	took := time.Since(begun)
	if diff := cmp.Diff([]string{"spiffe://" + td + "/e01"}, idsOf(got)); diff != "" {
		t.Error(diff)
	}
	t.Logf("first message after %v", took) // a time is reported, never asserted
	// At once means that nothing had to be asked of the CA: it is what is at hand.
	again := c.stream(t).next(t)
	if !bytes.Equal(again.GetSvids()[0].GetX509Svid(), got.GetSvids()[0].GetX509Svid()) {
		t.Error("each stream has an X.509-SVID of its own")
	}
}

// message is one complete answer, checked without go-spiffe.
func message(t *testing.T, w *world, name string) (*workload.X509SVIDResponse, []*x509.Certificate, []*x509.Certificate) {
	t.Helper()
	uid := newUser()
	e := entry(name, uid)
	e.Hint = "hint-" + name
	w.apply(t, e)
	m := w.as(t, uid).stream(t).next(t)
	if len(m.GetSvids()) != 1 {
		t.Fatalf("%d identities", len(m.GetSvids()))
	}
	chain, err := x509.ParseCertificates(m.GetSvids()[0].GetX509Svid())
	if err != nil {
		t.Fatal(err)
	}
	roots, err := x509.ParseCertificates(m.GetSvids()[0].GetBundle())
	if err != nil {
		t.Fatal(err)
	}
	return m, chain, roots
}

func TestSpec_E02_FieldsAgree(t *testing.T) {
	w := shared(t)
	m, chain, roots := message(t, w, "e02")
	if id := m.GetSvids()[0].GetSpiffeId(); id != "spiffe://"+td+"/e02" || chain[0].URIs[0].String() != id {
		t.Errorf("field %s, certificate %s", id, chain[0].URIs[0])
	}
	if hint := m.GetSvids()[0].GetHint(); hint != "hint-e02" {
		t.Errorf("hint %q", hint)
	}
	if want := bundleOf(t, w.ca).X509Authorities(); len(roots) != len(want) || !roots[0].Equal(want[0]) {
		t.Errorf("%d roots, want %d", len(roots), len(want))
	}
	if len(m.GetFederatedBundles()) != 0 {
		t.Errorf("bundles of others: %v", m.GetFederatedBundles())
	}
}

func TestSpec_E03_DERAndPKCS8(t *testing.T) {
	m, chain, roots := message(t, shared(t), "e03")
	s := m.GetSvids()[0]
	if chain[0].IsCA || !chain[1].IsCA {
		t.Error("the leaf is not first")
	}
	for what, b := range map[string][]byte{"chain": s.GetX509Svid(), "key": s.GetX509SvidKey(), "bundle": s.GetBundle()} {
		if bytes.Contains(b, []byte("-----BEGIN")) {
			t.Errorf("%s is PEM", what)
		}
	}
	key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
	if err != nil {
		t.Fatal(err)
	}
	if !key.(crypto.Signer).Public().(interface{ Equal(x crypto.PublicKey) bool }).Equal(chain[0].PublicKey) {
		t.Error("key of another certificate")
	}
	if len(roots) != 1 {
		t.Errorf("%d roots", len(roots))
	}
}

// TestSpec_E04_DeniedThenServed: without an entry PermissionDenied, and go-spiffe
// has the identity at its next retry.
func TestSpec_E04_DeniedThenServed(t *testing.T) {
	w := shared(t)
	uid := newUser()
	c := w.as(t, uid)
	if err := c.stream(t).end(); status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ready := make(chan error, 1)
	go func() {
		s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(c.spiffe()...))
		if err == nil {
			err = s.Close()
		}
		ready <- err
	}()
	begun := time.Now()
	w.apply(t, entry("e04", uid))
	if err := <-ready; err != nil {
		t.Error(err)
	}
	t.Logf("served %v after the entry was applied", time.Since(begun))
}

// TestSpec_E04_HeldThenServed: by default a call is held, and answered when the
// entry comes, without a retry.
func TestSpec_E04_HeldThenServed(t *testing.T) {
	w := shared(t)
	a := w.ca.StartAgent(t, "e04", local.AgentOptions{})
	uid := newUser()
	s := callerOf(t, a.Socket, uid).stream(t)
	local.Await(t, "the call is held", func(ctx context.Context) error {
		n, err := metric(ctx, a.Metrics, "meshid_agent_streams")
		if err == nil && n != 1 {
			err = fmt.Errorf("%v streams", n)
		}
		return err
	})
	w.apply(t, entry("e04-held", uid))
	if got := idsOf(s.next(t)); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}

// TestSpec_E05_OrderOverRestarts: two entries are two identities, and which is
// the first does not change.
func TestSpec_E05_OrderOverRestarts(t *testing.T) {
	t.Parallel()
	w := alone(t, local.CAOptions{})
	uid := newUser()
	// Neither the names' order nor that of their making is that of the IDs.
	a, b := entry("e05-b", uid), entry("e05-a", uid)
	a.SpiffeId, b.SpiffeId = "spiffe://"+td+"/a", "spiffe://"+td+"/b"
	w.apply(t, a)
	w.apply(t, b)
	w.settled(t)
	c := w.as(t, uid)
	var first []string
	for i := range 21 {
		var got []string
		local.Await(t, "both identities", func(ctx context.Context) (err error) {
			if got, err = c.ids(ctx); err == nil && len(got) != 2 {
				err = fmt.Errorf("got %v", got)
			}
			return err
		})
		if first == nil {
			first = got
		}
		if diff := cmp.Diff(first, got); diff != "" {
			t.Fatalf("after %d restarts: %s", i, diff)
		}
		w.agent.Kill()
		w.agent.Start(t)
	}
}

// TestSpec_E06_HintTwice: of two equal hints in a message the second is left out,
// loudly.
func TestSpec_E06_HintTwice(t *testing.T) {
	w := shared(t)
	uid := newUser()
	a, b, c := entry("e06-a", uid), entry("e06-b", uid), entry("e06-c", uid)
	a.Hint, b.Hint, c.Hint = "same", "same", "other"
	err := w.tryApply(t, a, b, c)
	if err != nil {
		t.Fatal(err)
	}
	s := w.as(t, uid).stream(t)
	m := s.next(t)
	for len(m.GetSvids()) < 3 {
		m = s.next(t)
	}
	hints := make(map[string]int)
	for _, v := range m.GetSvids() {
		hints[v.GetHint()]++
	}
	if diff := cmp.Diff(map[string]int{"same": 1, "other": 1, "": 1}, hints); diff != "" {
		t.Error(diff)
	}
	if m.GetSvids()[0].GetHint() != "same" {
		t.Errorf("first hint is %q", m.GetSvids()[0].GetHint())
	}
	local.Await(t, "a person is told", func(context.Context) error {
		if !strings.Contains(w.agent.Log(), "hint is dropped") {
			return errors.New("the log does not say it")
		}
		return nil
	})
}

func TestSpec_E07_HintLength(t *testing.T) {
	w := shared(t)
	uid := newUser()
	e := entry("e07", uid)
	e.Hint = strings.Repeat("x", 1025)
	if err := w.tryApply(t, e); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "hint") {
		t.Errorf("1025 bytes: %v", err)
	}
	e.Hint = e.GetHint()[1:]
	w.apply(t, e)
	if got := w.as(t, uid).stream(t).next(t).GetSvids()[0].GetHint(); got != e.GetHint() {
		t.Errorf("hint of %d bytes", len(got))
	}
}

// TestSpec_E08_RotationPushes: a complete message, with new keys.
func TestSpec_E08_RotationPushes(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("e08-a", uid), entry("e08-b", uid))
	s := w.as(t, uid).stream(t)
	m := s.next(t)
	for len(m.GetSvids()) < 2 {
		m = s.next(t)
	}
	w.rotate(t)
	changed := make(map[string]bool)
	for len(changed) < 2 {
		next := s.next(t)
		if diff := cmp.Diff(idsOf(m), idsOf(next)); diff != "" {
			t.Fatal(diff)
		}
		for i, v := range next.GetSvids() {
			old := m.GetSvids()[i]
			if bytes.Equal(old.GetX509Svid(), v.GetX509Svid()) {
				continue
			}
			changed[v.GetSpiffeId()] = true
			if bytes.Equal(old.GetX509SvidKey(), v.GetX509SvidKey()) {
				t.Errorf("%s: the same key", v.GetSpiffeId())
			}
		}
		if len(next.GetSvids()[0].GetBundle()) == 0 {
			t.Error("no bundle")
		}
	}
}

func TestSpec_E13_BundlesByTrustDomain(t *testing.T) {
	w := shared(t)
	uid := newUser()
	w.apply(t, entry("e13", uid))
	s, err := workload.NewSpiffeWorkloadAPIClient(w.as(t, uid).raw(t)).FetchX509Bundles(header(t.Context(), "true"), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string][]byte{"spiffe://" + td: bundleOf(t, w.ca).X509Authorities()[0].Raw}, m.GetBundles()); diff != "" {
		t.Error(diff)
	}
	if len(m.GetCrl()) != 0 {
		t.Error("it has a CRL")
	}
}

func TestSpec_E14_BundlesWithoutIdentity(t *testing.T) {
	w := shared(t)
	conn := w.as(t, newUser()).raw(t)
	if err := call(header(t.Context(), "true"), conn, "/SpiffeWorkloadAPI/FetchX509Bundles"); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
}

// TestSpec_E15_SilentWithoutChange: what concerns others, or changes nothing, is
// not told.
func TestSpec_E15_SilentWithoutChange(t *testing.T) {
	w := shared(t)
	uid, other := newUser(), newUser()
	mine := entry("e15", uid)
	w.apply(t, mine)
	s := w.as(t, uid).stream(t)
	before := s.next(t)
	theirs := w.as(t, other)
	for i := range 20 {
		w.apply(t, entry(fmt.Sprintf("e15-%d", i), other))
		theirs.context(t)
	}
	w.apply(t, mine) // again, as it is
	w.settled(t)
	w.remove(t, "e15-3")
	w.settled(t)
	w.rotate(t)
	// Were there a message before this, it would come first.
	after := s.next(t)
	if bytes.Equal(before.GetSvids()[0].GetX509Svid(), after.GetSvids()[0].GetX509Svid()) {
		t.Error("a message without a change")
	}
}

func TestSpec_E20_NoCRL(t *testing.T) {
	m, _, _ := message(t, shared(t), "e20")
	if len(m.GetCrl()) != 0 {
		t.Errorf("%d CRLs", len(m.GetCrl()))
	}
}
