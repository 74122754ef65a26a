package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
	nodev1 "github.com/meshid/meshid/proto/node/v1"

	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

const (
	// maxQuarantines bounds what is sent to each agent at each change.
	maxQuarantines = 10_000
	// maxLaggingNodes bounds how many nodes are named.
	maxLaggingNodes = 16

	quarantineAdd  = "add"
	quarantineLift = "lift"
)

// AddQuarantine implements adminv1.AdminServiceServer. As with a ban, all are in force
// in memory first, so that nothing is handed out from then on whatever the disk does;
// then stored and recorded; the agents are told meanwhile.
func (a *adminService) AddQuarantine(ctx context.Context, req *adminv1.AddQuarantineRequest) (*adminv1.AddQuarantineResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	s := a.s
	all, err := s.parseQuarantines(req.GetQuarantine(), req.GetQuarantines(), func(q *registry.Quarantine, p *adminv1.Quarantine) error {
		switch reason := p.GetReason(); {
		case reason == "":
			return fail(kindInvalid, "a reason is required", nil)
		case len(reason) > maxReasonBytes:
			return fail(kindInvalid, fmt.Sprintf("the reason has %d bytes, at most %d are allowed", len(reason), maxReasonBytes), nil)
		}
		q.Reason, q.CreatedBy, q.CreatedAt = p.GetReason(), c.actor, c.began
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.quarantineMu.Lock()
	defer s.quarantineMu.Unlock()
	before, added := s.registry.Quarantines(), 0
	for _, q := range all {
		if _, again := before.Get(q.Name()); !again {
			added++
		}
	}
	if added > 0 && before.Len()+added > maxQuarantines {
		return nil, fail(kindConflict, fmt.Sprintf("there are %d quarantines, and %d at most: lift some, or delete entries instead", before.Len(), maxQuarantines), nil)
	}
	what := quarantinesText(all)
	withdrawal := s.beginWithdrawal(c, withdrawalQuarantine, what, s.entitled(), func() uint64 {
		s.registry.ChangeQuarantines(time.Now(), all)
		return s.registry.Quarantines().Sequence
	})
	s.hub.wakeAll()
	s.below.wakeAll()
	s.revoke(ctx, &revocation{withdrawal: withdrawal, why: truncate(what + " is quarantined: " + all[0].Reason), actor: c.actor, match: ofQuarantines(all)})
	s.metrics.quarantines.WithLabelValues(quarantineAdd).Add(float64(len(all)))
	s.log.InfoContext(ctx, "quarantined", "what", what, "count", len(all), "actor", c.actor, "request_id", c.requestID)

	storeCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeoutOf(len(all)))
	defer cancel()
	stored := s.cfg.Store.PutQuarantines(storeCtx, all...)
	recorded := s.appendTogether(ctx, s.quarantineRecords(c, all, false))
	if err := errors.Join(stored, recorded); err != nil {
		const problem = "it is in force, but could not be written and may be forgotten when the CA restarts: look at the disk, then do it again"
		s.log.ErrorContext(ctx, "quarantine is not written", "what", what, "err", err)
		s.cfg.Health.Set(conditionQuarantine, health.Error, "the quarantine of "+what+" is in force, but could not be written: look at the disk, then add it again")
		return nil, fail(kindUnavailable, problem, err)
	}
	s.cfg.Health.Clear(conditionQuarantine)
	return &adminv1.AddQuarantineResponse{Nodes: clamp(s.hub.count()), Withdrawal: withdrawal}, nil
}

// LiftQuarantine implements adminv1.AdminServiceServer. The other way round: first
// the records, last the effect.
func (a *adminService) LiftQuarantine(ctx context.Context, req *adminv1.LiftQuarantineRequest) (*adminv1.LiftQuarantineResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	s := a.s
	asked, err := s.parseQuarantines(req.GetQuarantine(), req.GetQuarantines(), func(*registry.Quarantine, *adminv1.Quarantine) error { return nil })
	if err != nil {
		return nil, err
	}
	s.quarantineMu.Lock()
	defer s.quarantineMu.Unlock()
	var all, missing []*registry.Quarantine
	for _, q := range asked {
		if found, ok := s.registry.Quarantines().Get(q.Name()); ok {
			all = append(all, found)
		} else {
			missing = append(missing, q)
		}
	}
	if len(missing) > 0 {
		return nil, fail(kindNotFound, quarantinesText(missing)+" is not quarantined, and nothing was changed: `ca quarantine list` shows what is", nil)
	}
	storeCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeoutOf(len(all)))
	defer cancel()
	record := func() error { return s.appendTogether(ctx, s.quarantineRecords(c, all, true)) }
	if err := s.cfg.Store.DeleteQuarantines(storeCtx, record, all...); err != nil {
		return nil, fail(kindUnavailable, "the quarantine stays: the store or the ledger cannot write now", err)
	}
	s.registry.ChangeQuarantines(time.Now(), nil, all...)
	s.hub.wakeAll()
	s.below.wakeAll()
	s.metrics.quarantines.WithLabelValues(quarantineLift).Add(float64(len(all)))
	s.log.InfoContext(ctx, "quarantine lifted", "what", quarantinesText(all), "count", len(all), "actor", c.actor, "request_id", c.requestID)
	return &adminv1.LiftQuarantineResponse{}, nil
}

