package console

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/search"
)

const (
	ledgerRows = 50
	maxFilter  = 2048 // bytes of one filter
)

// form is the search of the ledger as it was typed.
type form struct {
	Identity, Node, Entry, Authority, Reason, Actor, Request, Serial string
	Event, Outcome, Anomaly, Since, Until                            string
}

type choice struct{ Value, Text string }

type ledgerPage struct {
	Searchable bool
	Form       form
	Problem    string
	Field      string // that the problem is about
	Events     []choice
	Outcomes   []choice
	Anomalies  []choice
	Rows       []decision
	Next       string
	Filtered   bool
	Records    uint64
}

// query reads the form. Its error is an *inputError.
func (f *form) query(q url.Values, now time.Time) (search.Query, error) {
	var out search.Query
	for name, into := range map[string]*string{
		"identity": &f.Identity, "node": &f.Node, "entry": &f.Entry, "authority": &f.Authority, "reason": &f.Reason, "actor": &f.Actor,
		"request": &f.Request, "serial": &f.Serial, "event": &f.Event, "outcome": &f.Outcome, "anomaly": &f.Anomaly, "since": &f.Since, "until": &f.Until,
	} {
		*into = strings.TrimSpace(q.Get(name))
		if len(*into) > maxFilter {
			*into = ""
			return out, &inputError{name, "it is too long"}
		}
	}
	out = search.Query{
		SPIFFEID: f.Identity, Node: f.Node, Entry: f.Entry, Authority: f.Authority, Reason: f.Reason, Actor: f.Actor, RequestID: f.Request,
		Anomaly: f.Anomaly, Limit: ledgerRows,
	}
	if f.Serial != "" {
		raw, err := hex.DecodeString(strings.NewReplacer(":", "", " ", "").Replace(f.Serial))
		switch {
		case err != nil || len(raw) == 0:
			return out, &inputError{"serial", "write the serial or the SHA-256 of a certificate in hexadecimal"}
		case len(raw) == 32:
			out.SHA256 = raw
		default:
			out.Serial = raw
		}
	}
	if f.Event != "" {
		n, ok := ledgerv1.Event_value["EVENT_"+strings.ToUpper(f.Event)]
		if !ok {
			return out, &inputError{"event", "there is no such event"}
		}
		out.Event = ledgerv1.Event(n)
	}
	if f.Outcome != "" {
		n, ok := ledgerv1.Outcome_value["OUTCOME_"+strings.ToUpper(f.Outcome)]
		if !ok {
			return out, &inputError{"outcome", "there is no such outcome"}
		}
		out.Outcome = ledgerv1.Outcome(n)
	}
	for _, t := range []struct {
		name, text string
		into       *time.Time
	}{{"since", f.Since, &out.Since}, {"until", f.Until, &out.Until}} {
		if t.text == "" {
			continue
		}
		at, err := cli.Time(t.text, now, time.UTC)
		if err != nil {
			return out, &inputError{t.name, "write how long ago (24h, 7d), or a time in UTC such as 2026-11-25 14:00"}
		}
		*t.into = at
	}
	if t := q.Get("after"); t != "" {
		n, err := fmt.Sscanf(t, "%d.%d", &out.After.Key, &out.After.Record)
		if n != 2 || err != nil {
			return out, &inputError{"after", "it is none of our pages: begin again"}
		}
		out.After.Valid = true
	}
	return out, nil
}

func choices(names map[int32]string, prefix string) []choice {
	var list []choice
	for n, name := range names {
		if n != 0 {
			value := strings.ToLower(strings.TrimPrefix(name, prefix))
			list = append(list, choice{value, strings.ReplaceAll(value, "_", " ")})
		}
	}
	slices.SortFunc(list, func(a, b choice) int { return strings.Compare(a.Value, b.Value) })
	return list
}

func (c *Console) ledger(r *http.Request, v *view) error {
	q := r.URL.Query()
	p := &ledgerPage{
		Events: choices(ledgerv1.Event_name, "EVENT_"), Outcomes: choices(ledgerv1.Outcome_name, "OUTCOME_"), Records: c.cfg.Tree.Newest().Size,
	}
	for _, name := range search.Anomalies {
		p.Anomalies = append(p.Anomalies, choice{name, strings.ReplaceAll(name, "_", " ")})
	}
	v.Title, v.Template, v.Body = "Ledger", "ledger", p
	query, err := p.Form.query(q, v.Now)
	if bad, ok := errors.AsType[*inputError](err); ok {
		p.Searchable, p.Filtered = true, true
		p.Problem, p.Field, v.status = bad.message, bad.field, http.StatusBadRequest
		return nil
	}
	p.Filtered = p.Form != form{}
	// A list that is being read is not moved under the reader.
	v.Live = !query.After.Valid
	p.Searchable, err = c.ask(r, v, func(ctx context.Context, x Index) error {
		found, next, err := x.Find(ctx, query)
		if err != nil {
			return err
		}
		p.Rows = decisions(found)
		if next.Valid {
			q.Set("after", fmt.Sprintf("%d.%d", next.Key, next.Record))
			p.Next = prefix + "/ledger?" + q.Encode()
		}
		return nil
	})
	return err
}

