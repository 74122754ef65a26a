package server

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/internal/diff"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Limits of the entries.
const (
	maxEntries     = 50_000
	maxLaggards    = 100
	inspectTimeout = 5 * time.Second
)

// Actions of a change.
const (
	actionCreated   = "created"
	actionChanged   = "changed"
	actionUnchanged = "unchanged"
	actionDeleted   = "deleted"
)

// compileAll compiles entries on all cores. Of each index, either the entry or
// the error is set.
func (s *Server) compileAll(entries []*entryv1.Entry) ([]*identity.Entry, []error) {
	compiled, errs := make([]*identity.Entry, len(entries)), make([]error, len(entries))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(entries), runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for {
				i := int(next.Add(1) - 1)
				if i >= len(entries) {
					return
				}
				compiled[i], errs[i] = identity.Compile(s.cfg.TrustDomain, entries[i])
			}
		})
	}
	wg.Wait()
	return compiled, errs
}

// change is what becomes of one entry.
type change struct {
	action        string
	before, after *entryv1.Entry
	compiled      *identity.Entry // after
}

func (c *change) name() string {
	if c.after != nil {
		return c.after.GetName()
	}
	return c.before.GetName()
}

// ApplyEntries implements adminv1.AdminServiceServer.
func (a *adminService) ApplyEntries(ctx context.Context, req *adminv1.ApplyEntriesRequest) (*adminv1.ApplyEntriesResponse, error) {
	return a.s.applyEntries(ctx, req, "")
}

// applyEntries applies what a second person has approved if approved is the basis of
// that, and else whatever takes none.
func (s *Server) applyEntries(ctx context.Context, req *adminv1.ApplyEntriesRequest, approved string) (*adminv1.ApplyEntriesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(req.GetEntries()))
	for i, e := range req.GetEntries() {
		names[i] = e.GetName()
	}
	if err := declared(names); err != nil {
		return nil, err
	}
	s.entryMu.Lock()
	defer s.entryMu.Unlock()
	current := s.registry.Entries()
	changes, err := s.plan(current, req)
	if err != nil {
		return nil, err
	}
	resp := &adminv1.ApplyEntriesResponse{Revision: current.Revision}
	switch {
	case req.GetDryRun() || !s.cfg.TwoPersonsEntries || !slices.ContainsFunc(changes, (*change).givesPower):
	case approved == "":
		resp.Held, err = s.holdEntries(ctx, c, current, changes)
		return resp, err
	case approved != entriesBasis(current, req.GetEntries()):
		return nil, errEntriesChanged
	}
	if !req.GetDryRun() {
		if resp.Revision, resp.Withdrawal, err = s.commit(ctx, c, current, changes); err != nil {
			return nil, err
		}
	}
	for _, ch := range changes {
		resp.Changes = append(resp.Changes, &adminv1.ApplyEntriesResponse_Change{
			Name: ch.name(), Action: ch.action, Before: ch.before, After: ch.after,
		})
	}
	return resp, nil
}

