package identity

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"cel.dev/cel-go/common/types"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// Hard bounds for the ttl of an entry. A ttl of 0 means the CA's default.
const (
	MaxTTL = 24 * time.Hour
	MinTTL = 10 * time.Second
)

const (
	maxEntryName = 128  // bytes
	maxHint      = 1024 // bytes; SPIFFE Workload API §8: should not be longer
	maxDNSNames  = 32
)

// FieldError is one mistake in an entry.
type FieldError struct {
	// Field is the field's name as an operator writes it, such as "workloads"
	// or "dns_names[1]".
	Field string
	// Line and Column are the place inside the field's text, 1-based and in
	// characters; 0 if the mistake is not at one place.
	Line, Column int
	// Message says what is wrong, Hint how to set it right; Hint may be "".
	Message, Hint string
}

// String returns the mistake on one line.
func (e FieldError) String() string {
	var b strings.Builder
	b.WriteString(e.Field)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
	}
	b.WriteString(": " + e.Message)
	if e.Hint != "" {
		b.WriteString("; " + e.Hint)
	}
	return b.String()
}

// EntryError is what Compile returns: all that is wrong with one entry.
type EntryError struct {
	// Entry is the entry's name, which may itself be what is wrong.
	Entry string
	// Fields has at least one element.
	Fields []FieldError
}

func (e *EntryError) Error() string {
	lines := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		lines[i] = f.String()
	}
	return fmt.Sprintf("entry %s: %s", quoteShort(e.Entry), strings.Join(lines, "\n\t"))
}

// Entry is a registration entry whose rules and templates are compiled. It is
// immutable and may be used concurrently.
type Entry struct {
	name   string
	proto  *entryv1.Entry
	digest [32]byte

	nodes     *expr // nil: every node
	workloads *expr

	id       *template
	idText   string      // literal text before the first expression
	staticID spiffeid.ID // zero if the template has expressions
	dns      []*template
}

// Name returns the entry's unique name.
func (e *Entry) Name() string { return e.name }

// Revision returns the revision that last changed the entry.
func (e *Entry) Revision() uint64 { return e.proto.GetRevision() }

// Digest returns the SHA-256 of the entry's canonical form: entries with equal
// digests say the same, whatever their revision.
//
// The canonical form is the text "meshid entry v1", a zero byte, and then, in
// this order: name, spiffe_id, nodes, workloads; ttl in nanoseconds; the number
// of dns_names and each of them; hint; admin, accept_weak. A text is its length
// in bytes and its bytes, a number is 8 bytes (big-endian), a condition is the
// number 0 or 1. At the end of an entry with downstream: true stands the text
// "downstream". Nothing is normalized: a rule with another spacing is another
// entry.
func (e *Entry) Digest() [32]byte { return e.digest }

// DigestOf returns the digest that an entry has, or would have if it compiled.
func DigestOf(p *entryv1.Entry) [32]byte { return digest(p) }

// Admin reports whether who holds this identity may use the admin API.
func (e *Entry) Admin() bool { return e.proto.GetAdmin() }

// Downstream reports whether who holds this identity is a CA below this one.
func (e *Entry) Downstream() bool { return e.proto.GetDownstream() }

// TTL returns the life of an X.509-SVID, 0 for the CA's default.
func (e *Entry) TTL() time.Duration { return e.proto.GetTtl().AsDuration() }

// Proto returns the entry as it was applied. It must not be modified.
func (e *Entry) Proto() *entryv1.Entry { return e.proto }

// StaticID returns the entry's SPIFFE ID if it depends on no facts, and whether
// that is so.
func (e *Entry) StaticID() (spiffeid.ID, bool) { return e.staticID, !e.staticID.IsZero() }

