package identity

import (
	"fmt"
	"regexp/syntax"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/parser"
)

// This file decides whether a workload rule rests on something. A rule is too
// weak if a workload, or the tenant who starts it, could make it true by what
// they may choose themselves:
//
//   - docker.labels, docker.name: whoever starts a container chooses them;
//   - docker.image_labels: whoever builds an image chooses them;
//   - k8s.labels, k8s.pod_name, k8s.container, k8s.owner_*: whoever may create pods
//     in a namespace chooses them; and k8s.service_account, since each namespace
//     may have one of that name;
//   - unix.path, unix.sha256: a process connects first and then executes the
//     program that the rule names, so they say what runs, not on whose behalf;
//   - ext: an external attestor reports it, and what its words are worth is not
//     known here.
//
// Strong is what the kernel or the engine assigns, or what names content:
// unix.uid, unix.gid, unix.groups, docker.container_id, docker.image_digest,
// k8s.namespace, k8s.pod_uid, k8s.container_id, k8s.image_digest; and docker.image
// and k8s.image, the references that were resolved. A name within an image
// reference proves nothing (anybody may push registry.evil/shop), so a prefix of
// an image counts only if it ends the registry or the repository: it must
// have a slash, or end with ':' or '@'. A suffix or a part never counts.
// node.* is about the machine and says nothing of the process.
//
// A rule may be as weak as it likes if the SPIFFE ID has a whole path segment that
// is a strong fact, as in /ns/{k8s.namespace}/sa/{k8s.service_account}: each
// workload then gets a name that it alone can have.
//
// The analysis is conservative. A term is strong only if it pins a strong fact
// to given values: equality or `in` with literals (or with facts of the node,
// which the CA has verified), a prefix as above, an anchored pattern that begins
// with such a prefix. `!=`, `<`, has(), and all that it does not understand are
// not strong. A rule is strong if it cannot be true without a strong term:
//
//	a && b     one of them is strong
//	a || b     both are strong
//	c ? a : b  (c && a) || (!c && b)
//	!a         De Morgan
//
// A fact that is added to proto/attributes/v1 is weak until it is listed here.

// strongFacts are the facts that a process cannot choose, and how they may be
// pinned down.
var strongFacts = map[string]pinning{
	"unix.uid":            {equality: true},
	"unix.gid":            {equality: true},
	"unix.groups":         {member: true},
	"docker.container_id": {equality: true},
	"docker.image_digest": {equality: true},
	"docker.image":        {equality: true, prefix: true},
	"k8s.namespace":       {equality: true},
	"k8s.pod_uid":         {equality: true},
	"k8s.container_id":    {equality: true},
	"k8s.image_digest":    {equality: true},
	"k8s.image":           {equality: true, prefix: true},
}

type pinning struct{ equality, member, prefix bool }

// weakFacts say why each weak fact is weak.
var weakFacts = map[string]string{
	"docker.labels":       "whoever starts a container chooses its labels",
	"docker.name":         "whoever starts a container chooses its name",
	"docker.image_labels": "whoever builds an image chooses its labels",
	"k8s.service_account": "each namespace may have a service account of that name",
	"k8s.labels":          "whoever may create pods in a namespace chooses their labels",
	"k8s.pod_name":        "whoever may create pods in a namespace chooses their names",
	"k8s.container":       "whoever may create pods in a namespace chooses their containers' names",
	"k8s.owner_kind":      "whoever may create pods in a namespace chooses their owners",
	"k8s.owner_name":      "whoever may create pods in a namespace chooses their owners",
	"k8s.owner_uid":       "whoever may create pods in a namespace chooses their owners",
	"unix.path":           "a process can execute that program after it has connected",
	"unix.sha256":         "a process can execute that program after it has connected",
	"ext":                 "what an external attestor reports is not judged here",
}

const weakHint = `add a term that a workload cannot choose, such as docker.image.startsWith("registry.example/team/"), ` +
	`docker.image_digest == "sha256:…" or unix.uid == 1000; or write accept_weak: true if you accept that`

