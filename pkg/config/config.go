// Package config reads one strict YAML file: an unknown key, a key given twice,
// a value of the wrong type or an alias is an error that names file, line,
// column and what to write instead. It answers "what did the operator write,
// and where". It does not know what the settings mean: each program and each
// plug-in declares its own struct, and a plug-in's part is kept as a Section
// until the plug-in is known.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// MaxBytes is the size of the largest file that is read.
const MaxBytes = 8 << 20

// maxDepth bounds how deeply a file may be nested, maxDocuments how many
// documents it may hold: the parser's time grows with the square of that.
const (
	maxDepth     = 64
	maxDocuments = 10_000
)

// Error is a mistake in a file. Line and Column are 1-based; 0 if the mistake
// is that something is missing from the file as a whole.
type Error struct {
	File         string
	Line, Column int
	// Field is the path of the setting, such as "ca.address"; may be empty.
	Field   string
	Message string
}

// Error returns "file:line:column: field: message".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
	}
	b.WriteString(": ")
	if e.Field != "" {
		b.WriteString(e.Field)
		b.WriteString(": ")
	}
	b.WriteString(e.Message)
	return b.String()
}

// File is a parsed file.
type File struct {
	name string
	body ast.Node // nil for an empty file
}

// Read reads and parses the file at path.
func Read(path string) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read from
	data, err := io.ReadAll(io.LimitReader(f, MaxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, data)
}

// Parse parses data; name stands for the file in errors. The file must hold one
// document; an empty one is like a mapping without keys.
func Parse(name string, data []byte) (*File, error) {
	documents, err := ParseAll(name, data)
	if err != nil {
		return nil, err
	}
	switch len(documents) {
	case 0:
		return &File{name: name}, nil
	case 1:
		return documents[0], nil
	default:
		line, column := documents[1].Position("")
		return nil, &Error{File: name, Line: line, Column: column, Message: "a second YAML document starts here; write one document only"}
	}
}

// ParseAll parses data into its documents, without those that are empty.
func ParseAll(name string, data []byte) ([]*File, error) {
	if len(data) > MaxBytes {
		return nil, &Error{File: name, Message: fmt.Sprintf("larger than %d bytes", MaxBytes)}
	}
	if err := shallow(name, data); err != nil {
		return nil, err
	}
	parsed, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, wrap(name, err)
	}
	var files []*File
	for _, d := range parsed.Docs {
		if d.Body == nil || d.Body.Type() == ast.NullType || d.Body.Type() == ast.CommentType {
			continue
		}
		v := &checker{file: name}
		ast.Walk(v, d.Body)
		if v.err != nil {
			return nil, v.err
		}
		files = append(files, &File{name: name, body: d.Body})
	}
	return files, nil
}

// shallow refuses, before it is parsed, what is nested too deeply, since the
// parser recurses, and what is cut into too many documents.
func shallow(name string, data []byte) error {
	depth, documents := 0, 0
	for i, line := range bytes.Split(data, []byte("\n")) {
		if bytes.HasPrefix(line, []byte("---")) {
			if documents++; documents > maxDocuments {
				return &Error{File: name, Line: i + 1, Column: 1, Message: fmt.Sprintf("more than %d documents; write lists, or several files", maxDocuments)}
			}
		}
		indent := len(line) - len(bytes.TrimLeft(line, " -?:\t"))
		for _, c := range line {
			switch c {
			case '[', '{':
				depth++
			case ']', '}':
				depth = max(0, depth-1)
			}
		}
		if indent > 2*maxDepth || depth > maxDepth {
			return &Error{File: name, Line: i + 1, Column: 1, Message: fmt.Sprintf("nested more than %d deep", maxDepth)}
		}
	}
	return nil
}

// checker refuses what a configuration does not need: anchors, aliases, merge
// keys and tags can make a small file large or say one thing in two places.
type checker struct {
	file string
	err  *Error
}

// Visit implements ast.Visitor.
func (c *checker) Visit(n ast.Node) ast.Visitor {
	if c.err != nil {
		return nil
	}
	var what string
	switch n.Type() {
	case ast.AnchorType:
		what = "anchors (&name)"
	case ast.AliasType:
		what = "aliases (*name)"
	case ast.MergeKeyType:
		what = "merge keys (<<)"
	case ast.TagType:
		what = "tags (!name)"
	default:
		return c
	}
	p := n.GetToken().Position
	c.err = &Error{File: c.file, Line: p.Line, Column: p.Column, Message: what + " are not supported; write the value out, or quote it if it is a string"}
	return nil
}