// Compile checks an entry completely and compiles it for a trust domain. The
// error is an *EntryError with all mistakes. p is copied.
func Compile(td spiffeid.TrustDomain, p *entryv1.Entry) (*Entry, error) {
	if p == nil {
		return nil, &EntryError{Fields: []FieldError{{Field: "name", Message: "there is no entry"}}}
	}
	c := &entryCompiler{td: td, entry: &Entry{name: p.GetName(), proto: proto.CloneOf(p)}}
	c.name()
	c.spiffeID()
	c.rules()
	c.rest()
	if len(c.bad) > 0 {
		return nil, &EntryError{Entry: p.GetName(), Fields: c.bad}
	}
	e := c.entry
	e.digest = digest(e.proto)
	return e, nil
}

type entryCompiler struct {
	td    spiffeid.TrustDomain
	entry *Entry
	bad   []FieldError
}

func (c *entryCompiler) fail(field, message, hint string) {
	c.bad = append(c.bad, FieldError{Field: field, Message: message, Hint: hint})
}

func (c *entryCompiler) name() {
	const legal = `a name has 1 to 128 characters of a-z, 0-9, "-", ".", "/" and "_" and begins with a letter or digit`
	name := c.entry.proto.GetName()
	switch {
	case name == "":
		c.fail("name", "it is missing", legal)
	case len(name) > maxEntryName:
		c.fail("name", fmt.Sprintf("it has %d bytes", len(name)), legal)
	case !isLower(name[0]) && !isDigit(name[0]):
		c.fail("name", "it begins with "+quoteByte(name, 0), legal)
		return
	}
	for i := range len(name) {
		if b := name[i]; !isLower(b) && !isDigit(b) && !strings.ContainsRune("-./_", rune(b)) {
			c.fail("name", "it has "+quoteByte(name, i), legal)
			return
		}
	}
}

func (c *entryCompiler) spiffeID() {
	const field = "spiffe_id"
	e := c.entry
	text := e.proto.GetSpiffeId()
	example := "write it as spiffe://" + c.td.Name() + `/ns/{docker.labels["ns"]}/app/{docker.labels["app"]}`
	if text == "" {
		c.fail(field, "it is missing", example)
		return
	}
	t, bad := compileTemplate(field, text)
	if bad != nil {
		c.bad = append(c.bad, bad...)
		return
	}
	e.id = t
	prefix, static := t.prefix()
	e.idText = prefix
	if static {
		c.staticID(prefix, example)
		return
	}
	if e.proto.GetAdmin() {
		c.fail(field, "an entry with admin: true must spell its SPIFFE ID out", "write one entry for each administrator")
	}
	if e.proto.GetDownstream() {
		c.fail(field, "an entry with downstream: true must spell its SPIFFE ID out", "write one entry for each CA")
	}
	// The trust domain is never made from facts, so that equality is certain.
	own := scheme + c.td.Name() + "/"
	rest, ok := strings.CutPrefix(prefix, own)
	if !ok {
		c.fail(field, fmt.Sprintf("it must begin with %q, without expressions in it", own), "entries are for the CA's own trust domain only")
		return
	}
	// The literal parts are checked with a value in place of each expression.
	if err := checkID(t.sample()); err != nil {
		c.fail(field, err.Error(), `with "x" for each expression it is `+quoteShort(t.sample()))
		return
	}
	if strings.HasPrefix("/"+rest, ReservedPath) {
		c.fail(field, "the path "+ReservedPath+" is reserved for the system's own identities", "choose another first segment")
	}
}

func (c *entryCompiler) staticID(text, example string) {
	const field = "spiffe_id"
	id, err := ParseID(text)
	switch {
	case err != nil:
		c.fail(field, err.Error(), example)
	case id.TrustDomain() != c.td:
		c.fail(field, fmt.Sprintf("its trust domain is %q and this CA's is %q", id.TrustDomain().Name(), c.td.Name()), "entries are for the CA's own trust domain only")
	case id.Path() == "":
		c.fail(field, "it has no path", example)
	case Reserved(id.Path()):
		c.fail(field, "the path "+ReservedPath+" is reserved for the system's own identities", "choose another first segment")
	default:
		c.entry.staticID = id
	}
}