// weakness returns why a workload rule is too weak, or "".
func weakness(tree *ast.AST) string {
	root := tree.Expr()
	if pins(root) {
		return ""
	}
	branch := weakBranch(root)
	var why strings.Builder
	if branch.ID() != root.ID() {
		if text, err := parser.Unparse(branch, tree.SourceInfo()); err == nil {
			fmt.Fprintf(&why, "if `%s` is true, the rule ", text)
		}
	}
	if why.Len() == 0 {
		why.WriteString("the rule ")
	}
	used := weakUses(branch)
	if len(used) == 0 {
		why.WriteString("rests on no fact that a workload could not choose")
	} else {
		why.WriteString("rests only on " + strings.Join(used, " and "))
		var reasons []string
		for _, fact := range used {
			if !slices.Contains(reasons, weakFacts[fact]) {
				reasons = append(reasons, weakFacts[fact])
			}
		}
		why.WriteString(": " + strings.Join(reasons, ", and "))
	}
	if open := openPrefix(branch); open != "" {
		fmt.Fprintf(&why, "; the prefix %q is open: it also covers %q", open, open+".evil.example/app")
	}
	return why.String()
}

// weakBranch returns the part of a rule that is true on weak facts alone.
func weakBranch(e ast.Expr) ast.Expr {
	if a, b, ok := operands(e, operators.LogicalOr); ok {
		if !pins(a) {
			return weakBranch(a)
		}
		return weakBranch(b)
	}
	return e
}

// weakUses lists the weak facts that an expression names.
func weakUses(e ast.Expr) []string {
	var used []string
	ast.PreOrderVisit(e, ast.NewExprVisitor(func(e ast.Expr) {
		path := ""
		switch e.Kind() {
		case ast.IdentKind:
			path = e.AsIdent()
		case ast.SelectKind:
			if _, parent := messageOf(e.AsSelect().Operand()); parent != "" {
				path = parent + "." + e.AsSelect().FieldName()
			}
		default:
		}
		if _, ok := weakFacts[path]; ok && !slices.Contains(used, path) {
			used = append(used, path)
		}
	}))
	slices.Sort(used)
	return used
}

// pins reports whether the expression cannot be true without a strong term.
func pins(e ast.Expr) bool {
	switch e.Kind() {
	case ast.LiteralKind:
		return e.AsLiteral() == types.False // it is never true
	case ast.CallKind:
		if a, b, ok := operands(e, operators.LogicalAnd); ok {
			return pins(a) || pins(b)
		}
		if a, b, ok := operands(e, operators.LogicalOr); ok {
			return pins(a) && pins(b)
		}
		call := e.AsCall()
		switch call.FunctionName() {
		case operators.LogicalNot:
			return pinsNot(call.Args()[0])
		case operators.Conditional:
			c, a, b := call.Args()[0], call.Args()[1], call.Args()[2]
			return (pins(c) || pins(a)) && (pinsNot(c) || pins(b))
		}
		return strongTerm(call)
	default:
		return false
	}
}

// pinsNot reports whether the expression cannot be false without a strong term.
func pinsNot(e ast.Expr) bool {
	switch e.Kind() {
	case ast.LiteralKind:
		return e.AsLiteral() == types.True
	case ast.CallKind:
		if a, b, ok := operands(e, operators.LogicalAnd); ok {
			return pinsNot(a) && pinsNot(b)
		}
		if a, b, ok := operands(e, operators.LogicalOr); ok {
			return pinsNot(a) || pinsNot(b)
		}
		call := e.AsCall()
		switch call.FunctionName() {
		case operators.LogicalNot:
			return pins(call.Args()[0])
		case operators.NotEquals:
			return strongEquality(call.Args()[0], call.Args()[1])
		}
		return false
	default:
		return false
	}
}

