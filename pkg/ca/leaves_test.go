package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/internal/pkcs10"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// leavesAbove opens a CA whose upstream CA signs each leaf.
func leavesAbove(t *testing.T, limits upstream.Capabilities) (*fixture, *upstreamtest.Memory, *upstreamtest.Authority) {
	t.Helper()
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	m := upstreamtest.NewMemory(a, upstreamtest.Good)
	m.Limits = limits
	return open(t, Config{Upstream: &Upstream{CA: m, Kind: "memory", Leaves: true}}), m, a
}

// named makes a request for a new key that asks for names in its CSR.
func named(t testing.TB, key *ecdsa.PrivateKey, names pkcs10.Names) *Request {
	t.Helper()
	csr, err := pkcs10.Sign(key, names)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ParseCSR(csr)
	if err != nil {
		t.Fatal(err)
	}
	return &Request{ID: id("/app"), DNSNames: []string{"app.example.org"}, Key: pub, CSR: csr}
}

var appNames = pkcs10.Names{URI: id("/app").String(), DNS: []string{"app.example.org"}}

// signLeaf asks for a leaf as servers do, and checks the chain that is released.
func (f *fixture) signLeaf(t testing.TB) error {
	t.Helper()
	signed, err := f.CA.Sign(t.Context(), time.Now(), named(t, newKey(t), appNames))
	if err != nil {
		return err
	}
	durable, err := f.cfg.Ledger.Append(t.Context(), signed.Draft)
	if err != nil {
		return err
	}
	var chain []*x509.Certificate
	for _, der := range durable[0].Chain() {
		chain = append(chain, parse(t, der))
	}
	leaf, record := chain[0], durable[0].Record()
	if len(chain) != 2 || record.GetAuthority().GetId() != authorityID(chain[1]) || record.GetAuthority().GetRole() != RoleIntermediate ||
		string(record.GetCertificate().GetSerial()) != string(leaf.SerialNumber.Bytes()) ||
		!record.GetCertificate().GetNotAfter().AsTime().Equal(leaf.NotAfter) || !signed.NotAfter.Equal(leaf.NotAfter) {
		t.Errorf("a chain of %d, and the record %v", len(chain), record)
	}
	return f.verify(time.Now(), chain...)
}

func TestLeaves(t *testing.T) {
	f, m, a := leavesAbove(t, upstream.Capabilities{})
	if roots, _ := f.Bundle(); len(roots) != 1 || !roots[0].Equal(a.Root) {
		t.Fatalf("%d roots", len(roots))
	}
	for _, authority := range f.Authorities() {
		if authority.Role == RoleIntermediate {
			t.Errorf("there is an intermediate: %+v", authority)
		}
	}
	own, err := f.ServerCertificate()
	if err != nil || len(own.Certificate) != 3 || own.Leaf.URIs[0].Path != ownPath {
		t.Errorf("own: %+v, %v", own, err)
	}
	if err := f.signLeaf(t); err != nil {
		t.Error(err)
	}
	if f.Concurrency() != leafConcurrency || !f.NamesInCSR() || m.Calls() != 3 { // for the root, for itself, and for the leaf
		t.Errorf("%d calls", m.Calls())
	}
	if warning, failure := f.Health(time.Now()); warning != nil || failure != nil {
		t.Errorf("%v, %v", warning, failure)
	}
	for _, r := range f.records(t) {
		if r.GetEvent() == ledgerv1.Event_EVENT_AUTHORITY && r.GetAuthority().GetRole() == RoleIntermediate {
			t.Errorf("an intermediate is recorded: %v", r)
		}
	}
}

// What is signed above is held against the entry; nothing else is passed on.
func TestLeavesRequests(t *testing.T) {
	f, m, _ := leavesAbove(t, upstream.Capabilities{MinTTL: 10 * time.Minute})
	key, before := newKey(t), m.Calls()
	otherKey := named(t, key, appNames)
	otherKey.Key = parseKey(t, newKey(t))
	// The names, and the wish to be a CA: in the bytes of crypto/x509, with a subject.
	extra := named(t, key, appNames)
	extra.CSR = csrOf(t, key, &x509.CertificateRequest{URIs: []*url.URL{id("/app").URL()}, DNSNames: appNames.DNS, ExtraExtensions: []pkix.Extension{
		{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}},
	}})
	short := named(t, key, appNames)
	short.TTL = time.Minute
	none := named(t, key, appNames)
	none.CSR = nil
	for name, c := range map[string]struct {
		request *Request
		reason  string
	}{
		"no request":      {none, ReasonCSR},
		"no names":        {named(t, key, pkcs10.Names{}), ReasonCSR},
		"another id":      {named(t, key, pkcs10.Names{URI: id("/admin").String(), DNS: appNames.DNS}), ReasonCSR},
		"more DNS names":  {named(t, key, pkcs10.Names{URI: appNames.URI, DNS: []string{"app.example.org", "admin.example.org"}}), ReasonCSR},
		"another key":     {otherKey, ReasonCSR},
		"more than names": {extra, ReasonCSR},
		"too short a ttl": {short, ReasonTTL},
	} {
		_, err := f.CA.Sign(t.Context(), time.Now(), c.request)
		if refused, ok := errors.AsType[*RequestError](err); !ok || refused.Reason != c.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
	if m.Calls() != before {
		t.Errorf("the upstream CA was asked %d times", m.Calls()-before)
	}
}

