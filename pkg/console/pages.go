package console

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

// pageRows bounds the rows of one page.
const pageRows = 100

// errSlow says that a question took too long.
var errSlow = errors.New("the question took too long")

// ask runs a question to the search index with a deadline. Without an index, v
// says so and ask returns false.
func (c *Console) ask(r *http.Request, v *view, question func(context.Context, Index) error) (bool, error) {
	if c.cfg.Index == nil {
		v.Unsearchable = "The ledger's search index cannot be used now: the condition ledger_search says why. Everything is still recorded."
		return false, nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	err := question(ctx, c.cfg.Index)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = errors.Join(errSlow, err)
	}
	return err == nil, err
}

// frame fills in what every page shows.
func (c *Console) frame(r *http.Request, v *view) error {
	status, err := c.cfg.Fleet.GetStatus(r.Context(), new(adminv1.GetStatusRequest))
	if err != nil {
		return err
	}
	u, _ := r.Context().Value(userKey{}).(user)
	v.User, v.Method, v.SignedInByCookie = u.name, u.method, u.session != ""
	v.TrustDomain, v.Instance, v.Version = status.GetTrustDomain(), status.GetInstance(), status.GetVersion()
	v.Now = c.cfg.Now()
	v.Worst = "ok"
	for _, condition := range status.GetConditions() {
		if s := condition.GetSeverity(); s != "ok" {
			v.Problems++
			if v.Worst != "error" {
				v.Worst = s
			}
		}
	}
	v.RefreshedByHand = r.URL.RequestURI()
	return nil
}

// decision is a record as one row of a list.
type decision struct {
	Index     uint64
	Path      string
	Time      time.Time
	Event     string
	Outcome   string
	Who       string // the identity, or whoever acted
	Node      string
	Entry     string
	Why       string
	Anomalies []string
}

func newDecision(f search.Found) decision {
	rec := f.Record
	d := decision{
		Index: f.Index, Path: recordPath(f.Index), Time: rec.GetTime().AsTime(), Event: eventName(rec.GetEvent()), Outcome: ledger.OutcomeName(rec.GetOutcome()),
		Who: cmp.Or(rec.GetSpiffeId(), rec.GetActor()), Node: rec.GetNode().GetId(), Entry: rec.GetEntry().GetName(), Anomalies: f.Anomalies,
		Why: cmp.Or(rec.GetDetail(), rec.GetReason()),
	}
	if d.Who == d.Node {
		d.Who = rec.GetActor()
	}
	switch rec.GetEvent() {
	case ledgerv1.Event_EVENT_AUTHORITY:
		d.Why = cmp.Or(d.Why, rec.GetAuthority().GetRole()+" "+rec.GetAuthority().GetState()+map[bool]string{true: ", tainted"}[rec.GetAuthority().GetTainted()])
	case ledgerv1.Event_EVENT_BUNDLE:
		d.Why = cmp.Or(d.Why, fmt.Sprintf("sequence %d", rec.GetBundle().GetSequence()))
	case ledgerv1.Event_EVENT_SIGN_IN:
		by := rec.GetSignIn().GetMethod() + " from " + rec.GetSignIn().GetAddress()
		if d.Why != "" {
			by += ": " + d.Why
		}
		d.Why = by
	case ledgerv1.Event_EVENT_ISSUE, ledgerv1.Event_EVENT_RENEW_AGENT:
		if k := rec.GetKind(); k != ledgerv1.Kind_KIND_UNSPECIFIED {
			d.Why = cmp.Or(d.Why, kinds[k])
		}
	default:
	}
	if n := rec.GetSummary().GetCount(); n > 0 {
		d.Why += fmt.Sprintf(" (%s alike)", count(n))
	}
	return d
}

// kinds says why a certificate was issued.
var kinds = map[ledgerv1.Kind]string{
	ledgerv1.Kind_KIND_FIRST: "first certificate", ledgerv1.Kind_KIND_RENEWAL: "renewal", ledgerv1.Kind_KIND_ROTATION: "rotation",
}

func eventName(e ledgerv1.Event) string {
	return strings.ReplaceAll(ledger.EventName(e), "_", " ")
}

func decisions(found []search.Found) []decision {
	list := make([]decision, len(found))
	for i, f := range found {
		list[i] = newDecision(f)
	}
	return list
}

// overviewPage is the first page.
type overviewPage struct {
	Status         *adminv1.GetStatusResponse
	Problems       []*adminv1.Condition
	Nodes, InForce uint32
	Searchable     bool
	Horizon        search.Horizon
	Activity       activity
	Newest         []decision
	Tree           Proof
	Halted         string
	Budget         time.Duration
}