// parseQuarantines checks what quarantines are of, and completes each. Of several of the
// same, the last one counts.
func (s *Server) parseQuarantines(one *adminv1.Quarantine, more []*adminv1.Quarantine, complete func(*registry.Quarantine, *adminv1.Quarantine) error) ([]*registry.Quarantine, error) {
	asked := more
	if one != nil || len(more) == 0 {
		asked = append(slices.Clone(more), one)
	}
	if len(asked) > maxQuarantines {
		return nil, fail(kindInvalid, fmt.Sprintf("%d quarantines, at most %d are allowed", len(asked), maxQuarantines), nil)
	}
	all := make([]*registry.Quarantine, 0, len(asked))
	at := make(map[string]int, len(asked))
	for _, p := range asked {
		q, err := s.parseQuarantine(p)
		if err == nil {
			err = complete(q, p)
		}
		if err != nil {
			return nil, err
		}
		if i, again := at[q.Name()]; again {
			all[i] = q
			continue
		}
		at[q.Name()] = len(all)
		all = append(all, q)
	}
	return all, nil
}

// quarantinesText names some for people.
func quarantinesText(all []*registry.Quarantine) string {
	names := make([]string, len(all))
	for i, q := range all {
		names[i] = q.Name()
	}
	return namesText(names)
}

// ListQuarantines implements adminv1.AdminServiceServer.
func (a *adminService) ListQuarantines(context.Context, *adminv1.ListQuarantinesRequest) (*adminv1.ListQuarantinesResponse, error) {
	resp := new(adminv1.ListQuarantinesResponse)
	quarantines := a.s.registry.Quarantines()
	for _, q := range quarantines.All() {
		resp.Quarantines = append(resp.Quarantines, &adminv1.Quarantine{
			SpiffeId: q.SPIFFEID, KeySha256: q.KeySHA256, Serial: q.Serial,
			Reason: q.Reason, CreatedBy: q.CreatedBy, CreatedAt: timestamppb.New(q.CreatedAt),
		})
	}
	for _, session := range a.s.hub.all() {
		resp.Nodes++
		switch {
		case quarantines == nil || session.inForce().quarantineSequence >= quarantines.Sequence:
			resp.NodesInForce++
		case len(resp.GetLagging()) < maxLaggingNodes:
			resp.Lagging = append(resp.Lagging, session.nodeID)
		default:
		}
	}
	return resp, nil
}

// parseQuarantine checks what a quarantine is of.
func (s *Server) parseQuarantine(p *adminv1.Quarantine) (*registry.Quarantine, error) {
	q := &registry.Quarantine{SPIFFEID: p.GetSpiffeId(), KeySHA256: p.GetKeySha256(), Serial: p.GetSerial()}
	n := 0
	for _, set := range []bool{q.SPIFFEID != "", len(q.KeySHA256) > 0, len(q.Serial) > 0} {
		if set {
			n++
		}
	}
	switch {
	case n != 1:
		return nil, fail(kindInvalid, "write one of spiffe_id, key_sha256 and serial", nil)
	case len(q.KeySHA256) > 0 && len(q.KeySHA256) != sha256.Size:
		return nil, fail(kindInvalid, fmt.Sprintf("key_sha256 has %d bytes: it is the SHA-256 of a public key, %d bytes", len(q.KeySHA256), sha256.Size), nil)
	case len(q.Serial) > maxSerialBytes:
		return nil, fail(kindInvalid, fmt.Sprintf("serial has %d bytes, at most %d are allowed", len(q.Serial), maxSerialBytes), nil)
	case q.SPIFFEID == "":
		return q, nil
	}
	id, err := identity.ParseID(q.SPIFFEID)
	if err != nil {
		return nil, fail(kindInvalid, "spiffe_id: "+truncate(err.Error()), err)
	}
	switch {
	case id.TrustDomain() != s.cfg.TrustDomain:
		return nil, fail(kindInvalid, fmt.Sprintf("spiffe_id is not one of %s, which is all that this CA issues", s.cfg.TrustDomain), nil)
	case id == identity.CAID(s.cfg.TrustDomain):
		return nil, fail(kindInvalid, "spiffe_id is the CA's own: replace its intermediate instead, with `ca authority rotate`", nil)
	}
	return q, nil
}

func (s *Server) quarantineRecords(c *caller, all []*registry.Quarantine, lifted bool) []*ledgerv1.Record {
	records := make([]*ledgerv1.Record, len(all))
	for i, q := range all {
		r := s.newRecord(c, ledgerv1.Event_EVENT_QUARANTINE)
		r.Detail, r.SpiffeId = q.Reason, q.SPIFFEID
		r.Quarantine = &ledgerv1.Quarantine{SpiffeId: q.SPIFFEID, KeySha256: q.KeySHA256, Serial: q.Serial, Lifted: lifted}
		records[i] = r
	}
	return records
}

// quarantinesProto is what agents are told.
func quarantinesProto(q *registry.Quarantines) *nodev1.Quarantines {
	p := new(nodev1.Quarantines)
	if q != nil {
		p.Sequence = q.Sequence
	}
	for _, q := range q.All() {
		switch {
		case q.SPIFFEID != "":
			sum := sha256.Sum256([]byte(q.SPIFFEID))
			p.SpiffeIdSha256 = append(p.SpiffeIdSha256, sum[:])
		case len(q.KeySHA256) > 0:
			p.KeySha256 = append(p.KeySha256, q.KeySHA256)
		default:
			p.Serials = append(p.Serials, q.Serial)
		}
	}
	return p
}
