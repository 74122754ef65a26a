package sds

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

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

// TestSpec_S11_HeldUntilThereIsAnIdentity: no error, no answer, and then at once.
func TestSpec_S11_HeldUntilThereIsAnIdentity(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	for name, before := range map[string]*identity.Snapshot{
		"nothing known":       nil,
		"identity on its way": {Bundle: &identity.Bundle{TrustDomain: a.TrustDomain}},
		"no entry":            {Bundle: &identity.Bundle{TrustDomain: a.TrustDomain}, Denied: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := identitytest.NewAuthority(t, "a.test")
				r := newRig(t, identitytest.NewSource(before), Options{})
				world, change := r.sotw(t.Context()), r.delta(t.Context())
				world.ask(nameDefault)
				change.ask(nameDefault)
				got := make(chan string, 2)
				go func() { got <- contents(t, world.next())[nameDefault] }()
				go func() { got <- deltaContents(t, change.next())[nameDefault] }()
				time.Sleep(time.Hour) // in the bubble's time
				synctest.Wait()
				if len(got) > 0 {
					t.Fatalf("answered with %q", <-got)
				}
				if n := r.value("meshid_agent_sds_held_streams"); n != 2 {
					t.Errorf("%v streams counted as held", n)
				}
				start := time.Now()
				r.source.Publish(a.Snapshot(1, a.SVID("/x")))
				for range 2 {
					if id := <-got; id != "spiffe://a.test/x" {
						t.Errorf("got %q", id)
					}
				}
				if took := time.Since(start); took != 0 {
					t.Errorf("took %s although nothing had to be waited for", took)
				}
				synctest.Wait()
				if n := r.value("meshid_agent_sds_held_streams"); n != 0 {
					t.Errorf("%v streams still counted as held", n)
				}
			})
		})
	}
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

// TestV_H7_NACK: a refusal is counted by reason and reported, the refused version is
// not sent again, the next change is.
func TestV_H7_NACK(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		world, change := r.sotw(t.Context()), r.delta(t.Context())
		world.ask(nameDefault)
		m := world.next()
		world.nack(m, "", "Failed to load private key from <inline>, Cause: error:0b000074:X.509 certificate routines:OPENSSL_internal:KEY_VALUES_MISMATCH", nameDefault)
		change.ask(nameDefault)
		d := change.next()
		change.nack(d, "Failed to load certificate chain from <inline>")
		synctest.Wait()
		for _, reason := range []string{"key", "certificate"} {
			if n := r.value("meshid_agent_sds_nacks_total", reason); n != 1 {
				t.Errorf("%s: %v", reason, n)
			}
		}
		if n := r.value("meshid_agent_sds_rejecting_streams"); n != 2 {
			t.Errorf("%v streams rejecting", n)
		}
		if len(r.problems) != 1 || r.problems[0] == conditionRejected+": " {
			t.Errorf("reported %q", r.problems)
		}
		sent := r.value("meshid_agent_sds_responses_total", "sotw") + r.value("meshid_agent_sds_responses_total", "delta")
		time.Sleep(time.Hour)
		r.source.Publish(r.source.Latest())
		synctest.Wait()
		if now := r.value("meshid_agent_sds_responses_total", "sotw") + r.value("meshid_agent_sds_responses_total", "delta"); now != sent {
			t.Errorf("%v responses without a change", now-sent)
		}
		r.source.Publish(a.Snapshot(1, a.SVID("/x")))
		m, d = world.next(), change.next()
		world.ack(m, nameDefault)
		change.ack(d)
		synctest.Wait()
		if n := r.value("meshid_agent_sds_rejecting_streams"); n != 0 {
			t.Errorf("%v streams rejecting", n)
		}
		if last := r.problems[len(r.problems)-1]; last != conditionRejected+": " {
			t.Errorf("reported %q in the end", last)
		}
	})
}

func TestClassify(t *testing.T) {
	for text, want := range map[string]rejection{
		"Failed to load private key from <inline>":                                   rejectedKey,
		"KEY_VALUES_MISMATCH":                                                        rejectedKey,
		"Failed to load incomplete private key":                                      rejectedKey,
		"Failed to load certificate chain from <inline>":                             rejectedCertificate,
		"SAN-based verification of peer certificates without trusted CA is insecure": rejectedValidation,
		"no trust bundle":                                                            rejectedValidation,
		"":                                                                           rejectedOther,
		"boom":                                                                       rejectedOther,
	} {
		if got := classify(text); got != want {
			t.Errorf("%q is %s, want %s", text, got, want)
		}
	}
}

