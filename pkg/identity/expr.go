package identity

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
	"weak"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/env"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// Bounds of one expression. They keep compiling in the range of a millisecond
// and evaluating below one, whoever wrote the entry and whatever the facts are.
const (
	maxExpression   = 4096 // characters
	maxNodes        = 2000 // nodes of the syntax tree, macros expanded
	maxNesting      = 50
	maxRegexProgram = 1000 // instructions
	maxCost         = 100_000

	maxErrors  = 8   // that are reported
	maxMessage = 300 // bytes of what CEL says
)

// functions are all that an expression may call. None depends on the time, on
// chance or on anything but the facts; what is left out could be added.
var functions = map[string]bool{
	operators.Conditional: true, operators.LogicalAnd: true, operators.LogicalOr: true, operators.LogicalNot: true,
	operators.Equals: true, operators.NotEquals: true, operators.Less: true, operators.LessEquals: true,
	operators.Greater: true, operators.GreaterEquals: true, operators.Add: true, operators.Subtract: true,
	operators.Multiply: true, operators.Divide: true, operators.Modulo: true, operators.Negate: true,
	operators.Index: true, operators.In: true, operators.NotStrictlyFalse: true,
	"size": true, "contains": true, "startsWith": true, "endsWith": true, "matches": true,
	"int": true, "string": true,
	"charAt": true, "indexOf": true, "lastIndexOf": true, "join": true, "lowerAscii": true, "upperAscii": true,
	"replace": true, "split": true, "substring": true, "trim": true,
}

// scope says which variables an expression may name.
type scope int

const (
	scopeNode     scope = iota // node
	scopeWorkload              // node and the workload's facts
)

// envs are the two environments, shared by all entries. They are made on first
// use: the protocol buffers' descriptors are not needed before that.
var envs = [...]func() (*cel.Env, error){
	scopeNode:     sync.OnceValues(func() (*cel.Env, error) { return newEnv(scopeNode) }),
	scopeWorkload: sync.OnceValues(func() (*cel.Env, error) { return newEnv(scopeWorkload) }),
}

func newEnv(sc scope) (*cel.Env, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, fmt.Errorf("make type registry: %w", err)
	}
	subset := env.NewLibrarySubset()
	for name := range functions {
		subset.AddIncludedFunctions(env.NewFunction(name))
	}
	s := schema()
	opts := []cel.EnvOption{
		cel.StdLib(cel.StdLibSubset(subset)),
		cel.CustomTypeAdapter(registry),
		cel.CustomTypeProvider(&provider{Registry: registry, schema: s}),
		cel.ParserExpressionSizeLimit(maxExpression),
		cel.ExpressionNodeLimit(maxNodes),
		cel.ParserRecursionLimit(maxNesting),
		cel.ParserErrorRecoveryLimit(2),
		cel.RegexProgramSizeLimit(maxRegexProgram),
		cel.ASTValidators(cel.ValidateRegexLiterals()),
	}
	opts = append(opts, textFunctions()...)
	for i := range s.vars {
		if sc == scopeWorkload || s.vars[i].name == varNode {
			opts = append(opts, cel.Variable(s.vars[i].name, s.vars[i].typ))
		}
	}
	e, err := cel.NewCustomEnv(opts...)
	if err != nil {
		return nil, fmt.Errorf("make CEL environment: %w", err)
	}
	return e, nil
}

// position is a place in a field's text, both 1-based and in characters.
type position struct{ line, column int }

// at returns the place that is line (1-based) and column (0-based) after p.
func (p position) at(line, column int) position {
	if line <= 1 {
		return position{p.line, p.column + column}
	}
	return position{p.line + line - 1, column + 1}
}

// positionOf returns the place of the byte at offset.
func positionOf(text string, offset int) position {
	before := text[:offset]
	start := strings.LastIndexByte(before, '\n') + 1
	return position{line: strings.Count(before, "\n") + 1, column: utf8.RuneCountInString(before[start:]) + 1}
}

// expr is a compiled expression. It is immutable, may be evaluated concurrently,
// and is shared by all entries that have the same text. The syntax tree is not
// kept: it is larger than all the rest.
type expr struct {
	exprKey
	program cel.Program
	// counted is the same program with its cost counted and limited as it
	// runs, for facts larger than the cost was estimated for.
	counted func() (cel.Program, error)
	// Of a condition: where it can be looked up, and why it is too weak for a
	// workload rule, or "".
	options [][]guard
	weak    string
	// Of a text: whether it is a fact that a workload cannot choose, as it is.
	strong bool
	// uses are the variables that it names.
	uses []string
}

