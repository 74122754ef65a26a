package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Limits of an attestation. Whoever attests is unknown until the end of it.
const (
	attestTimeout     = 10 * time.Second
	maxAttestRounds   = 8
	maxEvidenceBytes  = 64 << 10
	maxVersionBytes   = 64
	maxNodeAttributes = 16 << 10
)

// Attest implements nodev1.NodeServiceServer.
func (n *nodeService) Attest(stream grpc.BidiStreamingServer[nodev1.AttestRequest, nodev1.AttestResponse]) error {
	c, err := callerOf(stream.Context())
	if err != nil {
		return err
	}
	release, ok := n.s.attests.Take(host(c.address))
	if !ok {
		n.s.metrics.attestations.WithLabelValues(n.s.methodLabel(""), "overload").Inc()
		return fail(kindOverload, "too many attestations at the same time: try again", nil)
	}
	defer release()
	ctx, cancel := context.WithTimeout(stream.Context(), attestTimeout)
	defer cancel()
	a := &attestation{s: n.s, c: c, stream: stream}
	identity, err := a.run(ctx)
	n.s.metrics.attesting.WithLabelValues(n.s.methodLabel(a.method)).Observe(time.Since(c.began).Seconds())
	n.s.metrics.attestations.WithLabelValues(n.s.methodLabel(a.method), outcomeOf(err)).Inc()
	if err != nil {
		return err
	}
	return stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Identity{Identity: identity}})
}

// methodLabel keeps the metric's label a closed set.
func (s *Server) methodLabel(method string) string {
	if _, known := s.verifiers[method]; known {
		return method
	}
	return "unknown"
}

func outcomeOf(err error) string {
	var f *failure
	switch {
	case err == nil:
		return "success"
	case errors.As(err, &f) && (f.kind == kindDenied || f.kind == kindInvalid):
		return "refused"
	default:
		return "error"
	}
}

// attestation is one attempt of an unknown caller.
type attestation struct {
	s      *Server
	c      *caller
	stream grpc.BidiStreamingServer[nodev1.AttestRequest, nodev1.AttestResponse]
	method string
	rounds int
	// evidence is the SHA-256 of what was sent, token that of the join token in
	// it; nil if there was none.
	evidence, token []byte
}

// tokenEvidence is a verifier whose evidence is a token that can be used once.
type tokenEvidence interface {
	// TokenSHA256 returns the SHA-256 of the token in the evidence, and false if
	// there is none in it.
	TokenSHA256(evidence []byte) (sum [32]byte, ok bool)
}

func (a *attestation) run(ctx context.Context) (*nodev1.AgentIdentity, error) {
	if err := a.s.checkClock(); err != nil { // before a token is used up
		return nil, err
	}
	first, err := a.receive(ctx)
	if err != nil {
		return nil, err
	}
	start := first.GetStart()
	if start == nil {
		return nil, fail(kindInvalid, "the first message must be start", nil)
	}
	a.method = start.GetMethod()
	verifier, ok := a.s.verifiers[a.method]
	if !ok {
		cause := errors.New("the method has no legal name")
		if word(a.method) {
			cause = fmt.Errorf("method %q", a.method)
		}
		return nil, a.refused(ctx, nil, reasonMethod, kindInvalid, "this CA does not use the attestation method", cause)
	}
	if len(start.GetEvidence()) > maxEvidenceBytes || !legalVersion(start.GetAgentVersion()) {
		return nil, a.refused(ctx, nil, reasonLimit, kindInvalid, "the evidence is too long, or the agent's version no short line of ASCII", nil)
	}
	evidence := sha256.Sum256(start.GetEvidence())
	a.evidence = evidence[:]
	// The proof of possession is cheap, and what follows is bound to the key.
	key, err := ca.ParseCSR(start.GetCsr())
	if err != nil {
		return nil, a.refused(ctx, nil, reasonCSR, kindInvalid, truncate(err.Error()), err)
	}
	if v, ok := verifier.(tokenEvidence); ok {
		if sum, ok := v.TokenSHA256(start.GetEvidence()); ok {
			a.token = sum[:]
		}
	}
	binding := key.Hash()
	node, err := verifier.Verify(ctx, attest.Claim{Evidence: start.GetEvidence(), Binding: binding[:]}, a.challenge)
	switch {
	case errors.Is(err, attest.ErrRefused):
		return nil, a.refused(ctx, nil, reasonAttestation, kindDenied,
			"attestation refused: the CA's ledger says why", err)
	case err != nil && ctx.Err() != nil:
		return nil, a.refused(ctx, nil, reasonUnavailable, kindUnavailable, "the attestation took too long", nil)
	case err != nil:
		return nil, a.refused(ctx, nil, reasonUnavailable, kindUnavailable, "the attestation cannot be verified now: try again", err)
	}
	if node.GetMethod() != a.method || proto.Size(node) > maxNodeAttributes {
		return nil, a.refused(ctx, nil, reasonAttestation, kindDenied, "attestation refused: the CA's ledger says why",
			fmt.Errorf("verifier established a node of method %q with %d bytes of attributes", node.GetMethod(), proto.Size(node)))
	}
	if err := a.claimToken(ctx, node); err != nil {
		return nil, a.refused(ctx, nil, reasonAttestation, kindDenied, "attestation refused: the CA's ledger says why", err)
	}
	return a.admit(ctx, node, key, start)
}

