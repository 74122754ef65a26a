package server

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

type nodeInspected = nodev1.Inspected

// Limits of join tokens.
const (
	methodJoinToken = "join_token"
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 30 * 24 * time.Hour
	maxTokens       = 10_000
	maxLabels       = 64
	maxLabelBytes   = 256
	tokenIDLen      = 8 // characters of the SHA-256
	maxReasonBytes  = 512
	maxRotateWithin = 24 * time.Hour
)

// CreateToken implements adminv1.AdminServiceServer.
func (a *adminService) CreateToken(ctx context.Context, req *adminv1.CreateTokenRequest) (*adminv1.CreateTokenResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	s := a.s
	if _, used := s.verifiers[methodJoinToken]; !used || s.cfg.NewToken == nil {
		return nil, fail(kindConflict, "this CA does not use the attestation method join_token: add it to its configuration", nil)
	}
	ttl := defaultTokenTTL
	if req.GetTtl() != nil {
		ttl = req.GetTtl().AsDuration()
	}
	if ttl <= 0 || ttl > maxTokenTTL {
		return nil, fail(kindInvalid, fmt.Sprintf("the token's ttl is %s: write more than 0 and at most %s", ttl, maxTokenTTL), nil)
	}
	if err := checkLabels(req.GetLabels()); err != nil {
		return nil, err
	}
	if err := s.checkClock(); err != nil { // tokens that have expired by it are deleted
		return nil, err
	}
	name := req.GetNodeName()
	if name == "" {
		name = newRequestID()
	}
	id, err := identity.NodeID(s.cfg.TrustDomain, methodJoinToken, name)
	if err != nil {
		return nil, fail(kindInvalid, "the node's name must be a legal part of a SPIFFE ID: "+truncate(err.Error()), err)
	}
	now := time.Now()
	s.tokenMu.Lock()
	defer s.tokenMu.Unlock()
	open, err := s.cfg.Store.Tokens(ctx, now)
	if err != nil {
		return nil, fail(kindUnavailable, "the store cannot be read now", err)
	}
	if len(open) >= maxTokens {
		return nil, fail(kindConflict, fmt.Sprintf("there are %d unused tokens: delete some", len(open)), nil)
	}
	secret, sum, err := s.cfg.NewToken()
	if err != nil {
		return nil, fail(kindInternal, "internal error", err)
	}
	t := &registry.Token{
		SHA256: sum, NodeName: name, CreatedBy: c.actor, Labels: req.GetLabels(), CreatedAt: now, ExpiresAt: now.Add(ttl),
	}
	r := s.newRecord(c, ledgerv1.Event_EVENT_TOKEN_CREATED)
	r.Node, r.TokenSha256, r.TokenExpires = s.tokenNodeRef(t), sum[:], timestamppb.New(t.ExpiresAt)
	if err := s.cfg.Store.CreateToken(ctx, t, func() error { return s.append(ctx, r) }); err != nil {
		s.log.ErrorContext(ctx, "join token cannot be made", "actor", c.actor, "request_id", c.requestID, "err", err)
		return nil, fail(kindUnavailable, "no token was made: the store or the ledger cannot write now", err)
	}
	s.cfg.Anchor.noteToken(sum, t)
	s.log.InfoContext(ctx, "join token made", "actor", c.actor, "node_id", id.String(), "request_id", c.requestID)
	return &adminv1.CreateTokenResponse{Token: secret, NodeId: id.String(), ExpiresAt: timestamppb.New(t.ExpiresAt)}, nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fail(kindInvalid, fmt.Sprintf("%d labels, at most %d are allowed", len(labels), maxLabels), nil)
	}
	for k, v := range labels {
		if k == "" || len(k) > maxLabelBytes || len(v) > maxLabelBytes {
			return fail(kindInvalid, fmt.Sprintf("a label's name and value have 1 to %d bytes", maxLabelBytes), nil)
		}
	}
	return nil
}

