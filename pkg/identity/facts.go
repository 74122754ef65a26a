package identity

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// Facts are the attested attributes of one node and of one process on it, in the
// form in which rules are evaluated over them. They are immutable, may be shared
// between goroutines, and are meant to be reused for many entries.
//
// What is not known never helps to match: selecting a field of an absent message
// (docker.image of a process that is in no container), an empty string (an
// executable too large to be hashed), or the kernel's overflow user id is an
// error, and a rule whose value is an error does not match, whichever way round
// it was written. Only has() asks whether something is known.
type Facts struct {
	node     *attributesv1.Node
	workload *attributesv1.Workload
	// vars are the values of schema.vars: typed pointers, nil if absent.
	vars []any
	// oversized is set if a value is beyond the sizes that the cost of an
	// expression was estimated for: its cost is then counted as it runs.
	oversized bool
}

// NewFacts returns the facts of a process on a node. Workload may be nil where
// only nodes are asked about: no workload rule matches then. The messages must
// not be changed afterwards.
func NewFacts(node *attributesv1.Node, workload *attributesv1.Workload) *Facts {
	s := schema()
	f := &Facts{node: node, workload: workload, vars: make([]any, len(s.vars))}
	w := reflect.ValueOf(workload)
	for i := range s.vars {
		switch v := &s.vars[i]; {
		case v.name == varNode:
			f.vars[i] = node
			f.oversized = f.oversized || v.message.oversized(reflect.ValueOf(node))
		case v.name == varExt:
			f.vars[i] = f.extValues()
		case workload == nil:
			f.vars[i] = v.absent
		default:
			field := w.Elem().Field(v.index)
			f.vars[i] = field.Interface()
			f.oversized = f.oversized || v.message.oversized(field)
		}
	}
	return f
}

func (f *Facts) extValues() map[string]any {
	ext := f.workload.GetExt()
	if len(ext) == 0 {
		return nil
	}
	f.oversized = f.oversized || len(ext) > maxElements
	values := make(map[string]any, len(ext))
	for name, v := range ext {
		m := v.GetValues()
		values[name] = m
		f.oversized = f.oversized || len(name) > maxString || oversizedMap(m)
	}
	return values
}

// ResolveName makes Facts an activation of CEL.
func (f *Facts) ResolveName(name string) (any, bool) {
	s := schema()
	for i := range s.vars {
		if s.vars[i].name == name {
			return f.vars[i], true
		}
	}
	return nil, false
}

// Parent makes Facts an activation of CEL.
func (f *Facts) Parent() interpreter.Activation { return nil }

// Variables that are not a message of Workload.
const (
	varNode = "node"
	varExt  = "ext"
)

// Sizes that costs of expressions are estimated for. Larger values are legal.
const (
	maxString   = 4096
	maxElements = 256
)

// overflowID is what the kernel reports for a user or group that has no id in
// the reader's user namespace: it names nobody.
const overflowID = 65534

// factSchema is the typed vocabulary of rules, taken from the messages of
// proto/attributes/v1: a message added to Workload becomes a variable, a field
// added to a message can be selected.
type factSchema struct {
	vars     []variable
	messages map[string]*message // by full name
}

type variable struct {
	name    string
	typ     *types.Type
	message *message // nil for ext
	index   int      // of the field in Workload's Go struct
	absent  any      // typed nil
}

// message is a message type, seen through its Go struct.
type message struct {
	name   string // full name
	fields map[string]*field
	names  []string // in the order of declaration
	list   []*field // the same
}

type field struct {
	typ   *types.Type
	cel   *types.FieldType
	index int
	kind  reflect.Type
	sub   *message // if the field is a message
}

var schema = sync.OnceValue(buildSchema)

