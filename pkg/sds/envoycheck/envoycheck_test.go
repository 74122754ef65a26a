package envoycheck

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

func shipped(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "deploy", "envoy", "sidecar.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func check(t testing.TB, text string) []Finding {
	t.Helper()
	r, err := Check([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return r.Findings
}

// lookup finds what stands at a finding's path.
func lookup(t *testing.T, document any, path string) any {
	t.Helper()
	for _, step := range regexp.MustCompile(`[^.\[\]]+|\[\d+\]`).FindAllString(path, -1) {
		var i int
		if _, err := fmt.Sscanf(step, "[%d]", &i); err == nil {
			list, _ := document.([]any)
			if i >= len(list) {
				t.Fatalf("%s: no element %s", path, step)
			}
			document = list[i]
			continue
		}
		document = at(document, step)
	}
	return document
}

// TestV_H1_BadBootstraps: each mistake is found, in each place where it can be
// made, and nothing else with it; its fix is YAML, and its path is in the document.
func TestV_H1_BadBootstraps(t *testing.T) {
	const source = `{ resource_api_version: V3, initial_fetch_timeout: 0s, api_config_source:`
	text := shipped(t)
	for _, row := range []struct{ old, new, rule, problem string }{
		{"require_client_certificate: true", "", "require_client_certificate", "not true"},
		{"disable_stateless_session_resumption: true", "", "session_resumption", "stateless"},
		{"disable_stateful_session_resumption: true", "disable_stateful_session_resumption: false", "session_resumption", "stateful"},
		{"max_session_keys: 0", "max_session_keys: 1", "session_resumption", "max_session_keys"},
		{"max_session_keys: 0", "", "session_resumption", "max_session_keys"},
		{"max_connection_duration: 3600s, ", "", "max_connection_duration", "missing"},
		{"max_connection_duration: 3600s", "max_connection_duration: 0s", "max_connection_duration", "no bound"},
		{"max_connection_duration: 3600s", "max_connection_duration: 86401s", "max_connection_duration", "longer than a day"},
		{", max_stream_duration: 3600s", "", "max_stream_duration", "missing"},
		{"route: { cluster: application }", "route: { cluster: application, max_stream_duration: { max_stream_duration: 0s } }", "max_stream_duration", "for this route"},
		{"route: { cluster: application }", "route: { cluster: application, max_stream_duration: { grpc_timeout_header_max: 0s } }", "max_stream_duration", "for this route"},
		{", tls_maximum_protocol_version: TLSv1_3", "", "tls_versions", "maximum"},
		{"tls_params: { tls_minimum_protocol_version: TLSv1_3 }", "tls_params: { tls_minimum_protocol_version: TLSv1_2 }", "tls_versions", "minimum"},
		{`{ san_type: URI, matcher: { exact: "spiffe://example.org/app/web" } }`, `{ san_type: DNS, matcher: { exact: "web" } }`, "match_typed_subject_alt_names", "san_type"},
		{`{ exact: "spiffe://example.org/app/web" }`, `{ prefix: "spiffe://" }`, "match_typed_subject_alt_names", "one trust domain"},
		{`{ exact: "spiffe://example.org/app/web" }`, `{ prefix: "spiffe://example.org" }`, "match_typed_subject_alt_names", "one trust domain"},
		{`{ exact: "spiffe://example.org/app/web" }`, `{ safe_regex: { regex: "spiffe://.*/app/web" } }`, "match_typed_subject_alt_names", "one trust domain"},
		{`[ { san_type: URI, matcher: { exact: "spiffe://example.org/app/stock" } } ]`, "[]", "match_typed_subject_alt_names", "missing"},
		{"default_validation_context:", "other:", "match_typed_subject_alt_names", "default_validation_context"},
		{"combined_validation_context:", "other:", "validation_context", "combined_validation_context"},
		{"validation_context_sds_secret_config:", "other:", "validation_context", "validation_context_sds_secret_config"},
		{"default_validation_context: #", "default_validation_context: ↵trusted_ca: { filename: /etc/roots.pem } #", "pooled_roots", "without the SPIFFE validator"},
		{"default_validation_context: #", "default_validation_context: ↵trusted_ca: { inline_string: \"-----BEGIN CERTIFICATE----- -----BEGIN CERTIFICATE-----\" } #", "pooled_roots", "2 roots"},
		{"default_validation_context: #", "default_validation_context: ↵allow_expired_certificate: true #", "allow_expired_certificate", "true"},
		{"default_validation_context: #", "default_validation_context: ↵trust_chain_verification: ACCEPT_UNTRUSTED #", "trust_chain_verification", "ACCEPT_UNTRUSTED"},
		{source, strings.Replace(source, "0s", "15s", 1), "initial_fetch_timeout", "not 0s"},
		{source, strings.Replace(source, " initial_fetch_timeout: 0s,", "", 1), "initial_fetch_timeout", "not 0s"},
		{"http_connection_manager.v3.HttpConnectionManager\n          stat_prefix: inbound", "redis_proxy.v3.RedisProxy\n          stat_prefix: inbound", "max_connection_duration", "no filter"},
		{"http_connection_manager.v3.HttpConnectionManager\n          stat_prefix: inbound", "tcp_proxy.v3.TcpProxy\n          cluster: application\n          stat_prefix: inbound", "max_connection_duration", "max_downstream_connection_duration"},
		// The cluster's connections live as long as those of the plain listener.
		{"http_connection_manager.v3.HttpConnectionManager\n          stat_prefix: outbound_stock\n          route_config:\n            virtual_hosts: [ { name: all, domains: [\"*\"], routes: [ { match: { prefix: \"/\" }, route: { cluster: stock } } ] } ]", "tcp_proxy.v3.TcpProxy\n          stat_prefix: outbound_stock\n          cluster: stock", "max_connection_duration", "max_downstream_connection_duration"},
	} {
		parts := strings.Split(text, row.old)
		if len(parts) == 1 {
			t.Errorf("no %q in the bootstrap", row.old)
		}
		places := make(map[string]bool)
		for n := range len(parts) - 1 {
			next := parts[n+1][strings.Index(parts[n+1], "\n")+1:]
			indented := strings.ReplaceAll(row.new, "↵", "\n"+next[:len(next)-len(strings.TrimLeft(next, " "))])
			changed := strings.Join(parts[:n+1], row.old) + indented + strings.Join(parts[n+1:], row.old)
			var document any
			if err := yaml.Unmarshal([]byte(changed), &document); err != nil {
				t.Fatalf("%q for %q: %v", row.new, row.old, err)
			}
			findings := check(t, changed)
			if len(findings) == 0 {
				t.Errorf("place %d, %q for %q: nothing found", n, row.new, row.old)
			}
			for _, f := range findings {
				if f.Rule != row.rule || !strings.Contains(f.Problem, row.problem) {
					t.Errorf("place %d, %q for %q: %+v", n, row.new, row.old, f)
				}
				if lookup(t, document, f.Path) == nil {
					t.Errorf("place %d, %q for %q: nothing is at %s", n, row.new, row.old, f.Path)
				}
				var fix map[string]any
				if err := yaml.Unmarshal([]byte(f.Fix), &fix); err != nil && !strings.HasPrefix(f.Fix, "- ") || f.Why == "" {
					t.Errorf("the fix of %s is not YAML: %v\n%s", f.Rule, err, f.Fix)
				}
				places[f.Path] = true
			}
		}
		if len(places) < len(parts)-1 {
			t.Errorf("%q for %q: %d places, told apart %d", row.new, row.old, len(parts)-1, len(places))
		}
	}
}

// TestSpec_S40_ADS: on a static cluster Envoy crashes; a listener may have it.
func TestSpec_S40_ADS(t *testing.T) {
	text := shipped(t)
	begin := strings.Index(text, "api_config_source:")
	end := begin + strings.Index(text[begin:], "} } ]\n") // the source ends where the list of secrets does
	listener := strings.Index(text, "  listeners:")
	findings := check(t, text[:begin]+"ads: {} "+text[end:])
	if len(findings) != 1 || findings[0].Rule != "ads_on_static_cluster" {
		t.Errorf("a cluster: %+v", findings)
	}
	if findings := check(t, text[:listener]+strings.ReplaceAll(text[listener:], text[begin:end], "ads: {} ")); len(findings) != 0 {
		t.Errorf("a listener: %+v", findings)
	}
}

// The same bootstrap is JSON, in both ways to write a field's name, and part of a
// config_dump; the findings are the same, once each.
func TestV_H1_Forms(t *testing.T) {
	var document map[string]any
	if err := yaml.Unmarshal([]byte(strings.Replace(shipped(t), "require_client_certificate: true", "", 1)), &document); err != nil {
		t.Fatal(err)
	}
	asJSON := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var clusters, listeners []any
	for _, c := range at(document, "static_resources", "clusters").([]any) {
		clusters = append(clusters, map[string]any{"cluster": c})
	}
	for _, l := range at(document, "static_resources", "listeners").([]any) {
		listeners = append(listeners, map[string]any{"listener": l})
	}
	for name, text := range map[string]string{
		"json": asJSON(document), "camel case": asJSON(inCamel(document)),
		"config_dump": asJSON(map[string]any{"configs": []any{
			map[string]any{"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": document},
			map[string]any{"@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump", "static_clusters": clusters},
			map[string]any{"@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump", "static_listeners": listeners},
		}}),
		"config_dump of the bootstrap": asJSON(map[string]any{"configs": []any{
			map[string]any{"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": document},
		}}),
	} {
		r, err := Check([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Findings) != 1 || r.Findings[0].Rule != "require_client_certificate" || r.Downstreams != 1 || r.Upstreams != 1 {
			t.Errorf("%s: %+v", name, r)
		}
	}
	sent := asJSON(map[string]any{"configs": []any{map[string]any{
		"@type": "type.googleapis.com/envoy.admin.v3.SecretsConfigDump",
		"dynamic_active_secrets": []any{map[string]any{"name": "ROOTCA", "secret": map[string]any{
			"validation_context": map[string]any{"trusted_ca": map[string]any{"inline_bytes": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"}},
		}}},
	}}})
	if f := check(t, sent); !slices.ContainsFunc(f, func(f Finding) bool {
		return f.Rule == "pooled_roots" && f.Path == "configs[0].dynamic_active_secrets[0].secret.validation_context"
	}) {
		t.Errorf("a secret that was sent: %+v", f)
	}
	listed := strings.Replace(sent, `"validation_context":{`, `"validation_context":{"crl":{"inline_bytes":"LS0="},"only_verify_leaf_cert_crl":true,`, 1)
	if f := check(t, listed); slices.ContainsFunc(f, func(f Finding) bool { return f.Rule == "pooled_roots" }) || listed == sent {
		t.Errorf("the agent's, with revocation lists: %+v", f)
	}
}

func inCamel(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = inCamel(v[i])
		}
	case map[string]any:
		changed := make(map[string]any)
		for k, v := range v {
			if !strings.Contains(k, ".") {
				k = camel(k)
			}
			changed[k] = inCamel(v)
		}
		return changed
	}
	return v
}

func TestV_H1_NotChecked(t *testing.T) {
	for _, text := range []string{"", "a: b", "[]", "{", "configs: {}", "static_resources"} {
		if r, err := Check([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, r)
		}
	}
	if f := check(t, "static_resources: {listeners: []}"); len(f) != 1 || f[0].Rule != "tls_context" {
		t.Errorf("no TLS at all: %+v", f)
	}
}

func FuzzCheck(f *testing.F) {
	f.Add([]byte(shipped(f)))
	f.Add([]byte(`{"configs": [{"@type": "x.TcpProxy", "cluster": 1, "route": {"max_stream_duration": {"max_stream_duration": "s"}}}]}`))
	f.Add([]byte("static_resources: &a {b: [1, 2, {transport_socket: [], name: x}]}\ndynamic_resources: *a"))
	f.Fuzz(func(t *testing.T, document []byte) {
		r, err := Check(document)
		if err == nil && r.Findings == nil {
			t.Error("neither findings nor an error")
		}
	})
}