// tokenID is how operators name a token.
func tokenID(sum [32]byte) string { return hex.EncodeToString(sum[:])[:tokenIDLen] }

func (s *Server) tokenNodeID(t *registry.Token) string {
	id, err := identity.NodeID(s.cfg.TrustDomain, methodJoinToken, t.NodeName)
	if err != nil {
		return ""
	}
	return id.String()
}

// tokenNodeRef is the node that a token is for, with the attributes that it will
// have.
func (s *Server) tokenNodeRef(t *registry.Token) *ledgerv1.NodeRef {
	return &ledgerv1.NodeRef{Id: s.tokenNodeID(t), Attributes: tokenAttributes(t)}
}

// tokenAttributes are those that the node that uses a token will have.
func tokenAttributes(t *registry.Token) *attributesv1.Node {
	return &attributesv1.Node{
		Method: methodJoinToken, Id: t.NodeName, Labels: t.Labels, JoinToken: &attributesv1.JoinToken{CreatedBy: t.CreatedBy},
	}
}

// ListTokens implements adminv1.AdminServiceServer.
func (a *adminService) ListTokens(ctx context.Context, _ *adminv1.ListTokensRequest) (*adminv1.ListTokensResponse, error) {
	tokens, err := a.s.openTokens(ctx)
	if err != nil {
		return nil, fail(kindUnavailable, "the store cannot be read now", err)
	}
	resp := new(adminv1.ListTokensResponse)
	for _, t := range tokens {
		resp.Tokens = append(resp.Tokens, &adminv1.ListTokensResponse_Token{
			Id: tokenID(t.SHA256), NodeId: a.s.tokenNodeID(t), ExpiresAt: timestamppb.New(t.ExpiresAt),
			CreatedBy: t.CreatedBy, Labels: t.Labels,
		})
	}
	return resp, nil
}

// DeleteToken implements adminv1.AdminServiceServer.
func (a *adminService) DeleteToken(ctx context.Context, req *adminv1.DeleteTokenRequest) (*adminv1.DeleteTokenResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	s := a.s
	s.tokenMu.Lock()
	defer s.tokenMu.Unlock()
	tokens, err := s.cfg.Store.Tokens(ctx, time.Now()) // also what the ledger does not know can be deleted
	if err != nil {
		return nil, fail(kindUnavailable, "the store cannot be read now", err)
	}
	var found []*registry.Token
	for _, t := range tokens {
		if tokenID(t.SHA256) == req.GetId() {
			found = append(found, t)
		}
	}
	switch len(found) {
	case 0:
		// What was asked for is not repeated: it may be a token itself.
		return nil, fail(kindNotFound, "there is no unused token with this id: `ca token list` shows them", nil)
	case 1:
	default:
		return nil, fail(kindConflict, fmt.Sprintf("%d tokens are named %q", len(found), req.GetId()), nil)
	}
	r := s.newRecord(c, ledgerv1.Event_EVENT_TOKEN_DELETED)
	r.Node, r.TokenSha256 = s.tokenNodeRef(found[0]), found[0].SHA256[:]
	if err := s.cfg.Store.DeleteToken(ctx, found[0].SHA256, func() error { return s.append(ctx, r) }); err != nil {
		return nil, fail(kindUnavailable, "the token was not deleted: it was used just now, or the store or the ledger cannot write", err)
	}
	s.cfg.Anchor.noteToken(found[0].SHA256, nil)
	return &adminv1.DeleteTokenResponse{}, nil
}

