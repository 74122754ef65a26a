package sds

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/test/identitytest"
)

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

// gate is a source that has everybody wait.
type gate struct {
	Source
	open chan struct{}
}

func (g gate) Subscribe(ctx context.Context, p *peer.Peer) (*identity.Watch, error) {
	select {
	case <-g.open:
		return g.Source.Subscribe(ctx, p)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// What a proxy says is read, and what it says of itself dropped, however long it takes
// to find out who it is: more of it than HTTP/2's windows hold does not have it wait.
func TestRequestsDoNotWaitForTheSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := identitytest.NewAuthority(t, "a.test")
		r := newRig(t, identitytest.NewSource(a.Snapshot(1, a.SVID("/x"))), Options{})
		g := gate{r.source, make(chan struct{})}
		r.server.source = g
		c := r.sotw(t.Context())
		for range 5 {
			c.request(&discoveryv3.DiscoveryRequest{
				TypeUrl: TypeURL, ResourceNames: []string{nameDefault}, Node: &corev3.Node{Id: strings.Repeat("x", 60<<10)},
			})
		}
		close(g.open)
		c.next()
		left, cancel := context.WithCancel(t.Context())
		r.server.source = gate{r.source, nil}
		gone := r.sotw(left)
		gone.ask(nameDefault)
		synctest.Wait()
		cancel() // while it waits
		if _, err := gone.Recv(); status.Code(err) != codes.Canceled {
			t.Errorf("left with %v", err)
		}
		synctest.Wait()
		if n := r.value("meshid_agent_sds_streams", "sotw"); n != 1 {
			t.Errorf("%v streams", n)
		}
	})
}
