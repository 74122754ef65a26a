package main

import (
	"errors"
	"os"
	"testing"

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
	})
}

// TestScripts runs testdata/script/*.txtar: what an operator types, and reads.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
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
