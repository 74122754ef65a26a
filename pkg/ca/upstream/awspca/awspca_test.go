package awspca

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	fake "github.com/meshid/meshid/test/fakes/awspca"
)

// start returns a fake with the configuration of a client, whose credentials are in
// the environment.
func start(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) (*fake.Server, Config) {
	t.Helper()
	s := fake.New(t, a, b)
	path := upstreamtest.File(t, "ca.pem", s.CA)
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": fake.AccessKey, "AWS_SECRET_ACCESS_KEY": fake.SecretKey, "AWS_SESSION_TOKEN": "",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_EC2_METADATA_DISABLED": "true", "AWS_PROFILE": "",
	} {
		t.Setenv(name, value)
	}
	return s, Config{CertificateAuthority: fake.ARN, Endpoint: s.URL, ServerCA: path}
}

func TestConformance(t *testing.T) {
	upstreamtest.Run(t, upstreamtest.Kind{
		Start: func(t *testing.T, b upstreamtest.Behaviour, a *upstreamtest.Authority) upstream.CA {
			_, c := start(t, b, a)
			return upstreamtest.Open(t, New, c)
		},
	})
}

// The calls that an intermediate takes, and what is said when one is not allowed.
func TestPermissions(t *testing.T) {
	s, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	c.Endpoint += "/" // as people copy it
	if _, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c)); err != nil {
		t.Fatal(err)
	}
	if got, want := s.Calls(), []string{"DescribeCertificateAuthority", "IssueCertificate", "GetCertificate", "GetCertificate"}; !slices.Equal(got, want) {
		t.Errorf("calls %v, want %v", got, want)
	}
	for _, action := range fake.Actions {
		s, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
		s.Allowed = slices.DeleteFunc(slices.Clone(fake.Actions), func(a string) bool { return a == action })
		_, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
		if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "acm-pca:"+action) {
			t.Errorf("without %s: %v", action, err)
		}
	}
}

func TestCredentials(t *testing.T) {
	for name, c := range map[string]struct {
		variable, value string
		want            error
		says            string
	}{
		"none":         {"AWS_ACCESS_KEY_ID", "", upstream.ErrUnavailable, "credentials"},
		"unknown":      {"AWS_ACCESS_KEY_ID", "AKIAUNKNOWN", upstream.ErrDenied, "UnrecognizedClientException"},
		"wrong secret": {"AWS_SECRET_ACCESS_KEY", strings.Repeat("wrong", 8), upstream.ErrDenied, "InvalidSignatureException"},
		"short secret": {"AWS_SECRET_ACCESS_KEY", "short", upstream.ErrUnavailable, "too short"},
	} {
		t.Run(name, func(t *testing.T) {
			_, config := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
			t.Setenv(c.variable, c.value)
			_, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, config))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v", err)
			}
			if err != nil && strings.Contains(err.Error(), fake.SecretKey) {
				t.Error("the error holds the secret")
			}
		})
	}
}

func TestCAThatIsNotActive(t *testing.T) {
	s, c := start(t, upstreamtest.Good, upstreamtest.NewAuthority(t, upstreamtest.Good))
	s.Status = "DISABLED"
	_, err := upstreamtest.Mint(t.Context(), t, upstreamtest.Open(t, New, c))
	if !errors.Is(err, upstream.ErrDenied) || !strings.Contains(err.Error(), "DISABLED") {
		t.Errorf("%v", err)
	}
}

func TestNew(t *testing.T) {
	good := Config{CertificateAuthority: fake.ARN}
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no ARN", func(c *Config) { c.CertificateAuthority = "" }, "list-certificate-authorities"},
		{"ARN of a certificate", func(c *Config) { c.CertificateAuthority += "/certificate/1" }, "list-certificate-authorities"},
		{"plain HTTP", func(c *Config) { c.Endpoint = "http://localhost" }, "https://host"},
		{"a path", func(c *Config) { c.Endpoint = "https://localhost/x" }, "https://host"},
		{"no role", func(c *Config) { c.AssumeRole = "meshid" }, "assume_role_arn"},
		{"no file", func(c *Config) { c.ServerCA = "/none" }, "server_ca"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := good
			c.change(&config)
			if _, err := New(config); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
	china, err := New(Config{CertificateAuthority: strings.NewReplacer("arn:aws:", "arn:aws-cn:", "eu-central-1", "cn-north-1").Replace(fake.ARN)})
	if err != nil {
		t.Fatal(err)
	}
	if china.endpoint != "https://acm-pca.cn-north-1.amazonaws.com.cn" || china.template != "arn:aws-cn:acm-pca:::template/"+DefaultTemplate {
		t.Errorf("endpoint %s, template %s", china.endpoint, china.template)
	}
}