// TestV_H9_NodeIsNotBelieved: what a proxy says that it is has no effect, and is not
// even decoded.
func TestV_H9_NodeIsNotBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		var answers []map[string]string
		for _, id := range []string{"", "spiffe://a.test/admin", "sidecar~10.0.0.1~admin.default~default.svc.cluster.local"} {
			c := r.sotw(t.Context())
			node := &corev3.Node{Id: id, Cluster: id, Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
				"spiffe_id": structpb.NewStringValue("spiffe://a.test/admin"),
			}}}
			c.request(&discoveryv3.DiscoveryRequest{
				Node: node, TypeUrl: TypeURL, ResourceNames: []string{nameDefault, "spiffe://a.test/admin"},
			})
			answers = append(answers, contents(t, c.next()))
		}
		for _, got := range answers {
			if diff := cmp.Diff(map[string]string{nameDefault: "spiffe://a.test/x"}, got); diff != "" {
				t.Error(diff)
			}
		}
	})
	node := &corev3.Node{Id: "x"}
	for range 516 {
		node.Extensions = append(node.Extensions, &corev3.Extension{Name: strings.Repeat("e", 60), TypeUrls: []string{strings.Repeat("t", 50)}})
	}
	for _, m := range []proto.Message{
		&discoveryv3.DiscoveryRequest{Node: node, VersionInfo: "v", ResourceNames: []string{"a", "b"}, ResponseNonce: "n"},
		&discoveryv3.DeltaDiscoveryRequest{Node: node, ResourceNamesSubscribe: []string{"a"}, ResponseNonce: "n"},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got := m.ProtoReflect().New().Interface()
		var parts mem.BufferSlice // as it comes, in frames
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 16<<10)
			parts = append(parts, mem.SliceBuffer(rest[:n]))
			rest = rest[n:]
		}
		if err := newCodec().Unmarshal(parts, got); err != nil {
			t.Fatal(err)
		}
		switch want := m.(type) {
		case *discoveryv3.DiscoveryRequest:
			want.Node = nil
		case *discoveryv3.DeltaDiscoveryRequest:
			want.Node = nil
		}
		if !proto.Equal(m, got) {
			t.Errorf("got %v, want %v", got, m)
		}
	}
	for _, bad := range [][]byte{{0x12, 0xff}, {0x07}, {0x12}} {
		if err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(bad)}, &discoveryv3.DiscoveryRequest{}); err == nil {
			t.Errorf("%x was decoded", bad)
		}
	}
}

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

// At most one response is unanswered; what changes meanwhile is one push, the latest.
func TestSpec_S21_Coalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		c := r.sotw(t.Context())
		c.ask(nameDefault)
		m := c.next()
		var last *identity.SVID
		for range 100 {
			last = a.SVID("/x")
			r.source.Publish(a.Snapshot(1, last))
			synctest.Wait()
		}
		if n := r.value("meshid_agent_sds_responses_total", "sotw"); n != 1 {
			t.Errorf("%v responses sent without an answer to the first", n)
		}
		if n := r.value("meshid_agent_sds_unacknowledged_streams"); n != 1 {
			t.Errorf("%v streams without an answer", n)
		}
		c.ack(m, nameDefault)
		m = c.next()
		if got := leafOf(t, secretsOf(t, m.GetResources())[nameDefault].GetTlsCertificate().GetCertificateChain().GetInlineBytes()); !got.Equal(identitytest.X509(last.Chain[0])) {
			t.Error("not the latest")
		}
		c.ack(m, nameDefault)
		synctest.Wait()
		if n := r.value("meshid_agent_sds_responses_total", "sotw"); n != 2 {
			t.Errorf("%v responses", n)
		}
	})
}

