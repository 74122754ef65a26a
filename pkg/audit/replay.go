package audit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"sort"
	"time"

	"google.golang.org/protobuf/proto"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/ledger"
)

// Effect is what another set of entries would have made of a recorded decision.
type Effect string

// Effects.
const (
	// Refused: what was issued would not have been.
	Refused Effect = "refused"
	// Changed: another SPIFFE ID or other DNS names would have been issued.
	Changed Effect = "changed"
	// Allowed: what was refused would have been issued.
	Allowed Effect = "allowed"
)

// Bounds of a replay's memory. Beyond maxGroups, decisions are counted only;
// beyond maxInstances, instances are.
const (
	maxGroups    = 20_000
	maxInstances = 1 << 20
	maxAnswers   = 1 << 14
	maxSamples   = 5
	// clockSlack is how far the order of records and the order of their times
	// may differ.
	clockSlack = 2 * time.Minute
)

// Group is one effect on all instances that it is the same for.
type Group struct {
	Effect Effect `json:"effect"`
	// Entry is the entry that decided, Reason why it refused, if it did.
	Entry  string `json:"entry"`
	Reason string `json:"reason,omitempty"`
	// SPIFFEID and DNSNames were issued; Would and WouldDNSNames would be.
	SPIFFEID      string   `json:"spiffe_id,omitempty"`
	DNSNames      []string `json:"dns_names,omitempty"`
	Would         string   `json:"would_spiffe_id,omitempty"`
	WouldDNSNames []string `json:"would_dns_names,omitempty"`
	// Miss is why it would be refused.
	Miss *identity.Miss `json:"miss,omitempty"`
	// Records and Instances count what the group stands for.
	Records   uint64 `json:"records"`
	Instances uint64 `json:"instances"`
	// Samples are some of the instances, each with its node.
	Samples     []Sample  `json:"samples"`
	First, Last time.Time `json:"-"`
	// LastIndex is the newest of the records.
	LastIndex uint64 `json:"last_index"`
}

// Sample is one workload instance.
type Sample struct {
	Instance string `json:"instance"`
	Node     string `json:"node"`
}

// Report is what a replay found.
type Report struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	// Issued and Refusals are the decisions that were judged; Kept are those that
	// would have been the same; Other are those that no entry made.
	Issued   uint64 `json:"issued"`
	Refusals uint64 `json:"refusals"`
	Kept     uint64 `json:"kept"`
	Other    uint64 `json:"other"`
	// Groups are the effects, the most records first.
	Groups []*Group `json:"groups"`
	// Uncounted are records with an effect that belong to no group, because there
	// were too many groups.
	Uncounted uint64 `json:"uncounted,omitempty"`
}

// replayer judges recorded decisions by another set of entries. It may be used by
// one goroutine.
type replayer struct {
	set    *identity.Set
	report Report

	seed      maphash.Seed
	answers   map[uint64]*answer
	groups    map[string]*Group
	instances map[uint64]struct{}
}

// answer is what the set makes of one decision.
type answer struct {
	group *Group // without counts; nil if it is the same
}

// Replay judges the decisions between two times by a set of entries. progress is
// told how many of the journal's records have been read, from the first one on that
// may be of that time.
func Replay(ctx context.Context, dir string, set *identity.Set, since, until time.Time, progress func(done, all uint64)) (*Report, error) {
	size, err := ledger.Size(dir)
	if err != nil {
		return nil, err
	}
	from, err := firstSince(dir, since)
	if err != nil {
		return nil, err
	}
	p := &replayer{
		set: set, report: Report{Since: since, Until: until}, seed: maphash.MakeSeed(),
		answers: map[uint64]*answer{}, groups: map[string]*Group{}, instances: map[uint64]struct{}{},
	}
	for e, err := range ledger.Scan(dir, from) {
		if err != nil {
			return nil, err
		}
		if e.Index >= size { // made meanwhile
			break
		}
		if e.Index%1024 == 0 {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if progress != nil {
				progress(e.Index-from, size-from)
			}
		}
		at := e.Record.GetTime().AsTime()
		if at.Sub(until) > clockSlack {
			break
		}
		if at.Before(since) || !at.Before(until) {
			continue
		}
		p.judge(e)
	}
	return p.finish(), nil
}

// firstSince returns the first record of the last segment that begins before a
// time.
func firstSince(dir string, since time.Time) (uint64, error) {
	firsts, err := ledger.Segments(dir)
	if err != nil {
		return 0, err
	}
	if len(firsts) == 0 {
		return 0, fmt.Errorf("there is no ledger in %s", dir)
	}
	var failed error
	later := sort.Search(len(firsts), func(i int) bool {
		r, err := read(dir, firsts[i])
		if err != nil {
			failed = errors.Join(failed, err)
			return true
		}
		return !r.GetTime().AsTime().Before(since.Add(-clockSlack))
	})
	return firsts[max(later-1, 0)], failed
}

// judge takes one record.
func (p *replayer) judge(e ledger.Entry) {
	r := e.Record
	if r.GetEvent() != ledgerv1.Event_EVENT_ISSUE {
		return
	}
	if !byEntry(r) {
		p.report.Other++
		return
	}
	if r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS {
		p.report.Issued++
	} else {
		p.report.Refusals++
	}
	a := p.answer(r)
	if a.group == nil {
		p.report.Kept++
		return
	}
	key := groupKey(a.group)
	g := p.groups[key]
	if g == nil {
		if len(p.groups) >= maxGroups {
			p.report.Uncounted++
			return
		}
		copied := *a.group
		g = &copied
		p.groups[key] = g
	}
	p.count(g, key, e)
}