// exprKey is what an expression's meaning depends on.
type exprKey struct {
	scope  scope
	kind   types.Kind // of its value: bool or string
	source string
}

// compiled has the expressions in use: weak.Pointer[expr] by exprKey. Fleets
// have many entries with few different templates and node rules.
var compiled sync.Map

// eval returns the expression's value, or an error: then something is not known.
func (x *expr) eval(f *Facts) (ref.Val, error) {
	p := x.program
	if f.oversized {
		var err error
		if p, err = x.counted(); err != nil {
			return nil, err
		}
	}
	v, _, err := p.Eval(f)
	return v, err
}

// holds reports whether the rule is true of the facts. Anything else is no match.
func (x *expr) holds(f *Facts) bool {
	v, err := x.eval(f)
	return err == nil && v == types.True
}

// compileExpr returns the compiled expression, whose value has type want. at is
// the place of source in its field. The errors have no Field set.
func compileExpr(sc scope, source string, want *types.Type, at position) (*expr, []FieldError) {
	key := exprKey{scope: sc, kind: want.Kind(), source: source}
	if p, ok := compiled.Load(key); ok {
		if shared, ok := p.(weak.Pointer[expr]); ok {
			if x := shared.Value(); x != nil {
				return x, nil
			}
		}
	}
	x, bad := newExpr(key, want, at)
	if bad != nil {
		return nil, bad
	}
	p := weak.Make(x)
	compiled.Store(key, p)
	runtime.AddCleanup(x, func(key exprKey) { compiled.CompareAndDelete(key, p) }, key)
	return x, nil
}

// CheckNodes returns what is wrong with a nodes rule that is to become a part of a larger
// one: a text that only reads as a rule together with what stands around it, such as
// "true) || (true", is none.
func CheckNodes(rule string) error {
	_, bad := compileExpr(scopeNode, rule, types.BoolType, position{1, 1})
	var problems []error
	for _, b := range bad {
		b.Field = "nodes"
		problems = append(problems, errors.New(b.String()))
	}
	return errors.Join(problems...)
}

// newExpr compiles an expression.
func newExpr(key exprKey, want *types.Type, at position) (*expr, []FieldError) {
	e, err := envs[key.scope]()
	if err != nil {
		return nil, []FieldError{{Message: err.Error()}}
	}
	c := &compilation{scope: key.scope, at: at}
	parsed, issues := e.Parse(key.source)
	if issues.Err() != nil {
		return nil, c.translate(key.source, issues.Errors(), nil)
	}
	checked, issues := e.Check(parsed)
	if issues.Err() != nil {
		return nil, c.translate(key.source, issues.Errors(), parsed.NativeRep())
	}
	tree := checked.NativeRep()
	if got := checked.OutputType(); !got.IsExactType(want) {
		return nil, []FieldError{{
			Line: at.line, Column: at.column,
			Message: fmt.Sprintf("it is a %s and must be a %s", typeName(got), typeName(want)),
			Hint:    typeHint(got, want),
		}}
	}
	if bad := c.restrict(tree); len(bad) > 0 {
		return nil, bad
	}
	estimate, err := e.EstimateCost(checked, sizes{})
	if err != nil {
		return nil, []FieldError{{Line: at.line, Column: at.column, Message: "its cost cannot be estimated: " + err.Error()}}
	}
	if estimate.Max > maxCost {
		return nil, []FieldError{{
			Line: at.line, Column: at.column,
			Message: fmt.Sprintf("it may cost up to %d units, at most %d are allowed", estimate.Max, maxCost),
			Hint:    "avoid macros inside macros (all, exists, map, filter), and write a long rule as several entries",
		}}
	}
	program, err := e.Program(checked, cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, []FieldError{{Line: at.line, Column: at.column, Message: err.Error()}}
	}
	x := &expr{
		exprKey: key, program: program,
		counted: sync.OnceValues(func() (cel.Program, error) {
			again, issues := e.Compile(key.source)
			if issues.Err() != nil {
				return nil, issues.Err()
			}
			return e.Program(again, cel.EvalOptions(cel.OptOptimize, cel.OptTrackCost), cel.CostLimit(maxCost))
		}),
	}
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() == ast.IdentKind && !slices.Contains(x.uses, e.AsIdent()) {
			x.uses = append(x.uses, e.AsIdent())
		}
	}))
	if key.kind == types.BoolKind {
		x.options = guards(tree.Expr())
		x.weak = weakness(tree)
	} else {
		x.strong = strongFact(tree.Expr())
	}
	return x, nil
}

