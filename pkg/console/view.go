package console

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/meshid/meshid/internal/cli"
)

//go:embed templates/*.html
var templateFiles embed.FS

//go:embed assets/style.css assets/live.js assets/icon.svg
var assetFiles embed.FS

// assetTypes are the files that browsers may load.
var assetTypes = map[string]string{
	"style.css": "text/css; charset=utf-8", "live.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml",
}

// maxText is how many characters of one text are shown: tenants choose labels, and
// a page must stay one.
const maxText = 200

// view is one page on its way.
type view struct {
	Title    string
	Template string
	// Live pages renew themselves.
	Live bool
	Body any

	// What follows is filled in for whoever is signed in.
	User, Method     string
	TrustDomain      string
	Instance, Worst  string
	Version          string
	Problems         int
	Now              time.Time
	Unsearchable     string // why there are no figures from the ledger
	RefreshedByHand  string // address of this page
	status           int
	SignedInByCookie bool
}

// pages are the parsed templates, and the files beside them by their names with
// the hash of their content, so that a browser never mixes versions.
type pages struct {
	templates map[string]*template.Template
	assets    map[string]asset
}

type asset struct {
	content []byte
	kind    string
}

func newPages(now func() time.Time) (*pages, error) {
	p := &pages{templates: make(map[string]*template.Template), assets: make(map[string]asset)}
	names := make(map[string]string)
	for file, kind := range assetTypes {
		content, err := assetFiles.ReadFile("assets/" + file)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(content)
		base, ext, _ := strings.Cut(file, ".")
		names[file] = base + "-" + hex.EncodeToString(sum[:6]) + "." + ext
		p.assets[names[file]] = asset{content, kind}
	}
	funcs := template.FuncMap{
		"asset":     func(file string) string { return prefix + "/assets/" + names[file] },
		"text":      text,
		"ago":       func(t time.Time) string { return ago(now(), t) },
		"stamp":     stamp,
		"rfc3339":   func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"duration":  cli.Short,
		"count":     count,
		"search":    searchLink,
		"hex":       func(b []byte) string { return hex.EncodeToString(b) },
		"plural":    plural,
		"printable": lines,
		"pagesOf":   func() []pageLink { return pageLinks },
		"states":    func() []choice { return nodeStates },
		"last":      lastPart,
		"holders": func(role, id string) string {
			return holdersLink(map[bool]string{true: "root", false: "authority"}[role == "root"], id)
		},
	}
	layout, err := template.New("layout.html").Funcs(funcs).ParseFS(templateFiles, "templates/layout.html", "templates/parts.html")
	if err != nil {
		return nil, fmt.Errorf("parse the console's layout: %w", err)
	}
	for _, name := range []string{"login", "overview", "nodes", "identities", "issuance", "authorities", "entries", "holders", "ledger", "record", "problem"} {
		t, err := layout.Clone()
		if err != nil {
			return nil, err
		}
		if p.templates[name], err = t.ParseFS(templateFiles, "templates/"+name+".html"); err != nil {
			return nil, fmt.Errorf("parse the console's page %s: %w", name, err)
		}
	}
	return p, nil
}

// asset serves a file of ours.
func (c *Console) asset(w http.ResponseWriter, r *http.Request) {
	a, ok := c.pages.assets[r.PathValue("name")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	w.Header().Set("Content-Type", a.kind)
	_, _ = w.Write(a.content) // the browser may have gone
}

// errNotFound is the error of a page that is not there.
var errNotFound = errors.New("there is no such page")

// inputError says what is wrong with what was typed.
type inputError struct{ field, message string }

// Error implements error.
func (e *inputError) Error() string { return e.field + ": " + e.message }

// page makes a handler of one page: make fills the view in.
func (c *Console) page(make func(*http.Request, *view) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v := &view{status: http.StatusOK}
		err := c.frame(r, v)
		if err == nil {
			err = make(r, v)
		}
		switch {
		case err == nil:
			c.metrics.requests.WithLabelValues("success").Inc()
		case errors.Is(err, errNotFound):
			v.problem(http.StatusNotFound, "Not found", "There is nothing at this address. "+sentence(err))
			c.metrics.requests.WithLabelValues("refused").Inc()
		default:
			c.metrics.requests.WithLabelValues("error").Inc()
			c.log.WarnContext(r.Context(), "page of the console cannot be made", "page", r.URL.Path, "err", err)
			message := "It cannot be shown now: the CA's log says why."
			if r.Context().Err() != nil || errors.Is(err, errSlow) {
				message = "It took too long. Narrow the search by time, or by another filter."
			}
			v.problem(http.StatusServiceUnavailable, "Not now", message)
		}
		c.render(w, v.status, v)
	}
}