func (c *Console) overview(r *http.Request, v *view) error {
	status, err := c.cfg.Fleet.GetStatus(r.Context(), new(adminv1.GetStatusRequest))
	if err != nil {
		return err
	}
	p := &overviewPage{Status: status, Tree: c.cfg.Tree.Newest(), Budget: status.GetOutageBudget().AsDuration()}
	if err := c.cfg.Tree.Halted(); err != nil {
		p.Halted = err.Error()
	}
	for _, condition := range status.GetConditions() {
		if condition.GetSeverity() != "ok" {
			p.Problems = append(p.Problems, condition)
		}
	}
	nodes, err := c.cfg.Fleet.ListNodes(r.Context(), new(adminv1.ListNodesRequest))
	if err != nil {
		return err
	}
	for _, n := range nodes.GetNodes() {
		if n.GetConnected() {
			p.Nodes++
			if n.GetRevision() >= status.GetRevision() {
				p.InForce++
			}
		}
	}
	p.Searchable, err = c.ask(r, v, func(ctx context.Context, x Index) (err error) {
		if p.Horizon, err = x.Horizon(ctx, v.Now, time.Hour, 1); err != nil {
			return err
		}
		if p.Activity, err = c.activity(ctx, x, v.Now, spans[0]); err != nil {
			return err
		}
		found, _, err := x.Find(ctx, search.Query{Limit: 12})
		p.Newest = decisions(found)
		return err
	})
	v.Title, v.Template, v.Live, v.Body = "Overview", "overview", true, p
	return err
}

// nodeRow is one node of the fleet.
type nodeRow struct {
	*adminv1.Node
	Labels   []string
	Attested time.Time
	NotAfter time.Time
	Current  bool // it has the revision in force
}

type nodesPage struct {
	Revision                            uint64
	Rows                                []nodeRow
	Query, State                        string
	All, Shown, Connected, InForce, Bad int
	Versions                            []tally
	Next                                string
}

// tally is a name and a number.
type tally struct {
	Name  string
	Total uint64
}

func (c *Console) nodes(r *http.Request, v *view) error {
	status, err := c.cfg.Fleet.GetStatus(r.Context(), new(adminv1.GetStatusRequest))
	if err != nil {
		return err
	}
	list, err := c.cfg.Fleet.ListNodes(r.Context(), new(adminv1.ListNodesRequest))
	if err != nil {
		return err
	}
	q := r.URL.Query()
	p := &nodesPage{Revision: status.GetRevision(), Query: q.Get("q"), State: q.Get("state"), All: len(list.GetNodes())}
	versions := make(map[string]uint64)
	for _, n := range list.GetNodes() {
		row := nodeRow{
			Node: n, Labels: labels(n.GetAttributes()), Attested: n.GetAttestedAt().AsTime(), NotAfter: n.GetSvidNotAfter().AsTime(),
			Current: n.GetConnected() && n.GetRevision() >= p.Revision,
		}
		if n.GetConnected() {
			p.Connected++
			versions[cmp.Or(n.GetAgentVersion(), "unknown")]++
		}
		if row.Current {
			p.InForce++
		}
		if n.GetState() != "active" {
			p.Bad++
		}
		if p.Query != "" && !strings.Contains(n.GetId(), p.Query) && !slices.ContainsFunc(row.Labels, func(l string) bool { return strings.Contains(l, p.Query) }) {
			continue
		}
		switch p.State {
		case "connected":
			if !n.GetConnected() {
				continue
			}
		case "away":
			if n.GetConnected() || n.GetState() != "active" {
				continue
			}
		case "behind":
			if !n.GetConnected() || row.Current {
				continue
			}
		case "withdrawn":
			if n.GetState() == "active" {
				continue
			}
		default:
			p.State = ""
		}
		p.Shown++
		if n.GetId() <= q.Get("after") {
			continue
		}
		if len(p.Rows) == pageRows {
			if p.Next == "" {
				p.Next = prefix + "/nodes?" + url.Values{"q": {p.Query}, "state": {p.State}, "after": {p.Rows[pageRows-1].GetId()}}.Encode()
			}
			continue
		}
		p.Rows = append(p.Rows, row)
	}
	p.Versions = sorted(versions)
	v.Title, v.Template, v.Live, v.Body = "Nodes", "nodes", true, p
	return nil
}

func labels(n *attributesv1.Node) []string {
	var list []string
	for k, v := range n.GetLabels() {
		list = append(list, k+"="+v)
	}
	slices.Sort(list)
	return list
}

// sorted returns the largest first.
func sorted(m map[string]uint64) []tally {
	var list []tally
	for name, n := range m {
		list = append(list, tally{name, n})
	}
	slices.SortFunc(list, func(a, b tally) int {
		return cmp.Or(cmp.Compare(b.Total, a.Total), strings.Compare(a.Name, b.Name))
	})
	return list
}