// facts lists the facts that the expression names, for an explanation.
func (x *expr) facts() []*factRef {
	e, err := envs[x.scope]()
	if err != nil {
		return nil
	}
	checked, issues := e.Compile(x.source)
	if issues.Err() != nil {
		return nil
	}
	return factsIn(checked.NativeRep().Expr())
}

// sizes are what the cost of an expression is estimated with; see
// Facts.oversized.
type sizes struct{}

func (sizes) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	if n.ComputedSize() != nil {
		return nil
	}
	switch n.Type().Kind() {
	case types.StringKind:
		return &cost.SizeEstimate{Max: maxString}
	case types.ListKind, types.MapKind:
		return &cost.SizeEstimate{Max: maxElements}
	default:
		return nil
	}
}

func (sizes) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}

// compilation collects what is needed to say where an expression is wrong.
type compilation struct {
	scope scope
	at    position
}

// restrict checks what CEL's type checker allows and a rule must not do.
func (c *compilation) restrict(tree *ast.AST) []FieldError {
	var bad []FieldError
	report := func(e ast.Expr, message, hint string) {
		loc := tree.SourceInfo().GetStartLocation(e.ID())
		p := c.at.at(loc.Line(), max(loc.Column(), 0))
		bad = append(bad, FieldError{Line: p.line, Column: p.column, Message: message, Hint: hint})
	}
	selected := map[int64]bool{} // operands of a selection
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		switch e.Kind() {
		case ast.SelectKind:
			selected[e.AsSelect().Operand().ID()] = true
		case ast.StructKind:
			report(e, "a message cannot be made in a rule", "name single fields")
		case ast.CallKind:
			call := e.AsCall()
			name := call.FunctionName()
			if !functions[name] {
				report(e, fmt.Sprintf("%s() cannot be used in a rule", name), "")
			}
			if name == operators.Equals && (isOverflow(call.Args()[0], call.Args()[1]) || isOverflow(call.Args()[1], call.Args()[0])) {
				report(e, "the overflow id 65534 stands for every id that the kernel cannot name, so it never matches", "")
			}
			if name == "matches" {
				if pattern := call.Args()[len(call.Args())-1]; pattern.Kind() != ast.LiteralKind {
					report(pattern, "the pattern of matches must be a literal string", "a pattern that a workload could choose would be an attack on the agent")
				}
			}
		default:
		}
		if tree.GetType(e.ID()).Kind() == types.StructKind && !selected[e.ID()] {
			report(e, "it is used as a whole", "compare its fields, and ask has("+exampleField(tree.GetType(e.ID()).TypeName())+") whether something is known")
		}
	}))
	return bad
}

// isOverflow reports whether a user or group id is compared with overflowID.
func isOverflow(fact, literal ast.Expr) bool {
	if literal.Kind() != ast.LiteralKind || literal.AsLiteral() != types.Int(overflowID) {
		return false
	}
	r := factOf(fact)
	return r != nil && (r.path == "unix.uid" || r.path == "unix.gid")
}

func exampleField(name string) string {
	s := schema()
	m := s.messages[name]
	if m == nil || len(m.names) == 0 {
		return "…"
	}
	for i := range s.vars {
		if s.vars[i].message == m {
			return s.vars[i].name + "." + m.names[0]
		}
	}
	return "…." + m.names[0]
}

