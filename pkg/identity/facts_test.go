package identity

import (
	"fmt"
	"strings"
	"testing"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

func TestRules(t *testing.T) {
	for _, row := range []struct {
		rule string
		want bool
	}{
		{`true`, true},
		{`unix.uid == 1000`, true},
		{`1000 == unix.uid`, true},
		{`unix.uid == 1001`, false},
		{`unix.uid >= 1000 && unix.uid < 2000`, true},
		{`27 in unix.groups`, true},
		{`28 in unix.groups`, false},
		{`unix.groups.exists(g, g == 4)`, true},
		{`size(unix.groups) == 2`, true},
		{`unix.path == "/usr/bin/web"`, true},
		{`docker.labels["app"] == "web"`, true},
		{`docker.labels.app == "web"`, true},
		{`docker.labels[docker.labels["x"]] == "web"`, false},
		{`"app" in docker.labels`, true},
		{`has(docker.labels.app)`, true},
		{`has(docker.labels.none)`, false},
		{`docker.labels.exists(k, k.startsWith("te") && docker.labels[k] == "shop")`, true},
		{`docker.image.matches("^registry\\.internal/shop/[a-z]+:1$")`, true},
		{`docker.image.split(":")[1] == "1"`, true},
		{`docker.image.split("/").size() == 3`, true},
		{`docker.name.lowerAscii().endsWith("-1")`, true},
		{`docker.image in ["a/b", "registry.internal/shop/web:1"]`, true},
		{`docker.image_labels["maintainer"] == "shop"`, true},
		{`docker.labels["maintainer"] == "shop"`, false}, // not the image's
		{`ext["vault"]["role"] == "web"`, true},
		{`ext["vault"]["other"] == "web"`, false},
		{`ext["none"]["role"] == "web"`, false},
		{`ext.vault.role == "web"`, true},
		{`"vault" in ext && "role" in ext["vault"]`, true},
		{`ext.vault.exists(k, ext.vault[k] == "web")`, true},
		{`node.method == "x509pop" && node.labels["zone"] == "a"`, true},
		{`"n1" in node.x509pop.dns_names`, true},
		{`docker.labels["app"] + "-1" == docker.name`, true},
		{`string(unix.uid) == "1000" && int("5") == 5`, true},
		{`unix.uid == 0 ? false : docker.labels["app"] == "web"`, true},
		{`!(unix.uid == 0)`, true},
		{`["a", "web"].exists(x, x == docker.labels["app"])`, true},
	} {
		if got := rule(t, row.rule).MatchWorkload(shopFacts()); got != row.want {
			t.Errorf("%s is %v", row.rule, got)
		}
	}
}

// What is not known never helps to match, whichever way round it is asked.
func TestUnknownNeverMatches(t *testing.T) {
	host := &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 1000, Gid: 1000}}
	container := &attributesv1.Workload{Docker: &attributesv1.Docker{Image: "a/b"}}
	for _, row := range []struct {
		workload *attributesv1.Workload
		rules    []string
	}{
		{host, []string{
			`docker.image == ""`, `docker.image != "x"`, `!(docker.image == "x")`, `docker.image == "x"`, `!docker.image.startsWith("x/")`,
			`docker.labels["a"] != "x"`, `!(docker.labels["a"] == "x")`, `!("a" in docker.labels)`, `size(docker.labels) == 0`, `docker.labels == {}`,
			`docker.labels.all(k, k != "x")`, `!docker.labels.exists(k, k == "x")`, `docker.image == "" || docker.image != ""`,
			`docker.image == "x" ? true : true`, `!has(docker.labels.a)`, `docker.labels["a"] == docker.labels["a"]`,
			`unix.uid == 1000 && docker.image != "x"`, `!(unix.uid == 1000 && docker.image == "x")`, `!(unix.uid == 1 || docker.image == "x")`,
			`[docker.image] != ["x"]`, `docker.image in ["", "x"]`, `!(docker.image in ["x"])`, `{"a": docker.image} != {"a": "x"}`,
			// Empty strings: an executable too large for its hash.
			`unix.sha256 == ""`, `unix.sha256 != "x"`, `!(unix.sha256 == "x")`, `size(unix.sha256) == 0`, `!unix.path.startsWith("/tmp")`,
			`ext["a"]["b"] != "x"`, `!(ext["a"]["b"] == "x")`,
			`node.join_token.created_by != "x"`, `!(node.x509pop.subject_cn == "x")`, `node.id != "x"`, `node.labels["x"] != "y"`,
		}},
		{container, []string{
			`unix.uid == 0`, `unix.uid != 1`, `!(unix.uid == 1)`, `!(5 in unix.groups)`, `unix.groups.all(g, g != 0)`, `unix.uid < 1`, `!has(unix.path) && unix.gid == 0`,
			`docker.image_digest == ""`, `docker.image_digest != "x"`, `docker.labels["a"] != "x"`, `docker.labels["a"] == ""`, `docker.name != "x"`,
		}},
	} {
		f := NewFacts(&attributesv1.Node{Method: "join_token"}, row.workload)
		for _, r := range row.rules {
			if rule(t, r).MatchWorkload(f) {
				t.Errorf("%s matches %v", r, row.workload)
			}
		}
	}
	// With no workload, or no node, nothing matches.
	always := rule(t, "true")
	for _, f := range []*Facts{nil, NewFacts(shopNode(), nil), NewFacts(nil, nil)} {
		if always.MatchWorkload(f) {
			t.Error("a rule matches no workload")
		}
		if _, err := always.Render(f); err == nil {
			t.Error("no workload has an identity")
		}
	}
	if always.MatchNode(nil) || always.MatchNode(NewFacts(nil, shopWorkload())) {
		t.Error("an entry for every node matches no node")
	}
	if rule(t, `node.method != "x" && unix.uid == 1000`).MatchWorkload(NewFacts(nil, shopWorkload())) {
		t.Error("a rule over an unknown node matches")
	}
}

