package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server/registry"
)

// Nodes and quarantines in the Anchor:
//
//  1. every 15 s, and at the end, what is in force is noted, with how many records
//     the ledger had by then
//  2. at the start, the records since then are read: that is what is wanted
//  3. where the store allows more than that, it is not believed: the ban, the
//     eviction, the quarantine holds; a node whose facts or certificate were never
//     recorded has to attest again
//  4. that is recorded, put right in the store, and an alarm

// anchorRecords is after how many records the file is written though nothing in it
// has changed, so that few are read at the start.
const anchorRecords = 20_000

// Reasons of EVENT_STORE_EDITED.
const (
	reasonBanMissing        = "ban_missing"
	reasonEvictionMissing   = "eviction_missing"
	reasonNodeUnrecorded    = "node_unrecorded"
	reasonQuarantineMissing = "quarantine_missing"
)

// anchoredNodes are the file's part about nodes and quarantines.
type anchoredNodes struct {
	// Version is that of the program that noted it.
	Version     string                  `json:"version,omitempty"`
	NodeRecords uint64                  `json:"node_records,omitempty"` // in the journal when it was noted
	Nodes       map[string]anchoredNode `json:"nodes"`                  // by SPIFFE ID
	Quarantines []*registry.Quarantine  `json:"quarantines,omitempty"`
	// Tokens are by SHA-256; nil in the file of a version that did not note them.
	Tokens map[string]anchoredToken `json:"tokens"`
}

type anchoredNode struct {
	State  registry.State `json:"state"`
	Reason string         `json:"reason,omitempty"` // of a ban or an eviction
	Digest string         `json:"digest,omitempty"` // of an active one
}

// attestedDigest is that of what a node may do by: its facts, and its certificate.
func attestedDigest(attributes *attributesv1.Node, serial []byte) string {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(attributes)
	if err != nil {
		return "" // attributes with invalid UTF-8 do not get here; it equals nothing
	}
	h := sha256.New()
	fmt.Fprintf(h, "%x ", bytes.TrimLeft(serial, "\x00"))
	h.Write(raw)
	return hex.EncodeToString(h.Sum(nil))
}

// anchorNode notes what a node is.
func anchorNode(n *registry.Node) anchoredNode {
	if n.State == registry.Active {
		return anchoredNode{State: n.State, Digest: attestedDigest(n.Attributes, n.Serial)}
	}
	return anchoredNode{State: n.State, Reason: n.StateReason}
}

// wanted is what nodes and quarantines have to be, by the file and the records
// since. nil wants nothing.
type wanted struct {
	nodes       map[string]*wantedNode
	quarantines map[string]*registry.Quarantine // by name
	tokens      wantedTokens
	archived    bool // there were records that are not known any more
	facts       bool // what nodes attested is known
	begun       bool // the ledger has records of a CA that was in use
}

// wantedNode is a node. Of an active one, all digests since the file was written are
// good: the last may have been recorded and never stored.
type wantedNode struct {
	state   registry.State
	reason  string
	digests []string
}

// wantedNodes reads what is wanted; nil if nobody knows, as with a new ledger.
func (a *Anchor) wantedNodes(ctx context.Context, kept *anchored) (*wanted, error) {
	archived, err := ledger.Archived(a.journal.Dir())
	if err != nil {
		return nil, err
	}
	w := &wanted{
		nodes: make(map[string]*wantedNode), quarantines: make(map[string]*registry.Quarantine), facts: true,
		tokens: wantedTokens{open: make(map[string]anchoredToken), deleted: make(map[string]anchoredToken)},
	}
	from := uint64(0)
	if kept != nil && kept.Nodes != nil {
		from = min(kept.NodeRecords, a.journal.Size())
		w.facts = kept.Version == a.version
		for id, n := range kept.Nodes {
			w.nodes[id] = &wantedNode{state: n.State, reason: n.Reason, digests: []string{n.Digest}}
		}
		for _, q := range kept.Quarantines {
			w.quarantines[q.Name()] = q
		}
		maps.Copy(w.tokens.open, kept.Tokens)
		if kept.Tokens == nil && from > 0 {
			if err := scan(ctx, a.journal.Dir(), 0, w.tokens.take); err != nil {
				return nil, err
			}
		}
	}
	w.archived = from < archived.Size
	if err := scan(ctx, a.journal.Dir(), from, w.take); err != nil {
		return nil, err
	}
	if kept == nil && !w.archived && !w.begun {
		return nil, nil //nolint:nilnil // whatever is in the store, a new ledger begins with
	}
	return w, nil
}