// ListNodes implements adminv1.AdminServiceServer.
func (a *adminService) ListNodes(context.Context, *adminv1.ListNodesRequest) (*adminv1.ListNodesResponse, error) {
	resp := new(adminv1.ListNodesResponse)
	for _, n := range a.s.registry.Nodes() {
		node := &adminv1.Node{
			Id: n.ID, Attributes: n.Attributes, State: string(n.State), StateReason: n.StateReason,
			AttestedAt: timestamppb.New(n.AttestedAt), SvidNotAfter: timestamppb.New(n.NotAfter), SvidSerial: n.Serial,
			AgentVersion: n.AgentVersion, Address: n.Address,
		}
		if session, ok := a.s.hub.get(n.ID); ok {
			force := session.inForce()
			node.Connected = true
			node.Revision, node.BundleSequence = force.revision, force.bundleSequence
			node.Streams, node.StreamsAcknowledged, node.ClockSkew = force.streams, force.acknowledged, force.clockSkew
			if hello, ok := session.opened(); ok && hello.GetAgentVersion() != "" {
				node.AgentVersion = hello.GetAgentVersion()
			}
		}
		resp.Nodes = append(resp.Nodes, node)
	}
	return resp, nil
}

// maxNodesAtOnce bounds the nodes of one call.
const maxNodesAtOnce = 10_000

// EvictNode implements adminv1.AdminServiceServer.
func (a *adminService) EvictNode(ctx context.Context, req *adminv1.EvictNodeRequest) (*adminv1.EvictNodeResponse, error) {
	ids := namedNodes(req.GetId(), req.GetIds())
	withdrawal, err := a.s.withdraw(ctx, ids, req.GetReason(), registry.Evicted)
	if err != nil {
		return nil, err
	}
	return &adminv1.EvictNodeResponse{Withdrawal: withdrawal, Nodes: clamp(len(ids))}, nil
}

// BanNode implements adminv1.AdminServiceServer.
func (a *adminService) BanNode(ctx context.Context, req *adminv1.BanNodeRequest) (*adminv1.BanNodeResponse, error) {
	ids := namedNodes(req.GetId(), req.GetIds())
	withdrawal, err := a.s.withdraw(ctx, ids, req.GetReason(), registry.Banned)
	if err != nil {
		return nil, err
	}
	return &adminv1.BanNodeResponse{Withdrawal: withdrawal, Nodes: clamp(len(ids))}, nil
}

