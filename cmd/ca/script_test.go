package main

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

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