// Name returns the file's name.
func (f *File) Name() string { return f.name }

// Decode decodes the file into a pointer to a struct with `yaml` tags. Fields
// of type Section keep their part undecoded.
func (f *File) Decode(into any) error {
	if f.body == nil {
		return nil
	}
	return decode(f.name, f.body, into)
}

// List returns the elements of a file that is a sequence; a file that is a
// mapping is a list of itself.
func (f *File) List() []*File {
	seq, ok := f.body.(*ast.SequenceNode)
	if !ok {
		return []*File{f}
	}
	list := make([]*File, 0, len(seq.Values))
	for _, v := range seq.Values {
		list = append(list, &File{name: f.name, body: v})
	}
	return list
}

// Position returns where the setting with the path, such as "ca.address" or
// "dns_names[0]", stands: its value if there is one, else its nearest parent.
func (f *File) Position(path string) (line, column int) {
	if f.body == nil {
		return 0, 0
	}
	node := locate(f.body, path)
	p := node.GetToken().Position
	if m, ok := node.(*ast.MappingNode); ok && len(m.Values) > 0 {
		p = m.Values[0].Key.GetToken().Position
	}
	return p.Line, p.Column
}

// Within returns the position in the file of a position inside the string value
// at path. In a block scalar or a string that is written with escapes, it is
// the position of the value itself.
func (f *File) Within(path string, line, column int) (fileLine, fileColumn int) {
	fileLine, fileColumn = f.Position(path)
	if f.body == nil || line != 1 || column < 1 {
		return fileLine, fileColumn
	}
	s, ok := locate(f.body, path).(*ast.StringNode)
	if !ok {
		return fileLine, fileColumn
	}
	switch s.Token.Type {
	case token.SingleQuoteType, token.DoubleQuoteType:
		return fileLine, fileColumn + column
	case token.StringType:
		return fileLine, fileColumn + column - 1
	default:
		return fileLine, fileColumn
	}
}

// Errorf returns an *Error for the setting at path.
func (f *File) Errorf(path, format string, args ...any) error {
	line, column := f.Position(path)
	return &Error{File: f.name, Line: line, Column: column, Field: path, Message: fmt.Sprintf(format, args...)}
}

// Duration is a length of time, written as 30s, 15m or 1h30m. The zero value is one
// that is not set, and cannot be written: 0s would not mean what it says.
type Duration time.Duration

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (d *Duration) UnmarshalYAML(node ast.Node) error {
	message := "write a duration such as 30s, 15m or 1h"
	if s, ok := node.(*ast.StringNode); ok {
		switch v, err := time.ParseDuration(s.Value); {
		case err == nil && v != 0:
			*d = Duration(v)
			return nil
		case err == nil:
			message += "; without this key, it is the default"
		}
	}
	p := node.GetToken().Position
	return &Error{Line: p.Line, Column: p.Column, Message: message}
}

// MarshalYAML implements yaml.BytesMarshaler: it writes what UnmarshalYAML reads, and
// 0s for what is not set.
func (d Duration) MarshalYAML() ([]byte, error) {
	return []byte(time.Duration(d).String()), nil
}

// Or returns the duration, or otherwise where it is not set.
func (d Duration) Or(otherwise time.Duration) time.Duration {
	if d == 0 {
		return otherwise
	}
	return time.Duration(d)
}

// Section is a part of a file that is decoded later, by the plug-in that it is
// for. The zero value is a section that is not in the file.
type Section struct {
	file string
	node ast.Node
}

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (s *Section) UnmarshalYAML(node ast.Node) error {
	s.node = node
	return nil
}

// MarshalYAML implements yaml.BytesMarshaler: a section is written as it was read.
func (s Section) MarshalYAML() ([]byte, error) {
	if s.node == nil {
		return []byte("null"), nil
	}
	return []byte(s.node.String()), nil
}

// Present reports whether the section is in the file.
func (s Section) Present() bool { return s.node != nil }

// Decode decodes the section strictly into a pointer to a struct. A section
// that is not in the file, or is empty, leaves it as it is.
func (s Section) Decode(into any) error {
	if s.node == nil || s.node.Type() == ast.NullType {
		return nil
	}
	return decode(s.file, s.node, into)
}