// plan compiles a request's entries and says what each of them changes. All that
// is wrong is reported at once.
func (s *Server) plan(current *registry.Entries, req *adminv1.ApplyEntriesRequest) ([]*change, error) {
	// Fields that the CA sets are not taken from a request.
	wanted := make([]*entryv1.Entry, len(req.GetEntries()))
	seen := make(map[string]bool, len(wanted))
	var wrong []*identity.EntryError
	for i, e := range req.GetEntries() {
		if e == nil {
			return nil, fail(kindInvalid, fmt.Sprintf("entry %d of the request is empty", i+1), nil)
		}
		wanted[i] = proto.CloneOf(e)
		wanted[i].Revision = current.Revision + 1
		if seen[e.GetName()] {
			wrong = append(wrong, &identity.EntryError{Entry: e.GetName(), Fields: []identity.FieldError{{
				Field: "name", Message: "there are two entries of this name", Hint: "give each entry a name of its own",
			}}})
		}
		seen[e.GetName()] = true
	}
	compiled, errs := s.compileAll(wanted)
	for _, err := range errs {
		var e *identity.EntryError
		switch {
		case err == nil:
		case errors.As(err, &e):
			wrong = append(wrong, e)
		default:
			return nil, fail(kindInternal, "internal error", err)
		}
	}
	if len(wrong) > 0 {
		return nil, invalidEntries(wrong)
	}
	var changes []*change
	for i, e := range wanted {
		ch := &change{action: actionCreated, after: e, compiled: compiled[i]}
		if before, ok := current.Proto(e.GetName()); ok {
			ch.before, ch.action = before, actionChanged
			if old, ok := current.Set.Get(e.GetName()); ok && old.Digest() == compiled[i].Digest() {
				ch.action, ch.after, ch.compiled = actionUnchanged, before, old
			}
		}
		changes = append(changes, ch)
	}
	if req.GetPrune() {
		for _, name := range current.Names() {
			if !seen[name] && !strings.HasPrefix(name, DeclaredPrefix) {
				before, _ := current.Proto(name)
				changes = append(changes, &change{action: actionDeleted, before: before})
			}
		}
	}
	slices.SortFunc(changes, func(a, b *change) int { return strings.Compare(a.name(), b.name()) })
	total := current.Set.Len() + len(current.Broken)
	for _, ch := range changes {
		switch ch.action {
		case actionCreated:
			total++
		case actionDeleted:
			total--
		default:
		}
	}
	if total > maxEntries {
		return nil, fail(kindConflict, fmt.Sprintf("there would be %d entries, at most %d are allowed: "+
			"one entry with a template can stand for many workloads", total, maxEntries), nil)
	}
	return changes, nil
}

// invalidEntries says what is wrong with the entries of a request.
func invalidEntries(wrong []*identity.EntryError) error {
	first := "an entry is not valid"
	if len(wrong[0].Fields) > 0 {
		f := wrong[0].Fields[0]
		first = violationField(wrong[0].Entry, f) + ": " + violationText(f)
	}
	n := 0
	for _, e := range wrong {
		n += len(e.Fields)
	}
	if n > 1 {
		first = fmt.Sprintf("%s (and %d more problems)", first, n-1)
	}
	f := fail(kindInvalid, first, nil)
	f.entries = wrong
	return f
}

// commit stores the changes, records them before they are committed, and puts
// them into force. It returns the id of the withdrawal, if it deleted an entry.
// entryMu is held.
func (s *Server) commit(ctx context.Context, c *caller, current *registry.Entries, changes []*change) (revision uint64, withdrawal string, err error) {
	var (
		upserts  []*entryv1.Entry
		removed  []string
		compiled []*identity.Entry
		records  []*change
	)
	for _, ch := range changes {
		switch ch.action {
		case actionCreated, actionChanged:
			upserts, compiled = append(upserts, ch.after), append(compiled, ch.compiled)
		case actionDeleted:
			removed = append(removed, ch.before.GetName())
		default:
			continue
		}
		records = append(records, ch)
	}
	if len(records) == 0 {
		return current.Revision, "", nil
	}
	// Once begun, it is carried through, whether or not the caller still waits.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*storeTimeout)
	defer cancel()
	revision, err = s.cfg.Store.ApplyEntries(ctx, upserts, removed, func(revision uint64) error {
		if revision != current.Revision+1 {
			// The trust bundle took a revision meanwhile.
			for _, e := range upserts {
				e.Revision = revision
			}
			var errs []error
			compiled, errs = s.compileAll(upserts)
			if err := errors.Join(errs...); err != nil {
				return err
			}
		}
		return s.recordEntries(ctx, c, revision, records)
	})
	if err != nil {
		s.log.ErrorContext(ctx, "entries cannot be changed", "actor", c.actor, "request_id", c.requestID, "err", err)
		return 0, "", fail(kindUnavailable, "nothing was changed: the store or the ledger cannot write now", err)
	}
	apply := func() uint64 {
		s.registry.Apply(revision, compiled, removed)
		return revision
	}
	if len(removed) > 0 {
		withdrawal = s.beginWithdrawal(c, withdrawalEntry, strings.Join(removed, ", "), s.entitled(), apply)
	} else {
		apply()
	}
	s.hub.wakeAll()
	s.below.wakeAll()
	if len(removed) > 0 {
		s.revoke(ctx, &revocation{withdrawal: withdrawal, why: truncate("entries are deleted: " + strings.Join(removed, ", ")), actor: c.actor, match: ofEntries(removed)})
	}
	s.cfg.Anchor.changed(records)
	s.reportBroken()
	s.keepAnchor(ctx)
	for _, ch := range records {
		s.metrics.entryChanges.WithLabelValues(ch.action).Inc()
	}
	s.log.InfoContext(ctx, "entries changed", "actor", c.actor, "revision", revision,
		"upserts", len(upserts), "removed", len(removed), "request_id", c.requestID)
	return revision, withdrawal, nil
}