// translate turns CEL's errors into ours, with a hint where one can be given.
func (c *compilation) translate(source string, errs []*cel.Error, tree *ast.AST) []FieldError {
	var out []FieldError
	for _, e := range errs[:min(len(errs), maxErrors)] {
		p := c.at
		if e.Location != nil {
			p = c.at.at(e.Location.Line(), max(e.Location.Column(), 0))
		}
		f := FieldError{Line: p.line, Column: p.column, Message: e.Message}
		switch {
		case strings.HasPrefix(e.Message, "undefined field "):
			c.undefinedField(&f, e, tree)
		case strings.HasPrefix(e.Message, "undeclared reference to "):
			c.undeclared(&f, e, tree)
		case strings.HasPrefix(e.Message, "found no matching overload for "):
			overload(&f)
		case e.Message == "invalid matches argument":
			f.Message = "the pattern is not a valid regular expression"
			f.Hint = "the syntax is RE2's"
		case strings.Contains(e.Message, "Syntax error"):
			f.Message = lowerFirst(e.Message)
			f.Hint = syntaxHint(source, e.Location)
		}
		if len(f.Message) > maxMessage {
			f.Message = strings.ToValidUTF8(f.Message[:maxMessage], "") + "…"
		}
		out = append(out, f)
	}
	slices.SortStableFunc(out, func(a, b FieldError) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return out
}

func (c *compilation) undefinedField(f *FieldError, e *cel.Error, tree *ast.AST) {
	name := quoted(e.Message)
	var m *message
	path := ""
	if found := findExpr(tree, e.ExprID); found != nil && found.Kind() == ast.SelectKind {
		m, path = messageOf(found.AsSelect().Operand())
	}
	if m == nil {
		f.Message = fmt.Sprintf("there is no field %q", name)
		return
	}
	f.Message = fmt.Sprintf("there is no field %q in %s", name, path)
	if best := nearest(name, m.names); best != "" {
		f.Hint = fmt.Sprintf("did you mean %s.%s?", path, best)
		return
	}
	f.Hint = path + " has " + strings.Join(m.names, ", ")
}

func (c *compilation) undeclared(f *FieldError, e *cel.Error, tree *ast.AST) {
	name := quoted(e.Message)
	s := schema()
	if found := findExpr(tree, e.ExprID); found != nil && found.Kind() == ast.CallKind {
		f.Message = fmt.Sprintf("there is no function %s()", name)
		var names []string
		for fn := range functions {
			if isLower(fn[0]) {
				names = append(names, fn)
			}
		}
		slices.Sort(names)
		names = append(names, "has", "all", "exists", "exists_one", "map", "filter")
		if best := nearest(name, names); best != "" {
			f.Hint = fmt.Sprintf("did you mean %s()?", best)
		}
		return
	}
	f.Message = fmt.Sprintf("there is no %q here", name)
	var inScope []string
	for i := range s.vars {
		v := &s.vars[i]
		visible := c.scope == scopeWorkload || v.name == varNode
		if visible {
			inScope = append(inScope, v.name)
		} else if v.name == name {
			f.Hint = name + " is a fact about a workload: such terms belong in `workloads`"
			return
		}
	}
	for i := range s.vars { // a field without its message
		v := &s.vars[i]
		if v.message != nil && slices.Contains(inScope, v.name) && v.message.fields[name] != nil {
			f.Hint = fmt.Sprintf("did you mean %s.%s?", v.name, name)
			return
		}
	}
	if best := nearest(name, inScope); best != "" {
		f.Hint = fmt.Sprintf("did you mean %s?", best)
		return
	}
	f.Hint = "one can name " + strings.Join(inScope, ", ") + "; a text stands in quotes"
}

// overload rewrites the error of an operator or function that does not take its
// operands.
func overload(f *FieldError) {
	name := quoted(f.Message)
	_, signature, _ := strings.Cut(f.Message, "applied to '")
	signature = strings.TrimSuffix(signature, "'")
	if symbol, ok := operators.FindReverse(name); ok && symbol != "" {
		name = symbol
	}
	f.Message = fmt.Sprintf("%s does not take %s", name, signature)
	switch signature {
	case "(int, string)", "(string, int)":
		f.Hint = "a number is written without quotes, a text with quotes"
	case "(int, uint)", "(uint, int)":
		f.Hint = "a number is written without the u"
	}
}

func syntaxHint(source string, loc interface {
	Line() int
	Column() int
},
) string {
	if loc == nil {
		return ""
	}
	lines := strings.Split(source, "\n")
	if loc.Line() < 1 || loc.Line() > len(lines) {
		return ""
	}
	line := []rune(lines[loc.Line()-1])
	if loc.Column() < 0 || loc.Column() >= len(line) {
		return "the expression ends too early"
	}
	rest := string(line[loc.Column():])
	for word, hint := range map[string]string{
		"and": "write && for and", "or": "write || for or", "not": "write ! for not", "=": "write == to compare",
	} {
		if tail, ok := strings.CutPrefix(rest, word); ok && (tail == "" || !isWord(tail[0])) {
			return hint
		}
	}
	return ""
}

func isWord(c byte) bool { return isLower(c) || isUpper(c) || isDigit(c) || c == '_' || c == '=' }

func typeName(t *types.Type) string {
	switch t.Kind() {
	case types.BoolKind:
		return "condition (bool)"
	case types.StringKind:
		return "text (string)"
	case types.IntKind:
		return "number (int)"
	default:
		return cel.FormatCELType(t)
	}
}

func typeHint(got, want *types.Type) string {
	switch {
	case got.Kind() == types.IntKind && want.Kind() == types.StringKind:
		return "convert it with string(…)"
	case got.Kind() == types.StringKind && want.Kind() == types.BoolKind:
		return `compare it, as in docker.image == "registry.example/app:1"`
	default:
		return ""
	}
}

// quoted returns the first text in single quotes.
func quoted(s string) string {
	_, s, _ = strings.Cut(s, "'")
	s, _, _ = strings.Cut(s, "'")
	return s
}

func lowerFirst(s string) string {
	if s == "" || !isUpper(s[0]) {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}

// findExpr returns the node with an id, or nil.
func findExpr(tree *ast.AST, id int64) ast.Expr {
	if tree == nil {
		return nil
	}
	var found ast.Expr
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.ID() == id {
			found = e
		}
	}))
	return found
}

