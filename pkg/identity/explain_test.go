package identity

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

func TestExplain(t *testing.T) {
	with := func(change func(*entry)) *entry {
		p := shop()
		p.AcceptWeak = true
		change(p)
		return p
	}
	workloads := func(s string) *entry { return with(func(p *entry) { p.Workloads = s }) }
	host := &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 1000}}
	long := shopWorkload()
	long.Docker.Labels["team"] = strings.Repeat("t", 100)
	hostile := shopWorkload()
	hostile.Docker.Labels["app"] = "../ca\n\x1b[31m"
	for _, row := range []struct {
		name     string
		entry    *entry
		workload *attributesv1.Workload
		want     Miss
	}{
		{"match", shop(), shopWorkload(), Miss{}},
		{
			"node", with(func(p *entry) { p.Nodes = `node.method == "x509pop" && node.labels["zone"] == "b"` }), shopWorkload(),
			Miss{"nodes", `node.labels["zone"] == "b"`, `node.labels["zone"] is "a"`},
		},
		{
			"absent node facts", with(func(p *entry) { p.Nodes = `node.join_token.created_by == "x"` }), shopWorkload(),
			Miss{"nodes", `node.join_token.created_by == "x"`, `there is no node.join_token`},
		},
		{
			"first false term", workloads(`docker.labels["team"] == "shop" && ( docker.image.startsWith("registry/")  &&  unix.uid == 5 )`), shopWorkload(),
			Miss{"workloads", `docker.image.startsWith("registry/")`, `docker.image is "registry.internal/shop/web:1"`},
		},
		{
			"nearest alternative",
			workloads(`(unix.uid == 1 && unix.gid == 1) || (docker.labels["team"] == "shop" && docker.labels["app"] == "api") || docker.name == "x"`), shopWorkload(),
			Miss{"workloads", `docker.labels["app"] == "api"`, `docker.labels["app"] is "web"`},
		},
		{"number", workloads(`unix.uid == 5`), shopWorkload(), Miss{"workloads", `unix.uid == 5`, `unix.uid is 1000`}},
		{"list", workloads(`5 in unix.groups`), shopWorkload(), Miss{"workloads", `5 in unix.groups`, `unix.groups is [4, 27]`}},
		{"map", workloads(`"x" in docker.labels`), shopWorkload(), Miss{"workloads", `"x" in docker.labels`, `docker.labels is a map with the keys ["app", "ns", "team"]`}},
		{"missing label", workloads(`docker.labels["x"] == "y"`), shopWorkload(), Miss{"workloads", `docker.labels["x"] == "y"`, `there is no docker.labels["x"]`}},
		{"no container", workloads(`docker.image != "y"`), host, Miss{"workloads", `docker.image != "y"`, `the process is in no container (docker.image)`}},
		{"in a container", workloads(`!has(docker.container_id)`), shopWorkload(), Miss{"workloads", `!has(docker.container_id)`, `docker.container_id is "c1"`}},
		{"unknown", workloads(`unix.sha256 != "y"`), host, Miss{"workloads", `unix.sha256 != "y"`, `unix.sha256 is not known`}},
		{"two facts", workloads(`docker.name == docker.labels["app"]`), shopWorkload(), Miss{"workloads", `docker.name == docker.labels["app"]`, `docker.name is "web-1"; docker.labels["app"] is "web"`}},
		{"no facts", workloads(`1 == 2`), shopWorkload(), Miss{"workloads", `1 == 2`, `it is false`}},
		{"conditional", workloads(`unix.uid == 1000 ? unix.gid == 1 || false : true`), shopWorkload(), Miss{"workloads", `unix.uid == 1000 ? unix.gid == 1 || false : true`, `unix.uid is 1000; unix.gid is 1000`}},
		{"operators in text", workloads(`docker.name == "a && b" && unix.uid == 1 // && unix.gid == 2`), shopWorkload(), Miss{"workloads", `docker.name == "a && b"`, `docker.name is "web-1"`}},
		{
			"long value", shop(), long,
			Miss{"workloads", `docker.labels["team"] == "shop"`, `docker.labels["team"] is "` + strings.Repeat("t", 64) + `"… (100 bytes)`},
		},
		{"no workload", shop(), nil, Miss{"workloads", shop().Workloads, "there is no workload"}},
		{
			"hostile value", shop(), hostile,
			Miss{"spiffe_id", `docker.labels["app"]`, `the value "../ca\n\x1b[31m" cannot be used: a path segment has '/', only a-z, A-Z, 0-9, '.', '-' and '_' are allowed`},
		},
		{
			"missing label in template", with(func(p *entry) { p.SpiffeId = `spiffe://example.org/{docker.labels["x"]}` }), shopWorkload(),
			Miss{"spiffe_id", `docker.labels["x"]`, `no such key: x`},
		},
		{
			"dns", with(func(p *entry) { p.DnsNames = []string{"a.b", `{docker.image_digest}.internal`} }), shopWorkload(),
			Miss{"dns_names[1]", `docker.image_digest`, `the value "sha256:` + strings.Repeat("cd", 28) + `c"… (71 bytes) cannot be used: it has ':', only a-z, 0-9, '-' and dots between labels are allowed`},
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := mustCompile(t, row.entry).Explain(NewFacts(shopNode(), row.workload))
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	if got := mustCompile(t, shop()).Explain(nil); got.Field != "nodes" {
		t.Errorf("no facts: %+v", got)
	}
}

// Explain agrees with matching: it is zero if and only if there is an identity,
// and the term that it blames is not true.
func TestExplainAgreesWithMatch(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 120 {
		source := randomRule(rng, 3)
		e := rule(t, source)
		for range 5 {
			f := NewFacts(randomNode(rng), randomWorkload(rng))
			miss := e.Explain(f)
			if (miss == Miss{}) != e.MatchWorkload(f) {
				t.Fatalf("%s: match %v, %+v", source, e.MatchWorkload(f), miss)
			}
			if miss != (Miss{}) && rule(t, miss.Term).MatchWorkload(f) {
				t.Fatalf("%s: %s is blamed and true of %v", source, miss.Term, f.workload)
			}
		}
	}
}
