package identity

import (
	"crypto/ed25519"
	"crypto/x509"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")

var goodIDs = []string{
	"spiffe://example.org",
	"spiffe://example.org/a",
	"spiffe://example.org/ns/prod/app/web",
	"spiffe://example.org/a.b",
	"spiffe://example.org/a..b",
	"spiffe://example.org/.a",
	"spiffe://example.org/a.",
	"spiffe://example.org/-",
	"spiffe://example.org/_",
	"spiffe://example.org/-a-/_b_",
	"spiffe://example.org/0",
	"spiffe://example.org/Admin",
	"spiffe://example.org/ABCXYZ.abcxyz-019_",
	"spiffe://example.org/a/b/c/d/e/f/g/h/i/j",
	"spiffe://example.org/spiffe",
	"spiffe://example.org/meshid",
	"spiffe://example.org/meshid/ca",
	"spiffe://td/x",
	"spiffe://t/x",
	"spiffe://0/x",
	"spiffe://a-b/x",
	"spiffe://a_b.c/x",
	"spiffe://_a_/x",
	"spiffe://xn--bcher-kva.example/x",
	"spiffe://10.0.0.1/x",
	"spiffe://1.2.3.4",
}

var badIDs = []string{
	// ID-1: scheme, trust domain, query, fragment.
	"", "spiffe", "spiffe:", "spiffe:/", "spiffe://", "spiffe:///x", "//example.org/x", "example.org/x",
	"SPIFFE://example.org/x", "Spiffe://example.org/x", "http://example.org/x", "spiffes://example.org/x",
	" spiffe://example.org/x", "spiffe:example.org/x", "spiffe:/example.org/x",
	"spiffe://example.org?x", "spiffe://example.org/x?", "spiffe://example.org/x?q=1", "spiffe://example.org/x#", "spiffe://example.org/x#f",
	// ID-2: userinfo, port.
	"spiffe://u@example.org/x", "spiffe://u:p@example.org/x", "spiffe://@example.org/x", "spiffe://example.org:443/x", "spiffe://example.org:/x",
	// ID-3, ID-4: host.
	"spiffe://Example.org/x", "spiffe://EXAMPLE.ORG/x", "spiffe://ex%61mple.org/x", "spiffe://exa mple.org/x", "spiffe://example.org\x00/x",
	"spiffe://bücher.example/x", "spiffe://ехample.org/x", "spiffe://[::1]/x", "spiffe://::1/x", "spiffe://a*b/x", "spiffe://a,b/x", "spiffe://a+b/x",
	// Trust domains that no certificate can carry, or that others do not take.
	"spiffe://example.org./x", "spiffe://.example.org/x", "spiffe://example..org/x", "spiffe://./x", "spiffe://-example.org/x",
	"spiffe://example-.org/x", "spiffe://example.-org/x", "spiffe://example.org-/x", "spiffe://-td-/x", "spiffe://-/x",
	// ID-5: path.
	"spiffe://example.org/", "spiffe://example.org//", "spiffe://example.org//x", "spiffe://example.org/x/", "spiffe://example.org/x//y",
	"spiffe://example.org/.", "spiffe://example.org/..", "spiffe://example.org/./x", "spiffe://example.org/../x", "spiffe://example.org/x/..",
	"spiffe://example.org/...", "spiffe://example.org/x/.../y", "spiffe://example.org/%41", "spiffe://example.org/%2e%2e/x", "spiffe://example.org/a%2Fb",
	"spiffe://example.org/a b", "spiffe://example.org/a\tb", "spiffe://example.org/a\nb", "spiffe://example.org/a\x00b", "spiffe://example.org/a\x7f",
	"spiffe://example.org/ä", "spiffe://example.org/а", "spiffe://example.org/\xff", "spiffe://example.org/😀", "spiffe://example.org/a:b",
	"spiffe://example.org/a@b", "spiffe://example.org/a+b", "spiffe://example.org/a~b", "spiffe://example.org/a;b", "spiffe://example.org/a,b",
	"spiffe://example.org/a=b", "spiffe://example.org/a&b", "spiffe://example.org/a$b", "spiffe://example.org/a!b", "spiffe://example.org/a*b",
	"spiffe://example.org/a'b", "spiffe://example.org/(a)", "spiffe://example.org/{a}", `spiffe://example.org/a\b`, "spiffe://example.org/a|b",
}

func TestSpec_A01_AcceptTable(t *testing.T) {
	for _, s := range goodIDs {
		id, err := ParseID(s)
		if err != nil {
			t.Errorf("ParseID(%q): %v", s, err)
			continue
		}
		if id.String() != s {
			t.Errorf("ParseID(%q) became %q", s, id)
		}
	}
}

func TestSpec_A02_RejectTable(t *testing.T) {
	if len(badIDs) < 60 {
		t.Fatalf("%d rows", len(badIDs))
	}
	for _, s := range badIDs {
		if id, err := ParseID(s); err == nil {
			t.Errorf("ParseID(%q) = %q", s, id)
		}
	}
}

// idOfLength returns a SPIFFE ID with so many bytes.
func idOfLength(n int) string {
	s := "spiffe://example.org/"
	return s + strings.Repeat("a", n-len(s))
}

func TestSpec_A03_LengthLimitAccepted(t *testing.T) {
	s := idOfLength(2048)
	id, err := ParseID(s)
	if err != nil || id.String() != s {
		t.Fatalf("2048 bytes: %v", err)
	}
	e := shop()
	e.SpiffeId = s
	if _, err := Compile(exampleOrg, e); err != nil {
		t.Errorf("entry: %v", err)
	}
	e.SpiffeId, e.DnsNames = `spiffe://example.org/{docker.labels["app"]}`, nil
	f := shopFacts()
	f.workload.Docker.Labels["app"] = strings.TrimPrefix(s, "spiffe://example.org/")
	got, err := mustCompile(t, e).Render(f)
	if err != nil || got.ID != id {
		t.Errorf("template: %v", err)
	}
}

func TestSpec_A04_TooLongRefused(t *testing.T) {
	s := idOfLength(2049)
	if _, err := ParseID(s); err == nil {
		t.Error("2049 bytes accepted")
	}
	e := shop()
	e.SpiffeId = s
	if _, err := Compile(exampleOrg, e); err == nil {
		t.Error("registered")
	}
	// A template whose literal parts are legal on their own.
	e.SpiffeId = idOfLength(2000) + `/{docker.labels["app"]}`
	compiled := mustCompile(t, e)
	f := shopFacts()
	f.workload.Docker.Labels["app"] = strings.Repeat("x", 48)
	if id, err := compiled.Render(f); err == nil {
		t.Errorf("rendered %d bytes", len(id.ID.String()))
	}
	f.workload.Docker.Labels["app"] = strings.Repeat("x", 47)
	if _, err := compiled.Render(f); err != nil {
		t.Errorf("2048 bytes: %v", err)
	}
	e.SpiffeId = idOfLength(2048) + `/{docker.labels["app"]}`
	if _, err := Compile(exampleOrg, e); err == nil {
		t.Error("a template that is always too long was registered")
	}
}

func TestSpec_A05_TrustDomainLength(t *testing.T) {
	name := strings.Repeat("a.", 127) + "a" // 255 bytes
	if td, err := ParseTrustDomain(name); err != nil || td.Name() != name {
		t.Errorf("255 bytes: %v", err)
	}
	if _, err := ParseID("spiffe://" + name + "/x"); err != nil {
		t.Errorf("255 bytes in an ID: %v", err)
	}
	long := "b" + name
	if _, err := ParseTrustDomain(long); err == nil {
		t.Error("256 bytes accepted")
	}
	if _, err := ParseID("spiffe://" + long + "/x"); err == nil {
		t.Error("256 bytes in an ID accepted")
	}
}

func TestSpec_A06_IPv4TrustDomain(t *testing.T) {
	id, err := ParseID("spiffe://10.0.0.1/x")
	if err != nil || id.TrustDomain().Name() != "10.0.0.1" {
		t.Errorf("%v, %v", id, err)
	}
	if _, err := ParseID("spiffe://[::1]/x"); err == nil {
		t.Error("IPv6 accepted")
	}
}

func TestSpec_A08_PathCaseKept(t *testing.T) {
	upper, err := ParseID("spiffe://example.org/Admin")
	if err != nil {
		t.Fatal(err)
	}
	lower, err := ParseID("spiffe://example.org/admin")
	if err != nil {
		t.Fatal(err)
	}
	if upper == lower || upper.Path() != "/Admin" {
		t.Errorf("%v, %v", upper, lower)
	}
}

func TestSpec_A09_ForeignTrustDomainRefused(t *testing.T) {
	for _, s := range []string{
		"spiffe://other.example/x", "spiffe://example.org.evil/x", "spiffe://evil.example.org/x", "spiffe://example.or/x",
		`spiffe://other.example/{docker.name}`, `spiffe://example.org.evil/{docker.name}`, `spiffe://{docker.name}/x`,
		`spiffe://example.org{docker.name}/x`, `spiffe://example.{docker.name}/x`, `{docker.name}`, `spiffe:/{docker.name}`,
	} {
		e := shop()
		e.SpiffeId = s
		if _, err := Compile(exampleOrg, e); err == nil {
			t.Errorf("%s: registered", s)
		}
	}
}

func TestV_A2_NodeNamesAreOneSegment(t *testing.T) {
	id, err := NodeID(exampleOrg, "x509pop", "0a1b")
	if err != nil || id.String() != "spiffe://example.org/meshid/node/x509pop/0a1b" {
		t.Errorf("%v, %v", id, err)
	}
	for _, s := range []string{"", "a/b", "../ca", "..", ".", "...", "a\x00b", "𝓃", "a b", "a%2fb", "/", "a/", strings.Repeat("a", 2048)} {
		if id, err := NodeID(exampleOrg, "join_token", s); err == nil {
			t.Errorf("id %q gave %v", s, id)
		}
		if id, err := NodeID(exampleOrg, s, "n1"); err == nil {
			t.Errorf("method %q gave %v", s, id)
		}
	}
	if _, err := NodeID(spiffeid.TrustDomain{}, "join_token", "n1"); err == nil {
		t.Error("no trust domain accepted")
	}
	if got := CAID(exampleOrg).String(); got != "spiffe://example.org/meshid/ca" {
		t.Errorf("CAID = %s", got)
	}
	if got := CAID(spiffeid.TrustDomain{}); !got.IsZero() {
		t.Errorf("CAID of no trust domain = %s", got)
	}
}

func TestV_A3_NamesNoCertificateCanCarry(t *testing.T) {
	for _, td := range []string{
		"td.", ".td", "a..b", "-td-", "-td", "td-", "a.-b", "a-.b", ".", "-", "", "TD", "td:1", "td/x", "spiffe://td",
		strings.Repeat("a", 256),
	} {
		if _, err := ParseTrustDomain(td); err == nil {
			t.Errorf("ParseTrustDomain(%q) accepted", td)
		}
		if _, err := ParseID("spiffe://" + td + "/x"); err == nil && td != "td/x" {
			t.Errorf("ParseID with %q accepted", td)
		}
	}
	for _, s := range []string{"spiffe://example.org/...", "spiffe://example.org/a/....", "spiffe://td./a"} {
		if _, err := ParseID(s); err == nil {
			t.Errorf("ParseID(%q) accepted", s)
		}
		e := shop()
		e.SpiffeId = s
		if _, err := Compile(exampleOrg, e); err == nil {
			t.Errorf("%q registered", s)
		}
	}
	f := shopFacts()
	f.workload.Docker.Labels["app"] = "..."
	if id, err := mustCompile(t, shop()).Render(f); err == nil {
		t.Errorf("rendered %v", id.ID)
	}
}

// What is accepted survives a certificate, byte for byte.
func TestV_A4_RawBytesRoundTrip(t *testing.T) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	for _, s := range append([]string{idOfLength(2048), "spiffe://" + strings.Repeat("a.", 127) + "a/x"}, goodIDs...) {
		id, err := ParseID(s)
		if err != nil {
			t.Fatalf("ParseID(%q): %v", s, err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotAfter: time.Unix(1<<31, 0), URIs: []*url.URL{id.URL()},
		}
		der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
		if err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		if len(cert.URIs) != 1 || cert.URIs[0].String() != s {
			t.Errorf("%q came back as %v", s, cert.URIs)
		}
	}
	for _, s := range []string{
		"SPIFFE://td/a", "spiffe://TD/a", "spiffe://td/%41", "spiffe://td/a b", "spiffe://td/a\x00", "spiffe://tԁ/a", "spiffe://td/a/",
		"spiffe://td/a?", "spiffe://td/a#", "spiffe://td:1/a", "spiffe://u@td/a",
	} {
		if _, err := ParseID(s); err == nil {
			t.Errorf("ParseID(%q) accepted", s)
		}
	}
}

func TestV_A5_ByteWiseComparison(t *testing.T) {
	if _, err := ParseTrustDomain("TD"); err == nil {
		t.Error("upper case trust domain accepted")
	}
	e := shop()
	e.SpiffeId = "spiffe://Example.org/x"
	if _, err := Compile(exampleOrg, e); err == nil {
		t.Error("entry for Example.org registered at example.org")
	}
	lower := NewSet(mustCompile(t, &entry{Name: "admin", SpiffeId: "spiffe://example.org/admin", Workloads: "unix.uid == 0", Admin: true}))
	if lower.Reserved(spiffeid.RequireFromString("spiffe://example.org/Admin"), mustCompile(t, shop())) != "" {
		t.Error("/Admin is taken for /admin")
	}
	// Values are compared as bytes too.
	f := shopFacts()
	f.workload.Docker.Labels["team"] = "SHOP"
	if mustCompile(t, shop()).MatchWorkload(f) {
		t.Error("SHOP is taken for shop")
	}
}

func TestV_A7_PrefixesEndAtADelimiter(t *testing.T) {
	for _, td := range []string{"example.org.evil", "evil.example.org", "example.orgs", "example.or"} {
		e := shop()
		e.SpiffeId = "spiffe://" + td + "/x"
		if _, err := Compile(exampleOrg, e); err == nil {
			t.Errorf("a grant on example.org covers %s", td)
		}
	}
	// The reserved path is a path, not the beginning of a word.
	e := shop()
	e.SpiffeId = "spiffe://example.org/meshids/x"
	if _, err := Compile(exampleOrg, e); err != nil {
		t.Errorf("/meshids is taken for /meshid: %v", err)
	}
	e.SpiffeId = `spiffe://example.org/meshid{docker.labels["app"]}`
	if _, err := mustCompile(t, e).Render(shopFacts()); err != nil {
		t.Errorf("/meshidweb is taken for /meshid: %v", err)
	}
	// A prefix of an image reference that does not end the registry is refused.
	e = shop()
	e.Workloads = `docker.image.startsWith("registry.internal")`
	if _, err := Compile(exampleOrg, e); err == nil || !strings.Contains(err.Error(), "registry.internal.evil.example") {
		t.Errorf("open prefix: %v", err)
	}
}

func TestV_A9_ReservedNames(t *testing.T) {
	for _, s := range []string{
		"spiffe://example.org", "spiffe://example.org/", "spiffe://example.org/meshid", "spiffe://example.org/meshid/ca",
		"spiffe://example.org/meshid/node/x509pop/n1", `spiffe://example.org/meshid/{docker.name}`, `spiffe://example.org/meshid/node/{docker.name}/x`,
	} {
		e := shop()
		e.SpiffeId = s
		if _, err := Compile(exampleOrg, e); err == nil {
			t.Errorf("%s: registered", s)
		}
	}
	for _, row := range []struct{ template, ns, app string }{
		{`spiffe://example.org/{docker.labels["ns"]}/{docker.labels["app"]}`, "meshid", "ca"},
		{`spiffe://example.org/{docker.labels["ns"]}`, "meshid", ""},
		{`spiffe://example.org/{docker.labels["ns"]}{docker.labels["app"]}/ca`, "mesh", "id"},
		{`spiffe://example.org/mesh{docker.labels["ns"]}/ca`, "id", ""},
		{`spiffe://example.org/meshid{docker.labels["ns"]}/ca`, "", ""},
		{`spiffe://example.org/meshid{docker.labels["ns"]}`, "/ca", ""},
	} {
		e := shop()
		e.SpiffeId = row.template
		f := shopFacts()
		f.workload.Docker.Labels["ns"], f.workload.Docker.Labels["app"] = row.ns, row.app
		if id, err := mustCompile(t, e).Render(f); err == nil {
			t.Errorf("%s with %q, %q: %v", row.template, row.ns, row.app, id.ID)
		}
	}
}

func TestValidateDNSName(t *testing.T) {
	label := strings.Repeat("a", 63)
	long := strings.Join([]string{label, label, label, strings.Repeat("b", 61)}, ".") // 253
	for _, s := range []string{"a", "orders", "web.shop.internal", "1a.b", "a1", "xn--bcher-kva.example", "a-b.c--d", "1.2.3.a4", label + ".x", long} {
		if err := ValidateDNSName(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{
		"", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "A", "a_b", "*.a", "*", "a b", "a\x00", "bücher", "10.0.0.1", "1", "a.1", "::1",
		"a:1", "a/b", "a@b", label + "a", long + "c", "a\n",
	} {
		if err := ValidateDNSName(s); err == nil {
			t.Errorf("%q accepted", s)
		}
	}
}

func TestQuoteShort(t *testing.T) {
	for _, row := range []struct{ in, want string }{
		{"a\x00\"", `"a\x00\""`},
		{strings.Repeat("a", 64), `"` + strings.Repeat("a", 64) + `"`},
		{strings.Repeat("a", 65), `"` + strings.Repeat("a", 64) + `"… (65 bytes)`},
		{strings.Repeat("a", 63) + "ä", `"` + strings.Repeat("a", 63) + `"… (65 bytes)`},
	} {
		if got := quoteShort(row.in); got != row.want {
			t.Errorf("quoteShort(%q) = %s, want %s", row.in, got, row.want)
		}
	}
}