// has() alone asks whether something is known: this is how a rule says that a
// process is in no container.
func TestHas(t *testing.T) {
	host := NewFacts(shopNode(), &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 0}})
	root := rule(t, `unix.uid == 0 && !has(docker.container_id)`)
	if !root.MatchWorkload(host) {
		t.Error("root on the host does not match")
	}
	inContainer := shopWorkload()
	inContainer.Unix.Uid = 0
	if root.MatchWorkload(NewFacts(shopNode(), inContainer)) {
		t.Error("root in a container matches")
	}
	for r, want := range map[string]bool{
		`has(unix.uid)`: true, `has(unix.path)`: false, `has(docker.image)`: false, `has(node.x509pop)`: true, `has(node.join_token)`: false,
		`has(node.x509pop.subject_cn)`: true, `has(node.x509pop.serial)`: false, `has(unix.groups)`: false, `has(docker.labels)`: false,
	} {
		if got := rule(t, r).MatchWorkload(host); got != want {
			t.Errorf("%s is %v", r, got)
		}
	}
}

// A false or true operand decides && and || even if the other is not known.
func TestUnknownOperands(t *testing.T) {
	host := NewFacts(shopNode(), &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 1000}})
	for r, want := range map[string]bool{
		`docker.image == "x" || unix.uid == 1000`:    true,
		`unix.uid == 1000 || docker.image == "x"`:    true,
		`!(docker.image == "x" && unix.uid == 1)`:    true, // whatever the image is
		`!(docker.image == "x" && unix.uid == 1000)`: false,
	} {
		if got := rule(t, r).MatchWorkload(host); got != want {
			t.Errorf("%s is %v", r, got)
		}
	}
}

func TestV_D11_LabelsAreExactBytes(t *testing.T) {
	huge := strings.Repeat("x", 1<<20)
	w := shopWorkload()
	w.Docker.Labels = map[string]string{
		"team": "shop:admin", "a=b": "c", "nl": "shop\nteam", "Team": "TEAM", "huge": huge, "": "empty", "nul": "a\x00b", "sp": " shop ",
	}
	f := NewFacts(shopNode(), w)
	for r, want := range map[string]bool{
		`docker.labels["team"] == "shop:admin"`:      true,
		`docker.labels["team"] == "shop"`:            false,
		`docker.labels["team:shop"] == "admin"`:      false,
		`docker.labels["a"] == "b=c"`:                false,
		`docker.labels["a=b"] == "c"`:                true,
		`docker.labels["nl"] == "shop"`:              false,
		`docker.labels["nl"] == "shop\nteam"`:        true,
		`docker.labels["Team"] == "TEAM"`:            true,
		`docker.labels["Team"] == "shop:admin"`:      false,
		`docker.labels["TEAM"] == "TEAM"`:            false,
		`docker.labels["nul"] == "a"`:                false,
		`docker.labels["sp"] == "shop"`:              false,
		`docker.labels[""] == "empty"`:               true,
		`docker.labels["huge"] == "x"`:               false,
		`docker.labels["huge"].startsWith("xxx")`:    true,
		`docker.labels["huge"].size() == 1048576`:    true,
		`docker.image_labels["team"] == "TEAM"`:      false,
		`docker.labels["huge"].matches("^x+y(x|z)")`: false,
	} {
		if got := rule(t, r).MatchWorkload(f); got != want {
			t.Errorf("%s is %v", r, got)
		}
	}
	exact := rule(t, fmt.Sprintf(`docker.labels["huge"] == %q`, strings.Repeat("x", 4000)))
	if exact.MatchWorkload(f) {
		t.Error("a prefix is taken for the label")
	}
	// A legal value among hostile ones is found by the index too.
	set := NewSet(rule(t, `docker.labels["team"] == "shop:admin"`))
	if len(set.MatchWorkload(f)) != 1 {
		t.Error("the index does not find the label")
	}
}