// namedNodes are those of a request, each once and in order.
func namedNodes(id string, more []string) []string {
	ids := slices.Clone(more)
	if id != "" || len(more) == 0 {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// withdraw takes the rights of nodes, of all or of none: in force in memory first, so
// that nothing is issued from then on whatever the disk does; then stored and recorded;
// then the agents are told, and their connections are closed as soon as they have said
// what their proxies did. If the disk fails, the caller is told that it is in force
// until the CA restarts.
func (s *Server) withdraw(ctx context.Context, ids []string, reason string, state registry.State) (withdrawal string, err error) {
	c, err := callerOf(ctx)
	if err != nil {
		return "", err
	}
	switch {
	case len(reason) > maxReasonBytes:
		return "", fail(kindInvalid, fmt.Sprintf("the reason has %d bytes, at most %d are allowed", len(reason), maxReasonBytes), nil)
	case len(ids) > maxNodesAtOnce:
		return "", fail(kindInvalid, fmt.Sprintf("%d nodes, at most %d are allowed in one call", len(ids), maxNodesAtOnce), nil)
	}
	event, action := ledgerv1.Event_EVENT_EVICT, "evict"
	if state == registry.Banned {
		event, action = ledgerv1.Event_EVENT_BAN, "ban"
	}
	unlock := s.lockNodes(ids)
	nodes, err := s.toWithdraw(ids, reason, state)
	if err != nil {
		unlock()
		return "", err
	}
	what := namesText(ids)
	withdrawal = s.beginWithdrawal(c, withdrawalNode, what, ids, func() uint64 {
		for _, n := range nodes {
			s.registry.PutNode(n)
		}
		return 0
	})
	stored := s.storeNodes(ctx, nodes...)
	records := make([]*ledgerv1.Record, len(nodes))
	for i, n := range nodes {
		records[i] = s.newRecord(c, event)
		records[i].Node, records[i].Detail = nodeRef(n, n.Address), reason
	}
	recorded := s.appendTogether(ctx, records)
	unlock()

	s.clearClones(ids)
	s.metrics.evictions.WithLabelValues(action).Add(float64(len(ids)))
	var told []*session
	for _, id := range ids {
		if session, connected := s.hub.get(id); connected {
			session.evict(&nodev1.Evicted{Banned: state == registry.Banned, Reason: reason})
			told = append(told, session)
		} else {
			s.conns.closeAll(id)
		}
	}
	s.revoke(ctx, &revocation{withdrawal: withdrawal, why: truncate(action + " of node " + what + ": " + reason), actor: c.actor, match: ofNodes(ids)})
	s.dismiss(ctx, told)
	s.log.InfoContext(ctx, "nodes withdrawn", "node_id", what, "count", len(ids), "action", action, "actor", c.actor, "request_id", c.requestID)
	if err := errors.Join(stored, recorded); err != nil {
		s.log.ErrorContext(ctx, "withdrawal of nodes is not written", "node_id", what, "count", len(ids), "err", err)
		return "", fail(kindUnavailable, "it is in force, but could not be written and will be forgotten when the CA restarts: "+
			"look at the disk, then do it again", err)
	}
	return withdrawal, nil
}

// toWithdraw returns the nodes as they are to be, if all of them may be so.
func (s *Server) toWithdraw(ids []string, reason string, state registry.State) ([]*registry.Node, error) {
	nodes := make([]*registry.Node, 0, len(ids))
	var unknown, banned []string
	for _, id := range ids {
		node, ok := s.registry.Node(id)
		switch {
		case !ok:
			unknown = append(unknown, fmt.Sprintf("%q", truncate(id)))
			continue
		case node.State == registry.Banned && state == registry.Evicted:
			banned = append(banned, id)
			continue
		}
		next := *node
		next.State, next.StateReason = state, reason
		next.Previous, next.PreviousUntil = nil, time.Time{}
		nodes = append(nodes, &next)
	}
	switch {
	case len(unknown) > 0:
		return nil, fail(kindNotFound, "nothing was changed: there is no node "+namesText(unknown), nil)
	case len(banned) > 0 && len(ids) == 1:
		return nil, fail(kindConflict, "the node is banned: lift the ban first if it may attest again", nil)
	case len(banned) > 0:
		return nil, fail(kindConflict, "nothing was changed: these are banned, lift the bans first if they may attest again, or leave them out: "+namesText(banned), nil)
	}
	return nodes, nil
}

// namesText names some of what was named, for people.
func namesText(ids []string) string {
	const most = 3
	if len(ids) <= most {
		return strings.Join(ids, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(ids[:most], ", "), len(ids)-most)
}

// storeTimeoutOf bounds writing so many things at once, on a machine that has more to do.
func storeTimeoutOf(n int) time.Duration { return storeTimeout + time.Duration(n)*5*time.Millisecond }

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *Server) storeNodes(ctx context.Context, nodes ...*registry.Node) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeoutOf(len(nodes)))
	defer cancel()
	return s.cfg.Store.PutNodes(ctx, nodes...)
}

