package console

import (
	"bytes"
	"html/template"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/html"
)

// TestAsHTMLTemplate renders every page with html/template too, which escapes by
// context. A browser must see the same.
func TestAsHTMLTemplate(t *testing.T) {
	for i, s := range append(hostile, "plain", "") {
		w := &world{text: s, covered: i%2 == 0}
		c := testConsole(t, w)
		for path, page := range map[string]func(*http.Request, *view) error{
			"/console/": c.overview, "/console/nodes?q=" + s[:min(len(s), 3)]: c.nodes, "/console/identities": c.identities, "/console/issuance": c.issuance,
			"/console/authorities": c.authorities, "/console/entries": c.entries, "/console/ledger?since=x": c.ledger, "/console/ledger?event=issue": c.ledger,
			"/console/ledger/7": c.record, "/console/ledger/13": c.record,
		} {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
			r.URL.RawQuery = strings.SplitN(path+"?", "?", 3)[1]
			r.SetPathValue("record", path[strings.LastIndex(path, "/")+1:])
			v := &view{User: s, SignedInByCookie: true}
			if err := c.frame(r, v); err != nil {
				t.Fatal(err)
			}
			v.User = s
			if err := page(r, v); err != nil {
				t.Fatal(err)
			}
			compare(t, c.pages, v)
		}
		compare(t, c.pages, &view{Title: s, Template: "problem", Body: s})
		for _, p := range []loginPage{{Links: true, OIDC: true, Certificates: true, To: s, Problem: s}, {Token: s, To: s}, {}} {
			compare(t, c.pages, &view{Title: "Sign in", Template: "login", Body: p})
		}
	}
}

func compare(t *testing.T, p *pages, v *view) {
	t.Helper()
	reference, err := template.New("layout.html").Funcs(p.funcs).ParseFS(templateFiles, "templates/layout.html", "templates/parts.html", "templates/"+v.Template+".html")
	if err != nil {
		t.Fatal(err)
	}
	var want, got bytes.Buffer
	if err := reference.Execute(&want, v); err != nil {
		t.Fatal(err)
	}
	if err := p.pages[v.Template].render(&got, "layout.html", v); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(tree(t, want.String()), tree(t, got.String())); diff != "" {
		t.Errorf("%s (-html/template +ours):\n%s", v.Template, diff)
	}
}

// tree is what a browser makes of a page, in a form that can be compared.
func tree(t *testing.T, page string) []string {
	t.Helper()
	doc, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for n := range doc.Descendants() {
		line := n.Data
		if n.Type == html.ElementNode {
			line = "<" + n.Data
			for _, a := range n.Attr {
				line += " " + a.Key + "=" + a.Val
			}
		}
		list = append(list, line)
	}
	return list
}

// TestBrokenTemplates: what does not fit is an error, and no half of a page.
func TestBrokenTemplates(t *testing.T) {
	p, err := newPages(func() time.Time { return epoch })
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{nil, 7, struct{ Title string }{"x"}} {
		var b bytes.Buffer
		if err := p.pages["overview"].render(&b, "layout.html", v); err == nil {
			t.Errorf("a page was made of %v", v)
		}
	}
	var b bytes.Buffer
	if err := p.pages["overview"].render(&b, "none", nil); err == nil {
		t.Error("a page was made of no template")
	}
}