type identitiesPage struct {
	Searchable bool
	Query      string
	Rows       []search.Identity
	Horizon    search.Horizon
	Chart      chart
	Next       string
}

// horizonSteps of a quarter of an hour are shown ahead.
const (
	horizonStep  = 15 * time.Minute
	horizonSteps = 96
)

func (c *Console) identities(r *http.Request, v *view) error {
	q := r.URL.Query()
	p := &identitiesPage{Query: q.Get("q")}
	var err error
	p.Searchable, err = c.ask(r, v, func(ctx context.Context, x Index) (err error) {
		if p.Rows, err = x.Identities(ctx, v.Now, p.Query, q.Get("after"), pageRows+1); err != nil {
			return err
		}
		if len(p.Rows) > pageRows {
			p.Rows = p.Rows[:pageRows]
			p.Next = prefix + "/identities?" + url.Values{"q": {p.Query}, "after": {p.Rows[pageRows-1].SPIFFEID}}.Encode()
		}
		p.Horizon, err = x.Horizon(ctx, v.Now, horizonStep, horizonSteps)
		return err
	})
	if p.Searchable {
		var slots []slot
		for i, n := range p.Horizon.Expiring {
			at := v.Now.Add(time.Duration(i) * horizonStep)
			slots = append(slots, slot{fmt.Sprintf("%s to %s: %s expire", clock(at), clock(at.Add(horizonStep)), plural(n, "certificate")), []uint64{n}})
		}
		p.Chart = newChart("Certificates in use by when they expire, over the next 24 hours", []string{"expiring"}, slots, "now", "in 24 hours")
	}
	v.Title, v.Template, v.Live, v.Body = "Identities", "identities", true, p
	return err
}

func clock(t time.Time) string { return t.UTC().Format("15:04") }

// activity is what was decided in a span of time.
type activity struct {
	Span                    span
	Issued, Refused, Failed uint64
	Chart                   chart
	Reasons                 []tally
	Slots                   []activitySlot
}

type activitySlot struct {
	Start                   time.Time
	Issued, Refused, Failed uint64
}

// certified are the events that end in a certificate, or do not.
var certified = []ledgerv1.Event{ledgerv1.Event_EVENT_ISSUE, ledgerv1.Event_EVENT_ATTEST, ledgerv1.Event_EVENT_RENEW_AGENT}

func (c *Console) activity(ctx context.Context, x Tallies, now time.Time, s span) (activity, error) {
	a := activity{Span: s}
	// Steps begin at multiples of themselves, so that bars do not change their meaning
	// from one look to the next.
	from := now.Add(s.Step - s.Length).Truncate(s.Step)
	n := int(s.Length / s.Step)
	for i := range n {
		a.Slots = append(a.Slots, activitySlot{Start: from.Add(time.Duration(i) * s.Step)})
	}
	tallies, err := x.Tallies(ctx, from, from.Add(s.Length), s.Step)
	if err != nil {
		return a, err
	}
	reasons := make(map[string]uint64)
	for _, t := range tallies {
		i := int(t.Start.Sub(from) / s.Step)
		if !slices.Contains(certified, t.Event) || i < 0 || i >= n {
			continue
		}
		at := &a.Slots[i]
		switch t.Outcome {
		case ledgerv1.Outcome_OUTCOME_SUCCESS:
			at.Issued += t.Total
			a.Issued += t.Total
		case ledgerv1.Outcome_OUTCOME_REFUSED:
			at.Refused += t.Total
			a.Refused += t.Total
			reasons[cmp.Or(t.Reason, "unknown")] += t.Total
		default:
			at.Failed += t.Total
			a.Failed += t.Total
			reasons[cmp.Or(t.Reason, "unknown")] += t.Total
		}
	}
	a.Reasons = sorted(reasons)
	layout := "15:04"
	if s.Length > 24*time.Hour {
		layout = "2 Jan 15:04"
	}
	var slots []slot
	for _, at := range a.Slots {
		title := fmt.Sprintf("%s UTC: %s issued, %s refused, %s failed", at.Start.UTC().Format(layout), count(at.Issued), count(at.Refused), count(at.Failed))
		slots = append(slots, slot{title, []uint64{at.Issued, at.Refused, at.Failed}})
	}
	a.Chart = newChart(fmt.Sprintf("Certificates issued and refused over %s: %s issued, %s refused, %s failed", s.Text, count(a.Issued), count(a.Refused), count(a.Failed)),
		[]string{"issued", "refused", "failed"}, slots,
		from.UTC().Format(layout)+" UTC", "now")
	return a, nil
}

type issuancePage struct {
	Searchable bool
	Spans      []span
	Activity   activity
}

