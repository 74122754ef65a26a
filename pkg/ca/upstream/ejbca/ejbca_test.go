package ejbca

import (
	"context"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	fake "github.com/meshid/meshid/test/fakes/ejbca"
	"github.com/meshid/meshid/test/require"
)

// place is a server that is set up as docs/upstream/ejbca.md says, and a
// configuration for it.
type place struct {
	*fake.Server
	dir    string
	config Config
}

var fence = regexp.MustCompile("(?ms)^```(\\w+)[^\\n]*\\n(.*?)^```$")

func newPlace(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) *place {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(require.Repository(), "docs/upstream/ejbca.md"))
	if err != nil {
		t.Fatal(err)
	}
	p := &place{dir: t.TempDir(), Server: fake.New(t, a, b, fake.Setup{
		CAName: "MeshRoot", CertificateProfile: "MeshIntermediate", EndEntityProfile: "Mesh", Validity: 24 * time.Hour,
		SubjectFields: []string{"CN", "SN", "O"}, AltFields: []string{"URI"},
	})}
	for _, m := range fence.FindAllStringSubmatch(string(page), -1) {
		switch m[1] {
		case "sh":
			for line := range strings.Lines(m[2]) {
				words := strings.Fields(line)
				if words[0] != "ejbca.sh" {
					t.Fatalf("%q is no command of ejbca.sh", line)
				}
				if err := p.Operator(words[1:]); err != nil {
					t.Fatalf("%s: %v", line, err)
				}
			}
		case "yaml":
			var file struct {
				TrustDomain string `yaml:"trust_domain"`
				Upstream    struct {
					Roots []string `yaml:"roots_sha256"`
					EJBCA Config   `yaml:"ejbca"`
				} `yaml:"upstream"`
			}
			if err := yaml.UnmarshalWithOptions([]byte(m[2]), &file, yaml.Strict()); err != nil {
				t.Fatal(err)
			}
			p.config = file.Upstream.EJBCA
		}
	}
	certificate, key := p.ClientCertificate("meshid-ca-1", time.Hour)
	p.config.URL = p.URL
	p.config.ServerCA = upstreamtest.Write(t, filepath.Join(p.dir, p.config.ServerCA), p.CA)
	p.config.Certificate = upstreamtest.Write(t, filepath.Join(p.dir, p.config.Certificate), certificate)
	p.config.Key = upstreamtest.Write(t, filepath.Join(p.dir, p.config.Key), key)
	return p
}

func mint(t *testing.T, ca *CA) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := upstreamtest.Mint(ctx, t, ca)
	return err
}

func good(t *testing.T) *place {
	t.Helper()
	return newPlace(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
}

// TestConformance is with each form of an answer.
func TestConformance(t *testing.T) {
	for _, format := range []string{fake.DER, fake.PEM, fake.PEMBase64} {
		t.Run(format, func(t *testing.T) {
			upstreamtest.Run(t, upstreamtest.Kind{Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
				t.Helper()
				p := newPlace(t, b, a)
				p.Change(func(s *fake.Setup) { s.Format = format })
				switch b { //nolint:exhaustive // the others are answers
				case upstreamtest.Denied:
					p.Change(func(s *fake.Setup) { s.EndEntityProfile = "Other" })
				case upstreamtest.Gone:
					p.Close()
				}
				return upstreamtest.Open(t, New, p.config)
			}})
		})
	}
}