// receive returns the agent's next message. Recv itself knows no deadline: it
// ends when the handler has returned.
func (a *attestation) receive(ctx context.Context) (*nodev1.AttestRequest, error) {
	type received struct {
		msg *nodev1.AttestRequest
		err error
	}
	ch := make(chan received, 1)
	if !a.s.tasks.start(func() {
		msg, err := a.stream.Recv()
		ch <- received{msg, err}
	}) {
		return nil, fail(kindUnavailable, "the CA is shutting down", nil)
	}
	select {
	case r := <-ch:
		return r.msg, r.err
	case <-ctx.Done():
		return nil, fail(kindUnavailable, "the attestation took too long", ctx.Err())
	}
}

// challenge is what a verifier asks with.
func (a *attestation) challenge(ctx context.Context, challenge []byte) ([]byte, error) {
	if a.rounds++; a.rounds > maxAttestRounds {
		return nil, fmt.Errorf("more than %d challenges: %w", maxAttestRounds, attest.ErrRefused)
	}
	err := a.stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Challenge{Challenge: challenge}})
	if err != nil {
		return nil, fmt.Errorf("send challenge: %w", err)
	}
	msg, err := a.receive(ctx)
	if err != nil {
		return nil, fmt.Errorf("receive response: %w", err)
	}
	step, ok := msg.GetStep().(*nodev1.AttestRequest_Response)
	if !ok || len(step.Response) > maxEvidenceBytes {
		return nil, fmt.Errorf("the answer to a challenge must be a response of at most %d bytes: %w", maxEvidenceBytes, attest.ErrRefused)
	}
	return step.Response, nil
}

// named has the agent make a CSR with the name that it did not know before, for the key
// that was attested. The names in it are looked at where it is used.
func (a *attestation) named(ctx context.Context, id string, key *ca.PublicKey) ([]byte, error) {
	if err := a.stream.Send(&nodev1.AttestResponse{Step: &nodev1.AttestResponse_Name{Name: id}}); err != nil {
		return nil, fmt.Errorf("send the node's name: %w", err)
	}
	msg, err := a.receive(ctx)
	if err != nil {
		return nil, fmt.Errorf("receive a CSR with the node's name: %w", err)
	}
	csr := msg.GetResponse()
	again, err := ca.ParseCSR(csr)
	if err == nil && again.Hash() != key.Hash() {
		err = errors.New("the CSR with the node's name is for another key")
	}
	return csr, err
}

// refused records that an attestation was refused. ref is nil while the node is
// not known; it is then counted for the address that it came from.
func (a *attestation) refused(ctx context.Context, ref *ledgerv1.NodeRef, reason string, k kind, text string, cause error) error {
	r := a.record(ledgerv1.Event_EVENT_ATTEST)
	r.Outcome, r.Reason, r.Detail = outcomeFor(reason), reason, text
	if cause != nil {
		r.Detail = truncate(cause.Error())
	}
	source, foreign := host(a.c.address), true
	if ref != nil {
		source, foreign = ref.GetId(), false
	} else {
		ref = &ledgerv1.NodeRef{Address: a.c.address, Attributes: &attributesv1.Node{Method: a.s.methodLabel(a.method)}}
	}
	r.Node = ref
	a.s.metrics.refused.WithLabelValues(reason).Inc()
	records := []*ledgerv1.Record{r}
	if a.token != nil {
		used := a.record(ledgerv1.Event_EVENT_TOKEN_USED)
		used.Outcome, used.Reason, used.Detail, used.Node = r.GetOutcome(), r.GetReason(), r.GetDetail(), r.GetNode()
		records = append(records, used)
	}
	a.s.refuse(ctx, source, foreign, records...)
	return fail(k, text, cause)
}

