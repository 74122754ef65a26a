package identity

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
)

// Miss says why an entry gives no identity: the nearest miss.
type Miss struct {
	// Field is "nodes", "workloads", "spiffe_id" or "dns_names[i]"; "" if
	// nothing is missed.
	Field string
	// Term is the part of the rule or template that failed, as it was written.
	Term string
	// Why says what the facts are instead. Values are quoted, and cut after 64
	// bytes.
	Why string
}

// Explain returns the first thing that keeps the entry from giving an identity
// for these facts, or the zero Miss if it gives one. It is for people: it compiles
// each term anew, which costs a thousand times what matching costs.
func (e *Entry) Explain(f *Facts) Miss {
	switch {
	case f == nil || f.node == nil:
		return Miss{Field: "nodes", Term: e.proto.GetNodes(), Why: "there is no node"}
	case !e.MatchNode(f):
		return splitRule(scopeNode, e.proto.GetNodes()).miss("nodes", f)
	case f.workload == nil:
		return Miss{Field: "workloads", Term: e.proto.GetWorkloads(), Why: errNoWorkload.Error()}
	case !e.MatchWorkload(f):
		return splitRule(scopeWorkload, e.proto.GetWorkloads()).miss("workloads", f)
	}
	_, err := e.render(f)
	if err == nil {
		return Miss{}
	}
	return Miss{Field: err.field, Term: err.term, Why: err.why.Error()}
}

// term is a piece of a rule: a conjunction, a disjunction, or else something
// that is explained as a whole.
type term struct {
	operator string // "&&", "||", or "" if there are no operands
	operands []*term
	source   string
	expr     *expr // nil if operands are there, or it did not compile alone
}

// splitRule splits the text of a rule, which is known to compile, into terms.
func splitRule(sc scope, source string) *term {
	source = unwrap(source)
	t := &term{source: source}
	for _, operator := range []string{"||", "&&"} {
		pieces := splitAt(source, operator)
		if len(pieces) < 2 {
			continue
		}
		t.operator = operator
		for _, piece := range pieces {
			t.operands = append(t.operands, splitRule(sc, piece))
		}
		return t
	}
	t.expr, _ = compileExpr(sc, source, types.BoolType, position{1, 1})
	return t
}

// unwrap removes space and parentheses around the whole text.
func unwrap(s string) string {
	for {
		s = strings.TrimSpace(s)
		if s == "" || s[0] != '(' {
			return s
		}
		depth := 0
		for i := 0; i < len(s); {
			switch s[i] {
			case '(':
				depth++
			case ')':
				depth--
			}
			next := skipToken(s, i)
			if depth == 0 && i < len(s)-1 || next < 0 {
				return s // it closes before the end
			}
			i = next
		}
		s = s[1 : len(s)-1]
	}
}

// splitAt splits at an operator outside all brackets and literals. A text with a
// conditional is not split: the conditional binds less.
func splitAt(s, operator string) []string {
	var pieces []string
	depth, start := 0, 0
	for i := 0; i < len(s); {
		switch s[i] {
		case '(', '[', '{':
			depth++
		case ')', ']', '}':
			depth--
		case '?':
			if depth == 0 {
				return nil
			}
		default:
			if depth == 0 && strings.HasPrefix(s[i:], operator) {
				pieces = append(pieces, s[start:i])
				i += len(operator)
				start = i
				continue
			}
		}
		next := skipToken(s, i)
		if next < 0 {
			return nil
		}
		i = next
	}
	return append(pieces, s[start:])
}

// score says how near to true a term is: 1 if it is true, less otherwise.
func (t *term) score(f *Facts) float64 {
	switch {
	case t.operator == "" && t.expr != nil && t.expr.holds(f):
		return 1
	case t.operator == "":
		return 0
	}
	sum, best := 0.0, 0.0
	for _, o := range t.operands {
		s := o.score(f)
		sum += s
		best = max(best, s)
	}
	if t.operator == "||" {
		return best
	}
	return sum / float64(len(t.operands))
}

// miss explains a term that is not true: of a conjunction the first such
// operand, of a disjunction the one that is nearest to being true.
func (t *term) miss(field string, f *Facts) Miss {
	switch t.operator {
	case "&&":
		for _, o := range t.operands {
			if o.score(f) < 1 {
				return o.miss(field, f)
			}
		}
	case "||":
		nearest := slices.MaxFunc(t.operands, func(a, b *term) int { return cmp.Compare(a.score(f), b.score(f)) })
		return nearest.miss(field, f)
	}
	return Miss{Field: field, Term: t.source, Why: t.why(f)}
}

// why says what the facts are that a term is about.
func (t *term) why(f *Facts) string {
	if t.expr == nil {
		return "it is not true"
	}
	var said []string
	for _, r := range t.expr.facts() {
		if s := r.say(f); !slices.Contains(said, s) {
			said = append(said, s)
		}
	}
	if len(said) > 0 {
		return strings.Join(said, "; ")
	}
	if _, err := t.expr.eval(f); err != nil {
		return err.Error()
	}
	return "it is false"
}

// factsIn lists the facts that an expression names, each as deep as it is named.
func factsIn(e ast.Expr) []*factRef {
	var refs []*factRef
	covered := map[int64]bool{}
	ast.PreOrderVisit(e, ast.NewExprVisitor(func(e ast.Expr) {
		if covered[e.ID()] {
			return
		}
		r := factOf(e)
		if r == nil && e.Kind() == ast.SelectKind && e.AsSelect().IsTestOnly() {
			if parent := factOf(e.AsSelect().Operand()); parent != nil {
				r = parent.child(e.AsSelect().FieldName())
			}
		}
		if r == nil {
			return
		}
		refs = append(refs, r)
		ast.PreOrderVisit(e, ast.NewExprVisitor(func(inner ast.Expr) { covered[inner.ID()] = true }))
	}))
	return refs
}

// say states the fact, in words for an operator.
func (r *factRef) say(f *Facts) string {
	v, err := r.get(f)
	if err != nil {
		if len(r.fields) > 0 && schema().vars[r.variable].name == "docker" && f.workload.GetDocker() == nil {
			return "the process is in no container (" + r.path + ")"
		}
		return err.Error()
	}
	return r.path + " is " + sayValue(v)
}

// sayElements is how many elements of a list or map are named.
const sayElements = 8

func sayValue(v any) string {
	switch v := v.(type) {
	case types.String:
		return quoteShort(string(v))
	case string:
		return quoteShort(v)
	case types.Int:
		return strconv.FormatInt(int64(v), 10)
	case []int64:
		return sayList(v, func(n int64) string { return strconv.FormatInt(n, 10) })
	case []string:
		return sayList(v, quoteShort)
	case map[string]string:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		return "a map with the keys " + sayList(keys, quoteShort)
	case map[string]any:
		return fmt.Sprintf("a map with %d keys", len(v))
	default:
		return "known"
	}
}

func sayList[T any](list []T, say func(T) string) string {
	var b strings.Builder
	b.WriteByte('[')
	for i, v := range list {
		if i == sayElements {
			fmt.Fprintf(&b, ", … %d in all", len(list))
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(say(v))
	}
	b.WriteByte(']')
	return b.String()
}

var errNoWorkload = errors.New("there is no workload")
