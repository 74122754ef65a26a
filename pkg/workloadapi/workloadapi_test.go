package workloadapi

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// TestSpec_D10_NotReady: a call is held for a while, then Unavailable; it recovers.
func TestSpec_D10_NotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(nil), Options{})
		start := time.Now()
		c := r.svids(t.Context())
		if _, err := c.Recv(); status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
		if took := time.Since(start); took != 10*time.Second {
			t.Errorf("held for %s", took)
		}
		c = r.svids(t.Context())
		start = time.Now()
		time.AfterFunc(3*time.Second, func() { r.source.Publish(a.Snapshot(1, a.SVID("/x"))) })
		next(t, c)
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("answered after %s", took)
		}
		time.Sleep(time.Hour)
		r.source.Publish(a.Snapshot(1, a.SVID("/x")))
		next(t, c) // its patience was for the first answer
	})
}

// TestSpec_E02_E03_E13_E20_Fields: all fields, DER, PKCS#8, leaf first.
func TestSpec_E02_E03_E13_E20_Fields(t *testing.T) {
	root := identitytest.NewAuthority(t, "a.test")
	inter := root.Intermediate()
	b := identitytest.NewAuthority(t, "b.test")
	x := inter.SVID("/x")
	x.Hint = "internal"
	snapshot := &identity.Snapshot{
		SVIDs: []*identity.SVID{x}, Bundle: root.Bundle(1, identitytest.NewAuthority(t, "a.test")),
		Federated: map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1)},
	}
	r := newRig(t, identitytest.NewSource(snapshot), Options{})
	m := next(t, r.svids(t.Context()))
	got := m.GetSvids()[0]
	chain, err := x509.ParseCertificates(got.GetX509Svid())
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || !chain[0].Equal(identitytest.X509(x.Chain[0])) || !chain[1].Equal(inter.Cert) {
		t.Errorf("chain of %d", len(chain))
	}
	if got.GetSpiffeId() != "spiffe://a.test/x" || chain[0].URIs[0].String() != got.GetSpiffeId() || got.GetHint() != "internal" {
		t.Errorf("%s %s", got.GetSpiffeId(), got.GetHint())
	}
	key, err := x509.ParsePKCS8PrivateKey(got.GetX509SvidKey())
	if err != nil {
		t.Fatal(err)
	}
	if !chain[0].PublicKey.(interface{ Equal(x crypto.PublicKey) bool }).Equal(key.(crypto.Signer).Public()) {
		t.Error("key of another certificate")
	}
	bundle, err := x509.ParseCertificates(got.GetBundle())
	if err != nil || len(bundle) != 2 || !bundle[0].Equal(root.Cert) {
		t.Errorf("bundle of %d: %v", len(bundle), err)
	}
	if diff := cmp.Diff(map[string][]byte{"spiffe://b.test": b.Cert.Raw}, m.GetFederatedBundles()); diff != "" {
		t.Error(diff)
	}
	if len(m.GetCrl()) != 0 { // E20
		t.Error("there is a CRL")
	}
	c, err := r.client.FetchX509Bundles(withHeader(t.Context()), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundles := next(t, c)
	want := map[string][]byte{"spiffe://a.test": got.GetBundle(), "spiffe://b.test": b.Cert.Raw}
	if diff := cmp.Diff(want, bundles.GetBundles()); diff != "" { // E13
		t.Error(diff)
	}
}

