package server

import (
	"context"
	"crypto/x509"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Direct is what a workload asks for that speaks to the CA itself, without a node
// agent between them. Whoever calls IssueDirect has authenticated the workload, and
// takes Node, Workload and Instance from the platform: they are believed.
type Direct struct {
	// Node is where the workload runs. It matches the entries' nodes rules; if it has
	// the id of a node that is banned, nothing is issued.
	Node     *attributesv1.Node
	Workload *attributesv1.Workload
	// Instance is what the key belongs to.
	Instance string
	// SPIFFEID is the identity that is asked for. It is issued if there is an entry
	// that gives it to this workload on this node, and in no other way.
	SPIFFEID string
	// AnyID asks for whichever identity the entries give, and SPIFFEID is empty: of
	// several entries that of the first by name, as in the Workload API.
	AnyID bool
	// CSR is a PKCS #10 request, DER: its public key is taken, and nothing else.
	CSR []byte
	// PublicKey is in place of a CSR, a SubjectPublicKeyInfo in DER, if whoever calls
	// IssueDirect has verified that the workload holds the private key.
	PublicKey []byte
	// TTL is the longest life that is wanted; zero means the entry's. It lowers what
	// the entry says and never raises it; less than a certificate may have is raised.
	TTL time.Duration
	// Backdate is how far NotBefore may lie in the past at most; zero means as far as
	// configured.
	Backdate time.Duration
	// MinLife and MaxLife bound the time from NotBefore to NotAfter; zero for no bound.
	// What is less is refused.
	MinLife, MaxLife time.Duration
	// Actor is who asked on behalf of the workload, if it is not the workload itself.
	Actor string
	// Address is where the request came from.
	Address string
}

// key returns the public key that a certificate is asked for, proved and allowed.
func (b *batch) key(item *nodev1.IssueItem) (*ca.PublicKey, error) {
	if b.direct != nil && len(b.direct.PublicKey) > 0 {
		return ca.ProvenKey(b.direct.PublicKey)
	}
	return ca.ParseCSR(item.GetCsr())
}

// bound has a request to the CA say what a workload without an agent wants.
func (d *Direct) bound(r *ca.Request) *ca.Request {
	if d != nil {
		r.Backdate, r.MinLife, r.MaxLife = d.Backdate, d.MinLife, d.MaxLife
	}
	return r
}

// DirectSVID is an X.509-SVID whose record is durable.
type DirectSVID struct {
	// Chain is DER, leaf first, without the root.
	Chain [][]byte
	// RenewAt is when it should be replaced.
	RenewAt time.Time
	// Roots are all roots of the trust domain: an old and a new one while they change.
	Roots []*x509.Certificate
}

// DirectError is a refusal of IssueDirect. It has been recorded, unless there were
// too many.
type DirectError struct {
	// Reason is what an agent would be told.
	Reason nodev1.Reason
	// Message may be shown to the caller.
	Message string
	// RetryAfter is when to try again; zero means not before something changes.
	RetryAfter time.Duration
}

func (e *DirectError) Error() string { return e.Message }

// IssueDirect is Issue for a workload without an agent: the same entries, limits,
// quarantines, bans and records, and no certificate before its record is durable. Its
// error is a *DirectError. It may be called concurrently.
func (s *Server) IssueDirect(ctx context.Context, d *Direct) (*DirectSVID, error) {
	nodeID, err := identity.NodeID(s.cfg.TrustDomain, d.Node.GetMethod(), d.Node.GetId())
	if err != nil {
		return nil, &DirectError{Reason: nodev1.Reason_REASON_RULE_NOT_MATCHED, Message: "the node has no legal name: " + err.Error()}
	}
	c := &caller{
		requestID: newRequestID(), address: d.Address, actor: d.Actor, began: time.Now(),
		node: &registry.Node{ID: nodeID.String(), Attributes: d.Node},
	}
	defer func() { s.metrics.issueDuration.Observe(time.Since(c.began).Seconds()) }()
	refused := func(reason nodev1.Reason, label, message string, retryAfter time.Duration) error {
		s.refused.Add(1)
		s.metrics.refused.WithLabelValues(label).Inc()
		return &DirectError{Reason: reason, Message: message, RetryAfter: retryAfter}
	}
	use := s.useOf(c.node.ID)
	defer use.inFlight.Add(-1)
	admitted, retryAfter := 0, retryOverload
	if int(use.inFlight.Add(1)) <= maxDirect {
		admitted, retryAfter = use.issues.take(c.began, 1)
	}
	if admitted == 0 {
		return nil, refused(nodev1.Reason_REASON_UNAVAILABLE, reasonLimit, "too many requests from this node", retryAfter)
	}

	b := &batch{
		s: s, c: c, entries: s.registry.Entries(), quarantines: s.registry.Quarantines(),
		node: nodeRef(c.node, c.address), began: timestamppb.New(c.began),
		direct: d, banned: s.bannedAs(d.Node.GetId()),
	}
	item := &nodev1.IssueItem{
		Entry: b.entryFor(d), Instance: d.Instance, Workload: d.Workload, Csr: d.CSR, Kind: nodev1.IssueKind_ISSUE_KIND_UNSPECIFIED,
	}
	decisions := make([]decision, 1)
	signing, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	if err := s.eachOnAllCores(ctx, 1, func(int) {
		b.decide(signing, &decisions[0], item, &Placed{Verdict: PlacementVerified})
	}); err != nil {
		return nil, &DirectError{Reason: nodev1.Reason_REASON_UNAVAILABLE, Message: "the request was given up", RetryAfter: retryOverload}
	}
	res, err := s.record(ctx, c, decisions)
	if err != nil {
		return nil, &DirectError{Reason: nodev1.Reason_REASON_UNAVAILABLE, Message: "the CA cannot record now", RetryAfter: retryNoSigning}
	}
	if refusal := res.GetResults()[0].GetRefusal(); refusal != nil {
		return nil, &DirectError{Reason: refusal.GetReason(), Message: refusal.GetMessage(), RetryAfter: refusal.GetRetryAfter().AsDuration()}
	}
	svid := res.GetResults()[0].GetSvid()
	roots, _ := s.cfg.CA.Bundle()
	return &DirectSVID{Chain: svid.GetChain(), RenewAt: svid.GetRenewAt().AsTime(), Roots: roots}, nil
}

// Reasons of a refusal before IssueDirect.
const (
	// DirectCredentials: what the caller shows does not prove who it is.
	DirectCredentials = reasonAttestation
	// DirectPlacement: the caller may not ask for the workload, or the workload does not
	// run there.
	DirectPlacement = reasonPlacement
	// DirectRequest: what is asked for is malformed.
	DirectRequest = reasonCSR
)

// RefuseDirect records that whoever would have called IssueDirect refused it for one of
// the reasons above. What is not known of d is zero. Like all refusals, those of one
// node, or of one address while the node is not known, are counted instead of recorded
// if they are too many.
func (s *Server) RefuseDirect(ctx context.Context, d *Direct, reason, detail string) {
	c := &caller{requestID: newRequestID(), address: d.Address, actor: d.Actor, began: time.Now()}
	r := s.newRecord(c, ledgerv1.Event_EVENT_ISSUE)
	r.Outcome, r.Reason, r.Detail, r.VerifiedBy = ledgerv1.Outcome_OUTCOME_REFUSED, reason, truncate(detail), "ca"
	r.SpiffeId, r.Instance, r.Workload, r.Attestors = truncate(d.SPIFFEID), d.Instance, d.Workload, attestorsOf(d.Workload)
	source, foreign := host(d.Address), true
	r.Node = &ledgerv1.NodeRef{Address: d.Address, Attributes: d.Node}
	if id, err := identity.NodeID(s.cfg.TrustDomain, d.Node.GetMethod(), d.Node.GetId()); err == nil {
		source, foreign, r.Node.Id = id.String(), false, id.String()
	}
	s.metrics.refused.WithLabelValues(reason).Inc()
	s.refuse(ctx, source, foreign, r)
}

// bannedAs reports whether a node with this id is banned, by whichever method it was
// attested.
func (s *Server) bannedAs(id string) bool {
	for method := range s.verifiers {
		name, err := identity.NodeID(s.cfg.TrustDomain, method, id)
		if err != nil {
			continue // no node of that method has such an id
		}
		if n, ok := s.registry.Node(name.String()); ok && n.State == registry.Banned {
			return true
		}
	}
	return false
}

// maxMissEntries bounds the search for the entry that a refusal is explained by.
const maxMissEntries = 256

// entryFor returns the name of the entry by which a workload gets the identity that
// it asks for; if there is none, that of the one that comes nearest, or "".
func (b *batch) entryFor(d *Direct) string {
	facts := identity.NewFacts(d.Node, d.Workload)
	gives := func(e *identity.Entry) bool {
		id, err := e.Render(facts)
		return err == nil && id.ID.String() == d.SPIFFEID
	}
	for _, e := range b.entries.Set.MatchWorkload(facts) {
		if e.MatchNode(facts) && (d.AnyID || gives(e)) {
			return e.Name()
		}
	}
	if d.AnyID {
		// Only if there is one for the node is it the one that was meant.
		if all := b.entries.Set.MatchNode(facts); len(all) == 1 {
			return all[0].Name()
		}
		return ""
	}
	tried := 0
	for e := range b.entries.Set.All() {
		if tried++; tried > maxMissEntries {
			break
		}
		if gives(e) {
			return e.Name()
		}
	}
	return ""
}

// ttl is the life to ask the CA for: the entry's, lowered to what a workload without
// an agent wants.
func (b *batch) ttl(entry time.Duration) time.Duration {
	if b.direct == nil || b.direct.TTL <= 0 {
		return entry
	}
	if entry == 0 {
		entry = b.s.cfg.DefaultTTL
	}
	return max(min(entry, b.direct.TTL), identity.MinTTL)
}
