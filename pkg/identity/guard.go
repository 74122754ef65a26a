package identity

import (
	"strconv"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
)

// A guard is a necessary condition that can be looked up: a fact that must equal
// a value, or begin with it. An option is a list of guards of which at least one
// holds whenever the rule does. A rule has any number of options, and each one
// alone is enough to find it; with none, the rule must be tried each time.
type guard struct {
	fact *factRef
	// prefix is the length of the prefix, or whole.
	prefix int
	value  guardValue
}

// whole says that a guard is about the whole value.
const whole = -1

// guardValue is a string or a number; which one is known from the fact's type.
type guardValue struct {
	text   string
	number int64
}

// key names what is looked up, without the value.
func (g *guard) key() string {
	if g.prefix == whole {
		return g.fact.path
	}
	return g.fact.path + " prefix " + strconv.Itoa(g.prefix)
}

// maxAlternatives bounds the guards of one option.
const maxAlternatives = 64

// guards returns the options of a rule.
func guards(e ast.Expr) [][]guard {
	if e.Kind() != ast.CallKind {
		return nil
	}
	if a, b, ok := operands(e, operators.LogicalAnd); ok {
		return append(guards(a), guards(b)...)
	}
	if a, b, ok := operands(e, operators.LogicalOr); ok {
		one, other := shortest(guards(a)), shortest(guards(b))
		if one == nil || other == nil || len(one)+len(other) > maxAlternatives {
			return nil
		}
		return [][]guard{append(append([]guard(nil), one...), other...)}
	}
	call := e.AsCall()
	switch call.FunctionName() {
	case operators.Equals:
		a, b := call.Args()[0], call.Args()[1]
		if g, ok := equality(a, b); ok {
			return [][]guard{{g}}
		}
		if g, ok := equality(b, a); ok {
			return [][]guard{{g}}
		}
	case operators.In:
		list := call.Args()[1]
		if list.Kind() != ast.ListKind || list.AsList().Size() > maxAlternatives || list.AsList().Size() == 0 {
			return nil
		}
		var option []guard
		for _, element := range list.AsList().Elements() {
			g, ok := equality(call.Args()[0], element)
			if !ok {
				return nil
			}
			option = append(option, g)
		}
		return [][]guard{option}
	case "startsWith":
		if !call.IsMemberFunction() || len(call.Args()) != 1 {
			return nil
		}
		g, ok := equality(call.Target(), call.Args()[0])
		if ok && g.value.text != "" {
			g.prefix = len(g.value.text)
			return [][]guard{{g}}
		}
	}
	return nil
}

// equality returns the guard of fact == literal.
func equality(fact, literal ast.Expr) (guard, bool) {
	if literal.Kind() != ast.LiteralKind {
		return guard{}, false
	}
	r := factOf(fact)
	if r == nil {
		return guard{}, false
	}
	switch v := literal.AsLiteral().(type) {
	case types.String:
		return guard{fact: r, prefix: whole, value: guardValue{text: string(v)}}, r.typ.Kind() == types.StringKind
	case types.Int:
		return guard{fact: r, prefix: whole, value: guardValue{number: int64(v)}}, r.typ.Kind() == types.IntKind
	default:
		return guard{}, false
	}
}

func shortest(options [][]guard) []guard {
	var best []guard
	for _, o := range options {
		if best == nil || len(o) < len(best) {
			best = o
		}
	}
	return best
}
