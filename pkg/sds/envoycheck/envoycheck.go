// Package envoycheck answers what in an Envoy's configuration would let a peer in
// whose identity was withdrawn, or would stop the secrets from coming: a bootstrap,
// or what the admin endpoint's /config_dump says. It looks at the document only: it
// does not know the agent, the CA, nor whether the secrets that are named exist.
package envoycheck

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml"
)

// MaxBytes bounds a document: config_dump of an Envoy with 10,000 clusters has some
// 60 MB.
const MaxBytes = 256 << 20

// Finding is one thing that is wrong.
type Finding struct {
	// Rule names what was checked: one of the names in rules.go. Names stay.
	Rule string `json:"rule"`
	// Path is the place in the document at which Fix is to be pasted.
	Path string `json:"path"`
	// Problem is what stands there, Why what comes of it.
	Problem string `json:"problem"`
	Why     string `json:"why"`
	// Fix is YAML.
	Fix string `json:"fix"`
}

// Report is what a document has, and lacks.
type Report struct {
	// Findings stand in the order of the document; empty is good.
	Findings []Finding `json:"findings"`
	// Downstreams and Upstreams count the TLS contexts that were checked.
	Downstreams int `json:"downstream_tls_contexts"`
	Upstreams   int `json:"upstream_tls_contexts"`
}

// Check reads a bootstrap, YAML or JSON, or the answer of /config_dump. It fails if
// the document is neither.
func Check(document []byte) (*Report, error) {
	if len(document) > MaxBytes {
		return nil, fmt.Errorf("the document has %d bytes, at most %d are read", len(document), MaxBytes)
	}
	root, err := parse(document)
	if err != nil {
		return nil, err
	}
	c := &checker{report: Report{Findings: []Finding{}}, clusters: usedClusters{make(map[string][]tcpProxy), make(map[string]bool)}}
	c.clusters.look("", root, nil)
	configs, isDump := at(root, "configs").([]any)
	switch {
	case isDump:
		c.dump(configs)
	case at(root, "static_resources") != nil || at(root, "dynamic_resources") != nil:
		c.walk("", root)
	default:
		return nil, errors.New("neither a bootstrap (static_resources or dynamic_resources) nor a config_dump (configs)")
	}
	if c.report.Downstreams+c.report.Upstreams == 0 {
		c.find(ruleNoTLS, "", "no TLS context is in it", "")
	}
	return &c.report, nil
}

// parse reads JSON as JSON: it is much faster, and config_dump is large.
func parse(document []byte) (root map[string]any, err error) {
	if text := bytes.TrimLeftFunc(document, unicode.IsSpace); len(text) > 0 && text[0] == '{' && json.Valid(text) {
		err = json.Unmarshal(text, &root)
	} else {
		err = yaml.Unmarshal(document, &root)
	}
	if err != nil {
		return nil, fmt.Errorf("read YAML or JSON: %w", err)
	}
	return root, nil
}

// checker walks through a document.
type checker struct {
	report   Report
	clusters usedClusters
}

// dump checks each part of a config_dump once: the static resources stand in it
// twice, with the bootstrap and among the others of their kind.
func (c *checker) dump(configs []any) {
	kinds := func(suffix string) bool {
		return slices.ContainsFunc(configs, func(v any) bool { return isType(v, suffix) })
	}
	both := kinds(".ListenersConfigDump") && kinds(".ClustersConfigDump")
	for i, v := range configs {
		if both && isType(v, ".BootstrapConfigDump") {
			continue
		}
		c.walk(fmt.Sprintf("configs[%d]", i), v)
	}
}

// walk checks everything below a value, in whichever place it stands.
func (c *checker) walk(path string, value any) {
	if object, ok := value.(map[string]any); ok {
		c.check(path, object)
	}
	each(path, value, func(path, _ string, v any) { c.walk(path, v) })
}

// each calls f for what is directly below a value and in force, in a stable order,
// with its path and, in an object, its key.
func each(path string, value any, f func(path, key string, v any)) {
	switch value := value.(type) {
	case []any:
		for i, v := range value {
			f(fmt.Sprintf("%s[%d]", path, i), "", v)
		}
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(value)) {
			if s := snake(k); s != "draining_state" && s != "error_state" {
				f(strings.TrimPrefix(path+"."+k, "."), k, value[k])
			}
		}
	}
}

// find notes what a rule has found.
func (c *checker) find(r rule, path, problem, fix string) {
	found := Finding{Rule: r.name, Path: path, Problem: problem, Why: r.why, Fix: fix}
	if slices.Contains(c.report.Findings, found) {
		return // a filter is looked at for its listener and for its cluster
	}
	c.report.Findings = append(c.report.Findings, found)
}

// at descends by keys, in either of the two ways to write them; what is missing is
// nil.
func at(value any, keys ...string) any {
	for _, k := range keys {
		m, _ := value.(map[string]any)
		v, ok := m[k]
		if !ok {
			v = m[camel(k)]
		}
		value = v
	}
	return value
}

// camel writes a field's name as protobuf's JSON does.
func camel(name string) string {
	words := strings.Split(name, "_")
	for i, w := range words[1:] {
		if w != "" {
			words[i+1] = strings.ToUpper(w[:1]) + w[1:]
		}
	}
	return strings.Join(words, "")
}

// snake is the opposite of camel.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// isType says whether a value has a type whose name ends so.
func isType(value any, suffix string) bool {
	name, _ := at(value, "@type").(string)
	return strings.HasSuffix(name, suffix)
}

// below returns the first value that has such a type, at or below a value.
func below(value any, suffix string) any {
	if isType(value, suffix) {
		return value
	}
	var found any
	each("", value, func(_, _ string, v any) {
		if found == nil {
			found = below(v, suffix)
		}
	})
	return found
}

// usedClusters says which clusters are used for what: the life of a connection to
// one that only tcp_proxy uses is bounded there.
type usedClusters struct {
	tcp  map[string][]tcpProxy
	http map[string]bool
}

type tcpProxy struct {
	path   string
	config any
}

func (u *usedClusters) look(path string, value any, proxy *tcpProxy) {
	use := func(name any) {
		switch name, ok := name.(string); {
		case !ok:
		case proxy != nil:
			u.tcp[name] = append(u.tcp[name], *proxy)
		default:
			u.http[name] = true
		}
	}
	each(path, value, func(path, key string, v any) {
		if isType(v, ".TcpProxy") {
			u.look(path, v, &tcpProxy{path, v})
			return
		}
		if key == "cluster" {
			use(v)
		}
		if weighted, ok := at(v, "clusters").([]any); ok && snake(key) == "weighted_clusters" {
			for _, w := range weighted {
				use(at(w, "name"))
			}
		}
		u.look(path, v, proxy)
	})
}