// TestSpec_E04_E12_E14_NoIdentity: at once, in the middle of a stream, and on both methods.
func TestSpec_E04_E12_E14_NoIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		denied := &identity.Snapshot{Bundle: a.Bundle(1), Denied: true}
		r := newRig(t, identitytest.NewSource(denied), Options{})
		start := time.Now()
		if _, err := r.svids(t.Context()).Recv(); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		c, err := r.client.FetchX509Bundles(withHeader(t.Context()), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("took %s", took)
		}
		r.source.Publish(a.Snapshot(1, a.SVID("/x"), a.SVID("/y")))
		s := r.svids(t.Context())
		if diff := cmp.Diff([]string{"spiffe://a.test/x", "spiffe://a.test/y"}, ids(next(t, s))); diff != "" {
			t.Error(diff)
		}
		r.source.Publish(a.Snapshot(1, a.SVID("/y"))) // E12
		if diff := cmp.Diff([]string{"spiffe://a.test/y"}, ids(next(t, s))); diff != "" {
			t.Error(diff)
		}
		r.source.Publish(denied)
		if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		synctest.Wait()
		if n := r.value("meshid_agent_workloadapi_calls_total", "FetchX509SVID", "denied"); n != 2 {
			t.Errorf("%v calls counted as denied", n)
		}
	})
}

// With DenyAfter, a new call of a process without an identity is held in case that it
// gets one.
func TestDenyAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		denied := &identity.Snapshot{Bundle: a.Bundle(1), Denied: true}
		r := newRig(t, identitytest.NewSource(denied), Options{DenyAfter: 5 * time.Second})
		start := time.Now()
		if _, err := r.svids(t.Context()).Recv(); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %s", took)
		}
		c := r.svids(t.Context())
		start = time.Now()
		time.AfterFunc(time.Second, func() { r.source.Publish(a.Snapshot(1, a.SVID("/x"))) })
		next(t, c)
		if took := time.Since(start); took != time.Second {
			t.Errorf("took %s", took)
		}
		r.source.Publish(denied) // in the middle it is said at once
		if _, err := c.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Error(err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("took %s", took)
		}
	})
}

// TestSpec_E06_E07_Hints: unique in a message and not too long, or left out.
func TestSpec_E06_E07_Hints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		hints := []string{"h", "h", "", "", strings.Repeat("x", 1024), strings.Repeat("y", 1025), "z"}
		var svids []*identity.SVID
		for i, h := range hints {
			v := a.SVID(fmt.Sprintf("/%d", i))
			v.Hint = h
			svids = append(svids, v)
		}
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, svids...)), Options{})
		var got []string
		for _, s := range next(t, r.svids(t.Context())).GetSvids() {
			got = append(got, s.GetHint())
		}
		if diff := cmp.Diff([]string{"h", "", "", "", hints[4], "", "z"}, got); diff != "" {
			t.Error(diff)
		}
		if n := r.value("meshid_agent_workloadapi_dropped_hints_total"); n != 2 {
			t.Errorf("%v counted", n)
		}
	})
}

// TestSpec_E05_Order: as the snapshot has it, in each message and after each restart.
func TestSpec_E05_Order(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	source := identitytest.NewSource(a.Snapshot(1, a.SVID("/z"), a.SVID("/a"), a.SVID("/m")))
	for range 20 {
		r := newRig(t, source, Options{})
		if diff := cmp.Diff([]string{"spiffe://a.test/z", "spiffe://a.test/a", "spiffe://a.test/m"}, ids(next(t, r.svids(t.Context())))); diff != "" {
			t.Fatal(diff)
		}
	}
}

// TestSpec_E08_E11_E15_OnlyChanges: no message when nothing has changed for the client, a
// full one when something has.
func TestSpec_E08_E11_E15_OnlyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test")
		x, y := a.SVID("/x"), a.SVID("/y")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, x, y)), Options{})
		c := r.svids(t.Context())
		first := next(t, c)
		time.Sleep(time.Hour)
		r.source.Publish(a.Snapshot(2, x, y)) // another value with the same contents
		r.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{x, y}, Bundle: a.Bundle(2), Withdrawn: []spiffeid.ID{x.ID}})
		synctest.Wait()
		if n := r.value("meshid_agent_workloadapi_messages_total", "FetchX509SVID"); n != 1 {
			t.Errorf("%v messages", n)
		}
		r.source.Publish(a.Snapshot(2, a.SVID("/x"), y))
		second := next(t, c)
		if len(second.GetSvids()) != 2 || string(second.GetSvids()[0].GetX509SvidKey()) == string(first.GetSvids()[0].GetX509SvidKey()) ||
			string(second.GetSvids()[1].GetX509SvidKey()) != string(first.GetSvids()[1].GetX509SvidKey()) {
			t.Error("not the full set, or not the new key")
		}
		with := a.Snapshot(3, x)
		with.Federated = map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1)}
		r.source.Publish(with)
		if len(next(t, c).GetFederatedBundles()) != 1 {
			t.Error("no federated bundle")
		}
		r.source.Publish(a.Snapshot(4, x))
		if len(next(t, c).GetFederatedBundles()) != 0 {
			t.Error("the federated bundle has stayed")
		}
	})
}