// count adds a record to its group.
func (p *replayer) count(g *Group, key string, e ledger.Entry) {
	at := e.Record.GetTime().AsTime()
	if g.Records == 0 || at.Before(g.First) {
		g.First = at
	}
	if at.After(g.Last) {
		g.Last = at
	}
	g.Records++
	g.LastIndex = e.Index
	instance := Sample{Instance: e.Record.GetInstance(), Node: e.Record.GetNode().GetId()}
	name := maphash.String(p.seed, key+"\x00"+instance.Node+"\x00"+instance.Instance)
	if _, known := p.instances[name]; known {
		return
	}
	if len(p.instances) >= maxInstances { // a renewal cannot be told from a new instance
		return
	}
	p.instances[name] = struct{}{}
	g.Instances++
	if len(g.Samples) < maxSamples {
		g.Samples = append(g.Samples, instance)
	}
}

func groupKey(g *Group) string {
	miss := identity.Miss{}
	if g.Miss != nil {
		miss = *g.Miss
	}
	return fmt.Sprintf("%s\x00%s\x00%s\x00%s\x00%s\x00%q\x00%q\x00%q", g.Effect, g.Entry, g.SPIFFEID, g.Would, g.Reason, g.DNSNames, g.WouldDNSNames, miss)
}

// answer returns what the set gives for a record; what was found for the same
// evidence before is not worked out again.
func (p *replayer) answer(r *ledgerv1.Record) *answer {
	evidence, err := proto.MarshalOptions{Deterministic: true}.Marshal(&ledgerv1.Record{
		Outcome: r.GetOutcome(), Reason: r.GetReason(), SpiffeId: r.GetSpiffeId(), Workload: r.GetWorkload(),
		Node:        &ledgerv1.NodeRef{Id: r.GetNode().GetId(), Attributes: r.GetNode().GetAttributes()},
		Entry:       &ledgerv1.EntryRef{Name: r.GetEntry().GetName()},
		Certificate: &ledgerv1.Certificate{DnsNames: r.GetCertificate().GetDnsNames()},
	})
	if err != nil { // it has been decoded, so it can be encoded
		return p.work(r)
	}
	key := maphash.Bytes(p.seed, evidence)
	if a, ok := p.answers[key]; ok {
		return a
	}
	if len(p.answers) >= maxAnswers {
		clear(p.answers)
	}
	a := p.work(r)
	p.answers[key] = a
	return a
}

// work evaluates the set on a record's evidence.
func (p *replayer) work(r *ledgerv1.Record) *answer {
	facts := identity.NewFacts(r.GetNode().GetAttributes(), r.GetWorkload())
	name := r.GetEntry().GetName()
	would := p.entryGives(name, facts)
	issued := r.GetOutcome() == ledgerv1.Outcome_OUTCOME_SUCCESS
	g := &Group{Entry: name, Reason: r.GetReason(), SPIFFEID: r.GetSpiffeId(), DNSNames: r.GetCertificate().GetDnsNames()}
	if issued && (!would.Allowed || would.SPIFFEID != g.SPIFFEID) {
		// Another entry may give the same identity.
		if other := p.another(g.SPIFFEID, facts); other != nil {
			would = other
		}
	}
	switch {
	case issued && !would.Allowed:
		g.Effect, g.Miss = Refused, would.Miss
	case issued && (would.SPIFFEID != g.SPIFFEID || !slices.Equal(would.DNSNames, g.DNSNames)):
		g.Effect, g.Would, g.WouldDNSNames = Changed, would.SPIFFEID, would.DNSNames
	case !issued && would.Allowed:
		g.Effect, g.Would, g.WouldDNSNames = Allowed, would.SPIFFEID, would.DNSNames
	default:
		return &answer{}
	}
	return &answer{group: g}
}

// entryGives asks the set's entry of a name, as the CA would.
func (p *replayer) entryGives(name string, facts *identity.Facts) *Answer {
	entry, ok := p.set.Get(name)
	if !ok {
		return &Answer{Miss: &identity.Miss{Why: fmt.Sprintf("there is no entry %q", name)}}
	}
	a := evaluate(entry, facts)
	if !a.Allowed {
		return a
	}
	if id, err := entry.Render(facts); err == nil {
		if mark := p.set.Reserved(id.ID, entry); mark != "" {
			return &Answer{Miss: &identity.Miss{
				Field: "spiffe_id", Term: entry.Proto().GetSpiffeId(), Why: "the SPIFFE ID belongs to an entry marked " + mark,
			}}
		}
	}
	return a
}

// another returns what an entry of the set gives that gives this SPIFFE ID.
func (p *replayer) another(id string, facts *identity.Facts) *Answer {
	for _, entry := range p.set.MatchWorkload(facts) {
		if !entry.MatchNode(facts) {
			continue
		}
		if a := p.entryGives(entry.Name(), facts); a.Allowed && a.SPIFFEID == id {
			return a
		}
	}
	return nil
}

// finish orders the groups.
func (p *replayer) finish() *Report {
	p.report.Groups = make([]*Group, 0, len(p.groups))
	for _, g := range p.groups {
		p.report.Groups = append(p.report.Groups, g)
	}
	order := map[Effect]int{Refused: 0, Changed: 1, Allowed: 2}
	slices.SortFunc(p.report.Groups, func(a, b *Group) int {
		return cmp.Or(cmp.Compare(order[a.Effect], order[b.Effect]), cmp.Compare(b.Records, a.Records), cmp.Compare(groupKey(a), groupKey(b)))
	})
	return &p.report
}