// recordEntries records each change with its diff.
func (s *Server) recordEntries(ctx context.Context, c *caller, revision uint64, changes []*change) error {
	records := make([]*ledgerv1.Record, len(changes))
	for i, ch := range changes {
		r := s.newRecord(c, ledgerv1.Event_EVENT_ENTRY_APPLIED)
		r.Entry = &ledgerv1.EntryRef{Name: ch.name(), Revision: revision}
		if ch.action == actionDeleted {
			r.Event = ledgerv1.Event_EVENT_ENTRY_DELETED
		} else {
			r.Entry = entryRef(ch.compiled)
		}
		r.Definition, r.Diff = definitionOf(ch.before, ch.after), entryDiff(ch.before, ch.after)
		records[i] = r
	}
	if err := s.append(ctx, records...); err != nil {
		return fmt.Errorf("record change of entries: %w", err)
	}
	return nil
}

// DeleteEntries implements adminv1.AdminServiceServer.
func (a *adminService) DeleteEntries(ctx context.Context, req *adminv1.DeleteEntriesRequest) (*adminv1.DeleteEntriesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := declared(req.GetNames()); err != nil {
		return nil, err
	}
	s := a.s
	s.entryMu.Lock()
	defer s.entryMu.Unlock()
	current := s.registry.Entries()
	names := slices.Sorted(slices.Values(req.GetNames()))
	names = slices.Compact(names)
	changes := make([]*change, 0, len(names))
	for _, name := range names {
		before, ok := current.Proto(name)
		if !ok {
			return nil, fail(kindNotFound, fmt.Sprintf("there is no entry %q: nothing was deleted", truncate(name)), nil)
		}
		changes = append(changes, &change{action: actionDeleted, before: before})
	}
	revision, withdrawal, err := s.commit(ctx, c, current, changes)
	if err != nil {
		return nil, err
	}
	return &adminv1.DeleteEntriesResponse{Revision: revision, Withdrawal: withdrawal}, nil
}

// ListEntries implements adminv1.AdminServiceServer.
func (a *adminService) ListEntries(_ context.Context, req *adminv1.ListEntriesRequest) (*adminv1.ListEntriesResponse, error) {
	current := a.s.registry.Entries()
	names := req.GetNames()
	if len(names) == 0 {
		names = current.Names()
	}
	resp := &adminv1.ListEntriesResponse{Revision: current.Revision}
	for _, name := range names {
		e, ok := current.Proto(name)
		if !ok {
			return nil, fail(kindNotFound, fmt.Sprintf("there is no entry %q", truncate(name)), nil)
		}
		resp.Entries = append(resp.Entries, e)
	}
	return resp, nil
}