// An answer that is not what was asked for is not released, whatever is wrong with it.
func TestLeavesWrong(t *testing.T) {
	f, m, a := leavesAbove(t, upstream.Capabilities{})
	for _, b := range []upstreamtest.Behaviour{
		upstreamtest.LongLife, upstreamtest.WrongKey, upstreamtest.NotCA, upstreamtest.Expired, upstreamtest.NotYetValid, upstreamtest.OtherName,
		upstreamtest.MoreNames, upstreamtest.NoKeyUsage, upstreamtest.OtherUsage, upstreamtest.MissingChain, upstreamtest.NoRoot,
		upstreamtest.LongChain, upstreamtest.HugeAnswer, upstreamtest.Garbage,
	} {
		m.Become(a.Behaving(b), b)
		err := f.signLeaf(t)
		if _, ok := errors.AsType[*LaterError](err); !ok {
			t.Errorf("%s: %v", b, err)
		}
		if warning, _ := f.Health(time.Now()); warning == nil || !strings.Contains(warning.Error(), "has not signed the last one") {
			t.Errorf("%s: health: %v", b, warning)
		}
	}
	m.Become(a, upstreamtest.Good)
	if err := f.signLeaf(t); err != nil {
		t.Error(err)
	}
	if warning, failure := f.Health(time.Now()); warning != nil || failure != nil {
		t.Errorf("health: %v, %v", warning, failure)
	}
}

// More than the upstream CA signs in time wait, and the rest is told when to come back;
// all get theirs in the end, and it is never asked for more than it can.
func TestLeavesRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most, all = 10, 200
		f, m, _ := leavesAbove(t, upstream.Capabilities{LeafRate: most})
		begun, before := time.Now(), m.Calls()
		var done sync.WaitGroup
		for range all {
			done.Go(func() {
				for {
					began := time.Now()
					err := f.signLeaf(t)
					if err == nil {
						return
					}
					later, ok := errors.AsType[*LaterError](err)
					if !ok || later.After <= 0 || time.Since(began) > 2*leafWait {
						t.Errorf("after %s: %v", time.Since(began), err)
						return
					}
					time.Sleep(later.After)
				}
			})
		}
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for m.Calls()-before < all {
			<-ticker.C
			if n, limit := m.Calls()-before, int(time.Since(begun)/time.Second+2)*most; n > limit {
				t.Errorf("asked %d times in %s", n, time.Since(begun))
			}
		}
		done.Wait()
		if took := time.Since(begun); took > 3*all/most*time.Second {
			t.Errorf("it took %s", took)
		}
	})
}

// A limit of the upstream CA is kept for all, and denial and silence are told apart.
func TestLeavesFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, m, a := leavesAbove(t, upstream.Capabilities{})
		later := func() *LaterError {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := f.CA.Sign(ctx, time.Now(), named(t, newKey(t), appNames))
			e, ok := errors.AsType[*LaterError](err)
			if !ok {
				t.Fatalf("%v", err)
			}
			return e
		}
		m.Become(a, upstreamtest.Denied)
		if e := later(); e.After != deniedRetry || !errors.Is(e, upstream.ErrDenied) {
			t.Errorf("%+v", e)
		}
		m.Become(a, upstreamtest.Slow)
		if e := later(); !errors.Is(e, upstream.ErrUnavailable) {
			t.Errorf("%+v", e)
		}
		m.Become(a, upstreamtest.RateLimited)
		if e := later(); e.After != upstreamtest.RetryAfter {
			t.Errorf("%+v", e)
		}
		m.Become(a, upstreamtest.Good)
		before := m.Calls()
		if e := later(); e.After < upstreamtest.RetryAfter || m.Calls() != before {
			t.Errorf("it was asked before it wanted to be: %+v", e)
		}
		time.Sleep(upstreamtest.RetryAfter)
		if err := f.signLeaf(t); err != nil {
			t.Error(err)
		}
	})
}

// The CA's own X.509-SVID is renewed for days, through an outage; and another root above
// is used once it is in the bundle.
func TestLeavesOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, m, a := leavesAbove(t, upstream.Capabilities{})
		f.run(t)
		for day := range 5 {
			switch day {
			case 1:
				m.Become(a, upstreamtest.Gone)
			case 2:
				m.Become(a, upstreamtest.Good)
			case 3:
				a = upstreamtest.NewAuthority(t, upstreamtest.Good)
				m.Become(a, upstreamtest.Good)
				if err := f.signLeaf(t); err == nil {
					t.Error("a leaf below a root that is not in force was released")
				}
			}
			for range 24 {
				time.Sleep(time.Hour)
				own, err := f.ServerCertificate()
				if err != nil && day != 1 {
					t.Fatalf("day %d: %v", day, err)
				}
				if err := f.signLeaf(t); (err != nil) != (day == 1) {
					t.Errorf("day %d: %v", day, err)
				}
				if day == 4 && parse(t, own.Certificate[len(own.Certificate)-1]).Equal(a.Root) == false {
					t.Errorf("the CA shows itself with another root than %q", a.Root.Subject)
				}
			}
			if warning, _ := f.Health(time.Now()); (warning != nil) != (day == 1) {
				t.Errorf("day %d: %v", day, warning)
			}
		}
	})
}