// TestSpec_E17_ErrorsOfTheInside: whatever happens in the agent, a client is told to come back, and
// never what makes go-spiffe give up for ever.
func TestSpec_E17_ErrorsOfTheInside(t *testing.T) {
	final := []codes.Code{codes.Canceled, codes.InvalidArgument}
	for _, tc := range []struct {
		name string
		do   func(r *rig, a *identitytest.Authority)
		want codes.Code
	}{
		{"shutdown", func(r *rig, _ *identitytest.Authority) { r.server.Close() }, codes.Unavailable},
		{"source ends, canceled", func(r *rig, _ *identitytest.Authority) { r.source.End(context.Canceled) }, codes.Unavailable},
		{"source ends, status", func(r *rig, _ *identitytest.Authority) { r.source.End(status.Error(codes.InvalidArgument, "x")) }, codes.Unavailable},
		{"process ends", func(r *rig, _ *identitytest.Authority) { _ = r.peer.Close() }, codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := identitytest.NewAuthority(t, "a.test")
				r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
				c := r.svids(t.Context())
				next(t, c)
				tc.do(r, a)
				_, err := c.Recv()
				if status.Code(err) != tc.want || slices.Contains(final, status.Code(err)) {
					t.Errorf("got %v", err)
				}
				synctest.Wait()
				if r.source.Open() != 0 {
					t.Error("a watch is left open")
				}
			})
		})
	}
	for _, err := range []error{
		context.Canceled, context.DeadlineExceeded, errors.New("x"),
		status.Error(codes.InvalidArgument, "x"), status.Error(codes.Canceled, "x"), status.Error(codes.Internal, "x"),
	} {
		r := newRig(t, identitytest.Refusing(err), Options{})
		if _, got := r.svids(t.Context()).Recv(); status.Code(got) != codes.Unavailable {
			t.Errorf("%v: got %v", err, got)
		}
	}
	for code, err := range map[codes.Code]error{
		codes.ResourceExhausted: fmt.Errorf("x: %w", status.Error(codes.ResourceExhausted, "x")),
		codes.PermissionDenied:  status.Error(codes.PermissionDenied, "x"),
	} {
		r := newRig(t, identitytest.Refusing(err), Options{})
		if _, got := r.svids(t.Context()).Recv(); status.Code(got) != code {
			t.Errorf("%v: got %v", err, got)
		}
	}
}