// record returns a record of this attestation.
func (a *attestation) record(event ledgerv1.Event) *ledgerv1.Record {
	r := a.s.newRecord(a.c, event)
	r.VerifiedBy, r.EvidenceSha256, r.TokenSha256 = "ca", a.evidence, a.token
	return r
}

// admit gives a node that was attested its X.509-SVID. Whatever the node had
// before is worth nothing from then on.
func (a *attestation) admit(ctx context.Context, attributes *attributesv1.Node, key *ca.PublicKey, start *nodev1.AttestStart) (*nodev1.AgentIdentity, error) {
	s, version := a.s, start.GetAgentVersion()
	id, err := identity.NodeID(s.cfg.TrustDomain, attributes.GetMethod(), attributes.GetId())
	if err != nil {
		return nil, a.refused(ctx, nil, reasonAttestation, kindDenied, "attestation refused: the CA's ledger says why", err)
	}
	csr := start.GetCsr()
	if s.cfg.CA.NamesInCSR() {
		if csr, err = a.named(ctx, id.String(), key); err != nil {
			return nil, a.refused(ctx, nil, reasonCSR, kindInvalid, "the answer to the node's name must be a CSR that has it: is this agent older than the CA?", err)
		}
	}
	defer s.lockNode(id.String())()
	before, known := s.registry.Node(id.String())
	ref := &ledgerv1.NodeRef{Id: id.String(), Address: a.c.address, AgentVersion: version, Attributes: attributes}
	sum := key.Hash()
	if q, ok := s.registry.Quarantines().Of(id.String(), sum[:], nil); ok {
		return nil, a.refused(ctx, ref, reasonQuarantined, kindDenied, "the node's identity or key is quarantined", errors.New(q.Name()+" is quarantined: "+q.Reason))
	}
	if known && before.State == registry.Banned {
		return nil, a.refused(ctx, ref, reasonBanned, kindDenied, "the node is banned", nil)
	}
	r := a.record(ledgerv1.Event_EVENT_ATTEST)
	r.Node, r.Kind = ref, ledgerv1.Kind_KIND_FIRST
	if known {
		r.PreviousSerial = before.Serial
	}
	var used []*ledgerv1.Record
	if a.token != nil {
		u := a.record(ledgerv1.Event_EVENT_TOKEN_USED)
		u.Node = ref
		used = append(used, u)
	}
	signed, durable, err := s.signAgent(ctx, id.String(), key, csr, r, used...)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	node := &registry.Node{
		ID: id.String(), Attributes: attributes, State: registry.Active, AttestedAt: now,
		Serial: signed.Serial, NotAfter: signed.NotAfter,
		AgentVersion: version, Address: a.c.address, LastSeen: now,
	}
	if err := s.putNodes(ctx, node); err != nil {
		return nil, err
	}
	// A stream of the node that was there before ends; it would go on with
	// attributes that may no longer be true.
	s.hub.end(node.ID, fail(kindUnauthenticated, "the node has attested again", nil))
	s.clearClones([]string{node.ID})
	s.log.InfoContext(ctx, "node attested", "node_id", node.ID, "method", a.method, "request_id", a.c.requestID)
	return s.agentIdentity(durable, signed.RenewAt), nil
}

