package kube

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// kubeconfig writes the kubeconfig of a server that speaks TLS, and returns its path and
// that of the token file that it names.
func kubeconfig(t *testing.T, server *httptest.Server) (path, token string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	write("token", "secret-1")
	write("config", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: ca.pem}}]
users: [{name: u, user: {tokenFile: token}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, server.URL))
	return filepath.Join(dir, "config"), filepath.Join(dir, "token")
}

// open returns a client of a server that answers with handler.
func open(t *testing.T, handler http.HandlerFunc) *Client {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	path, _ := kubeconfig(t, server)
	c, err := Open(Config{Name: "prod", Kubeconfig: path, UserAgent: "ca/1"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The requests are those that the API's conventions write.
func TestRequests(t *testing.T) {
	type seen struct{ method, uri, kind, body, agent, auth string }
	var got seen
	c := open(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got = seen{r.Method, r.URL.RequestURI(), r.Header.Get("Content-Type"), string(body), r.UserAgent(), r.Header.Get("Authorization")}
		fmt.Fprint(w, `{"metadata":{"resourceVersion":"7","continue":"next"},"items":[{"n":1},{"n":2}]}`)
	})
	pods := Resource{Version: "v1", Plural: "pods"}
	csrs := Resource{Group: "certificates.k8s.io", Version: "v1", Plural: "certificatesigningrequests"}
	var page Page[struct{ N int }]
	object := map[string]string{"kind": "X"}
	for _, test := range []struct {
		call                    func() error
		method, uri, kind, body string
	}{
		{func() error { return c.Get(t.Context(), Path{Resource: pods, Namespace: "shop", Name: "web"}, &page) }, "GET", "/api/v1/namespaces/shop/pods/web", "", ""},
		{func() error { return c.List(t.Context(), Path{Resource: pods}, Selection{}, &page) }, "GET", "/api/v1/pods", "", ""},
		{func() error {
			return c.List(t.Context(), Path{Resource: pods}, Selection{Labels: "a=b", Fields: "c=d", Limit: 5, Continue: "e"}, &page)
		}, "GET", "/api/v1/pods?continue=e&fieldSelector=c%3Dd&labelSelector=a%3Db&limit=5", "", ""},
		{func() error { return c.Create(t.Context(), Path{Resource: csrs}, object, nil) }, "POST", "/apis/certificates.k8s.io/v1/certificatesigningrequests", "application/json", `{"kind":"X"}`},
		{func() error { return c.Apply(t.Context(), Path{Resource: csrs, Name: "one"}, object, nil) }, "PATCH", "/apis/certificates.k8s.io/v1/certificatesigningrequests/one?fieldManager=meshid&force=true", "application/apply-patch+yaml", `{"kind":"X"}`},
		{func() error { return c.Merge(t.Context(), Path{Resource: csrs, Name: "one"}, object, nil) }, "PATCH", "/apis/certificates.k8s.io/v1/certificatesigningrequests/one", "application/merge-patch+json", `{"kind":"X"}`},
		{func() error { return c.Delete(t.Context(), Path{Resource: csrs, Name: "one"}, "u") }, "DELETE", "/apis/certificates.k8s.io/v1/certificatesigningrequests/one", "application/json", `{"apiVersion":"v1","kind":"DeleteOptions","preconditions":{"uid":"u"}}`},
	} {
		if err := test.call(); err != nil {
			t.Fatal(err)
		}
		if want := (seen{test.method, test.uri, test.kind, test.body, "ca/1", "Bearer secret-1"}); got != want {
			t.Errorf("sent %+v, want %+v", got, want)
		}
	}
	if page.Metadata.ResourceVersion != "7" || page.Metadata.Continue != "next" || len(page.Items) != 2 || page.Items[1].N != 2 {
		t.Errorf("read %+v", page)
	}
}

func TestErrors(t *testing.T) {
	var code int
	var reason, body string
	c := open(t, func(w http.ResponseWriter, _ *http.Request) {
		if code == http.StatusTooManyRequests {
			w.Header().Set("Retry-After", "7")
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		if body != "" {
			fmt.Fprint(w, body)
			return
		}
		if err := json.NewEncoder(w).Encode(map[string]any{
			"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "the server says so",
		}); err != nil {
			t.Error(err)
		}
	})
	for _, test := range []struct {
		code         int
		reason, body string
		kind         error
		after        time.Duration
	}{
		{401, "Unauthorized", "", ErrDenied, 0},
		{403, "Forbidden", "", ErrDenied, 0},
		{404, "NotFound", "", ErrNotFound, 0},
		{409, "AlreadyExists", "", ErrExists, 0},
		{409, "Conflict", "", ErrConflict, 0},
		{422, "Invalid", "", ErrInvalid, 0},
		{400, "BadRequest", "", ErrInvalid, 0},
		{429, "TooManyRequests", "", ErrLimited, 7 * time.Second},
		{500, "InternalError", "", ErrUnavailable, 0},
		{503, "ServiceUnavailable", "", ErrUnavailable, 0},
		{502, "", "<html>a proxy's own words</html>", ErrUnavailable, 0},
		{403, "", "no", ErrDenied, 0},
		{200, "", `{"not": "an object`, ErrUnavailable, 0},
	} {
		code, reason, body = test.code, test.reason, test.body
		err := c.Get(t.Context(), Path{Resource: Resource{Group: "g.io", Version: "v1", Plural: "things"}, Namespace: "shop", Name: "web"}, &struct{}{})
		e, ok := errors.AsType[*Error](err)
		if !ok || !errors.Is(err, test.kind) || e.RetryAfter != test.after {
			t.Errorf("%d %s: %v, retry after %v; want %v, %v", test.code, test.reason, err, e.RetryAfter, test.kind, test.after)
			continue
		}
		if !strings.HasPrefix(err.Error(), "get things.g.io shop web in cluster prod: ") {
			t.Errorf("%d: the error is %q", test.code, err)
		}
	}
	server := httptest.NewTLSServer(http.NotFoundHandler())
	path, _ := kubeconfig(t, server)
	server.Close()
	c, err := Open(Config{Kubeconfig: path})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Get(t.Context(), Path{Resource: Resource{Version: "v1", Plural: "pods"}}, nil); !errors.Is(err, ErrUnavailable) {
		t.Errorf("nobody listens: %v", err)
	}
}

// answering is a RoundTripper that answers without end.
type answering struct{}

func (answering) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{Body: io.NopCloser(endless{})}, nil
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// An answer without end does not fill the memory; a watch has none.
func TestAnswerIsBounded(t *testing.T) {
	for uri, ends := range map[string]bool{"https://k/api/v1/pods": true, "https://k/api/v1/pods?watch=true": false} {
		req := httptest.NewRequest(http.MethodGet, uri, nil)
		answer, err := bounded{answering{}}.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.CopyN(io.Discard, answer.Body, maxResponse+1)
		if ends != (err != nil && n == maxResponse && strings.Contains(err.Error(), "larger than 64 MiB")) {
			t.Errorf("%s: %d bytes, %v", uri, n, err)
		}
		if err := answer.Body.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	config := func(cluster string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {%s}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nusers: [{name: u}]\ncurrent-context: x\n", cluster)
	}
	for name, test := range map[string]struct{ text, context, want string }{
		"not verified": {config("server: 'https://k', insecure-skip-tls-verify: true"), "", "certificate-authority"},
		"without TLS":  {config("server: 'http://10.0.0.1'"), "", "write https"},
		"context":      {config("server: 'https://k'"), "other", `no context "other": write one of x`},
		"not YAML":     {"{", "", "kubeconfig"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "config")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(Config{Kubeconfig: path, Context: test.context}); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := Open(Config{}); err == nil || !strings.Contains(err.Error(), "give it a kubeconfig") {
		t.Errorf("outside of a cluster: %v", err)
	}
	if _, err := Open(Config{Kubeconfig: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	path := filepath.Join(t.TempDir(), "proxy")
	if err := os.WriteFile(path, []byte(config("server: 'http://127.0.0.1:8001'")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Kubeconfig: path}); err != nil {
		t.Errorf("kubectl proxy on this machine: %v", err)
	}
}