// What cannot be delivered whole is not delivered, and does not take away what the
// workload has.
func TestBrokenSnapshots(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	x := a.SVID("/x")
	other := spiffeid.RequireFromString("spiffe://a.test/other")
	for name, broken := range map[string]*identity.Snapshot{
		"empty bundle":         {SVIDs: []*identity.SVID{x}, Bundle: &identity.Bundle{TrustDomain: a.TrustDomain}},
		"no bundle":            {SVIDs: []*identity.SVID{x}},
		"only nil and leaves":  {SVIDs: []*identity.SVID{x}, Bundle: &identity.Bundle{TrustDomain: a.TrustDomain, Roots: []*x509.Certificate{nil, identitytest.X509(x.Chain[0])}}},
		"hole in the chain":    {SVIDs: []*identity.SVID{{ID: x.ID, Chain: []*identity.Certificate{x.Chain[0], nil}, Key: x.Key}}, Bundle: a.Bundle(1)},
		"no chain":             {SVIDs: []*identity.SVID{{ID: x.ID, Key: x.Key}}, Bundle: a.Bundle(1)},
		"another ID":           {SVIDs: []*identity.SVID{{ID: other, Chain: x.Chain, Key: x.Key}}, Bundle: a.Bundle(1)},
		"no key":               {SVIDs: []*identity.SVID{{ID: x.ID, Chain: x.Chain}}, Bundle: a.Bundle(1)},
		"foreign trust domain": {SVIDs: []*identity.SVID{identitytest.NewAuthority(t, "b.test").SVID("/x")}, Bundle: a.Bundle(1)},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, identitytest.NewSource(broken), Options{})
			if _, err := r.svids(t.Context()).Recv(); status.Code(err) != codes.Unavailable {
				t.Error(err)
			}
			r.source.Publish(a.Snapshot(1, x))
			c := r.svids(t.Context())
			next(t, c)
			r.source.Publish(broken)
			r.source.Publish(a.Snapshot(1, a.SVID("/y")))
			if diff := cmp.Diff([]string{"spiffe://a.test/y"}, ids(next(t, c))); diff != "" {
				t.Error(diff)
			}
		})
	}
	// A federated bundle that is not good costs only itself.
	b, c := identitytest.NewAuthority(t, "b.test"), identitytest.NewAuthority(t, "c.test")
	s := a.Snapshot(1, x)
	s.Federated = map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1), c.TrustDomain: {TrustDomain: c.TrustDomain}, a.TrustDomain: a.Bundle(2)}
	r := newRig(t, identitytest.NewSource(s), Options{})
	if diff := cmp.Diff(map[string][]byte{"spiffe://b.test": b.Cert.Raw}, next(t, r.svids(t.Context())).GetFederatedBundles()); diff != "" {
		t.Error(diff)
	}
}

// TestV_I1_CallsAreBounded, in all and for each user.
func TestV_I1_CallsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{MaxStreams: 3, MaxStreamsPerUID: 2})
		ctx, cancel := context.WithCancel(t.Context())
		next(t, r.svids(ctx))
		next(t, r.svids(t.Context()))
		if _, err := r.svids(t.Context()).Recv(); status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
		release, err := r.server.admit(7)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.server.admit(8); status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
		release()
		cancel()
		synctest.Wait()
		next(t, r.svids(t.Context()))
		if n := r.value("meshid_agent_workloadapi_streams", "FetchX509SVID"); n != 2 {
			t.Errorf("%v streams", n)
		}
	})
}

// Without a peer there is nothing to be had.
func TestNoPeer(t *testing.T) {
	s, err := New(identitytest.NewSource(nil), Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = s.FetchX509SVID(nil, &noPeer[workload.X509SVIDResponse]{ctx: t.Context()})
	if status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
	if _, err := New(nil, Options{}); err == nil {
		t.Error("made without a source")
	}
}

// TestSpec_E16_SlowReaders: those who do not read hold nobody up.
func TestSpec_E16_SlowReaders(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	r := newSocketRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), filepath.Join(t.TempDir(), "s"))
	for range 10 {
		conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(64<<10))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(t.Context()), &workload.X509SVIDRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	s := newX509Source(t, r.addr)
	for range 100 {
		snapshot := a.Snapshot(1, a.SVID("/x"))
		r.source.Publish(snapshot)
		for deadline := time.Now().Add(10 * time.Second); !has(t, s, snapshot); runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatal("held up")
			}
		}
	}
}

// TestSpec_E19_ClientGone: the stream is freed, and its goroutines.
func TestSpec_E19_ClientGone(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
	next(t, r.svids(t.Context()))
	base := runtime.NumGoroutine()
	for range 500 {
		ctx, cancel := context.WithCancel(t.Context())
		next(t, r.svids(ctx))
		cancel()
	}
	for deadline := time.Now().Add(time.Minute); runtime.NumGoroutine() > base+2 || r.source.Open() > 1; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before; %d watches", runtime.NumGoroutine(), base, r.source.Open())
		}
	}
}