// The producer hears when the proxy has put a bundle into force, also when the proxy
// has it from before.
func TestSpec_S23_BundleAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, next := identitytest.NewAuthority(t, "a.test"), identitytest.NewAuthority(t, "a.test")
		x := a.SVID("/x")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, x)), Options{})
		c := r.sotw(t.Context())
		c.ask(nameRoot, nameDefault)
		m := c.next()
		synctest.Wait()
		if got := r.source.Acknowledged(); len(got) != 0 {
			t.Fatalf("acknowledged %v before the proxy has", got)
		}
		c.ack(m, nameRoot, nameDefault)
		synctest.Wait()
		if diff := cmp.Diff([]uint64{1}, r.source.Acknowledged()); diff != "" {
			t.Error(diff)
		}
		r.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{x}, Bundle: a.Bundle(2, next)})
		m = c.next()
		c.nack(m, "", "no", nameRoot, nameDefault)
		synctest.Wait()
		if diff := cmp.Diff([]uint64{1}, r.source.Acknowledged()); diff != "" {
			t.Error(diff)
		}
		r.source.Publish(&identity.Snapshot{SVIDs: []*identity.SVID{x}, Bundle: a.Bundle(3)})
		m = c.next()
		c.ack(m, nameRoot, nameDefault)
		synctest.Wait()
		if diff := cmp.Diff([]uint64{1, 3}, r.source.Acknowledged()); diff != "" {
			t.Error(diff)
		}
		// A stream of the same proxy later.
		again := r.sotw(t.Context())
		again.request(&discoveryv3.DiscoveryRequest{ResourceNames: []string{nameRoot, nameDefault}, VersionInfo: m.GetVersionInfo()})
		synctest.Wait()
		if diff := cmp.Diff([]uint64{1, 3, 3}, r.source.Acknowledged()); diff != "" {
			t.Error(diff)
		}
		if n := r.value("meshid_agent_sds_responses_total", "sotw"); n != 3 {
			t.Errorf("%v responses: what the proxy has was sent again", n)
		}
	})
}

// A certificate that is not valid yet is sent as soon as it is.
func TestNotYetValidIsSentInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		start := time.Now()
		x := a.SVID("/x", func(c *x509.Certificate) { c.NotBefore = start.Add(10 * time.Second) })
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, x)), Options{})
		c := r.sotw(t.Context())
		c.ask(nameDefault)
		c.next()
		if took := time.Since(start); took < 9*time.Second || took > 11*time.Second {
			t.Errorf("sent after %s", took)
		}
		if r.value("meshid_agent_sds_withheld_secrets_total", "not_yet_valid") == 0 {
			t.Error("not counted")
		}
	})
}

// TestSpec_S15_NoStateOfTheBundleFailsOpen: without a usable bundle nothing is sent under a root's name,
// whatever is wrong with it.
func TestSpec_S15_NoStateOfTheBundleFailsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		leaf := identitytest.X509(a.SVID("/x").Chain[0])
		r := newRig(t, identitytest.NewSource(nil), Options{})
		c := r.sotw(t.Context())
		c.ask(nameRoot, nameAll, "spiffe://a.test")
		for _, b := range []*identity.Bundle{
			{TrustDomain: a.TrustDomain},
			{TrustDomain: a.TrustDomain, Roots: []*x509.Certificate{leaf}},
			{TrustDomain: a.TrustDomain, Roots: []*x509.Certificate{nil}},
			{Roots: []*x509.Certificate{a.Cert}},
			nil,
		} {
			r.source.Publish(&identity.Snapshot{Bundle: b})
			synctest.Wait()
			if n := r.value("meshid_agent_sds_responses_total", "sotw"); n != 0 {
				t.Fatalf("something was sent for %+v", b)
			}
		}
		r.source.Publish(a.Snapshot(1))
		if diff := cmp.Diff(map[string]string{nameRoot: "a.test", nameAll: "a.test", "spiffe://a.test": "a.test"}, contents(t, c.next())); diff != "" {
			t.Error(diff)
		}
	})
}

// Why streams end, and with which code.
func TestStreamEnds(t *testing.T) {
	other := "type.googleapis.com/envoy.config.listener.v3.Listener"
	for _, tc := range []struct {
		name string
		do   func(r *rig, c *sotw)
		want codes.Code
	}{
		{"the source gives up", func(r *rig, c *sotw) { c.ask(nameDefault); c.next(); r.source.End(errors.New("x")) }, codes.Unavailable},
		{"the process has ended", func(r *rig, c *sotw) {
			c.ask(nameDefault)
			c.next()
			_ = r.peer.Close()
			c.ask(nameRoot) // by another process, which holds the connection
		}, codes.Unavailable},
		{"the agent stops", func(r *rig, c *sotw) { c.ask(nameDefault); c.next(); r.server.Close() }, codes.Unavailable},
		{"another type", func(_ *rig, c *sotw) { c.request(&discoveryv3.DiscoveryRequest{TypeUrl: other}) }, codes.InvalidArgument},
		{"another type later", func(_ *rig, c *sotw) {
			c.ask(nameDefault)
			c.next()
			c.request(&discoveryv3.DiscoveryRequest{TypeUrl: other})
		}, codes.InvalidArgument},
		{"silence", func(*rig, *sotw) {}, codes.DeadlineExceeded},
		{"the client is done", func(_ *rig, c *sotw) { c.ask(nameDefault); c.next(); _ = c.CloseSend() }, codes.OK},
		{"too much at once", func(_ *rig, c *sotw) { c.ask(strings.Repeat("x", maxRequestBytes)) }, codes.ResourceExhausted},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := identitytest.NewAuthority(t, "a.test")
				r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
				c := r.sotw(t.Context())
				tc.do(r, c)
				if _, err := c.Recv(); statusOf(err) != tc.want {
					t.Errorf("ended with %v, want %s", err, tc.want)
				}
				synctest.Wait()
				if n := r.source.Open(); n != 0 {
					t.Errorf("%d of %d watches are open", n, r.source.Opened())
				}
				if n := r.value("meshid_agent_sds_streams", "sotw"); n != 0 {
					t.Errorf("%v streams", n)
				}
			})
		})
	}
}