// signAgent signs an agent's X.509-SVID and makes its record durable, and with it
// what else happened on the way: that is recorded also if nothing is signed.
func (s *Server) signAgent(ctx context.Context, id string, key *ca.PublicKey, csr []byte, r *ledgerv1.Record, also ...*ledgerv1.Record) (*ca.Signed, *ledger.Durable, error) {
	parsed, err := identity.ParseID(id)
	if err != nil {
		return nil, nil, fail(kindInternal, "internal error", err)
	}
	signing, done := context.WithTimeout(ctx, signTimeout)
	defer done()
	signed, err := s.cfg.CA.Sign(signing, time.Now(), &ca.Request{ID: parsed, Key: key, CSR: csr, TTL: s.cfg.AgentTTL, Record: r})
	if err != nil {
		_, label, message, _ := refusalOf(err)
		if label != reasonCSR {
			label = reasonUnavailable
		}
		s.refuseAgent(ctx, id, r, label, err.Error())
		if err := s.append(ctx, also...); err != nil {
			s.log.ErrorContext(ctx, "use of a token cannot be recorded", "node_id", id, "err", err)
		}
		if label == reasonCSR {
			return nil, nil, fail(kindInvalid, message, err)
		}
		s.log.ErrorContext(ctx, "agent's certificate cannot be signed", "node_id", id, "err", err)
		return nil, nil, fail(kindUnavailable, "the CA cannot sign now: try again", err)
	}
	drafts := []*ledger.Draft{signed.Draft}
	for _, other := range also {
		drafts = append(drafts, ledger.NewDraft(other, nil))
	}
	ctx, cancel := context.WithTimeout(ctx, ledgerTimeout)
	defer cancel()
	durable, err := s.cfg.Ledger.Append(ctx, drafts...)
	if err != nil {
		s.log.ErrorContext(ctx, "agent's certificate cannot be recorded", "node_id", id, "err", err)
		return nil, nil, fail(kindUnavailable, "the CA cannot record now: try again", err)
	}
	return signed, durable[0], nil
}

// refuseAgent records that a node got no X.509-SVID.
func (s *Server) refuseAgent(ctx context.Context, id string, r *ledgerv1.Record, reason, detail string) {
	r.Outcome, r.Reason, r.Detail = outcomeFor(reason), reason, truncate(detail)
	s.metrics.refused.WithLabelValues(reason).Inc()
	s.refuse(ctx, id, false, r)
}

// putNodes stores nodes, all or none, and puts them into force. Their locks are held.
func (s *Server) putNodes(ctx context.Context, nodes ...*registry.Node) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeoutOf(len(nodes)))
	defer cancel()
	if err := s.cfg.Store.PutNodes(ctx, nodes...); err != nil {
		s.log.ErrorContext(ctx, "nodes cannot be stored", "node_id", nodes[0].ID, "count", len(nodes), "err", err)
		return fail(kindUnavailable, "the CA cannot store now: try again", err)
	}
	for _, n := range nodes {
		s.registry.PutNode(n)
	}
	return nil
}

// agentIdentity is the answer to Attest and Renew. Like issuedSVID it needs
// proof that the record is on the disk.
func (s *Server) agentIdentity(d *ledger.Durable, renewAt time.Time) *nodev1.AgentIdentity {
	return &nodev1.AgentIdentity{Chain: d.Chain(), Bundle: s.bundle(), RenewAt: timestamppb.New(renewAt)}
}

// bundle returns the trust bundle of the moment.
func (s *Server) bundle() *nodev1.Bundle {
	roots, lists, sequence := s.cfg.CA.BundleWithLists()
	b := &nodev1.Bundle{TrustDomain: s.cfg.TrustDomain.Name(), Sequence: sequence, Roots: make([][]byte, len(roots))}
	for i, root := range roots {
		b.Roots[i] = root.Raw
	}
	for _, l := range lists {
		b.RevocationLists = append(b.RevocationLists, &nodev1.RevocationList{Issuer: l.Issuer, List: l.List})
	}
	return b
}