// UnbanNode implements adminv1.AdminServiceServer. The node is then one that has
// to attest again.
func (a *adminService) UnbanNode(ctx context.Context, req *adminv1.UnbanNodeRequest) (*adminv1.UnbanNodeResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	s, ids := a.s, namedNodes(req.GetId(), req.GetIds())
	if len(ids) > maxNodesAtOnce {
		return nil, fail(kindInvalid, fmt.Sprintf("%d nodes, at most %d are allowed in one call", len(ids), maxNodesAtOnce), nil)
	}
	defer s.lockNodes(ids)()
	nodes := make([]*registry.Node, len(ids))
	records := make([]*ledgerv1.Record, len(ids))
	for i, id := range ids {
		node, ok := s.registry.Node(id)
		switch {
		case !ok:
			return nil, fail(kindNotFound, fmt.Sprintf("there is no node %q", truncate(id)), nil)
		case node.State != registry.Banned && len(ids) == 1:
			return nil, fail(kindConflict, "the node is not banned", nil)
		case node.State != registry.Banned:
			return nil, fail(kindConflict, "nothing was changed: the node "+id+" is not banned", nil)
		}
		records[i] = s.newRecord(c, ledgerv1.Event_EVENT_UNBAN)
		records[i].Node, records[i].Detail = nodeRef(node, node.Address), node.StateReason
		next := *node
		next.State, next.StateReason = registry.Evicted, "ban lifted"
		nodes[i] = &next
	}
	// The other way round than a ban: first the records, last the effect.
	if err := s.appendTogether(ctx, records); err != nil {
		return nil, fail(kindUnavailable, "the ban stays: the ledger cannot write now", err)
	}
	if err := s.putNodes(ctx, nodes...); err != nil {
		return nil, err
	}
	s.metrics.evictions.WithLabelValues("unban").Add(float64(len(ids)))
	s.log.InfoContext(ctx, "ban of nodes lifted", "node_id", namesText(ids), "count", len(ids), "actor", c.actor, "request_id", c.requestID)
	return &adminv1.UnbanNodeResponse{}, nil
}

// GetBundle implements adminv1.AdminServiceServer.
func (a *adminService) GetBundle(context.Context, *adminv1.GetBundleRequest) (*adminv1.GetBundleResponse, error) {
	b := a.s.bundle()
	return &adminv1.GetBundleResponse{TrustDomain: b.GetTrustDomain(), Sequence: b.GetSequence(), Roots: b.GetRoots()}, nil
}

// ListAuthorities implements adminv1.AdminServiceServer.
func (a *adminService) ListAuthorities(ctx context.Context, _ *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error) {
	resp := new(adminv1.ListAuthoritiesResponse)
	for _, authority := range a.s.cfg.CA.Authorities() {
		resp.Authorities = append(resp.Authorities, authorityProto(authority))
	}
	below, err := a.s.authoritiesBelow(ctx, func(string) bool { return true })
	if err != nil {
		a.s.log.WarnContext(ctx, "intermediates of CAs below cannot be read", "err", err)
		resp.BelowUnknown = "the store cannot be read now"
	}
	resp.Below = below
	return resp, nil
}

func authorityProto(a ca.Authority) *adminv1.Authority {
	return &adminv1.Authority{
		Id: a.ID, Role: a.Role, State: a.State, Tainted: a.Tainted, Certificate: a.Certificate.Raw,
		NotBefore: timestamppb.New(a.Certificate.NotBefore), NotAfter: timestamppb.New(a.Certificate.NotAfter),
	}
}

// RotateIntermediate implements adminv1.AdminServiceServer.
func (a *adminService) RotateIntermediate(ctx context.Context, req *adminv1.RotateIntermediateRequest) (*adminv1.RotateIntermediateResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	within, err := rotateWithin(req.GetWithin())
	if err != nil {
		return nil, err
	}
	s := a.s
	if err := s.checkClock(); err != nil {
		return nil, err
	}
	old := ""
	for _, authority := range s.cfg.CA.Authorities() {
		if authority.Role == ca.RoleIntermediate && authority.State == ca.StateActive {
			old = authority.ID
		}
	}
	if err := s.recordOrder(ctx, c, old, within); err != nil {
		return nil, err
	}
	fresh, err := s.cfg.CA.RotateIntermediate(ctx)
	if err != nil {
		s.log.ErrorContext(ctx, "intermediate cannot be replaced", "err", err)
		return nil, fail(kindUnavailable, "the intermediate was not replaced: the CA's log says why", err)
	}
	if fresh.State == ca.StatePrepared {
		s.revocations.renewWhen(fresh.ID, old, within)
	} else {
		s.renewFrom(old, within)
	}
	s.log.InfoContext(ctx, "intermediate replaced", "actor", c.actor, "authority", fresh.ID, "request_id", c.requestID)
	return &adminv1.RotateIntermediateResponse{Authority: authorityProto(fresh)}, nil
}