func statusOf(err error) codes.Code {
	if errors.Is(err, io.EOF) {
		return codes.OK
	}
	return status.Code(err)
}

// On an aggregated stream each request says its type.
func TestAggregatedNeedsTheType(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		c := r.adsSotw(t.Context())
		c.request(&discoveryv3.DiscoveryRequest{ResourceNames: []string{nameDefault}})
		if _, err := c.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
		d := r.sotw(t.Context())
		d.request(&discoveryv3.DiscoveryRequest{ResourceNames: []string{nameDefault}})
		d.next()
	})
}

// What the source says when it cannot serve.
func TestSubscribeErrors(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{errors.New("docker hangs"), codes.Unavailable},
		{context.Canceled, codes.Unavailable},
		{status.Error(codes.InvalidArgument, "internal"), codes.Unavailable},
		{fmt.Errorf("admit: %w", status.Error(codes.ResourceExhausted, "full")), codes.ResourceExhausted},
		{status.Error(codes.PermissionDenied, "no"), codes.PermissionDenied},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, identitytest.Refusing(tc.err), Options{})
			c := r.sotw(t.Context())
			_, err := c.Recv()
			if status.Code(err) != tc.want {
				t.Errorf("%v: got %v", tc.err, err)
			}
			if strings.Contains(fmt.Sprint(err), "docker") {
				t.Errorf("the proxy was told about the inside: %v", err)
			}
			if _, err := secretv3.NewSecretDiscoveryServiceClient(r.conn).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{}); status.Code(err) != tc.want {
				t.Errorf("%v: fetch got %v", tc.err, err)
			}
		})
	}
}

// TestV_H10_KeysOnlyToKnownPeers: over a connection whose process the kernel has not named,
// there is nothing to be had.
func TestV_H10_KeysOnlyToKnownPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		for _, err := range []error{
			r.server.serve(&noStream{ctx: t.Context()}, protocolSotW),
			second(r.server.fetch(t.Context(), &discoveryv3.DiscoveryRequest{})),
		} {
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("got %v", err)
			}
		}
		if r.source.Opened() != 0 {
			t.Error("the source was asked")
		}
	})
}

func second(_ any, err error) error { return err }

// noStream is a stream of a connection without peer.
type noStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // it is what a stream is
}

func (n *noStream) Context() context.Context { return n.ctx }

// Streams are bounded, in all and for each user; a stream that ends makes room.
func TestV_I1_StreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{MaxStreams: 5, MaxStreamsPerUID: 3})
		var open []*sotw
		for range 3 {
			c := r.sotw(t.Context())
			c.ask(nameDefault)
			c.next()
			open = append(open, c)
		}
		refused := r.sotw(t.Context())
		if _, err := refused.Recv(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
		// Another user still has room, until the whole is full.
		var release []func()
		for uid := range uint32(2) {
			f, err := r.server.admit(uid)
			if err != nil {
				t.Fatal(err)
			}
			release = append(release, f)
		}
		if _, err := r.server.admit(7); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
		for _, f := range release {
			f()
		}
		if err := open[0].CloseSend(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c := r.sotw(t.Context())
		c.ask(nameDefault)
		c.next()
		if len(r.server.perUID) != 1 {
			t.Errorf("%d users remembered", len(r.server.perUID))
		}
		r.server.Close()
		if _, err := r.server.admit(7); status.Code(err) != codes.Unavailable {
			t.Errorf("after Close: %v", err)
		}
	})
}

// TestV_I3_OversizedHeaders: a client that sends a megabyte of metadata is refused, others
// are served.
func TestV_I3_OversizedHeaders(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("y", 1<<20))
	client := secretv3.NewSecretDiscoveryServiceClient(r.conn)
	if c, err := client.StreamSecrets(ctx); err == nil {
		if _, err = c.Recv(); err == nil {
			t.Error("accepted")
		}
	}
	c := r.sotw(t.Context())
	c.ask(nameDefault)
	c.next()
}