// Renew implements nodev1.NodeServiceServer. The X.509-SVID that is replaced
// must be the newest, and be the one that the connection was made with: whoever
// comes with an older one has a copy of the agent's key, or is the original that
// a copy has overtaken. An answer that was lost is no such case: as long as the
// newest has never been used, the one before is as good.
func (n *nodeService) Renew(ctx context.Context, req *nodev1.RenewRequest) (*nodev1.RenewResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if c.node == nil {
		return nil, fail(kindDenied, "permission denied", errors.New("caller is not a node"))
	}
	s := n.s
	if err := s.checkClock(); err != nil {
		return nil, err
	}
	r := s.newRecord(c, ledgerv1.Event_EVENT_RENEW_AGENT)
	r.VerifiedBy, r.Kind = "ca", ledgerv1.Kind_KIND_RENEWAL
	r.Node, r.PreviousSerial = nodeRef(c.node, c.address), c.serial
	if string(req.GetPreviousSerial()) != string(c.serial) {
		const problem = "previous_serial must be that of the X.509-SVID which the connection was made with"
		s.refuseAgent(ctx, c.node.ID, r, reasonSerial, problem)
		return nil, fail(kindInvalid, problem, nil)
	}
	key, err := ca.ParseCSR(req.GetCsr())
	if err != nil {
		s.refuseAgent(ctx, c.node.ID, r, reasonCSR, err.Error())
		return nil, fail(kindInvalid, truncate(err.Error()), err)
	}
	sum := key.Hash()
	if q, ok := s.registry.Quarantines().Of(c.node.ID, sum[:], nil); ok {
		s.refuseAgent(ctx, c.node.ID, r, reasonQuarantined, q.Name()+" is quarantined: "+q.Reason)
		return nil, fail(kindDenied, "the node's identity or key is quarantined", nil)
	}
	defer s.lockNode(c.node.ID)()
	node, ok := s.registry.Node(c.node.ID)
	if !ok || node.State != registry.Active {
		const problem = "the node was evicted: attest again"
		s.refuseAgent(ctx, c.node.ID, r, reasonEvicted, problem)
		return nil, fail(kindUnauthenticated, problem, nil)
	}
	newest := string(c.serial) == string(node.Serial)
	lostAnswer := !node.Confirmed && string(c.serial) == string(node.Previous)
	if !newest && !lostAnswer {
		s.noteClone(ctx, c, node, c.serial)
		return nil, fail(kindUnauthenticated, "the node has a newer X.509-SVID: attest again", nil)
	}
	r.Node = nodeRef(node, c.address)
	signed, durable, err := s.signAgent(ctx, node.ID, key, req.GetCsr(), r)
	if err != nil {
		return nil, err
	}
	next := *node
	next.Serial, next.NotAfter, next.Confirmed = signed.Serial, signed.NotAfter, false
	next.Previous, next.PreviousUntil = c.serial, c.notAfter
	next.Address, next.LastSeen = c.address, c.began
	if err := s.putNodes(ctx, &next); err != nil {
		return nil, err
	}
	s.metrics.renewals.Inc()
	return &nodev1.RenewResponse{Identity: s.agentIdentity(durable, signed.RenewAt)}, nil
}

// noteClone records that an agent came with an X.509-SVID that it had replaced.
func (s *Server) noteClone(ctx context.Context, c *caller, n *registry.Node, serial []byte) {
	s.metrics.clones.Inc()
	s.metrics.refused.WithLabelValues(reasonClone).Inc()
	s.setClone(n.ID)
	s.log.WarnContext(ctx, "agent may have been cloned", "node_id", n.ID, "address", c.address,
		"serial", fmt.Sprintf("%x", serial), "request_id", c.requestID)
	c.recorded = true
	r := s.newRecord(c, ledgerv1.Event_EVENT_RENEW_AGENT)
	r.VerifiedBy, r.Kind = "ca", ledgerv1.Kind_KIND_RENEWAL
	r.Outcome, r.Reason = ledgerv1.Outcome_OUTCOME_REFUSED, reasonClone
	r.Detail = "the X.509-SVID presented has been replaced by a newer one"
	r.Node, r.PreviousSerial = nodeRef(n, c.address), serial
	s.refuse(ctx, n.ID, false, r)
}

// setClone keeps the condition about agents that may have been cloned: it holds
// until each of them was evicted or banned, or has attested again.
func (s *Server) setClone(id string) {
	s.cloneMu.Lock()
	defer s.cloneMu.Unlock()
	s.clones[id] = true
	s.sayClones()
}

// clearClones forgets what was suspected of nodes.
func (s *Server) clearClones(ids []string) {
	s.cloneMu.Lock()
	defer s.cloneMu.Unlock()
	for _, id := range ids {
		delete(s.clones, id)
	}
	s.sayClones()
}

// sayClones sets the condition; cloneMu is held.
func (s *Server) sayClones() {
	if len(s.clones) == 0 {
		s.cfg.Health.Clear(conditionClone)
		return
	}
	s.cfg.Health.Set(conditionClone, health.Warning, fmt.Sprintf(
		"%d agents presented an X.509-SVID that they had replaced: a key may have been copied; "+
			"look for %q in the ledger, then evict or ban the node", len(s.clones), reasonClone))
}