// take takes a record.
func (w *wanted) take(r *ledgerv1.Record) {
	w.begun = w.begun || r.GetBundle() != nil || r.GetEntry() != nil || r.GetNode() != nil
	w.tokens.take(r)
	if r.GetOutcome() != ledgerv1.Outcome_OUTCOME_SUCCESS {
		return
	}
	id := r.GetNode().GetId()
	switch r.GetEvent() {
	case ledgerv1.Event_EVENT_ATTEST, ledgerv1.Event_EVENT_RENEW_AGENT:
		n, ok := w.nodes[id]
		if !ok || r.GetEvent() == ledgerv1.Event_EVENT_ATTEST && n.state != registry.Active {
			n = &wantedNode{state: registry.Active}
			w.nodes[id] = n
		}
		n.digests = append(n.digests, attestedDigest(r.GetNode().GetAttributes(), r.GetCertificate().GetSerial()))
	case ledgerv1.Event_EVENT_EVICT, ledgerv1.Event_EVENT_UNBAN:
		w.nodes[id] = &wantedNode{state: registry.Evicted, reason: r.GetDetail()}
	case ledgerv1.Event_EVENT_BAN:
		w.nodes[id] = &wantedNode{state: registry.Banned, reason: r.GetDetail()}
	case ledgerv1.Event_EVENT_QUARANTINE:
		p := r.GetQuarantine()
		q := &registry.Quarantine{
			SPIFFEID: p.GetSpiffeId(), KeySHA256: p.GetKeySha256(), Serial: p.GetSerial(),
			Reason: r.GetDetail(), CreatedBy: r.GetActor(), CreatedAt: r.GetTime().AsTime(),
		}
		if p.GetLifted() {
			delete(w.quarantines, q.Name())
		} else {
			w.quarantines[q.Name()] = q
		}
	default:
	}
}

// edit is something in the store that is not believed.
type edit struct {
	reason, text string
	node         *registry.Node       // as it is in force, or
	quarantine   *registry.Quarantine // that is in force
}

// judge returns what of the store is not believed, at now.
func (w *wanted) judge(now time.Time, nodes []*registry.Node, quarantines []*registry.Quarantine) []edit {
	if w == nil {
		return nil
	}
	var edits []edit
	stored := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		stored[n.ID] = true
		want, known := w.nodes[n.ID]
		next := *n
		next.Previous, next.PreviousUntil = nil, time.Time{}
		switch {
		case n.State == registry.Banned:
			// No harm in it.
		case known && want.state == registry.Banned:
			next.State, next.StateReason = registry.Banned, want.reason
			edits = append(edits, edit{reason: reasonBanMissing, text: "the ban of " + n.ID, node: &next})
		case n.State == registry.Evicted:
		case known && want.state == registry.Evicted:
			next.State, next.StateReason = registry.Evicted, want.reason
			edits = append(edits, edit{reason: reasonEvictionMissing, text: "the eviction of " + n.ID, node: &next})
		case known && (!w.facts || slices.Contains(want.digests, attestedDigest(n.Attributes, n.Serial))):
		case !known && w.archived && now.After(n.NotAfter):
			// Its records were archived, and its certificate is worth nothing.
		default:
			next.State, next.StateReason = registry.Evicted, "the ledger has no record of the node as it was in the database"
			edits = append(edits, edit{reason: reasonNodeUnrecorded, text: "the facts of " + n.ID, node: &next})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		if want := w.nodes[id]; want.state == registry.Banned && !stored[id] {
			edits = append(edits, edit{
				reason: reasonBanMissing, text: "the ban of " + id,
				node: &registry.Node{ID: id, Attributes: new(attributesv1.Node), State: registry.Banned, StateReason: want.reason},
			})
		}
	}
	there := make(map[string]bool, len(quarantines))
	for _, q := range quarantines {
		there[q.Name()] = true
	}
	for _, name := range slices.Sorted(maps.Keys(w.quarantines)) {
		if !there[name] {
			edits = append(edits, edit{reason: reasonQuarantineMissing, text: "the quarantine of " + name, quarantine: w.quarantines[name]})
		}
	}
	return edits
}

