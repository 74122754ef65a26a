package console

import (
	"bytes"
	"fmt"
	"html"
	"io/fs"
	"maps"
	"reflect"
	"slices"
	"strings"
	"text/template/parse"
)

// page is a page's template in the language of html/template, of which it has what
// the pages need. It is not html/template itself, because that calls methods by
// their names, and the linker of a program that does cannot leave out any exported
// method: the CA would be larger by 4.5 MB. The tests render every page with
// html/template as well, with the worst that others can choose, and compare.
//
// All values are escaped, for text and for attributes in double quotes. There are no
// others: neither script nor style has values in it, and addresses are made by
// functions.
type page struct {
	trees map[string]*parse.Tree
	funcs map[string]reflect.Value
}

// parsePage parses a page's files; the first is where it begins.
func parsePage(files fs.FS, funcs map[string]any, names ...string) (*page, error) {
	p := &page{trees: make(map[string]*parse.Tree), funcs: make(map[string]reflect.Value)}
	for name, f := range funcs {
		p.funcs[name] = reflect.ValueOf(f)
	}
	for _, name := range names {
		content, err := fs.ReadFile(files, "templates/"+name)
		if err != nil {
			return nil, err
		}
		trees, err := parse.Parse(name, string(content), "", "", funcs, builtins)
		if err != nil {
			return nil, fmt.Errorf("parse the console's template: %w", err)
		}
		maps.Copy(p.trees, trees)
	}
	return p, nil
}

// render writes the page with this value.
func (p *page) render(out *bytes.Buffer, start string, value any) (err error) {
	defer func() {
		switch e := recover().(type) {
		case nil:
		case templateError:
			err = fmt.Errorf("render %s: %s", start, string(e))
		default:
			panic(e)
		}
	}()
	r := &rendering{page: p, out: out}
	r.template(start, reflect.ValueOf(value))
	return nil
}

// templateError ends a rendering.
type templateError string

func bad(format string, args ...any) { panic(templateError(fmt.Sprintf(format, args...))) }

// builtins are the functions of html/template that the pages use. "and" and "or"
// do not look at what follows the value that decides.
var builtins = map[string]any{
	"and": func(a, b any) any { return nil }, "or": func(a, b any) any { return nil },
	"eq":     func(a, b any) bool { return a == b },
	"ne":     func(a, b any) bool { return a != b },
	"not":    func(a any) bool { return !truth(reflect.ValueOf(a)) },
	"index":  func(list any, i int) any { return reflect.ValueOf(list).Index(i).Interface() },
	"printf": fmt.Sprintf,
}

type variable struct {
	name  string
	value reflect.Value
}

type rendering struct {
	*page
	out  *bytes.Buffer
	vars []variable
}

func (r *rendering) template(name string, dot reflect.Value) {
	tree, ok := r.trees[name]
	if !ok {
		bad("there is no template %q", name)
	}
	vars := r.vars
	r.vars = []variable{{"$", dot}}
	r.walk(dot, tree.Root)
	r.vars = vars
}

func (r *rendering) walk(dot reflect.Value, node parse.Node) {
	switch n := node.(type) {
	case *parse.ListNode:
		if n != nil {
			for _, c := range n.Nodes {
				r.walk(dot, c)
			}
		}
	case *parse.TextNode:
		r.out.Write(n.Text)
	case *parse.ActionNode:
		if v := r.pipe(dot, n.Pipe); len(n.Pipe.Decl) == 0 {
			r.out.WriteString(strings.ReplaceAll(html.EscapeString(fmt.Sprint(plain(v))), "\x00", "\ufffd"))
		}
	case *parse.IfNode:
		r.branch(dot, &n.BranchNode, func(reflect.Value) reflect.Value { return dot })
	case *parse.WithNode:
		r.branch(dot, &n.BranchNode, func(v reflect.Value) reflect.Value { return v })
	case *parse.RangeNode:
		r.loop(dot, &n.BranchNode)
	case *parse.TemplateNode:
		r.template(n.Name, r.pipe(dot, n.Pipe))
	default:
		bad("%s is not supported", node)
	}
}

func (r *rendering) branch(dot reflect.Value, n *parse.BranchNode, inside func(reflect.Value) reflect.Value) {
	mark := len(r.vars)
	if v := r.pipe(dot, n.Pipe); truth(v) {
		r.walk(inside(v), n.List)
	} else if n.ElseList != nil {
		r.walk(dot, n.ElseList)
	}
	r.vars = r.vars[:mark]
}

