package sds

import (
	"testing"
	"testing/synctest"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

// TestSpec_S28_Withdrawal: what was delivered is replaced by an expired certificate for the
// same SPIFFE ID; in delta it is then removed as well. When the identity comes back
// it is served again.
func TestSpec_S28_Withdrawal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		x := a.SVID("/x")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, x)), Options{})
		id := x.ID.String()
		world, change := r.sotw(t.Context()), r.delta(t.Context())
		world.ask(nameDefault, nameRoot)
		m := world.next()
		world.ack(m, nameDefault, nameRoot)
		change.ask(id, nameRoot)
		d := change.next()
		change.ack(d)

		lost := &identity.Snapshot{Bundle: a.Bundle(1), Withdrawn: []spiffeid.ID{x.ID}, Denied: true}
		r.source.Publish(lost)
		m = world.next()
		stone := leafOf(t, secretsOf(t, m.GetResources())[nameDefault].GetTlsCertificate().GetCertificateChain().GetInlineBytes())
		if stone.URIs[0].String() != id || !stone.NotAfter.Before(time.Now()) {
			t.Errorf("got a certificate for %s until %s", stone.URIs[0], stone.NotAfter)
		}
		world.ack(m, nameDefault, nameRoot)
		d = change.next()
		if got := deltaContents(t, d); len(got) != 1 || got[id] != id || len(d.GetRemovedResources()) != 0 {
			t.Errorf("got %v, removed %v", got, d.GetRemovedResources())
		}
		change.ack(d)
		d = change.next()
		if diff := cmp.Diff([]string{id}, d.GetRemovedResources()); diff != "" || len(d.GetResources()) != 0 {
			t.Errorf("removed: %s, resources %d", diff, len(d.GetResources()))
		}
		change.ack(d)
		synctest.Wait()
		if n := r.value("meshid_agent_sds_tombstones_total"); n != 2 {
			t.Errorf("%v tombstones counted", n)
		}

		again := a.SVID("/x")
		r.source.Publish(a.Snapshot(1, again))
		for _, chain := range [][]byte{
			secretsOf(t, world.next().GetResources())[nameDefault].GetTlsCertificate().GetCertificateChain().GetInlineBytes(),
			secretsOf(t, deltaResources(change.next()))[id].GetTlsCertificate().GetCertificateChain().GetInlineBytes(),
		} {
			if !leafOf(t, chain).Equal(identitytest.X509(again.Chain[0])) {
				t.Error("the identity did not come back")
			}
		}

		// A proxy that comes back to another agent's life with what it had.
		r.source.Publish(lost)
		old := r.delta(t.Context())
		old.request(&discoveryv3.DeltaDiscoveryRequest{
			ResourceNamesSubscribe:  []string{nameDefault},
			InitialResourceVersions: map[string]string{nameDefault: "of-before"},
		})
		if got := deltaContents(t, old.next()); got[nameDefault] != id {
			t.Errorf("got %v", got)
		}
		// One that never had it gets nothing that looks like an identity.
		fresh := r.delta(t.Context())
		fresh.ask(id)
		if d := fresh.next(); len(d.GetResources()) != 0 || len(d.GetRemovedResources()) != 1 {
			t.Errorf("got %v", d)
		}
	})
}

// An identity that is merely missing, and not withdrawn, is left alone.
func TestMissingIsNotWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		c := r.sotw(t.Context())
		c.ask(nameDefault)
		c.ack(c.next(), nameDefault)
		synctest.Wait()
		sent := r.value("meshid_agent_sds_responses_total", "sotw")
		r.source.Publish(a.Snapshot(1))
		r.source.Publish(nil)
		synctest.Wait()
		if r.value("meshid_agent_sds_responses_total", "sotw") != sent {
			t.Error("something was sent")
		}
	})
}

// TestV_E3_WithdrawalAcknowledged: a snapshot counts as in force when the proxy has
// acknowledged all that it changes of certificates, in delta the removal as well; not
// when it was sent, and not when it was refused. A stream of trust bundles alone says
// that it carries none.
func TestV_E3_WithdrawalAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		x := a.SVID("/x")
		id := x.ID.String()
		first := a.Snapshot(1, x)
		source := identitytest.NewSource(first)
		r := newRig(t, source, Options{})
		want := func(step string, want ...identitytest.InForce) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(want, source.TakeInForce(), cmp.Comparer(func(a, b *identity.Snapshot) bool { return a == b })); diff != "" {
				t.Errorf("%s (-want +got)\n%s", step, diff)
			}
		}
		lost := func() *identity.Snapshot {
			return &identity.Snapshot{Bundle: first.Bundle, Withdrawn: []spiffeid.ID{x.ID}, Denied: true}
		}

		world := r.sotw(t.Context())
		world.ask(nameDefault, nameRoot)
		m := world.next()
		want("sent")
		world.ack(m, nameDefault, nameRoot)
		want("acknowledged", identitytest.InForce{Snapshot: first, Carries: true})
		gone := lost()
		source.Publish(gone)
		m = world.next()
		want("tombstone sent")
		world.nack(m, "", "no", nameDefault, nameRoot)
		want("tombstone refused")
		back := a.Snapshot(1, a.SVID("/x"))
		source.Publish(back)
		world.ack(world.next(), nameDefault, nameRoot)
		want("back", identitytest.InForce{Snapshot: back, Carries: true})

		bundles := r.sotw(t.Context())
		bundles.ask(nameRoot)
		bundles.ack(bundles.next(), nameRoot)
		want("bundle", identitytest.InForce{Snapshot: back})
		change := r.delta(t.Context())
		change.ask(id)
		change.ack(change.next())
		want("delta", identitytest.InForce{Snapshot: back, Carries: true})

		gone = lost()
		source.Publish(gone)
		want("nothing to change", identitytest.InForce{Snapshot: gone})
		world.ack(world.next(), nameDefault, nameRoot)
		want("tombstone in force", identitytest.InForce{Snapshot: gone, Carries: true})
		change.ack(change.next())
		d := change.next()
		want("tombstone in force, removal sent")
		change.ack(d)
		want("removal in force", identitytest.InForce{Snapshot: gone, Carries: true})
	})
}
