package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshid/meshid/test/require"
)

// An approval is another user's, of this plan, and nobody else could have written it.
func TestApproval(t *testing.T) {
	require.Root(t)
	for name, tc := range map[string]struct {
		owner int
		mode  os.FileMode
		text  string
		want  string
	}{
		"good":          {12345, 0o644, "c0de\n", ""},
		"one's own":     {0, 0o644, "c0de\n", "second person"},
		"another plan":  {12345, 0o644, "c0df\n", "what was approved is something else"},
		"anybody could": {12345, 0o666, "c0de\n", "chmod go-w"},
	} {
		path := filepath.Join(t.TempDir(), "approval")
		if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, tc.owner, -1); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tc.mode); err != nil {
			t.Fatal(err)
		}
		uid, err := checkApproval(path, "c0de")
		switch {
		case tc.want == "" && (err != nil || uid != tc.owner):
			t.Errorf("%s: uid %d, %v", name, uid, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: got %v, want an error with %q", name, err, tc.want)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	if _, err := checkApproval(link, "c0de"); err == nil {
		t.Error("a symbolic link was followed")
	}
}