// RenewSVIDs implements adminv1.AdminServiceServer.
func (a *adminService) RenewSVIDs(ctx context.Context, req *adminv1.RenewSVIDsRequest) (*adminv1.RenewSVIDsResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	within, err := rotateWithin(req.GetWithin())
	if err != nil {
		return nil, err
	}
	if err := a.s.checkClock(); err != nil {
		return nil, err
	}
	if err := a.s.recordOrder(ctx, c, "", within); err != nil {
		return nil, err
	}
	resp := new(adminv1.RenewSVIDsResponse)
	order := a.s.orders.add(time.Now(), "", within)
	for _, session := range a.s.hub.all() {
		session.order(order)
		resp.Nodes++
	}
	a.s.log.InfoContext(ctx, "renewal of all svids ordered", "actor", c.actor, "nodes", resp.GetNodes(), "request_id", c.requestID)
	return resp, nil
}

// recordOrder records who ordered a renewal, before it is ordered.
func (s *Server) recordOrder(ctx context.Context, c *caller, authority string, within time.Duration) error {
	r := s.newRecord(c, ledgerv1.Event_EVENT_RENEWAL_ORDERED)
	r.Order = &ledgerv1.Order{Authority: authority, Within: durationpb.New(within), Nodes: clamp(s.hub.count())}
	if err := s.append(ctx, r); err != nil {
		return fail(kindUnavailable, "nothing was ordered: the ledger cannot write now", err)
	}
	return nil
}

// rotateWithin checks over which time renewals are to be spread.
func rotateWithin(d *durationpb.Duration) (time.Duration, error) {
	within := d.AsDuration()
	if within < 0 || within > maxRotateWithin {
		return 0, fail(kindInvalid, fmt.Sprintf("within is %s: write 0 to %s", within, maxRotateWithin), nil)
	}
	return within, nil
}

// GetStatus implements adminv1.AdminServiceServer.
func (a *adminService) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	s := a.s
	entries := s.registry.Entries()
	_, sequence := s.cfg.CA.Bundle()
	resp := &adminv1.GetStatusResponse{
		TrustDomain: s.cfg.TrustDomain.Name(), Version: s.cfg.Version, Instance: s.cfg.Instance,
		StartedAt: timestamppb.New(s.started), Revision: entries.Revision, BundleSequence: sequence,
		Entries:        clamp(entries.Set.Len() + len(entries.Broken)),
		Nodes:          clamp(s.registry.CountNodes()),
		NodesConnected: clamp(s.hub.count()),
		Records:        s.cfg.Ledger.Size(), Issued: s.issued.Load(), Refused: s.refused.Load(),
		OutageBudget: durationpb.New(s.outageBudget(entries)),
	}
	for _, condition := range s.cfg.Health.Conditions() {
		resp.Conditions = append(resp.Conditions, &adminv1.Condition{
			Name: condition.Name, Severity: severityText(condition.Severity), Message: condition.Message,
			Since: timestamppb.New(condition.Since),
		})
	}
	return resp, nil
}

func severityText(s health.Severity) string { return s.String() }

func clamp(n int) uint32 { return uint32(min(max(n, 0), 1<<31)) }

// outageBudget is how long all workloads keep valid X.509-SVIDs if the CA
// stopped now: renewed at half of their life, the shortest-lived have half of it
// left at worst.
func (s *Server) outageBudget(entries *registry.Entries) time.Duration {
	shortest := time.Duration(0)
	for e := range entries.Set.All() {
		ttl := e.TTL()
		if ttl == 0 {
			ttl = s.cfg.DefaultTTL
		}
		if shortest == 0 || ttl < shortest {
			shortest = ttl
		}
	}
	if shortest == 0 {
		shortest = s.cfg.DefaultTTL
	}
	return shortest / 2
}
