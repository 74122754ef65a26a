package mesh

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/test/require"
)

// The bootstraps in deploy/envoy are the ones that the demo runs, and a real
// Envoy accepts them.
func TestSpec_S41_ShippedBootstraps(t *testing.T) {
	for file, sds := range map[string]string{"sidecar.yaml": SDSDelta, "sidecar-sotw.yaml": SDSStateOfTheWorld} {
		t.Run(file, func(t *testing.T) {
			var want bytes.Buffer
			if err := ExampleBootstrap(sds).Write(&want); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(filepath.Join("..", "..", "..", "deploy", "envoy", file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want.String(), string(got)); diff != "" {
				t.Errorf("deploy/envoy/%s is old: run `make generate` (-want +got):\n%s", file, diff)
			}
			envoy := require.Envoy(t)
			dir := t.TempDir()
			var endpoints bytes.Buffer
			if err := WriteEndpoints(&endpoints, "stock", 1, []Endpoint{{"192.0.2.1", inboundPort}, {"192.0.2.2", inboundPort}}); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "stock.yaml"), endpoints.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			// The folder of the endpoints must be there for Envoy to accept it.
			text := strings.ReplaceAll(want.String(), "/etc/envoy/endpoints", dir)
			path := filepath.Join(dir, "sidecar.yaml")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), envoy, "--mode", "validate", "--config-path", path).CombinedOutput()
			if err != nil {
				t.Fatalf("envoy: %v\n%s", err, out)
			}
		})
	}
}

func TestWriteEndpoints(t *testing.T) {
	var none bytes.Buffer
	if err := WriteEndpoints(&none, "orders", 7, nil); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(none.String(), "  - lb_endpoints: []\n") {
		t.Errorf("endpoints of a service without instances:\n%s", none.String())
	}
}

// The last parts of the types that lint knows.
const (
	downstreamTLS = "tls.v3.DownstreamTlsContext"
	upstreamTLS   = "tls.v3.UpstreamTlsContext"
)

// linter collects what a bootstrap lacks.
type linter struct {
	problems               []string
	downstreams, upstreams int
}

// lint checks that a bootstrap bounds how long a peer without a valid certificate
// is let in, and that it names its peers.
func lint(text []byte) (*linter, error) {
	var root map[string]any
	if err := yaml.Unmarshal(text, &root); err != nil {
		return nil, err
	}
	l := &linter{}
	l.walk("", root)
	clusters, _ := at(root, "static_resources", "clusters").([]any)
	for i, c := range clusters {
		for _, key := range []string{"transport_socket", "transport_socket_matches"} {
			l.noADS(fmt.Sprintf("static_resources.clusters[%d].%s", i, key), at(c, key))
		}
	}
	return l, nil
}

// at descends by keys; what is missing is nil.
func at(value any, keys ...string) any {
	for _, k := range keys {
		m, _ := value.(map[string]any)
		value = m[k]
	}
	return value
}

// isType says whether a value has a type whose name ends so.
func isType(value any, suffix string) bool {
	name, _ := at(value, "@type").(string)
	return strings.HasSuffix(name, suffix)
}

func (l *linter) add(path, problem string) {
	l.problems = append(l.problems, strings.TrimPrefix(path, ".")+": "+problem)
}

func (l *linter) require(ok bool, path, problem string) {
	if !ok {
		l.add(path, problem)
	}
}