func (c *Console) issuance(r *http.Request, v *view) error {
	p := &issuancePage{Spans: spans}
	s := spanNamed(r.URL.Query().Get("span"))
	var err error
	p.Searchable, err = c.ask(r, v, func(ctx context.Context, x Index) (err error) {
		p.Activity, err = c.activity(ctx, x, v.Now, s)
		return err
	})
	v.Title, v.Template, v.Live, v.Body = "Issuance", "issuance", true, p
	return err
}

// authority is a node of the tree of authorities.
type authority struct {
	ID, Role, State     string
	Subject             string
	NotBefore, NotAfter time.Time
	Left                time.Duration
	Used                int // of its life, in percent
	Expired, Tainted    bool
	Children            []*authority
}

type authoritiesPage struct {
	Roots    []*authority
	Sequence uint64
	Budget   time.Duration
}

func (c *Console) authorities(r *http.Request, v *view) error {
	status, err := c.cfg.Fleet.GetStatus(r.Context(), new(adminv1.GetStatusRequest))
	if err != nil {
		return err
	}
	list, err := c.cfg.Rules.ListAuthorities(r.Context(), new(adminv1.ListAuthoritiesRequest))
	if err != nil {
		return err
	}
	p := &authoritiesPage{Sequence: status.GetBundleSequence(), Budget: status.GetOutageBudget().AsDuration()}
	byID := make(map[string]*authority)
	type child struct {
		*authority
		above string
	}
	var below []child
	for _, a := range list.GetAuthorities() {
		n := &authority{
			ID: a.GetId(), Role: a.GetRole(), State: a.GetState(), Tainted: a.GetTainted(), NotBefore: a.GetNotBefore().AsTime(), NotAfter: a.GetNotAfter().AsTime(),
		}
		n.Left = n.NotAfter.Sub(v.Now)
		n.Expired = n.Left <= 0
		if life := n.NotAfter.Sub(n.NotBefore); life > 0 {
			n.Used = int(min(max(v.Now.Sub(n.NotBefore)*100/life, 0), 100))
		}
		above := ""
		if cert, err := x509.ParseCertificate(a.GetCertificate()); err == nil {
			n.Subject = cert.Subject.String()
			above = hex.EncodeToString(cert.AuthorityKeyId)
		}
		byID[n.ID] = n
		below = append(below, child{n, above})
	}
	for _, n := range below {
		if parent, ok := byID[n.above]; ok && parent != n.authority && parent.Role == "root" {
			parent.Children = append(parent.Children, n.authority)
		} else {
			p.Roots = append(p.Roots, n.authority)
		}
	}
	v.Title, v.Template, v.Live, v.Body = "Authorities", "authorities", true, p
	return nil
}

// entryRow is a registration entry and how often it matched.
type entryRow struct {
	*entryv1.Entry
	TTL  time.Duration
	Day  search.EntryTally
	Week search.EntryTally
}

type entriesPage struct {
	Searchable   bool
	Revision     uint64
	Rows         []entryRow
	Query        string
	All, Unused  int
	Next         string
	InForce, Off uint32
}

func (c *Console) entries(r *http.Request, v *view) error {
	list, err := c.cfg.Rules.ListEntries(r.Context(), new(adminv1.ListEntriesRequest))
	if err != nil {
		return err
	}
	q := r.URL.Query()
	p := &entriesPage{Revision: list.GetRevision(), Query: q.Get("q"), All: len(list.GetEntries())}
	day, week := make(map[string]search.EntryTally), make(map[string]search.EntryTally)
	p.Searchable, err = c.ask(r, v, func(ctx context.Context, x Index) error {
		for _, of := range []struct {
			into map[string]search.EntryTally
			age  time.Duration
		}{{day, 24 * time.Hour}, {week, 7 * 24 * time.Hour}} {
			tallies, err := x.EntryTallies(ctx, v.Now.Add(-of.age))
			if err != nil {
				return err
			}
			for _, t := range tallies {
				of.into[t.Entry] = t
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, e := range list.GetEntries() {
		name := e.GetName()
		if p.Searchable && week[name].Issued == 0 {
			p.Unused++
		}
		if p.Query != "" && !strings.Contains(name, p.Query) && !strings.Contains(e.GetSpiffeId(), p.Query) {
			continue
		}
		if name <= q.Get("after") {
			continue
		}
		if len(p.Rows) == pageRows {
			p.Next = prefix + "/entries?" + url.Values{"q": {p.Query}, "after": {p.Rows[pageRows-1].GetName()}}.Encode()
			break
		}
		p.Rows = append(p.Rows, entryRow{Entry: e, TTL: e.GetTtl().AsDuration(), Day: day[name], Week: week[name]})
	}
	v.Title, v.Template, v.Live, v.Body = "Entries", "entries", true, p
	return nil
}
