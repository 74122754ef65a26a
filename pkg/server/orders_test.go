package server

import (
	"fmt"
	"testing"
	"time"

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
