package kubernetes

import (
	"strings"
	"testing"
)

func TestCheckClusterBundleName(t *testing.T) {
	for name, ok := range map[string]bool{
		"mesh-roots": true, "mesh.example.org": true, "meshid.io:svid:bundle": true, "mesh.example.org:ca:roots": true,
		"": false, "no:": false, ":bundle": false, "meshid.io:bundle": false, ".": false, "..": false, "Roots": false,
		"../../../api/v1/namespaces/kube-system/configmaps/coredns": false, "roots/status": false, "a%2fb": false, "roots?force=true": false,
		"roots,metadata.name!=others": false, "roots=": false, "a\n": false, strings.Repeat("a", 254): false,
	} {
		if err := CheckClusterBundleName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}
