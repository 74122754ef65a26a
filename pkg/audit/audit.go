// Package audit judges recorded decisions again: does what the ledger says was
// decided follow from the evidence that it says it was decided on? It needs the
// journal's folder alone. It knows no running CA, and decides nothing itself.
package audit

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
)

// Result says how a judgement ended.
type Result string

// Results.
const (
	// Same: the evidence gives the decision that was recorded.
	Same Result = "same"
	// Different: the recorded decision does not follow from the recorded evidence.
	Different Result = "different"
	// NotJudged: the ledger does not hold what the decision rested on, or it rested
	// on no rule.
	NotJudged Result = "not_judged"
)

// Verdict is what became of judging one record.
type Verdict struct {
	Index  uint64 `json:"index"`
	Result Result `json:"result"`
	// Problems say why the recorded decision does not follow.
	Problems []string `json:"problems,omitempty"`
	// Reason says why there is no judgement.
	Reason string `json:"reason,omitempty"`
	// Entry is the entry by which it was judged, nil if there is none.
	Entry *Version `json:"entry,omitempty"`
	// Terms are the entry's rules and templates, evaluated on the recorded facts.
	Terms []identity.FieldTerms `json:"terms,omitempty"`
	// Again is what the evidence gives.
	Again *Answer `json:"again,omitempty"`

	Record *ledgerv1.Record `json:"-"`
}

// Answer is what an entry gives for some facts.
type Answer struct {
	Allowed  bool     `json:"allowed"`
	SPIFFEID string   `json:"spiffe_id,omitempty"`
	DNSNames []string `json:"dns_names,omitempty"`
	// Miss is why it is not allowed.
	Miss *identity.Miss `json:"miss,omitempty"`

	ttl time.Duration
}

// Version is an entry as the ledger has it.
type Version struct {
	// Index is the record that it is from, Event the event of that.
	Index    uint64    `json:"index"`
	Event    string    `json:"event"`
	Time     time.Time `json:"time"`
	Name     string    `json:"name"`
	Revision uint64    `json:"revision"`
	Digest   string    `json:"digest,omitempty"`
	// Text is the entry as YAML.
	Text string `json:"text,omitempty"`

	deleted    bool
	digest     []byte
	definition *entryv1.Entry // nil if an older version of the CA has not recorded it
}

// changeover is how long a decision may have been on its way by the version of an
// entry that was in force when it began.
const changeover = 30 * time.Second

// FindSerial returns the newest record about the certificate with a serial number,
// given in hexadecimal. progress is told of each segment that was searched.
func FindSerial(ctx context.Context, dir, serial string, progress func(done, all int)) (uint64, error) {
	text := strings.TrimLeft(strings.TrimPrefix(strings.ToLower(strings.ReplaceAll(serial, ":", "")), "0x"), "0")
	if text == "" || strings.Trim(text, "0123456789abcdef") != "" {
		return 0, fmt.Errorf("%q is no serial number: write it in hexadecimal", serial)
	}
	found, index := false, uint64(0)
	err := backwards(ctx, dir, ^uint64(0), progress, func(e ledger.Entry) {
		if strings.TrimLeft(hex.EncodeToString(e.Record.GetCertificate().GetSerial()), "0") == text &&
			e.Record.GetEvent() != ledgerv1.Event_EVENT_AUTHORITY {
			found, index = true, e.Index
		}
	}, func() bool { return found })
	switch {
	case err != nil:
		return 0, err
	case !found:
		return 0, fmt.Errorf("no record of a certificate with this serial number in %s%s", dir, archivedHint(dir))
	}
	return index, nil
}

// archivedHint says that there is more than what was searched.
func archivedHint(dir string) string {
	if head, err := ledger.Archived(dir); err == nil && head.Size > 0 {
		return fmt.Sprintf(": the records below %d were archived, look in the archive", head.Size)
	}
	return ""
}

