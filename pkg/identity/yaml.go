package identity

import (
	"fmt"
	"strings"
	"unicode"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// FormatYAML returns the canonical YAML text of an entry: one item of a list, so
// that the texts of several entries in a row are a file that can be applied. Equal
// entries have equal texts; fields that are not set are left out, the revision
// always is.
func FormatYAML(e *entryv1.Entry) string {
	var b strings.Builder
	lead := "- "
	line := func(key, value string) {
		b.WriteString(lead + key + ": " + value + "\n")
		lead = "  "
	}
	text := func(key, value string) {
		if value != "" {
			line(key, yamlString(value, "    "))
		}
	}
	line("name", yamlString(e.GetName(), "    "))
	text("spiffe_id", e.GetSpiffeId())
	text("nodes", e.GetNodes())
	text("workloads", e.GetWorkloads())
	if ttl := e.GetTtl().AsDuration(); ttl != 0 {
		line("ttl", shortDuration(ttl.String()))
	}
	if names := e.GetDnsNames(); len(names) > 0 {
		b.WriteString(lead + "dns_names:\n")
		for _, name := range names {
			b.WriteString("    - " + yamlString(name, "      ") + "\n")
		}
	}
	text("hint", e.GetHint())
	if e.GetAdmin() {
		line("admin", "true")
	}
	if e.GetDownstream() {
		line("downstream", "true")
	}
	if e.GetAcceptWeak() {
		line("accept_weak", "true")
	}
	return b.String()
}

// shortDuration drops the zero units that time.Duration prints: 1h0m0s is 1h.
func shortDuration(s string) string {
	if short, ok := strings.CutSuffix(s, "m0s"); ok {
		s = short + "m"
	}
	if short, ok := strings.CutSuffix(s, "h0m"); ok {
		s = short + "h"
	}
	return s
}

// yamlString returns a scalar that every YAML parser reads as this string:
// plain where nothing can be misread, a literal block for several lines, else in
// quotes.
func yamlString(s, indent string) string {
	switch {
	case plain(s):
		return s
	case block(s):
		return "|-\n" + indent + strings.ReplaceAll(s, "\n", "\n"+indent)
	case printable(s):
		return "'" + strings.ReplaceAll(s, "'", "''") + "'"
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case ordinary(r):
			b.WriteRune(r)
		case r <= 0xFF:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xFFFF:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// plain reports whether s can stand without quotes: it begins with a letter, has
// only characters that mean nothing in YAML, and is no word that means another
// type. A colon is followed by something, as in spiffe://.
func plain(s string) bool {
	if s == "" || !isLower(s[0]) && !isUpper(s[0]) {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case isLower(c), isUpper(c), isDigit(c), c == '-', c == '.', c == '_', c == '/':
		case c == ':' && i+1 < len(s) && s[i+1] == '/':
		default:
			return false
		}
	}
	switch strings.ToLower(s) {
	case "true", "false", "yes", "no", "on", "off", "null", "y", "n":
		return false
	}
	return true
}

// block reports whether s can be a literal block: several lines, none of which
// is empty at the edges or begins or ends with space where it would be lost.
func block(s string) bool {
	if !strings.Contains(s, "\n") || strings.HasPrefix(s, " ") {
		return false
	}
	lines := strings.Split(s, "\n")
	if lines[0] == "" || lines[len(lines)-1] == "" {
		return false
	}
	for _, line := range lines {
		if !printable(line) || strings.HasSuffix(line, " ") {
			return false
		}
	}
	return true
}

func printable(s string) bool {
	for _, r := range s {
		if !ordinary(r) {
			return false
		}
	}
	return true
}

// ordinary reports whether a character can stand for itself.
func ordinary(r rune) bool {
	return r == ' ' || r != unicode.ReplacementChar && r != '\uFEFF' && unicode.IsPrint(r)
}
