package agent

import (
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

// list is the revocation list of an intermediate.
func (a *authority) list(t testing.TB, change func(*x509.RevocationList)) *nodev1.RevocationList {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: a.cert.NotAfter.Add(time.Hour)}
	change(l)
	der, err := x509.CreateRevocationList(rand.Reader, l, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &nodev1.RevocationList{Issuer: a.cert.Raw, List: der}
}

func good(*x509.RevocationList) {}

// A list that would have anybody refused makes the whole bundle refused.
func TestV_L3_BadListIsRefused(t *testing.T) {
	root := newAuthority(t, "root", nil)
	one, two, stranger := newAuthority(t, "one", root), newAuthority(t, "two", root), newAuthority(t, "three", newAuthority(t, "root", nil))
	swapped := &nodev1.RevocationList{Issuer: one.cert.Raw, List: two.list(t, good).List}
	for name, tt := range map[string]struct {
		lists []*nodev1.RevocationList
		want  string
	}{
		"none":          {nil, ""},
		"good":          {[]*nodev1.RevocationList{one.list(t, good), two.list(t, good)}, ""},
		"twice":         {[]*nodev1.RevocationList{one.list(t, good), one.list(t, good)}, "revocation list 1 of the bundle: another one has its issuer"},
		"expired":       {[]*nodev1.RevocationList{one.list(t, func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(-time.Second) })}, "an outage would have everybody refused"},
		"before issuer": {[]*nodev1.RevocationList{one.list(t, func(l *x509.RevocationList) { l.NextUpdate = one.cert.NotAfter.Add(-time.Second) })}, "an outage would have everybody refused"},
		"not yet":       {[]*nodev1.RevocationList{one.list(t, func(l *x509.RevocationList) { l.ThisUpdate = time.Now().Add(time.Hour) })}, "is good from"},
		"of another":    {[]*nodev1.RevocationList{swapped}, "names another issuer"},
		"bad signature": {[]*nodev1.RevocationList{{Issuer: one.cert.Raw, List: tampered(one.list(t, good).List)}}, "its signature"},
		"other root":    {[]*nodev1.RevocationList{stranger.list(t, good)}, "chains to no root"},
		"garbage":       {[]*nodev1.RevocationList{{Issuer: one.cert.Raw, List: []byte("x")}}, "revocation list 0 of the bundle"},
		"no issuer":     {[]*nodev1.RevocationList{{List: one.list(t, good).List}}, "its issuer"},
		"too many":      {make([]*nodev1.RevocationList, maxLists+1), "at most 1000"},
		"too large":     {[]*nodev1.RevocationList{{Issuer: one.cert.Raw, List: make([]byte, maxListBytes)}}, "more than"},
	} {
		b, err := parseBundle(testTD, &nodev1.Bundle{TrustDomain: testTD.Name(), Sequence: 1, Roots: [][]byte{root.cert.Raw}, RevocationLists: tt.lists})
		switch {
		case (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want):
			t.Errorf("%s: %v", name, err)
		case err == nil && len(b.Lists) != len(tt.lists):
			t.Errorf("%s: %d lists", name, len(b.Lists))
		}
	}
}

// tampered returns DER whose last byte, of a signature, is another one.
func tampered(der []byte) []byte {
	other := append([]byte(nil), der...)
	other[len(other)-1] ^= 1
	return other
}

// Lists reach the workloads, and a sealed cache keeps them; a bundle with a bad one, and
// an X.509-SVID of an issuer without one, change nothing.
func TestV_L2_ListsOutliveTheAgent(t *testing.T) {
	data, with := sealing(t)
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		ca.lists = []*nodev1.RevocationList{ca.intermediate.list(t, good)}
		h := newHarness(t, ca, data, with)
		h.start()
		settleDown()
		ca.apply(uidEntry("a", "/a", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		before := mustHave(t, w, "/a")
		inForce := func(b *identity.Bundle, want *nodev1.RevocationList) {
			t.Helper()
			if len(b.Lists) != 1 || string(b.Lists[0].List) != string(want.GetList()) {
				t.Fatalf("%d lists", len(b.Lists))
			}
		}
		inForce(before.Bundle, ca.lists[0])
		push := func(lists ...*nodev1.RevocationList) {
			ca.mu.Lock()
			ca.sequence++
			ca.lists = lists
			ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Bundle{Bundle: ca.bundle()}})
			ca.mu.Unlock()
			settleDown()
		}
		last := ca.lists[0]
		push(ca.intermediate.list(t, func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(time.Hour) }))
		inForce(w.Snapshot().Bundle, last)
		if c := h.condition(condBundle); c.Severity != health.Error {
			t.Errorf("condition: %+v", c)
		}
		last = ca.intermediate.list(t, func(l *x509.RevocationList) {
			l.Number = big.NewInt(2)
			l.RevokedCertificateEntries = []x509.RevocationListEntry{{SerialNumber: big.NewInt(7), RevocationTime: time.Now()}}
		})
		push(last)
		inForce(w.Snapshot().Bundle, last)
		if c := h.condition(condBundle); c.Severity == health.Error {
			t.Errorf("condition: %+v", c)
		}
		// An intermediate that nobody knows a list of.
		ca.mu.Lock()
		ca.intermediate = newAuthority(t, "intermediate 2", ca.root)
		serial := mustHave(t, w, "/a").SVIDs[0].Chain[0].SerialNumber
		ca.push(&nodev1.SyncResponse{Message: &nodev1.SyncResponse_Rotate{Rotate: &nodev1.Rotate{Sequence: 1}}})
		ca.mu.Unlock()
		settleDown()
		time.Sleep(time.Minute)
		settleDown()
		if mustHave(t, w, "/a").SVIDs[0].Chain[0].SerialNumber.Cmp(serial) != 0 {
			t.Error("what others would refuse is in use")
		}
		time.Sleep(2 * time.Second)
		h.stop()
		ca.net.set(true)
		h = newHarness(t, ca, data, with)
		h.start()
		defer h.stop()
		settleDown()
		w = h.subscribe(2, 1000)
		settleDown()
		inForce(mustHave(t, w, "/a").Bundle, last)
	})
}
