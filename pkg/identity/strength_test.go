package identity

import (
	"math/rand/v2"
	"strings"
	"testing"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
)

// compileRule compiles an entry with a workload rule that must not be weak.
func compileRule(workloads string, acceptWeak bool) error {
	_, err := Compile(exampleOrg, &entry{Name: "e", SpiffeId: "spiffe://example.org/x", Workloads: workloads, AcceptWeak: acceptWeak})
	return err
}

func TestStrength(t *testing.T) {
	strong := []string{
		`unix.uid == 1000`, `1000 == unix.uid`, `unix.uid in [1000, 1001]`, `unix.gid == 5`, `27 in unix.groups`,
		`docker.image_digest == "sha256:00"`, `docker.image_digest in ["sha256:00", "sha256:01"]`, `docker.container_id == "c1"`,
		`docker.image == "registry/a:1"`, `docker.image in ["a/b:1", "c/d:2"]`,
		`docker.image.startsWith("registry.internal/shop/")`, `docker.image.startsWith("nginx:")`, `docker.image.startsWith("nginx@")`,
		`docker.image.startsWith("registry.internal:5000/")`, `docker.image.startsWith("shop/web")`,
		`docker.image.matches("^registry\\.internal/shop/.*$")`,
		`docker.labels["team"] == "shop" && docker.image.startsWith("registry.internal/shop/")`,
		`docker.labels["a"] == "b" && (docker.labels["c"] == "d" && unix.uid == 1)`,
		`unix.path == "/x" && unix.uid == 1`,
		`(unix.uid == 1 && docker.labels["a"] == "b") || docker.image == "a/b"`,
		`unix.uid == 0 && !has(docker.container_id)`,
		`!(unix.uid != 1000)`, `!(unix.uid != 1000 || docker.labels["a"] == "b")`, `!!(unix.uid == 1)`,
		`docker.labels["a"] == "b" ? unix.uid == 1 : unix.uid == 2`, `unix.uid == 1 ? docker.labels["a"] == "b" : false`,
		`unix.uid != 1 ? false : true`, `docker.labels["a"] == "b" ? unix.uid == 1 : false`,
		`docker.image == node.labels["image"]`, `unix.uid == int(node.labels["uid"])`, `docker.image in [node.labels["image"], "a/b"]`,
		`docker["image"] == "x" || unix.uid == 1`,
		`false`, `docker.labels["a"] == "b" && false`,
	}
	for _, r := range strong {
		err := compileRule(r, false)
		if strings.HasPrefix(r, `docker["image"]`) { // not a way to name a field
			if err == nil {
				t.Errorf("%s compiles", r)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", r, err)
		}
	}
	weak := []string{
		`true`, `unix.path == "/x"`, `docker.labels["a"] == "b"`, `docker.name == "web"`, `docker.image_labels["a"] == "b"`, `ext["a"]["b"] == "c"`,
		`has(docker.image)`, `has(unix.uid)`, `node.method == "x509pop"`, `node.labels["a"] == "b" && docker.labels["a"] == "b"`,
		`unix.uid != 0`, `unix.uid >= 1000`, `unix.uid < 1000`, `!(unix.uid == 0)`, `unix.uid == unix.gid`, `unix.uid in unix.groups`,
		`!(unix.uid in [0])`, `unix.uid in [0, unix.gid]`, `docker.image == docker.labels["image"]`, `docker.image == "a/" + docker.labels["image"]`,
		`docker.image.startsWith("")`, `docker.image.startsWith("registry.internal")`, `docker.image.startsWith("r")`, `docker.image.startsWith(":")`,
		`docker.image.startsWith("/")`, `docker.image.startsWith(docker.labels["a"])`, `!docker.image.startsWith("evil/")`,
		`docker.image.endsWith("/web:1")`, `docker.image.contains("registry.internal/shop/")`,
		`docker.image.matches("registry\\.internal/shop/")`, `docker.image.matches("^.*/shop/")`, `docker.image.matches("(?i)^registry/shop/")`,
		`docker.image.matches("^(registry/a/|.*)")`, `docker.image.matches("(?m)^registry/shop/")`, `docker.image.matches("^registry/shop/|x")`,
		`docker.image != "x"`, `docker.image_digest.startsWith("sha256:")`, `docker.image_digest != "x"`,
		`docker.name.startsWith("registry.internal/shop/")`,
		`unix.uid == 1 || docker.labels["a"] == "b"`, `unix.uid == 1 || true`, `(unix.uid == 1 || unix.uid == 2) || docker.name == "x"`,
		`docker.labels["a"] == "b" ? unix.uid == 1 : true`, `unix.uid == 1 ? true : docker.labels["a"] == "b"`, `unix.uid == 1 ? false : true`,
		`!(unix.uid == 1 && docker.labels["a"] == "b")`, `!(unix.uid != 1 && docker.labels["a"] == "b")`,
		`[true].exists(x, x || unix.uid == 1)`, `unix.groups.exists(g, g == 1)`, `(unix.uid == 1) == false`, `(unix.uid == 1) != true`,
		`docker.labels["a"] == "b" && has(docker.image)`, `size(docker.image) > 0`, `"x" in ["x"]`, `"a" in docker.labels`,
	}
	for _, r := range weak {
		err := compileRule(r, false)
		if err == nil {
			t.Errorf("%s is strong", r)
			continue
		}
		if !strings.Contains(err.Error(), "accept_weak: true") {
			t.Errorf("%s: the error does not say what to do: %v", r, err)
		}
		if err := compileRule(r, true); err != nil {
			t.Errorf("%s with accept_weak: %v", r, err)
		}
	}
}

func TestV_D8_PathAndHashAreNotEnough(t *testing.T) {
	for _, r := range []string{
		`unix.path == "/usr/bin/web"`, `unix.sha256 == "ab"`, `unix.path == "/usr/bin/web" && unix.sha256 == "ab"`,
		`unix.path == "/usr/bin/web" && docker.labels["a"] == "b"`,
	} {
		err := compileRule(r, false)
		if err == nil || !strings.Contains(err.Error(), "a process can execute that program after it has connected") {
			t.Errorf("%s: %v", r, err)
		}
	}
	for _, r := range []string{`unix.path == "/usr/bin/web" && unix.uid == 1000`, `unix.sha256 == "ab" && docker.image == "a/b"`} {
		if err := compileRule(r, false); err != nil {
			t.Errorf("%s: %v", r, err)
		}
	}
}

func TestV_D11_LabelsAreNotEnough(t *testing.T) {
	err := compileRule(`docker.labels["team"] == "shop" && docker.name == "web"`, false)
	want := `workloads: the rule rests only on docker.labels and docker.name: whoever starts a container chooses its labels, and whoever starts a container chooses its name; add a term that a workload cannot choose`
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v", err)
	}
	err = compileRule(`unix.uid == 1 || (docker.labels["team"] == "shop")`, false)
	if err == nil || !strings.Contains(err.Error(), "if `docker.labels[\"team\"] == \"shop\"` is true, the rule rests only on docker.labels") {
		t.Errorf("%v", err)
	}
	if err := compileRule(shop().Workloads, false); err != nil {
		t.Errorf("the documented entry: %v", err)
	}
}