// Errorf returns an *Error for the setting at path inside the section.
func (s Section) Errorf(path, format string, args ...any) error {
	f := &File{name: s.file, body: s.node}
	return f.Errorf(path, format, args...)
}

func decode(name string, node ast.Node, into any) error {
	var buf bytes.Buffer
	d := yaml.NewDecoder(&buf, yaml.Strict())
	if err := d.DecodeFromNode(node, into); err != nil {
		return explain(wrap(name, err), into)
	}
	setFile(reflect.ValueOf(into), name)
	return nil
}

var sectionType = reflect.TypeFor[Section]()

// setFile gives the sections inside v the file's name.
func setFile(v reflect.Value, name string) {
	switch v.Kind() { //nolint:exhaustive // nothing else can hold a section
	case reflect.Pointer:
		if !v.IsNil() {
			setFile(v.Elem(), name)
		}
	case reflect.Slice:
		for i := range v.Len() {
			setFile(v.Index(i), name)
		}
	case reflect.Struct:
		if v.Type() == sectionType {
			v.Addr().Interface().(*Section).file = name // the type was just compared
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				setFile(v.Field(i), name)
			}
		}
	}
}

// wrap turns an error of the YAML library into an *Error.
func wrap(name string, err error) *Error {
	if own, ok := errors.AsType[*Error](err); ok {
		own.File = name
		return own
	}
	out := &Error{File: name, Message: err.Error()}
	if y, ok := errors.AsType[yaml.Error](err); ok {
		out.Message = y.GetMessage()
		if t := y.GetToken(); t != nil && t.Position != nil {
			out.Line, out.Column = t.Position.Line, t.Position.Column
		}
	}
	return out
}

var (
	unknownField = regexp.MustCompile(`unknown field "([^"]*)"`)
	cannotDecode = regexp.MustCompile(`cannot unmarshal .* into Go (?:struct field \S+|value) of type (\S+)`)
	typeNames    = map[string]string{
		"bool":     "true or false",
		"string":   "a string",
		"int":      "a whole number",
		"int64":    "a whole number",
		"uint32":   "a whole number that is not negative",
		"uint64":   "a whole number that is not negative",
		"float64":  "a number",
		"[]string": "a list of strings",
	}
)

// explain says what to write instead.
func explain(e *Error, into any) *Error {
	if m := unknownField.FindStringSubmatch(e.Message); m != nil {
		e.Message = fmt.Sprintf("unknown key %q", m[1])
		if near := nearest(m[1], keys(reflect.TypeOf(into), 0)); near != "" {
			e.Message += fmt.Sprintf("; did you mean %q?", near)
		}
		return e
	}
	if m := cannotDecode.FindStringSubmatch(e.Message); m != nil {
		want, ok := typeNames[m[1]]
		if !ok {
			want = "a mapping with keys of its own"
		}
		e.Message = "write " + want
		return e
	}
	return e
}

// keys returns the keys of all structs below t.
func keys(t reflect.Type, depth int) []string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || t == sectionType || depth > 8 {
		return nil
	}
	var all []string
	for f := range t.Fields() {
		if name, _, _ := strings.Cut(f.Tag.Get("yaml"), ","); name != "" && name != "-" {
			all = append(all, name)
		}
		all = append(all, keys(f.Type, depth+1)...)
	}
	return all
}

// nearest returns the candidate that word is most likely a misspelling of, or "".
func nearest(word string, candidates []string) string {
	best, distance := "", len(word)/2+1
	slices.Sort(candidates)
	for _, c := range candidates {
		if d := editDistance(word, c); d < distance {
			best, distance = c, d
		}
	}
	return best
}

func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// locate finds the node at path, or its nearest parent that exists.
func locate(node ast.Node, path string) ast.Node {
	for part := range strings.FieldsFuncSeq(path, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		next := child(node, part)
		if next == nil {
			return node
		}
		node = next
	}
	return node
}

func child(node ast.Node, key string) ast.Node {
	switch n := node.(type) {
	case *ast.MappingNode:
		for _, v := range n.Values {
			if v.Key.String() == key {
				return v.Value
			}
		}
	case *ast.MappingValueNode:
		if n.Key.String() == key {
			return n.Value
		}
	case *ast.SequenceNode:
		for i, v := range n.Values {
			if fmt.Sprint(i) == key {
				return v
			}
		}
	}
	return nil
}