// Each SVID is encoded once.
func TestEncodedOnce(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	var c cache
	s := a.Snapshot(1, a.SVID("/x"))
	one, _, err := c.x509SVIDs(s)
	if err != nil {
		t.Fatal(err)
	}
	two, _, err := c.x509SVIDs(&identity.Snapshot{SVIDs: s.SVIDs, Bundle: s.Bundle})
	if err != nil {
		t.Fatal(err)
	}
	x, y := one.GetSvids()[0], two.GetSvids()[0]
	if &x.GetX509SvidKey()[0] != &y.GetX509SvidKey()[0] || &x.GetX509Svid()[0] != &y.GetX509Svid()[0] || &x.GetBundle()[0] != &y.GetBundle()[0] {
		t.Error("encoded twice")
	}
}

// TestV_E3_SentIsAcknowledged: a client cannot acknowledge. What was handed to its open
// stream counts, bundles and withdrawals alike, and so does a denial; what it has
// already counts without being sent again.
func TestV_E3_SentIsAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		x, y := a.SVID("/x"), a.SVID("/y")
		first := a.Snapshot(1, x, y)
		source := identitytest.NewSource(first)
		r := newRig(t, source, Options{})
		want := func(step string, sequences []uint64, want ...identitytest.InForce) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(sequences, source.Acknowledged()); diff != "" {
				t.Errorf("%s (-want +got)\n%s", step, diff)
			}
			if diff := cmp.Diff(want, source.TakeInForce(), cmp.Comparer(func(a, b *identity.Snapshot) bool { return a == b })); diff != "" {
				t.Errorf("%s (-want +got)\n%s", step, diff)
			}
		}
		svids := r.svids(t.Context())
		next(t, svids)
		want("svids", []uint64{1}, identitytest.InForce{Snapshot: first, Carries: true})
		bundles, err := r.client.FetchX509Bundles(withHeader(t.Context()), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		next(t, bundles)
		want("bundles", []uint64{1, 1}, identitytest.InForce{Snapshot: first})
		less := a.Snapshot(1, x)
		source.Publish(less)
		next(t, svids)
		synctest.Wait()
		if said := source.TakeInForce(); len(said) != 2 || said[0].Snapshot != less || said[1].Snapshot != less || said[0].Carries == said[1].Carries {
			t.Errorf("said %v", said)
		}
		gone := &identity.Snapshot{Bundle: less.Bundle, Withdrawn: []spiffeid.ID{x.ID}, Denied: true}
		source.Publish(gone)
		if _, err := svids.Recv(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("denied: %v", err)
		}
		synctest.Wait()
		if said := source.TakeInForce(); len(said) != 2 || said[0].Snapshot != gone || said[0].Carries == said[1].Carries {
			t.Errorf("said %v", said)
		}
		if n := len(source.Acknowledged()); n != 4 {
			t.Errorf("%d acknowledgements: a denial brings no bundle", n)
		}
	})
}

// The lists of a bundle that has some are in both messages; else there are none.
func TestSpec_E20_RevocationLists(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	b := a.Bundle(1)
	for _, want := range [][][]byte{nil, {[]byte("one"), []byte("two")}} {
		b := &identity.Bundle{TrustDomain: b.TrustDomain, Sequence: 1, Roots: b.Roots}
		for _, l := range want {
			b.Lists = append(b.Lists, &identity.RevocationList{Issuer: a.Cert, List: l})
		}
		s := &identity.Snapshot{SVIDs: []*identity.SVID{a.SVID("/x")}, Bundle: b}
		var c cache
		svids, _, err := c.x509SVIDs(s)
		if err != nil {
			t.Fatal(err)
		}
		bundles, err := c.x509Bundles(s)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([][][]byte{want, want}, [][][]byte{svids.GetCrl(), bundles.GetCrl()}); diff != "" {
			t.Error(diff)
		}
	}
}
