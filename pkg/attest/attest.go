// Package attest asks the two questions that every identity rests on: which
// machine is this, and which process is asking? It declares the interfaces that
// the methods implement. It knows no method, no network and no rule: what is
// established here is judged elsewhere.
package attest

import (
	"context"
	"errors"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"

	"github.com/meshid/meshid/pkg/attest/peer"
)

// ErrRefused is wrapped by a Verifier's error when the evidence was understood
// and is not good enough: trying again with the same evidence is useless.
var ErrRefused = errors.New("attestation refused")

// NodeAttester is the agent's half of a node attestation method. Both calls are
// for one attempt and are not made concurrently.
type NodeAttester interface {
	// Method names the method, such as "x509pop".
	Method() string
	// Evidence returns what the CA reads first. binding is the SHA-256 of the
	// public key (SubjectPublicKeyInfo, DER) that is to be certified: evidence
	// that can be bound to it is.
	Evidence(ctx context.Context, binding []byte) ([]byte, error)
	// Respond answers one challenge of the CA, bound in the same way.
	Respond(ctx context.Context, binding, challenge []byte) ([]byte, error)
}

// NodeVerifier is the CA's half. It is called concurrently and treats all that
// it is sent as hostile.
type NodeVerifier interface {
	Method() string
	// Verify establishes the node from evidence, asking challenges as it
	// needs. A refusal wraps ErrRefused. Whatever can be used once is used up
	// when Verify has succeeded.
	Verify(ctx context.Context, claim Claim, challenge Challenge) (*attributesv1.Node, error)
}

// Claim is what an agent sends first.
type Claim struct {
	Evidence []byte
	// Binding is the SHA-256 of the public key that the agent proved to hold
	// and wants certified. The caller computed it.
	Binding []byte
}

// Challenge sends one challenge to the agent and returns its answer.
type Challenge func(ctx context.Context, challenge []byte) (response []byte, err error)

// ErrNotMine is returned by a WorkloadAttestor that has nothing to say about a
// process, such as docker for a process that is in no container.
var ErrNotMine = errors.New("process is not of this attestor's kind")

// WorkloadAttestor establishes facts about one process. It is called
// concurrently.
type WorkloadAttestor interface {
	// Name names the attestor, such as "unix".
	Name() string
	// Attest returns the facts about the peer, ErrNotMine, or an error if the
	// facts cannot be had now: the workload then gets nothing, never less.
	Attest(ctx context.Context, p *peer.Peer) (*Facts, error)
}

// Facts are what one attestor established.
type Facts struct {
	// Workload has only the attestor's own field set.
	Workload *attributesv1.Workload
	// Instance names what a key belongs to: "docker:<container id>" for a
	// container. Of several attestors, the one with the higher Rank names it.
	Instance string
	Rank     int
}

// Ranks of instances, see Facts.
const (
	RankProcess   = 10 // uid, gid and executable
	RankContainer = 30
)

// InstanceWatcher is a WorkloadAttestor that also hears of instances starting
// and ending, so that SVIDs are ready before they are asked for, and keys are
// dropped when they are not needed any more.
type InstanceWatcher interface {
	// Watch calls event, from one goroutine, for each instance that is there
	// and then for each change, until ctx ends. It reconnects by itself, and
	// after each reconnect it reports what has changed meanwhile: an instance
	// is reported as ended only on positive knowledge, never because the
	// runtime cannot be reached.
	Watch(ctx context.Context, event func(InstanceEvent)) error
}

// InstanceEvent says that an instance is there, or has ended.
type InstanceEvent struct {
	Instance string
	Ended    bool
	// Workload are the facts that are known without a process; nil if Ended.
	Workload *attributesv1.Workload
}
