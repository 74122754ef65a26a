package server

// The path of an X.509-SVID through the CA, each step one function, in this
// order. The agent's half comes before; docs/issuance.md has all of it.
//
//  1. Issue        the node is that of the connection; what it may use is bounded
//  2. decide       for each item, on all cores: entry → rules → names → key → signature
//  3. record       one append to the ledger for the whole batch, refusals included
//  4. issuedSVID   only what the ledger gave back can be answered

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Limits of a batch and of an item.
const (
	maxItems          = 512
	maxNameBytes      = 128
	maxInstanceBytes  = 512
	maxAttributeBytes = 32 << 10
	maxSerialBytes    = 20 // RFC 5280 §4.1.2.2
	maxDetailBytes    = 1024
	maxProcessBytes   = 64
)

// signTimeout bounds the signing of a batch, where an upstream CA signs: what is not signed
// then is refused, and the rest is not lost. Agents wait for 15 s.
const signTimeout = 10 * time.Second

// Reasons of refusals in the ledger and in the metric: a closed set.
const (
	reasonLimit        = "limit"
	reasonEntryUnknown = "entry_unknown"
	reasonNodeRule     = "node_rule_not_matched"
	reasonRule         = "rule_not_matched"
	reasonTemplate     = "template"
	reasonCSR          = "csr"
	reasonUnavailable  = "unavailable"
	reasonAttestation  = "attestation"
	reasonMethod       = "unknown_method"
	reasonBanned       = "banned"
	reasonClone        = "cloned_agent"
	reasonEvicted      = "evicted"
	reasonSerial       = "previous_serial"
	reasonQuarantined  = "quarantined"
	reasonPlacement    = "placement"
)

// Reasons that are in records only.
const (
	reasonEntryBroken     = "entry_broken"
	reasonEntryUnrecorded = "entry_unrecorded"
)

// refusalReasons are all of them.
var refusalReasons = []string{
	reasonLimit, reasonEntryUnknown, reasonNodeRule, reasonRule, reasonTemplate, reasonCSR,
	reasonUnavailable, reasonAttestation, reasonMethod, reasonBanned, reasonClone, reasonEvicted, reasonSerial, reasonQuarantined, reasonPlacement,
}

// Issue implements nodev1.NodeServiceServer.
func (n *nodeService) Issue(ctx context.Context, req *nodev1.IssueRequest) (*nodev1.IssueResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if c.node == nil {
		return nil, fail(kindDenied, "permission denied", errors.New("caller is not a node"))
	}
	return n.s.issue(ctx, c, req.GetItems())
}

func (s *Server) issue(ctx context.Context, c *caller, items []*nodev1.IssueItem) (*nodev1.IssueResponse, error) {
	if len(items) > maxItems {
		return nil, fail(kindInvalid, fmt.Sprintf("%d items, at most %d are allowed", len(items), maxItems), nil)
	}
	defer func() { s.metrics.issueDuration.Observe(time.Since(c.began).Seconds()) }()
	s.metrics.batchSize.Observe(float64(len(items)))

	decisions := make([]decision, len(items))
	use := s.useOf(c.node.ID)
	defer use.inFlight.Add(-1)
	admitted, retryAfter := 0, retryOverload
	if int(use.inFlight.Add(1)) <= s.cfg.Limits.IssueRequests {
		admitted, retryAfter = use.issues.take(c.began, len(items))
	}
	// What is over the limit is not recorded: nothing was decided about it.
	for i := admitted; i < len(items); i++ {
		decisions[i].refuse(nodev1.Reason_REASON_UNAVAILABLE, reasonLimit, "too many requests of this node", retryAfter)
	}

	batch := &batch{
		s: s, c: c, entries: s.registry.Entries(), quarantines: s.registry.Quarantines(),
		node: nodeRef(c.node, c.address), began: timestamppb.New(c.began),
	}
	start := time.Now()
	placed := batch.place(ctx, items[:admitted])
	signing, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	if err := s.eachOnAllCores(ctx, admitted, func(i int) {
		var p *Placed
		if placed != nil {
			p = placed[i]
		}
		batch.decide(signing, &decisions[i], items[i], p)
	}); err != nil {
		return nil, err
	}
	s.metrics.stages.WithLabelValues(stageDecide).Observe(time.Since(start).Seconds())
	return s.record(ctx, c, decisions)
}

