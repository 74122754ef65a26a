package identity

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"
)

// yamlEntry is the form in which entries are read.
type yamlEntry struct {
	Name       string   `yaml:"name"`
	SpiffeID   string   `yaml:"spiffe_id"`
	Nodes      string   `yaml:"nodes"`
	Workloads  string   `yaml:"workloads"`
	TTL        string   `yaml:"ttl"`
	DNSNames   []string `yaml:"dns_names"`
	Hint       string   `yaml:"hint"`
	Admin      bool     `yaml:"admin"`
	AcceptWeak bool     `yaml:"accept_weak"`
}

func TestFormatYAML(t *testing.T) {
	p := shop()
	p.Revision = 12
	p.Workloads = "docker.labels[\"team\"] == \"shop\" &&\n  docker.image.startsWith(\"registry.internal/shop/\")"
	p.Hint = "it's \"web\""
	p.Admin, p.AcceptWeak = true, true
	p.Ttl = durationpb.New(90 * time.Minute)
	want := `- name: shop
  spiffe_id: 'spiffe://example.org/ns/{docker.labels["ns"]}/app/{docker.labels["app"]}'
  nodes: 'node.method == "x509pop" && node.x509pop.subject_cn.endsWith(".shop.internal")'
  workloads: |-
    docker.labels["team"] == "shop" &&
      docker.image.startsWith("registry.internal/shop/")
  ttl: 1h30m
  dns_names:
    - '{docker.labels["app"]}.shop.internal'
  hint: 'it''s "web"'
  admin: true
  accept_weak: true
`
	if diff := cmp.Diff(want, FormatYAML(p)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, want := FormatYAML(&entry{Name: "a/b", SpiffeId: "spiffe://example.org/x"}), "- name: a/b\n  spiffe_id: spiffe://example.org/x\n"; got != want {
		t.Errorf("%q", got)
	}
}

func TestFormatYAMLRoundTrip(t *testing.T) {
	alphabet := []rune("aZ09 -_.:/{}[]()\"'\\\n\t#&*!|>%@`,?=~é😀\u2028\ufeff\x00\x1b\u0085")
	words := []string{"", "true", "No", "null", "~", "1", "1.5", "0x1f", "-", "- a", "a: b", "a #b", "'", `"`, "|", ">", "a\nb", "a\n\nb", " a\nb", "a \nb", "a\nb\n", "\na", "a\n b\n  c", "%x", "@x", "y", "off", ".inf", "2026-01-01", "=", "<<", "---", "...", "a:", "? a"}
	rng := rand.New(rand.NewPCG(7, 8))
	for range 500 {
		r := make([]rune, rng.IntN(12))
		for i := range r {
			r[i] = alphabet[rng.IntN(len(alphabet))]
		}
		words = append(words, string(r))
	}
	for i, s := range words {
		next := words[(i+1)%len(words)]
		p := &entry{Name: "n", SpiffeId: s, Workloads: next, DnsNames: []string{s, next}, Hint: s, Ttl: durationpb.New(time.Duration(i+1) * time.Second)}
		text := FormatYAML(p) + FormatYAML(&entry{Name: "second"})
		var got []yamlEntry
		if err := yaml.Unmarshal([]byte(text), &got); err != nil {
			t.Fatalf("%q: %v\n%s", s, err, text)
		}
		ttl, err := time.ParseDuration(got[0].TTL)
		if err != nil || ttl != p.Ttl.AsDuration() {
			t.Errorf("ttl %s: %v", got[0].TTL, err)
		}
		want := yamlEntry{Name: "n", SpiffeID: s, Workloads: next, DNSNames: []string{s, next}, Hint: s, TTL: got[0].TTL}
		if diff := cmp.Diff([]yamlEntry{want, {Name: "second"}}, got); diff != "" {
			t.Fatalf("%q: -want +got\n%s\n%s", s, diff, text)
		}
	}
}
