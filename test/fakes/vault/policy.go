package vault

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
)

// policy is what paths may be used for.
type policy map[string][]string

const defaultPolicy = `
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
path "sys/wrapping/wrap" { capabilities = ["update"] }
path "sys/wrapping/lookup" { capabilities = ["update"] }
path "sys/wrapping/unwrap" { capabilities = ["update"] }
`

const wrappingPolicy = `
path "sys/wrapping/unwrap" { capabilities = ["update"] }
`

var (
	policyComment = regexp.MustCompile(`(?m)#.*$`)
	policyPath    = regexp.MustCompile(`^\s*path\s+"([^"]+)"\s*\{\s*capabilities\s*=\s*\[([^\]]*)\]\s*\}`)
	capabilities  = []string{"create", "read", "update", "patch", "delete", "list", "sudo", "deny"}
)

// parsePolicy reads the part of a policy's language that is used: paths, also with
// a star at the end or a plus for a segment, and their capabilities.
func parsePolicy(text string) (policy, error) {
	p := policy{}
	rest := policyComment.ReplaceAllString(text, "")
	for strings.TrimSpace(rest) != "" {
		m := policyPath.FindStringSubmatch(rest)
		if m == nil {
			return nil, fmt.Errorf("at %.40q", strings.TrimSpace(rest))
		}
		rest = rest[len(m[0]):]
		for word := range strings.SplitSeq(m[2], ",") {
			c := strings.Trim(strings.TrimSpace(word), `"`)
			if c == "" {
				continue
			}
			if !slices.Contains(capabilities, c) {
				return nil, fmt.Errorf("path %q: invalid capability %q", m[1], c)
			}
			p[m[1]] = append(p[m[1]], c)
		}
	}
	if len(p) == 0 {
		return nil, errors.New("it has no path")
	}
	return p, nil
}

func mustPolicy(text string) policy {
	p, err := parsePolicy(text)
	if err != nil {
		panic(err) // a constant of this package
	}
	return p
}

// grants says whether the policy allows a capability on a path: the most specific
// rule counts, which is the longest here.
func (p policy) grants(path, capability string) bool {
	best := ""
	for pattern := range p {
		if len(pattern) > len(best) && matches(pattern, path) {
			best = pattern
		}
	}
	return best != "" && slices.Contains(p[best], capability) && !slices.Contains(p[best], "deny")
}

func matches(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(path, prefix)
	}
	a, b := strings.Split(pattern, "/"), strings.Split(path, "/")
	return slices.EqualFunc(a, b, func(x, y string) bool { return x == "+" || x == y })
}

// allowed says whether the call's token may make it. mu is held.
func (s *Server) allowed(c *call) bool {
	if c.token == nil {
		return false
	}
	capability := map[string]string{http.MethodGet: "read", http.MethodPost: "update", http.MethodPut: "update"}[c.Method]
	return slices.ContainsFunc(c.token.policies, func(name string) bool {
		return name == "root" || s.policies[name].grants(c.path, capability)
	})
}
