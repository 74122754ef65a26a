// Package attesttest answers "does this attestation method keep the contract of
// package attest?" for the tests of methods. It knows no method: it runs the two
// halves of one against each other, and each against a hostile peer.
package attesttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/attest"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// NodeConfig describes a node attestation method to Node.
type NodeConfig struct {
	// Pair returns both halves, made for each other: the verifier accepts the
	// attester, in the state before the first attestation.
	Pair func(t *testing.T) (attest.NodeAttester, attest.NodeVerifier)
	// Want is what the verifier establishes, if it is always the same; nil is
	// not compared.
	Want *attributesv1.Node
	// Bound methods are refused if the evidence was made for another key.
	Bound bool
	// Once methods are refused the second time, whoever comes.
	Once bool
}

// binding returns a binding as the CA would compute it.
func binding(name string) []byte {
	sum := sha256.Sum256([]byte(name))
	return sum[:]
}

// transcript is what went over the wire in one attestation.
type transcript struct {
	evidence   []byte
	challenges [][]byte
	responses  [][]byte
}

// attempt runs one attestation. change may alter what the agent sends.
func attempt(ctx context.Context, a attest.NodeAttester, v attest.NodeVerifier, made, claimed []byte, change func(step int, b []byte) []byte) (*attributesv1.Node, *transcript, error) {
	if change == nil {
		change = func(_ int, b []byte) []byte { return b }
	}
	tr := &transcript{}
	evidence, err := a.Evidence(ctx, made)
	if err != nil {
		return nil, tr, err
	}
	tr.evidence = evidence
	node, err := v.Verify(ctx, attest.Claim{Evidence: change(0, bytes.Clone(evidence)), Binding: claimed},
		func(ctx context.Context, challenge []byte) ([]byte, error) {
			tr.challenges = append(tr.challenges, challenge)
			r, err := a.Respond(ctx, made, challenge)
			if err != nil {
				return nil, err
			}
			tr.responses = append(tr.responses, r)
			return change(len(tr.responses), bytes.Clone(r)), nil
		})
	return node, tr, err
}

// refused fails unless the verifier refused.
func refused(t *testing.T, node *attributesv1.Node, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("verified as %v, want a refusal", node)
		return
	}
	if node != nil {
		t.Errorf("returned a node with the error %v", err)
	}
	if !errors.Is(err, attest.ErrRefused) {
		t.Errorf("error %v does not wrap attest.ErrRefused", err)
	}
}

// Node checks both halves of a node attestation method.
func Node(t *testing.T, c NodeConfig) {
	t.Run("Accepts", func(t *testing.T) { nodeAccepts(t, c) })
	t.Run("Altered", func(t *testing.T) { nodeAltered(t, c) })
	t.Run("Evidence", func(t *testing.T) { nodeEvidence(t, c) })
	t.Run("Binding", func(t *testing.T) { nodeBinding(t, c) })
	t.Run("Replay", func(t *testing.T) { nodeReplay(t, c) })
	t.Run("Concurrent", func(t *testing.T) { nodeConcurrent(t, c) })
	t.Run("ChallengeFails", func(t *testing.T) { nodeChallengeFails(t, c) })
	t.Run("HostileCA", func(t *testing.T) { nodeHostileCA(t, c) })
}

func nodeAccepts(t *testing.T, c NodeConfig) {
	a, v := c.Pair(t)
	if a.Method() == "" || a.Method() != v.Method() {
		t.Fatalf("methods of the halves: %q and %q", a.Method(), v.Method())
	}
	node, _, err := attempt(t.Context(), a, v, binding("key"), binding("key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if node.GetMethod() != v.Method() || node.GetId() == "" {
		t.Errorf("node has method %q and id %q", node.GetMethod(), node.GetId())
	}
	if c.Want != nil {
		if diff := cmp.Diff(c.Want, node, protocmp.Transform()); diff != "" {
			t.Errorf("node (-want +got):\n%s", diff)
		}
	}
	again, _, err := attempt(t.Context(), a, v, binding("key"), binding("key"), nil)
	if c.Once {
		refused(t, again, err)
		return
	}
	if err != nil {
		t.Fatalf("the second time: %v", err)
	}
	if diff := cmp.Diff(node, again, protocmp.Transform()); diff != "" {
		t.Errorf("the second time, it is another node:\n%s", diff)
	}
}

// nodeAltered alters each message in many ways.
func nodeAltered(t *testing.T, c NodeConfig) {
	a, v := c.Pair(t)
	_, tr, err := attempt(t.Context(), a, v, binding("key"), binding("key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for step := range 1 + len(tr.responses) {
		for name, alter := range alterations() {
			a, v := c.Pair(t)
			node, _, err := attempt(t.Context(), a, v, binding("key"), binding("key"), func(s int, b []byte) []byte {
				if s != step {
					return b
				}
				return alter(b)
			})
			t.Run(fmt.Sprintf("message %d/%s", step, name), func(t *testing.T) { refused(t, node, err) })
		}
	}
}

// alterations are ways to spoil a message.
func alterations() map[string]func([]byte) []byte {
	return map[string]func([]byte) []byte{
		"empty":      func([]byte) []byte { return nil },
		"one byte":   func(b []byte) []byte { return b[:1] },
		"half":       func(b []byte) []byte { return b[:len(b)/2] },
		"last byte":  func(b []byte) []byte { return b[:len(b)-1] },
		"longer":     func(b []byte) []byte { return append(b, 0) },
		"twice":      func(b []byte) []byte { return append(b, b...) },
		"version 0":  func(b []byte) []byte { b[0] = 0; return b },
		"version 2":  func(b []byte) []byte { b[0] = 2; return b },
		"first bit":  func(b []byte) []byte { b[1] ^= 0x80; return b },
		"middle bit": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"last bit":   func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"zeros":      func(b []byte) []byte { clear(b[1:]); return b },
		"1 MiB":      func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) },
		"other":      func([]byte) []byte { return []byte("\x01\x30\x80\x00\x00") },
	}
}

