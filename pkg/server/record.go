package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/server/registry"
)

// recordVersion is that of the ledger's records.
const recordVersion = 1

// newRecord returns a record of this CA about a call.
func (s *Server) newRecord(c *caller, event ledgerv1.Event) *ledgerv1.Record {
	r := s.ownRecord(event)
	r.Actor, r.RequestId = c.actor, c.requestID
	r.Took = durationpb.New(time.Since(c.began))
	return r
}

// ownRecord returns a record about something that nobody called for.
func (s *Server) ownRecord(event ledgerv1.Event) *ledgerv1.Record {
	return &ledgerv1.Record{
		Version:     recordVersion,
		Time:        timestamppb.Now(),
		Event:       event,
		Outcome:     ledgerv1.Outcome_OUTCOME_SUCCESS,
		TrustDomain: s.cfg.TrustDomain.Name(),
		CaInstance:  s.cfg.Instance,
		CaVersion:   s.cfg.Version,
	}
}

// append makes records durable, as one batch or, if they are very many, as
// several.
func (s *Server) append(ctx context.Context, records ...*ledgerv1.Record) error {
	for chunk := range slices.Chunk(records, maxItems) {
		drafts := make([]*ledger.Draft, len(chunk))
		for i, r := range chunk {
			drafts[i] = ledger.NewDraft(r, nil)
		}
		if err := s.appendDrafts(ctx, drafts); err != nil {
			return err
		}
	}
	return nil
}

// appendTogether makes records durable, all or none, as long as they are not too large
// for that.
func (s *Server) appendTogether(ctx context.Context, records []*ledgerv1.Record) error {
	drafts := make([]*ledger.Draft, len(records))
	for i, r := range records {
		drafts[i] = ledger.NewDraft(r, nil)
	}
	err := s.appendDrafts(ctx, drafts)
	if errors.Is(err, ledger.ErrRecord) && len(records) > maxItems {
		return s.append(ctx, records...)
	}
	return err
}

func (s *Server) appendDrafts(ctx context.Context, drafts []*ledger.Draft) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ledgerTimeout)
	defer cancel()
	_, err := s.cfg.Ledger.Append(ctx, drafts...)
	return err
}

func nodeRef(n *registry.Node, address string) *ledgerv1.NodeRef {
	return &ledgerv1.NodeRef{
		Id: n.ID, Address: address, AgentVersion: n.AgentVersion, Attributes: n.Attributes,
	}
}

// outcomeFor tells a refusal from what could not be done.
func outcomeFor(reason string) ledgerv1.Outcome {
	if reason == reasonUnavailable {
		return ledgerv1.Outcome_OUTCOME_ERROR
	}
	return ledgerv1.Outcome_OUTCOME_REFUSED
}

// attestors are the parts of a workload's attributes, each of which one attestor
// established, and the names that records have for every combination of them: a
// record is made a thousand times a second, of a handful of combinations.
type attestors struct {
	parts []protoreflect.FieldDescriptor
	ext   protoreflect.FieldDescriptor
	known sync.Map // uint64, one bit a part → []string, read only
}

var workloadAttestors = sync.OnceValue(func() *attestors {
	a := new(attestors)
	fields := (&attributesv1.Workload{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if f := fields.Get(i); f.IsMap() {
			a.ext = f
		} else {
			a.parts = append(a.parts, f)
		}
	}
	return a
})

// attestorsOf names the attestors whose facts are in w. The result must not be
// modified.
func attestorsOf(w *attributesv1.Workload) []string {
	a, m := workloadAttestors(), w.ProtoReflect()
	var set uint64
	for i, f := range a.parts {
		if m.Has(f) {
			set |= 1 << i
		}
	}
	var names []string
	if known, ok := a.known.Load(set); ok {
		names, _ = known.([]string)
	} else {
		for i, f := range a.parts {
			if set&(1<<i) != 0 {
				names = append(names, string(f.Name()))
			}
		}
		a.known.Store(set, slices.Clip(names))
	}
	for _, name := range slices.Sorted(maps.Keys(w.GetExt())) {
		names = append(slices.Clip(names), name)
	}
	return names
}

// nearestMiss says why an entry gives no identity.
func nearestMiss(entry *identity.Entry, facts *identity.Facts) *ledgerv1.Miss {
	m := entry.Explain(facts)
	if m.Field == "" {
		return nil
	}
	return &ledgerv1.Miss{Field: m.Field, Term: truncate(m.Term), Why: truncate(m.Why)}
}

// missText is a miss for a person.
func missText(m *ledgerv1.Miss) string {
	switch {
	case m == nil:
		return ""
	case m.GetTerm() == "":
		return truncate(m.GetField() + ": " + m.GetWhy())
	default:
		return truncate(m.GetField() + ": " + m.GetTerm() + ": " + m.GetWhy())
	}
}

// recordEntriesInForce records the entries that the CA has loaded from its store,
// so that every decision can be judged by what is in this journal.
func (s *Server) recordEntriesInForce(ctx context.Context, entries *registry.Entries) error {
	records := make([]*ledgerv1.Record, 0, entries.Set.Len()+len(entries.Broken))
	for e := range entries.Set.All() {
		r := s.ownRecord(ledgerv1.Event_EVENT_ENTRY_LOADED)
		r.Entry, r.Definition = entryRef(e), e.Proto()
		records = append(records, r)
	}
	for _, name := range slices.Sorted(maps.Keys(entries.Broken)) {
		r := s.ownRecord(ledgerv1.Event_EVENT_ENTRY_LOADED)
		r.Outcome, r.Reason = ledgerv1.Outcome_OUTCOME_ERROR, reasonEntryBroken
		r.Detail = "the entry does not compile and is not in force: apply it again, or delete it"
		if why, not := s.cfg.Anchor.unrecordedEntry(name); not {
			r.Reason, r.Detail = reasonEntryUnrecorded, "the entry is not in force: "+why
		}
		r.Definition = entries.Broken[name]
		r.Entry = &ledgerv1.EntryRef{Name: name, Revision: r.GetDefinition().GetRevision()}
		records = append(records, r)
	}
	if err := s.append(ctx, records...); err != nil {
		return fmt.Errorf("record the entries in force: %w", err)
	}
	return nil
}

// entryRef names an entry as it is now.
func entryRef(e *identity.Entry) *ledgerv1.EntryRef {
	digest := e.Digest()
	return &ledgerv1.EntryRef{Name: e.Name(), Revision: e.Revision(), Digest: digest[:]}
}

// definitionOf returns the entry of a change as it is recorded: what it is now,
// or what it was if it is no more.
func definitionOf(before, after *entryv1.Entry) *entryv1.Entry {
	if after != nil {
		return after
	}
	return before
}

// word reports whether s is a short lower-case word, which may be repeated in a
// record whoever sent it: nobody takes it for a secret, nor was it one.
func word(s string) bool {
	return len(s) <= 32 && s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789_-") == ""
}

// legalVersion reports whether an agent may call itself that: operators read it on
// their terminals.
func legalVersion(s string) bool {
	return len(s) <= maxVersionBytes && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}
