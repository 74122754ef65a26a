package identity

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

type entry = entryv1.Entry

// shop is the entry that the documentation shows.
func shop() *entry {
	return &entry{
		Name:      "shop",
		SpiffeId:  `spiffe://example.org/ns/{docker.labels["ns"]}/app/{docker.labels["app"]}`,
		Nodes:     `node.method == "x509pop" && node.x509pop.subject_cn.endsWith(".shop.internal")`,
		Workloads: `docker.labels["team"] == "shop" && docker.image.startsWith("registry.internal/shop/")`,
		Ttl:       durationpb.New(time.Hour),
		DnsNames:  []string{`{docker.labels["app"]}.shop.internal`},
	}
}

// shopFacts are facts that shop matches. The caller may change them before they
// are used.
func shopFacts() *Facts {
	return NewFacts(shopNode(), shopWorkload())
}

func shopNode() *attributesv1.Node {
	return &attributesv1.Node{
		Method: "x509pop", Id: "n1", Labels: map[string]string{"zone": "a"},
		X509Pop: &attributesv1.X509PoP{SubjectCn: "n1.shop.internal", DnsNames: []string{"n1", "n1.shop.internal"}},
	}
}

func shopWorkload() *attributesv1.Workload {
	return &attributesv1.Workload{
		Unix: &attributesv1.Unix{Uid: 1000, Gid: 1000, Groups: []int64{4, 27}, Path: "/usr/bin/web", Sha256: strings.Repeat("ab", 32)},
		Docker: &attributesv1.Docker{
			ContainerId: "c1", Name: "web-1", Image: "registry.internal/shop/web:1", ImageDigest: "sha256:" + strings.Repeat("cd", 32),
			Labels:      map[string]string{"team": "shop", "ns": "prod", "app": "web"},
			ImageLabels: map[string]string{"maintainer": "shop"},
		},
		Ext: map[string]*attributesv1.Values{"vault": {Values: map[string]string{"role": "web"}}},
	}
}