func (r *rendering) loop(dot reflect.Value, n *parse.BranchNode) {
	mark := len(r.vars)
	list := concrete(r.pipe(dot, n.Pipe))
	if list.Kind() != reflect.Slice {
		bad("%s is no list", n.Pipe)
	}
	inner := len(r.vars)
	for i := range list.Len() {
		if len(n.Pipe.Decl) == 1 {
			r.vars[inner-1].value = list.Index(i)
		}
		r.walk(list.Index(i), n.List)
		r.vars = r.vars[:inner]
	}
	r.vars = r.vars[:mark]
	if list.Len() == 0 && n.ElseList != nil {
		r.walk(dot, n.ElseList)
	}
}

// pipe evaluates a pipeline, and declares its variable.
func (r *rendering) pipe(dot reflect.Value, p *parse.PipeNode) (v reflect.Value) {
	if len(p.Cmds) != 1 || len(p.Decl) > 1 {
		bad("%s is not supported", p)
	}
	v = r.command(dot, p.Cmds[0])
	for _, d := range p.Decl {
		r.vars = append(r.vars, variable{d.Ident[0], v})
	}
	return v
}

func (r *rendering) command(dot reflect.Value, c *parse.CommandNode) reflect.Value {
	if f, ok := c.Args[0].(*parse.IdentifierNode); ok {
		return r.call(dot, f.Ident, c.Args[1:])
	}
	if len(c.Args) > 1 {
		bad("%s is not supported", c)
	}
	return r.value(dot, c.Args[0])
}

func (r *rendering) value(dot reflect.Value, node parse.Node) reflect.Value {
	switch n := node.(type) {
	case *parse.DotNode:
		return dot
	case *parse.FieldNode:
		return fieldOf(dot, n.Ident)
	case *parse.VariableNode:
		for _, v := range slices.Backward(r.vars) {
			if v.name == n.Ident[0] {
				return fieldOf(v.value, n.Ident[1:])
			}
		}
	case *parse.PipeNode:
		return r.pipe(dot, n)
	case *parse.IdentifierNode:
		return r.call(dot, n.Ident, nil)
	case *parse.StringNode:
		return reflect.ValueOf(n.Text)
	case *parse.NumberNode:
		return reflect.ValueOf(int(n.Int64))
	default:
	}
	bad("%s is not supported", node)
	return reflect.Value{}
}

func (r *rendering) call(dot reflect.Value, name string, args []parse.Node) reflect.Value {
	if name == "and" || name == "or" {
		var v reflect.Value
		for _, a := range args {
			if v = r.value(dot, a); truth(v) == (name == "or") {
				break
			}
		}
		return v
	}
	f, ok := r.funcs[name]
	if !ok {
		f = reflect.ValueOf(builtins[name])
	}
	t := f.Type()
	in := make([]reflect.Value, len(args))
	for i, a := range args {
		in[i] = concrete(r.value(dot, a))
		want := t.In(min(i, t.NumIn()-1))
		if t.IsVariadic() && i >= t.NumIn()-1 {
			want = want.Elem()
		}
		if !in[i].IsValid() || !in[i].Type().AssignableTo(want) {
			bad("argument %d of %s is no %s", i+1, name, want)
		}
	}
	return f.Call(in)[0]
}

// fieldOf follows the names of fields.
func fieldOf(v reflect.Value, names []string) reflect.Value {
	for _, name := range names {
		v = concrete(v)
		if v.Kind() == reflect.Pointer {
			v = v.Elem()
		}
		if v.Kind() != reflect.Struct {
			bad("nothing has no %s", name)
		}
		f := v.FieldByName(name)
		if !f.IsValid() || !f.CanInterface() {
			bad("%s has no %s", v.Type(), name)
		}
		v = f
	}
	return v
}

// concrete is what is in an interface.
func concrete(v reflect.Value) reflect.Value {
	if v.Kind() == reflect.Interface {
		return v.Elem()
	}
	return v
}

func plain(v reflect.Value) any {
	if v = concrete(v); v.IsValid() {
		return v.Interface()
	}
	return ""
}

// truth is as in html/template: what is empty is false, a struct never is.
func truth(v reflect.Value) bool {
	switch v = concrete(v); v.Kind() {
	case reflect.Invalid:
		return false
	case reflect.Slice, reflect.Map, reflect.String:
		return v.Len() > 0
	case reflect.Struct:
		return true
	default:
		return !v.IsZero()
	}
}