// field is one fact of a record: a value, or more facts.
type field struct {
	Name, Value, Link string
	Time              time.Time
	Fields            []field
}

type recordPage struct {
	decision
	Detail    string
	Reason    string
	Fields    []field
	JSON      string
	Hash      string
	Link      string
	Serial    string
	Proof     Proof
	Problem   string // with the proof
	Diff      string
	Miss      *ledgerv1.Miss
	RequestID string
	Previous  string
	Following string
}

func (c *Console) record(r *http.Request, v *view) error {
	index, err := strconv.ParseUint(r.PathValue("record"), 10, 63)
	if err != nil {
		return errNotFound
	}
	p := new(recordPage)
	v.Title, v.Template, v.Body = fmt.Sprintf("Record %s", count(index)), "record", p
	var f search.Found
	ok, err := c.ask(r, v, func(ctx context.Context, x Index) (err error) {
		f, err = x.Record(ctx, index)
		return err
	})
	if errors.Is(err, search.ErrNoRecord) {
		return fmt.Errorf("there is no record %s yet, or it was archived: %w", count(index), errNotFound)
	}
	if err != nil {
		return err
	}
	if !ok {
		return errNotFound
	}
	rec := f.Record
	p.decision = newDecision(f)
	p.Detail, p.Reason, p.Diff, p.Miss, p.RequestID = rec.GetDetail(), rec.GetReason(), rec.GetDiff(), rec.GetMiss(), rec.GetRequestId()
	p.Hash, p.Link = hex.EncodeToString(f.Hash[:]), hex.EncodeToString(f.Link[:])
	p.Serial = hex.EncodeToString(rec.GetCertificate().GetSerial())
	p.Fields = fields(rec.ProtoReflect())
	json, err := ledger.FormatJSON(f.Entry)
	if err != nil {
		return err
	}
	p.JSON = string(json)
	if index > 0 {
		p.Previous = recordPath(index - 1)
	}
	p.Following = recordPath(index + 1)
	p.Proof, err = c.cfg.Tree.Prove(index, f.Raw)
	if err != nil {
		p.Problem = err.Error()
	}
	v.Live = p.Problem == "" && !p.Proof.Covered // until it is
	return nil
}

// maxFields bounds the facts of one message that are shown.
const maxFields = 200

// fields are the facts of a message that are set, in the order of its definition.
func fields(m protoreflect.Message) []field {
	var list []field
	all := m.Descriptor().Fields()
	for i := range all.Len() {
		f := all.Get(i)
		if !m.Has(f) || f.Name() == "diff" {
			continue
		}
		name, value := strings.ReplaceAll(string(f.Name()), "_", " "), m.Get(f)
		switch {
		case f.IsMap():
			group := field{Name: name}
			value.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				group.Fields = append(group.Fields, fact(f.MapValue(), k.String(), v))
				return len(group.Fields) < maxFields
			})
			slices.SortFunc(group.Fields, func(a, b field) int { return strings.Compare(a.Name, b.Name) })
			list = append(list, group)
		case f.IsList():
			group := field{Name: name}
			for i := range min(value.List().Len(), maxFields) {
				group.Fields = append(group.Fields, fact(f, strconv.Itoa(i+1), value.List().Get(i)))
			}
			list = append(list, group)
		default:
			list = append(list, fact(f, name, value))
		}
	}
	return list
}

// searchable are the facts by which other records are found.
var searchable = map[protoreflect.FullName]string{
	"meshid.ledger.v1.Record.spiffe_id": "identity", "meshid.ledger.v1.NodeRef.id": "node", "meshid.ledger.v1.EntryRef.name": "entry",
	"meshid.ledger.v1.Authority.id": "authority", "meshid.ledger.v1.Record.request_id": "request", "meshid.ledger.v1.Certificate.serial": "serial",
	"meshid.ledger.v1.Record.previous_serial": "serial", "meshid.ledger.v1.Record.actor": "actor", "meshid.ledger.v1.Record.reason": "reason",
}

// fact is one value.
func fact(f protoreflect.FieldDescriptor, name string, v protoreflect.Value) field {
	out := field{Name: name}
	switch f.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		switch m := v.Message().Interface().(type) {
		case *timestamppb.Timestamp:
			out.Time = m.AsTime()
		case *durationpb.Duration:
			out.Value = m.AsDuration().String()
		default:
			out.Fields = fields(v.Message())
		}
		return out
	case protoreflect.BytesKind:
		out.Value = hex.EncodeToString(v.Bytes())
	case protoreflect.EnumKind:
		out.Value = strconv.Itoa(int(v.Enum()))
		if d := f.Enum().Values().ByNumber(v.Enum()); d != nil {
			_, short, _ := strings.Cut(string(d.Name()), "_")
			out.Value = strings.ReplaceAll(strings.ToLower(short), "_", " ")
		}
	default:
		out.Value = v.String()
	}
	if by := searchable[f.FullName()]; by != "" && out.Value != "" {
		out.Link = searchLink(by, out.Value)
	}
	out.Value = cmp.Or(out.Value, "(empty)")
	return out
}