// eachOnAllCores calls fn for 0 to n-1. All batches together use as many cores
// as there are, taking turns item by item; or as many calls of an upstream CA.
func (s *Server) eachOnAllCores(ctx context.Context, n int, fn func(i int)) error {
	var next atomic.Int64
	work := func() {
		for ctx.Err() == nil {
			i := int(next.Add(1) - 1)
			if i >= n {
				return
			}
			select {
			case s.workers <- struct{}{}:
			case <-ctx.Done():
				return
			}
			fn(i)
			<-s.workers
		}
	}
	var wg sync.WaitGroup
	for range min(n, cap(s.workers)) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return ctx.Err()
}

// batch is what the items of one request share.
type batch struct {
	s       *Server
	c       *caller
	entries *registry.Entries
	// quarantines are looked at again once the batch is recorded.
	quarantines *registry.Quarantines
	// node and began are shared by the records of all items: read only.
	node  *ledgerv1.NodeRef
	began *timestamppb.Timestamp
	// direct is the request of a workload without an agent, nil if there is one;
	// banned is set if its node is.
	direct *Direct
	banned bool
}

// decision is what became of one item: signed, or refused.
type decision struct {
	signed  *ca.Signed
	refusal *nodev1.Refusal
	reason  string           // of the refusal, for the metric
	record  *ledgerv1.Record // of the refusal; nil if it is not recorded
	kind    ledgerv1.Kind
	id      string // of what was signed
	key     [32]byte
}

func (d *decision) refuse(reason nodev1.Reason, label, message string, retryAfter time.Duration) {
	d.refusal, d.reason = &nodev1.Refusal{Reason: reason, Message: message}, label
	if retryAfter > 0 {
		d.refusal.RetryAfter = durationpb.New(retryAfter)
	}
}

