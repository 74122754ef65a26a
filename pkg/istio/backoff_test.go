package istio

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// A client that fails and comes again at once is answered without being read, and its
// records are few; it is served as soon as it is right.
func TestStorm(t *testing.T) {
	m := newMesh(t)
	bad := m.client("bad")
	for range 200 {
		_, err := bad.call("")
		wantCode(t, "a bad token", err, codes.Unauthenticated)
	}
	if n := m.tokens.count(); n > 100 {
		t.Errorf("a bad token was verified %d times of 200", n)
	}
	var overload int
	for i := range 3 * strikeBurst {
		_, err := m.client(fmt.Sprintf("bad-%d", i)).call("")
		if status.Code(err) == codes.ResourceExhausted {
			overload++
		}
	}
	if overload == 0 {
		t.Error("one address may show as many bad tokens as it likes")
	}
	if n := len(m.records()); n > 100 {
		t.Errorf("%d records of refusals", n)
	}
}

// The same for a client that may not have what it asks for: until an entry says so.
func TestStormOfDenied(t *testing.T) {
	m := newMesh(t)
	denied := m.client(m.run("kube-system/dns", "dns-1", "n1"))
	before := len(m.records())
	for range 100 {
		_, err := denied.call("")
		wantCode(t, "no entry", err, codes.PermissionDenied)
	}
	if n := len(m.records()) - before; n != 1 {
		t.Errorf("%d records of one refusal", n)
	}
	m.apply(&entryv1.Entry{
		Name: "dns", SpiffeId: "spiffe://example.org/ns/{k8s.namespace}/sa/{k8s.service_account}",
		Nodes: `node.method == "istio"`, Workloads: `has(k8s.pod_uid) && k8s.namespace == "kube-system"`,
	})
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := denied.call("")
		if err == nil {
			break
		}
		if wantCode(t, "not served yet", err, codes.PermissionDenied); time.Now().After(deadline) {
			t.Fatal("it is not served although there is an entry now")
		}
	}
}

// A workload that is served and asks again and again cannot fill the ledger, nor take its
// neighbours' place.
func TestStormOfServed(t *testing.T) {
	m := newMesh(t)
	greedy, neighbour := m.client(m.run("shop/web", "web-1", "n1")), m.client(m.run("shop/cart", "cart-1", "n1"))
	before, asked := len(m.records()), 8*issueBurst
	began := time.Now()
	for range asked {
		if _, err := greedy.call(""); err != nil {
			wantCode(t, "too many", err, codes.FailedPrecondition)
		}
	}
	most := issueBurst + 1 + int(issueRate*time.Since(began).Seconds())
	if n := len(m.records()) - before; n < issueBurst || n > most {
		t.Errorf("%d records of %d requests, at most %d are allowed", n, asked, most)
	}
	if _, err := neighbour.call(""); err != nil {
		t.Errorf("a neighbour is not served: %v", err)
	}
	proxy := m.run("istio-system/ztunnel", "ztunnel-1", "n1")
	for _, id := range []string{"spiffe://example.org/ns/shop/sa/web", "spiffe://example.org/ns/shop/sa/cart"} {
		if _, err := m.client(proxy).call(id); err != nil {
			t.Errorf("their node's proxy is not served with %s: %v", id, err)
		}
	}
}

// The memory of refusals ends in time, and with a success.
func TestPauses(t *testing.T) {
	r := newRefusals()
	key := hashOf("x")
	refused := &refusal{code: codes.Unauthenticated, text: "no", record: "x"}
	if err := r.check(key); err != nil {
		t.Fatal(err)
	}
	r.note(key, refused)
	p, _ := r.pauses.get(key)
	if p.length != firstPause {
		t.Errorf("the first pause is %v", p.length)
	}
	var again *refusal
	if err := r.check(key); !errors.As(err, &again) || !again.again || again.record != "" {
		t.Errorf("the answer is %v", err)
	}
	r.note(key, refused) // came at the same time
	if p.length != firstPause {
		t.Errorf("the pause was doubled: %v", p.length)
	}
	for range 20 {
		p.until = time.Now()
		r.note(key, refused)
	}
	if p.length != longestPause {
		t.Errorf("the longest pause is %v", p.length)
	}
	r.forget(key)
	if err := r.check(key); err != nil {
		t.Error(err)
	}
}

// What is remembered is bounded, and what is used stays.
func TestRecent(t *testing.T) {
	r := newRecent[int, int](8)
	for i := range 1000 {
		r.put(i, i)
		if _, ok := r.get(0); !ok {
			t.Fatalf("what is used was forgotten after %d", i)
		}
		if n := len(r.newer) + len(r.older); n > 8 {
			t.Fatalf("%d are remembered", n)
		}
	}
	if _, ok := r.get(1); ok {
		t.Error("what was not used is remembered")
	}
}