func buildSchema() *factSchema {
	s := &factSchema{messages: map[string]*message{}}
	node := s.add(reflect.TypeFor[*attributesv1.Node](), varNode)
	s.vars = append(s.vars, variable{name: varNode, typ: types.NewObjectType(node.name), message: node})
	workload := reflect.TypeFor[attributesv1.Workload]()
	for i := range workload.NumField() {
		name := protoName(workload.Field(i))
		if t := workload.Field(i).Type; name != "" && t.Kind() == reflect.Pointer {
			m := s.add(t, name)
			s.vars = append(s.vars, variable{
				name: name, typ: types.NewObjectType(m.name), message: m, index: i, absent: reflect.Zero(t).Interface(),
			})
		}
	}
	stringMap := types.NewMapType(types.StringType, types.StringType)
	s.vars = append(s.vars, variable{name: varExt, typ: types.NewMapType(types.StringType, stringMap)})
	return s
}

// add adds the message type of a Go struct; path is how rules reach it.
func (s *factSchema) add(pointer reflect.Type, path string) *message {
	t := pointer.Elem()
	m := &message{name: "meshid.attributes.v1." + t.Name(), fields: map[string]*field{}}
	s.messages[m.name] = m
	for i := range t.NumField() {
		name := protoName(t.Field(i))
		if name == "" {
			continue
		}
		f := &field{index: i, kind: t.Field(i).Type}
		switch f.kind {
		case reflect.TypeFor[string]():
			f.typ = types.StringType
		case reflect.TypeFor[int64]():
			f.typ = types.IntType
		case reflect.TypeFor[bool]():
			f.typ = types.BoolType
		case reflect.TypeFor[[]int64]():
			f.typ = types.NewListType(types.IntType)
		case reflect.TypeFor[[]string]():
			f.typ = types.NewListType(types.StringType)
		case reflect.TypeFor[map[string]string]():
			f.typ = types.NewMapType(types.StringType, types.StringType)
		default:
			if f.kind.Kind() != reflect.Pointer {
				continue // not usable in rules
			}
			f.sub = s.add(f.kind, path+"."+name)
			f.typ = types.NewObjectType(f.sub.name)
		}
		f.cel = f.fieldType(path, name)
		m.fields[name] = f
		m.names = append(m.names, name)
		m.list = append(m.list, f)
	}
	return m
}

// protoName returns the name in the .proto file of a generated struct's field.
func protoName(f reflect.StructField) string {
	for part := range strings.SplitSeq(f.Tag.Get("protobuf"), ",") {
		if name, ok := strings.CutPrefix(part, "name="); ok {
			return name
		}
	}
	return ""
}

// fieldType returns how CEL reads the field. This is where default deny begins:
// what is not known is an error.
func (f *field) fieldType(path, name string) *types.FieldType {
	noMessage := errors.New("there is no " + path)
	notKnown := errors.New(path + "." + name + " is not known")
	known, value := f.access(path, name)
	read := func(obj any) (reflect.Value, bool) {
		v := reflect.ValueOf(obj)
		if v.Kind() != reflect.Pointer || v.IsNil() {
			return reflect.Value{}, false
		}
		return v.Elem().Field(f.index), true
	}
	return &types.FieldType{
		Type: f.typ,
		IsSet: func(obj any) bool {
			v, ok := read(obj)
			if !ok || !known(v) {
				return false
			}
			switch f.kind.Kind() {
			case reflect.Map, reflect.Slice:
				return v.Len() > 0
			case reflect.Pointer:
				return !v.IsNil()
			default:
				return true
			}
		},
		GetFrom: func(obj any) (any, error) {
			v, ok := read(obj)
			switch {
			case !ok:
				return nil, noMessage
			case !known(v):
				return nil, notKnown
			}
			return value(v), nil
		},
	}
}