// strongTerm reports whether a call is true only for given values of a fact
// that a workload cannot choose.
func strongTerm(call ast.CallExpr) bool {
	switch call.FunctionName() {
	case operators.Equals:
		return strongEquality(call.Args()[0], call.Args()[1])
	case operators.In:
		element, list := call.Args()[0], call.Args()[1]
		if r := factOf(list); r != nil && strongFacts[r.path].member {
			return given(element)
		}
		r := factOf(element)
		if r == nil || !strongFacts[r.path].equality || list.Kind() != ast.ListKind {
			return false
		}
		return !slices.ContainsFunc(list.AsList().Elements(), func(e ast.Expr) bool { return !given(e) })
	case "startsWith":
		return prefixed(call, delimited)
	case "matches":
		return prefixed(call, func(pattern string) bool { return delimited(literalPrefix(pattern)) })
	}
	return false
}

func strongEquality(a, b ast.Expr) bool {
	if r := factOf(a); r != nil && strongFacts[r.path].equality {
		return given(b)
	}
	if r := factOf(b); r != nil && strongFacts[r.path].equality {
		return given(a)
	}
	return false
}

// prefixed reports whether call is a method with one literal argument, for which
// ok holds, on a fact that a prefix may pin.
func prefixed(call ast.CallExpr, ok func(string) bool) bool {
	if !call.IsMemberFunction() || len(call.Args()) != 1 || call.Args()[0].Kind() != ast.LiteralKind {
		return false
	}
	r := factOf(call.Target())
	arg, isString := call.Args()[0].AsLiteral().(types.String)
	return r != nil && strongFacts[r.path].prefix && isString && ok(string(arg))
}

// delimited reports whether a prefix of an image reference ends the name of the
// registry or of the repository, so that nobody else can own what it covers.
func delimited(prefix string) bool {
	return strings.Contains(strings.TrimLeft(prefix, "/"), "/") ||
		len(prefix) > 1 && (strings.HasSuffix(prefix, ":") || strings.HasSuffix(prefix, "@"))
}

// literalPrefix returns the text that everything matched by an anchored pattern
// begins with, or "".
func literalPrefix(pattern string) string {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return ""
	}
	re = re.Simplify()
	if re.Op != syntax.OpConcat || len(re.Sub) < 2 || re.Sub[0].Op != syntax.OpBeginText {
		return ""
	}
	if lit := re.Sub[1]; lit.Op == syntax.OpLiteral && lit.Flags&syntax.FoldCase == 0 {
		return string(lit.Rune)
	}
	return ""
}

// pinned reports whether the rendered text has a whole path segment that is a strong
// fact as it is.
func (t *template) pinned() bool {
	for i, p := range t.parts {
		if p.expr == nil || !p.expr.strong {
			continue
		}
		starts := i > 0 && strings.HasSuffix(t.parts[i-1].literal, "/")
		ends := i == len(t.parts)-1 || strings.HasPrefix(t.parts[i+1].literal, "/")
		if starts && ends {
			return true
		}
	}
	return false
}

// strongFact reports whether an expression is a strong fact, and nothing else.
func strongFact(e ast.Expr) bool {
	r := factOf(e)
	return r != nil && strongFacts[r.path].equality
}

// openPrefix returns a prefix of an image in the expression that is not
// delimited, for the explanation.
func openPrefix(e ast.Expr) string {
	open := ""
	ast.PreOrderVisit(e, ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() == ast.CallKind && e.AsCall().FunctionName() == "startsWith" {
			prefixed(e.AsCall(), func(prefix string) bool {
				if !delimited(prefix) {
					open = prefix
				}
				return true
			})
		}
	}))
	return open
}

// given reports whether a value comes from the rule itself or from the node's
// verified facts, not from the workload.
func given(e ast.Expr) bool {
	ok := true
	ast.PreOrderVisit(e, ast.NewExprVisitor(func(e ast.Expr) {
		switch e.Kind() {
		case ast.IdentKind:
			ok = ok && e.AsIdent() == varNode
		case ast.ComprehensionKind:
			ok = false
		default:
		}
	}))
	return ok
}

// operands returns the operands of a call of a binary operator.
func operands(e ast.Expr, operator string) (a, b ast.Expr, ok bool) {
	if e.Kind() != ast.CallKind {
		return nil, nil, false
	}
	call := e.AsCall()
	if call.FunctionName() != operator || len(call.Args()) != 2 {
		return nil, nil, false
	}
	return call.Args()[0], call.Args()[1], true
}