// What operators have set up otherwise comes out as what to do about it.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*fake.Setup)
		config func(*Config)
		says   string
	}{
		{"another CA", nil, func(c *Config) { c.CAName = "Root" }, `CA with name \"Root\" doesn't exist`},
		{"another certificate profile", nil, func(c *Config) { c.CertificateProfile = "SUBCA" }, "Certificate profile with name"},
		{"another end entity profile", nil, func(c *Config) { c.EndEntityProfile = "EMPTY" }, "End Entity Profile with name"},
		{"no serial numbers", func(s *fake.Setup) { s.SubjectFields = []string{"CN"} }, nil, "Wrong number of SN fields in Subject DN"},
		{"no URI names", func(s *fake.Setup) { s.AltFields = nil }, nil, "Wrong number of URI fields"},
		{"off-line", func(s *fake.Setup) { s.Offline = true }, nil, "off-line"},
		{"approval", func(s *fake.Setup) { s.Approval = true }, nil, "take approvals out of the profile"},
		{"protocol", func(s *fake.Setup) { s.NoREST = true }, nil, "enable REST Certificate Management"},
		{"another path", nil, func(c *Config) { c.URL += "/pki/rest" }, "compare url"},
		{"right of the role", func(s *fake.Setup) { s.CAName = "Elsewhere" }, nil, "not authorized to resource /ca/Elsewhere"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := good(t)
			if c.change != nil {
				p.Change(c.change)
			}
			if c.config != nil {
				c.config(&p.config)
			}
			err := mint(t, upstreamtest.Open(t, New, p.config))
			if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}

// The client certificate is read for each request.
func TestClientCertificate(t *testing.T) {
	p := good(t)
	ca := upstreamtest.Open(t, New, p.config)
	if err := mint(t, ca); err != nil {
		t.Fatal(err)
	}
	put := func(name string, life time.Duration) {
		t.Helper()
		certificate, key := p.ClientCertificate(name, life)
		upstreamtest.Write(t, p.config.Certificate, certificate)
		upstreamtest.Write(t, p.config.Key, key)
	}
	put("somebody", time.Hour)
	if err := mint(t, ca); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "No admin authenticated") {
		t.Errorf("one that is in no role: %v", err)
	}
	put("meshid-ca-1", -time.Minute)
	if err := mint(t, ca); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "put its successor there") {
		t.Errorf("one that has ended: %v", err)
	}
	if _, err := New(p.config); err != nil {
		t.Errorf("a CA that starts with it: %v", err)
	}
	put("meshid-ca-1", time.Hour)
	if err := mint(t, ca); err != nil {
		t.Errorf("its successor: %v", err)
	}
	if n := p.Enrolled("meshid-ca-1"); n != 2 {
		t.Errorf("the end entity was enrolled %d times", n)
	}
	if err := os.Chmod(p.config.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := mint(t, ca); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "chmod") {
		t.Errorf("a key that others can read: %v", err)
	}
}

func TestRoots(t *testing.T) {
	a := upstreamtest.NewAuthority(t, upstreamtest.NoRoot)
	p := newPlace(t, upstreamtest.NoRoot, a)
	if err := mint(t, upstreamtest.Open(t, New, p.config)); err == nil {
		t.Error("an answer without a root was accepted")
	}
	p.config.Roots = upstreamtest.Write(t, p.dir+"/roots.pem", upstreamtest.PEM(a.Root))
	if err := mint(t, upstreamtest.Open(t, New, p.config)); err != nil {
		t.Error(err)
	}
}

func TestNew(t *testing.T) {
	p := good(t)
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no url", func(c *Config) { c.URL = "" }, "https://host:port"},
		{"plain HTTP", func(c *Config) { c.URL = "http://ejbca" }, "https://host:port"},
		{"no CA", func(c *Config) { c.CAName = "" }, "set ca_name to"},
		{"no certificate profile", func(c *Config) { c.CertificateProfile = "" }, "set certificate_profile to"},
		{"no end entity profile", func(c *Config) { c.EndEntityProfile = "" }, "set end_entity_profile to"},
		{"no end entity", func(c *Config) { c.EndEntity = "" }, "set end_entity to"},
		{"a name that is too long", func(c *Config) { c.EndEntity = strings.Repeat("x", 251) }, "at most 250"},
		{"no key", func(c *Config) { c.Key = "" }, "set key to"},
		{"a missing key", func(c *Config) { c.Key += "x" }, "no such file"},
		{"not a key", func(c *Config) { c.Key = c.Certificate }, "certificate "},
		{"no server CA", func(c *Config) { c.ServerCA = c.Key }, "server_ca: "},
		{"no roots", func(c *Config) { c.Roots = c.Key }, "roots: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := p.config
			c.change(&config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}

func TestParse(t *testing.T) {
	for _, texts := range [][]string{{"%"}, {""}, {"AAAA"}, make([]string, 100)} {
		if _, err := parse(texts); err == nil {
			t.Errorf("%d texts %.10q were accepted", len(texts), texts)
		}
	}
}

// Whatever comes is certificates of a size that is accepted, or an error.
func FuzzParse(f *testing.F) {
	a := upstreamtest.NewAuthority(f, upstreamtest.Good)
	text := string(upstreamtest.PEM(a.Issuer))
	f.Add(text, base64.StdEncoding.EncodeToString(a.Root.Raw))
	f.Add(base64.StdEncoding.EncodeToString([]byte(text)), "")
	f.Add(text+text, "%")
	f.Fuzz(func(t *testing.T, first, second string) {
		all, err := parse([]string{first, second})
		if err != nil {
			return
		}
		if len(all) == 0 {
			t.Error("no certificate, and no error")
		}
		for _, c := range all {
			if len(c.Raw) > upstream.MaxCertificate {
				t.Errorf("a certificate of %d bytes", len(c.Raw))
			}
		}
	})
}
