package sds

import (
	"context"
	"fmt"
	"maps"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// Each protocol serves all names, freely combined.
func TestSpec_S07_Names(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "b.test")
		x, y := a.SVID("/x"), a.SVID("/y")
		snapshot := a.Snapshot(1, x, y)
		snapshot.Federated = map[spiffeid.TrustDomain]*identity.Bundle{b.TrustDomain: b.Bundle(1)}
		r := newRig(t, identitytest.NewSource(snapshot), Options{})
		names := []string{
			"default", "ROOTCA", "ALL", "spiffe://a.test/x", "spiffe://a.test/y", "spiffe://a.test", "spiffe://b.test",
			"spiffe://c.test", "spiffe://a.test/other", "other",
		}
		check := func(got map[string]string) {
			t.Helper()
			want := map[string]string{
				"default": "spiffe://a.test/x", "spiffe://a.test/x": "spiffe://a.test/x", "spiffe://a.test/y": "spiffe://a.test/y",
				"ROOTCA": "a.test", "spiffe://a.test": "a.test", "spiffe://b.test": "b.test", "ALL": "a.test b.test",
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		}
		for _, open := range []func(context.Context) *sotw{r.sotw, r.adsSotw} {
			c := open(t.Context())
			c.ask(names...)
			check(contents(t, c.next()))
		}
		for _, open := range []func(context.Context) *delta{r.delta, r.adsDelta} {
			c := open(t.Context())
			c.ask(names...)
			m := c.next()
			check(deltaContents(t, m))
			if diff := cmp.Diff([]string{"other", "spiffe://a.test/other", "spiffe://c.test"}, m.GetRemovedResources()); diff != "" {
				t.Error(diff)
			}
			for _, res := range m.GetResources() {
				if res.GetVersion() == "" {
					t.Errorf("%s has no version", res.GetName())
				}
			}
		}
		m, err := secretv3.NewSecretDiscoveryServiceClient(r.conn).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: names})
		if err != nil {
			t.Fatal(err)
		}
		check(contents(t, m))
		if r.source.Opened() != 5 {
			t.Errorf("subscribed %d times for 5 streams", r.source.Opened())
		}
	})
}

// TestSpec_S14_UnauthorisedNames: another's SPIFFE ID is never answered with a secret, on any
// of the protocols, and it is counted.
func TestSpec_S14_UnauthorisedNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		foreign := "spiffe://a.test/admin"
		for _, open := range []func(context.Context) *sotw{r.sotw, r.adsSotw} {
			c := open(t.Context())
			c.ask(foreign, nameDefault)
			m := c.next()
			if diff := cmp.Diff(map[string]string{nameDefault: "spiffe://a.test/x"}, contents(t, m)); diff != "" {
				t.Error(diff)
			}
		}
		for _, open := range []func(context.Context) *delta{r.delta, r.adsDelta} {
			c := open(t.Context())
			c.ask(foreign)
			m := c.next()
			if len(m.GetResources()) != 0 || len(m.GetRemovedResources()) != 1 {
				t.Errorf("answered with %v", m)
			}
		}
		synctest.Wait()
		if n := r.value("meshid_agent_sds_unknown_names_total"); n != 4 {
			t.Errorf("%v counted", n)
		}
	})
}

// TestV_H5_NamesNotOwned: ten thousand names, of others and of nobody, with control bytes: the
// caller's own secrets come, the stream stays, and nothing else comes.
func TestV_H5_NamesNotOwned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		names := []string{nameDefault, nameRoot}
		for i := range 5000 {
			names = append(names, fmt.Sprintf("spiffe://a.test/other/%d", i), fmt.Sprintf("bad\x01\x7f\n%d", i))
		}
		c := r.sotw(t.Context())
		c.ask(names...)
		m := c.next()
		if diff := cmp.Diff(map[string]string{nameDefault: "spiffe://a.test/x", nameRoot: "a.test"}, contents(t, m)); diff != "" {
			t.Error(diff)
		}
		c.ack(m, names...)
		r.source.Publish(a.Snapshot(1, a.SVID("/x")))
		if len(contents(t, c.next())) != 2 {
			t.Error("the stream does not go on")
		}
		d := r.delta(t.Context())
		d.ask(names...)
		removed := 0
		for got := map[string]string{}; len(got) < 2; {
			m := d.next()
			maps.Copy(got, deltaContents(t, m))
			removed += len(m.GetRemovedResources())
			d.ack(m)
		}
		if removed == 0 || removed > 4096 {
			t.Errorf("%d names answered as removed", removed)
		}
		synctest.Wait()
		if r.value("meshid_agent_sds_surplus_names_total") == 0 {
			t.Error("surplus names not counted")
		}
	})
}
