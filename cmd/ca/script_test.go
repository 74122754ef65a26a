package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/meshid/meshid/internal/cli"
	"github.com/meshid/meshid/pkg/ca/upstream/upstreamtest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"ca": func() {
			os.Exit(cli.Main(run)) //nolint:forbidigo // this is the main of the program that the scripts call
		},
		"makejournal": func() {
			os.Exit(makeJournal()) //nolint:forbidigo // as above
		},
		"journal": func() {
			if err := writePast(os.Args[1:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1) //nolint:forbidigo // this is a main too
			}
		},
	})
}

// TestScripts runs testdata/script/*.txtar: what an operator types, and reads.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"await": await,
			"page":  page,
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("MESHID_ADMIN_SOCKET", e.WorkDir+"/admin.sock")
			return writeUpstream(t, e.WorkDir+"/upstream")
		},
	})
}

// writeUpstream puts an operator's CA into dir: ca.pem, ca-key.pem and roots.pem.
func writeUpstream(t *testing.T, dir string) error {
	a := upstreamtest.NewAuthority(t, upstreamtest.Good)
	return errors.Join(
		os.Mkdir(dir, 0o700),
		os.WriteFile(dir+"/ca.pem", upstreamtest.PEM(a.Issuer), 0o600),
		os.WriteFile(dir+"/ca-key.pem", upstreamtest.KeyPEM(t, a.Key), 0o600),
		os.WriteFile(dir+"/roots.pem", upstreamtest.PEM(a.Root), 0o600),
	)
}

// page executes the commands in those blocks of a page that are labelled with a
// word, and compares what they print: "…" in a line stands for what differs each
// time.
func page(ts *testscript.TestScript, _ bool, args []string) {
	b, err := os.ReadFile(args[0])
	ts.Check(err)
	blocks := strings.Split(string(b), "```text "+args[1]+"\n")[1:]
	if len(blocks) == 0 {
		ts.Fatalf("%s has no block %q", args[0], args[1])
	}
	for _, block := range blocks {
		block, _, _ = strings.Cut(block, "```")
		for _, example := range strings.Split("\n"+block, "\n$ ")[1:] {
			line, want, _ := strings.Cut(strings.TrimSuffix(example, "\n"), "\n")
			_ = ts.Exec("sh", "-c", line+" 2>&1") // an exit code is part of what is printed, if it matters
			pattern := strings.ReplaceAll(regexp.QuoteMeta(want), "…", ".*")
			if got := strings.TrimSuffix(ts.ReadFile("stdout"), "\n"); !regexp.MustCompile("^" + pattern + "$").MatchString(got) {
				ts.Fatalf("$ %s\n%s\n%s has:\n%s", line, got, args[0], want)
			}
		}
	}
}

// await runs a program again and again until it prints something: what it asks for
// is on its way.
func await(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(time.Minute); ; {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil && ts.ReadFile("stdout") != "" {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v prints nothing: %v\n%s", args, err, ts.ReadFile("stderr"))
		}
	}
}

// The type of a flag is one word: pflag takes what stands in backquotes in its usage
// for it.
func TestUsageOfFlags(t *testing.T) {
	seen := 0
	var look func(c *cobra.Command)
	look = func(c *cobra.Command) {
		for line := range strings.Lines(c.LocalFlags().FlagUsages()) {
			seen++
			head, _, _ := strings.Cut(strings.TrimSpace(line), "   ") // then comes the usage
			if long := head[strings.Index(head, "--"):]; len(strings.Fields(long)) > 2 {
				t.Errorf("%s: %s", c.CommandPath(), line)
			}
		}
		for _, below := range c.Commands() {
			look(below)
		}
	}
	look(newRoot())
	if seen < 100 {
		t.Errorf("only %d flags were looked at", seen)
	}
}