// nodeEvidence cuts the evidence at a hundred places.
func nodeEvidence(t *testing.T, c NodeConfig) {
	a, v := c.Pair(t)
	evidence, err := a.Evidence(t.Context(), binding("key"))
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(evidence); n += 1 + len(evidence)/100 {
		node, err := v.Verify(t.Context(), attest.Claim{Evidence: evidence[:n], Binding: binding("key")},
			func(context.Context, []byte) ([]byte, error) { return []byte{1}, nil })
		refused(t, node, err)
	}
}

// nodeBinding has the key exchanged on the way.
func nodeBinding(t *testing.T, c NodeConfig) {
	if !c.Bound {
		t.Skip("the method cannot bind its evidence to a key")
	}
	for name, claimed := range map[string][]byte{
		"other": binding("mallory's key"),
		"empty": nil,
		"short": binding("key")[:31],
		"long":  append(binding("key"), 0),
	} {
		t.Run(name, func(t *testing.T) {
			a, v := c.Pair(t)
			node, _, err := attempt(t.Context(), a, v, binding("key"), claimed, nil)
			refused(t, node, err)
		})
	}
}

// nodeReplay sends what was sent before, to the same verifier.
func nodeReplay(t *testing.T, c NodeConfig) {
	a, v := c.Pair(t)
	_, tr, err := attempt(t.Context(), a, v, binding("key"), binding("key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !c.Once && len(tr.challenges) == 0 {
		t.Fatal("a method that can be used again asks no challenge: its evidence can be replayed")
	}
	n := 0
	node, err := v.Verify(t.Context(), attest.Claim{Evidence: tr.evidence, Binding: binding("key")},
		func(_ context.Context, challenge []byte) ([]byte, error) {
			for _, old := range tr.challenges {
				if bytes.Equal(old, challenge) {
					t.Error("the same challenge was asked twice")
				}
			}
			if n == len(tr.responses) {
				return nil, errors.New("no more responses")
			}
			n++
			return tr.responses[n-1], nil
		})
	refused(t, node, err)
}

// nodeConcurrent attests many times at once with one verifier.
func nodeConcurrent(t *testing.T, c NodeConfig) {
	a, v := c.Pair(t)
	evidence, err := a.Evidence(t.Context(), binding("key"))
	if err != nil {
		t.Fatal(err)
	}
	var verified atomic.Int32
	var mu sync.Mutex // guards a
	var wg sync.WaitGroup
	const n = 20
	for range n {
		wg.Go(func() {
			_, err := v.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: binding("key")},
				func(ctx context.Context, challenge []byte) ([]byte, error) {
					mu.Lock()
					defer mu.Unlock()
					if _, err := a.Evidence(ctx, binding("key")); err != nil {
						return nil, err
					}
					return a.Respond(ctx, binding("key"), challenge)
				})
			if err == nil {
				verified.Add(1)
			}
		})
	}
	wg.Wait()
	want := int32(n)
	if c.Once {
		want = 1
	}
	if got := verified.Load(); got != want {
		t.Errorf("%d of %d attempts succeeded, want %d", got, n, want)
	}
}

// nodeChallengeFails loses the agent in the middle: that is no refusal, and is
// reported as what it is.
func nodeChallengeFails(t *testing.T, c NodeConfig) {
	lost := errors.New("stream lost")
	a, v := c.Pair(t)
	evidence, err := a.Evidence(t.Context(), binding("key"))
	if err != nil {
		t.Fatal(err)
	}
	asked := false
	_, err = v.Verify(t.Context(), attest.Claim{Evidence: evidence, Binding: binding("key")},
		func(context.Context, []byte) ([]byte, error) { asked = true; return nil, lost })
	if asked && (!errors.Is(err, lost) || errors.Is(err, attest.ErrRefused)) {
		t.Errorf("error %v, want one that wraps the challenge's", err)
	}
}

// nodeHostileCA sends the agent what is not a challenge.
func nodeHostileCA(t *testing.T, c NodeConfig) {
	for name, challenge := range map[string][]byte{
		"empty":     nil,
		"version":   {1},
		"garbage":   []byte("sign this, please"),
		"too short": make([]byte, 32),
		"too long":  append([]byte{1}, make([]byte, 64)...),
		"huge":      make([]byte, 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := c.Pair(t)
			if _, err := a.Evidence(t.Context(), binding("key")); err != nil {
				t.Fatal(err)
			}
			if r, err := a.Respond(t.Context(), binding("key"), challenge); err == nil {
				t.Errorf("answered with %d bytes", len(r))
			}
		})
	}
	t.Run("wrong order", func(t *testing.T) {
		a, _ := c.Pair(t)
		if r, err := a.Respond(t.Context(), binding("key"), append([]byte{1}, make([]byte, 32)...)); err == nil {
			t.Errorf("answered a challenge before evidence was asked for with %d bytes", len(r))
		}
	})
}