// decide works on one item. The certificate is a function of the entry and of
// the attested attributes: of the CSR only the public key and the proof that the
// agent holds the private one are taken. placed is what the platform says of the
// workload, nil if the entry does not depend on it.
func (b *batch) decide(ctx context.Context, d *decision, item *nodev1.IssueItem, placed *Placed) {
	defer func() {
		if p := recover(); p != nil {
			b.s.metrics.panics.Inc()
			b.s.log.ErrorContext(ctx, "deciding on an item panicked", "request_id", b.c.requestID, "node_id", b.c.node.ID,
				"err", fmt.Sprint(p), "stack", string(debug.Stack()))
			*d = decision{}
			d.refuse(nodev1.Reason_REASON_UNAVAILABLE, reasonUnavailable, "internal error", retryNoSigning)
		}
	}()
	r := &ledgerv1.Record{
		Version:     recordVersion,
		Time:        b.began,
		Event:       ledgerv1.Event_EVENT_ISSUE,
		TrustDomain: b.s.cfg.TrustDomain.Name(),
		VerifiedBy:  "agent",
		Node:        b.node,
		CaInstance:  b.s.cfg.Instance,
		CaVersion:   b.s.cfg.Version,
		RequestId:   b.c.requestID,
	}
	refused := func(reason nodev1.Reason, label, message, detail string, retryAfter time.Duration) {
		d.refuse(reason, label, message, retryAfter)
		r.Outcome, r.Reason, r.Detail = outcomeFor(label), label, truncate(detail)
		r.Took = durationpb.New(time.Since(b.c.began))
		d.record = r
	}

	if problem := checkItem(item); problem != "" {
		refused(nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonLimit, problem, problem, 0)
		return
	}
	r.Kind = kindOf(item.GetKind())
	d.kind = r.GetKind()
	r.Instance, r.Workload, r.PreviousSerial = item.GetInstance(), item.GetWorkload(), item.GetPreviousSerial()
	r.Attestors, r.Process = attestorsOf(item.GetWorkload()), item.GetProcess()

	if b.direct != nil {
		r.SpiffeId, r.Actor = b.direct.SPIFFEID, b.direct.Actor
	}
	if b.banned {
		refused(nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonBanned, "the node is banned", "", 0)
		return
	}

	quarantined := func(q *registry.Quarantine) {
		refused(nodev1.Reason_REASON_QUARANTINED, reasonQuarantined, "the identity or the key is quarantined", q.Name()+" is quarantined: "+q.Reason, 0)
	}
	if b.quarantines.Len() > 0 {
		// What is wrong with the CSR is said below, if it is its turn.
		if key, err := b.key(item); err == nil {
			sum := key.Hash()
			if q, ok := b.quarantines.Of("", sum[:], nil); ok {
				quarantined(q)
				return
			}
		}
	}

	// The entry must be there, and be one of this node's. Which of the two is
	// wrong is the ledger's business: the node has no right to know.
	entry, ok := b.entries.Set.Get(item.GetEntry())
	if !ok {
		r.Entry = &ledgerv1.EntryRef{Name: item.GetEntry()}
		refused(nodev1.Reason_REASON_ENTRY_UNKNOWN, reasonEntryUnknown, "no such entry for this node", "", 0)
		return
	}
	r.Entry = entryRef(entry)
	workload := item.GetWorkload()
	if placed != nil && placed.Workload != nil {
		workload, r.Workload = placed.Workload, placed.Workload
	}
	facts := identity.NewFacts(b.c.node.Attributes, workload)
	if !entry.MatchNode(facts) {
		r.Miss = nearestMiss(entry, facts)
		refused(nodev1.Reason_REASON_ENTRY_UNKNOWN, reasonNodeRule, "no such entry for this node", missText(r.GetMiss()), 0)
		return
	}
	if placed != nil {
		switch placed.Verdict {
		case PlacementVerified:
			r.VerifiedBy = "ca"
		case PlacementClaimed:
			r.Detail = truncate("placement: " + placed.Why)
		case PlacementRefuted:
			refused(nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonPlacement, "the workload is not known to run on this node", placed.Why, 0)
			return
		case PlacementUnknown:
			refused(nodev1.Reason_REASON_UNAVAILABLE, reasonPlacement, "where the workload runs is not known yet: try again", placed.Why, retryPlacement)
			return
		default:
			refused(nodev1.Reason_REASON_UNAVAILABLE, reasonPlacement, "internal error", "no such verdict", retryNoSigning)
			return
		}
	}
	if !entry.MatchWorkload(facts) {
		r.Miss = nearestMiss(entry, facts)
		miss := missText(r.GetMiss())
		refused(nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonRule, miss, miss, 0)
		return
	}
	id, err := entry.Render(facts)
	if err != nil {
		r.Miss = nearestMiss(entry, facts)
		refused(nodev1.Reason_REASON_TEMPLATE, reasonTemplate, truncate(err.Error()), err.Error(), 0)
		return
	}
	if b.direct != nil && !b.direct.AnyID && id.ID.String() != b.direct.SPIFFEID {
		const problem = "there is no entry that gives the workload this SPIFFE ID"
		refused(nodev1.Reason_REASON_RULE_NOT_MATCHED, reasonRule, problem, problem, 0)
		return
	}
	if q, ok := b.quarantines.Of(id.ID.String(), nil, nil); ok {
		r.SpiffeId = id.ID.String()
		quarantined(q)
		return
	}
	// Whoever has an admin's SPIFFE ID is an admin: no other entry makes it.
	if mark := b.entries.Set.Reserved(id.ID, entry); mark != "" {
		problem := "the SPIFFE ID belongs to an entry marked " + mark
		r.SpiffeId = id.ID.String()
		refused(nodev1.Reason_REASON_TEMPLATE, reasonTemplate, problem, problem, 0)
		return
	}
	key, err := b.key(item)
	if err != nil {
		r.SpiffeId = id.ID.String()
		refused(nodev1.Reason_REASON_CSR, reasonCSR, truncate(err.Error()), err.Error(), 0)
		return
	}
	r.Outcome = ledgerv1.Outcome_OUTCOME_SUCCESS
	r.Took = durationpb.New(time.Since(b.c.began))
	signed, err := b.s.cfg.CA.Sign(ctx, time.Now(), b.direct.bound(&ca.Request{ID: id.ID, DNSNames: id.DNSNames, Key: key, CSR: item.GetCsr(), TTL: b.ttl(id.TTL), Record: r}))
	if err != nil {
		reason, label, message, retryAfter := refusalOf(err)
		if label == reasonCSR && b.s.cfg.CA.NamesInCSR() {
			retryAfter = retryNoSigning // its agent may not know yet that names are needed, or which
		}
		level := slog.LevelError
		if _, ok := errors.AsType[*ca.LaterError](err); ok {
			level = slog.LevelDebug // what is wrong above is in the CA's health
		}
		if label == reasonUnavailable {
			b.s.log.Log(ctx, level, "signing is not possible", "request_id", b.c.requestID, "entry", entry.Name(), "err", err)
		}
		refused(reason, label, message, err.Error(), retryAfter)
		return
	}
	d.signed, d.id, d.key = signed, id.ID.String(), key.Hash()
}