func (c *entryCompiler) rules() {
	e := c.entry
	if source := e.proto.GetNodes(); strings.TrimSpace(source) != "" {
		e.nodes = c.rule("nodes", scopeNode, source)
	}
	source := e.proto.GetWorkloads()
	if strings.TrimSpace(source) == "" {
		c.fail("workloads", "it is missing", `say which processes have this identity, as in docker.image.startsWith("registry.example/team/")`)
		return
	}
	if e.workloads = c.rule("workloads", scopeWorkload, source); e.workloads == nil {
		return
	}
	if e.proto.GetAcceptWeak() {
		if e.proto.GetAdmin() {
			c.fail("accept_weak", "an entry with admin: true cannot accept a weak rule", "pin the workload down")
		}
		if e.proto.GetDownstream() {
			c.fail("accept_weak", "an entry with downstream: true cannot accept a weak rule", "pin the CA down")
		}
		return
	}
	if e.workloads.weak != "" && (e.id == nil || !e.id.pinned()) {
		c.fail("workloads", e.workloads.weak, weakHint)
	}
}

func (c *entryCompiler) rule(field string, sc scope, source string) *expr {
	if !utf8.ValidString(source) {
		c.fail(field, "it is not valid UTF-8", "")
		return nil
	}
	x, bad := compileExpr(sc, source, types.BoolType, position{1, 1})
	for _, b := range bad {
		b.Field = field
		c.bad = append(c.bad, b)
	}
	return x
}

func (c *entryCompiler) rest() {
	e := c.entry
	if ttl := e.proto.GetTtl(); ttl != nil {
		d := ttl.AsDuration()
		switch {
		case ttl.CheckValid() != nil || d < 0:
			c.fail("ttl", "it is not a duration", "write it as 1h or 30m")
		case d != 0 && (d < MinTTL || d > MaxTTL):
			c.fail("ttl", fmt.Sprintf("it is %s and must be between %s and %s", d, MinTTL, MaxTTL), "leave it out for the CA's default")
		case d%time.Second != 0:
			c.fail("ttl", fmt.Sprintf("it is %s and must be whole seconds", d), "certificates know no fractions of a second")
		}
	}
	hint := e.proto.GetHint()
	switch {
	case len(hint) > maxHint:
		c.fail("hint", fmt.Sprintf("it has %d bytes, at most %d are allowed", len(hint), maxHint), "")
	case !utf8.ValidString(hint) || strings.ContainsFunc(hint, unicode.IsControl):
		c.fail("hint", "it has a character that cannot be printed", "")
	}
	names := e.proto.GetDnsNames()
	if len(names) > maxDNSNames {
		c.fail("dns_names", fmt.Sprintf("there are %d, at most %d are allowed", len(names), maxDNSNames), "")
		return
	}
	for i, text := range names {
		c.dnsName(fmt.Sprintf("dns_names[%d]", i), text, slices.Contains(names[:i], text))
	}
}

func (c *entryCompiler) dnsName(field, text string, again bool) {
	if again {
		c.fail(field, "the same name is there twice", "leave one of them out")
		return
	}
	t, bad := compileTemplate(field, text)
	if bad != nil {
		c.bad = append(c.bad, bad...)
		return
	}
	if err := ValidateDNSName(t.sample()); err != nil {
		c.fail(field, err.Error(), "")
		return
	}
	c.entry.dns = append(c.entry.dns, t)
}

func digest(p *entryv1.Entry) [32]byte {
	form := append(make([]byte, 0, 512), "meshid entry v1\x00"...)
	number := func(n uint64) { form = binary.BigEndian.AppendUint64(form, n) }
	text := func(s string) {
		number(uint64(len(s)))
		form = append(form, s...)
	}
	condition := func(b bool) {
		if b {
			number(1)
		} else {
			number(0)
		}
	}
	text(p.GetName())
	text(p.GetSpiffeId())
	text(p.GetNodes())
	text(p.GetWorkloads())
	number(uint64(p.GetTtl().AsDuration())) //nolint:gosec // a ttl is never negative once compiled
	number(uint64(len(p.GetDnsNames())))
	for _, name := range p.GetDnsNames() {
		text(name)
	}
	text(p.GetHint())
	condition(p.GetAdmin())
	condition(p.GetAcceptWeak())
	if p.GetDownstream() { // only then: older entries keep their digests
		text("downstream")
	}
	return sha256.Sum256(form)
}