func mustCompile(t testing.TB, p *entry) *Entry {
	t.Helper()
	e, err := Compile(exampleOrg, p)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// rule compiles a workload rule, however weak it is.
func rule(t testing.TB, workloads string) *Entry {
	t.Helper()
	return mustCompile(t, &entry{Name: "e", SpiffeId: "spiffe://example.org/x", Workloads: workloads, AcceptWeak: true})
}

func TestEntry(t *testing.T) {
	p := shop()
	p.Revision = 7
	p.Hint = "web"
	e := mustCompile(t, p)
	f := shopFacts()
	if !e.MatchNode(f) || !e.MatchWorkload(f) {
		t.Fatalf("no match: %+v", e.Explain(f))
	}
	id, err := e.Render(f)
	if err != nil {
		t.Fatal(err)
	}
	want := "spiffe://example.org/ns/prod/app/web"
	if id.ID.String() != want || !cmp.Equal(id.DNSNames, []string{"web.shop.internal"}) || id.TTL != time.Hour || id.Hint != "web" || id.Entry != e {
		t.Errorf("%+v", id)
	}
	if e.Name() != "shop" || e.Revision() != 7 || e.Admin() || e.TTL() != time.Hour {
		t.Errorf("%v %v %v %v", e.Name(), e.Revision(), e.Admin(), e.TTL())
	}
	if !proto.Equal(e.Proto(), p) {
		t.Errorf("Proto = %v", e.Proto())
	}
	if got := e.Explain(f); got != (Miss{}) {
		t.Errorf("Explain = %+v", got)
	}
	p.Name = "changed later"
	if e.Name() != "shop" {
		t.Error("the entry shares the caller's message")
	}
}

func TestCompileErrors(t *testing.T) {
	mutate := func(f func(*entry)) *entry {
		p := shop()
		f(p)
		return p
	}
	workloads := func(s string) *entry { return mutate(func(p *entry) { p.Workloads = s }) }
	id := func(s string) *entry { return mutate(func(p *entry) { p.SpiffeId = s }) }
	dns := func(s ...string) *entry { return mutate(func(p *entry) { p.DnsNames = s }) }
	for _, row := range []struct {
		name  string
		entry *entry
		want  string // a part of the error
	}{
		{"no name", mutate(func(p *entry) { p.Name = "" }), `name: it is missing`},
		{"name with space", mutate(func(p *entry) { p.Name = "a b" }), `name: it has ' '`},
		{"name with upper case", mutate(func(p *entry) { p.Name = "aB" }), `name: it has 'B'`},
		{"name like an option", mutate(func(p *entry) { p.Name = "-f" }), `name: it begins with '-'`},
		{"long name", mutate(func(p *entry) { p.Name = strings.Repeat("a", 129) }), `name: it has 129 bytes`},
		{"no id", id(""), "spiffe_id: it is missing"},
		{"other trust domain", id("spiffe://other.org/x"), `its trust domain is "other.org" and this CA's is "example.org"`},
		{"no path", id("spiffe://example.org"), `it has no path`},
		{"empty segment", id(`spiffe://example.org/a//{docker.name}`), "a path segment is empty"},
		{"slash at the end", id(`spiffe://example.org/{docker.name}/`), "ends with a slash"},
		{"bad literal", id(`spiffe://example.org/{docker.name}/a b`), `a path segment has ' '`},
		{"open brace", id(`spiffe://example.org/{docker.name`), "spiffe_id:1:22: there is a { without its }"},
		{"close brace", id(`spiffe://example.org/docker.name}`), "spiffe_id:1:33: there is a } without its {"},
		{"unclosed string", id(`spiffe://example.org/{docker.labels["}`), "there is a { without its }"},
		{"empty braces", id(`spiffe://example.org/{ }`), "there is no expression in the braces"},
		{"field in template", id(`spiffe://example.org/{docker.labelz}`), `spiffe_id:1:29: there is no field "labelz" in docker; did you mean docker.labels?`},
		{"number in template", id(`spiffe://example.org/{unix.uid}`), "it is a number (int) and must be a text (string); convert it with string(…)"},
		{"many expressions", id(`spiffe://example.org/` + strings.Repeat("{docker.name}", 17)), "more than 16 expressions"},
		{"long template", id("spiffe://example.org/" + strings.Repeat("a", 9000)), "at most 8192"},
		{"no rule", workloads(" \n"), "workloads: it is missing"},
		{"not a condition", workloads("docker.image"), "workloads:1:1: it is a text (string) and must be a condition (bool)"},
		{"misspelt field", workloads(`docker.imagee == "x"`), `workloads:1:7: there is no field "imagee" in docker; did you mean docker.image?`},
		{"swapped letters", workloads(`unix.udi == 1`), `did you mean unix.uid?`},
		{"field of nested message", workloads(`node.x509pop.subjectcn == "x"`), `did you mean node.x509pop.subject_cn?`},
		{"unlike any", workloads(`docker.zzzzzzzzz == "x"`), `docker has container_id, name, image, image_digest, labels, image_labels`},
		{"misspelt variable", workloads(`dokcer.image == "x"`), `workloads:1:1: there is no "dokcer" here; did you mean docker?`},
		{"no variable", workloads(`uid == 1000`), `did you mean unix.uid?`},
		{"unquoted text", workloads(`docker.image == frontend`), `there is no "frontend" here; one can name node, unix, docker, k8s, ext; a text stands in quotes`},
		{"misspelt function", workloads(`docker.image.startWith("a/")`), `there is no function startWith(); did you mean startsWith()?`},
		{"number with quotes", workloads(`unix.uid == "1000"`), `workloads:1:10: == does not take (int, string); a number is written without quotes`},
		{"and", workloads(`unix.uid == 1 and unix.gid == 1`), "workloads:1:15: syntax error: mismatched input 'and' expecting <EOF>; write && for and"},
		{"assignment", workloads(`unix.uid = 1`), "write == to compare"},
		{"second line", workloads("unix.uid == 1 &&\n  docker.labls[\"x\"] == \"y\""), `workloads:2:9: there is no field "labls" in docker; did you mean docker.labels?`},
		{"characters, not bytes", workloads(`docker.name == "äöü" && docker.labls == "x"`), `workloads:1:31: `},
		{"whole message", workloads(`docker == docker`), "it is used as a whole"},
		{"made message", workloads(`meshid.attributes.v1.Docker{image: "x"}.image == "x" && unix.uid == 1`), "a message cannot be made in a rule"},
		{"clock", workloads(`timestamp("2026-01-01T00:00:00Z") == timestamp("2026-01-01T00:00:00Z")`), "there is no function timestamp()"},
		{"dynamic type", workloads(`dyn(unix.uid) == "x"`), "there is no function dyn()"},
		{"format", workloads(`"%s".format([docker.image]) == "x"`), "there is no function format()"},
		{"chosen pattern", workloads(`docker.image.matches(docker.labels["re"])`), "the pattern of matches must be a literal string"},
		{"broken pattern", workloads(`docker.image.matches("(")`), "the pattern is not a valid regular expression"},
		{"costly pattern", workloads(`docker.image.matches("(a{1,100}b){1,9}")`), "regex program size 1828 exceeds limit of 1000"},
		{"nested loops", workloads(`docker.labels.all(a, docker.labels.all(b, docker.labels.all(c, a == c)))`), "units, at most 100000 are allowed"},
		{"long rule", workloads(strings.Repeat(" ", 5000) + "unix.uid == 1"), "size"},
		{"deep rule", workloads(strings.Repeat("(", 300) + "true" + strings.Repeat(")", 300)), "recursion"},
		{"many nodes", workloads("unix.uid in [" + strings.Repeat("1,", 2010) + "1]"), ""},
		{"overflow id", workloads(`unix.uid == 65534 && unix.gid == 1`), "it never matches"},
		{"not UTF-8", workloads("docker.name == \"\xff\""), "not valid UTF-8"},
		{"workload in nodes", mutate(func(p *entry) { p.Nodes = `docker.image == "x"` }), "nodes:1:1: there is no \"docker\" here; docker is a fact about a workload: such terms belong in `workloads`"},
		{"field in nodes", mutate(func(p *entry) { p.Nodes = `node.metod == "x"` }), "nodes:1:5: there is no field \"metod\" in node; did you mean node.method?"},
		{"short ttl", mutate(func(p *entry) { p.Ttl = durationpb.New(9 * time.Second) }), "ttl: it is 9s and must be between 10s and 24h0m0s"},
		{"long ttl", mutate(func(p *entry) { p.Ttl = durationpb.New(25 * time.Hour) }), "ttl: it is 25h0m0s"},
		{"negative ttl", mutate(func(p *entry) { p.Ttl = durationpb.New(-time.Hour) }), "ttl: it is not a duration"},
		{"overflowing ttl", mutate(func(p *entry) { p.Ttl = &durationpb.Duration{Seconds: 1 << 60} }), "ttl: it is not a duration"},
		{"fraction in ttl", mutate(func(p *entry) { p.Ttl = durationpb.New(10*time.Second + 1) }), "whole seconds"},
		{"long hint", mutate(func(p *entry) { p.Hint = strings.Repeat("a", 1025) }), "hint: it has 1025 bytes"},
		{"control in hint", mutate(func(p *entry) { p.Hint = "a\nb" }), "hint: it has a character"},
		{"static dns", dns("Web.internal"), `dns_names[0]: DNS name "Web.internal": it has 'W'`},
		{"ip as dns", dns("ok.internal", "10.0.0.1"), `dns_names[1]: DNS name "10.0.0.1": its last label is a number`},
		{"wildcard", dns("*.internal"), `dns_names[0]`},
		{"dns template", dns(`{docker.labels["app"]}..internal`), `dns_names[0]: DNS name "x..internal": it has an empty label`},
		{"dns twice", dns("a.internal", "a.internal"), `dns_names[1]: the same name is there twice`},
		{"many dns", dns(make([]string, 33)...), "dns_names: there are 33, at most 32 are allowed"},
		{"admin template", mutate(func(p *entry) { p.Admin = true }), "an entry with admin: true must spell its SPIFFE ID out"},
		{"weak admin", mutate(func(p *entry) {
			p.Admin, p.AcceptWeak, p.SpiffeId = true, true, "spiffe://example.org/x"
		}), "an entry with admin: true cannot accept a weak rule"},
		{"nil", nil, "there is no entry"},
	} {
		t.Run(row.name, func(t *testing.T) {
			e, err := Compile(exampleOrg, row.entry)
			var entryErr *EntryError
			if !errors.As(err, &entryErr) || e != nil {
				t.Fatalf("Compile = %v, %v", e, err)
			}
			if !strings.Contains(err.Error(), row.want) {
				t.Errorf("error: %v\nwant: …%s…", err, row.want)
			}
			if len(entryErr.Fields) == 0 || entryErr.Fields[0].Field == "" || entryErr.Fields[0].Message == "" {
				t.Errorf("fields: %+v", entryErr.Fields)
			}
		})
	}
}

func TestCompileReportsAllMistakes(t *testing.T) {
	_, err := Compile(exampleOrg, &entry{
		Name: "UP", SpiffeId: "spiffe://x", Nodes: "nod.id == 1", Workloads: `unix.uid == "a" || docker.imag == "b"`,
		Ttl: durationpb.New(time.Second), DnsNames: []string{"-"},
	})
	var entryErr *EntryError
	if !errors.As(err, &entryErr) {
		t.Fatal(err)
	}
	var fields []string
	for _, f := range entryErr.Fields {
		fields = append(fields, f.Field)
	}
	want := []string{"name", "spiffe_id", "nodes", "workloads", "workloads", "ttl", "dns_names[0]"}
	if diff := cmp.Diff(want, fields); diff != "" {
		t.Errorf("-want +got:\n%s\n%v", diff, err)
	}
}

func TestDigest(t *testing.T) {
	base := mustCompile(t, shop()).Digest()
	same := shop()
	same.Revision = 99
	if mustCompile(t, same).Digest() != base {
		t.Error("the revision changes the digest")
	}
	seen := map[[32]byte]string{base: "base"}
	for name, change := range map[string]func(*entry){
		"name":        func(p *entry) { p.Name = "shop2" },
		"spiffe_id":   func(p *entry) { p.SpiffeId = "spiffe://example.org/x" },
		"nodes":       func(p *entry) { p.Nodes = "" },
		"workloads":   func(p *entry) { p.Workloads += " " },
		"ttl":         func(p *entry) { p.Ttl = nil },
		"dns":         func(p *entry) { p.DnsNames = nil },
		"more dns":    func(p *entry) { p.DnsNames = append(p.DnsNames, "a.b") },
		"hint":        func(p *entry) { p.Hint = "h" },
		"accept_weak": func(p *entry) { p.AcceptWeak = true },
		"admin":       func(p *entry) { p.SpiffeId, p.Admin = "spiffe://example.org/x", true },
	} {
		p := shop()
		change(p)
		d := mustCompile(t, p).Digest()
		if other, ok := seen[d]; ok {
			t.Errorf("%s and %s have one digest", name, other)
		}
		seen[d] = name
	}
	// Text cannot move from one field to the next.
	a, b := digest(&entry{Name: "ab", SpiffeId: "c"}), digest(&entry{Name: "a", SpiffeId: "bc"})
	if a == b {
		t.Error("fields run into each other")
	}
}

func TestSharedExpressions(t *testing.T) {
	a, b := shop(), shop()
	b.Name = "other"
	one, two := mustCompile(t, a), mustCompile(t, b)
	if one.workloads != two.workloads || one.nodes != two.nodes || one.id.parts[1].expr != two.id.parts[1].expr {
		t.Error("equal expressions are compiled twice")
	}
	if one.dns[0].parts[0].expr != one.id.parts[3].expr {
		t.Error("equal expressions of one entry are compiled twice")
	}
}