// access returns when the field's value is known, and what it is then. A message
// that is absent fails when its fields are selected.
func (f *field) access(path, name string) (known func(reflect.Value) bool, value func(reflect.Value) any) {
	known = func(reflect.Value) bool { return true }
	value = func(v reflect.Value) any { return v.Interface() }
	switch {
	case f.kind.Kind() == reflect.String:
		known = func(v reflect.Value) bool { return v.Len() > 0 }
		value = func(v reflect.Value) any { return types.String(v.String()) }
	case f.kind.Kind() == reflect.Int64:
		value = func(v reflect.Value) any { return types.Int(v.Int()) }
		if path == "unix" && (name == "uid" || name == "gid") { // 0 is root, and known
			known = func(v reflect.Value) bool { return v.Int() != overflowID }
		}
	case path == "unix" && name == "groups":
		value = knownIDs
	}
	return known, value
}

// knownIDs returns the group ids without the overflow id.
func knownIDs(v reflect.Value) any {
	groups, _ := reflect.TypeAssert[[]int64](v)
	for i, g := range groups {
		if g != overflowID {
			continue
		}
		known := append([]int64(nil), groups[:i]...)
		for _, g := range groups[i+1:] {
			if g != overflowID {
				known = append(known, g)
			}
		}
		return known
	}
	return groups
}

func (m *message) oversized(v reflect.Value) bool {
	if m == nil || v.IsNil() {
		return false
	}
	v = v.Elem()
	for _, f := range m.list {
		if f.oversized(v.Field(f.index)) {
			return true
		}
	}
	return false
}

func (f *field) oversized(v reflect.Value) bool {
	switch f.kind.Kind() {
	case reflect.String:
		return v.Len() > maxString
	case reflect.Slice:
		if v.Len() > maxElements {
			return true
		}
		if list, ok := reflect.TypeAssert[[]string](v); ok {
			return slices.ContainsFunc(list, func(s string) bool { return len(s) > maxString })
		}
	case reflect.Map:
		labels, ok := reflect.TypeAssert[map[string]string](v)
		return ok && oversizedMap(labels)
	case reflect.Pointer:
		return f.sub.oversized(v)
	default:
	}
	return false
}

func oversizedMap(m map[string]string) bool {
	if len(m) > maxElements {
		return true
	}
	for k, v := range m {
		if len(k) > maxString || len(v) > maxString {
			return true
		}
	}
	return false
}

// provider tells CEL of the schema's types.
type provider struct {
	*types.Registry
	schema *factSchema
}

func (p *provider) FindStructType(name string) (*types.Type, bool) {
	if _, ok := p.schema.messages[name]; !ok {
		return nil, false
	}
	return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
}

func (p *provider) FindStructFieldNames(name string) ([]string, bool) {
	m, ok := p.schema.messages[name]
	if !ok {
		return nil, false
	}
	return m.names, true
}

func (p *provider) FindStructFieldType(name, fieldName string) (*types.FieldType, bool) {
	m, ok := p.schema.messages[name]
	if !ok {
		return nil, false
	}
	f, ok := m.fields[fieldName]
	if !ok {
		return nil, false
	}
	return f.cel, true
}

func (p *provider) NewValue(name string, _ map[string]ref.Val) ref.Val {
	return types.NewErr("%s cannot be made in a rule", name)
}

// factRef is a fact that a rule can name: a variable, fields of messages, and
// keys of maps, such as docker.labels["team"].
type factRef struct {
	variable int
	fields   []*field
	keys     []string
	path     string // as a rule writes it, in canonical form
	typ      *types.Type
}

// get returns the fact's value, or an error that says that it is not known.
func (r *factRef) get(f *Facts) (any, error) {
	v := f.vars[r.variable]
	for _, field := range r.fields {
		var err error
		if v, err = field.cel.GetFrom(v); err != nil {
			return nil, err
		}
	}
	for _, key := range r.keys {
		var next any
		var ok bool
		switch m := v.(type) {
		case map[string]string:
			next, ok = m[key]
		case map[string]any:
			next, ok = m[key]
		}
		if !ok {
			return nil, fmt.Errorf("there is no %s", r.path)
		}
		v = next
	}
	return v, nil
}
