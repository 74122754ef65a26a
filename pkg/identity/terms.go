package identity

import "strings"

// Term is a piece of a rule or a template, and what it comes to for some facts.
type Term struct {
	// Source is the piece as it was written.
	Source string `json:"source"`
	// Holds says that a rule's piece is true, and that a template's gives a legal
	// name.
	Holds bool `json:"holds"`
	// Operator is "&&" or "||" if the piece is made of Operands.
	Operator string `json:"operator,omitempty"`
	Operands []Term `json:"operands,omitempty"`
	// Why says what the facts are that the piece is about, or what the template
	// gives.
	Why string `json:"why,omitempty"`
}

// FieldTerms are the terms of one field of an entry.
type FieldTerms struct {
	// Field is "nodes", "workloads", "spiffe_id" or "dns_names[i]".
	Field string `json:"field"`
	Term
}

// Terms evaluates the entry for these facts term by term: both rules, and the
// templates. It is for people, as Explain is, and as dear.
func (e *Entry) Terms(f *Facts) []FieldTerms {
	var all []FieldTerms
	rule := func(field string, sc scope, source string, holds bool) {
		t := Term{Source: strings.TrimSpace(source), Holds: holds}
		if t.Source != "" {
			t = splitRule(sc, source).evaluate(f)
			t.Holds = holds
		} else {
			t.Why = "there is no rule: every node"
		}
		all = append(all, FieldTerms{field, t})
	}
	rule("nodes", scopeNode, e.proto.GetNodes(), e.MatchNode(f))
	rule("workloads", scopeWorkload, e.proto.GetWorkloads(), e.MatchWorkload(f))
	if f == nil || f.workload == nil {
		return all
	}
	id := FieldTerms{"spiffe_id", Term{Source: e.proto.GetSpiffeId(), Holds: true}}
	if static, ok := e.StaticID(); ok {
		id.Why = static.String()
	} else if got, err := e.renderID(f); err != nil {
		id.Holds, id.Why = false, err.why.Error()
	} else {
		id.Why = got.String()
	}
	all = append(all, id)
	for i, t := range e.dns {
		name := FieldTerms{t.field, Term{Source: e.proto.GetDnsNames()[i], Holds: true}}
		buf, err := t.render(f, nil, maxDNSName, checkLabels)
		name.Why = string(buf)
		if err != nil {
			name.Holds, name.Why = false, err.why.Error()
		} else if err := ValidateDNSName(string(buf)); err != nil {
			name.Holds, name.Why = false, err.Error()
		}
		all = append(all, name)
	}
	return all
}

// evaluate says what a term and each part of it come to.
func (t *term) evaluate(f *Facts) Term {
	out := Term{Source: t.source, Operator: t.operator}
	if t.operator == "" {
		out.Holds = t.expr != nil && t.expr.holds(f)
		if out.Why = t.why(f); out.Holds && len(t.expr.facts()) == 0 {
			out.Why = ""
		}
		return out
	}
	out.Holds = t.operator == "&&"
	for _, o := range t.operands {
		part := o.evaluate(f)
		if t.operator == "&&" {
			out.Holds = out.Holds && part.Holds
		} else {
			out.Holds = out.Holds || part.Holds
		}
		out.Operands = append(out.Operands, part)
	}
	return out
}
