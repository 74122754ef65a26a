package k8scsr

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

// How it gets along with a real API server is in test/k8scsr.

// settings are those for an API server that answers with handler.
func settings(t *testing.T, handler http.HandlerFunc) Config {
	t.Helper()
	server := httptest.NewTLSServer(handler)
	t.Cleanup(server.Close)
	return Config{
		Kubeconfig: kubeapi.Kubeconfig(t, server), Signer: "example.org/mesh",
		Roots: Roots{File: upstreamtest.File(t, "roots.pem", upstreamtest.PEM(upstreamtest.NewAuthority(t, upstreamtest.Good).Root))},
	}
}

func TestRateLimited(t *testing.T) {
	ca, err := New(settings(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusTooManyRequests)
	}), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	_, err = upstreamtest.Mint(t.Context(), t, ca)
	limit, ok := errors.AsType[*upstream.RateLimitError](err)
	if !ok || limit.RetryAfter != upstreamtest.RetryAfter {
		t.Errorf("%v", err)
	}
}

// What is asked for, of cert-manager and of others.
func TestDescribe(t *testing.T) {
	certManager := func(isCA string) map[string]string {
		return map[string]string{"experimental.cert-manager.io/request-is-ca": isCA, "experimental.cert-manager.io/request-duration": "24h0m0s", "team": "mesh"}
	}
	for signer, want := range map[string]map[string]string{
		"example.org/mesh":                     {"team": "mesh"},
		"clusterissuers.cert-manager.io/mesh":  certManager("true"),
		"issuers.cert-manager.io/meshid.mesh":  certManager("true"),
		"myissuers.cert-manager.io/meshid.one": {"team": "mesh"},
	} {
		s := &CA{config: Config{Signer: signer, Annotations: map[string]string{"team": "mesh"}}, mine: "me"}
		got := s.describe(&upstream.Request{CSR: []byte("x"), TTL: 24 * time.Hour}, true, []string{"cert sign"})
		if diff := cmp.Diff(want, got.Metadata.Annotations); diff != "" {
			t.Errorf("%s: %s", signer, diff)
		}
		if got.Spec.SignerName != signer || got.Spec.ExpirationSeconds != 86400 || got.Metadata.Labels[process] != "me" {
			t.Errorf("%s: %+v", signer, got)
		}
	}
	s := &CA{config: Config{Signer: "clusterissuers.cert-manager.io/mesh", Annotations: map[string]string{"team": "mesh"}}}
	leaf := s.describe(&upstream.Request{TTL: 24 * time.Hour}, false, nil)
	if diff := cmp.Diff(certManager("false"), leaf.Metadata.Annotations); diff != "" {
		t.Errorf("a leaf: %s", diff)
	}
}

func TestOutcome(t *testing.T) {
	is := func(kind, reason string) kube.Condition {
		return kube.Condition{Type: kind, Status: "True", Reason: reason, Message: strings.Repeat("why ", 1000)}
	}
	certificate := []byte("certificate")
	for _, c := range []struct {
		name   string
		status status
		issued bool
		want   error
	}{
		{"new", status{}, false, nil},
		{"approved", status{Conditions: []kube.Condition{is("Approved", "")}}, false, nil},
		{"issued", status{[]kube.Condition{is("Approved", "")}, certificate}, true, nil},
		{"denied", status{Conditions: []kube.Condition{is("Denied", "")}}, false, upstream.ErrDenied},
		{"failed", status{Conditions: []kube.Condition{is("Approved", ""), is("Failed", "SigningError")}}, false, upstream.ErrUnavailable},
		{"failed for a permission", status{Conditions: []kube.Condition{is("Approved", ""), is("Failed", "DeniedReference")}}, false, upstream.ErrDenied},
		{"issued and denied", status{[]kube.Condition{is("Denied", "")}, certificate}, false, upstream.ErrDenied},
		{"not failed", status{[]kube.Condition{{Type: "Failed", Status: "False"}}, certificate}, true, nil},
	} {
		issued, err := (&request{Status: c.status}).outcome()
		if (issued != nil) != c.issued || !errors.Is(err, c.want) {
			t.Errorf("%s: %q, %v", c.name, issued, err)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%s: the error has %d bytes", c.name, len(err.Error()))
		}
	}
}

// A request is gone only if it was seen: a list may be older than the request.
func TestWatch(t *testing.T) {
	named := func(name string) *request {
		return &request{Object: kube.Object{Metadata: kube.Meta{Name: name}}}
	}
	a, b := &waiter{changed: make(chan struct{}, 1)}, &waiter{changed: make(chan struct{}, 1)}
	w := watch{waiting: map[string]*waiter{"a": a, "b": b}}
	w.Replace([]*request{named("a"), named("of another")})
	if _, gone := w.state(b); a.last == nil || b.last != nil || gone || len(a.changed) != 1 || len(b.changed) != 0 {
		t.Errorf("%+v, %+v", a, b)
	}
	w.Replace([]*request{named("b")})
	if _, gone := w.state(a); !gone || b.last == nil || b.gone {
		t.Errorf("%+v, %+v", a, b)
	}
	w.Delete(named("b"))
	if _, gone := w.state(b); !gone {
		t.Errorf("%+v", b)
	}
}

func TestNew(t *testing.T) {
	good := settings(t, http.NotFound)
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no signer", func(c *Config) { c.Signer = "" }, "signer: "},
		{"a signer without a domain", func(c *Config) { c.Signer = "mesh" }, "signer: "},
		{"a signer of Kubernetes", func(c *Config) { c.Signer = "kubernetes.io/kube-apiserver-client" }, "name another"},
		{"no kubeconfig", func(c *Config) { c.Kubeconfig = "/none" }, "kubeconfig"},
		{"a context of nothing", func(c *Config) { c.Kubeconfig, c.Context = "", "prod" }, "write kubeconfig"},
		{"no such context", func(c *Config) { c.Context = "prod" }, `no context "prod"`},
		{"not in a pod", func(c *Config) { c.Kubeconfig = "" }, "give it a kubeconfig"},
		{"a bad annotation", func(c *Config) { c.Annotations = map[string]string{"a b": ""} }, "annotations: "},
		{"no roots", func(c *Config) { c.Roots = Roots{} }, "roots: "},
		{"roots twice", func(c *Config) { c.Roots.TrustBundle = "mesh" }, "write one of"},
		{"no file of roots", func(c *Config) { c.Roots.File = "/none" }, "roots.file: "},
		{"no namespace", func(c *Config) { c.Roots = Roots{ConfigMap: ConfigMap{Name: "roots"}} }, "roots.config_map.namespace: "},
		{"no name", func(c *Config) { c.Roots = Roots{ConfigMap: ConfigMap{Namespace: "meshid"}} }, "roots.config_map.name: "},
		{"no key", func(c *Config) {
			c.Roots = Roots{ConfigMap: ConfigMap{Namespace: "meshid", Name: "roots", Key: "a/b"}}
		}, "roots.config_map.key: "},
		{"a bad bundle", func(c *Config) { c.Roots = Roots{TrustBundle: "a/b"} }, "roots.trust_bundle: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := good
			c.change(&config)
			if _, err := New(config, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
	for _, roots := range []Roots{{TrustBundle: "example.org:mesh:roots"}, {ConfigMap: ConfigMap{Namespace: "meshid", Name: "roots"}}} {
		config := good
		config.Roots = roots
		if _, err := New(config, slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
	}
}