// messageOf returns the message that an expression selects, and its path.
func messageOf(e ast.Expr) (*message, string) {
	switch e.Kind() {
	case ast.IdentKind:
		s := schema()
		for i := range s.vars {
			if s.vars[i].name == e.AsIdent() {
				return s.vars[i].message, s.vars[i].name
			}
		}
	case ast.SelectKind:
		if m, path := messageOf(e.AsSelect().Operand()); m != nil {
			if f := m.fields[e.AsSelect().FieldName()]; f != nil {
				return f.sub, path + "." + e.AsSelect().FieldName()
			}
		}
	default:
	}
	return nil, ""
}

// factOf returns the fact that an expression names, or nil.
func factOf(e ast.Expr) *factRef {
	switch e.Kind() {
	case ast.IdentKind:
		s := schema()
		for i := range s.vars {
			if s.vars[i].name == e.AsIdent() {
				return &factRef{variable: i, path: e.AsIdent(), typ: s.vars[i].typ}
			}
		}
	case ast.SelectKind:
		sel := e.AsSelect()
		if sel.IsTestOnly() {
			return nil
		}
		if r := factOf(sel.Operand()); r != nil {
			return r.child(sel.FieldName())
		}
	case ast.CallKind:
		call := e.AsCall()
		if call.FunctionName() != operators.Index || len(call.Args()) != 2 || call.Args()[1].Kind() != ast.LiteralKind {
			return nil
		}
		key, ok := call.Args()[1].AsLiteral().(types.String)
		if !ok {
			return nil
		}
		if r := factOf(call.Args()[0]); r != nil {
			return r.child(string(key))
		}
	default:
	}
	return nil
}

// child returns the fact below r: a field of a message, or a key of a map.
func (r *factRef) child(name string) *factRef {
	switch r.typ.Kind() {
	case types.StructKind:
		m := schema().messages[r.typ.TypeName()]
		if m == nil || m.fields[name] == nil {
			return nil
		}
		f := m.fields[name]
		return &factRef{variable: r.variable, fields: append(slices.Clone(r.fields), f), path: r.path + "." + name, typ: f.typ}
	case types.MapKind:
		return &factRef{
			variable: r.variable, fields: r.fields, keys: append(slices.Clone(r.keys), name),
			path: fmt.Sprintf("%s[%q]", r.path, name), typ: r.typ.Parameters()[1],
		}
	default:
		return nil
	}
}

// nearest returns the candidate that a misspelt name most likely stands for.
func nearest(name string, candidates []string) string {
	best, bestDistance := "", max(2, len(name)/3)+1
	for _, c := range candidates {
		if d := editDistance(name, c); d < bestDistance && d < len(c) {
			best, bestDistance = c, d
		}
	}
	return best
}

// editDistance counts insertions, deletions, replacements and swaps of
// neighbours. Long names are far from everything.
func editDistance(a, b string) int {
	if len(a) > maxQuoted || len(b) > maxQuoted {
		return maxQuoted
	}
	before, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			replace := prev[j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			cur[j] = min(replace, prev[j]+1, cur[j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev, cur = prev, cur, before
	}
	return prev[len(b)]
}