// Explain implements adminv1.AdminServiceServer.
func (a *adminService) Explain(ctx context.Context, req *adminv1.ExplainRequest) (*adminv1.ExplainResponse, error) {
	s := a.s
	resp := new(adminv1.ExplainResponse)
	switch n := req.GetNode().(type) {
	case *adminv1.ExplainRequest_NodeId:
		known, ok := s.registry.Node(n.NodeId)
		if !ok {
			return nil, fail(kindNotFound, fmt.Sprintf("there is no node %q", truncate(n.NodeId)), nil)
		}
		resp.Node = known.Attributes
	case *adminv1.ExplainRequest_NodeAttributes:
		resp.Node = n.NodeAttributes
	case nil:
		resp.Node = new(attributesv1.Node)
	default:
		return nil, fail(kindInvalid, "the node is given in an unknown way", nil)
	}
	switch t := req.GetTarget().(type) {
	case *adminv1.ExplainRequest_Workload:
		resp.Workload = t.Workload
	case *adminv1.ExplainRequest_Pid:
		answer, err := s.inspect(ctx, req.GetNodeId(), t.Pid)
		if err != nil {
			return nil, err
		}
		resp.Workload, resp.Instance = answer.GetWorkload(), answer.GetInstance()
	default:
		return nil, fail(kindInvalid, "say which workload: by its attributes, or by a pid on the node", nil)
	}
	current := s.registry.Entries()
	names := req.GetNames()
	if len(names) == 0 {
		for e := range current.Set.All() {
			names = append(names, e.Name())
		}
	}
	facts := identity.NewFacts(resp.GetNode(), resp.GetWorkload())
	for _, name := range names {
		entry, ok := current.Set.Get(name)
		if !ok {
			if _, broken := current.Broken[name]; broken {
				resp.Verdicts = append(resp.Verdicts, &adminv1.ExplainResponse_Verdict{
					Name: name, Why: "the entry does not compile and is not in force: apply it again",
				})
				continue
			}
			return nil, fail(kindNotFound, fmt.Sprintf("there is no entry %q", truncate(name)), nil)
		}
		resp.Verdicts = append(resp.Verdicts, verdictOf(entry, facts))
	}
	slices.SortStableFunc(resp.Verdicts, func(a, b *adminv1.ExplainResponse_Verdict) int {
		if d := nearness(a) - nearness(b); d != 0 {
			return d
		}
		return strings.Compare(a.GetName(), b.GetName())
	})
	return resp, nil
}

// inspect asks a node's agent what it would attest of a process.
func (s *Server) inspect(ctx context.Context, nodeID string, pid int64) (*nodeInspected, error) {
	session, ok := s.hub.get(nodeID)
	if !ok {
		return nil, fail(kindConflict, fmt.Sprintf("node %q is not connected: only a connected node can look at a process", truncate(nodeID)), nil)
	}
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	answer, err := session.inspect(ctx, pid)
	if err != nil {
		return nil, err
	}
	if answer.GetError() != "" {
		return nil, fail(kindConflict, "the node's agent cannot attest the process: "+truncate(answer.GetError()), nil)
	}
	if proto.Size(answer.GetWorkload()) > maxAttributeBytes || len(answer.GetInstance()) > maxInstanceBytes {
		return nil, fail(kindConflict, "the node's agent sent too much", nil)
	}
	return answer, nil
}

func verdictOf(entry *identity.Entry, facts *identity.Facts) *adminv1.ExplainResponse_Verdict {
	v := &adminv1.ExplainResponse_Verdict{Name: entry.Name()}
	if miss := entry.Explain(facts); miss != (identity.Miss{}) {
		v.Field, v.Term, v.Why = miss.Field, miss.Term, miss.Why
		return v
	}
	id, err := entry.Render(facts)
	if err != nil {
		v.Field, v.Why = "spiffe_id", err.Error()
		return v
	}
	v.Matches, v.SpiffeId, v.DnsNames = true, id.ID.String(), id.DNSNames
	return v
}

// nearness orders verdicts: the later the field that failed, the nearer.
func nearness(v *adminv1.ExplainResponse_Verdict) int {
	switch {
	case v.GetMatches():
		return 0
	case v.GetField() == "dns_names":
		return 1
	case v.GetField() == "spiffe_id":
		return 2
	case v.GetField() == "workloads":
		return 3
	case v.GetField() == "nodes":
		return 4
	default:
		return 5
	}
}

// EntryStatus implements adminv1.AdminServiceServer.
func (a *adminService) EntryStatus(context.Context, *adminv1.EntryStatusRequest) (*adminv1.EntryStatusResponse, error) {
	resp := &adminv1.EntryStatusResponse{Revision: a.s.registry.Entries().Revision}
	for _, session := range a.s.hub.all() {
		resp.NodesConnected++
		if session.inForce().revision >= resp.GetRevision() {
			resp.NodesInForce++
		} else if len(resp.GetLaggards()) < maxLaggards {
			resp.Laggards = append(resp.Laggards, session.nodeID)
		}
	}
	return resp, nil
}

// entryDiff returns the change of an entry as a diff of its YAML.
func entryDiff(before, after *entryv1.Entry) string {
	text := func(e *entryv1.Entry) string {
		if e == nil {
			return ""
		}
		return identity.FormatYAML(e)
	}
	return diff.Lines(text(before), text(after))
}
