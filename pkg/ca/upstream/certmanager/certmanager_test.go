package certmanager

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/ca/upstream"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

// How it gets along with a real API server is in test/certmanager.

// kubeconfig is that of an API server that answers with handler.
func kubeconfig(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewTLSServer(handler)
	t.Cleanup(server.Close)
	return kubeapi.Kubeconfig(t, server)
}

func open(t *testing.T, handler http.HandlerFunc) *CA {
	t.Helper()
	c := Config{Kubeconfig: kubeconfig(t, handler), Namespace: "mesh"}
	c.Issuer.Name = "mesh"
	ca, err := New(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestRateLimited(t *testing.T) {
	ca := open(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	_, err := upstreamtest.Mint(t.Context(), t, ca)
	limit, ok := errors.AsType[*upstream.RateLimitError](err)
	if !ok || limit.RetryAfter != upstreamtest.RetryAfter {
		t.Errorf("%v", err)
	}
}

// Of what others have left, the old is deleted, and only so much of it.
func TestAbandoned(t *testing.T) {
	item := func(name string, age time.Duration) map[string]any {
		return map[string]any{"metadata": map[string]any{"name": name, "uid": "uid-of-" + name, "creationTimestamp": time.Now().Add(-age).UTC().Format(time.RFC3339)}}
	}
	items := []any{item("meshid-of-another-process", time.Minute)}
	for i := range maxAbandoned + 1 {
		items = append(items, item(fmt.Sprint("meshid-old-", i), 2*time.Hour))
	}
	var mu sync.Mutex // guards deleted
	var deleted []string
	ca := open(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch r.Method {
		case http.MethodGet:
			if got := r.URL.Query().Get("labelSelector"); got != "app.kubernetes.io/managed-by=meshid" {
				t.Errorf("all of %q are listed", got)
			}
			if err := json.NewEncoder(w).Encode(map[string]any{"kind": "CertificateRequestList", "apiVersion": "cert-manager.io/v1", "metadata": map[string]any{}, "items": items}); err != nil {
				t.Error(err)
			}
		case http.MethodDelete:
			body, err := io.ReadAll(r.Body)
			name := filepath.Base(r.URL.Path)
			if err != nil || !strings.Contains(string(body), "uid-of-"+name) {
				t.Errorf("%s is deleted, whoever it is by now: %s", name, body)
			}
			mu.Lock()
			defer mu.Unlock()
			deleted = append(deleted, name)
			_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Success"}`)
		default:
			w.WriteHeader(http.StatusForbidden)
		}
	})
	if _, err := upstreamtest.Mint(t.Context(), t, ca); !errors.Is(err, upstream.ErrDenied) {
		t.Errorf("%v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(deleted) != maxAbandoned || slices.Contains(deleted, "meshid-of-another-process") {
		t.Errorf("%d deleted: %v", len(deleted), deleted)
	}
}

func TestOutcome(t *testing.T) {
	ready := func(status, reason string) kube.Condition {
		return kube.Condition{Type: "Ready", Status: status, Reason: reason, Message: "why"}
	}
	approved := kube.Condition{Type: "Approved", Status: "True", Reason: "cert-manager.io"}
	for _, c := range []struct {
		name   string
		all    []kube.Condition
		issued bool
		want   error
	}{
		{"new", nil, false, nil},
		{"approved", []kube.Condition{approved}, false, nil},
		{"pending", []kube.Condition{approved, ready("False", "Pending")}, false, nil},
		{"unknown", []kube.Condition{ready("Unknown", "Pending")}, false, nil},
		{"issued", []kube.Condition{approved, ready("True", "Issued")}, true, nil},
		{"failed", []kube.Condition{approved, ready("False", "Failed")}, false, upstream.ErrUnavailable},
		{"denied", []kube.Condition{{Type: "Denied", Status: "True"}, ready("False", "Denied")}, false, upstream.ErrDenied},
		{"denied by an issuer", []kube.Condition{ready("False", "Denied")}, false, upstream.ErrDenied},
		{"invalid", []kube.Condition{{Type: "InvalidRequest", Status: "True"}, ready("False", "Pending")}, false, upstream.ErrDenied},
		{"issued after it was denied", []kube.Condition{ready("True", "Issued"), {Type: "Denied", Status: "True"}}, false, upstream.ErrDenied},
	} {
		issued, err := outcome(c.all)
		if issued != c.issued || !errors.Is(err, c.want) {
			t.Errorf("%s: %v, %v", c.name, issued, err)
		}
	}
}

func TestNew(t *testing.T) {
	good := kubeconfig(t, http.NotFound)
	for _, c := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"no namespace", func(c *Config) { c.Namespace = "" }, "namespace: "},
		{"a path for a namespace", func(c *Config) { c.Namespace = "a/b" }, "namespace: "},
		{"no issuer", func(c *Config) { c.Issuer.Name = "" }, "issuer.name: "},
		{"a kind that is none", func(c *Config) { c.Issuer.Kind = "cluster-issuer" }, "issuer.kind: "},
		{"a kind of somebody else", func(c *Config) { c.Issuer.Kind = "StepIssuer" }, "or issuer.group"},
		{"a group that is none", func(c *Config) { c.Issuer.Group = "Example/v1" }, "issuer.group: "},
		{"no kubeconfig", func(c *Config) { c.Kubeconfig = "/none" }, "kubeconfig"},
		{"no such context", func(c *Config) { c.Context = "prod" }, `no context "prod"`},
		{"a context of nothing", func(c *Config) { c.Kubeconfig, c.Context = "", "prod" }, "write kubeconfig"},
		{"not in a pod", func(c *Config) { c.Kubeconfig = "" }, "give it a kubeconfig"},
		{"no roots", func(c *Config) { c.Roots = "/none" }, "roots: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := Config{Kubeconfig: good, Namespace: "mesh"}
			config.Issuer.Name = "mesh"
			c.change(&config)
			if _, err := New(config, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}
