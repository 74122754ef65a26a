package identity

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTemplates(t *testing.T) {
	for _, row := range []struct{ template, want string }{
		{`spiffe://example.org/x`, "/x"},
		{`spiffe://example.org/{docker.labels["app"]}`, "/web"},
		{`spiffe://example.org/{ docker.labels["app"] }`, "/web"},
		{`spiffe://example.org/a-{docker.labels["app"]}-b`, "/a-web-b"},
		{`spiffe://example.org/{docker.labels["app"]}{docker.labels["ns"]}`, "/webprod"},
		{`spiffe://example.org/{docker.labels["app"]}/{docker.labels["ns"]}/x`, "/web/prod/x"},
		{`spiffe://example.org/{{"a": docker.labels["app"]}["a"]}`, "/web"},
		{`spiffe://example.org/{"}" == "{" ? "a" : docker.labels["app"]}`, "/web"},
		{`spiffe://example.org/{'it\'s }' == '' ? "a" : "b"}`, "/b"},
		{`spiffe://example.org/{r"\" == "" ? "a" : "b"}`, "/b"},
		{`spiffe://example.org/{"""}"}""" == "" ? "a" : "b"}`, "/b"},
		{"spiffe://example.org/{docker.labels[\"app\"] // the } app\n}", "/web"},
		{`spiffe://example.org/{string(unix.uid)}`, "/1000"},
		{`spiffe://example.org/{docker.image.split("/")[2].split(":")[0]}`, "/web"},
		{`spiffe://example.org/{node.id}/{ext["vault"]["role"]}`, "/n1/web"},
		{`spiffe://example.org/{"team" in docker.labels ? docker.labels["team"] : "none"}`, "/shop"},
		{`spiffe://example.org/.{docker.labels["app"]}`, "/.web"},
	} {
		p := shop()
		p.SpiffeId, p.DnsNames = row.template, nil
		id, err := mustCompile(t, p).Render(shopFacts())
		if err != nil {
			t.Errorf("%s: %v", row.template, err)
			continue
		}
		if id.ID.Path() != row.want {
			t.Errorf("%s gave %s", row.template, id.ID.Path())
		}
	}
}

// hostileValues are not one legal path segment.
var hostileValues = []string{
	"", "/", "a/b", "/a", "a/", "../../spire/server", "../meshid/ca", "a/../b", "%2e%2e/x", "%2e%2e", "./", ".", "..", "...", "//", "a//b",
	"a b", " a", "a ", "a\n", "\x00", "a\x00b", "a?b", "a#b", "a:b", "a@b", "a\\b", "ä", "а", "\u202ea", "\ufeff", "{a}", "{docker.name}", "a%41",
	strings.Repeat("a", 3000),
}

func TestV_A1_TemplateInjection(t *testing.T) {
	templates := []string{
		`spiffe://example.org/{docker.labels["app"]}`, `spiffe://example.org/ns/{docker.labels["app"]}/x`, `spiffe://example.org/x-{docker.labels["app"]}`,
		`spiffe://example.org/{docker.labels["app"]}.x`, `spiffe://example.org/{docker.labels["app"]}{docker.labels["ns"]}`,
	}
	for _, template := range templates {
		p := shop()
		p.SpiffeId, p.DnsNames = template, nil
		e := mustCompile(t, p)
		for _, value := range hostileValues {
			w := shopWorkload()
			w.Docker.Labels["app"] = value
			f := NewFacts(shopNode(), w)
			if id, err := e.Render(f); err == nil {
				t.Errorf("%s with %q gave %v", template, value, id.ID)
			}
			if miss := e.Explain(f); miss.Field != "spiffe_id" {
				t.Errorf("%s with %q: %+v", template, value, miss)
			}
		}
		// A missing label is no identity either.
		w := shopWorkload()
		delete(w.Docker.Labels, "app")
		if id, err := e.Render(NewFacts(shopNode(), w)); err == nil {
			t.Errorf("%s without the label gave %v", template, id.ID)
		}
	}
	// Two values that are legal alone do not make a dot segment together.
	p := shop()
	p.SpiffeId, p.DnsNames = `spiffe://example.org/.{docker.labels["app"]}`, nil
	for _, value := range []string{".", "..", "/x"} {
		w := shopWorkload()
		w.Docker.Labels["app"] = value
		if id, err := mustCompile(t, p).Render(NewFacts(shopNode(), w)); err == nil {
			t.Errorf("%q gave %v", value, id.ID)
		}
	}
	// Values cannot have expressions: they are not templates.
	p.SpiffeId = `spiffe://example.org/{docker.labels["app"]}`
	w := shopWorkload()
	w.Docker.Labels["app"] = `{node.id}`
	if id, err := mustCompile(t, p).Render(NewFacts(shopNode(), w)); err == nil {
		t.Errorf("an expression in a value gave %v", id.ID)
	}
}

func TestDNSTemplates(t *testing.T) {
	render := func(value string, templates ...string) ([]string, error) {
		p := shop()
		p.SpiffeId, p.DnsNames = "spiffe://example.org/x", templates
		w := shopWorkload()
		w.Docker.Labels["app"] = value
		id, err := mustCompile(t, p).Render(NewFacts(shopNode(), w))
		if err != nil {
			return nil, err
		}
		return id.DNSNames, nil
	}
	app := `{docker.labels["app"]}`
	for _, row := range []struct {
		value     string
		templates []string
		want      []string
	}{
		{"web", []string{app}, []string{"web"}},
		{"web", []string{app + ".shop.internal", "b.internal"}, []string{"web.shop.internal", "b.internal"}},
		{"a.b", []string{app + ".internal"}, []string{"a.b.internal"}},
		{"web", []string{"svc-" + app}, []string{"svc-web"}},
		{"web", []string{"web", app}, []string{"web"}}, // once
	} {
		got, err := render(row.value, row.templates...)
		if diff := cmp.Diff(row.want, got); diff != "" || err != nil {
			t.Errorf("%q: %v\n%s", row.templates, err, diff)
		}
	}
	long := strings.Repeat("a", 60)
	for _, value := range []string{
		"", "Web", "a_b", "a..b", ".a", "a.", "-a", "a-", "*", "*.a", "a b", "a\x00.internal", "ä", "a/b", long + "aaaa", strings.Repeat(long+".", 4) + "aaaaaaaaaa", "::1",
	} {
		if got, err := render(value, app+".internal"); err == nil {
			t.Errorf("%q gave %q", value, got)
		}
	}
	for _, value := range []string{"10.0.0.1", "1"} {
		if got, err := render(value, app); err == nil {
			t.Errorf("%q gave %q", value, got)
		}
	}
	if got, err := render(long, strings.Repeat(app+".", 4)+app+"-"+app); err == nil {
		t.Errorf("a name of %d bytes", len(got[0]))
	}
}