func TestV_D12_ImageLabelsAreNotLabels(t *testing.T) {
	w := shopWorkload()
	w.Docker.Labels = nil
	w.Docker.ImageLabels = map[string]string{"team": "shop"}
	if rule(t, `docker.labels["team"] == "shop"`).MatchWorkload(NewFacts(shopNode(), w)) {
		t.Error("an image's label is taken for the container's")
	}
}

func TestV_D16_OverflowIDMatchesNothing(t *testing.T) {
	w := shopWorkload()
	w.Unix.Uid, w.Unix.Gid, w.Unix.Groups = 65534, 65534, []int64{65534, 4, 65534}
	f := NewFacts(shopNode(), w)
	for _, r := range []string{
		`unix.uid == 65535 - 1`, `unix.uid != 0`, `unix.uid > 0`, `!(unix.uid == 1)`, `unix.uid in [65534]`, `unix.gid != 0`, `65534 in unix.groups`, `has(unix.uid)`,
	} {
		if rule(t, r).MatchWorkload(f) {
			t.Errorf("%s matches the overflow id", r)
		}
	}
	for _, r := range []string{`4 in unix.groups`, `docker.labels["app"] == "web"`} {
		if !rule(t, r).MatchWorkload(f) {
			t.Errorf("%s does not match", r)
		}
	}
	if w.Unix.Groups[0] != 65534 {
		t.Error("the message was changed")
	}
}

// Facts beyond the sizes that costs are estimated for are judged with the cost
// counted: beyond the limit, nothing matches.
func TestCostIsLimited(t *testing.T) {
	w := shopWorkload()
	for i := range 100_000 {
		w.Docker.Labels[fmt.Sprint(i)] = "x"
	}
	f := NewFacts(shopNode(), w)
	if !f.oversized {
		t.Fatal("not oversized")
	}
	if !rule(t, `docker.labels["app"] == "web"`).MatchWorkload(f) {
		t.Error("a cheap rule does not match")
	}
	all := rule(t, `docker.labels.all(k, docker.labels[k] != "evil")`)
	if all.MatchWorkload(f) {
		t.Error("a rule beyond the cost limit matches")
	}
	if !all.MatchWorkload(shopFacts()) {
		t.Error("the same rule does not match ordinary facts")
	}
	for name, change := range map[string]func(*attributesv1.Node, *attributesv1.Workload){
		"path":   func(_ *attributesv1.Node, w *attributesv1.Workload) { w.Unix.Path = strings.Repeat("a", 4097) },
		"groups": func(_ *attributesv1.Node, w *attributesv1.Workload) { w.Unix.Groups = make([]int64, 257) },
		"label":  func(_ *attributesv1.Node, w *attributesv1.Workload) { w.Docker.Labels["a"] = strings.Repeat("a", 4097) },
		"key":    func(_ *attributesv1.Node, w *attributesv1.Workload) { w.Docker.Labels[strings.Repeat("a", 4097)] = "" },
		"names":  func(n *attributesv1.Node, _ *attributesv1.Workload) { n.X509Pop.DnsNames = make([]string, 257) },
		"name": func(n *attributesv1.Node, _ *attributesv1.Workload) {
			n.X509Pop.DnsNames[0] = strings.Repeat("a", 4097)
		},
		"ext": func(_ *attributesv1.Node, w *attributesv1.Workload) {
			w.Ext["vault"].Values["a"] = strings.Repeat("a", 4097)
		},
	} {
		n, w := shopNode(), shopWorkload()
		if NewFacts(n, w).oversized {
			t.Fatalf("%s: oversized before", name)
		}
		change(n, w)
		if !NewFacts(n, w).oversized {
			t.Errorf("%s: not oversized", name)
		}
	}
}
