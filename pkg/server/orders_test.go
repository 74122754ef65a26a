package server

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"
)

func TestMissedOrders(t *testing.T) {
	start := time.Unix(1_000_000, 0)
	var o orders
	if r := o.missed(start, start, 0); r != nil {
		t.Errorf("an order out of nothing: %v", r)
	}
	first := o.add(start, "a", time.Second)
	second := o.add(start, "a", time.Minute) // at the same instant
	if second.GetSequence() <= first.GetSequence() {
		t.Fatal("sequences do not grow")
	}
	attested := start.Add(-time.Hour)
	check := func(what string, now, attested time.Time, carriedOut uint64, want string) {
		t.Helper()
		r := o.missed(now, attested, carriedOut)
		got := "none"
		if r != nil {
			got = fmt.Sprintf("%q in %v", r.GetAuthority(), r.GetWithin().AsDuration())
		}
		if got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	check("nothing heard of", start, attested, 0, `"a" in 1m0s`)
	check("the first was heard of", start, attested, first.GetSequence(), `"a" in 1m0s`)
	check("all was heard of", start, attested, second.GetSequence(), "none")
	check("attested since", start, start.Add(time.Second), 0, "none")
	check("long ago", start.Add(maxOrderAge+time.Second), attested, 0, "none")
	o.add(start.Add(time.Second), "b", 2*time.Second)
	check("two authorities are all", start, attested, 0, `"" in 2s`)
	check("only the newer one", start, attested, second.GetSequence(), `"b" in 2s`)
	for i := range 3 * maxOrders {
		o.add(start.Add(time.Minute), fmt.Sprint(i), time.Second)
	}
	if len(o.list) != maxOrders {
		t.Errorf("%d orders are remembered", len(o.list))
	}
	check("what was forgotten is included", start.Add(time.Minute), attested, 0, `"" in 1s`)
}

// An order that is given while a node has no stream reaches it when it is back,
// once: what it has carried out is not sent again.
func TestMissedOrdersAreSent(t *testing.T) {
	h := newHouse(t)
	a := h.join("n1", nil)
	admin, ctx := h.admin()
	if r, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{}); err != nil || r.GetNodes() != 0 {
		t.Fatal(r, err)
	}
	rotate := func(hello *nodev1.Hello) *nodev1.Rotate {
		s := a.sync(hello)
		for {
			m := s.next()
			if r := m.GetRotate(); r != nil {
				return r
			}
			if m.GetInspect() != nil {
				return nil
			}
			// Whatever else is to be sent comes before the answer to a question.
			go func() {
				_, _ = admin.Explain(ctx, &adminv1.ExplainRequest{
					Node: &adminv1.ExplainRequest_NodeId{NodeId: a.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 1},
				})
			}()
		}
	}
	first := rotate(&nodev1.Hello{})
	if first.GetAuthority() != "" || first.GetSequence() == 0 {
		t.Fatalf("order is %v", first)
	}
	if r := rotate(&nodev1.Hello{Rotated: first.GetSequence()}); r != nil {
		t.Errorf("the order came again: %v", r)
	}
}

// Orders: renewals and inspections.
func TestOrders(t *testing.T) {
	h := newHouse(t)
	h.apply(shopEntry("web"))
	a := h.join("n1", nil)
	s := a.sync(&nodev1.Hello{})
	s.next()
	admin, ctx := h.admin()
	var old string
	for _, authority := range h.ca.Authorities() {
		if authority.Role == "intermediate" {
			old = authority.ID
		}
	}
	rotated, err := admin.RotateIntermediate(ctx, &adminv1.RotateIntermediateRequest{Within: durationOf(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	if r := s.next().GetRotate(); r.GetAuthority() != old || r.GetWithin().AsDuration() != time.Minute || rotated.GetAuthority().GetId() == old {
		t.Errorf("order is %v, the new authority %v", r, rotated.GetAuthority().GetId())
	}
	renewed, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{})
	if err != nil || renewed.GetNodes() != 1 {
		t.Fatal(renewed, err)
	}
	if r := s.next().GetRotate(); r == nil || r.GetAuthority() != "" {
		t.Errorf("order is %v", r)
	}
	if _, err := admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{Within: durationOf(-1)}); err == nil {
		t.Error("negative time")
	}

	type answer struct {
		resp *adminv1.ExplainResponse
		err  error
	}
	for name, tt := range map[string]struct {
		inspected *nodev1.Inspected
		want      codes.Code
	}{
		"attested": {&nodev1.Inspected{Workload: workload("web"), Instance: "docker:1"}, codes.OK},
		"gone":     {&nodev1.Inspected{Error: "no such process"}, codes.FailedPrecondition},
		"too much": {&nodev1.Inspected{Instance: strings.Repeat("x", 1000)}, codes.FailedPrecondition},
	} {
		got := make(chan answer, 1)
		go func() {
			resp, err := admin.Explain(ctx, &adminv1.ExplainRequest{
				Node: &adminv1.ExplainRequest_NodeId{NodeId: a.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 42},
			})
			got <- answer{resp, err}
		}()
		i := s.next().GetInspect()
		if i.GetPid() != 42 {
			t.Fatalf("inspect is %v", i)
		}
		// An answer to what was not asked is nobody's.
		s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Inspected{Inspected: &nodev1.Inspected{Request: i.GetRequest() + 1000, Error: "x"}}})
		tt.inspected.Request = i.GetRequest()
		s.send(&nodev1.SyncRequest{Message: &nodev1.SyncRequest_Inspected{Inspected: tt.inspected}})
		r := <-got
		if c := statusOf2(r.err); c != tt.want {
			t.Errorf("%s: %v", name, r.err)
		}
		if tt.want == codes.OK && (r.resp.GetInstance() != "docker:1" || !r.resp.GetVerdicts()[0].GetMatches()) {
			t.Errorf("%s: %v", name, r.resp)
		}
	}
	// A node that is not connected, and one that goes away while it is asked.
	b := h.join("n2", nil)
	_, err = admin.Explain(ctx, &adminv1.ExplainRequest{Node: &adminv1.ExplainRequest_NodeId{NodeId: b.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 1}})
	if statusOf2(err) != codes.FailedPrecondition {
		t.Errorf("not connected: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		got <- second(admin.Explain(ctx, &adminv1.ExplainRequest{Node: &adminv1.ExplainRequest_NodeId{NodeId: a.id}, Target: &adminv1.ExplainRequest_Pid{Pid: 1}}))
	}()
	s.next()
	s.stream.CloseSend()
	if err := <-got; statusOf2(err) != codes.Unavailable {
		t.Errorf("left: %v", err)
	}
}

func statusOf2(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	return statusOf(err, "").Code()
}

// Orders that meet before they are sent are one.
func TestOrdersMerge(t *testing.T) {
	for _, tt := range []struct {
		orders []string
		want   string
	}{
		{[]string{"a"}, "a"}, {[]string{"a", "a"}, "a"}, {[]string{"a", "b"}, ""}, {[]string{"", "a"}, ""}, {[]string{"a", ""}, ""},
	} {
		s := &session{wake: make(chan struct{}, 1)}
		for _, authority := range tt.orders {
			s.order(&nodev1.Rotate{Authority: authority})
		}
		r, _, _ := s.takeOrders()
		if r.GetAuthority() != tt.want {
			t.Errorf("%v: %q", tt.orders, r.GetAuthority())
		}
		if r, _, _ := s.takeOrders(); r != nil {
			t.Errorf("%v: sent twice", tt.orders)
		}
	}
}
