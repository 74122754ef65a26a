package identity

import (
	"strings"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// What expressions may do with texts are functions of CEL's strings extension, version 2,
// and no others of it: the extension formats numbers for each language of the world, a
// fortieth of the agent. TestTextFunctions holds them against the extension's own.
// Positions are counted in code points.

// textFunctions declares them.
func textFunctions() []cel.EnvOption {
	text, number, texts := cel.StringType, cel.IntType, cel.ListType(cel.StringType)
	of := func(args ...*cel.Type) []*cel.Type { return args }
	three := func(f func(s string, a, b ref.Val) ref.Val) cel.OverloadOpt {
		return cel.FunctionBinding(func(args ...ref.Val) ref.Val { return f(asText(args[0]), args[1], args[2]) })
	}
	return []cel.EnvOption{
		cel.Function("charAt", cel.MemberOverload("string_char_at_int", of(text, number), text,
			cel.BinaryBinding(func(s, at ref.Val) ref.Val { return charAt(asText(s), asNumber(at)) }))),
		cel.Function("indexOf",
			cel.MemberOverload("string_index_of_string", of(text, text), number,
				cel.BinaryBinding(func(s, part ref.Val) ref.Val { return indexOf(asText(s), asText(part), 0) })),
			cel.MemberOverload("string_index_of_string_int", of(text, text, number), number,
				three(func(s string, part, from ref.Val) ref.Val { return indexOf(s, asText(part), asNumber(from)) }))),
		cel.Function("lastIndexOf",
			cel.MemberOverload("string_last_index_of_string", of(text, text), number,
				cel.BinaryBinding(func(s, part ref.Val) ref.Val { return lastIndexOf(asText(s), asText(part), nil) })),
			cel.MemberOverload("string_last_index_of_string_int", of(text, text, number), number,
				three(func(s string, part, from ref.Val) ref.Val {
					last := asNumber(from)
					return lastIndexOf(s, asText(part), &last)
				}))),
		cel.Function("join",
			cel.MemberOverload("list_join", of(texts), text,
				cel.UnaryBinding(func(all ref.Val) ref.Val { return join(all, "") })),
			cel.MemberOverload("list_join_string", of(texts, text), text,
				cel.BinaryBinding(func(all, between ref.Val) ref.Val { return join(all, asText(between)) }))),
		cel.Function("lowerAscii", cel.MemberOverload("string_lower_ascii", of(text), text,
			cel.UnaryBinding(func(s ref.Val) ref.Val { return changeASCII(asText(s), 'A', 'Z', 'a'-'A') }))),
		cel.Function("upperAscii", cel.MemberOverload("string_upper_ascii", of(text), text,
			cel.UnaryBinding(func(s ref.Val) ref.Val { return changeASCII(asText(s), 'a', 'z', 'A'-'a') }))),
		cel.Function("replace",
			cel.MemberOverload("string_replace_string_string", of(text, text, text), text,
				three(func(s string, before, after ref.Val) ref.Val {
					return types.String(strings.ReplaceAll(s, asText(before), asText(after)))
				})),
			cel.MemberOverload("string_replace_string_string_int", of(text, text, text, number), text,
				cel.FunctionBinding(func(args ...ref.Val) ref.Val {
					return types.String(strings.Replace(asText(args[0]), asText(args[1]), asText(args[2]), int(asNumber(args[3]))))
				}))),
		cel.Function("split",
			cel.MemberOverload("string_split_string", of(text, text), texts,
				cel.BinaryBinding(func(s, at ref.Val) ref.Val { return split(asText(s), asText(at), -1) })),
			cel.MemberOverload("string_split_string_int", of(text, text, number), texts,
				three(func(s string, at, most ref.Val) ref.Val { return split(s, asText(at), asNumber(most)) }))),
		cel.Function("substring",
			cel.MemberOverload("string_substring_int", of(text, number), text,
				cel.BinaryBinding(func(s, from ref.Val) ref.Val {
					return substring(asText(s), asNumber(from), int64(utf8.RuneCountInString(asText(s))))
				})),
			cel.MemberOverload("string_substring_int_int", of(text, number, number), text,
				three(func(s string, from, to ref.Val) ref.Val { return substring(s, asNumber(from), asNumber(to)) }))),
		cel.Function("trim", cel.MemberOverload("string_trim", of(text), text,
			cel.UnaryBinding(func(s ref.Val) ref.Val { return types.String(strings.TrimSpace(asText(s))) }))),
	}
}

// asText and asNumber return what CEL has checked to be one, by the declaration.
func asText(v ref.Val) string {
	s, _ := v.(types.String)
	return string(s)
}

func asNumber(v ref.Val) int64 {
	n, _ := v.(types.Int)
	return int64(n)
}

// outside is the error of a position that a text does not have.
func outside(at int64) ref.Val { return types.NewErr("index out of range: %d", at) }

// charAt returns one code point, and nothing at the end.
func charAt(s string, at int64) ref.Val {
	points := []rune(s)
	switch {
	case at < 0 || at > int64(len(points)):
		return outside(at)
	case at == int64(len(points)):
		return types.String("")
	default:
		return types.String(points[at])
	}
}

// indexOf returns where part begins first, from a position on, or -1.
func indexOf(s, part string, from int64) ref.Val {
	points := []rune(s)
	switch n := int64(len(points)); {
	case from < 0:
		return outside(from)
	case part == "":
		return types.Int(min(from, n))
	case from >= n:
		return types.Int(-1)
	}
	before, _, found := strings.Cut(string(points[from:]), part)
	if !found {
		return types.Int(-1)
	}
	return types.Int(from + int64(utf8.RuneCountInString(before)))
}

// lastIndexOf returns where part begins last, at the latest at the position last if that
// is given, or -1.
func lastIndexOf(s, part string, last *int64) ref.Val {
	points := []rune(s)
	n := int64(len(points))
	from := n
	if last != nil {
		from = *last
		switch {
		case from < 0:
			return outside(from)
		case from >= n && part != "":
			return types.Int(-1)
		}
	}
	if part == "" {
		return types.Int(min(from, n))
	}
	before := string(points[:min(n, from+int64(utf8.RuneCountInString(part)))])
	at := strings.LastIndex(before, part)
	if at < 0 {
		return types.Int(-1)
	}
	return types.Int(utf8.RuneCountInString(before[:at]))
}

// join returns the texts of a list with another between them.
func join(all ref.Val, between string) ref.Val {
	var parts []string
	list, _ := all.(traits.Lister)
	for i := list.Iterator(); i.HasNext() == types.True; {
		v := i.Next()
		s, ok := v.(types.String)
		if !ok {
			return types.NewErr("join: invalid input: %v", v)
		}
		parts = append(parts, string(s))
	}
	return types.String(strings.Join(parts, between))
}

// changeASCII moves the letters of a range, and leaves all others alone.
func changeASCII(s string, first, last, by rune) ref.Val {
	return types.String(strings.Map(func(r rune) rune {
		if first <= r && r <= last {
			return r + by
		}
		return r
	}, s))
}

func split(s, at string, most int64) ref.Val {
	return types.NewStringList(types.DefaultTypeAdapter, strings.SplitN(s, at, int(most)))
}

// substring returns the code points from a position to another, which is not included.
func substring(s string, from, to int64) ref.Val {
	points := []rune(s)
	for _, at := range []int64{from, to} {
		if at < 0 || at > int64(len(points)) {
			return outside(at)
		}
	}
	if from > to {
		return types.NewErr("invalid substring range. start: %d, end: %d", from, to)
	}
	return types.String(points[from:to])
}