func TestV_D12_ImageLabelsAreNotEnough(t *testing.T) {
	err := compileRule(`docker.image_labels["team"] == "shop"`, false)
	if err == nil || !strings.Contains(err.Error(), "whoever builds an image chooses its labels") {
		t.Errorf("%v", err)
	}
}

// One entry for a whole cluster: the rule says nothing of the workload, the name
// says all of it.
func TestNameThatOnlyOneCanHave(t *testing.T) {
	for id, strong := range map[string]bool{
		"/ns/{k8s.namespace}/sa/{k8s.service_account}":                     true,
		"/pod/{k8s.pod_uid}":                                               true,
		"/sa/{k8s.service_account}":                                        false,
		`/app/{k8s.labels["app"]}`:                                         false,
		"/ns/{k8s.namespace}-{k8s.service_account}":                        false, // a-b is also a and b
		"/ns/x{k8s.namespace}":                                             false,
		"/ns/{k8s.namespace}{k8s.service_account}":                         false,
		`/ns/{k8s.namespace == "a" ? k8s.service_account : k8s.namespace}`: false,
	} {
		_, err := Compile(exampleOrg, &entry{Name: "e", SpiffeId: "spiffe://example.org" + id, Workloads: `has(k8s.pod_uid)`})
		if (err == nil) != strong {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// Every fact of the vocabulary is classified: a new one is a decision.
func TestEveryFactIsClassified(t *testing.T) {
	for _, v := range schema().vars {
		if v.name == varNode {
			continue
		}
		if v.message == nil {
			if weakFacts[v.name] == "" {
				t.Errorf("%s is not classified", v.name)
			}
			continue
		}
		for _, name := range v.message.names {
			path := v.name + "." + name
			_, strong := strongFacts[path]
			_, weak := weakFacts[path]
			if strong == weak {
				t.Errorf("%s: strong %v, weak %v", path, strong, weak)
			}
		}
	}
}

// A rule that passes as strong is false for a process that has chosen all that
// it can choose and has none of the values that the rule pins.
func TestStrongRulesResistTheTenant(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	strong := 0
	for range 800 {
		source := randomRule(rng, 3)
		e, err := Compile(exampleOrg, &entry{Name: "e", SpiffeId: "spiffe://example.org/x", Workloads: source})
		if err != nil {
			continue
		}
		strong++
		for range 20 {
			w := randomWorkload(rng)
			w.Unix.Uid, w.Unix.Gid, w.Unix.Groups = 4242, 4242, nil
			if w.Docker != nil {
				w.Docker.Image, w.Docker.ImageDigest, w.Docker.ContainerId = "evil.example/x:1", "sha256:evil", "evil"
			}
			if e.MatchWorkload(NewFacts(randomNode(rng), w)) {
				t.Fatalf("%s\nmatches %v", source, w)
			}
		}
	}
	if strong < 30 {
		t.Errorf("only %d strong rules were made", strong)
	}
}

func pick[T any](rng *rand.Rand, list ...T) T { return list[rng.IntN(len(list))] }

// randomRule makes a workload rule over a small vocabulary.
func randomRule(rng *rand.Rand, depth int) string {
	sub := func() string { return randomRule(rng, depth-1) }
	if depth > 0 {
		switch rng.IntN(9) {
		case 0, 1:
			return sub() + " && " + sub()
		case 2:
			return "(" + sub() + " && " + sub() + ")"
		case 3, 4:
			return "(" + sub() + " || " + sub() + ")"
		case 5:
			return "!(" + sub() + ")"
		case 6:
			return "(" + sub() + " ? " + sub() + " : " + sub() + ")"
		}
	}
	text := func() string { return pick(rng, `"a"`, `"b"`, `"c"`, `""`) }
	return pick(rng,
		func() string {
			return `docker.labels["k` + pick(rng, "1", "2") + `"] ` + pick(rng, "==", "!=") + ` ` + text()
		},
		func() string { return `docker.labels["k1"] in [` + text() + `, ` + text() + `]` },
		func() string { return `docker.labels["k2"].startsWith(` + text() + `)` },
		func() string { return text() + ` == docker.name` },
		func() string { return `unix.uid ` + pick(rng, "==", "!=", "<") + ` ` + pick(rng, "0", "1", "2") },
		func() string { return `unix.gid in [` + pick(rng, "1", "1, 2", "1, 1") + `]` },
		func() string { return pick(rng, "1", "2") + ` in unix.groups` },
		func() string { return `docker.image ` + pick(rng, "==", "!=") + ` "r/` + pick(rng, "a", "b") + `"` },
		func() string { return `docker.image.startsWith("` + pick(rng, "r/", "r/a", "r", "s/") + `")` },
		func() string { return `docker.image_digest == "sha256:` + pick(rng, "a", "b") + `"` },
		func() string { return `unix.path == ` + text() },
		func() string { return `ext["v"]["w"] == ` + text() },
		func() string { return `node.id == ` + text() },
		func() string { return `has(docker.` + pick(rng, "image", "name", "labels.k1") + `)` },
		func() string { return `docker.labels.exists(k, docker.labels[k] == ` + text() + `)` },
		func() string { return pick(rng, "true", "false") },
	)()
}

func randomNode(rng *rand.Rand) *attributesv1.Node {
	return &attributesv1.Node{Method: pick(rng, "m", "n"), Id: pick(rng, "a", "b", ""), Labels: map[string]string{"k1": pick(rng, "a", "b")}}
}

func randomWorkload(rng *rand.Rand) *attributesv1.Workload {
	text := func() string { return pick(rng, "a", "b", "c", "ab", "") }
	w := &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: int64(rng.IntN(3)), Gid: int64(rng.IntN(3)), Path: text()}}
	if rng.IntN(2) == 0 {
		w.Unix.Groups = []int64{int64(rng.IntN(3))}
	}
	if rng.IntN(4) > 0 {
		w.Docker = &attributesv1.Docker{
			Name: text(), Image: pick(rng, "r/a", "r/b", "s/a", ""), ImageDigest: pick(rng, "sha256:a", "sha256:b", ""), Labels: map[string]string{},
		}
		for _, k := range []string{"k1", "k2"} {
			if rng.IntN(3) > 0 {
				w.Docker.Labels[k] = text()
			}
		}
	}
	if rng.IntN(2) == 0 {
		w.Ext = map[string]*attributesv1.Values{"v": {Values: map[string]string{"w": text()}}}
	}
	return w
}
