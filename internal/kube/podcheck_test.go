package kube

import (
	"strings"
	"testing"
)

// A pod is refused for what is known of it, and not for what is not.
func TestCheckPod(t *testing.T) {
	pods := newPods()
	reader := podReader{pods}
	ended := simplePod(t, "ended", "shop", "web", "n1", "")
	ended.finished = true
	for _, pod := range []*Pod{simplePod(t, "there", "shop", "web", "n1", ""), simplePod(t, "deleted", "shop", "web", "n1", ""), ended} {
		reader.Set(pod)
	}
	reader.Delete(simplePod(t, "deleted", "shop", "web", "n1", ""))
	for _, test := range []struct{ node, uid, want string }{
		{"n1", "there", ""},
		{"n2", "there", "not on node n2"},
		{"n1", "deleted", "was deleted"},
		{"n1", "ended", "has ended"},
		{"n1", "unheard", ""},
	} {
		err := pods.CheckPod(test.node, test.uid)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s on %s: %v, want %q", test.uid, test.node, err, test.want)
		}
	}
}