// checkItem checks sizes, before anything is made of them.
func checkItem(item *nodev1.IssueItem) string {
	switch {
	case item == nil:
		return "the item is empty"
	case len(item.GetEntry()) > maxNameBytes:
		return fmt.Sprintf("the entry's name has %d bytes, at most %d are allowed", len(item.GetEntry()), maxNameBytes)
	case item.GetInstance() == "":
		return "the instance is missing"
	case len(item.GetInstance()) > maxInstanceBytes:
		return fmt.Sprintf("the instance has %d bytes, at most %d are allowed", len(item.GetInstance()), maxInstanceBytes)
	case len(item.GetPreviousSerial()) > maxSerialBytes:
		return fmt.Sprintf("the previous serial has %d bytes, at most %d are allowed", len(item.GetPreviousSerial()), maxSerialBytes)
	case item.GetWorkload() == nil:
		return "the workload's attributes are missing"
	}
	if n := proto.Size(item.GetWorkload()); n > maxAttributeBytes {
		return fmt.Sprintf("the workload's attributes have %d bytes, at most %d are allowed", n, maxAttributeBytes)
	}
	if n := proto.Size(item.GetProcess()); n > maxProcessBytes {
		return fmt.Sprintf("the process has %d bytes, at most %d are allowed", n, maxProcessBytes)
	}
	if start := item.GetProcess().GetStartTime(); start != nil && start.CheckValid() != nil {
		return "the start time of the process is not a time"
	}
	return ""
}

func kindOf(k nodev1.IssueKind) ledgerv1.Kind {
	switch k {
	case nodev1.IssueKind_ISSUE_KIND_FIRST:
		return ledgerv1.Kind_KIND_FIRST
	case nodev1.IssueKind_ISSUE_KIND_RENEWAL:
		return ledgerv1.Kind_KIND_RENEWAL
	case nodev1.IssueKind_ISSUE_KIND_ROTATION:
		return ledgerv1.Kind_KIND_ROTATION
	case nodev1.IssueKind_ISSUE_KIND_UNSPECIFIED:
		return ledgerv1.Kind_KIND_UNSPECIFIED
	default:
		return ledgerv1.Kind_KIND_UNSPECIFIED
	}
}

// refusalOf says what an agent is told of an error of Sign: what is wrong with
// its request, or that it may try again.
func refusalOf(err error) (reason nodev1.Reason, label, message string, retryAfter time.Duration) {
	if req, ok := errors.AsType[*ca.RequestError](err); ok {
		switch req.Reason {
		case "csr":
			return nodev1.Reason_REASON_CSR, reasonCSR, truncate(req.Error()), 0
		case "id", "dns", "ttl":
			return nodev1.Reason_REASON_TEMPLATE, reasonTemplate, truncate(req.Error()), 0
		default:
		}
	}
	if later, ok := errors.AsType[*ca.LaterError](err); ok {
		return nodev1.Reason_REASON_UNAVAILABLE, reasonUnavailable, "the upstream CA does not sign now", cmp.Or(later.After, retryNoSigning)
	}
	return nodev1.Reason_REASON_UNAVAILABLE, reasonUnavailable, "the CA cannot sign now", retryNoSigning
}

