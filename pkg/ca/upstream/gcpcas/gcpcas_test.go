package gcpcas

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	fake "github.com/meshid/meshid/test/fakes/gcpcas"
)

// start returns a fake with the configuration of a client.
func start(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*fake.Server, Config) {
	t.Helper()
	s := fake.New(t, a, b)
	return s, Config{Pool: fake.Pool, Endpoint: s.URL, ServerCA: upstreamtest.File(t, "ca.pem", s.CA), CredentialsFile: upstreamtest.File(t, "key.json", s.Key)}
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			_, c := start(t, b, a)
			c.CertificateAuthority = fake.Authority
			return upstreamtest.Open(t, New, c)
		},
	})
}

func TestPermissions(t *testing.T) {
	for _, permission := range fake.Permissions {
		s, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
		s.Granted = slices.DeleteFunc(slices.Clone(fake.Permissions), func(p string) bool { return p == permission })
		_, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
		if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), permission) {
			t.Errorf("without %s: %v", permission, err)
		}
	}
}

// A CA that is not in the pool, and an account whose key is not valid any more.
func TestRefusals(t *testing.T) {
	_, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	c.CertificateAuthority = "root-2"
	if _, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c)); !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "root-2") {
		t.Errorf("%v", err)
	}
	server, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	server.ChangeKey()
	_, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
	if err == nil || !strings.Contains(err.Error(), "Invalid JWT Signature") {
		t.Errorf("%v", err)
	}
	if err != nil && strings.Contains(err.Error(), "PRIVATE") {
		t.Error("the error holds the key")
	}
}

// The request is the same if it is made again.
func TestRequestID(t *testing.T) {
	if got := requestID([32]byte{1, 2, 3, 4, 5, 6, 0xff, 8, 0xff}); got != "01020304-0506-8f08-bf00-000000000000" {
		t.Error(got)
	}
}

func TestNew(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	external := write("external.json", `{"type":"external_account","credential_source":{"executable":{"command":"/bin/true"}}}`, 0o600)
	open := write("open.json", `{"type":"service_account"}`, 0o644)
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no pool", func(c *Config) { c.Pool = "" }, "projects/PROJECT"},
		{"a CA for the pool", func(c *Config) { c.Pool += "/certificateAuthorities/x" }, "projects/PROJECT"},
		{"a name for the CA", func(c *Config) { c.CertificateAuthority = fake.Pool }, "last part"},
		{"plain HTTP", func(c *Config) { c.Endpoint = "http://localhost" }, "https://host"},
		{"no credentials", func(c *Config) { c.CredentialsFile = "/none" }, "credentials_file"},
		{"credentials that run a program", func(c *Config) { c.CredentialsFile = external }, "not the key of a service account"},
		{"readable by all", func(c *Config) { c.CredentialsFile = open }, "credentials_file"},
		{"no CA file", func(c *Config) { c.ServerCA = "/none" }, "server_ca"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := Config{Pool: fake.Pool}
			c.change(&config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}