// Uses reports whether a rule or a template of the entry names facts of a kind, such
// as "k8s".
func (e *Entry) Uses(kind string) bool {
	uses := func(x *expr) bool { return x != nil && slices.Contains(x.uses, kind) }
	if uses(e.nodes) || uses(e.workloads) {
		return true
	}
	for _, t := range append([]*template{e.id}, e.dns...) {
		if t != nil && slices.ContainsFunc(t.parts, func(p part) bool { return uses(p.expr) }) {
			return true
		}
	}
	return false
}

// MatchNode reports whether the entry is for the node.
func (e *Entry) MatchNode(f *Facts) bool {
	if f == nil || f.node == nil {
		return false
	}
	return e.nodes == nil || e.nodes.holds(f)
}

// MatchWorkload reports whether the workload's rule is true of the process. It
// does not ask about the node.
func (e *Entry) MatchWorkload(f *Facts) bool {
	return f != nil && f.workload != nil && e.workloads.holds(f)
}

// Identity is what an entry gives to a workload.
type Identity struct {
	ID       spiffeid.ID
	DNSNames []string
	// TTL is the life of the X.509-SVID, 0 for the CA's default.
	TTL   time.Duration
	Hint  string
	Entry *Entry
}

// Render returns the identity for these facts, or an error if a template gives
// no legal name: then nothing may be issued. It does not evaluate the rules. The
// caller owns the result.
func (e *Entry) Render(f *Facts) (*Identity, error) {
	id, err := e.render(f)
	if err != nil {
		return nil, fmt.Errorf("render entry %s: %w", e.Name(), err)
	}
	return id, nil
}

func (e *Entry) render(f *Facts) (*Identity, *renderError) {
	if f == nil || f.workload == nil {
		return nil, &renderError{field: "workloads", why: errNoWorkload}
	}
	id := &Identity{ID: e.staticID, TTL: e.TTL(), Hint: e.proto.GetHint(), Entry: e}
	if e.staticID.IsZero() {
		var err *renderError
		if id.ID, err = e.renderID(f); err != nil {
			return nil, err
		}
	}
	if len(e.dns) == 0 {
		return id, nil
	}
	id.DNSNames = make([]string, 0, len(e.dns))
	var stack [maxDNSName]byte
	for _, t := range e.dns {
		buf, err := t.render(f, stack[:0], maxDNSName, checkLabels)
		if err != nil {
			return nil, err
		}
		name := string(buf)
		if err := ValidateDNSName(name); err != nil {
			return nil, &renderError{field: t.field, why: err}
		}
		if !slices.Contains(id.DNSNames, name) {
			id.DNSNames = append(id.DNSNames, name)
		}
	}
	return id, nil
}

func (e *Entry) renderID(f *Facts) (spiffeid.ID, *renderError) {
	var stack [256]byte
	buf, rerr := e.id.render(f, stack[:0], maxID, checkSegment)
	if rerr != nil {
		return spiffeid.ID{}, rerr
	}
	id, err := ParseID(string(buf))
	switch {
	case err != nil:
		return spiffeid.ID{}, &renderError{field: e.id.field, why: err}
	case Reserved(id.Path()):
		return spiffeid.ID{}, &renderError{field: e.id.field, why: errors.New("the path " + ReservedPath + " is reserved for the system's own identities")}
	case !strings.HasPrefix(id.String(), e.idText):
		return spiffeid.ID{}, &renderError{field: e.id.field, why: errors.New("it does not begin as its template does")}
	}
	return id, nil
}