// TestV_I6_NoGoroutineIsLeft: however streams end, nothing of them stays.
func TestV_I6_NoGoroutineIsLeft(t *testing.T) {
	a := identitytest.NewAuthority(t, "a.test")
	source := identitytest.NewSource(a.Snapshot(1, a.SVID("/x")))
	r := newRig(t, source, Options{})
	c := r.sotw(t.Context())
	c.ask(nameDefault)
	c.next()
	base := runtime.NumGoroutine()
	ends := []func(*sotw, context.CancelFunc){
		func(_ *sotw, cancel context.CancelFunc) { cancel() },
		func(c *sotw, cancel context.CancelFunc) {
			c.ask(nameDefault)
			c.next()
			cancel()
		},
		func(c *sotw, cancel context.CancelFunc) {
			c.ask(nameDefault)
			c.next()
			if err := c.CloseSend(); err != nil {
				t.Error(err)
			}
			_, _ = c.Recv()
			cancel()
		},
		func(c *sotw, cancel context.CancelFunc) {
			c.request(&discoveryv3.DiscoveryRequest{TypeUrl: "x"})
			_, _ = c.Recv()
			cancel()
		},
	}
	for i := range 1000 {
		ctx, cancel := context.WithCancel(t.Context())
		ends[i%len(ends)](r.sotw(ctx), cancel)
	}
	left := func() bool {
		return runtime.NumGoroutine() > base+2 || r.value("meshid_agent_sds_streams", "sotw") != 1
	}
	for deadline := time.Now().Add(time.Minute); left(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before; %v streams are counted", runtime.NumGoroutine(), base, r.value("meshid_agent_sds_streams", "sotw"))
		}
	}
}

// A fetch waits for an identity, within its bound.
func TestFetchWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(nil), Options{})
		client := secretv3.NewSecretDiscoveryServiceClient(r.conn)
		request := &discoveryv3.DiscoveryRequest{ResourceNames: []string{nameDefault}}
		start := time.Now()
		if _, err := client.FetchSecrets(t.Context(), request); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took != fetchWithin {
			t.Errorf("took %s", took)
		}
		time.AfterFunc(time.Second, func() { r.source.Publish(a.Snapshot(1, a.SVID("/x"))) })
		m, err := client.FetchSecrets(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		if contents(t, m)[nameDefault] != "spiffe://a.test/x" {
			t.Error("not the identity")
		}
		if _, err := client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{TypeUrl: "x"}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v", err)
		}
	})
}

// TestFault_F53_HostileAnswers: a client that answers nothing, or with wrong nonces, gets no more than
// others and holds nobody up.
func TestFault_F53_HostileAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		hostile, good := r.sotw(t.Context()), r.sotw(t.Context())
		hostile.ask(nameDefault)
		hostile.next()
		good.ask(nameDefault)
		m := good.next()
		for i := range 1000 {
			hostile.request(&discoveryv3.DiscoveryRequest{
				TypeUrl: TypeURL, ResourceNames: []string{nameDefault}, ResponseNonce: fmt.Sprint(i + 2),
			})
		}
		good.ack(m, nameDefault)
		r.source.Publish(a.Snapshot(1, a.SVID("/x")))
		good.next()
		synctest.Wait()
		if n := r.value("meshid_agent_sds_responses_total", "sotw"); n != 3 {
			t.Errorf("%v responses", n)
		}
	})
}

func TestNew_NeedsASource(t *testing.T) {
	if _, err := New(nil, Options{}); err == nil {
		t.Error("made without a source")
	}
	reg := newRig(t, identitytest.NewSource(nil), Options{}).reg
	if _, err := New(identitytest.NewSource(nil), Options{Registerer: reg}); err == nil {
		t.Error("made with metrics that are registered already")
	}
}

func (r *rig) adsDelta(ctx context.Context) *delta {
	r.t.Helper()
	c, err := discoveryv3.NewAggregatedDiscoveryServiceClient(r.conn).DeltaAggregatedResources(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return &delta{r.t, c}
}

// contents says what stands under each name: a SPIFFE ID, or trust domains.
func contents(t testing.TB, m *discoveryv3.DiscoveryResponse) map[string]string {
	t.Helper()
	return describe(t, secretsOf(t, m.GetResources()))
}

func deltaContents(t testing.TB, m *discoveryv3.DeltaDiscoveryResponse) map[string]string {
	t.Helper()
	all := secretsOf(t, deltaResources(m))
	for _, r := range m.GetResources() {
		if all[r.GetName()] == nil {
			t.Errorf("resource %q has another name inside", r.GetName())
		}
	}
	return describe(t, all)
}

func leafOf(t testing.TB, chain []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(chain)
	if block == nil {
		t.Fatal("no certificate")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
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