// truncate bounds a text for the ledger and for agents, and makes it valid UTF-8:
// a record that is not cannot be encoded, and would fail its whole batch.
func truncate(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= maxDetailBytes {
		return s
	}
	cut := maxDetailBytes
	for cut > 0 && s[cut]&0xC0 == 0x80 { // not inside of a rune
		cut--
	}
	return s[:cut] + "…"
}

// record makes the batch durable and builds the answer from what is. If the
// ledger cannot, every item that was signed is refused: the certificates are
// thrown away with the drafts.
func (s *Server) record(ctx context.Context, c *caller, decisions []decision) (*nodev1.IssueResponse, error) {
	drafts := make([]*ledger.Draft, 0, len(decisions))
	place := make([]int, len(decisions)) // of a signed item's draft
	for i := range decisions {
		d := &decisions[i]
		switch {
		case d.signed != nil:
			place[i] = len(drafts)
			drafts = append(drafts, d.signed.Draft)
		case d.record != nil && s.refusals.admit(c.began, c.node.ID, false, d.record):
			drafts = append(drafts, ledger.NewDraft(d.record, nil))
		case d.record != nil:
			s.metrics.suppressed.Inc()
		default:
		}
	}
	var durable []*ledger.Durable
	if len(drafts) > 0 {
		appendCtx, cancel := context.WithTimeout(ctx, ledgerTimeout)
		defer cancel()
		start := time.Now()
		var err error
		durable, err = s.cfg.Ledger.Append(appendCtx, drafts...)
		s.metrics.stages.WithLabelValues(stageRecord).Observe(time.Since(start).Seconds())
		if err != nil {
			s.log.ErrorContext(ctx, "issuance cannot be recorded", "request_id", c.requestID, "node_id", c.node.ID, "err", err)
			durable = nil
		}
	}
	quarantines := s.registry.Quarantines()
	results := make([]*nodev1.IssueResult, len(decisions))
	for i := range decisions {
		d := &decisions[i]
		if d.signed != nil && durable == nil {
			d.signed = nil
			d.refuse(nodev1.Reason_REASON_UNAVAILABLE, reasonUnavailable, "the CA cannot record now", retryNoSigning)
		}
		if d.signed != nil {
			// It was added meanwhile: what was signed and recorded is not handed out.
			if _, ok := quarantines.Of(d.id, d.key[:], nil); ok {
				d.signed = nil
				d.refuse(nodev1.Reason_REASON_QUARANTINED, reasonQuarantined, "the identity or the key is quarantined", 0)
			}
		}
		if d.signed == nil {
			s.refused.Add(1)
			s.metrics.refused.WithLabelValues(d.reason).Inc()
			results[i] = &nodev1.IssueResult{Result: &nodev1.IssueResult_Refusal{Refusal: d.refusal}}
			continue
		}
		s.issued.Add(1)
		s.metrics.issued.WithLabelValues(kindLabel(d.kind)).Inc()
		results[i] = &nodev1.IssueResult{Result: &nodev1.IssueResult_Svid{
			Svid: issuedSVID(durable[place[i]], d.signed.RenewAt),
		}}
	}
	return &nodev1.IssueResponse{Results: results}, nil
}

// issuedSVID is the only way from a certificate to an answer, and it needs proof
// that the certificate's record is on the disk.
func issuedSVID(d *ledger.Durable, renewAt time.Time) *nodev1.IssuedSVID {
	return &nodev1.IssuedSVID{
		SpiffeId: d.Record().GetSpiffeId(),
		Chain:    d.Chain(),
		RenewAt:  timestamppb.New(renewAt),
	}
}

func kindLabel(k ledgerv1.Kind) string {
	switch k {
	case ledgerv1.Kind_KIND_FIRST:
		return "first"
	case ledgerv1.Kind_KIND_RENEWAL:
		return "renewal"
	case ledgerv1.Kind_KIND_ROTATION:
		return "rotation"
	default:
		return "unspecified"
	}
}
