package identity

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/common/types"
)

// A template is text with CEL expressions in braces. Templates are rendered in
// one way only: the values are put between the literal parts as they are, after
// they were checked. Nothing is escaped, trimmed, cleaned or joined as a path.
type template struct {
	field string
	parts []part
}

// part is an expression, or literal text if expr is nil.
type part struct {
	literal string
	expr    *expr
}

const (
	maxTemplate      = 8192 // bytes
	maxTemplateExprs = 16
)

// compileTemplate parses a template and compiles its expressions.
func compileTemplate(field, text string) (*template, []FieldError) {
	if len(text) > maxTemplate {
		return nil, []FieldError{{Field: field, Message: fmt.Sprintf("it has %d bytes, at most %d are allowed", len(text), maxTemplate)}}
	}
	if !utf8.ValidString(text) {
		return nil, []FieldError{{Field: field, Message: "it is not valid UTF-8"}}
	}
	t := &template{field: field}
	var bad []FieldError
	fail := func(offset int, message, hint string) {
		p := positionOf(text, offset)
		bad = append(bad, FieldError{Field: field, Line: p.line, Column: p.column, Message: message, Hint: hint})
	}
	exprs := 0
	for i := 0; i < len(text); {
		switch text[i] {
		case '}':
			fail(i, "there is a } without its {", "")
			return nil, bad
		case '{':
			end := closingBrace(text, i)
			if end < 0 {
				fail(i, "there is a { without its }", "")
				return nil, bad
			}
			source := text[i+1 : end]
			switch exprs++; {
			case exprs > maxTemplateExprs:
				fail(i, fmt.Sprintf("it has more than %d expressions", maxTemplateExprs), "")
				return nil, bad
			case strings.TrimSpace(source) == "":
				fail(i, "there is no expression in the braces", `write one, as in {docker.labels["app"]}`)
			default:
				x, errs := compileExpr(scopeWorkload, source, types.StringType, positionOf(text, i+1))
				for _, e := range errs {
					e.Field = field
					bad = append(bad, e)
				}
				t.parts = append(t.parts, part{expr: x})
			}
			i = end + 1
		default:
			end := i
			for end < len(text) && text[end] != '{' && text[end] != '}' {
				end++
			}
			t.parts = append(t.parts, part{literal: text[i:end]})
			i = end
		}
	}
	if len(bad) > 0 {
		return nil, bad
	}
	return t, nil
}

// prefix returns the literal text before the first expression, and whether that
// is all.
func (t *template) prefix() (string, bool) {
	if len(t.parts) == 0 {
		return "", true
	}
	if t.parts[0].expr != nil {
		return "", false
	}
	return t.parts[0].literal, len(t.parts) == 1
}

// sample returns the text with "x" for each expression.
func (t *template) sample() string {
	var b strings.Builder
	for _, p := range t.parts {
		if p.expr != nil {
			b.WriteByte('x')
		}
		b.WriteString(p.literal)
	}
	return b.String()
}

// renderError says why a template gave no name.
type renderError struct {
	field, term string
	why         error
}

func (e *renderError) Error() string {
	if e.term == "" {
		return e.field + ": " + e.why.Error()
	}
	return fmt.Sprintf("%s: {%s}: %s", e.field, e.term, e.why)
}

func (e *renderError) Unwrap() error { return e.why }

// render appends the text for these facts to buf. legal checks each value.
func (t *template) render(f *Facts, buf []byte, limit int, legal func(string) error) ([]byte, *renderError) {
	for i := range t.parts {
		p := &t.parts[i]
		if p.expr == nil {
			buf = append(buf, p.literal...)
			continue
		}
		v, err := p.expr.eval(f)
		if err != nil {
			return nil, &renderError{t.field, p.expr.source, err}
		}
		s, ok := v.(types.String)
		if !ok {
			return nil, &renderError{t.field, p.expr.source, errors.New("its value is not a text")}
		}
		if err := legal(string(s)); err != nil {
			return nil, &renderError{t.field, p.expr.source, fmt.Errorf("the value %s cannot be used: %w", quoteShort(string(s)), err)}
		}
		if len(buf)+len(s) > limit {
			return nil, &renderError{t.field, p.expr.source, fmt.Errorf("the name becomes longer than %d bytes", limit)}
		}
		buf = append(buf, s...)
	}
	return buf, nil
}

// closingBrace returns the offset of the brace that closes the one at open, or
// -1. Braces in string literals and in comments do not count.
func closingBrace(text string, open int) int {
	depth := 0
	for i := open; i < len(text); {
		switch text[i] {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return i
			}
		}
		next := skipToken(text, i)
		if next < 0 {
			return -1
		}
		i = next
	}
	return -1
}

// skipToken returns the offset after the string literal or comment that begins
// at i, or else i+1; -1 if a string literal does not end.
func skipToken(text string, i int) int {
	switch c := text[i]; {
	case c == '/' && strings.HasPrefix(text[i:], "//"):
		if n := strings.IndexByte(text[i:], '\n'); n >= 0 {
			return i + n + 1
		}
		return len(text)
	case c == '"' || c == '\'':
		quote := text[i : i+1]
		if triple := strings.Repeat(quote, 3); strings.HasPrefix(text[i:], triple) {
			quote = triple
		}
		raw := isRaw(text, i)
		for j := i + len(quote); j < len(text); j++ {
			switch {
			case text[j] == '\\' && !raw:
				j++
			case strings.HasPrefix(text[j:], quote):
				return j + len(quote)
			case text[j] == '\n' && len(quote) == 1:
				return -1
			}
		}
		return -1
	default:
		return i + 1
	}
}

// isRaw reports whether the string literal that opens at i has the prefix r.
func isRaw(text string, i int) bool {
	for j := i - 1; j >= 0 && j >= i-2; j-- {
		switch text[j] {
		case 'r', 'R':
			return true
		case 'b', 'B':
		default:
			return false
		}
	}
	return false
}