// accept is what is wanted of a store that is accepted though it is behind: what its
// rows say, but for what was withdrawn since.
func (w *wanted) accept(nodes []*registry.Node, quarantines []*registry.Quarantine) anchoredNodes {
	next := anchoredNodes{Nodes: make(map[string]anchoredNode, len(nodes)), Quarantines: slices.Clone(quarantines)}
	for _, n := range nodes {
		next.Nodes[n.ID] = anchorNode(n)
	}
	if w == nil {
		return next
	}
	for id, want := range w.nodes {
		if want.state != registry.Active && next.Nodes[id].State != registry.Banned {
			next.Nodes[id] = anchoredNode{State: want.state, Reason: want.reason}
		}
	}
	for _, q := range w.quarantines {
		if !slices.ContainsFunc(quarantines, func(other *registry.Quarantine) bool { return other.Name() == q.Name() }) {
			next.Quarantines = append(next.Quarantines, q)
		}
	}
	return next
}

// believe returns the nodes and quarantines of the store as they are in force: what
// is not believed is recorded, and put right in the store.
func (s *Server) believe(ctx context.Context, nodes []*registry.Node, quarantines []*registry.Quarantine) ([]*registry.Node, []*registry.Quarantine, error) {
	a := s.cfg.Anchor
	if a == nil {
		return nodes, quarantines, nil
	}
	edits := a.wanted.judge(time.Now(), nodes, quarantines)
	records := make([]*ledgerv1.Record, 0, len(edits))
	for _, e := range edits {
		r := s.ownRecord(ledgerv1.Event_EVENT_STORE_EDITED)
		r.Outcome, r.Reason, r.Detail = ledgerv1.Outcome_OUTCOME_REFUSED, e.reason, e.text+" is not in the database as it was recorded, and holds"
		if e.node != nil {
			r.Node = nodeRef(e.node, "")
		} else {
			q := e.quarantine
			r.Quarantine = &ledgerv1.Quarantine{SpiffeId: q.SPIFFEID, KeySha256: q.KeySHA256, Serial: q.Serial}
		}
		if e.reason == reasonNodeUnrecorded {
			r.Detail = e.text + " are not those that were recorded: it has to attest again"
		}
		records = append(records, r)
		s.log.ErrorContext(ctx, "somebody has written to the database", "reason", e.reason, "detail", r.GetDetail())
	}
	if err := s.append(ctx, records...); err != nil {
		return nil, nil, fmt.Errorf("record what is not believed of the store: %w", err)
	}
	for _, e := range edits {
		var err error
		switch i := slices.IndexFunc(nodes, func(n *registry.Node) bool { return e.node != nil && n.ID == e.node.ID }); {
		case e.quarantine != nil:
			quarantines = append(quarantines, e.quarantine)
			err = s.cfg.Store.PutQuarantines(ctx, e.quarantine)
		case i >= 0:
			nodes[i] = e.node
			err = s.cfg.Store.PutNodes(ctx, e.node)
		default:
			nodes = append(nodes, e.node)
			err = s.cfg.Store.PutNodes(ctx, e.node)
		}
		if err != nil { // it is in force all the same, and judged again at the next start
			s.log.ErrorContext(ctx, "the database cannot be put right", "reason", e.reason, "err", err)
		}
		a.noteEdited(e.text)
	}
	return nodes, quarantines, nil
}

// noteNodes notes which nodes, quarantines and join tokens are in force.
func (s *Server) noteNodes(ctx context.Context) {
	a := s.cfg.Anchor
	if a == nil {
		return
	}
	// A change that is recorded is in force: none is on its way meanwhile.
	for i := range s.nodeMu {
		s.nodeMu[i].Lock()
	}
	s.quarantineMu.Lock()
	next := anchoredNodes{Version: a.version, NodeRecords: a.journal.Size(), Quarantines: s.registry.Quarantines().All()}
	nodes := s.registry.Nodes()
	s.quarantineMu.Unlock()
	for i := range s.nodeMu {
		s.nodeMu[i].Unlock()
	}
	// Tokens may be newer than that many records: to read a change again changes nothing.
	s.tokenMu.Lock()
	next.Tokens = a.tokensNow(time.Now())
	s.tokenMu.Unlock()
	next.Nodes = make(map[string]anchoredNode, len(nodes))
	for _, n := range nodes {
		next.Nodes[n.ID] = anchorNode(n)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kept == nil {
		return // nothing is in force yet
	}
	if old := a.kept.anchoredNodes; old.Version == next.Version && next.NodeRecords-old.NodeRecords < anchorRecords &&
		maps.Equal(old.Nodes, next.Nodes) && old.Tokens != nil && maps.Equal(old.Tokens, next.Tokens) && slices.Equal(old.Quarantines, next.Quarantines) {
		return
	}
	all := *a.kept
	all.anchoredNodes = next
	s.writeAnchor(ctx, &all)
}
