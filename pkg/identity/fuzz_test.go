package identity

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// stricter reports whether ParseID refuses for a reason that go-spiffe does not
// have: length, labels of the trust domain, segments of dots.
func stricter(s string) bool {
	if len(s) > 2048 {
		return true
	}
	td, path, _ := strings.Cut(strings.TrimPrefix(s, "spiffe://"), "/")
	if len(td) > 255 {
		return true
	}
	for label := range strings.SplitSeq(td, ".") {
		if label == "" || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") {
			return true
		}
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment != "" && strings.Trim(segment, ".") == "" {
			return true
		}
	}
	return false
}

// agree compares ParseID with go-spiffe.
func agree(t *testing.T, s string) {
	t.Helper()
	want, wantErr := spiffeid.FromString(s)
	got, err := ParseID(s)
	switch {
	case err == nil && (wantErr != nil || got != want):
		t.Fatalf("ParseID(%q) = %v, go-spiffe: %v, %v", s, got, want, wantErr)
	case err == nil && got.String() != s:
		t.Fatalf("ParseID(%q) became %q", s, got)
	case err != nil && wantErr == nil && !stricter(s):
		t.Fatalf("ParseID(%q): %v, go-spiffe accepts it", s, err)
	case err == nil && stricter(s):
		t.Fatalf("ParseID(%q) accepted", s)
	}
	if td, err := ParseTrustDomain(s); err == nil {
		if td.Name() != s {
			t.Fatalf("ParseTrustDomain(%q) = %q", s, td)
		}
		if _, err := ParseID("spiffe://" + s + "/x"); err != nil {
			t.Fatalf("%q is a trust domain but: %v", s, err)
		}
	}
}

// Every string of a small alphabet up to a length, and each table row with each
// byte replaced: over 10⁶ inputs where nothing may be skipped, else a tenth.
func TestSpec_A07_AgreesWithGoSPIFFE(t *testing.T) {
	const alphabet = "a/.-A%"
	inputs := 0
	var all func(prefix string, left int)
	all = func(prefix string, left int) {
		agree(t, prefix)
		inputs++
		if left == 0 {
			return
		}
		for i := range len(alphabet) {
			all(prefix+alphabet[i:i+1], left-1)
		}
	}
	full := os.Getenv("REQUIRE_ALL") == "1"
	depth, step := 5, 7
	if full {
		depth, step = 7, 1
	}
	all("spiffe://", depth)
	all("spiffe://a/", depth)
	for _, s := range append(append([]string{idOfLength(100)}, goodIDs...), badIDs...) {
		for i := range len(s) {
			for b := 0; b < 256; b += step {
				agree(t, s[:i]+string([]byte{byte(b)})+s[i+1:])
				inputs++
			}
		}
	}
	if full && inputs < 1_000_000 {
		t.Errorf("only %d inputs", inputs)
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range append(append([]string{}, goodIDs...), badIDs...) {
		f.Add(s)
	}
	f.Fuzz(agree)
}

// FuzzTemplate renders any template with any value: what comes out is a legal
// name in the trust domain, not reserved, and has the value as it is.
func FuzzTemplate(f *testing.F) {
	for _, value := range hostileValues {
		f.Add(`spiffe://example.org/{docker.labels["app"]}`, `{docker.labels["app"]}.internal`, value)
	}
	f.Add(`spiffe://example.org/{"}"}/{r"\"}`, `a{'\''}`, "x")
	f.Add(`spiffe://example.org/mesh{docker.labels["app"]}/ca`, `{"""}"""}`, "id")
	f.Fuzz(func(t *testing.T, id, dns, value string) {
		e, err := Compile(exampleOrg, &entry{
			Name: "e", SpiffeId: id, DnsNames: []string{dns}, Workloads: "true", AcceptWeak: true,
		})
		if err != nil {
			if _, ok := errors.AsType[*EntryError](err); !ok {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		w := shopWorkload()
		w.Docker.Labels["app"] = value
		facts := NewFacts(shopNode(), w)
		got, err := e.Render(facts)
		if miss := e.Explain(facts); (miss == Miss{}) != (err == nil) {
			t.Fatalf("Render: %v, Explain: %+v", err, miss)
		}
		if err != nil {
			return
		}
		s := got.ID.String()
		if _, err := ParseID(s); err != nil || !strings.HasPrefix(s, "spiffe://example.org/") || got.ID.Path() == "" {
			t.Fatalf("rendered %q: %v", s, err)
		}
		if strings.HasPrefix(got.ID.Path()+"/", ReservedPath) {
			t.Fatalf("rendered the reserved %q", s)
		}
		for _, name := range got.DNSNames {
			if err := ValidateDNSName(name); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzCompile compiles any rules: it never panics, errors name a field, and an
// entry that compiles behaves the same alone, in a set and explained.
func FuzzCompile(f *testing.F) {
	f.Add(shop().GetNodes(), shop().GetWorkloads(), true)
	f.Add("", `!(docker.image != "x") || unix.uid in [1, 2] ? true : false`, true)
	f.Add(`node.labels.exists(k, k == "a")`, `docker.labels.all(k, k.matches("^a+$"))`, true)
	f.Add("((", "a.b.c[\"\n", false)
	f.Add("node.id == 'x' // c", "\"\"\"\n", false)
	f.Fuzz(func(t *testing.T, nodes, workloads string, acceptWeak bool) {
		p := &entry{Name: "e", SpiffeId: "spiffe://example.org/x", Nodes: nodes, Workloads: workloads, AcceptWeak: acceptWeak}
		e, err := Compile(exampleOrg, p)
		if err != nil {
			var entryErr *EntryError
			if !errors.As(err, &entryErr) || len(entryErr.Fields) == 0 || entryErr.Fields[0].Field == "" {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		set := NewSet(e)
		for _, facts := range []*Facts{shopFacts(), NewFacts(shopNode(), nil), NewFacts(nil, shopWorkload())} {
			node, workload := e.MatchNode(facts), e.MatchWorkload(facts)
			if node != (len(set.MatchNode(facts)) == 1) || workload != (len(set.MatchWorkload(facts)) == 1) {
				t.Fatal("the set does not agree")
			}
			if miss := e.Explain(facts); (miss == Miss{}) != (node && workload) {
				t.Fatalf("match %v %v, Explain %+v", node, workload, miss)
			}
		}
	})
}