func sentence(err error) string {
	if err == errNotFound { //nolint:errorlint // nothing is added to it
		return ""
	}
	return strings.ToUpper(err.Error()[:1]) + err.Error()[1:] + "."
}

func (v *view) problem(status int, title, message string) {
	v.status, v.Title, v.Template, v.Body, v.Live = status, title, "problem", message, false
}

// render writes a page, or an error if it cannot be made: never half of one.
func (c *Console) render(w http.ResponseWriter, status int, v *view) {
	var b bytes.Buffer
	if err := c.pages.templates[v.Template].Execute(&b, v); err != nil {
		c.log.Error("page of the console cannot be rendered", "page", v.Template, "err", err)
		http.Error(w, "the page cannot be made: the CA's log says why", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // the browser may have gone
}

// text makes s fit to be shown: what a tenant chose cannot turn the direction of
// the page, hide, or fill it. The template escapes it as well.
func text(s string) string {
	s = strings.ToValidUTF8(s, "\ufffd")
	if utf8.RuneCountInString(s) > maxText {
		runes := []rune(s)
		return cli.Printable(string(runes[:maxText])) + fmt.Sprintf("… (%s bytes)", count(uint64(len(s))))
	}
	return cli.Printable(s)
}

// maxLines bounds a text of several lines.
const maxLines = 16 << 10

// lines is text for one that may have several lines.
func lines(s string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.ToValidUTF8(s[:min(len(s), maxLines)], "\ufffd")) {
		b.WriteString(cli.Printable(strings.ReplaceAll(strings.TrimSuffix(line, "\n"), "\t", "    ")) + "\n")
	}
	if len(s) > maxLines {
		b.WriteString("…")
	}
	return b.String()
}

// pageLinks are the pages in the order of the navigation: what is looked at daily
// first.
var pageLinks = []pageLink{
	{"overview", "", "Overview"},
	{"nodes", "nodes", "Nodes"},
	{"identities", "identities", "Identities"},
	{"issuance", "issuance", "Issuance"},
	{"entries", "entries", "Entries"},
	{"authorities", "authorities", "Authorities"},
	{"ledger", "ledger", "Ledger"},
}

type pageLink struct{ Name, Path, Title string }

var nodeStates = []choice{{"", "all"}, {"connected", "connected"}, {"behind", "behind the revision"}, {"away", "away"}, {"withdrawn", "evicted or banned"}}

// stamp is a time with its zone.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

// ago is a time as it is seen from now.
func ago(now, t time.Time) string {
	switch d := now.Sub(t); {
	case t.IsZero():
		return ""
	case d > -time.Second && d < time.Second:
		return "now"
	case d < 0:
		return "in " + cli.Short(-d)
	default:
		return cli.Short(d) + " ago"
	}
}

// count is a number with its thousands apart.
func count(n any) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural is a number and what it counts.
func plural(n any, one string) string {
	if s := fmt.Sprint(n); s != "1" {
		return count(n) + " " + one + "s"
	}
	return "1 " + one
}

// lastPart is the last segment of a SPIFFE ID: what tells nodes apart.
func lastPart(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// searchLink is the address of a search of the ledger: pairs of fields and values.
func searchLink(pairs ...any) string {
	q := make(url.Values)
	for i := 0; i+1 < len(pairs); i += 2 {
		if v := fmt.Sprint(pairs[i+1]); v != "" {
			q.Set(fmt.Sprint(pairs[i]), v)
		}
	}
	return prefix + "/ledger?" + q.Encode()
}

func recordPath(index uint64) string { return prefix + "/ledger/" + strconv.FormatUint(index, 10) }
