package envoycheck

import (
	"encoding/base64"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// rule is what is looked for, and why.
type rule struct{ name, why string }

// The rules. Facts about Envoy are those of its API reference, v3.
var (
	ruleNoTLS              = rule{"tls_context", "without TLS nobody proves who he is: whoever reaches the port is let in"}
	ruleClient             = rule{"require_client_certificate", "clients without a certificate get in, and so does a client whose certificate was withdrawn when it shows none"}
	ruleResumption         = rule{"session_resumption", "a resumed TLS session skips the check of the certificate: a peer comes back after its certificate expired or was withdrawn"}
	ruleConnection         = rule{"max_connection_duration", "an open connection survives expiry and withdrawal of its peer's certificate for as long as the peer keeps it open"}
	ruleStream             = rule{"max_stream_duration", "the bound of a connection waits for its open requests: one that never ends keeps a withdrawn peer connected"}
	ruleRoots              = rule{"validation_context", "without roots Envoy verifies nobody; without the agent's, no root is ever withdrawn"}
	ruleNames              = rule{"match_typed_subject_alt_names", "nobody is named: whoever has a certificate of the mesh is let in. Without names Envoy also takes an empty trust bundle for \"trust everybody\""}
	rulePooled             = rule{"pooled_roots", "in a plain list each root can vouch for each identity, those of other trust domains too; the SPIFFE validator keeps them apart"}
	ruleUntrusted          = rule{"trust_chain_verification", "certificates that do not chain to a root are let in"}
	ruleExpired            = rule{"allow_expired_certificate", "an identity is withdrawn by letting its certificate end: this lets it in for ever"}
	ruleVersion            = rule{"tls_versions", "TLS 1.2 shows certificates to who listens, and has no post-quantum key exchange; Envoy's default is 1.2 at the least as a server and at the most as a client"}
	ruleFetch              = rule{"initial_fetch_timeout", "when the secret has not come after 15 s Envoy calls itself ready, and refuses all connections"}
	ruleADS                = rule{"ads_on_static_cluster", "Envoy crashes at start when the secrets of a static cluster come over ads"}
	maxBound       float64 = 24 * 60 * 60 // seconds; no X.509-SVID lives longer
)

// The fixes that more than one rule has.
const (
	fixHTTPBounds = "common_http_protocol_options: { max_connection_duration: 3600s, max_stream_duration: 3600s }"
	fixSource     = `api_config_source:
  api_type: DELTA_GRPC
  transport_api_version: V3
  set_node_on_first_message_only: true
  grpc_services: [ { envoy_grpc: { cluster_name: node_agent, skip_envoy_headers: true, retry_policy: { retry_back_off: { base_interval: 0.1s, max_interval: 2s } } } } ]`
	fixMatcher = `match_typed_subject_alt_names:
- { san_type: URI, matcher: { exact: "spiffe://example.org/app/web" } } # who may be there`
	fixResumptionServer = "disable_stateless_session_resumption: true\ndisable_stateful_session_resumption: true"
	fixResumptionClient = "max_session_keys: 0"
	fixTCPBound         = "max_downstream_connection_duration: 3600s"
)

var fixCombined = "combined_validation_context:\n  default_validation_context:\n" + indent(fixMatcher, 4) +
	"\n  validation_context_sds_secret_config:\n    name: ROOTCA\n    sds_config:\n      resource_api_version: V3\n      initial_fetch_timeout: 0s\n" + indent(fixSource, 6)

func indent(text string, by int) string {
	space := strings.Repeat(" ", by)
	return space + strings.ReplaceAll(text, "\n", "\n"+space)
}

// staticCluster finds the paths at which a static cluster's TLS stands.
var staticCluster = regexp.MustCompile(`(?i)(static_?resources\.clusters|static_?clusters)\[\d+\].*\.transport_?socket`)

// check looks at one object, wherever it stands.
func (c *checker) check(path string, value map[string]any) {
	const downstream, upstream = "tls.v3.DownstreamTlsContext", "tls.v3.UpstreamTlsContext"
	switch {
	case isType(value, downstream):
		c.downstream(path, value)
	case isType(value, upstream):
		c.upstream(path, value)
	case isType(value, ".QuicDownstreamTransport"):
		// The one place where a TLS context has no type of its own.
		if context, ok := at(value, "downstream_tls_context").(map[string]any); ok && at(context, "@type") == nil {
			c.downstream(path+".downstream_tls_context", context)
		}
	}
	if socket := at(value, "transport_socket"); at(value, "filters") != nil && (below(socket, downstream) != nil || below(socket, ".QuicDownstreamTransport") != nil) {
		c.filters(path, at(value, "filters"))
	}
	for _, key := range []string{"transport_socket", "transport_socket_matches"} {
		if below(at(value, key), upstream) != nil && at(value, "name") != nil && at(value, "filters") == nil && !strings.Contains(path, "transport_socket") {
			c.cluster(path, value)
			break
		}
	}
	for _, key := range []string{"validation_context", "default_validation_context"} {
		if context, ok := at(value, key).(map[string]any); ok {
			c.validation(path+"."+key, context)
		}
	}
	if source, ok := at(value, "sds_config").(map[string]any); ok {
		c.source(path+".sds_config", source)
	}
	if override, ok := at(value, "route", "max_stream_duration").(map[string]any); ok {
		for _, key := range []string{"max_stream_duration", "grpc_timeout_header_max"} {
			if d := at(override, key); d != nil {
				if seconds, _ := seconds(d); seconds <= 0 {
					c.find(ruleStream, path+".route.max_stream_duration", key+" is 0: it switches the bound off for this route", key+": 3600s")
				}
			}
		}
	}
}

func (c *checker) downstream(path string, context map[string]any) {
	c.report.Downstreams++
	if at(context, "require_client_certificate") != true {
		c.find(ruleClient, path, "require_client_certificate is not true", "require_client_certificate: true")
	}
	for _, k := range []string{"disable_stateless_session_resumption", "disable_stateful_session_resumption"} {
		if at(context, k) != true {
			c.find(ruleResumption, path, k+" is not true", fixResumptionServer)
		}
	}
	if !isVersion13(at(context, "common_tls_context", "tls_params", "tls_minimum_protocol_version")) {
		c.find(ruleVersion, path+".common_tls_context", "tls_minimum_protocol_version is not TLSv1_3", "tls_params: { tls_minimum_protocol_version: TLSv1_3 }")
	}
	c.peers(path+".common_tls_context", at(context, "common_tls_context"))
}

func (c *checker) upstream(path string, context map[string]any) {
	c.report.Upstreams++
	if n := at(context, "max_session_keys"); fmt.Sprint(n) != "0" {
		c.find(ruleResumption, path, "max_session_keys is not 0", fixResumptionClient)
	}
	if !isVersion13(at(context, "common_tls_context", "tls_params", "tls_maximum_protocol_version")) {
		c.find(ruleVersion, path+".common_tls_context", "tls_maximum_protocol_version is not TLSv1_3", "tls_params: { tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3 }")
	}
	c.peers(path+".common_tls_context", at(context, "common_tls_context"))
}

func isVersion13(v any) bool { return v == "TLSv1_3" || fmt.Sprint(v) == "4" }

// peers checks that the roots come from SDS and that peers are named as well.
func (c *checker) peers(path string, common any) {
	combined := at(common, "combined_validation_context")
	inline := at(common, "validation_context")
	switch {
	case combined != nil:
		if at(combined, "validation_context_sds_secret_config", "name") == nil {
			c.find(ruleRoots, path+".combined_validation_context", "validation_context_sds_secret_config is missing", fixCombined)
		}
		if names := at(combined, "default_validation_context"); names != nil {
			c.names(path+".combined_validation_context.default_validation_context", names)
		} else {
			c.find(ruleNames, path+".combined_validation_context", "default_validation_context is missing", "default_validation_context:\n"+indent(fixMatcher, 2))
		}
	case inline != nil:
		c.names(path+".validation_context", inline)
	case at(common, "validation_context_sds_secret_config") != nil:
		c.find(ruleNames, path, "validation_context_sds_secret_config stands alone", fixCombined)
	default:
		c.find(ruleRoots, path, "combined_validation_context is missing", fixCombined)
	}
}

// names checks that matchers name somebody in particular.
func (c *checker) names(path string, context any) {
	matchers, _ := at(context, "match_typed_subject_alt_names").([]any)
	if len(matchers) == 0 {
		c.find(ruleNames, path, "match_typed_subject_alt_names is missing", fixMatcher)
	}
	for i, m := range matchers {
		if problem := nameProblem(m); problem != "" {
			c.find(ruleNames, path, fmt.Sprintf("match_typed_subject_alt_names[%d] %s", i, problem), fixMatcher)
		}
	}
}

// named is how what names members of one trust domain begins.
var named = regexp.MustCompile(`^spiffe://[a-z0-9._\\-]*[a-z0-9_-]/`)

func nameProblem(m any) string {
	if t := at(m, "san_type"); t != "URI" && fmt.Sprint(t) != "3" {
		return "is not of san_type URI: only the URI is a SPIFFE ID"
	}
	matcher := at(m, "matcher")
	if at(matcher, "custom") != nil {
		return "" // not ours to judge
	}
	for _, text := range []any{at(matcher, "exact"), at(matcher, "prefix"), at(matcher, "safe_regex", "regex")} {
		if text, ok := text.(string); ok && named.MatchString(strings.TrimPrefix(text, "^")) {
			return ""
		}
	}
	return "does not name SPIFFE IDs of one trust domain"
}

// validation checks a validation context that is written down, or was sent by SDS.
func (c *checker) validation(path string, context map[string]any) {
	if at(context, "allow_expired_certificate") == true {
		c.find(ruleExpired, path, "allow_expired_certificate is true", "allow_expired_certificate: false")
	}
	if v := at(context, "trust_chain_verification"); v == "ACCEPT_UNTRUSTED" || fmt.Sprint(v) == "1" {
		c.find(ruleUntrusted, path, "trust_chain_verification is ACCEPT_UNTRUSTED", "trust_chain_verification: VERIFY_TRUST_CHAIN")
	}
	spiffe := below(at(context, "custom_validator_config"), ".SPIFFECertValidatorConfig") != nil
	roots := at(context, "trusted_ca")
	if roots == nil || spiffe {
		return
	}
	if at(context, "crl") != nil && at(context, "only_verify_leaf_cert_crl") == true && strings.Contains(path, "dynamic_") {
		return // the agent's, of one trust domain with its revocation lists
	}
	problem := "trusted_ca without the SPIFFE validator"
	if n := certificates(roots); n > 1 {
		problem = fmt.Sprintf("trusted_ca with %d roots, without the SPIFFE validator", n)
	}
	c.find(rulePooled, path, problem, `custom_validator_config: # in the place of trusted_ca; or take it from the agent's secret ROOTCA
  name: envoy.tls.cert_validator.spiffe
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig
    trust_domains: [ { name: example.org, trust_bundle: { filename: /etc/envoy/bundle.pem } } ]`)
}

// certificates counts those that stand in a data source; 0 means that they stand
// elsewhere.
func certificates(source any) int {
	text, _ := at(source, "inline_string").(string)
	if encoded, ok := at(source, "inline_bytes").(string); ok {
		if b, err := base64.StdEncoding.DecodeString(encoded); err == nil {
			text = string(b)
		}
	}
	return strings.Count(text, "-----BEGIN CERTIFICATE-----")
}

// source checks where a secret comes from.
func (c *checker) source(path string, source map[string]any) {
	if _, ads := source["ads"]; ads && staticCluster.MatchString(path) {
		c.find(ruleADS, path, "ads", fixSource)
	}
	if at(source, "path_config_source") != nil || at(source, "path") != nil {
		return // a file is there, or not
	}
	if s, ok := seconds(at(source, "initial_fetch_timeout")); !ok || s != 0 {
		c.find(ruleFetch, path, "initial_fetch_timeout is not 0s", "initial_fetch_timeout: 0s")
	}
}

// filters checks the network filters behind a downstream TLS context.
func (c *checker) filters(path string, filters any) {
	chain, _ := filters.([]any)
	found := false
	for i, f := range chain {
		config, place := at(f, "typed_config"), fmt.Sprintf("%s.filters[%d].typed_config", path, i)
		switch {
		case isType(config, ".HttpConnectionManager"):
			found = true
			c.bounds(place, at(config, "common_http_protocol_options"), fixHTTPBounds)
		case isType(config, ".TcpProxy"):
			found = true
			c.tcpProxy(place, config)
		}
	}
	if !found {
		c.find(ruleConnection, path+".filters", "no filter whose connections are bounded", "- name: envoy.filters.network.tcp_proxy\n  typed_config:\n    \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy\n"+indent(fixTCPBound, 4))
	}
}

// tcpProxy checks the bound of what is connected through one.
func (c *checker) tcpProxy(path string, config any) {
	const field = "max_downstream_connection_duration"
	c.bound(ruleConnection, path, field, at(config, field), fixTCPBound)
}

// cluster checks the bounds of connections to a cluster with TLS.
func (c *checker) cluster(path string, cluster map[string]any) {
	name, _ := at(cluster, "name").(string)
	if proxies := c.clusters.tcp[name]; len(proxies) > 0 && !c.clusters.http[name] {
		for _, p := range proxies { // they bound its connections
			c.tcpProxy(p.path, p.config)
		}
		return
	}
	options := at(below(at(cluster, "typed_extension_protocol_options"), ".HttpProtocolOptions"), "common_http_protocol_options")
	if options == nil {
		options = at(cluster, "common_http_protocol_options")
	}
	c.bounds(path, options, `typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
`+indent(fixHTTPBounds, 4)+"\n    explicit_http_config: { http_protocol_options: {} }")
}

// bounds checks how long a connection may live: max_connection_duration waits for
// open requests.
func (c *checker) bounds(path string, options any, fix string) {
	c.bound(ruleConnection, path, "max_connection_duration", at(options, "max_connection_duration"), fix)
	c.bound(ruleStream, path, "max_stream_duration", at(options, "max_stream_duration"), fix)
}

func (c *checker) bound(r rule, path, field string, value any, fix string) {
	switch s, ok := seconds(value); {
	case !ok:
		c.find(r, path, field+" is missing", fix)
	case s <= 0:
		c.find(r, path, field+" is 0, which means no bound", fix)
	case s > maxBound:
		c.find(r, path, field+" is longer than a day", fix)
	}
}

// seconds reads a duration as protobuf's JSON writes it: "0.5s".
func seconds(value any) (float64, bool) {
	text, _ := value.(string)
	number, ok := strings.CutSuffix(text, "s")
	s, err := strconv.ParseFloat(number, 64)
	return s, ok && err == nil
}