// backwards visits the records below an index, segment by segment from the newest
// to the oldest, in each of them from the oldest record to the newest; after each
// segment it asks whether that is enough.
func backwards(ctx context.Context, dir string, below uint64, progress func(done, all int), visit func(ledger.Entry), enough func() bool) error {
	firsts, err := ledger.Segments(dir)
	if err != nil {
		return err
	}
	for i, first := range slices.Backward(firsts) {
		if first >= below {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		end := below
		if i+1 < len(firsts) {
			end = min(end, firsts[i+1])
		}
		for e, err := range ledger.Scan(dir, first) {
			if err != nil {
				return err
			}
			if e.Index >= end {
				break
			}
			if e.Index%1024 == 0 && ctx.Err() != nil {
				return context.Cause(ctx)
			}
			visit(e)
		}
		if progress != nil {
			progress(len(firsts)-i, len(firsts))
		}
		if enough() {
			return nil
		}
	}
	return nil
}

// Judge judges the record with an index. The error is about the journal, never
// about the decision.
func Judge(ctx context.Context, dir string, index uint64, progress func(done, all int)) (*Verdict, error) {
	r, err := read(dir, index)
	if err != nil {
		return nil, err
	}
	v := &Verdict{Index: index, Record: r}
	if v.Reason = notByEntry(r); v.Reason != "" {
		v.Result = NotJudged
		return v, nil
	}
	h, err := historyOf(ctx, dir, index, r, progress)
	if err != nil {
		return nil, err
	}
	v.judge(h)
	switch {
	case len(v.Problems) > 0:
		v.Result = Different
	case v.Reason != "":
		v.Result = NotJudged
	default:
		v.Result = Same
	}
	return v, nil
}

// read returns one record.
func read(dir string, index uint64) (*ledgerv1.Record, error) {
	for e, err := range ledger.Scan(dir, index) {
		return e.Record, err
	}
	return nil, fmt.Errorf("there is no record %d in %s", index, dir)
}

// Reasons of refusals that an entry gave, as package server records them.
const (
	reasonEntryUnknown = "entry_unknown"
	reasonNodes        = "node_rule_not_matched"
	reasonWorkloads    = "rule_not_matched"
	reasonTemplate     = "template"
)

// byEntry reports whether a record's decision was made by an entry.
func byEntry(r *ledgerv1.Record) bool { return notByEntry(r) == "" }

// notByEntry says why a record cannot be judged by an entry; "" if it can.
func notByEntry(r *ledgerv1.Record) string {
	switch {
	case r.GetEvent() != ledgerv1.Event_EVENT_ISSUE:
		return "no rule decided: only issuances to workloads, and their refusals, are decided by entries"
	case r.GetSummary() != nil:
		return fmt.Sprintf("this record stands for %d refusals like one that was recorded before it", r.GetSummary().GetCount())
	case r.GetEntry() == nil && r.GetVerifiedBy() == "ca":
		return "the certificate is the CA's own: no entry decides that"
	case r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS:
		return ""
	}
	switch r.GetReason() {
	case reasonEntryUnknown, reasonNodes, reasonWorkloads, reasonTemplate:
		return ""
	case "csr":
		return "it was refused for its certificate signing request, which is not recorded: " + r.GetDetail()
	default:
		return fmt.Sprintf("it was refused for %q, which is not about an entry", r.GetReason())
	}
}

// history is what the ledger says of an entry before a decision.
type history struct {
	versions []*Version // newest last
	// complete says that it begins with a start of the CA: then it has every
	// version that was in force since.
	complete bool
	// marks are those of entries that give the SPIFFE ID of the decision: "admin" or
	// "downstream", which reserve it, or "".
	marks map[string][]string
}

// historyOf goes back to the last start of the CA before index.
func historyOf(ctx context.Context, dir string, index uint64, r *ledgerv1.Record, progress func(done, all int)) (*history, error) {
	h := &history{marks: map[string][]string{}}
	var here []*Version
	marks := map[string][]string{}
	err := backwards(ctx, dir, index, progress, func(e ledger.Entry) {
		switch e.Record.GetEvent() { //nolint:exhaustive // no others are about entries
		case ledgerv1.Event_EVENT_STARTED:
			here, h.complete = nil, true
			clear(marks)
		case ledgerv1.Event_EVENT_ENTRY_APPLIED, ledgerv1.Event_EVENT_ENTRY_LOADED, ledgerv1.Event_EVENT_ENTRY_DELETED:
			version := versionOf(e)
			marks[version.Name] = nil
			if !version.deleted && version.definition.GetSpiffeId() == r.GetSpiffeId() {
				marks[version.Name] = marksOf(version.definition.GetAdmin(), version.definition.GetDownstream())
			}
			if version.Name == r.GetEntry().GetName() {
				here = append(here, version)
			}
		}
	}, func() bool {
		h.versions = append(here, h.versions...)
		here = nil
		for name, mark := range marks {
			if _, known := h.marks[name]; !known {
				h.marks[name] = mark
			}
		}
		clear(marks)
		return h.complete
	})
	return h, err
}

// versionOf returns what an event about an entry says.
func versionOf(e ledger.Entry) *Version {
	r := e.Record
	return &Version{
		Index: e.Index, Event: ledger.EventName(r.GetEvent()), Time: r.GetTime().AsTime(),
		Name: r.GetEntry().GetName(), Revision: r.GetEntry().GetRevision(),
		digest: r.GetEntry().GetDigest(), Digest: hex.EncodeToString(r.GetEntry().GetDigest()),
		definition: r.GetDefinition(),
		deleted:    r.GetEvent() == ledgerv1.Event_EVENT_ENTRY_DELETED || r.GetOutcome() != ledgerv1.Outcome_OUTCOME_SUCCESS,
	}
}

func (v *Verdict) problem(format string, args ...any) {
	v.Problems = append(v.Problems, fmt.Sprintf(format, args...))
}

// judge compares the decision with what the history gives.
func (v *Verdict) judge(h *history) {
	r := v.Record
	at := r.GetTime().AsTime()
	if r.GetReason() == reasonEntryUnknown {
		v.judgeUnknown(h, at)
		return
	}
	version, since := h.find(r.GetEntry().GetDigest())
	switch {
	case version == nil && len(h.versions) == 0 && !h.complete, version == nil && h.undefined():
		v.Reason = "the entry is not in this part of the ledger: it was recorded before the first segment here, or by a " +
			"version of the CA that did not record entries yet; judge it where those records are"
		return
	case version == nil:
		v.problem("no version of entry %q with digest %x was in force in this CA", r.GetEntry().GetName(), r.GetEntry().GetDigest())
		return
	case version.definition == nil:
		v.Entry = version
		v.Reason = fmt.Sprintf("record %d, which has the entry, was written by a version of the CA that did not record all of it", version.Index)
		return
	}
	v.Entry = version
	version.Text = identity.FormatYAML(version.definition)
	if !since.IsZero() && at.Sub(since) > changeover {
		v.problem("the entry had been changed or deleted %s before", at.Sub(since).Round(time.Second))
	}
	td, err := spiffeid.TrustDomainFromString(r.GetTrustDomain())
	if err != nil {
		v.problem("the trust domain is not one: %v", err)
		return
	}
	entry, err := identity.Compile(td, version.definition)
	if err != nil {
		v.Reason = fmt.Sprintf("this version of the program does not accept the entry: %v", err)
		return
	}
	if digest := entry.Digest(); !bytes.Equal(digest[:], r.GetEntry().GetDigest()) {
		v.problem("the entry in record %d has the digest %x and not the one recorded there and here", version.Index, digest)
	}
	facts := identity.NewFacts(r.GetNode().GetAttributes(), r.GetWorkload())
	v.Terms, v.Again = entry.Terms(facts), evaluate(entry, facts)
	if r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS {
		v.judgeIssued(entry, h)
	} else {
		v.judgeRefused(entry, facts, h)
	}
}

// find returns the newest version with a digest, and when another followed it;
// zero if none did.
func (h *history) find(digest []byte) (version *Version, replaced time.Time) {
	for _, candidate := range slices.Backward(h.versions) {
		if !candidate.deleted && bytes.Equal(candidate.digest, digest) {
			return candidate, replaced
		}
		replaced = candidate.Time
	}
	return nil, time.Time{}
}

// undefined reports whether versions are from before entries were recorded whole.
func (h *history) undefined() bool {
	return slices.ContainsFunc(h.versions, func(v *Version) bool { return v.definition == nil })
}

// evaluate asks an entry what it gives.
func evaluate(entry *identity.Entry, facts *identity.Facts) *Answer {
	if miss := entry.Explain(facts); miss != (identity.Miss{}) {
		return &Answer{Miss: &miss}
	}
	id, err := entry.Render(facts)
	if err != nil {
		return &Answer{Miss: &identity.Miss{Field: "spiffe_id", Why: err.Error()}}
	}
	return &Answer{Allowed: true, SPIFFEID: id.ID.String(), DNSNames: id.DNSNames, ttl: id.TTL}
}

func (v *Verdict) judgeIssued(entry *identity.Entry, h *history) {
	r, a := v.Record, v.Again
	if !a.Allowed {
		v.problem("a certificate was issued, and the entry does not allow it: %s: %s: %s", a.Miss.Field, a.Miss.Term, a.Miss.Why)
		return
	}
	if a.SPIFFEID != r.GetSpiffeId() {
		v.problem("the certificate is for %q, and the entry gives %q", r.GetSpiffeId(), a.SPIFFEID)
	}
	if !slices.Equal(a.DNSNames, r.GetCertificate().GetDnsNames()) {
		v.problem("the certificate has the DNS names %q, and the entry gives %q", r.GetCertificate().GetDnsNames(), a.DNSNames)
	}
	// A life is at most the ttl from the signing on, and a quarter of it lies before
	// that at most (package ca); certificates count in seconds.
	life := r.GetCertificate().GetNotAfter().AsTime().Sub(r.GetCertificate().GetNotBefore().AsTime())
	if a.ttl > 0 && life > a.ttl+a.ttl/4+2*time.Second {
		v.problem("the certificate lives for %s, and the entry allows %s", life, a.ttl)
	}
	for _, text := range h.reservedFrom(entry) {
		v.problem("%s", text)
	}
}

func marksOf(admin, downstream bool) (marks []string) {
	if admin {
		marks = append(marks, "admin")
	}
	if downstream {
		marks = append(marks, "downstream")
	}
	return marks
}

// reservedFrom says to which entries alone the SPIFFE ID of the decision belongs.
func (h *history) reservedFrom(entry *identity.Entry) []string {
	var texts []string
	own := marksOf(entry.Admin(), entry.Downstream())
	for name, marks := range h.marks {
		for _, mark := range marks {
			if !slices.Contains(own, mark) && name != entry.Name() {
				texts = append(texts, fmt.Sprintf("the SPIFFE ID belongs to entry %q, which is marked %s", name, mark))
			}
		}
	}
	slices.Sort(texts)
	return texts
}

func (v *Verdict) judgeRefused(entry *identity.Entry, facts *identity.Facts, h *history) {
	switch nodes, workloads := entry.MatchNode(facts), entry.MatchWorkload(facts); v.Record.GetReason() {
	case reasonNodes:
		if nodes {
			v.problem("it was refused by the rule for nodes, and that holds")
		}
	case reasonWorkloads:
		if !nodes {
			v.problem("it was refused by the rule for workloads, and the rule for nodes refuses it before that")
		} else if workloads {
			v.problem("it was refused by the rule for workloads, and that holds")
		}
	case reasonTemplate:
		switch reserved := h.reservedFrom(entry); {
		case !nodes || !workloads:
			v.problem("it was refused by a template, and a rule refuses it before that")
		case v.Again.Allowed && len(reserved) > 0:
			v.Again = &Answer{Miss: &identity.Miss{
				Field: "spiffe_id", Term: entry.Proto().GetSpiffeId(),
				Why: reserved[0],
			}}
		case v.Again.Allowed:
			v.problem("it was refused by a template, and the templates give legal names")
		}
	}
}

// judgeUnknown judges a refusal because there was no such entry.
func (v *Verdict) judgeUnknown(h *history, at time.Time) {
	name := v.Record.GetEntry().GetName()
	var last *Version
	if len(h.versions) > 0 {
		last = h.versions[len(h.versions)-1]
	}
	switch {
	case last == nil && !h.complete:
		v.Reason = "which entries there were is not in this part of the ledger"
	case last != nil && !last.deleted && at.Sub(last.Time) > changeover:
		v.Entry = last
		v.problem("it was refused because there was no entry %q, and there was one", name)
	default:
		v.Again = &Answer{Miss: &identity.Miss{Why: fmt.Sprintf("there is no entry %q", name)}}
	}
}

// ErrNoEntries is wrapped by the error of InForce if the journal does not say which
// entries were in force.
var ErrNoEntries = errors.New("the ledger does not say which entries were in force")

// InForce returns the entries that were in force after the last record, by name.
func InForce(ctx context.Context, dir string, progress func(done, all int)) (map[string]*entryv1.Entry, error) {
	known, here := map[string]*Version{}, map[string]*Version{}
	complete := false
	err := backwards(ctx, dir, ^uint64(0), progress, func(e ledger.Entry) {
		switch e.Record.GetEvent() { //nolint:exhaustive // no others are about entries
		case ledgerv1.Event_EVENT_STARTED:
			clear(here)
			complete = true
		case ledgerv1.Event_EVENT_ENTRY_APPLIED, ledgerv1.Event_EVENT_ENTRY_LOADED, ledgerv1.Event_EVENT_ENTRY_DELETED:
			v := versionOf(e)
			here[v.Name] = v
		}
	}, func() bool {
		for name, v := range here {
			if _, newer := known[name]; !newer {
				known[name] = v
			}
		}
		clear(here)
		return complete
	})
	if err != nil {
		return nil, err
	}
	entries := map[string]*entryv1.Entry{}
	for name, v := range known {
		switch {
		case v.deleted:
		case v.definition == nil:
			return nil, fmt.Errorf("%w: record %d was written before entries were recorded whole", ErrNoEntries, v.Index)
		default:
			entries[name] = v.definition
		}
	}
	if !complete {
		return nil, fmt.Errorf("%w: no start of the CA is in it%s", ErrNoEntries, archivedHint(dir))
	}
	return entries, nil
}