// walk checks everything below a value, in whichever place it stands.
func (l *linter) walk(path string, value any) {
	switch value := value.(type) {
	case []any:
		for i, v := range value {
			l.walk(fmt.Sprintf("%s[%d]", path, i), v)
		}
	case map[string]any:
		socket := at(value, "transport_socket", "typed_config")
		switch {
		case isType(value, downstreamTLS):
			l.downstreams++
			l.downstream(path, value)
		case isType(value, upstreamTLS):
			l.upstreams++
			l.upstream(path, value)
		case isType(socket, downstreamTLS):
			l.filters(path, value["filters"])
		case isType(socket, upstreamTLS):
			options := at(value, "typed_extension_protocol_options", "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"common_http_protocol_options")
			l.bounds(path, options)
		}
		for _, k := range slices.Sorted(maps.Keys(value)) {
			l.walk(path+"."+k, value[k])
		}
	}
}

func (l *linter) downstream(path string, context map[string]any) {
	for _, k := range []string{"require_client_certificate", "disable_stateless_session_resumption", "disable_stateful_session_resumption"} {
		l.require(context[k] == true, path, k)
	}
	l.peers(path, context)
}

func (l *linter) upstream(path string, context map[string]any) {
	l.require(fmt.Sprint(context["max_session_keys"]) == "0", path, "max_session_keys")
	l.require(at(context, "common_tls_context", "tls_params", "tls_maximum_protocol_version") == "TLSv1_3", path, "tls_maximum_protocol_version")
	l.peers(path, context)
}

// peers checks that the roots come from SDS and that peers are named as well.
func (l *linter) peers(path string, context map[string]any) {
	combined := at(context, "common_tls_context", "combined_validation_context")
	l.require(at(combined, "validation_context_sds_secret_config", "name") != nil, path, "validation_context_sds_secret_config")
	matchers, _ := at(combined, "default_validation_context", "match_typed_subject_alt_names").([]any)
	l.require(len(matchers) > 0, path, "match_typed_subject_alt_names")
	for _, m := range matchers {
		exact, _ := at(m, "matcher", "exact").(string)
		l.require(at(m, "san_type") == "URI" && strings.HasPrefix(exact, "spiffe://"), path, "san_type")
	}
}

// filters checks the network filters behind a TLS context.
func (l *linter) filters(path string, filters any) {
	chain, _ := filters.([]any)
	found := false
	for _, f := range chain {
		if c := at(f, "typed_config"); isType(c, ".HttpConnectionManager") {
			found = true
			l.bounds(path, at(c, "common_http_protocol_options"))
		}
	}
	l.require(found, path, "no filter whose connections are bounded")
}

// bounds checks how long a connection may live: max_connection_duration waits for
// open requests.
func (l *linter) bounds(path string, options any) {
	for _, k := range []string{"max_connection_duration", "max_stream_duration"} {
		l.require(bounded(at(options, k)), path, k)
	}
}

// bounded says whether a value is a duration above 0.
func bounded(value any) bool {
	text, _ := value.(string)
	d, err := time.ParseDuration(text)
	return err == nil && d > 0
}

// noADS refuses a source of secrets that Envoy crashes with.
func (l *linter) noADS(path string, value any) {
	switch value := value.(type) {
	case []any:
		for i, v := range value {
			l.noADS(fmt.Sprintf("%s[%d]", path, i), v)
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(value)) {
			if k == "ads" {
				l.add(path, "ads on a static cluster")
			}
			l.noADS(path+"."+k, value[k])
		}
	}
}

// bootstraps returns the bootstraps in deploy/envoy, and each kind that the shop
// generates.
func bootstraps(t *testing.T) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	files, err := filepath.Glob(filepath.Join(require.Repository(), "deploy", "envoy", "*.y*ml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if all[filepath.Base(f)], err = os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < 2 {
		t.Fatalf("%d bootstraps in deploy/envoy", len(all))
	}
	for _, sds := range []string{SDSDelta, SDSStateOfTheWorld} {
		both := ExampleBootstrap(sds)
		both.Example, both.RequestsPerConnection = false, 1
		both.AllowedClients = append(both.AllowedClients, "spiffe://example.org/app/admin")
		both.Upstreams = append(both.Upstreams, Upstream{Service: "mail", ServerID: "spiffe://example.org/app/mail", LocalPort: 9002})
		first, last := both, both
		first.AllowedClients, last.Upstreams = nil, nil
		for name, b := range map[string]Bootstrap{"first": first, "between": both, "last": last} {
			var text bytes.Buffer
			if err := b.Write(&text); err != nil {
				t.Fatal(err)
			}
			all["generated, "+name+", "+sds] = text.Bytes()
		}
	}
	return all
}

// TestV_H1_Bootstraps: no bootstrap that we ship lets a peer stay, or come back,
// whose certificate has expired.
func TestV_H1_Bootstraps(t *testing.T) {
	for name, text := range bootstraps(t) {
		l, err := lint(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range l.problems {
			t.Errorf("%s: %s", name, p)
		}
		downstreams, upstreams := bytes.Count(text, []byte(downstreamTLS)), bytes.Count(text, []byte(upstreamTLS))
		if l.downstreams != downstreams || l.upstreams != upstreams || downstreams+upstreams == 0 {
			t.Errorf("%s: %d of %d and %d of %d TLS contexts seen", name, l.downstreams, downstreams, l.upstreams, upstreams)
		}
	}
}

// TestV_H1_LintRefuses: the check would notice, in each place.
func TestV_H1_LintRefuses(t *testing.T) {
	text := example(t)
	for _, row := range []struct{ old, new, want string }{
		{"disable_stateless_session_resumption: true", "", "disable_stateless_session_resumption"},
		{"disable_stateful_session_resumption: true", "disable_stateful_session_resumption: false", "disable_stateful_session_resumption"},
		{"require_client_certificate: true", "", "require_client_certificate"},
		{"max_connection_duration: 3600s, ", "", "max_connection_duration"},
		{"max_connection_duration: 3600s", "max_connection_duration: 0s", "max_connection_duration"},
		{", max_stream_duration: 3600s", "", "max_stream_duration"},
		{"max_session_keys: 0", "max_session_keys: 1", "max_session_keys"},
		{", tls_maximum_protocol_version: TLSv1_3", "", "tls_maximum_protocol_version"},
		{`{ san_type: URI, matcher: { exact: "spiffe://example.org/app/web" } }`, `{ san_type: DNS, matcher: { exact: "web" } }`, "san_type"},
		{`[ { san_type: URI, matcher: { exact: "spiffe://example.org/app/stock" } } ]`, "[]", "match_typed_subject_alt_names"},
		{"combined_validation_context:", "other:", "match_typed_subject_alt_names"},
		{"validation_context_sds_secret_config:", "other:", "validation_context_sds_secret_config"},
		{"http_connection_manager.v3.HttpConnectionManager\n          stat_prefix: inbound", "tcp_proxy.v3.TcpProxy\n          stat_prefix: inbound", "no filter whose connections are bounded"},
	} {
		parts := strings.Split(text, row.old)
		if len(parts) == 1 {
			t.Errorf("no %q in the bootstrap", row.old)
		}
		for n := range len(parts) - 1 {
			changed := strings.Join(parts[:n+1], row.old) + row.new + strings.Join(parts[n+1:], row.old)
			if problems := lintProblems(t, changed); !slices.ContainsFunc(problems, func(p string) bool { return strings.HasSuffix(p, ": "+row.want) }) {
				t.Errorf("place %d, %q for %q: problems %q, want %q", n, row.new, row.old, problems, row.want)
			}
		}
	}
}

// TestSpec_S40_LintRefusesADS: on a static cluster; a listener may have it.
func TestSpec_S40_LintRefusesADS(t *testing.T) {
	text := example(t)
	begin := strings.Index(text, "api_config_source:")
	end := begin + strings.Index(text[begin:], "} } ]\n") // the source ends where the list of secrets does
	listener := strings.Index(text, "  listeners:")
	if begin > listener || !strings.Contains(text[listener:], text[begin:end]) {
		t.Fatal("the cluster and the listener do not have the same source of secrets")
	}
	problems := lintProblems(t, text[:begin]+"ads: {} "+text[end:])
	if len(problems) != 1 || !strings.HasSuffix(problems[0], ": ads on a static cluster") {
		t.Errorf("a cluster: %q", problems)
	}
	if problems := lintProblems(t, text[:listener]+strings.ReplaceAll(text[listener:], text[begin:end], "ads: {} ")); len(problems) != 0 {
		t.Errorf("a listener: %q", problems)
	}
}

// lintProblems returns what a bootstrap lacks.
func lintProblems(t *testing.T, text string) []string {
	t.Helper()
	l, err := lint([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return l.problems
}

// example is a bootstrap without problems.
func example(t *testing.T) string {
	t.Helper()
	var text bytes.Buffer
	if err := ExampleBootstrap(SDSDelta).Write(&text); err != nil {
		t.Fatal(err)
	}
	return text.String()
}
